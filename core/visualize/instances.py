"""Pictures of detection: instances over their picture, what augmentation makes of them, precision over recall.

An instance is a dict: `box` (x1, y1, x2, y2) in pixels, `label` its class's name, `score` in [0, 1] or None, and `rle`,
its mask as COCO's run-length code for the whole picture; `also`, which may be missing, lists (label, score) of other
classes that it may be. One mask at a time is unpacked and only its box is painted,
so a hundred instances on a picture of 6000 x 4000 take the memory of a few pictures.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageColor, ImageDraw
from pycocotools import mask as rle_codec

from core.visualize.drawing import ink_on, outline_of, unpack_mask
from core.visualize.fonts import draw_text, legible, width_of
from core.visualize.sheet import (
    DPI,
    FAINT,
    GAP,
    INK,
    MARGIN,
    PALETTE,
    Sheet,
    empty_sheet,
    fit,
    plain,
    save_figure,
)

PANELS = {
    "original": "original",
    "boxes": "boxes, classes, scores",
    "masks": "masks",
    "overlay": "masks over the picture",
    "classes": "masks and classes",
    "all": "all together",
}
NIGHT = "#202020"  # behind masks that stand alone
SMALL = 640  # pixels; a picture whose longer side is below it is enlarged, so that its labels can be read
OPACITY = 0.45  # of a mask over its picture
TINTS = (0.0, 0.32, -0.28, 0.16, -0.14)  # towards white or black: neighbours of one class


def draw_instances(
    picture: Image.Image,
    instances: Sequence[dict],
    *,
    boxes: bool = True,
    masks: bool = True,
    labels: bool = True,
    scores: bool = True,
    names: Sequence[str] = (),
) -> Image.Image:
    """A copy of the picture with what was found drawn over it, lines and letters in proportion to its size.

    A small picture is enlarged by a whole number. Each class has a colour, its instances shades of it; overlapping
    masks lie with the smaller one on top, and labels give way to each other, the surer one first.

    Args:
        scores: written behind the class, where there is one.
        names: the classes of the network: as many as there are colours, seven, have the same one in every picture.
            Without them, or with more, the classes of the picture have the colours in the order of the alphabet.
    """
    canvas, instances = _enlarge(picture, instances, names)
    if masks:
        _paint_masks([(canvas, OPACITY, None)], instances)
    if boxes:
        _draw_boxes(canvas, instances)
    if labels:
        _draw_labels(canvas, instances, scores, at_boxes=boxes)
    return canvas


def instance_panels(
    picture: Image.Image, instances: Sequence[dict], names: Sequence[str] = ()
) -> dict[str, Image.Image]:
    """The six views of `PANELS` at full resolution; see `draw_instances`."""
    original, instances = _enlarge(picture, instances, names)
    boxes, masks, overlay = original.copy(), Image.new("RGB", original.size, NIGHT), original.copy()
    _paint_masks([(overlay, OPACITY, None), (masks, 1.0, NIGHT)], instances)
    classes, everything = overlay.copy(), overlay.copy()
    for canvas in (boxes, everything):
        _draw_boxes(canvas, instances)
        _draw_labels(canvas, instances, scores=True, at_boxes=True)
    _draw_labels(classes, instances, scores=False, at_boxes=False)
    return dict(zip(PANELS, (original, boxes, masks, overlay, classes, everything), strict=True))


def instance_sheet(path: str | Path, panels: dict[str, Image.Image], title: str = "", caption: str = "") -> None:
    """The six panels on one sheet, PNG or JPEG by the suffix of `path`, under a title and a fainter caption."""
    some = next(iter(panels.values()))
    aspect = min(max(some.width / some.height, 0.3), 8.0)
    width, height = round((600 * 450 * aspect) ** 0.5), round((600 * 450 / aspect) ** 0.5)
    columns = 3 if aspect < 2.2 else 2 if aspect < 5 else 1
    header, line = (44 if title or caption else 0), height + 34
    sheet = Sheet(2 * MARGIN + columns * (width + GAP) - GAP, 2 * MARGIN + header + len(panels) // columns * line - GAP)
    room = sheet.size[0] - 2 * MARGIN
    if header:
        sheet.text(MARGIN, MARGIN - 8, title, 13, align="left", weight="bold", room=room)
        sheet.text(MARGIN, MARGIN + 14, caption, 9.5, FAINT, align="left", room=room)
    for number, (name, panel) in enumerate(panels.items()):
        left, top = MARGIN + number % columns * (width + GAP), MARGIN + header + number // columns * line
        sheet.text(left, top - 4, PANELS.get(name, name), 10, align="left", weight="bold")
        sheet.picture(fit(panel, width, height), left, top + 16)
    sheet.save(path)


def describe_instances(instances: Sequence[dict]) -> str:
    """'5 instances: 3 date, 2 fig', the most frequent class first."""
    counts = Counter(instance["label"] for instance in instances).most_common()
    if not counts:
        return "nothing found"
    total = f"{len(instances)} instance{'s' * (len(instances) != 1)}"
    return f"{total}: {', '.join(f'{count} {name}' for name, count in counts)}"


def augmentation_preview(path: str | Path, rows: Sequence[tuple[str, Sequence[tuple]]]) -> None:
    """Lines of training pictures as the network is shown them, with their boxes and masks.

    rows: (title, pictures), each picture a tuple of image uint8 (3, H, W), boxes (G, 4) in pixels, masks (G, H, W) and
    labels (G,). Under each its size and the number of instances left.
    """
    if not any(pictures for _, pictures in rows):
        return empty_sheet(path, "no pictures to show")
    shapes = [image.shape[2] / image.shape[1] for _, pictures in rows for image, *_ in pictures]
    aspect = float(np.clip(np.median(shapes), 0.6, 1.8))
    width, height = round((240 * 180 * aspect) ** 0.5), round((240 * 180 / aspect) ** 0.5)
    columns = max(len(pictures) for _, pictures in rows)
    title, line = 26, height + 26 + 26 + GAP
    size = max(2 * MARGIN + columns * (width + GAP) - GAP, 480), 2 * MARGIN + len(rows) * line - GAP
    sheet = Sheet(*size, "What the network is shown in training")
    names = sorted({int(label) for _, pictures in rows for *_, labels in pictures for label in labels})
    for number, (text, pictures) in enumerate(rows):
        top = MARGIN + number * line
        sheet.text(MARGIN, top - 2, text, 11, align="left", weight="bold")
        for column, (image, boxes, masks, labels) in enumerate(pictures):
            left = MARGIN + column * (width + GAP)
            instances = _instances_of(boxes, masks, labels)
            picture = Image.fromarray(torch.as_tensor(image).permute(1, 2, 0).cpu().numpy())  # (H, W, 3)
            drawn = draw_instances(picture, instances, labels=False, names=[str(name) for name in names])
            sheet.picture(fit(drawn, width, height), left, top + title)
            words = f"{picture.width} x {picture.height}, {len(instances)} instance{'s' * (len(instances) != 1)}"
            sheet.text(left + width / 2, top + title + height + 6, words, color=FAINT)
    sheet.save(path)


def precision_recall_curves(path: str | Path, precision: dict[str, np.ndarray], names: Sequence[str]) -> None:
    """Precision over recall, a panel for boxes and one for masks.

    Args:
        precision: "box" and "mask" -> (10 IoUs from 0.50 to 0.95, 101 recalls, K classes), nan for classes without
            instances: `CocoResult.precision`.
        names: of the K classes. Up to seven have a line of their own, at IoU 0.50; the mean over classes is dark, at
            0.50 (solid), 0.75 (dashed) and over 0.50 to 0.95 (dotted).
    """
    figure = Figure(figsize=(6.2 * len(precision), 5.2), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12, wspace=0.04)
    for axes, (kind, values) in zip(
        figure.subplots(1, len(precision), squeeze=False)[0], precision.items(), strict=True
    ):
        axes.set_title({"box": "boxes", "mask": "masks"}.get(kind, kind), loc="left", weight="bold", color=INK)
        axes.set(xlim=(0, 1.01), ylim=(0, 1.03), xlabel="recall", ylabel="precision")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e6e6")
        recall = np.linspace(0, 1, values.shape[1])
        there = np.isfinite(values).all((0, 1))  # (K,)
        if not there.any():
            axes.text(0.5, 0.5, "nothing to measure", transform=axes.transAxes, ha="center", color=FAINT)
            continue
        if len(names) <= len(PALETTE):
            for name, color, line in zip(names, PALETTE, values[0].T, strict=False):
                if np.isfinite(line).all():
                    axes.plot(recall, line, color=color, linewidth=1.5, label=plain(name))
        mean = values[:, :, there].mean(2)  # (10, 101)
        for line, style, text in ((mean[0], "-", "0.50"), (mean[5], "--", "0.75"), (mean.mean(0), ":", "0.50:0.95")):
            axes.plot(recall, line, style, color=INK, linewidth=2.2, label=f"mean, IoU {text}: AP {line.mean():.3f}")
        axes.legend(fontsize=8.5, loc="lower left", edgecolor="none", framealpha=0.85)
    save_figure(figure, path)


def _instances_of(boxes, masks, labels) -> list[dict]:
    """Tensors of a training target -> instances."""
    masks = np.asarray(torch.as_tensor(masks, dtype=torch.uint8).cpu())  # (G, H, W)
    return [
        {"box": box, "label": str(label), "score": None, "rle": rle_codec.encode(np.asfortranarray(mask))}
        for box, mask, label in zip(
            torch.as_tensor(boxes).tolist(), masks, torch.as_tensor(labels).tolist(), strict=True
        )
    ]


def _enlarge(picture, instances, names) -> tuple[Image.Image, list[dict]]:
    """A copy to draw on, and the instances in its pixels with their colours, the one with the largest mask first."""
    factor = max(1, round(SMALL / max(picture.size)))
    size = picture.width * factor, picture.height * factor
    canvas = picture.convert("RGB").resize(size, Image.Resampling.NEAREST)
    shown = sorted({instance["label"] for instance in instances})
    order = list(names) if names and len(names) <= len(PALETTE) else shown
    seen, ready = Counter(), []
    for instance in instances:
        label = instance["label"]
        color = _tinted(PALETTE[order.index(label) % len(PALETTE)], TINTS[seen[label] % len(TINTS)])
        seen[label] += 1
        (x1, x2), (y1, y2) = (  # inside the picture, and the right way round
            sorted(min(max(round(value * factor), 0), side) for value in instance["box"][start::2])
            for start, side in zip((0, 1), size, strict=True)
        )
        ready.append({**instance, "box": (x1, y1, x2, y2), "color": color, "factor": factor})
    areas = rle_codec.area([instance["rle"] for instance in ready]) if ready else []
    return canvas, [ready[number] for number in np.argsort([-float(area) for area in areas], kind="stable")]


def _tinted(color: str, tint: float) -> tuple[int, int, int]:
    target = 255 if tint > 0 else 0
    return tuple(round(value + (target - value) * abs(tint)) for value in ImageColor.getrgb(color))


def _measure(size: tuple[int, int]) -> float:
    """Height of letters in pixels, the measure of everything drawn on a picture of this size."""
    return max(11.0, min(0.0225 * max(size), 0.1 * min(size)))


def _paint_masks(layers: Sequence[tuple[Image.Image, float, str | None]], instances: Sequence[dict]) -> None:
    """Paint every mask on each (canvas, opacity, ground): with an outline in its colour, or in that of the ground."""
    if not instances:
        return
    half = max(0.9, _measure(layers[0][0].size) / 14)  # of the outline's width, pixels
    for instance in instances:
        mask, corner = unpack_mask(instance["rle"], instance["factor"], margin=round(3 * half) + 1)
        if mask is None:
            continue
        outline = outline_of(mask, half)
        for canvas, opacity, ground in layers:
            if ground:  # around the mask, so that it keeps its shape and stands out from those under it
                canvas.paste(ground, corner, outline)
            canvas.paste(instance["color"], corner, mask.point(lambda value, opacity=opacity: round(value * opacity)))
            if not ground:
                canvas.paste(instance["color"], corner, outline)


def _draw_boxes(canvas: Image.Image, instances: Sequence[dict]) -> None:
    draw = ImageDraw.Draw(canvas)
    line = max(2, round(_measure(canvas.size) / 7))
    halo = max(1, line // 3)
    for instance in instances:
        x1, y1, x2, y2 = instance["box"]
        place = x1, y1, max(x2 - 1, x1), max(y2 - 1, y1)
        draw.rectangle(place, outline=INK, width=line + halo)
        draw.rectangle(place, outline=instance["color"], width=line)


def _draw_labels(canvas: Image.Image, instances: Sequence[dict], scores: bool, at_boxes: bool) -> None:
    """A label at the edge of each box, or in its middle, where it hides no other; the surest instance chooses first."""
    draw = ImageDraw.Draw(canvas)
    size = round(_measure(canvas.size))  # of letters
    pad = max(2, round(size * 0.28))
    height = round(size * 1.15) + pad
    taken, texts = np.zeros((0, 4)), []
    ordered = sorted(instances, key=lambda instance: -(instance["score"] or 0.0))
    for instance in ordered:
        seen = [(instance["label"], instance["score"]), *instance.get("also", ())]
        (label, score), *others = (
            (legible(label), f" {score:.2f}" if scores and score is not None else "") for label, score in seen
        )
        room = canvas.width - 2 * pad
        text = _cut(label, room - width_of(score, size), size) + score
        text = _cut(text + "".join(f" or {label}{score}" for label, score in others), room, size)
        width = round(width_of(text, size)) + 2 * pad
        taken = np.vstack([taken, _free_place(instance["box"], width, height, canvas.size, taken, at_boxes)])
        texts.append(text)
    for instance, place, text in reversed(list(zip(ordered, taken.tolist(), texts, strict=True))):
        draw.rounded_rectangle(place, radius=max(2, size // 5), fill=instance["color"])
        draw_text(draw, place[0] + pad, (place[1] + place[3]) / 2, text, size, ink_on(instance["color"]))


def _free_place(box, width, height, size, taken: np.ndarray, at_box: bool) -> np.ndarray:
    """(x1, y1, x2, y2) of a label: of the places at its box the one that hides least of the labels `taken`."""
    x1, y1, x2, y2 = box
    x, y = (x1 + x2 - width) / 2, (y1 + y2 - height) / 2
    edge = [(left, top) for top in (y1 - height, y1, y2 - height, y2) for left in (x1, x2 - width)]
    middle = [(x, y + step * height) for step in (0, 1.1, -1.1, 2.2, -2.2)]
    places = np.array(edge if at_box else middle).round()  # (P, 2)
    places = np.clip(places, 0, np.maximum(np.array(size) - (width, height), 0))
    places = np.hstack([places, places + (width - 1, height - 1)])  # (P, 4)
    overlap = np.minimum(places[:, None, 2:], taken[None, :, 2:]) - np.maximum(places[:, None, :2], taken[None, :, :2])
    hidden = overlap.clip(0).prod(2).sum(1)  # (P,)
    return places[int(hidden.argmin())]


def _cut(text: str, width: float, size: int) -> str:
    """The text, cut at its end to what fits into `width` pixels; at least its first letter."""
    if width_of(text, size) <= width:
        return text
    while len(text) > 1 and width_of(text + "…", size) > width:
        text = text[:-1]
    return text + "…"
