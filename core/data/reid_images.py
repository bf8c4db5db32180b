"""From samples (paths, identities, boxes, masks) to what a network is trained on, and how a broken picture is met.

images = ReIDImages(samples, build_transform(256, 128, training=True), seed=0)
loader = DataLoader(images, batch_sampler=KeyedBatches(sampler), collate_fn=collate, num_workers=4)
for batch in batches(loader): ...
"""

import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch.utils.data import default_collate
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

from core.data.coco import encode_mask
from core.data.coco_checks import check_outline
from core.data.images import read_stored_image, turn_box
from core.data.loading import PictureDataset, find_broken
from core.data.randomness import seeded
from core.data.samples import clip_box
from core.data.transforms import to_image
from core.errors import InputError

# The object's box (x1, y1, x2, y2) where the data have none: the picture less a quarter on each side. It is the first
# and "original" one of XJTU-SuitcaseReID, which goes on to other boxes by the picture's place in the batch.
CENTRE_BOX = (0.25, 0.25, 0.75, 0.75)


class ReIDImages(PictureDataset):
    """Pictures with identity, camera and the object's box (and mask), augmented as a function of the key alone.

    An item is asked for by a key (epoch, slot, index) from `KeyedBatches`, or by an index. What `transform` draws at
    random depends on (seed, epoch, slot): not on the worker, nor on what was drawn before, and torch's own generators
    stay as they are. An item is a dict

        image   float (3, H, W), as `transform` makes it
        box     float (4,), x1, y1, x2, y2 of the transformed picture, in fractions of its width and height; its area
                is zero where the augmentation has moved the object out of the picture
        mask    uint8 (1, H, W), 0 or 1; only if `with_masks`
        id, camera, index   integers
        path    str

    Args:
        samples: list of `core.data.samples.Sample`.
        transform: as from `build_transform`.
        with_masks: read the instance masks too.

    Attributes:
        has_boxes, has_masks: whether every sample has its own. A sample without box gets `CENTRE_BOX`.

    Raises:
        InputError: masks are asked for and some sample has none; by `images[key]`: the picture can't be read, or its
            box lies outside.
    """

    def __init__(self, samples, transform, *, seed=0, with_masks=False):
        self.samples = samples
        self.transform = transform
        self.seed = seed
        self.with_masks = with_masks
        self.has_boxes = all(sample.box is not None for sample in samples)
        self.has_masks = all(sample.mask is not None for sample in samples)
        if with_masks and not self.has_masks:
            path = next(sample.path for sample in samples if sample.mask is None)
            raise InputError(f"{path}: the data have no instance mask for it: use the mask target gaussian or box")

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, key):
        epoch, slot, index = key if isinstance(key, tuple) else (0, key, key)
        sample = self.samples[index]
        loaded = load_sample(sample, self.with_masks)
        with seeded("augmentation", self.seed, epoch, slot):
            transformed = self.transform(loaded)
        height, width = transformed["image"].shape[-2:]
        item = {
            "image": transformed["image"].as_subclass(torch.Tensor),
            "box": transformed["box"].as_subclass(torch.Tensor)[0] / torch.tensor([width, height, width, height]),
            "id": sample.id,
            "camera": sample.camera,
            "index": index,
            "path": str(sample.path),
        }
        if self.with_masks:
            item["mask"] = transformed["mask"].as_subclass(torch.Tensor)
        return item


def collate(items):
    """List of items -> dict of batched tensors ("path": list of str); an InputError passes as it is."""
    return items if isinstance(items, InputError) else default_collate(items)


def load_sample(sample, with_mask=False):
    """Read a sample: dict with "image" uint8 (3, H, W), "box" float (1, 4) in pixels and "mask" uint8 (1, H, W).

    Box and mask are those of the stored pixels; by the picture's EXIF orientation all three are turned upright.
    """
    picture, turn = read_stored_image(sample.path, sample.bits)
    width, height = picture.size
    box = _clipped_box(sample, width, height)
    mask = Image.fromarray(_decode_mask(sample, width, height)) if with_mask else None
    if turn is not None:
        box = turn_box(box, turn, width, height)
        picture = picture.transpose(turn)
        mask = mask.transpose(turn) if with_mask else None
    canvas = picture.size[::-1]
    loaded = {
        "image": to_image(picture),
        "box": tv_tensors.BoundingBoxes([box], format="XYXY", canvas_size=canvas, dtype=torch.float32),
    }
    if with_mask:
        loaded["mask"] = tv_tensors.Mask(functional.pil_to_tensor(mask))  # (1, H, W)
    return loaded


def _clipped_box(sample, width, height):
    """The part of the sample's box (or of the default one) within the picture, in pixels."""
    if sample.box is None:
        return [fraction * size for fraction, size in zip(CENTRE_BOX, (width, height) * 2, strict=True)]
    clipped = clip_box(sample.box, width, height)
    if clipped is None:
        corners = ", ".join(f"{corner:g}" for corner in sample.box)
        raise InputError(
            f"{sample.path}: no part of the box ({corners}) lies in the picture of {width}x{height} pixels: correct "
            "the box (x1, y1, x2, y2 in pixels) or remove it"
        )
    return clipped


def _decode_mask(sample, width, height):
    """COCO run lengths, compressed or as a list of counts -> array uint8 (H, W) of 0 and 1.

    The trap: pycocotools leaves what the runs don't cover uninitialised, and reads beyond the end of damaged ones.
    """
    run_lengths, counts = sample.mask, sample.mask["counts"]
    if tuple(run_lengths["size"]) != (height, width):
        raise InputError(
            f"{sample.path}: its mask is for {run_lengths['size'][1]}x{run_lengths['size'][0]} pixels and the picture "
            f"has {width}x{height}: correct the mask or remove it"
        )
    if isinstance(counts, bytes):  # as pycocotools itself has them
        counts = counts.decode("latin-1")
    run_lengths = {"size": [height, width], "counts": counts}
    check_outline(run_lengths, width, height, sample.path)
    return coco_mask.decode(encode_mask(run_lengths, width, height))


def split_broken(samples, with_masks=False):
    """Sort out what can't be used, before a run, by reading everything once: as runs that skip broken pictures do.

    Before, and not while training, so that samplers, classes and metrics know nothing of the broken ones, and every
    rank and every resumed run leaves out the same.

    Returns:
        (samples that can be read, list of InputError: one for each of the others, in the order of `samples`)
    """
    problems = find_broken(samples, lambda sample: load_sample(sample, with_masks and sample.mask is not None))
    readable = [sample for sample, error in zip(samples, problems, strict=True) if error is None]
    return readable, [error for error in problems if error is not None]
