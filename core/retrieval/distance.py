"""Distances between features, and the nearest neighbours, in chunks: no caller ever has to hold all distances.

Everything here is evaluation: no gradient, float32 at least (float64 for float64 features), any device. Numpy arrays
are taken as well as tensors.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F

from core.errors import InputError

METRICS = ("euclidean", "cosine")

# Distances in one chunk: 16 MB as int64 keys. Larger ones help matrix products a little, but beyond 32 MB glibc asks
# the system for fresh pages each time, which takes longer than the work on them.
CHUNK_ELEMENTS = 2_000_000

# A squared distance below this part of the squared norms has lost its digits to cancellation: it is computed again.
CANCELLATION = 1e-4


def row_chunks(rows, columns, chunk_size=None):
    """Yield slices that cover range(rows), `chunk_size` rows each; None: as many as CHUNK_ELEMENTS values allow."""
    if chunk_size is None:
        chunk_size = max(1, CHUNK_ELEMENTS // max(1, columns))
    if chunk_size < 1:
        raise InputError(f"chunk size {chunk_size}: give at least 1 row")
    for start in range(0, rows, chunk_size):
        yield slice(start, min(rows, start + chunk_size))


def as_features(features, name):
    """Anything array-like of shape (N, D) -> tensor in float32 or float64, or InputError naming it."""
    features = torch.as_tensor(features).detach()
    if features.ndim != 2 or features.shape[1] == 0:
        raise InputError(f"{name} features have shape {tuple(features.shape)}: give one row of numbers per image")
    return features if features.dtype == torch.float64 else features.float()


@contextmanager
def full_precision(device):
    """No autocast and no TF32: a distance is a small difference of large numbers and needs every digit."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


class DistanceTo:
    """Distances to one gallery, for any number of chunks of queries.

    The gallery is centred once on its mean, which leaves every distance as it is and keeps digits: embeddings of a
    young network point nearly all the same way, and |q|^2 + |g|^2 - 2 q.g would cancel. What still cancels
    (near-duplicates) is computed again as |q - g|^2, so equal features are at distance exactly 0.

    Args:
        gallery: (G, D) features, G >= 1.
        metric: "euclidean", |q - g|, or "cosine", 1 - cos(q, g) in 0..2, computed as |q - g|^2 / 2 of the unit
            vectors. A zero vector has cosine 0 with everything.

    Raises:
        InputError: empty gallery, unknown metric, features not finite or too large to be squared.
    """

    def __init__(self, gallery, metric="euclidean"):
        if metric not in METRICS:
            raise InputError(f"unknown distance {metric!r}: choose one of {', '.join(METRICS)}")
        gallery = as_features(gallery, "gallery")
        if len(gallery) == 0:
            raise InputError("the gallery is empty: there is nothing to search; check the gallery folder")
        self.metric = metric
        self.is_zero = (gallery == 0).all(1) if metric == "cosine" else None  # (G,)
        unit = F.normalize(gallery) if metric == "cosine" else gallery
        self.centre = unit.mean(0)
        self.rows = unit - self.centre  # (G, D)
        self.squared_norms = _squared_norms(self.rows, "gallery")  # (G,)

    def __call__(self, query):
        """(q, D) -> (q, G) distances."""
        query = as_features(query, "query").to(self.rows)
        if query.shape[1] != self.rows.shape[1]:
            raise InputError(
                f"query features have {query.shape[1]} dimensions and gallery features {self.rows.shape[1]}: "
                "extract both with the same network"
            )
        unit = F.normalize(query) if self.metric == "cosine" else query
        distance = self.squared(unit - self.centre)
        if self.metric == "euclidean":
            return distance.sqrt_()
        distance.mul_(0.5)  # |q - g|^2 / 2 = 1 - q.g for unit vectors; each zero vector lacks 1/2
        return distance.add_(0.5 * (query == 0).all(1)[:, None]).add_(0.5 * self.is_zero)

    @torch.no_grad()
    def squared(self, query):
        """Squared Euclidean distances (q, G) of rows (q, D) that are centred already, as `self.rows` are."""
        query_norms = _squared_norms(query, "query")[:, None]  # (q, 1)
        with full_precision(query.device):
            squared = torch.addmm(self.squared_norms, query, self.rows.T, alpha=-2)  # (q, G)
        squared.add_(query_norms).clamp_(min=0)
        # Where the difference is small the two norms are nearly the same, so the query's stands for both.
        close, column = (squared < 2 * CANCELLATION * query_norms).nonzero(as_tuple=True)
        squared[close, column] = squared_distance_of_pairs(query, self.rows, close, column)
        return squared


