"""Weights for Mask R-CNN to start from: published COCO or ImageNet files, or any file a person has.

`load_detection_weights` is what a script calls. It changes the model's tensors in place and returns a line for the log.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from core.errors import InputError
from core.layers.norm import FrozenBatchNorm2d
from core.models import weights
from core.models.weights import DownloadError, WeightsReport, copy_matching, find_state_dict, load_file, load_weights

# torchvision's COCO_V1; its classes are COCO's category ids up to 90, eleven of which nothing belongs to.
PUBLISHED_COCO = {"resnet50": "https://download.pytorch.org/models/maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth"}

# (category id, name) of COCO's 80 categories; in the published file the label is the id.
# fmt: off
COCO_CATEGORIES = (
    (1, "person"), (2, "bicycle"), (3, "car"), (4, "motorcycle"), (5, "airplane"), (6, "bus"), (7, "train"),
    (8, "truck"), (9, "boat"), (10, "traffic light"), (11, "fire hydrant"), (13, "stop sign"), (14, "parking meter"),
    (15, "bench"), (16, "bird"), (17, "cat"), (18, "dog"), (19, "horse"), (20, "sheep"), (21, "cow"),
    (22, "elephant"), (23, "bear"), (24, "zebra"), (25, "giraffe"), (27, "backpack"), (28, "umbrella"),
    (31, "handbag"), (32, "tie"), (33, "suitcase"), (34, "frisbee"), (35, "skis"), (36, "snowboard"),
    (37, "sports ball"), (38, "kite"), (39, "baseball bat"), (40, "baseball glove"), (41, "skateboard"),
    (42, "surfboard"), (43, "tennis racket"), (44, "bottle"), (46, "wine glass"), (47, "cup"), (48, "fork"),
    (49, "knife"), (50, "spoon"), (51, "bowl"), (52, "banana"), (53, "apple"), (54, "sandwich"), (55, "orange"),
    (56, "broccoli"), (57, "carrot"), (58, "hot dog"), (59, "pizza"), (60, "donut"), (61, "cake"), (62, "chair"),
    (63, "couch"), (64, "potted plant"), (65, "bed"), (67, "dining table"), (70, "toilet"), (72, "tv"),
    (73, "laptop"), (74, "mouse"), (75, "remote"), (76, "keyboard"), (77, "cell phone"), (78, "microwave"),
    (79, "oven"), (80, "toaster"), (81, "sink"), (82, "refrigerator"), (84, "book"), (85, "clock"), (86, "vase"),
    (87, "scissors"), (88, "teddy bear"), (89, "hair drier"), (90, "toothbrush"),
)
# fmt: on
# For the labels 1 ... 90 of the published network its (category id, name), or None.
COCO_LABELS = tuple(next((pair for pair in COCO_CATEGORIES if pair[0] == label), None) for label in range(1, 91))

# torchvision's names of 2019 and today's; each may have a prefix.
OLD_NAMES = (
    (re.compile(r"(rpn\.head\.conv)\.(weight|bias)$"), r"\1.0.0.\2"),
    (re.compile(r"(fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$"), r"\1.0.\2"),
    (re.compile(r"mask_head\.mask_fcn([1-4])\.(weight|bias)$"), lambda m: f"mask_head.{int(m[1]) - 1}.0.{m[2]}"),
)

OFF = 1e-6  # weight of a BatchNorm's channel, its output's deviation, below which it is as good as 0

# The layers that have rows for each class, and how many.
HEADS = {
    "roi_heads.box_predictor.cls_score": 1,
    "roi_heads.box_predictor.bbox_pred": 4,
    "roi_heads.mask_predictor.mask_fcn_logits": 1,
}
HEAD_KEYS = tuple(f"{layer}.{part}" for layer in HEADS for part in ("weight", "bias"))


def load_detection_weights(
    model: nn.Module, source: str, backbone_name: str, categories: Sequence[tuple[int, str]]
) -> WeightsReport:
    """Give a MaskRCNN the weights it starts from, in place.

    The layers that predict classes keep their rows of background and of the data's categories, in the data's order,
    where the file has every one of these by name. Otherwise they stay as initialised, and the line says so.

    Args:
        model: a MaskRCNN of `len(categories) + 1` classes, or of the file's own number of them.
        source: "coco" or "imagenet" (the published file for the backbone), "none", or the path of a file: a Mask R-CNN
            of torchvision (names of today or of 2019) or of ours, a ResNet (ImageNet's, torchvision's, a ReID
            checkpoint of ours), or a plain state_dict of one of these. Of a checkpoint of ours the averaged weights
            are taken where it has them.
        backbone_name: its name.
        categories: (id, name) of the data's categories; their labels are 1, 2, ...

    Returns:
        WeightsReport. Where the published file can't be had, its `warning` is True and the model is as it was.

    Raises:
        InputError: nothing is published for this backbone; the file is missing, broken, holds code, or is of another
            network.
    """
    if source in ("none", "imagenet"):
        return load_weights(model.backbone.body, source, backbone_name)
    path = Path(source)
    if source == "coco":
        if backbone_name not in PUBLISHED_COCO:
            known = ", ".join(PUBLISHED_COCO)
            raise InputError(f"COCO weights are published for {known}, not for {backbone_name}; use imagenet or a file")
        try:
            path = weights.fetch(PUBLISHED_COCO[backbone_name])
        except DownloadError as error:
            return weights.not_to_be_had(PUBLISHED_COCO[backbone_name], error)
    content = load_file(path)
    state = rename_old_keys(find_state_dict(content, path))
    name = path.name if source == "coco" else weights.described(content, path)
    if not any(key.startswith("backbone.body.") for key in state):
        return copy_matching(model.backbone.body, state, name)
    report = _load_with_heads(model, state, _categories_of(content, state), list(categories), name)
    if path.name in (url.rsplit("/", 1)[-1] for url in PUBLISHED_COCO.values()):
        _take_out_eps(model)
    return report


def rename_old_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict with the names of torchvision's file of 2019 -> the same with today's; others stay as they are."""
    renamed = {}
    for key, value in state.items():
        for pattern, name in OLD_NAMES:
            key = pattern.sub(name, key)
        renamed[key] = value
    return renamed


