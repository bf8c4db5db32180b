"""Whether a COCO annotation file and its entries are what the format says: each fault is one line that names it."""

import functools
import json
import os
from array import array

import numpy as np

from core.data.samples import read_text
from core.errors import InputError

# Pixels. What lies farther out is a mistake of units.
FARTHEST = 1e5
# Pixels, of all polygons of an object: pycocotools takes 80 bytes for each while it draws, and ends where it has none.
LONGEST = 2_000_000
# Pixels. The box coding takes logarithms of a width, and thinner ones vanish in float32 (spacing 0.0005 at 4,096).
MIN_SIDE = 0.01


class EntryFault(InputError):
    """What is wrong with one entry. kind: what `fault_line` counts together, by default the start of the reason."""

    def __init__(self, where, reason, kind=None):
        super().__init__(f"{where}: {reason}")
        self.kind = kind or reason.partition(", found")[0]


class BrokenEntries(InputError):
    """Pictures or annotations of a file can't be used, which `read_coco` leaves out if it is asked to."""


def fault_line(faults, total, what, path):
    """One line about a list of `EntryFault`: of each kind how many, and the first; "" where there are none.

    total, what: how many entries there are, and of what.
    """
    kinds = {}
    for fault in faults:
        kinds.setdefault(fault.kind, []).append(str(fault).removeprefix(f"{path}, "))
    listed = []
    for first, *others in kinds.values():
        entry, _, reason = first.partition(": ")
        listed.append(f"{entry}{f' and {len(others)} more' if others else ''}: {reason}")
    return f"{path}: {len(faults)} of {total} {what} at fault: {'; '.join(listed)}" if faults else ""


def read_json(path):
    """The object that an annotation file holds."""
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: JSON errors, and integers of more than 4,300 digits
        raise InputError(f"{path}: not JSON ({error}); give a COCO annotation file") from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: expected an object with images, annotations and categories, found {type(content).__name__}; "
            "give a COCO annotation file"
        )
    return content


def number_ids(content, path):
    """Make numbers of ids that are texts, in `content`, wherever they are referred to. Returns lines for the log."""
    notes = []
    for key, field in (("images", "image_id"), ("categories", "category_id"), ("annotations", None)):
        entries, referring = (_objects(content, part) for part in (key, "annotations"))
        texts = [entry.get("id") for entry in entries]
        if not texts or not {str}.issuperset(map(type, texts)):
            continue
        are_numbers = all(text.isdecimal() and len(text) <= 18 for text in texts)
        numbers = {text: int(text) if are_numbers else place for place, text in enumerate(dict.fromkeys(texts), 1)}
        for entry in entries:
            entry["id"] = numbers[entry["id"]]
        for entry in referring:
            if isinstance(entry.get(field), str):
                entry[field] = numbers.get(entry[field], entry[field])
        how = "taken as numbers" if are_numbers else "numbered in their order, from 1"
        notes.append(f"{path}: the ids of {key} are texts, such as {texts[0]!r:.40}: {how}")
    return notes


def _objects(content, key):
    entries = content.get(key)
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def whole(value):
    """A whole number of 64 bits as an int, also one that is written as 3.0; None for anything else."""
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and abs(value) < 2**63 else None


def check_name(entry, field, where):
    """A field that has to be a text, and not an empty one."""
    name = entry.get(field)
    if not isinstance(name, str) or not name:
        raise EntryFault(where, f"needs {field}, a text, found {name!r:.80}")
    return name


def check_reference(entry, field, where):
    """A field that has to be the id of something else in the file."""
    reference = whole(entry.get(field))
    if reference is None:
        raise EntryFault(where, f"needs {field}, a whole number, found {entry.get(field)!r:.80}")
    return reference


