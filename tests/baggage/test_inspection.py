import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from baggage import picture_checks
from baggage.dataset_numbers import PUBLISHED, beside_published, dataset_numbers, describe, published_differences
from baggage.faults import FAULTS
from baggage.identity_checks import identity_faults
from baggage.inspection import inspect
from baggage.picture_checks import copy_faults, measure_pictures, picture_faults
from core.data.reid_datasets import load_reid_dataset
from core.errors import InputError

TRAIN, GALLERY, PROBE = "MVB_train/Info/train.json", "MVB_val/Info/val_gallery.json", "MVB_val/Info/val_probe.json"
FOLDERS = {TRAIN: "MVB_train/Image", GALLERY: "MVB_val/Image/gallery", PROBE: "MVB_val/Image/probe"}


@pytest.fixture
def root(baggage, tmp_path):
    """A whole set to break: identities 0001 .. 0006 to train on, 0007 .. 0009 to test, each g_1, g_2, p_1, p_2."""
    return shutil.copytree(baggage, tmp_path / "set", ignore=shutil.ignore_patterns("scenes"))


def found(root, read=True):
    """All faults. Without `read` the pictures stay unread, for faults that can't depend on them."""
    survey = inspect(root)
    survey.faults.extend(identity_faults(survey.pictures))
    if read:
        measures = measure_pictures(survey.files, 2)
        survey.faults.extend(picture_faults(survey, measures) + copy_faults(survey, measures))
    assert {fault.kind for fault in survey.faults} <= set(FAULTS)
    for fault in survey.faults:
        assert (
            len(f"{fault.where}{fault.message}".splitlines()) == 1 and str(root) not in f"{fault.where}{fault.message}"
        )
        assert all((root / path).exists() for path in fault.paths)
    return survey.faults


def kinds(faults):
    return sorted(fault.kind for fault in faults)


def edit(root, name, change):
    """`change` gets the list's entries, and changes them or returns others."""
    content = json.loads((root / name).read_text())
    changed = change(content["image"])
    content["image"] = content["image"] if changed is None else changed
    (root / name).write_text(json.dumps(content))


def entry_of(root, name, image_name):
    return next(e for e in json.loads((root / name).read_text())["image"] if e["image_name"] == image_name)


def update(root, name, image_name, /, **fields):
    """Change fields of one entry; a field of ... is removed. Returns where the faults should be."""
    places = []

    def change(entries):
        for place, entry in enumerate(entries):
            if entry["image_name"] == image_name:
                places.append(f"{name}, entry {place} ({fields.get('image_name', image_name)})")
                entry.update(fields)
                for field in [field for field, value in fields.items() if value is ...]:
                    del entry[field]

    edit(root, name, change)
    return places[0]


def remove(root, name, start):
    """Take pictures and entries out."""
    edit(root, name, lambda entries: [entry for entry in entries if not entry["image_name"].startswith(start)])
    for path in (root / FOLDERS[name]).glob(f"{start}*"):
        path.unlink()


def add(root, name, image_name, picture, **fields):
    """One more picture with its entry."""
    picture.save(root / FOLDERS[name] / image_name)
    entry = {"image_name": image_name, "id": image_name[:4], "datatype": image_name[5], "material": "soft"}
    entry |= {"dimsize": list(picture.size)} | fields
    edit(root, name, lambda entries: entries.append(entry))


