"""Which data sets an evaluation is on, how networks and sets are called, and the table of all against all."""

from argparse import Namespace

import pytest
import torch

from core.engine import reid_evaluation
from core.engine.complexity import Complexity
from core.engine.reid import ReIDData
from core.engine.reid_evaluation import comparison_table, load_data_sets, names_of_networks
from core.errors import InputError
from core.retrieval.ranking import RankingResult


@pytest.fixture
def loaded(monkeypatch):
    """Function: (dataset, data, trained on) -> (names of the sets, (dataset, data, protocol) of each); none is read."""

    def load(args, say):
        return ReIDData([], [], [], args.dataset or "synthetic", args.data or "data/x", args.protocol)

    def call(dataset=None, data=None, trained_on=(), protocol=None):
        args = Namespace(dataset=dataset, data=data, protocol=protocol, skip_broken=False)
        monkeypatch.setattr(reid_evaluation, "load_data", load)
        sets = load_data_sets(args, list(trained_on), print)
        return list(sets), [(one.name, one.root, one.protocol) for one in sets.values()]

    return call


def test_sets_that_the_person_names(loaded):
    assert loaded(["mvb"], "a/b") == (["mvb"], [("mvb", "a/b", None)])
    assert loaded(["mvb:a:b", "synthetic"]) == (
        ["mvb", "synthetic"],
        [("mvb", "a:b", None), ("synthetic", "data/x", None)],
    )
    names, sets = loaded(["market1501:x/coil20", "market1501:x/coil100", "market1501:y/coil20"], protocol="no_camera")
    assert names == ["coil20", "coil100", "coil20-2"] and {one[2] for one in sets} == {"no_camera"}
    assert loaded(["mvb:a", "mvb:a"])[0] == ["mvb"]


def test_sets_of_the_trainings_are_each_read_once(loaded):
    trained_on = [("mvb", "a", "no_camera"), ("market1501", "b", "market1501"), ("mvb", "a", "no_camera")]
    assert loaded(trained_on=trained_on) == (["mvb", "market1501"], trained_on[:2])


@pytest.mark.parametrize("dataset", [["mvb:a"], ["mvb", "market1501"]])
def test_a_folder_for_several_sets_is_refused(loaded, dataset):
    with pytest.raises(InputError, match="--dataset NAME:PATH NAME:PATH"):
        loaded(dataset, "folder")


def test_names_of_networks():
    paths = ["runs/a/best.pth", "runs/a/last.pth", "x/a/best.pth", "weights/osnet_x0.25.pth"]
    assert names_of_networks(paths) == ["a", "a-last", "a-2", "osnet_x0.25"]
    assert names_of_networks([]) == ["raw pixels"]


def test_all_against_all():
    def results(*values):
        ways = ("plain", "plain + re-ranking")
        return {how: RankingResult(torch.tensor([0.5]), value, 0.0, 4) for how, value in zip(ways, values, strict=True)}

    comparison = {"a": {"mvb": results(0.1, 0.2), "coil": results(0.3, 0.4)}}
    comparison["b"] = {"mvb": results(0.5, 0.6), "coil": results(0.7, 0.8)}
    costs = {"a": Complexity(10**6, 10**6, None, 5.0), "b": Complexity(2 * 10**6, 10**6, 2**20, 6.0)}
    table = comparison_table(comparison, costs)
    assert table.head[:5] == ["", "mvb mAP", "mvb Rank-1", "coil mAP", "coil Rank-1"]
    assert table.head[5:] == ["parameters (M)", "multiply-adds (M)", "peak memory (MiB)", "images/s"]
    assert table.rows == [
        ["a", 10, 50, 30, 50, 1, 1, None, 5],
        ["a, plain + re-ranking", 20, 50, 40, 50, 1, 1, None, 5],
        ["b", 50, 50, 70, 50, 2, 1, 1, 6],
        ["b, plain + re-ranking", 60, 50, 80, 50, 2, 1, 1, 6],
    ]
    assert comparison_table(comparison, {}).head == table.head[:5]
