"""What happens to a picture before the network sees it. The object's box and mask go wherever the picture goes.

A sample is a dict with "image" (`tv_tensors.Image`), and with "box" (`tv_tensors.BoundingBoxes`, (1, 4)) and "mask"
(`tv_tensors.Mask`, (1, H, W)) or without. A box always stays within the picture: of an object that has left it, a box
of zero area on the border remains, and a mask of zeros.
"""

import math

import numpy as np
import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from core.data.images import strips
from core.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def build_transform(
    height,
    width,
    *,
    training,
    flip=0.5,
    pad=10,
    autoaugment=False,
    translation=0.0,
    color_jitter=0.0,
    random_patch=0.0,
    blur=0.0,
    erasing=0.0,
    cutout=0.0,
    erasing_value="mean",
    hide_background=0.0,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
):
    """The pipeline for a sample: "image" becomes float (3, height, width), normalised; box and mask follow.

    Training is translate or resize, auto-augment, flip, pad and random crop, patch, jitter of colours, blur, normalise,
    hide the background, erase, cut out. Evaluation is resize and normalise, and ignores the other arguments. Patches
    and erasing hide pixels from the network only: box and mask stay, so a mask decoder learns where the object is,
    hidden or not.

    Args:
        flip, translation, color_jitter, random_patch, blur, erasing, cutout: probabilities.
        erasing_value: of the pixels that are erased or cut out: the "mean" colour, "zero" (black) or "noise".
        hide_background: probability that everything outside of the mask becomes the mean colour; above 0 it needs
            masks. It makes a network that knows cut-out objects (`recognition.cutouts`) as well as whole pictures.
        pad: black border on each side, in pixels of the resized picture, out of which the crop is taken.
        mean, std: of the three channels, for values in [0, 1].

    Sources: order, padding and erasing after normalisation (so that 0 is the mean colour) from Luo et al. 2019, "Bag
    of Tricks"; blur radius 0.1 to 2.0 from Chen et al. 2020 (MoCo v2); erasing with the area (s_l, s_h) = (0.02, 0.4)
    and aspect ratio r_1 = 0.3 of Zhong et al. 2020, the ratio drawn uniformly in its logarithm, as torchvision does;
    translation (a crop out of the picture made an eighth larger) from torchreid; the strengths of the colour jitter
    from fast-reid; cutout's square from LightMBN, 64 x 64 of 384 x 128 pixels.
    """
    if height == width == 1:
        raise InputError("pictures of a single pixel can't be made: give a larger height or width")
    normalise = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    steps = [v2.Resize((height, width), antialias=True)]
    if not training:
        return v2.Compose(steps + normalise)
    if translation > 0:  # out of the original, so that nothing is resized twice: the resize after it finds its size
        larger = v2.Resize((round(height * 1.125), round(width * 1.125)), antialias=True)
        steps.insert(0, v2.RandomApply([larger, v2.RandomCrop((height, width))], p=translation))
    if autoaugment:
        steps.append(AutoAugment())
    if flip > 0:
        steps.append(v2.RandomHorizontalFlip(flip))
    if pad > 0:
        steps.append(v2.RandomCrop((height, width), padding=pad))
    if random_patch > 0:
        steps.append(OnImage(RandomPatch(random_patch)))
    if color_jitter > 0:
        jitter = v2.ColorJitter(brightness=0.15, contrast=0.15, saturation=0.1, hue=0.1)
        steps.append(v2.RandomApply([jitter], p=color_jitter))
    if blur > 0:  # 13 taps hold three standard deviations of the widest blur; a picture is mirrored at its border once
        taps = min(13, 2 * min(height, width) - 1)
        steps.append(v2.RandomApply([v2.GaussianBlur(taps, sigma=(0.1, 2.0))], p=blur))
    steps += normalise
    if hide_background > 0:
        steps.append(HideBackground(hide_background))
    black = [-m / s for m, s in zip(mean, std, strict=True)]
    value = {"mean": 0, "zero": black, "noise": "random"}[erasing_value]  # of what is normalised
    if erasing > 0:
        steps.append(OnImage(v2.RandomErasing(erasing, scale=(0.02, 0.4), ratio=(0.3, 1 / 0.3), value=value)))
    if cutout > 0:
        steps.append(OnImage(v2.RandomErasing(cutout, scale=(1 / 12, 1 / 12), ratio=(1, 1), value=value)))
    return v2.Compose(steps)


