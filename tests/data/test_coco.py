"""COCO files: what is read, what is left out for training, the split, the ground truth, and one line for each fault."""

import json
import os
import re
import shutil
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from core.data.coco import (
    CocoCategory,
    coco_ground_truth,
    coco_paths,
    encode_mask,
    for_training,
    read_coco,
    split_coco,
)
from core.data.coco_checks import BrokenEntries, _total, check_outline
from core.data.coco_files import find_pictures
from core.data.coco_images import CocoImages
from core.data.coco_views import MOST_HEADERS
from core.errors import InputError

WIDTH, HEIGHT = 40, 30
TRIANGLE = [[10, 5, 20, 5, 10, 15]]
# A rectangle of columns 4-5 and rows 10-19, written column by column: 4 columns and 10 rows without, then 10 with, ...
COUNTS = [4 * HEIGHT + 10, 10, 20, 10, 10 + 34 * HEIGHT]


def compressed(box=(4, 10, 6, 20), width=WIDTH, height=HEIGHT):
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[box[1] : box[3], box[0] : box[2]] = 1
    encoded = coco_mask.encode(mask)
    return {"size": [height, width], "counts": encoded["counts"].decode("ascii")}


def annotation(number, image=5, category=18, **fields):
    entry = {"id": number, "image_id": image, "category_id": category, "bbox": [10, 5, 10, 10], "area": 50.0}
    return entry | {"iscrowd": 0, "segmentation": TRIANGLE} | fields


def content():
    """Two pictures, of which the second has no objects; ids with gaps, categories not in the order of their ids."""
    return {
        "info": {"year": 2024},
        "images": [
            {"id": 5, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
            {"id": 2, "file_name": "more/b.png", "width": 20, "height": 50},
        ],
        "categories": [{"id": 18, "name": "box"}, {"id": 3, "name": "bag", "supercategory": "baggage"}],
        "annotations": [
            annotation(0),
            annotation(7, category=3, bbox=[4, 10, 2, 10], area=20, segmentation=compressed()),
            annotation(4, bbox=[4, 10, 2, 10], iscrowd=1, segmentation={"size": [HEIGHT, WIDTH], "counts": COUNTS}),
        ],
    }


@pytest.fixture
def write(tmp_path):
    """Function: content -> (annotation file, images folder); the pictures are there."""
    (tmp_path / "images" / "more").mkdir(parents=True)
    Image.new("RGB", (WIDTH, HEIGHT), "grey").save(tmp_path / "images" / "a.png")
    Image.new("RGB", (20, 50), "grey").save(tmp_path / "images" / "more" / "b.png")

    def to_disk(data, name="instances.json"):
        path = tmp_path / name
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        return path, tmp_path / "images"

    return to_disk


def alike(images, numbers, width=WIDTH, height=HEIGHT):
    """An entry for each id, with a file of its own."""
    for number in numbers:
        if not (images / f"{number}.png").exists():
            os.link(images / "a.png", images / f"{number}.png")
    return [{"id": number, "file_name": f"{number}.png", "width": width, "height": height} for number in numbers]


def annotations_of(data):
    return [annotation for picture in data.pictures for annotation in picture.annotations]


def test_what_is_read(write):
    path, images = write(content())
    data = read_coco(path, images)
    assert data.categories == [(3, "bag"), (18, "box")]
    first, second = data.pictures
    assert first[:4] == (5, str(images / "a.png"), WIDTH, HEIGHT) and len(first.annotations) == 3
    assert second == (2, str(images / "more/b.png"), 20, 50, [])
    triangle, bag, crowd = first.annotations
    assert (triangle.id, triangle.label, triangle.box, triangle.area) == (0, 2, (10, 5, 20, 15), 50)
    assert [list(polygon) for polygon in triangle.segmentation] == TRIANGLE and triangle.crowd is False
    assert (bag.label, bag.box, bag.segmentation) == (1, (4, 10, 6, 20), compressed())
    assert crowd.crowd is True and crowd.segmentation["counts"] == COUNTS
    assert (data.annotations_path, data.notes, data.dropped) == (str(path), [], {})
    assert [data.categories[entry.label - 1].id for entry in first.annotations] == [18, 3, 18]


def test_polygons_and_both_kinds_of_run_lengths_make_the_masks_of_pycocotools(write):
    path, images = write(content())
    reference = COCO(path)
    for entry in annotations_of(read_coco(path, images)):
        mask = coco_mask.decode(encode_mask(entry.segmentation, WIDTH, HEIGHT))
        assert mask.shape == (HEIGHT, WIDTH) and np.array_equal(mask, reference.annToMask(reference.anns[entry.id]))
    rectangle = np.zeros((HEIGHT, WIDTH))
    rectangle[10:20, 4:6] = 1
    assert np.array_equal(mask, rectangle)


def test_a_picture_without_size_has_that_of_the_stored_one(write):
    data = content()
    del data["images"][0]["width"], data["images"][0]["height"]
    path, images = write(data)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (WIDTH, HEIGHT)).save(images / "a.png", exif=exif)
    read = read_coco(path, images)
    assert read.pictures[0][2:4] == (WIDTH, HEIGHT) and len(read.pictures[0].annotations) == 3
    assert len(read.notes) == 1 and "images without width and height (1)" in read.notes[0]


def test_area_and_iscrowd_may_be_missing(write):
    data = content()
    for entry in data["annotations"]:
        del entry["area"], entry["iscrowd"]
    triangle, *rectangles = annotations_of(read_coco(*write(data)))
    assert 45 <= triangle.area <= 55  # half of 10 x 10, as pycocotools draws it
    assert [entry.area for entry in rectangles] == [20, 20] and not any(entry.crowd for entry in rectangles)


def test_paths_of_the_layout_of_2017(tmp_path):
    assert coco_paths(tmp_path, "val") == (tmp_path / "val2017", tmp_path / "annotations" / "instances_val2017.json")


# --- Faults. Each is a change of the content above, and what the one line has to say.


def change(part, number, **fields):
    def apply(data):
        data[part][number].update(fields)

    return apply


def remove(part, number, field):
    return lambda data: data[part][number].pop(field)


def append(part, entry):
    return lambda data: data[part].append(entry)


def rle(**fields):
    return change("annotations", 1, segmentation=compressed() | fields)


