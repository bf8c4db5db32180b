"""Anchors: the boxes of fixed sizes and aspect ratios that the region proposal network starts from."""

import functools

import torch
from torch import Tensor, nn


class AnchorGenerator(nn.Module):
    """Anchors of every size and aspect ratio at every position of every feature map.

    Source: Ren et al. 2015, "Faster R-CNN", section 3.1.1; one size a level as in Lin et al. 2017, "Feature Pyramid
    Networks for Object Detection", section 4.1. Around the position (0, 0) their corners are rounded to whole pixels,
    as for the published weights.

    Args:
        sizes: for each level a tuple of sizes, pixels: the square root of an anchor's area. A plain number stands for
            a tuple of one.
        aspect_ratios: for each level a tuple of heights divided by widths. Plain numbers are meant for all levels.
    """

    def __init__(self, sizes=(32, 64, 128, 256, 512), aspect_ratios=(0.5, 1.0, 2.0)):
        super().__init__()
        self.sizes = tuple(tuple(size) if isinstance(size, tuple | list) else (size,) for size in sizes)
        if all(isinstance(ratio, tuple | list) for ratio in aspect_ratios):
            self.aspect_ratios = tuple(tuple(ratios) for ratios in aspect_ratios)
        else:
            self.aspect_ratios = (tuple(aspect_ratios),) * len(self.sizes)
        if len(self.sizes) != len(self.aspect_ratios):
            raise ValueError(f"sizes are of {len(self.sizes)} levels, aspect ratios of {len(self.aspect_ratios)}")
        levels = zip(self.sizes, self.aspect_ratios, strict=True)
        self.anchors_per_location = [len(sizes) * len(ratios) for sizes, ratios in levels]

    def forward(self, image_size: tuple[int, int], feature_maps: list[Tensor]) -> Tensor:
        """Anchors (A, 4) of a padded picture of (height, width) pixels, shared by all pictures of the batch.

        Their order is level, row, column, aspect ratio, size. They are float32 also for feature maps in half precision,
        which has no whole numbers above 2048. The tensor is kept for the next picture of this size: don't write to it.
        """
        if len(feature_maps) != len(self.sizes):
            raise ValueError(f"anchors are for {len(self.sizes)} feature maps, {len(feature_maps)} were given")
        grids = tuple(tuple(feature_map.shape[-2:]) for feature_map in feature_maps)
        dtype, device = torch.promote_types(feature_maps[0].dtype, torch.float32), feature_maps[0].device
        return _all_anchors(self.sizes, self.aspect_ratios, tuple(image_size), grids, dtype, device)

    def extra_repr(self) -> str:
        return f"sizes={self.sizes}, aspect_ratios={self.aspect_ratios}"


@functools.lru_cache(maxsize=8)  # 4 MiB for a picture of 800 x 1333: training on many sizes must not keep them all
@torch.inference_mode(False)  # or anchors first made in inference could not take part in a training step
def _all_anchors(sizes, aspect_ratios, image_size, grids, dtype, device) -> Tensor:
    anchors = []
    for level_sizes, ratios, (rows, columns) in zip(sizes, aspect_ratios, grids, strict=True):
        stride_y, stride_x = image_size[0] // max(rows, 1), image_size[1] // max(columns, 1)
        y = torch.arange(rows, dtype=dtype, device=device) * stride_y
        x = torch.arange(columns, dtype=dtype, device=device) * stride_x
        y, x = torch.meshgrid(y, x, indexing="ij")
        positions = torch.stack((x, y, x, y), dim=-1)  # (rows, columns, 4)
        base = base_anchors(level_sizes, ratios).to(device, dtype)  # (A_l, 4)
        anchors.append((positions[:, :, None] + base).flatten(0, 2))
    return torch.cat(anchors)


def base_anchors(sizes: tuple, aspect_ratios: tuple) -> Tensor:
    """The anchors (A, 4) around the position (0, 0), whole pixels; the sizes of the first ratio come first."""
    sizes = torch.tensor(sizes, dtype=torch.float32)
    height_factors = torch.tensor(aspect_ratios, dtype=torch.float32).sqrt()
    heights = (height_factors[:, None] * sizes).flatten()
    widths = ((1 / height_factors)[:, None] * sizes).flatten()
    return (torch.stack((-widths, -heights, widths, heights), dim=1) / 2).round()
