"""RoIAlign: every box's part of a feature map resampled to the same small grid, as one sparse matrix product.

RoIAlign is linear in the features: a bin of the output is a weighted sum of feature positions, and the weights depend
on the boxes only. So the weights are a sparse matrix, a row per bin and a column per position of the map; the output is
that matrix times the features seen as rows of C channels, and the gradient its transpose times the output's gradient.
Both sum in a fixed order: the result is the same in every run, on CUDA too.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.layers.shapes import check_shapes

MAX_ENTRIES = 1 << 22  # matrix entries held at a time, each an index and a weight: about 100 MiB with what sorts them


def roi_align(
    features: Tensor,
    boxes: Tensor | list[Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """Resample each box of the feature map to h x w bins, the mean of bilinear samples in each.

    Source: He et al. 2017, "Mask R-CNN", section 3, "RoIAlign"; the edge rules are torchvision's. A sample more than
    one position outside of the map is 0, a nearer one takes the value of the edge.

    Args:
        features: (B, C, H, W), float; differentiable. Half precision computes in float32. channels_last is used without
            a copy.
        boxes: a list of B tensors (Ni, 4), x1, y1, x2, y2 in pixels of the picture, or one (R, 5) with the index of the
            picture in front. They get no gradient.
        output_size: h and w, or one number for both.
        spatial_scale: feature positions per pixel of the picture, 1 / stride.
        sampling_ratio: samples in a bin along each axis; 0 or less takes as many as the bin is wide, rounded up.
        aligned: shift by half a position, so that the pixel centres of picture and map agree, and let boxes be smaller
            than one position. False is what the published models were trained with.

    Returns: (R, C, h, w) in the type of the features, in channels_last memory.

    Raises: ValueError for other shapes, boxes of more or fewer pictures than the features are of, and features that
        are no floats.
    """
    check_shapes(features=(features, "B", "C", "H", "W"))
    if not features.is_floating_point():
        raise ValueError(f"features are {features.dtype}, expected floats")
    rois = _rois(boxes, len(features))
    levels = torch.zeros(len(rois), dtype=torch.long, device=rois.device)
    return _RoIAlign.apply(rois, levels, (spatial_scale,), _pair(output_size), sampling_ratio, aligned, features)


class MultiScaleRoIAlign(nn.Module):
    """RoIAlign on a feature pyramid: each box is read from the level that fits its size.

    Source: Lin et al. 2017, "Feature Pyramid Networks for Object Detection", section 4.2.

    Args:
        featmap_names: which maps of the dict to use, finest first; others ("pool") are ignored.
        output_size: h and w of a box's grid, or one number for both.
        sampling_ratio: see `roi_align`.
    """

    def __init__(self, featmap_names: list[str], output_size: int | tuple[int, int], sampling_ratio: int):
        super().__init__()
        self.featmap_names = tuple(featmap_names)
        self.output_size = _pair(output_size)
        self.sampling_ratio = sampling_ratio

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], image_sizes: list[tuple[int, int]]) -> Tensor:
        """Maps (B, C, H, W) by name, B tensors of boxes (Ni, 4) in pixels, heights and widths -> (R, C, h, w).

        `image_sizes` only tell the strides, taken to be powers of two: the pictures' largest height or width over the
        map's, whichever says more. The padded sizes make them exact; with the pictures' own, as torchvision is given,
        those of pictures smaller than 0.7 of what they are padded to are wrong.
        """
        maps = [features[name] for name in self.featmap_names]
        height, width = (max(side) for side in zip(*image_sizes, strict=True))
        strides = [round(math.log2(max(height / level.shape[2], width / level.shape[3]))) for level in maps]
        rois = _rois(boxes, len(maps[0]))
        levels = assign_levels(rois[:, 1:], strides[0], strides[-1])
        scales = tuple(2.0**-k for k in strides)
        return _RoIAlign.apply(rois, levels, scales, self.output_size, self.sampling_ratio, False, *maps)

    def extra_repr(self) -> str:
        return f"{', '.join(self.featmap_names)}, output_size={self.output_size}, sampling_ratio={self.sampling_ratio}"


def assign_levels(boxes: Tensor, k_min: int, k_max: int) -> Tensor:
    """The pyramid level of each box (N, 4), (N,) counted from 0 for `k_min`, where level k has the stride 2^k.

    k = floor(k0 + log2(sqrt(w h) / 224)) with k0 = 4: a box of ImageNet's size is read at stride 16. Source: Lin et al.
    2017, equation 1; the 1e-6 of the reference keeps 224 itself from falling to the level below.
    """
    check_shapes(boxes=(boxes, "N", 4))
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    size = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    k = torch.floor(4 + torch.log2(size / 224) + 1e-6).clamp(k_min, k_max)
    return k.nan_to_num(k_min).long() - k_min


def axis_taps(
    start: Tensor, end: Tensor, bins: int, size: int, sampling_ratio: int, aligned: bool
) -> tuple[Tensor, Tensor]:
    """RoIAlign along one axis: which positions of the map a bin reads and how much of each.

    Args:
        start, end: (R,) sides of the boxes, in positions of the map.
        bins, size: number of bins of a box, and of positions of the map.

    Returns: (R, bins, T) positions and (R, bins, T) weights; a bin is the weighted sum of its T positions. Weights of
        samples that don't exist are 0.
    """
    extent = end - start if aligned else (end - start).clamp(min=1)  # (R,)
    bin_size = (extent / bins)[:, None]  # (R, 1)
    left = start[:, None] + torch.arange(bins, device=start.device) * bin_size  # (R, bins)
    if sampling_ratio > 0:
        samples = torch.full_like(bin_size, sampling_ratio)
        first, last, most = torch.zeros_like(left), samples, sampling_ratio
    else:
        samples = bin_size.ceil().nan_to_num(1, posinf=1, neginf=1).clamp(min=0)
        # A box may be far larger than the map: only the samples on the map, and one more at each end for rounding.
        step = bin_size / samples
        first = (((-1 - left) / step).floor() - 1).nan_to_num(0).clamp(min=0).minimum(samples)  # (R, bins)
        last = (((size - left) / step).ceil() + 1).nan_to_num(1).clamp(min=0).minimum(samples)
        most = int((last - first).max().clamp(min=1)) if len(left) else 1
    k = first[:, :, None] + torch.arange(most, device=start.device)  # (R, bins, most): number of the sample in its bin
    position = left[:, :, None] + (k + 0.5) * bin_size[:, :, None] / samples[:, :, None].clamp(min=1)
    outside = (k >= last[:, :, None]) | (position < -1) | (position > size)
    position = position.clamp(0, size - 1)
    low = position.nan_to_num(0).floor()  # NaN boxes read somewhere, with a weight of NaN
    high = (low + 1).clamp(max=size - 1)
    share = 1 / samples.clamp(min=1)[:, :, None]
    upper = (position - low) * share
    weight = torch.stack((share - upper, upper), dim=3).masked_fill(outside[:, :, :, None], 0)  # (R, bins, most, 2)
    return torch.stack((low, high), dim=3).flatten(2).int(), weight.flatten(2)


def weighted_sums(rows: Tensor, index: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Sparse matrix times dense rows: out[i] = sum of weight[e] * rows[index[e]] for e in offsets[i]..offsets[i + 1].

    The matrix is in CSR form, (nnz,) columns and values and (N + 1,) row offsets; `rows` is (M, C), the result (N, C).
    An embedding bag is this very product, and on CPU by far its fastest form. It has no fast form for float64.
    """
    if rows.dtype == torch.float32 and rows.device.type in ("cpu", "cuda"):
        return F.embedding_bag(
            index, rows, offsets, mode="sum", per_sample_weights=weight, include_last_offset=True
        )  # (N, C)
    out = rows.new_zeros(len(offsets) - 1, rows.shape[1])
    bags = torch.repeat_interleave(offsets.diff(), output_size=len(index))
    for part in torch.arange(len(index), device=rows.device).split(max(1, 2**25 // max(1, rows.shape[1]))):
        out.index_add_(0, bags[part], rows[index[part].long()] * weight[part, None])
    return out


def compressed(index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The CSR form, as `weighted_sums` takes it, of (N, T) columns and values, without the values that are 0."""
    used = weight != 0
    return index[used], weight[used], F.pad(used.sum(1).cumsum(0), (1, 0)).int()


class _RoIAlign(torch.autograd.Function):
    """RoIAlign of boxes (R, 5), each on its own of several maps; only the boxes are kept for the backward pass."""

    @staticmethod
    def forward(ctx, rois, levels, scales, output_size, sampling_ratio, aligned, *maps):
        ctx.save_for_backward(rois, levels)
        ctx.settings = (scales, output_size, sampling_ratio, aligned)
        ctx.shapes = [features.shape for features in maps]
        channels, bins = maps[0].shape[1], output_size[0] * output_size[1]
        dtype = torch.promote_types(maps[0].dtype, torch.float32)
        out = maps[0].new_empty(len(rois), bins * channels, dtype=dtype)
        for level, (features, scale) in enumerate(zip(maps, scales, strict=True)):
            rows, shape = None, features.shape
            for chosen in _chunks(rois, levels == level, scale, shape, output_size, sampling_ratio):
                rows = _rows(features, dtype) if rows is None else rows  # (B * H * W, C)
                matrix = _matrix(rois[chosen], scale, shape, output_size, sampling_ratio, aligned, dtype)
                part = weighted_sums(rows, *matrix).view(len(chosen), -1)
                if len(chosen) == len(rois):
                    out = part
                else:
                    out[chosen] = part
        return out.to(maps[0].dtype).view(len(rois), *output_size, channels).permute(0, 3, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        rois, levels = ctx.saved_tensors
        scales, output_size, sampling_ratio, aligned = ctx.settings
        dtype = torch.promote_types(grad.dtype, torch.float32)
        rows = _rows(grad, dtype)  # (R * h * w, C)
        bins = torch.arange(output_size[0] * output_size[1], device=grad.device)
        grads = []
        for level, (shape, scale) in enumerate(zip(ctx.shapes, scales, strict=True)):
            positions, total = shape[0] * shape[2] * shape[3], None
            for chosen in _chunks(rois, levels == level, scale, shape, output_size, sampling_ratio):
                matrix = _matrix(rois[chosen], scale, shape, output_size, sampling_ratio, aligned, dtype)
                numbers = (chosen[:, None] * len(bins) + bins).flatten()  # of the matrix's rows among those of `rows`
                part = weighted_sums(rows, *_transposed(*matrix, numbers, positions))  # (B * H * W, C)
                total = part if total is None else total.add_(part)
            if total is None:
                total = rows.new_zeros(positions, shape[1])
            total = total.to(grad.dtype).view(shape[0], *shape[2:], shape[1])
            grads.append(total.permute(0, 3, 1, 2))
        return None, None, None, None, None, None, *grads


def _rows(features, dtype):
    """(B, C, H, W) -> contiguous (B * H * W, C); a view where the map is channels_last."""
    return features.to(dtype).permute(0, 2, 3, 1).reshape(-1, features.shape[1]).contiguous()


def _matrix(rois, scale, shape, output_size, sampling_ratio, aligned, dtype):
    """The CSR matrix (R * h * w, B * H * W) of boxes (R, 5), in the form that `weighted_sums` takes."""
    (height, width), (h, w) = shape[2:], output_size
    x1, y1, x2, y2 = (rois[:, 1:].to(dtype) * scale - (0.5 if aligned else 0.0)).unbind(1)
    y, y_weight = axis_taps(y1, y2, h, height, sampling_ratio, aligned)  # (R, h, Ty)
    x, x_weight = axis_taps(x1, x2, w, width, sampling_ratio, aligned)  # (R, w, Tx)
    y = y + (rois[:, 0].int() * height)[:, None, None]  # the maps of a batch lie one below the other
    index = (y * width)[:, :, None, :, None] + x[:, None, :, None, :]  # (R, h, w, Ty, Tx)
    weight = y_weight[:, :, None, :, None] * x_weight[:, None, :, None, :]
    index, weight = index.flatten(0, 2).flatten(1), weight.flatten(0, 2).flatten(1)  # (R * h * w, Ty * Tx)
    if sampling_ratio <= 0:
        return compressed(index, weight)
    offsets = torch.arange(0, index.numel() + 1, index.shape[1], dtype=torch.int32, device=index.device)
    return index.flatten(), weight.flatten(), offsets


def _transposed(index, weight, offsets, numbers, columns):
    """The transpose of a CSR matrix that has the given number of columns, and whose rows bear these numbers."""
    index, order = index.sort(stable=True)
    entries = torch.repeat_interleave(numbers.int(), offsets.diff(), output_size=len(order))
    wanted = torch.arange(columns + 1, dtype=torch.int32, device=index.device)
    return entries[order], weight[order], torch.searchsorted(index, wanted, out_int32=True)


def _chunks(rois, chosen, scale, shape, output_size, sampling_ratio):
    """Indices of the chosen boxes, in chunks whose matrix has at most MAX_ENTRIES entries (or one box)."""
    chosen = chosen.nonzero().flatten()
    bins = output_size[0] * output_size[1]
    if sampling_ratio > 0 or len(chosen) == 0:
        return chosen.split(max(1, MAX_ENTRIES // (bins * (2 * sampling_ratio) ** 2))) if len(chosen) else ()
    # All boxes of a chunk are padded to the samples of the largest: those of similar size go together.
    sides = (rois[chosen, 3:] - rois[chosen, 1:3]).abs() * scale / rois.new_tensor(output_size[::-1])
    side = sides.nan_to_num(1).amax(dim=1).clamp(2, 2 * max(shape[2:])).log2().ceil().long()  # (R,)
    chunks = []
    for exponent in side.unique().tolist():
        taps = 2 * (2**exponent + 2)
        chunks.extend(chosen[side == exponent].split(max(1, MAX_ENTRIES // (bins * taps**2))))
    return chunks


def _rois(boxes, pictures):
    """Boxes (R, 5) with the picture's index in front, of a list with the (Ni, 4) of each picture."""
    if isinstance(boxes, Tensor):
        check_shapes(boxes=(boxes, "R", 5))
        number = boxes[:, 0]
        if not ((number >= 0) & (number < pictures) & (number == number.floor())).all():
            raise ValueError(f"boxes[:, 0] names pictures other than 0 .. {pictures - 1}")
        return boxes.detach()
    if len(boxes) != pictures:
        raise ValueError(f"boxes are of {len(boxes)} pictures, features of {pictures}")
    for i, group in enumerate(boxes):
        check_shapes(**{f"boxes[{i}]": (group, "N", 4)})
    number = [torch.full_like(group[:, :1], i) for i, group in enumerate(boxes)]
    return torch.cat((torch.cat(number), torch.cat(list(boxes))), dim=1).detach()


def _pair(size):
    return (size, size) if isinstance(size, int) else tuple(size)
