import math

import pytest
import torch

from core.retrieval import impostors
from core.retrieval.impostors import measure_impostors, strangers_accepted


def measure(pairs, query_ids, gallery_ids, chunk=2):
    pairs, query_ids, gallery_ids = map(torch.as_tensor, (pairs, query_ids, gallery_ids))
    return measure_impostors(pairs.bool().split(chunk), query_ids, gallery_ids, lambda counts: counts)


def test_strangers_worked_by_hand():
    """Five identities of one picture. For query a two of the other four pass, for b one, for the others nobody."""
    pairs = torch.zeros(5, 5)
    pairs[0, [1, 2]] = 1
    pairs[1, 4] = 1
    found = measure(pairs, range(5), range(5))
    assert found.identities == 5
    strangers = found.strangers
    assert strangers["identities"] == [1, 2, 4] and strangers["pictures"] == [1]
    # In a gallery of two: of a's 6 galleries 1 has nobody who passes, of b's 3.
    assert strangers["rates"][0] == pytest.approx([(2 / 4 + 1 / 4) / 5, (5 / 6 + 3 / 6) / 5, 2 / 5])
    assert strangers_accepted(strangers, 2, 1) == (pytest.approx(4 / 15), False)
    between = 4 / 15 + (2 / 5 - 4 / 15) * math.log2(3 / 2)
    assert strangers_accepted(strangers, 3, 1) == (pytest.approx(between), False)
    assert strangers_accepted(strangers, 9, 1) == strangers_accepted(strangers, 4, 2) == (pytest.approx(2 / 5), True)


def brute_force(pairs, query_ids, gallery_ids, size, generator):
    """The share of queries for which somebody passes in a gallery of `size` other identities; the mean of many."""
    rates = []
    for _ in range(200):
        hit = []
        for query, own in enumerate(query_ids):
            others = [name for name in sorted(set(gallery_ids)) if name != own]
            chosen = torch.randperm(len(others), generator=generator)[:size].tolist()
            hit.append(any(pairs[query, torch.as_tensor(gallery_ids) == others[one]].any() for one in chosen))
        rates.append(sum(hit) / len(hit))
    return sum(rates) / len(rates)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_as_drawing_galleries_says(size):
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(7).repeat_interleave(2).tolist()
    pairs = (torch.rand(14, 14, generator=generator) < 0.06) & (torch.tensor(ids)[:, None] != torch.tensor(ids))
    rate, _ = strangers_accepted(measure(pairs, ids, ids, chunk=5).strangers, size, 2)
    assert rate == pytest.approx(brute_force(pairs, ids, ids, size, generator), abs=0.03)


def test_more_pictures_of_each_let_more_strangers_pass():
    """Of each identity only one picture of four passes for all: with one each a quarter of the galleries has it."""
    ids = torch.arange(200).repeat_interleave(4)
    pairs = (ids[:, None] != ids) & (torch.arange(800) % 4 == 0)
    strangers = measure(pairs, ids, ids, chunk=100).strangers
    assert strangers["pictures"] == [1, 2, 4]
    assert [strangers_accepted(strangers, 1, count)[0] for count in (1, 2, 4)] == pytest.approx([0.25, 0.5, 1], abs=0.1)
    assert strangers_accepted(strangers, 1, 5) == (pytest.approx(1), True)


def test_the_interval_is_of_identities_and_not_of_pairs():
    """One of ten looks like all others: whether it is drawn decides. As many pairs at random tell nearly everything."""
    ids = torch.arange(10).repeat_interleave(10)
    two = ids[:, None] != ids
    one = two & ((ids[:, None] == 3) | (ids == 3))
    generator = torch.Generator().manual_seed(0)
    spread = two & (torch.rand(100, 100, generator=generator) < one.sum() / two.sum())
    (_, low, high, _), (_, lower, upper, _) = measure(one, ids, ids), measure(spread, ids, ids)
    assert low == 0 and high > 0.4
    assert 0.17 < lower < 0.2 < upper < 0.23
    assert measure(one, ids, ids) == measure(one, ids, ids, chunk=7)


def test_where_nothing_passes_the_interval_is_that_of_the_rule_of_three():
    ids = torch.arange(10)
    assert measure(torch.zeros(10, 10), ids, ids)[1:3] == (0, pytest.approx(3 / 45))


def test_one_identity_and_queries_that_are_not_in_the_gallery():
    found = measure(torch.zeros(2, 2), [0, 0], [0, 0])
    assert found.identities == 1 and math.isnan(found.lower) and found.strangers is None
    found = measure(torch.ones(1, 3), [9], [0, 1, 2])
    assert math.isnan(found.upper) and found.strangers["rates"] == [[1, 1]]


def test_of_many_identities_groups_are_drawn(monkeypatch):
    monkeypatch.setattr(impostors, "UNITS", 20)
    ids = torch.arange(90)
    pairs = (torch.rand(90, 90, generator=torch.Generator().manual_seed(0)) < 0.1) & (ids[:, None] != ids)
    found = measure(pairs, ids, ids, chunk=50)
    share = pairs.sum() / (90 * 89)
    assert 0.8 * share < found.lower < share < found.upper < 1.2 * share
