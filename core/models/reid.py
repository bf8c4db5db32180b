"""Re-identification networks: a backbone, global pooling, a head, and a mask decoder if one is wanted.

`build_reid_model` builds these and, by `model`, the networks of several branches (`core.models.parts`).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import InputError
from core.layers.attention import ATTENTIONS, FEATURE_ERASINGS
from core.layers.mask_decoder import MASK_DECODERS
from core.layers.norm import to_domain_specific
from core.layers.pooling import POOLINGS, build_pooling
from core.models.head import NECKS, ReIDOutput, head_parts, linear_reduction, relu_reduction, through_head
from core.models.lightmbn import lmbn_n, lmbn_r
from core.models.mgn import mgn
from core.models.osnet import OSNETS, OSNet
from core.models.parts import PartsModel
from core.models.pcb import pcb, pyramid
from core.models.resnet import RESNETS

__all__ = ["BACKBONES", "MASK_POOLINGS", "MODELS", "NECKS", "ReIDModel", "ReIDOutput", "build_reid_model"]

MASK_SUFFIX = "_with_mask"
BACKBONES = RESNETS | OSNETS
PARTS_MODELS = {"lmbn_n": lmbn_n, "lmbn_r": lmbn_r, "mgn": mgn, "pcb": pcb, "pyramid": pyramid}


class Published(NamedTuple):
    """What a network is published with."""

    backbone: str = "resnet50"
    neck: str = "bnneck"
    dropout: float = 0.0


MODELS = {"bot": Published(), "lmbn_n": Published("osnet_x1_0"), "lmbn_r": Published(), "pcb": Published()}
MODELS |= {"mgn": Published(neck="none"), "pyramid": Published(neck="none", dropout=0.2)}

# A deep network that starts without weights learns nothing in its first minutes unless its blocks start as the identity
# (Goyal et al. 2017). Shallow ones need no help, and their random features generalise better without it.
SHALLOW = ("resnet18", "resnet34")
MASK_POOLINGS = ("off", "soft", "branch")

# What a position outside of the mask still counts. Where no object is seen at all, all count the same.
LEAST_WEIGHT = 0.01


class ReIDModel(nn.Module):
    """Pictures (B, 3, H, W), normalised -> ReIDOutput. `build_reid_model` builds it.

    One `core.models.head.Head` on the pooled map of the last stage. With mask pooling the predicted mask says how much
    each position of stage 4 counts: in the one feature ("soft"), or in the feature of a second branch beside the plain
    one, with a neck and a classifier of its own ("branch"). The mask is taken as it is: it learns from its own loss,
    and no gradient of the identities passes through it.

    Two originals depart from this, and we do not follow them: reid-strong-baseline's ResNet has no ReLU after its first
    BatchNorm, and OpenUnReID puts a ReLU behind the neck, in training only, where the feature is reduced.

    Attributes:
        backbone: without its classifier; its state_dict has the keys of torchvision, IBN-Net or torchreid.
        pooling, reduction, neck, dropout: modules; the identity where there is nothing to do. OSNet's reduction is its
            own `fc`.
        classifier: Linear, or None for num_classes 0.
        feature_erasing: acts on stage 4 in training.
        mask_decoder: on stage 3, or None.
        mask_branch: reduction, neck and (if there are classes) classifier of the second branch, or None.
        feature_dim: F, of each branch. embedding_dim: D, of all together.
        feature_names, logit_names: of the branches in `features` and `logits` of the output.
        embed: "after" or "before" the neck, what retrieval compares.
    """

    def __init__(
        self, backbone, num_classes, pooling, neck, dropout, reduced_dim, mask_decoder=None, mask_pooling="off",
        cosine=False, feature_erasing="off",
    ):  # fmt: skip
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling
        channels, is_osnet = backbone.stage_channels[-1], isinstance(backbone, OSNet)
        self.feature_dim = reduced_dim or (512 if is_osnet else channels)

        def new_head():
            reduction = linear_reduction(channels, reduced_dim) if reduced_dim else None
            reduction = relu_reduction(channels, self.feature_dim, bias=True) if is_osnet else reduction
            return head_parts(self.feature_dim, num_classes, reduction, neck, cosine)

        self.reduction, self.neck, self.classifier = new_head()
        self.dropout = nn.Dropout(dropout)
        self.feature_erasing = FEATURE_ERASINGS[feature_erasing]()
        self.mask_decoder = mask_decoder
        self.mask_pooling = mask_pooling
        self.mask_branch = nn.ModuleList(new_head()) if mask_pooling == "branch" else None
        self.feature_names = ["global", "masked"] if mask_pooling == "branch" else ["global"]
        self.logit_names = self.feature_names if num_classes else []
        self.embedding_dim = self.feature_dim * len(self.feature_names)
        self.embed = "after"

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Channels of the four maps in `stages` of the output."""
        return self.backbone.stage_channels

    def activation_maps(self, images: Tensor) -> dict[str, Tensor]:
        """{"global": the map (B, C4, h, w) that is pooled}."""
        return {"global": self.backbone.forward_stages(images)[-1]}

    def forward(self, images: Tensor, return_mask: bool | None = None, return_stages: bool = False) -> ReIDOutput:
        """(B, 3, H, W) -> ReIDOutput.

        return_mask: whether the output has the mask; None means in training always, in evaluation never. The decoder
            runs where the mask is returned or pooled with. Asking a network without a decoder for a mask raises
            ValueError.
        return_stages: whether the output has the backbone's four maps.
        """
        if return_mask is None:
            return_mask = self.training and self.mask_decoder is not None
        if return_mask and self.mask_decoder is None:
            raise ValueError("this network was built without a mask decoder, so it has no mask to return")
        stages = self.backbone.forward_stages(images)  # (B, C3, H/16, W/16), (B, C4, h, w) the last two
        mask = None
        if return_mask or self.mask_pooling != "off":
            mask = self.mask_decoder(stages[2])  # (B, 1, mask_h, mask_w)
        mask_weights = None if self.mask_pooling == "off" else _position_weights(mask, stages[3])  # (B, 1, h, w)
        output = self.head(self.feature_erasing(stages[3]), mask_weights)
        return ReIDOutput(*output, mask if return_mask else None, stages if return_stages else None)

    def head(self, stage4: Tensor, mask_weights: Tensor | None = None) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """What follows the backbone: (B, C4, h, w) -> embedding, features and logits of `ReIDOutput`.

        mask_weights: (B, 1, h, w), above 0, what each position counts in mask pooling; None: all the same.
        """
        head = (self.reduction, self.neck, self.classifier)
        if self.mask_pooling == "branch":
            branches = [(None, head), (mask_weights, (*self.mask_branch, None)[:3])]
        else:
            branches = [(mask_weights, head)]
        outputs = [through_head(self.pooling(stage4, weights), *head, self.dropout) for weights, head in branches]
        features, embeddings, logits = (list(values) for values in zip(*outputs, strict=True))
        chosen = features if self.embed == "before" else embeddings
        embedding = chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=1)
        return embedding, features, [scores for scores in logits if scores is not None]


