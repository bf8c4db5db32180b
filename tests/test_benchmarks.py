"""The benchmarks that a person runs seldom, in small, so that they go on running."""

import itertools
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

import train_kd
import train_reid
import train_unsupervised
from benchmarks import (
    backbones,
    clustering,
    distillation,
    distillation_cost,
    losses,
    mask_decoder,
    mask_guidance,
    mask_rcnn,
    nms,
    paste,
    roi_align,
    runs,
    translation,
    turns,
    unsupervised,
)
from benchmarks.fresh_process import measure
from core.engine import options
from core.models.mask_rcnn import MaskRCNN

TINY = ["--height", "32", "--width", "32", "--pad", "2", "--mask-size", "8", "8"]
TINY += ["--ids-per-batch", "4", "--images-per-id", "2", "--iterations-per-epoch", "1"]


@pytest.fixture(scope="module")
def bags(baggage, tmp_path_factory):
    """Options of train_reid.py for a small set of its own: predicted masks are kept beside it."""
    root = shutil.copytree(baggage, tmp_path_factory.mktemp("bags") / "baggage")
    return [*TINY, "--dataset", "mvb", "--data", str(root)]


@pytest.fixture(scope="module")
def mask_checkpoint(tmp_path_factory):
    """Of a small Mask R-CNN that was never trained, but sees something everywhere."""
    torch.manual_seed(0)
    sizes = {"min_size": 32, "max_size": 48, "box_roi_output_size": 2, "rpn_post_nms_top_n_test": 20}
    network = MaskRCNN("resnet18", 2, **sizes)
    with torch.no_grad():
        network.roi_heads.box_predictor.cls_score.bias.copy_(torch.tensor([-2.0, 1.0]))
    state = {"kind": "mask_rcnn", "model": network.state_dict(), "ema": None, "network": network.options, "args": {}}
    path = tmp_path_factory.mktemp("masks") / "best.pth"
    torch.save({**state, "categories": [[1, "bag"]], "epoch": 1, "best": 0.1}, path)
    return path


@pytest.mark.parametrize(("mask", "pooling"), mask_guidance.ways(mask_guidance.MASKS, mask_guidance.POOLINGS))
def test_train_reid_accepts_each_line_of_mask_guidance(mask, pooling, bags, mask_checkpoint, tmp_path, no_pictures):
    line = ["--mask-checkpoint", str(mask_checkpoint), "--", *bags, "--epochs", "0"]
    arguments = mask_guidance.arguments_of(mask, pooling, 0, mask_guidance.get_parser().parse_args(line), tmp_path)
    train_reid.main(options.parse(train_reid.get_parser(), train_reid.RECIPES, train_reid.default_recipe, arguments))
    assert (tmp_path / f"{mask}-{pooling}-0" / "log.csv").is_file()


def test_ways_of_mask_guidance():
    """Without a mask there is none to pool with."""
    expected = [("none", "off"), ("instance", "soft"), ("instance", "off")]
    assert mask_guidance.ways(["none", "instance"], ["soft", "off"]) == expected


@pytest.mark.slow
def test_mask_guidance(bags, tmp_path, capsys):
    line = ["--masks", "none", "instance", "--poolings", "off", "--seeds", "3", "--parallel", "2"]
    line += ["--output", str(tmp_path / "runs")]
    line += ["--", *bags, "--epochs", "1"]
    mask_guidance.main(mask_guidance.get_parser().parse_args(line))
    rows = [row.split(" | ")[:2] for row in capsys.readouterr().out.splitlines() if row.startswith("| ")]
    assert rows[2:] == [["| none", "off"], ["| instance", "off"]]


def test_mask_decoder(capsys):
    line = ["--backbone", "resnet18", "--batch", "4", "--size", "32", "32", "--mask-size", "8", "8", "--steps", "1"]
    mask_decoder.main(mask_decoder.get_parser().parse_args([*line, "--mask-pooling", "soft", "--device", "cpu"]))
    rows = [row.split()[:-4] for row in capsys.readouterr().out.splitlines()[1:]]
    decoders = [["no", "decoder"], ["full"], ["light"]]
    assert rows == [[*what, *name] for what in (["training", "step"], ["evaluation"]) for name in decoders]


@pytest.mark.parametrize("kind", [*distillation.KINDS, *distillation.TAUGHT])
def test_each_kind_of_distillation_is_a_line_that_its_script_takes(kind, tmp_path):
    args = distillation.get_parser().parse_args(["--kinds", kind, "--", "--epochs", "1"])
    name, *arguments = distillation.command_of(kind, 1, tmp_path, args, tmp_path)
    script = {"train_reid.py": train_reid, "train_kd.py": train_kd}[name]
    parsed = options.parse(script.get_parser(), script.RECIPES, script.default_recipe, arguments)
    assert (parsed.epochs, parsed.seed, parsed.backbone) == (1, 1, "resnet18")
    if script is train_kd:
        train_kd.settle_distillation(parsed)
        assert bool(parsed.teacher) == (not kind.startswith("self"))


def test_table_of_distillation():
    results = [{"kind": "alone", "seed": seed, "mAP": 50.0 + seed, "rank1": 60.0} for seed in (0, 2)]
    results.append({"kind": "1*logits", "seed": 0, "mAP": 56.0, "rank1": 70.0})
    lines = distillation.table(results, {"mAP": 61.0, "rank1": 80.0}).splitlines()
    assert lines[3] == "| alone | 51.0 ± 1.4 | 60.0 ± 0.0 | 0.00 |"
    assert lines[4] == "| 1*logits | 56.0 | 70.0 | 0.50 |"


