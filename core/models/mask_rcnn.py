"""Mask R-CNN (He et al. 2017) on a ResNet with a feature pyramid, from pictures to losses or detections.

State-dict keys, defaults and results are those of torchvision's `maskrcnn_resnet50_fpn`; a file with its names of 2019
is read as well. `core.models.detection_weights` gets weights to start from.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import InputError
from core.layers.anchors import AnchorGenerator
from core.layers.fpn import FeaturePyramidNetwork
from core.layers.masks import paste_masks
from core.layers.norm import freeze_batch_norm
from core.layers.shapes import check_shapes, fitted_size
from core.models.detection_weights import rename_old_keys
from core.models.resnet import RESNETS
from core.models.roi_heads import RoIHeads
from core.models.rpn import RegionProposalNetwork, RPNHead

__all__ = ["BACKBONES", "MaskRCNN", "NORMS", "paste_masks", *(f"mask_rcnn_resnet{n}_fpn" for n in (18, 34, 50, 101))]

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101")
NORMS = ("batch", "frozen", "sync")
STAGES = ("layer4", "layer3", "layer2", "layer1", "conv1")  # in the order in which they become trainable
SIZE_DIVISIBLE = 32  # pixels; the coarsest stage's stride
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ResNetFPN(nn.Module):
    """Pictures (B, 3, H, W) -> the pyramid: "0" ... "3" and "pool", (B, 256, H/s, W/s) with s = 4, 8, 16, 32, 64.

    Args:
        name: one of `BACKBONES`.
        norm: "batch", "frozen" or "sync".
        trainable_layers: of the stages layer4, layer3, layer2, layer1 and the stem so many are trained, the rest keeps
            its weights. The running statistics of a BatchNorm go on moving, as in torchvision; "frozen" keeps them.
    """

    out_channels = 256

    def __init__(self, name: str, norm: str, trainable_layers: int):
        super().__init__()
        self.body = RESNETS[name](num_classes=0)
        trained = STAGES[:trainable_layers] + (("bn1",) if trainable_layers == len(STAGES) else ())
        for parameter_name, parameter in self.body.named_parameters():
            parameter.requires_grad_(parameter_name.startswith(trained))
        if norm == "frozen":
            freeze_batch_norm(self.body)
        elif norm == "sync":
            self.body = nn.SyncBatchNorm.convert_sync_batchnorm(self.body)
        self.fpn = FeaturePyramidNetwork(self.body.stage_channels, self.out_channels)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn(self.body.forward_stages(x))


class MaskRCNN(nn.Module):
    """Finds the objects in pictures: their boxes, classes and masks.

    Called with a list of pictures, float (3, H, W) in [0, 1], each of its own size. In training it also takes
    `targets`, for each picture a dict of boxes (G, 4) (x1, y1, x2, y2) in pixels, labels (G,) int64 in
    1 ... num_classes - 1 and masks (G, H, W) of bool or uint8, where G may be 0, and returns the five losses. Masks may
    be of the size, too, that the picture is resized to (with the largest min_size), which saves memory. Other
    shapes and types, boxes without area and labels that are no class raise ValueError. In evaluation it returns for
    each picture a dict of boxes (N, 4) in its pixels, labels (N,), scores (N,) and masks (N, 1, M, M), M = 28, the
    probability of the detected class over the box; `paste_masks` puts those into the picture.
    With `min_score` only what scores at least that, with far less work: the mask head sees nothing else.

    Args, all of them plain values, which `options` keeps so that a checkpoint can build the network again:
        backbone_name: one of `BACKBONES`.
        num_classes: with the background.
        norm: normalisation of the backbone: "batch", "frozen" (statistics and affine map fixed) or "sync".
        trainable_layers: stages of the backbone that are trained, counted from the last; 5 is all with the stem.
        min_size: the shorter side is resized to it, pixels. Of several, training picks one at random for each picture
            and evaluation takes the last.
        max_size: the longer side becomes no longer than that; then the shorter side stays below min_size.
        image_mean, image_std: of the channels, for normalisation.
        anchor_sizes: for each of P2 ... P6 a side length in pixels, or several.
        aspect_ratios: height / width of the anchors.
        rpn_...: see `RegionProposalNetwork`, with _train and _test for training and evaluation.
        box_..., mask_roi_output_size, roi_sampling_ratio: see `RoIHeads`; box_reg_weights None is (10, 10, 5, 5).

    Raises:
        InputError: a value that no network can be built of.
    """

    def __init__(
        self,
        backbone_name: str = "resnet50",
        num_classes: int = 91,
        *,
        norm: str = "batch",
        trainable_layers: int = 5,
        min_size: int | Sequence[int] = 800,
        max_size: int = 1333,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        anchor_sizes: Sequence[int | Sequence[int]] = (32, 64, 128, 256, 512),
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        rpn_pre_nms_top_n_train: int = 2000,
        rpn_pre_nms_top_n_test: int = 1000,
        rpn_post_nms_top_n_train: int = 2000,
        rpn_post_nms_top_n_test: int = 1000,
        rpn_nms_thresh: float = 0.7,
        rpn_fg_iou_thresh: float = 0.7,
        rpn_bg_iou_thresh: float = 0.3,
        rpn_batch_size_per_image: int = 256,
        rpn_positive_fraction: float = 0.5,
        rpn_score_thresh: float = 0.0,
        box_score_thresh: float = 0.05,
        box_nms_thresh: float = 0.5,
        box_detections_per_img: int = 100,
        box_fg_iou_thresh: float = 0.5,
        box_bg_iou_thresh: float = 0.5,
        box_batch_size_per_image: int = 512,
        box_positive_fraction: float = 0.25,
        box_reg_weights: Sequence[float] | None = None,
        box_roi_output_size: int = 7,
        mask_roi_output_size: int = 14,
        roi_sampling_ratio: int = 2,
    ):
        options = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        _check(options)
        super().__init__()
        self.options = options
        self.min_sizes = tuple(min_size) if isinstance(min_size, Sequence) else (min_size,)
        self.max_size = max_size
        self.register_buffer("image_mean", torch.tensor(image_mean), persistent=False)
        self.register_buffer("image_std", torch.tensor(image_std), persistent=False)

        self.backbone = ResNetFPN(backbone_name, norm, trainable_layers)
        sizes = tuple(tuple(size) if isinstance(size, Sequence) else (size,) for size in anchor_sizes)
        anchors = AnchorGenerator(sizes, (tuple(aspect_ratios),) * len(sizes))
        self.rpn = RegionProposalNetwork(
            anchors,
            RPNHead(self.backbone.out_channels, anchors.anchors_per_location[0]),
            pre_nms_top_n=(rpn_pre_nms_top_n_train, rpn_pre_nms_top_n_test),
            post_nms_top_n=(rpn_post_nms_top_n_train, rpn_post_nms_top_n_test),
            nms_thresh=rpn_nms_thresh,
            fg_iou_thresh=rpn_fg_iou_thresh,
            bg_iou_thresh=rpn_bg_iou_thresh,
            batch_size_per_image=rpn_batch_size_per_image,
            positive_fraction=rpn_positive_fraction,
            score_thresh=rpn_score_thresh,
        )
        self.roi_heads = RoIHeads(
            self.backbone.out_channels,
            num_classes,
            fg_iou_thresh=box_fg_iou_thresh,
            bg_iou_thresh=box_bg_iou_thresh,
            batch_size_per_image=box_batch_size_per_image,
            positive_fraction=box_positive_fraction,
            box_reg_weights=box_reg_weights or (10.0, 10.0, 5.0, 5.0),
            score_thresh=box_score_thresh,
            nms_thresh=box_nms_thresh,
            detections_per_img=box_detections_per_img,
            box_roi_output_size=box_roi_output_size,
            mask_roi_output_size=mask_roi_output_size,
            roi_sampling_ratio=roi_sampling_ratio,
        )

    def _load_from_state_dict(self, state_dict, prefix, *args):
        renamed = rename_old_keys(state_dict)
        state_dict.clear()
        state_dict.update(renamed)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None, min_score: float = 0.0
    ):
        check_images(images)
        sizes = [self._new_size(image) for image in images]
        if self.training:
            check_targets(targets, images, (max(self.min_sizes), self.max_size))
            targets = [resize_target(*pair) for pair in zip(targets, images, sizes, strict=True)]
            check_objects(targets, self.options["num_classes"])

        batch = self._batch(images, sizes)
        features = self.backbone(batch)
        padded_size = tuple(batch.shape[-2:])
        proposals, rpn_losses = self.rpn(list(features.values()), padded_size, sizes, targets)
        detections, roi_losses = self.roi_heads(features, proposals, padded_size, sizes, targets, min_score)
        if self.training:
            return {**roi_losses, **rpn_losses}
        for detection, image, size in zip(detections, images, sizes, strict=True):
            detection["boxes"] = resize_boxes(detection["boxes"], size, image.shape[-2:])
        return detections

    def _new_size(self, image: Tensor) -> tuple[int, int]:
        """(h, w) that the picture is resized to; in training the shorter side is drawn at random."""
        min_size = self.min_sizes[-1]
        if self.training:  # drawn even from one: the random numbers are then torchvision's
            min_size = self.min_sizes[int(torch.empty(1).uniform_(0.0, float(len(self.min_sizes))))]
        return fitted_size(*image.shape[-2:], min_size, self.max_size)

    def _batch(self, images, sizes) -> Tensor:
        """Pictures resized, normalised, and padded with zeros on the right and below -> (B, 3, H, W)."""
        height, width = (math.ceil(max(side) / SIZE_DIVISIBLE) * SIZE_DIVISIBLE for side in zip(*sizes, strict=True))
        weight = self.backbone.body.conv1.weight
        layout = torch.contiguous_format if weight.is_contiguous() else torch.channels_last
        batch = images[0].new_zeros(len(images), 3, height, width).contiguous(memory_format=layout)
        mean, std = (value.to(batch.dtype)[:, None, None] for value in (self.image_mean, self.image_std))
        for place, image, (h, w) in zip(batch, images, sizes, strict=True):
            resized = F.interpolate(image[None], size=(h, w), mode="bilinear", align_corners=False)[0]
            place[:, :h, :w] = (resized - mean) / std
        return batch


def check_images(images: Sequence[Tensor]) -> None:
    """ValueError for pictures that aren't float (3, H, W)."""
    for i, image in enumerate(images):
        check_shapes(**{f"images[{i}]": (image, 3, "H", "W")})
        if not image.is_floating_point():
            raise ValueError(f"images[{i}] is {image.dtype}, expected floats in [0, 1]")


