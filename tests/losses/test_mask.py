"""Mask targets and mask losses: golden numbers, hand-worked cases, empty input, gradients, extreme values."""

import math

import pytest
import torch
from torch.nn import functional as F

from core.errors import InputError
from core.losses.mask import CombinedMaskLoss, FocalMaskLoss, GaussianMaskRegressionLoss, box_masks, gaussian_masks

VALUE, GRADIENT = dict(rtol=1e-5, atol=0), dict(rtol=0, atol=1e-7)  # the tolerances of the golden file
KINDS = ["mse", "l1", "smooth_l1"]
LOSSES = [
    *[GaussianMaskRegressionLoss(kind, threshold) for kind in KINDS for threshold in (0.0, 0.3)],
    FocalMaskLoss(),
    FocalMaskLoss(0.5, 0.0),
    CombinedMaskLoss(),
]


@pytest.fixture
def arrays(golden):
    return {key: torch.from_numpy(value.copy()) for key, value in golden("loss_mask").items()}


def value_and_gradient(function, prediction):
    prediction = prediction.detach().requires_grad_()
    value = function(prediction)
    return value.detach(), torch.autograd.grad(value, prediction)[0]


def assert_golden(arrays, case, function):
    value, gradient = value_and_gradient(function, arrays["pred"])
    torch.testing.assert_close(value, arrays[f"{case}/value"], **VALUE)
    torch.testing.assert_close(gradient, arrays[f"{case}/grad"], **GRADIENT)


def random_masks(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    prediction = torch.rand(shape, generator=generator, dtype=dtype) * 0.8 + 0.1
    return prediction.requires_grad_(), torch.rand(shape, generator=generator, dtype=dtype)


@pytest.mark.parametrize("ratio", [0.1, 0.3])
def test_gaussian_masks_golden(arrays, ratio):
    masks = gaussian_masks(arrays["boxes"], (24, 16), ratio)
    torch.testing.assert_close(masks, arrays[f"gaussian_sigma_ratio_{ratio}"], rtol=1e-5, atol=1e-7)


def test_gaussian_masks_by_hand():
    """Five columns at 0, 1/4 ... 1 and three rows at 0, 1/2, 1; sigma 1/4 across and 1/2 down."""
    (mask,) = gaussian_masks(torch.tensor([[0.0, 0.0, 0.5, 1.0]]), (3, 5), 0.5)
    across = [math.exp(-1 / 2), 1, math.exp(-1 / 2), math.exp(-2), math.exp(-9 / 2)]
    down = [math.exp(-1 / 2), 1, math.exp(-1 / 2)]
    expected = torch.tensor([[[row * column for column in across] for row in down]])
    torch.testing.assert_close(mask, expected)


def test_box_masks_by_hand():
    """A box on whole pixels covers exactly these; one without a pixel center in it covers none."""
    boxes = torch.tensor([[1 / 4, 1 / 3, 3 / 4, 1.0], [0.3, 0.4, 0.35, 0.45], [0.0, 0.0, 1.0, 1.0]])
    masks = box_masks(boxes, (3, 4))
    assert masks[0, 0].tolist() == [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0]]
    assert masks[1].sum() == 0
    assert masks[2].all()


@pytest.mark.parametrize(
    "make", [lambda boxes: gaussian_masks(boxes, (8, 6), 0.1), lambda boxes: box_masks(boxes, (8, 6))]
)
def test_masks_of_no_boxes_and_of_boxes_without_area(make):
    assert make(torch.zeros(0, 4)).shape == (0, 1, 8, 6)
    flat = torch.tensor([[0.4, 0.2, 0.4, 0.8], [0.2, 0.6, 0.8, 0.6], [0.5, 0.5, 0.5, 0.5], [0.8, 0.2, 0.2, 0.8]])
    assert torch.equal(make(flat), torch.zeros(4, 1, 8, 6))
    tiny = torch.tensor([[0.5, 0.5, 0.5 + 1e-7, 0.5 + 1e-7], [0.0, 0.0, 1e-40, 1e-40]])
    assert make(tiny).isfinite().all()
    assert make(torch.rand(2, 4).half()).dtype == torch.float32


def test_gaussian_masks_gradient():
    boxes = torch.tensor([[0.1, 0.2, 0.7, 0.9], [0.3, 0.1, 0.5, 0.6]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda boxes: gaussian_masks(boxes, (4, 3), 0.3), boxes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threshold", ["0", "0.1"])
def test_regression_golden(arrays, kind, threshold):
    loss = GaussianMaskRegressionLoss(kind, float(threshold))
    assert_golden(arrays, f"{kind}_threshold_{threshold}", lambda p: loss(p, arrays["gaussian_sigma_ratio_0.3"]))


def test_regression_golden_special_cases(arrays):
    loss = GaussianMaskRegressionLoss("mse", 0.1)
    target = gaussian_masks(arrays["boxes"], (24, 16), 0.1)
    assert_golden(arrays, "mse_weight_2_sigma_0.1_threshold_0.1", lambda p: 2 * loss(p, target))
    below = torch.full_like(arrays["pred"], 0.05)
    assert_golden(arrays, "mse_threshold_0.1_nothing_above", lambda p: loss(p, below))


def test_focal_golden_on_targets_of_0_and_1(arrays):
    target = (arrays["gaussian_sigma_ratio_0.3"] > 0.5).float()
    assert_golden(arrays, "focal_binary_target", lambda p: FocalMaskLoss()(p, target))
    assert_golden(arrays, "focal_binary_alpha_0.5_gamma_1_weight_3", lambda p: 3 * FocalMaskLoss(0.5, 1.0)(p, target))


def original_focal(prediction, target):
    """The original: only a target of exactly 1 is foreground (alpha 1, gamma 2)."""
    probability = torch.where(target == 1, prediction, 1 - prediction)
    entropy = F.binary_cross_entropy(prediction, target, reduction="none")
    return ((1 - probability).square() * entropy).mean()


def test_focal_departs_from_the_original_on_soft_targets(arrays):
    """Where every pixel fits exactly, the original still pulls; ours is done, and prefers no other prediction."""
    target = arrays["gaussian_sigma_ratio_0.3"]
    assert_golden(arrays, "focal_gaussian_target", lambda p: original_focal(p, target))
    inside = target.clamp(0.01, 0.99)
    ours, gradient = value_and_gradient(lambda p: FocalMaskLoss()(p, inside), inside)
    _, original_gradient = value_and_gradient(lambda p: original_focal(p, inside), inside)
    assert ours == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))
    assert original_gradient.abs().max() > 1e-4


