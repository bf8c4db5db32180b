"""Who is in a scene: what stands where on the sheet, what is marked as found, what nasty input does."""

import os
import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from pycocotools import mask as rle_codec

from core.visualize.sheet import GAP, MARGIN, shorten
from recognition import sheets
from recognition.sheets import comparison_sheet, identification_sheet

BLUE, ORANGE, GREEN = (0, 114, 178), (213, 94, 0), (0, 158, 115)  # the first colours of the palette
RIGHT, WRONG = (26, 150, 65), (215, 25, 28)
SAME, OTHER = (207, 232, 210), (243, 211, 211)  # the zones of the scale
PURPLE = (120, 10, 200)


def instance(size, box, label="bag", score=0.9):
    """An instance whose mask is its box, in a picture of size (w, h)."""
    mask = np.zeros((size[1], size[0]), np.uint8, order="F")
    x1, y1, x2, y2 = box
    mask[y1:y2, x1:x2] = 1
    return {"box": list(box), "label": label, "score": score, "rle": rle_codec.encode(mask)}


def plain(color):
    return Image.new("RGB", (40, 40), color)


def match(identity="0061", distance=0.1, color=(10, 200, 120), accepted=False):
    return {"identity": identity, "distance": distance, "thumbnail": plain(color), "accepted": accepted}


def count(picture, color):
    return int((np.asarray(picture) == np.array(color)).all(2).sum())


def columns(picture, color):
    """First and last column that hold this colour."""
    found = np.nonzero((np.asarray(picture) == np.array(color)).all(2).any(0))[0]
    return found[0], found[-1]


@pytest.fixture
def draw(tmp_path):
    def sheet(scene, instances, cutouts, matches, **words):
        identification_sheet(tmp_path / "sheet.png", scene, instances, cutouts, matches, **words)
        return Image.open(tmp_path / "sheet.png").convert("RGB")

    return sheet


@pytest.fixture
def compare(tmp_path):
    def sheet(distance, threshold, cutouts=(None, None), pictures=None, names=("a.jpg", "b.jpg"), caption="caption"):
        pictures = pictures or [plain(PURPLE), plain((10, 200, 120))]
        words = "verdict", caption
        comparison_sheet(tmp_path / "pair.png", pictures, names, cutouts, distance, threshold, *words)
        return Image.open(tmp_path / "pair.png").convert("RGB")

    return sheet


