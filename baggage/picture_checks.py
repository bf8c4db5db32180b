"""What is in the files of a baggage set: sizes, colours, boxes and masks against the pictures, copies of each other.

measures = measure_pictures(survey.files)
survey.faults += picture_faults(survey, measures) + copy_faults(survey, measures)
"""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import ImageStat
from pycocotools import mask as coco_mask
from tqdm import tqdm

from baggage.faults import make_fault
from baggage.perceptual_hash import find_copies, picture_grids
from core.data.coco import encode_mask
from core.data.coco_checks import check_outline
from core.data.images import SWAPS_SIDES, bits_in_use, open_image, read_stored_image
from core.data.samples import clip_box
from core.errors import InputError

MIN_SIDE = 32  # pixels
# Grey levels of 0 .. 255: the standard deviation of each channel of a picture of one colour. The noise of a camera with
# its lid on stays below it, the dullest picture of a black bag lies far above.
FLAT = 3.0
FILLED = 16  # grey levels of 0 .. 255: a picture of 16 bits that stays below, by the bits of its set, is nearly black
MARGIN = 1.0  # pixels that a box may reach out: some count its last pixel as inside, some round


class Measure(NamedTuple):
    """What is kept of a picture. size: upright, stored: as in the file, (width, height). flat: of one colour.

    highest: the highest value of one with 16 bits that is nearly black beside others of its set, None of all others.
    box_share, mask_share: how much of the picture they cover, 0 .. 1; None where there is none, or none that fits.
    mask_area: pixels of the mask; None where there is none that fits, and where its run lengths are damaged.
    bits: of 16 those that all pictures together use.
    """

    size: tuple[int, int]
    stored: tuple[int, int]
    flat: bool
    highest: int | None
    grid: np.ndarray  # uint8 (32, 32)
    colors: np.ndarray  # uint8 (8, 8, 3)
    box_share: float | None
    mask_area: int | None
    bits: int

    @property
    def mask_share(self):
        return None if self.mask_area is None else self.mask_area / (self.size[0] * self.size[1])


def measure_pictures(pictures, num_threads=8):
    """Read every picture once: for each its Measure, the InputError that names what is wrong, or None where it lacks.

    Memory is 1.3 kB for each picture.
    """
    bits = bits_in_use([picture.path for picture in pictures if picture.exists], print)

    def measure(picture):
        if not picture.exists:
            return None
        try:
            stored, turn = read_stored_image(picture.path, bits)
        except InputError as error:
            return error
        flat = max(ImageStat.Stat(stored).stddev) < FLAT
        width, height = stored.size
        size = (height, width) if turn in SWAPS_SIDES else (width, height)
        grids = picture_grids(stored if turn is None else stored.transpose(turn))
        fits = picture.mask and tuple(picture.mask["size"][::-1]) == stored.size
        area = mask_area(picture) if fits else None
        highest = _highest_of_few_bits(picture.path, stored)
        return Measure(size, stored.size, flat, highest, *grids, _box_share(picture.box, stored.size), area, bits)

    with ThreadPoolExecutor(num_threads) as pool:  # decoding releases the interpreter's lock
        return list(tqdm(pool.map(measure, pictures), "reading pictures", len(pictures), unit="img", disable=None))


def _highest_of_few_bits(path, stored):
    """`Measure.highest`. stored: the picture (PIL, RGB) as training reads it, by the bits that the set uses.

    One that is of one colour over its own range, too, has no wrong bit depth. Of colour with 16 bits Pillow keeps no
    more than the high byte, so grey alone is looked at.
    """
    if max(high for _, high in stored.getextrema()) >= FILLED:
        return None
    with open_image(path) as image:
        values = np.asarray(image) if image.mode.startswith("I") else np.zeros(1)
    highest = int(values.max())
    return highest if values.std() * 255 >= FLAT * max(highest, 255) else None


