"""Instances over their pictures: what colour stands where, what is legible, what nasty input does."""

import os
import warnings
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle_codec

from core.visualize.instances import (
    PANELS,
    augmentation_preview,
    describe_instances,
    draw_instances,
    instance_panels,
    instance_sheet,
    precision_recall_curves,
)
from recognition.page import Card, index_page

BLUE, ORANGE, GREEN = (0, 114, 178), (213, 94, 0), (0, 158, 115)  # the first colours of the palette
NIGHT = (32, 32, 32)


def instance(size, box, label="bag", score=0.9):
    """An instance whose mask is its box, in a picture of size (w, h)."""
    mask = np.zeros((size[1], size[0]), np.uint8, order="F")
    x1, y1, x2, y2 = box
    mask[y1:y2, x1:x2] = 1
    return {"box": list(box), "label": label, "score": score, "rle": rle_codec.encode(mask)}


def near(pixel, color, tolerance=3):
    return np.abs(np.asarray(pixel, int) - np.asarray(color, int)).max() <= tolerance


def count(picture, color):
    return int((np.asarray(picture) == np.array(color)).all(2).sum())


@pytest.fixture
def picture():
    return Image.new("RGB", (800, 600), (200, 200, 200))


def test_each_panel_shows_what_its_name_says(picture):
    panels = instance_panels(picture, [instance(picture.size, (200, 200, 400, 400))])
    assert list(panels) == list(PANELS) and len(panels) == 6
    assert all(panel.size == picture.size and panel.mode == "RGB" for panel in panels.values())
    assert panels["original"].tobytes() == picture.tobytes()
    inside, outside, edge = (250, 330), (600, 500), (300, 398)
    blend = [round(200 + (value - 200) * 0.45) for value in BLUE]
    expected = {  # inside the mask, away from it, on the lower side of the box
        "boxes": ((200,) * 3, (200,) * 3, BLUE),
        "masks": (BLUE, NIGHT, BLUE),
        "overlay": (blend, (200,) * 3, None),
        "classes": (blend, (200,) * 3, None),
        "all": (blend, (200,) * 3, BLUE),
    }
    for name, colors in expected.items():
        for place, color in zip((inside, outside, edge), colors, strict=True):
            if color is not None:
                assert near(panels[name].getpixel(place), color), (name, place)


def test_a_mask_alone_is_exact(picture):
    """Its outline lies outside, so that nothing of it is lost and nothing added."""
    mask = np.zeros((600, 800), np.uint8)
    mask[100:140, 50:300], mask[100:400, 120:123] = 1, 1  # with a thin handle
    one = {"box": [50, 100, 300, 400], "label": "a", "score": None, "rle": rle_codec.encode(np.asfortranarray(mask))}
    drawn = np.asarray(instance_panels(picture, [one])["masks"])
    assert ((drawn == BLUE).all(2) == mask.astype(bool)).all()
    assert ((drawn == NIGHT).all(2) == ~mask.astype(bool)).all()


def test_the_smaller_mask_lies_on_top(picture):
    large, small = instance(picture.size, (100, 100, 700, 500), "a"), instance(picture.size, (300, 200, 400, 300), "b")
    for instances in ([large, small], [small, large]):
        masks = instance_panels(picture, instances)["masks"]
        assert masks.getpixel((350, 250)) == ORANGE and masks.getpixel((200, 450)) == BLUE


def test_classes_have_colours_and_instances_shades(picture):
    boxes = [(50, 50, 150, 150), (250, 50, 350, 150), (450, 50, 550, 150)]
    instances = [instance(picture.size, box, label) for box, label in zip(boxes, "aab", strict=True)]
    masks = instance_panels(picture, instances)["masks"]
    first, second, other = (masks.getpixel((box[0] + 50, 100)) for box in boxes)
    assert first == BLUE and second != BLUE and other == ORANGE
    assert second[2] > second[0]  # a lighter blue
    # With names a class keeps its colour where the others are missing; with more names than colours there is no such.
    alone = instance_panels(picture, instances[2:], names=["a", "b"])["masks"]
    assert alone.getpixel((500, 100)) == ORANGE
    many = instance_panels(picture, instances[2:], names=list("abcdefghi"))["masks"]
    assert many.getpixel((500, 100)) == BLUE


def test_labels_do_not_hide_each_other(picture):
    """Two instances in one box: both labels can be read."""
    one, two = instance(picture.size, (200, 200, 500, 400), "a"), instance(picture.size, (200, 200, 500, 400), "b", 0.8)
    options = {"boxes": False, "masks": False, "names": ["a", "b"]}
    together = draw_instances(picture, [one, two], **options)
    for found, color in ((one, BLUE), (two, ORANGE)):
        alone = draw_instances(picture, [found], **options)
        assert count(alone, color) > 500 and count(together, color) == count(alone, color)


