"""From COCO data to what Mask R-CNN is trained on: pictures of any size with boxes, labels and masks.

images = CocoImages(for_training(read_coco(annotations, folder)), build_detection_transform(1), seed=0)
loader = DataLoader(images, batch_sampler=KeyedBatches(sampler), collate_fn=collate_detection, num_workers=4)
for batch in batches(loader): ...
"""

import math
import pickle

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

from core.data.coco_masks import encode_mask
from core.data.coco_views import wrong_size
from core.data.images import read_stored_image
from core.data.loading import PictureDataset, find_broken
from core.data.randomness import seeded
from core.data.transforms import to_image
from core.errors import InputError
from core.layers.shapes import fitted_size

MOST_PIXELS = 2**27  # of all masks of a picture


class CocoImages(PictureDataset):
    """Pictures with their objects, augmented as a function of the key alone.

    An item is asked for by a key (epoch, slot, index) from `KeyedBatches`, or by an index. What `transform` draws at
    random depends on (seed, epoch, slot), as in `ReIDImages`. An item is a dict

        image     float (3, H, W), RGB in [0, 1]
        target    dict: boxes float (G, 4), x1, y1, x2, y2 in pixels; labels int64 (G,), 1 .. K; masks uint8 (G, H, W),
                  0 or 1 (with `fit` of another size than the image); G may be 0. Left out without `with_targets`
        image_id  int, as in the annotation file
        path      str
        dropped   int, how many objects the augmentation has moved out of the picture, or shrinking left no pixel of

    The annotations are packed into one block of memory that all workers share, forked or spawned: hundreds of
    thousands of Python objects would be copied into each.

    Args:
        data: `core.data.coco.CocoData`; for training, what `for_training` leaves of it.
        transform: as from `build_detection_transform`; None: the picture as it is.
        with_targets: False leaves the objects out, which an evaluation has no use for.
        max_side: for training; larger pictures are shrunk until their longer side has so many pixels, or down to half
            of it where the masks of all their objects would have more than `MOST_PIXELS`, before `transform`, whose
            time and memory grow with the pixels. None: every picture has the size it is stored in.
        fit: (min_size, max_size) of the network, for transforms that neither resize nor crop: masks are then of the
            size that it resizes the picture to, where that is smaller than the picture.

    Raises:
        InputError, by `images[key]`: the picture can't be read, or is not of the size that the file says.
    """

    def __init__(self, data, transform=None, *, seed=0, with_targets=True, max_side=None, fit=None):
        self.transform = transform
        self.max_side, self.fit = max_side, fit
        self.seed = seed
        self.with_targets = with_targets
        self.upright, self.bits = data.upright, data.bits
        packed = [pickle.dumps(picture, pickle.HIGHEST_PROTOCOL) for picture in data.pictures]
        self.ends = torch.from_numpy(np.cumsum([len(part) for part in packed], dtype=np.int64))
        self.packed = torch.frombuffer(bytearray().join(packed), dtype=torch.uint8)

    def __len__(self):
        return len(self.ends)

    def picture(self, index):
        """The `CocoPicture` of that index, with its annotations."""
        start, end = (self.ends[index - 1] if index else 0), self.ends[index]
        return pickle.loads(self.packed[start:end].numpy().data)

    def __getitem__(self, key):
        epoch, slot, index = key if isinstance(key, tuple) else (0, key, key)
        picture = self.picture(index)
        view = {"upright": self.upright, "bits": self.bits}
        loaded = load_picture(picture, self.with_targets, self.max_side, self.fit, **view)
        transformed = loaded
        if self.transform is not None:
            with seeded("augmentation", self.seed, epoch, slot):
                transformed = self.transform(loaded)
        image = functional.to_dtype(transformed["image"].as_subclass(torch.Tensor), torch.float32, scale=True)
        item = {"image": image.contiguous(), "image_id": picture.id, "path": picture.path}
        if self.with_targets:
            names = ("boxes", "labels", "masks")
            item["target"] = {name: transformed[name].as_subclass(torch.Tensor).contiguous() for name in names}
            item["dropped"] = len(picture.annotations) - len(transformed["labels"])
        return item


def collate_detection(items):
    """List of items -> dict of lists: pictures differ in size, so nothing is stacked. An InputError passes as it is."""
    return items if isinstance(items, InputError) else {key: [item[key] for item in items] for key in items[0]}


