"""Triplet, softmax-triplet and center loss: golden numbers, hand-worked cases, empty and odd batches, gradients."""

import math

import pytest
import torch
from torch.nn import functional as F

from core.errors import InputError
from core.losses.metric import CenterLoss, SemihardTripletLoss, SoftmaxTripletLoss, TripletLoss, hardest_pairs

VALUE, GRADIENT = dict(rtol=2e-5, atol=0), dict(rtol=0, atol=2e-6)  # the tolerances of the golden file
SEMIHARD = SemihardTripletLoss(0.2)
LOSSES = [TripletLoss(0.3), TripletLoss(None), SoftmaxTripletLoss(0.0), SoftmaxTripletLoss(0.3)]


@pytest.fixture
def batch(golden):
    arrays = {key: torch.from_numpy(value.copy()) for key, value in golden("loss_metric").items()}
    arrays["labels"] = arrays["labels"].long()
    return arrays


def random_batch(ids=4, images=3, dimension=5, dtype=torch.float64):
    embeddings = torch.randn(ids * images, dimension, dtype=dtype, generator=torch.Generator().manual_seed(0))
    return embeddings.requires_grad_(), torch.arange(ids).repeat_interleave(images)


def dense_distances(embeddings, labels, others):
    """Reference: hardest distances out of the whole matrix, `others` being the batch or a detached copy of it."""
    squared = (embeddings[:, None] - others[None]).square().sum(-1)
    distance = squared.clamp(min=1e-12).sqrt()  # (B, B)
    same = labels[:, None] == labels[None]
    to_positive = distance.masked_fill(~same, -math.inf).amax(1)
    return to_positive, distance.masked_fill(same, math.inf).amin(1)


def dense_softmax_triplet(embeddings, labels, others, margin):
    logs = F.log_softmax(torch.stack(dense_distances(embeddings, labels, others), dim=1), dim=1)
    return (-margin * logs[:, 0] - (1 - margin) * logs[:, 1]).mean()


def test_mining_golden(batch):
    positive, negative, complete = hardest_pairs(batch["embeddings"], batch["labels"])
    assert torch.equal(positive, batch["mining/p_index"].long())
    assert torch.equal(negative, batch["mining/n_index"].long())
    assert complete.all()


@pytest.mark.parametrize(
    "margin, unit, case",
    [
        (0.3, False, "triplet_hard_margin_0.3"),
        (None, False, "triplet_hard_soft_margin"),
        (0.3, True, "triplet_hard_margin_0.3_unit_features"),
        (0.3, False, "triplet_semihard_class_margin_0.3"),
        (0.3, False, "fastreid_triplet_hard_margin_0.3"),
    ],
)
def test_triplet_golden(batch, margin, unit, case):
    embeddings = batch["embeddings"].requires_grad_()
    value = TripletLoss(margin)(F.normalize(embeddings) if unit else embeddings, batch["labels"])
    (gradient,) = torch.autograd.grad(value, embeddings)
    torch.testing.assert_close(value, batch[f"{case}/value"], **VALUE)
    torch.testing.assert_close(gradient, batch[f"{case}/grad"], **GRADIENT)


def test_detached_triplet_golden(batch):
    """The original whose gradient reaches only the anchor: same value, other gradient."""
    embeddings = batch["embeddings"].requires_grad_()
    value = TripletLoss(0.3)(embeddings, batch["labels"])
    (gradient,) = torch.autograd.grad(value, embeddings)
    torch.testing.assert_close(value, batch["triplet_detached_margin_0.3/value"], **VALUE)
    assert not torch.allclose(gradient, batch["triplet_detached_margin_0.3/grad"], atol=1e-3)


@pytest.mark.parametrize("margin, case", [(0.0, "softmax_triplet_margin_0"), (0.3, "softmax_triplet_margin_0.3")])
def test_softmax_triplet_golden(batch, margin, case):
    """The golden gradient passes only through the anchor; the reference that gives it, undetached, gives ours."""
    embeddings, labels = batch["embeddings"].requires_grad_(), batch["labels"]
    value = SoftmaxTripletLoss(margin)(embeddings, labels)
    (gradient,) = torch.autograd.grad(value, embeddings)
    torch.testing.assert_close(value, batch[f"{case}/value"], **VALUE)

    detached = dense_softmax_triplet(embeddings, labels, embeddings.detach(), margin)
    (through_anchor,) = torch.autograd.grad(detached, embeddings)
    torch.testing.assert_close(through_anchor, batch[f"{case}/grad"], **GRADIENT)
    (through_all,) = torch.autograd.grad(dense_softmax_triplet(embeddings, labels, embeddings, margin), embeddings)
    torch.testing.assert_close(gradient, through_all, **GRADIENT)


