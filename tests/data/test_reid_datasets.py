import json
import shutil
from functools import partial

import pytest
import torch

from core.data.reid_datasets import (
    DATASETS,
    MARKET_LAYOUTS,
    ReIDDataset,
    Sample,
    check_evaluation,
    check_training,
    default_protocol,
    find_dataset,
    join_datasets,
    load_reid_dataset,
)
from core.data.samples import clip_box
from core.errors import InputError


def touch(folder, *names):
    """Empty files: the readers never open a picture."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def seen(samples):
    return [(sample.id, sample.camera, sample.name) for sample in samples]


# folder, names of each part as published, and what they mean: (id, camera, name)
MARKET_LIKE = {
    "market1501": (
        "Market-1501-v15.09.15",
        ["0002_c1s1_000451_03.jpg", "0007_c3s3_077419_03.jpg", "1500_c6s3_086542_02.jpg"],
        ["0001_c1s1_001051_00.jpg"],
        ["-1_c1s1_000401_03.jpg", "0000_c2s1_000151_01.jpg", "0001_c2s1_000976_01.jpg"],
        [(0, 0, "0002"), (1, 2, "0007"), (2, 5, "1500")],
        [(1, 0, "0001")],
        [(0, 1, "0000"), (1, 1, "0001")],
    ),
    "dukemtmc": (
        "DukeMTMC-reID",
        ["0001_c2_f0046182.jpg", "7140_c8_f0100000.jpg"],
        ["0005_c2_f0046985.jpg"],
        ["0005_c5_f0047108.jpg", "7139_c1_f0058000.jpg"],
        [(0, 1, "0001"), (1, 7, "7140")],
        [(5, 1, "0005")],
        [(5, 4, "0005"), (7139, 0, "7139")],
    ),
    "cuhk03_np": (
        "detected",
        ["0001_c1_1.png", "0003_c2_6.png"],
        ["0002_c1_9.png"],
        ["0002_c2_10.png"],
        [(0, 0, "0001"), (1, 1, "0003")],
        [(2, 0, "0002")],
        [(2, 1, "0002")],
    ),
    "veri776": (
        "VeRi",
        ["0001_c001_00016450_0.jpg", "0003_c020_00050010_0.jpg"],
        ["0002_c002_00030600_0.jpg"],
        ["0002_c003_00031500_1.jpg"],
        [(0, 0, "0001"), (1, 19, "0003")],
        [(2, 1, "0002")],
        [(2, 2, "0002")],
    ),
    "personx": (
        "subset1",
        ["0001_c3_12.jpg", "0011_c12_3.jpg"],
        ["0002_c10_0.jpg"],
        ["0002_c4_20.jpg"],
        [(0, 2, "0001"), (1, 11, "0011")],
        [(2, 9, "0002")],
        [(2, 3, "0002")],
    ),
    "vehiclex": (
        "AIC20_ReID_Simulation",
        ["0001_c006_1.jpg", "1362_c036_141.jpg"],
        None,
        None,
        [(0, 0, "0001"), (1, 30, "1362")],
        [],
        [],
    ),
}


def write_market_like(name, folder):
    layout = MARKET_LAYOUTS[name]
    for part, names in zip((layout.train, layout.query, layout.gallery), MARKET_LIKE[name][1:4], strict=True):
        if part:
            touch(folder / part, "Thumbs.db", *names)


@pytest.mark.parametrize("name", MARKET_LAYOUTS)
def test_market_like_from_its_own_folder_and_from_the_parent(tmp_path, name):
    published, *_, train, query, gallery = MARKET_LIKE[name]
    write_market_like(name, tmp_path / published)
    for root in (tmp_path / published, tmp_path, str(tmp_path)):
        dataset = load_reid_dataset(name, root)
        assert (seen(dataset.train), seen(dataset.query), seen(dataset.gallery)) == (train, query, gallery)
    assert dataset.train[0].path == str(tmp_path / published / MARKET_LAYOUTS[name].train / MARKET_LIKE[name][1][0])


def test_cuhk03_np_labeled_is_read_from_its_folder(tmp_path):
    write_market_like("cuhk03_np", tmp_path / "detected")
    write_market_like("cuhk03_np", tmp_path / "labeled")
    assert "detected" in load_reid_dataset("cuhk03_np", tmp_path).train[0].path
    assert "labeled" in load_reid_dataset("cuhk03_np", tmp_path / "labeled").train[0].path


LAID = {  # as torchreid, fast-reid, LightMBN and OpenUnReID lay their sets under one root; and what lies inside
    "market1501": (
        "market1501/Market-1501-v15.09.15 market1501 Market-1501 Market-1501/Market-1501-v15.09.15",
        "query",
    ),
    "dukemtmc": ("dukemtmc-reid/DukeMTMC-reID DukeMTMC-reID dukemtmcreid/DukeMTMC-reID", "bounding_box_train"),
    "msmt17": ("MSMT17_V1 msmt17/MSMT17_V1 msmt17/MSMT17_V2 msmt17 MSMT17_V2", "mask_test_v2"),
    "cuhk03_np": ("cuhk03-np/detected CUHK03-NP/detected cuhk03/CUHK03_detected", "query"),
    "veri776": ("veri776/VeRi VeRi veri VeRi_with_plate veri/VeRi veri/VeRi-776 VeRi/VeRi", "image_test"),
    "vehicleid": ("VehicleID_V1.0 vehicleid vehicleid/VehicleID_V1.0 PKU-VehicleID", "image"),
    "mot17": ("MOT17", "train"),
    "personx": ("personx/subset1", "query"),
    "mvb": ("MVB mvb mvb/MVB", "MVB_val"),
}


@pytest.mark.parametrize("name", LAID)
def test_published_folders_below_a_common_root(tmp_path, name):
    folders, inside = LAID[name]
    for number, folder in enumerate(folders.split()):
        root = tmp_path / str(number)
        (root / folder / inside).mkdir(parents=True)
        (root / "others" / "query").mkdir(parents=True)
        assert find_dataset(name, root) == find_dataset(name, str(root / folder)) == root / folder


def test_two_that_fit_are_refused_and_one_under_two_names_is_not(tmp_path):
    (tmp_path / "market1501" / "query").mkdir(parents=True)
    (tmp_path / "Market-1501").symlink_to(tmp_path / "market1501")
    assert find_dataset("market1501", tmp_path).samefile(tmp_path / "market1501")
    (tmp_path / "market1501" / "Market-1501-v15.09.15" / "query").mkdir(parents=True)
    assert find_dataset("market1501", tmp_path / "market1501") == tmp_path / "market1501"  # what is named is taken
    with pytest.raises(InputError, match=r"holds market1501 twice, as .*1501 and as .*v15.09.15; give one"):
        find_dataset("market1501", tmp_path)


def test_joined_sets_share_nothing():
    first = ReIDDataset(
        [Sample("a", 0, 2, name="7"), Sample("b", 1, 0, name="9")], [Sample("c", 5, 0, name="5")], [Sample("d", 5, 2)]
    )
    second = ReIDDataset([Sample("e", 0, 2, name="7")], [Sample("f", 3, 1)], [Sample("g", 3, 2), Sample("h", 5, 2)])
    train, query, gallery = join_datasets(["x", "y"], [first, second])
    assert seen(train) == [(0, 1, "x/7"), (1, 0, "x/9"), (2, 3, "y/7")]
    assert [(s.path, s.id, s.camera) for s in query] == [("c", 0, 0), ("f", 1, 2)]
    assert [(s.path, s.id, s.camera) for s in gallery] == [("d", 0, 1), ("g", 1, 3), ("h", 2, 3)]
    one_set = join_datasets(["x", "y"], [ReIDDataset([], first.query, list(first.query))] * 2)
    assert one_set.query == one_set.gallery  # as the protocol vehicleid wants it
    assert join_datasets(["x", "y"], [ReIDDataset([], [], [])] * 2) == ([], [], [])


def test_coil20_real_data(shared_data):
    dataset = load_reid_dataset("market1501", shared_data / "coil20_reid")
    assert [len(part) for part in dataset] == [500, 42, 308]
    assert [len({sample.id for sample in part}) for part in dataset] == [10, 7, 7]
    assert {sample.id for sample in dataset.train} == set(range(10))
    assert {sample.camera for part in dataset for sample in part} == {0, 1}
    assert check_evaluation(dataset, "market1501") is None


def write_msmt17(root, train="train", test="test"):
    lists = {
        "train": [("0000/0000_000_01_0303morning_0008_0.jpg", 0), ("0002/0002_001_15_0303noon_0100_1.jpg", 2)],
        "val": [("0000/0000_045_12_0303morning_0006_2.jpg", 0)],
        "query": [("0001/0001_019_07_0303morning_0020_1.jpg", 1)],
        "gallery": [("0001/0001_020_08_0303afternoon_0020_1.jpg", 1)],
    }
    for part, lines in lists.items():
        touch(root / (train if part in ("train", "val") else test), *(name for name, _ in lines))
        (root / f"list_{part}.txt").write_text("".join(f"{name} {identity}\n" for name, identity in lines))
    return lists


@pytest.mark.parametrize(
    ("folder", "train", "test"), [("MSMT17_V1", "train", "test"), ("MSMT17_V2", "mask_train_v2", "mask_test_v2")]
)
def test_msmt17_in_both_versions(tmp_path, folder, train, test):
    root = tmp_path / folder
    lists = write_msmt17(root, train, test)
    for given in (root, tmp_path):
        dataset = load_reid_dataset("msmt17", given)
        assert [(s.id, s.camera) for s in dataset.train] == [(0, 0), (1, 14), (0, 11)]
        assert [(s.id, s.camera) for s in dataset.query] == [(1, 6)]
        assert [(s.id, s.camera) for s in dataset.gallery] == [(1, 7)]
    (root / test / lists["gallery"][0][0]).unlink()
    with pytest.raises(InputError, match=r"list_gallery.txt: 1 of 1 pictures listed .* not on disk.*0001_020_08"):
        load_reid_dataset("msmt17", root)
    (root / "list_val.txt").unlink()
    with pytest.raises(InputError, match=r"list_val.txt: can't be read \(No such file"):
        load_reid_dataset("msmt17", root)
    (root / "list_val.txt").write_text("0000/strange.jpg 0\n")
    with pytest.raises(InputError, match=r"list_val.txt, line 1: '0000/strange.jpg 0' is not"):
        load_reid_dataset("msmt17", root)


@pytest.mark.parametrize("name", ["../0000001", "/0000001", "..\\0000001", "C:\\0000001", "a/../../0000001"])
def test_a_listed_picture_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    write_vehicleid(tmp_path)
    (tmp_path / "train_test_split" / "test_list_800.txt").write_text(f"0000004 20\n{name} 21\n")
    with pytest.raises(InputError, match=r"test_list_800.txt, line 2: .* leads out of .*image; name a picture in it"):
        load_reid_dataset("vehicleid", tmp_path)


@pytest.mark.parametrize("folder", ["train/0000", "train/0001"])
def test_a_listed_folder_without_permission_is_named(tmp_path, no_right_to, folder):
    for part in ("train", "val", "query", "gallery"):
        number = int(part in ("query", "gallery"))
        touch(tmp_path / "train", f"000{number}/{part}_0_01_0.jpg")
        touch(tmp_path / "test", f"000{number}/{part}_0_01_0.jpg")
        (tmp_path / f"list_{part}.txt").write_text(f"000{number}/{part}_0_01_0.jpg {number}\n")
    no_right_to(tmp_path / folder.replace("train/0001", "test/0001"))
    with pytest.raises(InputError, match=r"000\d: the folder can't be read \(Permission denied\)"):
        load_reid_dataset("msmt17", tmp_path)


def test_a_root_without_permission_is_named(tmp_path, no_right_to):
    no_right_to(tmp_path)
    with pytest.raises(InputError, match=rf"{tmp_path}: the folder can't be read \(Permission denied\)"):
        load_reid_dataset("market1501", tmp_path)


def write_vehicleid(root):
    touch(root / "image", *(f"{number:07d}.jpg" for number in range(1, 8)))
    (root / "train_test_split").mkdir()
    (root / "train_test_split" / "train_list.txt").write_text("0000001 7\n0000002 7\n0000003 9\n")
    (root / "train_test_split" / "test_list_800.txt").write_text("0000004 20\n0000005 20\n0000006 21\n")
    (root / "train_test_split" / "test_list_2400.txt").write_text("0000004 20\n0000005 20\n0000006 21\n0000007 21\n")


def test_vehicleid_lists(tmp_path):
    write_vehicleid(tmp_path / "VehicleID_V1.0")
    dataset = load_reid_dataset("vehicleid", tmp_path)
    assert [sample.id for sample in dataset.train] == [0, 0, 1]
    assert dataset.query == dataset.gallery
    assert seen(dataset.query) == [(20, 0, "20"), (20, 0, "20"), (21, 0, "21")]
    assert len(load_reid_dataset("vehicleid_large", tmp_path).query) == 4
    assert default_protocol("vehicleid_large") == "vehicleid"
    note = check_evaluation(dataset, "vehicleid")
    assert note.startswith("1 of 3 query pictures") and "0000006.jpg" in note
    with pytest.raises(InputError, match=r"test_list_1600.txt: can't be read"):
        load_reid_dataset("vehicleid_medium", tmp_path)
    (tmp_path / "VehicleID_V1.0" / "train_test_split" / "train_list.txt").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(InputError, match=r"train_list.txt: is not a text file"):
        load_reid_dataset("vehicleid", tmp_path)
    (tmp_path / "VehicleID_V1.0" / "train_test_split" / "train_list.txt").write_text("\n")
    with pytest.raises(InputError, match=r"train_list.txt: lists no pictures"):
        load_reid_dataset("vehicleid", tmp_path)


def write_mvb(root, train, query, gallery):
    """In the original layout, of empty files."""
    for folder, listing, side in ((train, "train", "g"), (query, "val_probe", "p"), (gallery, "val_gallery", "g")):
        names = [f"{number:04}_{side}_1.jpg" for number in ((1, 2) if folder == train else (3, 4))]
        touch(root / folder, *names)
        (root / folder.split("/")[0] / "Info").mkdir(exist_ok=True)
        entries = [{"image_name": name} for name in names]
        (root / folder.split("/")[0] / "Info" / f"{listing}.json").write_text(json.dumps(entries))


TRAIN = {  # how a set is written, and what of it only training needs: any of these may be gone
    **{
        name: (partial(write_market_like, name), [MARKET_LAYOUTS[name].train, f"{MARKET_LAYOUTS[name].train}/*"])
        for name in ("market1501", "dukemtmc", "cuhk03_np", "veri776", "personx")
    },
    "msmt17": (write_msmt17, ["train", "train/*/*", "train list_train.txt list_val.txt"]),
    "vehicleid": (write_vehicleid, ["train_test_split/train_list.txt", "image/000000[123].jpg"]),
    "mvb": (
        lambda root: write_mvb(root, "MVB_train/Image", "MVB_val/Image/probe", "MVB_val/Image/gallery"),
        ["MVB_train", "MVB_train/Image", "MVB_train/Image/*"],
    ),
    "suitcase": (
        lambda root: [
            touch(root / folder, f"000{number}_p_1_0.jpg", f"000{number}_g_1_0.jpg")
            for number, folder in enumerate(("bounding_box_train", "query", "bounding_box_test"))
        ],
        ["bounding_box_train", "bounding_box_train/*"],
    ),
}


@pytest.mark.parametrize(("name", "gone"), [(name, gone) for name, (_, each) in TRAIN.items() for gone in each])
def test_without_its_training_pictures_a_set_can_be_evaluated(tmp_path, name, gone):
    TRAIN[name][0](tmp_path)
    whole = load_reid_dataset(name, tmp_path)
    assert whole.train
    for path in [path for pattern in gone.split() for path in tmp_path.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert load_reid_dataset(name, tmp_path) == whole._replace(train=[])


@pytest.mark.parametrize("digits", [18, 19, 20, 60])
def test_identities_and_cameras_that_no_tensor_holds_are_numbered_anew(tmp_path, digits):
    long = "9" * (digits - 1)
    touch(tmp_path / "bounding_box_train", f"{long}1_c1.jpg", f"{long}2_c1.jpg")
    touch(tmp_path / "query", f"{long}3_c{long}.jpg", "5_c1.jpg")
    touch(tmp_path / "bounding_box_test", f"{long}3_c1.jpg", f"{long}4_c1.jpg", "5_c2.jpg")
    dataset = load_reid_dataset("market1501", tmp_path)
    torch.tensor([(sample.id, sample.camera) for part in dataset for sample in part])
    assert [sample.name for sample in dataset.query] == ["5", f"{long}3"]
    ids, cameras = ({sample.name: getattr(sample, field) for sample in dataset.gallery} for field in ("id", "camera"))
    assert [sample.id for sample in dataset.query] == [ids["5"], ids[f"{long}3"]] and len(set(ids.values())) == 3
    assert dataset.query[0].camera == cameras[f"{long}3"] != dataset.query[1].camera
    assert check_evaluation(dataset, "market1501") is None


def test_unknown_data_set_lists_the_known(tmp_path):
    for call in (lambda: load_reid_dataset("market", tmp_path), lambda: default_protocol("market")):
        with pytest.raises(InputError, match=r"unknown data set 'market'; known are .*dukemtmc.*market1501.*veri776"):
            call()


def test_every_data_set_has_a_protocol():
    protocols = {name: default_protocol(name) for name in DATASETS}
    assert {name for name, protocol in protocols.items() if protocol == "no_camera"} == {
        "mot17",
        "mvb",
        "suitcase",
        "folder",
        "pictures",
        "synthetic",
        "synthetic_hard",
    }
    assert protocols["market1501"] == protocols["veri776"] == "market1501"


@pytest.mark.parametrize("name", DATASETS)
def test_missing_and_empty_folder(tmp_path, name):
    with pytest.raises(InputError, match=r"absent: no such folder"):
        load_reid_dataset(name, tmp_path / "absent")
    with pytest.raises(InputError, match=r"~nobody-of-that-name: no such folder"):
        load_reid_dataset(name, "~nobody-of-that-name")
    empty = "holds no pictures" if name in ("pictures", "folder") else r"not laid out as .*expected .*found nothing"
    with pytest.raises(InputError, match=empty):
        load_reid_dataset(name, tmp_path)


def test_part_missing_or_without_usable_names(tmp_path):
    write_market_like("market1501", tmp_path)
    for path in (tmp_path / "query").iterdir():
        path.unlink()
    with pytest.raises(InputError, match=r"query: holds no pictures; expected names like 0002_c1s1"):
        load_reid_dataset("market1501", tmp_path)
    touch(tmp_path / "query", "holiday.jpg", "0001_c1s1_001051_00.jpg")
    with pytest.raises(InputError, match=r"query: 1 of 2 pictures have no usable name, the first is holiday.jpg; exp"):
        load_reid_dataset("market1501", tmp_path)
    for path in (tmp_path / "query").iterdir():
        path.unlink()
    (tmp_path / "query").rmdir()
    with pytest.raises(InputError, match=r"query: no such folder"):
        load_reid_dataset("market1501", tmp_path)


def test_training_needs_two_identities_but_one_picture_of_each_is_enough(tmp_path):
    write_market_like("market1501", tmp_path)  # every training identity has a single picture
    check_training(load_reid_dataset("market1501", tmp_path))
    (tmp_path / "bounding_box_train" / "0007_c3s3_077419_03.jpg").unlink()
    (tmp_path / "bounding_box_train" / "1500_c6s3_086542_02.jpg").unlink()
    dataset = load_reid_dataset("market1501", tmp_path)  # whoever only evaluates may read it
    with pytest.raises(InputError, match=r"all 1 training pictures are of one identity, 0002"):
        check_training(dataset)
    with pytest.raises(InputError, match="no training pictures"):
        check_training(ReIDDataset([], [], []))


def dataset_of(query, gallery):
    """Pairs (id, camera) -> ReIDDataset."""
    make = [
        [Sample(f"{identity}_{camera}.jpg", identity, camera) for identity, camera in part] for part in (query, gallery)
    ]
    return ReIDDataset([], *make)


def test_check_evaluation_of_absent_identities():
    some = dataset_of([(1, 0), (2, 0), (3, 0)], [(1, 1), (2, 0)])
    assert check_evaluation(some, "no_camera") == (
        "1 of 3 query pictures have no match in the gallery under the protocol no_camera "
        "(1 of them: identity absent), the first is 3_0.jpg; they count in no metric"
    )
    assert "2 of 3 query" in check_evaluation(some, "market1501")
    with pytest.raises(InputError, match="none of the 2 query pictures shows an identity of the gallery"):
        check_evaluation(dataset_of([(1, 0), (2, 0)], [(3, 1)]), "no_camera")
    with pytest.raises(InputError, match="nothing to evaluate: 0 query and 1 gallery"):
        check_evaluation(dataset_of([], [(3, 1)]), "no_camera")


def test_check_evaluation_of_cameras():
    one_camera = dataset_of([(1, 0), (2, 0)], [(1, 0), (2, 0)])
    assert check_evaluation(one_camera, "no_camera") is None
    with pytest.raises(InputError, match="all pictures are from one camera, so .*use the protocol no_camera"):
        check_evaluation(one_camera, "market1501")
    with pytest.raises(InputError, match="no identity of the query was seen by another camera.*the protocol no_camera"):
        check_evaluation(dataset_of([(1, 0), (2, 1)], [(1, 0), (2, 1)]), "market1501")
    with pytest.raises(InputError, match="no identity has two pictures"):
        check_evaluation(dataset_of([(1, 0)], [(1, 0)]), "vehicleid")


def test_clip_box():
    assert clip_box((1, 2, 3, 4), 10, 10) == (1, 2, 3, 4)
    assert clip_box((-5, 2, 30, 4), 10, 10) == (0, 2, 10, 4)
    assert clip_box((10, 2, 30, 4), 10, 10) is None
    assert clip_box((1, 2, float("nan"), 4), 10, 10) is None
