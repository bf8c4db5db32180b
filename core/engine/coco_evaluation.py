"""The COCO evaluation of boxes and masks, shared over ranks: pycocotools matches and accumulates, this file hands it
its part of the pictures and puts the parts together.

The 12 numbers are those of COCO's detection challenge (cocodataset.org/#detection-eval): average precision (AP) and
recall (AR), over IoU 0.50 to 0.95 where no other threshold is named, over areas below 32^2 (s), from 32^2 to 96^2 (m)
and above (l), with at most 1, 10 or 100 detections in a picture. A detection's area is that of its box where boxes are
measured, and that of its mask where masks are: so the two kinds of results are kept apart, here and in their files.
"""

import contextlib
import io
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from core.engine import distributed
from core.files import atomic_write
from core.layers.masks import paste_mask_chunks

IOU_TYPES = {"box": "bbox", "mask": "segm"}  # our names and those of pycocotools
COCO_NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
# Columns of a log, and what people call those that they follow; the rest is for log.csv alone.
FOLLOWED = ("mask_AP", "mask_AP50", "mask_AP75", "box_AP", "box_AP50")
METRIC_NAMES = {name: name.replace("_", " ") for name in FOLLOWED}
METRIC_NAMES |= {f"{kind}_{n}": None for kind in ("mask", "box") for n in COCO_NUMBERS if f"{kind}_{n}" not in FOLLOWED}


class ClassResult(NamedTuple):
    """What is measured of one class, in [0, 1]; nan where the class has no instance that counts."""

    name: str
    num_instances: int  # without crowds
    box_ap: float
    box_ap50: float
    mask_ap: float
    mask_ap50: float


class CocoResult(NamedTuple):
    """One evaluation, the same on every rank."""

    metrics: dict[str, float]  # box_AP, ..., mask_ARl: `COCO_NUMBERS` in [0, 1]; nan where there is nothing to measure
    per_class: list[ClassResult]  # in the order of category ids
    precision: dict[str, np.ndarray]  # "box", "mask": (10 IoUs, 101 recalls, K classes), nan for absent classes


def encode_detections(detections, image_size, image_id, categories):
    """The detections of one picture as COCO results: (box results, mask results), two lists of dicts.

    Args:
        detections: boxes (N, 4) in pixels, labels (N,) in 1..K, scores (N,), masks (N, 1, M, M) in [0, 1].
        image_size: (h, w) of the picture.
        categories: (category id, name) for each label 1, 2, ...; None: what is found of this class is left out.
    """
    chosen = [categories[label - 1] for label in detections["labels"].tolist()]
    kept = [number for number, category in enumerate(chosen) if category is not None]
    boxes, scores, masks = (detections[key][kept].float() for key in ("boxes", "scores", "masks"))
    boxes_xywh = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)  # (n, 4)
    found = [
        {"image_id": image_id, "category_id": chosen[number][0], "score": score}
        for number, score in zip(kept, scores.tolist(), strict=True)
    ]
    box_results = [{**one, "bbox": box} for one, box in zip(found, boxes_xywh.tolist(), strict=True)]
    segmentations = encode_masks(masks, boxes, image_size)
    mask_results = [{**one, "segmentation": mask} for one, mask in zip(found, segmentations, strict=True)]
    return box_results, mask_results


def encode_masks(masks, boxes, image_size):
    """Masks (N, 1, M, M) in [0, 1] pasted into their boxes (N, 4), as N run-length codes that fit into JSON."""
    height, width = image_size
    counts = [
        run_lengths(mask) for chunk in paste_mask_chunks(masks, boxes, image_size) for mask in chunk.cpu().numpy()
    ]
    codes = [rle.frPyObjects({"size": [height, width], "counts": one}, height, width) for one in counts]
    return [{"size": list(code["size"]), "counts": code["counts"].decode("ascii")} for code in codes]


def run_lengths(mask):
    """How many pixels in turn, column by column, are outside and inside of a mask (H, W) bool; outside comes first.

    What pycocotools' `encode` would count, without turning the whole picture into columns: only the places where the
    mask begins or ends are.
    """
    height, width = mask.shape
    rows, columns = np.divmod(np.flatnonzero(mask[1:] != mask[:-1]), width)
    below = columns * height + rows + 1  # places that differ from the one above them
    before = np.concatenate([[False], mask[-1, :-1]])  # (W,) a column goes on where the one before it ended
    top = np.flatnonzero(mask[0] != before) * height
    return np.diff(np.sort(np.concatenate([below, top])), prepend=0, append=mask.size).tolist()


