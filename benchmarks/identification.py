"""Who is it? The identification rate over the objects of scenes that no training saw, with and without masks.

    python -m benchmarks.identification --data data/synthetic --segment runs/MASKS/best.pth --reid runs/REID/best.pth

The scenes are <data>/scenes/val2017, whose annotations carry the identity; the gallery is <data>/MVB_val/Image/gallery.
What the network finds is matched with the annotations by the IoU of the masks, 0.5 at least, the best pair first. Of
the objects whose identity is in the gallery the top-1 rate counts those whose nearest gallery picture is of their
identity: over all of them (an object that was not found is wrong), and over those found. `unknown` counts what lies
beyond the threshold of the checkpoint (or --threshold): strangers, who are not in the gallery, should, and others
should not; `accepted` are those within it that are also right.

    masks           what was found, cut out along its mask; gallery pictures likewise, by the same network
    boxes           what was found, by its whole box; gallery pictures by the whole box of what was found in them
    pictures        what was found, by its whole box; whole gallery pictures
    true masks      the annotated masks, in scenes and gallery: what perfect masks would give
    true boxes      the annotated boxes
"""

import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pycocotools import mask as rle
from tqdm import tqdm

from core.data.coco import coco_paths, encode_mask, read_coco
from core.data.coco_images import read_as_annotated
from core.data.images import read_image
from core.data.reid_datasets import load_reid_dataset
from core.engine import distributed, options
from core.errors import InputError
from core.files import atomic_write
from core.retrieval.distance import nearest
from recognition.cutouts import cut_out
from recognition.matching import LEAST_SCORE, embed, one_per_object, settle_threshold, subject
from recognition.networks import find_instances, load_detector, load_encoder

MIN_IOU = 0.5
WAYS = ("masks", "boxes", "pictures", "true masks", "true boxes")


class Scenes(NamedTuple):
    """The objects of all scenes, one row each: identities (N,) of the annotations, found (N,) bool; features, way ->
    (N, D), zeros where nothing was found. strays: way -> (M, D) of what was found and fits no annotation."""

    identities: np.ndarray
    found: np.ndarray
    features: dict
    strays: dict


def get_parser():
    parser = options.Parser(__doc__, "python -m benchmarks.identification")
    parser.add_argument("--data", default="data/synthetic", help="a set of baggage.synthetic")
    parser.add_argument("--segment", metavar="PATH", help="a Mask R-CNN (default: the newest under runs/)")
    parser.add_argument("--reid", metavar="PATH", help="a ReID network (default: the newest under runs/)")
    parser.add_argument(
        "--score", type=options.fraction, default=LEAST_SCORE, help="least score of what counts as found"
    )
    parser.add_argument("--threshold", type=options.non_negative_float, help="distance (default: the checkpoint's)")
    parser.add_argument("--scenes", type=options.positive_int, help="only so many (default: all)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there, too")
    options.add_device_options(parser, timeout=False)
    return parser


def match(found, annotated):
    """For each annotated mask the number of the found one that is it, or -1: pairs by falling IoU, each mask once."""
    matched = np.full(len(annotated), -1)
    if found and annotated:
        iou = rle.iou(found, annotated, [0] * len(annotated))  # (F, A)
        for flat in np.argsort(-iou, axis=None, kind="stable"):
            one, other = divmod(int(flat), len(annotated))
            if iou[one, other] < MIN_IOU:
                break
            if matched[other] < 0 and one not in matched:
                matched[other] = one
    return matched


def identities_of(annotations_path):
    """Annotation id -> identity, a field that COCO itself doesn't have."""
    annotations = json.loads(Path(annotations_path).read_text())["annotations"]
    if not all("identity" in one for one in annotations):
        raise InputError(f"{annotations_path}: annotations need an identity, the number in the gallery's file names")
    return {one["id"]: int(one["identity"]) for one in annotations}


def read_scenes(data, identity_of, detector, encoder, score):
    """`Scenes` of COCO data."""
    rows, numbers, strays = {way: [] for way in WAYS}, [], {way: [] for way in WAYS[:3]}
    found_flags = []
    for scene in tqdm(data.pictures, "scenes", unit="picture", disable=None):
        picture = read_as_annotated(scene.path, scene.width, scene.height, **data.view)
        annotated = [
            (one.box, encode_mask(one.segmentation, scene.width, scene.height), identity_of[one.id])
            for one in scene.annotations
        ]
        found = [(one["box"], one["rle"]) for one in one_per_object(find_instances(detector, picture, score)[0])]
        matched = match([mask for _, mask in found], [mask for _, mask, _ in annotated])
        by_way = {"masks": embed_boxes(encoder, picture, found, True), "boxes": embed_boxes(encoder, picture, found)}
        by_way["pictures"] = by_way["boxes"]
        for way, features in by_way.items():
            padded = torch.cat([features, torch.zeros(1, features.shape[1])])  # row -1: not found
            rows[way].append(padded[matched])
            strays[way].append(features[[number not in matched for number in range(len(found))]])
        rows["true masks"].append(embed_boxes(encoder, picture, annotated, True))
        rows["true boxes"].append(embed_boxes(encoder, picture, annotated))
        numbers += [identity for *_, identity in annotated]
        found_flags += (matched >= 0).tolist()
    features, strays = ({way: torch.cat(values) for way, values in part.items()} for part in (rows, strays))
    return Scenes(np.array(numbers), np.array(found_flags), features, strays)


