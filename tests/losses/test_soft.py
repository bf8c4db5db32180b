"""Soft losses of MMT: golden numbers, by hand, empty batches, gradients."""

import math

import pytest
import torch
from torch.nn import functional as F

from core.losses import SoftmaxTripletLoss
from core.losses.soft import SoftCrossEntropyLoss, SoftSoftmaxTripletLoss


def tensors(golden, name):
    return {key: torch.from_numpy(value) for key, value in golden(name).items()}


def test_soft_cross_entropy_golden(golden):
    arrays = tensors(golden, "loss_classification")
    logits, teacher = arrays["logits"].requires_grad_(), arrays["teacher_logits"].requires_grad_()
    value = SoftCrossEntropyLoss()(logits, teacher)
    value.backward()
    torch.testing.assert_close(value, arrays["soft_entropy/value"], rtol=1e-5, atol=0)
    torch.testing.assert_close(logits.grad, arrays["soft_entropy/grad_logits"], rtol=0, atol=1e-6)
    assert teacher.grad is None
    assert SoftCrossEntropyLoss()(logits[:0], teacher[:0]) == 0


def dense(embeddings, others, teacher, labels):
    """Reference out of the whole matrices, `others` being the batch or a detached copy of it."""
    distance = (embeddings[:, None] - others).square().sum(-1).clamp(min=1e-12).sqrt()  # (B, B)
    same = labels[:, None] == labels
    positive = distance.masked_fill(~same, -math.inf).argmax(1, keepdim=True)
    negative = distance.masked_fill(same, math.inf).argmin(1, keepdim=True)
    pair = torch.cat([positive, negative], 1)
    soft = torch.cdist(teacher, teacher).gather(1, pair).softmax(1)
    return -(soft * distance.gather(1, pair).log_softmax(1)).sum(1).mean()


def test_soft_softmax_triplet_golden(golden):
    """The golden gradient passes only through the anchor; the reference that gives it, undetached, gives ours."""
    arrays = tensors(golden, "loss_metric")
    embeddings, labels = arrays["embeddings"].requires_grad_(), arrays["labels"].long()
    teacher = arrays["teacher_embeddings"].requires_grad_()
    value = SoftSoftmaxTripletLoss()(embeddings, teacher, labels)
    gradient, of_teacher = torch.autograd.grad(value, [embeddings, teacher], allow_unused=True)
    torch.testing.assert_close(value, arrays["soft_softmax_triplet/value"], rtol=2e-5, atol=0)
    assert of_teacher is None

    detached = dense(embeddings, embeddings.detach(), teacher.detach(), labels)
    (through_anchor,) = torch.autograd.grad(detached, embeddings)
    torch.testing.assert_close(through_anchor, arrays["soft_softmax_triplet/grad"], rtol=0, atol=2e-6)
    (through_all,) = torch.autograd.grad(dense(embeddings, embeddings, teacher.detach(), labels), embeddings)
    torch.testing.assert_close(gradient, through_all, rtol=0, atol=2e-6)


def test_by_hand():
    """On a line at 0, 1 (identity 0), 3, 7: violations -2, -1, 2, -2. A teacher to whom all are the same says 1/2."""
    embeddings, labels = torch.tensor([[0.0], [1.0], [3.0], [7.0]]), torch.tensor([0, 0, 1, 1])
    value = SoftSoftmaxTripletLoss()(embeddings, torch.zeros(4, 9), labels)
    expected = sum(math.log1p(math.exp(-v)) + math.log1p(math.exp(v)) for v in (-2, -1, 2, -2)) / 8
    assert value.item() == pytest.approx(expected)
    certain = torch.tensor([[0.0], [0.0], [99.0], [99.0]])  # that the positive is near and the negative far
    torch.testing.assert_close(
        SoftSoftmaxTripletLoss()(embeddings, certain, labels), SoftmaxTripletLoss()(embeddings, labels)
    )


def test_gradient_empty_batch_and_half_precision():
    embeddings = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    teacher, labels = embeddings.detach().roll(1, 0), torch.arange(6) // 2
    loss = SoftSoftmaxTripletLoss()
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher, labels), embeddings)
    assert loss(embeddings[:0], teacher[:0], labels[:0]) == 0
    assert loss(embeddings, teacher, torch.zeros(6)) == 0  # no negatives
    half = loss(embeddings.bfloat16(), F.normalize(teacher).half(), labels)
    assert half.dtype == torch.float32 and half.isfinite()
