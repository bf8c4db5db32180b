import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from core.errors import InputError
from core.retrieval.distance import pairwise_distance
from core.retrieval.ranking import Labels, junk_mask
from core.retrieval.threshold import BINS, as_typed, choose_threshold, describe_threshold


def on_a_line(query, gallery, query_ids, gallery_ids, rate, protocol="no_camera", cameras=None, **options):
    """Threshold for pictures that are points on a line."""
    query, gallery = torch.tensor(query)[:, None], torch.tensor(gallery)[:, None]
    query_cameras, gallery_cameras = cameras or ([0] * len(query), [1] * len(gallery))
    return choose_threshold(
        query, gallery, Labels(query_ids, query_cameras), Labels(gallery_ids, gallery_cameras), protocol,
        false_accept_rate=rate, metric="euclidean", **options,
    )  # fmt: skip


def test_worked_by_hand():
    """One query at 0; its own object at 1 and 3, others at 2, 4, 6, 8."""
    found = on_a_line([0.0], [1.0, 3.0, 2.0, 4.0, 6.0, 8.0], [7], [7, 7, 1, 2, 3, 4], rate=0.25)
    # One of four impostors may pass: the one at 2, and not the one at 4.
    assert found.distance == pytest.approx(4) and found.distance < 4
    assert found.true_accept_rate == 1 and (found.impostor_pairs, found.genuine_pairs) == (4, 2)
    assert found.identities == 5
    said = "threshold 3.999: at most 25 % of pairs of two objects pass among 5 identities (of others 0 to 75 %, at 95 %"
    assert str(found) == f"{said} confidence); pairs measured: 4 of two objects, 2 of one, of which 100.0 % pass"
    strict = on_a_line([0.0], [1.0, 3.0, 2.0, 4.0, 6.0, 8.0], [7], [7, 7, 1, 2, 3, 4], rate=0.2)
    assert strict.distance == pytest.approx(2) and strict.distance < 2
    assert strict.true_accept_rate == 0.5 and strict.false_accept_rate == 0.2


def test_impostors_that_look_the_same_leave_nothing_to_accept():
    found = on_a_line([0.0], [0.0, 0.0], [1], [1, 2], rate=0.0)
    assert found.distance == -1 and found.true_accept_rate == 0
    said = "nothing is accepted: more than 0 % of pairs of two objects have distance 0"
    assert str(found) == f"{said}; pairs measured: 1 of two objects, 1 of one, of which 0.0 % pass"
    assert describe_threshold(-1, 0.01) == describe_threshold(-1, 0.01, 0.0) == said.replace("0 % of", "1 % of")


def test_both_rates_are_said_where_both_are_known():
    words = "threshold 0.338: 33.3 % of pairs of one object pass, and at most 1 % of pairs of two"
    assert describe_threshold(0.338, 0.01, 1 / 3) == words
    assert describe_threshold(0.338, 0.01, math.nan) == "threshold 0.338: at most 1 % of pairs of two objects pass"


@pytest.mark.parametrize(
    "distance, printed",
    [(0.0, "0"), (0.3, "0.3"), (0.029999999, "0.02999"), (0.123456, "0.1234"), (1.99999988, "1.999"), (3e-9, "3e-09")],
)
def test_who_types_what_is_printed_accepts_no_pair_more(distance, printed):
    words = describe_threshold(distance, 0.01)
    assert words.startswith(f"threshold {printed}: ")
    assert float(printed) == as_typed(distance) <= distance
    assert as_typed(as_typed(distance)) == as_typed(distance)


class Largest(TorchDispatchMode):
    """The number of values in the largest tensor that an operator makes."""

    size = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        self.size = max([self.size, *(one.numel() for one in tree_leaves(made) if isinstance(one, torch.Tensor))])
        return made


def test_neither_all_distances_nor_all_genuine_pairs_are_held():
    features, ids = torch.arange(1000.0)[:, None], [0, 1] * 500
    with Largest() as largest:
        found = on_a_line(features[:, 0].tolist(), features[:, 0].tolist(), ids, ids, rate=0.1, chunk_size=4)
    assert found.genuine_pairs == 500_000 and largest.size <= 4 * BINS


def test_pairs_of_the_same_camera_do_not_count():
    arguments = ([0.0], [0.0, 1.0, 5.0], [1], [1, 1, 2], 0.0)
    assert on_a_line(*arguments, "market1501", ([0], [0, 1, 1])).genuine_pairs == 1
    assert on_a_line(*arguments, "no_camera", ([0], [0, 1, 1])).genuine_pairs == 2


def test_a_picture_is_no_pair_with_itself():
    points, ids = [0.0, 1.0, 5.0], [1, 1, 2]
    assert on_a_line(points, points, ids, ids, 0.0, "vehicleid").genuine_pairs == 2


