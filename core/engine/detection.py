"""What every Mask R-CNN script shares: COCO data and its loaders, one epoch, evaluation, checkpoints.

A script adds only what is its own. Everything here runs on one process or many; each rank ends with the same numbers.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from baggage.synthetic import settle_synthetic_baggage
from core.data.coco import CocoData, coco_ground_truth, coco_paths, for_training, read_coco, split_coco
from core.data.coco_images import CocoImages, collate_detection, split_broken
from core.data.detection_transforms import build_detection_transform
from core.data.loading import batches
from core.data.samplers import AspectRatioBatches, KeyedBatches
from core.engine import distributed, training
from core.engine.checkpoint import load_checkpoint
from core.engine.coco_evaluation import encode_detections, encode_masks, evaluate_detections
from core.engine.log import progress_is_shown
from core.engine.updater import autocast
from core.errors import InputError
from core.models.mask_rcnn import MaskRCNN
from core.models.weights import best_weights

SYNTHETIC = Path("data") / "synthetic"


class DetectionData(NamedTuple):
    """train, val: `CocoData`; val is None where there is nothing to evaluate on."""

    train: CocoData
    val: CocoData | None


def load_data(args, say=print):
    """`DetectionData` that `--data`, or `--train-...` and `--val-...`, name; without them the synthetic belt scenes.

    The scenes are made where they are missing. Settles `args.data` and the four paths in `args`.
    Raises InputError for whatever is wrong with the files.
    """
    _settle_paths(args, say)
    train = read_coco(args.train_annotations, args.train_images, check_sizes=not args.skip_broken)
    if args.skip_broken:
        train = without_broken(train, say)
    if args.val_annotations:
        val = read_coco(
            args.val_annotations, args.val_images, categories=train.categories, check_sizes=not args.skip_broken
        )
        val = without_broken(val, say) if args.skip_broken else val
    elif args.val_fraction:
        train, val = split_coco(train, args.val_fraction, args.seed)
    else:
        val = None
        say("no validation data: the run trains without evaluation (--val-fraction 0.1 holds a tenth of it out)")
    train = for_training(train)
    for part in (train, val):
        for note in part.notes if part else ():
            say(note)
    return DetectionData(train, val)


def without_broken(data, say):
    """Rank 0 reads every picture once; what it can't read is named, counted and left out on all ranks."""

    def broken():
        readable, errors = split_broken(data)
        return {picture.id for picture in readable.pictures}, [str(error) for error in errors]

    readable, errors = distributed.on_main(broken)
    for error in errors:
        say(f"left out: {error}")
    if errors:
        say(f"--skip-broken: {len(errors)} of {len(data.pictures)} pictures of {data.annotations_path} left out")
    if not readable:
        raise InputError(f"{data.annotations_path}: none of its pictures can be read")
    return data._replace(pictures=[picture for picture in data.pictures if picture.id in readable])


def _settle_paths(args, say):
    for split in ("train", "val"):
        if bool(getattr(args, f"{split}_images")) != bool(getattr(args, f"{split}_annotations")):
            raise InputError(f"--{split}-images and --{split}-annotations belong together: give both or neither")
    if args.data is None and not (args.train_annotations or args.val_annotations):
        with distributed.main_first():
            settle_synthetic_baggage(SYNTHETIC, "plain", say)
        args.data = str(SYNTHETIC / "scenes")
    for split in ("train", "val"):
        if args.data is not None and not getattr(args, f"{split}_images"):
            images, annotations = coco_paths(args.data, split)
            if split == "train" or Path(annotations).is_file():
                setattr(args, f"{split}_images", str(images))
                setattr(args, f"{split}_annotations", str(annotations))
    if not args.train_annotations:
        raise InputError("nothing to train on: give --train-images and --train-annotations, or --data ROOT")
    if args.val_annotations and args.val_fraction:
        raise InputError(
            "--val-fraction holds training pictures out where there is no validation file, and there is one"
        )


def describe(data):
    """One line: pictures and instances of each part, and the categories."""
    parts = [
        f"{name} {len(part.pictures)} pictures with {sum(len(p.annotations) for p in part.pictures)} instances"
        for name, part in data._asdict().items()
        if part
    ]
    names = ", ".join(category.name for category in data.train.categories[:10])
    rest = f" and {len(data.train.categories) - 10} more" if len(data.train.categories) > 10 else ""
    return f"{', '.join(parts)}; classes: {names}{rest}"


def build_train_loader(args, data, device):
    """Batches of augmented pictures of alike shape; `loader.batch_sampler.set_epoch` starts an epoch."""
    sampler = AspectRatioBatches(
        [(picture.width, picture.height) for picture in data.pictures],
        args.batch_size,
        seed=args.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        batches_per_epoch=args.iterations_per_epoch or None,
    )
    transform = build_detection_transform(
        args.augmentation, flip=args.flip, vertical_flip=args.vertical_flip, crop_size=args.crop_size
    )
    # Large photographs are shrunk before the costly augmentations; level 3 may enlarge a part twice.
    max_side = 2 * args.max_size if args.augmentation > 1 else None
    return DataLoader(
        CocoImages(data, transform, seed=args.seed, max_side=max_side),
        batch_sampler=KeyedBatches(sampler),
        num_workers=args.workers,
        # A loader draws seeds for its workers, more of them in its first epoch: not from the stream of the network.
        generator=torch.Generator(),
        persistent_workers=args.workers > 0,
        pin_memory=device.type == "cuda",
        collate_fn=collate_detection,
    )


