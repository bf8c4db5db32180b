"""A table over a folder of runs: the best epochs, their evaluations, and what is not as a run left it."""

import json

import pytest

from core.engine.summary import summarise_runs
from core.errors import InputError


def leave(folder, log, **args):
    """A run folder with its log.csv and args.json."""
    folder.mkdir(parents=True)
    (folder / "log.csv").write_text(log)
    (folder / "args.json").write_text(json.dumps(args))
    return folder


def evaluate(folder, **content):
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(content))


@pytest.fixture
def runs(tmp_path):
    """Two runs of ReID, one of Mask R-CNN, one that measures nothing; evaluations of the second, and of raw pixels."""
    root = tmp_path / "runs"
    log = "epoch,loss,images_per_second,mAP,rank1\n0,,,0.1,0.2\n1,2.5,40,0.5,0.7\n2,2.0,50,0.4,0.9\n"
    leave(root / "a", log, dataset="mvb", backbone="resnet18")
    log = "epoch,images_per_second,mAP,rank1\n1,80,0.6,0.8\n2,90,,\n"
    second = leave(root / "deep" / "b", log, dataset="mvb", model="lmbn_n", backbone="osnet_x0_25")
    log = "epoch,images_per_second,box_AP,mask_AP\n1,2,0.2,0.3\n2,3,0.1,nan\n"
    leave(root / "masks", log, val_annotations="x/instances_val.json", backbone_name="resnet50")
    leave(root / "gan", "epoch,loss\n1,3\n", dataset="mvb")
    ways = {"plain": {"mAP": 0.7, "rank1": 0.75}, "flip": {"mAP": 0.71, "rank1": 0.76}}
    args = {"checkpoint": str(second / "best.pth"), "dataset": "market1501"}
    evaluate(tmp_path / "runs" / "elsewhere", results=ways, args=args)
    evaluate(root / "elsewhere" / "of two", results={}, args={"checkpoint": ["a", "b"]})
    evaluate(root / "raw-pixels" / "mvb", results={"plain": ways["plain"]}, args={"checkpoint": None, "dataset": "mvb"})
    found = {"mask_AP": 0.31, "box_AP": None}
    evaluate(root / "masks" / "last" / "val", results=found, classes=[], args={"checkpoint": "moved/last.pth"})
    return root


def test_the_best_run_comes_first_and_its_evaluations_below_it(runs):
    table = summarise_runs(runs)
    assert table.head == ["run", "data", "network", "what", "mAP", "Rank-1", "mask AP", "box AP", "images/s"]
    nothing = [None] * 4
    assert [list(row) for row in table.rows] == [
        ["raw pixels", "mvb", "", "evaluation: plain", 70, 75, None, None, None],
        ["deep/b", "mvb", "lmbn_n osnet_x0_25", "training, epoch 1", 60, 80, None, None, 80],
        ["deep/b", "market1501", "lmbn_n osnet_x0_25", "best: plain", 70, 75, None, None, None],
        ["deep/b", "market1501", "lmbn_n osnet_x0_25", "best: flip", 71, 76, None, None, None],
        ["a", "mvb", "resnet18", "training, epoch 1", 50, 70, None, None, 40],
        ["masks", "instances_val", "resnet50", "training, epoch 1", None, None, 30, 20, 2],
        ["masks", "", "resnet50", "last", None, None, 31, None, None],
        ["gan", "mvb", "", "training, not evaluated", *nothing, None],
    ]


def test_the_folder_of_one_run(runs):
    (row,) = summarise_runs(runs / "a").rows
    assert row[0] == "a" and row[4] == 50


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a/log.csv", "epoch,mAP\n1,good\n"),
        ("a/log.csv", "epoch,mAP\n1,0.5,0.5\n"),
        ("a/log.csv", b"\xff\xfe"),
        ("a/args.json", "{"),
        ("a/args.json", None),
        ("elsewhere/metrics.json", "[]"),
        ("elsewhere/metrics.json", '{"args": [], "results": {}}'),
        ("elsewhere/metrics.json", '["args", "results"]'),
        ("a/args.json", "[]"),
        ("a/args.json", '{"model": 5, "backbone": ["x"]}'),
        ("a/args.json", '{"val_annotations": {"a": 1}}'),
        ("elsewhere/metrics.json", '{"args": {"checkpoint": 5}, "results": {}}'),
        ("elsewhere/metrics.json", '{"args": {}, "results": {"plain": 5}}'),
        ("elsewhere/metrics.json", '{"args": {}, "results": {"plain": {"mAP": "good"}}}'),
    ],
)
def test_files_that_are_not_as_a_run_left_them_are_named(runs, name, content):
    path = runs / name
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match="not as a run wrote it") as caught:
        summarise_runs(runs)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_runs(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match="no run in it"):
            summarise_runs(folder)
