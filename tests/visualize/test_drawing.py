"""core.visualize.drawing: by hand."""

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle_codec

from core.visualize.drawing import ink_on, outline_of, unpack_mask


def code(mask):
    return rle_codec.encode(np.asfortranarray(mask, np.uint8))


def test_a_mask_is_unpacked_around_what_it_covers():
    mask = np.zeros((6, 8))
    mask[2:4, 3:6] = [[1, 0, 1], [1, 1, 1]]
    picture, corner = unpack_mask(code(mask), 1, 0)
    assert corner == (3, 2) and np.array_equal(np.asarray(picture), 255 * mask[2:4, 3:6])
    picture, corner = unpack_mask(code(mask), 2, 3)  # twice as large, then 3 pixels around it
    assert corner == (3, 1) and picture.size == (6 + 6, 4 + 6)
    assert np.array_equal(np.asarray(picture)[3:-3, 3:-3], 255 * mask[2:4, 3:6].repeat(2, 0).repeat(2, 1))
    assert np.count_nonzero(picture) == 4 * 5


def test_an_empty_mask_is_no_picture():
    assert unpack_mask(code(np.zeros((6, 8))), 2, 3) == (None, (0, 0))


def test_an_outline_lies_on_both_sides_of_the_edge():
    step = np.zeros((40, 40), np.uint8)
    step[:, 20:] = 255
    row = np.asarray(outline_of(Image.fromarray(step), 2))[20].astype(int)
    assert (row[18:22] > 200).all() and not row[:16].any() and not row[24:].any()
    assert abs(row - row[::-1]).max() <= 2


@pytest.mark.parametrize(
    ("color", "ink"), [((240, 228, 66), "#222222"), ((0, 114, 178), "#ffffff"), ((0, 255, 0), "#222222")]
)
def test_ink_can_be_read(color, ink):
    assert ink_on(color) == ink
