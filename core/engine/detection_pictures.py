"""Picture sheets of a detection run: what each level of augmentation makes of pictures, and what the network finds."""

from pathlib import Path

import torch
from torchvision.transforms.v2.functional import to_pil_image

from core.data.coco_images import CocoImages
from core.data.detection_transforms import build_detection_transform
from core.engine.detection import instances_of
from core.engine.options import arguments_of
from core.engine.step import autocast
from core.files import distinct_names, make_folder
from core.visualize.instances import augmentation_preview, instance_panels, instance_sheet

AUGMENTATION_TITLES = (
    "0: as it is",
    "1: flip",
    "2: + colour, greyscale; the network also varies the size",
    "3: + large-scale jitter, crop, rotation, perspective, motion blur",
)


def draw_augmentations(path, data, args, pictures=6):
    """The same few pictures under each level of augmentation, one row for each."""
    how = arguments_of(build_detection_transform, args)
    indices = _spread(len(data.pictures), pictures)
    rows = []
    for level, title in enumerate(AUGMENTATION_TITLES):
        images = CocoImages(data, build_detection_transform(level, **how), seed=args.seed, max_side=2 * args.max_size)
        shown = []
        for slot, index in enumerate(indices):
            item = images[(1, slot, index)]
            target = item["target"]
            picture = (item["image"] * 255).round().byte()
            shown.append((picture, target["boxes"], target["masks"], target["labels"]))
        rows.append((title, shown))
    augmentation_preview(path, rows)


@torch.inference_mode()
def draw_predictions(folder, network, images, categories, device, *, amp="off", score=0.5, pictures=8):
    """Sheets of six panels, `<folder>/<its name>.jpg`, for a few pictures of `images` (`CocoImages`).

    Args:
        categories: as in `core.engine.detection.predict`.
        score: instances below it are not drawn.
    """
    network.eval()
    make_folder(folder)
    indices = _spread(len(images), pictures)
    stems = distinct_names(images.picture(index).path for index in indices)
    for index, stem in zip(indices, stems, strict=True):
        item = images[index]
        with autocast(device, amp):
            (output,) = network([item["image"].to(device)], min_score=score)
        found = instances_of(output, tuple(item["image"].shape[-2:]), categories)
        panels = instance_panels(to_pil_image(item["image"]), found)
        instance_sheet(Path(folder) / f"{stem}.jpg", panels)


def _spread(total, count):
    """At most `count` indices, evenly over `total`."""
    count = min(count, total)
    return [index * total // count for index in range(count)]
