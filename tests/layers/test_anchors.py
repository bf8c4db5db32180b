import copy

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator as Reference
from torchvision.models.detection.image_list import ImageList

from core.layers.anchors import AnchorGenerator, base_anchors
from core.layers.boxes import decode_boxes

PYRAMID = ((32,), (64,), (128,), (256,), (512,))
RATIOS = ((0.5, 1.0, 2.0),) * 5


def maps(*grids, **options):
    return [torch.zeros(1, 1, *grid, **options) for grid in grids]


def reference(sizes, ratios, image_size, feature_maps):
    images = ImageList(torch.zeros(1, 3, *image_size), [image_size])
    return Reference(sizes, ratios)(images, feature_maps)[0]


def test_golden(golden):
    arrays = {name.removeprefix("anchors/"): torch.from_numpy(a) for name, a in golden("ops_detection").items()}
    layer = AnchorGenerator((32, 64, 128), (0.5, 1.0, 2.0))
    assert layer((64, 96), maps((8, 12), (4, 6), (2, 3))).equal(arrays["out"])
    for level, size in enumerate((32, 64, 128)):
        assert base_anchors((size,), (0.5, 1.0, 2.0)).equal(arrays[f"cell{level}"])
    assert AnchorGenerator(((16, 48),), ((0.5, 1.0),))((50, 70), maps((4, 5))).equal(arrays["two_sizes"])


@pytest.mark.parametrize(
    "sizes, ratios, image_size, grids",
    [
        (PYRAMID, RATIOS, (160, 224), [(40, 56), (20, 28), (10, 14), (5, 7), (3, 4)]),
        (PYRAMID, RATIOS, (32, 32), [(8, 8), (4, 4), (2, 2), (1, 1), (1, 1)]),
        (((10, 21.5), (33, 40)), ((0.3, 1.0, 3.3), (1.0, 2.0, 4.0)), (50, 71), [(7, 9), (4, 5)]),
    ],
)
def test_against_torchvision(sizes, ratios, image_size, grids):
    layer = AnchorGenerator(sizes, ratios)
    anchors = layer(image_size, maps(*grids))
    assert anchors.equal(reference(sizes, ratios, image_size, maps(*grids)))
    assert layer.anchors_per_location == Reference(sizes, ratios).num_anchors_per_location()
    assert len(anchors) == sum(n * h * w for n, (h, w) in zip(layer.anchors_per_location, grids, strict=True))


def test_worked_by_hand():
    """Size 8 with heights of 4 and 1 times the width: 4 x 16 and 8 x 8. Order: row, column, ratio."""
    anchors = AnchorGenerator((8,), (4.0, 1.0))((20, 20), maps((2, 2)))
    tall, square = torch.tensor([-2.0, -8.0, 2.0, 8.0]), torch.tensor([-4.0, -4.0, 4.0, 4.0])
    right, down = torch.tensor([10.0, 0.0, 10.0, 0.0]), torch.tensor([0.0, 10.0, 0.0, 10.0])
    expected = [tall, square, tall + right, square + right, tall + down, square + down]
    expected += [tall + right + down, square + right + down]
    assert anchors.equal(torch.stack(expected))


def test_strides_are_whole_and_those_of_the_picture():
    """A map may be smaller than the picture's size divided by its stride; another picture gives other anchors."""
    layer = AnchorGenerator((8,), (1.0,))
    assert layer((23, 35), maps((4, 8)))[-1].tolist() == [7 * 4 - 4, 3 * 5 - 4, 7 * 4 + 4, 3 * 5 + 4]
    assert layer((40, 80), maps((4, 8)))[-1].tolist() == [7 * 10 - 4, 3 * 10 - 4, 7 * 10 + 4, 3 * 10 + 4]


def test_empty_map_has_no_anchors():
    layer = AnchorGenerator((8, 16), (1.0,))
    assert layer((16, 16), maps((1, 1), (2, 0))).equal(layer((16, 16), maps((1, 1), (0, 0))))
    assert layer((16, 16), maps((1, 1), (2, 0))).shape == (1, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps_get_float32_anchors(dtype):
    layer = AnchorGenerator((8,), (1.0,))
    anchors = layer((4096, 8), maps((1024, 2), dtype=dtype))
    assert anchors.dtype == torch.float32 and anchors.equal(layer((4096, 8), maps((1024, 2))))
    assert layer((8, 8), maps((1, 1), dtype=torch.float64)).dtype == torch.float64


def test_anchors_of_a_size_are_made_once_and_usable_in_training_after_inference():
    layer = AnchorGenerator((8,), (1.0,))
    with torch.inference_mode():
        first = layer((48, 40), maps((6, 5)))
    assert layer((48, 40), maps((6, 5))) is first and not first.is_inference()
    assert copy.deepcopy(layer)((48, 40), maps((6, 5))).equal(first)
    deltas = torch.zeros(30, 4, requires_grad=True)
    decode_boxes(deltas, first).sum().backward()  # saves the anchors for the backward pass
    assert deltas.grad.abs().sum() > 0


def test_levels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="sizes are of 2 levels, aspect ratios of 3"):
        AnchorGenerator(((8,), (16,)), ((1.0,),) * 3)
    with pytest.raises(ValueError, match="for 2 feature maps, 1 were given"):
        AnchorGenerator((8, 16), (1.0,))((8, 8), maps((1, 1)))
