"""Evaluate a trained network: what kind it is stands in its checkpoint.

ReID: CMC, mAP, mINP, re-ranking, features, rank list; on the data that it was
trained on, and on other data (cross-domain):
    python evaluate.py runs/NAME/best.pth --rerank
    python evaluate.py runs/NAME/best.pth --dataset market1501:PATH --flip
Several networks on several data sets, all against all, and what each costs:
    python evaluate.py runs/A/best.pth runs/B/best.pth \\
        --dataset market1501:PATH mvb:PATH --complexity
Where the network looks, and its embeddings on a plane:
    python evaluate.py runs/NAME/best.pth --activation-map --embedding-plot
The floor that a ReID network must beat, the pixels themselves:
    python evaluate.py --raw-pixels
Weights that another project published:
    python evaluate.py FILE --backbone osnet_x0_25 --dataset market1501:PATH
Mask R-CNN: the COCO numbers of boxes and masks, a table of classes, COCO result
files, precision over recall, pictures:
    python evaluate.py runs/NAME/best.pth
    python evaluate.py runs/NAME/best.pth --images FOLDER --annotations FILE
A table of all runs and evaluations below a folder:
    python evaluate.py --summary runs
The network for production, any batch size; or the checkpoint without what only
training needs (Mask R-CNN, too):
    python evaluate.py runs/NAME/best.pth --export onnx --output bags.onnx
    python evaluate.py runs/NAME/best.pth --export weights
All GPUs of a machine, or of several (see run_ddp.sh):
    bash run_ddp.sh evaluate.py runs/NAME/best.pth
    NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash run_ddp.sh evaluate.py ...

Everything goes to <--output>/<data set>, without --output beside the
checkpoint; of several networks or sets to <--output>/all-against-all. A folder
that exists is never overwritten, the next free number is added; the files that
--save-features and --export name are replaced.
"""

import argparse
import sys
from pathlib import Path

from core.engine import options


def get_parser():
    parser = options.Parser(__doc__)
    parser.add_argument("checkpoint", nargs="*", help="runs/NAME/best.pth, or weights that another project published")
    parser.add_argument("--raw-pixels", action="store_true", help="ReID without a network: the pixels themselves")
    parser.add_argument("--summary", metavar="FOLDER", help="no network: a table of all runs below it")
    parser.add_argument(
        "--export", choices=("onnx", "torchscript", "weights"), help="no evaluation: write this, to --output FILE"
    )
    parser.add_argument(
        "--output",
        help="folder for the results (default: the checkpoint's path without .pth, or runs/raw-pixels); of --export "
        "a file",
    )
    group = options.add_reid_data_options(parser)
    group.description = (
        "by default as in the checkpoint: --height and --width (both 64 for\n"
        "--raw-pixels), --val-fraction; --dataset and --data where neither is given.\n"
        "--dataset takes several, NAME:PATH each; put the checkpoints before it"
    )
    dataset = next(action for action in group._group_actions if action.dest == "dataset")
    dataset.nargs, dataset.metavar = "+", "NAME[:PATH]"
    group = options.add_reid_evaluation_options(parser)
    group.description = "by default as in the checkpoint: --distance (euclidean for --raw-pixels)"
    parser.set_defaults(height=None, width=None, distance=None, val_fraction=None)
    group = parser.add_argument_group("answers of ReID")
    group.add_argument("--feature", choices=["before", "after"], default="after", help="the neck: what is compared")
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
        help="sheet of where each branch looks in N queries (default: none; 8 without N); put the checkpoint first, "
        "or it is taken for N",
    )
    group.add_argument("--embedding-plot", action="store_true", help="the embeddings on a plane, by identity")
    group.add_argument(
        "--complexity", action="store_true", help="also parameters, multiply-adds, memory and speed of embedding"
    )
    group = parser.add_argument_group("Mask R-CNN", "data by --data ROOT, too: the val part in the layout of COCO 2017")
    group.add_argument("--images", metavar="FOLDER", help="pictures (default: those that its training evaluated on)")
    group.add_argument("--annotations", metavar="FILE", help="their annotations, COCO JSON with masks")
    group.add_argument("--predictions", type=options.non_negative_int, default=8, help="pictures drawn with instances")
    group.add_argument("--score", type=options.fraction, default=0.5, help="of the instances drawn, at least")
    options.add_published_options(parser)
    options.add_device_options(parser)
    return parser