SMALL = [
    (backbones, 2, "--network resnet18 --batch 2 --size 32 32 --steps 1 --amp"),
    (mask_rcnn, 2, "--backbone resnet18 --size 64 64 --min-size 64 --rois 4 --objects 2 --detections 3 --steps 1"),
    (roi_align, 4, "--rois 4 --channels 2 --size 64 64 --steps 1"),
    (paste, 4, "--instances 2 --size 32 48 --steps 1"),
    (nms, 3, "--boxes 30 --steps 1"),
    (losses, 3, "--repetitions 1"),
    (distillation_cost, 2, "--teacher resnet18 --batch 4 --size 32 32 --steps 1 --kd self logits+features+relational"),
    (translation, 2, "--channels 2 --blocks 1 --layers 1 --size 8 8 --batch 2 --steps 1 --amp"),
]


@pytest.mark.parametrize(("benchmark", "num_rows", "line"), SMALL, ids=[one.__name__ for one, *_ in SMALL])
def test_beside_a_reference(benchmark, num_rows, line, capsys):
    benchmark.main(benchmark.get_parser().parse_args([*line.split(), "--device", "cpu"]))
    rows = [row.partition(": ")[0] for row in capsys.readouterr().out.splitlines() if " ms, ratio " in row]
    assert len(set(rows)) == len(rows) == num_rows


def test_turns_begin_with_another_function_each_time(monkeypatch):
    order, seconds = [], itertools.count()
    monkeypatch.setattr(turns.time, "perf_counter", lambda: next(seconds) ** 2)
    functions = {name: lambda name=name: order.append(name) for name in "abc"}
    medians = turns.medians(functions, "cpu", steps=3, warmup=1)
    assert "".join(order) == "abcbcacababc"
    # The n-th call of all lasts from (2n)^2 to (2n + 1)^2: 4n + 1; a is called as number 5, 7 and 9 after the warm-up.
    assert medians == {"a": 4 * 7 + 1, "b": 4 * 8 + 1, "c": 4 * 6 + 1}


def test_each_call_is_waited_for_on_the_device_it_runs_on(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", calls.append)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: calls.append("mps"))
    for device in ("cuda:1", "mps", "cpu"):
        turns.medians({"ours": lambda: calls.append("call")}, device, steps=1, warmup=0)
    assert calls == ["cuda:1", "call", "cuda:1", "mps", "call", "mps", "call"]


def test_both_scripts_accept_each_line_of_unsupervised(baggage, tmp_path, monkeypatch, capsys):
    scripts, lines = {"train_reid.py": train_reid, "train_unsupervised.py": train_unsupervised}, []

    def run_script(name, *line, **environment):
        script = scripts[name]
        args = options.parse(script.get_parser(), script.RECIPES, script.default_recipe, list(map(str, line)))
        lines.append(args)
        folder = Path(args.output) / args.name
        folder.mkdir()
        (folder / "log.csv").write_text("epoch,mAP,rank1\n0,0.25,0.5\n1,0.5,0.75\n")
        (folder / "train.log").write_text("done in 1.5 minutes, see it")

    monkeypatch.setattr(unsupervised, "run_script", run_script)
    line = ["--bags", str(baggage), "--output", str(tmp_path / "runs"), "--", "--epochs", "2"]
    unsupervised.main(unsupervised.get_parser().parse_args(line))
    assert len(lines) == 2 * 2 + 3 * 6 * 2 and {args.epochs for args in lines} == {2}
    rows = capsys.readouterr().out.splitlines()
    assert "| coil100 | labels | 25.0 ± 0.0 | 50.0 ± 0.0 | 75.0 ± 0.0 |  | 1.5 ± 0.0 |" in rows
    names = [[path.name for path in (tmp_path / "runs" / side).rglob("*.jpg")] for side in ("before", "after")]
    assert len(names[0]) == len(names[1]) == 9 * 2


linux = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")


@linux
def test_clustering(capsys):
    clustering.main(clustering.get_parser().parse_args(["--sizes", "90", "--dimensions", "8"]))
    rows = [row.split()[0] for row in capsys.readouterr().out.splitlines()[1:]]
    assert rows == ["90", "100,000"]


@linux
def test_a_large_result_comes_out_of_a_fresh_process():
    assert measure(list, bytes, ([200_000],)).value == bytes(200_000)  # more than a pipe holds


@linux
def test_a_fresh_process_that_dies_is_reported():
    with pytest.raises(RuntimeError, match="_exit ended with exit code 3"):
        measure(list, os._exit, ([3],))


def test_a_script_that_fails_ends_the_benchmark_after_its_report(capfd):
    with pytest.raises(SystemExit, match="exit code 1$"):
        runs.run_script("-c", "import os, sys; sys.exit(os.environ['REPORT'])", REPORT="no data")
    assert capfd.readouterr().err == "no data\n"


def test_last_row(tmp_path):
    (tmp_path / "log.csv").write_text("epoch,mAP\n1,0.5\n2,0.75\n")
    assert runs.last_row(tmp_path) == {"epoch": "2", "mAP": "0.75"}
