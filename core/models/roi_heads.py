"""The second stage of Mask R-CNN (He et al. 2017): class, box and mask of each proposal.

As in torchvision, class 0 is the background and label k has row k of every prediction layer.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.layers.boxes import batched_nms, box_iou, clip_boxes, decode_boxes, encode_boxes, large_enough, match
from core.layers.masks import project_masks
from core.layers.roi_align import MultiScaleRoIAlign
from core.models.rpn import BETA, sample_balanced

MIN_SIZE = 1e-2  # pixels; thinner detections are dropped
LEVELS = ("0", "1", "2", "3")  # P2 ... P5; P6 is for the RPN alone


class BoxHead(nn.Module):
    """Two fully connected layers, (R, C, h, w) -> (R, hidden)."""

    def __init__(self, in_features: int, hidden: int):
        super().__init__()
        self.fc6 = nn.Linear(in_features, hidden)
        self.fc7 = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.fc7(F.relu(self.fc6(x.flatten(1)))))


class BoxPredictor(nn.Module):
    """(R, D) -> class logits (R, num_classes) and box deltas of every class (R, 4 * num_classes), both float32."""

    def __init__(self, in_features: int, num_classes: int):
        super().__init__()
        self.cls_score = nn.Linear(in_features, num_classes)
        self.bbox_pred = nn.Linear(in_features, 4 * num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(x).float(), self.bbox_pred(x).float()


class MaskHead(nn.Sequential):
    """Four 3x3 convolutions with ReLU, (R, C, h, w) -> (R, 256, h, w)."""

    def __init__(self, in_channels: int, channels: Sequence[int] = (256, 256, 256, 256)):
        widths = (in_channels, *channels)
        super().__init__(
            *(
                nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1), nn.ReLU(inplace=True))
                for c_in, c_out in zip(widths, channels, strict=False)
            )
        )
        for block in self:
            nn.init.kaiming_normal_(block[0].weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(block[0].bias)


class MaskPredictor(nn.Module):
    """Doubles the resolution and gives the mask logits of one class for each region."""

    def __init__(self, in_channels: int, hidden: int, num_classes: int):
        super().__init__()
        self.conv5_mask = nn.ConvTranspose2d(in_channels, hidden, 2, stride=2)
        self.mask_fcn_logits = nn.Conv2d(hidden, num_classes, 1)
        for layer in (self.conv5_mask, self.mask_fcn_logits):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """(R, C, h, w) and the class of each region (R,) -> logits (R, 2h, 2w), float32.

        Neither the loss nor a detection looks at another class than its own (section 3: masks don't compete), so of
        the 1x1 convolution `mask_fcn_logits` only that class's row is computed.
        """
        x = F.relu(self.conv5_mask(x))  # (R, hidden, 2h, 2w)
        rows = F.embedding(labels, self.mask_fcn_logits.weight.flatten(1))  # (R, hidden)
        logits = torch.bmm(rows[:, None].to(x.dtype), x.flatten(2)).view(len(x), *x.shape[2:])
        return logits.float() + self.mask_fcn_logits.bias[labels][:, None, None]


class RoIHeads(nn.Module):
    """Proposals -> in training losses, in evaluation detections.

    Args:
        in_channels: channels of the pyramid's maps.
        num_classes: with the background.
        fg_iou_thresh: a proposal takes the class of the object that it overlaps most, from this IoU on.
        bg_iou_thresh: it is background below this IoU; in between it isn't trained on.
        batch_size_per_image: proposals of a picture that the losses are taken over.
        positive_fraction: largest part of objects among them.
        box_reg_weights: weights of the box coding (x, y, w, h).
        score_thresh: detections need a higher class score.
        nms_thresh: IoU above which the lesser of two detections of a class goes.
        detections_per_img: best detections of a picture that are kept.
        box_roi_output_size, mask_roi_output_size: each region is read as a grid of so many bins along each side, for
            the boxes and for the masks, which come out twice as large.
        roi_sampling_ratio: samples in a bin along each side.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        fg_iou_thresh: float = 0.5,
        bg_iou_thresh: float = 0.5,
        batch_size_per_image: int = 512,
        positive_fraction: float = 0.25,
        box_reg_weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0),
        score_thresh: float = 0.05,
        nms_thresh: float = 0.5,
        detections_per_img: int = 100,
        box_roi_output_size: int = 7,
        mask_roi_output_size: int = 14,
        roi_sampling_ratio: int = 2,
    ):
        super().__init__()
        self.box_roi_pool = MultiScaleRoIAlign(LEVELS, box_roi_output_size, roi_sampling_ratio)
        self.box_head = BoxHead(in_channels * box_roi_output_size**2, 1024)
        self.box_predictor = BoxPredictor(1024, num_classes)
        self.mask_roi_pool = MultiScaleRoIAlign(LEVELS, mask_roi_output_size, roi_sampling_ratio)
        self.mask_head = MaskHead(in_channels)
        self.mask_predictor = MaskPredictor(256, 256, num_classes)
        self.fg_iou_thresh = fg_iou_thresh
        self.bg_iou_thresh = bg_iou_thresh
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction
        self.box_reg_weights = tuple(box_reg_weights)
        self.score_thresh = score_thresh
        self.nms_thresh = nms_thresh
        self.detections_per_img = detections_per_img

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: Sequence[Tensor],
        padded_size: tuple[int, int],
        image_sizes: Sequence[tuple[int, int]],
        targets: Sequence[dict[str, Tensor]] | None = None,
        min_score: float = 0.0,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """
        Args:
            features: the pyramid, "0" ... "3": (B, C, Hi, Wi).
            proposals: (P, 4) of each picture, in pixels of the batch.
            padded_size: (H, W) of the batch, pixels; over the size of a map it gives that map's stride.
            image_sizes: (h, w) of each picture in the batch.
            targets: boxes (G, 4), labels (G,), masks (G, H, W) of each picture, in pixels of the batch; for training.
            min_score: detections have at least this score too; what has less gets no mask, which is most of the work.

        Returns:
            Detections: a dict of boxes (N, 4), labels (N,), scores (N,), masks (N, 1, M, M) for each picture, best
            first, with M twice mask_roi_output_size; empty in training. Losses: loss_classifier, loss_box_reg,
            loss_mask; empty in evaluation.
        """
        if self.training:
            return [], self.losses(features, proposals, padded_size, targets)
        logits, deltas = self._predict_boxes(features, proposals, padded_size)
        detections = self.detect(logits, deltas, proposals, image_sizes, min_score)
        boxes, labels = [d["boxes"] for d in detections], [d["labels"] for d in detections]
        masks = self._predict_masks(features, boxes, padded_size, torch.cat(labels)).sigmoid()  # (N, M, M)
        for detection, mask in zip(detections, masks[:, None].split([len(b) for b in boxes]), strict=True):
            detection["masks"] = mask
        return detections, {}

    def _predict_boxes(self, features, boxes, padded_size):
        regions = self.box_roi_pool(features, boxes, [padded_size] * len(boxes))
        return self.box_predictor(self.box_head(regions))

    def _predict_masks(self, features, boxes, padded_size, labels):
        regions = self.mask_roi_pool(features, boxes, [padded_size] * len(boxes))
        return self.mask_predictor(self.mask_head(regions), labels)

    def losses(self, features, proposals, padded_size, targets) -> dict[str, Tensor]:
        """Classifier and box losses on a sample of the proposals, mask loss on the objects among them."""
        samples = [self.sample(boxes, target) for boxes, target in zip(proposals, targets, strict=True)]
        boxes, labels, matched = zip(*samples, strict=True)
        positive = [torch.where(label > 0)[0] for label in labels]
        encoded = [
            encode_boxes(target["boxes"][index[keep]], box[keep], self.box_reg_weights)
            for target, index, box, keep in zip(targets, matched, boxes, positive, strict=True)
        ]
        logits, deltas = self._predict_boxes(features, boxes, padded_size)
        loss_classifier, loss_box_reg = box_losses(logits, deltas, torch.cat(labels), torch.cat(encoded))

        boxes = [box[keep] for box, keep in zip(boxes, positive, strict=True)]
        mask_labels = torch.cat([label[keep] for label, keep in zip(labels, positive, strict=True)])
        mask_logits = self._predict_masks(features, boxes, padded_size, mask_labels)  # (P, M, M)
        masks = [
            project_masks(target["masks"], box, index[keep], mask_logits.shape[-1])
            for target, box, index, keep in zip(targets, boxes, matched, positive, strict=True)
        ]
        loss_mask = F.binary_cross_entropy_with_logits(mask_logits, torch.cat(masks), reduction="sum")
        return {
            "loss_classifier": loss_classifier,
            "loss_box_reg": loss_box_reg,
            "loss_mask": loss_mask / max(mask_logits.numel(), 1),
        }

    @torch.no_grad()
    def sample(self, proposals: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The proposals of one picture and its true boxes -> a sample: boxes (S, 4), labels (S,), object or -1 (S,).

        The true boxes are among the candidates, so there are objects to learn from before the RPN finds any.
        """
        boxes = torch.cat((proposals, target["boxes"]))
        matched = match(box_iou(target["boxes"], boxes), self.fg_iou_thresh, self.bg_iou_thresh)
        label_of = F.pad(target["labels"], (2, 0))  # at matched + 2: -2, in between -> -1; -1, background -> 0
        label_of[0] = -1
        labels = label_of[matched + 2]
        chosen = sample_balanced(labels, self.batch_size_per_image, self.positive_fraction)
        chosen = torch.cat(chosen).sort()[0]
        return boxes[chosen], labels[chosen], matched[chosen]

    @torch.no_grad()
    def detect(self, logits, deltas, proposals, image_sizes, min_score=0.0) -> list[dict[str, Tensor]]:
        """Class logits and deltas of all proposals -> boxes, labels and scores of each picture, best first.

        Every proposal is a candidate for every class; those with a high enough score are decoded and thinned by NMS
        within their class.
        """
        deltas = deltas.unflatten(1, (-1, 4))  # (R, num_classes, 4)
        counts = [len(boxes) for boxes in proposals]
        pictures = zip(logits.softmax(-1).split(counts), deltas.split(counts), proposals, image_sizes, strict=True)
        return [self._detect_in_picture(*picture, min_score) for picture in pictures]

    def _detect_in_picture(self, scores, deltas, proposals, image_size, min_score):
        candidates = scores[:, 1:]
        region, label = torch.where((candidates > self.score_thresh) & (candidates >= min_score))
        label = label + 1
        scores = scores[region, label]
        boxes = decode_boxes(deltas[region, label], proposals[region], self.box_reg_weights).view(-1, 4)
        boxes = clip_boxes(boxes, image_size)
        keep = large_enough(boxes, MIN_SIZE)
        boxes, scores, label = boxes[keep], scores[keep], label[keep]
        keep = batched_nms(boxes, scores, label, self.nms_thresh)[: self.detections_per_img]
        return {"boxes": boxes[keep], "labels": label[keep], "scores": scores[keep]}


def box_losses(logits: Tensor, deltas: Tensor, labels: Tensor, encoded: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy over all sampled proposals, and smooth L1 on the deltas of the true class of the positive ones.

    Args:
        logits: (S, num_classes).
        deltas: (S, 4 * num_classes).
        labels: (S,), 0 is background.
        encoded: (P, 4), what the deltas of the P positives should be, in their order.

    Returns:
        Both divided by S: a positive counts the same for the boxes whether its picture has many or few.
    """
    positive = torch.where(labels > 0)[0]
    own = deltas.unflatten(1, (-1, 4))[positive, labels[positive]]  # (P, 4)
    count = max(len(labels), 1)
    loss_classifier = F.cross_entropy(logits, labels, reduction="sum") / count
    return loss_classifier, F.smooth_l1_loss(own, encoded, beta=BETA, reduction="sum") / count
