"""Picture sheets and curves: whom the network finds, where it looks, what it is shown, how training goes.

Every function writes one PNG, whole or not at all (InputError where the disk is full), and keeps no state: figures are
matplotlib's objects, without pyplot, without a display.
Colours are those of Okabe and Ito (2008), which colour-blind people tell apart; where green and red mean right and
wrong, the line and a sign say it as well. A sheet of nothing is a small sheet that says so.
"""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageOps

from core.data.images import read_image
from core.files import atomic_write

DPI = 100
GAP, MARGIN = 18, 28  # pixels between pictures, and around the sheet
INK, FAINT = "#222222", "#767676"
RIGHT, WRONG = "#1a9641", "#d7191c"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
METRICS = {"mAP": "mAP", "mINP": "mINP", "rank1": "Rank-1", "rank5": "Rank-5", "rank10": "Rank-10"}


class RankRow(NamedTuple):
    """One query and its matches, best first."""

    query_path: str
    query_name: str
    match_paths: list[str]
    match_names: list[str]
    distances: list[float]
    correct: list[bool]  # whether each match is of the query's identity


class _Sheet:
    """A page of pictures, frames and text, placed in pixels from the top left corner."""

    def __init__(self, width: int, height: int):
        self.size = (width, height)
        self.pixels = np.full((height, width, 3), 255, np.uint8)
        self.figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
        self.axes.set_axis_off()

    def picture(self, picture: Image.Image, left: int, top: int) -> None:
        self.pixels[top : top + picture.height, left : left + picture.width] = np.asarray(picture)

    def frame(self, left: float, top: float, width: float, height: float, color: str, line=1.0, style="solid") -> None:
        """A frame whose line, `line` pixels wide, lies outside the rectangle."""
        half = line / 2
        self.axes.add_patch(
            Rectangle(
                (left - half, top - half),
                width + line,
                height + line,
                fill=False,
                edgecolor=color,
                linewidth=line * 72 / DPI,
                linestyle=style,
                joinstyle="miter",
                snap=False,
            )
        )

    def text(self, left: float, top: float, text: str, size=8.5, color=INK, align="center", weight="normal") -> None:
        # Names come from folders and files: a dollar sign in one is no formula.
        self.axes.text(left, top, text, fontsize=size, color=color, ha=align, va="top", weight=weight, parse_math=False)

    def save(self, path: str | Path) -> None:
        width, height = self.size
        self.axes.imshow(self.pixels, extent=(0, width, height, 0), aspect="auto", interpolation="nearest", zorder=0)
        _save(self.figure, path)


def rank_list_sheet(path: str | Path, rows: Sequence[RankRow], num_matches: int = 10) -> None:
    """One line per query: the query, then its first matches.

    A solid green frame and a tick stand for the same identity, a dashed red frame and a cross for another one; under
    each match its distance to the query and its name. Pictures that can't be read raise InputError.
    """
    if not rows:
        return _empty_sheet(path, "no queries to show")
    rows = [row._replace(match_paths=row.match_paths[:num_matches]) for row in rows]
    queries = [read_image(row.query_path) for row in rows]
    matches = [[read_image(match) for match in row.match_paths] for row in rows]
    width, height = _box_for(queries + [picture for row in matches for picture in row], area=124 * 124)
    columns = max(1, max(len(row) for row in matches))
    first = MARGIN + width + 2 * GAP + 10  # left edge of the first match: the query stands apart
    header, line_height = 26, height + 44
    sheet = _Sheet(
        max(first + columns * (width + GAP) - GAP, first + 240) + MARGIN,
        2 * MARGIN + header + len(rows) * (line_height + GAP) - GAP,
    )

    sheet.text(MARGIN + width / 2, MARGIN - 6, "query", size=10, weight="bold")
    for column in range(columns):
        sheet.text(first + column * (width + GAP) + width / 2, MARGIN - 6, str(column + 1), size=10, color=FAINT)
    for number, (row, query) in enumerate(zip(rows, queries, strict=True)):
        top = MARGIN + header + number * (line_height + GAP)
        sheet.picture(_fit(query, width, height), MARGIN, top)
        sheet.frame(MARGIN, top, width, height, INK, line=2)
        sheet.text(MARGIN + width / 2, top + height + 9, _shorten(row.query_name, width - 12), weight="bold")
        if not matches[number]:
            sheet.text(
                first, top + height / 2 - 6, "no picture in the gallery to compare with", align="left", color=FAINT
            )
        for column, picture in enumerate(matches[number]):
            left = first + column * (width + GAP)
            right = row.correct[column]
            color = RIGHT if right else WRONG
            sheet.picture(_fit(picture, width, height), left, top)
            sheet.frame(left, top, width, height, color, line=4, style="solid" if right else (0, (3.5, 1.0)))
            distance = f"{'✓' if right else '✗'} {row.distances[column]:.3f}"
            sheet.text(left + width / 2, top + height + 9, distance, color=color, weight="bold")
            sheet.text(left + width / 2, top + height + 25, _shorten(row.match_names[column], width), 8, FAINT)
    sheet.save(path)


