import json

import pytest

from core.data import mvb
from core.data.reid_datasets import check_evaluation, load_reid_dataset
from core.errors import InputError

RUN_LENGTHS = {"size": [40, 60], "counts": "PPYo1"}


def entry(image_name, **fields):
    identity, datatype = image_name.split("_")[:2]
    return {
        "image_name": image_name,
        "id": identity,
        "datatype": datatype,
        "material": "hard",
        "dimsize": [60, 40],
        **fields,
    }


def write_original(root, train=None, gallery=None, probe=None, wrap=lambda entries: {"image": entries}):
    """An MVB of a few bags; the pictures are empty files, which the reader never opens."""
    train = [entry("0010_g_1.jpg"), entry("0010_p_3.jpg"), entry("0011_p_1.jpg")] if train is None else train
    gallery = [entry("0500_g_1.jpg"), entry("0501_g_2.jpg")] if gallery is None else gallery
    probe = [entry("0500_p_1.jpg")] if probe is None else probe
    parts = {
        ("MVB_train/Image", "MVB_train/Info/train.json"): train,
        ("MVB_val/Image/gallery", "MVB_val/Info/val_gallery.json"): gallery,
        ("MVB_val/Image/probe", "MVB_val/Info/val_probe.json"): probe,
    }
    for (folder, listing), entries in parts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for each in entries:
            if isinstance(each, dict) and isinstance(each.get("image_name"), str):
                (root / folder / each["image_name"]).touch()
        (root / listing).parent.mkdir(parents=True, exist_ok=True)
        (root / listing).write_text(json.dumps(wrap(entries)))
    return root


def without(fields, name):
    return {key: value for key, value in fields.items() if key != name}


@pytest.mark.parametrize("name", ["mvb", "synthetic"])
def test_original_layout(tmp_path, name):
    write_original(tmp_path / "MVB")
    for root in (tmp_path, tmp_path / "MVB"):
        dataset = load_reid_dataset(name, root)
        assert [(s.id, s.name) for s in dataset.train] == [(0, "0010"), (0, "0010"), (1, "0011")]
        assert [(s.id, s.name) for s in dataset.query] == [(500, "0500")]
        assert [(s.id, s.name) for s in dataset.gallery] == [(500, "0500"), (501, "0501")]
    assert dataset.query[0].path == str(tmp_path / "MVB/MVB_val/Image/probe/0500_p_1.jpg")
    assert dataset.query[0].box is None and dataset.query[0].mask is None
    assert dataset.query[0].camera != dataset.gallery[0].camera  # view 1 on either side of security
    assert check_evaluation(dataset, "no_camera") is check_evaluation(dataset, "market1501") is None


def test_bare_list_one_file_for_both_sides_and_a_copy_of_it(tmp_path):
    write_original(tmp_path, wrap=list)
    info = tmp_path / "MVB_val" / "Info"
    both = json.loads((info / "val_gallery.json").read_text()) + json.loads((info / "val_probe.json").read_text())
    (info / "val_gallery.json").unlink()
    (info / "val_probe.json").unlink()
    (info / "val.json").write_text(json.dumps(both))
    (info / "format.json").write_text(json.dumps(both, indent=2))
    dataset = load_reid_dataset("mvb", tmp_path)
    assert (len(dataset.query), len(dataset.gallery)) == (1, 2)


def test_box_and_mask(tmp_path):
    train = [
        entry("0010_g_1.jpg", bbox=[5, 6.5, 10, 20], segmentation=RUN_LENGTHS),
        entry("0011_p_1.jpg", bbox=[50, -2, 20, 12]),
        without(entry("0012_p_1.jpg", bbox=[50, -2, 20, 12]), "dimsize"),
        entry("0013_p_1.jpg", bbox=None, segmentation=None),
    ]
    samples = load_reid_dataset("mvb", write_original(tmp_path, train=train)).train
    assert [sample.box for sample in samples] == [(5, 6.5, 15, 26.5), (50, 0, 60, 10), (50, -2, 70, 10), None]
    assert [sample.mask for sample in samples] == [RUN_LENGTHS, None, None, None]


def test_identities_as_text_and_number_are_the_same_bag(tmp_path):
    gallery = [entry("0010_g_1.jpg", id=" 0010\n"), entry("0010_g_2.jpg", id=10), entry("0011_g_2.jpg", id="11")]
    dataset = load_reid_dataset(
        "mvb", write_original(tmp_path, gallery=gallery, probe=[entry("0010_p_1.jpg", id="10")])
    )
    assert [sample.id for sample in dataset.gallery] == [10, 10, 11]
    assert dataset.query[0].id == 10


