"""How good is a ranking: CMC, mAP and mINP.

CMC and mAP as in Zheng et al. 2015 (Market-1501), where precision is not interpolated; mINP as in Ye et al. 2021
(AGW), equation 2 of section 4. The ranks are found without sorting the gallery: only a query's few matches are
sorted, every gallery image is placed among them, and counting gives the rank of each match.

Several processes can share the queries: each calls `rank_features` for its own, the tensors of `QueryRanks` are
gathered in any order, and `summarise` gives every process the same numbers.
"""

from typing import NamedTuple

import torch

from core.errors import InputError
from core.retrieval.distance import DistanceTo, as_features, order_keys, row_chunks

PROTOCOLS = ("market1501", "no_camera", "vehicleid")
MAX_RANK = 50  # CMC is reported up to this rank, as in the reference implementations
# Columns of a log, and what people call them.
METRIC_NAMES = {"mAP": "mAP", "mINP": "mINP", "rank1": "Rank-1", "rank5": "Rank-5", "rank10": "Rank-10"}


class Labels(NamedTuple):
    """Whom N pictures show, and which camera took them: two (N,) integer tensors."""

    ids: torch.Tensor
    cameras: torch.Tensor

    def at(self, rows):
        """The labels of some pictures: `rows` is a slice or a tensor of indices."""
        return Labels(self.ids[rows], self.cameras[rows])


class RankingResult(NamedTuple):
    """The metrics of one evaluation, all in 0..1."""

    cmc: torch.Tensor  # (min(50, G),) float64; element r - 1 is the share of queries with a match among the first r
    mean_ap: float
    mean_inp: float
    num_valid_queries: int

    def rank(self, r):
        """CMC at rank r (1-based); beyond the gallery's size it is that of the whole gallery."""
        return float(self.cmc[min(r, len(self.cmc)) - 1])

    def metrics(self):
        """The columns of a log, `METRIC_NAMES`: fractions in [0, 1]."""
        return {"mAP": self.mean_ap, "mINP": self.mean_inp, **{f"rank{r}": self.rank(r) for r in (1, 5, 10)}}


class QueryRanks(NamedTuple):
    """What each query contributes. For "vehicleid" there are `repeats` blocks of Q entries each."""

    first_match_rank: torch.Tensor  # (Q,) int64, 1-based; 0 where not valid
    average_precision: torch.Tensor  # (Q,) float32; 0 where not valid
    inverse_negative_penalty: torch.Tensor  # (Q,) float32; 0 where not valid
    valid: torch.Tensor  # (Q,) bool: a match is left after junk was dropped
    gallery_size: int  # images that a query is compared with, junk included


