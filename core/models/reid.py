"""Re-identification networks: a backbone, global pooling, a neck, a classifier, and a mask decoder if one is wanted."""

from typing import NamedTuple

from torch import Tensor, nn

from core.errors import InputError
from core.layers.mask_decoder import MaskDecoder
from core.layers.pooling import POOLINGS, build_pooling
from core.models.resnet import RESNETS

MASK_SUFFIX = "_with_mask"

# A deep network that starts without weights learns nothing in its first minutes unless its blocks start as the identity
# (Goyal et al. 2017). Shallow ones need no help, and their random features generalise better without it.
SHALLOW = ("resnet18", "resnet34")
NECKS = ("bnneck", "none")


class ReIDOutput(NamedTuple):
    """What a re-identification network returns, in training and in evaluation.

    embedding: (B, D), what retrieval compares.
    features: one (B, D) per branch, what metric losses compare.
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
    """Pictures (B, 3, H, W), normalised -> ReIDOutput with one branch. `build_reid_model` builds it.

    The neck of Luo et al. 2019, "Bag of Tricks and a Strong Baseline for Deep Person Re-identification", section 3.6:
    metric losses see the pooled feature, a BatchNorm without a learned bias follows, and the classifier (without bias)
    and retrieval see what comes out of it. Without a neck all of them see the pooled feature. Dropout acts on the
    classifier's input alone.

    Two originals depart from this, and we do not follow them: reid-strong-baseline's ResNet has no ReLU after its first
    BatchNorm, and OpenUnReID puts a ReLU behind the neck, in training only, where the feature is reduced.

    Attributes:
        backbone: ResNet without `fc`; its state_dict has the keys of torchvision or of IBN-Net.
        pooling, reduction, neck, dropout: modules; the identity where there is nothing to do.
        classifier: Linear, or None for num_classes 0.
        mask_decoder: MaskDecoder on stage 3, or None.
        feature_dim: D.
    """

    def __init__(self, backbone, num_classes, pooling, neck, dropout, embedding_dim, mask_size):
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling
        *_, stage3_channels, channels = backbone.stage_channels
        self.feature_dim = embedding_dim or channels
        self.reduction = _reduction(channels, embedding_dim) if embedding_dim else nn.Identity()
        self.neck = _batch_norm_neck(self.feature_dim) if neck == "bnneck" else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.classifier = _classifier(self.feature_dim, num_classes, bias=neck == "none") if num_classes else None
        self.mask_decoder = MaskDecoder(stage3_channels, mask_size) if mask_size else None

    def forward(self, images: Tensor, return_mask: bool | None = None) -> ReIDOutput:
        """(B, 3, H, W) -> ReIDOutput.

        return_mask: run the mask decoder; None means in training always, in evaluation never. Asking a network
            without a decoder for a mask raises ValueError.
        """
        if return_mask is None:
            return_mask = self.training and self.mask_decoder is not None
        if return_mask and self.mask_decoder is None:
            raise ValueError("this network was built without a mask decoder, so it has no mask to return")
        _, _, stage3, stage4 = self.backbone.forward_stages(images)  # (B, C3, H/16, W/16), (B, C4, h, w)
        feature = self.reduction(self.pooling(stage4))  # (B, D)
        embedding = self.neck(feature)  # (B, D)
        logits = [] if self.classifier is None else [self.classifier(self.dropout(embedding))]  # (B, C)
        mask = self.mask_decoder(stage3) if return_mask else None  # (B, 1, mask_h, mask_w)
        return ReIDOutput(embedding, [feature], logits, mask)


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
) -> ReIDModel:
    """A network with random weights; `core.models.weights.load_weights` gives it published ones.

    Args:
        backbone: a name in `RESNETS`, or one followed by `_with_mask`.
        num_classes: identities to train on; 0 builds no classifier.
        last_stride: stride of the backbone's stage 4, 1 or 2.
        pooling: "avg", "max" or "gem".
        neck: "bnneck" or "none".
        dropout: probability, before the classifier.
        embedding_dim: size of the embedding; 0 keeps the backbone's, otherwise a Linear layer before the neck.
        mask_size: (height, width) in pixels of predicted masks.
        with_mask: None builds the decoder if the backbone's name ends in `_with_mask`; False never does, so that
            nothing is left without a gradient where no loss asks for a mask; True always.

    Raises:
        InputError: an unknown backbone, pooling or neck; the message lists the known ones.
    """
    name = backbone.removesuffix(MASK_SUFFIX)
    if name not in RESNETS:
        known = ", ".join(RESNETS)
        raise InputError(f"unknown backbone {backbone!r}; use one of {known}, each also with {MASK_SUFFIX} added")
    if pooling not in POOLINGS:
        raise InputError(f"unknown pooling {pooling!r}; use one of {', '.join(POOLINGS)}")
    if neck not in NECKS:
        raise InputError(f"unknown neck {neck!r}; use one of {', '.join(NECKS)}")
    if with_mask is None:
        with_mask = backbone.endswith(MASK_SUFFIX)
    return ReIDModel(
        RESNETS[name](num_classes=0, last_stride=last_stride, zero_init_residual=name not in SHALLOW),
        num_classes,
        build_pooling(pooling),
        neck,
        dropout,
        embedding_dim,
        mask_size if with_mask else None,
    )


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