@pytest.fixture
def drawn(monkeypatch):
    """Function: () -> the matplotlib axes of the last sheet."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (figures.append(figure), save(figure, *a, **k)))
    return lambda: figures[-1].axes[0]


@pytest.fixture
def written(drawn):
    """Function: () -> {words: (first and last column)} of the texts on the last sheet, as they are drawn."""
    return lambda: {text.get_text(): text.get_window_extent().intervalx for text in drawn().texts}


SCENE = Image.new("RGB", (800, 600), (200, 200, 200))


def test_objects_are_outlined_and_numbered_and_stay_visible(draw):
    boxes = [(100, 100, 300, 300), (400, 100, 700, 500)]
    sheet = draw(SCENE, [instance(SCENE.size, box) for box in boxes], [plain(PURPLE)] * 2, [[], []])
    none = draw(SCENE, [], [], [])
    assert count(none, BLUE) == count(none, ORANGE) == 0
    for color in (BLUE, ORANGE):
        assert 1500 < count(sheet, color) < 8000  # a line, a disc and a frame: no filled mask
    assert count(sheet, (200,) * 3) > 250_000  # the scene shows through


def test_the_accepted_match_is_marked_and_those_too_far_are_faint(draw):
    found = [instance(SCENE.size, (100, 100, 300, 300))]
    colors = (10, 200, 120), (60, 20, 250), (240, 20, 160)  # of the nearest, of one within 0.3 too, of one beyond
    for accepted in (True, False):
        distances = (0.1, 0.3, 0.301) if accepted else (0.31, 0.32, 0.4)
        matches = [match("00", *pair) for pair in zip(distances, colors, strict=True)]
        matches[0]["accepted"] = accepted
        sheet = draw(SCENE, found, [plain(PURPLE)], [matches], threshold=0.3)
        assert count(sheet, PURPLE) == 96 * 96
        assert [count(sheet, color) for color in colors] == [accepted * 96 * 96, accepted * 96 * 96, 0]
        assert (count(sheet, RIGHT) > 800) == accepted
        faint = [round(value + (255 - value) * 0.55) for value in colors[2]]
        near = np.abs(np.asarray(sheet).astype(int) - faint).max(2) <= 1
        assert near.sum() == 96 * 96


def test_a_bar_stands_where_the_threshold_lies(draw, drawn):
    found = [instance(SCENE.size, (100, 100, 300, 300))] * 3
    rows = [[match(str(distance), distance) for distance in row] for row in ((0.1, 0.2), (0.3, 0.31), (0.4, 0.5))]
    draw(SCENE, found, [plain(PURPLE)] * 3, rows, threshold=0.3)
    names = {text.get_text(): text.get_position()[0] for text in drawn().texts}
    bars = [line.get_xdata()[0] for line in drawn().lines]
    assert names["0.2"] < bars[0] and names["0.3"] < bars[1] < names["0.31"] and bars[2] < names["0.4"]
    assert any("threshold 0.3:" in name for name in names)
    draw(SCENE, found, [plain(PURPLE)] * 3, rows)
    assert not drawn().lines and any("no threshold" in text.get_text() for text in drawn().texts)
    draw(SCENE, [], [], [], threshold=0.3)
    assert not any("threshold" in text.get_text() for text in drawn().texts)


@pytest.mark.parametrize("threshold", [None, -1.0, 0.000123456])
def test_what_the_bar_means_is_said_whole(draw, written, threshold):
    small = Image.new("RGB", (100, 100))
    sheet = draw(small, [instance(small.size, (10, 10, 30, 30))], [plain(PURPLE)], [[match()]], threshold=threshold)
    ((words, place),) = ((words, place) for words, place in written().items() if "threshold" in words)
    assert "…" not in words and place[1] < sheet.width - MARGIN


@pytest.mark.parametrize("size", [(640, 480), (300, 900)])
@pytest.mark.parametrize("number", [1, 4, 9])
def test_every_object_has_its_row(draw, monkeypatch, size, number):
    monkeypatch.setattr(sheets, "MANY", 8)
    found = [instance(size, (5 * place, 10, 5 * place + 60, 200)) for place in range(number)]
    cutouts = [plain((place, 77, 255 - place)) for place in range(number)]
    sheet = draw(Image.new("RGB", size), found, cutouts, [[match()]] * number, title="t", caption="c")
    tile = 96 if number <= 8 else 64
    assert [count(sheet, (place, 77, 255 - place)) for place in range(number)] == [tile**2] * number
    assert max(sheet.size) < 2.5 * min(sheet.size)


def boxes_of(plan):
    """(1 + rows, 4): left, top, right, bottom of the scene and of each row."""
    rows = [(left, top, left + plan.row[0], top + plan.row[1]) for left, top in plan.places]
    return np.array([(0, 0, *plan.scene), *rows])


def check(plan, number):
    """Nothing overlaps, all is inside."""
    boxes = boxes_of(plan)
    gap = np.maximum(boxes[:, None, :2] - boxes[None, :, 2:], boxes[None, :, :2] - boxes[:, None, 2:]).max(2)
    assert len(boxes) == number + 1 and (gap[~np.eye(len(boxes), dtype=bool)] >= GAP).all()
    assert boxes.min() == 0 and boxes[:, 2].max() <= plan.width and boxes[:, 3].max() <= plan.height


@pytest.mark.parametrize("size", [(16, 16), (640, 480), (300, 900), (6000, 200), (2, 5000)])
def test_the_parts_do_not_overlap_however_many(size):
    for number in (0, 1, 2, 7, 8, 41, 200, sheets.MOST_ROWS):
        for matches in (0, 1, 5, 500):
            plan = sheets._plan(size, number, matches)
            check(plan, number)
            assert max(plan.width, plan.height) < 14000  # JPEG ends at 65500


@pytest.mark.parametrize(
    "size", [(16, 16), (1000, 1000), (1280, 960), (720, 1280), (1920, 1080), (3000, 500), (6000, 4000)]
)
def test_little_of_a_sheet_is_blank(size):
    for number in range(1, 61):
        plan = sheets._plan(size, number, 5)
        check(plan, number)
        boxes = boxes_of(plan) + (0, 0, 2 * GAP, GAP)  # each with the gap to the next
        filled = (boxes[:, 2:] - boxes[:, :2]).prod(1).sum()
        blank = 1 - filled / ((plan.width + 2 * GAP) * (plan.height + GAP))
        assert blank < (0.25 if number > 3 else 0.35), number  # up to three can't fill the side of an upright scene
        assert plan.scene[0] * plan.scene[1] > 0.2 * plan.width * plan.height or size in ((16, 16), (3000, 500))
        assert 0.5 < plan.width / plan.height < 3


def test_a_number_stands_on_its_object_and_hides_no_other():
    ring = np.zeros((100, 120), bool)
    ring[10:90, 10:110], ring[20:80, 20:100] = True, False
    thin = np.zeros((100, 5000), bool)
    thin[51] = True
    for mask in (ring, thin, np.eye(3, dtype=bool)):
        x, y = sheets._places(mask).T
        assert mask[y, x].all() and 0 < len(x) <= 3000
    places = sheets._places(np.ones((200, 200), bool))
    first = sheets._free_place(places, np.zeros((0, 2)))
    assert np.abs(first - 99.5).max() < 8  # its centre
    second = sheets._free_place(places, first[None])
    assert 2 * sheets.DISC <= np.hypot(*(second - first)) < 4 * sheets.DISC
    assert (sheets._free_place(places[:1], first[None]) == places[0]).all()  # no room at all


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (3, 700), (5000, 2), (6000, 4000)])
def test_scenes_of_any_size(draw, size):
    sheet = draw(Image.new("RGB", size, PURPLE), [instance(size, (0, 0, *size))], [plain((9, 9, 9))], [[match()]])
    assert max(sheet.size) < 2000 and count(sheet, BLUE) > 300
    assert count(sheet, PURPLE) > 100_000 or min(size) < 4  # a ribbon is all outline


def test_nothing_found_is_said(draw):
    said, title = draw(SCENE, [], [], []), draw(SCENE, [], [], [], title="scene.jpg")
    assert said.height > 700 and (np.asarray(said)[730:].min() < 160) and title.height > said.height
    assert draw(Image.new("RGB", (16, 16)), [], [], []).width >= 360


def test_nasty_instances_and_names(draw):
    empty = instance(SCENE.size, (0, 0, 0, 0))
    empty["box"] = [500.0, 400.0, -20.0, 9000.0]
    text = instance(SCENE.size, (0, 0, 50, 50), label="", score=None)
    text["rle"] = {"size": [600, 800], "counts": text["rle"]["counts"].decode()}  # as it comes from JSON
    corner = instance(SCENE.size, (790, 590, 800, 600), label="class " * 99)
    names = ["W" * 5000, "$title_ 猫\n" + os.fsdecode(b"\xff"), ""]
    matches = [[match(name, 1e9, accepted=True) | {"thumbnail": None}] * 2 for name in names]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of letters that the font lacks
        sheet = draw(SCENE, [empty, text, corner], [plain(PURPLE)] * 3, matches, title=names[0], caption=names[1])
    assert max(sheet.size) < 2000 and count(sheet, PURPLE) == 3 * 96 * 96
    assert all(count(sheet, color) > 500 for color in (BLUE, ORANGE, GREEN))
    grey = Image.new("L", (64, 48), 90)
    assert count(draw(grey, [instance(grey.size, (9, 9, 30, 30))], [plain(PURPLE)], [[]]), (90,) * 3) > 1000


def test_names_keep_both_ends():
    assert shorten("red-samsonite", 200, 8) == "red-samsonite"
    short = shorten("red-samsonite-of-the-gate-0012", 96, 8)
    assert "…" in short and short.startswith("red") and short.endswith("12") and len(short) < 20
    assert shorten("a\nb", 200, 8) == "a b" and shorten("", 5, 8) == ""


def test_objects_beyond_the_last_row_keep_their_number(draw, monkeypatch):
    found = [instance(SCENE.size, (100 + 200 * place, 100, 250 + 200 * place, 300)) for place in range(3)]
    monkeypatch.setattr(sheets, "MOST_ROWS", 2)
    sheet = draw(SCENE, found, [plain(PURPLE), plain(PURPLE), plain((1, 2, 3))], [[], [], []])
    assert count(sheet, PURPLE) == 2 * 96 * 96 and count(sheet, (1, 2, 3)) == 0 and count(sheet, GREEN) > 500


def test_one_mask_is_unpacked_at_a_time(draw, monkeypatch):
    sizes = []
    decode = rle_codec.decode
    monkeypatch.setattr(rle_codec, "decode", lambda rle: sizes.append(decode(rle).shape) or decode(rle))
    draw(SCENE, [instance(SCENE.size, (10, 10, 90, 90))] * 3, [plain(PURPLE)] * 3, [[]] * 3)
    assert sizes == [(600, 800)] * 3


def test_lists_of_different_lengths_are_refused(draw):
    with pytest.raises(ValueError):
        draw(SCENE, [instance(SCENE.size, (10, 10, 90, 90))], [], [])


def test_the_sheets_are_of_the_kind_that_their_names_say(tmp_path):
    for name, kind in (("a.png", "PNG"), ("b.jpg", "JPEG")):
        identification_sheet(tmp_path / name, SCENE, [], [], [])
        with Image.open(tmp_path / name) as sheet:
            assert sheet.format == kind
        comparison_sheet(tmp_path / name, [SCENE] * 2, ["a", "b"], [None] * 2, 0.1, 0.2, "yes")
        with Image.open(tmp_path / name) as sheet:
            assert sheet.format == kind


@pytest.mark.parametrize(
    "distance, threshold", [(0.1, 0.3), (0.3, 0.3), (0.5, 0.3), (5.0, 0.3), (0.0, 0.0), (1e-9, 0.0)]
)
def test_the_verdict_has_the_colour_of_its_side_of_the_threshold(compare, distance, threshold):
    sheet = compare(distance, threshold)
    color, wrong = (RIGHT, WRONG) if distance <= threshold else (WRONG, RIGHT)
    assert count(sheet, color) > 300 and count(sheet, wrong) == 0


def test_the_mark_lies_on_its_side_of_the_threshold(compare):
    for distance in (0.1, 0.29, 0.31, 0.5, 2.0):
        sheet = compare(distance, 0.3)
        scale = sheet.crop((0, sheet.height - 72, sheet.width, sheet.height - 64))  # the mark alone, above the zones
        mark = sum(columns(scale, RIGHT if distance <= 0.3 else WRONG)) / 2
        start, limit, end = columns(sheet, SAME)[0], columns(sheet, OTHER)[0], columns(sheet, OTHER)[1]
        expected = start + (limit - start) * distance / 0.3
        assert start < limit < end and mark <= end
        assert abs(mark - expected) < 6, (distance, mark, expected)


def test_without_a_threshold_there_is_no_side(compare):
    sheet = compare(0.4, None)
    assert [count(sheet, color) for color in (RIGHT, WRONG, SAME, OTHER)] == [0] * 4
    assert count(sheet, PURPLE) > 10_000
    compare(0.0, None)


def test_matches_without_a_place_are_said(draw, written, monkeypatch):
    monkeypatch.setattr(sheets, "MOST_ROWS", 2)
    found = [instance(SCENE.size, (100, 100, 300, 300))] * 2
    limit = sheets.MOST_MATCHES
    for objects, number, said in (
        (found, limit, set()),
        (found, 20, {f"the nearest {limit} of 20 matches are shown"}),
        (
            found * 2,
            20,
            {f"2 more have a number in the scene and no row here; the nearest {limit} of 20 matches are shown"},
        ),
    ):
        sheet = draw(SCENE, objects, [plain(PURPLE)] * len(objects), [[match()] * number] * len(objects))
        texts = written()
        assert {words for words in texts if "are shown" in words} == said
        assert all(texts[words][1] < sheet.width for words in said)


@pytest.mark.parametrize("distance", [0.0, 0.02, 3.0])
def test_a_threshold_that_accepts_nothing_has_no_place_on_the_scale(compare, written, distance):
    sheet = compare(distance, -1.0)
    assert count(sheet, SAME) == count(sheet, RIGHT) == 0 and count(sheet, OTHER) > 10_000
    assert "0" in written() and not any("threshold" in words for words in written())


@pytest.mark.parametrize(
    "distance, threshold, label, has_zero",
    [
        (1.748, 0.0, "threshold 0", False),
        (0.0, 0.0, "threshold 0", False),
        (1.748, 0.0001, "threshold 0.0001", False),
        (1.748, 0.000123456, "threshold 0.0001235", False),
        (1.0, 0.035, "threshold 0.035", False),
        (1.0, 0.3, "threshold 0.3", True),
        (0.0, 1e-9, "threshold 1e-09", False),
    ],
)
def test_the_label_of_the_threshold_stays_on_the_line_and_hides_nothing(
    compare, written, distance, threshold, label, has_zero
):
    sheet = compare(distance, threshold)
    texts = written()
    for words in (label, f"distance {distance:.3f}"):
        assert MARGIN <= texts[words][0] < texts[words][1] <= sheet.width - MARGIN
    assert ("0" in texts) == has_zero and (not has_zero or texts["0"][1] < texts[label][0])


def test_the_caption_and_what_was_compared_have_two_lines(compare, written):
    words = "threshold 0.0123: at most 1 % of pairs of two objects pass on whole validation pictures"
    one = compare(0.1, 0.3, (plain((1, 2, 3)), None)).height
    two = compare(
        0.1, 0.3, (plain((1, 2, 3)), None), caption=f"similarity 0.900, cosine distance 0.100; {words}"
    ).height
    texts = written()
    assert {"similarity 0.900, cosine distance 0.100", words} < set(texts) and two > one
    assert {"compared:", "cut out of it", "the whole picture"} < set(texts)


def test_what_was_compared_is_shown(compare):
    without = compare(0.1, 0.3)
    cut = compare(0.1, 0.3, (plain((1, 2, 3)), None))
    assert cut.height > without.height and count(cut, (1, 2, 3)) == 150 * 150
    assert count(cut, (10, 200, 120)) == count(without, (10, 200, 120)) + 150 * 150  # as a whole


def test_pictures_of_any_shape_are_compared(compare):
    for sizes in ([(1, 1), (16, 16)], [(5000, 2), (3, 700)], [(4000, 3000), (30, 40)]):
        sheet = compare(0.1, 0.3, pictures=[Image.new("RGB", size) for size in sizes], names=["W" * 999, "$_\n猫"])
        assert sheet.width < 1000 and sheet.height < 1000
