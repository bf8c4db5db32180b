import json
import os
import shutil

import pytest
from PIL import Image

from baggage.conversion import check_target, convert, identity_numbers, target_names
from baggage.inspection import Picture, inspect
from core.data.reid_datasets import load_reid_dataset
from core.errors import InputError


def picture(path, identity=1, part="train", source="g", view=1):
    return Picture(str(path), True, part, source, identity, str(identity), "entry 0", view)


def seen(samples):
    """What a sample is but for its path, and its bytes."""
    return sorted((s.id, s.camera, s.name, open(s.path, "rb").read()) for s in samples)


@pytest.mark.parametrize("copy", [False, True])
def test_converted_is_the_same_as_the_original(baggage, tmp_path, copy):
    done = convert(inspect(baggage).pictures, tmp_path / "out", copy)
    assert done == ({"copied": 36} if copy else {"linked": 36}) and os.listdir(tmp_path) == ["out"]
    original, converted = load_reid_dataset("mvb", baggage), load_reid_dataset("mvb", tmp_path / "out")
    for part in ("train", "query", "gallery"):
        assert seen(getattr(original, part)) == seen(getattr(converted, part))
    assert sorted(os.listdir(tmp_path / "out/query"))[0] == "0007_p_1.jpg"
    links = os.stat(tmp_path / "out/query/0007_p_1.jpg").st_nlink
    assert links == 1 if copy else links > 1


def test_another_disk_gets_copies(baggage, tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    assert convert(inspect(baggage).pictures[:3], tmp_path / "out") == {"copied": 3}


def test_a_link_to_a_picture_becomes_the_picture(baggage, tmp_path):
    real = inspect(baggage).pictures[0].path
    os.symlink(real, tmp_path / "link.jpg")
    convert([picture(tmp_path / "link.jpg")], tmp_path / "out")
    assert not os.path.islink(tmp_path / "out/bounding_box_train/0001_g_1.jpg")


def test_names():
    pictures = [
        picture("a/0010_g_1.jpg", 10),
        picture("a/10_g_1.PNG", 10),  # the same bag and view under another name
        picture("a/0010_p_3_0.jpg", 10, source="p", view=3),
        picture("a/bag", 10, source="p", view=None),
        picture("b/0010_g_1.jpg", 10, part="gallery"),
    ]
    assert target_names(pictures, identity_numbers(pictures)) == [
        "bounding_box_train/0010_g_1.jpg",
        "bounding_box_train/0010_g_1_2.png",
        "bounding_box_train/0010_p_3.jpg",
        "bounding_box_train/0010_p_0.jpg",
        "bounding_box_test/0010_g_1.jpg",
    ]
    assert target_names([picture("a.jpg", 123456)], {123456: 123456}) == ["bounding_box_train/123456_g_1.jpg"]


def test_identities_that_are_no_numbers(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.jpg")
    names = ("red", "blue", 7)
    parts = ("train", "probe", "gallery")
    convert([picture(tmp_path / "a.jpg", *pair) for pair in zip(names, parts, strict=True)], tmp_path / "out")
    assert json.loads((tmp_path / "out/identities.json").read_text()) == {"2": "red", "1": "blue", "0": "7"}
    assert os.listdir(tmp_path / "out/query") == ["0001_g_1.jpg"]
    pictures = [picture(tmp_path / "a.jpg", 4)._replace(name="0004"), picture(tmp_path / "a.jpg", "red")]
    convert([*pictures, picture(tmp_path / "a.jpg", 4)], tmp_path / "zeros")  # names stay as the data write them
    assert json.loads((tmp_path / "zeros/identities.json").read_text()) == {"0": "0004", "1": "red"}
    assert identity_numbers([picture("a", 10**12), picture("b", 3)]) == {10**12: 0, 3: 1}


def test_a_folder_that_is_there_is_left_alone(baggage, tmp_path):
    (tmp_path / "out").mkdir()
    convert(inspect(baggage).pictures[:1], tmp_path / "out")  # empty, so it may be used
    for target in (tmp_path / "out", tmp_path / "out/bounding_box_train/0001_g_1.jpg"):
        with pytest.raises(InputError, match="is there already"):
            convert(inspect(baggage).pictures, target)
    assert len(os.listdir(tmp_path / "out/bounding_box_train")) == 1


def test_what_fails_leaves_nothing(baggage, tmp_path):
    pictures = [*inspect(baggage).pictures[:5], picture(tmp_path / "gone.jpg")]
    with pytest.raises(InputError, match="can't be written"):
        convert(pictures, tmp_path / "out")
    with pytest.raises(InputError, match="nothing to convert"):
        convert([], tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="can't be written"):
        convert(pictures, tmp_path / "file" / "out")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["a" * 300, "a" * 300 + "/out", "new/" + "a" * 300])
def test_names_that_are_too_long(baggage, tmp_path, name):
    for refused in (lambda out: check_target(out), lambda out: convert(inspect(baggage).pictures, out)):
        with pytest.raises(InputError, match="can't be written .File name too long."):
            refused(tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_a_name_as_long_as_names_can_be(baggage, tmp_path):
    convert(inspect(baggage).pictures[:1], tmp_path / "new" / ("a" * 255))
    assert os.listdir(tmp_path / "new") == ["a" * 255]


def test_ids_as_numbers_and_text_mixed(baggage, tmp_path):
    root = shutil.copytree(baggage, tmp_path / "set")
    listing = root / "MVB_val/Info/val_probe.json"
    content = json.loads(listing.read_text())
    listing.write_text(json.dumps({"image": [entry | {"id": int(entry["id"])} for entry in content["image"]]}))
    convert(inspect(root).pictures, tmp_path / "out")
    assert seen(load_reid_dataset("mvb", tmp_path / "out").query) == seen(load_reid_dataset("mvb", baggage).query)
