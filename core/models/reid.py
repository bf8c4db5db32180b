"""Re-identification networks: a backbone, global pooling, a neck, a classifier, and a mask decoder if one is wanted."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import InputError
from core.layers.mask_decoder import MASK_DECODERS
from core.layers.pooling import POOLINGS, build_pooling
from core.models.resnet import RESNETS

MASK_SUFFIX = "_with_mask"

# A deep network that starts without weights learns nothing in its first minutes unless its blocks start as the identity
# (Goyal et al. 2017). Shallow ones need no help, and their random features generalise better without it.
SHALLOW = ("resnet18", "resnet34")
NECKS = ("bnneck", "none")
MASK_POOLINGS = ("off", "soft", "branch")

# What a position outside of the mask still counts. Where no object is seen at all, all count the same.
LEAST_WEIGHT = 0.01


class ReIDOutput(NamedTuple):
    """What a re-identification network returns, in training and in evaluation.

    embedding: (B, D), what retrieval compares; of all branches, one after the other.
    features: one (B, F) per branch, what metric losses compare.
    logits: one (B, C) per branch, what identity losses read; empty where the network has no classifier.
    mask: (B, 1, mask_h, mask_w) in [0, 1], or None where none is asked for.
    stages: None; no network gives its intermediate stages yet.
    """

    embedding: Tensor
    features: list[Tensor]
    logits: list[Tensor]
    mask: Tensor | None = None
    stages: None = None


class ReIDModel(nn.Module):
    """Pictures (B, 3, H, W), normalised -> ReIDOutput. `build_reid_model` builds it.

    The neck of Luo et al. 2019, "Bag of Tricks and a Strong Baseline for Deep Person Re-identification", section 3.6:
    metric losses see the pooled feature, a BatchNorm without a learned bias follows, and the classifier (without bias)
    and retrieval see what comes out of it. Without a neck all of them see the pooled feature. Dropout acts on the
    classifier's input alone.

    With mask pooling the predicted mask says how much each position of stage 4 counts: in the one feature ("soft"), or
    in the feature of a second branch beside the plain one, with a neck and a classifier of its own ("branch"). The mask
    is taken as it is: it learns from its own loss, and no gradient of the identities passes through it.

    Two originals depart from this, and we do not follow them: reid-strong-baseline's ResNet has no ReLU after its first
    BatchNorm, and OpenUnReID puts a ReLU behind the neck, in training only, where the feature is reduced.

    Attributes:
        backbone: ResNet without `fc`; its state_dict has the keys of torchvision or of IBN-Net.
        pooling, reduction, neck, dropout: modules; the identity where there is nothing to do.
        classifier: Linear, or None for num_classes 0.
        mask_decoder: on stage 3, or None.
        mask_branch: reduction, neck and (if there are classes) classifier of the second branch, or None.
        feature_dim: F, of each branch. embedding_dim: D, of all together.
    """

    def __init__(self, backbone, num_classes, pooling, neck, dropout, reduced_dim, mask_decoder, mask_pooling):
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling
        channels = backbone.stage_channels[-1]
        self.feature_dim = reduced_dim or channels
        self.embedding_dim = self.feature_dim * (2 if mask_pooling == "branch" else 1)
        self.reduction, self.neck, self.classifier = _head(channels, reduced_dim, neck, num_classes)
        self.dropout = nn.Dropout(dropout)
        self.mask_decoder = mask_decoder
        self.mask_pooling = mask_pooling
        has_branch = mask_pooling == "branch"
        self.mask_branch = nn.ModuleList(_head(channels, reduced_dim, neck, num_classes)) if has_branch else None

    def forward(self, images: Tensor, return_mask: bool | None = None) -> ReIDOutput:
        """(B, 3, H, W) -> ReIDOutput.

        return_mask: whether the output has the mask; None means in training always, in evaluation never. The decoder
            runs where the mask is returned or pooled with. Asking a network without a decoder for a mask raises
            ValueError.
        """
        if return_mask is None:
            return_mask = self.training and self.mask_decoder is not None
        if return_mask and self.mask_decoder is None:
            raise ValueError("this network was built without a mask decoder, so it has no mask to return")
        _, _, stage3, stage4 = self.backbone.forward_stages(images)  # (B, C3, H/16, W/16), (B, C4, h, w)
        mask = None
        if return_mask or self.mask_pooling != "off":
            mask = self.mask_decoder(stage3)  # (B, 1, mask_h, mask_w)
        mask_weights = None if self.mask_pooling == "off" else _position_weights(mask, stage4)  # (B, 1, h, w)
        return ReIDOutput(*self.head(stage4, mask_weights), mask if return_mask else None)

    def head(self, stage4: Tensor, mask_weights: Tensor | None = None) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """What follows the backbone: (B, C4, h, w) -> embedding, features and logits of `ReIDOutput`.

        mask_weights: (B, 1, h, w), above 0, what each position counts in mask pooling; None: all the same.
        """
        head = (self.reduction, self.neck, self.classifier)
        if self.mask_pooling == "branch":
            branches = [(None, head), (mask_weights, self.mask_branch)]
        else:
            branches = [(mask_weights, head)]
        embeddings, features, logits = [], [], []
        for weights, (reduction, neck, classifier) in branches:
            features.append(reduction(self.pooling(stage4, weights)))  # (B, F)
            embeddings.append(neck(features[-1]))  # (B, F)
            if classifier is not None:
                logits.append(classifier(self.dropout(embeddings[-1])))  # (B, C)
        return embeddings[0] if len(embeddings) == 1 else torch.cat(embeddings, dim=1), features, logits


def build_reid_model(
    backbone: str,
    num_classes: int,
    *,
    last_stride: int = 1,
    pooling: str = "avg",
    neck: str = "bnneck",
    dropout: float = 0.0,
    embedding_dim: int = 0,
    mask_size: tuple[int, int] = (256, 256),
    with_mask: bool | None = None,
    mask_decoder: str = "full",
    mask_pooling: str = "off",
) -> ReIDModel:
    """A network with random weights; `core.models.weights.load_weights` gives it published ones.

    Args:
        backbone: a name in `RESNETS`, or one followed by `_with_mask`.
        num_classes: identities to train on; 0 builds no classifier.
        last_stride: stride of the backbone's stage 4, 1 or 2.
        pooling: "avg", "max" or "gem".
        neck: "bnneck" or "none".
        dropout: probability, before the classifier.
        embedding_dim: size of a branch's embedding; 0 keeps the backbone's, otherwise a Linear layer before the neck.
        mask_size: (height, width) in pixels of predicted masks.
        with_mask: None builds the decoder if the backbone's name ends in `_with_mask`; False never does, so that
            nothing is left without a gradient where no loss asks for a mask; True always.
        mask_decoder: "full" (the original's) or "light".
        mask_pooling: "off", "soft" or "branch"; see `ReIDModel`.

    Raises:
        InputError: an unknown name, the message lists the known ones; mask pooling without a decoder.
    """
    name = backbone.removesuffix(MASK_SUFFIX)
    if name not in RESNETS:
        known = ", ".join(RESNETS)
        raise InputError(f"unknown backbone {backbone!r}; use one of {known}, each also with {MASK_SUFFIX} added")
    choices = {
        "pooling": (pooling, POOLINGS),
        "neck": (neck, NECKS),
        "mask decoder": (mask_decoder, MASK_DECODERS),
        "mask pooling": (mask_pooling, MASK_POOLINGS),
    }
    for what, (value, known) in choices.items():
        if value not in known:
            raise InputError(f"unknown {what} {value!r}; use one of {', '.join(known)}")
    if with_mask is None:
        with_mask = backbone.endswith(MASK_SUFFIX)
    if mask_pooling != "off" and not with_mask:
        raise InputError(f"mask pooling {mask_pooling} needs a mask decoder: use {name}{MASK_SUFFIX} and a mask loss")
    resnet = RESNETS[name](num_classes=0, last_stride=last_stride, zero_init_residual=name not in SHALLOW)
    return ReIDModel(
        resnet,
        num_classes,
        build_pooling(pooling),
        neck,
        dropout,
        embedding_dim,
        MASK_DECODERS[mask_decoder](resnet.stage_channels[-2], mask_size) if with_mask else None,
        mask_pooling,
    )


def _position_weights(mask: Tensor, stage4: Tensor) -> Tensor:
    """How much each position of (B, C, h, w) counts by the mask (B, 1, mask_h, mask_w): (B, 1, h, w), above 0."""
    weights = F.interpolate(mask.detach(), size=stage4.shape[-2:], mode="area")
    return weights.clamp(min=LEAST_WEIGHT)


def _head(channels: int, reduced_dim: int, neck: str, num_classes: int) -> list[nn.Module | None]:
    """What follows the pooling of a branch: reduction, neck, classifier (None for num_classes 0)."""
    feature_dim = reduced_dim or channels
    reduction = _reduction(channels, reduced_dim) if reduced_dim else nn.Identity()
    batch_norm = _batch_norm_neck(feature_dim) if neck == "bnneck" else nn.Identity()
    if not num_classes:
        batch_norm.requires_grad_(False)  # it learns from the classifier alone
    classifier = _classifier(feature_dim, num_classes, bias=neck == "none") if num_classes else None
    return [reduction, batch_norm, classifier]


def _reduction(channels: int, embedding_dim: int) -> nn.Linear:
    layer = nn.Linear(channels, embedding_dim)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out")
    nn.init.zeros_(layer.bias)
    return layer


def _batch_norm_neck(feature_dim: int) -> nn.BatchNorm1d:
    layer = nn.BatchNorm1d(feature_dim)
    layer.bias.requires_grad_(False)  # it stays 0: identities lie around the origin, as cosine distance wants them
    return layer


def _classifier(feature_dim: int, num_classes: int, bias: bool) -> nn.Linear:
    layer = nn.Linear(feature_dim, num_classes, bias=bias)
    nn.init.normal_(layer.weight, std=0.001)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