def test_identities_that_are_no_numbers_are_numbered_by_name(tmp_path):
    gallery = [entry("0_g_1.jpg", id="red"), entry("1_g_1.jpg", id=7)]
    dataset = load_reid_dataset("mvb", write_original(tmp_path, gallery=gallery, probe=[entry("2_p_1.jpg", id="red")]))
    assert [(s.id, s.name) for s in dataset.gallery] == [(1, "red"), (0, "7")]
    assert dataset.query[0].id == 1


def test_identity_and_side_from_the_name_where_the_entry_has_none(tmp_path):
    dataset = load_reid_dataset("mvb", write_original(tmp_path, probe=[{"image_name": "0500_p_2.jpg"}]))
    assert (dataset.query[0].id, dataset.query[0].name) == (500, "0500")


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        ([], "no entry with datatype 'p', so there is no probe"),
        (["0500_p_1.jpg"], r"val_probe.json, entry 0: expected an object with image_name"),
        ([entry("0500_p_1.jpg"), {"id": 3}], "entry 1: needs an image_name, found None"),
        ([entry("0500_p_1.jpg") | {"image_name": 7}], "entry 0: needs an image_name, found 7"),
        (
            [{"image_name": "17.jpg", "datatype": "p"}],
            r"entry 0 \(17.jpg\): needs an id, a text or a number of at most 18 digits, found None",
        ),
        ([{"image_name": "17.jpg", "id": 17}], r"entry 0 \(17.jpg\): needs a datatype, 'g' or 'p', found None"),
        ([entry("0500_p_1.jpg", datatype="q")], "needs a datatype, 'g' or 'p', found 'q'"),
        ([entry("0500_p_1.jpg", id=5.5)], "needs an id, a text or a number of at most 18 digits, found 5.5"),
        ([entry("0500_p_1.jpg", id="  ")], "needs an id, a text or a number of at most 18 digits, found '  '"),
        ([entry("0500_p_1.jpg", id=True)], "needs an id, a text or a number of at most 18 digits, found True"),
        (
            [entry("0500_p_1.jpg", bbox=[1, 2, 3])],
            r"bbox has to be \[x, y, width, height\] in pixels, found \[1, 2, 3\]",
        ),
        ([entry("0500_p_1.jpg", bbox=[1, 2, 3, "4"])], "bbox has to be"),
        ([entry("0500_p_1.jpg", bbox=[1, 2, 0, 4])], "bbox has to be"),
        ([entry("0500_p_1.jpg", bbox=[1, 2, float("nan"), 4])], "bbox has to be"),
        ([entry("0500_p_1.jpg", bbox=[60, 2, 9, 4])], "lies outside the picture of 60 x 40 pixels"),
        ([entry("0500_p_1.jpg", bbox=[1, 2, 9, 4], dimsize="big")], "dimsize has to be"),
        ([entry("0500_p_1.jpg", bbox=[1, 2, 9, 4], dimsize=[10**5, 10**5])], "dimsize has to be"),
        ([entry("0500_p_1.jpg", segmentation={"size": [0, 60], "counts": []})], "segmentation has to be COCO"),
        ([entry("0500_p_1.jpg", segmentation={"size": [40, 60]})], "segmentation has to be COCO run lengths"),
        ([entry("0500_p_1.jpg", segmentation=[[0, 0, 1, 1, 0, 1]])], "segmentation has to be COCO run lengths"),
        ([entry("../gallery/0500_g_1.jpg", datatype="p", id=500)], "leads out of .*probe; name a picture in it"),
        ([entry("/0500_p_1.jpg", datatype="p", id=500)], "leads out of .*probe; name a picture in it"),
        ([entry("0500_p_1.jpg"), entry("0500_p_1.jpg", id=3)], "identity 3, but listed before as 0500"),
    ],
)
def test_bad_entries(tmp_path, probe, message):
    write_original(tmp_path, probe=probe)
    with pytest.raises(InputError, match=message) as caught:
        load_reid_dataset("mvb", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{'image': ", r"train.json: not JSON \("),
        ("", r"train.json: not JSON \("),
        ('{"images": []}', r"train.json: expected a list of pictures, .* found dict"),
        ("3", r"train.json: expected a list of pictures, .* found int"),
    ],
)
def test_listing_that_is_no_list(tmp_path, content, message):
    write_original(tmp_path)
    (tmp_path / "MVB_train/Info/train.json").write_text(content)
    with pytest.raises(InputError, match=message):
        load_reid_dataset("mvb", tmp_path)


def test_missing_listings_and_pictures(tmp_path):
    write_original(tmp_path)
    (tmp_path / "MVB_train/Image/0010_p_3.jpg").unlink()
    with pytest.raises(InputError, match=r"train.json: 1 of 3 pictures listed there are not on disk.*0010_p_3.jpg"):
        load_reid_dataset("mvb", tmp_path)
    for path in (tmp_path / "MVB_val/Info").iterdir():
        path.unlink()
    with pytest.raises(InputError, match=r"Info: no \*.json there; expected val_gallery.json and val_probe.json"):
        load_reid_dataset("mvb", tmp_path)
    (tmp_path / "MVB_train/Info/train.json").unlink()
    with pytest.raises(InputError, match=r"^\S*train.json: can't be read"):
        load_reid_dataset("mvb", tmp_path)


def write_converted(root, train, query, gallery):
    for part, names in (("bounding_box_train", train), ("query", query), ("bounding_box_test", gallery)):
        (root / part).mkdir(parents=True)
        for name in names:
            (root / part / name).touch()


@pytest.mark.parametrize("folder", ["MVB_val/Info", "MVB_train/Image", "MVB_val/Image/probe"])
def test_a_folder_without_permission_is_named(tmp_path, no_right_to, folder):
    write_original(tmp_path)
    no_right_to(tmp_path / folder)
    with pytest.raises(InputError, match=rf"{folder}: the folder can't be read \(Permission denied\)"):
        load_reid_dataset("mvb", tmp_path)


def test_converted_layout(tmp_path):
    write_converted(
        tmp_path / "MVB", ["0010_g_1.jpg", "0010_p_3.jpg", "0012_p_1.jpg"], ["0500_p_2.jpg"], ["0500_g_2.jpg"]
    )
    for root in (tmp_path, tmp_path / "MVB"):
        dataset = load_reid_dataset("mvb", root)
        assert [(s.id, s.name) for s in dataset.train] == [(0, "0010"), (0, "0010"), (1, "0012")]
        assert dataset.query[0].id == dataset.gallery[0].id == 500
        assert dataset.query[0].camera != dataset.gallery[0].camera
    # beside an original one, as that project keeps it, the converted one is read
    write_original(tmp_path / "MVB", probe=[{"image_name": "17.jpg"}])
    assert load_reid_dataset("mvb", tmp_path) == dataset


def test_converted_layout_with_strange_names_or_a_part_missing(tmp_path):
    write_converted(tmp_path, ["0010_g_1.jpg", "0011_x_1.jpg"], ["0500_p_2.jpg"], ["0500_g_2.jpg"])
    with pytest.raises(InputError, match=r"1 of 2 pictures have no usable name, the first is 0011_x_1.jpg; .*0010_p_3"):
        load_reid_dataset("mvb", tmp_path)
    (tmp_path / "bounding_box_train/0011_x_1.jpg").rename(tmp_path / "bounding_box_train/0011_g_1.jpg")
    (tmp_path / "query/0500_p_2.jpg").unlink()
    (tmp_path / "query").rmdir()
    with pytest.raises(InputError, match="query: no such folder"):
        load_reid_dataset("mvb", tmp_path)


def test_a_number_that_no_tensor_holds_is_no_name():
    assert mvb.parse_name("9" * 18 + "_p_" + "9" * 18) == ("9" * 18, 10**18 - 1, 2 * 10**18 - 1)
    for name in ("9" * 19 + "_p_1.jpg", "0001_p_" + "9" * 19 + ".jpg", "0001_p_" + "9" * 5000):
        assert mvb.parse_name(name) is None


def test_suitcase(tmp_path):
    # identity, p, view, number of the picture; augmented copies in training
    train = ["0001_p_1_0.jpg", "0001_p_1_0_aug3.jpg", "0004_p_2_1.jpg"]
    write_converted(
        tmp_path / "SuitcaseReID_Processed", train, ["0002_p_1_0.jpg"], ["0002_p_3_0.jpg", "0002_p_1_5.jpg"]
    )
    dataset = load_reid_dataset("suitcase", tmp_path)
    assert [sample.id for sample in dataset.train] == [0, 0, 1]
    assert len({sample.camera for sample in dataset.gallery}) == 2
    assert dataset.query[0].camera == dataset.gallery[0].camera or dataset.query[0].camera == dataset.gallery[1].camera
    assert check_evaluation(dataset, "market1501") is None
