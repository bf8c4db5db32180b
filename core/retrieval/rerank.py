"""Re-ranking with k-reciprocal encoding (Zhong, Zheng, Cao, Li: Re-ranking Person Re-identification with k-reciprocal
Encoding, CVPR 2017), with sparse neighbour sets instead of the dense N x N matrices of the published code.

The steps, with the paper's symbols: R(p, k1) are the k-reciprocal neighbours of image p (equation 2), R*(p, k1) the
expanded set (equation 4), V_p its encoding with weights exp(-d) (equation 7), averaged over the k2 nearest
neighbours (equation 11); the Jaccard distance of two encodings (equation 10) is mixed with the original distance
(equation 12, lambda).

N = Q + G images. Memory beyond the features is the (Q, G) result, a centred copy of the features and O(N (k1 + k2))
for the sets; every other array is a chunk. Time grows with N^2 D (distances) and else about with N.

`index_select` instead of `tensor[index]` is on purpose: on a CPU it is five to ten times as fast.
"""

from typing import NamedTuple

import torch

from core.errors import InputError
from core.retrieval.distance import (
    CHUNK_ELEMENTS,
    DistanceTo,
    as_features,
    row_chunks,
    smallest,
    squared_distance_of_pairs,
)

PAIRS_PER_CHUNK = CHUNK_ELEMENTS // 4  # a pair needs five numbers


class SparseRows(NamedTuple):
    """A sparse matrix with N rows, in compressed row form; columns ascend within a row."""

    pointer: torch.Tensor  # (N + 1,) entries of row i are pointer[i] .. pointer[i + 1] - 1
    column: torch.Tensor  # (E,) int64
    value: torch.Tensor  # (E,)

    @classmethod
    def build(cls, row, column, value, num_rows):
        """From the row number (E,) of each entry, ascending."""
        length = torch.bincount(row, minlength=num_rows)
        return cls(torch.cat([length.new_zeros(1), length.cumsum(0)]), column, value)


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
    row, column = _expanded_reciprocal_sets(ranks, k1, chunk_size)
    encoding = _encode(distance_to.rows, largest, row, column)
    del distance_to
    if k2 > 1:
        encoding = _average_over_neighbours(encoding, ranks[:, :k2], chunk_size)
    return _mix_with_jaccard(original, encoding, lambda_value)


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


def _reciprocal_mask(ranks, chunk_size):
    """Which of an image's k neighbours have it among their own k: (N, k) -> (N, k) bool."""
    mask = torch.empty_like(ranks, dtype=torch.bool)
    for chunk in row_chunks(len(ranks), ranks.shape[1] ** 2, chunk_size):
        image = torch.arange(chunk.start, chunk.stop, device=ranks.device)
        mask[chunk] = (ranks[ranks[chunk]] == image[:, None, None]).any(2)  # (n, k, k)
    return mask


def _expanded_reciprocal_sets(ranks, k1, chunk_size):
    """R*(p, k1) of every image p: the pairs (p, member), ordered by p and member, as two tensors (E,).

    R*(p, k1) is R(p, k1) with every R(q, k1 / 2), q in R(p, k1), of which more than 2/3 lie in R(p, k1) themselves
    (equation 4; the published code, which we follow, compares with ">").
    """
    num_images = len(ranks)
    ranks = ranks[:, : k1 + 1]
    half_ranks = ranks[:, : round(k1 / 2) + 1]  # Python and numpy round half to even
    nowhere = num_images  # an extra column that takes what is not in a set
    reciprocal = _reciprocal_mask(ranks, chunk_size)  # (N, k)
    half_sets = torch.where(_reciprocal_mask(half_ranks, chunk_size), half_ranks, nowhere)  # (N, h)
    half_sizes = (half_sets != nowhere).sum(1)  # (N,)

    rows, columns = [], []
    for chunk in row_chunks(num_images, num_images, chunk_size):
        candidates, mask = ranks[chunk], reciprocal[chunk]  # (n, k)
        member = torch.zeros(len(mask), num_images + 1, dtype=torch.bool, device=ranks.device)
        member.scatter_(1, torch.where(mask, candidates, nowhere), True)
        member[:, nowhere] = False
        theirs = half_sets[candidates]  # (n, k, h)
        shared = member.gather(1, theirs.flatten(1)).view_as(theirs).sum(2)  # (n, k)
        joins = mask & (3 * shared > 2 * half_sizes[candidates])
        member.scatter_(1, torch.where(joins[:, :, None], theirs, nowhere).flatten(1), True)
        row, column = member[:, :nowhere].nonzero(as_tuple=True)
        rows.append(row + chunk.start)
        columns.append(column)
    return torch.cat(rows), torch.cat(columns)


