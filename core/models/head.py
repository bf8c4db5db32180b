"""What follows the pooling of one branch: a reduction, a neck, a classifier; and what a whole network returns."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NECKS = ("bnneck", "none")


class ReIDOutput(NamedTuple):
    """What a re-identification network returns, in training and in evaluation.

    embedding: (B, D), what retrieval compares; of all branches, one after the other.
    features: one (B, F) per branch that metric losses compare.
    logits: one (B, C) per branch that identity losses read, cosines with a cosine classifier; empty without classifier.
    mask: (B, 1, mask_h, mask_w) in [0, 1], or None where none is asked for.
    stages: the backbone's four maps (B, Ci, h, w), or None where they aren't asked for.
    """

    embedding: Tensor
    features: list[Tensor]
    logits: list[Tensor]
    mask: Tensor | None = None
    stages: tuple[Tensor, ...] | None = None


class CosineClassifier(nn.Linear):
    """(B, F) -> the cosines (B, C) to each identity's weight, which arcface and cosface read.

    In float32, under autocast too: the losses multiply them by 64.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(F.normalize(x.float()), F.normalize(self.weight.float()))


class Head(nn.Module):
    """A pooled vector (B, C) -> feature (B, F), embedding (B, F), logits (B, num_classes) or None.

    The neck of Luo et al. 2019, "Bag of Tricks and a Strong Baseline for Deep Person Re-identification", section 3.6:
    metric losses see the feature, a BatchNorm without a learned bias follows, and the classifier (without bias) and
    retrieval see what comes out of it. Without a neck all of them see the feature. Dropout acts on the classifier's
    input alone.

    Args:
        feature_dim: F, what `reduction` makes of C.
        num_classes: 0 builds no classifier.
        reduction: a module; heads may share one. None: the identity.
        cosine: the classifier is a `CosineClassifier`.
    """

    def __init__(
        self, feature_dim: int, num_classes: int, reduction: nn.Module | None = None, neck: str = "bnneck",
        dropout: float = 0.0, cosine: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.feature_dim = feature_dim
        self.reduction, self.neck, self.classifier = head_parts(feature_dim, num_classes, reduction, neck, cosine)
        self.dropout = nn.Dropout(dropout)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return through_head(pooled, self.reduction, self.neck, self.classifier, self.dropout)


def head_parts(feature_dim, num_classes, reduction=None, neck="bnneck", cosine=False) -> list[nn.Module | None]:
    """[reduction, neck, classifier] of `Head`, whose arguments these are."""
    batch_norm = _batch_norm_neck(feature_dim) if neck == "bnneck" else nn.Identity()
    if not num_classes:
        batch_norm.requires_grad_(False)  # it learns from the classifier alone
    classifier = _classifier(feature_dim, num_classes, neck == "none", cosine) if num_classes else None
    return [reduction or nn.Identity(), batch_norm, classifier]


def through_head(pooled, reduction, neck, classifier, dropout) -> tuple[Tensor, Tensor, Tensor | None]:
    """The forward pass of `Head`."""
    feature = reduction(pooled)  # (B, F)
    embedding = neck(feature)  # (B, F)
    return feature, embedding, None if classifier is None else classifier(dropout(embedding))


def linear_reduction(channels: int, feature_dim: int, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(channels, feature_dim, bias=bias)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out")
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def relu_reduction(channels: int, feature_dim: int, bias: bool = False) -> nn.Sequential:
    """Linear, BatchNorm, ReLU: a 1x1 convolution of what was pooled."""
    linear = linear_reduction(channels, feature_dim, bias)
    return nn.Sequential(linear, nn.BatchNorm1d(feature_dim), nn.ReLU(inplace=True))


def _batch_norm_neck(feature_dim: int) -> nn.BatchNorm1d:
    layer = nn.BatchNorm1d(feature_dim)
    layer.bias.requires_grad_(False)  # it stays 0: identities lie around the origin, as cosine distance wants them
    return layer


def _classifier(feature_dim: int, num_classes: int, bias: bool, cosine: bool) -> nn.Linear:
    if cosine:
        return CosineClassifier(feature_dim, num_classes, bias=False)
    layer = nn.Linear(feature_dim, num_classes, bias=bias)
    nn.init.normal_(layer.weight, std=0.001)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
