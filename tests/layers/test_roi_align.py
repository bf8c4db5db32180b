import math
from collections import OrderedDict

import pytest
import torch
import torchvision.ops
from torch.autograd import gradcheck

from core.layers import roi_align as module
from core.layers.roi_align import MultiScaleRoIAlign, assign_levels, roi_align, weighted_sums

MODES = [(sampling, aligned) for sampling in (-1, 0, 1, 2, 3) for aligned in (False, True)]


@pytest.fixture
def arrays(golden):
    return {name: torch.from_numpy(array) for name, array in golden("ops_detection").items()}


def random_rois(count, seed=0, pictures=2, spread=130, size=90):
    """(count, 5) boxes of a picture of about 132 x 84 pixels; some reach beyond it."""
    generator = torch.Generator().manual_seed(seed)
    number = torch.randint(pictures, (count, 1), generator=generator).float()
    corner = torch.rand(count, 2, generator=generator) * spread - 20
    return torch.cat((number, corner, corner + torch.rand(count, 2, generator=generator) * size + 1), dim=1)


def nasty_rois():
    """The whole picture, far beyond it, outside, without area, smaller than a position, at the very edge, very long."""
    boxes = [
        [0, 0, 0, 132, 84],
        [1, -500, -500, 1000, 900],
        [1, 200, 200, 300, 300],
        [0, -90, 10, -20, 40],
        [0, 5, 5, 5, 5],
        [1, 131, 83, 132, 84],
        [0, 8.3, 9.1, 9.0, 9.2],
        [1, -4, -4, 4, 4],
        [0, 100, 60, 136, 88],
        [1, 0, 10, 20000, 12],
        [0, 60, -3000, 61, 3000],
    ]
    return torch.tensor(boxes, dtype=torch.float32)


def both(features, rois, *options):
    """Output and gradient of ours and of torchvision's, for the same random gradient of the output."""
    results = []
    for function in (roi_align, torchvision.ops.roi_align):
        leaf = features.detach().clone().requires_grad_()
        out = function(leaf, rois, *options)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        results.append((out.detach(), *torch.autograd.grad((out * weight).sum(), leaf)))
    return results


# ------------------------------------------------------------------------------------------------- against references


@pytest.mark.parametrize("sampling, aligned", [(2, False), (-1, False), (2, True), (-1, True)])
def test_golden(arrays, sampling, aligned):
    name = f"roi_align/aligned_{aligned}_sampling_{sampling}"
    features = arrays["roi_align/features"].requires_grad_()
    out = roi_align(features, arrays["roi_align/rois"], (3, 2), 0.25, sampling, aligned)
    torch.testing.assert_close(out, arrays[f"{name}/out"], rtol=1e-5, atol=1e-5)
    (out * arrays["roi_align/loss_weight"]).sum().backward()
    torch.testing.assert_close(features.grad, arrays[f"{name}/grad_features"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampling, aligned", MODES)
@pytest.mark.parametrize("size", [7, (3, 5), 1])
def test_equals_torchvision(sampling, aligned, size):
    features = torch.randn(2, 5, 21, 33, generator=torch.Generator().manual_seed(0))
    rois = torch.cat((random_rois(40), nasty_rois()))
    (ours, gradient), (theirs, their_gradient) = both(features, rois, size, 0.25, sampling, aligned)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("sampling, aligned", [(-1, False), (1, False), (2, False), (1, True), (2, True)])
def test_reversed_boxes(sampling, aligned):
    # aligned and as many samples as needed: torchvision asks for a vector of negative length
    rois = torch.tensor([[0, 40, 30, 20, 50], [1, 20, 50, 40, 30], [1, 60, 40, 10, 8.0]])
    features = torch.randn(2, 3, 21, 33)
    (ours, gradient), (theirs, their_gradient) = both(features, rois, 5, 0.25, sampling, aligned)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-5, atol=1e-5)


def test_a_reversed_box_without_samples_is_0():
    out = roi_align(torch.ones(1, 2, 8, 8), torch.tensor([[0, 6, 6, 2, 2.0]]), 3, sampling_ratio=-1, aligned=True)
    assert (out == 0).all()


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 2, 1, 9), (2, 2, 7, 1)])
@pytest.mark.parametrize("sampling", [-1, 2])
def test_one_pixel_features(shape, sampling):
    rois = torch.tensor([[0, 0, 0, 1, 1], [0, -1, -1, 3, 5], [0, 0.5, 0.5, 0.75, 0.75], [0, 2, 2, 3, 3.0]])
    rois[::2, 0] = shape[0] - 1
    (ours, gradient), (theirs, their_gradient) = both(torch.randn(shape), rois, 2, 1.0, sampling)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------------- worked by hand


