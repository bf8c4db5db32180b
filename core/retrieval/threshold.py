"""Are two pictures of the same object? The distance up to which the answer is yes, chosen on pairs that are known."""

import math
from decimal import ROUND_FLOOR, Context
from typing import NamedTuple

import torch

from core.errors import InputError
from core.retrieval.distance import DistanceTo, as_features, row_chunks
from core.retrieval.impostors import CONFIDENCE, measure_impostors
from core.retrieval.ranking import Labels, junk_mask

# The bits of a float32 that is not negative, read as an integer, are ordered as the floats are. They are counted in two
# rounds of 16 bits each, so that any rank among any number of pairs is found exactly, with 64k counters.
HALF = 16
BINS = 1 << HALF


class Threshold(NamedTuple):
    """Two pictures show the same object if their distance is at most `distance`.

    false_accept_rate: at most this share of the impostor pairs (two objects) is accepted.
    true_accept_rate: the share of the genuine pairs (one object) that is accepted; nan where there are none.
    identities, lower, upper, strangers: as `core.retrieval.impostors.Impostors` has them.
    """

    distance: float
    false_accept_rate: float
    true_accept_rate: float
    impostor_pairs: int
    genuine_pairs: int
    identities: int
    lower: float
    upper: float
    strangers: dict | None

    def __str__(self):
        """One line: what the threshold lets pass, and how much of it is right."""
        sure = {name: getattr(self, name) for name in ("identities", "lower", "upper")}
        words = describe_threshold(self.distance, self.false_accept_rate, **sure)
        words += f"; pairs measured: {self.impostor_pairs} of two objects, {self.genuine_pairs} of one"
        return f"{words}, of which {100 * self.true_accept_rate:.1f} % pass" if self.genuine_pairs else words


def as_typed(distance):
    """The largest number of four digits that is at most `distance`: who types what is printed accepts no pair more."""
    return float(Context(prec=4, rounding=ROUND_FLOOR).create_decimal(repr(float(distance))))


def describe_threshold(
    distance, false_accept_rate, true_accept_rate=math.nan, identities=0, lower=math.nan, upper=math.nan
):
    """A `Threshold` in words, also one that lets nothing pass. What is nan, or 0 identities, is unknown."""
    rate = f"{100 * false_accept_rate:.3g} %"
    if distance < 0:
        return f"nothing is accepted: more than {rate} of pairs of two objects have distance 0"
    limit = f"threshold {as_typed(distance):.4g}"
    behind = f" among {identities} identities" if identities else ""
    if not math.isnan(upper):
        behind += f" (of others {100 * lower:.3g} to {100 * upper:.3g} %, at {100 * CONFIDENCE:g} % confidence)"
    if math.isnan(true_accept_rate):
        return f"{limit}: at most {rate} of pairs of two objects pass{behind}"
    of_one = f"{100 * true_accept_rate:.3g} % of pairs of one object pass"
    return f"{limit}: {of_one}, and at most {rate} of pairs of two{behind}"


@torch.no_grad()
def choose_threshold(
    query,
    gallery,
    query_labels,
    gallery_labels,
    protocol="market1501",
    *,
    false_accept_rate=0.01,
    of_others=False,
    metric="cosine",
    chunk_size=None,
    add_up=None,
):
    """The largest distance at which not more than a given share of the impostor pairs would be accepted.

    The pairs are those of a query and a gallery picture. Pairs of one object that the protocol leaves out (the same
    camera under "market1501", a picture and itself under "vehicleid") are not counted.

    Args:
        query, gallery: (Q, D), (G, D) features.
        query_labels, gallery_labels: `Labels` of them.
        protocol: as in `core.retrieval.ranking`.
        false_accept_rate: at least 0, below 1.
        of_others: it is to hold for other objects than these, too: the upper end of the share's interval is at most
            this, where that can be reached; with few identities it can't.
        metric: "euclidean" or "cosine".
        chunk_size: queries at a time; None: chosen for memory. Neither all distances nor all pairs are ever held.
        add_up: where several processes share the queries, the function that adds an int64 tensor of each of them; all
            get the same answer then. Not for "vehicleid", whose queries are its gallery.

    Returns:
        Threshold. Its distance is -1 where the nearest impostors are too many at distance 0, so that nothing is
        accepted.

    Raises:
        InputError: a rate outside, no impostor pair, features that `DistanceTo` refuses.
    """
    if not 0 <= false_accept_rate < 1:
        raise InputError(f"false-accept rate {false_accept_rate}: give a number of at least 0 and below 1")
    distance_to, query = DistanceTo(gallery, metric), as_features(query, "query")
    query_labels, gallery_labels = (
        Labels(*(torch.as_tensor(values, device=query.device) for values in labels))
        for labels in (query_labels, gallery_labels)
    )

    add_up = add_up or (lambda counts: counts)

    def pairs():
        """Chunks of queries: (bits of the distances (q, G), which pairs are impostors, which genuine)."""
        for rows in row_chunks(len(query), len(gallery), chunk_size):
            same = query_labels.ids[rows, None] == gallery_labels.ids  # (q, G)
            junk = junk_mask(query_labels.at(rows), gallery_labels, protocol)  # (q, G)
            if protocol == "vehicleid":  # query and gallery are one set
                junk[torch.arange(len(same)), torch.arange(rows.start, rows.stop)] = True
            yield _bits(distance_to(query[rows]).float().clamp_(min=0)), ~same, same & ~junk

    upper = torch.zeros(2, BINS, dtype=torch.int64)  # of impostors, of genuine pairs
    for bits, *kinds in pairs():
        upper += torch.stack([_counts(bits[kind] >> HALF) for kind in kinds])
    upper = add_up(upper)
    impostors, genuine = upper.sum(1).tolist()
    if not impostors:
        raise InputError("all pictures are of one object: without pairs of two objects no threshold can be chosen")
    rate = false_accept_rate
    while True:
        # The first impostor that must not be accepted, by the upper and then the lower half of its distance's bits.
        allowed = int(rate * impostors)
        upper_half, before = _find(upper[0], allowed)
        lower = torch.zeros(2, BINS, dtype=torch.int64)
        for bits, *kinds in pairs():
            kinds = [kind & (bits >> HALF == upper_half) for kind in kinds]
            lower += torch.stack([_counts(bits[kind] & (BINS - 1)) for kind in kinds])
        lower = add_up(lower)
        lower_half, _ = _find(lower[0], allowed - before)
        just_below = (upper_half << HALF) + lower_half - 1
        passing = (impostor & (bits <= just_below) for bits, impostor, _ in pairs())
        measured = measure_impostors(passing, query_labels.ids, gallery_labels.ids, add_up)
        if not of_others or not allowed or not measured.upper > false_accept_rate:
            break
        rate *= min(false_accept_rate / measured.upper, 0.9)
    limit = float(torch.tensor(just_below, dtype=torch.int32).view(torch.float32)) if just_below >= 0 else -1.0
    accepted = int(upper[1, :upper_half].sum() + lower[1, :lower_half].sum())
    true_accept_rate = accepted / genuine if genuine else float("nan")
    return Threshold(limit, rate, true_accept_rate, impostors, genuine, *measured)


def _bits(distance):
    return (distance + 0.0).view(torch.int32)  # -0.0 + 0.0 = 0.0, whose bits are 0


def _counts(values):
    return torch.bincount(values, minlength=BINS).cpu()


def _find(counts, rank):
    """The bin of the value that `rank` others come before, and how many come before its bin."""
    total = counts.cumsum(0)
    place = int(torch.searchsorted(total, rank, right=True))
    return place, int(total[place] - counts[place])
