"""An evaluation of ReID networks: on which data sets, re-ranked, and what it leaves: tables, metrics.json, features."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import torch.nn.functional as F

from core.engine.reid import labels_of, load_data
from core.engine.tables import Table, as_json, write_texts
from core.errors import InputError
from core.files import atomic_write, distinct_names, make_folder
from core.retrieval.ranking import METRIC_NAMES, rank_queries, summarise
from core.retrieval.rerank import re_rank


def load_data_sets(args, trained_on, say):
    """Name -> `ReIDData` of each set: those of `--dataset NAME[:PATH] ...`, or else those of `trained_on`.

    Args:
        trained_on: (dataset, data, protocol) of each network.
    """
    wanted = trained_on
    if args.dataset:
        if args.data and (len(args.dataset) > 1 or ":" in args.dataset[0]):
            raise InputError("--data is the folder of a single --dataset NAME: write --dataset NAME:PATH NAME:PATH")
        named = [text.partition(":") for text in args.dataset]
        wanted = [(name, path or args.data, args.protocol) for name, _, path in named]
    sets = []
    for dataset, data, protocol in {str(one): one for one in wanted}.values():
        own = {"dataset": dataset, "data": data, "protocol": protocol}
        sets.append(load_data(Namespace(**{**vars(args), **own}), say))
    names = [data.name for data in sets]
    names = [Path(str(one.root)).name if names.count(one.name) > 1 else one.name for one in sets]  # of one layout
    return dict(zip(distinct_names(f"{name}.set" for name in names), sets, strict=True))


def names_of_networks(checkpoints):
    """A name for each: its run folder's, and the file's where that says more than "best"; others as their file."""
    paths = [Path(path).absolute() for path in checkpoints]
    run_names = {"best": "{0}", "last": "{0}-last"}
    names = [run_names.get(path.stem, "{1}").format(path.parent.name, path.stem) for path in paths]
    return distinct_names(f"{name}.pth" for name in names) or ["raw pixels"]


def re_ranked(query, gallery, data, args):
    """RankingResult with k-reciprocal re-ranking; the cosine distance is the Euclidean one of unit vectors."""
    if args.distance == "cosine":
        query, gallery = F.normalize(query), F.normalize(gallery)
    distance = re_rank(query, gallery, args.k1, args.k2, args.lambda_value)  # (Q, G)
    ranks = rank_queries(distance, labels_of(data.query), labels_of(data.gallery), data.protocol)
    return summarise(ranks, data.protocol)


def metrics_table(results):
    """`Table` of the metrics in per cent. results: how it was asked -> `RankingResult`."""
    rows = [[how, *(100 * value for value in result.metrics().values())] for how, result in results.items()]
    return Table(["", *METRIC_NAMES.values()], rows)


def comparison_table(comparison, costs):
    """`Table` of all against all: a row for each network and way to ask it, mAP and Rank-1 on each data set.

    comparison: network -> data set -> results as in `metrics_table`. costs: network -> `Complexity`; may be empty.
    """
    rows = {}
    for network, by_set in comparison.items():
        for name, results in by_set.items():
            for how, result in results.items():
                row = rows.setdefault((network, how), {"": network + f", {how}" * (how != "plain")})
                row |= {f"{name} mAP": 100 * result.mean_ap, f"{name} Rank-1": 100 * result.rank(1)}
    for (network, _), row in rows.items():
        row |= costs[network].columns() if costs else {}
    return Table(list(next(iter(rows.values()))), [list(row.values()) for row in rows.values()])


def write_results(folder, results, threshold, cost, args):
    """table.txt and metrics.json of a network on a data set."""
    numbers = {"results": _numbers(results), "threshold": threshold and threshold._asdict()}
    numbers |= {"complexity": cost._asdict()} if cost else {}
    texts = {"table.txt": metrics_table(results).text(), "metrics.json": as_json({**numbers, "args": vars(args)})}
    write_texts(folder, texts)


def write_comparison(folder, comparison, costs, args):
    """The table of all against all as text, CSV and LaTeX, and metrics.json with everything."""
    numbers = {"complexity": {name: cost._asdict() for name, cost in costs.items()}, "args": vars(args)}
    numbers["results"] = {
        network: {name: _numbers(results) for name, results in by_set.items()} for network, by_set in comparison.items()
    }
    write_texts(folder, {**comparison_table(comparison, costs).files("table"), "metrics.json": as_json(numbers)})


def _numbers(results):
    return {
        how: {**result.metrics(), "cmc": result.cmc.tolist(), "num_valid_queries": result.num_valid_queries}
        for how, result in results.items()
    }


def save_features(path, query, gallery, data):
    """One .npz: features (N, D) float32, ids, cameras (N,) and paths of query and gallery; no pickled objects in it."""
    arrays = {}
    for name, features, samples in (("query", query, data.query), ("gallery", gallery, data.gallery)):
        ids, cameras = labels_of(samples)
        arrays[f"{name}_features"] = features.cpu().numpy()
        arrays[f"{name}_ids"], arrays[f"{name}_cameras"] = ids.numpy(), cameras.numpy()
        arrays[f"{name}_paths"] = np.array([str(sample.path) for sample in samples])
    make_folder(Path(path).parent)
    with atomic_write(path) as file:
        np.savez(file, **arrays)
