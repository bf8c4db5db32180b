"""What happens to a training picture before a detector sees it; boxes, masks and labels of its instances go along.

A sample is a dict with "image" (`tv_tensors.Image`, uint8 (3, H, W)), "boxes" (`tv_tensors.BoundingBoxes`, XYXY,
(G, 4)), "masks" (`tv_tensors.Mask`, uint8 (G, H, W), 0 or 1) and "labels" (int64 (G,)); G may be 0. Everything drawn
at random comes from torch's CPU generator. Resizing to what the network takes, and normalising, belong to the model.
"""

from torchvision.transforms import v2

from core.errors import InputError

LEVELS = (0, 1, 2, 3)


def build_detection_transform(level, *, flip=0.5, vertical_flip=0.0):
    """The pipeline for a sample -> the same keys, the image still uint8.

    Level 0 is nothing; 1 adds flips.

    Args:
        level: 0..3.
        flip, vertical_flip: probabilities of mirroring left-right and upside down, from level 1 on.

    Raises:
        InputError: no such level.
    """
    if level not in LEVELS:
        raise InputError(f"augmentation level {level}: there is none; choose one of 0, 1, 2, 3")
    steps = []
    if level >= 1:
        steps += [v2.RandomHorizontalFlip(flip), v2.RandomVerticalFlip(vertical_flip)]
    return v2.Compose(steps) if steps else v2.Identity()


def training_sizes(level, min_size):
    """The lengths in pixels out of which the model draws a training picture's shorter side.

    From level 2 on six of them, evenly from 0.8 x min_size to min_size (640, 672, ..., 800 for 800, which is how COCO
    models are usually trained since Detectron); below, `min_size` alone. The last is always `min_size`: a model in
    evaluation takes that one.
    """
    if level < 2:
        return (min_size,)
    return tuple(round(min_size * (0.8 + 0.04 * step)) for step in range(6))
