"""Boxes: areas, IoU, clipping, coding, matching and non-maximum suppression.

A box is (x1, y1, x2, y2) in pixels with float edges: its width is x2 - x1. Half precision is computed in float32, since
it can't tell neighbouring pixels apart from 2048 on and has no area above 65504. Tensors of other shapes than those
given raise ValueError.
"""

import math

import torch
from torch import Tensor

from core.layers.shapes import check_shapes

MAX_LOG_SCALE = math.log(1000 / 16)  # decoding enlarges a box at most this much: exp of a wild delta would be infinite

# Boxes that `_greedy_keep` settles at a time: small temporaries that stay in a CPU's cache, few launches elsewhere.
BLOCK_CPU, BLOCK = 64, 1024


def _widen(tensor: Tensor) -> Tensor:
    """Half precision and integers become float32; float32 and float64 stay as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _result_type(a: Tensor, b: Tensor) -> torch.dtype:
    """The wider type of the two; float32 for integers, which would cut what is between them."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    return dtype if dtype.is_floating_point else torch.float32


def box_area(boxes: Tensor) -> Tensor:
    """(N, 4) -> (N,), square pixels, float32 at least. A box reversed in one direction has a negative area."""
    check_shapes(boxes=(boxes, ..., 4))
    x1, y1, x2, y2 = _widen(boxes).unbind(-1)
    return (x2 - x1) * (y2 - y1)


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of all pairs, (N, 4), (M, 4) -> (N, M), in [0, 1]; NaN where both areas are zero."""
    check_shapes(a=(a, "N", 4), b=(b, "M", 4))
    dtype = _result_type(a, b)
    a, b = _widen(a).T.unsqueeze(-1), _widen(b).T.unsqueeze(-2)  # (4, N, 1), (4, 1, M)
    return _iou(a, _area(a), b, _area(b)).to(dtype)


def _area(edges: Tensor) -> Tensor:
    """(4, ...) edges x1, y1, x2, y2 -> (...)."""
    return (edges[2] - edges[0]) * (edges[3] - edges[1])


def _iou(a: Tensor, area_a: Tensor, b: Tensor, area_b: Tensor) -> Tensor:
    """IoU of edges (4, ...) that broadcast, with their areas.

    Each coordinate is a row of its own, since long runs of one coordinate are what a CPU is fast at, and everything
    happens in two matrices: most of the time would go into new memory.
    """
    intersection = torch.minimum(a[2], b[2]).sub_(torch.maximum(a[0], b[0])).clamp_(min=0)  # so far the width
    intersection.mul_(torch.minimum(a[3], b[3]).sub_(torch.maximum(a[1], b[1])).clamp_(min=0))
    return intersection.div_((area_a + area_b).sub_(intersection))


def clip_boxes(boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Moves every corner into the picture: (..., 4) and (height, width) in pixels -> (..., 4)."""
    check_shapes(boxes=(boxes, ..., 4))
    height, width = image_size
    xs, ys = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
    return torch.stack((xs, ys), dim=-1).flatten(-2)


def large_enough(boxes: Tensor, min_size: float) -> Tensor:
    """Mask (...) of the boxes (..., 4) whose two sides are both at least `min_size` pixels."""
    check_shapes(boxes=(boxes, ..., 4))
    boxes = _widen(boxes)
    return (boxes[..., 2:] - boxes[..., :2] >= min_size).all(dim=-1)


def _centre_and_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    size = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + 0.5 * size, size  # (..., 2) each