LEADING_OUT = [
    "/a.png", "//server/a.png", "../a.png", "more/../../a.png", "..", "more/../../images-2/a.png", "..\\a.png",
    "more\\..\\..\\a.png", "\\\\server\\a.png", "\\a.png", "C:\\a.png", "d:/a.png",
]  # fmt: skip
FAULTS = [
    (change("annotations", 1, image_id=77), "annotation 7: image 77 is not listed"),
    (change("annotations", 1, category_id=77), "annotation 7: category 77 is not listed"),
    (append("images", {"id": 5, "file_name": "c.png", "width": 1, "height": 1}), "id 5 is there twice"),
    (append("annotations", annotation(7)), r"annotations\[3\]: id 7 is there twice"),
    (append("categories", {"id": 3, "name": "cup"}), "id 3 is there twice"),
    (change("annotations", 0, bbox=[10, 5, -10, 10]), "annotation 0: bbox .* negative size"),
    (change("annotations", 0, bbox=[10, 5, 10, -0.5]), "annotation 0: bbox .* negative size"),
    (change("annotations", 0, bbox=[10, 5, 10]), "annotation 0: bbox has to be"),
    (change("annotations", 0, bbox=[10, 5, 10, "10"]), "annotation 0: bbox has to be"),
    (change("annotations", 0, bbox=[10, 5, 10, float("nan")]), "annotation 0: bbox has to be"),
    (change("annotations", 0, bbox=[10, 5, 10, 10**400]), "annotation 0: bbox has to be"),
    (change("annotations", 0, bbox=[True, 5, 10, 10]), "annotation 0: bbox has to be"),
    (remove("annotations", 0, "bbox"), "annotation 0: bbox has to be"),
    (change("annotations", 0, area=-1), "annotation 0: area"),
    (change("annotations", 0, area="big"), "annotation 0: area"),
    (change("annotations", 0, area=float("nan")), "annotation 0: area"),
    (change("annotations", 0, iscrowd=2), "annotation 0: iscrowd"),
    (change("annotations", 0, iscrowd=[]), "annotation 0: iscrowd"),
    (remove("annotations", 0, "image_id"), "annotation 0: needs image_id"),
    (remove("annotations", 0, "category_id"), "annotation 0: needs category_id"),
    (change("annotations", 0, image_id="5"), "annotation 0: needs image_id.*'5'"),
    (remove("annotations", 0, "id"), r"annotations\[0\]: needs an id"),
    (change("annotations", 0, id=1.5), r"annotations\[0\]: needs an id"),
    (remove("annotations", 0, "segmentation"), "annotation 0: has no segmentation"),
    (change("annotations", 0, segmentation=[]), "annotation 0: has no segmentation"),
    (change("annotations", 0, segmentation=None), "annotation 0: has no segmentation"),
    (change("annotations", 0, segmentation=5), "annotation 0: segmentation has to be"),
    (change("annotations", 0, segmentation=[[1, 2, 3, 4]]), "annotation 0: a polygon of 4 numbers.*3 points"),
    (change("annotations", 0, segmentation=[*TRIANGLE, [1, 2, 3, 4]]), "annotation 0: a polygon of 4 numbers"),
    (change("annotations", 0, segmentation=[[]]), "annotation 0: a polygon of 0 numbers"),
    (change("annotations", 0, segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "annotation 0: a polygon of 7 numbers"),
    (change("annotations", 0, segmentation=[[[1, 2], [3, 4], [5, 6]]]), "annotation 0: a polygon has to be"),
    (change("annotations", 0, segmentation=[1, 2, 3, 4, 5, 6]), "annotation 0: a polygon has to be"),
    (change("annotations", 0, segmentation=[[1, 2, 3, 4, 5, 1e9]]), "annotation 0: a polygon has to be"),
    (change("annotations", 0, segmentation=[[1, 2, 3, 4, 5, float("inf")]]), "annotation 0: a polygon has to be"),
    (rle(size=[WIDTH, HEIGHT]), r"annotation 7: its run lengths have size \[40, 30\] and the image \[30, 40\]"),
    (rle(size=None), "annotation 7: run lengths need"),
    (rle(counts=5), "annotation 7: run lengths need"),
    (rle(counts=[10, 20]), "annotation 7: its run lengths are damaged"),
    (rle(counts=[WIDTH * HEIGHT + 5, -5]), "annotation 7: its run lengths are damaged"),
    (rle(counts=[float(WIDTH * HEIGHT)]), "annotation 7: its run lengths are damaged"),
    (rle(counts=""), "annotation 7: its run lengths are damaged"),
    (rle(counts=compressed()["counts"][:-2]), "annotation 7: its run lengths are damaged"),
    (rle(counts="\u00e9\u00e9"), "annotation 7: its run lengths are damaged"),
    (rle(counts="\ud800"), "annotation 7: its run lengths are damaged"),
    (rle(counts="o" * 20 + "0"), "annotation 7: its run lengths are damaged"),
    (rle(counts="o" * 500), "annotation 7: its run lengths are damaged"),
    (change("images", 0, width=-40), "image 5: width and height"),
    (change("images", 0, height=0), "image 5: width and height"),
    (change("images", 0, height="30"), "image 5: width and height"),
    (change("images", 0, height=10**12), "image 5: width and height"),
    (remove("images", 0, "width"), "image 5: width and height"),
    (remove("images", 0, "file_name"), "image 5: needs file_name"),
    (change("images", 0, file_name=""), "image 5: needs file_name"),
    (change("images", 0, file_name="c.png"), "1 of 2 pictures .*c.png"),
    (change("images", 0, file_name="gone/a.png"), "1 of 2 pictures .*gone/a.png"),
    *(
        (change("images", 0, file_name=name), "image 5: file_name .* leads out of .*; name a picture in it")
        for name in LEADING_OUT
    ),
    (change("images", 0, id=None), r"images\[0\]: needs an id"),
    (append("images", "a.png"), r"images\[2\]: needs an id"),
    (remove("categories", 0, "name"), "category 18: needs name"),
    (change("categories", 0, name=4), "category 18: needs name"),
    (append("categories", None), r"categories\[2\]: needs an id"),
    (lambda data: data.update(images=[]), "lists no images"),
    (lambda data: data.update(categories=[]), "lists no categories"),
    (lambda data: data.pop("images"), "needs a list of images"),
    (lambda data: data.pop("annotations"), "needs a list of annotations"),
    (lambda data: data.pop("categories"), "needs a list of categories"),
    (lambda data: data.update(annotations={"a": 1}), "needs a list of annotations"),
]


@pytest.mark.parametrize(("damage", "says"), FAULTS)
def test_a_fault_is_one_line_that_names_it(write, damage, says):
    data = content()
    damage(data)
    path, images = write(data)
    with pytest.raises(InputError, match=says) as caught:
        read_coco(path, images)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON"),
        ("{'images': 1}", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1" + "0" * 5000 + "]", "not JSON"),
        ("[1, 2]", "expected an object .* found list"),
        ("null", "expected an object"),
        ("{}", "needs a list of categories"),
    ],
)
def test_what_is_no_annotation_file(write, text, says):
    with pytest.raises(InputError, match=says) as caught:
        read_coco(*write(text))
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders(write, tmp_path):
    path, images = write(content())
    with pytest.raises(InputError, match="nothing.json: can't be read"):
        read_coco(tmp_path / "nothing.json", images)
    with pytest.raises(InputError, match="elsewhere: no such folder"):
        read_coco(path, tmp_path / "elsewhere")
    with pytest.raises(InputError, match="can't be read|not a text file"):
        read_coco(images, images)
    with pytest.raises(InputError, match="not a text file"):
        read_coco(images / "a.png", images)