def test_bins_of_a_plane():
    """On features that grow evenly, x + 10 y, the mean of a bin's samples is the value at its centre."""
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    plane = (x + 10 * y)[None, None]
    box = torch.tensor([[8.0, 4, 32, 28]])  # at stride 4: x from 2 to 8, y from 1 to 7, bins of 3
    for sampling in (-1, 1, 2, 5):
        out = roi_align(plane, [box], 2, 0.25, sampling)
        torch.testing.assert_close(out[0, 0], torch.tensor([[28.5, 31.5], [58.5, 61.5]]))
        shifted = roi_align(plane, [box], 2, 0.25, sampling, aligned=True)  # half a position up and left
        torch.testing.assert_close(shifted[0, 0], torch.tensor([[23.0, 26.0], [53.0, 56.0]]))


def test_taps_and_gradient_of_one_sample():
    features = torch.zeros(1, 1, 4, 4, requires_grad=True)
    out = roi_align(features, torch.tensor([[0, 0.75, 1.5, 1.75, 2.5]]), 1, sampling_ratio=1)  # sample x 1.25, y 2
    out.sum().backward()
    expected = torch.zeros(4, 4)
    expected[2, 1:3] = torch.tensor([0.75, 0.25])
    torch.testing.assert_close(features.grad[0, 0], expected)


def test_gradcheck():
    features = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    rois = random_rois(5, spread=24, size=20).double()
    for sampling, aligned in MODES:
        assert gradcheck(lambda x, s=sampling, a=aligned: roi_align(x, rois, (2, 3), 0.25, s, a), features)


def test_a_list_of_boxes_is_one_tensor_with_numbers():
    rois = random_rois(9)
    rois = rois[rois[:, 0].argsort(stable=True)]
    boxes = [rois[rois[:, 0] == i, 1:] for i in range(2)]
    features = torch.randn(2, 3, 21, 33)
    assert torch.equal(roi_align(features, boxes, 4, 0.25), roi_align(features, rois, 4, 0.25))


