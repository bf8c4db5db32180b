"""Networks of several branches: a shared trunk, copies of the backbone's deep part, and what is pooled from each map.

LightMBN, MGN, PCB and the pyramid are compositions of what stands here.
"""

import copy
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import InputError
from core.models.head import Head, ReIDOutput
from core.models.resnet import ResNet


def split_backbone(backbone: nn.Module, copies: int) -> tuple[nn.Sequential, list[nn.Sequential]]:
    """(trunk, deep parts): everything up to the first block of stage 3, and `copies` of what follows it.

    The modules keep their names, so behind `trunk.` and `branches.<name>.deep.` stand the keys of the backbone. ResNets
    are split at `layer3`, OSNets at `conv3`, as in MGN (Wang et al. 2018) and LightMBN. `backbone` is used up.
    """
    name = "layer3" if isinstance(backbone, ResNet) else "conv3"
    children = {key: child for key, child in backbone.named_children() if key not in ("fc", "classifier")}
    stage = OrderedDict(children[name].named_children())
    at = list(children).index(name)
    first = next(iter(stage))
    shallow = OrderedDict(list(children.items())[:at])
    shallow[name] = nn.Sequential(OrderedDict({first: stage.pop(first)}))
    deep = OrderedDict({name: nn.Sequential(stage), **dict(list(children.items())[at + 1 :])})
    return nn.Sequential(shallow), [copy.deepcopy(nn.Sequential(deep)) for _ in range(copies)]


def halve_last_stage(deep: nn.Sequential) -> nn.Sequential:
    """A ResNet's `deep` part whose stage 4 has stride 2: a coarser map. No weight changes its shape."""
    block = deep.layer4[0]
    (block.conv2 if hasattr(block, "conv3") else block.conv1).stride = (2, 2)
    if block.downsample is not None:
        block.downsample[0].stride = (2, 2)
    return deep


def pool(x: Tensor, how: str) -> Tensor:
    """(B, C, h, w) -> (B, C) by "avg", "max" or "sum" of both."""
    if how == "sum":
        return pool(x, "avg") + pool(x, "max")
    return x.mean(dim=(2, 3)) if how == "avg" else x.amax(dim=(2, 3))


def stripes_of(x: Tensor, count: int) -> tuple[Tensor, ...]:
    """`count` horizontal stripes of a map (B, C, h, w), as equal in height as rows allow."""
    if x.shape[2] < count:
        raise InputError(f"{count} parts of a map of {x.shape[2]} rows: give fewer parts or a larger picture height")
    return x.tensor_split(count, dim=2)


class Branch(nn.Module):
    """The trunk's map (B, C', h', w') -> a list of pooled vectors (B, C), as many as it has names.

    Args:
        name: its vectors are called so: the whole map's `name`, the stripes' `name`_1, ...; `names` lists them.
        deep: what makes the map (B, C, h, w).
        whole: how the whole map is pooled; None: it isn't.
        stripes: number of horizontal stripes.
        stripe_pooling: how each is pooled.
    """

    def __init__(
        self, name: str, deep: nn.Module, whole: str | None = None, stripes: int = 0, stripe_pooling: str = "avg"
    ):
        super().__init__()
        self.name, self.deep = name, deep
        self.whole, self.stripes, self.stripe_pooling = whole, stripes, stripe_pooling
        self.names = [name] * bool(whole) + [f"{name}_{number}" for number in range(1, stripes + 1)]

    def map(self, x: Tensor) -> Tensor:
        return self.deep(x)

    def pooled(self, x: Tensor) -> list[Tensor]:
        whole = [pool(x, self.whole)] if self.whole else []
        stripes = stripes_of(x, self.stripes) if self.stripes else ()
        return whole + [pool(stripe, self.stripe_pooling) for stripe in stripes]

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.pooled(self.map(x))


class PartsModel(nn.Module):
    """Pictures (B, 3, H, W), normalised -> ReIDOutput of several branches.

    The embedding is the heads' embeddings, each of unit length, one after the other: so the originals compare them.

    Args:
        trunk: pictures -> the map that the branches share.
        branches: each reads the trunk's map.
        heads: a `Head` for each vector of each branch, in their order.
        metric: names of the vectors that metric losses compare. Without classifiers all are, so that all learn.
        pooled_channels: above 0 retrieval compares what was pooled, of so many channels, and not what the heads made of
            it (PCB).

    Attributes:
        feature_names, logit_names: of the entries of `features` and `logits` in the output.
        embed: "after" or "before" the neck, what retrieval compares.
    """

    mask_decoder = None
    stage_channels = ()  # its output has no stages

    def __init__(
        self, trunk: nn.Module, branches: list[Branch], heads: list[Head], metric: list[str], pooled_channels: int = 0
    ):
        super().__init__()
        self.trunk = trunk
        names = [name for branch in branches for name in branch.names]
        self.branches = nn.ModuleDict({branch.name: branch for branch in branches})
        self.heads = nn.ModuleDict(dict(zip(names, heads, strict=True)))
        has_classes = heads[0].classifier is not None
        self.feature_names = [name for name in names if name in metric] if has_classes else names
        self.logit_names = names if has_classes else []
        self.feature_dim = heads[0].feature_dim
        self.pooled_channels = pooled_channels
        self.embedding_dim = (pooled_channels or self.feature_dim) * len(names)
        self.embed = "after"

    @property
    def backbone(self) -> nn.ModuleList:
        """What a backbone's weights fill, for those who freeze it."""
        return nn.ModuleList([self.trunk, *(branch.deep for branch in self.branches.values())])

    def activation_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Branch name -> its map (B, C, h, w)."""
        shared = self.trunk(images)
        return {name: branch.map(shared) for name, branch in self.branches.items()}

    def forward(self, images: Tensor, return_mask: bool | None = None, return_stages: bool = False) -> ReIDOutput:
        """return_mask: True raises ValueError, since there is no mask decoder. return_stages: there are none either."""
        if return_mask:
            raise ValueError("a network of several branches has no mask to return")
        shared = self.trunk(images)  # (B, C', H/16, W/16)
        pooled = [vector for branch in self.branches.values() for vector in branch(shared)]  # (B, C) each
        outputs = [head(vector) for head, vector in zip(self.heads.values(), pooled, strict=True)]
        features, embeddings, logits = zip(*outputs, strict=True)
        chosen = pooled if self.pooled_channels else features if self.embed == "before" else embeddings
        embedding = torch.cat([F.normalize(vector) for vector in chosen], dim=1)  # (B, D)
        compared = [feature for name, feature in zip(self.heads, features, strict=True) if name in self.feature_names]
        return ReIDOutput(embedding, compared, [scores for scores in logits if scores is not None])