def evaluate_detections(ground_truth, box_results, mask_results, image_ids):
    """The COCO numbers over the pictures of all ranks: a collective call, with the same result on every rank.

    Equal to the last digit to pycocotools in one process over all pictures, however they are shared.

    Args:
        ground_truth: pycocotools' `COCO` of the whole set; it is left as it is.
        box_results, mask_results: COCO results of this rank's pictures (see `encode_detections`).
        image_ids: this rank's pictures, with or without detections; every picture belongs to one rank.
    """
    image_ids = sorted(image_ids)
    evaluations = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for kind, results in (("box", box_results), ("mask", mask_results)):
            own = _match(ground_truth, results, image_ids, IOU_TYPES[kind])
            evaluations[kind] = _accumulate(distributed.gather_objects(own), ground_truth, IOU_TYPES[kind])
    metrics = {
        f"{kind}_{name}": value if value > -1 else math.nan
        for kind, evaluation in evaluations.items()
        for name, value in zip(COCO_NUMBERS, evaluation.stats.tolist(), strict=True)
    }
    precision = {kind: evaluation.eval["precision"][..., 0, -1] for kind, evaluation in evaluations.items()}
    precision = {kind: np.where(values > -1, values, np.nan) for kind, values in precision.items()}  # (10, 101, K)
    return CocoResult(metrics, _per_class(ground_truth, evaluations["box"].params.imgIds, precision), precision)


class _Matches(NamedTuple):
    """What matching leaves to be accumulated, as a few arrays: thousands of small dicts would travel slowly.

    E entries that are not empty, each of one category, area range and picture, with D detections and G instances
    between them. All that pycocotools asks of a match later on is whether there is one.
    """

    image_ids: list[int]  # all pictures of the rank
    where: np.ndarray  # (E, 3): index of category and of area range, image id
    num_detections: np.ndarray  # (E,)
    num_instances: np.ndarray  # (E,)
    scores: np.ndarray  # (D,)
    matched: np.ndarray  # (10, D) bool
    ignored: np.ndarray  # (10, D) bool
    instance_ignored: np.ndarray  # (G,) bool


def _match(ground_truth, results, image_ids, iou_type):
    """This rank's pictures matched with its results."""
    strange = {result["image_id"] for result in results} - set(image_ids)
    if strange:
        raise ValueError(f"detections of pictures that are not among those to evaluate: {sorted(strange)[:5]}")
    evaluation = COCOeval(*_own_part(ground_truth, results, image_ids, iou_type), iou_type)
    evaluation.evaluate()
    num_areas, num_images = len(evaluation.params.areaRng), len(image_ids)
    entries = []
    for number, entry in enumerate(evaluation.evalImgs):
        if entry is not None:
            rest, image = divmod(number, num_images)
            entries.append(((*divmod(rest, num_areas), image_ids[image]), entry))
    return _Matches(
        image_ids,
        np.array([where for where, _ in entries], dtype=np.int64).reshape(-1, 3),
        np.array([len(entry["dtScores"]) for _, entry in entries], dtype=np.int64),
        np.array([len(entry["gtIgnore"]) for _, entry in entries], dtype=np.int64),
        np.concatenate([np.zeros(0), *(entry["dtScores"] for _, entry in entries)]),
        np.concatenate([np.zeros((10, 0), bool), *(entry["dtMatches"] > 0 for _, entry in entries)], axis=1),
        np.concatenate([np.zeros((10, 0), bool), *(entry["dtIgnore"] for _, entry in entries)], axis=1),
        np.concatenate([np.zeros(0, bool), *(entry["gtIgnore"] > 0 for _, entry in entries)]),
    )


def _own_part(ground_truth, results, image_ids, iou_type):
    """Ground truth and results of some pictures as pycocotools holds them, in copies since it writes into both.

    Instances are numbered anew from 1: the number 0 means "no match" to pycocotools, and files have instances of id 0.
    """
    images = [ground_truth.imgs[image_id] for image_id in image_ids]
    instances = [instance for image_id in image_ids for instance in ground_truth.imgToAnns.get(image_id, ())]
    instances = [
        {**instance, "id": number, "iscrowd": instance.get("iscrowd", 0)}
        for number, instance in enumerate(instances, start=1)
    ]
    if iou_type == "bbox":
        areas = [result["bbox"][2] * result["bbox"][3] for result in results]
    else:
        # One at a time: pycocotools' area of a list overflows from 256 entries on, with numpy 2.
        areas = [int(rle.area(result["segmentation"])) for result in results]
    detections = [
        {**result, "id": number, "area": area, "iscrowd": 0}
        for number, (result, area) in enumerate(zip(results, areas, strict=True), start=1)
    ]
    categories = ground_truth.dataset["categories"]
    return _as_coco(images, instances, categories), _as_coco(images, detections, categories)