def junk_mask(query, gallery, protocol):
    """Which gallery images do not exist for a query: (Q, G) bool, of the `Labels` of both.

    "market1501" drops the images of the query's identity by the query's own camera, "no_camera" nothing.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"unknown protocol {protocol!r}: choose one of {', '.join(PROTOCOLS)}")
    same_id = query.ids[:, None] == gallery.ids
    if protocol != "market1501":
        return torch.zeros_like(same_id)
    return same_id & (query.cameras[:, None] == gallery.cameras)


def vehicleid_galleries(ids, repeats=10, seed=0):
    """Draw one gallery image per identity, `repeats` times (Liu et al. 2016, VehicleID).

    Args:
        ids: (N,) identity of each image.
        repeats: independent draws; 10 in the published protocol.
        seed: the same seed gives the same draws, on every device.

    Returns:
        (repeats, number of identities) int64 indices into the images.
    """
    ids = torch.as_tensor(ids).cpu()
    identities, inverse = torch.unique(ids, return_inverse=True)
    generator = torch.Generator().manual_seed(seed)
    # In a shuffled order, the first image of each identity is a fair draw.
    shuffled = torch.stack([torch.randperm(len(ids), generator=generator) for _ in range(repeats)])  # (R, N)
    by_identity = inverse[shuffled].argsort(dim=1, stable=True)  # (R, N)
    counts = torch.bincount(inverse, minlength=len(identities))
    return shuffled.gather(1, by_identity[:, counts.cumsum(0) - counts])


@torch.no_grad()
def _rank_chunk(distance, match, junk):
    """Ranks of one chunk of queries: (q, G) distances, (q, G) bool, (q, G) bool -> the four tensors of QueryRanks."""
    last = torch.iinfo(torch.int64).max
    keys = order_keys(distance).masked_fill_(junk, last)  # (q, G), all different but for junk
    match = match & ~junk
    count = match.sum(1)  # (q,)
    most = max(1, int(count.max()))

    query, column = match.nonzero(as_tuple=True)  # in query order
    slot = torch.arange(len(query), device=keys.device) - (count.cumsum(0) - count)[query]
    match_keys = keys.new_full((len(keys), most), last)
    match_keys[query, slot] = keys[query, column]
    match_keys = match_keys.sort(1).values  # (q, M), padded with `last`

    # A gallery image falls into the slot of the first match that it does not come after. The rank of match j counts
    # the images in slots 0..j, itself included; junk falls behind the last match.
    place = torch.searchsorted(match_keys, keys)  # (q, G) in 0..M
    place += torch.arange(len(keys), device=keys.device)[:, None] * (most + 1)
    in_slot = torch.bincount(place.flatten(), minlength=len(keys) * (most + 1)).view(-1, most + 1)
    rank = in_slot.cumsum(1)[:, :most]  # (q, M), 1-based

    number = torch.arange(1, most + 1, device=keys.device)  # the j-th match ...
    precision = torch.where(number <= count[:, None], number / rank, 0)  # ... at its rank: j / rank
    valid = count > 0
    last_rank = rank.gather(1, (count - 1).clamp(min=0)[:, None])[:, 0]
    return (
        torch.where(valid, rank[:, 0], 0),
        precision.sum(1) / count.clamp(min=1),
        torch.where(valid, count / last_rank, 0),
        valid,
    )


def _rank(restrict, query, gallery, protocol, chunk_size, query_index, gallery_index, seed):
    """Rank all queries. `restrict(columns)` gives a function slice of queries -> distances to these gallery images."""
    if protocol == "vehicleid":
        if query_index is None:
            if not torch.equal(query.ids, gallery.ids):
                raise InputError(
                    "protocol vehicleid compares all test images with each other and draws the gallery itself: "
                    "give the same images, in the same order, as query and as gallery"
                )
            query_index = torch.arange(len(query.ids))
        query_index = torch.as_tensor(query_index).to(query.ids.device)
        draws = vehicleid_galleries(gallery.ids, seed=seed) if gallery_index is None else torch.as_tensor(gallery_index)
        draws = draws.to(query.ids.device).long()  # (repeats, number of identities)
    else:
        draws = [slice(None)]

    parts = []
    for columns in draws:
        distance_of, drawn = restrict(columns), gallery.at(columns)
        for rows in row_chunks(len(query.ids), len(drawn.ids), chunk_size):
            asked = query.at(rows)
            if protocol == "vehicleid":  # its own picture is junk: a query drawn for the gallery has no match left
                junk = query_index[rows, None] == columns
            else:
                junk = junk_mask(asked, drawn, protocol)
            parts.append(_rank_chunk(distance_of(rows), asked.ids[:, None] == drawn.ids, junk))
    if not parts:  # a process without a share of the queries
        none = torch.zeros(0, device=query.ids.device)
        return QueryRanks(none.long(), none, none, none.bool(), len(drawn.ids))
    return QueryRanks(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)), len(drawn.ids))


def _check_labels(labels, count, device, name):
    """`Labels` as tensors on `device`; there must be one for each of `count` images."""
    labels = Labels(*(torch.as_tensor(values).to(device) for values in labels))
    for values in labels:
        if values.shape != (count,):
            raise ValueError(f"{count} {name} images, but {name} labels of shape {tuple(values.shape)}")
    return labels


def rank_queries(
    distance,
    query_labels,
    gallery_labels,
    protocol="market1501",
    *,
    chunk_size=None,
    query_index=None,
    gallery_index=None,
    seed=0,
):
    """What each query contributes, from a distance matrix. Q = 0 is allowed, for a process without a share.

    Args:
        distance: (Q, G), smaller is closer; equal distances rank in gallery order, as a stable sort would have it.
        query_labels, gallery_labels: `Labels` of Q and G images.
        protocol: "market1501": gallery images of the query's identity and camera are dropped; "no_camera": nothing is
            dropped; "vehicleid": query and gallery are the same images, one image per identity is drawn as gallery,
            all others are queries, and 10 such draws are averaged.
        chunk_size: queries at a time; None: chosen for memory.
        query_index: "vehicleid" with only a share of the queries: the position of each in the gallery, (Q,).
        gallery_index: "vehicleid" only, the draws (repeats, number of identities); None: drawn from `seed`.
        seed: see `gallery_index`.

    Returns:
        QueryRanks.

    Raises:
        InputError: empty gallery, NaN, unknown protocol, "vehicleid" with a gallery that is not the queries.
    """
    distance = torch.as_tensor(distance)
    if distance.ndim != 2 or distance.shape[1] == 0:
        raise InputError(f"distances of shape {tuple(distance.shape)}: the gallery is empty; check its folder")
    if distance.isnan().any():
        raise InputError("distances hold NaN: the features are not finite; check that training was stable")
    query_labels = _check_labels(query_labels, len(distance), distance.device, "query")
    gallery_labels = _check_labels(gallery_labels, distance.shape[1], distance.device, "gallery")

    def restrict(columns):
        return lambda rows: distance[rows][:, columns]

    return _rank(restrict, query_labels, gallery_labels, protocol, chunk_size, query_index, gallery_index, seed)


def rank_features(
    query,
    gallery,
    query_labels,
    gallery_labels,
    protocol="market1501",
    *,
    metric="euclidean",
    chunk_size=None,
    query_index=None,
    gallery_index=None,
    seed=0,
):
    """What each query contributes, from features (Q, D) and (G, D), without ever holding the distance matrix.

    metric: "euclidean" or "cosine". The other arguments, result and errors: as in `rank_queries`.
    """
    query, gallery = as_features(query, "query"), as_features(gallery, "gallery")
    query_labels = _check_labels(query_labels, len(query), gallery.device, "query")
    gallery_labels = _check_labels(gallery_labels, len(gallery), gallery.device, "gallery")

    def restrict(columns):
        distance_to = DistanceTo(gallery[columns], metric)
        return lambda rows: distance_to(query[rows])

    return _rank(restrict, query_labels, gallery_labels, protocol, chunk_size, query_index, gallery_index, seed)


def summarise(ranks, protocol="market1501"):
    """Means over all valid queries: `QueryRanks` -> `RankingResult`.

    A query without a match left does not count, as in the reference implementations.

    Raises:
        InputError: no query, or none that is valid.
    """
    valid = ranks.valid.cpu()
    num_valid = int(valid.sum())
    if len(valid) == 0:
        raise InputError("there is no query: check the query folder")
    if num_valid == 0 and protocol == "market1501":
        raise InputError(
            f"cameras leave no valid query: none of {len(valid)} queries has its identity in the gallery under another "
            "camera; evaluate with the protocol no_camera, or check identities and cameras of query and gallery"
        )
    if num_valid == 0:
        raise InputError(
            f"no valid query: none of {len(valid)} queries has another image of its identity in the gallery"
        )
    first = ranks.first_match_rank.cpu()[valid]
    length = min(MAX_RANK, ranks.gallery_size)
    found_at = torch.bincount(first[first <= length] - 1, minlength=length)
    return RankingResult(
        cmc=found_at.cumsum(0).double() / num_valid,
        mean_ap=float(ranks.average_precision.cpu()[valid].double().mean()),
        mean_inp=float(ranks.inverse_negative_penalty.cpu()[valid].double().mean()),
        num_valid_queries=num_valid,
    )


def evaluate_ranking(
    distance, query_ids, gallery_ids, query_cameras, gallery_cameras, protocol="market1501", **options
):
    """CMC, mAP and mINP of a (Q, G) distance matrix, with identities and cameras as integers, (Q,) and (G,).

    `rank_queries`, which has the other arguments, then `summarise`.

    Returns:
        RankingResult; queries without a match left are skipped. For "vehicleid" the valid queries of all draws count.

    Raises:
        InputError: as `rank_queries`; no query; no valid query.
    """
    labels = Labels(query_ids, query_cameras), Labels(gallery_ids, gallery_cameras)
    ranks = rank_queries(distance, *labels, protocol, **options)
    return summarise(ranks, protocol)


def evaluate_features(
    query, gallery, query_ids, gallery_ids, query_cameras, gallery_cameras, protocol="market1501", **options
):
    """CMC, mAP and mINP of features (Q, D), (G, D): `rank_features`, then `summarise`; labels as in `evaluate_ranking`.

    Never holds more than `chunk_size` rows of the distance matrix. Returns and raises as `evaluate_ranking`.
    """
    labels = Labels(query_ids, query_cameras), Labels(gallery_ids, gallery_cameras)
    ranks = rank_features(query, gallery, *labels, protocol, **options)
    return summarise(ranks, protocol)
