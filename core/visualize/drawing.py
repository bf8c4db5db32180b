"""Drawing over pictures: what is drawn of a mask, and the ink that can be read on a colour."""

from functools import lru_cache
from statistics import NormalDist

import numpy as np
from PIL import Image, ImageFilter
from pycocotools import mask as rle_codec

from core.visualize.sheet import INK


def unpack_mask(rle: dict, factor: int, margin: int) -> tuple[Image.Image | None, tuple[int, int]]:
    """The part of a mask in which it isn't empty, with a margin, enlarged: (L picture of 0 and 255, its corner)."""
    left, top, width, height = (int(value) for value in rle_codec.toBbox(rle))
    if width == 0 or height == 0:
        return None, (0, 0)
    full = rle_codec.decode(rle)  # (H, W), by columns
    cut = np.ascontiguousarray(full[top : top + height, left : left + width]) * np.uint8(255)
    mask = Image.fromarray(cut).resize((width * factor, height * factor), Image.Resampling.NEAREST)
    padded = Image.new("L", (mask.width + 2 * margin, mask.height + 2 * margin))
    padded.paste(mask, (margin, margin))
    return padded, (left * factor - margin, top * factor - margin)


def outline_of(mask: Image.Image, half: float) -> Image.Image:
    """Where the edge of a mask is nearer than `half` pixels, smooth at the border.

    A step blurred by a Gaussian of width sigma is Phi(d / sigma) at distance d, so the blurred value tells d.
    """
    sigma = half + 0.5
    return mask.filter(ImageFilter.GaussianBlur(sigma)).point(_outline_table(half, sigma))


@lru_cache
def _outline_table(half: float, sigma: float) -> list[int]:
    distances = [abs(sigma * NormalDist().inv_cdf(min(max(value, 0.5), 254.5) / 255)) for value in range(256)]
    return [round(255 * min(max(half + 0.5 - distance, 0.0), 1.0)) for distance in distances]


def ink_on(color: tuple[int, int, int]) -> str:
    """Dark or white, whichever can be read on this colour (luminance of ITU-R BT.601)."""
    red, green, blue = color
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#ffffff"
