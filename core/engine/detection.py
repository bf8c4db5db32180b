"""What every Mask R-CNN script shares: COCO data and its loaders, evaluation, checkpoints.

A script adds only what is its own. Everything here runs on one process or many; each rank ends with the same numbers.
"""

from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from core.data.coco import (
    CocoData,
    coco_ground_truth,
    coco_paths,
    for_training,
    read_coco,
    split_coco,
    without_empty_categories,
)
from core.data.coco_checks import BrokenEntries
from core.data.coco_images import CocoImages, collate_detection, split_broken
from core.data.detection_transforms import build_detection_transform, training_sizes
from core.data.images import bits_in_use
from core.data.leaks import detection_leaks
from core.data.loading import batches, build_loader
from core.data.samplers import AspectRatioBatches, KeyedBatches
from core.engine import distributed
from core.engine.checkpoint import all_options, load_checkpoint, restore
from core.engine.coco_evaluation import encode_detections, encode_masks, evaluate_detections
from core.engine.log import progress_is_shown
from core.engine.options import arguments_of
from core.engine.step import autocast
from core.errors import InputError, as_written
from core.files import printable
from core.models.mask_rcnn import MaskRCNN
from core.models.weights import Unfilled, best_weights

SYNTHETIC = Path("data") / "synthetic"


class DetectionData(NamedTuple):
    """train, val: `CocoData`; val is None where there is nothing to evaluate on. paths: where they lie, by the names of
    the options data, train_images, train_annotations, val_images, val_annotations; None for what is not used."""

    train: CocoData
    val: CocoData | None
    paths: dict[str, str | None]


def load_data(args, say=print):
    """`DetectionData` that `--data`, or `--train-...` and `--val-...`, name; without them the synthetic belt scenes.

    The scenes are made where they are missing. What leaks (`core.data.leaks`) is said.
    Raises InputError for whatever is wrong with the files.
    """
    paths = _settled_paths(args, say)
    train = _read(paths["train_annotations"], paths["train_images"], args)
    if args.skip_broken:
        train = without_broken(train, say)
    if paths["val_annotations"]:
        how = {"categories": train.categories, "upright": train.upright}
        val = _read(paths["val_annotations"], paths["val_images"], args, **how)
        val = without_broken(val, say) if args.skip_broken else val
    elif args.val_fraction:
        train, val = split_coco(train, args.val_fraction, args.seed)
    else:
        val = None
        say("no validation data: the run trains without evaluation (--val-fraction 0.1 holds a tenth of it out)")
    train, val = with_bits_in_use([train, val], say)
    for note in train.notes:
        say(note)
    train = for_training(train._replace(notes=[]))
    for note in train.notes + (val.notes if val else []):
        say(note)
    if val:
        _check_measurable(val)
    (train, *rest), empty = without_empty_categories([part for part in (train, val) if part])
    val = rest[0] if rest else None
    if empty:
        say(f"classes without an object, left out: {empty}")
    for line in distributed.on_main(lambda: detection_leaks(train, val)) if val else ():
        say(line)
    return DetectionData(train, val, paths)


def _check_measurable(val):
    if all(annotation.crowd for picture in val.pictures for annotation in picture.annotations):
        raise InputError(
            f"{val.annotations_path}: no object to evaluate on in its {len(val.pictures)} pictures for validation "
            "(crowd regions are none); give others by --val-images and --val-annotations or by --val-fraction, or none"
        )


def _read(annotations, images, args, **how):
    try:
        return read_coco(annotations, images, skip_broken=args.skip_broken, **how)
    except BrokenEntries as error:
        raise InputError(f"{error} (--skip-broken leaves out what can't be used)") from error


def with_bits_in_use(parts, say, bits=None):
    """The parts of a set (`CocoData` or None) with `bits`, or as many as the pictures of all of them use together."""
    paths = [picture.path for part in parts if part for picture in part.pictures]
    bits = bits or distributed.on_main(lambda: bits_in_use(paths, say))
    return [part and part._replace(bits=bits) for part in parts]


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


