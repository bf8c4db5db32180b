"""Losses on the cosine similarities of all pairs of a batch.

All take (embeddings (B, D), labels (B,)), normalise the embeddings and return a scalar: 0 where no picture has both a
positive (another picture of its identity; never the picture itself) and a negative, and for an empty batch.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from core.errors import InputError
from core.losses.metric import mean_of_complete, pair_masks
from core.losses.precision import in_float32

LEFT_OUT = -1e9  # the exponent of a pair that doesn't count; -inf would make the gradient of a row without pairs NaN


class SimilarityLoss(nn.Module):
    """What these losses share; `compare(similarity (B, B), is_positive, is_negative)` is the loss itself."""

    @in_float32
    def forward(self, embeddings, labels):
        if len(embeddings) == 0:
            return embeddings.sum()
        unit = F.normalize(embeddings)  # (B, D)
        return self.compare(unit @ unit.T, *pair_masks(labels))


class MultiSimilarityLoss(SimilarityLoss):
    """Multi-similarity loss (Wang et al. 2019, equation 15) with its mining (equations 10 and 11).

    A negative counts where its similarity is above that of the anchor's least similar positive less the margin, a
    positive where it is below that of the most similar negative plus the margin. Anchors that keep positives and
    negatives give

        log(1 + sum exp(-a (s_p - t))) / a + log(1 + sum exp(b (s_n - t))) / b

    and all are summed and divided by B. LightMBN drops whatever is as similar as 1 - 1e-5 to leave out the anchor
    itself; here a positive that looks the same counts.

    Args:
        margin: of the mining, at least 0 (0.1 in the paper, 0.7 in LightMBN). InputError otherwise.
        scale_positive, scale_negative: a, b.
        threshold: t.
    """

    def __init__(self, margin=0.1, scale_positive=2.0, scale_negative=40.0, threshold=0.5):
        super().__init__()
        if margin is None or not 0 <= margin < math.inf:
            raise InputError(
                f"multi-similarity margin is {'soft' if margin is None else margin}: give a number from 0 up"
            )
        self.margin, self.threshold = margin, threshold
        self.scale_positive, self.scale_negative = scale_positive, scale_negative

    def compare(self, similarity, is_positive, is_negative):
        with torch.no_grad():
            least_positive = similarity.masked_fill(~is_positive, math.inf).amin(dim=1, keepdim=True)  # (B, 1)
            most_negative = similarity.masked_fill(~is_negative, -math.inf).amax(dim=1, keepdim=True)  # (B, 1)
            # Negated, so that a NaN counts and shows in the value.
            positives = is_positive & ~(similarity - self.margin >= most_negative)  # (B, B)
            negatives = is_negative & ~(similarity + self.margin <= least_positive)  # (B, B)
            kept = positives.any(dim=1) & negatives.any(dim=1)  # (B,)
        distance = similarity - self.threshold
        positive = F.softplus(_log_sum_exp(-self.scale_positive * distance, positives)) / self.scale_positive  # (B,)
        negative = F.softplus(_log_sum_exp(self.scale_negative * distance, negatives)) / self.scale_negative  # (B,)
        return torch.where(kept, positive + negative, 0.0).sum() / len(similarity)


class CircleLoss(SimilarityLoss):
    """Circle loss on pairs (Sun et al. 2020, equation 6), the mean over the anchors that have both kinds.

    log(1 + sum_n exp(g [s_n + m]+ (s_n - m)) * sum_p exp(-g [1 + m - s_p]+ (s_p - 1 + m))); the weights in [ ]+ pass no
    gradient.

    Args:
        margin: m.
        scale: g; 128 and m = 0.25 are the paper's for persons.
    """

    def __init__(self, margin=0.25, scale=128.0):
        super().__init__()
        self.margin, self.scale = margin, scale

    def compare(self, similarity, is_positive, is_negative):
        positive, negative = circle_scores(similarity, self.margin)  # (B, B), (B, B)
        values = F.softplus(
            _log_sum_exp(-self.scale * positive, is_positive) + _log_sum_exp(self.scale * negative, is_negative)
        )
        return mean_of_complete(values, is_positive.any(dim=1) & is_negative.any(dim=1))


class RankedListLoss(SimilarityLoss):
    """Ranked list loss (Wang et al. 2019, equations 2 to 6), the mean over the anchors that have both kinds.

    With Euclidean distances d of unit vectors: the mean of [d_p - (alpha - margin)]+ over the positives, plus the mean
    of alpha - d_n over the negatives nearer than alpha, weighted by exp(temperature * (alpha - d_n)). As in LightMBN
    the gradient passes through the weights too, and positives that are near enough count in the mean.

    Args:
        margin, alpha, temperature: m, alpha and T of the paper.
    """

    def __init__(self, margin=0.4, alpha=1.2, temperature=10.0):
        super().__init__()
        self.margin, self.alpha, self.temperature = margin, alpha, temperature

    def compare(self, similarity, is_positive, is_negative):
        distance = (2 - 2 * similarity).clamp(min=1e-12).sqrt()  # (B, B); without the clamp a 0 has no gradient
        too_far = (distance - (self.alpha - self.margin)).clamp(min=0)
        positive = torch.where(is_positive, too_far, 0.0).sum(dim=1) / is_positive.sum(dim=1).clamp(min=1)  # (B,)
        too_near = self.alpha - distance
        nontrivial = is_negative & ~(too_near <= 0)  # negated, so that a NaN counts
        weights = torch.where(nontrivial, self.temperature * too_near, LEFT_OUT).softmax(dim=1)
        negative = (weights * torch.where(nontrivial, too_near, 0.0)).sum(dim=1)  # (B,)
        return mean_of_complete(positive + negative, is_positive.any(dim=1) & is_negative.any(dim=1))


def circle_scores(similarity, margin):
    """What a similarity s counts as a positive, [1 + m - s]+ (s - 1 + m), and as a negative, [s + m]+ (s - m).

    Sun et al. 2020, equations 5 and 8. The weights in [ ]+ pass no gradient.
    """
    fixed = similarity.detach()
    positive = (1 + margin - fixed).clamp(min=0) * (similarity - (1 - margin))
    negative = (fixed + margin).clamp(min=0) * (similarity - margin)
    return positive, negative


def _log_sum_exp(values, counts):
    return torch.where(counts, values, LEFT_OUT).logsumexp(dim=1)