def _encode(features, largest, row, column):
    """V (equation 7): weight exp(-d) for every member of the set, d normalised as in `re_rank`, row sums 1."""
    weight = (squared_distance_of_pairs(features, features, row, column) / largest[row]).neg_().exp_()  # (E,)
    total = torch.zeros_like(largest).index_add_(0, row, weight)
    return SparseRows.build(row, column, weight / total[row], len(features))


def _expand(start, length):
    """Concatenate the ranges start_i .. start_i + length_i - 1. Returns their numbers and the i of each."""
    owner = torch.repeat_interleave(length)
    first = length.cumsum(0) - length
    return (start - first).index_select(0, owner).add_(torch.arange(len(owner), device=owner.device)), owner


def _average_over_neighbours(encoding, neighbours, chunk_size):
    """Local query expansion (equation 11): row i becomes the mean of the rows neighbours[i], (N, k2)."""
    num_images, k2 = neighbours.shape
    length = encoding.pointer.diff()
    rows, columns, values = [], [], []
    for chunk in row_chunks(num_images, num_images, chunk_size):
        source = neighbours[chunk].flatten()  # (n * k2,)
        entry, owner = _expand(encoding.pointer[source], length[source])
        position = owner // k2 * num_images + encoding.column.index_select(0, entry)
        total = encoding.value.new_zeros((chunk.stop - chunk.start) * num_images)
        total.index_add_(0, position, encoding.value.index_select(0, entry))
        filled = total.nonzero()[:, 0]
        rows.append(filled // num_images + chunk.start)
        columns.append(filled % num_images)
        values.append(total[filled] / k2)
    return SparseRows.build(torch.cat(rows), torch.cat(columns), torch.cat(values), num_images)


def _mix_with_jaccard(original, encoding, lambda_value):
    """Turn the original distances (Q, G) into the final ones (equations 10 and 12), in place.

    The rows of V sum to 1, so that sum max = 2 - sum min, and only images that share a member have any minimum:
    an inverted index gives, for each member of a query's set, the gallery images that have it too.
    """
    num_query, num_gallery = original.shape
    in_gallery = slice(int(encoding.pointer[num_query]), None)
    order = encoding.column[in_gallery].argsort(stable=True)
    image = torch.repeat_interleave(encoding.pointer[num_query:].diff())[order]  # (E',) gallery image of each entry
    value = encoding.value[in_gallery][order]
    holders = torch.bincount(encoding.column[in_gallery], minlength=num_query + num_gallery)
    first_holder = holders.cumsum(0) - holders

    pairs = torch.cat([holders.new_zeros(1), holders[encoding.column[: in_gallery.start]].cumsum(0)])
    pairs = pairs[encoding.pointer[: num_query + 1]]  # (Q + 1,) pairs of entries before each query
    for start, stop in _balanced_chunks(pairs.cpu(), num_gallery):
        entries = slice(int(encoding.pointer[start]), int(encoding.pointer[stop]))
        member = encoding.column[entries]
        holder, owner = _expand(first_holder[member], holders[member])
        query = torch.repeat_interleave(encoding.pointer[start : stop + 1].diff())  # (e,) 0-based in this chunk
        overlap = value.new_zeros((stop - start) * num_gallery)
        smaller = torch.minimum(encoding.value[entries].index_select(0, owner), value.index_select(0, holder))
        position = (query * num_gallery).index_select(0, owner).add_(image.index_select(0, holder))
        overlap.index_add_(0, position, smaller)
        jaccard = 1 - overlap / (2 - overlap)
        original[start:stop].mul_(lambda_value).add_(jaccard.view(-1, num_gallery), alpha=1 - lambda_value)
    return original


def _balanced_chunks(pairs, num_gallery):
    """Yield (start, stop) of queries with at most PAIRS_PER_CHUNK pairs and CHUNK_ELEMENTS distances, or one query.

    pairs: (Q + 1,) pairs of entries before each query, ascending.
    """
    num_query, start = len(pairs) - 1, 0
    while start < num_query:
        stop = int(torch.searchsorted(pairs, pairs[start] + PAIRS_PER_CHUNK, right=True)) - 1
        stop = min(num_query, max(start + 1, min(stop, start + CHUNK_ELEMENTS // num_gallery)))
        yield start, stop
        start = stop