def load_picture(picture, with_targets=True, max_side=None, fit=None, **view):
    """Read a `CocoPicture`: dict with "image" uint8 (3, H, W) and, `with_targets`, "boxes" float (G, 4), "labels"
    int64 (G,) and "masks" uint8 (G, H, W). Image, boxes and masks are tv_tensors, for torchvision.transforms.v2.

    A picture that is shrunk for `max_side` loses the objects that this leaves no pixel of.
    max_side, fit: see `CocoImages`. view: `CocoData.view`.
    """
    image = read_as_annotated(picture.path, picture.width, picture.height, **view)
    image = _at_most(image, max_side, len(picture.annotations) if with_targets and not fit else 0)
    width, height = image.size
    shrunk = image.size != (picture.width, picture.height)
    loaded = {"image": to_image(image)}
    if with_targets:
        boxes = torch.tensor([annotation.box for annotation in picture.annotations], dtype=torch.float32).reshape(-1, 4)
        boxes *= torch.tensor([width / picture.width, height / picture.height] * 2)
        labels = torch.tensor([annotation.label for annotation in picture.annotations], dtype=torch.int64)
        fitted = fitted_size(height, width, *fit) if fit else (height, width)
        masks = _masks(picture, *min(fitted, (height, width)))
        kept = masks.flatten(1).any(1).bool() if shrunk else slice(None)
        loaded["boxes"] = tv_tensors.BoundingBoxes(boxes[kept], format="XYXY", canvas_size=(height, width))
        loaded["labels"] = labels[kept]
        loaded["masks"] = tv_tensors.Mask(masks[kept])
    return loaded


def _at_most(image, max_side, num_masks):
    """The PIL image, shrunk where it is larger than `max_side` and that number of masks ask for: see `CocoImages`."""
    if max_side is None:
        return image
    longer = max(image.size)
    pixels = num_masks * image.width * image.height  # where they have the picture's size
    side = min(longer, max_side, max(max_side / 2, longer * math.sqrt(MOST_PIXELS / max(pixels, 1))))
    if side == longer:
        return image
    size = [max(1, round(length * side / longer)) for length in image.size]
    return image.resize(size, Image.Resampling.BILINEAR)  # which is antialiased in Pillow


def read_as_annotated(path, width, height, *, upright=True, bits=16):
    """Read a picture the way it lay before the person who outlined its objects.

    Some tools show a picture turned upright by its EXIF orientation, others as it is stored. The file's width and
    height tell where they fit one view alone. Where they fit both, as after half a turn, `upright` says which it is.

    Args: upright, bits: `CocoData.view`.

    Returns:
        PIL image, mode RGB, of width x height.

    Raises:
        InputError: it can't be read, or has neither size.
    """
    stored, turn = read_stored_image(path, bits)
    views = [stored] if turn is None else [stored, stored.transpose(turn)]
    for view in reversed(views) if upright else views:
        if view.size == (width, height):
            return view
    raise wrong_size(path, stored.size, (width, height))


def split_broken(data):
    """Sort out the pictures that can't be read or have another size, as `core.data.reid_images.split_broken` does.

    Returns:
        (data without them, list of InputError: one for each, in the order of the pictures)
    """
    problems = find_broken(
        data.pictures, lambda picture: read_as_annotated(picture.path, picture.width, picture.height, **data.view)
    )
    readable = [picture for picture, error in zip(data.pictures, problems, strict=True) if error is None]
    return data._replace(pictures=readable), [error for error in problems if error is not None]


def _masks(picture, height, width):
    """uint8 (G, height, width), 0 or 1: the masks of a picture's objects; of each pixel's area, the value in the middle
    ("nearest exact"), so that mirrored masks are those of the mirrored picture.

    One object at a time: all masks of a large picture together would take many times the picture's own memory.
    """
    masks = torch.empty(len(picture.annotations), height, width, dtype=torch.uint8)
    is_whole = (height, width) == (picture.height, picture.width)
    rows = ((np.arange(height) + 0.5) * picture.height / height).astype(np.int64)
    columns = ((np.arange(width) + 0.5) * picture.width / width).astype(np.int64)
    for mask, annotation in zip(masks, picture.annotations, strict=True):
        stored = coco_mask.decode(encode_mask(annotation.segmentation, picture.width, picture.height))  # by columns
        mask.copy_(torch.from_numpy(stored if is_whole else stored.T[columns][:, rows].T))
    return masks
