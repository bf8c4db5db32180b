"""Re-ranking by `core.retrieval.reciprocal`: the Jaccard distance of two images' neighbourhoods is mixed with their
original distance (Zhong et al. 2017, equation 12, lambda).

N = Q + G images. Memory beyond the features is the (Q, G) result, a centred copy of the features and the sparse
encodings. Time grows with N^2 D (distances) and else about with N.
"""

import torch

from core.errors import InputError
from core.retrieval.distance import DistanceTo, as_features, row_chunks, smallest
from core.retrieval.reciprocal import encode, jaccard, overlaps


@torch.no_grad()
def re_rank(query, gallery, k1=20, k2=6, lambda_value=0.3, chunk_size=None):
    """Distances that take the neighbourhoods of both images into account.

    Args:
        query: (Q, D) features.
        gallery: (G, D) features.
        k1: neighbours for the reciprocal test, >= 1.
        k2: neighbours over which an encoding is averaged, >= 1; 1: not averaged.
        lambda_value: share of the original distance in the result, 0..1.
        chunk_size: images at a time; None: chosen for memory.

    Returns:
        (Q, G) distances in 0..1: (1 - lambda) * Jaccard + lambda * d, where d is the squared Euclidean distance
        divided by the largest one from this query to any of the N images. As in the published code, an image counts
        among its own neighbours, so k1 + 1 are taken, and round(k1 / 2) + 1 (half to even) for the expansion.
        For the cosine distance give unit vectors.

    Raises:
        InputError: empty query or gallery, features not finite, parameters out of range.
    """
    if k1 < 1 or k2 < 1 or not 0 <= lambda_value <= 1:
        raise InputError(
            f"re-ranking with k1 {k1}, k2 {k2}, lambda {lambda_value}: k1 and k2 start at 1, lambda is 0..1"
        )
    query, gallery = as_features(query, "query"), as_features(gallery, "gallery")
    if len(query) == 0 or len(gallery) == 0:
        raise InputError(f"re-ranking {len(query)} queries in {len(gallery)} gallery images: neither may be empty")
    if query.shape[1] != gallery.shape[1]:
        raise InputError(f"query features have {query.shape[1]} dimensions and gallery features {gallery.shape[1]}")

    distance_to = DistanceTo(torch.cat([query.to(gallery), gallery]))  # to all N images
    ranks, largest, original = _neighbours(distance_to, len(query), max(k1 + 1, k2), chunk_size)
    # Python and numpy round half to even.
    encoding = encode(distance_to.rows, ranks, k1 + 1, round(k1 / 2) + 1, k2, largest, chunk_size)
    del distance_to
    for rows, overlap in overlaps(encoding, len(query), first_gallery=len(query)):
        original[rows].mul_(lambda_value).add_(jaccard(overlap), alpha=1 - lambda_value)
    return original


def _neighbours(distance_to, num_query, k, chunk_size):
    """The k nearest of all N images for each image, ties in index order, itself included.

    Returns:
        ranks (N, min(k, N)); largest squared distance from each image, (N,); normalised distances query to gallery
        (Q, G).
    """
    rows = distance_to.rows
    num_images = len(rows)
    ranks = torch.empty(num_images, min(k, num_images), dtype=torch.int64, device=rows.device)
    largest = rows.new_empty(num_images)
    original = rows.new_empty(num_query, num_images - num_query)
    for chunk in row_chunks(num_images, num_images, chunk_size):
        distance = distance_to.squared(rows[chunk])  # (n, N)
        ranks[chunk] = smallest(distance, ranks.shape[1])
        # All features equal: every distance is 0 and stays 0.
        largest[chunk] = distance.amax(1).clamp(min=torch.finfo(distance.dtype).tiny)
        queries = distance[: max(0, num_query - chunk.start), num_query:]
        torch.div(queries, largest[chunk][: len(queries), None], out=original[chunk][: len(queries)])
    return ranks, largest, original