def noise(width, height, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def deep(factor, seed=0):
    """Grey noise of 8 bits times `factor`, in 16 bits."""
    return Image.fromarray(np.asarray(noise(60, 50, seed).convert("L")).astype(np.uint16) * factor)


def test_clean_sets_have_no_faults(baggage, root):
    assert found(baggage) == found(root) == []


def test_a_root_that_is_no_mvb(tmp_path):
    with pytest.raises(InputError, match="not laid out as mvb"):
        inspect(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        inspect(tmp_path / "absent")


# Identities ----------------------------------------------------------------------------------------------------------


def test_identity_on_one_side_of_security(root):
    remove(root, TRAIN, "0002_p")
    (fault,) = found(root)
    assert fault[:2] == ("one_source", "identity 0002") and "only before security" in fault.message


@pytest.mark.parametrize(("listing", "message"), [(PROBE, "only in the gallery"), (GALLERY, "only in the probe")])
def test_identity_in_one_split(root, listing, message):
    remove(root, listing, "0008")
    (fault,) = found(root)
    assert fault[:2] == ("one_split", "identity 0008") and message in fault.message


def test_identity_in_train_and_test(root):
    for listing in (GALLERY, PROBE):
        for path in (root / FOLDERS[listing]).glob("0007*"):
            path.rename(path.with_name(path.name.replace("0007", "0001")))
            update(root, listing, path.name, image_name=path.name.replace("0007", "0001"), id="0001")
    (fault,) = found(root)
    assert fault[:2] == ("identity_in_train_and_test", "identity 0001")
    assert fault.message == "pictures: 4 in train, 2 in gallery, 2 in probe"


# Pictures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["same", "quality", "scale", "brightness", "png"])
def test_copy_within_a_split(root, change):
    original = Image.open(root / "MVB_train/Image/0003_g_1.jpg").convert("RGB")
    copy, name = original, f"0003_g_9.{'png' if change == 'png' else 'jpg'}"
    if change == "scale":
        copy = original.resize((original.width * 2 // 3, original.height * 2 // 3))
    if change == "brightness":
        copy = original.point(lambda value: min(255, round(1.15 * value)))
    add(root, TRAIN, name, copy, material="hard")
    if change == "same":
        shutil.copy(root / "MVB_train/Image/0003_g_1.jpg", root / "MVB_train/Image" / name)
    if change == "quality":
        copy.save(root / "MVB_train/Image" / name, quality=30)
    (fault,) = found(root)
    assert fault[:2] == ("copies", "MVB_train/Image/0003_g_1.jpg")
    assert fault.message == f"the same picture as MVB_train/Image/{name}"


def test_copy_across_splits_under_another_identity(root):
    add(root, GALLERY, "0007_g_9.jpg", Image.open(root / "MVB_train/Image/0003_g_1.jpg"))
    (fault,) = found(root)
    assert fault.kind == "copies_across_splits"
    assert fault.paths == ("MVB_train/Image/0003_g_1.jpg", "MVB_val/Image/gallery/0007_g_9.jpg")
    assert "different identities: 0003, 0007; in train and gallery" in fault.message


@pytest.mark.parametrize("kind", ["cut", "empty", "text"])
def test_unreadable(root, kind):
    path = root / "MVB_val/Image/probe/0008_p_1.jpg"
    content = {"cut": path.read_bytes()[:900], "empty": b"", "text": b"no picture"}
    path.write_bytes(content[kind])
    (fault,) = found(root)
    assert fault[:2] == ("unreadable", "MVB_val/Image/probe/0008_p_1.jpg") and "can't be read" in fault.message


def test_single_coloured_pictures_are_not_copies_of_each_other(root):
    for name in ("0001_g_1", "0002_g_1"):
        path = root / f"MVB_train/Image/{name}.jpg"
        Image.new("RGB", Image.open(path).size, (90, 120, 60)).save(path)
    assert [fault[:2] for fault in found(root)] == [
        ("single_coloured", "MVB_train/Image/0001_g_1.jpg"),
        ("single_coloured", "MVB_train/Image/0002_g_1.jpg"),
    ]


@pytest.mark.parametrize(
    ("factor", "kind"),
    [(257, None), (16, "wrong_bit_depth"), (4, "wrong_bit_depth"), (1, "wrong_bit_depth"), (0, "single_coloured")],
)
@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_bits_that_are_not_filled(root, factor, kind, suffix):
    """8 bits as 16, as 12 of 16, as 10 of 16, as they are; nothing at all: beside a picture that fills 16."""
    add(root, TRAIN, f"0002_g_9.{suffix}", deep(257, seed=7))
    name = f"0003_g_9.{suffix}"
    add(root, TRAIN, name, deep(factor))
    faults = [fault[:2] for fault in found(root)]
    assert faults == ([(kind, f"MVB_train/Image/{name}")] if kind else [])


@pytest.mark.parametrize("factor", [16, 4, 1])
def test_pictures_that_all_use_few_bits_are_read_by_them(root, factor, capsys):
    """One that fills far fewer than the others is nearly black beside them."""
    for name in ("0003_g_8.png", "0003_g_9.png"):
        add(root, TRAIN, name, deep(factor, seed=int(name[7])))
    assert found(root) == []
    bits = 8 + factor.bit_length() - 1
    assert f"pictures of 16 bits use {bits} of them" in capsys.readouterr().out
    if factor == 16:
        add(root, TRAIN, "0004_g_9.png", Image.fromarray(np.asarray(deep(1)) // 2))
        assert [fault[:2] for fault in found(root)] == [("wrong_bit_depth", "MVB_train/Image/0004_g_9.png")]


def test_how_many_bits_are_filled_is_said(root):
    values = np.array(deep(16))
    values[0, 0] = 4080
    add(root, TRAIN, "0002_g_9.png", deep(257, seed=7))
    add(root, TRAIN, "0003_g_9.png", Image.fromarray(values))
    assert "its values reach 4,080 of 65,535" in found(root)[0].message


def test_tiny(root):
    add(root, TRAIN, "0003_g_8.jpg", noise(32, 32))
    add(root, TRAIN, "0003_g_9.jpg", noise(50, 31, seed=1))
    (fault,) = found(root)
    assert fault[:3] == ("tiny", "MVB_train/Image/0003_g_9.jpg", "50x31 pixels; a side of 32 is the least")


def test_entry_of_another_size_and_one_turned_by_exif(root):
    where = update(root, TRAIN, "0003_g_1.jpg", dimsize=[999, 10])
    path = root / "MVB_train/Image/0004_g_1.jpg"
    picture, exif = Image.open(path), Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees; box, mask and dimsize are those of the stored picture
    picture.save(path, exif=exif)
    (fault,) = found(root)
    assert fault[:2] == ("wrong_size", where) and "says 999x10" in fault.message


@pytest.mark.parametrize(("bbox", "message"), [([5, -3, 20, 20], "partly"), ([900, 5, 20, 20], "wholly")])
def test_box_outside(root, bbox, message):
    where = update(root, GALLERY, "0007_g_1.jpg", bbox=bbox)
    (fault,) = found(root)
    assert fault[:2] == ("box_outside", where) and f"lies {message} outside the picture" in fault.message


def test_a_box_may_count_the_last_pixel_as_inside(root):
    width, height = entry_of(root, GALLERY, "0007_g_1.jpg")["dimsize"]
    update(root, GALLERY, "0007_g_1.jpg", bbox=[-0.5, 0, width + 1, height + 1])
    assert found(root) == []


def test_masks(root):
    mask = entry_of(root, TRAIN, "0001_g_1.jpg")["segmentation"]
    other = update(root, TRAIN, "0001_g_1.jpg", segmentation=mask | {"size": [mask["size"][0] + 1, mask["size"][1]]})
    width, height = entry_of(root, TRAIN, "0002_g_1.jpg")["dimsize"]
    damaged = update(root, TRAIN, "0002_g_1.jpg", segmentation={"size": [height, width], "counts": "abc"})
    width, height = entry_of(root, TRAIN, "0003_g_1.jpg")["dimsize"]
    empty = update(root, TRAIN, "0003_g_1.jpg", segmentation={"size": [height, width], "counts": [height * width]})
    assert [fault[:2] for fault in found(root)] == [
        ("mask_of_another_size", other),
        ("mask_damaged", damaged),
        ("mask_damaged", empty),
    ]


def test_a_mask_is_decoded_once(root, monkeypatch):
    decoded, area = [], picture_checks.mask_area
    monkeypatch.setattr(picture_checks, "mask_area", lambda picture: (decoded.append(picture), area(picture))[1])
    assert found(root) == [] and len(decoded) == 36
    (root / "MVB_train/Image/0001_g_1.jpg").write_bytes(b"")  # its mask is looked at all the same
    width, height = entry_of(root, TRAIN, "0001_g_1.jpg")["dimsize"]
    update(root, TRAIN, "0001_g_1.jpg", segmentation={"size": [height, width], "counts": [height * width]})
    assert kinds(found(root)) == ["mask_damaged", "unreadable"] and len(decoded) == 72


# Metadata ------------------------------------------------------------------------------------------------------------


def test_metadata_without_picture_and_picture_without_metadata(root):
    (root / "MVB_train/Image/0001_g_2.jpg").unlink()
    noise(60, 50).save(root / "MVB_val/Image/gallery/9999_g_1.jpg")
    (root / "MVB_train/Image/notes.txt").touch()
    (root / "MVB_train/Image/.hidden.jpg").touch()
    without_picture, without_metadata = found(root)
    assert (
        without_picture.kind == "metadata_without_picture" and "train.json, entry 1 (0001_g_2" in without_picture.where
    )
    assert without_metadata[:2] == ("picture_without_metadata", "MVB_val/Image/gallery/9999_g_1.jpg")


@pytest.mark.parametrize(
    ("source", "folder", "kind", "parts"),
    [
        ("MVB_val/Image/gallery/0008_g_1.jpg", "MVB_val/Image/probe", "copies_across_splits", "gallery and probe"),
        ("MVB_val/Image/probe/0008_p_1.jpg", "MVB_val/Image/gallery", "copies_across_splits", "probe and gallery"),
        ("MVB_train/Image/0003_g_1.jpg", "MVB_val/Image/probe", "copies_across_splits", "train and probe"),
        ("MVB_val/Image/probe/0008_p_1.jpg", "MVB_train/Image", "copies_across_splits", "probe and train"),
        ("MVB_train/Image/0003_g_1.jpg", "MVB_train/Image/more", "copies", None),
        ("MVB_train/Image/0003_g_1.jpg", "MVB_val/Image", "copies", None),  # in none of the three
    ],
)
def test_an_unlisted_copy_under_the_name_of_a_listed_picture(root, source, folder, kind, parts):
    (root / folder).mkdir(exist_ok=True)
    stray = f"{folder}/{os.path.basename(source)}"
    shutil.copy(root / source, root / stray)
    without_metadata, copies = found(root)
    assert without_metadata[:3] == ("picture_without_metadata", stray, "no entry lists it")
    assert (copies.kind, copies.where, copies.paths) == (kind, source, (source, stray))
    leak = f"; in {parts}; no entry lists {stray}, which does no harm before one does"
    assert copies.message == f"the same picture as {stray}" + (leak if parts else "")
    survey = inspect(root)
    numbers = dataset_numbers(survey, measure_pictures(survey.pictures))
    assert numbers["pictures"]["all"] == 36 and numbers["identities"]["all"] == 9


def test_unlisted_pictures_are_looked_at(root):
    (root / "MVB_val/Image/probe/rubbish.jpg").write_bytes(b"\xff\xd8")
    noise(60, 20).save(root / "MVB_train/Image/tiny.png")
    Image.new("RGB", (60, 60)).save(root / "MVB_train/Image/flat.png")
    where = update(root, TRAIN, "0004_p_1.jpg", id=None)  # this one is listed, but of no bag
    (root / "MVB_train/Image/0004_p_1.jpg").write_bytes(b"")
    assert sorted(fault[:2] for fault in found(root)) == [
        ("metadata", where),
        ("picture_without_metadata", "MVB_train/Image/flat.png"),
        ("picture_without_metadata", "MVB_train/Image/tiny.png"),
        ("picture_without_metadata", "MVB_val/Image/probe/rubbish.jpg"),
        ("single_coloured", "MVB_train/Image/flat.png"),
        ("tiny", "MVB_train/Image/tiny.png"),
        ("unreadable", "MVB_train/Image/0004_p_1.jpg"),
        ("unreadable", "MVB_val/Image/probe/rubbish.jpg"),
    ]


@pytest.mark.parametrize("fields", [{"datatype": "p"}, {"datatype": "q"}, {"datatype": "q", "image_name": "bag.jpg"}])
def test_a_picture_whose_entry_is_wrong_about_its_side_is_listed(root, fields):
    update(root, GALLERY, "0008_g_1.jpg", **fields)
    if "image_name" in fields:
        (root / FOLDERS[GALLERY] / "0008_g_1.jpg").rename(root / FOLDERS[GALLERY] / "bag.jpg")
    assert "picture_without_metadata" not in kinds(found(root))


def test_a_name_that_leads_out_of_the_split(root):
    names = ["../../MVB_val/Image/gallery/0007_g_1.jpg", str(root.parent / "0001_g_1.jpg")]
    shutil.copy(root / "MVB_train/Image/0001_g_1.jpg", names[1])
    fields = {"id": "0001", "datatype": "g", "material": "soft", "dimsize": [60, 50]}
    edit(root, TRAIN, lambda entries: entries.extend({"image_name": name} | fields for name in names))
    faults = inspect(root).faults
    assert kinds(faults) == ["metadata", "metadata"]
    assert {fault.message for fault in faults} == {"image_name leads out of MVB_train/Image; name a picture in it"}
    pictures = [picture for picture in inspect(root).pictures if (picture.path or "0007_g_1").count("0007_g_1")]
    assert [(picture.part, picture.exists) for picture in pictures] == [("train", False)] * 2 + [("gallery", True)]


@pytest.mark.parametrize(("listing", "side"), [(GALLERY, "gallery"), (PROBE, "probe")])
def test_a_name_that_leads_to_the_other_side_of_the_test(root, listing, side):
    """Training refuses it; the picture that it leads to keeps its own entry, and counts."""
    other = {"gallery": "../probe/0008_p_1.jpg", "probe": "../gallery/0008_g_1.jpg"}[side]
    edit(root, listing, lambda entries: entries.append(entries[2] | {"image_name": other}))
    (fault,) = found(root)
    assert fault[:2] == ("metadata", f"{listing}, entry 6 ({other})")
    assert fault.message == f"image_name leads out of MVB_val/Image/{side}; name a picture in it"
    with pytest.raises(InputError) as refused:
        load_reid_dataset("mvb", root)
    assert str(refused.value) == f"{root / listing}, entry 6 ({other}): {fault.message}"
    assert [picture.exists for picture in inspect(root).pictures].count(True) == 36


def test_links_to_folders(root):
    shared = root / "MVB_val/shared"  # both sides in one folder
    shutil.copytree(root / FOLDERS[PROBE], shutil.copytree(root / FOLDERS[GALLERY], shared), dirs_exist_ok=True)
    for listing in (GALLERY, PROBE):
        shutil.rmtree(root / FOLDERS[listing])
        (root / FOLDERS[listing]).symlink_to(shared)
    (shared / "up").symlink_to(root / "MVB_val/Image")
    (root / "MVB_train/Image/self").symlink_to(".")
    noise(60, 50).save(root / "MVB_train/Image/stray.png")
    (fault,) = found(root)  # once
    assert fault[:2] == ("picture_without_metadata", "MVB_train/Image/stray.png")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id": ...}, "has no id"),
        ({"datatype": ...}, "has no datatype"),
        ({"material": ...}, "has no material"),
        ({"material": None}, "has no material"),
        ({"dimsize": ...}, "has no dimsize"),
        ({"id": 5.5}, "needs an id, a text or a number of at most 18 digits, found 5.5"),
        ({"id": True}, "needs an id"),
        ({"id": ""}, "needs an id"),
        ({"id": " \n "}, "needs an id"),
        ({"id": "9" * 5000}, "needs an id"),
        ({"datatype": "q"}, "needs a datatype, 'g' or 'p', found 'q'"),
        ({"datatype": ["g"]}, "needs a datatype"),
        ({"material": 3}, "material has to be a text, found 3"),
        ({"dimsize": "big"}, "dimsize has to be [width, height]"),
        ({"dimsize": [0, 10]}, "dimsize has to be [width, height]"),
        ({"dimsize": [10**400, 64]}, "dimsize has to be [width, height]"),
        ({"dimsize": [10**5, 10**5]}, "dimsize has to be [width, height]"),
        ({"dimsize": [True, 64]}, "dimsize has to be [width, height]"),
        ({"bbox": "here"}, "bbox has to be [x, y, width, height]"),
        ({"bbox": [1, 2, 3]}, "bbox has to be"),
        ({"bbox": [1, 2, -3, 4]}, "bbox has to be"),
        ({"bbox": [float("nan"), 2, 3, 4]}, "bbox has to be"),
        ({"bbox": [10**400, 2, 3, 4]}, "bbox has to be"),
        ({"segmentation": [[1, 2, 3, 4, 5, 6]]}, "segmentation has to be COCO run lengths"),
        ({"segmentation": {"size": [1, 2]}}, "segmentation has to be COCO run lengths"),
        ({"segmentation": {"size": [0, 2], "counts": []}}, "segmentation has to be COCO run lengths"),
        ({"segmentation": {"size": [10**8, 10**8], "counts": [10**16]}}, "segmentation has to be COCO run lengths"),
    ],
)
def test_fields_that_lack_or_are_of_the_wrong_type(root, fields, message):
    where = update(root, TRAIN, "0004_p_1.jpg", **fields)
    (fault,) = found(root, read=False)
    assert fault[:2] == ("metadata", where) and message in fault.message


@pytest.mark.parametrize(
    "fields",
    [
        {"bbox": [1, 2, 3, 4], "dimsize": [10**400, 64]},
        {"segmentation": {"size": [10**8, 10**8], "counts": [10**16]}},
        {"segmentation": {"size": [10**8, 10**8], "counts": "PPYo1"}, "dimsize": ...},
    ],
)
def test_sizes_that_no_picture_has_where_no_picture_is(root, fields):
    update(root, TRAIN, "0004_p_1.jpg", **fields)
    (root / "MVB_train/Image/0004_p_1.jpg").unlink()
    assert set(kinds(found(root))) == {"metadata", "metadata_without_picture"}


def test_sizes_as_floats_are_those_that_training_reads(root):
    width, height = entry_of(root, TRAIN, "0004_p_1.jpg")["dimsize"]
    mask = {"size": [float(height), float(width)], "counts": [height, height * (width - 1)]}
    bbox = [1, 2, 3, 4]  # with a box, training looks at dimsize too
    update(root, TRAIN, "0004_p_1.jpg", dimsize=[float(width), float(height)], segmentation=mask, bbox=bbox)
    load_reid_dataset("mvb", root)
    assert found(root) == []
    where = update(root, TRAIN, "0004_p_1.jpg", dimsize=[width + 0.5, height])
    load_reid_dataset("mvb", root)
    assert [fault[:2] for fault in found(root)] == [("wrong_size", where)]


def test_every_wrong_field_of_an_entry_is_named(root):
    where = update(root, TRAIN, "0004_p_1.jpg", bbox="here", segmentation=7, material=[], dimsize=None)
    faults = found(root)
    assert kinds(faults) == ["metadata"] * 4 and {fault.where for fault in faults} == {where}


@pytest.mark.parametrize("entry", [7, None, "0004_p_9.jpg", [], {}, {"image_name": 7}, {"image_name": ""}])
def test_entries_that_name_no_picture(root, entry):
    edit(root, TRAIN, lambda entries: entries.append(entry))
    (fault,) = found(root, read=False)
    assert fault[:2] == ("metadata", f"{TRAIN}, entry 24")


def test_what_follows_from_an_entry_without_a_name_is_not_listed(root):
    edit(root, TRAIN, lambda entries: [None, *entries[1:-1], {"image_name": None}])
    assert kinds(found(root)) == ["metadata", "metadata"]  # and not the two pictures that they may have named
    noise(60, 50).save(root / "MVB_train/Image/stray.png")
    assert kinds(found(root)) == ["metadata"] * 2 + ["picture_without_metadata"] * 3
    edit(root, GALLERY, lambda entries: [None] * len(entries))
    faults = [fault for fault in found(root) if "MVB_val" in fault.where]
    assert kinds(faults) == ["metadata"] * 6


def test_a_name_that_is_no_text_anywhere(root):
    edit(root, TRAIN, lambda entries: entries.append({"image_name": "\ud800\n\0.jpg", "id": "0001", "datatype": "g"}))
    faults = found(root)  # material and dimsize lack too
    assert kinds(faults) == ["metadata", "metadata", "metadata_without_picture"]
    assert all("\ufffd\\n\\x00" in fault.where for fault in faults)


def test_ids_as_numbers_and_as_text_mixed(root):
    where = update(root, TRAIN, "0004_p_1.jpg", id=4)
    (fault,) = found(root)
    assert fault[:3] == ("mixed_ids", where, "id 4 is a number, and others of this list are text")
    edit(root, TRAIN, lambda entries: [entry | {"id": int(entry["id"])} for entry in entries])
    said = f"ids are numbers here, and text in {GALLERY} and {PROBE}; training reads 1 and '0001' as one bag"
    between = ("mixed_ids", TRAIN, said)
    assert [fault[:3] for fault in found(root, read=False)] == [between]  # once, and not for each entry
    where = update(root, TRAIN, "0004_p_1.jpg", id="4")
    assert [fault[:2] for fault in found(root, read=False)] == [("mixed_ids", where), between[:2]]
    assert len(load_reid_dataset("mvb", root).train) == 24


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("4", "id '4' is the bag that this list else spells '0004'"),
        ("0004 ", "id '0004 ' has blanks around it, which training takes off"),
        ("\t4", "id '\\t4' has blanks around it, which training takes off"),
    ],
)
def test_a_bag_in_two_spellings_is_one(root, baggage, given, message):
    where = update(root, TRAIN, "0004_p_1.jpg", id=given)
    (fault,) = found(root, read=False)
    assert fault[:3] == ("mixed_ids", where, message)
    samples, clean = (load_reid_dataset("mvb", folder).train for folder in (root, baggage))
    assert [sample.id for sample in samples] == [sample.id for sample in clean]


def test_bags_that_two_lists_spell_differently(root):
    edit(root, PROBE, lambda entries: [entry | {"id": str(int(entry["id"]))} for entry in entries])
    (fault,) = found(root, read=False)
    message = f"id '7' is spelled '0007' in {GALLERY} (bags in two spellings: 3)"
    assert fault[:3] == ("mixed_ids", PROBE, message)


def test_lists_without_ids_are_of_no_type(root):
    edit(root, GALLERY, lambda entries: [{"image_name": entry["image_name"]} for entry in entries])
    edit(root, TRAIN, lambda entries: [entry | {"id": int(entry["id"])} for entry in entries])
    edit(root, PROBE, lambda entries: [entry | {"id": int(entry["id"])} for entry in entries])
    assert found(root, read=False) == []


def test_names_that_disagree_with_their_entries(root):
    where = update(root, TRAIN, "0004_p_1.jpg", id="0005")
    faults = found(root)
    assert [fault[:2] for fault in faults] == [("name_disagrees", where)] and "name says identity 0004" in faults[
        0
    ].message
    update(root, TRAIN, "0004_p_1.jpg", id="0004", datatype="g")
    assert [fault[:2] for fault in found(root)] == [("name_disagrees", where)]


def test_a_word_where_names_say_the_ids(root):
    where = update(root, TRAIN, "0004_p_1.jpg", id="0004a")
    faults = found(root, read=False)
    assert faults[0][:3] == ("name_disagrees", where, "the name says identity 0004, the entry 0004a")
    edit(root, TRAIN, lambda entries: [entry | {"id": f"bag {entry['image_name'][:4]}"} for entry in entries])
    assert found(root, read=False) == []  # here they are words throughout


def test_entries_listed_twice(root):
    first = entry_of(root, TRAIN, "0001_g_1.jpg")
    edit(root, TRAIN, lambda entries: entries.extend([first, first | {"id": "0002"}]))
    shutil.copy(root / GALLERY, root / "MVB_val/Info/copy_of_gallery.json")  # allowed
    faults = found(root)
    twice = [fault for fault in faults if fault.kind == "listed_twice"]
    assert [fault.where for fault in twice] == [f"{TRAIN}, entry {place} (0001_g_1.jpg)" for place in (24, 25)]
    assert "of identity 0002, and 0001 in" in twice[1].message
    assert kinds(faults) == ["listed_twice", "listed_twice", "name_disagrees"]


@pytest.mark.parametrize("text", ["{", '"text"', '{"image": 7}', "[" * 100_000, "9" * 5000])
def test_a_list_that_cannot_be_read_is_one_fault(root, text):
    (root / TRAIN).write_text(text)
    (fault,) = found(root, read=False)
    assert fault[:2] == ("metadata", TRAIN)


def test_a_list_that_is_no_text(root):
    (root / PROBE).write_bytes(b"\xff\xfe\x00\xd8")
    assert [fault[:2] for fault in found(root)] == [("metadata", PROBE)]


@pytest.mark.parametrize(
    ("gone", "where"),
    [
        (TRAIN, TRAIN),
        ("MVB_val/Info", "MVB_val/Info"),
        ("MVB_train/Image", "MVB_train/Image"),
        ("MVB_val/Image/probe", "MVB_val/Image/probe"),
    ],
)
def test_missing_lists_and_folders_are_one_fault_each(root, gone, where):
    shutil.rmtree(root / gone) if (root / gone).is_dir() else (root / gone).unlink()
    assert [fault[:2] for fault in found(root, read=False)] == [("missing_part", where)]


def test_a_side_without_entries_is_one_fault(root):
    remove(root, PROBE, "")
    remove(root, TRAIN, "0001_g")
    remove(root, TRAIN, "0002_g")
    faults = found(root)
    assert [fault.where for fault in faults if fault.kind == "missing_part"] == ["MVB_val/Info"]
    assert [fault.where for fault in faults if fault.kind == "one_source"] == ["identity 0001", "identity 0002"]
    assert len(faults) == 3


def test_nothing_in_it(tmp_path):
    (tmp_path / "MVB_train").mkdir()
    assert kinds(found(tmp_path)) == ["missing_part"] * 2
    survey = inspect(tmp_path)
    numbers = dataset_numbers(survey, measure_pictures(survey.pictures))
    assert numbers["pictures"]["all"] == numbers["identities"]["all"] == 0
    json.dumps(numbers, allow_nan=False)


def test_views_are_counted_once_whatever_pictures_they_have(root):
    remove(root, TRAIN, "0001_g_2")
    for number, name in enumerate(("0001_g_1_2.jpg", "0001_g_1_3.jpg", "0002_g_7.jpg", "0003_g.jpg", "0003_g_.jpg")):
        add(root, TRAIN, name, noise(60, 50, seed=number))
    survey = inspect(root)
    numbers = dataset_numbers(survey, measure_pictures(survey.pictures))
    assert sum(picture.view is None for picture in survey.pictures) == 2
    assert numbers["views_per_source"]["g"]["histogram"] == {"1": 1, "2": 6, "3": 1, "4": 1}
    assert numbers["pictures_per_identity"]["train"]["histogram"] == {"4": 3, "5": 2, "6": 1}


def test_a_side_whose_entries_are_all_refused_does_not_lack(root):
    edit(root, PROBE, lambda entries: [{**entry, "id": None} for entry in entries])
    assert set(kinds(found(root, read=False))) == {"metadata"}


def test_all_at_once(root):
    remove(root, TRAIN, "0002_p")
    remove(root, PROBE, "0008")
    add(root, GALLERY, "0007_g_9.jpg", Image.open(root / "MVB_train/Image/0003_g_1.jpg"))
    (root / "MVB_train/Image/0005_g_1.jpg").write_bytes(b"")
    (root / "MVB_train/Image/0006_g_1.jpg").unlink()
    noise(60, 50).save(root / "MVB_train/Image/stray.png")
    update(root, GALLERY, "0009_g_1.jpg", bbox=[900, 5, 20, 20])
    update(root, TRAIN, "0004_p_1.jpg", datatype="q")
    assert kinds(found(root)) == sorted(
        [
            *("one_source", "one_split", "copies_across_splits", "unreadable", "metadata_without_picture"),
            *("picture_without_metadata", "box_outside", "metadata"),
        ]
    )


def test_published_counts(baggage, monkeypatch):
    assert PUBLISHED["pictures"] == sum(PUBLISHED[part] for part in ("train", "gallery", "probe"))
    pictures = inspect(baggage).pictures
    assert [one["here"] for one in beside_published(pictures).values()] == [9, 36, 24, 6, 6]
    for name, one in beside_published(pictures).items():
        monkeypatch.setitem(PUBLISHED, name, one["here"])
    assert published_differences(beside_published(pictures)) == []
    lines = published_differences(beside_published(pictures[:-1]))
    assert lines == ["pictures: 35, and the published set has 36", "probe: 5, and the published set has 6"]


# The converted layout ------------------------------------------------------------------------------------------------


def write_converted(root):
    names = {
        "bounding_box_train": ["0001_g_1", "0001_p_1"],
        "query": ["0002_p_1", "0003_p_1"],
        "bounding_box_test": ["0002_g_1", "0003_g_1"],
    }
    for folder, files in names.items():
        (root / folder).mkdir(parents=True)
        for name in files:
            noise(60, 50, seed=sum(map(ord, folder + name)) * 7).save(root / folder / f"{name}.jpg")
    return root


def test_converted(tmp_path):
    root = write_converted(tmp_path)
    assert found(root) == []
    survey = inspect(root)
    assert (survey.layout, survey.both, len(survey.pictures)) == ("converted", False, 6)
    noise(60, 50, seed=5).save(root / "query" / "17.jpg")
    shutil.copy(root / "query" / "0003_p_1.jpg", root / "bounding_box_train" / "0003_p_1.jpg")
    assert [fault[:2] for fault in found(root)] == [
        ("picture_without_metadata", "query/17.jpg"),
        ("identity_in_train_and_test", "identity 0003"),
        ("copies_across_splits", "bounding_box_train/0003_p_1.jpg"),
    ]
    shutil.copy(root / "bounding_box_test" / "0003_g_1.jpg", root / "query" / "18.jpg")
    assert found(root)[-1][:2] == ("copies_across_splits", "bounding_box_test/0003_g_1.jpg")


def test_converted_in_parts_and_both_layouts(tmp_path, root):
    converted = write_converted(tmp_path / "converted")
    shutil.rmtree(converted / "query")
    assert [fault[:2] for fault in found(converted)] == [("missing_part", "query")]
    for folder in ("bounding_box_train", "bounding_box_test"):
        os.rename(converted / folder, root / folder)
    assert (inspect(root).layout, inspect(root).both) == ("original", True)
    (root / "query").mkdir()
    assert (inspect(root).layout, inspect(root).both) == ("converted", True)


# Numbers -------------------------------------------------------------------------------------------------------------


def test_numbers(root):
    remove(root, TRAIN, "0001_g_2")
    update(
        root,
        TRAIN,
        "0001_g_1.jpg",
        bbox=[0, 0, *[side / 2 for side in entry_of(root, TRAIN, "0001_g_1.jpg")["dimsize"]]],
    )
    survey = inspect(root)
    measures = measure_pictures(survey.pictures)
    numbers = dataset_numbers(survey, measures)
    assert numbers["pictures"] == {"all": 35, "train": 23, "gallery": 6, "probe": 6}
    assert numbers["identities"] == {"all": 9, "train": 6, "gallery": 3, "probe": 3}
    assert numbers["pictures_by_source"]["train"] == {"g": 11, "p": 12}
    assert numbers["pictures_per_identity"]["train"]["histogram"] == {"3": 1, "4": 5}
    assert numbers["views_per_source"]["g"]["histogram"] == {"1": 1, "2": 8}
    assert numbers["view_numbers"] == {"g": {"1": 9, "2": 8}, "p": {"1": 9, "2": 9}}
    assert (
        sum(numbers["materials"]["pictures"].values()) == 35 and sum(numbers["materials"]["identities"].values()) == 9
    )
    assert numbers["coverage"]["train"]["box"]["share"]["min"] == 0.25 == measures[0].box_share
    assert numbers["coverage"]["probe"]["mask"]["with"] == 6
    width, height = entry_of(root, TRAIN, "0001_g_1.jpg")["dimsize"]
    assert measures[0].size == (width, height)
    assert numbers["faults"] == {"all": 0, "by_kind": {}, "list": []}


def test_describe_by_hand():
    assert describe([4, 1, 1, 2]) == {"count": 4, "min": 1, "mean": 2.0, "median": 1.5, "max": 4}
    assert describe([]) is None
