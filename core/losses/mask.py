"""Losses on the predicted mask, and the targets made from boxes.

The losses take (prediction (B, 1, H, W) in [0, 1], target (B, 1, H, W) in [0, 1]) and return a scalar.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from core.errors import InputError
from core.losses.identity import check_focal
from core.losses.precision import at_least_float32, in_float32

REGRESSIONS = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}


def gaussian_masks(boxes, size, sigma_ratio):
    """A Gaussian bump over each box: 1 at its center, sigma = sigma_ratio * side, not normalised.

    The pixels stand at linspace(0, 1, W) and linspace(0, 1, H), both ends included. The bump is the product of a row
    and a column profile, so no grid of coordinates is made.

    Args:
        boxes: (N, 4) as x1, y1, x2, y2 in 0..1 of the picture.
        size: (H, W) in pixels.
        sigma_ratio: above 0. InputError otherwise.

    Returns:
        (N, 1, H, W) in [0, 1]; all 0 for a box without area.
    """
    if not 0 < sigma_ratio < math.inf:
        raise InputError(f"sigma ratio is {sigma_ratio}: give the Gaussian's width as a part of the box side, above 0")
    boxes = at_least_float32(boxes)
    columns = _profiles(boxes[:, 0], boxes[:, 2], size[1], sigma_ratio)  # (N, W)
    rows = _profiles(boxes[:, 1], boxes[:, 3], size[0], sigma_ratio)  # (N, H)
    return _outer(rows, columns)


def _profiles(start, end, length, sigma_ratio):
    """A Gaussian over each interval (N,), (N,), at `length` points of 0..1 -> (N, length); 0 where it has no length."""
    points = torch.linspace(0, 1, length, dtype=start.dtype, device=start.device)
    side = (end - start)[:, None]  # (N, 1)
    solid = side > 0
    sigma = torch.where(solid, side, 1.0) * sigma_ratio
    # The quotient is squared, not its parts: the square of a very small sigma would be 0.
    offset = (points - (start + end)[:, None] / 2) / sigma  # (N, length)
    return torch.where(solid, torch.exp(-offset.square() / 2), 0.0)


def box_masks(boxes, size):
    """1 on the pixels whose center lies in the box, 0 elsewhere.

    Pixel i of W has its center at (i + 0.5) / W, so a box on whole pixels covers exactly these, as instance masks do.

    Args:
        boxes: (N, 4) as x1, y1, x2, y2 in 0..1 of the picture.
        size: (H, W) in pixels.

    Returns:
        (N, 1, H, W) of 0 and 1; all 0 for a box without area.
    """
    boxes = at_least_float32(boxes)
    columns = _covered(boxes[:, 0], boxes[:, 2], size[1])  # (N, W)
    rows = _covered(boxes[:, 1], boxes[:, 3], size[0])  # (N, H)
    return _outer(rows, columns)


def _covered(start, end, length):
    """Which of `length` pixel centers lie in each interval (N,), (N,) -> (N, length) of 0 and 1."""
    centers = (torch.arange(length, dtype=start.dtype, device=start.device) + 0.5) / length
    return ((centers >= start[:, None]) & (centers < end[:, None])).to(start.dtype)


def _outer(rows, columns):
    return (rows[:, :, None] * columns[:, None, :])[:, None]  # (N, 1, H, W)


class GaussianMaskRegressionLoss(nn.Module):
    """Regression of a (Gaussian) mask, the mean over the pixels whose target is at least the threshold.

    The mean is over the whole batch, not over each picture. Where no pixel of it reaches the threshold, all count.

    With several processes the pixels can be counted over all of them: each returns W * (its sum) / (everyone's count)
    for W processes, so that DDP's mean over the processes is the value of the global batch.

    Args:
        kind: "mse", "l1" or "smooth_l1" (beta 1). InputError otherwise.
        threshold: 0 to 1; at 0 every pixel counts. InputError outside.
        gather: None, or a function that concatenates a tensor of all processes along dimension 0.

    Shape: prediction (B, 1, H, W), target (B, 1, H, W) -> scalar; 0 for an empty batch.
    """

    def __init__(self, kind="mse", threshold=0.0, gather=None):
        super().__init__()
        if kind not in REGRESSIONS:
            raise InputError(f"unknown mask regression {kind!r}: use one of {', '.join(REGRESSIONS)}")
        if not 0 <= threshold <= 1:
            raise InputError(f"mask threshold is {threshold}: give a number from 0 to 1")
        self.kind = kind
        self.threshold = threshold
        self.gather = gather

    @in_float32
    def forward(self, prediction, target):
        _require_same_shape(prediction, target)
        error = REGRESSIONS[self.kind](prediction, target, reduction="none")  # (B, 1, H, W)
        counts = target >= self.threshold if self.threshold > 0 else torch.ones_like(target, dtype=torch.bool)
        num_counting = counts.sum()
        pixels = torch.stack([num_counting, torch.full_like(num_counting, target.numel())])[None]  # (1, 2)
        if self.gather is not None:
            pixels = self.gather(pixels)  # (W, 2)
        num_counting, num_all = pixels.sum(dim=0)
        counts = counts | (num_counting == 0)
        num_counting = torch.where(num_counting == 0, num_all, num_counting).clamp(min=1)
        return len(pixels) * torch.where(counts, error, 0.0).sum() / num_counting


class FocalMaskLoss(nn.Module):
    """Focal loss for masks: alpha * |t - p|^gamma * binary cross entropy of p against t, the mean over all pixels.

    For a target t of 0 and 1 this is the focal loss (Lin et al. 2017, equation 4) with alpha as a plain factor; for a
    soft target it is the quality focal loss (Li et al. 2020): a pixel weighs less the better it fits, and is at its
    minimum where p = t. The original asks whether the target is exactly 1 and weighs all other pixels by p^gamma, so
    that under a Gaussian target nearly every pixel is background. There the two differ; on targets of 0 and 1 they are
    equal.

    Args:
        alpha: factor, at least 0. InputError otherwise.
        gamma: 0 (no focus) or at least 1: between them the gradient is infinite where a pixel fits exactly.
            InputError otherwise.

    Shape: prediction (B, 1, H, W) in [0, 1], target (B, 1, H, W) in [0, 1] -> scalar; 0 for an empty batch.
    """

    def __init__(self, alpha=1.0, gamma=2.0):
        super().__init__()
        check_focal(alpha, gamma)
        self.alpha = alpha
        self.gamma = gamma

    @in_float32
    def forward(self, prediction, target):
        _require_same_shape(prediction, target)
        # A sigmoid reaches 0 and 1 in float32. Written out, because torch's binary cross entropy answers a NaN with an
        # exception (on CUDA with an assertion that ends the process) where we want a NaN that the run can report.
        smallest = torch.finfo(prediction.dtype).eps
        safe = prediction.clamp(smallest, 1 - smallest)
        cross_entropy = -(target * torch.log(safe) + (1 - target) * torch.log1p(-safe))  # (B, 1, H, W)
        focus = (target - prediction).abs().pow(self.gamma)
        return self.alpha * (focus * cross_entropy).sum() / max(target.numel(), 1)


class CombinedMaskLoss(nn.Module):
    """`GaussianMaskRegressionLoss` over all pixels plus `focal_weight` times `FocalMaskLoss`.

    The default of 0.5 is the original's. Its focal part differs under soft targets, as said there.

    Shape: prediction (B, 1, H, W) in [0, 1], target (B, 1, H, W) in [0, 1] -> scalar; 0 for an empty batch.
    """

    def __init__(self, kind="mse", focal_weight=0.5):
        super().__init__()
        self.regression = GaussianMaskRegressionLoss(kind)
        self.focal = FocalMaskLoss()
        self.focal_weight = focal_weight

    def forward(self, prediction, target):
        return self.regression(prediction, target) + self.focal_weight * self.focal(prediction, target)


def _require_same_shape(prediction, target):
    """Broadcasting would turn a target of another size into a wrong loss without a word."""
    if prediction.shape != target.shape:
        raise ValueError(f"mask is {tuple(prediction.shape)} but its target is {tuple(target.shape)}")
