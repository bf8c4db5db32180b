"""train_mask_rcnn.py as a person runs it: what it says and leaves, how it goes on after a kill, what it refuses."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

import train_mask_rcnn
from core.engine.checkpoint import load_checkpoint, save_checkpoint
from core.models.weights import best_weights

pytestmark = pytest.mark.usefixtures("no_pictures")
ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--recipe", "quick", "--min-size", "64", "--max-size", "96", "--anchor-sizes", "8", "16", "24", "32", "48"]
SMALL += ["--rois-per-image", "16", "--rpn-samples", "32", "--pre-nms-train", "50", "--post-nms-train", "30"]
SMALL += ["--pre-nms-test", "50", "--post-nms-test", "20", "--workers", "0", "--device", "cpu"]
SMALL += ["--iterations-per-epoch", "2", "--epochs", "2", "--box-roi-size", "3", "--mask-roi-size", "7"]
LOSSES = ["loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"]


def train(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, "train_mask_rcnn.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, timeout=600, **output)
    assert done.returncode == 0, done.stdout
    return done.stdout


def read_log(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def assert_same_run(first, second):
    """Weights equal bit by bit, and the same numbers in log.csv but for the speed."""
    one, other = (load_checkpoint(folder / "last.pth")["model"] for folder in (first, second))
    assert one.keys() == other.keys()
    assert not [key for key in one if not torch.equal(one[key], other[key])]
    for one, other in zip(read_log(first), read_log(second), strict=True):
        assert {**one, "images_per_second": 0} == {**other, "images_per_second": 0}


def test_what_a_run_says_and_leaves_behind(shapes, tmp_path, run, monkeypatch):
    monkeypatch.undo()  # its pictures too
    code, said, _ = run(train_mask_rcnn, *SMALL, "--data", shapes, "--output", tmp_path, "--name", "shapes")
    assert code == 0
    folder = tmp_path / "shapes"
    assert {path.name for path in folder.iterdir()} == {
        *("args.json", "log.csv", "train.log", "curves.png", "predictions", "last.pth", "best.pth")
    }
    rows = read_log(folder)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert list(rows[0])[:9] == ["epoch", "lr", "loss", *LOSSES, "images_per_second"]
    assert len([name for name in rows[0] if name.startswith(("mask_A", "box_A"))]) == 24
    assert float(rows[0]["loss"]) == pytest.approx(sum(float(rows[0][name]) for name in LOSSES))
    assert "train 8 pictures with 14 instances, val 4 pictures with 6 instances; classes: square, disc" in said
    assert "recipe quick" in said and said.count("epoch   ") == 2 and "mask AP" in said
    assert said.count("\nbox  ") == 2 and said.count("\nmask ") == 2  # the twelve numbers after each epoch
    assert "after the last epoch, by class" in said and "disc" in said
    assert (folder / "train.log").read_text() in said
    assert min(Image.open(folder / "curves.png").size) > 100
    assert len(list((folder / "predictions").iterdir())) == 4
    assert json.loads((folder / "args.json").read_text())["data"] == str(shapes)

    state = load_checkpoint(folder / "best.pth", "mask_rcnn")
    assert state["categories"] == [[3, "square"], [7, "disc"]]
    assert state["network"]["num_classes"] == 3 and state["network"]["norm"] == "batch"
    assert state["best"] == max(float(row["mask_AP"]) for row in rows)


@pytest.mark.slow
def test_it_learns(shapes, tmp_path, run):
    """Untrained AP is 0: the shapes are found after a minute of training from scratch."""
    options = ["--iterations-per-epoch", 24, "--ema", 0.9, "--min-lr", 1e-5]
    assert run(train_mask_rcnn, *SMALL, *options, "--data", shapes, "--output", tmp_path, "--name", "learns")[0] == 0
    first, last = read_log(tmp_path / "learns")
    assert float(last["loss"]) < 0.7 * float(first["loss"])
    assert float(last["mask_AP50"]) > 0.5 and float(last["box_AP50"]) > 0.5


KILLED_AFTER_ITS_FIRST_CHECKPOINT = """
import os, runpy, signal
from core.engine import checkpoint
save_run = checkpoint.save_run
def save_and_die(*arguments, **how):
    save_run(*arguments, **how)
    os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save_run = save_and_die