def embed_boxes(encoder, picture, objects, with_masks=False):
    """(N, D) of objects (box, mask, ...) of a picture."""
    return embed(encoder, (cut_out(picture, box, mask if with_masks else None) for box, mask, *_ in objects))[0]


def read_gallery(samples, detector, encoder):
    """(identities (G,), way -> features (G, D), how many pictures nothing was found in)."""
    features, nothing = {way: [] for way in WAYS}, 0
    for sample in tqdm(samples, "gallery", unit="picture", disable=None):
        picture = read_image(sample.path)
        whole = ((0, 0, *picture.size), None)
        found = subject(picture, detector)
        nothing += found is None
        one = (found["box"], found["rle"]) if found else whole
        true = (sample.box, sample.mask) if sample.box else whole
        cuts = dict(zip(WAYS, ((one, True), (one, False), (whole, False), (true, True), (true, False)), strict=True))
        for way, (cut, with_masks) in cuts.items():
            features[way].append(embed_boxes(encoder, picture, [cut], with_masks))
    return (
        np.array([sample.id for sample in samples]),
        {way: torch.cat(rows) for way, rows in features.items()},
        nothing,
    )


def measure(way, scenes, gallery_ids, gallery, metric, threshold):
    """The numbers of one way, a dict of counts."""
    is_known = np.isin(scenes.identities, gallery_ids)  # (N,)
    is_there = scenes.found if way in scenes.strays else np.ones_like(scenes.found)
    distances, rows = (part[:, 0].numpy() for part in nearest(scenes.features[way], gallery, 1, metric))
    right = is_there & (gallery_ids[rows] == scenes.identities)
    counts = {"known": is_known.sum(), "known found": (is_known & is_there).sum(), "right": right.sum()}
    counts["strangers found"] = (~is_known & is_there).sum()
    if threshold is not None:
        is_unknown = is_there & (distances > threshold)
        counts["accepted"] = (right & ~is_unknown).sum()
        counts["known unknown"] = (is_known & is_unknown).sum()
        counts["strangers unknown"] = (~is_known & is_unknown).sum()
        if len(scenes.strays.get(way, ())):
            stray_distances = nearest(scenes.strays[way], gallery, 1, metric)[0]
            counts["strays unknown"] = (stray_distances > threshold).sum()
    counts["strays"] = len(scenes.strays.get(way, ()))
    return {name: int(count) for name, count in counts.items()}


def table(numbers):
    """For people: a row for each way."""
    head = f"{'':<12}{'known':>6}{'found':>7}{'right':>7}{'top-1, all':>12}{'of found':>10}"
    head += f"{'accepted':>10}{'unknown':>9}{'strangers unknown':>19}{'strays unknown':>16}"
    lines = [head]
    for way, one in numbers.items():
        found = one["known found"]
        line = f"{way:<12}{one['known']:>6}{found:>7}{one['right']:>7}"
        line += f"{percent(one['right'], one['known']):>12}{percent(one['right'], found):>10}"
        line += f"{one.get('accepted', '-'):>10}{one.get('known unknown', '-'):>9}"
        line += f"{one.get('strangers unknown', '-')} of {one['strangers found']}".rjust(19)
        line += f"{one.get('strays unknown', '-')} of {one['strays']}".rjust(16)
        lines.append(line)
    return "\n".join(lines)


def percent(part, whole):
    return f"{100 * part / whole:.1f} %" if whole else "-"


def main(args):
    device = distributed.setup(args.device)
    images, annotations = coco_paths(Path(args.data) / "scenes", "val")
    data = read_coco(annotations, images)
    data = data._replace(pictures=data.pictures[: args.scenes])
    identity_of = identities_of(annotations)
    detector, encoder = load_detector(args.segment, device, args.amp), load_encoder(args.reid, device, args.amp)
    threshold = settle_threshold(encoder, args.threshold)
    print(f"detector: {detector.message}\nencoder: {encoder.message}; {encoder.metric} distance, threshold {threshold}")

    start = time.perf_counter()
    gallery_ids, galleries, nothing = read_gallery(load_reid_dataset("mvb", args.data).gallery, detector, encoder)
    middle = time.perf_counter()
    scenes = read_scenes(data, identity_of, detector, encoder, args.score)
    seconds = {"gallery": round(middle - start, 1), "scenes": round(time.perf_counter() - middle, 1)}
    numbers = {way: measure(way, scenes, gallery_ids, galleries[way], encoder.metric, threshold) for way in WAYS}
    print(f"gallery: {len(gallery_ids)} pictures of {len(set(gallery_ids))} identities, nothing found in {nothing}")
    print(f"scenes: {len(data.pictures)} with {len(scenes.identities)} objects, {scenes.found.sum()} found")
    print(f"seconds: gallery {seconds['gallery']}, scenes {seconds['scenes']}, five ways each\n\n{table(numbers)}")
    if args.json:
        content = {"args": vars(args), "threshold": threshold, "seconds": seconds, "nothing_found": nothing}
        with atomic_write(args.json) as file:
            file.write(json.dumps({**content, "ways": numbers}, indent=2).encode())


if __name__ == "__main__":
    distributed.run_script(lambda argv: main(options.parse(get_parser(), argv=argv)), sys.argv[1:])
