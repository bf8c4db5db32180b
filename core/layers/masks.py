"""Instance masks: small ones pasted into their picture, and the picture's own cut to small targets.

Tensors of other shapes than those given raise ValueError.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from core.layers.roi_align import axis_taps, compressed, weighted_sums
from core.layers.shapes import check_shapes

IN_CACHE = 2**23  # bytes: chunks of about this size are pasted fastest, and tightest around their boxes
MAX_FLOATS = 2**24  # of an intermediate result while masks are projected, 64 MiB


def paste_masks(masks: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Draw each mask (N, 1, M, M) into its box (N, 4) of a picture of height, width: (N, 1, h, w), 0 outside.

    The mask, with a border of 0 one pixel wide, is resized bilinearly to the box, which grows by the border and is cut
    to whole pixels: torchvision's way. The result is in the type of the masks; `paste_mask_chunks` needs less memory.
    """
    out = masks.new_zeros(len(masks), 1, *image_size)
    for chosen, (rows, columns), values in _pasted(masks, boxes, image_size, IN_CACHE):
        out[chosen, 0, rows, columns] = values
    return out


def paste_mask_chunks(
    masks: Tensor, boxes: Tensor, image_size: tuple[int, int], threshold: float = 0.5, max_bytes: int = IN_CACHE
) -> Iterator[Tensor]:
    """Yield the pasted masks as bool (n, h, w), `value >= threshold`, in order and in chunks of bounded memory.

    Args:
        masks: (N, 1, M, M), probabilities in [0, 1].
        boxes: (N, 4), x1, y1, x2, y2 in pixels of the picture.
        image_size: height and width of the picture.
        threshold: above 0; a pixel outside of the box is never in the mask.
        max_bytes: bound of a chunk and all that is held while it is made, the chunk before it included; one mask is
            always possible (7 bytes per pixel of the picture).
    """
    for chosen, (rows, columns), values in _pasted(masks, boxes, image_size, max_bytes):
        pasted = torch.zeros(len(masks[chosen]), *image_size, dtype=torch.bool, device=masks.device)
        pasted[:, rows, columns] = values >= threshold
        del values  # or it would be held while the next chunk is made
        yield pasted