def test_softmax_triplet_at_zero_is_soft_margin(batch):
    embeddings = batch["embeddings"].requires_grad_()
    value = SoftmaxTripletLoss(0.0)(embeddings, batch["labels"])
    (gradient,) = torch.autograd.grad(value, embeddings)
    torch.testing.assert_close(value, batch["triplet_hard_soft_margin/value"], **VALUE)
    torch.testing.assert_close(gradient, batch["triplet_hard_soft_margin/grad"], **GRADIENT)


def test_center_golden(batch):
    """The golden value holds 1e-12 for each masked zero, far below its tolerance."""
    loss = CenterLoss(*batch["center/centers"].shape)
    loss.load_state_dict({"centers": batch["center/centers"]})
    embeddings = batch["embeddings"].requires_grad_()
    value = loss(embeddings, batch["labels"])
    gradient, center_gradient = torch.autograd.grad(value, [embeddings, loss.centers])
    torch.testing.assert_close(value, batch["center/value"], **VALUE)
    torch.testing.assert_close(gradient, batch["center/grad"], **GRADIENT)
    torch.testing.assert_close(center_gradient, batch["center/grad_centers"], **GRADIENT)


def test_triplet_by_hand():
    """On a line at 0, 1 (identity 0), 3, 7 (identity 1): violations 1-3, 1-2, 4-2, 4-6."""
    embeddings, labels = torch.tensor([[0.0], [1.0], [3.0], [7.0]]), torch.tensor([0, 0, 1, 1])
    assert TripletLoss(0.5)(embeddings, labels).item() == pytest.approx((0 + 0 + 2.5 + 0) / 4)
    assert TripletLoss(1.5)(embeddings, labels).item() == pytest.approx((0 + 0.5 + 3.5 + 0) / 4)
    soft = sum(math.log1p(math.exp(violation)) for violation in (-2, -1, 2, -2)) / 4
    assert TripletLoss(None)(embeddings, labels).item() == pytest.approx(soft)
    hard = sum(math.log1p(math.exp(-violation)) for violation in (-2, -1, 2, -2)) / 4
    assert SoftmaxTripletLoss(0.25)(embeddings, labels).item() == pytest.approx(0.25 * hard + 0.75 * soft)


def test_semihard_by_hand():
    """Identity 0 at 0 and 60 degrees, identity 1 at 30, 80 and 180; squared distances are 2 - 2 cos.

    From 0 to 60 it is 1: the nearest negative that is farther is at 80, not the nearer one at 30. From 60 to 0 it is 1,
    too, and there it is the one at 180.
    """
    radians = torch.tensor([0.0, 60, 30, 80, 180], dtype=torch.float64) * math.pi / 180
    embeddings, labels = 5 * torch.stack([radians.cos(), radians.sin()], dim=1), torch.tensor([0, 0, 1, 1, 1])

    def squared(degrees):
        return 2 - 2 * math.cos(math.radians(degrees))

    chosen = [(60, 80), (60, 120)]  # of identity 0: to the positive, to the negative
    chosen += [(50, 30), (150, 30)]  # from 30: both negatives are nearer than the positive, equally far; the farthest
    chosen += [(50, 80), (100, 80)]  # from 80: to 30 (negatives at 20 and 80), to 180 (none is farther)
    chosen += [(150, 180), (100, 120)]  # from 180: to 30 (negatives at 120 and 180), to 80
    expected = sum(max(0, squared(positive) - squared(negative) + 0.75) for positive, negative in chosen) / 8
    assert SemihardTripletLoss(0.75)(embeddings, labels).item() == pytest.approx(expected)


def test_semihard_is_not_batch_hard(batch):
    """The class of this name in LightMBN is (`test_triplet_golden`, case semihard_class)."""
    value = SemihardTripletLoss(0.3)(batch["embeddings"], batch["labels"])
    assert not torch.isclose(value, batch["triplet_semihard_class_margin_0.3/value"], rtol=0.1)


def test_gradient_reaches_all_three_by_hand():
    """Only the anchor at 3 violates: its positive at 7 is 4 away, its negative at 1 only 2: loss (4 - 2) / 4."""
    embeddings = torch.tensor([[0.0], [1.0], [3.0], [7.0]], requires_grad=True)
    TripletLoss(0.0)(embeddings, torch.tensor([0, 0, 1, 1])).backward()
    assert embeddings.grad.flatten().tolist() == pytest.approx([0, 1 / 4, -2 / 4, 1 / 4])


