"""ResNet (He et al. 2016) and its IBN-a variant (Pan et al. 2018).

Called plain, `resnet18()` ... `resnet152()` are torchvision's networks, and `resnet50_ibn_a()` is IBN-Net's: the same
state_dict keys, so the published weights load as they are, the same outputs, and the same weights from the same seed.
"""

from torch import Tensor, nn

from core.layers.norm import IBN


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)


def _conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, (B, C, H, W) -> (B, planes, H/stride, W/stride)."""

    expansion = 1

    def __init__(
        self, in_channels: int, planes: int, stride: int = 1, downsample: nn.Module | None = None, ibn: bool = False
    ):
        super().__init__()
        self.conv1 = _conv3x3(in_channels, planes, stride)
        self.bn1 = IBN(planes) if ibn else nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += shortcut
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut, (B, C, H, W) -> (B, 4 * planes, H/stride, W/stride).

    The stride sits in the 3x3 convolution, as in torchvision ("ResNet V1.5"), not in the first 1x1 as in the paper.
    """

    expansion = 4

    def __init__(
        self, in_channels: int, planes: int, stride: int = 1, downsample: nn.Module | None = None, ibn: bool = False
    ):
        super().__init__()
        self.conv1 = _conv1x1(in_channels, planes)
        self.bn1 = IBN(planes) if ibn else nn.BatchNorm2d(planes)
        self.conv2 = _conv3x3(planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = _conv1x1(planes, planes * self.expansion)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += shortcut
        return self.relu(out)


class ResNet(nn.Module):
    """Pictures (B, 3, H, W) -> class scores (B, num_classes).

    Args:
        block: BasicBlock or Bottleneck.
        depths: number of blocks in each of the four stages.
        num_classes: 0 leaves the classifier `fc` out; the network then returns the pooled features (B, C4).
        last_stride: stride of stage 4, 2 or 1. With 1 its map keeps 1/16 of the picture's size, which re-identification
            gains from (Luo et al. 2019, section 3.5). No weight changes its shape.
        ibn: IBN-a, an `IBN` after the first convolution of each block of the stages 1 to 3.
        zero_init_residual: start every block as the identity, its last BatchNorm with weight 0 (Goyal et al. 2017).
        stem_relu: False leaves the ReLU behind the first BatchNorm out, as reid-strong-baseline's networks do.

    Attributes:
        stage_channels: (C1, C2, C3, C4), the channels of `layer1` ... `layer4`.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        num_classes: int = 1000,
        last_stride: int = 2,
        *,
        ibn: bool = False,
        zero_init_residual: bool = False,
        stem_relu: bool = True,
    ):
        super().__init__()
        if last_stride not in (1, 2):
            raise ValueError(f"last_stride is 1 or 2, not {last_stride}")
        c1, c2, c3, c4 = self.stage_channels = tuple(planes * block.expansion for planes in (64, 128, 256, 512))
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.stem_relu = stem_relu
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = _stage(block, 64, c1, depths[0], stride=1, ibn=ibn)
        self.layer2 = _stage(block, c1, c2, depths[1], stride=2, ibn=ibn)
        self.layer3 = _stage(block, c2, c3, depths[2], stride=2, ibn=ibn)
        self.layer4 = _stage(block, c3, c4, depths[3], stride=last_stride, ibn=False)
        self.fc = nn.Linear(c4, num_classes) if num_classes > 0 else None
        self._initialise(zero_init_residual)

    def _initialise(self, zero_init_residual: bool):
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, BasicBlock | Bottleneck):
                last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                nn.init.zeros_(last.weight)

    def forward_stages(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pictures (B, 3, H, W) -> the maps of layer1 ... layer4, (B, Ci, H/s, W/s) with s = 4, 8, 16, 32.

        Sizes are rounded up; s of layer4 is 16 with last_stride 1.
        """
        x = self.bn1(self.conv1(x))
        x = self.maxpool(self.relu(x) if self.stem_relu else x)  # (B, 64, H/4, W/4)
        stage1 = self.layer1(x)
        stage2 = self.layer2(stage1)
        stage3 = self.layer3(stage2)
        return stage1, stage2, stage3, self.layer4(stage3)

    def forward(self, x: Tensor) -> Tensor:
        features = self.forward_stages(x)[-1].mean(dim=(2, 3))  # (B, C4)
        return features if self.fc is None else self.fc(features)


def _stage(block, in_channels: int, out_channels: int, depth: int, stride: int, ibn: bool) -> nn.Sequential:
    """`depth` blocks; the first one takes the stride, and a 1x1 convolution on its shortcut where shapes change."""
    downsample = None
    if stride != 1 or in_channels != out_channels:
        downsample = nn.Sequential(_conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))
    planes = out_channels // block.expansion
    first = block(in_channels, planes, stride, downsample, ibn)
    return nn.Sequential(first, *(block(out_channels, planes, ibn=ibn) for _ in range(depth - 1)))


def resnet18(num_classes: int = 1000, last_stride: int = 2, **options) -> ResNet:
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, last_stride, **options)


def resnet34(num_classes: int = 1000, last_stride: int = 2, **options) -> ResNet:
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes, last_stride, **options)


def resnet50(num_classes: int = 1000, last_stride: int = 2, **options) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, last_stride, **options)


def resnet101(num_classes: int = 1000, last_stride: int = 2, **options) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes, last_stride, **options)


def resnet152(num_classes: int = 1000, last_stride: int = 2, **options) -> ResNet:
    return ResNet(Bottleneck, (3, 8, 36, 3), num_classes, last_stride, **options)


def resnet50_ibn_a(num_classes: int = 1000, last_stride: int = 2, **options) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, last_stride, ibn=True, **options)


def resnet101_ibn_a(num_classes: int = 1000, last_stride: int = 2, **options) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes, last_stride, ibn=True, **options)


RESNETS = {
    network.__name__: network
    for network in (resnet18, resnet34, resnet50, resnet101, resnet152, resnet50_ibn_a, resnet101_ibn_a)
}