def entries_by_id(content, key, path):
    """Id -> entry of one of the file's lists ("images", ...), each an object with a whole number of its own as id."""
    entries = content.get(key)
    if not isinstance(entries, list):
        raise InputError(f"{path}: needs a list of {key}, found {entries!r:.80}; give a COCO annotation file")
    if not entries and key != "annotations":
        raise InputError(f"{path}: lists no {key}; give a file that does")
    found, faults = {}, []
    for place, entry in enumerate(entries):
        where, given = f"{path}, {key}[{place}]", entry.get("id") if isinstance(entry, dict) else None
        number = whole(given)
        if number is None:
            shown = f"{entry!r:.80}" if given is None else f"{given!r:.80}"
            faults.append(EntryFault(where, f"needs an id, a whole number of at most 64 bits, found {shown}"))
        elif number in found:
            faults.append(EntryFault(where, f"id {number} is there twice; give every entry its own", kind="twice"))
        else:
            found[number] = entry
            entry["id"] = number
    if faults:
        raise InputError(f"{fault_line(faults, len(entries), key, path)}; correct or remove them")
    return found


def check_size(entry, where):
    """(width, height) of an image in pixels, or (None, None) where the entry has neither."""
    if entry.get("width") is None and entry.get("height") is None:
        return None, None
    width, height = (whole(entry.get(side)) or 0 for side in ("width", "height"))
    if min(width, height) <= 0 or width * height >= 2**31:
        raise EntryFault(
            where,
            "width and height have to be whole numbers of pixels above 0, found "
            f"{entry.get('width')!r:.40} and {entry.get('height')!r:.40}",
        )
    return width, height


def merge_by_file(pictures, path):
    """Make one picture of the entries of one file, as exporters write them that give every object an image of its own.

    Args:
        pictures: image id -> picture. Paths may differ in their spelling: "a.jpg", "./a.jpg", "x/../a.jpg".

    Returns:
        (id -> picture for the first entry of each file, id of every entry -> that of the first, lines for the log)

    Raises:
        InputError: entries of one file disagree about its width and height.
    """
    real = functools.cache(os.path.realpath)  # asked once a folder: asking for every file takes minutes on a network
    first_of, first_ids, merged = {}, {}, {}
    for number, picture in pictures.items():
        folder, name = os.path.split(picture.path)
        first_ids[number] = first_of.setdefault((real(folder), name), number)
        first = merged.setdefault(first_ids[number], picture)
        if first.width is None:
            merged[first.id] = first._replace(width=picture.width, height=picture.height)
        elif picture.width is not None and (first.width, first.height) != (picture.width, picture.height):
            raise InputError(
                f"{path}: images {first.id} and {number} are both {picture.path}, the one of {first.width}x"
                f"{first.height} pixels and the other of {picture.width}x{picture.height}; correct width and height"
            )
    several = len({first for number, first in first_ids.items() if number != first})
    line = f"{path}: pictures listed under several image ids ({several}): merged, each under its first id"
    return merged, first_ids, [line] if several else []


