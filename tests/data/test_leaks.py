"""What an evaluation shares with the training: found byte for byte, each kind one line, and nothing on good data."""

import os

import pytest

from core.data import leaks
from core.data.coco import CocoData, CocoPicture, read_coco, split_coco
from core.data.leaks import common_files, detection_leaks, reid_leaks
from core.data.reid_datasets import load_reid_dataset
from core.data.samples import ReIDDataset, Sample


@pytest.fixture
def make(tmp_path):
    """Function: file name, contents -> path."""

    def write(name, contents):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
        return str(path)

    return write


def sample(path, identity=1, camera=0, name=None):
    return Sample(path, identity, camera, name=f"{identity:04d}" if name is None else name)


# ------------------------------------------------------------------------------------------------------------- files


def test_files_of_two_lists_are_compared_by_what_is_in_them(make):
    first, second = make("a/1", "one"), make("a/2", "two")
    copy, other, own = make("b/1", "one"), make("b/2", "2wo"), make("b/3", "three")
    found = common_files([first, second], [copy, other, own])
    assert set(found) == {first, copy} and found[first] == found[copy]
    assert common_files([first, second], [other, own]) == {} == common_files([], [own]) == common_files([own], [])


def test_the_same_file_by_another_path_is_found(make, tmp_path):
    original = make("a/1", "one")
    os.link(original, tmp_path / "hard")
    os.symlink(original, tmp_path / "soft")
    os.symlink(tmp_path / "a", tmp_path / "folder")
    paths = [str(tmp_path / name) for name in ("hard", "soft", "folder/1", "folder/../a/1")]
    assert set(common_files([original], [*paths, make("b/1", "1ne")])) == {original, *paths}
    assert set(common_files([original], [original])) == {original}


def test_only_what_may_be_equal_is_read(make, monkeypatch):
    read = []
    digest = leaks._digest
    monkeypatch.setattr(leaks, "_digest", lambda path: read.append(path) or digest(path))
    alone = [make(f"a/{size}", bytes(size)) for size in range(1, 50)]
    alike, copy, same_size = make("a/x", b"x" * 60), make("b/x", b"x" * 60), make("b/y", b"y" * 60)
    assert set(common_files([*alone, alike], [copy, same_size])) == {alike, copy}
    assert sorted(read) == sorted([alike, copy, same_size])


def test_what_cannot_be_read_is_left_to_whoever_reads_it(make, tmp_path):
    empty, copy = make("a/1", ""), make("b/1", "")
    here, folder, absent = make("a/2", "x"), str(tmp_path / "a"), str(tmp_path / "absent")
    os.symlink(tmp_path / "nowhere", tmp_path / "dangling")
    strange = [folder, absent, str(tmp_path / "dangling"), "", "a" * 5000]
    assert common_files([empty, here, *strange], [copy, *strange]) == {}


# -------------------------------------------------------------------------------------------------------------- ReID


def test_each_kind_of_leak_is_one_line(make):
    trained = [make(f"train/{number}", f"train {number}") for number in range(4)]
    asked = [make("query/1", "train 2"), make("query/2", "query")]
    shown = [make("gallery/1", "train 1"), make("gallery/2", "query"), make("gallery/3", "gallery")]
    dataset = ReIDDataset(
        [sample(path, number, name=f"00{10 + number}") for number, path in enumerate(trained)],
        [sample(asked[0], 20), sample(asked[1], 21)],
        [sample(shown[0], 12, name="12"), sample(shown[1], 21), sample(shown[2], 20)],
    )
    pictures, identities, queries = reid_leaks(dataset, "no_camera")
    assert pictures == (
        f"warning: 2 of 5 pictures of query and gallery are in train too, byte for byte; the first is {asked[0]}, in "
        f"train {trained[2]}: the metrics will be too good"
    )
    assert identities == (
        "warning: 1 of 3 identities of query and gallery are in train too, by their names; the first is 12 "
        f"({shown[0]}): the metrics will be too good"
    )
    assert queries.startswith(
        f"warning: 1 of 2 query pictures are in the gallery too, byte for byte; the first is {asked[1]}, in the "
        f"gallery {shown[1]}: the metrics will be too good"
    )
    assert reid_leaks(dataset, "no_camera", shared_names=False) == [pictures, queries]
    assert reid_leaks(dataset._replace(train=[]), "no_camera") == [queries]
    assert reid_leaks(ReIDDataset(dataset.train, [], []), "no_camera") == []