def encode_boxes(reference: Tensor, proposals: Tensor, weights=(1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """What the regression shall answer for each proposal: (N, 4), (N, 4) -> deltas (N, 4).

    Source: Girshick et al. 2014, "Rich feature hierarchies for accurate object detection and semantic segmentation",
    appendix C: (t_x, t_y) is the shift of the centre in units of the proposal, (t_w, t_h) the logarithm of the change
    of size. A side of zero gives an infinite delta or NaN.

    Args:
        reference: the true boxes.
        proposals: the boxes to start from.
        weights: (wx, wy, ww, wh), factors that bring the deltas to about unit variance.
    """
    check_shapes(proposals=(proposals, ..., 4), reference=(reference, *proposals.shape))
    dtype = _result_type(reference, proposals)
    weights = _constants(weights, proposals)
    to_centre, to_size = _centre_and_size(_widen(reference))
    centre, size = _centre_and_size(_widen(proposals))
    shift = weights[:2] * (to_centre - centre) / size
    return torch.cat((shift, weights[2:] * torch.log(to_size / size)), dim=-1).to(dtype)  # (N, 4)


def decode_boxes(deltas: Tensor, proposals: Tensor, weights=(1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """The inverse of `encode_boxes`, for k boxes a proposal: (N, 4 * k), (N, 4) -> (N, k, 4) in pixels.

    The result has the wider type of the two, so half-precision deltas on float32 proposals give float32 boxes.
    t_w and t_h are clipped at log(1000 / 16).
    """
    check_shapes(proposals=(proposals, ..., 4), deltas=(deltas, *proposals.shape[:-1], "4 * k"))
    if deltas.shape[-1] % 4:
        raise ValueError(f"deltas have shape {tuple(deltas.shape)}, expected (..., 4 * k)")
    dtype = _result_type(deltas, proposals)
    deltas = _widen(deltas).unflatten(-1, (deltas.shape[-1] // 4, 4)) / _constants(weights, deltas)  # (N, k, 4)
    centre, size = _centre_and_size(_widen(proposals).unsqueeze(-2))  # (N, 1, 2)
    centre = deltas[..., :2] * size + centre
    half = 0.5 * (deltas[..., 2:].clamp(max=MAX_LOG_SCALE).exp() * size)  # (N, k, 2)
    return torch.cat((centre - half, centre + half), dim=-1).to(dtype)


def _constants(values, like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def match(iou: Tensor, high: float, low: float, allow_low_quality: bool = False) -> Tensor:
    """The true box that each proposal belongs to: IoU (G, N) -> (N,) index into the G, -1 or -2.

    -1 is background, a best IoU below `low`; -2 is neither, in [low, high). With `allow_low_quality` the proposals that
    are the best of some true box, all of them where several are equally good, keep *their own* best true box, however
    low its IoU is. Without true boxes everything is background.

    Source: Ren et al. 2015, "Faster R-CNN", section 3.1.2.
    """
    check_shapes(iou=(iou, "G", "N"))
    if len(iou) == 0:
        return torch.full((iou.shape[1],), -1, dtype=torch.int64, device=iou.device)
    quality, best = iou.max(dim=0)  # (N,)
    matched = best.masked_fill(quality < high, -2).masked_fill(quality < low, -1)
    if allow_low_quality and iou.shape[1] > 0:
        is_best = (iou == iou.amax(dim=1, keepdim=True)).any(dim=0)  # (N,)
        matched = torch.where(is_best, best, matched)
    return matched


@torch.no_grad()
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression: (N, 4), (N,) -> (kept,) indices, best score first.

    A box goes when its IoU with a kept box of higher score exceeds the threshold. Equal scores are settled by order,
    NaN counts as the highest score. A box without an area is never suppressed by another such box, since their IoU is
    0 / 0.
    """
    check_shapes(boxes=(boxes, "N", 4), scores=(scores, "N"))
    order = scores.argsort(descending=True, stable=True)
    edges = _widen(boxes)[order].T.contiguous()  # (4, N)
    return order[_greedy_keep(edges, torch.zeros_like(order), iou_threshold)]


@torch.no_grad()
def batched_nms(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """`nms` within each group (a class, an FPN level): (N, 4), (N,), (N,) integers -> (kept,) indices, best first.

    Up to 1,000 boxes the groups are moved apart by multiples of the largest coordinate, as torchvision does. Nothing
    here needs that, but it rounds coordinates (to 1/128 pixel from 65,536 on) and a box at the threshold may fall on
    either side of it: only the same rounding gives the same boxes.
    """
    check_shapes(boxes=(boxes, "N", 4), scores=(scores, "N"), groups=(groups, "N"))
    order = scores.argsort(descending=True, stable=True)
    order = order[groups[order].argsort(stable=True)]  # by group, then by score
    boxes, groups = _widen(boxes)[order], groups[order]
    if 0 < len(boxes) <= 1000:
        largest = boxes.nan_to_num(0, 0, 0).max()  # one box that isn't finite would make them all NaN
        boxes = boxes + (groups.to(boxes) * (largest + 1))[:, None]
    keep = order[_greedy_keep(boxes.T.contiguous(), groups, iou_threshold)].sort().values
    return keep[scores[keep].argsort(descending=True, stable=True)]


def _greedy_keep(edges: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """Positions (kept,) that survive: edges (4, N) sorted by group (N,), in it best first; no box crosses groups.

    A block of boxes is settled at a time: first the boxes inside it, then those that stay there strike out the rest of
    the group. Struck out boxes take no part in what follows, so the work is boxes kept times boxes left. `edges` is
    written to.
    """
    threshold = _round_down(iou_threshold, edges.dtype)
    block = BLOCK_CPU if edges.device.type == "cpu" else BLOCK
    areas, positions = _area(edges), torch.arange(len(groups), device=edges.device)
    ends = torch.searchsorted(groups, groups, right=True)  # (N,), where the group of each box ends
    kept, start = [], 0
    while start < len(groups):
        stop = min(start + block, len(groups))
        head, area, group = edges[:, start:stop, None], areas[start:stop, None], groups[start:stop]
        overlaps = _iou(head, area, head.mT, area.mT) > threshold  # (n, n)
        keep = _resolve((overlaps & (group[:, None] == group)).triu(1))
        kept.append(positions[start:stop][keep])
        start, end = stop, int(ends[stop - 1])
        if stop < end:  # the last group of the block goes on behind it
            keep &= group == group[-1]
            struck = _iou(head[:, keep], area[keep], edges[:, None, stop:end], areas[stop:end]) > threshold
            stay = stop + (~struck.any(dim=0)).nonzero()[:, 0]
            start = end - len(stay)  # they move up to the end of their group
            for row in (*edges, areas, positions):
                row[start:end] = row[stay]
    return torch.cat(kept) if kept else positions


def _resolve(overlaps: Tensor) -> Tensor:
    """Greedy choice as a fixed point: overlaps (n, n), True where row i, before column j, would suppress it -> (n,).

    A box stays if no box that stays suppresses it. Applied to everything at once, that rule is right for the first box
    at once, and for each further link of a chain of overlaps after one more turn; when nothing changes all are right.
    """
    keep, before = ~overlaps.any(dim=0), None
    while before is None or not torch.equal(keep, before):
        before, keep = keep, ~(overlaps & keep[:, None]).any(dim=0)
    return keep


def _round_down(value: float, dtype: torch.dtype) -> float:
    """The largest number of that type not above `value`: 3/10 in float32 exceeds 0.3, and must be seen to do so."""
    rounded = torch.tensor(value, dtype=dtype)
    if rounded.item() > value:
        rounded = torch.nextafter(rounded, torch.tensor(-math.inf, dtype=dtype))
    return rounded.item()
