"""MGN (Wang et al. 2018, "Learning Discriminative Features with Multiple Granularities for Person ReID")."""

from core.models.head import Head, relu_reduction
from core.models.parts import Branch, PartsModel, halve_last_stage, split_backbone
from core.models.resnet import ResNet, resnet50


def mgn(
    num_classes: int, backbone: ResNet | None = None, *, feature_dim: int = 256, neck: str = "none", **head
) -> PartsModel:
    """Three branches: the whole; the whole and 2 stripes; the whole and 3 stripes; all max-pooled: 8 embeddings.

    Metric losses compare the three wholes, as reduced (LightMBN's; in the paper they see them before the reduction).

    Args:
        backbone: used up. None: ResNet-50.
        head: `dropout`, `cosine` of each `Head`.
    """
    backbone = backbone or resnet50(0, last_stride=1)
    channels = backbone.stage_channels[-1]
    trunk, (first, second, third) = split_backbone(backbone, copies=3)
    branches = [
        Branch("p1", halve_last_stage(first) if isinstance(backbone, ResNet) else first, "max"),
        Branch("p2", second, "max", stripes=2, stripe_pooling="max"),
        Branch("p3", third, "max", stripes=3, stripe_pooling="max"),
    ]
    names = [name for branch in branches for name in branch.names]
    heads = [Head(feature_dim, num_classes, relu_reduction(channels, feature_dim), neck, **head) for _ in names]
    return PartsModel(trunk, branches, heads, metric=["p1", "p2", "p3"])
