"""k-reciprocal encoding (Zhong, Zheng, Cao, Li: Re-ranking Person Re-identification with k-reciprocal Encoding, CVPR
2017), with sparse neighbour sets instead of the dense N x N matrices of the published code.

The steps, with the paper's symbols: R(p, k1) are the k-reciprocal neighbours of image p (equation 2), R*(p, k1) the
expanded set (equation 4), V_p its encoding with weights exp(-d) (equation 7), averaged over the k2 nearest
neighbours (equation 11). The Jaccard distance of two images is that of their encodings (equation 10).

Memory beyond the features is O(N (k1 + k2)) for the sets; every other array is a chunk. Time grows about with N, once
the neighbours are known.

`index_select` instead of `tensor[index]` is on purpose: on a CPU it is five to ten times as fast.
"""

from typing import NamedTuple

import torch

from core.retrieval.distance import CHUNK_ELEMENTS, row_chunks, squared_distance_of_pairs

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


def encode(features, ranks, size, half_size, k2, largest=None, chunk_size=None):
    """V of every image, as SparseRows whose rows sum to 1.

    Args:
        features: (N, D).
        ranks: (N, k), each image's nearest images, itself among them, nearest first.
        size, half_size: of the `ranks`, how many count in the reciprocal test, and how many in that of the expansion.
        k2: over how many of the `ranks` an encoding is averaged; 1: not averaged.
        largest: (N,), what the squared distances from an image are divided by; None: nothing.
    """
    row, column = _expanded_reciprocal_sets(ranks[:, :size], ranks[:, :half_size], chunk_size)
    distance = squared_distance_of_pairs(features, features, row, column)  # (E,)
    weight = (distance if largest is None else distance / largest[row]).neg_().exp_()
    total = weight.new_zeros(len(features)).index_add_(0, row, weight)
    encoding = SparseRows.build(row, column, weight / total[row], len(features))
    return _average_over_neighbours(encoding, ranks[:, :k2], chunk_size) if k2 > 1 else encoding


def jaccard(overlap):
    """The Jaccard distance of two encodings out of their `overlaps`: rows sum to 1, so that sum max = 2 - sum min."""
    return 1 - overlap / (2 - overlap)


def overlaps(encoding, num_query, first_gallery):
    """Sums of the minima of two encodings, for images 0 .. num_query - 1 and the images from `first_gallery` on.

    Only images that share a member have any minimum: an inverted index gives, for each member of a query's set, the
    gallery images that have it too.

    Yields: slice of queries, their (q, G) overlaps.
    """
    num_images = len(encoding.pointer) - 1
    num_gallery = num_images - first_gallery
    in_gallery = slice(int(encoding.pointer[first_gallery]), None)
    order = encoding.column[in_gallery].argsort(stable=True)
    image = torch.repeat_interleave(encoding.pointer[first_gallery:].diff())[order]  # (E',) gallery image of each entry
    value = encoding.value[in_gallery][order]
    holders = torch.bincount(encoding.column[in_gallery], minlength=num_images)
    first_holder = holders.cumsum(0) - holders

    last = int(encoding.pointer[num_query])
    pairs = torch.cat([holders.new_zeros(1), holders[encoding.column[:last]].cumsum(0)])
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
        yield slice(start, stop), overlap.view(-1, num_gallery)


def _reciprocal_mask(ranks, chunk_size):
    """Which of an image's k neighbours have it among their own k: (N, k) -> (N, k) bool."""
    mask = torch.empty_like(ranks, dtype=torch.bool)
    for chunk in row_chunks(len(ranks), ranks.shape[1] ** 2, chunk_size):
        image = torch.arange(chunk.start, chunk.stop, device=ranks.device)
        mask[chunk] = (ranks[ranks[chunk]] == image[:, None, None]).any(2)  # (n, k, k)
    return mask


def _expanded_reciprocal_sets(ranks, half_ranks, chunk_size):
    """R*(p, k1) of every image p: the pairs (p, member), ordered by p and member, as two tensors (E,).

    R*(p, k1) is R(p, k1) with every R(q, k1 / 2), q in R(p, k1), of which more than 2/3 lie in R(p, k1) themselves
    (equation 4; the published code, which we follow, compares with ">").
    """
    num_images = len(ranks)
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