def mask_sheet(
    path: str | Path, images: torch.Tensor, masks: torch.Tensor, targets: torch.Tensor | None = None
) -> None:
    """Each picture beside its predicted mask, laid over it as a heat map, and beside the target if there is one.

    images: (B, 3, H, W) in [0, 1]; masks, targets: (B, 1, h, w) in [0, 1], of any size. The colours are those of an
    absolute scale from 0 to 1, so that an unsure mask looks unsure.
    """
    if len(images) == 0:
        return _empty_sheet(path, "no pictures to show")
    pictures = _to_pictures(images)
    layers = {"picture": pictures, "predicted mask": _heat_maps(images, masks)}
    if targets is not None:
        layers["target"] = _heat_maps(images, targets)
    width, height = _box_for(pictures, area=176 * 176)
    group_width = len(layers) * (width + GAP // 2) - GAP // 2
    groups = min(len(pictures), 4 if targets is None else 3)
    lines = math.ceil(len(pictures) / groups)
    header, caption, bar = 22, 22, 44
    sheet_width = 2 * MARGIN + groups * (group_width + 2 * GAP) - 2 * GAP
    sheet = _Sheet(sheet_width, 2 * MARGIN + header + lines * (height + caption + GAP) - GAP + bar)

    peaks = masks.flatten(1).amax(1).tolist()
    for number in range(len(pictures)):
        group_left = MARGIN + number % groups * (group_width + 2 * GAP)
        top = MARGIN + header + number // groups * (height + caption + GAP)
        for column, (name, layer) in enumerate(layers.items()):
            left = group_left + column * (width + GAP // 2)
            sheet.picture(_fit(layer[number], width, height), left, top)
            if number < groups:
                sheet.text(left + width / 2, MARGIN - 4, name, size=9.5, weight="bold")
            if name == "predicted mask":
                sheet.text(left + width / 2, top + height + 6, f"highest {peaks[number]:.2f}", color=FAINT)
    scale_top = sheet.size[1] - MARGIN - 14
    scale_width = min(240, sheet_width - 2 * MARGIN - 60)
    scale_left = (sheet_width - scale_width) // 2
    ramp = torch.linspace(0, 1, scale_width).expand(1, 1, 14, -1)
    sheet.picture(_heat_maps(torch.full((1, 3, 14, scale_width), 0.5), ramp)[0], scale_left, scale_top)
    sheet.text(scale_left - 10, scale_top - 1, "0", align="right")
    sheet.text(scale_left + scale_width + 10, scale_top - 1, "1", align="left")
    sheet.save(path)


def augmentation_sheet(
    path: str | Path,
    images: torch.Tensor,
    boxes: torch.Tensor | None = None,
    masks: torch.Tensor | None = None,
    columns: int = 8,
) -> None:
    """Pictures as the network is shown them, with their box (orange) and the outline of their mask (blue).

    images: (N, 3, H, W) in [0, 1]; boxes: (N, 4), x1 y1 x2 y2 as fractions of width and height; masks: (N, 1, h, w),
    outlined where they cross 0.5.
    """
    if len(images) == 0:
        return _empty_sheet(path, "no pictures to show")
    pictures = _to_pictures(images)
    width, height = _box_for(pictures, area=148 * 148)
    columns = min(columns, len(pictures))
    lines = math.ceil(len(pictures) / columns)
    legend = 0 if boxes is None and masks is None else 30
    sheet = _Sheet(
        max(2 * MARGIN + columns * (width + GAP) - GAP, 260),
        2 * MARGIN + lines * (height + GAP) - GAP + legend,
    )
    for number, picture in enumerate(pictures):
        left = MARGIN + number % columns * (width + GAP)
        top = MARGIN + number // columns * (height + GAP)
        sheet.picture(_fit(picture, width, height), left, top)
        inner = ImageOps.contain(picture, (width, height)).size  # what _fit leaves of the box for a very long picture
        x, y = left + (width - inner[0]) // 2, top + (height - inner[1]) // 2
        if masks is not None:
            _outline(sheet, masks[number, 0].numpy(), x, y, *inner)
        if boxes is not None:
            x1, y1, x2, y2 = boxes[number].tolist()
            corner = round(x + x1 * inner[0]), round(y + y1 * inner[1])
            place = (*corner, round((x2 - x1) * inner[0]), round((y2 - y1) * inner[1]))
            sheet.frame(*place, "black", line=3)
            sheet.frame(*place, PALETTE[4], line=2)
    words = ([("box", PALETTE[4])] if boxes is not None else []) + ([("mask", PALETTE[5])] if masks is not None else [])
    for number, (word, color) in enumerate(words):
        left, top = MARGIN + number * 90, sheet.size[1] - MARGIN - 8
        sheet.frame(left + 2, top, 20, 8, color, line=2)
        sheet.text(left + 32, top - 2, word, align="left")
    sheet.save(path)


def curves(path: str | Path, log: str | Path | Sequence[dict]) -> None:
    """Loss and its parts, learning rate, and retrieval metrics over epochs.

    log: log.csv of a run, or its rows as dicts: epoch, lr, loss, any parts of the loss, images_per_second, and mAP,
    mINP, rank1, rank5, rank10 as fractions. Blank fields are epochs at which a value was not measured.
    """
    if isinstance(log, (str, Path)):
        with open(log, newline="", encoding="utf-8") as file:
            log = list(csv.DictReader(file))
    if not log:
        return _empty_sheet(path, "no epoch finished yet")
    names = list(dict.fromkeys(name for row in log for name in row))
    values = {name: np.array([_number(row.get(name)) for row in log]) for name in names}
    epochs = values.pop("epoch")
    parts = [name for name in names if name not in {"epoch", "lr", "loss", "images_per_second", *METRICS}]

    figure = Figure(figsize=(15, 4.6), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12, wspace=0.04)
    loss_axes, rate_axes, metric_axes = figure.subplots(1, 3, width_ratios=(1.25, 0.75, 1.25))
    _lines(loss_axes, epochs, {name: values[name] for name in ["loss", *parts] if name in values}, "loss")
    _lines(rate_axes, epochs, {"lr": values["lr"]} if "lr" in values else {}, "learning rate")
    shown = {label: 100 * values[name] for name, label in METRICS.items() if name in values}
    _lines(metric_axes, epochs, shown, "retrieval (%)")
    metric_axes.set_ylim(-2, 102)
    rate_axes.set_ylim(bottom=0)
    rate_axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:.1e}".replace("e-0", "e-") if rate else "0")
    _save(figure, path)


def _save(figure: Figure, path: str | Path) -> None:
    FigureCanvasAgg(figure)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=DPI)


