"""Evaluate a trained network: what kind it is stands in its checkpoint.

ReID: CMC, mAP, mINP, re-ranking, features, rank list; on the data it was trained on, and on other data (cross-domain):
    python evaluate.py runs/NAME/best.pth --rerank
    python evaluate.py runs/NAME/best.pth --dataset market1501 --data PATH --flip --save-features features.npz
Where the network looks, and its embeddings on a plane:
    python evaluate.py runs/NAME/best.pth --activation-map --embedding-plot
The floor that a ReID network must beat, the pixels themselves:
    python evaluate.py --raw-pixels
Weights that another project published:
    python evaluate.py FILE --backbone osnet_x0_25 --dataset market1501 --data PATH
Mask R-CNN: the COCO numbers of boxes and masks, a table of classes, COCO result files, precision over recall, pictures:
    python evaluate.py runs/NAME/best.pth
    python evaluate.py runs/NAME/best.pth --images FOLDER --annotations FILE
All GPUs of a machine, or of several (see run_ddp.sh):
    bash run_ddp.sh evaluate.py runs/NAME/best.pth --data PATH
    NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash run_ddp.sh evaluate.py runs/NAME/best.pth

Everything goes to <--output>/<data set>, without --output beside the checkpoint; a folder that exists is never
overwritten, the next free number is added. --save-features alone names a file, which is replaced.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from core.data.coco import coco_ground_truth, coco_paths, read_coco
from core.engine import coco_evaluation, detection, detection_pictures, distributed, options, reid, reid_pictures
from core.engine.checkpoint import open_run
from core.engine.published import load_state
from core.errors import InputError
from core.files import atomic_write, make_folder
from core.models.reid import ReIDOutput
from core.retrieval.expansion import expand_queries
from core.retrieval.ranking import METRIC_NAMES, rank_queries, summarise
from core.retrieval.rerank import re_rank
from core.visualize.instances import precision_recall_curves

# What has no effect is refused, not ignored: options of a network of the other kind, and of a step that isn't taken.
EXPANSION_OPTIONS = ("expansion_k", "expansion_alpha")
RERANK_OPTIONS = ("k1", "k2", "lambda_value")
REID_OPTIONS = ("backbone", "model", "dataset", "height", "width", "protocol", "distance", "eval_batch_size", "flip")
REID_OPTIONS += ("query_expansion", *EXPANSION_OPTIONS, "rerank", *RERANK_OPTIONS, "save_features", "rank_list")
REID_OPTIONS += ("activation_map", "embedding_plot", "false_accept_rate")
DETECTION_OPTIONS = ("images", "annotations", "predictions", "score")


class RawPixels(torch.nn.Module):
    """The floor: a picture's own pixels as its embedding, (B, 3, H, W) -> (B, 3 * H * W)."""

    def __init__(self, height, width):
        super().__init__()
        self.embedding_dim = 3 * height * width

    def forward(self, images):
        return ReIDOutput(images.flatten(1), [], [], None)


