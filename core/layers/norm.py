"""Normalisation layers that torch.nn does not have."""

import copy

import torch
import torch.nn.functional as F
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


class GroupedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm that in training sees `group_size` consecutive pictures of a batch at a time.

    Source: Hoffer et al. 2017, algorithm 1, "ghost batch normalization".

    A batch of G groups gives what G processes with a group each give, whose running statistics are averaged. Parameters
    and keys are those of BatchNorm. Raises ValueError where a batch is not made of whole groups.
    """

    def __init__(self, channels: int, group_size: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__(channels, eps, momentum)
        self.group_size = group_size

    def _check_input_dim(self, x):
        pass

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> the same shape."""
        if not self.training or len(x) == self.group_size:
            return super().forward(x)
        if len(x) % self.group_size:
            raise ValueError(f"a batch of {len(x)} is not made of groups of {self.group_size}")
        outputs, means, variances = [], [], []
        for group in x.split(self.group_size):
            means.append(self.running_mean.clone())
            variances.append(self.running_var.clone())
            statistics = (means[-1], variances[-1])  # updated in place
            outputs.append(F.batch_norm(group, *statistics, self.weight, self.bias, True, self.momentum, self.eps))
        self.running_mean.copy_(torch.stack(means).mean(0))
        self.running_var.copy_(torch.stack(variances).mean(0))
        self.num_batches_tracked += 1
        return torch.cat(outputs)


class DomainSpecificBatchNorm(nn.Module):
    """A BatchNorm for each domain, weight, bias and statistics (Chang et al. 2019, "Domain-Specific Batch Normalization
    for Unsupervised Domain Adaptation"); all start as copies of one.

    In training a batch holds as many pictures of each domain, one domain after the other. In evaluation all are of
    domain `domain`, at first the last one; `use_domain` changes it. Raises ValueError for a batch that can't be cut.
    """

    def __init__(self, batch_norm: nn.Module, num_domains: int):
        super().__init__()
        self.dsbn = nn.ModuleList(copy.deepcopy(batch_norm) for _ in range(num_domains))
        self.domain = num_domains - 1

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> the same shape."""
        if not self.training:
            return self.dsbn[self.domain](x)
        if len(x) % len(self.dsbn):
            raise ValueError(f"a batch of {len(x)} has no equal parts for {len(self.dsbn)} domains")
        parts = x.chunk(len(self.dsbn))
        return torch.cat([norm(part) for norm, part in zip(self.dsbn, parts, strict=True)])


def use_domain(model: nn.Module, domain: int) -> None:
    """Whose BatchNorm evaluation uses from now on; nothing to do for a model that is not domain-specific."""
    for module in model.modules():
        if isinstance(module, DomainSpecificBatchNorm):
            module.domain = domain


def to_domain_specific(model: nn.Module, num_domains: int) -> nn.Module:
    """`model` with a DomainSpecificBatchNorm in the place of every BatchNorm; see `_replaced`."""
    return _replaced(model, nn.modules.batchnorm._BatchNorm, lambda norm: DomainSpecificBatchNorm(norm, num_domains))


def group_batch_norm(model: nn.Module, group_size: int) -> nn.Module:
    """`model` with a GroupedBatchNorm of the same parameters in the place of every BatchNorm; see `_replaced`."""

    def grouped(norm):
        new = GroupedBatchNorm(norm.num_features, group_size, norm.eps, norm.momentum)
        new.load_state_dict(norm.state_dict())
        new.weight, new.bias = norm.weight, norm.bias  # the very same, trained or not
        return new.to(norm.running_mean.device)

    return _replaced(model, nn.modules.batchnorm._BatchNorm, grouped)


def freeze_batch_norm(model: nn.Module) -> nn.Module:
    """`model` with a FrozenBatchNorm2d of the same numbers in the place of every BatchNorm2d; see `_replaced`."""

    def frozen(norm):
        new = FrozenBatchNorm2d(norm.num_features, norm.eps).to(norm.running_mean.device)
        new.load_state_dict(norm.state_dict())
        return new

    return _replaced(model, nn.BatchNorm2d, frozen)


def _replaced(module, kind, replacement):
    """`module` with every part of a kind replaced; changed in place, unless it is of that kind itself."""
    if isinstance(module, kind):
        return replacement(module)
    for name, child in module.named_children():
        setattr(module, name, _replaced(child, kind, replacement))
    return module