if __name__ == "__main__":
    options.answer_help(get_parser())  # before torch is imported, which takes seconds

import torch

from core.data.coco import coco_ground_truth
from core.engine import coco_evaluation, detection, distributed, reid, reid_evaluation, reid_pictures
from core.engine.checkpoint import open_run, save_checkpoint, weights_alone
from core.engine.complexity import complexity
from core.engine.detection_pictures import draw_predictions
from core.engine.export import SUFFIXES, export_network
from core.engine.published import load_state
from core.engine.summary import summarise_runs
from core.engine.tables import as_json, write_texts
from core.errors import InputError
from core.files import make_folder
from core.models.reid import ReIDOutput
from core.retrieval.expansion import expand_queries
from core.visualize.instances import precision_recall_curves

# What has no effect is refused, not ignored: options of a network of the other kind, and of a step that isn't taken.
EXPANSION_OPTIONS = ("expansion_k", "expansion_alpha")
RERANK_OPTIONS = ("k1", "k2", "lambda_value")
REID_OPTIONS = ("backbone", "model", "dataset", "height", "width", "protocol", "distance", "eval_batch_size")
REID_OPTIONS += ("feature", "flip", "query_expansion", *EXPANSION_OPTIONS, "rerank", *RERANK_OPTIONS, "save_features")
REID_OPTIONS += ("val_fraction", "rank_list", "activation_map", "embedding_plot", "complexity")
REID_OPTIONS += ("false_accept_rate", "false_accept_of_others")
DETECTION_OPTIONS = ("images", "annotations", "predictions", "score")
ALWAYS = ("output", "device", "timeout", "workers")
SUMMARY_OPTIONS = ("summary", *ALWAYS)
EXPORT_OPTIONS = ("checkpoint", "export", "feature", "backbone", "model", *ALWAYS)


class RawPixels(torch.nn.Module):
    """The floor: a picture's own pixels as its embedding, (B, 3, H, W) -> (B, 3 * H * W)."""

    def __init__(self, height, width):
        super().__init__()
        self.embedding_dim = 3 * height * width

    def forward(self, images):
        return ReIDOutput(images.flatten(1), [], [], None)


def main(args):
    device = distributed.setup(args.device, args.timeout)
    say = print if distributed.is_main() else lambda _: None
    if args.summary:
        refuse(args, set(vars(args)) - set(SUMMARY_OPTIONS), "without effect beside --summary; leave it out")
        return summarise_folder(args, say)
    if args.raw_pixels == bool(args.checkpoint):
        raise InputError("give either a checkpoint, e.g. runs/NAME/best.pth, or --raw-pixels")
    state = read_state(args.checkpoint[0], args, say, "reid", "mask_rcnn") if args.checkpoint else None
    is_detection = state is not None and state["kind"] == "mask_rcnn"
    if len(args.checkpoint) > 1 and (is_detection or args.export):
        raise InputError(f"{args.checkpoint[0]} is taken by itself here: several checkpoints are for evaluating ReID")
    if args.export:
        refuse(args, set(vars(args)) - set(EXPORT_OPTIONS), "without effect beside --export; leave it out")
        if args.export == "weights":
            refuse(args, ["feature"], "without effect beside --export weights; leave it out")
        distributed.on_main(lambda: export(args, state, device))
    elif is_detection:
        refuse(args, REID_OPTIONS, "not an option for a network of Mask R-CNN; leave it out")
        args.checkpoint = args.checkpoint[0]
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


