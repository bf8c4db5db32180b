"""The notes of several ranks in one store, without processes."""

import pytest
import torch.distributed as dist

from core.engine import attendance
from core.engine.attendance import Attendance


@pytest.fixture
def ranks(monkeypatch):
    monkeypatch.setattr(attendance, "SECONDS_TO_GIVE_UP", 0.12)
    store = dist.HashStore()
    return [Attendance(store, rank, world_size=12) for rank in range(12)]


def test_ranks_that_did_not_arrive_are_named_with_where_they_were(ranks):
    for rank in ranks[:11]:
        rank.start("broadcast")
    for rank in ranks[:10]:
        rank.start("barrier")
    said = ranks[0].who_is_missing()
    assert (
        said == "rank 10 did not arrive (last seen at: broadcast), rank 11 did not arrive (last seen at: nothing yet)"
    )


def test_a_rank_that_does_not_give_up_is_stuck_inside(ranks):
    for rank in ranks:
        rank.start("barrier")
    for rank in ranks[1:]:
        if rank.rank != 4:
            rank.store.set(f"gave_up/{rank.rank}", "1")
    assert ranks[0].who_is_missing() == "rank 4 stopped or died in it"
    ranks[4].store.set("gave_up/4", "1")
    assert "the connection between them is at fault" in ranks[0].who_is_missing()


def test_of_many_missing_ranks_the_first_are_named(ranks):
    ranks[0].start("barrier")
    said = ranks[0].who_is_missing()
    assert said.startswith("rank 1 did not arrive") and said.endswith(
        "rank 8 did not arrive (last seen at: nothing yet) and 3 more"
    )


def test_a_store_that_is_gone(ranks, monkeypatch):
    def gone(*_):
        raise dist.DistNetworkError("connection refused")

    ranks[0].start("barrier")
    monkeypatch.setattr(ranks[0], "_read", gone)
    assert "can't be reached" in ranks[0].who_is_missing()
