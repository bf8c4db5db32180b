"""Exact nearest neighbours among vectors that come in chunks.

A matrix product in float32 says which rows of a chunk may be among the nearest; its rounding error has a bound, so no
row is lost. Those few are then computed again in float64, by differences. So the result does not depend on chunks,
device or the order of sums, equal vectors are at distance exactly 0 and have exactly equal distances.
"""

import numpy as np
import torch

from core.errors import InputError
from core.retrieval.distance import full_precision, row_chunks


def lengths(vectors):
    """Euclidean lengths of rows, (n, D) -> (n,) float64. Equal rows get equal lengths: each is summed alone."""
    vectors = vectors.astype(np.float64, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.sqrt(np.einsum("nd,nd->n", vectors, vectors))


def can_be_squared(norms):
    """True where |q - g|^2 of vectors of this length is finite in float32."""
    with np.errstate(over="ignore"):
        return np.isfinite((2 * norms.astype(np.float32)) ** 2)


def unit_rows(vectors):
    """(n, D) float64 -> rows of length 1; a zero vector stays one."""
    norms = lengths(vectors)
    return vectors / np.where(norms > 0, norms, 1)[:, None]


@torch.no_grad()
def nearest_groups(chunks, queries, metric, k, groups, count, device):
    """The k nearest groups of each query, each by its nearest row.

    Args:
        chunks: iterable of (first row, vectors (n, D) float16 or float32, norms (n,) float32), in the order of rows.
        queries: (Q, D) float64 array.
        metric: "cosine", 1 - cos, where a zero query has cosine 0 with everything; or "euclidean".
        groups: (N,) whole numbers from 0 without gaps, or None: each row is a group of its own.
        count: of the groups, >= 1; N where `groups` is None.
        device: torch.device of the matrix products.

    Returns:
        distances (Q, k) float32 and rows (Q, k) int64 on the CPU, with k at most the number of groups; nearest first,
        equal distances in the order of rows.

    Raises:
        InputError: queries that are not finite or too large to be squared; vectors that are not finite.
    """
    k = min(k, count)
    norms = lengths(queries)
    if not can_be_squared(norms).all():
        raise InputError("query features are not finite, or too large to be squared: check that training was stable")
    best = Best(len(queries), k, groups, count)
    queries = unit_rows(queries) if metric == "cosine" else queries
    on_device = torch.from_numpy(queries.astype(np.float32)).to(device)  # (Q, D)
    buffer = None
    for start, stored, stored_norms in chunks:
        vectors = torch.from_numpy(stored).to(device)  # (n, D)
        if buffer is None or len(buffer) < len(vectors):  # float32, made once: fresh pages cost more than the copy
            buffer = torch.empty(vectors.shape, device=device)
        gallery = buffer[: len(vectors)].copy_(vectors)
        gallery_norms = torch.from_numpy(stored_norms).to(device)
        own = None if groups is None else np.unique(groups[start : start + len(stored)], return_inverse=True)[1]
        own = own if own is None else torch.from_numpy(own).to(device)  # (n,) groups of this chunk, from 0
        for part in row_chunks(len(queries), len(stored)):
            limit = best.limit(part, metric).to(device)
            coarse, slack = coarse_distances(on_device[part], gallery, gallery_norms, metric)
            if not torch.isfinite(coarse).all():  # would be found near nothing, and nobody would know
                raise InputError("the gallery holds vectors that are not finite: its file is damaged, build it again")
            query, column = candidates(coarse, slack, limit, k, own)
            distance = exact_distances(queries[part], stored, query, column, metric)
            best.merge(query + part.start, distance, column + start)
    return torch.from_numpy(best.distances), torch.from_numpy(best.rows)


def coarse_distances(query, gallery, gallery_norms, metric):
    """Distances as one matrix product gives them, and how far off they may be.

    A sum of D products in float32 is off by at most D u |q| |g|, u = 2^-24, in whatever order it is summed (Higham
    2002, Accuracy and Stability of Numerical Algorithms, equation 3.5); 16 u are for all that is rounded besides.

    Args:
        query: (q, D) float32, of length 1 or 0 for "cosine".
        gallery: (n, D) float32, not normalised, with its lengths gallery_norms (n,).

    Returns:
        (q, n) 1 - cos, or squared Euclidean distances; slack, (q,) float32 in the same unit.
    """
    with full_precision(query.device):
        products = query @ gallery.T  # (q, n)
    dim = query.shape[1]
    if metric == "cosine":
        scale, coarse = torch.ones_like(query[:, 0]), products.div_(gallery_norms).neg_().add_(1)
    else:
        query_norms = torch.linalg.vector_norm(query, dim=1)
        scale = (query_norms + gallery_norms.max()).square_()
        coarse = products.mul_(-2).add_(gallery_norms.square()).add_(query_norms.square()[:, None])
    # The last term is for products that are too small for float32 and become 0.
    return coarse, (dim + 16) * 2**-24 * scale + dim * 1e-37


def candidates(coarse, slack, limit, k, groups):
    """All pairs that may belong to the k nearest groups of their query, and few others.

    Args:
        coarse, slack: (q, n), (q,) of `coarse_distances`.
        limit: (q,) exact distance, in the unit of coarse, beyond which nothing is wanted; infinite while unknown.
        groups: (n,) int64 from 0 without gaps, or None: each column is a group.

    Returns:
        query and column, (P,) int64 arrays, in the order of query, then column.
    """
    allowed = coarse <= (limit + slack)[:, None]
    if int(allowed.sum()) > 4 * k * len(coarse) + 1000:  # at the start, or an order that brings nearer and nearer rows
        least = coarse
        if groups is not None:
            columns = groups.expand_as(coarse)
            least = coarse.new_full((len(coarse), int(groups.max()) + 1), torch.inf)
            least.scatter_reduce_(1, columns, coarse, "amin")  # (q, groups of the chunk)
            allowed &= coarse <= least.gather(1, columns) + 2 * slack[:, None]
        if least.shape[1] >= k:
            kth = least.topk(k, dim=1, largest=False).values[:, -1]  # its exact distance is at most kth + slack
            allowed &= coarse <= (kth + 2 * slack)[:, None]
    query, column = allowed.nonzero(as_tuple=True)
    return query.cpu().numpy(), column.cpu().numpy()


def exact_distances(queries, stored, query, column, metric):
    """Distances (P,) float32 of the pairs (query, column), from differences in float64.

    Args:
        queries: (q, D) float64, of length 1 or 0 for "cosine".
        stored: (n, D) as the gallery has them.
    """
    squared = np.empty(len(query))
    for pairs in row_chunks(len(query), stored.shape[1]):
        rows = stored[column[pairs]].astype(np.float64)  # (p, D)
        rows = unit_rows(rows) if metric == "cosine" else rows
        squared[pairs] = lengths(queries[query[pairs]] - rows) ** 2
    if metric == "euclidean":
        return np.sqrt(squared).astype(np.float32)
    zero = ~queries.any(1)  # |q - g|^2 / 2 is 1 - q.g for unit vectors; a zero query lacks 1/2
    return (squared / 2 + 0.5 * zero[query]).astype(np.float32)


class Best:
    """The k nearest groups found so far: distances (Q, k) float32, infinite where none yet, and rows (Q, k), -1."""

    def __init__(self, num_queries, k, groups, count):
        self.distances = np.full((num_queries, k), np.inf, np.float32)
        self.rows = np.full((num_queries, k), -1, np.int64)
        self.groups, self.count = groups, count

    def limit(self, part, metric):
        """(q,) float32 in the unit of `coarse_distances`, rounded up: what is beyond is not wanted."""
        kth = self.distances[part, -1].astype(np.float64)
        kth = kth if metric == "cosine" else kth**2
        return torch.from_numpy((kth * (1 + 1e-6)).astype(np.float32))

    def merge(self, query, distance, rows):
        """Take in pairs: query (P,), distance (P,) float32, rows (P,), which come after all rows taken in before."""
        if len(query) == 0:
            return
        touched, k = np.unique(query), self.rows.shape[1]
        query = np.concatenate([touched.repeat(k), query])
        distance = np.concatenate([self.distances[touched].ravel(), distance])
        rows = np.concatenate([self.rows[touched].ravel(), rows])
        found = rows >= 0
        query, distance, rows = query[found], distance[found], rows[found]
        order = np.lexsort((rows, distance, query))
        query, distance, rows = query[order], distance[order], rows[order]
        if self.groups is not None:  # the first row of each group of a query is its nearest
            groups = self.groups[rows].astype(np.int64)
            first = np.sort(np.unique(query * self.count + groups, return_index=True)[1])
            query, distance, rows = query[first], distance[first], rows[first]
        rank = np.arange(len(query)) - np.searchsorted(query, query)
        kept = rank < k
        self.distances[query[kept], rank[kept]] = distance[kept]
        self.rows[query[kept], rank[kept]] = rows[kept]