def check_targets(
    targets: Sequence[dict[str, Tensor]] | None, images: Sequence[Tensor], fit: tuple[int, int] | None = None
) -> None:
    """ValueError for targets that aren't as `MaskRCNN` says, by shapes and types alone."""
    if targets is None or len(targets) != len(images):
        found = 0 if targets is None else len(targets)
        raise ValueError(f"training needs targets: {found} for {len(images)} images")
    for i, (target, image) in enumerate(zip(targets, images, strict=True)):
        sides = {"boxes": ("G", 4), "labels": ("G",), "masks": ("G", *image.shape[1:])}
        absent = [name for name in sides if name not in target]
        fitted = fit and fitted_size(*image.shape[1:], *fit)
        if not absent and tuple(target["masks"].shape[1:]) == fitted:
            sides["masks"] = ("G", *fitted)
        if absent:
            raise ValueError(f"targets[{i}] has no {absent[0]}")
        check_shapes(**{f"targets[{i}] {name}": (target[name], *expected) for name, expected in sides.items()})
        if target["labels"].dtype != torch.int64:
            raise ValueError(f"targets[{i}] labels are {target['labels'].dtype}, expected torch.int64")


def check_objects(targets: Sequence[dict[str, Tensor]], num_classes: int) -> None:
    """ValueError for a box without area and a label that is no class, in targets as the losses see them.

    All objects of the batch are looked at together: a GPU is waited for once.
    """
    boxes, labels = (torch.cat([target[name] for target in targets]) for name in ("boxes", "labels"))
    has_area = (boxes[:, 2:] > boxes[:, :2]).all(dim=1) & boxes.isfinite().all(dim=1)  # (G of all,)
    wrong = ~(has_area & (labels >= 1) & (labels < num_classes))
    if wrong.any():
        index = int(wrong.int().argmax())
        i, j = [(i, j) for i, target in enumerate(targets) for j in range(len(target["labels"]))][index]
        raise ValueError(
            f"targets[{i}], object {j}: box {boxes[index].tolist()} of the resized picture and label "
            f"{int(labels[index])}, expected x1 < x2, y1 < y2 and a label of 1 .. {num_classes - 1}"
        )


