"""Attention and erasing: which channels and positions of a map count. All blocks take and return (B, C, H, W)."""

import torch
from torch import Tensor, nn


class SqueezeExcitation(nn.Module):
    """Channels weighted by a small network on their means (Hu et al. 2018, equations 2 to 4).

    squeeze: False weighs every position by its own channels; LightMBN's SE_Module has lost the mean.
    """

    def __init__(self, channels: int, reduction: int = 16, squeeze: bool = True):
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, channels, 1)
        self.squeeze = squeeze

    def forward(self, x: Tensor) -> Tensor:
        weights = x.mean(dim=(2, 3), keepdim=True) if self.squeeze else x
        return x * self.fc2(self.fc1(weights).relu()).sigmoid()


class ChannelAttention(nn.Module):
    """Channels weighted by one small network on their means and on their maxima (Woo et al. 2018, equation 2)."""

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.mlp = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean, largest = x.mean(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)  # (B, C, 1, 1)
        return x * (self.mlp(mean) + self.mlp(largest)).sigmoid()


class SpatialAttention(nn.Module):
    """Positions weighted by a convolution on the mean and maximum over channels (Woo et al. 2018, equation 3)."""

    def __init__(self, kernel: int = 7):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.cat((x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)), dim=1)  # (B, 2, H, W)
        return x * self.conv(seen).sigmoid()


class CBAM(nn.Sequential):
    """Channel attention, then spatial attention (Woo et al. 2018, equation 1)."""

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__(ChannelAttention(channels, reduction), SpatialAttention())


class PositionSelfAttention(nn.Module):
    """Each position adds what similar positions hold (PAM of Fu et al. 2019, equations 1 and 2).

    It starts as the identity, since gamma is 0. Memory grows with (H * W)^2.
    """

    def __init__(self, channels: int, reduction: int = 8):
        super().__init__()
        self.query_conv = nn.Conv2d(channels, channels // reduction, 1)
        self.key_conv = nn.Conv2d(channels, channels // reduction, 1)
        self.value_conv = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (conv(x).flatten(2) for conv in (self.query_conv, self.key_conv, self.value_conv))
        attention = (query.transpose(1, 2) @ key).softmax(dim=-1)  # (B, HW, HW)
        return self.gamma * (value @ attention.transpose(1, 2)).view_as(x) + x


class ChannelSelfAttention(nn.Module):
    """Each channel adds what other channels hold (CAM of Fu et al. 2019, equations 3 and 4).

    As in the authors' code a channel attends most to the least similar ones. It starts as the identity.
    """

    def __init__(self, channels: int = 0):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)  # (B, C, HW)
        energy = flat @ flat.transpose(1, 2)  # (B, C, C)
        attention = (energy.amax(dim=-1, keepdim=True) - energy).softmax(dim=-1)
        return self.gamma * (attention @ flat).view_as(x) + x


class BatchDropBlock(nn.Module):
    """In training one random rectangle is 0, the same in all pictures of a batch (Dai et al. 2019, section 3.2).

    height_ratio, width_ratio: the rectangle's sides as parts of the map's.
    """

    def __init__(self, height_ratio: float = 0.33, width_ratio: float = 1.0):
        super().__init__()
        self.height_ratio, self.width_ratio = height_ratio, width_ratio

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        height, width = x.shape[2:]
        rows, columns = round(self.height_ratio * height), round(self.width_ratio * width)
        top = torch.randint(height - rows + 1, ()).item()
        left = torch.randint(width - columns + 1, ()).item()
        mask = torch.ones_like(x[:1, :1])
        mask[..., top : top + rows, left : left + columns] = 0
        return x * mask


class TopDropBlock(nn.Module):
    """In training each picture loses its `ratio` most active rows (Herzog et al. 2021; Quispe and Pedrini 2020).

    A row is as active as its most active position, which is so by its sum of squares over channels.
    """

    def __init__(self, ratio: float = 0.33):
        super().__init__()
        self.ratio = ratio

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        activity = x.detach().square().sum(dim=1).amax(dim=2)  # (B, H)
        dropped = activity.argsort(dim=1)[:, activity.shape[1] - round(self.ratio * activity.shape[1]) :]
        return x * torch.ones_like(activity).scatter(1, dropped, 0.0)[:, None, :, None]  # (B, 1, H, 1)


ATTENTIONS = {
    "se": SqueezeExcitation,
    "cbam": CBAM,
    "channel": ChannelAttention,
    "spatial": lambda _channels: SpatialAttention(),
    "position_self": PositionSelfAttention,
    "channel_self": ChannelSelfAttention,
}
FEATURE_ERASINGS = {"off": nn.Identity, "batch": BatchDropBlock, "top": TopDropBlock}
