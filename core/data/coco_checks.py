"""Whether a COCO annotation file and its entries are what the format says: each fault is one line that names it."""

import functools
import json
import os
from array import array

import numpy as np

from core.data.samples import read_text
from core.errors import InputError

# Pixels. What lies farther out is a mistake of units, and rasterising walks along every pixel of an outline.
FARTHEST = 1e5
# Pixels. The box coding takes logarithms of a width, and thinner ones vanish in float32 (spacing 0.0005 at 4,096).
MIN_SIDE = 0.01


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


def check_name(entry, field, where):
    """A field that has to be a text, and not an empty one."""
    name = entry.get(field)
    if not isinstance(name, str) or not name:
        raise InputError(f"{where}: needs {field}, a text, found {name!r:.80}")
    return name


def check_reference(entry, field, where):
    """A field that has to be the id of something else in the file."""
    reference = entry.get(field)
    if type(reference) is not int:
        raise InputError(f"{where}: needs {field}, a whole number, found {reference!r:.80}")
    return reference


def entries_by_id(content, key, path):
    """Id -> entry of one of the file's lists ("images", ...), each an object with a whole number of its own as id."""
    entries = content.get(key)
    if not isinstance(entries, list):
        raise InputError(f"{path}: needs a list of {key}, found {entries!r:.80}; give a COCO annotation file")
    if not entries and key != "annotations":
        raise InputError(f"{path}: lists no {key}; give a file that does")
    found = {}
    for place, entry in enumerate(entries):
        number = entry.get("id") if isinstance(entry, dict) else None
        if type(number) is not int:
            raise InputError(f"{path}, {key}[{place}]: needs an id, a whole number, found {entry!r:.80}")
        if number in found:
            raise InputError(f"{path}, {key}[{place}]: id {number} is there twice; give every entry its own")
        found[number] = entry
    return found


def check_size(entry, where):
    """(width, height) of an image in pixels, or (None, None) where the entry has neither."""
    width, height = entry.get("width"), entry.get("height")
    if width is None and height is None:
        return None, None
    if type(width) is not int or type(height) is not int or min(width, height) <= 0 or width * height >= 2**31:
        raise InputError(
            f"{where}: width and height have to be whole numbers of pixels above 0, found {width!r:.40} and "
            f"{height!r:.40}; correct them"
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
        raise InputError(f"{where}: bbox has to be [x, y, width, height] in pixels, found {bbox!r:.80}")
    x, y, width, height = map(float, bbox)
    if width < 0 or height < 0:
        raise InputError(f"{where}: bbox {bbox} has a negative size; it has to be [x, y, width, height] in pixels")
    return x, y, x + width, y + height


def check_outline(segmentation, width, height, where):
    """A segmentation as it will be kept: polygons as a list of compact arrays, run lengths as they are."""
    if isinstance(segmentation, dict):
        _check_run_lengths(segmentation, width, height, where)
        return segmentation
    if not isinstance(segmentation, list):
        raise InputError(f"{where}: segmentation has to be polygons or run lengths, found {segmentation!r:.80}")
    for polygon in segmentation:
        if not isinstance(polygon, list) or not _are_coordinates(polygon):
            raise InputError(f"{where}: a polygon has to be [x, y, x, y, ...] in pixels, found {polygon!r:.80}")
        if len(polygon) < 6 or len(polygon) % 2:
            raise InputError(
                f"{where}: a polygon of {len(polygon)} numbers; it needs 3 points or more, each x and y: "
                f"{polygon!r:.80}; correct or remove it"
            )
    return [array("d", polygon) for polygon in segmentation]


def _are_coordinates(values):
    # The types are compared, as True is an int too; NaN and infinity, which Python's JSON has, fail the comparison.
    return {int, float}.issuperset(map(type, values)) and all(-FARTHEST <= value <= FARTHEST for value in values)


def _check_run_lengths(run_lengths, width, height, where):
    size, counts = run_lengths.get("size"), run_lengths.get("counts")
    if not isinstance(size, list) or len(size) != 2 or not isinstance(counts, str | list):
        raise InputError(f"{where}: run lengths need size [height, width] and counts, found {run_lengths!r:.80}")
    if size != [height, width]:
        raise InputError(
            f"{where}: its run lengths have size {size!r:.40} and the image [{height}, {width}] (height, width); "
            "correct the one or the other"
        )
    if isinstance(counts, str):
        whole = _total(counts) == width * height
    else:
        whole = all(type(count) is int and count >= 0 for count in counts) and sum(counts) == width * height
    if not whole:
        raise InputError(f"{where}: its run lengths are damaged, they don't cover {width}x{height} pixels; redo them")


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
