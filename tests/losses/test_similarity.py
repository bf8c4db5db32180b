"""Multi-similarity, circle and ranked list loss: golden numbers, cases by hand, empty and odd batches, gradients."""

import math

import pytest
import torch

from core.errors import InputError
from core.losses.similarity import CircleLoss, MultiSimilarityLoss, RankedListLoss

ALL = [MultiSimilarityLoss(), CircleLoss(), RankedListLoss()]
GOLDEN = {
    "multi_similarity_margin_0.1": MultiSimilarityLoss(0.1),
    "multi_similarity_margin_0.7": MultiSimilarityLoss(0.7),
    "circle_margin_0.25_gamma_32": CircleLoss(0.25, 32),
    "circle_margin_0.35_gamma_16": CircleLoss(0.35, 16),
    "ranked_list_margin_1.3_alpha_2_tval_1": RankedListLoss(1.3, 2, 1),
    "ranked_list_margin_0.4_alpha_1.2_tval_10": RankedListLoss(0.4, 1.2, 10),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_golden(golden, case):
    arrays = golden("loss_metric")
    embeddings = torch.tensor(arrays["embeddings"], requires_grad=True)
    value = GOLDEN[case](embeddings, torch.tensor(arrays["labels"]).long())
    (gradient,) = torch.autograd.grad(value, embeddings)
    torch.testing.assert_close(value, torch.tensor(arrays[f"{case}/value"]), rtol=2e-5, atol=0)
    torch.testing.assert_close(gradient, torch.tensor(arrays[f"{case}/grad"]), rtol=0, atol=2e-6)


def at_angles(*degrees):
    """Unit vectors in the plane, three times as long as they should be."""
    radians = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    return (3 * torch.stack([radians.cos(), radians.sin()], dim=1)).requires_grad_()


def test_multi_similarity_by_hand():
    """Identity 0 at 0 and 60 degrees, identity 1 at 90 degrees.

    The anchor at 0 has s_p 0.5 and s_n 0, which lies a margin of 0.1 below and is dropped. The anchor at 60 has s_p 0.5
    and s_n 0.866. The one at 90 has no positive. Divided by all three.
    """
    value = MultiSimilarityLoss(0.1)(at_angles(0, 60, 90), torch.tensor([0, 0, 1])).item()
    kept = math.log1p(math.exp(-2 * 0)) / 2 + math.log1p(math.exp(40 * (math.sqrt(0.75) - 0.5))) / 40
    assert value == pytest.approx(kept / 3)


def test_circle_by_hand():
    """Scale 4, margin 0.25; the anchors at 0 and 60 degrees count, the one at 90 has no positive."""
    value = CircleLoss(0.25, 4.0)(at_angles(0, 60, 90), torch.tensor([0, 0, 1])).item()
    positive = -4 * 0.75 * (0.5 - 0.75)
    negatives = (4 * (s + 0.25) * (s - 0.25) for s in (0, math.sqrt(0.75)))
    assert value == pytest.approx(sum(math.log1p(math.exp(positive + negative)) for negative in negatives) / 2)


def test_ranked_list_by_hand():
    """On the circle at 0 and 60 degrees (distance 1), 90 and 180 degrees (distances of the others from 0 and 60)."""
    value = RankedListLoss(margin=0.5, alpha=1.25, temperature=2.0)(
        at_angles(0, 60, 90, 180), torch.tensor([0, 0, 1, 2])
    ).item()
    from_60 = [2 * math.sin(math.radians(degrees / 2)) for degrees in (30, 120)]  # the second is beyond alpha
    assert from_60[1] > 1.25 < math.sqrt(2)
    assert value == pytest.approx(((1 - 0.75) + (1 - 0.75) + (1.25 - from_60[0])) / 2)
    # two negatives that count: at 90 and at 120 from the anchor at 60, weighted by their nearness
    loss, labels = RankedListLoss(margin=1.0, alpha=2.0, temperature=2.0), torch.tensor([0, 0, 1, 2])
    near = [2 - distance for distance in from_60]
    weights = [math.exp(2 * nearness) for nearness in near]
    weighted = sum(weight * nearness for weight, nearness in zip(weights, near, strict=True)) / sum(weights)
    from_0 = [2 - math.sqrt(2), 0]
    both = (0 + weighted + 0 + from_0[0]) / 2
    assert loss(at_angles(0, 60, 90, 180), labels).item() == pytest.approx(both, rel=1e-6)


@pytest.mark.parametrize("loss", [MultiSimilarityLoss(0.7), RankedListLoss()], ids=repr)
def test_gradcheck(loss):
    """Circle's weights pass no gradient, so there is no such check for it."""
    embeddings = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(4).repeat_interleave(2)
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), embeddings.requires_grad_())


@pytest.mark.parametrize("loss", ALL, ids=repr)
@pytest.mark.parametrize("labels", [[], [0, 1, 2, 3], [5, 5, 5, 5]], ids=["empty", "no positives", "no negatives"])
def test_nothing_to_compare_is_zero_and_keeps_the_graph(loss, labels):
    embeddings = torch.randn(len(labels), 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    value = loss(embeddings, torch.tensor(labels, dtype=torch.long))
    value.backward()
    assert value.item() == 0
    assert torch.equal(embeddings.grad, torch.zeros(len(labels), 3))


@pytest.mark.parametrize("loss", ALL, ids=repr)
def test_equal_and_zero_embeddings_have_no_nan_in_the_gradient(loss):
    for embeddings in (torch.ones(6, 3, requires_grad=True), torch.zeros(6, 3, requires_grad=True)):
        loss(embeddings, torch.tensor([0, 0, 0, 1, 1, 1])).backward()
        assert embeddings.grad.isfinite().all()


@pytest.mark.parametrize("loss", ALL, ids=repr)
def test_a_nan_shows_in_the_value(loss):
    embeddings = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    embeddings[0, 0] = math.nan
    assert loss(embeddings, torch.tensor([0, 0, 1, 1, 2, 2])).isnan()


@pytest.mark.parametrize("loss", ALL, ids=repr)
def test_float32_under_autocast(loss):
    embeddings = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(embeddings, labels)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(embeddings.float(), labels))


@pytest.mark.parametrize("margin, said", [(-0.1, "-0.1"), (math.nan, "nan"), (None, "soft")])
def test_bad_margin(margin, said):
    with pytest.raises(InputError, match=f"multi-similarity margin is {said}"):
        MultiSimilarityLoss(margin)
