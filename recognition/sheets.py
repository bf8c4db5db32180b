"""Who is in a scene, and whether two pictures show one object: what `demo.py` draws.

Colours repeat after seven objects, so each has its number, in the scene and beside its matches. The scene is shrunk
before anything is drawn on it, and one mask at a time is unpacked: a scene of 6000 x 4000 needs little beside itself.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Rectangle
from PIL import Image, ImageColor, ImageDraw

from core.visualize.drawing import ink_on, outline_of, unpack_mask
from core.visualize.sheet import DPI, FAINT, GAP, INK, MARGIN, PALETTE, RIGHT, WRONG, Sheet, fit, shorten

MOST_ROWS, MOST_MATCHES = 300, 10  # on one sheet
MANY = 40  # instances; with more of them the pictures in their rows are smaller
SCREEN = 1.6  # width by height
NARROWEST = 640  # pixels, a sheet without its margins: its captions fit
BETWEEN = 16  # pixels between the matches of a row
DISC = 12  # radius in pixels of the disc that a number stands in
LINE = 1.4  # half the width of an outline in pixels
LETTERS, LARGE = 12, 14  # points: on a web page a sheet is shown at half its size


def identification_sheet(
    path: str | Path,
    scene: Image.Image,
    instances: Sequence[dict],
    cutouts: Sequence[Image.Image],
    matches: Sequence[Sequence[dict]],
    threshold: float | None = None,
    title: str = "",
    caption: str = "",
) -> None:
    """A scene with its objects outlined and numbered, and for each number its cut-out and its best matches.

    The match that is accepted has a frame and a tick. In each row a bar stands where the threshold lies: matches beyond
    it are faint. Only the first `MOST_ROWS` objects have a row, and a row only the nearest `MOST_MATCHES`, which the
    sheet says; all objects have their outline and number.

    Args:
        path: PNG or JPEG by its suffix.
        instances: as in `core.visualize.instances`, in the order of their numbers 1, 2, ...
        cutouts: a picture of each instance.
        matches: of each instance, nearest first, dicts of identity (str), distance, thumbnail (PIL picture or None) and
            accepted (bool). The identity of the first that is accepted is the answer, and without one it is "unknown".
        threshold: distance up to which two are the same; None where there is none, then no match is beyond it.
    """
    rows = list(zip(instances, cutouts, matches, strict=True))[:MOST_ROWS]
    most = max((len(found) for *_, found in rows), default=0)
    plan = _plan(scene.size, len(rows), most)
    captions = [line for line in (caption, _explain(threshold) if most else "") if line]
    top = MARGIN + (26 if title else 0) + 22 * len(captions) + (6 if title or captions else 0)
    notes = [] if instances else ["nothing found"]
    if len(instances) > len(rows):
        notes.append(f"{len(instances) - len(rows)} more have a number in the scene and no row here")
    if most > MOST_MATCHES:
        notes.append(f"the nearest {MOST_MATCHES} of {most} matches are shown")
    note = "; ".join(notes)
    sheet = Sheet(plan.width + 2 * MARGIN, top + plan.height + (30 if note else 0) + MARGIN)
    sheet.text(MARGIN, MARGIN - 8, title, LARGE, align="left", weight="bold", room=plan.width)
    for number, line in enumerate(captions):
        below = top - 12 - 22 * (len(captions) - number)
        sheet.text(MARGIN, below, line, LETTERS if plan.width > 1250 else 9.5, FAINT, align="left", room=plan.width)
    _draw_scene(sheet, scene, instances, MARGIN, top, plan.scene)
    for number, (row, (left, below)) in enumerate(zip(rows, plan.places, strict=True)):
        _draw_row(sheet, number, *row, threshold, MARGIN + left, top + below, plan)
    if note:
        sheet.text(MARGIN, top + plan.height + 14, note, 11, FAINT, align="left")
    sheet.save(path)


def comparison_sheet(
    path: str | Path,
    pictures: Sequence[Image.Image],
    names: Sequence[str],
    cutouts: Sequence[Image.Image | None],
    distance: float,
    threshold: float | None,
    verdict: str,
    caption: str = "",
) -> None:
    """Two pictures side by side, the verdict over them and a line from 0 on which distance and threshold lie.

    Args:
        path: PNG or JPEG by its suffix.
        pictures, names: two of each.
        cutouts: what was compared, two pictures; None for one that was compared as a whole.
        distance: of the two; at most `threshold` means the same object. threshold: None where the network carries none,
            negative where nothing is the same.
        verdict: in words, such as "yes, the same object".
        caption: fainter, under the verdict; broken into two lines at its first "; ".
    """
    aspect = float(np.median([picture.width / picture.height for picture in pictures]))
    lines = caption.split("; ", 1)
    width, small, head = 440, 150, 36 + 16 * len(lines)
    height = round(min(max(width / aspect, 220), 560))
    cuts = 22 + small if any(cutouts) else 0
    sheet = Sheet(2 * MARGIN + 2 * width + GAP, MARGIN + head + height + 26 + cuts + 118)
    color, sign = INK, ""
    if threshold is not None:
        color, sign = (RIGHT, "✓ ") if distance <= threshold else (WRONG, "✗ ")
    room = sheet.size[0] - 2 * MARGIN
    sheet.text(MARGIN, MARGIN - 10, sign + verdict, 15, color, align="left", weight="bold", room=room)
    for number, line in enumerate(lines):
        sheet.text(MARGIN, MARGIN + 18 + 16 * number, line, 9.5, FAINT, align="left", room=room)
    for side in (0, 1):
        left, top = MARGIN + side * (width + GAP), MARGIN + head
        sheet.picture(fit(pictures[side], width, height), left, top)
        sheet.text(left, top + height + 7, names[side], 10, align="left", weight="bold", room=width)
        if cuts:
            top += height + 30
            whole = cutouts[side] is None
            sheet.picture(fit(pictures[side] if whole else cutouts[side], small, small), left, top)
            words = "the whole picture" if whole else "cut out of it"
            sheet.text(left + small + 12, top, "compared:", 9.5, FAINT, align="left")
            sheet.text(left + small + 12, top + 16, words, 9.5, FAINT, align="left")
    _draw_scale(sheet, distance, threshold, color, MARGIN, sheet.size[1] - 64, room)
    sheet.save(path)


class _Plan(NamedTuple):
    """Where the parts of an identification sheet lie, in pixels without the margin and the title."""

    width: int
    height: int
    scene: tuple[int, int]  # its width and height; it lies at the top left
    places: list[tuple[int, int]]  # left and top of each row
    row: tuple[int, int]  # width and height of a row
    tile: int  # side of the pictures in a row


def _plan(size: tuple[int, int], count: int, matches: int) -> _Plan:
    """The scene with rows beside it and, as text flows around a picture, below it: the smallest sheet, but no ribbon.

    The scene is tried as wide as some columns of rows and as high as some of them, so that their edges meet.
    """
    tile = 96 if count <= MANY else 64
    row = max(tile + 24 + min(matches, MOST_MATCHES) * (tile + BETWEEN) - BETWEEN, 300), tile + 72
    longest = min(max(4 * max(size), 640), 3600)  # pixels; enlarged further, a scene is a blur
    shortest = min(900, 0.75 * longest)
    scales = [wide / size[0] for wide in range(row[0], 3600, row[0] + 2 * GAP)]
    scales += [high / size[1] for high in range(row[1], 3600, row[1] + GAP)]
    scales = np.clip(scales, shortest / max(size), longest / max(size))
    scenes = [tuple(max(8, round(scale * side)) for side in size) for scale in np.unique(scales)]
    return min((_flow(scene, row, tile, count, beside) for scene in scenes for beside in range(9)), key=_cost)


def _flow(scene: tuple[int, int], row: tuple[int, int], tile: int, count: int, beside: int) -> _Plan:
    """Rows in `beside` columns right of the scene, as many as its height holds, and the others below it."""
    step = row[0] + 2 * GAP, row[1] + GAP
    lines = min(max(round((scene[1] + GAP) / step[1]), 1), math.ceil(count / beside)) if beside else 0
    apart = min(max((scene[1] - row[1]) // max(lines - 1, 1), step[1]), 1.4 * step[1])  # the last ends with the scene
    left = scene[0] + 2 * GAP
    if 0 < beside * lines < count:  # the columns go on below the scene
        left = math.ceil(left / step[0]) * step[0]
    width = max(left + beside * step[0] - 2 * GAP, row[0], NARROWEST)
    places = [(left + column * step[0], round(line * apart)) for line in range(lines) for column in range(beside)]
    bottom = max([scene[1]] + [top + row[1] for _, top in places])
    for number in range(count - len(places)):
        line, column = divmod(number, (width + 2 * GAP) // step[0])
        places.append((column * step[0], bottom + 2 * GAP + line * step[1]))
    height = max([bottom] + [top + row[1] for _, top in places])
    return _Plan(width, height, scene, places[:count], row, tile)


def _cost(plan: _Plan) -> float:
    """The area of a screen that shows all of it, and more for what is blank and where the scene has under a third."""
    area, scene = plan.width * plan.height, plan.scene[0] * plan.scene[1]
    blank = area - scene - len(plan.places) * (plan.row[0] + 2 * GAP) * (plan.row[1] + GAP)
    return max(plan.width / SCREEN, plan.height) ** 2 * SCREEN + 3 * blank + 2 * max(area - 3 * scene, 0)


def _draw_scene(sheet: Sheet, scene: Image.Image, instances, left: int, top: int, size: tuple[int, int]) -> None:
    """The scene in `size`, with the outline of each mask (of the box, where the mask is empty) and its number."""
    enlarged = size[0] > 4 * scene.width  # its pixels are to be seen as they are
    canvas = scene if scene.mode == "RGB" else scene.convert("RGB")
    canvas = canvas.resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)
    scale = size[0] / scene.width, size[1] / scene.height
    centres = np.zeros((0, 2))
    for number, instance in enumerate(instances):
        mask, corner = _shrunk_mask(instance["rle"], scale)
        if mask is None:
            places = _draw_box(canvas, instance["box"], scale, _color(number))
        else:
            for half, color in ((LINE + 1, INK), (LINE, _color(number))):
                canvas.paste(color, corner, outline_of(mask, half))
            places = _places(np.asarray(mask) > 127) + corner
        centres = np.vstack([centres, _free_place(places, centres)])
    sheet.picture(canvas, left, top)
    for number, (x, y) in enumerate(centres):
        _disc(sheet, left + min(max(x, 0), size[0]), top + min(max(y, 0), size[1]), number)


def _shrunk_mask(rle: dict, scale: tuple[float, float]) -> tuple[Image.Image | None, tuple[int, int]]:
    """The part of a mask in which it isn't empty, in pixels of the sheet, with room for its outline: (L, corner)."""
    mask, (left, top) = unpack_mask(rle, 1, 0)
    if mask is None:
        return None, (0, 0)
    x, y = round(left * scale[0]), round(top * scale[1])
    width = max(1, round((left + mask.width) * scale[0]) - x)
    height = max(1, round((top + mask.height) * scale[1]) - y)
    if scale[0] > 1:
        small = mask.resize((width, height), Image.Resampling.BILINEAR)
    else:  # thin parts stay
        small = mask.resize((width, height), Image.Resampling.BOX).point(lambda value: 255 * (value > 0))
    room = math.ceil(3 * (LINE + 1)) + 1
    padded = Image.new("L", (width + 2 * room, height + 2 * room))
    padded.paste(small, (room, room))
    return padded, (x - room, y - room)