def test_weighted_sums_are_a_matrix_product():
    matrix = torch.rand(6, 9, generator=torch.Generator().manual_seed(0))
    matrix[matrix < 0.6] = 0
    matrix[2] = 0  # a row without entries
    columns, values = matrix.nonzero()[:, 1], matrix[matrix != 0]
    offsets = torch.cat((torch.zeros(1, dtype=torch.long), (matrix != 0).sum(1).cumsum(0)))
    rows = torch.randn(9, 4)
    for dtype in (torch.float32, torch.float64):  # an embedding bag, and gather and sum
        out = weighted_sums(rows.to(dtype), columns, values.to(dtype), offsets)
        torch.testing.assert_close(out, (matrix @ rows).to(dtype), rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------------------------------- types, layouts, memory


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_float32(dtype):
    features = torch.randn(2, 3, 21, 33).to(dtype)
    rois = random_rois(20)
    leaf, exact = features.clone().requires_grad_(), features.float().requires_grad_()
    out, expected = roi_align(leaf, rois, 3, 0.25, 2), roi_align(exact, rois, 3, 0.25, 2)
    assert out.dtype == dtype and torch.equal(out, expected.to(dtype))
    weight = torch.randn(out.shape).to(dtype)
    out.backward(weight)
    expected.backward(weight.float())
    assert leaf.grad.dtype == dtype and torch.equal(leaf.grad, exact.grad.to(dtype))


def test_half_precision_boxes():
    features, rois = torch.randn(2, 3, 21, 33), random_rois(20).half()
    assert torch.equal(roi_align(features, rois, 3, 0.25, 2), roi_align(features, rois.float(), 3, 0.25, 2))


def test_autocast_keeps_float32():
    features, rois = torch.randn(2, 3, 21, 33), random_rois(20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = roi_align(features, rois, 3, 0.25, 2)
    assert torch.equal(out, roi_align(features, rois, 3, 0.25, 2))


def test_channels_last_is_not_copied():
    features = torch.randn(2, 8, 21, 33)
    last = features.to(memory_format=torch.channels_last)
    assert module._rows(last, torch.float32).data_ptr() == last.data_ptr()
    for sampling in (-1, 2):
        ours, gradient = both(features, random_rois(9), 3, 0.25, sampling)[0]
        again, gradient_again = both(last, random_rois(9), 3, 0.25, sampling)[0]
        assert torch.equal(ours, again) and torch.equal(gradient, gradient_again)


@pytest.mark.parametrize("sampling", [-1, 2])
def test_chunks_change_nothing(monkeypatch, sampling):
    features, rois = torch.randn(2, 3, 21, 33), torch.cat((random_rois(30), nasty_rois()))
    whole, gradient = both(features, rois, 3, 0.25, sampling)[0]
    calls = []
    matrix = module._matrix
    monkeypatch.setattr(module, "_matrix", lambda *args: calls.append(args) or matrix(*args))
    monkeypatch.setattr(module, "MAX_ENTRIES", 2000)
    chunked, chunked_gradient = both(features, rois, 3, 0.25, sampling)[0]
    assert len(calls) > 4
    torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(chunked_gradient, gradient, rtol=1e-5, atol=1e-6)


def test_a_giant_box_reads_only_what_is_on_the_map():
    rois = torch.tensor([[0, -1e9, -1e9, 1e9, 1e9], [0, 0, 0, 1e6, 1e6]])
    features = torch.ones(1, 1, 20, 20, requires_grad=True)
    out = roi_align(features, rois, 7)  # 8 * 10^16 samples
    assert out.isfinite().all() and out.min() >= 0 and out.max() < 0.01
    assert out[1, 0, 0, 0] > 0
    out.sum().backward()
    assert features.grad.isfinite().all()


def test_boxes_that_are_not_numbers_give_nan():
    rois = torch.tensor([[0, 0, 0, 8, 8], [0, math.nan, 1, 5, 5], [0, 1, 1, math.nan, 5]])
    for sampling in (-1, 2):
        out = roi_align(torch.ones(1, 1, 9, 9), rois, 2, 1.0, sampling)
        assert out[0].isfinite().all() and out[1:].isnan().all()
    rois[1:] = torch.tensor([0, 1, 1, math.inf, 5])
    for sampling in (-1, 2):  # no crash and no endless samples
        assert roi_align(torch.ones(1, 1, 9, 9), rois, 2, 1.0, sampling)[0].isfinite().all()


@pytest.mark.parametrize("sampling", [-1, 2])
@pytest.mark.parametrize("boxes", [torch.zeros(0, 5), [torch.zeros(0, 4)] * 2])
def test_no_boxes(boxes, sampling):
    features = torch.randn(2, 3, 8, 8, requires_grad=True)
    out = roi_align(features, boxes, (7, 5), 0.25, sampling)
    assert out.shape == (0, 3, 7, 5)
    out.sum().backward()
    assert torch.equal(features.grad, torch.zeros(2, 3, 8, 8))


FEATURES, FOUR = torch.rand(2, 3, 8, 8), torch.tensor([[1.0, 1, 5, 6]])
FIVE = torch.tensor([[1.0, 1, 1, 5, 6]])


@pytest.mark.parametrize(
    "features, boxes, message",
    [
        (FEATURES, [FOUR], "boxes are of 1 pictures, features of 2"),
        (FEATURES, [FOUR] * 3, "boxes are of 3 pictures, features of 2"),
        (FEATURES, [FOUR, FIVE], "boxes[1] has shape (1, 5), expected (N, 4)"),
        (FEATURES, [FOUR, FOUR[0]], "boxes[1] has shape (4,), expected (N, 4)"),
        (FEATURES, FOUR, "boxes have shape (1, 4), expected (R, 5)"),
        (FEATURES, FIVE * 2, "boxes[:, 0] names pictures other than 0 .. 1"),
        (FEATURES, FIVE * -1, "boxes[:, 0] names pictures other than 0 .. 1"),
        (FEATURES, FIVE * 0.5, "boxes[:, 0] names pictures other than 0 .. 1"),
        (FEATURES, FIVE * math.nan, "boxes[:, 0] names pictures other than 0 .. 1"),
        (FEATURES[0], [FOUR] * 2, "features have shape (3, 8, 8), expected (B, C, H, W)"),
        (FEATURES.byte(), [FOUR] * 2, "features are torch.uint8, expected floats"),
    ],
)
def test_other_shapes_are_refused_by_name(features, boxes, message):
    with pytest.raises(ValueError) as caught:
        roi_align(features, boxes, 7)
    assert str(caught.value) == message


def test_the_pyramid_refuses_other_boxes():
    pool, maps, sizes = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2), pyramid(), [(256, 384)] * 2
    for boxes, message in (
        ([FOUR], "boxes are of 1 pictures, features of 2"),
        ([FIVE, FOUR], r"boxes\[0\] has shape \(1, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            pool(maps, boxes, sizes)
    with pytest.raises(ValueError, match=r"boxes have shape \(1, 5\), expected \(N, 4\)"):
        assign_levels(FIVE, 2, 5)


# -------------------------------------------------------------------------------------------------------- pyramid


def pyramid(dtype=torch.float32, requires_grad=False, names="0123"):
    generator = torch.Generator().manual_seed(0)
    maps = OrderedDict()
    for name, stride in zip(names, (4, 8, 16, 32), strict=True):
        map = torch.randn(2, 3, 256 // stride, 384 // stride, generator=generator).to(dtype)
        maps[name] = map.requires_grad_(requires_grad)
    maps["pool"] = torch.full((2, 3, 4, 6), math.nan)  # ignored
    return maps


def pyramid_boxes():
    rois = torch.cat((random_rois(30, spread=300, size=60), random_rois(30, seed=1, spread=200, size=380)))
    return [rois[rois[:, 0] == i, 1:].clamp(min=0, max=256) for i in range(2)]


def test_golden_pyramid(arrays):
    maps = {f"p{i}": arrays[f"multiscale/feature{i}"] for i in range(4)}
    size = tuple(arrays["multiscale/image_size"].tolist())
    out = MultiScaleRoIAlign(list(maps), 3, 2)(maps, [arrays["multiscale/boxes"]], [size])
    torch.testing.assert_close(out, arrays["multiscale/out"], rtol=1e-5, atol=1e-5)
    levels = assign_levels(arrays["multiscale/boxes"], 2, 5)
    assert torch.equal(levels, arrays["multiscale/levels"].long())


@pytest.mark.parametrize("sampling", [-1, 2])
@pytest.mark.parametrize("sizes", [[(256, 384), (256, 300)], [(250, 333), (201, 380)]])
def test_pyramid_equals_torchvision(sampling, sizes):
    names, boxes = ["0", "1", "2", "3"], pyramid_boxes()
    ours, theirs = pyramid(requires_grad=True), pyramid(requires_grad=True)
    out = MultiScaleRoIAlign(names, 7, sampling)(ours, boxes, sizes)
    expected = torchvision.ops.MultiScaleRoIAlign(names, 7, sampling)(theirs, boxes, sizes)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(out.shape)
    out.backward(weight)
    expected.backward(weight)
    for name in names:
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, rtol=1e-5, atol=2e-5)


def test_pyramid_of_a_thin_picture():
    """22 rows are padded to 32: the rows alone would say that the map of stride 4 has stride 2 or 3."""
    maps = {"a": torch.randn(1, 2, 8, 336), "b": torch.randn(1, 2, 4, 168)}
    box = torch.tensor([[100.0, 2, 160, 20]])
    out = MultiScaleRoIAlign(["a", "b"], 2, 2)(maps, [box], [(22, 1333)])
    torch.testing.assert_close(out, roi_align(maps["a"], [box], 2, 0.25, 2))


def test_levels_without_boxes_get_a_gradient_of_0():
    maps = pyramid(requires_grad=True)
    boxes = [torch.tensor([[10.0, 10, 60, 60]]), torch.zeros(0, 4)]
    MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)(maps, boxes, [(256, 384)] * 2).sum().backward()
    assert maps["0"].grad[0].abs().sum() > 0 and (maps["0"].grad[1] == 0).all()
    for name in "123":
        assert torch.equal(maps[name].grad, torch.zeros_like(maps[name]))


def test_pyramid_without_boxes():
    maps = pyramid(requires_grad=True)
    out = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)(maps, [torch.zeros(0, 4)] * 2, [(256, 384)] * 2)
    assert out.shape == (0, 3, 7, 7)
    out.sum().backward()
    assert all((maps[name].grad == 0).all() for name in "0123")


def test_pyramid_in_half_precision():
    boxes, sizes = pyramid_boxes(), [(256, 384)] * 2
    pool = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    halves = pyramid(torch.float16)
    exact = {name: map.float() for name, map in halves.items()}
    assert torch.equal(pool(halves, boxes, sizes), pool(exact, boxes, sizes).half())


def test_levels_by_hand():
    sides = torch.tensor([0.0, 1, 111.9, 112, 223.9, 224, 447, 448, 5000])
    boxes = torch.stack((torch.zeros(9), torch.zeros(9), sides, sides), dim=1)
    assert assign_levels(boxes, 2, 5).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert assign_levels(boxes[:0], 2, 5).tolist() == []
    assert assign_levels(torch.tensor([[0, 0, math.nan, 5], [9, 9, 3, 20]]), 2, 5).tolist() == [0, 0]
