"""Pseudo labels of N features: time and peak memory of the Jaccard distance and DBSCAN, and what larger sets will take.

    python -m benchmarks.clustering                              # 5,000, 10,000 and 20,000 features of 2,048 dimensions
    python -m benchmarks.clustering --sizes 1000 2000 4000       # seconds

The features are of identities with --images-per-identity pictures each, with noise: most are clustered, some are
outliers. Each size runs in a process of its own; peak memory is what the call adds to the features. The growth laws,
time a N + b N^2 (sets and clusters; distances), memory c + d N, are fitted to the sizes, and answer for --extrapolate.
"""

import argparse

import numpy as np
import torch

from benchmarks.fresh_process import measure
from core.retrieval.clustering import cluster, k_means


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[5_000, 10_000, 20_000], help="numbers of features")
    parser.add_argument("--extrapolate", type=int, default=100_000, help="features (default: 100000)")
    parser.add_argument("--dimensions", type=int, default=2048, help="feature size (default: 2048)")
    parser.add_argument("--images-per-identity", type=int, default=20, help="(default: 20)")
    parser.add_argument("--noise", type=float, default=1.0, help="of a feature, over its identity's (default: 1)")
    parser.add_argument("--k-means", type=int, default=0, metavar="K", help="K clusters by k-means instead of DBSCAN")
    return parser


def make_features(num_images, dimensions, images_per_identity, noise, num_clusters):
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(max(1, num_images // images_per_identity), dimensions, generator=generator)
    features = torch.randn(num_images, dimensions, generator=generator).mul_(noise)
    return features.add_(centers[torch.randint(len(centers), (num_images,), generator=generator)]), num_clusters


def labels_of(features, num_clusters):
    labels = k_means(features, num_clusters) if num_clusters else cluster(features)
    return int(labels.max()) + 1, int((labels < 0).sum())


def fit(sizes, values, powers, at):
    """The value at another size, by least squares of a sum of these powers of the size."""
    terms = np.array([[size / at] for size in sizes]) ** powers
    return float(np.linalg.lstsq(terms, np.array(values), rcond=None)[0].sum())


def main(args):
    print(f"{'features':>10s} {'clusters':>9s} {'outliers':>9s} {'seconds':>9s} {'cpu s':>9s} {'peak GiB':>9s}")
    found = []
    for size in args.sizes:
        inputs = (size, args.dimensions, args.images_per_identity, args.noise, args.k_means)
        found.append(measure(make_features, labels_of, inputs))
        clusters, outliers = found[-1].value
        times = f"{found[-1].seconds:9.1f} {found[-1].cpu_seconds:9.1f} {found[-1].peak_gib:9.2f}"
        print(f"{size:10,d} {clusters:9,d} {outliers:9,d} {times}", flush=True)
    laws = {"seconds": [1, 2], "cpu_seconds": [1, 2], "peak_gib": [0, 1]}  # powers of N
    fitted = [fit(args.sizes, [getattr(one, key) for one in found], law, args.extrapolate) for key, law in laws.items()]
    print(f"{args.extrapolate:10,d} {'by the growth law':>19s} {fitted[0]:9.0f} {fitted[1]:9.0f} {fitted[2]:9.2f}")


if __name__ == "__main__":
    main(get_parser().parse_args())