def get_parser():
    parser = options.Parser(__doc__)
    parser.add_argument("checkpoint", nargs="?", help="runs/NAME/best.pth, or weights that another project published")
    parser.add_argument("--raw-pixels", action="store_true", help="ReID without a network: the pixels themselves")
    parser.add_argument(
        "--output", help="folder for the results (default: the checkpoint's path without .pth, or runs/raw-pixels)"
    )
    group = options.add_reid_data_options(parser)
    group.description = (
        "by default as in the checkpoint: --height and --width (both 64 for --raw-pixels), and --dataset and --data\n"
        "where neither is given"
    )
    group = options.add_reid_evaluation_options(parser)
    group.description = "by default as in the checkpoint: --distance (euclidean for --raw-pixels)"
    parser.set_defaults(height=None, width=None, distance=None)
    group = parser.add_argument_group("answers of ReID")
    group.add_argument("--flip", action="store_true", help="average with the embedding of the mirrored picture")
    group.add_argument("--query-expansion", action="store_true", help="average each feature with its neighbours")
    group.add_argument("--expansion-k", type=options.positive_int, default=5, help="neighbours, itself included")
    group.add_argument("--expansion-alpha", type=options.non_negative_float, default=3.0, help="of cosine ** alpha")
    group.add_argument("--rerank", action="store_true", help="also with k-reciprocal re-ranking (Zhong et al. 2017)")
    group.add_argument("--k1", type=options.positive_int, default=20, help="neighbours of re-ranking")
    group.add_argument("--k2", type=options.positive_int, default=6, help="neighbours averaged in re-ranking")
    group.add_argument(
        "--lambda", dest="lambda_value", type=options.fraction, default=0.3, help="share of the original distance"
    )
    group.add_argument("--save-features", metavar="FILE", help="features, ids, cameras and paths as one .npz file")
    group.add_argument("--rank-list", type=options.non_negative_int, default=8, help="queries on it; 0: no sheet")
    group.add_argument(
        "--activation-map",
        nargs="?",
        type=options.positive_int,
        const=8,
        default=0,
        metavar="N",
        help="sheet of where the last stage is active in N queries (default: none; 8 without N); put the checkpoint "
        "first, or it is taken for N",
    )
    group.add_argument("--embedding-plot", action="store_true", help="the embeddings on a plane, by identity")
    group = parser.add_argument_group("Mask R-CNN", "data by --data ROOT, too: the val part in the layout of COCO 2017")
    group.add_argument("--images", metavar="FOLDER", help="pictures (default: those that its training evaluated on)")
    group.add_argument("--annotations", metavar="FILE", help="their annotations, COCO JSON with masks")
    group.add_argument("--predictions", type=options.non_negative_int, default=8, help="pictures drawn with instances")
    group.add_argument("--score", type=options.fraction, default=0.5, help="of the instances drawn, at least")
    options.add_published_options(parser)
    options.add_device_options(parser)
    return parser


def main(args):
    device = distributed.setup(args.device, args.timeout)
    say = print if distributed.is_main() else lambda _: None
    if args.raw_pixels == (args.checkpoint is not None):
        raise InputError("give either a checkpoint, e.g. runs/NAME/best.pth, or --raw-pixels")
    how = {"backbone": args.backbone, "model": args.model}
    state = load_state(args.checkpoint, "reid", "mask_rcnn", **how) if args.checkpoint else None
    if state and "message" in state:
        say(state["message"])
    if state and state["kind"] == "mask_rcnn":
        refuse(args, REID_OPTIONS, "not an option for a network of Mask R-CNN; leave it out")
        evaluate_detection(args, state, device, say)
    else:
        refuse(args, DETECTION_OPTIONS, "not an option for a network of ReID; leave it out")
        evaluate_reid(args, state, device, say)


def refuse(args, names, why):
    """Raises InputError where options are given that have no effect here."""
    parser = get_parser()
    given = [name for name in parser.given(args) if name in names]
    if given:
        raise InputError(f"{parser.as_typed(given)}: {why}")


def write_texts(folder, table, numbers, args):
    """What people read and what programs read: table.txt, metrics.json."""
    metrics = json.dumps({**numbers, "args": vars(args)}, indent=2)
    for name, text in (("table.txt", table), ("metrics.json", metrics)):
        with atomic_write(folder / name) as file:
            file.write((text + "\n").encode())


# ReID


def load_network(args, state, device):
    """The network to evaluate; options that the person left open are taken from its checkpoint."""
    if args.raw_pixels:
        args.height, args.width = args.height or 64, args.width or 64
        args.distance = args.distance or "euclidean"
        return RawPixels(args.height, args.width).to(device)
    network, _ = reid.network_from_checkpoint(args.checkpoint, device, state=state)
    args.height, args.width = args.height or state["input_size"][0], args.width or state["input_size"][1]
    args.distance = args.distance or state["distance"]
    if args.dataset is None and args.data is None:
        args.dataset, args.data = state["args"]["dataset"], state["args"]["data"]
        args.protocol = args.protocol or state["args"]["protocol"]
    return network


