"""The sheets: their size, and what colour stands where."""

import errno
import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from core.engine.coco_evaluation import METRIC_NAMES as DETECTION
from core.errors import InputError
from core.retrieval.ranking import METRIC_NAMES as RETRIEVAL
from core.visualize.curves import curves
from core.visualize.retrieval import RankRow, augmentation_sheet, cluster_sheet, mask_sheet, rank_list_sheet
from core.visualize.sheet import GAP, HEAD, MARGIN, PALETTE, Sheet

GREEN, RED = (26, 150, 65), (215, 25, 28)


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def find(picture, color, tolerance=12):
    """Rows and columns of the pixels of one colour."""
    return np.nonzero((np.abs(picture - np.array(color)) <= tolerance).all(2))


def rgb(color):
    """'#0072B2' -> (0, 114, 178)."""
    return tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))


@pytest.fixture
def row(tmp_path):
    """A blue query and four grey matches of odd shapes, the first and last of them right."""
    shapes = [("RGB", (40, 80), (0, 0, 250)), ("L", (80, 40), 90), ("L", (64, 64), 90), ("L", (300, 20), 90)]
    shapes.append(("L", (1, 1), 90))
    paths = []
    for number, (mode, size, color) in enumerate(shapes):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.new(mode, size, color).save(paths[-1])
    names = ["one", "two", "three", "a name that is far too long for the picture above it $x$"]
    return RankRow(paths[0], "one", paths[1:], names, [0.1, 0.2, 0.3, 0.4], [True, False, False, True])


def test_clusters_have_a_line_each(tmp_path, row):
    pictures = [(row.query_path, 16)]
    cluster_sheet(tmp_path / "sheet.png", [("3 pictures", pictures * 3), ("1 picture", pictures)])
    rows, columns = find(pixels(tmp_path / "sheet.png"), (0, 0, 250))
    blocks = [(np.diff(np.unique(values), prepend=-9) > 1).sum() for values in (rows, columns)]
    assert blocks == [2, 3]
    cluster_sheet(tmp_path / "empty.png", [])
    assert min(Image.open(tmp_path / "empty.png").size) > 50