def test_combined_golden(arrays):
    """The golden sums are regression + w * original focal; with our focal in its place they are ours."""
    target = arrays["gaussian_sigma_ratio_0.1"]
    loss = CombinedMaskLoss()

    def with_original_focal(prediction):
        change = original_focal(prediction, target) - FocalMaskLoss()(prediction, target)
        return loss(prediction, target) + 0.5 * change

    assert_golden(arrays, "combined", with_original_focal)
    target = arrays["gaussian_sigma_ratio_0.3"]
    regression = GaussianMaskRegressionLoss("smooth_l1")
    assert_golden(arrays, "combined_smooth_l1", lambda p: 0.7 * regression(p, target) + 0.2 * original_focal(p, target))
    torch.testing.assert_close(
        CombinedMaskLoss("smooth_l1", 0.2)(arrays["pred"], target),
        regression(arrays["pred"], target) + 0.2 * FocalMaskLoss()(arrays["pred"], target),
    )


def test_losses_by_hand():
    prediction = torch.tensor([0.5, 0.5, 0.25, 1.0]).view(2, 1, 1, 2)
    target = torch.tensor([1.0, 0.0, 0.5, 0.0]).view(2, 1, 1, 2)
    errors = [0.5, 0.5, 0.25, 1.0]
    assert GaussianMaskRegressionLoss("l1")(prediction, target).item() == pytest.approx(sum(errors) / 4)
    assert GaussianMaskRegressionLoss("l1", 0.5)(prediction, target).item() == pytest.approx((0.5 + 0.25) / 2)
    assert GaussianMaskRegressionLoss("mse", 0.6)(prediction, target).item() == pytest.approx(0.25)


def test_focal_by_hand():
    prediction = torch.tensor([0.5, 0.5, 0.25]).view(1, 1, 1, 3)
    target = torch.tensor([1.0, 0.0, 0.5]).view(1, 1, 1, 3)
    soft = -(0.5 * math.log(0.25) + 0.5 * math.log(0.75))
    squares = (0.25 * math.log(2) + 0.25 * math.log(2) + 0.0625 * soft) / 3
    assert FocalMaskLoss()(prediction, target).item() == pytest.approx(squares)
    plain = (0.5 * math.log(2) + 0.5 * math.log(2) + 0.25 * soft) / 3
    assert FocalMaskLoss(0.3, 1)(prediction, target).item() == pytest.approx(0.3 * plain)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss):
    prediction, target = random_masks(2, 1, 3, 4)
    assert torch.autograd.gradcheck(lambda p: loss(p, target), prediction)


@pytest.mark.parametrize("loss", LOSSES)
def test_empty_batch_is_zero_and_differentiable(loss):
    prediction = torch.zeros(0, 1, 3, 4, requires_grad=True)
    value = loss(prediction, torch.zeros(0, 1, 3, 4))
    value.backward()
    assert value.item() == 0
    assert prediction.grad.shape == (0, 1, 3, 4)


@pytest.mark.parametrize("loss", LOSSES)
def test_saturated_predictions_are_finite(loss):
    """A sigmoid gives exactly 0 and 1 in float32; the targets here are right, wrong and soft."""
    prediction = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0]).view(1, 1, 2, 3).requires_grad_()
    value = loss(prediction, torch.tensor([0.0, 1.0, 1.0, 0.0, 0.4, 0.4]).view(1, 1, 2, 3))
    value.backward()
    assert value.isfinite()
    assert value > 0
    assert prediction.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_nan_shows_in_the_value(loss):
    prediction = torch.full((1, 1, 2, 2), math.nan)
    assert loss(prediction, torch.ones(1, 1, 2, 2)).isnan()


@pytest.mark.parametrize("loss", LOSSES)
def test_float32_under_autocast(loss):
    prediction, target = random_masks(2, 1, 3, 4, dtype=torch.float32)
    prediction = prediction.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(prediction, target)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(prediction.float(), target))


@pytest.mark.parametrize("loss", LOSSES)
def test_target_of_another_size_is_refused(loss):
    with pytest.raises(ValueError, match="target"):
        loss(torch.rand(2, 1, 4, 4), torch.rand(2, 1, 1, 1))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: GaussianMaskRegressionLoss("l2"), "unknown mask regression 'l2'.*mse, l1, smooth_l1"),
        (lambda: GaussianMaskRegressionLoss(threshold=math.nan), "mask threshold"),
        (lambda: GaussianMaskRegressionLoss(threshold=1.5), "mask threshold"),
        (lambda: FocalMaskLoss(gamma=0.5), "focal gamma"),
        (lambda: FocalMaskLoss(alpha=-1), "focal alpha"),
        (lambda: gaussian_masks(torch.rand(1, 4), (2, 2), 0), "sigma ratio"),
        (lambda: gaussian_masks(torch.rand(1, 4), (2, 2), math.nan), "sigma ratio"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(InputError, match=message):
        make()