runpy.run_path("train_mask_rcnn.py", run_name="__main__")
"""


@pytest.mark.slow
def test_killed_and_resumed_is_as_if_nothing_had_happened(shapes, tmp_path):
    """With everything that has a state or draws random numbers: EMA, accumulation, augmentation, workers, two sizes."""
    options = [*SMALL, "--data", shapes, "--output", tmp_path, "--augmentation", 3, "--crop-size", 64, 80, "--ema", 0.9]
    options += ["--accumulate", 2, "--iterations-per-epoch", 3, "--epochs", 2, "--workers", 1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = [sys.executable, "-c", KILLED_AFTER_ITS_FIRST_CHECKPOINT, *map(str, options), "--name", "killed"]
    with ThreadPoolExecutor(1) as pool:  # a core each
        whole = pool.submit(train, *options, "--name", "whole")
        done = subprocess.run(killed, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        whole.result()
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert load_checkpoint(tmp_path / "killed" / "last.pth")["epoch"] == 1
    said = train(*options, "--name", "killed", "--resume", "--workers", 0)
    assert "continuing from" in said
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_two_processes(shapes, tmp_path, run_on_two):
    said = run_on_two(train_mask_rcnn, *SMALL, "--data", shapes, "--output", tmp_path, "--name", "two", "--epochs", 1)
    assert "2 pictures x 2 processes x 1 batches an update = 4 pictures" in said
    assert said.count("epoch   ") == 1 and len(read_log(tmp_path / "two")) == 1


def test_one_annotation_file_and_a_fraction(shapes, tmp_path, run):
    code, said, _ = run(
        train_mask_rcnn, *SMALL, "--train-images", shapes / "train2017", "--train-annotations",
        shapes / "annotations" / "instances_train2017.json", "--val-fraction", 0.25, "--output", tmp_path,
        "--epochs", 1, "--iterations-per-epoch", 1,
    )  # fmt: skip
    assert code == 0 and "train 6 pictures" in said and "val 2 pictures" in said
    assert "mask_AP" in read_log(tmp_path / "mask-rcnn-coco-resnet18")[0]


def test_without_validation_data_it_trains_and_says_so(shapes, tmp_path, run):
    code, said, _ = run(
        train_mask_rcnn, *SMALL, "--train-images", shapes / "train2017", "--train-annotations",
        shapes / "annotations" / "instances_train2017.json", "--output", tmp_path, "--name", "blind",
        "--epochs", 1, "--iterations-per-epoch", 1,
    )  # fmt: skip
    assert code == 0 and "trains without evaluation" in said
    assert {path.name for path in (tmp_path / "blind").iterdir()} >= {"last.pth", "log.csv"}
    assert not (tmp_path / "blind" / "best.pth").exists()


def test_augmentation_preview_draws_and_stops(shapes, tmp_path, run):
    code, said, _ = run(train_mask_rcnn, *SMALL, "--data", shapes, "--output", tmp_path, "--augmentation-preview")
    assert code == 0 and [path.name for path in tmp_path.iterdir()] == ["augmentation.png"]
    assert min(Image.open(tmp_path / "augmentation.png").size) > 300 and "augmentation.png" in said


def test_weights_of_a_run_start_another_and_keep_their_heads(shapes, tmp_path, run):
    options = [*SMALL, "--data", shapes, "--output", tmp_path, "--epochs", 1, "--iterations-per-epoch", 1]
    assert run(train_mask_rcnn, *options, "--name", "first")[0] == 0
    code, said, _ = run(
        train_mask_rcnn,
        *options,
        "--name",
        "second",
        "--weights",
        tmp_path / "first" / "last.pth",
        "--lr",
        1e-9,
        "--min-lr",
        0,
    )
    assert code == 0 and "frozen BatchNorm, 3 of 5 stages learn" in said
    key = "roi_heads.mask_predictor.mask_fcn_logits.weight"
    first, second = (load_checkpoint(tmp_path / name / "last.pth") for name in ("first", "second"))
    torch.testing.assert_close(best_weights(first)[key], second["model"][key], rtol=0, atol=1e-6)


def test_a_loss_that_is_not_finite_stops_the_run(shapes, tmp_path, run):
    code, _, error = run(
        train_mask_rcnn, *SMALL, "--data", shapes, "--output", tmp_path, "--optimizer", "sgd", "--lr", 1e30,
        "--schedule", "step", "--clip-gradient", 0,
    )  # fmt: skip
    assert code == 2 and error.count("\n") == 1
    assert "not finite" in error and "loss_mask" in error and ".png" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "nowhere"),
        (["--train-images", "{shapes}/train2017"], "belong together"),
        (["--val-images", "{shapes}", "--val-annotations", "{shapes}/x.json"], "nothing to train on"),
        (["--data", "{shapes}", "--val-fraction", "0.5"], "there is one"),
        (["--data", "{shapes}", "--val-fraction", "1"], "below 1"),
        (["--data", "{shapes}", "--weights", "nowhere.pth"], "no such file: nowhere.pth"),
        (["--data", "{shapes}", "--weights", "coco"], "resnet18"),
        (["--data", "{shapes}", "--norm", "sync"], "CUDA"),
        (["--data", "{shapes}", "--anchor-sizes", "32", "64"], "anchor-sizes"),
        (["--data", "{shapes}", "--augmentation", "4"], "augmentation"),
        (["--data", "{shapes}", "--backbone", "vgg16"], "vgg16"),
        (["--data", "{shapes}", "--device", "tpu"], "tpu"),
        (["--data", "{shapes}", "--resume", "nowhere.pth"], "nowhere.pth"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, shapes, tmp_path, run):
    arguments = [argument.format(shapes=shapes) for argument in arguments]
    code, _, error = run(train_mask_rcnn, *SMALL, "--output", tmp_path, *arguments)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not list(tmp_path.iterdir())


def test_a_broken_picture_is_named(shapes, tmp_path, run):
    root = shutil.copytree(shapes, tmp_path / "data")
    (root / "train2017" / "2.png").write_bytes(b"no picture")
    code, _, error = run(train_mask_rcnn, *SMALL, "--data", root, "--output", tmp_path, "--iterations-per-epoch", 0)
    assert code == 2 and "2.png" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["data"]  # no run folder, so that the next has its name
    code, said, _ = run(
        train_mask_rcnn, *SMALL, "--data", root, "--output", tmp_path, "--skip-broken", "--name", "rest"
    )
    assert code == 0 and "train 7 pictures" in said
    assert "1 of 8 pictures" in said and "2.png" in (tmp_path / "rest" / "train.log").read_text()


def test_a_resumed_run_needs_no_weights_and_may_have_other_thresholds(shapes, tmp_path, run):
    options = [*SMALL, "--data", shapes, "--output", tmp_path, "--iterations-per-epoch", 1]
    assert run(train_mask_rcnn, *options, "--name", "first", "--epochs", 1)[0] == 0
    start = tmp_path / "start.pth"
    shutil.copy(tmp_path / "first" / "last.pth", start)
    assert run(train_mask_rcnn, *options, "--name", "second", "--epochs", 1, "--weights", start)[0] == 0
    start.unlink()
    code, said, _ = run(
        train_mask_rcnn, *options, "--name", "second", "--epochs", 2, "--weights", start, "--resume", "--min-score", 0.3
    )
    assert code == 0 and "after epoch 1; changed" in said and "box_score_thresh 0.05 -> 0.3" in said
    assert "frozen BatchNorm, 3 of 5 stages learn" in said  # as where it started, with weights
    state = load_checkpoint(tmp_path / "second" / "last.pth")
    assert state["epoch"] == 2 and state["network"]["box_score_thresh"] == 0.3
    rows = read_log(tmp_path / "second")
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]  # its weights knew the classes before its first epoch
    assert state["best"] == max(float(row["mask_AP"]) for row in rows)


def test_options_that_do_little_are_told(shapes, tmp_path, run):
    code, said, _ = run(
        train_mask_rcnn, *SMALL, "--data", shapes, "--output", tmp_path, "--epochs", 1, "--iterations-per-epoch", 1,
        "--warmup-iterations", 1000, "--crop-size", 64, 64,
    )  # fmt: skip
    assert code == 0 and "--crop-size belongs to --augmentation 3" in said
    assert "warm-up of 1000 updates takes more than a third of all 1" in said


def test_no_epoch_evaluates_and_stops(shapes, tmp_path, run, monkeypatch):
    monkeypatch.undo()
    code, said, _ = run(
        train_mask_rcnn, *SMALL, "--data", shapes, "--output", tmp_path, "--name", "none", "--epochs", 0
    )
    assert code == 0 and "by class" in said and "next:" not in said and "warm-up" not in said
    assert {path.name for path in (tmp_path / "none").iterdir()} == {"args.json", "train.log", "predictions"}


def test_resume_refuses_another_network_and_other_classes(shapes, tmp_path, run):
    options = [*SMALL, "--data", shapes, "--output", tmp_path, "--epochs", 1, "--iterations-per-epoch", 1]
    assert run(train_mask_rcnn, *options, "--name", "run")[0] == 0
    checkpoint = tmp_path / "run" / "last.pth"
    code, _, error = run(train_mask_rcnn, *options, "--resume", checkpoint, "--backbone", "resnet34")
    assert code == 2 and "backbone_name is resnet18 there and resnet34 here" in error
    state = load_checkpoint(checkpoint)
    save_checkpoint(checkpoint, {**state, "categories": [[3, "square"], [7, "ball"]]})
    code, _, error = run(train_mask_rcnn, *options, "--resume", checkpoint)
    assert code == 2 and "ball" in error
    save_checkpoint(checkpoint, {**state, "kind": "reid"})
    code, _, error = run(train_mask_rcnn, *options, "--resume", checkpoint)
    assert code == 2 and "kind reid" in error
