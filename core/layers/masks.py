"""Instance masks: small ones pasted into their picture, and the picture's own cut to small targets."""

from collections.abc import Iterator

import torch
from torch import Tensor

from core.layers.roi_align import roi_align


def paste_masks(masks: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Draw each mask (N, 1, M, M) into its box (N, 4) of a picture of height, width: (N, 1, h, w), 0 outside.

    See `paste_mask_chunks`, which does not need all of them at once.
    """
    out = masks.new_zeros(len(masks), 1, *image_size)
    for chosen, pasted in _pasted(masks, boxes, image_size, max_bytes=2**28):
        out[chosen, 0] = pasted.to(out.dtype)
    return out


def paste_mask_chunks(
    masks: Tensor,
    boxes: Tensor,
    image_size: tuple[int, int],
    threshold: float = 0.5,
    max_bytes: int = 2**28,
) -> Iterator[Tensor]:
    """Yield the pasted masks as bool (n, h, w), `value >= threshold`, in order and in chunks of bounded memory.

    Args:
        masks: (N, 1, M, M), probabilities in [0, 1].
        boxes: (N, 4), x1, y1, x2, y2 in pixels of the picture.
        image_size: height and width of the picture.
        max_bytes: bound of a chunk and everything that is held while it is made; one mask is always possible.
    """
    for _, pasted in _pasted(masks, boxes, image_size, max_bytes):
        yield pasted >= threshold


def project_masks(masks: Tensor, boxes: Tensor, matched: Tensor, size: int) -> Tensor:
    """The part of its object's mask in each box, resampled to size x size: the mask head's target, values in [0, 1].

    Args:
        masks: (G, H, W), bool or uint8, the masks of a picture's objects.
        boxes: (N, 4) in pixels.
        matched: (N,) which object each box belongs to.

    Returns: (N, size, size) in the type of the boxes.
    """
    rois = torch.cat((matched.to(boxes)[:, None], boxes), dim=1)
    return roi_align(masks[:, None].to(boxes.dtype), rois, size)[:, 0]


def mask_boxes(masks: Tensor) -> Tensor:
    """The tight box of each mask: (N, H, W) -> (N, 4) float, x1, y1, x2, y2 with x2 and y2 past the last pixel.

    An empty mask gives zeros.
    """
    masks = masks != 0
    edges = []
    for line in (masks.any(dim=1), masks.any(dim=2)):  # (N, W), (N, H)
        line = line.to(torch.uint8)
        first = line.argmax(dim=1)
        last = line.shape[1] - line.flip(1).argmax(dim=1)
        edges.append(torch.stack((first, last), dim=1) * line.amax(dim=1, keepdim=True))  # (N, 2)
    return torch.stack(edges, dim=2).flatten(1).float()  # (N, 4)


def _pasted(masks, boxes, image_size, max_bytes):
    """Yield (slice of the instances, their pasted masks (n, h, w) in float32 at least)."""
    height, width = image_size
    size = masks.shape[-1]
    values = masks[:, 0].to(torch.promote_types(masks.dtype, torch.float32))  # (N, M, M)
    # The padding of one pixel of 0 around the mask widens the box too.
    centre, half = (boxes[:, 2:] + boxes[:, :2]) * 0.5, (boxes[:, 2:] - boxes[:, :2]) * 0.5
    half = half * ((size + 2) / size)
    low, high = (centre - half).long(), (centre + half).long()  # (N, 2)
    chunk = max(1, max_bytes // (height * width * 5 + 4 * size * (height + 3 * width)))
    for start in range(0, len(masks), chunk):
        chosen = slice(start, start + chunk)
        rows = _resize(low[chosen, 1], high[chosen, 1], height, size).to(values.dtype)  # (n, h, M)
        columns = _resize(low[chosen, 0], high[chosen, 0], width, size).to(values.dtype)  # (n, w, M)
        yield chosen, rows @ (values[chosen] @ columns.transpose(1, 2))


def _resize(low, high, length, size):
    """How much of each of a mask's `size` pixels goes to each of the picture's `length`: (n, length, size), float32."""
    extent = (high - low + 1).clamp(min=1)[:, None]  # (n, 1)
    local = torch.arange(length, device=low.device) - low[:, None]  # (n, length)
    source = ((local + 0.5) * ((size + 2) / extent.float()) - 0.5).clamp(0, size + 1)
    weight = (1 - (source[:, :, None] - torch.arange(1, size + 1, device=low.device)).abs()).clamp(min=0)
    return weight * ((local >= 0) & (local < extent))[:, :, None]