def save_features(path, query, gallery, data):
    """One .npz: features (N, D) float32, ids, cameras (N,) and paths of query and gallery; no pickled objects in it."""
    arrays = {}
    for name, features, samples in (("query", query, data.query), ("gallery", gallery, data.gallery)):
        ids, cameras = reid.labels_of(samples)
        arrays[f"{name}_features"] = features.cpu().numpy()
        arrays[f"{name}_ids"], arrays[f"{name}_cameras"] = ids.numpy(), cameras.numpy()
        arrays[f"{name}_paths"] = np.array([str(sample.path) for sample in samples])
    make_folder(Path(path).parent)
    with atomic_write(path) as file:
        np.savez(file, **arrays)


def re_ranked(query, gallery, data, args):
    """RankingResult with k-reciprocal re-ranking; the cosine distance is the Euclidean one of unit vectors."""
    if args.distance == "cosine":
        query, gallery = F.normalize(query), F.normalize(gallery)
    distance = re_rank(query, gallery, args.k1, args.k2, args.lambda_value)  # (Q, G)
    ranks = rank_queries(distance, reid.labels_of(data.query), reid.labels_of(data.gallery), data.protocol)
    return summarise(ranks, data.protocol)


def table(results):
    """Rows of metrics in per cent, for people."""
    width = max(map(len, results))
    head = " " * width + "".join(f"{name:>9}" for name in METRIC_NAMES.values())
    rows = [
        f"{name:<{width}}" + "".join(f"{100 * value:>9.2f}" for value in result.metrics().values())
        for name, result in results.items()
    ]
    return "\n".join([head, *rows])


def evaluate_reid(args, state, device, say):
    if args.raw_pixels and args.activation_map:
        raise InputError("--activation-map needs a network, and raw pixels have none: leave it out")
    if not args.rerank:
        refuse(args, RERANK_OPTIONS, "without effect; give --rerank, too, or leave it out")
    if not args.query_expansion:
        refuse(args, EXPANSION_OPTIONS, "without effect; give --query-expansion, too, or leave it out")
    network = load_network(args, state, device)
    data = reid.load_data(args, say)
    args.dataset, args.data, args.protocol = data.name, data.root, data.protocol  # metrics.json keeps them
    if args.rerank and args.protocol == "vehicleid":
        raise InputError(
            "--rerank needs a query and a gallery, under protocol vehicleid they are one set: leave it out"
        )
    output = args.output or (Path(args.checkpoint).with_suffix("") if args.checkpoint else "runs/raw-pixels")
    folder, _ = open_run(output, args.dataset)
    say(f"{args.checkpoint or 'raw pixels'} on {args.dataset} in {args.data}, protocol {args.protocol}")
    say(reid.describe(data))

    normalisation = state and state["normalisation"]
    loaders = reid.query_gallery_loaders(args, data, device, normalisation)
    query, gallery = reid.extract_query_gallery(network, loaders, device, amp=args.amp, flip=args.flip)
    how = "flip" if args.flip else "plain"
    # Of the features as they are: `demo.py`, whose --threshold it is, has no neighbours to average them with.
    threshold = reid.threshold(query, gallery, data, args)
    if args.save_features and distributed.is_main():
        save_features(args.save_features, query, gallery, data)
    if args.query_expansion:
        query, gallery = expand_queries(query, gallery, args.expansion_k, args.expansion_alpha)
        how += " + expansion"
    results = {how: reid.rank_embeddings(query, gallery, data, args.distance)}
    if distributed.is_main():
        if args.rerank:
            results[f"{how} + re-ranking"] = re_ranked(query, gallery, data, args)
        print(table(results))
        if threshold:
            print(f"{threshold}{'; all with --flip, which demo.py does without' * args.flip}")
        write_reid_results(folder, results, threshold, query, gallery, data, args)
        if args.activation_map:
            path = folder / "activation_map.png"
            images = loaders[0].dataset
            reid_pictures.draw_activations(path, network, images, device, args.activation_map, normalisation)
        print(f"written to {folder}")


