"""Figures of a data set: what stands in them, for empty, missing and odd values too."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from baggage import charts
from baggage.charts import Row, bar_figure, contact_sheet, histogram_figure, scatter_figure
from core.visualize.sheet import Sheet

ORANGE = (230, 159, 0)


def is_color(picture, color, tolerance=12):
    return (np.abs(picture.astype(int) - np.array(color)) <= tolerance).all(2)


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Function: (draw, *arguments) -> (matplotlib's figure, pixels), of a figure or sheet that is really written."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (figures.append(figure), save(figure, *a, **k)))

    def draw(function, *arguments, **options):
        function(tmp_path / "figure.png", *arguments, **options)
        assert [path.name for path in tmp_path.iterdir() if "figure" in path.name] == ["figure.png"]
        return figures[-1], np.asarray(Image.open(tmp_path / "figure.png").convert("RGB"))

    return draw


@pytest.fixture
def written(monkeypatch):
    """The texts that are put on sheets."""
    texts = []
    text = Sheet.text
    monkeypatch.setattr(
        Sheet, "text", lambda self, x, y, words, *a, **k: (texts.append(words), text(self, x, y, words))
    )
    return texts


def words(axes):
    return [text.get_text() for text in axes.texts]


def test_bars_carry_their_numbers_and_a_hatch(drawn):
    groups = {"train": {"pictures": 18120, "identities": 3519}, "probe": {"pictures": 0.25, "identities": None}}
    figure, _ = drawn(bar_figure, "Splits", groups, "number")
    (axes,) = figure.axes
    heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
    assert heights == [[18120, 0.25], [3519, 0]]
    assert words(axes) == ["18,120", "0.25", "3,519", "–"]  # what is missing is not 0
    hatches = [bars[0].get_hatch() or "" for bars in axes.containers]
    assert len(set(hatches)) == 2
    assert [label.get_text()[1:] for label in axes.get_xticklabels()] == ["train", "probe"]
    assert [text.get_text()[1:] for text in figure.legends[0].get_texts()] == ["pictures", "identities"]


def test_many_bars_differ_by_more_than_colour(drawn):
    groups = {"all": {f"material {number}": number for number in range(12)}}
    figure, _ = drawn(bar_figure, "Materials", groups, "pictures")
    looks = [(bars[0].get_facecolor(), bars[0].get_hatch()) for bars in figure.axes[0].containers]
    assert len(set(looks)) == 12


MATERIALS = {"hard": {"g": 240, "p": 288}, "others": {"g": 120, "p": None}, "soft": {"g": 540, "p": 648}}


def test_few_bars_stand(drawn):
    figure, pixels = drawn(bar_figure, "Materials", MATERIALS, "pictures")
    (axes,) = figure.axes
    assert [label.get_text()[1:] for label in axes.get_xticklabels()] == ["hard", "others", "soft"]
    assert axes.get_ylabel() == "pictures" and pixels.shape[1] < 600


@pytest.mark.parametrize(
    "names", [[f"material {number}" for number in range(16)], ["soft", "aluminium and magnesium in an alloy"]]
)
def test_many_bars_and_long_names_lie(drawn, names):
    groups = {name: {"g": 10 + place, "p": None} for place, name in enumerate(names)}
    figure, pixels = drawn(bar_figure, "Materials", groups, "pictures")
    (axes,) = figure.axes
    assert [label.get_text()[1:] for label in axes.get_yticklabels()] == names  # whole
    assert {label.get_rotation() for label in axes.get_yticklabels()} == {0}
    assert axes.yaxis_inverted() and axes.get_xlabel() == "pictures" and pixels.shape[1] == 900
    assert [bar.get_width() for bar in axes.containers[0]] == [10 + place for place in range(len(names))]
    assert words(axes) == [str(10 + place) for place in range(len(names))] + ["–"] * len(names)
    renderer = figure.canvas.get_renderer()
    places = [text.get_window_extent(renderer) for text in (*axes.get_yticklabels(), *axes.texts)]
    assert all(place.x0 >= 0 and place.x1 <= 900 for place in places)
    assert not any(one.overlaps(other) for place, one in enumerate(places) for other in places[:place])


def test_a_histogram_counts_whole_numbers_one_by_one(drawn):
    figure, _ = drawn(histogram_figure, "Bags", {"train": [2, 2, 4], "test": [3], "none": []}, "pictures")
    counts = [[patch.get_height() for patch in axes.patches] for axes in figure.axes]
    assert counts == [[2, 0, 1], [0, 1, 0], [0, 0, 0]]
    assert [patch.get_center()[0] for patch in figure.axes[0].patches] == [2, 3, 4]
    assert words(figure.axes[0])[0].endswith("train: 3, median 2, from 2 to 4")
    assert words(figure.axes[2])[0].endswith("none: 0")


def test_a_histogram_says_what_it_leaves_out(drawn):
    values = [0.1, 0.2, None, float("nan"), float("inf"), 7.0]
    figure, _ = drawn(histogram_figure, "Ratios", {"all": values}, "ratio", bins=[0, 1, 2])
    assert [patch.get_height() for patch in figure.axes[0].patches] == [2, 0]
    assert words(figure.axes[0])[0].endswith("all: 6, median 0.15, from 0.1 to 0.2; 4 not shown")


def test_scatter_has_a_marker_for_each_series_and_bounds_their_number(drawn, monkeypatch):
    monkeypatch.setattr(charts, "MOST_POINTS", 5)
    series = {"before": [(i, i) for i in range(11)], "after": [(3, float("nan")), (1, 2)], "none": []}
    figure, _ = drawn(scatter_figure, "Sizes", series, "width", "height")
    before, after, _ = figure.axes[0].collections
    assert before.get_offsets()[:, 0].tolist() == [0, 2, 5, 8, 10] and after.get_offsets().tolist() == [[1, 2]]
    shapes = [points.get_paths()[0].vertices.tolist() for points in (before, after)]
    assert shapes[0] != shapes[1]
    legend = [text.get_text()[1:] for text in figure.axes[0].get_legend().get_texts()]
    assert legend == ["before: 11, 5 of them shown", "after: 1", "none: 0"]


@pytest.mark.parametrize("name", ["_hidden", "$x$ and $", "\udcff", "行李"])
def test_names_are_taken_as_they_stand(drawn, name):
    drawn(bar_figure, name, {name: {name: 1}}, "number")
    drawn(scatter_figure, name, {name: [(1, 2)]}, "x", "y")
    figure, _ = drawn(histogram_figure, name, {name: [1.5]}, "x")
    assert figure.axes[0].patches


def test_nothing_is_a_small_sheet(drawn):
    for function, nothing in (
        (bar_figure, ({}, "y")),
        (bar_figure, ({"train": {}}, "y")),
        (histogram_figure, ({}, "x")),
        (histogram_figure, ({"all": [None]}, "x")),
        (scatter_figure, ({"all": []}, "x", "y")),
        (contact_sheet, ([],)),
    ):
        assert drawn(function, "Title", *nothing)[1].shape == (90, 360, 3)


@pytest.fixture
def blue(tmp_path):
    """A blue picture of 200 x 100 pixels."""
    Image.new("RGB", (200, 100), (0, 0, 250)).save(tmp_path / "blue.png")
    return tmp_path / "blue.png"


def test_contact_sheet_shows_pictures_and_cards(drawn, written, blue, tmp_path):
    (tmp_path / "broken.jpg").write_text("no picture")
    missing = [(tmp_path / "broken.jpg", "", None), ("nowhere.png", "x", None)]
    rows = [Row("good", ": 2", [(blue, "one", None), (str(blue), "two", None)]), Row("bad", "", missing)]
    _, pixels = drawn(contact_sheet, "Samples", rows)
    columns = np.nonzero(is_color(pixels, (0, 0, 250)).any(0))[0]
    assert (np.diff(columns) > 1).sum() == 1 and len(columns) == 2 * charts.CELL  # two pictures beside each other
    assert is_color(pixels, charts.CARD, 0).sum() > 1.5 * charts.CELL**2  # two cards, less their letters
    assert written.count("not readable") == 1 and written.count("missing") == 1
    assert {"Samples", "good: 2", "bad", "one", "two", "x"} <= set(written)


def test_contact_sheet_shows_12_bits_of_16(drawn, written, tmp_path):
    Image.fromarray(np.full((60, 80), 4095, np.uint16)).save(tmp_path / "deep.png")
    dark, bright = (
        drawn(contact_sheet, "", [Row("row", "", [(tmp_path / "deep.png", "", None)])], *bits)[1]
        for bits in ((), (12,))
    )
    assert (dark.max(axis=2) < 20).sum() > 1000 > (bright.max(axis=2) < 20).sum()


def test_contact_sheet_frames_boxes_where_they_are_seen(drawn, blue, tmp_path):
    """The right half of the stored picture; turned upright by EXIF it is the lower one. A box ends at its cell."""
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (200, 100), (0, 0, 250)).save(tmp_path / "turned.png", exif=turned)
    for path, wide, high in ((blue, (56, 112), (28, 84)), (tmp_path / "turned.png", (28, 84), (56, 112))):
        _, pixels = drawn(contact_sheet, "", [Row("row", "", [(path, "", (100, 0, 200, 100))])])
        rows, columns = np.nonzero(is_color(pixels, ORANGE))
        top, left = 28 + 30 + 26, 28  # margin, title, heading
        assert np.abs(np.array([columns.min(), columns.max()]) - left - wide).max() <= 3
        assert np.abs(np.array([rows.min(), rows.max()]) - top - high).max() <= 3
    _, pixels = drawn(contact_sheet, "", [Row("row", "", [(blue, "", (-900, 20, 900, 60))])])
    assert np.nonzero(is_color(pixels, ORANGE))[1].max() <= 28 + charts.CELL + 3


def test_a_long_name_leaves_the_rest_of_its_heading_whole(drawn, blue):
    rest = ": 12 pictures of 3 identities"
    rows = [Row(name, rest, [(blue, "", None)]) for name in ("hard shell", "hard shell " * 30 + "end")]
    figure, _ = drawn(contact_sheet, "Samples", rows)
    short, long = (text for text in words(figure.axes[0]) if text.endswith(rest))
    assert short == "hard shell" + rest
    assert long.startswith("hard shell") and "…" in long and long.endswith("end" + rest)


def test_contact_sheet_ends_before_it_is_too_long(drawn, written, blue, monkeypatch):
    monkeypatch.setattr(charts, "MOST_ROWS", 2)
    rows = [Row(f"row {number}", "", [(blue, "", None)] * 7) for number in range(5)]
    _, pixels = drawn(contact_sheet, "Many", rows)
    assert "3 more rows are not shown" in written and "row 1" in written and "row 2" not in written
    blues = is_color(pixels, (0, 0, 250)).sum() / (charts.CELL * charts.CELL / 2)
    assert blues == pytest.approx(14, rel=0.02)
