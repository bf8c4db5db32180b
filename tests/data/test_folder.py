import pytest

from core.data.reid_datasets import check_evaluation, check_training, load_reid_dataset
from core.errors import InputError


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def seen(root, samples):
    return [(sample.path.removeprefix(f"{root}/"), sample.id, sample.name) for sample in samples]


def test_train_query_gallery(tmp_path):
    touch(
        tmp_path,
        *("train/blue bag/1.jpg", "train/blue bag/beach/2.PNG", "train/anna's/1.webp", "train/anna's/notes.txt"),
        *("query/zoe/1.jpg", "gallery/zoe/2.jpg", "gallery/kim/1.jpg", "gallery/.cache/1.jpg"),
    )
    dataset = load_reid_dataset("folder", tmp_path)
    assert seen(tmp_path, dataset.train) == [
        ("train/anna's/1.webp", 0, "anna's"),
        ("train/blue bag/1.jpg", 1, "blue bag"),
        ("train/blue bag/beach/2.PNG", 1, "blue bag"),
    ]
    assert seen(tmp_path, dataset.query) == [("query/zoe/1.jpg", 1, "zoe")]
    assert seen(tmp_path, dataset.gallery) == [("gallery/kim/1.jpg", 0, "kim"), ("gallery/zoe/2.jpg", 1, "zoe")]
    assert check_evaluation(dataset, "no_camera") is None
    with pytest.raises(InputError, match="one camera.*the protocol no_camera"):
        check_evaluation(dataset, "market1501")


def test_split_made_of_test_is_the_same_every_time(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "test/x/b.jpg", "test/x/a.jpg", "test/x/c.jpg", "test/y/1.jpg")
    dataset = load_reid_dataset("folder", tmp_path)
    assert seen(tmp_path, dataset.query) == [("test/x/a.jpg", 0, "x")]
    assert seen(tmp_path, dataset.gallery) == [
        ("test/x/b.jpg", 0, "x"),
        ("test/x/c.jpg", 0, "x"),
        ("test/y/1.jpg", 1, "y"),
    ]
    assert load_reid_dataset("folder", tmp_path) == dataset


def test_numbers_as_names_stay_apart(tmp_path):
    touch(tmp_path, "train/7/1.jpg", "train/007/1.jpg", "query/a/1.jpg", "gallery/a/2.jpg")
    assert [sample.id for sample in load_reid_dataset("folder", tmp_path).train] == [0, 1]


def test_without_train_it_can_be_evaluated_only(tmp_path):
    touch(tmp_path, "query/a/1.jpg", "gallery/a/2.jpg")
    dataset = load_reid_dataset("folder", tmp_path)
    assert dataset.train == [] and check_evaluation(dataset, "no_camera") is None
    with pytest.raises(InputError, match="no training pictures"):
        check_training(dataset)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/a/1.jpg", "train/b/1.jpg", "query/a/1.jpg"], "gallery: no such folder"),
        (["train/notes.txt", "test/a/1.jpg"], "train: holds no pictures; expected train/<identity>/<picture>"),
        (["train/a/notes.txt", "test/a/1.jpg"], "train: holds no pictures"),
        (["train/a/1.jpg", "train/2.jpg", "test/a/1.jpg"], "train: 1 pictures lie outside .*the first is 2.jpg"),
        (["train/a/1.jpg", "train/b/1.jpg", "test/a/1.jpg", "test/b/1.jpg"], "every identity has a single picture"),
        (["notes.txt", "a/notes.txt"], r"holds no pictures; expected .*/<identity>/<picture>"),
        (["a/1.jpg", "b/1.jpg", "2.jpg"], "1 pictures lie outside the identities' folders, the first is 2.jpg"),
        (["bounding_box_train/1_c1.jpg", "notes/1.jpg"], "laid out as the data set market1501, not as folders"),
        (["MVB_train/Image/1.jpg", "notes/1.jpg"], "laid out as the data set mvb, not as folders"),
    ],
)
def test_bad_folders(tmp_path, names, message):
    touch(tmp_path, *names)
    with pytest.raises(InputError, match=message):
        load_reid_dataset("folder", tmp_path)


@pytest.mark.parametrize("prefix", ["", "train/"])
@pytest.mark.parametrize(
    ("counts", "fraction", "tested"),
    [
        ([2] * 10, 0.2, 2),
        ([3] * 20, 0.2, 4),
        ([2] * 4, 0.01, 2),  # two at least, or there is nobody to be taken for another
        ([2] * 4, 0.9, 2),  # and two at least to learn
        ([2] * 3, 0.2, 0),
        ([2, 1, 1, 1, 1, 1], 0.4, 0),  # a picture that asks, and one to be found
        ([2, 1, 2, 1, 1], 0.2, 2),
        ([2, 2, 1], 1.0, 3),
        ([2] * 9, 0.0, 0),
    ],
)
def test_identities_are_held_out_where_nobody_split_them(tmp_path, prefix, counts, fraction, tested):
    names = [f"{prefix}bag {bag}/{number}.jpg" for bag, count in enumerate(counts) for number in range(count)]
    touch(tmp_path, *names)
    dataset = load_reid_dataset("folder", tmp_path, fraction)
    learned, held = ({sample.name for sample in part} for part in (dataset.train, dataset.gallery))
    assert len(held) == tested and len(learned) == len(counts) - tested and not learned & held
    assert {sample.path for part in dataset for sample in part} == {str(tmp_path / name) for name in names}
    assert sorted({sample.id for sample in dataset.train}) == list(range(len(learned)))
    if tested:
        assert check_evaluation(dataset, "no_camera") is None
        assert all(sample.name in held for sample in dataset.query)
    assert load_reid_dataset("folder", tmp_path, fraction) == dataset


def test_a_new_identity_moves_few_others(tmp_path):
    touch(tmp_path, *(f"{bag}/{number}.jpg" for bag in range(30) for number in range(2)))
    before = {sample.name for sample in load_reid_dataset("folder", tmp_path).query}
    touch(tmp_path, "new/1.jpg", "new/2.jpg")
    assert len(before ^ {sample.name for sample in load_reid_dataset("folder", tmp_path).query}) <= 2


def test_query_identity_absent_from_the_gallery(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "query/x/1.jpg", "query/y/1.jpg", "gallery/y/2.jpg")
    assert "1 of 2 query pictures have no match" in check_evaluation(load_reid_dataset("folder", tmp_path), "no_camera")


def test_pictures_that_nobody_has_named(tmp_path):
    touch(tmp_path, "b/1.jpg", "a.png", "b/c/2.webp", "notes.txt")
    dataset = load_reid_dataset("pictures", tmp_path)
    assert seen(tmp_path, dataset.train) == [("a.png", 0, ""), ("b/1.jpg", 1, ""), ("b/c/2.webp", 2, "")]
    assert dataset.query == dataset.gallery == []
