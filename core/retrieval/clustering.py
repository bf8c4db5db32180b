"""Pseudo labels: pictures of one object, as the features tell it. DBSCAN on the Jaccard distance of neighbourhoods,
SpCL's test of which clusters to trust, and k-means.

Features are compared as unit vectors. Labels count from 0; -1 is an outlier, which belongs to no cluster. No N x N
matrix is ever held: DBSCAN works on the pairs that are near. Everything runs on the features' device; sums on a GPU
may differ in their last bit from run to run, so of several ranks one computes the labels and tells the others.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from core.errors import InputError
from core.retrieval.distance import as_features, full_precision, nearest, row_chunks
from core.retrieval.reciprocal import encode, jaccard, overlaps


class NearPairs(NamedTuple):
    """Pairs of N images with their Jaccard distance; each image is paired with itself, each pair is there twice."""

    row: torch.Tensor  # (P,) int64, ascending
    column: torch.Tensor  # (P,) int64
    distance: torch.Tensor  # (P,)
    num_images: int


def _encoded(features, k1, k2):
    if k1 < 1 or k2 < 1:
        raise InputError(f"Jaccard distance with k1 {k1}, k2 {k2}: they start at 1")
    features = F.normalize(as_features(features, "image"))
    _, ranks = nearest(features, features, k1)
    return encode(features, ranks, k1, round(k1 / 2) + 1, k2)


@torch.no_grad()
def jaccard_distance(features, k1=30, k2=6):
    """Jaccard distances of k-reciprocal encodings as OpenUnReID has them: (N, D) -> (N, N), in 0..1.

    As there, and not as in re-ranking, k1 neighbours count (the image itself is one), and the weights of an encoding
    are exp(-d) of the squared distance of unit vectors as it is. `near_pairs` gives the small ones alone, in far less
    memory. Raises InputError for features that are not finite.
    """
    encoding = _encoded(features, k1, k2)
    num_images = len(encoding.pointer) - 1
    distance = encoding.value.new_empty(num_images, num_images)
    for rows, overlap in overlaps(encoding, num_images, first_gallery=0):
        distance[rows] = jaccard(overlap).clamp_(min=0)
    return distance


@torch.no_grad()
def near_pairs(features, k1=30, k2=6, eps=0.6):
    """The `NearPairs` of features (N, D) whose `jaccard_distance` is at most eps, 0 <= eps < 1."""
    if not 0 <= eps < 1:
        raise InputError(f"eps is {eps}: a Jaccard distance that keeps pictures apart is from 0 up and below 1")
    encoding = _encoded(features, k1, k2)
    num_images = len(encoding.pointer) - 1
    least = 2 * (1 - eps) / (2 - eps) - 1e-5  # overlap at that distance; what is nearly near is looked at
    found = []
    for rows, overlap in overlaps(encoding, num_images, first_gallery=0):
        row, column = (overlap >= least).nonzero(as_tuple=True)
        distance = jaccard(overlap[row, column]).clamp_(min=0)
        is_near = distance <= eps
        found.append((row[is_near] + rows.start, column[is_near], distance[is_near]))
    return NearPairs(*map(torch.cat, zip(*found, strict=True)), num_images)


@torch.no_grad()
def dbscan(pairs, eps=0.6, min_samples=4):
    """Labels (N,) of DBSCAN (Ester et al. 1996), numbered and settled as scikit-learn does.

    An image with at least `min_samples` images within eps, itself one of them, is a core image; core images within eps
    of each other share a cluster. Clusters are numbered by their first core image, and an image that is near core
    images of several clusters goes to the first of them.

    Args:
        pairs: `NearPairs` up to eps or beyond.
    """
    is_near = pairs.distance <= eps
    row, column, num_images = pairs.row[is_near], pairs.column[is_near], pairs.num_images
    is_core = torch.bincount(row, minlength=num_images) >= min_samples  # (N,)
    between = is_core[row] & is_core[column]
    first = _first_of_component(row[between], column[between], num_images)  # (N,)
    reaching = is_core[column]
    cluster = torch.full_like(first, num_images)  # none
    cluster.scatter_reduce_(0, row[reaching], first[column[reaching]], "amin")
    return _numbered(cluster).masked_fill(cluster == num_images, -1)


def _first_of_component(row, column, num_images):
    """The smallest image that is connected with each one by the edges (row, column): (N,).

    The smallest number that an image has heard of goes to its neighbors and to the image it heard of, and everyone
    then asks that image: rounds grow with log N and not with the length of a chain.
    """
    row, column = torch.cat([row, column]), torch.cat([column, row])
    first = torch.arange(num_images, device=row.device)
    while True:
        heard = first.scatter_reduce(0, row, first[column], "amin")
        heard = heard.scatter_reduce(0, first, heard, "amin")
        heard = heard[heard]
        if torch.equal(heard, first):
            return first
        first = heard


def cluster(features, *, k1=30, k2=6, eps=0.6, min_samples=4):
    """Pseudo labels (N,) of features (N, D): DBSCAN on their `jaccard_distance`; -1 for outliers."""
    return dbscan(near_pairs(features, k1, k2, eps), eps, min_samples)


def with_own_labels(labels):
    """Outliers become clusters of one, numbered after the last cluster, in order."""
    outlier = labels < 0
    return torch.where(outlier, labels.max() + outlier.cumsum(0), labels)


@torch.no_grad()
def self_paced_cluster(features, *, k1=30, k2=6, eps=(0.58, 0.6, 0.62), min_samples=4, threshold=None):
    """Pseudo labels that last: the reliability criterion of SpCL (Ge et al. 2020, section 3.3).

    The clusters of the middle eps are compared with those of a tighter and of a looser one. An image leaves its cluster
    and becomes a cluster of its own where the cluster is not independent (1 - IoU with the looser one is above the
    threshold) or not compact around it (1 - IoU with the tighter one is above that of the cluster's best image). The
    last image of a cluster stays.

    Args:
        threshold: of independence; None: the 90 % quantile of the clusters of now. As published, the first labels of a
            training settle it.

    Returns:
        labels (N,) without -1: an outlier, and who left, has a label of its own after the clusters; and the threshold.
    """
    pairs = near_pairs(features, k1, k2, eps[2])
    tight, labels, loose = (with_own_labels(dbscan(pairs, value, min_samples)) for value in eps)
    dependence, looseness = _one_minus_iou(labels, loose), _one_minus_iou(labels, tight)  # (N,) each
    sizes = labels.bincount()  # (C,)
    cluster_dependence = dependence.new_full(sizes.shape, 1).scatter_reduce(0, labels, dependence, "amin")
    cluster_looseness = looseness.new_full(sizes.shape, 1).scatter_reduce(0, labels, looseness, "amin")
    if threshold is None:
        of_clusters = cluster_dependence[sizes > 1].sort().values.tolist() or [0.0]
        threshold = of_clusters[min(len(of_clusters) - 1, round(0.9 * len(of_clusters)))]
    leaves = (cluster_dependence[labels] > threshold) | (looseness > cluster_looseness[labels])
    number = torch.arange(len(labels), device=labels.device)
    last = torch.zeros_like(sizes).scatter_reduce(0, labels, number, "amax")
    leaves &= (number != last[labels]) | (labels[leaves].bincount(minlength=len(sizes)) < sizes)[labels]
    return with_own_labels(labels.masked_fill(leaves, -1)), threshold


def _one_minus_iou(labels, others):
    """1 - intersection over union of the two clusters of each image, in two clusterings without outliers: (N,)."""
    both = labels * (others.max() + 1) + others
    _, place, count = both.unique(return_inverse=True, return_counts=True)
    shared = count[place]
    return 1 - shared / (labels.bincount()[labels] + others.bincount()[others] - shared)


def _numbered(values):
    """Labels 0, 1, ... in the order of the values."""
    return values.unique(return_inverse=True)[1]


@torch.no_grad()
def k_means(features, num_clusters, *, seed=0, rounds=100):
    """Labels (N,) of k-means on unit vectors (N, D), numbered by their first image; seeded by k-means++ (Arthur and
    Vassilvitskii 2007). A center that no image is nearest to stays where it is and has no label.

    Raises InputError where there are fewer images than clusters.
    """
    features = F.normalize(as_features(features, "image"))
    if not 1 <= num_clusters <= len(features):
        raise InputError(
            f"{num_clusters} clusters of {len(features)} images: give a number from 1 to that of the images"
        )
    centers = features[_k_means_seeds(features, num_clusters, seed)]
    labels = _nearest_center(features, centers)
    for _ in range(rounds):
        sizes = labels.bincount(minlength=num_clusters)[:, None]  # (K, 1)
        sums = torch.zeros_like(centers).index_add_(0, labels, features)
        centers = torch.where(sizes > 0, sums / sizes.clamp(min=1), centers)
        before, labels = labels, _nearest_center(features, centers)
        if torch.equal(labels, before):
            break
    number = torch.arange(len(labels), device=labels.device)
    first = torch.full((num_clusters,), len(labels), device=labels.device).scatter_reduce(0, labels, number, "amin")
    return _numbered(first[labels])


def _k_means_seeds(features, num_clusters, seed):
    """Images, each drawn with a probability that grows with its squared distance from the nearest one so far."""
    generator = torch.Generator().manual_seed(seed)
    seeds = [int(torch.randint(len(features), (1,), generator=generator))]
    squared = torch.full_like(features[:, 0], torch.inf)  # (N,)
    while len(seeds) < num_clusters:
        squared = torch.minimum(squared, 2 - 2 * (features @ features[seeds[-1]]).clamp(max=1))
        squared[seeds[-1]] = 0
        weights = squared.cpu() + torch.finfo(squared.dtype).tiny  # all the same where nothing is left but copies
        seeds.append(int(torch.multinomial(weights, 1, generator=generator)))
    return seeds


def _nearest_center(features, centers):
    labels = torch.empty(len(features), dtype=torch.int64, device=features.device)
    half_norms = centers.square().sum(1) / 2
    with full_precision(features.device):
        for rows in row_chunks(len(features), len(centers)):
            labels[rows] = torch.addmm(half_norms, features[rows], centers.T, alpha=-1).argmin(1)
    return labels


def cluster_centers(features, labels):
    """The mean feature of each label 0 .. C - 1: (N, D), (N,) -> (C, D); images with label -1 are left out."""
    kept = labels >= 0
    sizes = labels[kept].bincount()
    centers = features.new_zeros(len(sizes), features.shape[1]).index_add_(0, labels[kept], features[kept])
    return centers / sizes[:, None]
