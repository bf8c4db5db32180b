"""What happens to a training picture before a detector sees it; boxes, masks and labels of its instances go along.

A sample is a dict with "image" (`tv_tensors.Image`, uint8 (3, H, W)), "boxes" (`tv_tensors.BoundingBoxes`, XYXY,
(G, 4)), "masks" (`tv_tensors.Mask`, uint8 (G, H, W), 0 or 1) and "labels" (int64 (G,)); G may be 0. Everything drawn
at random comes from torch's CPU generator. Resizing to what the network takes, and normalising, belong to the model.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from core.data.transforms import IMAGENET_MEAN, OnImage
from core.errors import InputError
from core.layers.masks import mask_boxes

LEVELS = (0, 1, 2, 3)
# What lies outside the picture has the mean colour: zero once normalised, as the model's own padding.
MEAN_COLOUR = [round(255 * mean) for mean in IMAGENET_MEAN]


def build_detection_transform(level, *, flip=0.5, vertical_flip=0.0, crop_size=None):
    """The pipeline for a sample -> the same keys, the image still uint8.

    Level 0 is nothing. 1: flips. 2: also colour jitter and greyscale. 3: also motion blur, small rotation, perspective,
    and either large-scale jitter or a crop that keeps every instance. Up to level 2 every instance stays. At level 3
    boxes are the tight boxes of the masks, and an instance without a pixel left is removed.

    Args:
        level: 0..3.
        flip, vertical_flip: probabilities of mirroring left-right and upside down, from level 1 on.
        crop_size: (height, width) in pixels of what large-scale jitter makes; None: the picture's own.

    Raises:
        InputError: no such level, a probability outside [0, 1], a crop of less than 2 pixels.
    """
    _check(level, flip, vertical_flip, crop_size)
    steps = []
    if level >= 2:
        steps += colour_steps()
    if level >= 3:
        steps += [v2.RandomApply([OnImage(MotionBlur())], p=0.2), *geometric_steps(crop_size)]
    if level >= 1:
        steps += [v2.RandomHorizontalFlip(flip), v2.RandomVerticalFlip(vertical_flip)]
    return v2.Compose(steps) if steps else v2.Identity()


def colour_steps():
    """What level 2 adds.

    Sources: the hue of Liu et al. 2016 (SSD), 18 degrees either way, since twice that makes brown things green; how
    often, from Chen et al. 2020 (SimCLR), with half of its greyscale, since colour tells classes apart.
    """
    jitter = v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.05)
    return [v2.RandomApply([jitter], p=0.8), v2.RandomGrayscale(p=0.1)]


def geometric_steps(crop_size=None):
    """What level 3 adds, besides the blur. After the colours, so that what lies outside keeps the mean colour."""
    outside = {tv_tensors.Image: MEAN_COLOUR, tv_tensors.Mask: None}  # None is 0 too, and quicker
    rotation = v2.RandomRotation(10, interpolation=v2.InterpolationMode.BILINEAR, fill=outside)
    perspective = v2.RandomPerspective(distortion_scale=0.2, p=0.3, fill=outside)
    steps = [
        MasksByPlace(v2.Compose([v2.RandomApply([rotation], p=0.3), perspective])),
        v2.RandomChoice([LargeScaleJitter(crop_size), SafeCrop()], p=[0.5, 0.5]),
    ]
    return [UnlessThin(v2.Compose(steps)), TightBoxes()]


def _check(level, flip, vertical_flip, crop_size):
    if level not in LEVELS:
        raise InputError(f"augmentation level {level}: there is none; choose one of 0, 1, 2, 3")
    for name, probability in (("flip", flip), ("vertical flip", vertical_flip)):
        if not 0 <= probability <= 1:
            raise InputError(f"{name}: a probability of {probability} can't be; choose one from 0 to 1")
    if crop_size is not None and min(crop_size) < 2:
        raise InputError(f"crop size {crop_size[0]}x{crop_size[1]}: give height and width of at least 2 pixels")


def training_sizes(level, min_size):
    """The lengths in pixels out of which the model draws a training picture's shorter side.

    From level 2 on six of them, evenly from 0.8 x min_size to min_size (640, 672, ..., 800 for 800, which is how COCO
    models are usually trained since Detectron); below, `min_size` alone. The last is always `min_size`: a model in
    evaluation takes that one.
    """
    if level < 2:
        return (min_size,)
    return tuple(round(min_size * (0.8 + 0.04 * step)) for step in range(6))


class MotionBlur(nn.Module):
    """Blur an image uint8 (3, H, W) along a straight line, as a camera or a belt that moves while the shutter is open.

    The direction is uniform; the length too, from 2 pixels to `max_length` x the shorter side.
    """

    def __init__(self, max_length=0.02):
        super().__init__()
        self.max_length = max_length

    def forward(self, image):
        height, width = image.shape[-2:]
        length = _uniform(2.0, max(2.0, self.max_length * min(height, width)))
        angle = _uniform(0.0, math.pi)
        taps = torch.linspace(-length / 2, length / 2, math.ceil(length) + 1)
        shifts = torch.stack([taps * math.sin(angle), taps * math.cos(angle)], dim=1).round().long()  # (taps, 2) y, x
        border = int(shifts.abs().max())
        padded = F.pad(image.as_subclass(torch.Tensor).float()[None], [border] * 4, mode="replicate")[0]
        blurred = torch.zeros(image.shape)
        for y, x in (shifts + border).tolist():  # a sum of shifted pictures is ten times quicker than a convolution
            blurred += padded[:, y : y + height, x : x + width]
        return tv_tensors.Image((blurred / len(shifts)).round().to(torch.uint8))


class LargeScaleJitter(nn.Module):
    """Scale a picture at random, and crop or pad it to a fixed size (Ghiasi et al. 2021, "Simple Copy-Paste", 3.1).

    The scale is uniform in `scale`, where 1 is the largest at which the whole picture fits. What is too large is
    cropped at random; what is too small is laid somewhere on the mean colour. Only what stays is ever resized.

    Args:
        crop_size: (height, width) of the result; None: that of the picture.
    """

    def __init__(self, crop_size=None, scale=(0.1, 2.0)):
        super().__init__()
        self.crop_size = crop_size
        self.scale = scale

    def forward(self, sample):
        height, width = sample["image"].shape[-2:]
        new_height, new_width = self.crop_size or (height, width)
        factor = min(new_height / height, new_width / width) * _uniform(*self.scale)
        top, rows, new_top, new_rows = _place(height, new_height, factor)
        left, columns, new_left, new_columns = _place(width, new_width, factor)
        window, size = (top, left, rows, columns), [new_rows, new_columns]
        border = [new_left, new_top, new_width - new_left - new_columns, new_height - new_top - new_rows]

        image = functional.resized_crop(sample["image"], *window, size, antialias=True)
        boxes = functional.resized_crop(sample["boxes"], *window, size)
        # As plain tensors: of a Mask, resizing takes the pixel in the corner instead of the one in the middle.
        exact = v2.InterpolationMode.NEAREST_EXACT
        masks = functional.resized_crop(sample["masks"].as_subclass(torch.Tensor), *window, size, interpolation=exact)
        return {
            **sample,
            "image": functional.pad(image, border, fill=MEAN_COLOUR),
            "boxes": functional.pad(boxes, border),
            "masks": functional.pad(tv_tensors.Mask(masks), border),
        }


def _place(side, new_side, factor):
    """One side of a picture, scaled by `factor` -> start and length of what stays, and those it has in the result."""
    scaled = max(2, round(side * factor))  # 2, for torch's resize fails where a single pixel of 8 bits is to come out
    if scaled <= new_side:
        return 0, side, _integer(0, new_side - scaled), scaled
    length = min(side, max(1, round(new_side / factor)))
    return _integer(0, side - length), length, 0, new_side


class SafeCrop(nn.Module):
    """Crop at random so that every pixel of every instance stays.

    Height and width are drawn on their own, uniformly from what is needed to the whole side.

    Args:
        min_side: what stays of each side at least, as a fraction; otherwise a row of objects would become a strip.
    """

    def __init__(self, min_side=0.5):
        super().__init__()
        self.min_side = min_side

    def forward(self, sample):
        occupied = sample["masks"].as_subclass(torch.Tensor).any(0)  # (H, W)
        top, height = self._window(occupied.any(1))
        left, width = self._window(occupied.any(0))
        moved = {key: functional.crop(sample[key], top, left, height, width) for key in ("image", "boxes", "masks")}
        return {**sample, **moved}

    def _window(self, occupied):
        """(S,) what must stay of a side -> start, length."""
        side, indices = len(occupied), occupied.nonzero().flatten().tolist()
        first, end = (indices[0], indices[-1] + 1) if indices else (side, 0)  # (S, 0) asks for nothing
        length = _integer(max(end - first, math.ceil(self.min_side * side)), side)
        return _integer(max(0, end - length), min(first, side - length)), length


class MasksByPlace(nn.Module):
    """Apply a transform that moves pixels, to masks by the places that their pixels come from.

    All masks of a picture move alike. torchvision makes floats of each, which is ten times their memory.
    """

    def __init__(self, transform):
        super().__init__()
        self.transform = transform

    def forward(self, sample):
        masks = sample["masks"].as_subclass(torch.Tensor)
        height, width = masks.shape[1:]
        dtype = torch.float32 if height * width < 2**24 else torch.float64  # which holds every place
        places = torch.arange(1, height * width + 1, dtype=dtype).view(1, height, width)  # 0 is outside
        moved = self.transform({**sample, "masks": tv_tensors.Mask(places)})
        places = moved["masks"].as_subclass(torch.Tensor)[0].long()
        masks = masks.flatten(1)[:, (places - 1).clamp(min=0)].mul_(places > 0)
        return {**moved, "masks": tv_tensors.Mask(masks)}


class UnlessThin(nn.Module):
    """Apply a transform to samples whose picture has at least 2 pixels on each side; the others stay as they are.

    A picture one pixel wide has two corners instead of four: torchvision finds no perspective for it and fails.
    """

    def __init__(self, transform):
        super().__init__()
        self.transform = transform

    def forward(self, sample):
        return self.transform(sample) if min(sample["image"].shape[-2:]) >= 2 else sample


class TightBoxes(nn.Module):
    """Boxes become the tight ones around the masks; instances without a pixel are removed.

    After a rotation a box encloses its object loosely; after a crop it may have none of its object in it.
    """

    def forward(self, sample):
        boxes = mask_boxes(sample["masks"].as_subclass(torch.Tensor)).float()  # (G, 4)
        kept = boxes[:, 2] > boxes[:, 0]
        return {
            **sample,
            "boxes": tv_tensors.wrap(boxes[kept], like=sample["boxes"]),
            "masks": tv_tensors.wrap(sample["masks"][kept], like=sample["masks"]),
            "labels": sample["labels"][kept],
        }


def _uniform(low, high):
    return low + (high - low) * float(torch.rand(()))


def _integer(low, high):
    """Uniform in low..high, both included."""
    return int(torch.randint(low, high + 1, ()))
