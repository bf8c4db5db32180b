"""How training goes, as curves over epochs."""

import csv
import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from core.visualize.sheet import DPI, FAINT, INK, PALETTE, empty_sheet, save_figure


def curves(path: str | Path, log: str | Path | Sequence[dict], metrics: dict[str, str | None]) -> None:
    """Loss and its parts, learning rate, and the metrics of the evaluation over epochs.

    log: log.csv of a run, or its rows as dicts: epoch, lr, loss, any parts of the loss (drawn as `sum_branches` adds
    them up), images_per_second, and metrics as fractions. Blank fields are epochs at which a value was not measured.
    metrics: columns of the evaluation, each with what people call it; None: not drawn.
    """
    if isinstance(log, (str, Path)):
        with open(log, newline="", encoding="utf-8") as file:
            log = list(csv.DictReader(file))
    if not log:
        return empty_sheet(path, "no epoch finished yet")
    names = list(dict.fromkeys(name for row in log for name in row))
    values = sum_branches({name: np.array([_number(row.get(name)) for row in log]) for name in names})
    epochs = values.pop("epoch")
    others = {"epoch", "lr", "loss", "images_per_second", *metrics}
    parts = [name for name in values if name not in others]

    panels = 3 if metrics else 2
    figure = Figure(figsize=(5 * panels, 4.6), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12, wspace=0.04)
    loss_axes, rate_axes, *metric_axes = figure.subplots(1, panels, width_ratios=(1.25, 0.75, 1.25)[:panels])
    _lines(loss_axes, epochs, {name: values[name] for name in ["loss", *parts] if name in values}, "loss")
    _lines(rate_axes, epochs, {"lr": values["lr"]} if "lr" in values else {}, "learning rate")
    shown = {label: 100 * values[name] for name, label in metrics.items() if label and name in values}
    for axes in metric_axes:
        _lines(axes, epochs, shown, "evaluation (%)")
        axes.set_ylim(-2, 102)
    rate_axes.set_ylim(bottom=0)
    rate_axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:.1e}".replace("e-0", "e-") if rate else "0")
    save_figure(figure, path)


def sum_branches(values: dict) -> dict:
    """{"triplet/global": 1, "triplet/part": 2, "lr": 3} -> {"triplet": 3, "lr": 3}, of numbers or arrays."""
    sums: dict = {}
    for name, value in values.items():
        name = name.split("/")[0]
        sums[name] = sums[name] + value if name in sums else value
    return sums


def _lines(axes, epochs: np.ndarray, lines: dict[str, np.ndarray], title: str) -> None:
    """One panel. Points that were measured are joined over epochs where they were not."""
    axes.set_title(title, loc="left", fontsize=12, weight="bold", color=INK)
    axes.set_xlabel("epoch", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    colors, used = cycle(PALETTE), {}
    first, last = epochs.min(), epochs.max()
    pad = 0.03 * (last - first) or 0.5
    axes.set_xlim(first - pad, last + pad)
    drawn = 0
    for name, line in lines.items():
        total = name == "loss"
        boxes = name.startswith("box ")  # boxes are dashed, in the colour that the same number of masks has
        color = INK if total or name == "lr" else used.get(name.replace("box ", "mask ")) or next(colors)
        used[name] = color
        there = np.isfinite(line)
        if there.any():
            marker = "o" if there.sum() <= 30 else None
            axes.plot(
                epochs[there],
                line[there],
                label=name.removeprefix("loss_").replace("_", " "),
                color=color,
                linestyle="--" if boxes else "-",
                markerfacecolor="white" if boxes else color,
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
