"""One object cut out of a picture: its box with a little room, and what is not the object hidden."""

import math

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from core.data.coco import encode_mask
from core.data.transforms import IMAGENET_MEAN

# What hides the background: 0 once the picture is normalised, so a network sees nothing there.
MEAN_COLOR = tuple(round(255 * value) for value in IMAGENET_MEAN)


def cut_out(picture, box, rle=None, margin=0.05):
    """The object in `box` as a picture of its own.

    Args:
        picture: PIL image, mode RGB.
        box: (x1, y1, x2, y2) in pixels; what lies outside of the picture is left out, and at least one pixel remains.
        rle: COCO run lengths of a mask of the whole picture: around the mask the cut-out has the colour `MEAN_COLOR`.
            A mask without a pixel in the cut-out hides nothing.
        margin: room on each side, in fractions of the box's width and height.

    Returns:
        PIL image, mode RGB.

    Raises:
        ValueError: the mask is of a picture of another size.
    """
    x1, y1, x2, y2 = _grown(box, margin, *picture.size)
    cut = picture.crop((x1, y1, x2, y2))
    if rle is None:
        return cut
    if tuple(rle["size"]) != (picture.height, picture.width):
        size = f"{rle['size'][1]}x{rle['size'][0]}"
        raise ValueError(f"a mask of {size} pixels for a picture of {picture.width}x{picture.height}")
    mask = coco_mask.decode(encode_mask(rle, picture.width, picture.height))[y1:y2, x1:x2]  # (h, w) of 0 and 1
    if not mask.any():
        return cut
    hidden = Image.new("RGB", cut.size, MEAN_COLOR)
    hidden.paste(cut, mask=Image.fromarray(np.ascontiguousarray(mask) * np.uint8(255)))
    return hidden


def _grown(box, margin, width, height):
    """Whole pixels (x1, y1, x2, y2) of a box with its margin, within a picture of width x height, none of it empty."""
    x1, y1, x2, y2 = box
    across, down = margin * (x2 - x1), margin * (y2 - y1)
    x1, x2 = _within(x1 - across, x2 + across, width)
    y1, y2 = _within(y1 - down, y2 + down, height)
    return x1, y1, x2, y2


def _within(start, end, size):
    """The pixels that [start, end) touches, from 0 to `size`; one at least."""
    start = min(max(math.floor(start), 0), size - 1)
    return start, min(max(math.ceil(end), start + 1), size)
