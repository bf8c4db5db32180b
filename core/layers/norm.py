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


class FrozenBatchNorm2d(nn.Module):
    """BatchNorm2d with fixed statistics and a fixed affine map: x * scale + bias with one number each per channel.

    Detection trains on a few pictures at a time, too few for batch statistics, so the backbone keeps those of its
    pre-training (He et al. 2017, section 3.1). Everything is a buffer: nothing is trained or decayed, and what averages
    buffers, over ranks or over steps, averages the same numbers. The keys are BatchNorm2d's without
    `num_batches_tracked`; a file that has it is read too. A scale or bias beyond the range of the input's type is cut
    to it: infinity times a channel of zeros would be no number.

    Args:
        channels: number of channels.
        eps: added to the variance.
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        bias = self.bias - self.running_mean * scale
        limit = min(torch.finfo(x.dtype).max, torch.finfo(scale.dtype).max)
        scale, bias = (value.clamp(-limit, limit).to(x.dtype)[:, None, None] for value in (scale, bias))
        return torch.addcmul(bias, x, scale)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


def freeze_batch_norm(module: nn.Module) -> nn.Module:
    """`module` with a FrozenBatchNorm2d of the same numbers in the place of every BatchNorm2d; changed in place,
    unless it is a BatchNorm2d itself."""
    if isinstance(module, nn.BatchNorm2d):
        frozen = FrozenBatchNorm2d(module.num_features, module.eps).to(module.running_mean.device)
        frozen.load_state_dict(module.state_dict())
        return frozen
    for name, child in module.named_children():
        setattr(module, name, freeze_batch_norm(child))
    return module
