"""Cross entropy with label smoothing, focal loss: golden numbers, hand-worked case, empty batch, gradient, autocast."""

import math

import pytest
import torch

from core.errors import InputError
from core.losses.identity import CrossEntropyLoss, FocalLoss


@pytest.mark.parametrize(
    "smoothing, case", [(0.0, "plain"), (0.1, "label_smooth_eps_0.1"), (0.3, "label_smooth_eps_0.3")]
)
def test_golden(golden, smoothing, case):
    arrays = golden("loss_classification")
    logits = torch.tensor(arrays["logits"], requires_grad=True)
    value = CrossEntropyLoss(smoothing)(logits, torch.tensor(arrays["labels"]).long())
    torch.testing.assert_close(value, torch.tensor(arrays[f"{case}/value"]), rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(gradient, torch.tensor(arrays[f"{case}/grad_logits"]), rtol=0, atol=1e-6)


def test_by_hand():
    logits = torch.tensor([[math.log(3.0), 0.0]])  # probabilities 3/4 and 1/4
    value = CrossEntropyLoss(0.2)(logits, torch.tensor([0]))  # target 0.9, 0.1
    assert value.item() == pytest.approx(-0.9 * math.log(0.75) - 0.1 * math.log(0.25), rel=1e-6)


def test_empty_batch_is_zero_and_differentiable():
    logits = torch.zeros(0, 5, requires_grad=True)
    value = CrossEntropyLoss(0.1)(logits, torch.zeros(0, dtype=torch.long))
    value.backward()
    assert value.item() == 0
    assert logits.grad.shape == (0, 5)


def test_gradient():
    logits = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([0, 2, 1, 2])
    assert torch.autograd.gradcheck(lambda x: CrossEntropyLoss(0.1)(x, labels), logits)


def test_float32_under_autocast():
    logits, labels = (
        torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).bfloat16(),
        torch.tensor([0, 2, 1, 2]),
    )
    with torch.autocast("cpu", torch.bfloat16):
        value = CrossEntropyLoss(0.1)(logits, labels)
    assert value.dtype == torch.float32
    assert torch.equal(value, CrossEntropyLoss(0.1)(logits.float(), labels))


@pytest.mark.parametrize("smoothing", [-0.1, 1.1, math.nan])
def test_bad_smoothing(smoothing):
    with pytest.raises(InputError, match="label smoothing"):
        CrossEntropyLoss(smoothing)


LIGHTMBN = {"lightmbn_mean": (1.0, 2.0), "lightmbn_alpha_0.25_gamma_1.5": (0.25, 1.5)}


@pytest.mark.parametrize("case, options", [("fastreid_alpha_0.5_gamma_2", (0.5, 2.0)), *LIGHTMBN.items()])
def test_focal_golden(golden, case, options):
    """LightMBN adds 1e-6 to the probabilities: from ours so defined its numbers follow, to the same tolerance."""
    arrays = golden("loss_classification")
    logits, labels = torch.tensor(arrays["logits"], requires_grad=True), torch.tensor(arrays["labels"]).long()
    value = FocalLoss(*options)(logits, labels)
    if case in LIGHTMBN:
        (alpha, gamma), p = options, logits.softmax(dim=1).gather(1, labels[:, None])
        without_eps = (-alpha * (1 - p) ** gamma * p.log()).mean()
        torch.testing.assert_close(value, without_eps, rtol=1e-5, atol=0)
        value = (-alpha * (1 - p - 1e-6) ** gamma * (p + 1e-6).log()).mean()
    torch.testing.assert_close(value, torch.tensor(arrays[f"focal_{case}/value"]), rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(gradient, torch.tensor(arrays[f"focal_{case}/grad_logits"]), rtol=0, atol=1e-6)


def test_focal_by_hand():
    logits = torch.tensor([[math.log(3.0), 0.0]])  # probabilities 3/4 and 1/4
    assert FocalLoss(2.0, 3.0)(logits, torch.tensor([1])).item() == pytest.approx(-2 * 0.75**3 * math.log(0.25))
    assert FocalLoss(gamma=0)(logits, torch.tensor([1])).item() == pytest.approx(-math.log(0.25))


def test_focal_is_safe_where_nothing_is_left_to_learn_and_where_there_is_nothing():
    logits = torch.tensor([[1000.0, 0.0]], requires_grad=True)
    FocalLoss(gamma=1.0)(logits, torch.tensor([0])).backward()
    assert logits.grad.tolist() == [[0, 0]]
    empty = torch.zeros(0, 5, requires_grad=True)
    FocalLoss()(empty, torch.zeros(0, dtype=torch.long)).backward()
    assert empty.grad.shape == (0, 5)


def test_focal_gradient():
    logits = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: FocalLoss()(x, torch.tensor([0, 2, 1, 2])), logits)


@pytest.mark.parametrize("options, message", [((-1, 2), "alpha"), ((1, 0.5), "gamma"), ((1, math.nan), "gamma")])
def test_bad_focal(options, message):
    with pytest.raises(InputError, match=f"focal {message}"):
        FocalLoss(*options)
