"""Softmax losses with a margin on cosines: golden numbers, hand-worked cases, empty batch, gradients."""

import math

import pytest
import torch
from torch.nn import functional as F

from core.losses.margin import ArcFaceLoss, CircleSoftmaxLoss, CosFaceLoss

LOSSES = {"cosface": CosFaceLoss, "arcface": ArcFaceLoss, "arcface_s30_m0.2": ArcFaceLoss, "circle": CircleSoftmaxLoss}
ALL = [CosFaceLoss(), ArcFaceLoss(), CircleSoftmaxLoss()]


@pytest.mark.parametrize("case", LOSSES)
def test_golden(golden, case):
    arrays = {key: torch.from_numpy(value.copy()) for key, value in golden("loss_margin_softmax").items()}
    features, weight = arrays["features"].requires_grad_(), arrays["weight"].requires_grad_()
    cosines, labels = F.linear(F.normalize(features), F.normalize(weight)), arrays["labels"].long()
    loss = LOSSES[case](arrays[f"{case}/margin"].item(), arrays[f"{case}/scale"].item())

    true, other = loss.scores(cosines)
    logits = loss.scale * torch.where(F.one_hot(labels, 7).bool(), true, other)
    torch.testing.assert_close(logits, arrays[f"{case}/logits"], rtol=0, atol=2e-5)
    value = loss(cosines, labels)
    torch.testing.assert_close(value, arrays[f"{case}/cross_entropy"], rtol=2e-5, atol=0)
    gradients = torch.autograd.grad(value, [features, weight])
    for gradient, name in zip(gradients, ("features", "weight"), strict=True):
        torch.testing.assert_close(gradient, arrays[f"{case}/grad_{name}"], rtol=0, atol=2e-5)


def test_by_hand():
    """The true identity at 60 degrees, the other at 90; scale 2."""
    cosines, labels = torch.tensor([[0.5, 0.0]]), torch.tensor([0])

    def expected(true, other):
        return pytest.approx(math.log1p(math.exp(other - true)), rel=1e-5)

    assert CosFaceLoss(0.25, 2.0)(cosines, labels).item() == expected(2 * 0.25, 0)
    assert ArcFaceLoss(math.pi / 6, 2.0)(cosines, labels).item() == expected(0, 0)  # 60 + 30 degrees
    assert CircleSoftmaxLoss(0.25, 2.0)(cosines, labels).item() == expected(2 * 0.75 * -0.25, 2 * 0.25 * -0.25)


@pytest.mark.parametrize("loss", ALL, ids=repr)
def test_empty_batch_is_zero_and_differentiable(loss):
    cosines = torch.zeros(0, 5, requires_grad=True)
    value = loss(cosines, torch.zeros(0, dtype=torch.long))
    value.backward()
    assert value.item() == 0 and cosines.grad.shape == (0, 5)


@pytest.mark.parametrize("loss", [CosFaceLoss(scale=4.0), ArcFaceLoss(scale=4.0)], ids=repr)
def test_gradcheck(loss):
    """Circle's weights pass no gradient, so there is no such check for it."""
    cosines = torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.5
    assert torch.autograd.gradcheck(lambda x: loss(x, torch.tensor([0, 2, 1, 2])), cosines.requires_grad_())


@pytest.mark.parametrize("loss", ALL, ids=repr)
def test_cosines_of_one_and_a_little_above_have_no_nan(loss):
    cosines = torch.tensor([[1.0, -1.0], [1.0000001, -1.0000001]], requires_grad=True)
    loss(cosines, torch.tensor([0, 1])).backward()
    assert cosines.grad.isfinite().all()
