"""LightMBN (Herzog et al. 2021, "Lightweight Multi-Branch Network for Person Re-Identification")."""

from torch import Tensor, nn

from core.errors import InputError
from core.layers.attention import TopDropBlock
from core.models.head import Head, linear_reduction, relu_reduction
from core.models.osnet import OSBlock, OSNet, osnet_x1_0
from core.models.parts import Branch, PartsModel, halve_last_stage, pool, split_backbone
from core.models.resnet import Bottleneck, ResNet, resnet50

BRANCHES = ("global", "part", "channel")


class GlobalBranch(Branch):
    """The whole map behind one more block; and its maximum where the most active third of its rows is erased."""

    def __init__(self, deep: nn.Module, bottleneck: nn.Module, pooling: str):
        super().__init__("global", deep, pooling)
        self.names = ["global", "drop"]
        self.bottleneck, self.drop = bottleneck, TopDropBlock(0.33)

    def map(self, x: Tensor) -> Tensor:
        return self.bottleneck(self.deep(x))

    def pooled(self, x: Tensor) -> list[Tensor]:
        return [pool(x, self.whole), pool(self.drop(x), "max")]


class ChannelBranch(Branch):
    """The whole map pooled, and the vector cut into two halves of the channels."""

    def __init__(self, deep: nn.Module, pooling: str):
        super().__init__("channel", deep, pooling)
        self.names = ["channel_1", "channel_2"]

    def pooled(self, x: Tensor) -> list[Tensor]:
        return list(pool(x, self.whole).chunk(2, dim=1))


def lightmbn(
    backbone: nn.Module, num_classes: int, *, feature_dim: int = 512, branches: tuple[str, ...] = BRANCHES, **head
) -> PartsModel:
    """LightMBN on an OSNet (LMBN_n) or a ResNet (LMBN_r); both are one network but for how two maps are pooled.

    Args:
        backbone: used up.
        branches: which of `BRANCHES` there are; the paper's ablation. InputError for others.
        head: `neck`, `dropout`, `cosine` of each `Head`.
    """
    if not branches or set(branches) - set(BRANCHES):
        raise InputError(f"LightMBN has the branches {', '.join(BRANCHES)}, not {', '.join(branches) or 'none'}")
    channels, is_resnet = backbone.stage_channels[-1], isinstance(backbone, ResNet)
    pooling = "max" if is_resnet else "avg"
    bottleneck = Bottleneck(channels, channels // 4) if is_resnet else OSBlock(channels, channels)
    trunk, (first, second, third) = split_backbone(backbone, copies=3)
    built = {
        "global": GlobalBranch(halve_last_stage(first) if is_resnet else first, bottleneck, pooling),
        "part": Branch("part", second, "max", stripes=2),
        "channel": ChannelBranch(third, pooling),
    }
    shared = relu_reduction(channels // 2, feature_dim)

    def head_of(name: str) -> Head:
        reduction = shared if name.startswith("channel") else linear_reduction(channels, feature_dim, bias=False)
        return Head(feature_dim, num_classes, reduction, **head)

    chosen = [built[name] for name in BRANCHES if name in branches]
    heads = [head_of(name) for branch in chosen for name in branch.names]
    metric = ["global", "drop", "part"] if set(branches) - {"channel"} else ["channel_1", "channel_2"]
    return PartsModel(trunk, chosen, heads, metric)


def lmbn_n(num_classes: int, backbone: OSNet | None = None, **options) -> PartsModel:
    """LMBN_n; options as in `lightmbn`."""
    return lightmbn(backbone or osnet_x1_0(0), num_classes, **options)


def lmbn_r(num_classes: int, backbone: ResNet | None = None, **options) -> PartsModel:
    """LMBN_r; options as in `lightmbn`."""
    return lightmbn(backbone or resnet50(0, last_stride=1), num_classes, **options)