def test_the_surer_label_lies_on_top_where_there_is_no_room():
    picture = Image.new("RGB", (640, 40), (200, 200, 200))
    instances = [instance(picture.size, (0, 0, 640, 40), "a" * 200, 0.6), instance(picture.size, (0, 0, 640, 40), "b")]
    drawn = draw_instances(picture, instances * 3, boxes=False, masks=False, names=["b"] + ["a" * 200])
    alone = draw_instances(picture, instances[1:], boxes=False, masks=False)
    assert count(drawn, BLUE) >= count(alone, BLUE) > 100


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (3, 700), (5000, 2), (150, 4000), (639, 400), (2600, 1900)])
def test_pictures_of_any_size_and_shape(tmp_path, size):
    width, height = size
    names = ["a class with a name that is longer than many pictures are wide", "$b_", "Ж"]
    whole = [instance(size, (0, 0, width, height), name) for name in names]
    panels = instance_panels(Image.new("RGB", size), whole)
    drawn = panels["all"].size
    assert drawn[0] % width == 0 and drawn[1] % height == 0 and drawn[0] * height == drawn[1] * width
    assert max(drawn) >= 430 and (max(size) < 500 or drawn == size)
    instance_sheet(tmp_path / "sheet.png", panels, "name", "caption")
    assert max(Image.open(tmp_path / "sheet.png").size) < 2500


def test_a_tiny_picture_is_enlarged_pixel_by_pixel():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    panels = instance_panels(picture, [instance((16, 16), (2, 4, 10, 12))])
    factor = panels["original"].width // 16
    assert (np.asarray(panels["original"])[::factor, ::factor] == np.asarray(picture)).all()
    rows, columns = np.nonzero((np.asarray(panels["masks"]) == BLUE).all(2))
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == tuple(factor * v for v in (4, 12, 2, 10))


def test_nasty_instances_are_drawn_without_a_crash(picture):
    empty = instance(picture.size, (0, 0, 0, 0))
    outside = {**instance(picture.size, (0, 0, 50, 50)), "box": [-500.0, -2.5, 9000.0, 1e7]}
    turned = {**instance(picture.size, (0, 0, 50, 50)), "box": [300, 300, 100, 100]}
    text = {**instance(picture.size, (0, 0, 50, 50)), "score": None, "label": ""}
    text["rle"] = {"size": [600, 800], "counts": text["rle"]["counts"].decode()}  # as it comes from JSON
    before = picture.tobytes()
    panels = instance_panels(picture, [empty, outside, turned, text])
    assert picture.tobytes() == before
    assert near(panels["boxes"].getpixel((799, 300)), GREEN, 255)
    assert instance_panels(picture, [empty])["masks"].getcolors() == [(800 * 600, NIGHT)]


def test_without_instances_the_picture_stays_as_it_is(picture, tmp_path):
    panels = instance_panels(picture, [])
    assert all(panels[name].tobytes() == picture.tobytes() for name in panels if name != "masks")
    instance_sheet(tmp_path / "sheet.png", panels)


def test_one_mask_is_unpacked_at_a_time(picture, monkeypatch):
    """Not N x H x W at once, which is 2.4 GB for 100 instances on 6000 x 4000."""
    sizes = []
    decode = rle_codec.decode
    monkeypatch.setattr(rle_codec, "decode", lambda rle: sizes.append(decode(rle).shape) or decode(rle))
    instance_panels(picture, [instance(picture.size, (10, 10, 90, 90)) for _ in range(5)])
    assert sizes == [(600, 800)] * 5


