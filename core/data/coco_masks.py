"""COCO outlines as masks, and whether the boxes and areas of a file are those of its masks."""

from array import array
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from core.data.coco_checks import MIN_SIDE
from core.errors import InputError

AT_ONCE = 10_000  # objects: the points of a whole file would take as much memory again


class _Objects(NamedTuple):
    """N objects, in pixels. listed: (annotation, width and height of its picture) of each; boxes (N, 4): x, y, width,
    height, as the file says; tight (N, 4): x1, y1, x2, y2 of the mask; masks (N,): its area; sizes (N, 2): width and
    height of the picture."""

    listed: list
    boxes: np.ndarray
    tight: np.ndarray
    masks: np.ndarray
    sizes: np.ndarray


def encode_mask(segmentation, width, height):
    """Polygons or run lengths -> COCO's compressed run lengths, of a picture of width x height pixels."""
    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, height, width)
    return segmentation


def in_pixels(pictures, path):
    """Multiply outlines that are fractions of their picture by its width and height; and boxes, where they are, too.

    They are where no polygon of the file leaves the square from 0 to 1: no picture has all of its objects in one pixel.

    Args:
        pictures: image id -> picture, whose annotations are replaced in place.

    Returns:
        list of lines for the log.
    """
    listed = [one for picture in pictures.values() for one in picture.annotations if isinstance(one.segmentation, list)]
    if not listed or any(min(part) < 0 or max(part) > 1 for one in listed for part in one.segmentation):
        return []
    boxes = [one.box for one in listed]
    of_boxes = all(min(x1, y1) >= 0 and max(x1, y1, x2 - x1, y2 - y1) <= 1 for x1, y1, x2, y2 in boxes)
    for picture in pictures.values():
        size = np.array([picture.width, picture.height], dtype=float)
        for place, one in enumerate(picture.annotations):
            if isinstance(one.segmentation, list):
                outline = [array("d", (np.frombuffer(p).reshape(-1, 2) * size).tobytes()) for p in one.segmentation]
                box = tuple((np.array(one.box) * np.tile(size, 2)).tolist()) if of_boxes else one.box
                area = float(coco_mask.area(encode_mask(outline, picture.width, picture.height)))
                picture.annotations[place] = one._replace(box=box, segmentation=outline, area=area)
    what = "outlines and boxes" if of_boxes else "outlines"
    return [f"{path}: {what} are fractions of the picture ({len(listed)} objects): multiplied by its width and height"]


def check_against_masks(pictures, path):
    """Hold the boxes and areas of a file against its masks.

    Crowd regions, boxes without area and empty masks don't count.

    Returns:
        list of lines for the log: how many boxes are not those of their masks, with the first; the same of areas.

    Raises:
        InputError: most are not, or most boxes would be, were their numbers read in another way.
    """
    listed = [
        (annotation, (picture.width, picture.height))
        for picture in pictures
        for annotation in picture.annotations
        if not annotation.crowd
    ]
    notes = []
    if listed:
        objects = _measure(listed)
        for check in (_wrong_boxes, _wrong_areas):
            line, reason = check(objects) if objects.listed else ("", "")
            if reason:
                raise InputError(f"{path}: {line}; {reason}")
            notes += [f"{path}: {line}"] if line else []
    return notes


def _measure(listed):
    """`_Objects` without the boxes and masks that have no area."""
    corners = np.array([annotation.box for annotation, _ in listed])
    sizes = np.array([size for _, size in listed], dtype=np.float64)
    parts = [_extents(listed[start : start + AT_ONCE]) for start in range(0, len(listed), AT_ONCE)]
    tight, masks = map(np.concatenate, zip(*parts, strict=True))
    tight = np.clip(tight, 0, np.tile(sizes, 2))
    boxes = np.hstack([corners[:, :2], _sides(corners)])
    kept = np.flatnonzero((boxes[:, 2:] >= MIN_SIDE).all(1) & (_sides(tight) >= MIN_SIDE).all(1))
    return _Objects([listed[place] for place in kept], boxes[kept], tight[kept], masks[kept], sizes[kept])


def _extents(listed):
    """Boxes (N, 4) and areas (N,) of the masks: of polygons by their points, a fraction of the work of drawing them."""
    tight, masks = np.zeros((len(listed), 4)), np.zeros(len(listed))
    outlines = [annotation.segmentation for annotation, _ in listed]
    polygons = [(place, one) for place, some in enumerate(outlines) if isinstance(some, list) for one in some]
    if polygons:
        owners = np.array([place for place, _ in polygons])
        points = np.frombuffer(b"".join(one for _, one in polygons)).reshape(-1, 2)
        ends = np.cumsum([len(one) // 2 for _, one in polygons])
        starts = np.append(0, ends[:-1])
        following = np.roll(points, -1, axis=0)
        following[ends - 1] = points[starts]
        doubled = np.add.reduceat(points[:, 0] * following[:, 1] - points[:, 1] * following[:, 0], starts)
        masks = np.bincount(owners, abs(doubled) / 2, len(listed))
        first = np.flatnonzero(np.diff(owners, prepend=-1))  # the first polygon of each object
        tight[owners[first], :2] = np.minimum.reduceat(points, starts[first])
        tight[owners[first], 2:] = np.maximum.reduceat(points, starts[first])
    coded = [place for place, outline in enumerate(outlines) if isinstance(outline, dict)]
    if coded:
        codes = [encode_mask(outlines[place], *listed[place][1]) for place in coded]
        boxes = coco_mask.toBbox(codes)
        tight[coded] = np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])
        masks[coded] = [coco_mask.area(code) for code in codes]  # the trap: it can't count more than 255 at once
    return tight, masks


