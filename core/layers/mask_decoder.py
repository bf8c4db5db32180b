"""Decoders that predict where in the picture the object is, from the features of a ResNet's third stage."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaskDecoder(nn.Module):
    """Stage-3 features (B, C, h, w) -> one mask per picture (B, 1, mask_h, mask_w), values in [0, 1].

    Four 3x3 convolutions with BatchNorm and ReLU (512, 256, 128, 64 channels), a bilinear x2 after each of the first
    three, a 1x1 convolution to one channel, sigmoid, and a bilinear resize to `mask_size`. Stage 3 has 1/16 of the
    picture's size, so the mask is predicted at 1/2 of it. Source: OpenUnReID's fork XJTU-SuitcaseReID, whose key names
    these are; its 2.4 billion multiply-adds at 256x128 pixels are 1.3 here (`convolve_doubled`). The sigmoid comes
    before the resize, as there; both compute in float32 under autocast.

    One departure, in how training starts: the original draws the last convolution by Kaiming's rule for its single
    output, which gives logits of about +-8 and a sigmoid without gradient; here its weights start near 0, the mask at
    1/2 everywhere.

    Args:
        in_channels: C, 1024 for a ResNet of Bottlenecks and 256 for one of BasicBlocks.
        mask_size: (height, width) of the masks that come out, in pixels.
    """

    def __init__(self, in_channels: int, mask_size: tuple[int, int] = (256, 256)):
        super().__init__()
        self.mask_size = tuple(mask_size)
        self.conv1 = nn.Conv2d(in_channels, 512, kernel_size=3, padding=1)
        self.bn1 = nn.BatchNorm2d(512)
        self.conv2 = nn.Conv2d(512, 256, kernel_size=3, padding=1)
        self.bn2 = nn.BatchNorm2d(256)
        self.conv3 = nn.Conv2d(256, 128, kernel_size=3, padding=1)
        self.bn3 = nn.BatchNorm2d(128)
        self.conv4 = nn.Conv2d(128, 64, kernel_size=3, padding=1)
        self.bn4 = nn.BatchNorm2d(64)
        self.mask_pred = nn.Conv2d(64, 1, kernel_size=1)
        for convolution in (self.conv1, self.conv2, self.conv3, self.conv4):
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(convolution.bias)
        _start_at_one_half(self.mask_pred)

    def forward(self, features: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(features)))  # (B, 512, h, w)
        x = F.relu(self.bn2(convolve_doubled(x, self.conv2)))  # (B, 256, 2h, 2w)
        x = F.relu(self.bn3(convolve_doubled(x, self.conv3)))  # (B, 128, 4h, 4w)
        x = F.relu(self.bn4(convolve_doubled(x, self.conv4)))  # (B, 64, 8h, 8w)
        return _probabilities(self.mask_pred(x), self.mask_size)


class LightMaskDecoder(nn.Module):
    """A decoder for a fortieth of the work: stage-3 features (B, C, h, w) -> (B, 1, mask_h, mask_w) in [0, 1].

    A 1x1 convolution to 128 channels before anything is enlarged, a bilinear x2, a 3x3 convolution to 64 channels, each
    with BatchNorm and ReLU, a 1x1 convolution to one channel, sigmoid, and a bilinear resize from 1/8 of the picture to
    `mask_size`. At 256x128 pixels on 1024 channels it has 0.03 billion multiply-adds where `MaskDecoder` has 1.3. Ours.
    """

    def __init__(self, in_channels: int, mask_size: tuple[int, int] = (256, 256)):
        super().__init__()
        self.mask_size = tuple(mask_size)
        self.conv1 = nn.Conv2d(in_channels, 128, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(128)
        self.conv2 = nn.Conv2d(128, 64, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.mask_pred = nn.Conv2d(64, 1, kernel_size=1)
        for convolution in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        _start_at_one_half(self.mask_pred)

    def forward(self, features: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(features)))  # (B, 128, h, w)
        x = F.relu(self.bn2(convolve_doubled(x, self.conv2)))  # (B, 64, 2h, 2w)
        return _probabilities(self.mask_pred(x), self.mask_size)


MASK_DECODERS = {"full": MaskDecoder, "light": LightMaskDecoder}


def _start_at_one_half(convolution: nn.Conv2d) -> None:
    nn.init.normal_(convolution.weight, std=0.01)
    nn.init.zeros_(convolution.bias)


def _probabilities(logits: Tensor, size: tuple[int, int]) -> Tensor:
    mask = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
    return F.interpolate(mask, size=size, mode="bilinear", align_corners=False)


def convolve_doubled(x: Tensor, convolution: nn.Conv2d) -> Tensor:
    """A 3x3 convolution, padding 1, of the map enlarged to twice its sides (bilinear), for a quarter of its products.

    Enlarging works on each channel by itself and the taps of the convolution on each position by itself, so they may
    change places: the nine taps mix the channels of the small map, and two matrices then enlarge, shift and add, along
    the rows and along the columns. That is exact but for rounding, and twice as quick, backward too.

    Shape: (B, C, h, w) -> (B, D, 2h, 2w).
    """
    (batch, channels, height, width), depth = x.shape, convolution.out_channels
    taps = convolution.weight.permute(3, 2, 0, 1).reshape(9 * depth, channels)  # the kernel's columns, rows, outputs
    mixed = F.linear(x.permute(0, 2, 3, 1), taps)  # (B, h, w, 3 * 3 * D)
    wide = _double_and_shift(width, x) @ mixed.reshape(batch, height, 3 * width, 3 * depth)  # (B, h, 2w, 3 * D)
    wide = wide.reshape(batch, height, 2 * width, 3, depth).transpose(2, 3)  # (B, h, 3, 2w, D)
    full = _double_and_shift(height, x) @ wide.reshape(batch, 3 * height, 2 * width * depth)  # (B, 2h, 2w * D)
    full = full.reshape(batch, 2 * height, 2 * width, depth)
    if convolution.bias is not None:
        full = full + convolution.bias.to(full.dtype)
    return full.permute(0, 3, 1, 2).contiguous()


def _double_and_shift(length: int, like: Tensor) -> Tensor:
    """(2n, 3n): column 3 * i + k is where tap k sees position i of n when these are enlarged to 2n and padded by 1."""
    positions = torch.eye(length, device=like.device)[:, None]  # (n, 1, n)
    padded = F.pad(F.interpolate(positions, scale_factor=2, mode="linear")[:, 0], (1, 1))  # (n, 2n + 2)
    # The trap: `unfold` says this, too, and no ONNX file can hold it.
    shifted = torch.stack([padded[:, tap : tap + 2 * length] for tap in range(3)], dim=1)  # (n, 3, 2n)
    return shifted.reshape(3 * length, 2 * length).T.to(like.dtype)  # quarters: exact in any type