def _draw_box(canvas: Image.Image, box, scale: tuple[float, float], color: str) -> np.ndarray:
    """A frame for an object without a mask; returns its middle (1, 2)."""
    x1, x2 = sorted(min(max(x * scale[0], 0), canvas.width - 1) for x in box[0::2])
    y1, y2 = sorted(min(max(y * scale[1], 0), canvas.height - 1) for y in box[1::2])
    ImageDraw.Draw(canvas).rectangle((x1, y1, x2, y2), outline=color, width=round(2 * LINE))
    return np.array([[(x1 + x2) / 2, (y1 + y2) / 2]])


def _places(mask: np.ndarray) -> np.ndarray:
    """Pixels (P, 2) of a mask, x and y, about a thousand at most, the nearest to its centre first."""
    step = math.ceil(math.sqrt(np.count_nonzero(mask) / 1000))
    y, x = np.nonzero(mask[::step, ::step])
    if not len(x):  # so thin that every step misses it
        step, (y, x) = 1, np.nonzero(mask)
    places = np.stack([x, y], 1) * step  # (P, 2)
    return places[np.argsort(((places - places.mean(0)) ** 2).sum(1), kind="stable")]


def _free_place(places: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """The first place (2,) whose disc hides none of those at `taken` (T, 2), else the one farthest from them."""
    if not len(taken):
        return places[0]
    distance = np.hypot(*(places[:, None] - taken[None]).transpose(2, 0, 1)).min(1)  # (P,)
    return places[int((distance >= 2 * DISC + 2).argmax() if distance.max() >= 2 * DISC + 2 else distance.argmax())]


def _explain(threshold: float | None) -> str:
    if threshold is None:
        return "there is no threshold, so everyone is unknown"
    within = f"the bar is the threshold {threshold:.4g}: left of it near enough, the nearest with ✓"
    return f"{within}; right of it, faint, too far"


def _draw_row(
    sheet: Sheet, number: int, instance, cutout, matches, threshold: float | None, left: int, top: int, plan: _Plan
) -> None:
    """Number, answer and class; under them the cut-out, then its matches with name and distance."""
    width, tile = plan.row[0], plan.tile
    answer = next((match["identity"] for match in matches if match["accepted"]), None)
    score = "" if instance["score"] is None else f" {instance['score']:.2f}"
    label = shorten(instance["label"], 0.25 * width, LETTERS) + score
    words = "unknown" if answer is None else shorten(answer, 0.4 * width, LARGE)
    _disc(sheet, left + DISC, top + DISC, number)
    sheet.text(left + 2 * DISC + 8, top + 2, words, LARGE, FAINT if answer is None else INK, "left", "bold")
    sheet.text(left + width, top + 4, label, LETTERS, FAINT, "right")
    top += 2 * DISC + 8
    sheet.picture(fit(cutout, tile, tile), left, top)
    sheet.frame(left, top, tile, tile, _color(number), line=3)
    start, step = left + tile + 24, tile + BETWEEN
    if not matches:
        sheet.text(start, top + tile / 2 - 6, "nothing to compare with", 9, FAINT, "left")
    near = [threshold is None or match["distance"] <= threshold for match in matches[:MOST_MATCHES]]
    for place, (match, is_near) in enumerate(zip(matches, near, strict=False)):
        _draw_match(sheet, match, is_near, start + place * step, top, tile)
    if near and threshold is not None:
        bar = start + sum(near) * step - BETWEEN / 2
        sheet.axes.add_line(Line2D([bar] * 2, [top - 4, top + tile + 38], color=INK, linewidth=1.5))


def _draw_match(sheet: Sheet, match: dict, is_near: bool, left: int, top: int, tile: int) -> None:
    accepted, thumbnail = match["accepted"], match["thumbnail"]
    picture = fit(thumbnail or Image.new("RGB", (1, 1), "#dcdcdc"), tile, tile)
    if not is_near:
        picture = Image.blend(picture, Image.new("RGB", picture.size, "white"), 0.55)
    sheet.picture(picture, left, top)
    if thumbnail is None:
        sheet.text(left + tile / 2, top + tile / 2 - 6, "no picture", 7.5, FAINT)
    color, weight = (RIGHT, "bold") if accepted else (INK if is_near else FAINT, "normal")
    if accepted:
        sheet.frame(left, top, tile, tile, RIGHT, line=4)
    sheet.text(left + tile / 2, top + tile + 6, match["identity"], LETTERS, color, weight=weight, room=tile)
    distance = f"{'✓ ' * accepted}{match['distance']:.3f}"
    sheet.text(left + tile / 2, top + tile + 22, distance, LETTERS, color, weight=weight)


def _draw_scale(sheet: Sheet, distance: float, threshold: float | None, color, left: int, top: int, width: int) -> None:
    """The line from 0 on, `top` its upper edge: up to the threshold the same object, hatched, beyond it another."""
    end = max(1.25 * distance, 2 * (threshold or 0), 1e-6)
    bar, limit, x = 20, max(threshold or 0, 0) / end * width, left + distance / end * width
    is_marked = threshold is not None and threshold >= 0
    half = 67  # of a label's width, which stays on the line

    def label(middle, top, words, *style, **more):
        sheet.text(min(max(middle, left + half), left + width - half), top, words, *style, **more)

    zones = [(left, width, "#e8e8e8", None, "")]
    if threshold is not None:
        zones = [
            (left, limit, "#cfe8d2", "////", "the same object"),
            (left + limit, width - limit, "#f3d3d3", None, "another object"),
        ]
    if is_marked:
        sheet.axes.add_line(Line2D([left + limit] * 2, [top - 4, top + bar + 6], color=INK, linewidth=1.5))
        label(left + limit, top + bar + 8, f"threshold {threshold:.4g}", 9)
    for start, long, fill, hatch, words in zones:
        sheet.axes.add_patch(Rectangle((start, top), long, bar, facecolor=fill, hatch=hatch, edgecolor="#ffffff"))
        if long > 120:
            sheet.text(start + long / 2, top + 3, words, 9)
    if not is_marked or limit > half + 16:  # else the threshold's label is there
        sheet.text(left, top + bar + 8, "0", 9, FAINT, "left")
    sheet.axes.add_line(Line2D([x], [top - 6], color=color, marker="v", markersize=9))
    label(x, top - 32, f"distance {distance:.3f}", 10, color, weight="bold")


def _disc(sheet: Sheet, x: float, y: float, number: int) -> None:
    """The number of an instance, counted from 1, in a disc of its colour."""
    size = 8.5 if number < 99 else 7
    sheet.axes.add_patch(Circle((x, y), DISC, facecolor=_color(number), edgecolor="white", linewidth=1))
    sheet.text(
        x, y - 0.55 * size * DPI / 72, str(number + 1), size, ink_on(ImageColor.getrgb(_color(number))), weight="bold"
    )


def _color(number: int) -> str:
    return PALETTE[number % len(PALETTE)]
