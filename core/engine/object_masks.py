"""Which pixels are the object, in pictures of one object whose data don't say: a trained Mask R-CNN answers.

It was trained on scenes, in which objects are small, and a picture of one object is filled by it. So the picture is
laid in the middle of a larger canvas, where the object has about the size that the network knows.
"""

import json
import math
import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

from core.data.images import BACK, read_stored_image, turn_box
from core.data.reid_images import CENTRE_BOX
from core.data.samples import clip_box
from core.engine import detection, distributed
from core.engine.checkpoint import fingerprint
from core.engine.coco_evaluation import encode_masks
from core.engine.log import progress_is_shown
from core.engine.step import autocast
from core.errors import InputError
from core.files import atomic_write
from core.layers.masks import paste_masks
from core.models.mask_rcnn import resize_boxes

VERSION = 2  # of the masks: raise it when the same network would give others
CANVAS = 3.0  # sides of the canvas, in sides of the picture
MAX_SIDE = 1333  # pixels of the picture on the canvas, longer side: the network shrinks what is larger anyway
MIN_SCORE = 0.3  # of what counts as found
GRID = 64  # rows and columns of the grid on which masks are compared with the place where the object should be
ROUND = 32  # pictures of each rank before all know what was found
WRITE_SECONDS = 60  # between two writes of the cache, which is written as a whole


@torch.inference_mode()
def object_mask(network, picture, device, *, amp="off", box=None, labels=None, canvas=CANVAS, min_score=MIN_SCORE):
    """The one object that a picture shows, as a Mask R-CNN sees it.

    Of all instances it is the one with the highest product of its score and of how well its mask lies where the object
    should be: the IoU with `box` or, where there is none, the share of the picture's middle (`CENTRE_BOX`) covered.

    Args:
        network: `core.models.mask_rcnn.MaskRCNN` in evaluation mode.
        picture: PIL image, mode RGB, upright.
        box: (x1, y1, x2, y2) of the object in pixels, roughly, or None.
        labels: of the classes that it may be; None: of any.
        canvas: sides of the canvas, in sides of the picture; 1: the picture alone.
        min_score: what scores less is not looked at.

    Returns:
        Dict of rle (COCO run lengths of the whole picture), score and box (x1, y1, x2, y2; pixels, within the
        picture); None where nothing is found.
    """
    image, place = _on_canvas(picture, canvas)
    with autocast(device, amp):
        (found,) = network([image.to(device)], min_score=min_score)
    is_wanted = torch.isin(found["labels"].cpu(), torch.tensor(labels)) if labels else slice(None)
    scores, boxes, masks = (found[name].float().cpu()[is_wanted] for name in ("scores", "boxes", "masks"))
    boxes = resize_boxes(boxes - place.offset, place.size, (picture.height, picture.width))
    fits = scores * _fit(boxes, masks, picture.size, box)  # (N,)
    if not (fits > 0).any():
        return None
    best = fits.argmax()
    (rle,) = encode_masks(masks[best][None], boxes[best][None], (picture.height, picture.width))
    inside = clip_box(boxes[best].tolist(), *picture.size)
    if inside is None or not coco_mask.area(rle):  # less than a pixel
        return None
    return {"rle": rle, "score": scores[best].item(), "box": inside}


class _Place(NamedTuple):
    """Where a picture lies on its canvas: offset (4,), which the canvas adds to boxes; size (h, w) it has there."""

    offset: torch.Tensor
    size: tuple[int, int]


def _on_canvas(picture, canvas):
    """The picture in the middle of a canvas in the mean colour of its rim: float (3, H, W) in [0, 1], and `_Place`."""
    shrink = min(1.0, MAX_SIDE / max(picture.size))
    if shrink < 1:
        picture = picture.resize([max(1, round(shrink * side)) for side in picture.size], Image.Resampling.BILINEAR)
    pixels = pil_to_tensor(picture).float() / 255  # (3, h, w)
    height, width = pixels.shape[1:]
    top, left = (round((canvas - 1) / 2 * side) for side in (height, width))
    rim = torch.cat([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], dim=1).mean(dim=1)  # (3,)
    image = rim[:, None, None].repeat(1, height + 2 * top, width + 2 * left)  # (3, H, W)
    image[:, top : top + height, left : left + width] = pixels
    return image, _Place(torch.tensor([left, top, left, top]), (height, width))