def test_a_copy_that_the_evaluation_drops_does_no_harm(make):
    """Under market1501 one of the same identity and camera; a second copy may count all the same."""
    asked, copy, second = make("query/1", "x"), make("gallery/1", "x"), make("gallery/2", "x")
    query, dropped = [sample(asked, 1, 0)], sample(copy, 1, 0)
    for gallery, protocol, count in (
        ([dropped], "market1501", 0),
        ([dropped], "no_camera", 1),
        ([sample(copy, 1, 1)], "market1501", 1),
        ([sample(copy, 2, 0)], "market1501", 1),
        ([dropped, sample(second, 1, 3)], "market1501", 1),
        ([sample(asked, 1, 1)], "market1501", 1),  # the file itself is listed as another camera's
    ):
        assert len(reid_leaks(ReIDDataset([], query, gallery), protocol)) == count, (gallery, protocol)


def test_under_vehicleid_a_picture_is_no_copy_of_itself(make):
    paths = [make(name, contents) for name, contents in (("1", "x"), ("2", "y"), ("3", "x"), ("4", "z"))]
    one_set = [sample(path) for path in paths[1:]]
    assert reid_leaks(ReIDDataset([], one_set, list(one_set)), "vehicleid") == []
    one_set = [sample(path) for path in paths]
    (line,) = reid_leaks(ReIDDataset([], one_set, list(one_set)), "vehicleid")
    assert line.startswith("warning: 2 of 4 query pictures") and f"{paths[0]}, in the gallery {paths[2]}" in line
    (line,) = reid_leaks(ReIDDataset([], one_set, list(one_set)), "no_camera")  # which finds each picture itself
    assert line.startswith("warning: 4 of 4 query pictures")
    (line,) = reid_leaks(ReIDDataset([sample(make("5", "z"), name="7")], one_set, list(one_set)), "vehicleid")[:1]
    assert line.startswith("warning: 1 of 4 pictures of query and gallery are in train")


def test_names_that_are_no_text_are_printable(make):
    names = ("a\nb\x1b.jpg", "c\udce4.jpg")
    query, gallery = ([sample(make(name, "x"), name=f"i\n{name}")] for name in names)
    lines = reid_leaks(ReIDDataset(query, query, gallery), "no_camera")
    assert len(lines) == 3 and all(line.encode() and len(line.splitlines()) == 1 for line in lines)


@pytest.mark.parametrize("name", ["coil20_reid", "coil100_reid"])
def test_nothing_is_said_of_good_data(shared_data, name):
    assert reid_leaks(load_reid_dataset("market1501", shared_data / name), "market1501") == []


def test_nothing_is_said_of_the_synthetic_set(baggage):
    dataset = load_reid_dataset("synthetic", baggage)
    assert reid_leaks(dataset, "no_camera") == [] and all(s.name for part in dataset for s in part)
    scenes = [
        read_coco(baggage / f"scenes/annotations/instances_{split}2017.json", baggage / f"scenes/{split}2017")
        for split in ("train", "val")
    ]
    assert detection_leaks(*scenes) == []


# --------------------------------------------------------------------------------------------------------- detection


def coco(paths):
    return CocoData([CocoPicture(number, path, 8, 8, []) for number, path in enumerate(paths)], [], "x.json", [], {})


def test_pictures_of_val_that_are_trained_on(make):
    train = coco([make("train/1", "x"), make("train/2", "y")])
    val = coco([make("val/1", "z"), make("val/2", "y"), make("val/3", "y")])
    assert detection_leaks(train, val) == [
        f"warning: 2 of 3 pictures of val are in train too, byte for byte; the first is {val.pictures[1].path}, in "
        f"train {train.pictures[1].path}: the metrics will be too good"
    ]
    assert "3 of 3 pictures of val" in detection_leaks(val, val)[0]
    assert detection_leaks(train, coco([])) == []


def test_a_picture_that_is_listed_twice_may_be_held_out_and_trained_on(make):
    parts = split_coco(coco([make("1", "x")] * 2), 0.5, seed=0)
    assert len(detection_leaks(*parts)) == 1


@pytest.mark.parametrize("name", ["tiny_coco", "pennfudan_coco", "nuts_coco"])
def test_nothing_is_said_of_good_scenes(shared_data, name):
    def part(split):
        root = shared_data / name
        if (root / "images").is_dir():
            return read_coco(root / f"annotations/instances_{split}.json", root / "images")
        return read_coco(root / f"annotations/instances_{split}2017.json", root / f"{split}2017")

    assert detection_leaks(part("train"), part("val")) == []