def build_reid_model(
    backbone: str,
    num_classes: int,
    *,
    model: str = "bot",
    last_stride: int = 1,
    pooling: str = "avg",
    neck: str | None = None,
    dropout: float | None = None,
    embedding_dim: int = 0,
    cosine: bool = False,
    parts: int = 0,
    branches: tuple[str, ...] = (),
    attention: str | None = None,
    attention_stages: tuple[int, ...] = (3, 4),
    feature_erasing: str = "off",
    stem_relu: bool = True,
    mask_size: tuple[int, int] = (256, 256),
    with_mask: bool | None = None,
    mask_decoder: str = "full",
    mask_pooling: str = "off",
    num_domains: int = 1,
) -> ReIDModel | PartsModel:
    """A network with random weights; `core.models.weights.load_weights` gives it published ones.

    Args:
        backbone: a name in `BACKBONES`; of the network "bot" also one followed by `_with_mask`.
        num_classes: identities to train on; 0 builds no classifier.
        model: a name in `MODELS`.
        last_stride: stride of a ResNet's stage 4, 1 or 2.
        pooling: "avg", "max" or "gem", of "bot"; the others have their own.
        neck: "bnneck" or "none"; None: as in `MODELS`.
        dropout: probability, before the classifier; None: as in `MODELS`.
        embedding_dim: size of a branch's embedding; 0: the network's own, which for "bot" is the backbone's; otherwise
            "bot" gets a Linear layer before the neck.
        cosine: the classifier gives cosines (`core.models.head.CosineClassifier`).
        parts: stripes of pcb and pyramid; 0: 6.
        branches: of LightMBN; (): all three.
        attention: a name in `ATTENTIONS`, a block of it behind each of `attention_stages` of a ResNet.
        feature_erasing: "off", "batch" or "top": what "bot" erases of stage 4 in training.
        stem_relu: of a ResNet, see there.
        mask_size: (height, width) in pixels of predicted masks.
        with_mask: None builds the decoder if the backbone's name ends in `_with_mask`; False never does, so that
            nothing is left without a gradient where no loss asks for a mask; True always.
        mask_decoder: "full" (the original's) or "light".
        mask_pooling: "off", "soft" or "branch"; see `ReIDModel`.
        num_domains: above 1 every BatchNorm is a `DomainSpecificBatchNorm`.

    Raises:
        InputError: an unknown name, the message lists the known ones; what a network can't have.
    """
    name = backbone.removesuffix(MASK_SUFFIX)
    if name not in BACKBONES:
        known = ", ".join(BACKBONES)
        raise InputError(f"unknown backbone {backbone!r}; use one of {known}, each also with {MASK_SUFFIX} added")
    choices = {
        "model": (model, MODELS),
        "pooling": (pooling, POOLINGS),
        "neck": (neck or NECKS[0], NECKS),
        "attention": (attention or "se", ATTENTIONS),
        "feature erasing": (feature_erasing, FEATURE_ERASINGS),
        "mask decoder": (mask_decoder, MASK_DECODERS),
        "mask pooling": (mask_pooling, MASK_POOLINGS),
    }
    for what, (value, known) in choices.items():
        if value not in known:
            raise InputError(f"unknown {what} {value!r}; use one of {', '.join(known)}")
    neck = neck or MODELS[model].neck
    dropout = MODELS[model].dropout if dropout is None else dropout
    if with_mask is None:
        with_mask = backbone.endswith(MASK_SUFFIX)
    if mask_pooling != "off" and not with_mask:
        raise InputError(f"mask pooling {mask_pooling} needs a mask decoder: use {name}{MASK_SUFFIX} and a mask loss")
    for given, which, models in (
        (parts, "parts", ("pcb", "pyramid")),
        (branches, "branches", ("lmbn_n", "lmbn_r")),
        (with_mask, "a mask decoder", ("bot",)),
        (pooling != "avg", f"{pooling} pooling", ("bot",)),
        (feature_erasing != "off", "feature erasing", ("bot",)),
    ):
        if given and model not in models:
            raise InputError(f"network {model} has no choice of {which}: leave it out, or use {' or '.join(models)}")
    body = _build_backbone(name, last_stride, stem_relu, attention, attention_stages)
    if model != "bot":
        own = {"feature_dim": embedding_dim, "parts": parts, "branches": branches}
        own = {key: value for key, value in own.items() if value}
        network = PARTS_MODELS[model](num_classes, body, neck=neck, dropout=dropout, cosine=cosine, **own)
    else:
        decoder = MASK_DECODERS[mask_decoder](body.stage_channels[-2], mask_size) if with_mask else None
        network = ReIDModel(
            body, num_classes, build_pooling(pooling), neck, dropout, embedding_dim, decoder,
            mask_pooling, cosine, feature_erasing,
        )  # fmt: skip
    return to_domain_specific(network, num_domains) if num_domains > 1 else network


