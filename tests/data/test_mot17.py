"""Persons cut out of sequences written here: three of them in two or three copies, frames of 40 x 60 pixels."""

import pytest
from PIL import Image

from core.data.mot17 import cut_persons
from core.data.reid_datasets import check_evaluation, default_protocol, load_reid_dataset
from core.errors import InputError

# frame, track, left, top, width, height, considered, class, visible part; the last four of each line decide
BOXES = """\
1,1,10,20,8,16,1,1,1
1,2,-4,5,10,20,1,1,0.3
1,3,30,5,6,12,1,1,0.29
1,4,30,5,6,12,1,7,1
1,5,30,5,6,12,0,1,1
1,6,50,5,6,12,1,1,1
2,1,11,20,8,16,1,1,1
21,1,20,20,8.5,16,1,1,1
11,1,15,20,8,16,1,1,0.9
"""


def write_mot17(root, sequences=("02", "04", "11"), copies=("DPM", "FRCNN"), boxes=BOXES):
    for number in sequences:
        for copy in copies:
            folder = root / "train" / f"MOT17-{number}-{copy}"
            for part in ("gt", "img1"):
                (folder / part).mkdir(parents=True)
            (folder / "gt" / "gt.txt").write_text(boxes)
            for frame in (1, 11, 21):
                image = Image.new("RGB", (40, 60), (frame, 200 * (copy == "FRCNN"), 0))
                image.save(folder / "img1" / f"{frame:06d}.jpg", quality=100)
    return root


def test_persons_are_cut_once_and_read_from_the_cuts(tmp_path):
    root = write_mot17(tmp_path / "MOT17")
    dataset = load_reid_dataset("mot17", tmp_path)
    assert [(s.name, s.id, s.camera) for s in dataset.train] == [
        ("020001", 0, 1), ("020001", 0, 1), ("020001", 0, 1), ("020002", 1, 1),
        ("040001", 2, 3), ("040001", 2, 3), ("040001", 2, 3), ("040002", 3, 3),
    ]  # fmt: skip
    assert [(s.id, s.camera) for s in dataset.query] == [(110001, 10)]  # a person with one picture does not ask
    assert [s.id for s in dataset.gallery] == [110001, 110001, 110002]
    assert dataset.query[0].path == str(root / "reid" / "query" / "110001_c11_000001.jpg")
    sizes = [Image.open(s.path).size for s in dataset.train[:4]]
    assert sizes == [(8, 16), (8, 16), (9, 16), (6, 20)]  # whole pixels; what lies in the frame
    assert Image.open(dataset.train[0].path).getpixel((2, 2))[1] > 150  # out of the copy FRCNN
    assert check_evaluation(dataset, default_protocol("mot17")) is None
    for path in (root / "train").iterdir():
        path.rename(tmp_path / path.name)
    assert load_reid_dataset("mot17", root) == dataset
    assert {path.name for path in root.iterdir()} == {"reid", "train"}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda root: (root / "train/MOT17-02-FRCNN").rename(root / "elsewhere"), "expected two sequences or more"),
        (lambda root: (root / "train/MOT17-02-FRCNN/gt/gt.txt").unlink(), r"gt.txt: can't be read"),
        (lambda root: (root / "train/MOT17-02-FRCNN/gt/gt.txt").write_text("1,2,3\n"), r"gt.txt: not a list of lines"),
        (lambda root: (root / "train/MOT17-04-FRCNN/img1/000011.jpg").unlink(), r"img1/000011.jpg"),
        (lambda root: (root / "reid").touch(), r"reid: can't be written"),
    ],
)
def test_what_is_damaged_is_named_and_nothing_is_left(tmp_path, damage, said):
    damage(write_mot17(tmp_path, sequences=("02", "04"), copies=("FRCNN",)))
    left = set(tmp_path.iterdir())
    with pytest.raises(InputError, match=said):
        cut_persons(tmp_path)
    assert set(tmp_path.iterdir()) == left