def _squared_norms(rows, name):
    norms = torch.linalg.vector_norm(rows, dim=1).square()
    if not torch.isfinite(norms).all():
        raise InputError(f"{name} features are not finite, or too large to be squared: check that training was stable")
    return norms


@torch.no_grad()
def squared_distance_of_pairs(a, b, a_index, b_index):
    """|a[a_index] - b[b_index]|^2, (P,), by differences: no cancellation. a is (N, D), b is (M, D)."""
    squared = a.new_empty(len(a_index))
    for pairs in row_chunks(len(a_index), a.shape[1]):
        difference = a.index_select(0, a_index[pairs]).sub_(b.index_select(0, b_index[pairs]))  # (p, D)
        squared[pairs] = torch.linalg.vector_norm(difference, dim=1).square_()
    return squared


@torch.no_grad()
def pairwise_distance(query, gallery, metric="euclidean"):
    """Distance of every query to every gallery image.

    Args:
        query: (Q, D) features; Q = 0 is allowed.
        gallery: (G, D) features, G >= 1.
        metric: "euclidean", |q - g|, or "cosine", 1 - cos(q, g) in 0..2.

    Returns:
        (Q, G) float32 (float64 if the gallery is). No gradient passes: losses have their own distances.

    Raises:
        InputError: empty gallery, features not finite, unequal dimensions, unknown metric.
    """
    distance_to = DistanceTo(gallery, metric)
    query = as_features(query, "query")
    distance = distance_to.rows.new_empty(len(query), len(distance_to.rows))
    for rows in row_chunks(*distance.shape):
        distance[rows] = distance_to(query[rows])
    return distance


def order_keys(distance):
    """Integers that are all different within a row and ordered as a stable sort orders the row.

    Equal distances are settled in gallery order, exactly. A float32 and its column fit into one int64: the bits of a
    positive float are ordered as the float is, those of a negative one the other way round.

    Args:
        distance: (q, G) without NaN.

    Returns:
        (q, G) int64, all below torch.iinfo(torch.int64).max.
    """
    if distance.dtype == torch.float64:
        return distance.argsort(dim=1, stable=True).argsort(dim=1)
    bits = (distance.float() + 0.0).view(torch.int32)  # -0.0 equals 0.0, but its bits do not: -0.0 + 0.0 = 0.0
    bits ^= (bits >> 31).bitwise_and_(0x7FFFFFFF)
    return torch.add(torch.arange(distance.shape[1], device=distance.device), bits, alpha=1 << 32)


def smallest(distance, k):
    """Columns of the k smallest values of each row, (q, G) -> (q, k), smallest first, ties in column order."""
    return order_keys(distance).topk(k, dim=1, largest=False, sorted=True).indices


@torch.no_grad()
def nearest(query, gallery, k, metric="euclidean", chunk_size=None, junk=None):
    """The k nearest gallery images of each query, nearest first; ties are settled in gallery order.

    Args:
        query: (Q, D) features.
        gallery: (G, D) features, G >= 1.
        k: how many; min(k, G) are returned.
        metric: as in `pairwise_distance`.
        chunk_size: queries at a time; None: chosen for memory.
        junk: optional (Q, G) bool, True for images that a query must not get (`ranking.junk_mask`).

    Returns:
        distances (Q, k) and indices (Q, k) int64. Where junk leaves fewer than k images the last distances are
        infinite and their indices -1.

    Raises:
        InputError: as `pairwise_distance`.
    """
    distance_to = DistanceTo(gallery, metric)
    query = as_features(query, "query")
    k = min(k, len(distance_to.rows))
    distances = distance_to.rows.new_empty(len(query), k)
    indices = torch.empty(len(query), k, dtype=torch.int64, device=distances.device)
    for rows in row_chunks(len(query), len(distance_to.rows), chunk_size):
        distance = distance_to(query[rows])  # (q, G)
        if junk is not None:
            distance.masked_fill_(junk[rows].to(distance.device), torch.inf)
        indices[rows] = smallest(distance, k)
        distances[rows] = distance.gather(1, indices[rows])
    return distances, indices.masked_fill_(distances.isinf(), -1)