def _categories_of(content, state) -> list[str | None] | None:
    """Names of the file's labels 1, 2, ..., None where it has none; None altogether if that is unknown."""
    if isinstance(content, dict) and "categories" in content:
        return [name for _, name in content["categories"]]
    if len(state.get(HEAD_KEYS[0], ())) == len(COCO_LABELS) + 1:
        return [category and category[1] for category in COCO_LABELS]
    return None


def _load_with_heads(model, state, names, categories, name) -> WeightsReport:
    """Copy all tensors but the heads', and of those the rows of the data's categories if there are all of them."""
    own = model.state_dict()
    wanted = [category for _, category in categories]
    unknown = [category for category in wanted if category not in names] if names else []
    classes = len(own[HEAD_KEYS[0]])
    if names and not unknown and len(wanted) + 1 == classes:
        rows = torch.tensor([0] + [names.index(category) + 1 for category in wanted])
        state = state | {key: _take_rows(state[key], rows, HEADS[key.rpartition(".")[0]]) for key in HEAD_KEYS}
        kept = f"; heads kept, with the rows of {len(wanted)} of {len(names)} classes"
        return _add(copy_matching(model, state, name), kept if len(wanted) < len(names) else "", detects=True)
    same_size = all(key in state and state[key].shape == own[key].shape for key in HEAD_KEYS)
    if same_size and len(wanted) + 1 != classes:  # not a model of this data's labels but of the file's
        return copy_matching(model, state, name)
    if same_size and names is None:  # its classes have no names: they can only be the data's
        kept = "; heads kept, its classes without names taken as the data's"
        return _add(copy_matching(model, state, name), kept, detects=True)
    why = f"it doesn't know {unknown[0]!r}" if unknown else f"it has {len(state.get(HEAD_KEYS[0], ()))} classes"
    heads = ", ".join(layer.rpartition(".")[2] for layer in HEADS)
    report = copy_matching(model, state, name, leave=HEAD_KEYS)
    return _add(report, f"; heads initialised anew for {classes} classes, {why}: {heads}")


def _add(report: WeightsReport, text: str, detects: bool = False) -> WeightsReport:
    return report._replace(message=report.message + text, detects=detects)


def _take_rows(tensor: Tensor, rows: Tensor, per_class: int) -> Tensor:
    """The rows of some classes of a tensor with `per_class` rows for each class."""
    return tensor.unflatten(0, (-1, per_class))[rows].flatten(0, 1)


@torch.no_grad()
def _take_out_eps(model: nn.Module):
    """The file of 2019 was trained with a frozen BatchNorm without eps; ours has one, so its weight makes up for it."""
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            var = module.running_var.double()  # of some channels 1e-44, where float32 has no quotient
            weight = module.weight * ((var + module.eps) / var).sqrt()
            # Those channels are off: normalised and multiplied by a weight of 1e-8 they are as good as 0. Made up for,
            # their scale would be 1e14, which float16 doesn't have and no gradient should be multiplied by.
            module.weight.copy_(torch.where(module.weight.abs() < OFF, module.weight, weight))
