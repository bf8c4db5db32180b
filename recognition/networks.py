"""The trained networks that a person has: the one whose path is given, else the newest of its kind under runs/."""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from pycocotools import mask as coco_mask

from core.data.transforms import build_transform, to_image
from core.engine import detection, reid
from core.engine.checkpoint import check_checkpoint, fingerprint, load_checkpoint
from core.engine.published import load_state
from core.engine.step import autocast
from core.errors import InputError
from core.files import printable
from core.models import weights
from core.models.detection_weights import (
    COCO_CATEGORIES,
    COCO_LABELS,
    HEAD_KEYS,
    PUBLISHED_COCO,
    load_detection_weights,
    rename_old_keys,
)
from core.models.mask_rcnn import MaskRCNN

RUNS = "runs"
TRAIN_MASKS = "`python train_mask_rcnn.py`"
TRAIN_REID = (
    "`python train_reid.py --backbone resnet18_with_mask --mask-decoder light --hide-background 0.5 --epochs 30`"
)


class Detector(NamedTuple):
    """Finds instances. categories: (category id, name) for each label 1, 2, ..., or None. labels: those to look for.
    path, message: its weights. is_own: whether it was trained here, and is not the published one. bits: of 16 those
    that its training pictures used."""

    network: torch.nn.Module
    categories: list
    labels: list
    path: str
    message: str
    device: torch.device
    amp: str = "off"
    is_own: bool = True
    bits: int = 16


class Encoder(NamedTuple):
    """Tells identities apart. transform: a sample of a picture -> (3, H, W). metric: of its distances. threshold: as a
    ReID checkpoint has it, or None. fingerprint: as in `core.engine.checkpoint`. path, message: its weights. bits: of
    16 those that its training pictures used. published: (backbone, model) of another project's file."""

    network: torch.nn.Module
    transform: torch.nn.Module
    metric: str
    threshold: dict | None
    fingerprint: str
    path: str
    message: str
    device: torch.device
    amp: str = "off"
    bits: int = 16
    published: tuple = (None, "bot")


class NothingTrained(InputError):
    """There is no network of the kind that is needed."""