def test_compressed_run_lengths_are_summed_as_pycocotools_reads_them():
    generator = np.random.default_rng(0)
    for _ in range(50):
        height, width = generator.integers(1, 300, 2)
        smooth = np.repeat(generator.random((height, -(-width // 7))), 7, axis=1)[:, :width]
        mask = np.asfortranarray(smooth > generator.random(), dtype=np.uint8)
        counts = coco_mask.encode(mask)["counts"].decode("ascii")
        assert _total(counts) == height * width
        assert _total(counts + "1") != height * width


# --- Categories of another file


def test_labels_by_the_categories_of_a_training_file(write):
    data = content()
    wanted = [(1, "cup"), (18, "bag"), (3, "box")]
    read = read_coco(*write(data), categories=wanted)
    assert [entry.label for entry in annotations_of(read)] == [3, 2, 3]
    # Back to this file's ids; "cup", which it lacks, keeps its own. Else it would have had a free one:
    assert read.categories == [(1, "cup"), (3, "bag"), (18, "box")]
    assert all(type(category) is CocoCategory for category in read.categories)
    read = read_coco(*write(data), categories=[[3, "cup"], [4, "box"], [18, "hat"], [9, "bag"]])
    assert read.categories == [(19, "cup"), (18, "box"), (20, "hat"), (3, "bag")]
    assert [entry.label for entry in annotations_of(read)] == [2, 4, 2]


def test_two_categories_of_one_name_are_told_apart_by_id(write):
    data = content()
    data["categories"] = [{"id": 18, "name": "bag"}, {"id": 3, "name": "bag"}]
    own = read_coco(*write(data))
    assert [entry.label for entry in annotations_of(own)] == [2, 1, 2]
    again = read_coco(*write(data), categories=own.categories)
    assert again == own


def test_categories_that_training_does_not_know(write):
    path, images = write(content())
    with pytest.raises(InputError, match="annotation 7: category 'bag' is not one of .*box"):
        read_coco(path, images, categories=[(1, "box")])
    with pytest.raises(InputError, match="no name in common.*cup"):
        read_coco(path, images, categories=[(18, "cup")])
    data = content()
    del data["annotations"][1]  # listed, but without an object: nothing is lost
    assert read_coco(*write(data), categories=[(1, "box")]).categories == [(18, "box")]


def test_of_two_categories_of_one_name_that_no_id_tells_apart_the_first_counts(write):
    read = read_coco(*write(content()), categories=[(1, "bag"), (2, "bag"), (4, "box"), (5, "box")])
    assert [entry.label for entry in annotations_of(read)] == [3, 1, 3]
    assert [category.id for category in read.categories] == [3, 2, 18, 5]


# --- Entries of one file


def one_an_object(*names, **fields):
    """The content above with its first picture listed once more for each name, with an object each; a fresh outline."""
    data = content()
    data["images"] += [
        {"id": 30 + place, "file_name": name, "width": WIDTH, "height": HEIGHT} | fields
        for place, name in enumerate(names)
    ]
    data["annotations"] += [
        annotation(40 + place, 30 + place, bbox=[place, 20, 5, 5], segmentation=square(place, 20, 5))
        for place in range(len(names))
    ]
    return data


def square(x, y, side):
    return [[x, y, x + side, y, x + side, y + side, x, y + side]]


def test_entries_of_one_file_are_one_picture(write):
    path, images = write(one_an_object("a.png", "a.png", "a.png"))
    read = read_coco(path, images)
    assert [(picture.id, picture.path) for picture in read.pictures] == [
        (5, str(images / "a.png")),
        (2, str(images / "more/b.png")),
    ]
    assert [entry.id for entry in read.pictures[0].annotations] == [0, 7, 4, 40, 41, 42]
    assert read.notes == [
        f"{path}: pictures listed under several image ids (1): merged, each under its first id"
    ]  # one line, for all of them
    ground_truth = coco_ground_truth(read)
    assert ground_truth.getImgIds() == [5, 2] and len(ground_truth.getAnnIds(imgIds=[5])) == 6


@pytest.mark.parametrize("name", ["./a.png", "more/../a.png", "more/.././a.png", ".//a.png", "link/a.png", "whole"])
def test_the_spelling_of_a_path_makes_no_other_picture(write, name):
    _, images = write(content())
    os.symlink(images, images / "link")
    read = read_coco(*write(one_an_object(str(images / "a.png") if name == "whole" else name)))
    assert ids_of(read) == [5, 2] and [entry.id for entry in read.pictures[0].annotations] == [0, 7, 4, 40]
    assert len(read.notes) == 1 and "several image ids (1)" in read.notes[0]


def test_files_of_one_name_in_two_folders_are_two_pictures(write):
    _, images = write(content())
    os.link(images / "a.png", images / "more" / "a.png")
    read = read_coco(*write(one_an_object("more/a.png")))
    assert ids_of(read) == [5, 2, 30] and read.notes == []


def test_entries_of_one_file_that_disagree_about_its_size(write):
    for fields in ({"width": 41}, {"width": HEIGHT, "height": WIDTH}):
        with pytest.raises(
            InputError, match=r"images 5 and 30 are both .*a.png, the one of 40x30 .* other of "
        ) as caught:
            read_coco(*write(one_an_object("./a.png", **fields)), skip_broken=True)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("without", [0, 2])
def test_one_entry_may_know_the_size_for_all(write, without):
    data = one_an_object("a.png")
    del data["images"][without]["width"], data["images"][without]["height"]
    read = read_coco(*write(data))
    assert read.pictures[0][:1] + read.pictures[0][2:4] == (5, WIDTH, HEIGHT)
    assert len(read.notes) == 1 and "several image ids" in read.notes[0]


def test_one_picture_is_never_in_both_parts(write):
    data = many(write, [[1], [2], [1], [2]])
    assert data.notes == []
    listed = json.loads(Path(data.annotations_path).read_text())
    again = [entry | {"id": 100 + entry["id"]} for entry in listed["images"]]
    listed["images"] += again
    listed["annotations"] += [
        annotation(1000 + entry["id"], entry["id"], 3, bbox=[1, 1, 9, 9], segmentation=square(1, 1, 9))
        for entry in again
    ]
    read = read_coco(*write(listed))
    for seed in range(5):
        train, val = split_coco(read, 0.5, seed)
        paths = [picture.path for picture in train.pictures + val.pictures]
        assert len(paths) == len(set(paths)) == 4
        assert all(len(picture.annotations) == 2 for picture in train.pictures + val.pictures)


# --- Boxes and areas beside their masks


def scattered(count=12, boxes=lambda x, y, w, h: [x, y, w, h], areas=lambda area, w, h: area, **fields):
    """Content with `count` objects of several shapes and sizes, boxes and areas as `boxes`, `areas` write them."""
    data = content()
    data["annotations"] = []
    for number in range(count):
        x, y, w, h = 3 + 2 * number % 21, 2 + 3 * number % 17, 5 + number % 7, 4 + number % 5
        if number % 3 == 0:
            outline, area = [[x, y, x + w, y, x, y + h]], w * h / 2
        elif number % 3 == 1:
            outline, area = compressed((x, y, x + w, y + h)), w * h
        else:
            decoded = coco_mask.decode(compressed((x, y, x + w, y + h)))
            changes = np.flatnonzero(np.diff(decoded.ravel(order="F"), prepend=0, append=2))
            outline, area = {"size": [HEIGHT, WIDTH], "counts": np.diff(changes, prepend=0).tolist()}, w * h
        data["annotations"].append(
            annotation(number, bbox=boxes(x, y, w, h), area=areas(area, w, h), segmentation=outline, **fields)
        )
    return data


def test_right_boxes_and_areas_pass_in_silence(write):
    assert read_coco(*write(scattered(1000))).notes == []
    assert read_coco(*write(scattered(areas=lambda area, w, h: w * h))).notes == []  # the box's, as many write it
    assert read_coco(*write(scattered(areas=lambda area, w, h: area * 1.8))).notes == []
    assert read_coco(*write(scattered(boxes=lambda x, y, w, h: [x - 1, y - 1, w + 2, h + 2]))).notes == []


WRONG_BOXES = [
    (lambda x, y, w, h: [x, y, x + w, y + h], r"\[x1, y1, x2, y2\];"),
    (lambda x, y, w, h: [x + w / 2, y + h / 2, w, h], r"\[center x, center y, width, height\];"),
    (lambda x, y, w, h: [y, x, h, w], r"\[y, x, height, width\];"),
    (lambda x, y, w, h: [y, x, y + h, x + w], r"\[y1, x1, y2, x2\];"),
    (lambda x, y, w, h: [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT], r"\[x, y, width, height\] as fractions of"),
    (
        lambda x, y, w, h: [(x + w / 2) / WIDTH, (y + h / 2) / HEIGHT, w / WIDTH, h / HEIGHT],
        r"\[center x, center y, width, height\] as fractions of",
    ),
    (
        lambda x, y, w, h: [100 * x / WIDTH, 100 * y / HEIGHT, 100 * w / WIDTH, 100 * h / HEIGHT],
        "do not belong together",
    ),
    (lambda x, y, w, h: [2 * x, 2 * y, 2 * w, 2 * h], "do not belong together"),
    (lambda x, y, w, h: [0.7 * x, 0.8 * y, 0.7 * w, 0.8 * h], "do not belong together"),
    (lambda x, y, w, h: [x + 3, y - 3, w, h], "do not belong together"),
    (lambda x, y, w, h: [(7 * x) % 20, (5 * y) % 11, h, 2 * w], "boxes and outlines do not belong together"),
]


@pytest.mark.parametrize(("boxes", "says"), WRONG_BOXES)
def test_boxes_that_are_not_those_of_their_masks_are_refused_with_the_reason(write, boxes, says):
    with pytest.raises(InputError, match=r"boxes that are not those of their masks \(\d+ of 12\).*" + says) as caught:
        read_coco(*write(scattered(boxes=boxes)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("boxes", "says"), WRONG_BOXES[:3])
def test_a_single_object_tells_too(write, boxes, says):
    data = content()
    data["annotations"] = [annotation(0, bbox=boxes(15, 4, 12, 6), segmentation=[[15, 4, 27, 4, 27, 10, 15, 10]])]
    with pytest.raises(InputError, match=says):
        read_coco(*write(data))


def test_corners_of_large_objects_are_found_though_they_overlap_as_sizes(write):
    """[1, 1, 30, 20] as corners or as sizes: the IoU is 0.9 to 0.8."""
    data = content()
    data["annotations"] = [
        annotation(x, bbox=[x, 3, x + 20, 25], area=440, segmentation=[[x, 3, x + 20, 3, x + 20, 25, x, 25]])
        for x in (4, 5, 6)
    ]
    with pytest.raises(InputError, match=r"boxes .*\(3 of 3\).*look like \[x1, y1, x2, y2\]"):
        read_coco(*write(data))


def test_some_wrong_boxes_are_counted_in_one_line(write):
    data = scattered()
    for entry in data["annotations"][3:7]:
        entry["bbox"][0] += 12
    path, images = write(data)
    x, y, w, h = data["annotations"][3]["bbox"]
    assert read_coco(path, images).notes == [
        f"{path}: boxes that are not those of their masks (4 of 12), such as annotation 3: [{x}, {y}, {w}, {h}], its "
        f"mask has [{x - 12}, {y}, {w}, {h}]"
    ]
    assert read_coco(path, images).pictures[0].annotations[3].box == (x, y, x + w, y + h)


def test_what_for_training_drops_anyway_is_not_held_against_a_mask(write):
    data = scattered(3)
    data["annotations"] += [
        annotation(20 + number, bbox=[20, 2, 0, 10] if number % 2 else [25, 2, 0.001, 5]) for number in range(9)
    ]
    data["annotations"] += [annotation(30 + number, bbox=[25, 2, 9, 9], iscrowd=1) for number in range(9)]
    empty = {"size": [HEIGHT, WIDTH], "counts": [WIDTH * HEIGHT]}
    outside = [[60, 5, 70, 5, 60, 15]]
    for number, outline in enumerate([empty, outside, [[5, 5, 5, 5, 5, 5]], [[1, 1, 9, 1, 5, 1]]] * 2):
        data["annotations"].append(annotation(50 + number, bbox=[25, 2, 9, 9], area=3, segmentation=outline))
    assert read_coco(*write(data)).notes == []
    data["annotations"] = data["annotations"][3:]
    assert read_coco(*write(data)).notes == []


def test_a_box_outside_the_picture_is_not_that_of_a_mask_inside(write):
    with pytest.raises(InputError, match=r"boxes that are not those of their masks \(12 of 12\).*do not belong"):
        read_coco(*write(scattered(boxes=lambda x, y, w, h: [x + 60, y, w, h])))


def test_of_an_object_across_the_border_what_is_inside_counts(write):
    data = content()
    outline = [[-20, 4, 10, 4, 10, 14, -20, 14]]
    data["annotations"] = [
        annotation(1, bbox=[-20, 4, 30, 10], area=300, segmentation=outline),
        annotation(2, bbox=[0, 4, 10, 10], area=100, segmentation=outline),
        annotation(3, bbox=[-20, 4, 30, 10], area=100, segmentation=compressed((0, 4, 10, 14))),
    ]
    assert read_coco(*write(data)).notes == []


WRONG_AREAS = [
    (lambda area, w, h: area / (WIDTH * HEIGHT), "fractions of the picture"),
    (lambda area, w, h: 0, "all of them are 0"),
    (lambda area, w, h: 1200, "all of them are 1200"),
    (lambda area, w, h: area / 100, "areas and outlines do not belong together"),
    (lambda area, w, h: area * 4, "areas and outlines do not belong together"),
]


@pytest.mark.parametrize(("areas", "says"), WRONG_AREAS)
def test_areas_that_are_not_those_of_their_masks_are_refused_with_the_reason(write, areas, says):
    says = r"areas that are not those of their masks \(\d+ of 12\).*" + says + ".*leave area out"
    with pytest.raises(InputError, match=says) as caught:
        read_coco(*write(scattered(areas=areas)))
    assert "\n" not in str(caught.value)
    data = scattered(areas=areas)
    for entry in data["annotations"]:
        del entry["area"]
    assert read_coco(*write(data)).notes == []


def test_some_wrong_areas_are_counted_in_one_line(write):
    data = scattered()
    for entry in data["annotations"][4:6]:
        entry["area"] *= 5
    path, images = write(data)
    area = data["annotations"][4]["area"]
    assert read_coco(path, images).notes == [
        f"{path}: areas that are not those of their masks (2 of 12), such as annotation 4: [{area}], its mask has "
        f"[{area // 5}]"
    ]


def test_outlines_that_cross_have_the_area_of_what_they_cover(write):
    bow = [[5, 5, 25, 25, 25, 5, 5, 25]]  # its two halves are walked around in opposite directions
    data = content()
    data["annotations"] = [annotation(1, bbox=[5, 5, 20, 20], segmentation=bow)]
    del data["annotations"][0]["area"]
    read = read_coco(*write(data))
    assert read.notes == [] and 150 < read.pictures[0].annotations[0].area < 250
    data["annotations"] = [annotation(1, bbox=[0, 5, 30, 5], area=60, segmentation=[[0, 5, 30, 5, 0, 9]] * 6)]
    assert read_coco(*write(data)).notes == []


@pytest.mark.parametrize("name", ["nuts", "pennfudan", "tiny"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_real_files_hold_against_their_masks(shared_data, name, split):
    root = shared_data / f"{name}_coco"
    images, path = coco_paths(root, split)
    if name != "tiny":
        images, path = root / "images", root / "annotations" / f"instances_{split}.json"
    data = read_coco(path, images)
    assert data.notes == [] and data.pictures


# --- Width and height beside the headers of the pictures


def sized(write, *size, **options):
    data = content()
    data["images"][0].update(width=size[0], height=size[1])
    data["annotations"] = []
    return read_coco(*write(data), **options)


def test_a_wrong_size_is_found_before_any_picture_is_read(write):
    for size in ((80, 60), (41, 30), (HEIGHT, WIDTH)):
        with pytest.raises(InputError, match=rf"a.png: the picture has 40x30 .* says {size[0]}x{size[1]}") as caught:
            sized(write, *size)
        assert "\n" not in str(caught.value)
        assert sized(write, *size, skip_broken=True).pictures[0][2:4] == size


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_may_be_that_of_the_stored_or_of_the_upright_picture(write, tmp_path, orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images" / "a.png", format=kind, exif=exif)
    assert sized(write, WIDTH, HEIGHT)
    if orientation >= 5:
        assert sized(write, HEIGHT, WIDTH)
    else:
        with pytest.raises(InputError, match="correct width and height there"):
            sized(write, HEIGHT, WIDTH)


@pytest.mark.parametrize("damage", [b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_a_broken_header_is_left_to_the_reading(write, tmp_path, damage):
    (tmp_path / "images" / "a.png").write_bytes(damage)
    assert len(sized(write, WIDTH, HEIGHT).pictures) == 2


def test_of_many_headers_some_are_read_spread_evenly(write, monkeypatch):
    data = content()
    data["images"] = alike(write(data)[1], range(10, 2 * MOST_HEADERS + 10), 80, 60)
    data["annotations"] = []
    opened, real = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path, **how: opened.append(os.path.basename(path)) or real(path, **how))
    assert len(read_coco(*write(data), skip_broken=True).pictures) == 2 * MOST_HEADERS
    assert opened == [f"{number}.png" for number in range(10, 2 * MOST_HEADERS + 10, 2)]
    with pytest.raises(InputError, match="says 80x60"):
        read_coco(*write(data))


# --- Pictures with an EXIF orientation


def turned(path, orientation, size=(WIDTH, HEIGHT), kind="JPEG"):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size, "grey").save(path, format=kind, exif=exif)


def photographs(write, *pictures):
    """Data of pictures (orientation, stored size, size in the file or None), each with an object near its origin."""
    data = content()
    _, images = write(data)
    data["images"], data["annotations"] = [], []
    for number, (orientation, stored, said) in enumerate(pictures):
        turned(images / f"{number}.jpg", orientation, stored)
        size = {} if said is None else {"width": said[0], "height": said[1]}
        data["images"].append({"id": number, "file_name": f"{number}.jpg", **size})
        data["annotations"].append(annotation(number, number))
    return data


SQUARE = (6, (30, 30), (30, 30))
HALF_TURN = (3, (40, 30), (40, 30))
MIRRORED = (2, (40, 30), (40, 30))
AS_STORED = (6, (40, 30), (40, 30))
AS_UPRIGHT = (8, (40, 30), (30, 40))
PLAIN = (1, (40, 30), (40, 30))


@pytest.mark.parametrize(
    ("pictures", "upright", "says"),
    [
        ([PLAIN, PLAIN], True, None),
        ([PLAIN, AS_STORED], False, None),
        ([AS_UPRIGHT, PLAIN], True, None),
        ([SQUARE], True, r"(1 of 1 looked at): outlines are taken to lie on the upright picture, as no other .* tells"),
        ([HALF_TURN, PLAIN, MIRRORED], True, r"(2 of 3 looked at).* upright picture, as no other picture tells"),
        ([SQUARE, AS_STORED], False, r"(1 of 2 looked at).* stored picture, as in 1 of 1 others"),
        ([SQUARE, HALF_TURN, AS_UPRIGHT], True, r"(2 of 3 looked at).* upright picture, as in 1 of 1 others"),
        ([MIRRORED, AS_STORED, AS_UPRIGHT, AS_STORED], False, r"(1 of 4 .* stored picture, as in 2 of 3 others"),
        ([MIRRORED, AS_STORED, AS_UPRIGHT], True, r"(1 of 3 .* upright picture, as in 1 of 2 others"),
    ],
)
def test_pictures_that_do_not_tell_follow_those_that_do(write, pictures, upright, says):
    path, images = write(photographs(write, *pictures))
    for skip_broken in (True, False):
        data = read_coco(path, images, skip_broken=skip_broken)
        assert data.upright is upright and len(data.notes) == (says is not None)
        if says:
            assert re.search(re.sub(r"[()]", r"\\\g<0>", says), data.notes[0]) and data.notes[0].startswith(f"{path}: ")
        assert for_training(data).upright is upright
        if len(pictures) > 1:
            assert {part.upright for part in split_coco(data, 0.5, 0)} == {upright}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "MPO"])
def test_the_orientation_is_read_from_every_kind_of_header(write, tmp_path, kind):
    for orientation, size, told in ((6, (30, 40), True), (6, (40, 30), False), (3, (40, 30), None)):
        turned(tmp_path / "images" / "a.png", orientation, kind=kind)
        data = content()
        data["images"][0].update(width=size[0], height=size[1])
        data["annotations"] = []
        read = read_coco(*write(data))
        assert read.upright is (told is not False) and len(read.notes) == (told is None)


def test_no_picture_is_decoded_for_its_orientation(write, monkeypatch):
    data = photographs(write, SQUARE, AS_STORED, PLAIN)
    data["images"].append({"id": 9, "file_name": "a.png", "width": WIDTH, "height": HEIGHT})
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    assert read_coco(*write(data)).upright is False


def test_a_picture_without_size_follows_its_objects_or_the_others(write):
    unsized = (6, (40, 30), None)
    path, images = write(data := photographs(write, unsized, unsized))
    read = read_coco(path, images)  # the objects lie within both views
    assert [picture[2:4] for picture in read.pictures] == [(30, 40)] * 2 and read.upright
    assert len(read.notes) == 2 and "images without width and height (2)" in read.notes[0]
    assert "(2 of 2 looked at): outlines are taken to lie on the upright picture, as no other" in read.notes[1]
    data["annotations"][0].update(bbox=[30, 5, 10, 10], segmentation=square(30, 5, 10))
    read = read_coco(*write(data))  # one of the first lies within the stored view alone
    assert [picture[2:4] for picture in read.pictures] == [(40, 30)] * 2 and not read.upright
    assert "(1 of 2 looked at): outlines are taken to lie on the stored picture, as in 1 of 1" in read.notes[1]
    data["annotations"][0].update(bbox=[5, 30, 10, 10], segmentation=square(5, 30, 10))
    read = read_coco(*write(data))  # and now within the upright one
    assert [picture[2:4] for picture in read.pictures] == [(30, 40)] * 2 and read.upright
    data["annotations"][1].update(segmentation=compressed((10, 5, 20, 15)))
    read = read_coco(*write(data))  # run lengths say the size
    assert [picture[2:4] for picture in read.pictures] == [(30, 40), (40, 30)] and len(read.notes) == 1
    read = read_coco(*write(photographs(write, unsized, AS_STORED)))
    assert [picture[2:4] for picture in read.pictures] == [(40, 30)] * 2 and not read.upright
    read = read_coco(*write(photographs(write, (3, (40, 30), None), (1, (40, 30), None), AS_UPRIGHT)))
    assert [picture[2:4] for picture in read.pictures] == [(40, 30), (40, 30), (30, 40)] and read.upright
    assert "(1 of 3 looked at)" in read.notes[1]


# --- What is left out for training


def test_for_training_leaves_out_what_can_not_be_learnt_and_counts_it(write):
    data = content()
    data["annotations"] += [
        annotation(20, bbox=[10, 5, 0, 10]),
        annotation(21, bbox=[10, 5, 10, 0.001]),
        annotation(22, bbox=[WIDTH, 5, 10, 10], segmentation=square(WIDTH, 5, 10)),
        annotation(23, bbox=[-10, 5, 10, 10], segmentation=square(-10, 5, 10)),
        annotation(24, bbox=[10, -20, 10, 10], segmentation=square(10, -20, 10)),
        annotation(28, bbox=[WIDTH - 0.001, 5, 10, 10], segmentation=square(WIDTH, 5, 10)),
        annotation(25, segmentation=[[60, 5, 70, 5, 60, 15]]),
        annotation(26, segmentation={"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}),
        annotation(27, bbox=[-5, 20, 10, 30], segmentation=[[-5, 20, 5, 20, 5, 50, -5, 50]]),
    ]
    path, images = write(data)
    read = read_coco(path, images)
    kept = for_training(read)
    assert [entry.id for entry in annotations_of(kept)] == [0, 7, 27] and len(kept.pictures) == 2
    assert kept.dropped == {
        "crowd regions": 1, "boxes without area": 2, "boxes outside the picture": 4, "empty masks": 2
    }  # fmt: skip
    assert kept.notes == [
        f"{path}: 9 of 12 objects left out: crowd regions (1), boxes without area (2), boxes outside the picture (4), "
        "empty masks (2)"
    ]
    assert annotations_of(kept)[-1].box == (0, 20, 5, 30)
    assert len(annotations_of(read)) == 12 and read.notes == []  # what was read is as it was
    assert annotations_of(for_training(kept)) == annotations_of(kept)
    masks = [
        coco_mask.decode(encode_mask(entry.segmentation, WIDTH, HEIGHT))
        for entries in (annotations_of(read)[:2], annotations_of(kept)[:2])
        for entry in entries
    ]
    assert np.array_equal(masks[0], masks[2]) and np.array_equal(masks[1], masks[3])


def test_nothing_left_out_nothing_said(write):
    data = content()
    del data["annotations"][2]
    kept = for_training(read_coco(*write(data)))
    assert kept.notes == [] and kept.dropped == {} and len(annotations_of(kept)) == 2


def test_nothing_to_train_on(write):
    data = content()
    data["annotations"] = []
    with pytest.raises(InputError, match="no object to train on$"):
        for_training(read_coco(*write(data)))
    data["annotations"] = [annotation(1, bbox=[1, 1, 0, 0])]
    with pytest.raises(InputError, match=r"no object to train on; left out: boxes without area \(1\)"):
        for_training(read_coco(*write(data)))


# --- The split


def many(write, labels):
    """Data with one picture for each set of category ids."""
    data = content()
    path, images = write(data)
    data["categories"] = [{"id": number, "name": str(number)} for number in (1, 2, 3)]
    data["images"] = alike(images, range(len(labels)))
    data["annotations"] = [
        annotation(10 * image + category, image, category) for image, some in enumerate(labels) for category in some
    ]
    return read_coco(*write(data))


def ids_of(data):
    return [picture.id for picture in data.pictures]


def test_split_is_a_function_of_the_seed(write):
    data = many(write, [[1], [2], [3], [1, 2], []] * 8)
    train, val = split_coco(data, 0.25, seed=3)
    assert len(val.pictures) == 10 and sorted(ids_of(train) + ids_of(val)) == list(range(40))
    assert ids_of(train) == sorted(ids_of(train)) and ids_of(val) == sorted(ids_of(val))
    assert split_coco(data, 0.25, seed=3) == (train, val)
    assert ids_of(split_coco(data, 0.25, seed=4)[1]) != ids_of(val)
    assert train.categories == val.categories == data.categories


def test_every_category_stays_in_train(write):
    # Category 3 is in the pictures 0 and 1 alone, so one of them has to stay; category 2 in picture 5 alone.
    data = many(write, [[1, 3], [3], [1], [1], [], [1, 2]])
    in_val = set()
    for seed in range(40):
        train, val = split_coco(data, 0.5, seed)
        assert {entry.label for entry in annotations_of(train)} == {1, 2, 3} and 5 not in ids_of(val)
        assert len(val.pictures) == 3
        in_val |= set(ids_of(val))
    assert in_val == {0, 1, 2, 3, 4}  # and no other picture is kept from it


def test_val_has_a_picture_even_where_a_category_is_lost(write):
    train, val = split_coco(many(write, [[1], [2]]), 0.5, seed=0)
    assert len(train.pictures) == len(val.pictures) == 1
    train, val = split_coco(many(write, [[1], [1], [1]]), 0.99, seed=0)
    assert len(train.pictures) == 1


def test_splits_that_can_not_be(write):
    data = many(write, [[1], [1]])
    for fraction in (0, 1, -0.5, float("nan")):
        with pytest.raises(InputError, match="val_fraction"):
            split_coco(data, fraction, 0)
    with pytest.raises(InputError, match="single picture"):
        split_coco(many(write, [[1]]), 0.5, 0)


# --- The ground truth of an evaluation


def test_ground_truth_is_what_pycocotools_reads(write, capsys):
    path, images = write(content())
    ground_truth = coco_ground_truth(read_coco(path, images))
    assert capsys.readouterr() == ("", "")
    reference = COCO(path)
    assert ground_truth.getImgIds() == reference.getImgIds() and set(ground_truth.cats) == set(reference.cats)
    assert [cat["name"] for cat in ground_truth.loadCats([3, 18])] == ["bag", "box"]
    assert sorted(ground_truth.anns) == [1, 2, 3]
    for ours, theirs in zip(ground_truth.anns.values(), reference.anns.values(), strict=True):
        for field in ("image_id", "category_id", "bbox", "area", "iscrowd"):
            assert ours[field] == theirs[field]
        assert np.array_equal(ground_truth.annToMask(ours), reference.annToMask(theirs))


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_truth_scores_1_also_where_an_annotation_has_id_0(write, kind, capsys):
    data = content()
    ground_truth = coco_ground_truth(read_coco(*write(data)))
    results = [
        {
            "image_id": entry["image_id"],
            "category_id": entry["category_id"],
            "score": 0.9,
            "bbox": list(entry["bbox"]),
            "segmentation": ground_truth.annToRLE(entry),
        }
        for entry in ground_truth.anns.values()
        if not entry["iscrowd"]
    ]
    if kind == "segm":
        results = [{key: value for key, value in result.items() if key != "bbox"} for result in results]
    evaluation = COCOeval(ground_truth, ground_truth.loadRes(results), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    capsys.readouterr()
    assert evaluation.stats[0] == pytest.approx(1)


def test_real_photographs(shared_data):
    folder = shared_data / "nuts_coco"
    path = folder / "annotations" / "instances_train.json"
    data = read_coco(path, folder / "images")
    kept = for_training(data)
    assert len(kept.pictures) == 11 and len(annotations_of(kept)) == 99 and kept.notes == []
    assert data.categories == [(1, "date"), (2, "fig"), (3, "hazelnut")]
    reference = COCO(path)
    for picture in kept.pictures:
        for entry in picture.annotations:
            ours = coco_mask.decode(entry.segmentation)
            assert np.array_equal(ours, reference.annToMask(reference.anns[entry.id]))


@pytest.mark.skipif(os.name != "posix", reason="names that Windows has not")
@pytest.mark.parametrize(
    "name", ["./a.png", "more/../a.png", "1:02:03.png", "..a.png", "a..png", "more\\a.png", ".../a.png"]
)
def test_a_strange_name_of_a_picture_in_the_folder_is_read(write, name):
    data = content()
    data["images"][0]["file_name"] = name
    path, images = write(data)
    target = os.path.join(images, name)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if not os.path.exists(target):
        shutil.copy(os.path.join(images, "a.png"), target)
    assert os.path.samefile(read_coco(path, images).pictures[0].path, target)


def test_names_of_categories_can_be_printed(write):
    """They stand in tables, lines and pictures, and are matched with those of a network, which read them so, too."""
    data = content()
    data["categories"][0]["name"], data["categories"][1]["name"] = "\x1b[31mbox\n", "\ud800\u202ebag"
    names = [category.name for category in read_coco(*write(data)).categories]
    assert names == ["\N{REPLACEMENT CHARACTER}\\u202ebag", r"\x1b[31mbox\n"]
    again = read_coco(*write(data), categories=[(1, names[1]), (2, names[0])])
    assert [category.name for category in again.categories] == names[::-1] and again.pictures[0].annotations


# --- Outlines that are larger than any picture


def spikes(points, far, width=WIDTH, height=HEIGHT):
    """A star around the picture's middle, with points at a distance of `far` pixels in turn with points in between."""
    turns = np.arange(points) * 2.4  # radians
    reach = np.where(np.arange(points) % 2, far, 8)[:, None]
    return [(np.stack([np.cos(turns), np.sin(turns)], 1) * reach + [width / 2, height / 2]).ravel().tolist()]


@pytest.mark.parametrize("points", [8, 400, 10_000])
@pytest.mark.parametrize("far", [1e3, 7e4])
def test_an_outline_takes_no_more_to_draw_than_its_picture_is_worth(write, points, far):
    data = content()
    data["annotations"] = [annotation(1, bbox=[0, 0, WIDTH, HEIGHT], area=600, segmentation=spikes(points, far))]
    ((kept,),) = [picture.annotations for picture in for_training(read_coco(*write(data))).pictures[:1]]
    (outline,) = read_coco(*write(data)).pictures[0].annotations[0].segmentation
    corners = np.array(outline).reshape(-1, 2)
    assert (corners > [-WIDTH - 1, -HEIGHT - 1]).all() and (corners < [2 * WIDTH + 1, 2 * HEIGHT + 1]).all()
    if points == 8:  # pycocotools can draw it whole
        whole = coco_mask.decode(encode_mask(spikes(points, far), WIDTH, HEIGHT))
        assert (coco_mask.decode(kept.segmentation) != whole).mean() < 0.02  # rounding along the edges
    else:
        assert 0 < coco_mask.area(kept.segmentation) <= WIDTH * HEIGHT


def test_an_outline_with_more_points_than_a_picture_has_room_for():
    zigzag = np.stack([np.tile([0, 4000], 5000), np.arange(10_000) % 2900], 1).ravel().tolist()
    with pytest.raises(InputError, match="here: an outline can have 2,000,000 pixels of length, found 40,000,000"):
        check_outline([zigzag], 4000, 3000, "here")
    assert check_outline([zigzag[:400]] * 2, 4000, 3000, "here")  # of less than two million


def test_an_outline_that_is_all_of_it_far_away_is_empty(write):
    data = content()
    data["annotations"].append(annotation(30, bbox=[60000, 5, 10, 10], segmentation=square(60000, 5, 10)))
    data["annotations"].append(annotation(31, segmentation=square(5, -90000, 10)))
    kept = for_training(read_coco(*write(data)))
    assert kept.dropped == {"crowd regions": 1, "boxes outside the picture": 1, "empty masks": 1}


def test_cutting_an_outline_leaves_the_mask_as_it_is(write):
    """Polygons that cross the bounds of what is kept in every way, against pycocotools with the whole of them."""
    generator = np.random.default_rng(0)
    for _ in range(60):
        polygon = (generator.normal(0, 150, (generator.integers(3, 9), 2)) + [20, 15]).ravel().tolist()
        kept = check_outline([polygon], WIDTH, HEIGHT, "here")
        ours, whole = (coco_mask.decode(encode_mask(one, WIDTH, HEIGHT)) for one in (kept, [polygon]))
        assert (ours != whole).mean() < 0.04


def test_run_lengths_of_absurd_sizes(write):
    huge = {"size": [40000, 40000], "counts": [40000 * 40000]}
    for damage, says in (
        (rle(**huge), r"have size \[40000, 40000\] and the image"),
        (rle(size=[10**30, 10**30]), "and the image"),
        (rle(size=[float("nan"), WIDTH]), "and the image"),
        (rle(counts=[10**30]), "damaged"),
        (rle(counts=[float("inf")]), "damaged"),
        (rle(counts="~" * 40), "damaged"),
    ):
        data = content()
        damage(data)
        with pytest.raises(InputError, match="annotation 7: its run lengths .*" + says):
            read_coco(*write(data))
    data = content()
    rle(size=[float(HEIGHT), float(WIDTH)])(data)
    assert read_coco(*write(data)).pictures[0].annotations[1].segmentation == compressed()


# --- Ids and numbers


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (change("images", 0, id=2**63), r"images\[0\]: needs an id, .*, found 9223372036854775808"),
        (change("images", 0, id=1e300), r"images\[0\]: needs an id, .*, found 1e\+300"),
        (change("annotations", 0, id=-(10**30)), r"annotations\[0\]: needs an id, .*, found -1000"),
        (change("categories", 0, id=10**400), r"categories\[0\]: needs an id"),
        (change("images", 0, id="a", file_name="x" * 500), r"images\[0\]: needs an id, .*, found 'a'"),
        (change("images", 0, id=float("nan")), r"images\[0\]: needs an id, .*, found nan"),
        (change("annotations", 0, image_id=10**400), "annotation 0: needs image_id"),
        (change("annotations", 0, category_id=1e300), "annotation 0: needs category_id"),
        (change("annotations", 0, area=10**400), "annotation 0: area has to be"),
        (change("annotations", 0, area=1e300), "annotation 0: area has to be"),
        (change("annotations", 0, area=float("inf")), "annotation 0: area has to be"),
        (change("annotations", 0, bbox=[10**400, 5, 10, 10]), "annotation 0: bbox has to be"),
        (change("annotations", 0, bbox=[0, 0, 1e300, 1e300]), "annotation 0: bbox has to be"),
        (change("images", 0, width=10**400), "image 5: width and height"),
        (change("images", 0, width=1e300), "image 5: width and height"),
    ],
)
def test_absurd_numbers_are_one_line(write, damage, says):
    data = content()
    damage(data)
    with pytest.raises(InputError, match=says) as caught:
        read_coco(*write(data))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_whole_numbers_with_a_point_are_ids_and_sizes(write):
    expected = read_coco(*write(content()))
    data = content()
    for entry in (*data["images"], *data["categories"], *data["annotations"]):
        entry |= {name: float(entry[name]) for name in entry.keys() & {"id", "image_id", "category_id", "width"}}
        data_types = {type(entry["id"])}
        assert data_types == {float}
    read = read_coco(*write(data))
    assert read == expected and type(read.pictures[0].id) is int and type(read.pictures[0].width) is int


@pytest.mark.parametrize("name", ["{}", "image-{}"])
def test_ids_that_are_texts(write, name):
    expected = read_coco(*write(content()))
    data = content()
    for entry in (*data["images"], *data["annotations"]):
        entry |= {field: name.format(entry[field]) for field in entry.keys() & {"id", "image_id"}}
    read = read_coco(*write(data))
    if name == "{}":
        assert read.pictures == expected.pictures and "are texts, such as '5': taken as numbers" in read.notes[0]
    else:
        assert [picture.id for picture in read.pictures] == [1, 2] and "numbered in their order" in read.notes[0]
        assert [len(picture.annotations) for picture in read.pictures] == [3, 0]
    assert len(read.notes) == 2 and all("\n" not in note for note in read.notes)
    data["annotations"][0]["image_id"] = "elsewhere"
    with pytest.raises(InputError, match="needs image_id, a whole number, found 'elsewhere'"):
        read_coco(*write(data))


def test_categories_whose_ids_are_texts(write):
    data = content()
    for entry in data["categories"]:
        entry["id"] = entry["name"]
    for entry, name in zip(data["annotations"], ("box", "bag", "box"), strict=True):
        entry["category_id"] = name
    read = read_coco(*write(data))
    assert read.categories == [(1, "box"), (2, "bag")]
    assert [one.label for one in annotations_of(read)] == [1, 2, 1]


# --- Entries that are at fault: together, and left out where that is wanted


def faulty():
    """Content with a fault of every kind, and one good object for each."""
    data = content()
    data["annotations"] += [
        annotation(20, segmentation=[[1, 2, 3, 4]]),
        annotation(21, segmentation=[[1, 2, 3, 4]]),
        annotation(22, segmentation=[*TRIANGLE, [1, 2, 3, 4], [5, 6]]),
        annotation(23, segmentation=[]),
        annotation(24, segmentation=None),
        annotation(25, bbox=[1, 2, 3]),
        annotation(26, image=77),
        annotation(27, category=77),
        annotation(28, segmentation=compressed() | {"counts": "oo"}),
        annotation(29, area=10**400),
    ]
    return data


def test_all_faults_are_said_at_once_each_kind_with_its_number_and_the_first(write):
    path, images = write(faulty())
    with pytest.raises(BrokenEntries) as caught:
        read_coco(path, images)
    said = str(caught.value)
    assert said.startswith(f"{path}: 10 of 13 annotations at fault: ") and "\n" not in said
    assert "annotation 20 and 2 more: a polygon of 4 numbers" in said
    assert "annotation 23 and 1 more: has no segmentation" in said
    for number in (25, 26, 27, 28, 29):
        assert f"annotation {number}: " in said
    assert "21" not in said and "24" not in said


def test_what_is_at_fault_is_left_out_where_that_is_wanted(write):
    path, images = write(faulty())
    read = read_coco(path, images, skip_broken=True)
    assert [entry.id for entry in annotations_of(read)] == [0, 7, 4, 22]
    assert [list(polygon) for polygon in annotations_of(read)[-1].segmentation] == TRIANGLE  # without its sliver
    (note,) = read.notes
    assert note.startswith(f"left out: {path}: 10 of 13 annotations at fault: ") and "annotation 20 and 2 more" in note


def test_pictures_that_are_not_there_or_at_fault_are_left_out_where_that_is_wanted(write):
    data = content()
    data["images"] += [
        {"id": 50, "file_name": "gone.png", "width": 5, "height": 5},
        {"id": 51, "file_name": "gone2.png", "width": 5, "height": 5},
        {"id": 52, "file_name": "a.png", "width": -1, "height": 5},
        {"id": 53, "width": 5, "height": 5},
    ]
    data["annotations"].append(annotation(60, image=50))
    path, images = write(data)
    with pytest.raises(
        BrokenEntries, match=r"2 of 6 images at fault: image 52: width .*; image 53: needs file_name.*2 of 6 pictures"
    ):
        read_coco(path, images)
    read = read_coco(path, images, skip_broken=True)
    assert ids_of(read) == [5, 2] and len(annotations_of(read)) == 3
    assert (
        len(read.notes) == 2
        and f"2 of 6 pictures listed there are not on disk, the first is {images}" in (read.notes[1])
    )
    del data["images"][-2:]
    path, images = write(data)
    with pytest.raises(BrokenEntries, match=r"2 of 4 pictures .*gone.png; nor is one like it in .*check the folder"):
        read_coco(path, images)
    data["images"] = data["images"][2:]
    with pytest.raises(InputError, match=": 2 of 2 pictures"):
        read_coco(*write(data), skip_broken=True)


def test_a_broken_picture_without_width_and_height_is_left_out_where_that_is_wanted(write):
    data = content()
    del data["images"][1]["width"], data["images"][1]["height"]
    path, images = write(data)
    (images / "more" / "b.png").write_bytes(b"no picture")
    with pytest.raises(BrokenEntries, match="b.png"):
        read_coco(path, images)
    read = read_coco(path, images, skip_broken=True)
    assert ids_of(read) == [5] and len(read.notes) == 1 and read.notes[0].startswith(f"left out: {images}/more/b.png: ")


def test_boxes_alone_are_refused_with_the_way_out(write):
    data = content()
    for entry in data["annotations"]:
        entry["segmentation"] = []
    says = (
        r"3 of 3 annotations .*annotation 0 and 2 more: has no segmentation; a box alone .*write it as a polygon, \[\["
    )
    with pytest.raises(InputError, match=says):
        read_coco(*write(data))
    for entry in data["annotations"]:  # as it says
        x, y, width, height = entry["bbox"]
        entry["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    assert len(annotations_of(for_training(read_coco(*write(data))))) == 2


# --- Files that were written elsewhere


@pytest.mark.parametrize(
    ("names", "files"),
    [
        (["a.png", "more\\b.png"], ["a.png", "more/b.png"]),
        (["a.png", "more/B.PNG"], ["a.png", "more/b.png"]),
        (["A.png", "MORE/b.png"], ["a.png", "more/b.png"]),
        (["caf\u00e9.png", "b.png"], ["cafe\u0301.png", "b.png"]),
        (["cafe\u0301.png", "b.png"], ["caf\u00e9.png", "b.png"]),
        (["images/a.png", "images/b.png"], ["a.png", "b.png"]),
        (["x/images/a.png", "x/images/b.png"], ["a.png", "b.png"]),
        (["train\\a.PNG", "val\\b.png"], ["a.png", "b.png"]),
        (["a.png", "b.png"], ["train/a.png", "train/b.png"]),
        (["a.png", "b.png"], ["train/a.png", "val/b.png"]),
        (["images/a.png", "images/b.png"], ["images/images/a.png", "images/images/b.png"]),
    ],
)
def test_pictures_are_found_where_it_is_beyond_doubt(tmp_path, names, files):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    paths, line, why = find_pictures(dict(enumerate(names)), tmp_path)
    assert [Path(paths[number]) for number in range(2)] == [tmp_path / file for file in files] and not why
    moved = sum(name != file for name, file in zip(names, files, strict=True))
    assert f"({moved}), such as {tmp_path}" in line and "\n" not in line


@pytest.mark.parametrize(
    ("names", "files", "found", "says"),
    [
        (["a.png", "b.png"], ["a.png"], 1, "nor is one like it in"),
        (["a.png", "b.png"], ["a.png", "b.jpg"], 1, "b.jpg may be meant: correct file_name"),
        (["a.png", "b.png"], ["a.png", "masks/b.png"], 1, "masks/b.png may be meant"),
        (["a.png", "b.png"], ["images/a.png", "masks/a.png", "masks/b.png"], 0, "a.png and .*a.png may be meant"),
        (["train/a.png", "train/b.png"], ["val/a.png", "val/b.png"], 0, "val/a.png may be meant"),
        (["a.PNG"], ["a.png", "A.png"], 0, "a.png may be meant"),
        (["a.png", "A.png"], ["a.png"], 1, "a.png may be meant"),
        (["a.png"], [], 0, "check the folder"),
    ],
)
def test_where_there_is_doubt_it_is_said_what_may_be_meant(tmp_path, names, files, found, says):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    paths, line, why = find_pictures(dict(enumerate(names)), tmp_path)
    assert len(paths) == found and not line and re.search(says, why)


def test_a_file_with_another_spelling_is_read_and_it_is_said(write):
    data = content()
    data["images"][1]["file_name"] = "More\\B.PNG"
    path, images = write(data)
    read = read_coco(path, images)
    assert read.pictures[1].path == str(images / "more/b.png") and len(read.notes) == 1
    assert "found by another name or folder than their file_name has (1), such as" in read.notes[0]


@pytest.mark.parametrize("fractions_of_boxes", [True, False])
def test_outlines_that_are_fractions_of_the_picture(write, fractions_of_boxes):
    data = content()
    data["annotations"] = data["annotations"][:1]
    expected = read_coco(*write(data))
    (entry,) = data["annotations"]
    sizes = np.array([WIDTH, HEIGHT])
    entry["segmentation"] = [(np.array(TRIANGLE).reshape(-1, 2) / sizes).ravel().tolist()]
    del entry["area"]
    if fractions_of_boxes:
        entry["bbox"] = (np.array(entry["bbox"]) / np.tile(sizes, 2)).tolist()
    read = read_coco(*write(data))
    (ours,), (whole,) = (annotations_of(one) for one in (read, expected))
    assert ours.box == pytest.approx(whole.box) and abs(ours.area - 50) < 8
    assert list(ours.segmentation[0]) == pytest.approx(TRIANGLE[0])
    assert len(read.notes) == 1 and "are fractions of the picture (1 objects)" in read.notes[0]
    if fractions_of_boxes:  # as corners
        x, y, width, height = entry["bbox"]
        entry["bbox"] = [x, y, x + width, y + height]
        with pytest.raises(InputError, match="they look like"):
            read_coco(*write(data))


def test_objects_that_are_all_flagged_as_crowds_are_objects(write):
    data = content()
    data["annotations"] = [
        entry | {"iscrowd": 1, "segmentation": compressed(), "area": 20} for entry in data["annotations"][1:]
    ]
    read = read_coco(*write(data))
    assert not any(entry.crowd for entry in annotations_of(read))
    assert len(read.notes) == 1 and "every object is flagged iscrowd (2)" in read.notes[0]
    assert len(annotations_of(for_training(read))) == 2
    data["annotations"].append(annotation(30))  # one is not: the others may well be crowds
    kept = for_training(read_coco(*write(data)))
    assert len(annotations_of(kept)) == 1 and "crowd regions (2); a crowd region is of many" in kept.notes[0]


# --- Whatever else a file may hold

STRANGE = [
    *(
        None,
        True,
        0,
        -1,
        1,
        2,
        5,
        18,
        0.5,
        3.0,
        1e5,
        1e300,
        2**31,
        2**63,
        -(2**64),
        10**400,
        float("nan"),
        float("inf"),
    ),
    *(
        "",
        "a",
        "a.png",
        "..",
        "a\0b",
        "\ud800",
        "x" * 300,
        "5",
        "o" * 99,
        "\u00e9",
        [],
        [[]],
        [[[]]],
        [1],
        [1, 2, 3, 4],
    ),
    *(
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5, 6]],
        [[0, 0, 1e5, 0, 0, 1e5]] * 3,
        [-1e5, -1e5, 1e5, 1e5],
        [None] * 6,
        ["1"] * 6,
    ),
    *(
        [1e5] * 4,
        [30, 40],
        {},
        {"size": [30, 40]},
        {"size": [30.0, 40.0], "counts": [1200]},
        {"size": [], "counts": ""},
    ),
    *({"size": [2**31, 2**31], "counts": [2**62]}, {"size": [30, 40], "counts": [0] * 9}, {"id": 1}, compressed()),
]


def places(value, place=()):
    """Where something can be changed: keys into the content, from the outside in."""
    found = []
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found += [(*place, key), *places(value[key], (*place, key))]
    return found


def changed_at_random(generator):
    data = deepcopy(content())
    for _ in range(generator.integers(1, 4)):
        listed = places(data)
        *outer, last = listed[generator.integers(len(listed))]
        inner = data
        for key in outer:
            inner = inner[key]
        action = generator.integers(5)
        if action == 0:
            del inner[last]
        elif action == 1 and isinstance(inner, list):
            inner.append(deepcopy(inner[last]))
        else:
            inner[last] = deepcopy(STRANGE[generator.integers(len(STRANGE))])
    return data


@pytest.mark.parametrize("seed", range(2))
def test_a_damaged_file_is_read_or_refused_in_one_line(write, seed):
    """By hand: more seeds, of 150 files each."""
    generator = np.random.default_rng(seed)
    outcomes = []
    for _ in range(150):
        path, images = write(changed_at_random(generator))
        for skip_broken in (False, True):
            try:
                data = for_training(read_coco(path, images, skip_broken=skip_broken))
                coco_ground_truth(data)
                CocoImages(data)[0]
                outcomes.append("read")
            except InputError as error:
                assert "\n" not in str(error) and len(str(error)) < 2000
                outcomes.append("refused")
    assert {"read", "refused"} == set(outcomes)