def check_box(bbox, where):
    """COCO's (x, y, width, height) -> (x1, y1, x2, y2). A width or height of 0 passes, a negative one does not."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not _are_coordinates(bbox):
        raise EntryFault(where, f"bbox has to be [x, y, width, height] in pixels, found {bbox!r:.80}")
    x, y, width, height = map(float, bbox)
    if width < 0 or height < 0:
        raise EntryFault(where, f"bbox {bbox} has a negative size; it has to be [x, y, width, height]", kind="negative")
    return x, y, x + width, y + height


def check_outline(segmentation, width, height, where, faults=None):
    """A segmentation as it will be kept: polygons as a list of compact arrays, run lengths as a dict.

    Polygons are cut off where they lead farther out than the picture is wide or high: drawing walks along all of them.

    Args:
        faults: list to which the fault of a polygon is added, if the object has others that can be used.
    """
    if isinstance(segmentation, dict):
        return _check_run_lengths(segmentation, width, height, where)
    if not isinstance(segmentation, list):
        raise EntryFault(where, f"segmentation has to be polygons or run lengths, found {segmentation!r:.80}")
    wrong = [_polygon_fault(polygon, where) for polygon in segmentation]
    polygons = [polygon for polygon, fault in zip(segmentation, wrong, strict=True) if fault is None]
    if len(polygons) < len(segmentation):
        fault = next(filter(None, wrong))
        if faults is None or not polygons:
            raise fault
        faults.append(fault)
    outline = [_cut(array("d", polygon), width, height) for polygon in polygons]
    if sum(len(polygon) * (max(polygon) - min(polygon)) for polygon in outline) > 2 * LONGEST:  # it may be
        length = sum(map(_length, outline))
        if length > LONGEST:
            raise EntryFault(where, f"an outline can have {LONGEST:,} pixels of length, found {length:,.0f}")
    return outline


def _polygon_fault(polygon, where):
    if not isinstance(polygon, list) or not _are_coordinates(polygon):
        return EntryFault(where, f"a polygon has to be [x, y, x, y, ...] in pixels, found {polygon!r:.80}")
    if len(polygon) < 6 or len(polygon) % 2:
        reason = f"a polygon of {len(polygon)} numbers; it needs 3 points or more, each x and y: {polygon!r:.80}"
        return EntryFault(where, reason, kind="too few points")
    return None


def _are_coordinates(values):
    # The types are compared, as True is an int too; NaN and infinity, which Python's JSON has, fail the comparison.
    return {int, float}.issuperset(map(type, values)) and all(-FARTHEST <= value <= FARTHEST for value in values)


def _cut(polygon, width, height):
    """A polygon, x, y, x, y, ..., without what is farther out; of one that is all of it, a point out there.

    The sides are cut off one after the other (Sutherland and Hodgman 1974).
    """
    shorter = min(width, height)
    if -shorter <= min(polygon) and max(polygon) <= 2 * shorter:
        return polygon
    points = np.frombuffer(polygon).reshape(-1, 2)
    for axis, sign, bound in ((0, 1, -width), (0, -1, 2 * width), (1, 1, -height), (1, -1, 2 * height)):
        depth = sign * (points[:, axis] - bound)  # (N,) 0 or more is inside
        following, deeper = np.roll(points, -1, axis=0), np.roll(depth, -1)
        crosses = (depth >= 0) != (deeper >= 0)
        crossings = points + (depth / np.where(crosses, depth - deeper, 1))[:, None] * (following - points)
        kept = np.stack([depth >= 0, crosses], axis=1)  # of each point, and of the crossing after it
        points = np.stack([points, crossings], axis=1)[kept]
    return array("d", points.tobytes() if len(points) > 2 else np.tile([-width, -height], 3).astype(float).tobytes())


def _length(polygon):
    """In pixels, as pycocotools walks: of a slanted line its longer side."""
    points = np.frombuffer(polygon).reshape(-1, 2)
    return abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum()


def _check_run_lengths(run_lengths, width, height, where):
    size, counts = run_lengths.get("size"), run_lengths.get("counts")
    if not isinstance(size, list) or len(size) != 2 or not isinstance(counts, str | list):
        raise EntryFault(where, f"run lengths need size [height, width] and counts, found {run_lengths!r:.80}")
    if size != [height, width]:
        raise EntryFault(
            where,
            f"its run lengths have size {size!r:.40} and the image [{height}, {width}] (height, width)",
            kind="size of run lengths",
        )
    if isinstance(counts, str):
        is_whole = _total(counts) == width * height
    else:
        is_whole = all(type(count) is int and count >= 0 for count in counts) and sum(counts) == width * height
    if not is_whole:
        reason = f"its run lengths are damaged, they don't cover {width}x{height} pixels"
        raise EntryFault(where, reason, kind="damaged run lengths")
    return {"size": [height, width], "counts": counts}  # without floats, which pycocotools does not take


def _total(counts):
    """Sum of compressed run lengths, or -1 where they are no such thing: pycocotools may read beyond their end.

    The code (rleToString in COCO's maskApi.c): 6 bits a character from "0" on, 5 of the value, lowest first, and one
    that says whether more follow; the last character's bit 0x10 is the sign. From the fourth run on, the value is the
    difference to the run before the last.
    """
    codes = np.frombuffer(counts.encode("utf-8", "surrogatepass"), np.uint8).astype(np.int64) - ord(
        "0"
    )  # (characters,)
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return -1
    last = (codes & 32) == 0
    run = np.cumsum(last) - last  # (characters,) which run a character belongs to
    ends = np.flatnonzero(last)
    first = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(len(codes)) - first[run]
    if place.max() > 6:
        return -1
    values = np.add.reduceat((codes & 31) << (5 * place), first)  # (runs,)
    values -= np.where(codes[ends] & 16, 1 << (5 * (place[ends] + 1)), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return int(values.sum()) if values.min() >= 0 else -1
