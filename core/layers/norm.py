"""Normalisation layers that torch.nn does not have."""

import torch
from torch import Tensor, nn


class IBN(nn.Module):
    """Instance normalisation on the first half of the channels, batch normalisation on the second.

    Source: Pan et al. 2018, "Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net", the block
    IBN-a. The names `IN` and `BN` are those of IBN-Net's published weights.

    The instance half keeps no running statistics: it normalises each picture by that picture's own mean and variance,
    in evaluation as in training. A map of a single position therefore has no variance, and torch refuses it.

    Args:
        channels: number of input channels; `channels // 2` of them are normalised by instance.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.half = channels // 2
        self.IN = nn.InstanceNorm2d(self.half, affine=True)
        self.BN = nn.BatchNorm2d(channels - self.half)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if len(x) == 0:  # no pictures, nothing to normalise; torch's instance_norm fails on them
            return x
        by_instance, by_batch = x[:, : self.half], x[:, self.half :]
        return torch.cat((self.IN(by_instance), self.BN(by_batch)), dim=1)