def _settled_paths(args, say):
    """`DetectionData.paths`, each of them a text."""
    names = ("data", "train_images", "train_annotations", "val_images", "val_annotations")
    paths = {name: getattr(args, name) for name in names}
    for split in ("train", "val"):
        if bool(paths[f"{split}_images"]) != bool(paths[f"{split}_annotations"]):
            raise InputError(f"--{split}-images and --{split}-annotations belong together: give both or neither")
    if paths["data"] is None and not (paths["train_annotations"] or paths["val_annotations"]):
        from baggage.synthetic import settle_synthetic_baggage  # core stands without it

        with distributed.main_first():
            settle_synthetic_baggage(SYNTHETIC, "plain", say)
        paths["data"] = str(SYNTHETIC / "scenes")
    for split in ("train", "val") if paths["data"] is not None else ():
        is_there = split == "train" or coco_paths(paths["data"], split)[1].is_file()
        if is_there and not paths[f"{split}_images"]:
            options = "--train-images and --train-annotations, --val-images and --val-annotations"
            images, annotations = _in_layout(paths["data"], split, options)
            paths |= {f"{split}_images": str(images), f"{split}_annotations": str(annotations)}
    if not paths["train_annotations"]:
        raise InputError("nothing to train on: give --train-images and --train-annotations, or --data ROOT")
    if paths["val_annotations"] and args.val_fraction:
        raise InputError(
            "--val-fraction holds training pictures out where there is no validation file, and there is one"
        )
    return paths


def _in_layout(root, split, options):
    """`coco_paths` that are there. options: those that name the files of a folder that is laid out otherwise."""
    found = coco_paths(root, split)
    missing = [str(path) for path in found if not path.exists()]
    if missing:
        files = [str(path) for pattern in ("*.json", "*/*.json") for path in sorted(found[0].parent.glob(pattern))]
        there = f"; there are {', '.join(files[:3])}{', ...' * (len(files) > 3)}" if files else ""
        raise InputError(
            f"{root}: not laid out as COCO 2017, there is no {' and no '.join(missing)}; name the folders and files by "
            f"{options}{there}"
        )
    return found


