"""Global pooling: a feature map becomes one vector, (B, C, H, W) -> (B, C).

Each takes weights of the positions as well, (B, 1, H, W), above 0: a mask that says where the object is. Only their
ratios within a picture matter: without them, or with equal ones, every position counts the same.
"""

import torch
from torch import Tensor, nn


class AveragePooling(nn.Module):
    """The mean over all positions, (B, C, H, W) -> (B, C)."""

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        return _mean(x, weights)


class MaxPooling(nn.Module):
    """The largest value of all positions, (B, C, H, W) -> (B, C). Equal ones share the gradient.

    Each value is multiplied by its weight, of which the largest in a picture counts as 1.
    """

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        if weights is not None:
            x = x * (weights / weights.amax(dim=(2, 3), keepdim=True))
        return x.amax(dim=(2, 3))


class GeM(nn.Module):
    """Generalised-mean pooling, (B, C, H, W) -> (B, C): (mean of max(x, eps)^p)^(1/p), with p learned.

    p = 1 is the average, p -> infinity the maximum. Source: Radenovic et al. 2019, "Fine-tuning CNN Image Retrieval
    with No Human Annotation", equation 3, with one p for all channels.

    It computes in float32 at least, under autocast too: x^p leaves the range of half precision at once. Even in
    float32, eps^p is zero from p = 7.5 on, and a channel that is zero everywhere would get the gradient 0 * inf = NaN;
    so every channel is first divided by its largest value, which is multiplied back at the end. The result does not
    depend on that scale (the mean is homogeneous), so no gradient needs to pass through it.

    Args:
        p: the exponent to start from.
        eps: smaller values, negative ones included, are raised to this; they get no gradient.
    """

    def __init__(self, p: float = 3.0, eps: float = 1e-6):
        super().__init__()
        self.p = nn.Parameter(torch.full((1,), float(p)))
        self.eps = eps

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32)).clamp(min=self.eps)
        scale = x.detach().amax(dim=(2, 3), keepdim=True)  # (B, C, 1, 1)
        mean = _mean((x / scale).pow(self.p), weights)  # (B, C), in (0, 1]
        return mean.pow(1.0 / self.p) * scale.flatten(1)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


def _mean(x: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return x.mean(dim=(2, 3))
    return (x * weights).sum(dim=(2, 3)) / weights.sum(dim=(2, 3))


POOLINGS = {"avg": AveragePooling, "max": MaxPooling, "gem": GeM}


def build_pooling(name: str) -> nn.Module:
    """The pooling called `name`: avg, max or gem. Raises ValueError for another name."""
    if name not in POOLINGS:
        raise ValueError(f"unknown pooling {name!r}; known: {', '.join(POOLINGS)}")
    return POOLINGS[name]()