def _fit(boxes, masks, size, box):
    """How well each mask lies where the object should be, (N,) in [0, 1]; see `object_mask`. size: (w, h)."""
    to_grid = torch.tensor([GRID / side for side in (*size, *size)])
    drawn = paste_masks(masks, boxes * to_grid, (GRID, GRID))[:, 0] >= 0.5  # (N, G, G)
    wanted = torch.zeros(GRID, GRID, dtype=torch.bool)
    corners = torch.tensor(CENTRE_BOX) * GRID if box is None else torch.tensor(box) * to_grid
    x1, y1, x2, y2 = corners.round().int().clamp(0, GRID).tolist()
    wanted[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)] = True
    shared = (drawn & wanted).sum(dim=(1, 2))
    whole = wanted.sum() if box is None else (drawn | wanted).sum(dim=(1, 2))
    return shared / whole.clamp(min=1)


# A whole data set -----------------------------------------------------------------------------------------------------


def predicted_masks(samples, root, checkpoint_path, device, *, amp="off", say=print):
    """The samples with the mask that a trained Mask R-CNN sees in each picture, in place of their own; on every rank.

    Each rank looks at its share. What is found is kept in `<root>/masks-<fingerprint of the network>.json`, and is
    looked up there by path, box, file size and time, so that it is computed once for a data set; a run that is killed
    leaves what it had about a minute before. Where nothing is found the mask is the sample's box, or `CENTRE_BOX`, and
    a line says how often that was so. No random numbers of the run are drawn.

    Args:
        samples: list of `core.data.samples.Sample`.
        root: the data set's folder; of a list, the first keeps the masks. If it can't be written to, a line says so.
        checkpoint_path: of train_mask_rcnn.py.
        say: takes the lines for a person.

    Raises:
        InputError: the checkpoint can't be used, a picture can't be read, or nothing is found in any of them.
    """
    with torch.random.fork_rng(devices=[]):  # its first weights are drawn on the CPU, whatever the device
        network, state = detection.network_from_checkpoint(checkpoint_path, device)
    root = root[0] if isinstance(root, list) else root
    path = Path(root) / f"masks-{fingerprint(state)[:12]}.json"
    keys, files, known = distributed.on_main(lambda: _look_up(samples, root, path, say))
    missing = [number for number, key in enumerate(keys) if not _is_current(known.get(key), files[number])]
    if missing:
        say(f"masks: {checkpoint_path} looks for the object in {len(missing)} pictures of {root}")
    ranks, writable, written = distributed.world_size(), True, time.monotonic()
    with tqdm(total=len(missing), desc="masks", unit="img", disable=not progress_is_shown()) as bar:
        for start in range(0, len(missing), ROUND * ranks):
            share = missing[start : start + ROUND * ranks]
            own = [samples[number] for number in share[distributed.rank() :: ranks]]
            parts = distributed.gather_objects(_predict(own, network, device, amp))
            errors = _take_in(known, [(keys[number], files[number]) for number in share], parts)
            is_over = bool(errors) or start + len(share) == len(missing)
            is_due = is_over or time.monotonic() - written > WRITE_SECONDS
            if writable and distributed.broadcast_object(is_due):  # by the clock of rank 0
                writable, written = distributed.on_main(lambda: _write_cache(path, known, say)), time.monotonic()
            if errors:
                raise errors[0]
            bar.update(len(share))
    masked = [known[key] for key in keys]
    _report_misses(masked, samples, root, checkpoint_path, say)
    return [sample._replace(mask=entry["rle"]) for sample, entry in zip(samples, masked, strict=True)]


def _report_misses(masked, samples, root, checkpoint_path, say):
    """Say in how many pictures nothing was found; raise InputError where that is all of them."""
    misses = sum(not entry["found"] for entry in masked)
    if not misses:
        return
    if misses == len(masked):
        raise InputError(
            f"{checkpoint_path} finds nothing in any of the {misses} pictures of {root}: give another "
            "--mask-checkpoint, or --mask-target gaussian or box, which are made from boxes"
        )
    instead = "box" if all(sample.box for sample in samples) else "middle of the picture"
    line = f"masks: nothing found in {misses} of {len(masked)} pictures: the mask there is the {instead}"
    say(f"warning: {line}" if misses > len(masked) / 2 else line)