def read_state(path, args, say, *kinds):
    """A checkpoint, or one made of what another project published."""
    state = load_state(path, *kinds, backbone=args.backbone, model=args.model)
    if "message" in state:
        say(state["message"])
    return state


def with_options(args, **values):
    return argparse.Namespace(**{**vars(args), **values})


def summarise_folder(args, say):
    table = distributed.on_main(lambda: summarise_runs(args.summary))
    folder, _ = open_run(args.output or args.summary, "summary")
    distributed.on_main(lambda: write_texts(folder, table.files("summary")))
    say(f"{table.text()}\nwritten to {folder}")


def export(args, state, device):
    """One file: the network for production, or its weights as a small checkpoint."""
    if state["kind"] == "mask_rcnn" and args.export != "weights":
        raise InputError(f"--export {args.export} is for ReID: {args.checkpoint[0]} is a Mask R-CNN; use weights")
    path = Path(args.output or Path(args.checkpoint[0]).with_suffix(SUFFIXES[args.export]))
    make_folder(path.parent)
    if args.export == "weights":
        save_checkpoint(path, weights_alone(state))
        return print(f"written to {path} ({path.stat().st_size / 1e6:.1f} MB), a checkpoint that can't be resumed")
    network, _ = reid.network_from_checkpoint(args.checkpoint[0], device, state=state)
    network.embed = args.feature
    print(export_network(path, args.export, network, state, device))


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


def evaluate_reid(args, state, device, say):
    """Each network on each data set; of more than one pair a table of all against all."""
    check_reid_options(args)
    if args.val_fraction is None:  # as where it was trained, so that what it learned from is not asked for
        args.val_fraction = (state["args"] if state else {}).get("val_fraction", options.VAL_FRACTION)
    networks = []
    for path in args.checkpoint or [None]:
        state = read_state(path, args, say, "reid") if networks else state  # the first was read already
        own = with_options(args, checkpoint=path)
        network = load_network(own, state, device)
        if args.feature == "before" and not has_neck(network):
            raise InputError(f"--feature before: {path} has no neck, before and after it are the same: leave it out")
        network.embed = args.feature
        networks.append((own, network, state and state["normalisation"]))
    sets = reid_evaluation.load_data_sets(args, [(own.dataset, own.data, own.protocol) for own, *_ in networks], say)
    is_one = len(networks) == len(sets) == 1
    if args.rerank and any(data.protocol == "vehicleid" for data in sets.values()):
        raise InputError(
            "--rerank needs a query and a gallery, under protocol vehicleid they are one set: leave it out"
        )
    if args.save_features and not is_one:
        raise InputError("--save-features names one file: give one checkpoint and one data set, or leave it out")
    names = reid_evaluation.names_of_networks(args.checkpoint)
    together = None if is_one else open_run(args.output or "runs", "all-against-all")[0]
    comparison, costs = {name: {} for name in names}, {}
    for name, (own, network, normalisation) in zip(names, networks, strict=True):
        if args.complexity and distributed.is_main():
            size = (own.height, own.width)
            costs[name] = complexity(network, size, device, batch_size=args.eval_batch_size, amp=args.amp)
            print(f"{name}: {costs[name]}; on {device.type}, {args.eval_batch_size} pictures in a batch")
        beside = Path(own.checkpoint).with_suffix("") if own.checkpoint else "runs/raw-pixels"
        for set_name, data in sets.items():
            own = with_options(own, dataset=data.name, data=data.root, protocol=data.protocol)  # for metrics.json
            folder, _ = open_run(args.output or beside if is_one else together / name, set_name)
            say(f"{own.checkpoint or 'raw pixels'} on {data.name} in {data.root}, protocol {data.protocol}")
            say(reid.describe(data))
            results = evaluate_pair(network, data, normalisation, folder, costs.get(name), own, device)
            comparison[name][set_name] = results
    if together and distributed.is_main():
        reid_evaluation.write_comparison(together, comparison, costs, args)
        print(f"{reid_evaluation.comparison_table(comparison, costs).text()}\nwritten to {together}")


