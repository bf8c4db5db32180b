"""Region proposal network (Ren et al. 2015): where in the picture something may be, whatever its class.

Also here, because both stages of the detector train on a sample: `sample_balanced`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.layers.anchors import AnchorGenerator
from core.layers.boxes import batched_nms, box_iou, clip_boxes, decode_boxes, encode_boxes, large_enough, match

MIN_SIZE = 1e-3  # pixels; thinner proposals are dropped
BOX_WEIGHTS = (1.0, 1.0, 1.0, 1.0)  # of the coding (x, y, w, h)
BETA = 1 / 9  # where the smooth L1 loss turns from quadratic to linear


def sample_balanced(labels: Tensor, count: int, positive_fraction: float) -> tuple[Tensor, Tensor]:
    """Random positives, at most `positive_fraction` of `count`, and negatives that fill it up as far as there are any.

    The random numbers are drawn by the same calls as in torchvision, so the same seed gives the same sample.

    Args:
        labels: (N,), 1 or more is positive, 0 negative, less is never taken.

    Returns:
        Two tensors of indices into `labels`, each in ascending order.
    """
    positive, negative = torch.where(labels >= 1)[0], torch.where(labels == 0)[0]
    num_positive = min(len(positive), int(count * positive_fraction))
    num_negative = min(len(negative), count - num_positive)
    chosen_positive = torch.randperm(len(positive), device=labels.device)[:num_positive]
    chosen_negative = torch.randperm(len(negative), device=labels.device)[:num_negative]
    return positive[chosen_positive.sort()[0]], negative[chosen_negative.sort()[0]]


class RPNHead(nn.Module):
    """A 3x3 convolution, then for each of A anchors per position its objectness and four box deltas.

    The same weights serve all levels of the pyramid. Keys and initialisation (normal, deviation 0.01) as torchvision.
    """

    def __init__(self, in_channels: int, num_anchors: int):
        super().__init__()
        conv = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.conv = nn.Sequential(nn.Sequential(conv, nn.ReLU(inplace=True)))
        self.cls_logits = nn.Conv2d(in_channels, num_anchors, 1)
        self.bbox_pred = nn.Conv2d(in_channels, 4 * num_anchors, 1)
        self.num_outputs = (num_anchors, 4 * num_anchors)
        for layer in (conv, self.cls_logits, self.bbox_pred):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, levels: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps (B, C, Hi, Wi) -> per level objectness logits (B, Hi * Wi * A) and deltas (B, Hi * Wi * A, 4), float32.

        Both run over rows, columns and anchors in that order, as the anchors do.
        """
        weight, bias = self._prediction()
        logits, deltas = [], []
        for level in levels:
            out = F.conv2d(self.conv(level), weight[..., None, None], bias).float().permute(0, 2, 3, 1)
            out = out.flatten(1, 2).split(self.num_outputs, dim=2)  # (B, H * W, A), (B, H * W, 4 * A)
            logits.append(out[0].flatten(1))
            deltas.append(out[1].reshape(len(level), -1, 4))
        return logits, deltas

    def at_anchors(self, levels: Sequence[Tensor], picture: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """The same for the anchors `anchor` (S,), counted over all levels, of the pictures `picture` (S,) in the batch.

        Training samples a few hundred of a hundred thousand anchors. Their gradient reaches no more than the 3x3 pixels
        around each, and taken only there it spares the backward pass of the costliest convolution of the network.

        Returns:
            Logits (S,) and deltas (S, 4), float32.
        """
        num_anchors = self.num_outputs[0]
        patches, order = [], []
        first = 0
        for level in levels:
            height, width = level.shape[2:]
            chosen = torch.where((anchor >= first) & (anchor < first + height * width * num_anchors))[0]
            position = (anchor[chosen] - first) // num_anchors
            patches.append(_patches(level, picture[chosen], position // width, position % width))
            order.append(chosen)
            first += height * width * num_anchors
        conv = self.conv[0][0]
        hidden = F.linear(torch.cat(patches), conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias).relu()  # (S, C)
        out = F.linear(hidden, *self._prediction()).float()[torch.cat(order).argsort()]
        logits, deltas = out.split(self.num_outputs, dim=1)  # (S, A), (S, 4 * A)
        own = (torch.arange(len(anchor), device=anchor.device), anchor % num_anchors)
        return logits[own], deltas.unflatten(1, (num_anchors, 4))[own]

    def _prediction(self) -> tuple[Tensor, Tensor]:
        """Weight (5 * A, C) and bias (5 * A,) of both outputs together: one layer reads the map once."""
        weight = torch.cat((self.cls_logits.weight, self.bbox_pred.weight)).flatten(1)
        return weight, torch.cat((self.cls_logits.bias, self.bbox_pred.bias))


def _patches(level: Tensor, picture: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """The 3x3 pixels around positions (S,) of a map (B, C, H, W), zero outside -> (S, 9 * C)."""
    channels, height, width = level.shape[1:]
    step = torch.arange(-1, 2, device=level.device)
    rows, columns = row[:, None, None] + step[:, None], column[:, None, None] + step  # (S, 3, 1), (S, 1, 3)
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)  # (S, 3, 3)
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    pixels = (picture[:, None, None] * height + rows) * width + columns
    # Not by indexing, whose backward pass on a CPU adds overlapping patches in whatever order its threads come.
    values = F.embedding(pixels, level.permute(0, 2, 3, 1).reshape(-1, channels))  # (S, 3, 3, C)
    return (values * inside[..., None]).flatten(1)


class RegionProposalNetwork(nn.Module):
    """Anchors over all levels of the pyramid -> scored, decoded and filtered: the proposals, and the losses on them.

    Args:
        anchor_generator: gives the anchors of a padded picture.
        head: gives each anchor's objectness and deltas.
        pre_nms_top_n: in training and in evaluation, best proposals of each level that NMS sees.
        post_nms_top_n: in training and in evaluation, proposals of a picture that are kept.
        nms_thresh: IoU above which the lesser of two proposals of a level goes.
        fg_iou_thresh: an anchor is positive from this IoU with an object; each object's best anchors are in any case.
        bg_iou_thresh: an anchor is negative below this IoU with every object; those in between are not trained on.
        batch_size_per_image: anchors of a picture that the losses are taken over.
        positive_fraction: largest part of positives among them.
        score_thresh: proposals of a lower objectness in [0, 1] are dropped.
    """

    def __init__(
        self,
        anchor_generator: AnchorGenerator,
        head: RPNHead,
        *,
        pre_nms_top_n: tuple[int, int] = (2000, 1000),
        post_nms_top_n: tuple[int, int] = (2000, 1000),
        nms_thresh: float = 0.7,
        fg_iou_thresh: float = 0.7,
        bg_iou_thresh: float = 0.3,
        batch_size_per_image: int = 256,
        positive_fraction: float = 0.5,
        score_thresh: float = 0.0,
    ):
        super().__init__()
        self.anchor_generator = anchor_generator
        self.head = head
        self.pre_nms_top_n = pre_nms_top_n
        self.post_nms_top_n = post_nms_top_n
        self.nms_thresh = nms_thresh
        self.fg_iou_thresh = fg_iou_thresh
        self.bg_iou_thresh = bg_iou_thresh
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction
        self.score_thresh = score_thresh

    def forward(
        self,
        levels: Sequence[Tensor],
        padded_size: tuple[int, int],
        image_sizes: Sequence[tuple[int, int]],
        targets: Sequence[dict[str, Tensor]] | None = None,
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """
        Args:
            levels: maps of the pyramid (B, C, Hi, Wi), finest first.
            padded_size: (H, W) of the batch of pictures, pixels.
            image_sizes: (h, w) of each picture in it.
            targets: "boxes" (G, 4) of each picture, in pixels of the batch; needed in training.

        Returns:
            Proposals (P, 4) of each picture, best first, without gradient; in training the losses `loss_objectness`
            and `loss_rpn_box_reg`, in evaluation an empty dict.
        """
        with torch.no_grad():  # the losses look at a sample of the anchors, for which the head is asked again
            logits, deltas = self.head(levels)
            anchors = self.anchor_generator(padded_size, levels)  # (A, 4)
            proposals = self.propose(logits, deltas, anchors, image_sizes)
        if not self.training:
            return proposals, {}
        # Autocast keeps the half-precision copies of weights. Those made above have no gradient; where torch uses them
        # again (older versions do), `conv.bias` would silently get none from the losses.
        torch.clear_autocast_cache()
        return proposals, self.losses(levels, anchors, targets)

    def propose(self, logits, deltas, anchors, image_sizes) -> list[Tensor]:
        """The best of each level, decoded, clipped to the picture and thinned by NMS within the level."""
        top_n = self.pre_nms_top_n[0 if self.training else 1]
        best, level_of = [], []
        first = 0
        for i, level in enumerate(logits):
            index = level.topk(min(top_n, level.shape[1]), dim=1)[1]
            best.append(index + first)
            level_of.append(index.new_full((index.shape[1],), i))
            first += level.shape[1]
        best, level_of = torch.cat(best, dim=1), torch.cat(level_of)  # (B, T), (T,)

        scores = torch.cat(logits, dim=1).gather(1, best).sigmoid()
        deltas = torch.cat(deltas, dim=1).gather(1, best[..., None].expand(-1, -1, 4))  # (B, T, 4)
        boxes = decode_boxes(deltas.flatten(0, 1), anchors[best].flatten(0, 1), BOX_WEIGHTS).view_as(deltas)
        return [
            self._filter(*picture, level_of, size) for *picture, size in zip(boxes, scores, image_sizes, strict=True)
        ]

    def _filter(self, boxes, scores, level_of, image_size):
        boxes = clip_boxes(boxes, image_size)
        keep = torch.where(large_enough(boxes, MIN_SIZE) & (scores >= self.score_thresh))[0]
        boxes, scores, level_of = boxes[keep], scores[keep], level_of[keep]
        keep = batched_nms(boxes, scores, level_of, self.nms_thresh)
        return boxes[keep[: self.post_nms_top_n[0 if self.training else 1]]]

    def losses(self, levels, anchors, targets) -> dict[str, Tensor]:
        """Equation 1 of the paper on a sample of the anchors, with both parts divided by the size of the sample."""
        samples, labels, encoded = [], [], []
        for target in targets:
            iou = box_iou(target["boxes"], anchors)  # (G, A)
            matched = match(iou, self.fg_iou_thresh, self.bg_iou_thresh, allow_low_quality=True)  # (A,)
            label = (matched >= 0).long() - (matched == -2).long()  # 1 positive, 0 negative, -1 neither
            positive, negative = sample_balanced(label, self.batch_size_per_image, self.positive_fraction)
            samples.append(torch.cat((positive, negative)))
            labels.append(label[samples[-1]])
            encoded.append(encode_boxes(target["boxes"][matched[positive]], anchors[positive], BOX_WEIGHTS))
        picture = torch.cat([torch.full_like(index, i) for i, index in enumerate(samples)])
        logits, deltas = self.head.at_anchors(levels, picture, torch.cat(samples))  # (S,), (S, 4)
        labels = torch.cat(labels)
        count = max(len(labels), 1)
        objectness = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum")
        box_reg = F.smooth_l1_loss(deltas[labels == 1], torch.cat(encoded), beta=BETA, reduction="sum")
        return {"loss_objectness": objectness / count, "loss_rpn_box_reg": box_reg / count}
