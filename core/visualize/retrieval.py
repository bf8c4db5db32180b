"""Sheets of a ReID run: whom the network finds, where it sees the object, what it is shown."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageOps

from core.data.images import read_image
from core.visualize.sheet import (
    FAINT,
    GAP,
    INK,
    MARGIN,
    PALETTE,
    RIGHT,
    WRONG,
    Sheet,
    box_for,
    empty_sheet,
    fit,
    to_pictures,
)


class RankRow(NamedTuple):
    """One query and its matches, best first. bits: of 16 those in use, see `core.data.images.read_image`."""

    query_path: str
    query_name: str
    match_paths: list[str]
    match_names: list[str]
    distances: list[float]
    correct: list[bool]  # whether each match is of the query's identity
    bits: int = 16


def rank_list_sheet(path: str | Path, rows: Sequence[RankRow], num_matches: int = 10) -> None:
    """One line per query: the query, then its first matches.

    A solid green frame and a tick stand for the same identity, a dashed red frame and a cross for another one; under
    each match its distance to the query and its name. Pictures that can't be read raise InputError.
    """
    if not rows:
        return empty_sheet(path, "no queries to show")
    rows = [row._replace(match_paths=row.match_paths[:num_matches]) for row in rows]
    queries = [read_image(row.query_path, row.bits) for row in rows]
    matches = [[read_image(match, row.bits) for match in row.match_paths] for row in rows]
    width, height = box_for(queries + [picture for row in matches for picture in row], area=124 * 124)
    columns = max(1, max(len(row) for row in matches))
    first = MARGIN + width + 2 * GAP + 10  # left edge of the first match: the query stands apart
    header, line_height = 26, height + 44
    sheet = Sheet(
        max(first + columns * (width + GAP) - GAP, first + 240) + MARGIN,
        2 * MARGIN + header + len(rows) * (line_height + GAP) - GAP,
        "Queries and their nearest pictures",
    )

    sheet.text(MARGIN + width / 2, MARGIN - 6, "query", size=10, weight="bold")
    for column in range(columns):
        sheet.text(first + column * (width + GAP) + width / 2, MARGIN - 6, str(column + 1), size=10, color=FAINT)
    for number, (row, query) in enumerate(zip(rows, queries, strict=True)):
        top = MARGIN + header + number * (line_height + GAP)
        sheet.picture(fit(query, width, height), MARGIN, top)
        sheet.frame(MARGIN, top, width, height, INK, line=2)
        sheet.text(MARGIN + width / 2, top + height + 9, row.query_name, weight="bold", room=width)
        if not matches[number]:
            sheet.text(
                first, top + height / 2 - 6, "no picture in the gallery to compare with", align="left", color=FAINT
            )
        for column, picture in enumerate(matches[number]):
            left = first + column * (width + GAP)
            right = row.correct[column]
            color = RIGHT if right else WRONG
            sheet.picture(fit(picture, width, height), left, top)
            sheet.frame(left, top, width, height, color, line=4, style="solid" if right else (0, (3.5, 1.0)))
            distance = f"{'✓' if right else '✗'} {row.distances[column]:.3f}"
            sheet.text(left + width / 2, top + height + 9, distance, color=color, weight="bold")
            sheet.text(left + width / 2, top + height + 25, row.match_names[column], 8, FAINT, room=width)
    sheet.save(path)


def cluster_sheet(path: str | Path, rows: Sequence[tuple[str, Sequence[tuple[str, int]]]]) -> None:
    """A line of pictures for each cluster. rows: what stands before the line, and (path, bits in use) of pictures."""
    if not rows:
        return empty_sheet(path, "no clusters to show")
    lines = [[read_image(picture, bits) for picture, bits in pictures] for _, pictures in rows]
    width, height = box_for([picture for line in lines for picture in line], area=104 * 104)
    first, columns = MARGIN + 96, max(map(len, lines))
    sheet = Sheet(
        first + columns * (width + GAP) - GAP + MARGIN, 2 * MARGIN + len(rows) * (height + GAP) - GAP, "Clusters"
    )
    for number, ((title, _), line) in enumerate(zip(rows, lines, strict=True)):
        top = MARGIN + number * (height + GAP)
        sheet.text(first - GAP, top + height / 2 - 6, title, align="right")
        for column, picture in enumerate(line):
            sheet.picture(fit(picture, width, height), first + column * (width + GAP), top)
    sheet.save(path)


def mask_sheet(
    path: str | Path, images: torch.Tensor, masks: torch.Tensor, targets: torch.Tensor | None = None
) -> None:
    """Each picture beside its predicted mask, laid over it as a heat map, and beside the target if there is one.

    images: (B, 3, H, W) in [0, 1]; masks, targets: (B, 1, h, w) in [0, 1], of any size. Under each mask its highest
    value.
    """
    layers = {"predicted mask": masks} if targets is None else {"predicted mask": masks, "target": targets}
    peaks = [f"highest {peak:.2f}" for peak in masks.flatten(1).amax(1).tolist()] if len(masks) else []
    heat_sheet(path, images, layers, {"predicted mask": peaks}, "Where the network sees the object")


def heat_sheet(
    path: str | Path,
    images: torch.Tensor,
    layers: dict[str, torch.Tensor],
    captions: dict[str, Sequence[str]] | None = None,
    title: str = "Where the network looks",
) -> None:
    """Each picture beside its heat maps, laid over it in grey.

    The colours are those of an absolute scale from 0 to 1, so that an unsure mask looks unsure.

    Args:
        images: (B, 3, H, W) in [0, 1].
        layers: heading -> (B, 1, h, w) in [0, 1], of any size.
        captions: "picture" or a heading of `layers` -> a line under each of them.
    """
    if len(images) == 0:
        return empty_sheet(path, "no pictures to show")
    pictures = to_pictures(images)
    columns = {"picture": pictures, **{name: _heat_maps(images, maps) for name, maps in layers.items()}}
    sheet = column_sheet(columns, captions, footer=44, title=title)
    _draw_scale(sheet)
    sheet.save(path)


def column_sheet(
    columns: dict[str, list[Image.Image]],
    captions: dict[str, Sequence[str]] | None = None,
    footer: int = 0,
    title: str = "",
) -> Sheet:
    """Rows of pictures under headings; short rows stand beside each other.

    Args:
        columns: heading -> N pictures, at least one.
        captions: heading -> a line under each of its pictures.
        footer: pixels that stay free at the lower edge.
    """
    pictures = next(iter(columns.values()))
    width, height = box_for(pictures, area=176 * 176)
    group_width = len(columns) * (width + GAP // 2) - GAP // 2
    groups = min(len(pictures), max(1, 9 // len(columns)))
    lines = math.ceil(len(pictures) / groups)
    header, caption = 22, 22 if captions else 0
    sheet_width = 2 * MARGIN + groups * (group_width + 2 * GAP) - 2 * GAP
    sheet = Sheet(sheet_width, 2 * MARGIN + header + lines * (height + caption + GAP) - GAP + footer, title)

    for number in range(len(pictures)):
        group_left = MARGIN + number % groups * (group_width + 2 * GAP)
        top = MARGIN + header + number // groups * (height + caption + GAP)
        for column, (name, layer) in enumerate(columns.items()):
            left = group_left + column * (width + GAP // 2)
            sheet.picture(fit(layer[number], width, height), left, top)
            if number < groups:
                sheet.text(left + width / 2, MARGIN - 4, name, size=9.5, weight="bold")
            if captions and name in captions:
                sheet.text(left + width / 2, top + height + 6, captions[name][number], color=FAINT, room=width)
    return sheet


def _draw_scale(sheet: Sheet) -> None:
    """The colours from 0 to 1, at the lower edge."""
    top, width = sheet.size[1] - MARGIN - 14, min(240, sheet.size[0] - 2 * MARGIN - 60)
    left = (sheet.size[0] - width) // 2
    ramp = torch.linspace(0, 1, width).expand(1, 1, 14, -1)
    sheet.picture(_heat_maps(torch.full((1, 3, 14, width), 0.5), ramp)[0], left, top)
    sheet.text(left - 10, top - 1, "0", align="right")
    sheet.text(left + width + 10, top - 1, "1", align="left")


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
        return empty_sheet(path, "no pictures to show")
    pictures = to_pictures(images)
    width, height = box_for(pictures, area=148 * 148)
    columns = min(columns, len(pictures))
    lines = math.ceil(len(pictures) / columns)
    sheet = Sheet(
        2 * MARGIN + columns * (width + GAP) - GAP,
        2 * MARGIN + lines * (height + GAP) - GAP + 30,
        "What the network is shown in training",
    )
    for number, picture in enumerate(pictures):
        left = MARGIN + number % columns * (width + GAP)
        top = MARGIN + number // columns * (height + GAP)
        sheet.picture(fit(picture, width, height), left, top)
        inner = ImageOps.contain(picture, (width, height)).size  # what fit leaves of the box for a very long picture
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
    if not words:
        sheet.text(MARGIN, sheet.size[1] - MARGIN - 10, "no box and no mask in the data", color=FAINT, align="left")
    for number, (word, color) in enumerate(words):
        left, top = MARGIN + number * 90, sheet.size[1] - MARGIN - 8
        sheet.frame(left + 2, top, 20, 8, color, line=2)
        sheet.text(left + 32, top - 2, word, align="left")
    sheet.save(path)


def _heat_maps(images: torch.Tensor, masks: torch.Tensor) -> list[Image.Image]:
    """Masks in colour over the pictures in grey, the more opaque the higher: (B, 3, H, W), (B, 1, h, w)."""
    images, masks = images.detach().cpu().float(), masks.detach().cpu().float().clamp(0, 1)
    masks = torch.nn.functional.interpolate(masks, images.shape[2:], mode="bilinear", align_corners=False)
    colors = torch.from_numpy(matplotlib.colormaps["inferno"](masks[:, 0].numpy())[..., :3]).float()  # (B, H, W, 3)
    opacity = 0.45 + 0.3 * masks
    grey = images.mean(1, keepdim=True)  # (B, 1, H, W)
    return to_pictures(grey * (1 - opacity) + colors.permute(0, 3, 1, 2) * opacity)


def _outline(sheet: Sheet, mask: np.ndarray, left: int, top: int, width: int, height: int) -> None:
    """Where a mask (h, w) crosses 0.5, over its picture; closed at the edge by a border of zeros."""
    mask = np.pad(np.asarray(mask, np.float32), 1)
    if mask.max() <= 0.5:
        return
    rows, columns = mask.shape[0] - 2, mask.shape[1] - 2
    x = left + (np.arange(-1, columns + 1) + 0.5).clip(0, columns) / columns * width
    y = top + (np.arange(-1, rows + 1) + 0.5).clip(0, rows) / rows * height
    sheet.axes.contour(x, y, mask, levels=[0.5], colors=["black"], linewidths=2.2)
    sheet.axes.contour(x, y, mask, levels=[0.5], colors=[PALETTE[5]], linewidths=1.4)