@torch.no_grad()
def project_masks(masks: Tensor, boxes: Tensor, matched: Tensor, size: int) -> Tensor:
    """The part of its object's mask in each box, resampled to size x size: the mask head's target, values in [0, 1].

    It is RoIAlign of the mask with as many samples as a bin has pixels. RoIAlign is separable, so first the rows of
    the mask are summed and then the columns of the result, which is far less work for large boxes.

    Args:
        masks: (G, H, W), bool or uint8, the masks of a picture's objects.
        boxes: (N, 4) in pixels.
        matched: (N,) which object each box belongs to, 0 .. G-1; ValueError for others.

    Returns: (N, size, size) in the type of the boxes, float32 for integers, computed in float32 at least.
    """
    check_shapes(masks=(masks, "G", "H", "W"), boxes=(boxes, "N", 4), matched=(matched, "N"))
    objects, height, width = masks.shape
    dtype = torch.promote_types(boxes.dtype, torch.float32)
    x1, y1, x2, y2 = boxes.to(dtype).unbind(1)
    out = boxes.new_empty(len(boxes), size, size, dtype=boxes.dtype if boxes.is_floating_point() else dtype)
    done = 0
    most = max(1, MAX_FLOATS // (height * width))  # objects whose masks are made float at a time
    for start in range(0, objects, most):
        chosen = ((matched >= start) & (matched < min(start + most, objects))).nonzero().flatten()
        done += len(chosen)
        rows = masks[start : start + most].reshape(-1, width).to(dtype)  # (g * H, W)
        for part in chosen.split(max(1, MAX_FLOATS // (size * width))):
            n = len(part)
            index, weight = axis_taps(y1[part], y2[part], size, height, -1, False)  # (n, size, T)
            index = index + ((matched[part] - start).int() * height)[:, None, None]
            summed = weighted_sums(rows, *compressed(index.flatten(0, 1), weight.flatten(0, 1)))  # (n * size, W)
            lines = summed.view(n, size, width).transpose(1, 2).reshape(n * width, size)
            index, weight = axis_taps(x1[part], x2[part], size, width, -1, False)
            index = index + torch.arange(0, n * width, width, dtype=torch.int32, device=index.device)[:, None, None]
            target = weighted_sums(lines, *compressed(index.flatten(0, 1), weight.flatten(0, 1)))  # x before y
            out[part] = target.view(n, size, size).transpose(1, 2).to(out.dtype)
    if done < len(boxes):
        raise ValueError(f"matched has {len(boxes) - done} of {len(boxes)} numbers outside of the {objects} masks")
    return out


def mask_boxes(masks: Tensor) -> Tensor:
    """The tight box of each mask: (N, H, W) -> (N, 4) float, x1, y1, x2, y2 with x2 and y2 past the last pixel.

    An empty mask gives zeros.
    """
    check_shapes(masks=(masks, "N", "H", "W"))
    edges = []
    for dim in (1, 2):
        line = masks.any(dim=dim).to(torch.uint8)  # (N, W), then (N, H)
        first = line.argmax(dim=1)
        last = line.shape[1] - line.flip(1).argmax(dim=1)
        edges.append(torch.stack((first, last), dim=1) * line.amax(dim=1, keepdim=True))  # (N, 2)
    return torch.stack(edges, dim=2).flatten(1).float()  # (N, 4)


def _pasted(masks, boxes, image_size, max_bytes):
    """Yield (slice of the instances, slices of the rows and columns around their boxes, values (n, rows, columns))."""
    check_shapes(masks=(masks, "N", 1, "M", "M"), boxes=(boxes, "N", 4))
    (height, width), size = image_size, masks.shape[-1]
    dtype = torch.promote_types(masks.dtype, torch.float32)
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    centre, half = (boxes[:, 2:] + boxes[:, :2]) * 0.5, (boxes[:, 2:] - boxes[:, :2]) * 0.5
    half = half * ((size + 2) / size)  # the border of the mask widens the box
    low, high = (centre - half).long(), (centre + half).long()  # (N, 2)
    chunk = max(1, max_bytes // (7 * height * width + 16 * size * (height + width)))
    for start in range(0, len(masks), chunk):
        chosen = slice(start, start + chunk)
        (x1, y1), (x2, y2) = low[chosen].amin(dim=0).tolist(), high[chosen].amax(dim=0).tolist()
        x1, y1 = max(x1, 0), max(y1, 0)
        x2, y2 = max(x1, min(x2 + 1, width)), max(y1, min(y2 + 1, height))
        rows = _resize(low[chosen, 1], high[chosen, 1], y1, y2, size).to(dtype)  # (n, rows, M)
        columns = _resize(low[chosen, 0], high[chosen, 0], x1, x2, size).to(dtype)  # (n, columns, M)
        yield chosen, (slice(y1, y2), slice(x1, x2)), _product(rows, masks[chosen, 0].to(dtype), columns)


def _product(rows, masks, columns):
    """(n, h, M) x (n, M, M) x (n, w, M) -> (n, h, w), not in half precision under autocast either."""
    with torch.autocast(masks.device.type, enabled=False):
        return rows @ (masks @ columns.transpose(1, 2))


def _resize(low, high, start, end, size):
    """How much of each of a mask's `size` pixels goes to the picture's start..end: (n, end - start, size), float32."""
    extent = (high - low + 1)[:, None]  # (n, 1); negative for a reversed box, which holds no pixel
    local = torch.arange(start, end, device=low.device) - low[:, None]  # (n, end - start)
    source = ((local + 0.5) * ((size + 2) / extent.clamp(min=1).float()) - 0.5).clamp(0, size + 1)
    weight = (1 - (source[:, :, None] - torch.arange(1, size + 1, device=low.device)).abs()).clamp(min=0)
    return weight * ((local >= 0) & (local < extent))[:, :, None]
