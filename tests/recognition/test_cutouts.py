import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from core.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from recognition.cutouts import MEAN_COLOR, cut_out


def picture(width, height):
    """Every pixel tells where it is: (x, y, 200)."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, np.full_like(rows, 200)], axis=2).astype(np.uint8))


def encoded(mask):
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))


def test_the_box_with_its_margin():
    cut = cut_out(picture(100, 60), (20, 10, 60, 30), margin=0.1)  # 4 and 2 pixels on each side
    assert cut.size == (48, 24)
    assert cut.getpixel((0, 0)) == (16, 8, 200) and cut.getpixel((47, 23)) == (63, 31, 200)


def test_around_the_mask_is_the_mean_colour_which_normalisation_makes_zero():
    mask = np.zeros((60, 100), bool)
    mask[12:20, 30:50] = True
    cut = np.asarray(cut_out(picture(100, 60), (20, 10, 60, 30), encoded(mask), margin=0))
    assert cut.shape == (20, 40, 3)
    inside = mask[10:30, 20:60]
    assert (cut[~inside] == MEAN_COLOR).all()
    assert np.array_equal(cut[inside], np.asarray(picture(100, 60))[mask])
    assert np.abs((np.array(MEAN_COLOR) / 255 - IMAGENET_MEAN) / IMAGENET_STD).max() < 0.01


def test_run_lengths_as_text_and_as_list_are_the_same():
    mask = np.zeros((6, 4), bool)
    mask[2:5, 1:3] = True
    counts = [8, 3, 3, 3, 7]  # by columns
    as_list = cut_out(picture(4, 6), (0, 0, 4, 6), {"size": [6, 4], "counts": counts})
    as_text = cut_out(picture(4, 6), (0, 0, 4, 6), encoded(mask))
    assert as_list.tobytes() == as_text.tobytes()


def test_without_a_pixel_of_the_mask_in_the_box_nothing_is_hidden():
    mask = np.zeros((60, 100), bool)
    plain = cut_out(picture(100, 60), (20, 10, 60, 30))
    assert cut_out(picture(100, 60), (20, 10, 60, 30), encoded(mask)).tobytes() == plain.tobytes()
    mask[50:, 80:] = True  # elsewhere
    assert cut_out(picture(100, 60), (20, 10, 60, 30), encoded(mask)).tobytes() == plain.tobytes()


@pytest.mark.parametrize(
    "box, expected",
    [
        ((0, 0, 9, 7), (9, 7)),  # all of it
        ((3.2, 3.4, 3.6, 3.9), (1, 1)),  # less than a pixel
        ((4, 4, 4, 4), (1, 1)),  # no area
        ((-20, 2, 50, 3), (9, 1)),  # beyond both sides
        ((8.9, 6.9, 30, 30), (1, 1)),
        ((30, 30, 40, 40), (1, 1)),  # outside
        ((-9, -9, -3, -3), (1, 1)),
    ],
)
def test_any_box_gives_a_picture(box, expected):
    mask = encoded(np.ones((7, 9), bool))
    assert cut_out(picture(9, 7), box, margin=0).size == cut_out(picture(9, 7), box, mask, margin=0).size == expected
    assert cut_out(picture(1, 1), box).size == (1, 1)


def test_a_mask_of_another_picture_is_refused():
    with pytest.raises(ValueError, match="a mask of 9x7 pixels for a picture of 7x9"):
        cut_out(picture(7, 9), (0, 0, 2, 2), encoded(np.ones((7, 9), bool)))
