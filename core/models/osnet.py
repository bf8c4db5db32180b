"""OSNet: omni-scale feature learning (Zhou et al. 2019, ICCV; OSNet-AIN: Zhou et al. 2021, TPAMI).

The state_dict keys and, in evaluation, the 512-d feature are torchreid's, so its published files load as they are.
"""

from functools import partial

import torch
from torch import Tensor, nn

from core.models.head import relu_reduction


class ConvBlock(nn.Module):
    """Convolution without bias, normalisation, ReLU, (B, C, H, W) -> (B, C', H/stride, W/stride).

    norm: "batch", "instance" or "none". relu: without it the block is linear.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, norm="batch", relu=True):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
        norms = {"batch": nn.BatchNorm2d, "instance": partial(nn.InstanceNorm2d, affine=True), "none": nn.Identity}
        self.bn = norms[norm](out_channels)
        self.relu = nn.ReLU(inplace=True) if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class LightConv3x3(nn.Module):
    """A 3x3 convolution in two: a linear 1x1 over channels, then a 3x3 within each; BatchNorm, ReLU (figure 3b)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv2(self.conv1(x))))


class LightConvStream(nn.Module):
    """`depth` light convolutions, one after the other: a receptive field of 2 * depth + 1 (keys of OSNet-AIN)."""

    def __init__(self, channels: int, depth: int):
        super().__init__()
        self.layers = nn.Sequential(*(LightConv3x3(channels) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ChannelGate(nn.Module):
    """Maps (B, C, H, W) weighted channel by channel and added; the weights come from the channels' means (equation 2).

    The maps share the weights of the gate, so it sees all their means at once.
    """

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1)
        self.relu = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1)

    def forward(self, *maps: Tensor) -> Tensor:
        means = torch.cat([x.mean(dim=(2, 3), keepdim=True) for x in maps])  # (len(maps) * B, C, 1, 1)
        weights = self.fc2(self.relu(self.fc1(means))).sigmoid().chunk(len(maps))
        total = maps[0] * weights[0]
        for x, weight in zip(maps[1:], weights[1:], strict=True):
            total = torch.addcmul(total, x, weight)
        return total


class OSBlock(nn.Module):
    """Four streams of 1 to 4 light convolutions, summed under one gate they share, and a shortcut (figure 4).

    (B, in_channels, H, W) -> (B, out_channels, H, W).

    Args:
        instance_norm: "none"; "outside", after the sum with the shortcut (OSNet-IBN); "inside", before it (OSNet-AIN).
        adaptive: names of OSNet-AIN for the same streams.
    """

    def __init__(self, in_channels: int, out_channels: int, instance_norm: str = "none", adaptive: bool = False):
        super().__init__()
        channels = out_channels // 4
        self.conv1 = ConvBlock(in_channels, channels)
        if adaptive:
            self.conv2 = nn.ModuleList(LightConvStream(channels, depth) for depth in (1, 2, 3, 4))
        else:
            self.conv2a = LightConv3x3(channels)
            self.conv2b = nn.Sequential(*(LightConv3x3(channels) for _ in range(2)))
            self.conv2c = nn.Sequential(*(LightConv3x3(channels) for _ in range(3)))
            self.conv2d = nn.Sequential(*(LightConv3x3(channels) for _ in range(4)))
        self.gate = ChannelGate(channels)
        last = "none" if instance_norm == "inside" else "batch"
        self.conv3 = ConvBlock(channels, out_channels, norm=last, relu=False)
        self.downsample = ConvBlock(in_channels, out_channels, relu=False) if in_channels != out_channels else None
        self.IN = None if instance_norm == "none" else nn.InstanceNorm2d(out_channels, affine=True)
        self.instance_norm, self.adaptive = instance_norm, adaptive
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        streams = self.conv2 if self.adaptive else (self.conv2a, self.conv2b, self.conv2c, self.conv2d)
        reduced = self.conv1(x)
        out = self.conv3(self.gate(*(stream(reduced) for stream in streams)))
        if self.instance_norm == "inside":
            out = self.IN(out)
        out += x if self.downsample is None else self.downsample(x)
        if self.instance_norm == "outside":
            out = self.IN(out)
        return self.relu(out)