def build_eval_loader(data, device, *, workers=0):
    """This rank's share of the pictures, every world_size-th, one at a time: no padding, whatever their shapes."""
    return DataLoader(
        CocoImages(data, with_targets=False),
        sampler=range(distributed.rank(), len(data.pictures), distributed.world_size()),
        num_workers=workers,
        generator=torch.Generator(),
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        collate_fn=collate_detection,
    )


def train_one_epoch(model, loader, updater, *, epoch, seed, device, amp="off"):
    """`core.engine.training.train_one_epoch` with the five losses of Mask R-CNN, which the network computes itself.

    Also returns "dropped", how many instances the augmentation moved out of the pictures, over all ranks.
    """
    dropped = torch.zeros(1)

    def compute_losses(batch):
        images = [image.to(device, non_blocking=True) for image in batch["image"]]  # B of (3, H, W)
        targets = [
            {name: value.to(device, non_blocking=True) for name, value in target.items()} for target in batch["target"]
        ]
        dropped.add_(sum(batch["dropped"]))
        with autocast(device, amp), distributed.collective("forward"):
            return model(images, targets)

    row = training.train_one_epoch(model, compute_losses, loader, updater, epoch=epoch, seed=seed)
    everywhere = distributed.all_reduce_sum(dropped.to(device))
    return {**row, "dropped": round(everywhere.item())}


@torch.inference_mode()
def predict(network, loader, categories, device, *, amp="off"):
    """Detections of this rank's share of the pictures, as COCO results.

    Args:
        categories: one (category id, name) for each label 1, 2, ... of the network; None: a class to leave out.

    Returns:
        (box results, mask results, ids of the pictures), lists; see `encode_detections`.
    """
    network.eval()
    box_results, mask_results, image_ids = [], [], []
    bar = tqdm(batches(loader), "evaluation", len(loader), leave=False, disable=not progress_is_shown())
    for batch in bar:
        with autocast(device, amp):
            outputs = network([image.to(device, non_blocking=True) for image in batch["image"]])
        for image, output, image_id in zip(batch["image"], outputs, batch["image_id"], strict=True):
            boxes, masks = encode_detections(output, tuple(image.shape[-2:]), image_id, categories)
            box_results += boxes
            mask_results += masks
            image_ids.append(image_id)
    return box_results, mask_results, image_ids


def instances_of(detections, image_size, categories):
    """The detections of one picture as they are drawn, identified and written: a list of dicts.

    Args: as in `core.engine.coco_evaluation.encode_detections`.

    Returns:
        box [x1, y1, x2, y2] as the network says it, in pixels; category_id, label (its name), score, and rle, the mask
        as a run-length code; in the network's order, the best first.
    """
    boxes, masks = detections["boxes"].float(), detections["masks"].float()
    codes = encode_masks(masks, boxes, image_size)
    found = zip(detections["labels"].tolist(), boxes.tolist(), detections["scores"].tolist(), codes, strict=True)
    return [
        {"box": box, "category_id": category[0], "label": category[1], "score": score, "rle": rle}
        for label, box, score, rle in found
        if (category := categories[label - 1]) is not None
    ]


def evaluate(network, loader, data, device, *, amp="off"):
    """`CocoResult` of a network on `data`, the same on every rank; None where there is nothing to evaluate on."""
    if data is None:
        return None
    results = predict(network, loader, data.categories, device, amp=amp)
    return evaluate_detections(coco_ground_truth(data), *results)


def checkpoint_state(epoch, best, network, updater, args, data):
    """Everything that a run needs to go on, and that `evaluate.py` and `demo.py` need to use the network alone."""
    paths = {
        name: str(Path(value).absolute())
        for name, value in vars(args).items()
        if value is not None and name in ("data", "train_images", "train_annotations", "val_images", "val_annotations")
    }
    return {
        "kind": "mask_rcnn",
        "epoch": epoch,
        "best": best,
        "model": network.state_dict(),
        **updater.state_dict(),
        "args": {**vars(args), **paths},
        "network": network.options,
        "categories": [list(category) for category in data.train.categories],
    }


def restore(state, path, network, updater, data):
    """Continue from a checkpoint. Raises InputError if its classes are others, naming what differs."""
    saved = [tuple(category) for category in state["categories"]]
    if saved != list(data.train.categories):
        other = sorted(set(saved) ^ set(data.train.categories))[:4]
        raise InputError(f"{path} was trained on other classes, such as {other}; give the data it was started with")
    training.restore(state, path, ("model", network), (None, updater))


def network_from_checkpoint(path, device, state=None):
    """The trained network of a mask_rcnn checkpoint, averaged where it is averaged, ready to detect; and its state.

    state: what `load_checkpoint` made of the path, where that is known already.
    """
    state = state or load_checkpoint(path, "mask_rcnn")
    network = MaskRCNN(**state["network"])
    network.load_state_dict(best_weights(state))
    return network.to(device).eval(), state
