"""k-reciprocal re-ranking with sparse sets, beside the dense numpy implementation, which works as the published code.

    python -m benchmarks.rerank                  # 4,000 features (667 queries) of 64 dimensions: seconds
    python -m benchmarks.rerank --market-scale   # 3,368 + 15,913 features of 2,048 dimensions; ours alone: the dense
                                                 # one would hold several matrices of 1.5 GB and take minutes

Both start from the same random features and include the distances. Each runs in a process of its own; peak memory is
what the call adds to the features, the (Q, G) result included. The last line is the largest difference over 1,000
entries.
"""

import argparse

import torch

from benchmarks.fresh_process import measure, print_table
from benchmarks.reference_retrieval import re_rank_dense
from core.retrieval.rerank import re_rank


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=667, help="query images (default: 667)")
    parser.add_argument("--gallery", type=int, default=3333, help="gallery images (default: 3333)")
    parser.add_argument("--dimensions", type=int, default=64, help="feature size (default: 64)")
    parser.add_argument("--images-per-identity", type=int, default=0, help="0: no identities, pure noise (default: 0)")
    parser.add_argument(
        "--market-scale", action="store_true", help="3368 queries, 15913 gallery images, 2048 dimensions"
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; the best counts (default: 3)")
    return parser


def make_inputs(num_query, num_gallery, dimensions, images_per_identity):
    generator = torch.Generator().manual_seed(0)
    num_images = num_query + num_gallery
    features = torch.randn(num_images, dimensions, generator=generator)
    if images_per_identity:
        centres = torch.randn(max(1, num_images // images_per_identity), dimensions, generator=generator)
        features = centres[torch.randint(len(centres), (num_images,), generator=generator)] + 0.7 * features
    return features[:num_query], features[num_query:]


def sample(distance):
    """1,000 entries of (Q, G), evenly spread, as a list."""
    flat = torch.as_tensor(distance).flatten()
    return flat[:: max(1, len(flat) // 1000)][:1000].tolist()


def ours(query, gallery):
    return sample(re_rank(query, gallery))


def dense_numpy(query, gallery):
    return sample(re_rank_dense(query.numpy(), gallery.numpy()))


def main(args):
    if args.market_scale:
        args.queries, args.gallery, args.dimensions, args.repeats = 3368, 15913, 2048, 1
    arguments = (args.queries, args.gallery, args.dimensions, args.images_per_identity)
    print(f"{args.queries} queries, {args.gallery} gallery images, {args.dimensions} dimensions, distances included")
    measurements = [("re_rank", measure(make_inputs, ours, arguments, args.repeats))]
    if not args.market_scale:
        measurements.append(("numpy, dense", measure(make_inputs, dense_numpy, arguments, args.repeats)))
    print_table(measurements, "numpy, dense")
    if not args.market_scale:
        a, b = (torch.tensor(m.value) for _, m in measurements)
        print(f"largest difference {(a - b).abs().max():.2g}")


if __name__ == "__main__":
    main(get_parser().parse_args())
