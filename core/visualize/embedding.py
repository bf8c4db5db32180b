"""Where a network puts its pictures, as points on a plane."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from core.visualize.sheet import DPI, INK, MARKERS, PALETTE, empty_sheet, plain, save_figure, shorten

OTHERS = "#c4c4c4"
IN_A_COLUMN = 24  # lines of the legend


def embedding_plot(
    path: str | Path,
    coordinates,
    identities: Sequence[str],
    explained: Sequence[float],
    is_query: Sequence[bool] | None = None,
    title: str = "",
) -> None:
    """Points on a plane, each identity in a colour and a shape of its own; both axes have one scale.

    There are 42 pairs of these: of more identities, those of at least two points are chosen, spread evenly over all of
    them in the order of their names, and the others are faint grey dots.

    Args:
        coordinates: (N, 2).
        identities: (N,), as the data call them.
        explained: (2,), the share of the total variance along each axis, in [0, 1].
        is_query: (N,); queries are larger and have a dark edge. None: all are drawn alike.
    """
    coordinates = np.asarray(coordinates, float)[:, :2]
    if not len(coordinates):
        return empty_sheet(path, "no pictures to show")
    identities = np.asarray([str(identity) for identity in identities])
    is_query = np.zeros(len(identities), bool) if is_query is None else np.asarray(is_query, bool)
    chosen = _chosen(identities, len(PALETTE) * len(MARKERS))
    figure = Figure(figsize=(9.6, 6.8), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    axes = figure.subplots()
    axes.set_title(plain(title), loc="left", fontsize=12, weight="bold", color=INK)
    for axis, name, share in ((axes.xaxis, "first", explained[0]), (axes.yaxis, "second", explained[1])):
        axis.set_label_text(f"{name} component, {100 * share:.1f} % of the variance", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#eeeeee")
    axes.set_axisbelow(True)
    axes.set_aspect("equal", adjustable="datalim")
    faint = ~np.isin(identities, chosen)
    axes.scatter(*coordinates[faint].T, s=9, c=OTHERS, alpha=0.6, linewidths=0)
    for number, identity in enumerate(chosen):
        style = {"c": PALETTE[number % len(PALETTE)], "marker": MARKERS[number % len(MARKERS)]}
        for query, more in ((False, _GALLERY), (True, _QUERY)):
            own = coordinates[(identities == identity) & (is_query == query)]
            axes.scatter(*own.T, **style, **more, zorder=3 + query)
    _legend(figure, chosen, is_query, int(faint.sum()))
    save_figure(figure, path)


_GALLERY = {"s": 30, "edgecolors": "#00000055", "linewidths": 0.4}
_QUERY = {"s": 64, "edgecolors": "black", "linewidths": 1.4}


def _chosen(identities: np.ndarray, most: int) -> list[str]:
    """Identities of two points or more, at most so many, spread evenly; all of one point where there are no others."""
    names, counts = np.unique(identities, return_counts=True)
    names = names[counts > 1] if (counts > 1).any() else names
    places = np.linspace(0, len(names) - 1, min(most, len(names))).round().astype(int)
    return names[places].tolist()


def _legend(figure: Figure, chosen: list[str], is_query: np.ndarray, others: int) -> None:
    """Beside the plot: what the marks mean, then whose they are."""
    marks = []
    if is_query.any():
        marks.append(("query", "o", "white", 8, "black", 1.4))
        marks.append(("gallery", "o", "white", 5.5, "#00000055", 0.8))
    for number, identity in enumerate(chosen):
        color = PALETTE[number % len(PALETTE)]
        marks.append((shorten(identity, 110, 8), MARKERS[number % len(MARKERS)], color, 5.5, "#00000055", 0.4))
    if others:
        marks.append((f"others: {others:,}", "o", OTHERS, 3, OTHERS, 0))
    handles = [
        Line2D([], [], linestyle="", marker=m, color=c, markersize=s, markeredgecolor=e, markeredgewidth=w)
        for _, m, c, s, e, w in marks
    ]
    names = [plain(name) for name, *_ in marks]
    columns = math.ceil(len(names) / IN_A_COLUMN)
    figure.legend(handles, names, loc="outside right upper", ncols=columns, frameon=False, fontsize=9, columnspacing=1)
