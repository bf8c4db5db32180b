"""What a data set is made of, as figures: bars, histograms, scatter plots, and sheets of its pictures.

A group has its hatch, its marker or its own panel besides its colour, so that colour alone says nothing. Values that
are not finite are left out, and the figure says how many.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from core.data.images import read_stored_image, turn_box
from core.errors import InputError
from core.visualize.sheet import (
    DPI,
    FAINT,
    GAP,
    INK,
    MARGIN,
    MARKERS,
    PALETTE,
    Sheet,
    empty_sheet,
    fit,
    plain,
    save_figure,
    shorten,
)

HATCHES = ("", "///", "...", "xx", "\\\\\\", "++", "oo")
MOST_POINTS = 20_000  # of a series on a scatter plot: more take minutes and show nothing more
MOST_ROWS = 80  # of pictures on a sheet: matplotlib draws no more than 65,535 pixels
CELL = 112  # pixels, the side of a picture on a sheet
WIDEST = 9.0  # inches, a figure of bars that stand: more of them lie
LETTER = 0.085  # inches, about the width of one
NARROWEST = 640  # pixels, a sheet: most headings fit
CARD = (224, 224, 224)  # where a picture can't be read


def bar_figure(path: str | Path, title: str, groups: dict[str, dict[str, float | None]], label: str) -> None:
    """Bars side by side: one group for each key, one bar for each key of its dict, the number at its end.

    Bars stand where names and groups have room beside each other, and lie under each other where they are many or long.

    groups: e.g. {"train": {"pictures": 400, "identities": 100}, "gallery": {...}}. A number that is missing or None is
    an en dash, which is not 0.
    """
    if not any(groups.values()):
        return empty_sheet(path, f"{title}: nothing to show")
    series = list(dict.fromkeys(name for group in groups.values() for name in group))
    step = 0.54 * len(series) + 0.3  # inches for each group of standing bars
    longest = max(len(name) for name in groups)
    lie = longest * LETTER > step or len(groups) > 1 and len(groups) * step > WIDEST
    size = (
        (WIDEST, 1.4 + (0.2 * len(series) + 0.16) * len(groups)) if lie else (max(5.2, 1.2 + step * len(groups)), 4.2)
    )
    figure, (axes,) = _figure(*size, title)
    bar, names, values = (axes.barh, axes.yaxis, axes.xaxis) if lie else (axes.bar, axes.xaxis, axes.yaxis)
    width = 0.8 / len(series)
    for number, name in enumerate(series):
        numbers = np.array([_number(group.get(name)) for group in groups.values()])
        places = np.arange(len(groups)) + (number - (len(series) - 1) / 2) * width
        color, hatch = PALETTE[number % len(PALETTE)], HATCHES[(number + number // len(PALETTE)) % len(HATCHES)]
        style = {"color": color, "hatch": hatch, "edgecolor": "white", "linewidth": 0.8}
        bars = bar(places, np.nan_to_num(numbers, posinf=0, neginf=0), width * 0.92, label=plain(name), **style)
        axes.bar_label(bars, [_short(value) for value in numbers], padding=2 + lie, fontsize=8.5, color=INK)
    names.set_ticks(range(len(groups)), [plain(shorten(name, 320 if lie else 190, 9)) for name in groups])
    ends = (-0.6, len(groups) - 0.4)
    axes.margins(**{"x" if lie else "y": 0.12})
    low, high = axes.dataLim.intervalx if lie else axes.dataLim.intervaly
    room = (None if low < 0 else 0, None if high > 0 else 1)
    axes.set(xlim=room, ylim=ends[::-1]) if lie else axes.set(xlim=ends, ylim=room)  # the first lies on top
    axes.grid(False)
    values.grid(color="#e6e6e6")
    values.set_major_formatter(lambda value, _: _short(value))
    values.set_label_text(label, color=INK)
    if any(series) and series != [label]:
        figure.legend(loc="outside lower center", ncols=min(len(series), 5), frameon=False, fontsize=9)
    save_figure(figure, path)


def histogram_figure(
    path: str | Path,
    title: str,
    series: dict[str, Sequence[float]],
    xlabel: str,
    bins: int | Sequence[float] | None = None,
) -> None:
    """How often each value occurs: one panel for each series, under each other, over the same bins.

    bins: a number or the edges; None: one for each whole number where all values are whole and near each other, 30
    otherwise. Edges that leave values out say how many.
    """
    values = {name: np.array([_number(value) for value in some], float) for name, some in series.items()}
    everything = np.concatenate([np.zeros(0), *values.values()])
    everything = everything[np.isfinite(everything)]
    if not len(everything):
        return empty_sheet(path, f"{title}: nothing to show")
    edges = _edges(everything, bins)
    figure, panels = _figure(7.2, 1.1 + 1.7 * len(values), title, len(values))
    for number, (axes, (name, some)) in enumerate(zip(panels, values.items(), strict=True)):
        shown = some[(some >= edges[0]) & (some <= edges[-1])]
        axes.hist(shown, edges, color=PALETTE[number % len(PALETTE)], edgecolor="white", linewidth=0.6)
        text = f"{len(some):,}"
        if len(shown):
            text += f", median {_short(np.median(shown))}, from {_short(shown.min())} to {_short(shown.max())}"
        if len(shown) < len(some):
            text += f"; {len(some) - len(shown):,} not shown"
        axes.text(0, 1.04, f"{plain(name)}: {text}", transform=axes.transAxes, fontsize=9.5, color=INK)
        axes.set_ylim(0, None if len(shown) else 1)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        if edges[0] % 1 == 0.5:  # the bins are whole numbers, so no tick lies between them
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(lambda value, _: _short(value))
        axes.set_ylabel("count", color=INK)
    panels[-1].set_xlabel(xlabel, color=INK)
    save_figure(figure, path)


def scatter_figure(
    path: str | Path, title: str, series: dict[str, Sequence[tuple[float, float]]], xlabel: str, ylabel: str
) -> None:
    """Points (x, y), a colour and a marker for each series; of more than 20,000 in one, so many evenly spread ones."""
    points = {name: np.array(some, float).reshape(-1, 2) for name, some in series.items()}
    points = {name: some[np.isfinite(some).all(1)] for name, some in points.items()}
    if not any(map(len, points.values())):
        return empty_sheet(path, f"{title}: nothing to show")
    figure, (axes,) = _figure(7.2, 5.2, title)
    most = max(map(len, points.values()))
    opacity = 0.75 if most < 300 else 0.35 if most < 5000 else 0.15
    for number, (name, some) in enumerate(points.items()):
        text = f"{plain(name)}: {len(some):,}"
        if len(some) > MOST_POINTS:
            some = some[np.linspace(0, len(some) - 1, MOST_POINTS).round().astype(int)]
            text += f", {MOST_POINTS:,} of them shown"
        marker, color = MARKERS[number % len(MARKERS)], PALETTE[number % len(PALETTE)]
        axes.scatter(*some.T, s=26, c=color, marker=marker, alpha=opacity, linewidths=0, label=text)
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.grid(axis="x", color="#e6e6e6")
    legend = axes.legend(loc="best", frameon=True, edgecolor="none", fontsize=9)
    for handle in legend.legend_handles:
        handle.set_alpha(1)
    save_figure(figure, path)


class Row(NamedTuple):
    """A row of a contact sheet under its heading, whose name is shortened where it is long, and the rest of it is not.

    pictures: (path, caption, box) each: (x1, y1, x2, y2) in pixels of the stored picture, framed in orange, or None.
    """

    name: str
    rest: str
    pictures: Sequence[tuple[str | Path, str, tuple[float, float, float, float] | None]]


def contact_sheet(path: str | Path, title: str, rows: Sequence[Row], bits: int = 16) -> None:
    """Rows of pictures beside each other, as wide as the longest; rows beyond 80 are left out, and counted.

    A picture that is missing or can't be read is a grey card that says so. bits: see `core.data.images.read_image`.
    """
    if not rows:
        return empty_sheet(path, f"{title}: no pictures to show")
    shown = rows[:MOST_ROWS]
    left_out = len(rows) - len(shown)
    heading, line = 26, CELL + 24
    width = 2 * MARGIN + max(len(row.pictures) for row in shown) * (CELL + GAP) - GAP
    height = 2 * MARGIN + 30 + len(shown) * (heading + line + GAP) + 26 * bool(left_out) - GAP
    sheet = Sheet(max(width, NARROWEST), height)
    room = sheet.size[0] - 2 * MARGIN
    sheet.text(MARGIN, MARGIN - 10, title, 13, align="left", weight="bold", room=room)
    top = MARGIN + 30
    for row in shown:
        name = shorten(row.name, room, 10.5, row.rest)
        sheet.text(MARGIN, top, name, 10.5, align="left", weight="bold", room=room)
        for place, picture in enumerate(row.pictures):
            _cell(sheet, MARGIN + place * (CELL + GAP), top + heading, *picture, bits)
        top += heading + line + GAP
    if left_out:
        sheet.text(MARGIN, top - 6, f"{left_out:,} more rows are not shown", 9.5, FAINT, align="left")
    sheet.save(path)


def _cell(sheet: Sheet, left: int, top: int, path: str | Path, caption: str, box, bits: int) -> None:
    try:
        picture, turn = read_stored_image(path, bits)
    except InputError:  # this is the report that shows it, not the run that stumbles over it
        sheet.picture(Image.new("RGB", (CELL, CELL), CARD), left, top)
        sheet.text(left + CELL / 2, top + CELL / 2 - 7, "not readable" if os.path.exists(path) else "missing", 9, FAINT)
    else:
        box = box if box is None or turn is None else turn_box(box, turn, *picture.size)
        picture = picture if turn is None else picture.transpose(turn)
        sheet.picture(fit(picture, CELL, CELL), left, top)
        if box is not None:
            scale = CELL / max(picture.size)
            x, y = left + (CELL - picture.width * scale) / 2, top + (CELL - picture.height * scale) / 2
            x1, x2 = (min(max(x + value * scale, left), left + CELL) for value in box[0::2])
            y1, y2 = (min(max(y + value * scale, top), top + CELL) for value in box[1::2])
            sheet.frame(x1, y1, x2 - x1, y2 - y1, "black", line=3)
            sheet.frame(x1, y1, x2 - x1, y2 - y1, PALETTE[4], line=2)
    sheet.text(left + CELL / 2, top + CELL + 5, caption, 8, FAINT, room=CELL + GAP / 2)


def _figure(width: float, height: float, title: str, panels: int = 1):
    """A figure of width x height inches and its axes, under each other."""
    figure = Figure(figsize=(width, min(height, 60)), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    figure.suptitle(plain(title), fontsize=12, weight="bold", color=INK, x=0.02, ha="left")
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(axis="y", color="#e6e6e6")
        one.set_axisbelow(True)
    return figure, axes


def _edges(values: np.ndarray, bins) -> np.ndarray:
    """Edges of the bins for finite values; the middle of a bin is a whole number where that is what is counted."""
    low, high = values.min(), values.max()
    if bins is None and (values == values.round()).all() and high - low <= 60:
        return np.arange(low - 0.5, high + 1)
    return np.histogram_bin_edges(values, 30 if bins is None else bins)


def _number(value) -> float:
    return np.nan if value is None else float(value)


def _short(value: float) -> str:
    """A number for people: 12,345; 0.257; a dash for one that is missing."""
    if not np.isfinite(value):
        return "–"
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 1000 else f"{value:.3g}"
