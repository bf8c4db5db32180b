"""Losses on the classifier's output: which identity is it?"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from core.errors import InputError
from core.losses.precision import in_float32


class CrossEntropyLoss(nn.Module):
    """Cross entropy with label smoothing (Szegedy et al. 2016, section 7), the mean over the batch.

    The target is (1 - e) * onehot + e / K for smoothing e and K identities, as in Luo et al. 2019 and in torch;
    fast-reid's variant spreads e over the K - 1 wrong identities instead.

    Args:
        label_smoothing: e, 0 to 1. InputError outside.

    Shape: logits (B, K), labels (B,) integers 0..K-1 -> scalar; 0 for an empty batch.
    """

    def __init__(self, label_smoothing=0.0):
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise InputError(f"label smoothing is {label_smoothing}: give a number from 0 to 1")
        self.label_smoothing = label_smoothing

    @in_float32
    def forward(self, logits, labels):
        total = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing, reduction="sum")
        return total / max(len(labels), 1)  # torch's own mean over an empty batch is NaN


class FocalLoss(nn.Module):
    """Focal loss on class scores: -alpha (1 - p)^gamma log p, with p of the true identity by softmax; the batch mean.

    Lin et al. 2017, equation 5, whose alpha here is a plain factor. LightMBN adds 1e-6 to p.

    Args:
        alpha: factor, at least 0. InputError otherwise.
        gamma: 0 (no focus) or at least 1: between them the gradient is infinite where p is 1. InputError otherwise.

    Shape: logits (B, K), labels (B,) integers 0..K-1 -> scalar; 0 for an empty batch.
    """

    def __init__(self, alpha=1.0, gamma=2.0):
        super().__init__()
        check_focal(alpha, gamma)
        self.alpha, self.gamma = alpha, gamma

    @in_float32
    def forward(self, logits, labels):
        surprise = F.cross_entropy(logits, labels, reduction="none")  # (B,): -log p
        focus = -torch.expm1(-surprise)  # 1 - p, without cancellation
        return self.alpha * (focus.pow(self.gamma) * surprise).sum() / max(len(labels), 1)


def check_focal(alpha, gamma):
    if not 0 <= alpha < math.inf:
        raise InputError(f"focal alpha is {alpha}: give a number from 0 up")
    if gamma != 0 and not 1 <= gamma < math.inf:
        raise InputError(f"focal gamma is {gamma}: give 0 or a number from 1 up")