def newest_checkpoint(runs, kind):
    """(path, content) of the newest checkpoint of a kind under a folder, or (None, None); what is none is named.

    In each folder best.pth is what counts, and last.pth where there is none: of a training without evaluation.
    """
    best = {path.parent: path for name in ("last.pth", "best.pth") for path in Path(runs).rglob(name) if path.is_file()}
    for path in sorted(best.values(), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            if load_checkpoint(path, mmap=True)["kind"] == kind:  # most may be of the other kind
                return path, load_checkpoint(path, kind)
        except InputError as error:
            print(f"skipped: {printable(error)}", file=sys.stderr)
    return None, None


def load_detector(path, device, amp="off", classes=None):
    """`Detector` of a checkpoint of train_mask_rcnn.py or of torchvision's COCO file.

    path: "coco" for the published COCO weights, as in train_mask_rcnn.py; None for the newest Mask R-CNN under runs/,
    and where there is none, those, too.
    classes: names of what to look for; None: everything.
    Raises InputError for a file of another kind, where there is nothing, and for a class that the network doesn't know.
    """
    content = None
    if path is None:
        path, content = newest_checkpoint(RUNS, "mask_rcnn")
    if path in (None, "coco"):
        path = published_file(was_asked=path == "coco")
    content = content or weights.load_file(path)
    if isinstance(content, dict) and "kind" in content:
        check_checkpoint(content, path, "mask_rcnn")
        network, state = detection.network_from_checkpoint(path, device, state=content)
        labels = choose_labels(state["categories"], classes)
        message = f"finds objects: {path}, epoch {state['epoch']}"
        bits = state.get("view", {}).get("bits", 16)
        return Detector(network, state["categories"], labels, str(path), message, device, amp, bits=bits)
    state = rename_old_keys(weights.find_state_dict(content, path))
    if len(state.get(HEAD_KEYS[0], ())) != len(COCO_LABELS) + 1:
        raise InputError(f"{path} is neither a checkpoint of train_mask_rcnn.py nor torchvision's COCO file")
    network = MaskRCNN("resnet50", len(COCO_LABELS) + 1, norm="frozen")
    report = load_detection_weights(network, str(path), "resnet50", COCO_CATEGORIES)
    network, labels = network.to(device).eval(), choose_labels(COCO_LABELS, classes)
    return Detector(network, COCO_LABELS, labels, str(path), report.message, device, amp, is_own=False)


def published_file(was_asked):
    """The local copy of the published COCO weights, downloaded if need be.

    was_asked: whether a person wants these; otherwise they are the last resort, and any other network is as good.
    """
    url = PUBLISHED_COCO["resnet50"]
    try:
        return weights.fetch(url)
    except weights.DownloadError as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        if was_asked:
            raise InputError(f"no published COCO weights: put {url} ({error}) into {folder}") from error
        raise NothingTrained(
            f"no network that finds objects is trained yet: {TRAIN_MASKS} trains one ({TRAIN_REID} the one that "
            f"recognises them); or put {url} ({error}) into {folder}, or give --segment PATH"
        ) from error


def load_encoder(path, device, amp="off", published=(None, "bot")):
    """`Encoder` of a checkpoint of train_reid.py; path: None for the newest one under runs/.

    published: (backbone, model) of another project's file, None for a checkpoint.
    Raises InputError for a file of another kind, and where there is none.
    """
    backbone, model = published
    if path is None:
        path, state = newest_checkpoint(RUNS, "reid")
    else:
        state = load_state(path, "reid", backbone=backbone, model=model)
    if path is None:
        raise NothingTrained(
            f"no network that recognises objects is trained yet: {TRAIN_REID} trains one ({TRAIN_MASKS} the one that "
            "finds them); or give --reid PATH"
        )
    network, state = reid.network_from_checkpoint(path, device, state=state)
    transform = build_transform(*state["input_size"], training=False, **state["normalisation"])
    message = "recognises them: " + (state["message"] if backbone else f"{path}, epoch {state['epoch']}")
    how = (str(path), message, device, amp, state.get("bits", 16), tuple(published))
    return Encoder(network, transform, state["distance"], state.get("threshold"), fingerprint(state), *how)


def choose_labels(categories, wanted):
    """The labels 1, 2, ... of these classes, all of a name. Raises InputError for one that the network doesn't know."""
    names = [category[1].casefold() if category else None for category in categories]
    unknown = [name for name in wanted or () if name.casefold() not in names]
    if unknown:
        known = ", ".join(category[1] for category in categories if category)
        raise InputError(f"--classes {' '.join(unknown)}: the network doesn't know this; it knows {known}")
    chosen = {name.casefold() for name in wanted} if wanted else set(names) - {None}
    return [label for label, name in enumerate(names, start=1) if name in chosen]


@torch.inference_mode()
def find_instances(detector, picture, score):
    """The instances in a PIL picture that score at least `score` and have one of its labels, the best first.

    Returns:
        (instances, most): a list of dicts, as `core.engine.detection.instances_of` makes them; and how many the network
        returns at most, of all labels, where it did: there may be more. None where it found fewer.
    """
    image = to_image(picture).as_subclass(torch.Tensor).to(detector.device).float().div_(255)  # (3, H, W)
    with autocast(detector.device, detector.amp):
        (found,) = detector.network([image], min_score=score)
    most = detector.network.options["box_detections_per_img"]
    is_full = len(found["labels"]) >= most
    kept = torch.isin(found["labels"], torch.tensor(detector.labels, device=detector.device))
    found = {name: value[kept] for name, value in found.items()}
    instances = detection.instances_of(found, (picture.height, picture.width), detector.categories)
    return instances, most if is_full else None


def whole_picture(picture):
    """A PIL picture as one instance, in the form of `find_instances`: of no class and without a score."""
    width, height = picture.size
    rle = coco_mask.frPyObjects({"size": [height, width], "counts": [0, height * width]}, height, width)
    rle["counts"] = rle["counts"].decode("ascii")
    box = [0.0, 0.0, float(width), float(height)]
    return [{"box": box, "category_id": None, "label": "the whole picture", "score": None, "rle": rle}]
