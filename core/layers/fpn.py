"""Feature pyramid network (Lin et al. 2017): maps of every resolution with the meaning of the deepest one."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class FeaturePyramidNetwork(nn.Module):
    """Maps of a backbone's stages -> as many maps of `out_channels` at the same resolutions, and one coarser.

    Source: Lin et al. 2017, "Feature Pyramid Networks for Object Detection", figure 3: a 1x1 convolution of each stage
    (`inner_blocks`), to which the coarser level is added upsampled to its size, and a 3x3 convolution of the sum
    (`layer_blocks`). The coarsest map, P6, is P5 at every second position (the paper's footnote 2): the RPN alone uses
    it. Keys and initialisation are torchvision's.

    Args:
        in_channels: channels of each stage, finest first.
        out_channels: channels of every map of the pyramid.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int = 256):
        super().__init__()
        self.inner_blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(c, out_channels, 1)) for c in in_channels)
        self.layer_blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(out_channels, out_channels, 3, padding=1)) for _ in in_channels
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)

    def forward(self, stages: Sequence[Tensor]) -> dict[str, Tensor]:
        """Maps (B, Ci, Hi, Wi), finest first -> "0", "1", ...: (B, out_channels, Hi, Wi), and "pool" of half the last.

        Sizes needn't be halves of each other: the coarser map is upsampled to whatever size the finer one has.
        """
        inner = self.inner_blocks[-1](stages[-1])
        maps = [self.layer_blocks[-1](inner)]
        for i in reversed(range(len(stages) - 1)):
            lateral = self.inner_blocks[i](stages[i])
            inner = lateral + F.interpolate(inner, size=lateral.shape[-2:], mode="nearest")
            maps.insert(0, self.layer_blocks[i](inner))
        pyramid = {str(i): level for i, level in enumerate(maps)}
        pyramid["pool"] = maps[-1][..., ::2, ::2]
        return pyramid
