"""Evaluate a trained network on any data set: CMC, mAP, mINP, re-ranking, features, rank list.

The data that the network was trained on, and other data (cross-domain):
    python evaluate.py runs/NAME/best.pth --rerank
    python evaluate.py runs/NAME/best.pth --dataset market1501 --data PATH --flip --save-features features.npz
All GPUs of a machine, or of several (see run_ddp.sh):
    bash run_ddp.sh evaluate.py runs/NAME/best.pth --dataset msmt17 --data PATH
    NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash run_ddp.sh evaluate.py runs/NAME/best.pth
The floor that a network must beat, the pixels themselves:
    python evaluate.py --raw-pixels

table.txt, metrics.json and rank_list.png go to <--output>/<data set>, without --output beside the checkpoint; a folder
that exists is never overwritten, the next free number is added.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from core.engine import distributed, options, reid, reid_pictures
from core.engine.checkpoint import open_run
from core.errors import InputError
from core.files import atomic_write, make_folder
from core.models.reid import ReIDOutput
from core.retrieval.expansion import expand_queries
from core.retrieval.ranking import evaluate_ranking
from core.retrieval.rerank import re_rank


class RawPixels(torch.nn.Module):
    """The floor: a picture's own pixels as its embedding, (B, 3, H, W) -> (B, 3 * H * W)."""

    def __init__(self, height, width):
        super().__init__()
        self.feature_dim = 3 * height * width

    def forward(self, images):
        return ReIDOutput(images.flatten(1), [], [], None)


def get_parser():
    parser = options.Parser(__doc__)
    parser.add_argument("checkpoint", nargs="?", help="a ReID checkpoint, e.g. runs/NAME/best.pth")
    parser.add_argument("--raw-pixels", action="store_true", help="no network: evaluate the pixels themselves")
    options.add_reid_data_options(parser)
    # None: as in the checkpoint, or 64 x 64 for --raw-pixels.
    parser.set_defaults(height=None, width=None)
    options.add_reid_evaluation_options(parser)
    parser.set_defaults(distance=None)
    group = parser.add_argument_group("answers")
    group.add_argument("--flip", action="store_true", help="average with the embedding of the mirrored picture")
    group.add_argument("--query-expansion", action="store_true", help="average each feature with its neighbours")
    group.add_argument("--expansion-k", type=options.positive_int, default=5, help="neighbours, itself included")
    group.add_argument(
        "--expansion-alpha", type=options.non_negative_float, default=3.0, help="weight: cosine ** alpha"
    )
    group.add_argument("--rerank", action="store_true", help="also with k-reciprocal re-ranking (Zhong et al. 2017)")
    group.add_argument("--k1", type=options.positive_int, default=20, help="neighbours of re-ranking")
    group.add_argument("--k2", type=options.positive_int, default=6, help="neighbours averaged in re-ranking")
    group.add_argument(
        "--lambda", dest="lambda_value", type=options.fraction, default=0.3, help="share of the original distance"
    )
    group.add_argument("--save-features", metavar="FILE", help="features, ids, cameras and paths as one .npz file")
    group.add_argument(
        "--rank-list", type=options.non_negative_int, default=8, help="queries on the sheet; 0: no sheet"
    )
    group.add_argument("--output", help="folder for the results")
    options.add_device_options(parser)
    return parser


def load_network(args, device):
    """The network to evaluate; options that the person left open are taken from its checkpoint."""
    if args.raw_pixels == (args.checkpoint is not None):
        raise InputError("give either a checkpoint, e.g. runs/NAME/best.pth, or --raw-pixels")
    if args.raw_pixels:
        args.height, args.width = args.height or 64, args.width or 64
        args.distance = args.distance or "euclidean"
        return RawPixels(args.height, args.width).to(device)
    network, state = reid.network_from_checkpoint(args.checkpoint, device)
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
        ids, cameras = reid.labels(samples)
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
    query_ids, query_cameras = reid.labels(data.query)
    gallery_ids, gallery_cameras = reid.labels(data.gallery)
    return evaluate_ranking(distance, query_ids, gallery_ids, query_cameras, gallery_cameras, args.protocol)


def table(results):
    """Rows of metrics in per cent, for people."""
    width = max(map(len, results))
    head = " " * width + "".join(f"{name:>9}" for name in ("mAP", "mINP", "Rank-1", "Rank-5", "Rank-10"))
    rows = [
        f"{name:<{width}}" + "".join(f"{100 * value:>9.2f}" for value in reid.metrics(result).values())
        for name, result in results.items()
    ]
    return "\n".join([head, *rows])


def main(args):
    device = distributed.setup(args.device, args.timeout)
    say = print if distributed.is_main() else lambda _: None
    network = load_network(args, device)
    data = reid.load_data(args, say)
    if args.rerank and args.protocol == "vehicleid":
        raise InputError(
            "--rerank needs a query and a gallery, under protocol vehicleid they are one set: leave it out"
        )
    output = args.output or (Path(args.checkpoint).with_suffix("") if args.checkpoint else "runs/raw-pixels")
    folder, _ = open_run(output, args.dataset)
    say(f"{args.checkpoint or 'raw pixels'} on {args.dataset} in {args.data}, protocol {args.protocol}")
    say(reid.describe(data))

    loaders = reid.query_gallery_loaders(args, data, device)
    query, gallery = reid.extract_query_gallery(network, loaders, device, amp=args.amp, flip=args.flip)
    how = "flip" if args.flip else "plain"
    if args.save_features and distributed.is_main():
        save_features(args.save_features, query, gallery, data)
    if args.query_expansion:
        query, gallery = expand_queries(query, gallery, args.expansion_k, args.expansion_alpha)
        how += " + expansion"
    results = {how: reid.rank_embeddings(query, gallery, data, args.protocol, args.distance)}
    if distributed.is_main():
        if args.rerank:
            results[f"{how} + re-ranking"] = re_ranked(query, gallery, data, args)
        print(table(results))
        write_results(folder, results, query, gallery, data, args)
        print(f"written to {folder}")


def write_results(folder, results, query, gallery, data, args):
    """The table, every number as JSON, and the rank list."""
    numbers = {
        name: {**reid.metrics(result), "cmc": result.cmc.tolist(), "num_valid_queries": result.num_valid_queries}
        for name, result in results.items()
    }
    for name, text in (
        ("table.txt", table(results)),
        ("metrics.json", json.dumps({"results": numbers, "args": vars(args)}, indent=2)),
    ):
        with atomic_write(folder / name) as file:
            file.write((text + "\n").encode())
    if args.rank_list:
        path = folder / "rank_list.png"
        reid_pictures.draw_rank_list(path, query, gallery, data, args.protocol, args.distance, args.rank_list)


if __name__ == "__main__":
    distributed.run_script(lambda argv: main(options.parse(get_parser(), argv=argv)), sys.argv[1:])