class OSNet(nn.Module):
    """Pictures (B, 3, H, W) -> in training class scores (B, num_classes), in evaluation the feature (B, feature_dim).

    Args:
        num_classes: 0 leaves the classifier out; the feature is then returned in training, too.
        channels: of `conv1` and of the three stages.
        instance_norm: for each of the six blocks, see `OSBlock`.
        adaptive: OSNet-AIN, whose transitions between stages stand beside them (`pool2`, `pool3`) and not in them.
        stem_norm: "batch" or "instance", of `conv1`.

    Attributes:
        stage_channels: channels of the four maps of `forward_stages`.
        fc: Linear, BatchNorm, ReLU: from the pooled map to the feature; with feature_dim 0 the identity.
    """

    def __init__(
        self, num_classes=1000, *, channels, instance_norm=("none",) * 6, stem_norm="batch", adaptive=False,
        feature_dim=512,
    ):  # fmt: skip
        super().__init__()
        c1, c2, c3, c4 = channels
        self.stage_channels = (c2, c3, c4, c4)

        def stage(number, in_channels, out_channels):
            first, second = instance_norm[2 * number : 2 * number + 2]
            block = OSBlock(in_channels, out_channels, first, adaptive)
            return nn.Sequential(block, OSBlock(out_channels, out_channels, second, adaptive))

        def halving(channels):
            return nn.Sequential(ConvBlock(channels, channels), nn.AvgPool2d(2, stride=2))

        self.conv1 = ConvBlock(3, c1, kernel=7, stride=2, norm=stem_norm)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.conv2 = stage(0, c1, c2)
        self.pool2 = halving(c2) if adaptive else nn.Identity()
        self.conv3 = stage(1, c2, c3)
        self.pool3 = halving(c3) if adaptive else nn.Identity()
        if not adaptive:
            self.conv2.append(halving(c2))
            self.conv3.append(halving(c3))
        self.conv4 = stage(2, c3, c4)
        self.conv5 = ConvBlock(c4, c4)
        self.fc = relu_reduction(c4, feature_dim, bias=True) if feature_dim else nn.Identity()
        self.classifier = nn.Linear(feature_dim or c4, num_classes) if num_classes else None
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward_stages(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pictures (B, 3, H, W) -> the maps of conv2 ... conv5, (B, Ci, H/s, W/s) with s = 8, 16, 16, 16."""
        stage2 = self.pool2(self.conv2(self.maxpool(self.conv1(x))))
        stage3 = self.pool3(self.conv3(stage2))
        stage4 = self.conv4(stage3)
        return stage2, stage3, stage4, self.conv5(stage4)

    def forward(self, x: Tensor) -> Tensor:
        feature = self.fc(self.forward_stages(x)[-1].mean(dim=(2, 3)))  # (B, feature_dim)
        return self.classifier(feature) if self.training and self.classifier is not None else feature


def osnet_x1_0(num_classes: int = 1000, **options) -> OSNet:
    return OSNet(num_classes, channels=(64, 256, 384, 512), **options)


def osnet_x0_75(num_classes: int = 1000, **options) -> OSNet:
    return OSNet(num_classes, channels=(48, 192, 288, 384), **options)


def osnet_x0_5(num_classes: int = 1000, **options) -> OSNet:
    return OSNet(num_classes, channels=(32, 128, 192, 256), **options)


def osnet_x0_25(num_classes: int = 1000, **options) -> OSNet:
    return OSNet(num_classes, channels=(16, 64, 96, 128), **options)


def osnet_ibn_x1_0(num_classes: int = 1000, **options) -> OSNet:
    norms = ("outside", "outside", "none", "none", "none", "none")
    return osnet_x1_0(num_classes, instance_norm=norms, stem_norm="instance", **options)


def osnet_ain_x1_0(num_classes: int = 1000, **options) -> OSNet:
    norms = ("inside", "inside", "none", "inside", "inside", "none")  # found by search, section 4
    return osnet_x1_0(num_classes, instance_norm=norms, stem_norm="instance", adaptive=True, **options)


OSNETS = {
    network.__name__: network
    for network in (osnet_x1_0, osnet_x0_75, osnet_x0_5, osnet_x0_25, osnet_ibn_x1_0, osnet_ain_x1_0)
}