def picture_faults(survey, measures, min_side=MIN_SIDE):
    """What is wrong with each picture by itself, and sizes, boxes and masks that don't fit it.

    measures: one for each of `survey.files`.
    """
    faults = []
    for picture, measure in zip(survey.files, measures, strict=True):
        known, where = len(faults), survey.key(picture) if picture.exists else None
        if isinstance(measure, InputError):
            faults.append(make_fault("unreadable", where, str(measure).removeprefix(f"{picture.path}: ")))
            measure = None
        if measure is not None:
            width, height = measure.size
            if measure.highest is not None:
                message = f"its values reach {measure.highest:,} of {2**measure.bits - 1:,}"
                message += ", so training sees it nearly black; scale them"
                faults.append(make_fault("wrong_bit_depth", where, message))
            elif measure.flat:
                faults.append(make_fault("single_coloured", where, f"{width}x{height} pixels of one colour"))
            if min(width, height) < min_side:
                faults.append(make_fault("tiny", where, f"{width}x{height} pixels; a side of {min_side} is the least"))
            if picture.size not in (None, measure.size, measure.stored):
                message = f"the entry says {picture.size[0]}x{picture.size[1]} pixels, the picture has {width}x{height}"
                faults.append(make_fault("wrong_size", picture.where, message))
        size = measure.stored if measure else picture.size
        if size and picture.box:
            faults += _box_faults(picture, size)
        if picture.mask:
            faults += _mask_faults(picture, size, measure)
        paths = (where,) if picture.exists else ()
        faults[known:] = [fault._replace(paths=paths) for fault in faults[known:]]
    return faults


def _box_faults(picture, size):
    x1, y1, x2, y2 = picture.box
    if min(x1, y1) >= -MARGIN and x2 <= size[0] + MARGIN and y2 <= size[1] + MARGIN:
        return []
    share = "partly" if clip_box(picture.box, *size) else "wholly"
    box = ", ".join(f"{value:g}" for value in picture.box)
    message = f"the box ({box}) lies {share} outside the picture of {size[0]}x{size[1]} pixels"
    return [make_fault("box_outside", picture.where, message)]


def _mask_faults(picture, size, measure):
    height, width = picture.mask["size"]
    if size and (width, height) != tuple(size):
        message = f"its mask is for {width}x{height} pixels, the picture has {size[0]}x{size[1]}"
        return [make_fault("mask_of_another_size", picture.where, message)]
    area = measure.mask_area if measure else mask_area(picture)
    if area == 0:
        return [make_fault("mask_damaged", picture.where, "its mask is empty")]
    if area is None:
        message = f"the run lengths of its mask are damaged, they don't cover {width}x{height} pixels"
        return [make_fault("mask_damaged", picture.where, message)]
    return []


def mask_area(picture):
    """Pixels of the mask, or None where its run lengths are damaged."""
    height, width = picture.mask["size"]
    if (height, width) != (int(height), int(width)):
        return None
    height, width = int(height), int(width)
    run_lengths = picture.mask | {"size": [height, width]}
    try:
        check_outline(run_lengths, width, height, picture.where)
    except InputError:
        return None
    return int(coco_mask.area(encode_mask(run_lengths, width, height)))


def _box_share(box, size):
    """How much of a stored picture of `size` (width, height) its box covers, or None where none of it does."""
    clipped = box and clip_box(box, *size)
    return (clipped[2] - clipped[0]) * (clipped[3] - clipped[1]) / (size[0] * size[1]) if clipped else None


def copy_faults(survey, measures, **limits):
    """Pictures that are copies of each other, by `find_copies` and its limits; across splits they leak.

    measures: one for each of `survey.files`.
    A picture of one colour is left out: it is a copy of any other, and named already.
    """
    kept = [
        (picture, measure)
        for picture, measure in zip(survey.files, measures, strict=True)
        if isinstance(measure, Measure) and not measure.flat
    ]
    if not kept:
        return []
    grids, colors = (np.stack([getattr(measure, name) for _, measure in kept]) for name in ("grid", "colors"))
    faults = []
    for group in find_copies(grids, colors, **limits):
        pictures = [kept[index][0] for index in group]
        parts = list(dict.fromkeys(picture.part for picture in pictures if picture.part))
        names = {picture.identity: picture.name for picture in pictures if picture.identity is not None}
        paths = [survey.key(picture) for picture in pictures]
        others = ", ".join(paths[1:6]) + (f" and {len(paths) - 6} more" if len(paths) > 6 else "")
        message = f"the same picture as {others}"
        if len(names) > 1:
            message += f", under different identities: {', '.join(list(names.values())[:6])}"
        kind = "copies"
        if len(parts) > 1:
            kind, message = "copies_across_splits", f"{message}; in {' and '.join(parts)}"
            strays = [path for path, picture in zip(paths, pictures, strict=True) if picture.identity is None]
            if strays:
                message += f"; no entry lists {strays[0]}, which does no harm before one does"
        faults.append(make_fault(kind, paths[0], message, tuple(paths)))
    return faults
