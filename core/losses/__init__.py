"""What training minimises: embeddings, logits or masks and what is true of them in, one scalar out."""

from core.losses.identity import CrossEntropyLoss, FocalLoss
from core.losses.margin import ArcFaceLoss, CircleSoftmaxLoss, CosFaceLoss
from core.losses.mask import (
    CombinedMaskLoss,
    FocalMaskLoss,
    GaussianMaskRegressionLoss,
    box_masks,
    gaussian_masks,
)
from core.losses.memory import ClusterMemory, HybridMemory
from core.losses.metric import CenterLoss, SemihardTripletLoss, SoftmaxTripletLoss, TripletLoss
from core.losses.similarity import CircleLoss, MultiSimilarityLoss, RankedListLoss
from core.losses.soft import SoftCrossEntropyLoss, SoftSoftmaxTripletLoss
from core.losses.spec import build_loss, needs_cosines, needs_logits, needs_mask, needs_pairs

__all__ = [
    "ArcFaceLoss",
    "CenterLoss",
    "CircleLoss",
    "CircleSoftmaxLoss",
    "ClusterMemory",
    "CombinedMaskLoss",
    "CosFaceLoss",
    "CrossEntropyLoss",
    "FocalLoss",
    "FocalMaskLoss",
    "GaussianMaskRegressionLoss",
    "HybridMemory",
    "MultiSimilarityLoss",
    "RankedListLoss",
    "SemihardTripletLoss",
    "SoftCrossEntropyLoss",
    "SoftSoftmaxTripletLoss",
    "SoftmaxTripletLoss",
    "TripletLoss",
    "box_masks",
    "build_loss",
    "gaussian_masks",
    "needs_cosines",
    "needs_logits",
    "needs_mask",
    "needs_pairs",
]
