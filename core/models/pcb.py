"""Networks of horizontal stripes: PCB (Sun et al. 2018) and the pyramid of stripes (Zheng et al. 2019)."""

from torch import Tensor, nn

from core.models.head import Head, linear_reduction, relu_reduction
from core.models.parts import Branch, PartsModel, pool, split_backbone, stripes_of
from core.models.resnet import ResNet, resnet50


def pcb(
    num_classes: int, backbone: ResNet | None = None, *, parts: int = 6, feature_dim: int = 256,
    neck: str = "bnneck", dropout: float = 0.0, cosine: bool = False,
) -> PartsModel:  # fmt: skip
    """PCB: each of `parts` stripes, average-pooled, says by itself who it is.

    With the neck "bnneck" it is LightMBN's: a head each, and one of the whole, which metric losses compare. With "none"
    it is the paper's and torchreid's: one reduction for all stripes, and retrieval compares what was pooled; they train
    it with dropout 0.5.

    Args:
        backbone: used up. None: ResNet-50.
    """
    backbone = backbone or resnet50(0, last_stride=1)
    channels, is_published = backbone.stage_channels[-1], neck == "none"
    trunk, (deep,) = split_backbone(backbone, copies=1)
    branch = Branch("part", deep, None if is_published else "avg", stripes=parts)
    shared = relu_reduction(channels, feature_dim) if is_published else None
    heads = [
        Head(feature_dim, num_classes, shared or linear_reduction(channels, feature_dim, False), neck, dropout, cosine)
        for _ in branch.names
    ]
    metric = branch.names if is_published else ["part"]
    return PartsModel(trunk, [branch], heads, metric, channels if is_published else 0)


class PyramidBranch(Branch):
    """Every run of neighbouring stripes, from each alone to all together: n * (n + 1) / 2 vectors."""

    def __init__(self, deep: nn.Module, stripes: int):
        super().__init__("part", deep, stripes=stripes, stripe_pooling="sum")
        self.runs = [(start, start + size) for size in range(1, stripes + 1) for start in range(stripes - size + 1)]
        self.names = [f"part_{start + 1}_{end}" for start, end in self.runs]

    def pooled(self, x: Tensor) -> list[Tensor]:
        ends = [0]
        for stripe in stripes_of(x, self.stripes):
            ends.append(ends[-1] + stripe.shape[2])
        return [pool(x[:, :, ends[start] : ends[end]], self.stripe_pooling) for start, end in self.runs]


def pyramid(
    num_classes: int, backbone: ResNet | None = None, *, parts: int = 6, feature_dim: int = 128, neck: str = "none",
    dropout: float = 0.2, cosine: bool = False,
) -> PartsModel:  # fmt: skip
    """The pyramid: a head for every run of neighbouring stripes, average and maximum added, 21 of them for 6 parts.

    Metric losses compare all of them, one by one (in the paper: concatenated).
    """
    backbone = backbone or resnet50(0, last_stride=1)
    channels = backbone.stage_channels[-1]
    trunk, (deep,) = split_backbone(backbone, copies=1)
    branch = PyramidBranch(deep, parts)
    heads = [
        Head(feature_dim, num_classes, relu_reduction(channels, feature_dim), neck, dropout, cosine)
        for _ in branch.names
    ]
    return PartsModel(trunk, [branch], heads, metric=branch.names)