def test_center_by_hand():
    loss = CenterLoss(3, 2)
    loss.load_state_dict({"centers": torch.tensor([[0.0, 0.0], [5.0, 5.0], [1.0, 1.0]])})
    value = loss(torch.tensor([[3.0, 4.0], [1.0, 2.0]]), torch.tensor([0, 2]))
    assert value.item() == pytest.approx((25 + 1) / 2)


@pytest.mark.parametrize("loss", [*LOSSES, SEMIHARD], ids=repr)
def test_gradcheck(loss):
    embeddings, labels = random_batch()
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), embeddings)


def test_center_gradcheck():
    embeddings, labels = random_batch()
    loss = CenterLoss(4, 5).double()
    assert torch.autograd.gradcheck(lambda x, _: loss(x, labels), (embeddings, loss.centers))


@pytest.mark.parametrize("loss", [*LOSSES, SEMIHARD, CenterLoss(3, 5)], ids=repr)
def test_empty_batch_is_zero_and_differentiable(loss):
    embeddings = torch.zeros(0, 5, requires_grad=True)
    value = loss(embeddings, torch.zeros(0, dtype=torch.long))
    value.backward()
    assert value.item() == 0
    assert embeddings.grad.shape == (0, 5)


def test_anchor_without_positive_is_left_out():
    """0 and 1 are one identity, 3 stands alone: it is a negative, but no anchor."""
    embeddings = torch.tensor([[0.0], [1.0], [3.0]], requires_grad=True)
    labels = torch.tensor([0, 0, 1])
    assert hardest_pairs(embeddings, labels)[2].tolist() == [True, True, False]
    value = TripletLoss(2.5)(embeddings, labels)  # 1 - 3 + 2.5 and 1 - 2 + 2.5
    assert value.item() == pytest.approx((0.5 + 1.5) / 2)


@pytest.mark.parametrize("loss", [*LOSSES, SEMIHARD], ids=repr)
@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [5, 5, 5, 5]], ids=["no positives", "no negatives"])
def test_nothing_to_compare_is_zero_and_keeps_the_graph(loss, labels):
    embeddings = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    value = loss(embeddings, torch.tensor(labels))
    value.backward()
    assert value.item() == 0
    assert torch.equal(embeddings.grad, torch.zeros(4, 3))


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_equal_embeddings_have_no_nan_in_the_gradient(loss):
    embeddings = torch.ones(6, 3, requires_grad=True)
    loss(embeddings, torch.tensor([0, 0, 0, 1, 1, 1])).backward()
    assert torch.equal(embeddings.grad, torch.zeros(6, 3))


def test_ties_go_to_the_first_index():
    """Two heaps of 20 equal points, each heap two identities of 10; whole numbers, so that nothing is rounded."""
    embeddings = torch.arange(12.0).repeat(40, 1)
    embeddings[:20] += 1
    positive, negative, _ = hardest_pairs(embeddings, torch.arange(4).repeat_interleave(10))
    assert positive.tolist() == [10 * (i // 10) + (1 if i % 10 == 0 else 0) for i in range(40)]
    assert negative.tolist() == [[10, 0, 30, 20][i // 10] for i in range(40)]


def test_distances_are_exact_far_from_the_origin():
    """A matrix product loses such small distances beside such large coordinates; mining and loss do not."""
    near, labels = torch.tensor([[0.0, 0.0], [0.25, 0.0], [4.0, 0.0], [4.0, 0.25]]), torch.tensor([0, 0, 1, 1])
    far = near + 4096
    assert torch.equal(TripletLoss(8.0)(near, labels), TripletLoss(8.0)(far, labels))


def test_a_nan_shows_in_the_value():
    embeddings, labels = random_batch(dtype=torch.float32)
    with torch.no_grad():
        embeddings[0, 0] = math.nan
    assert all(loss(embeddings, labels).isnan() for loss in [*LOSSES, SEMIHARD])


@pytest.mark.parametrize("loss", [*LOSSES, SEMIHARD, CenterLoss(4, 5)], ids=repr)
def test_float32_under_autocast(loss):
    embeddings, labels = random_batch(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(embeddings, labels)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(embeddings.float(), labels))


@pytest.mark.parametrize("margin", [-0.1, math.nan, math.inf])
def test_bad_margin(margin):
    with pytest.raises(InputError, match="triplet margin"):
        TripletLoss(margin)
    with pytest.raises(InputError, match="softmax triplet margin"):
        SoftmaxTripletLoss(margin)
