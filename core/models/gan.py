"""The networks that translate pictures between two domains: CycleGAN's, and the similarity network of SPGAN.

Sources: Zhu et al. 2017, "Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks", appendix;
Deng et al. 2018, "Image-Image Domain Adaptation with Preserved Self-Similarity and Domain-Dissimilarity for Person
Re-identification" (SPGAN). The keys are those of OpenUnReID. Pictures are float, in [-1, 1]. All weights start from
N(0, 0.02), biases from 0. Instance normalisation keeps no statistics: a picture's answer depends on no other one.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _initialise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _normalised(convolution: nn.Module, activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(convolution, nn.InstanceNorm2d(convolution.out_channels), activation)


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
    return _normalised(convolution, nn.ReLU(inplace=True))


def _upsample(in_channels: int, out_channels: int) -> nn.Sequential:
    convolution = nn.ConvTranspose2d(in_channels, out_channels, 3, 2, padding=1, output_padding=1, bias=False)
    return _normalised(convolution, nn.ReLU(inplace=True))


class _ReflectionPad(nn.ReflectionPad2d):
    """torch's, where its gradient need not be the same twice: on CUDA it is summed in no fixed order."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.are_deterministic_algorithms_enabled():
            return super().forward(x)
        for dim, pad in ((-1, self.padding[0]), (-2, self.padding[2])):
            size = x.shape[dim]
            before, after = x.narrow(dim, 1, pad), x.narrow(dim, size - 1 - pad, pad)
            x = torch.cat((before.flip(dim), x, after.flip(dim)), dim)
        return x


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, without an activation at the end: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            _ReflectionPad(1),
            _conv(channels, channels, 3),
            _ReflectionPad(1),
            nn.Conv2d(channels, channels, 3),
            nn.InstanceNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class ResNetGenerator(nn.Module):
    """A picture in another look: (B, 3, H, W) -> (B, 3, H, W), both in [-1, 1]; see `nearest_size` for H and W.

    Args:
        channels: of the first convolution, at full size; a quarter of the size has four times as many.
        blocks: residual blocks at a quarter of the size. The paper takes 6 for 128x128 pixels, 9 for 256x256.
    """

    def __init__(self, channels: int = 64, blocks: int = 9):
        super().__init__()
        self.G = nn.Sequential(
            _ReflectionPad(3),
            _conv(3, channels, 7),
            _conv(channels, 2 * channels, 3, stride=2, padding=1),
            _conv(2 * channels, 4 * channels, 3, stride=2, padding=1),
            *(ResidualBlock(4 * channels) for _ in range(blocks)),
            _upsample(4 * channels, 2 * channels),
            _upsample(2 * channels, channels),
            _ReflectionPad(3),
            nn.Conv2d(channels, 3, 7),
            nn.Tanh(),
        )
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.G(images)


class PatchDiscriminator(nn.Module):
    """Is each patch real? (B, 3, H, W) -> (B, 1, h, w) without a sigmoid, where h = H // 2**layers - 2; w likewise.

    Args:
        channels: of the first convolution; they double with each one up to eight times.
        layers: convolutions of stride 2. A patch has 70x70 pixels with 3 (PatchGAN), 34x34 with 2, 16x16 with 1.
    """

    def __init__(self, channels: int = 64, layers: int = 3):
        super().__init__()
        widths = [channels * min(2**number, 8) for number in range(layers + 1)]
        strides = [2] * (layers - 1) + [1]
        middle = [
            _normalised(nn.Conv2d(narrow, wide, 4, stride, padding=1, bias=False), nn.LeakyReLU(0.2, inplace=True))
            for (narrow, wide), stride in zip(pairwise(widths), strides, strict=True)
        ]
        first, last = nn.Conv2d(3, channels, 4, 2, padding=1), nn.Conv2d(widths[-1], 1, 4, 1, padding=1)
        self.D = nn.Sequential(first, nn.LeakyReLU(0.2, inplace=True), *middle, last)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.D(images)


class _Halvings(nn.Module):
    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layer = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class SiameseMetricNet(nn.Module):
    """Where a picture lies among others, for SPGAN: (B, 3, height, width) -> (B, channels), rows of unit length.

    Each layer makes the picture four times smaller; before `fc2` half of the values are dropped in training.

    Args:
        channels: of the first layer; they double with each one.
        layers: 3 in the paper.
        height, width: of the pictures, at least 4**layers; the fully connected layer has a weight for each place.
    """

    def __init__(self, channels: int = 64, layers: int = 3, height: int = 256, width: int = 128):
        super().__init__()
        widths = [3, *(channels * 2**number for number in range(layers))]

        def layer(narrow, wide):
            return nn.Conv2d(narrow, wide, 4, 2, padding=1), nn.LeakyReLU(0.2, inplace=True), nn.MaxPool2d(2)

        first, *others = (layer(*pair) for pair in pairwise(widths))
        self.layers = nn.Sequential(*first, *(_Halvings(*modules) for modules in others))
        places = (height // 4**layers) * (width // 4**layers)
        self.fc1 = nn.Linear(widths[-1] * places, 2 * channels, bias=False)
        self.dropout = nn.Dropout(0.5)
        self.fc2 = nn.Linear(2 * channels, channels, bias=False)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.layers(images).flatten(1)  # (B, C * h * w)
        x = self.fc2(self.dropout(F.leaky_relu(self.fc1(x), 0.2)))
        return F.normalize(x)


def nearest_size(size: int, discriminator_layers: int, siamese_layers: int = 0) -> int:
    """The height or width nearest to `size`, in pixels, that all networks take: `size` itself where they do.

    The generator halves it twice and doubles it again: a multiple of 4, from 8 up. The discriminator needs 3 places
    where its last two convolutions take one each, the siamese network (0 layers: there is none) one place at its end.
    """
    smallest = max(8, 3 * 2**discriminator_layers, 4**siamese_layers)
    return max(-(-smallest // 4), (size + 2) // 4) * 4