def _predict(samples, network, device, amp):
    """For each sample a dict of rle (of the stored pixels, as data sets have it) and found, or the InputError of a
    broken picture: the other ranks must learn of it, too."""
    results = []
    for sample in samples:
        try:
            results.append(_predict_one(sample, network, device, amp))
        except InputError as error:
            results.append(error)
    return results


def _predict_one(sample, network, device, amp):
    picture, turn = read_stored_image(sample.path, sample.bits)
    width, height = picture.size
    box = sample.box and clip_box(sample.box, width, height)  # one that lies outside stops the training, in one line
    if turn is None:
        found = object_mask(network, picture, device, amp=amp, box=box)
    else:
        upright = box and turn_box(box, turn, width, height)
        found = object_mask(network, picture.transpose(turn), device, amp=amp, box=upright)
    if found is None:
        return {"found": False, "rle": _box_rle(box, width, height)}
    return {"found": True, "rle": found["rle"] if turn is None else _turned(found["rle"], BACK.get(turn, turn))}


def _turned(rle, turn):
    return _encode(np.asarray(Image.fromarray(coco_mask.decode(rle)).transpose(turn)))


def _box_rle(box, width, height):
    """Run lengths of the pixels that a box touches, or `CENTRE_BOX` where it is None."""
    x1, y1, x2, y2 = box or [part * side for part, side in zip(CENTRE_BOX, (width, height) * 2, strict=True)]
    mask = np.zeros((height, width), np.uint8)
    mask[math.floor(y1) : math.ceil(y2), math.floor(x1) : math.ceil(x2)] = 1
    return _encode(mask)


def _encode(mask):
    """Array uint8 (H, W) of 0 and 1 -> run lengths that fit into JSON."""
    code = coco_mask.encode(np.asfortranarray(mask))
    return {"size": list(code["size"]), "counts": code["counts"].decode("ascii")}


# The cache: {"version": ..., "masks": {key: {"file": [bytes, time], "found": ..., "rle": ...}}} -----------------------


def _look_up(samples, root, path, say):
    """(key of each sample, size and time of each file, what the cache knows: dict of entries by key)."""
    keys = [  # by fewer bits than 16 it is another picture
        json.dumps([os.path.relpath(sample.path, root), sample.box, *[sample.bits] * (sample.bits < 16)])
        for sample in samples
    ]
    files = [_file_state(sample.path) for sample in samples]
    return keys, files, _read_cache(path, say)


def _file_state(path):
    """[bytes, time of the last change in ns]; None for a file that can't be had, which reading will tell."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _is_current(entry, file):
    return entry is not None and file is not None and entry["file"] == file


def _read_cache(path, say):
    """Entries by key; none, which is said, where the file is of another version or damaged."""
    if not os.path.lexists(path):
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] == VERSION:
            entries = content["masks"].items()
            return {key: {name: entry[name] for name in ("file", "found", "rle")} for key, entry in entries}
        reason = "it is of another version"
    except OSError as error:
        reason = f"it can't be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        reason = "it is damaged"
    say(f"masks: {path} is not used, {reason}: its masks are computed anew")
    return {}


def _take_in(known, pictures, parts):
    """Put the results of a round into `known`; the InputErrors among them.

    Args:
        pictures: (key, size and time of the file) of all pictures of the round; rank r had each world_size-th from r.
        parts: what each rank's `_predict` gave.
    """
    errors = []
    for number, (key, file) in enumerate(pictures):
        result = parts[number % len(parts)][number // len(parts)]
        if isinstance(result, InputError):
            errors.append(result)
        else:
            known[key] = {"file": file, **result}
    return errors


def _write_cache(path, known, say):
    """Whether the cache could be written; a line says why not."""
    try:
        with atomic_write(path) as file:
            file.write(json.dumps({"version": VERSION, "masks": known}).encode())
    except InputError as error:
        say(f"masks: {path} can't be written ({error.__cause__.strerror}): the next run computes them again")
        return False
    return True