def _as_coco(images, annotations, categories):
    coco = COCO()
    coco.dataset = {"images": images, "annotations": annotations, "categories": categories}
    coco.createIndex()
    return coco


def _accumulate(parts, ground_truth, iou_type):
    """pycocotools' evaluation after `summarize`, from the `_Matches` of all ranks.

    Pictures are put in the order of their ids, in which one process would have met them: it decides between equal
    scores.
    """
    evaluation = COCOeval(None, None, iou_type)
    params = evaluation.params
    params.imgIds = sorted(image_id for part in parts for image_id in part.image_ids)
    params.catIds = sorted(ground_truth.getCatIds())
    position = {image_id: number for number, image_id in enumerate(params.imgIds)}
    num_areas, num_images = len(params.areaRng), len(params.imgIds)
    evaluation.evalImgs = [None] * (len(params.catIds) * num_areas * num_images)
    for part in parts:
        ends, instance_ends = np.cumsum(part.num_detections), np.cumsum(part.num_instances)
        columns = (part.where, part.num_detections, part.num_instances, ends, instance_ends)
        for (category, area, image_id), count, num_instances, end, instance_end in zip(*columns, strict=True):
            own = slice(end - count, end)
            evaluation.evalImgs[(category * num_areas + area) * num_images + position[image_id]] = {
                "dtScores": part.scores[own],
                "dtMatches": part.matched[:, own],
                "dtIgnore": part.ignored[:, own],
                "gtIgnore": part.instance_ignored[instance_end - num_instances : instance_end],
            }
    evaluation._paramsEval = params
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def _per_class(ground_truth, image_ids, precision):
    instances = [instance for image_id in image_ids for instance in ground_truth.imgToAnns.get(image_id, ())]
    counted = [instance["category_id"] for instance in instances if not instance.get("iscrowd", 0)]
    counts = dict(zip(*np.unique(counted, return_counts=True), strict=True)) if counted else {}
    rows = []
    for number, category_id in enumerate(sorted(ground_truth.getCatIds())):
        values = [
            float(part.mean())
            for kind in ("box", "mask")
            for part in (precision[kind][:, :, number], precision[kind][0, :, number])
        ]
        rows.append(ClassResult(ground_truth.cats[category_id]["name"], int(counts.get(category_id, 0)), *values))
    return rows


def summary_table(result):
    """The 12 numbers of boxes and of masks in per cent, for people."""
    head = " " * 5 + "".join(f"{name:>7}" for name in COCO_NUMBERS)
    rows = [
        f"{kind:<5}" + "".join(_percent(result.metrics[f"{kind}_{name}"], 7) for name in COCO_NUMBERS)
        for kind in IOU_TYPES
    ]
    return "\n".join([head, *rows])


def per_class_table(result):
    """A row for each class and one for all: number of instances, AP and AP50 of boxes and of masks in per cent.

    Classes without an instance are named above it.
    """
    metrics = [result.metrics[name] for name in ("box_AP", "box_AP50", "mask_AP", "mask_AP50")]
    total = ClassResult("all", sum(row.num_instances for row in result.per_class), *metrics)
    measured = [row for row in result.per_class if row.num_instances]
    absent = [row.name for row in result.per_class if not row.num_instances]
    names = ", ".join(absent[:8]) + (f" and {len(absent) - 8} more" if len(absent) > 8 else "")
    width = max(len("class"), *(len(row.name) for row in (*measured, total)))
    head = f"{'class':<{width}}{'instances':>11}{'box AP':>9}{'AP50':>7}{'mask AP':>10}{'AP50':>7}"
    rows = [
        f"{row.name:<{width}}{row.num_instances:>11}{_percent(row.box_ap, 9)}{_percent(row.box_ap50, 7)}"
        f"{_percent(row.mask_ap, 10)}{_percent(row.mask_ap50, 7)}"
        for row in (*measured, total)
    ]
    return "\n".join([f"without an instance, left out: {names}"] * bool(absent) + [head, *rows])


def _percent(fraction, width):
    return f"{'-' if math.isnan(fraction) else f'{100 * fraction:.1f}':>{width}}"


def write_results(folder, box_results, mask_results):
    """The results of all ranks as `detections_bbox.json` and `detections_segm.json`: a collective call, rank 0 writes.

    pycocotools' `COCO.loadRes` reads them, apart from an empty list, which it takes for a fault.
    """
    for name, results in (("detections_bbox.json", box_results), ("detections_segm.json", mask_results)):
        parts = distributed.gather_objects(results)
        if distributed.is_main():
            everything = sorted((one for part in parts for one in part), key=lambda one: one["image_id"])
            with atomic_write(Path(folder) / name) as file:
                file.write(json.dumps(everything).encode())