def _sides(corners):
    """(N, 4) x1, y1, x2, y2 -> (N, 2) width and height, negative ones as 0."""
    return (corners[:, 2:] - corners[:, :2]).clip(0)


def _wrong_boxes(objects):
    """(line about the boxes that are not those of their masks, or ""; why the file is refused for them, or "").

    A box is not that of its mask where their IoU is below 0.5 and a side is off by more than 2 pixels.
    """
    x_y, size = np.hsplit(objects.boxes, 2)
    close, wrong = _compare(np.hstack([x_y, x_y + size]), objects)
    reason = ""
    if close.mean() <= 0.5:
        # Not only where most are wrong: corners read as sizes still overlap well with large objects near x = y = 0.
        fitting = [(_compare(corners, objects)[0].mean(), name) for name, corners in _readings(objects)]
        share, name = max(fitting, key=itemgetter(0))
        if share > 0.5:
            wrong, reason = ~close, f"they look like {name}; write [x, y, width, height] in pixels"
        elif wrong.mean() > 0.5:
            reason = "boxes and outlines do not belong together; correct the one or the other"
    tight = np.hstack([objects.tight[:, :2], _sides(objects.tight)])
    return _line("boxes", wrong, objects, objects.boxes, tight), reason


def _compare(corners, objects):
    """(N,) whether boxes (N, 4), x1, y1, x2, y2 in pixels, fit those of the masks closely, and (N,) whether they are
    not those of the masks."""
    corners = np.clip(corners, 0, np.tile(objects.sizes, 2))
    both = np.hstack([np.maximum(corners, objects.tight)[:, :2], np.minimum(corners, objects.tight)[:, 2:]])
    shared = _sides(both).prod(1)
    iou = shared / (_sides(corners).prod(1) + _sides(objects.tight).prod(1) - shared)
    off = abs(corners - objects.tight).max(1)
    return (iou >= 0.9) | (off <= 2), (iou < 0.5) & (off > 2)


def _readings(objects):
    """Yields (name, x1, y1, x2, y2 in pixels (N, 4)): what else the four numbers of the boxes may be."""
    picture = np.tile(objects.sizes, 2)
    units = (("", 1), (" as fractions of the picture", picture))
    for x, y, width, height, numbers in (
        ("x", "y", "width", "height", objects.boxes),
        ("y", "x", "height", "width", objects.boxes[:, [1, 0, 3, 2]]),
    ):
        for unit, scale in units:
            first, second = np.hsplit(numbers * scale, 2)
            yield f"[{x}1, {y}1, {x}2, {y}2]{unit}", np.hstack([first, second])
            yield f"[{x}, {y}, {width}, {height}]{unit}", np.hstack([first, first + second])
            centered = np.hstack([first - second / 2, first + second / 2])
            yield f"[center {x}, center {y}, {width}, {height}]{unit}", centered


def _wrong_areas(objects):
    """(line about the areas that are not those of their masks, or ""; why the file is refused for them, or "")."""
    said = np.array([annotation.area for annotation, _ in objects.listed])
    wrong = ~_are_areas(said, objects)
    for place in np.flatnonzero(wrong):  # outlines that cross themselves or one another have to be drawn
        annotation, size = objects.listed[place]
        objects.masks[place] = coco_mask.area(encode_mask(annotation.segmentation, *size))
    wrong &= ~_are_areas(said, objects) & (objects.masks > 0)
    reason = ""
    if wrong.mean() > 0.5:
        picture = objects.sizes.prod(1)
        if _are_areas(said * picture, objects).mean() > 0.5:
            reason = "they look like fractions of the picture"
        elif len(said) > 1 and (said == said[0]).all():
            reason = f"all of them are {said[0]:g}"
        else:
            reason = "areas and outlines do not belong together"
        reason += "; write pixels, or leave area out, and that of the mask is taken"
    return _line("areas", wrong, objects, said[:, None], objects.masks[:, None]), reason


def _are_areas(areas, objects):
    """(N,) whether areas are those of the masks, within a factor of 2 as outlines differ, or of the boxes, which many
    exporters write: within 5 %, and a pixel of each side."""
    width, height = objects.boxes[:, 2:].T
    of_masks = (areas <= 2 * objects.masks) & (objects.masks <= 2 * areas)
    return of_masks | (abs(areas - width * height) <= 0.05 * width * height + width + height + 1)


def _line(what, wrong, objects, said, found):
    """The line about the objects that are `wrong`, "" if none is; said, found (N, K): numbers of the first to show."""
    if not wrong.any():
        return ""
    place = np.flatnonzero(wrong)[0]
    said, found = (", ".join(f"{number:.6g}" for number in numbers[place]) for numbers in (said, found))
    return (
        f"{what} that are not those of their masks ({wrong.sum()} of {len(wrong)}), such as annotation "
        f"{objects.listed[place][0].id}: [{said}], its mask has [{found}]"
    )