def resize_boxes(boxes: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """Boxes (N, 4) in a picture of size `old` (h, w) -> the same in pixels of size `new`."""
    y, x = new[0] / old[0], new[1] / old[1]
    return boxes * boxes.new_tensor((x, y, x, y))


def resize_target(target: dict[str, Tensor], image: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """Boxes and masks of a picture, moved to where they are when it is resized to `size` (h, w).

    What isn't 0 in a mask is the object, be it 1 or 255; of floats what is above 0.5.
    """
    masks = target["masks"] > 0.5 if target["masks"].is_floating_point() else target["masks"].bool()
    masks = F.interpolate(masks[:, None].byte(), size=size)[:, 0]  # nearest
    boxes = resize_boxes(target["boxes"].float(), image.shape[-2:], size)
    return {"boxes": boxes, "labels": target["labels"], "masks": masks}


def _check(options: dict):
    """InputError for values that no network can be built of."""
    for name, known in (("backbone_name", BACKBONES), ("norm", NORMS)):
        if options[name] not in known:
            raise InputError(f"{name} {options[name]!r} is unknown; known are {', '.join(known)}")
    if options["num_classes"] < 2:
        raise InputError(f"num_classes is {options['num_classes']}; it counts the background, so it is 2 or more")
    if options["trainable_layers"] not in range(len(STAGES) + 1):
        raise InputError(f"trainable_layers is {options['trainable_layers']}; it goes from 0 to {len(STAGES)}")
    for name in ("min_size", "max_size", "aspect_ratios", "anchor_sizes", "image_std"):
        values = _flat(options[name])
        if not values or min(values) <= 0:
            raise InputError(f"{name} is {options[name]}; give numbers above 0")
    for name in ("box_roi_output_size", "mask_roi_output_size", "roi_sampling_ratio"):
        if not isinstance(options[name], int) or options[name] <= 0:
            raise InputError(f"{name} is {options[name]!r}; give a whole number above 0")
    sizes = options["anchor_sizes"]
    if len(sizes) != 5 or len({len(_flat(level)) for level in sizes}) != 1:
        raise InputError(f"anchor_sizes is {sizes}; give one size, or equally many, for each of the 5 levels P2 to P6")


def _flat(value) -> list:
    return [number for part in value for number in _flat(part)] if isinstance(value, Sequence) else [value]


def mask_rcnn_resnet18_fpn(num_classes: int = 91, **options) -> MaskRCNN:
    return MaskRCNN("resnet18", num_classes, **options)


def mask_rcnn_resnet34_fpn(num_classes: int = 91, **options) -> MaskRCNN:
    return MaskRCNN("resnet34", num_classes, **options)


def mask_rcnn_resnet50_fpn(num_classes: int = 91, **options) -> MaskRCNN:
    return MaskRCNN("resnet50", num_classes, **options)


def mask_rcnn_resnet101_fpn(num_classes: int = 91, **options) -> MaskRCNN:
    return MaskRCNN("resnet101", num_classes, **options)