def test_sheet_is_of_the_kind_that_its_name_says(picture, tmp_path):
    panels = instance_panels(picture, [instance(picture.size, (200, 200, 400, 400))])
    for name, kind in (("a.png", "PNG"), ("b.jpg", "JPEG"), ("c.JPEG", "JPEG")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            instance_sheet(tmp_path / name, panels, "$title_ 猫 " + os.fsdecode(b"\xff"), "caption " * 99)
        with Image.open(tmp_path / name) as sheet:
            assert sheet.format == kind and 1700 < sheet.width < 2100 and sheet.height > 900
    sheet = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    assert count(sheet, NIGHT) > 100_000 and count(sheet, (200,) * 3) > 100_000  # masks alone; the picture


def test_what_was_found_in_words():
    found = [{"label": "fig"}, {"label": "date"}, {"label": "date"}]
    assert describe_instances(found) == "3 instances: 2 date, 1 fig"
    assert describe_instances(found[:1]) == "1 instance: 1 fig"
    assert describe_instances([]) == "nothing found"


def test_augmentation_preview_shows_every_picture_with_its_instances(tmp_path):
    image = torch.full((3, 300, 400), 128, dtype=torch.uint8)
    masks = torch.zeros(1, 300, 400, dtype=torch.bool)
    masks[:, 50:250, 100:300] = True
    shown = (image, torch.tensor([[100.0, 50.0, 300.0, 250.0]]), masks, torch.tensor([2]))
    none = (image, torch.zeros(0, 4), torch.zeros(0, 300, 400, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))
    small = (image[:, :20, :10], *none[1:])
    augmentation_preview(tmp_path / "two.png", [("first", [shown, none]), ("second", [shown, small])])
    two = np.asarray(Image.open(tmp_path / "two.png").convert("RGB"))
    augmentation_preview(tmp_path / "one.png", [("first", [shown, none])])
    one = np.asarray(Image.open(tmp_path / "one.png").convert("RGB"))
    blend = [round(128 + (value - 128) * 0.45) for value in BLUE]
    masked = [(np.abs(sheet.astype(int) - blend).max(2) <= 3).sum() for sheet in (one, two)]
    assert masked[0] > 5000 and masked[1] == 2 * masked[0]
    assert one.shape[1] == two.shape[1] and two.shape[0] > 1.6 * one.shape[0]
    augmentation_preview(tmp_path / "none.png", [("first", []), ("second", [])])
    assert Image.open(tmp_path / "none.png").size == (360, 90)


def test_precision_recall_curves_show_classes_and_means(tmp_path):
    precision = np.full((10, 101, 3), 0.5)
    precision[..., 0], precision[..., 2] = 0.9, np.nan  # the third class has no instances
    curves = {"box": precision, "mask": precision}
    precision_recall_curves(tmp_path / "curves.png", curves, ["_a", "$b", "c"])
    drawn = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB"))
    for panel in np.split(drawn, 2, axis=1):
        height = {color: np.nonzero((panel == np.array(color)).all(2).sum(1) > 300)[0] for color in (BLUE, ORANGE)}
        assert len(height[BLUE]) and len(height[ORANGE]) and height[BLUE].max() < height[ORANGE].min()  # 0.9 above 0.5
        assert count(panel, GREEN) == 0
    many = np.repeat(precision[..., :1], 80, axis=2)
    precision_recall_curves(tmp_path / "many.png", {"mask": many}, [str(name) for name in range(80)])
    drawn = np.asarray(Image.open(tmp_path / "many.png").convert("RGB"))
    assert not any(count(drawn, color) for color in (BLUE, ORANGE, GREEN))  # the means alone
    precision_recall_curves(tmp_path / "none.png", {"mask": precision * np.nan}, ["a", "b", "c"])


class StrictParser(HTMLParser):
    """Fails on a tag that is not closed in its turn; collects what the page refers to and says."""

    VOID = {"meta", "img"}

    def __init__(self):
        super().__init__()
        self.open, self.links, self.words = [], [], []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("href", "src")]
        self.words += [value for name, value in attrs if name == "alt"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_is_well_formed_and_finds_its_files_whatever_they_are_called(tmp_path):
    names = ["plain.jpg", "a <b>&\"'#%?é 猫.png", "</li></ul>", "javascript:alert(1)", os.fsdecode(b"\xff.png")]
    cards = [
        Card(name, "1 <i>instance</i>", f"./{name}/t.jpg", f"./{name}/s.jpg", {"<all>": f"./{name}/a.jpg"})
        for name in names
        if "/" not in name
    ]
    cards.append(Card(names[2], "", "t.jpg", "s.jpg", {}))
    page = tmp_path / "index.html"
    index_page(page, "T <script>", "&amp; so on", cards, ["broken <img src=x>"])
    parser = StrictParser()
    parser.feed(page.read_text(encoding="utf-8"))
    parser.close()
    assert not parser.open
    for name in names:
        assert os.fsencode(name).decode("utf-8", "replace") in parser.words
    assert {"T <script>", "&amp; so on", "broken <img src=x>", "1 <i>instance</i>", "<all>"} <= set(parser.words)
    assert [unquote(link, errors="surrogateescape") for link in parser.links[:3]] == [
        "./plain.jpg/s.jpg",
        "./plain.jpg/t.jpg",
        "./plain.jpg/a.jpg",
    ]
    assert f"./{names[1]}/t.jpg" in [unquote(link) for link in parser.links]
    assert not any(link.startswith(("javascript:", "http")) for link in parser.links)


def test_the_page_of_nothing(tmp_path):
    index_page(tmp_path / "index.html", "0 pictures", "", [])
    parser = StrictParser()
    parser.feed((tmp_path / "index.html").read_text())
    assert not parser.open and not parser.links
