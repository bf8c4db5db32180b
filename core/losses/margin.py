"""Softmax losses with a margin on cosines: of an embedding with the direction of each identity.

All take (cosines (B, C), labels (B,) integers 0..C-1) and return the mean over the batch, 0 for an empty one. The
cosines are those of a classifier that normalises its input and its weight, so the losses have no parameters.
"""

import torch
from torch import nn
from torch.nn import functional as F

from core.losses.precision import in_float32
from core.losses.similarity import circle_scores

ALMOST_ONE = 1 - 1e-6  # where acos still has a slope


class MarginSoftmaxLoss(nn.Module):
    """What these losses share; `scores(cosines)` says what a cosine counts for the true identity, and for others.

    Args:
        margin: m, in cosine, or radians for `ArcFaceLoss`.
        scale: s, which multiplies the scores.
    """

    def __init__(self, margin, scale=64.0):
        super().__init__()
        self.margin, self.scale = margin, scale

    @in_float32
    def forward(self, cosines, labels):
        true, other = self.scores(cosines)  # (B, C), (B, C)
        is_true = F.one_hot(labels, cosines.shape[1]).bool()  # (B, C)
        logits = self.scale * torch.where(is_true, true, other)
        return F.cross_entropy(logits, labels, reduction="sum") / max(len(labels), 1)


class CosFaceLoss(MarginSoftmaxLoss):
    """Large margin cosine loss (Wang et al. 2018, equation 4): the true identity has s (cos - m)."""

    def __init__(self, margin=0.35, scale=64.0):
        super().__init__(margin, scale)

    def scores(self, cosines):
        return cosines - self.margin, cosines


class ArcFaceLoss(MarginSoftmaxLoss):
    """Additive angular margin loss (Deng et al. 2019, equation 3): the true identity has s cos(angle + m).

    Plain as the equation is: where angle + m is above pi, the score rises again.
    """

    def __init__(self, margin=0.5, scale=64.0):
        super().__init__(margin, scale)

    def scores(self, cosines):
        return torch.cos(torch.acos(cosines.clamp(-ALMOST_ONE, ALMOST_ONE)) + self.margin), cosines


class CircleSoftmaxLoss(MarginSoftmaxLoss):
    """Circle loss on identities (Sun et al. 2020, equation 7); the weights of the scores pass no gradient."""

    def __init__(self, margin=0.25, scale=128.0):
        super().__init__(margin, scale)

    def scores(self, cosines):
        return circle_scores(cosines, self.margin)