def describe(data):
    """One line: pictures and instances of each part, and the categories."""
    parts = [
        f"{name} {len(part.pictures)} pictures with {sum(len(p.annotations) for p in part.pictures)} instances"
        for name, part in (("train", data.train), ("val", data.val))
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
    transform = build_detection_transform(args.augmentation, **arguments_of(build_detection_transform, args))
    # Large photographs are shrunk before the costly augmentations; level 3 may enlarge a part twice. Up to level 2
    # nothing is cropped or turned, so that masks need be no larger than the network sees them.
    max_side = 2 * args.max_size if args.augmentation > 1 else None
    fit = (training_sizes(args.augmentation, args.min_size)[-1], args.max_size) if args.augmentation < 3 else None
    images = CocoImages(data, transform, seed=args.seed, max_side=max_side, fit=fit)
    return build_loader(images, collate_detection, device, args.workers, batch_sampler=KeyedBatches(sampler))


def build_eval_loader(data, device, *, workers=0):
    """This rank's share of the pictures, every world_size-th, one at a time: no padding, whatever their shapes."""
    images = CocoImages(data, with_targets=False)
    share = range(distributed.rank(), len(data.pictures), distributed.world_size())
    return build_loader(images, collate_detection, device, workers, sampler=share)


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


def checkpoint_state(network, step, best, args, data):
    """Everything that a run needs to go on, and that `evaluate.py` and `demo.py` need to use the network alone.

    best: the highest mask AP so far.
    """
    paths = {name: path and str(Path(path).absolute()) for name, path in data.paths.items()}
    return {
        "kind": "mask_rcnn",
        "best": best,
        "model": network.state_dict(),
        **step.state_dict(),
        "args": {**all_options(args), **paths},
        "network": network.options,
        "categories": [list(category) for category in data.train.categories],
        "view": data.train.view,
    }


def resume(state, path, network, step, data):
    """Continue from a checkpoint. Raises InputError if its classes are others, naming what differs."""
    saved = [tuple(category) for category in state["categories"]]
    if saved != list(data.train.categories):
        other = sorted(set(saved) ^ set(data.train.categories))[:4]
        raise InputError(f"{path} was trained on other classes, such as {other}; give the data it was started with")
    restore(state, path, ("model", network), (None, step))


def network_from_checkpoint(path, device, state=None):
    """The trained network of a mask_rcnn checkpoint, averaged where it is averaged, ready to detect; and its state.

    state: what `load_checkpoint` made of the path, where that is known already.
    """
    state = state or load_checkpoint(path, "mask_rcnn")
    with as_written(path, "get it again"):
        with Unfilled():
            network = MaskRCNN(**state["network"])
        network.load_state_dict(best_weights(state))
    categories = [[number, printable(name)] for number, name in state["categories"]]  # a checkpoint may be anybody's
    return network.to(device).eval(), {**state, "categories": categories}


def load_evaluation_data(args, trained_with, say, view):
    """`CocoData` that the options name, or else what the training evaluated on.

    Unreadable pictures are left out if `--skip-broken` is given or the training left them out. Those that the training
    evaluated on are read as its own were (`CocoData.view`), which it knows from more of them.
    """
    args.skip_broken = args.skip_broken or trained_with.get("skip_broken", False)
    if bool(args.images) != bool(args.annotations):
        raise InputError("--images and --annotations belong together: give both or neither")
    if args.images and args.data:
        raise InputError("give either --images and --annotations or --data, not all of them")
    images, annotations = args.images, args.annotations
    if args.data:
        images, annotations = _in_layout(args.data, "val", "--images and --annotations")
    elif not images:
        images, annotations = trained_with["val_images"], trained_with["val_annotations"]
    if images:
        is_own = Path(images).resolve() == Path(trained_with.get("val_images") or "").resolve()
        view = view if is_own else {}
        data = _read(annotations, images, args, upright=view.get("upright", True))
        for note in data.notes:
            say(note)
        (data,) = with_bits_in_use([data], say, view.get("bits"))
    elif trained_with["val_fraction"]:
        data = load_data(Namespace(**trained_with), say=lambda _: None).val
    else:
        raise InputError(f"{args.checkpoint} was trained without evaluation: give --images and --annotations")
    args.annotations = data.annotations_path  # metrics.json keeps it
    return without_broken(data, say) if args.skip_broken else data


def match_categories(categories, data, say):
    """The data's category for each label 1, 2, ... of the network, None where the data lacks it: matched by name.

    Where two have one name, the one of the same id is taken, else the first, as `read_coco` does for a training.
    """
    labels = list(enumerate(categories))[::-1]  # so that of two alike the first one counts
    by_name = {name: label for label, (_, name) in labels}
    by_both = {(number, name): label for label, (number, name) in labels}
    matched = [None] * len(categories)
    # The one of the same id stays, else the first of the same name.
    for category in sorted(reversed(data.categories), key=by_both.__contains__):
        label = by_both.get(category, by_name.get(category.name))
        if label is not None:
            matched[label] = category
    if not any(matched):
        listed = [", ".join(category[1] for category in some[:8]) for some in (categories, data.categories)]
        raise InputError(
            f"{data.annotations_path}: the network knows {listed[0]}, the annotations are of {listed[1]}; "
            "no class has the same name: give annotations of its classes"
        )
    unknown = [category.name for category in data.categories if category not in matched]
    if unknown:
        say(f"left out, since the network does not know them: {', '.join(unknown)}")
    return matched