def _lines(axes, epochs: np.ndarray, lines: dict[str, np.ndarray], title: str) -> None:
    """One panel. Points that were measured are joined over epochs where they were not."""
    axes.set_title(title, loc="left", fontsize=12, weight="bold", color=INK)
    axes.set_xlabel("epoch", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    colors = iter(PALETTE * (len(lines) // len(PALETTE) + 1))
    first, last = epochs.min(), epochs.max()
    pad = 0.03 * (last - first) or 0.5
    axes.set_xlim(first - pad, last + pad)
    drawn = 0
    for name, line in lines.items():
        total = name == "loss"
        color = INK if total or name == "lr" else next(colors)
        there = np.isfinite(line)
        if there.any():
            marker = "o" if there.sum() <= 30 else None
            axes.plot(
                epochs[there],
                line[there],
                label=name.replace("_", " "),
                color=color,
                marker=marker,
                markersize=3.5,
                linewidth=2.2 if total else 1.6,
            )
            drawn += 1
    if drawn > 1:
        axes.legend(frameon=False, fontsize=9, ncols=2 if drawn > 4 else 1, loc="best")
    if not drawn:
        axes.text(0.5, 0.5, "not measured yet", transform=axes.transAxes, ha="center", va="center", color=FAINT)


def _number(field) -> float:
    return math.nan if field is None or field == "" else float(field)


def _empty_sheet(path: str | Path, text: str) -> None:
    sheet = _Sheet(360, 90)
    sheet.text(180, 38, text, size=11, color=FAINT)
    sheet.save(path)


def _box_for(pictures: list[Image.Image], area: int) -> tuple[int, int]:
    """Width and height of one box for all pictures: the middle one of their shapes, but no ribbon."""
    aspect = float(np.clip(np.median([picture.width / picture.height for picture in pictures]), 0.45, 2.0))
    return round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))


def _fit(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The whole picture, in its own shape, centred in a light grey box."""
    return ImageOps.pad(picture, (width, height), Image.Resampling.LANCZOS, color=(240, 240, 240))


def _shorten(name: str, width: int) -> str:
    """The name, cut to what fits under a picture of `width` pixels; its end tells more than its beginning."""
    fits = max(4, int(width / 6.2))
    return name if len(name) <= fits else "…" + name[1 - fits :]


def _to_pictures(images: torch.Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] -> PIL pictures."""
    pixels = (images.detach().cpu().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)  # (B, H, W, 3)
    return [Image.fromarray(picture) for picture in pixels.numpy()]


def _heat_maps(images: torch.Tensor, masks: torch.Tensor) -> list[Image.Image]:
    """Masks in colour over the pictures in grey, the more opaque the higher: (B, 3, H, W), (B, 1, h, w)."""
    images, masks = images.detach().cpu().float(), masks.detach().cpu().float().clamp(0, 1)
    masks = torch.nn.functional.interpolate(masks, images.shape[2:], mode="bilinear", align_corners=False)
    colors = torch.from_numpy(matplotlib.colormaps["inferno"](masks[:, 0].numpy())[..., :3]).float()  # (B, H, W, 3)
    opacity = 0.45 + 0.3 * masks
    grey = images.mean(1, keepdim=True)  # (B, 1, H, W)
    return _to_pictures(grey * (1 - opacity) + colors.permute(0, 3, 1, 2) * opacity)


def _outline(sheet: _Sheet, mask: np.ndarray, left: int, top: int, width: int, height: int) -> None:
    """Where a mask (h, w) crosses 0.5, over its picture; closed at the edge by a border of zeros."""
    mask = np.pad(np.asarray(mask, np.float32), 1)
    if mask.max() <= 0.5:
        return
    rows, columns = mask.shape[0] - 2, mask.shape[1] - 2
    x = left + (np.arange(-1, columns + 1) + 0.5).clip(0, columns) / columns * width
    y = top + (np.arange(-1, rows + 1) + 0.5).clip(0, rows) / rows * height
    sheet.axes.contour(x, y, mask, levels=[0.5], colors=["black"], linewidths=2.2)
    sheet.axes.contour(x, y, mask, levels=[0.5], colors=[PALETTE[5]], linewidths=1.4)