def has_neck(network):
    necks = [module for name, module in network.named_modules() if name.endswith("neck")]
    return any(isinstance(neck, torch.nn.BatchNorm1d) for neck in necks)


def check_reid_options(args):
    if args.raw_pixels and (args.activation_map or args.feature == "before"):
        raise InputError("--activation-map and --feature need a network, and raw pixels have none: leave it out")
    if not args.rerank:
        refuse(args, RERANK_OPTIONS, "without effect; give --rerank, too, or leave it out")
    if not args.query_expansion:
        refuse(args, EXPANSION_OPTIONS, "without effect; give --query-expansion, too, or leave it out")


def evaluate_pair(network, data, normalisation, folder, cost, args, device):
    """A network on a data set: how it was asked -> `RankingResult`; rank 0 prints, writes and draws."""
    loaders = reid.query_gallery_loaders(args, data, device, normalisation)
    query, gallery = reid.extract_query_gallery(network, loaders, device, amp=args.amp, flip=args.flip)
    how = ("flip" if args.flip else "plain") + ", before the neck" * (args.feature == "before")
    # Of the features as they are: `demo.py`, whose --threshold it is, has no neighbours to average them with.
    threshold = reid.threshold(query, gallery, data, args)
    if args.save_features and distributed.is_main():
        reid_evaluation.save_features(args.save_features, query, gallery, data)
    if args.query_expansion:
        query, gallery = expand_queries(query, gallery, args.expansion_k, args.expansion_alpha)
        how += " + expansion"
    results = {how: reid.rank_embeddings(query, gallery, data, args.distance)}
    if not distributed.is_main():
        return results
    if args.rerank:
        results[f"{how} + re-ranking"] = reid_evaluation.re_ranked(query, gallery, data, args)
    print(reid_evaluation.metrics_table(results).text())
    if threshold:
        otherwise = " and ".join(["--flip"] * args.flip + ["--feature before"] * (args.feature == "before"))
        print(f"{threshold}{f'; all with {otherwise}, which demo.py does without' if otherwise else ''}")
    reid_evaluation.write_results(folder, results, threshold, cost, args)
    if args.rank_list:
        path = folder / "rank_list.png"
        reid_pictures.draw_rank_list(path, query, gallery, data, args.distance, args.rank_list)
    if args.embedding_plot:
        reid_pictures.draw_embeddings(folder / "embeddings.png", query, gallery, data, args.distance)
    if args.activation_map:
        path, images = folder / "activation_map.png", loaders[0].dataset
        reid_pictures.draw_activations(path, network, images, device, args.activation_map, normalisation)
    print(f"written to {folder}")
    return results


# Mask R-CNN


def evaluate_detection(args, state, device, say):
    network, _ = detection.network_from_checkpoint(args.checkpoint, device, state=state)
    data = detection.load_evaluation_data(args, state["args"], say, state.get("view", {}))
    categories = detection.match_categories(state["categories"], data, say)
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
        numbers = {"results": result.metrics, "classes": [row._asdict() for row in result.per_class]}
        write_texts(folder, {"table.txt": text, "metrics.json": as_json({**numbers, "args": vars(args)})})
        names = [row.name for row in result.per_class]
        precision_recall_curves(folder / "precision_recall.png", result.precision, names)
        if args.predictions:
            how = {"amp": args.amp, "score": args.score, "pictures": args.predictions}
            path = folder / "predictions"
            draw_predictions(path, network, loader.dataset, categories, device, **how)
        print(f"written to {folder}")


if __name__ == "__main__":
    distributed.run_script(lambda argv: main(options.parse(get_parser(), argv=argv)), sys.argv[1:])