def _build_backbone(name, last_stride, stem_relu, attention, attention_stages):
    """A backbone without classifier; attention stands behind the last block of a stage, where no published key is."""
    if name in OSNETS:
        if attention:
            raise InputError(f"attention is for ResNets, {name} has its own: leave it out")
        return OSNETS[name](0, feature_dim=0)
    resnet = RESNETS[name](0, last_stride, zero_init_residual=name not in SHALLOW, stem_relu=stem_relu)
    for stage in attention_stages if attention else ():
        if stage not in (1, 2, 3, 4):
            raise InputError(f"there is no stage {stage}: attention stages are of 1, 2, 3, 4")
        block = ATTENTIONS[attention](resnet.stage_channels[stage - 1])
        getattr(resnet, f"layer{stage}").add_module("attention", block)
    return resnet


def _position_weights(mask: Tensor, stage4: Tensor) -> Tensor:
    """How much each position of (B, C, h, w) counts by the mask (B, 1, mask_h, mask_w): (B, 1, h, w), above 0."""
    (height, width), (rows, columns) = [map(int, x.shape[-2:]) for x in (mask, stage4)]
    if height % rows == width % columns == 0:  # the same, and an ONNX file can hold it
        weights = F.avg_pool2d(mask.detach(), (height // rows, width // columns))
    else:
        weights = F.interpolate(mask.detach(), size=(rows, columns), mode="area")
    return weights.clamp(min=LEAST_WEIGHT)