@pytest.mark.parametrize("rate", [0.0, 0.003, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_as_sorting_all_pairs_says(rate, metric):
    generator = torch.Generator().manual_seed(3)
    query, gallery = torch.randn(31, 5, generator=generator), torch.randn(47, 5, generator=generator)
    gallery[5:9] = gallery[4]  # equal distances
    query_ids, gallery_ids = (torch.randint(6, (n,), generator=generator) for n in (31, 47))
    query_cameras, gallery_cameras = (torch.randint(2, (n,), generator=generator) for n in (31, 47))
    labels = (Labels(query_ids, query_cameras), Labels(gallery_ids, gallery_cameras), "market1501")
    found = choose_threshold(query, gallery, *labels, false_accept_rate=rate, metric=metric, chunk_size=4)
    assert found == choose_threshold(query, gallery, *labels, false_accept_rate=rate, metric=metric)

    distance = pairwise_distance(query, gallery, metric)
    same = query_ids[:, None] == gallery_ids
    impostors = distance[~same].sort().values
    assert found.impostor_pairs == len(impostors)
    assert (impostors <= found.distance).double().mean() <= rate
    following = impostors[impostors > found.distance][0]  # with the next impostor it would be more than allowed
    assert (impostors <= following).double().mean() > rate
    genuine = distance[same & ~junk_mask(*labels)]
    assert found.true_accept_rate == pytest.approx((genuine <= found.distance).double().mean().item())


def test_the_interval_of_few_identities_is_said():
    words = "threshold 0.338: at most 1 % of pairs of two objects pass among 10 identities"
    assert describe_threshold(0.338, 0.01, identities=10) == words
    interval = " (of others 0.21 to 4.13 %, at 95 % confidence)"
    assert describe_threshold(0.338, 0.01, math.nan, 10, 0.0021, 0.04126) == words + interval


def clustered(identities, pictures, seed=0, dim=4):
    """Features (N, D) of so many pictures of each identity, around a point of its own, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.arange(identities).repeat_interleave(pictures)
    centers = torch.randn(identities, dim, generator=generator)
    return centers[ids] + 0.2 * torch.randn(len(ids), dim, generator=generator), Labels(ids, torch.zeros_like(ids))


def of_identities(features, labels, kept):
    rows = torch.isin(labels.ids, kept)
    return features[rows], labels.at(rows)


def test_a_threshold_from_few_identities_holds_for_others_where_that_is_asked_for():
    """Over splits, the plain one lets more of others pass than asked for every other time; its interval says so."""
    features, labels = clustered(60, 4)
    rates, within = {False: [], True: []}, []
    for seed in range(12):
        mixed = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
        own, others = (of_identities(features, labels, part) for part in (mixed[:12], mixed[12:]))
        impostors = pairwise_distance(others[0], others[0], "euclidean")[others[1].ids[:, None] != others[1].ids]
        how = {"protocol": "no_camera", "false_accept_rate": 0.02, "metric": "euclidean"}
        for of_others, shares in rates.items():
            found = choose_threshold(own[0], own[0], own[1], own[1], **how, of_others=of_others)
            shares.append((impostors <= found.distance).double().mean().item())
            if of_others:
                assert found.false_accept_rate < 0.02
            else:
                within.append(found.lower <= shares[-1] <= found.upper)
    assert sum(within) >= 10
    assert sum(share > 0.02 for share in rates[True]) <= 2 < sum(share > 0.02 for share in rates[False])


def test_where_even_the_strictest_threshold_does_not_hold_it_is_the_strictest():
    features, labels = clustered(4, 3)
    found = choose_threshold(features, features, labels, labels, "no_camera", of_others=True)
    strictest = choose_threshold(features, features, labels, labels, "no_camera", false_accept_rate=0.0)
    assert found.distance == strictest.distance and found.upper == strictest.upper == 0.5 > 0.01  # 3 / 6 pairs of bags


def test_no_genuine_pair():
    found = on_a_line([0.0], [1.0], [1], [2], rate=0.0)
    assert math.isnan(found.true_accept_rate) and found.genuine_pairs == 0
    words = "threshold 0.9999: at most 0 % of pairs of two objects pass among 1 identities; "
    assert str(found) == words + "pairs measured: 1 of two objects, 0 of one"


def test_bad_input():
    with pytest.raises(InputError, match="all pictures are of one object"):
        on_a_line([0.0], [1.0], [1], [1], rate=0.0)
    with pytest.raises(InputError, match="false-accept rate 1"):
        on_a_line([0.0], [1.0], [1], [2], rate=1)
