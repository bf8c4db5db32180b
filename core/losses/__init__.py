"""What training minimises: embeddings, logits or masks and what is true of them in, one scalar out."""

from core.losses.identity import CrossEntropyLoss
from core.losses.mask import (
    CombinedMaskLoss,
    FocalMaskLoss,
    GaussianMaskRegressionLoss,
    box_masks,
    gaussian_masks,
)
from core.losses.metric import CenterLoss, SoftmaxTripletLoss, TripletLoss
from core.losses.spec import build_loss, needs_logits, needs_mask, needs_pairs

__all__ = [
    "CenterLoss",
    "CombinedMaskLoss",
    "CrossEntropyLoss",
    "FocalMaskLoss",
    "GaussianMaskRegressionLoss",
    "SoftmaxTripletLoss",
    "TripletLoss",
    "box_masks",
    "build_loss",
    "gaussian_masks",
    "needs_logits",
    "needs_mask",
    "needs_pairs",
]