def to_image(picture):
    """PIL image in mode RGB -> `tv_tensors.Image`, uint8 (3, H, W); a huge one costs no copies on the way."""
    pixels = np.empty((picture.height, picture.width, 3), np.uint8)
    for top, strip in strips(picture):
        pixels[top : top + strip.height] = strip
    return tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1))


def denormalise(image, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Normalised images (..., 3, H, W) -> values in [0, 1], for pictures."""
    mean = torch.as_tensor(mean, dtype=image.dtype, device=image.device)[:, None, None]
    std = torch.as_tensor(std, dtype=image.dtype, device=image.device)[:, None, None]
    return (image * std + mean).clamp(0, 1)


class OnImage(nn.Module):
    """Apply a transform to the image of a sample, and to nothing else."""

    def __init__(self, transform):
        super().__init__()
        self.transform = transform

    def forward(self, sample):
        return {**sample, "image": self.transform(sample["image"])}


class RandomPatch(v2.RandomErasing):
    """With probability p a rectangle of an image is covered by an equally large one of the same image.

    Sizes as of torchreid's RandomPatch (Zhou et al. 2019, OSNet): 0.01 to 0.5 of the area, aspect ratio 0.1 to 10. That
    one takes patches, turned and mirrored at random, from a pool of earlier pictures; here randomness is a function of
    the sample alone, and a pool would be a state.
    """

    def __init__(self, p):
        super().__init__(p, scale=(0.01, 0.5), ratio=(0.1, 10))

    def make_params(self, flat_inputs):
        params = super().make_params(flat_inputs)
        if params["v"] is not None:
            params["v"] = v2.RandomCrop((params["h"], params["w"]))(flat_inputs[0])
        return params


class HideBackground(nn.Module):
    """With probability p: 0, which is the mean colour after normalisation, wherever the mask of a sample is 0.

    A sample whose mask is empty (the augmentation has moved the object out of the picture) stays as it is.
    """

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, sample):
        hidden = torch.rand(()) < self.p  # drawn for every sample, so that the next random number is the same one
        if not hidden or not sample["mask"].any():
            return sample
        return {**sample, "image": sample["image"] * (sample["mask"] > 0)}  # (3, H, W) x (1, H, W)


# Cubuk et al. 2019, "AutoAugment", table 9: (operation, probability, magnitude 0..9 or None), two operations each.
# The last five repeat earlier ones, as in the paper's list of 25.
IMAGENET_POLICY = (
    (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, None)),
    (("equalize", 0.8, None), ("equalize", 0.6, None)),
    (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
    (("equalize", 0.4, None), ("solarize", 0.2, 4)),
    (("equalize", 0.4, None), ("rotate", 0.8, 8)),
    (("solarize", 0.6, 3), ("equalize", 0.6, None)),
    (("posterize", 0.8, 5), ("equalize", 1.0, None)),
    (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
    (("equalize", 0.6, None), ("posterize", 0.4, 6)),
    (("rotate", 0.8, 8), ("color", 0.4, 0)),
    (("rotate", 0.4, 9), ("equalize", 0.6, None)),
    (("equalize", 0.0, None), ("equalize", 0.8, None)),
    (("invert", 0.6, None), ("equalize", 1.0, None)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("rotate", 0.8, 8), ("color", 1.0, 2)),
    (("color", 0.8, 8), ("solarize", 0.8, 7)),
    (("sharpness", 0.4, 7), ("invert", 0.6, None)),
    (("shear_x", 0.6, 5), ("equalize", 1.0, None)),
    (("color", 0.4, 0), ("equalize", 0.6, None)),
    (("equalize", 0.4, None), ("solarize", 0.2, 4)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, None)),
    (("invert", 0.6, None), ("equalize", 1.0, None)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("equalize", 0.8, None), ("equalize", 0.6, None)),
)

# What magnitude 9 means (0 is no change; between them evenly spaced), and whether the sign is drawn too (table 6).
LARGEST = {"shear_x": 0.3, "rotate": 30.0, "color": 0.9, "contrast": 0.9, "sharpness": 0.9}


class AutoAugment(v2.Transform):
    """The ImageNet policy of AutoAugment (Cubuk et al. 2019) on image, box and mask together.

    torchvision's class of that name refuses boxes and masks. This one draws the same random numbers in the same order
    and calls the same operators, so images come out equal to those of `torchvision.transforms.v2.AutoAugment(
    interpolation=BILINEAR, fill=fill)`. Box and mask follow the geometric operators (rotation, shear); the box becomes
    the smallest upright one around the moved box.

    Args:
        fill: grey value 0..255 of image pixels that come from outside; 128 as in the authors' code. Masks get 0.
    """

    def __init__(self, fill=128):
        super().__init__()
        self.fill = fill

    def make_params(self, flat_inputs):
        """Draw a sub-policy: the operations to apply with their strengths, for image, box and mask alike."""
        operations = []
        for name, probability, magnitude in IMAGENET_POLICY[int(torch.randint(len(IMAGENET_POLICY), ()))]:
            if torch.rand(()) <= probability:
                strength = _strength(name, magnitude)
                if name in LARGEST and torch.rand(()) <= 0.5:
                    strength = -strength
                operations.append((name, strength))
        return {"operations": operations}

    def transform(self, inpt, params):
        for name, strength in params["operations"]:
            inpt = apply_operation(inpt, name, strength, self.fill)
        return inpt


def _strength(name, magnitude):
    """Magnitude 0..9 of the paper -> the argument of `apply_operation`."""
    if name in LARGEST:
        return float(torch.linspace(0, LARGEST[name], 10)[magnitude])
    if name == "posterize":
        return 8 - round(magnitude * 4 / 9)  # 8 bits down to 4
    if name == "solarize":
        return 255 * float(torch.linspace(1, 0, 10)[magnitude])
    return None


def apply_operation(inpt, name, strength, fill=128):
    """One operation of the policy on an image (uint8), boxes or a mask; operations on colour touch the image only.

    Args:
        strength: rotate: degrees, counter-clockwise; shear_x: horizontal shift per row, about the top left corner;
            color, contrast, sharpness: change of the factor 1; posterize: bits kept; solarize: threshold 0..255 from
            which values are inverted; others: None.
    """
    is_image = isinstance(inpt, tv_tensors.Image)
    if name in ("rotate", "shear_x"):
        border = {"interpolation": v2.InterpolationMode.BILINEAR, "fill": fill if is_image else 0}
        if name == "rotate":
            return functional.rotate(inpt, strength, **border)
        shear = [math.degrees(math.atan(strength)), 0.0]  # torchvision takes an angle
        return functional.affine(inpt, angle=0.0, translate=[0, 0], scale=1.0, shear=shear, center=[0, 0], **border)
    return COLOUR_OPERATIONS[name](inpt, strength) if is_image else inpt


COLOUR_OPERATIONS = {
    "color": lambda image, change: functional.adjust_saturation(image, 1 + change),
    "contrast": lambda image, change: functional.adjust_contrast(image, 1 + change),
    "sharpness": lambda image, change: functional.adjust_sharpness(image, 1 + change),
    "posterize": functional.posterize,
    "solarize": functional.solarize,
    "autocontrast": lambda image, _: functional.autocontrast(image),
    "equalize": lambda image, _: functional.equalize(image),
    "invert": lambda image, _: functional.invert(image),
}
