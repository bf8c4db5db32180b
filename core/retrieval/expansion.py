"""Query expansion: replace every feature by a mean over its nearest neighbours before searching."""

import torch

from core.errors import InputError
from core.retrieval.distance import as_features, nearest, row_chunks


@torch.no_grad()
def expand_queries(query, gallery, k=10, alpha=3.0, times=1, chunk_size=None):
    """Average query expansion over query and gallery together, weighted by similarity.

    Chum et al. 2007 for alpha = 0 (plain mean); alpha query expansion, Radenovic et al. 2019, section 3.5, for
    alpha > 0: the weight is the cosine similarity to the power of alpha.

    Args:
        query: (Q, D) features.
        gallery: (G, D) features.
        k: nearest images to average, the image itself included, >= 1.
        alpha: exponent of the similarity, >= 0. A negative similarity keeps its sign: an image on the far side pushes
            the mean away, as an odd exponent has it.
        times: how often to repeat.
        chunk_size: images at a time; None: chosen for memory.

    Returns:
        (Q, D) and (G, D), not normalised: it is the mean of the features as given, and a mean rather than a sum.

    Raises:
        InputError: empty query or gallery, features not finite, parameters out of range.
    """
    if k < 1 or alpha < 0 or times < 0:
        raise InputError(f"query expansion with k {k}, alpha {alpha}, {times} times: k starts at 1, the others at 0")
    query, gallery = as_features(query, "query"), as_features(gallery, "gallery")
    if len(query) == 0 or len(gallery) == 0:
        raise InputError(f"expanding {len(query)} queries in {len(gallery)} gallery images: neither may be empty")
    features = torch.cat([query.to(gallery), gallery])  # (N, D)
    for _ in range(times):
        distances, neighbours = nearest(features, features, k, "cosine", chunk_size)  # (N, k)
        similarity = 1 - distances
        weights = similarity.abs().pow(alpha)
        if alpha > 0:
            weights *= similarity.sign()
        expanded = torch.empty_like(features)
        for rows in row_chunks(len(features), neighbours.shape[1] * features.shape[1]):
            # (n, 1, k) @ (n, k, D)
            expanded[rows] = torch.bmm(weights[rows, None], features[neighbours[rows]])[:, 0] / neighbours.shape[1]
        features = expanded
    return features[: len(query)], features[len(query) :]
