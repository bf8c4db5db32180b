"""Plain numpy implementations of the published retrieval metrics and re-ranking: the oracle of the tests and the
reference of the benchmarks. They do one query or one image at a time and hold dense matrices, as the published code
does; nothing outside tests and benchmarks uses them.
"""

import numpy as np


def euclidean_distances(a, b):
    """(N, D), (M, D) -> (N, M), by the usual expansion of the square."""
    squared = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T
    return np.sqrt(np.maximum(squared, 0))


def rank_metrics(distance, query_ids, gallery_ids, query_cameras, gallery_cameras, drop_same_camera=True):
    """Market-1501 evaluation (Zheng et al. 2015; mINP: Ye et al. 2021), one query at a time.

    Returns:
        cmc (min(50, G),), AP and INP of each valid query, indices of the valid queries. Ties rank in gallery order.
    """
    length = min(50, distance.shape[1])
    cmc, average_precision, inverse_negative_penalty, valid = [], [], [], []
    for i, row in enumerate(distance):
        order = np.argsort(row, kind="stable")
        same_id = gallery_ids[order] == query_ids[i]
        junk = same_id & (gallery_cameras[order] == query_cameras[i]) & drop_same_camera
        matches = same_id[~junk]
        if not matches.any():
            continue
        positions = np.flatnonzero(matches) + 1  # 1-based
        found = np.zeros(length)
        found[positions[0] - 1 :] = 1
        cmc.append(found)
        average_precision.append(np.mean(np.arange(1, len(positions) + 1) / positions))
        inverse_negative_penalty.append(len(positions) / positions[-1])
        valid.append(i)
    cmc = np.mean(cmc, axis=0) if cmc else np.zeros(length)
    return cmc, np.array(average_precision), np.array(inverse_negative_penalty), np.array(valid, dtype=int)


def _k_reciprocal(initial_rank, i, k):
    """R(i, k): those of the first k of i's list that have i among their first k."""
    forward = initial_rank[i, :k]
    return forward[(initial_rank[forward, :k] == i).any(1)]


def re_rank_dense(query, gallery, k1=20, k2=6, lambda_value=0.3):
    """k-reciprocal re-ranking (Zhong et al. 2017) as the published code works: N x N matrices, a loop over images.

    Neighbour lists come from a stable sort. Returns (Q, G) float32.
    """
    features = np.concatenate([query, gallery])
    num_query, num_images = len(query), len(features)
    distance = euclidean_distances(features, features) ** 2
    np.fill_diagonal(distance, 0)
    distance = distance / distance.max(axis=1, keepdims=True)
    initial_rank = np.argsort(distance, axis=1, kind="stable")

    encoding = np.zeros_like(distance)
    half = int(np.around(k1 / 2))
    for i in range(num_images):
        reciprocal = _k_reciprocal(initial_rank, i, k1 + 1)
        expanded = reciprocal
        for candidate in reciprocal:
            theirs = _k_reciprocal(initial_rank, candidate, half + 1)
            if len(np.intersect1d(theirs, reciprocal)) > 2 / 3 * len(theirs):
                expanded = np.append(expanded, theirs)
        expanded = np.unique(expanded)
        weight = np.exp(-distance[i, expanded])
        encoding[i, expanded] = weight / weight.sum()
    if k2 > 1:
        encoding = np.stack([encoding[initial_rank[i, :k2]].mean(axis=0) for i in range(num_images)])

    distance = distance[:num_query]
    holders = [np.flatnonzero(encoding[:, i]) for i in range(num_images)]
    jaccard = np.zeros_like(distance)
    for i in range(num_query):
        overlap = np.zeros(num_images, dtype=distance.dtype)
        for member in np.flatnonzero(encoding[i]):
            overlap[holders[member]] += np.minimum(encoding[i, member], encoding[holders[member], member])
        jaccard[i] = 1 - overlap / (2 - overlap)
    return ((1 - lambda_value) * jaccard + lambda_value * distance)[:, num_query:]
