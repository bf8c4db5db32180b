"""What a threshold lets pass of objects that it was not chosen on, measured on those that it was chosen on.

Pairs of pictures are not independent: two objects that look alike give many that pass. So identities are drawn, not
pairs. The threshold itself was fitted to these identities, so with few of them all this is a little too good.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

RESAMPLES, CONFIDENCE = 1000, 0.95
UNITS = 1000  # that are drawn; where there are more identities, every thousandth together


class Impostors(NamedTuple):
    """What a threshold lets pass.

    identities: C, of the gallery. lower, upper: the interval of the share of the pairs of two objects that pass, at
    `CONFIDENCE`; nan where nothing was measured. strangers: None for one identity, else dict of identities (n,),
    pictures (m,) and rates (m, n): the share of a stranger's pictures that somebody passes for in a gallery of n
    identities with m pictures each.
    """

    identities: int
    lower: float
    upper: float
    strangers: dict | None


def measure_impostors(accepted: Iterable[Tensor], query_ids: Tensor, gallery_ids: Tensor, add_up) -> Impostors:
    """`Impostors` by the pairs of two objects that pass.

    Args:
        accepted: chunks (q, G) bool of the queries in their order, True for such a pair.
        query_ids, gallery_ids: (Q,), (G,) integers.
        add_up: as in `core.retrieval.threshold.choose_threshold`.
    """
    names, columns = torch.unique(gallery_ids, return_inverse=True)  # (C,), (G,)
    count, others, units = len(names), len(names) - 1, min(len(names), UNITS)
    rows = torch.searchsorted(names, query_ids.contiguous()).clamp(max=others)  # (Q,)
    asked = names[rows] == query_ids  # whoever is not in the gallery has no place among its identities
    ranks = _ranks(columns)  # (G,) of each picture among those of its identity
    pictures = torch.tensor(_powers_up_to(round(len(columns) / count)), device=ranks.device)  # (m,)
    confusions = torch.zeros(units * units, dtype=torch.int64, device=ranks.device)
    histogram = torch.zeros(len(pictures), count, dtype=torch.int64, device=ranks.device)
    start = 0
    for pairs in accepted:
        query, picture = pairs.nonzero(as_tuple=True)
        first = ranks.new_full((len(pairs) * count,), len(ranks))
        first.scatter_reduce_(0, query * count + columns[picture], ranks[picture], "amin")
        found = (first.view(-1, 1, count) < pictures[:, None]).sum(2).clamp(max=others)  # (q, m) identities that pass
        histogram.scatter_add_(1, found.T, torch.ones_like(found.T))
        query = query + start
        pair = rows[query] % units * units + columns[picture] % units
        confusions.index_add_(0, pair, asked[query].long())
        start += len(pairs)
    by_name = torch.bincount(rows[asked], minlength=count)  # (C,) queries
    confusions, histogram, by_name = (add_up(counts.cpu()) for counts in (confusions, histogram, by_name))
    confusions = confusions.view(units, units).double()
    bounds = _interval(confusions, *_pairs_by_unit(by_name, torch.bincount(columns).cpu(), units))
    strangers = _strangers(histogram.double(), pictures.tolist()) if others and histogram.sum() else None
    return Impostors(count, *bounds, strangers)


def _powers_up_to(largest: int) -> list[int]:
    """1, 2, 4, ... and the largest."""
    return sorted({2**power for power in range(largest.bit_length())} | {largest})


def _ranks(columns: Tensor) -> Tensor:
    """(G,) identities -> the place of each picture among those of its identity, from 0, in a shuffled order."""
    shuffled = torch.randperm(len(columns), generator=torch.Generator().manual_seed(0)).to(columns.device)
    order = shuffled[torch.argsort(columns[shuffled], stable=True)]
    starts = torch.bincount(columns).cumsum(0) - torch.bincount(columns)
    ranks = torch.empty_like(columns)
    ranks[order] = torch.arange(len(columns), device=columns.device) - starts[columns[order]]
    return ranks


def _pairs_by_unit(queries: Tensor, pictures: Tensor, units: int) -> tuple[Tensor, Tensor]:
    """Counts (C,) -> ((U, U) pairs of two identities in two units, how many pairs of identities there are)."""
    unit = torch.arange(len(queries)) % units
    of_query, of_picture, same = (
        torch.zeros(units, dtype=torch.float64).index_add_(0, unit, counts.double())
        for counts in (queries, pictures, queries * pictures)
    )
    return of_query[:, None] * of_picture - same.diag(), len(queries) * (len(queries) - 1) / 2


def _interval(confusions: Tensor, pairs: Tensor, pairs_of_names: float) -> tuple[float, float]:
    """The share of pairs that pass where the identities are drawn anew, with replacement: its middle `CONFIDENCE`.

    The percentile bootstrap (Efron 1979) over the nodes of a graph whose edges are the pairs. Of COIL-100's other
    objects 95 % held in 66 % of splits with 5 identities, 84 to 92 % with 10, 98 to 100 % with 20. Where nothing
    passes: up to 3 / n of n pairs of identities (the rule of three).
    """
    if not pairs.sum() > 0:
        return float("nan"), float("nan")
    if not confusions.sum():
        return 0.0, min(1.0, 3 / pairs_of_names)
    units = len(pairs)
    drawn = torch.randint(units, (RESAMPLES, units), generator=torch.Generator().manual_seed(0))
    weights = torch.zeros(RESAMPLES, units, dtype=torch.float64)  # how often each is drawn
    weights.scatter_add_(1, drawn, torch.ones_like(weights))
    passed, total = (((weights @ counts) * weights).sum(1) for counts in (confusions, pairs))  # (RESAMPLES,)
    shares = passed[total > 0] / total[total > 0]
    tail = (1 - CONFIDENCE) / 2
    return tuple(torch.quantile(shares, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist())


def _strangers(histogram: Tensor, pictures: list[int]) -> dict:
    """Of (m, C) queries by the number of identities that pass for them: the rates as in `Impostors`.

    In a gallery of n of the K others none passes for a query with k among them with probability
    C(K - k, n) / C(K, n): the mean over all galleries of that size.
    """
    others = histogram.shape[1] - 1
    sizes = _powers_up_to(others)
    n = torch.tensor(sizes, dtype=torch.float64)
    left = others - torch.arange(others + 1, dtype=torch.float64)[:, None]  # (C, 1)
    log = torch.lgamma(left + 1) - torch.lgamma(left - n + 1)  # -inf where fewer than n are left
    none = torch.exp(log - torch.lgamma(torch.tensor(others + 1.0)) + torch.lgamma(others - n + 1))  # (C, n)
    rates = 1 - histogram @ none / histogram.sum(1, keepdim=True)
    return {"identities": sizes, "pictures": pictures, "rates": rates.clamp(0, 1).tolist()}


def strangers_accepted(strangers: dict, identities: int, pictures: float) -> tuple[float, bool]:
    """(the share of a stranger's pictures that somebody passes for in a gallery of that size, whether it may be more).

    Args: strangers: as `Impostors` has it. pictures: of an identity. Between the sizes that were measured it is
    interpolated, beyond them it is that of the largest.
    """
    sizes, counts = np.log2(strangers["identities"]), np.log2(strangers["pictures"])
    by_pictures = [np.interp(np.log2(identities), sizes, rates) for rates in strangers["rates"]]
    rate = np.interp(np.log2(pictures), counts, by_pictures)
    return float(rate), identities > strangers["identities"][-1] or pictures > strangers["pictures"][-1]