def test_rank_list_frames_stand_around_their_pictures(tmp_path, row):
    rank_list_sheet(tmp_path / "sheet.png", [row, row])
    sheet = pixels(tmp_path / "sheet.png")
    query = find(sheet, (0, 0, 250))
    middle = int(np.median(query[0][query[0] < sheet.shape[0] // 2]))  # a line through the first row of pictures
    line = sheet[middle - 12 : middle + 12]  # as high as a dash and its gap
    assert query[1].max() < find(line, (90, 90, 90), 0)[1].min()  # the query stands to the left of every match
    greens, reds = (np.unique(find(line, color)[1]) for color in (GREEN, RED))
    starts = {GREEN: greens[np.diff(greens, prepend=-9) > 1], RED: reds[np.diff(reds, prepend=-9) > 1]}
    # Two sides each of two green and two red frames; the green ones outside: G G R R R R G G.
    assert len(starts[GREEN]) == 4 and len(starts[RED]) == 4
    assert starts[GREEN][1] < starts[RED][0] and starts[RED][3] < starts[GREEN][2]
    # Each match is inside its own frame.
    between = sheet[middle, starts[GREEN][0] : starts[GREEN][1]]
    assert (between == 90).all(1).any() and not len(find(between[None], RED)[0])


def test_rank_list_says_right_and_wrong_without_colour(tmp_path, row):
    """A right frame is an unbroken line, a wrong one is dashed."""
    share = {}
    for right, color in ((True, GREEN), (False, RED)):
        one = row._replace(match_paths=row.match_paths[1:2], match_names=["x"], distances=[0.5], correct=[right])
        rank_list_sheet(tmp_path / "sheet.png", [one])
        rows, columns = find(pixels(tmp_path / "sheet.png"), color)
        side = rows[columns == columns.min() + 1]  # the left side of the frame
        share[right] = len(side) / (side.max() - side.min() + 1)
    assert share[True] == 1 and 0.5 < share[False] < 0.9


def test_rank_list_is_as_large_as_what_it_shows(tmp_path, row):
    def size(rows, **options):
        rank_list_sheet(tmp_path / "sheet.png", rows, **options)
        return Image.open(tmp_path / "sheet.png").size

    width, height = size([row])
    assert size([row] * 3)[0] == width and size([row] * 3)[1] > 2 * height
    assert size([row], num_matches=2)[0] < width
    assert size([row, row._replace(match_paths=[], match_names=[], distances=[], correct=[])])[0] == width
    assert (
        size([row._replace(match_paths=[], match_names=[], distances=[], correct=[])])[0] > 350
    )  # room for a sentence


def test_rank_list_names_a_picture_that_is_not_there(tmp_path, row):
    with pytest.raises(InputError, match="nowhere.jpg"):
        rank_list_sheet(tmp_path / "sheet.png", [row._replace(query_path="nowhere.jpg")])


def test_a_sheet_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    """A disk that fills up in the middle: one line, and the sheet of the last epoch is still there."""

    def save(figure, file, **options):
        file.write(b"half a picture")
        raise OSError(errno.ENOSPC, "No space left on device")

    for draw in (
        lambda path: curves(path, [{"epoch": 1, "loss": 2.0}], {}),
        lambda path: augmentation_sheet(path, torch.rand(2, 3, 8, 8)),
    ):
        draw(tmp_path / "sheet.png")
        before = (tmp_path / "sheet.png").read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(Figure, "savefig", save)
            with pytest.raises(InputError, match="sheet.png: No space left on device"):
                draw(tmp_path / "sheet.png")
        assert (tmp_path / "sheet.png").read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


def test_mask_sheet_is_bright_where_the_mask_is(tmp_path):
    images = torch.tensor([0.8, 0.0, 0.0]).view(1, 3, 1, 1).repeat(1, 1, 64, 64)
    masks = torch.zeros(1, 1, 16, 16)
    masks[..., :8] = 1  # left half
    mask_sheet(tmp_path / "sheet.png", images, masks)
    sheet = pixels(tmp_path / "sheet.png")
    rows, columns = find(sheet, (204, 0, 0), 3)  # the picture itself, at the left
    height, width = rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
    assert abs(height - 176) <= 2 and abs(width - 176) <= 2
    middle = sheet[(rows.min() + rows.max()) // 2].mean(1)
    start = columns.max() + 1 + GAP // 2
    assert middle[start + width // 4] > middle[start + 3 * width // 4] + 80


@pytest.mark.parametrize("count, targets", [(1, False), (5, False), (5, True)])
def test_mask_sheet_of_several_pictures_on_lines(tmp_path, count, targets):
    images, masks = torch.rand(count, 3, 48, 24), torch.rand(count, 1, 12, 12, dtype=torch.float64)
    mask_sheet(tmp_path / "sheet.png", images, masks, masks if targets else None)
    width, height = Image.open(tmp_path / "sheet.png").size
    lines = math.ceil(count / (3 if targets else 4))
    assert height == pytest.approx(lines * 290 + 150, rel=0.1) and width < 1800


def test_augmentation_sheet_draws_box_and_mask_where_they_are(tmp_path):
    images = torch.full((3, 3, 100, 100), 0.5)
    masks = torch.zeros(3, 1, 100, 100)
    masks[:, :, 60:80, 20:40] = 1
    masks[2] = 0  # without an outline
    boxes = torch.tensor([[0.5, 0.25, 0.75, 0.5]]).repeat(3, 1)
    augmentation_sheet(tmp_path / "sheet.png", images, boxes, masks, columns=2)
    sheet = pixels(tmp_path / "sheet.png")
    orange, blue = (rgb(color) for color in PALETTE[4:6])
    cell = sheet[HEAD + MARGIN :, MARGIN:][:148, :148]
    for color, expected in ((orange, (0.25, 0.5, 0.5, 0.75)), (blue, (0.6, 0.8, 0.2, 0.4))):
        rows, columns = find(cell, color, 25)
        found = np.array([rows.min(), rows.max(), columns.min(), columns.max()]) / 148
        assert np.abs(found - expected).max() < 0.025
    second_line = sheet[HEAD + MARGIN + 148 + GAP :][:148]
    assert len(find(second_line, orange, 25)[0]) and not len(find(second_line, blue, 25)[0])


def test_augmentation_sheet_keeps_the_box_on_a_ribbon(tmp_path):
    """A picture far longer than its place is shown whole, and its box moves with it."""
    images = torch.zeros(1, 3, 20, 200)
    augmentation_sheet(tmp_path / "sheet.png", images, torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    sheet = pixels(tmp_path / "sheet.png")
    rows, _ = find(sheet[:-40], (230, 159, 0))
    assert 18 <= rows.max() - rows.min() <= 30


def test_curves_read_log_csv_with_blanks(tmp_path):
    (tmp_path / "log.csv").write_text(
        "epoch,lr,loss,cross_entropy,images_per_second,mAP,mINP,rank1,rank5,rank10\n"
        "0,,,,,0.2,,,,\n1,0.001,3.5,3.5,80,,,,,\n2,0.0001,2.5,2.5,81,0.9,,,,\n"
    )
    curves(tmp_path / "curves.png", tmp_path / "log.csv", RETRIEVAL)
    full = pixels(tmp_path / "curves.png")
    assert full.shape[:2] == (460, 1500)
    rows, columns = find(full, rgb(PALETTE[0]))
    panel = columns > 950
    assert panel.sum() > 200  # mAP is joined over the epoch that has none
    rows, columns = rows[panel], columns[panel]
    assert (
        rows[columns == columns.min()].mean() > rows[columns == columns.max()].mean() + 200
    )  # it rises by 70 of 104 %


def test_curves_have_one_line_for_all_branches_of_a_loss(tmp_path):
    names = [f"cross_entropy/part_{part}" for part in range(6)]
    rows = [{"epoch": epoch, "loss": 6.0 / epoch, **dict.fromkeys(names, 1.0 / epoch)} for epoch in (1, 2)]
    curves(tmp_path / "parts.png", rows, RETRIEVAL)
    rows = [{"epoch": epoch, "loss": 6.0 / epoch, "cross_entropy": 6.0 / epoch} for epoch in (1, 2)]
    curves(tmp_path / "sum.png", rows, RETRIEVAL)
    assert (pixels(tmp_path / "parts.png") == pixels(tmp_path / "sum.png")).all()


def test_curves_of_a_detection_run(tmp_path):
    """Five losses and five of the 24 COCO numbers are drawn; the others are no parts of the loss."""
    parts = dict.fromkeys(("classifier", "box_reg", "mask", "objectness", "rpn_box_reg"), 0.1)
    numbers = {name: 0.01 * number for number, name in enumerate(DETECTION)}
    row = {"lr": 0.1, "loss": 0.5, **{f"loss_{name}": value for name, value in parts.items()}, **numbers}
    curves(tmp_path / "curves.png", [{"epoch": epoch, **row} for epoch in (1, 2)], DETECTION)
    full = pixels(tmp_path / "curves.png")
    drawn = [[len(find(panel, rgb(color))[0]) > 10 for color in PALETTE] for panel in np.split(full, 3, 1)]
    assert drawn[0][:5] == [True] * 5 and not any(drawn[0][5:])
    assert not any(drawn[1][5:])
    assert drawn[2][:3] == [True] * 3 and not any(drawn[2][3:])  # a number has one colour, dashed for boxes


@pytest.mark.parametrize("log", [[{"epoch": 0, "mAP": 0.5}], [{"epoch": 1, "lr": 0.1, "loss": 2.0}]])
def test_curves_of_a_run_that_has_just_begun(tmp_path, log):
    curves(tmp_path / "curves.png", log, RETRIEVAL)
    assert Image.open(tmp_path / "curves.png").size == (1500, 460)


@pytest.mark.parametrize("size", [(301, 201), (115, 29), (58, 219), (40, 600)])
def test_a_picture_on_a_sheet_is_drawn_pixel_by_pixel(tmp_path, size):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    sheet = Sheet(*size)
    sheet.picture(Image.fromarray(noise), 0, 0)
    sheet.save(tmp_path / "sheet.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")), noise)


def test_a_sheet_of_nothing_says_so(tmp_path):
    (tmp_path / "log.csv").write_text("epoch,lr,loss\n")
    none = torch.zeros(0, 3, 8, 8)
    for draw in (
        lambda path: rank_list_sheet(path, []),
        lambda path: mask_sheet(path, none, none[:, :1]),
        lambda path: augmentation_sheet(path, none),
        lambda path: curves(path, tmp_path / "log.csv", RETRIEVAL),
    ):
        draw(tmp_path / "sheet.png")
        sheet = pixels(tmp_path / "sheet.png")
        assert sheet.shape[:2] == (90, 360) and sheet.min() < 200  # words on it
        (tmp_path / "sheet.png").unlink()


@pytest.fixture
def written(monkeypatch):
    """What is written on the sheets that a test draws."""
    words = []
    write = Sheet.text

    def keep(sheet, left, top, text, *more, **how):
        words.append(text)
        write(sheet, left, top, text, *more, **how)

    monkeypatch.setattr(Sheet, "text", keep)
    return words


def test_every_sheet_has_a_title(tmp_path, row, written):
    images, masks = torch.rand(2, 3, 32, 16), torch.rand(2, 1, 8, 8)
    path = tmp_path / "sheet.png"
    for draw, title in (
        (lambda: rank_list_sheet(path, [row]), "Queries and their nearest pictures"),
        (lambda: cluster_sheet(path, [("1 picture", [(row.query_path, 16)])]), "Clusters"),
        (lambda: mask_sheet(path, images, masks), "Where the network sees the object"),
        (lambda: augmentation_sheet(path, images), "What the network is shown in training"),
    ):
        written.clear()
        draw()
        assert written[0] == title
    assert "no box and no mask in the data" in written  # of folders of pictures
    augmentation_sheet(path, images, torch.rand(2, 4), masks)
    assert written[-2:] == ["box", "mask"]


def test_a_title_widens_a_narrow_sheet_and_moves_what_is_below_it(tmp_path):
    sheet = Sheet(60, 40, "A title that is far wider than this sheet")
    sheet.picture(Image.new("RGB", (10, 10), (0, 0, 250)), 20, 5)
    sheet.save(tmp_path / "sheet.png")
    drawn = pixels(tmp_path / "sheet.png")
    rows, columns = find(drawn, (0, 0, 250), 0)
    assert drawn.shape[0] == 40 + HEAD and drawn.shape[1] > 300
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (HEAD + 5, HEAD + 14, 20, 29)
