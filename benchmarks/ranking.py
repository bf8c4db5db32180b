"""CMC, mAP and mINP from features, beside a plain numpy implementation that sorts the gallery query by query.

    python -m benchmarks.ranking                 # 1,000 queries, 5,000 gallery images: seconds
    python -m benchmarks.ranking --market-scale  # 3,368 queries, 15,913 gallery images, 2,048 dimensions

Both start from the same random features and include the distances. Each runs in a process of its own; peak memory is
what the call adds to the features. The last lines compare the metrics.
"""

import argparse

import torch

from benchmarks.fresh_process import measure, print_table
from benchmarks.reference_retrieval import euclidean_distances, rank_metrics
from core.retrieval.ranking import evaluate_features


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=1000, help="query images (default: 1000)")
    parser.add_argument("--gallery", type=int, default=5000, help="gallery images (default: 5000)")
    parser.add_argument("--dimensions", type=int, default=512, help="feature size (default: 512)")
    parser.add_argument("--identities", type=int, default=750, help="identities (default: 750)")
    parser.add_argument("--cameras", type=int, default=6, help="cameras (default: 6)")
    parser.add_argument(
        "--market-scale", action="store_true", help="3368 queries, 15913 gallery images, 2048 dimensions"
    )
    parser.add_argument("--repeats", type=int, default=1, help="runs of each; the best counts (default: 1)")
    parser.add_argument("--no-reference", action="store_true", help="leave the numpy implementation out")
    return parser


def make_inputs(num_query, num_gallery, dimensions, identities, cameras):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(num_query + num_gallery, dimensions, generator=generator)
    ids = torch.randint(identities, (len(features),), generator=generator)
    cams = torch.randint(cameras, (len(features),), generator=generator)
    pairs = [(tensor[:num_query], tensor[num_query:]) for tensor in (features, ids, cams)]
    return [tensor for pair in pairs for tensor in pair]


def ours(*inputs):
    result = evaluate_features(*inputs)
    return result.rank(1), result.mean_ap, result.mean_inp


def plain_numpy(*inputs):
    query, gallery, *labels = (tensor.numpy() for tensor in inputs)
    cmc, average_precision, inverse_negative_penalty, _ = rank_metrics(euclidean_distances(query, gallery), *labels)
    return float(cmc[0]), float(average_precision.mean()), float(inverse_negative_penalty.mean())


def main(args):
    if args.market_scale:
        args.queries, args.gallery, args.dimensions = 3368, 15913, 2048
    arguments = (args.queries, args.gallery, args.dimensions, args.identities, args.cameras)
    print(f"{args.queries} queries, {args.gallery} gallery images, {args.dimensions} dimensions, distances included")
    measurements = [("evaluate_features", measure(make_inputs, ours, arguments, args.repeats))]
    if not args.no_reference:
        measurements.append(("numpy, query by query", measure(make_inputs, plain_numpy, arguments, args.repeats)))
    print_table(measurements, "numpy, query by query")
    for name, m in measurements:
        print(f"{name:32s} Rank-1 {m.value[0]:.6f}  mAP {m.value[1]:.6f}  mINP {m.value[2]:.6f}")


if __name__ == "__main__":
    main(get_parser().parse_args())
