"""Cross entropy with label smoothing: golden numbers, hand-worked case, empty batch, gradient, autocast."""

import math

import pytest
import torch

from core.errors import InputError
from core.losses.identity import CrossEntropyLoss


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
