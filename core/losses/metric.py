"""Losses on the embeddings: pictures of one identity near each other, pictures of different identities apart.

All take (embeddings (B, D), labels (B,)) and return a scalar. With several processes the caller may hand in the
gathered global batch (`core.losses.spec.build_loss`, option `gather`).
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from core.errors import InputError
from core.losses.precision import in_float32


def pair_masks(labels):
    """Which pairs of a batch show one identity, and which show two: (B, B) and (B, B) bool.

    No picture is its own positive.
    """
    same = labels[:, None] == labels[None, :]  # (B, B)
    is_negative = ~same
    return same.fill_diagonal_(False), is_negative


@torch.no_grad()
def hardest_pairs(embeddings, labels):
    """Batch-hard mining (Hermans et al. 2017, section 2): each anchor's farthest positive and nearest negative.

    The anchor is never its own positive. Ties go to the first index.

    Args:
        embeddings: (B, D); distances are Euclidean.
        labels: (B,) identities.

    Returns:
        positive, negative: (B,) indices into the batch, and complete: (B,) bool, False for an anchor that has no
        positive or no negative, whose indices then mean nothing.
    """
    if len(embeddings) == 0:
        nothing = torch.empty(0, dtype=torch.int64, device=embeddings.device)
        return nothing, nothing, nothing.bool()
    # By a matrix product, which is fast. Its rounding grows with the distance from the origin, so that goes to the
    # middle of the batch; what rounding is left can only swap pairs that are equally hard but for it.
    centered = embeddings - embeddings.mean(dim=0)
    distance = torch.cdist(centered, centered, compute_mode="use_mm_for_euclid_dist")  # (B, B)
    is_positive, is_negative = pair_masks(labels)  # (B, B), (B, B)
    positive = distance.masked_fill(~is_positive, -math.inf).argmax(dim=1)  # (B,)
    negative = distance.masked_fill(~is_negative, math.inf).argmin(dim=1)  # (B,)
    return positive, negative, is_positive.any(dim=1) & is_negative.any(dim=1)


def distances_to(embeddings, partners):
    """Euclidean distance of each embedding (B, D) to that of index partners (B,), by differences: no cancellation.

    Where two embeddings are equal the gradient is 0 (`vector_norm` has that subgradient; the root of a sum of squares
    would give NaN).
    """
    return torch.linalg.vector_norm(embeddings - embeddings[partners], dim=1)  # (B,)


def hardest_distances(embeddings, labels):
    """Euclidean distances of each anchor to its hardest positive and hardest negative, with gradient to both ends.

    Only the mined pairs enter the graph, so it holds B x D numbers and no B x B matrix.

    Returns:
        to_positive (B,), to_negative (B,), complete (B,) as in `hardest_pairs`.
    """
    positive, negative, complete = hardest_pairs(embeddings, labels)
    return distances_to(embeddings, positive), distances_to(embeddings, negative), complete


def hinge(violation, margin):
    """max(0, violation + margin), or log(1 + exp(violation)) where the margin is None: soft."""
    return F.softplus(violation) if margin is None else (violation + margin).clamp(min=0)


def mean_of_complete(values, complete):
    """Mean of the values whose anchor (or pair) is complete; 0, still joined to the graph, where none is."""
    return torch.where(complete, values, 0.0).sum() / complete.sum().clamp(min=1)


class TripletLoss(nn.Module):
    """Batch-hard triplet loss (Hermans et al. 2017, equation 5), with Euclidean distances that are not squared.

    max(0, margin + d(a, p) - d(a, n)), or with the soft margin log(1 + exp(d(a, p) - d(a, n))), the mean over the
    anchors that have both a positive and a negative; 0 where none has.

    The gradient flows to anchor, positive and negative. OpenUnReID's version compares the batch with a detached copy of
    itself, so that each embedding moves only as an anchor: same value, another gradient. The older implementations
    count the anchor among its own positives, so that an identity with one picture enters the mean; not so here.

    Args:
        margin: in units of the embedding's length, finite and at least 0; None is the soft margin. InputError
            otherwise.

    Shape: embeddings (B, D), labels (B,) -> scalar.
    """

    def __init__(self, margin=0.3):
        super().__init__()
        if margin is not None and not 0 <= margin < math.inf:
            raise InputError(f"triplet margin is {margin}: give a number from 0 up, or none for the soft margin")
        self.margin = margin

    @in_float32
    def forward(self, embeddings, labels):
        to_positive, to_negative, complete = hardest_distances(embeddings, labels)
        return mean_of_complete(hinge(to_positive - to_negative, self.margin), complete)


class SemihardTripletLoss(TripletLoss):
    """Triplet loss with semi-hard negatives (FaceNet: Schroff et al. 2015, section 3.2), the mean over positive pairs.

    Every pair of anchor and positive takes the nearest negative that is farther than the positive; where none is, the
    farthest one. Distances are squared, between unit vectors (equations 1 and 2), so they lie in 0..4; FaceNet's margin
    is 0.2. LightMBN's `TripletSemihardLoss` is batch-hard despite its name: that is `TripletLoss`.

    Args:
        margin: as in `TripletLoss`.

    Shape: embeddings (B, D), labels (B,) -> scalar; 0 where no pair has a negative.
    """

    @in_float32
    def forward(self, embeddings, labels):
        unit = F.normalize(embeddings)  # (B, D)
        distance = 2 - 2 * unit @ unit.T  # (B, B)
        is_positive, is_negative = pair_masks(labels)
        with torch.no_grad():
            nearest, order = distance.masked_fill(~is_negative, math.inf).sort(dim=1)  # (B, B), negatives first
            place = torch.searchsorted(nearest, distance.contiguous(), right=True)  # of the first that is farther
            place = torch.minimum(place, is_negative.sum(dim=1, keepdim=True) - 1).clamp(min=0)
            negative = order.gather(1, place)  # (B, B): for the pair (anchor, positive)
        to_negative = distance[torch.arange(len(labels), device=labels.device)[:, None], negative]  # (B, B)
        complete = is_positive & is_negative.any(dim=1, keepdim=True)
        return mean_of_complete(hinge(distance - to_negative, self.margin), complete)


class SoftmaxTripletLoss(nn.Module):
    """Cross entropy over the two hardest distances of each anchor (softmax-triplet loss of MMT, Ge et al. 2020).

    With (q_p, q_n) = softmax(d(a, p), d(a, n)): -m log q_p - (1 - m) log q_n, the mean over the anchors that have both.
    At m = 0 this is the soft-margin triplet loss. As in `TripletLoss` the gradient flows to all three pictures, and an
    anchor without a positive is left out; OpenUnReID's gradient reaches only the anchor.

    Args:
        margin: m, a soft label from 0 to 1 and not a distance, in spite of its customary name. InputError outside.

    Shape: embeddings (B, D), labels (B,) -> scalar.
    """

    def __init__(self, margin=0.0):
        super().__init__()
        if not 0 <= margin <= 1:
            raise InputError(f"softmax triplet margin is {margin}: it is a soft label, give a number from 0 to 1")
        self.margin = margin

    @in_float32
    def forward(self, embeddings, labels):
        to_positive, to_negative, complete = hardest_distances(embeddings, labels)
        violation = to_positive - to_negative  # (B,)
        values = self.margin * F.softplus(-violation) + (1 - self.margin) * F.softplus(violation)
        return mean_of_complete(values, complete)


class CenterLoss(nn.Module):
    """Squared distance to the learned center of one's identity (Wen et al. 2016, equation 2), the mean over the batch.

    Scaled as Luo et al. 2019 use it with the weight 5e-4: no factor 1/2, divided by the batch size. Their code masks a
    B x C matrix and clamps it afterwards, so each of the B * (C - 1) masked zeros adds 1e-12; here they add nothing.

    The centers are parameters, drawn from the global random state. They need an optimiser, and no weight decay: the
    decay of 5e-4 would outweigh this loss at its weight of 5e-4. (Luo et al. move them by SGD at 0.5 with the gradient
    divided by the loss weight.)

    Args:
        num_classes: C, identities.
        feature_dim: D.

    Shape: embeddings (B, D), labels (B,) integers 0..C-1 -> scalar; 0 for an empty batch.
    """

    def __init__(self, num_classes, feature_dim):
        super().__init__()
        self.centers = nn.Parameter(torch.randn(num_classes, feature_dim))  # (C, D)

    @in_float32
    def forward(self, embeddings, labels):
        return (embeddings - self.centers[labels]).square().sum() / max(len(labels), 1)