def write_reid_results(folder, results, threshold, query, gallery, data, args):
    """The table, every number as JSON, and the pictures that need no network."""
    numbers = {
        name: {**result.metrics(), "cmc": result.cmc.tolist(), "num_valid_queries": result.num_valid_queries}
        for name, result in results.items()
    }
    threshold = threshold and no_nan(threshold._asdict())
    write_texts(folder, table(results), {"results": numbers, "threshold": threshold}, args)
    if args.rank_list:
        path = folder / "rank_list.png"
        reid_pictures.draw_rank_list(path, query, gallery, data, args.distance, args.rank_list)
    if args.embedding_plot:
        reid_pictures.draw_embeddings(folder / "embeddings.png", query, gallery, data, args.distance)


# Mask R-CNN


def evaluate_detection(args, state, device, say):
    network, _ = detection.network_from_checkpoint(args.checkpoint, device, state=state)
    data = load_detection_data(args, state["args"], say, state.get("view", {}))
    categories = match_categories(state["categories"], data, say)
    output = args.output or Path(args.checkpoint).with_suffix("")
    folder, _ = open_run(output, Path(data.annotations_path).stem)
    instances = sum(len(picture.annotations) for picture in data.pictures)
    say(f"{args.checkpoint} on {data.annotations_path}: {len(data.pictures)} pictures with {instances} instances")

    loader = detection.build_eval_loader(data, device, workers=args.workers)
    box_results, mask_results, image_ids = detection.predict(network, loader, categories, device, amp=args.amp)
    truth = coco_ground_truth(data)
    # What the network was never told of is not measured.
    known = {category.id for category in categories if category}
    truth.dataset["categories"] = [one for one in truth.dataset["categories"] if one["id"] in known]
    result = coco_evaluation.evaluate_detections(truth, box_results, mask_results, image_ids)
    coco_evaluation.write_results(folder, box_results, mask_results)
    if distributed.is_main():
        text = f"{coco_evaluation.summary_table(result)}\n\n{coco_evaluation.per_class_table(result)}"
        print(text)
        numbers = {"results": no_nan(result.metrics), "classes": [no_nan(row._asdict()) for row in result.per_class]}
        write_texts(folder, text, numbers, args)
        precision_recall_curves(
            folder / "precision_recall.png", result.precision, [row.name for row in result.per_class]
        )
        if args.predictions:
            how = {"amp": args.amp, "score": args.score, "pictures": args.predictions}
            detection_pictures.draw_predictions(
                folder / "predictions", network, loader.dataset, categories, device, **how
            )
        print(f"written to {folder}")


def load_detection_data(args, trained_with, say, view):
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
        images, annotations = coco_paths(args.data, "val")
    elif not images:
        images, annotations = trained_with["val_images"], trained_with["val_annotations"]
    if images:
        is_own = Path(images).resolve() == Path(trained_with.get("val_images") or "").resolve()
        view = view if is_own else {}
        data = read_coco(annotations, images, check_sizes=not args.skip_broken, upright=view.get("upright", True))
        for note in data.notes:
            say(note)
        (data,) = detection.with_bits_in_use([data], say, view.get("bits"))
    elif trained_with["val_fraction"]:
        data = detection.load_data(argparse.Namespace(**trained_with), say=lambda _: None).val
    else:
        raise InputError(f"{args.checkpoint} was trained without evaluation: give --images and --annotations")
    args.annotations = data.annotations_path  # metrics.json keeps it
    return detection.without_broken(data, say) if args.skip_broken else data


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


def no_nan(numbers):
    """JSON knows no nan: null is a number that could not be measured."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in numbers.items()}


if __name__ == "__main__":
    distributed.run_script(lambda argv: main(options.parse(get_parser(), argv=argv)), sys.argv[1:])
