"""train_reid.py as a person runs it: what it says and leaves behind, how it goes on after a kill, what it refuses."""

import csv
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import train_reid
from core.data.images import list_images
from core.engine import recipes, reid_training
from core.engine import run as core_run
from core.engine.checkpoint import load_checkpoint
from core.errors import InputError
from core.losses import build_loss, needs_pairs
from core.models.mask_rcnn import MaskRCNN
from core.models.reid import build_reid_model

pytestmark = pytest.mark.usefixtures("no_pictures")
ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--backbone", "resnet18", "--weights", "none", "--height", "32", "--width", "32", "--pad", "2"]
SMALL += ["--ids-per-batch", "4", "--images-per-id", "2", "--workers", "0", "--device", "cpu"]


def command(*arguments, processes=None):
    """The command line of a run, under torchrun if a number of processes is given."""
    start = [sys.executable]
    if processes:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*start, "train_reid.py", *map(str, arguments)]


def train(*arguments, processes=None):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(*arguments, processes=processes), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def read_log(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def assert_same_weights(first, second):
    first, second = (load_checkpoint(folder / "last.pth")["model"] for folder in (first, second))
    assert first.keys() == second.keys()
    different = [key for key in first if not torch.equal(first[key], second[key])]
    assert not different


def test_the_readme_command_in_small(baggage, tmp_path):
    said = train(
        *SMALL, "--backbone", "resnet18_with_mask", "--recipe", "quick", "--dataset", "mvb", "--data", baggage,
        "--epochs", 2, "--mask-size", 16, 16, "--output", tmp_path, "--name", "bags", "--height", 32,
        "--iterations-per-epoch", 3, processes=1,
    )  # fmt: skip
    folder = tmp_path / "bags"
    left = {path.name for path in folder.iterdir()}
    pictures = {"augmentation.png", "rank_list.png", "masks.png", "curves.png"}
    assert left == {"args.json", "log.csv", "train.log", "last.pth", "best.pth"} | pictures
    for name in pictures:
        assert min(Image.open(folder / name).size) > 100
    rows = read_log(folder)
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert {"cross_entropy", "triplet", "combined_mask", "lr", "images_per_second", "mAP", "mINP", "rank10"} <= set(
        rows[0]
    )
    parts = sum(float(rows[1][name]) for name in ("cross_entropy", "triplet", "combined_mask"))
    assert float(rows[1]["loss"]) == pytest.approx(parts)
    assert rows[0]["loss"] == "" and 0 < float(rows[0]["mAP"]) <= 1
    assert said.count("epoch   ") == 3 and "recipe quick" in said
    assert (folder / "train.log").read_text() in said
    args = json.loads((folder / "args.json").read_text())
    assert args["mask_target"] == "instance"  # every training picture has a mask
    assert args["recipe"] == "quick" and args["epochs"] == 2 and args["versions"]["torch"] == torch.__version__
    state = load_checkpoint(folder / "best.pth", "reid")
    assert state["input_size"] == [32, 32] and len(state["identities"]) == 6 and state["network"]["with_mask"]
    threshold = state["threshold"]  # of the pairs of 3 bags, 2 pictures of each side: 6 x 6 less 3 x 4
    assert (threshold["impostor_pairs"], threshold["genuine_pairs"]) == (24, 12)
    assert threshold["false_accept_rate"] == 0.01 and 0 <= threshold["true_accept_rate"] <= 1


def test_options_win_over_recipes_and_recipes_are_the_published_ones():
    def parse(*argv):
        return train_reid.options.parse(
            train_reid.get_parser(), train_reid.RECIPES, train_reid.default_recipe, list(argv)
        )

    assert parse().recipe == "quick"
    assert parse("--dataset", "market1501").recipe == "bot"
    bot = parse("--data", "x", "--dataset", "folder")
    assert (bot.recipe, bot.height, bot.width, bot.lr, bot.milestones) == ("bot", 256, 128, 3.5e-4, [40, 70])
    suitcase = parse("--recipe", "suitcase", "--lr", "0.001")
    assert (suitcase.lr, suitcase.pooling, suitcase.iterations_per_epoch, suitcase.autoaugment) == (
        0.001,
        "gem",
        200,
        True,
    )


def test_every_recipe_fits_its_options_and_its_loss():
    parser = train_reid.get_parser()
    known = vars(parser.parse_args([]))
    for name, recipe in recipes.RECIPES.items():
        assert set(recipe) <= set(known), name
        for loss in recipes.LOSSES[name]:
            assert min(recipe["ids_per_batch"], recipe["images_per_id"]) > 1 or not needs_pairs(loss), name
        args = SimpleNamespace(**{**known, **recipe})
        network = torch.nn.ModuleDict({"backbone": torch.nn.Linear(1, 1), "head": torch.nn.Linear(1, 1)})
        criterion = build_loss("+".join(recipes.LOSSES[name]), 2, 1, margin=args.margin)
        step = reid_training.build_step(network, criterion, args, torch.device("cpu"), 1)
        assert step.scheduler.get_last_lr()[-1] <= max(args.lr, args.head_lr)
    assert set(recipes.PUBLISHED) <= set(recipes.RECIPES) == set(recipes.LOSSES)


EVERYTHING = [
    "--dropout",
    "0.3",
    "--ema",
    "0.9",
    "--autoaugment",
    "--blur",
    "0.5",
    "--accumulate",
    "2",
    "--clip-gradient",
]
EVERYTHING += ["1", "--freeze-epochs", "1", "--loss", "cross_entropy+triplet+0.0005*center+0.05*gaussian_mask"]
EVERYTHING += ["--backbone", "resnet18_with_mask", "--mask-size", "16", "16", "--schedule", "cosine"]
EVERYTHING += ["--mask-decoder", "light", "--mask-pooling", "soft", "--hide-background", "0.5"]


def kill_and_resume(options, folder):
    """A run that is killed at two random moments, within 5 seconds of its start and within 1.5 of its first checkpoint,
    resumed each time, and ends."""
    moments = random.Random(0)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCHELASTIC_MAX_RESTARTS": "1",
    }  # so it may begin by --resume
    for number in range(2):
        process = subprocess.Popen(
            command(*options, "--name", folder.name, "--resume"), cwd=ROOT, env=environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        while number == 1 and not (folder / "last.pth").exists() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(moments.uniform(0, 1.5 if number else 5))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for name in ("last.pth", "best.pth"):
            if (folder / name).exists():
                load_checkpoint(folder / name, "reid")
    assert (folder / "last.pth").exists()
    train(*options, "--name", folder.name, "--resume")


@pytest.mark.slow
def test_killed_at_two_moments_and_resumed_it_ends_with_the_same_weights(baggage, tmp_path):
    options = [*SMALL, *EVERYTHING, "--dataset", "mvb", "--data", baggage, "--epochs", 3, "--output", tmp_path]
    options += ["--deterministic", "--workers", 1]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    with ThreadPoolExecutor(1) as pool:  # a core each
        whole = pool.submit(train, *options, "--name", straight.name)
        kill_and_resume(options, killed)
        whole.result()
    logs = [read_log(folder) for folder in (straight, killed)]
    for row in chain(*logs):
        row.pop("images_per_second")
    assert_same_weights(straight, killed)
    assert logs[0] == logs[1]
    assert not list(killed.glob(".*")) and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("option", "file"),
    [("--weights", "weights.pth"), ("--resume", "last.pth"), ("--data", "set"), ("--output", "runs")],
)
def test_a_folder_that_nobody_may_look_into_is_one_line(run, baggage, tmp_path, monkeypatch, option, file):
    """Simulated, since the tests may run as root, who may look everywhere."""
    forbidden = str(tmp_path / "secret")

    def denied(of):
        def call(path, *arguments, **how):
            if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(forbidden):
                raise PermissionError(13, "Permission denied", os.fspath(path))
            return of(path, *arguments, **how)

        return call

    monkeypatch.setattr(os, "stat", denied(os.stat))
    monkeypatch.setattr(os, "mkdir", denied(os.mkdir))
    options = ["--dataset", "mvb", "--data", baggage, "--output", tmp_path, "--epochs", 1]
    line = refused(run, *options, option, f"{forbidden}/{file}")
    assert "secret" in line and ("Permission denied" in line or option == "--data")


@pytest.mark.parametrize(("calls", "words"), [(2, "with epoch 1 trained"), (3, "with epoch 2 trained")])
def test_stopped_by_sigterm_in_an_evaluation_it_ends_with_the_same_bits(
    run, baggage, tmp_path, monkeypatch, calls, words
):
    options = [*SMALL, "--dataset", "mvb", "--data", baggage, "--epochs", 2, "--output", tmp_path, "--ema", 0.5]
    options += ["--iterations-per-epoch", 1]
    assert run(train_reid, *options, "--name", "straight")[0] == 0
    evaluate_reid = train_reid.reid.evaluate
    counted = iter(range(1, 99))  # the first is of epoch 0

    def evaluate_or_stop(*arguments):
        if next(counted) == calls:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate_reid(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train_reid.reid, "evaluate", evaluate_or_stop)
        code, _, err = run(train_reid, *options, "--name", "stopped")
    assert code == 143 and err.startswith(f"stopped by SIGTERM {words} and saved: --resume evaluates it")
    code, said, err = run(train_reid, *options, "--name", "stopped", "--resume")
    assert code == 0 and ", to be evaluated" in said, err
    assert_same_weights(tmp_path / "straight", tmp_path / "stopped")
    logs = [[{**row, "images_per_second": 0} for row in read_log(tmp_path / name)] for name in ("straight", "stopped")]
    assert logs[0] == logs[1]
    best = [load_checkpoint(tmp_path / name / "best.pth") for name in ("straight", "stopped")]
    assert (best[0]["epoch"], best[0]["best"]) == (best[1]["epoch"], best[1]["best"])


def test_resumed_after_its_last_epoch_it_only_draws_its_pictures(run, baggage, tmp_path):
    options = [*SMALL, "--dataset", "mvb", "--data", baggage, "--epochs", 1, "--output", tmp_path, "--name", "bags"]
    assert run(train_reid, *options)[0] == 0
    before = load_checkpoint(tmp_path / "bags" / "last.pth")
    code, said, _ = run(train_reid, *options, "--resume")
    assert code == 0 and "continuing from" in said and "epoch   1" not in said
    assert load_checkpoint(tmp_path / "bags" / "last.pth")["epoch"] == before["epoch"] == 1


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(run, run_on_two, baggage, tmp_path):
    options = [*SMALL, "--dataset", "mvb", "--data", baggage, "--backbone", "resnet18_with_mask", "--mask-size", 16, 16]
    options += ["--loss", "cross_entropy+triplet+gaussian_mask", "--mask-threshold", 0.1, "--gather"]
    # Four epochs of one step: four lines with the losses. Adam would turn rounding into steps of full size.
    options += ["--freeze-batch-norm", "--epochs", 4, "--iterations-per-epoch", 1, "--optimizer", "sgd", "--lr", 0.01]
    options += ["--warmup-epochs", 0, "--eval-every", 9, "--output", tmp_path]
    assert run(train_reid, *options, "--ids-per-batch", 4, "--name", "one")[0] == 0
    run_on_two(train_reid, *options, "--ids-per-batch", 2, "--name", "two")
    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    for alone, together in zip(one[1:], two[1:], strict=True):
        for name in ("loss", "cross_entropy", "triplet", "gaussian_mask"):
            assert float(together[name]) == pytest.approx(float(alone[name]), abs=1e-4)
    assert float(two[-1]["mAP"]) == pytest.approx(float(one[-1]["mAP"]), abs=1e-3)
    one, two = (load_checkpoint(tmp_path / name / "last.pth")["model"] for name in ("one", "two"))
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_processes_save_the_network_that_they_evaluated(run, baggage, tmp_path):
    """BatchNorm in training mode, averaged weights, a backbone that thaws, bf16, accumulation: all under DDP.

    The loss needs no classifier, and DDP stops in the second step where a parameter gets no gradient.
    """
    options = [*SMALL, "--dataset", "mvb", "--data", baggage, "--output", tmp_path, "--name", "bags"]
    options += ["--epochs", 2, "--freeze-epochs", 1, "--ema", 0.5, "--amp", "bf16", "--accumulate", 2]
    options += ["--ids-per-batch", 2, "--loss", "triplet", "--embedding-dim", 64, "--channels-last"]
    train(*options, processes=2)
    assert not any("classifier" in key for key in load_checkpoint(tmp_path / "bags" / "last.pth")["model"])
    logged = read_log(tmp_path / "bags")[-1]
    code, said, err = run(evaluate, tmp_path / "bags" / "last.pth", "--amp", "bf16", "--device", "cpu")
    assert code == 0, err
    folder = Path(said.split("written to ")[-1].strip())
    found = json.loads((folder / "metrics.json").read_text())["results"]["plain"]
    assert {name: found[name] for name in ("mAP", "mINP", "rank1")} == pytest.approx(
        {name: float(logged[name]) for name in ("mAP", "mINP", "rank1")}
    )


def test_nothing_left_to_learn(run, baggage, tmp_path):
    options = ["--dataset", "mvb", "--data", baggage, "--output", tmp_path, "--epochs", 1]
    assert "leaves nothing to learn" in refused(run, *options, "--loss", "triplet", "--freeze-epochs", 1)
    assert not list(tmp_path.iterdir())


def test_masks_of_a_checkpoint_for_data_that_has_none(run, tmp_path, baggage):
    """Predicted once and kept beside the data; with a second branch, evaluated every second epoch, and resumed."""
    data = copy(baggage, tmp_path / "data")
    content = json.loads((data / "MVB_train" / "Info" / "train.json").read_text())
    for entry in content["image"]:
        del entry["bbox"], entry["segmentation"]
    (data / "MVB_train" / "Info" / "train.json").write_text(json.dumps(content))
    detector = MaskRCNN("resnet18", 2, min_size=32, max_size=48, box_roi_output_size=2, rpn_post_nms_top_n_test=20)
    state = {"kind": "mask_rcnn", "model": detector.state_dict(), "ema": None, "network": detector.options, "args": {}}
    torch.save({**state, "categories": [[1, "bag"]], "epoch": 1, "best": 0.1}, tmp_path / "mask.pth")
    arguments = [*SMALL, "--backbone", "resnet18_with_mask", "--recipe", "quick", "--dataset", "mvb", "--data", data]
    arguments += ["--height", 32, "--mask-size", 8, 8, "--mask-target", "predicted", "--output", tmp_path]
    arguments += ["--mask-checkpoint", tmp_path / "mask.pth", "--mask-pooling", "branch", "--hide-background", 0.5]
    arguments += ["--iterations-per-epoch", 1, "--eval-every", 2, "--name", "bags"]
    arguments += ["--loss", "0.5*CrossEntropy+0.5*MSLoss+0.001*Center+combined_mask", "--head-lr", 0.01]
    code, said, err = run(train_reid, *arguments, "--epochs", 2)
    assert code == 0, err
    (cache,) = data.glob("masks-*.json")
    assert len(json.loads(cache.read_text())["masks"]) == 24 and "24 pictures" in said
    state = load_checkpoint(tmp_path / "bags" / "last.pth")
    assert state["threshold"] and "mask_branch.1.weight" in state["model"]
    assert list(state["loss"]) == ["losses.center.0.centers", "losses.center.1.centers"]
    names = ["cross_entropy", "multi_similarity", "center"]
    columns = [f"{name}/{branch}" for name in names for branch in ("global", "masked")]
    row = read_log(tmp_path / "bags")[1]
    assert [name for name in row if "/" in name] == columns
    assert float(row["loss"]) == pytest.approx(sum(float(row[name]) for name in [*columns, "combined_mask"]))
    both = float(row["cross_entropy/global"]) + float(row["cross_entropy/masked"])
    assert f"cross_entropy {both:.4f}  multi_similarity " in said and "masked" not in said.split("epoch   1")[1]

    code, said, err = run(train_reid, *arguments, "--epochs", 4, "--resume")
    assert code == 0, err
    assert "looks for the object" not in said and "after epoch 2" in said
    assert [row["mAP"] != "" for row in read_log(tmp_path / "bags")] == [True, False, True, False, True]


def test_a_checkpoint_has_no_threshold_of_other_weights(run, baggage, tmp_path, monkeypatch):
    saved = {}
    monkeypatch.setattr(
        core_run, "save_run", lambda folder, state, improved: saved.update({state["epoch"]: state["threshold"]})
    )
    options = ["--dataset", "mvb", "--data", baggage, "--output", tmp_path, "--epochs", 3, "--eval-every", 2]
    code, _, err = run(train_reid, *SMALL, *options, "--iterations-per-epoch", 1)
    assert code == 0, err
    assert {epoch: threshold is not None for epoch, threshold in saved.items()} == {0: True, 1: False, 2: True, 3: True}


def test_a_network_of_several_branches_from_beginning_to_end(run, baggage, tmp_path):
    """LightMBN on OSNet x0.25: its log has each branch's share, its checkpoint is enough to evaluate and go on."""
    arguments = ["--dataset", "mvb", "--data", baggage, "--output", tmp_path, "--name", "run", "--weights", "none"]
    arguments += ["--model", "lmbn_n", "--backbone", "osnet_x0_25", "--branches", "global,part", "--embedding-dim", 16]
    arguments += ["--loss", "0.5*CrossEntropy+0.5*MSLoss", "--height", 64, "--width", 32, "--pad", 0, "--workers", 0]
    arguments += ["--ids-per-batch", 3, "--images-per-id", 2, "--iterations-per-epoch", 1, "--head-lr", 1e-3]
    code, said, err = run(train_reid, *arguments, "--epochs", 1)
    assert code == 0, err
    assert "network: lmbn_n-osnet_x0_25; loss: 0.5*CrossEntropy+0.5*MSLoss" in said
    row = read_log(tmp_path / "run")[1]
    names = [f"cross_entropy/{branch}" for branch in ("global", "drop", "part", "part_1", "part_2")]
    names += [f"multi_similarity/{branch}" for branch in ("global", "drop", "part")]
    assert sum(float(row[name]) for name in names) == pytest.approx(float(row["loss"]))
    state = load_checkpoint(tmp_path / "run" / "best.pth")
    assert state["input_size"] == [64, 32] and state["network"]["branches"] == ["global", "part"]
    code, said, err = run(evaluate, tmp_path / "run" / "best.pth", "--workers", 0, "--rank-list", 0)
    assert code == 0 and f"{100 * float(row['mAP']):.2f}" in said, err

    code, said, err = run(train_reid, *arguments, "--epochs", 2, "--resume")
    assert code == 0 and "after epoch 1" in said, err


def test_data_without_query_and_gallery(run, baggage, tmp_path, monkeypatch):
    """vehiclex is published for training only."""
    whole = train_reid.reid.load_reid_dataset("mvb", baggage)
    monkeypatch.setattr(train_reid.reid, "find_dataset", lambda _, root: root)
    monkeypatch.setattr(train_reid.reid, "load_reid_dataset", lambda *_: whole._replace(query=[], gallery=[]))
    options = [
        *SMALL,
        "--dataset",
        "vehiclex",
        "--data",
        baggage,
        "--output",
        tmp_path,
        "--name",
        "cars",
        "--epochs",
        1,
    ]
    code, said, err = run(train_reid, *options)
    assert code == 0 and "trains without evaluation" in said, err
    assert (tmp_path / "cars" / "last.pth").exists() and not (tmp_path / "cars" / "rank_list.png").exists()


def test_what_a_resumed_run_changes_is_said_and_a_refused_one_leaves_the_run_as_it_was(run, baggage, tmp_path):
    options = [*SMALL, "--dataset", "mvb", "--data", baggage, "--output", tmp_path, "--name", "bags", "--epochs", 1]
    assert run(train_reid, *options)[0] == 0
    before = (tmp_path / "bags" / "args.json").read_bytes()
    assert "without averaged weights" in refused(run, *options, "--resume", "--ema", 0.9)
    assert (tmp_path / "bags" / "args.json").read_bytes() == before
    code, said, _ = run(train_reid, *options, "--epochs", 2, "--seed", 5, "--resume")
    assert code == 0 and "changed: epochs 1 -> 2, seed 0 -> 5" in said


def test_with_more_epochs_the_rate_is_that_of_a_run_of_so_many(run, baggage, tmp_path):
    options = [*SMALL, "--dataset", "mvb", "--data", baggage, "--output", tmp_path, "--schedule", "cosine"]
    options += ["--warmup-epochs", 0, "--eval-every", 9]
    assert run(train_reid, *options, "--name", "whole", "--epochs", 3)[0] == 0
    assert run(train_reid, *options, "--name", "parts", "--epochs", 2)[0] == 0
    assert run(train_reid, *options, "--name", "parts", "--epochs", 3, "--resume")[0] == 0
    whole, parts = ([row["lr"] for row in read_log(tmp_path / name)][1:] for name in ("whole", "parts"))
    assert parts[2] == whole[2] and len(set(whole)) == 3


def test_a_run_is_not_continued_while_it_is_alive(run, baggage, tmp_path):
    options = [*SMALL, "--dataset", "mvb", "--data", baggage, "--output", tmp_path, "--name", "bags", "--epochs", 1]
    assert run(train_reid, *options)[0] == 0
    before = (tmp_path / "bags" / "train.log").read_bytes()
    hold = (
        "import sys, time; from core.engine.checkpoint import lock_run; lock = lock_run(sys.argv[1]); print(flush=True)"
    )
    command = [sys.executable, "-c", f"{hold}; time.sleep(60)", str(tmp_path / "bags")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as holder:
        holder.stdout.readline()
        line = refused(run, *options, "--epochs", 2, "--resume")
        holder.kill()
    assert f"bags: its run is alive (process {holder.pid}" in line
    assert (tmp_path / "bags" / "train.log").read_bytes() == before


def test_an_identity_under_another_name_is_not_continued_with(run, tmp_path):
    """Its place among the classes would be another, and so would those behind it."""
    for number, name in enumerate(("blue", "red", "white", "yellow")):
        for part, picture in product(("train", "test"), range(2)):
            folder = tmp_path / "bags" / part / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (60 * number, 90 * picture, len(part))).save(folder / f"{picture}.png")
    options = [*SMALL, "--dataset", "folder", "--data", tmp_path / "bags", "--output", tmp_path, "--epochs", 1]
    assert run(train_reid, *options, "--name", "run")[0] == 0
    (tmp_path / "bags" / "train" / "blue").rename(tmp_path / "bags" / "train" / "sky")
    line = refused(run, *options, "--name", "run", "--epochs", 2, "--resume")
    assert "trained on 4 identities, the data have 4, and they differ (['blue', 'sky'])" in line


def test_frozen_backbone_stays_and_then_learns(run, baggage, tmp_path):
    options = [*SMALL, "--dataset", "mvb", "--data", baggage, "--output", tmp_path, "--freeze-epochs", 1]
    weights = []
    for epochs in (1, 2):
        assert run(train_reid, *options, "--epochs", epochs, "--warmup-epochs", 0)[0] == 0
        folder = max(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        weights.append(load_checkpoint(folder / "last.pth")["model"])
    torch.manual_seed(0)
    fresh = build_reid_model("resnet18", 6).state_dict()
    for key in ("backbone.conv1.weight", "backbone.bn1.running_mean"):
        assert torch.equal(weights[0][key], fresh[key])
        assert not torch.equal(weights[1][key], fresh[key])
    assert not torch.equal(weights[0]["classifier.weight"], fresh["classifier.weight"])


def test_no_decoder_without_a_mask_loss(run, baggage, tmp_path):
    options = [*SMALL, "--dataset", "mvb", "--data", baggage, "--output", tmp_path, "--epochs", 1, "--name", "bags"]
    code, said, _ = run(train_reid, *options, "--backbone", "resnet18_with_mask", "--loss", "triplet+cross_entropy")
    assert code == 0 and "no mask decoder is built" in said
    assert not any("mask_decoder" in key for key in load_checkpoint(tmp_path / "bags" / "last.pth")["model"])
    assert not (tmp_path / "bags" / "masks.png").exists()


def test_masks_are_regressed_on_gaussians_where_the_data_has_none(run, shared_data, tmp_path):
    data = ["--dataset", "market1501", "--data", shared_data / "coil20_reid", "--recipe", "quick", "--output", tmp_path]
    options = [*SMALL, *data, "--backbone", "resnet18_with_mask", "--iterations-per-epoch", 1, "--epochs", 1]
    code, said, err = run(train_reid, *options, "--mask-size", 16, 16)
    assert code == 0, err
    assert "mask target gaussian" in said and said.count("the data has no boxes") == 1


def test_weights_that_cannot_be_had_are_one_warning(run, baggage, tmp_path, monkeypatch):
    monkeypatch.setattr("core.models.weights.PUBLISHED", {"resnet18": "http://127.0.0.1:9/resnet18-f37072fd.pth"})
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    options = [*SMALL, "--dataset", "mvb", "--data", baggage, "--output", tmp_path, "--epochs", 0]
    code, said, _ = run(train_reid, *options, "--weights", "imagenet")
    assert code == 0 and said.count("warning:") == 1 and "training from scratch" in said


def copy(source, folder):
    shutil.copytree(source, folder)
    return folder


def refused(run, *arguments):
    """The one line with which a run is refused."""
    code, _, err = run(train_reid, *SMALL, *arguments)
    lines = [line for line in err.splitlines() if line.startswith("error")]
    assert code == 2 and len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dataset", "market"], "unknown data set 'market'"),
        (["--data", "somewhere"], "needs --dataset"),
        (["--dataset", "market1501", "--data", "no/such/folder"], "no/such/folder"),
        (["--backbone", "resnet51"], "unknown backbone 'resnet51'"),
        (["--loss", "1*triplett"], "unknown loss 'triplett'"),
        (["--loss", "1*gaussian_mask"], "use --backbone resnet18_with_mask"),
        (["--weights", "no/such/file.pth"], "no such file: no/such/file.pth"),
        (["--sync-batch-norm"], "--sync-batch-norm works on CUDA alone"),
        (["--resume", "no/such/file.pth"], "no such file"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--sigma-ratio", "0"], "argument --sigma-ratio: '0' is not a finite number above 0"),
        (["--mask-pooling", "soft"], "--mask-pooling soft needs a mask that is learned"),
        (["--mask-decoder", "light"], "--mask-decoder light: use a --backbone ..._with_mask"),
        (["--mask-target", "predicted"], "--mask-checkpoint PATH belong together"),
        (["--mask-checkpoint", "mask.pth"], "--mask-checkpoint PATH belong together"),
        (["--mask-target", "predicted", "--mask-checkpoint", "mask.pth"], "nothing would use the masks"),
        (
            ["--mask-target", "predicted", "--mask-checkpoint", "no/mask.pth", "--hide-background", "1"],
            "no such file: no/mask.pth",
        ),
        (["--model", "pcb"], "6 parts of a map of 2 rows: give fewer parts or a larger picture height"),
        (["--model", "mgn", "--parts", "3"], "network mgn has no choice of parts: leave it out, or use pcb or pyramid"),
        (["--model", "lmbn_r", "--branches", "global,head"], "the branches global, part, channel, not global, head"),
        (["--attention", "cbam", "--attention-stages", "3,5"], "'5' is not a stage from 1 to 4"),
        (["--backbone", "osnet_x0_25", "--attention", "se"], "attention is for ResNets, osnet_x0_25 has its own"),
        (["--loss", "arcface+triplet+0.5*Focal"], "arcface reads cosines and focal class scores"),
    ],
)
def test_bad_options_are_one_line(run, baggage, tmp_path, arguments, said):
    data = [] if "--dataset" in arguments or "--data" in arguments else ["--dataset", "mvb", "--data", baggage]
    assert said in refused(run, *data, "--output", tmp_path, *arguments)
    assert not list(tmp_path.iterdir())  # refused before anything is made


@pytest.mark.parametrize(
    "arguments",
    [
        ["--images-per-id", "1"],
        ["--images-per-id", "1", "--recipe", "suitcase"],
        ["--images-per-id", "1", "--loss", "softmax_triplet", "--gather"],
        ["--images-per-id", "1", "--loss", "cross_entropy+0.01*TripletLoss"],
        ["--ids-per-batch", "1"],
        ["--ids-per-batch", "1", "--gather"],
    ],
)
@pytest.mark.parametrize("data", [[], ["--dataset", "mvb", "--data", "no/such/folder"]])
def test_triplets_that_no_batch_has_are_refused_before_data_are_made_or_read(
    run, tmp_path, monkeypatch, arguments, data
):
    monkeypatch.chdir(tmp_path)
    line = refused(run, *data, *arguments)
    assert "compares two identities or more" in line and arguments[0] in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--images-per-id", 1, "--loss", "cross_entropy+0*triplet"],
        ["--images-per-id", 1, "--loss", "cross_entropy+center"],
        ["--ids-per-batch", 1, "--loss", "cross_entropy", "--freeze-batch-norm"],
        ["--images-per-id", 1, "--epochs", 0],  # which trains nothing
    ],
)
def test_one_picture_of_each_identity_without_triplets(run, baggage, tmp_path, arguments):
    data = ["--dataset", "mvb", "--data", baggage, "--output", tmp_path, "--epochs", 1, "--iterations-per-epoch", 1]
    code, _, err = run(train_reid, *SMALL, *data, *arguments)
    assert code == 0, err


def test_gathered_batches_of_one_identity_each_have_triplets(monkeypatch):
    """Two processes with --gather see two identities together, and without it each its own."""
    monkeypatch.setattr(train_reid.distributed, "world_size", lambda: 2)

    def settle(*arguments):
        parse = train_reid.options.parse
        args = parse(train_reid.get_parser(), train_reid.RECIPES, train_reid.default_recipe, list(arguments))
        return train_reid.settle(args)

    with pytest.raises(InputError, match="--gather"):
        settle("--ids-per-batch", "1")
    settle("--ids-per-batch", "1", "--gather")
    with pytest.raises(InputError, match="has 2 and 1"):
        settle("--ids-per-batch", "1", "--gather", "--images-per-id", "1")


def test_one_sub_folder_for_each_bag_is_enough(run, tmp_path):
    """Nobody split them: some are held out, the batch fits the others, and `evaluate.py` holds out the same."""
    for bag in range(5):
        (tmp_path / "bags" / str(bag)).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (32, 32), (50 * bag, 90, 99 * number)).save(tmp_path / "bags" / str(bag) / f"{number}.png")
    data = ["--dataset", "folder", "--data", tmp_path / "bags"]
    small = [*SMALL, "--ids-per-batch", 16, "--epochs", 1, "--output", tmp_path / "runs", "--val-fraction", 0.4]
    code, out, err = run(train_reid, *data, *small)
    assert code == 0, err
    assert f"{tmp_path / 'bags'} has no folder test: 2 of its 5 identities are held out" in out
    assert "--ids-per-batch 16 is more than the 3 identities give: it is 3 now" in out and "batch: 3 identities" in out
    best, features = tmp_path / "runs" / "reid-folder-resnet18" / "best.pth", tmp_path / "features.npz"
    learned = load_checkpoint(best)["identities"]
    for named in ([], data):
        code, out, err = run(evaluate, best, *named, "--device", "cpu", "--workers", 0, "--save-features", features)
        assert code == 0 and "query 2 pictures of 2 identities" in out, err
        with np.load(features) as saved:
            tested = {Path(path).parent.name for path in saved["gallery_paths"]}
        assert tested == set("01234").difference(learned) and len(learned) == 3


def test_an_empty_folder_and_one_without_usable_names(run, tmp_path):
    (tmp_path / "data").mkdir()
    options = ["--dataset", "market1501", "--data", tmp_path / "data", "--output", tmp_path / "runs"]
    assert str(tmp_path / "data") in refused(run, *options)
    for part in ("bounding_box_train", "query", "bounding_box_test"):
        (tmp_path / "data" / part).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / part / "holiday.jpg")
    assert "holiday.jpg" in refused(run, *options)


@pytest.mark.parametrize("damage, workers", [("zero bytes", 0), ("truncated", 0), ("truncated", 1)])
def test_a_broken_picture_is_named_and_stops_the_run_unless_skipped(run, baggage, tmp_path, damage, workers):
    data = copy(baggage, tmp_path / "data")
    victim = list_images(data / "MVB_train" / "Image")[3]
    content = Path(victim).read_bytes()
    Path(victim).write_bytes(b"" if damage == "zero bytes" else content[: len(content) // 2])
    options = ["--dataset", "mvb", "--data", data, "--output", tmp_path / "runs", "--epochs", 3, "--workers", workers]
    assert Path(victim).name in refused(run, *options)
    assert not (tmp_path / "runs").exists()  # so that the next run has the name
    code, said, _ = run(train_reid, *SMALL, *options, "--skip-broken")
    assert code == 0 and Path(victim).name in said and "1 of 24 train pictures left out" in said


def test_an_identity_with_one_picture_is_trained_on(run, tmp_path):
    for part, identities in (("train", "abcd"), ("query", "ef"), ("gallery", "ef")):
        for number, identity in enumerate(identities):
            (tmp_path / "data" / part / identity).mkdir(parents=True)
            Image.new("RGB", (20, 30), (40 * number, 90, 30)).save(tmp_path / "data" / part / identity / "1.png")
    code, _, err = run(
        train_reid, *SMALL, "--dataset", "folder", "--data", tmp_path / "data", "--output", tmp_path, "--epochs", 1
    )
    assert code == 0, err


def test_two_sets_are_trained_together(run, baggage, tmp_path):
    for part, identities in (("train", "abcd"), ("query", "ef"), ("gallery", "ef")):
        for number, identity in enumerate(identities):
            (tmp_path / "data" / part / identity).mkdir(parents=True)
            Image.new("RGB", (20, 30), (40 * number, 90, 30)).save(tmp_path / "data" / part / identity / "1.png")
    options = ["--dataset", "mvb+folder", "--data", baggage, tmp_path / "data", "--output", tmp_path, "--name", "both"]
    assert run(train_reid, *SMALL, *options, "--epochs", 1, "--iterations-per-epoch", 1)[0] == 0
    state = load_checkpoint(tmp_path / "both" / "last.pth")
    assert len(state["identities"]) == len(set(state["identities"])) == 10 and "folder/a" in state["identities"]
    assert state["args"]["data"] == [str(baggage), str(tmp_path / "data")]
    assert json.loads((tmp_path / "both" / "args.json").read_text())["dataset"] == "mvb+folder"
    code, said, _ = run(evaluate, tmp_path / "both/last.pth", "--device", "cpu", "--workers", 0, "--rank-list", 0)
    assert code == 0 and "on mvb+folder in" in said and "query 8 pictures of 5 identities" in said


def test_augmentation_preview_draws_and_stops(run, baggage, tmp_path, monkeypatch):
    monkeypatch.undo()
    options = ["--dataset", "mvb", "--data", baggage, "--output", tmp_path / "out", "--random-patch", 1]
    code, said, _ = run(train_reid, *SMALL, *options, "--augmentation-preview")
    assert code == 0 and [path.name for path in (tmp_path / "out").iterdir()] == ["augmentation.png"]
    assert min(Image.open(tmp_path / "out" / "augmentation.png").size) > 100 and "augmentation.png" in said


def test_one_camera_and_an_absent_identity(run, one_camera, tmp_path):
    options = ["--dataset", "market1501", "--data", one_camera, "--output", tmp_path / "runs"]
    assert "the protocol no_camera" in refused(run, *options)
    for path in list_images(one_camera / "query"):
        Path(path).rename(Path(path).with_name("9" + Path(path).name[1:]))
    assert "identity of the gallery" in refused(run, *options, "--protocol", "no_camera")


def test_a_loss_that_becomes_nan_names_its_parts_and_its_pictures(run, baggage, tmp_path):
    data = ["--dataset", "mvb", "--data", baggage, "--output", tmp_path]
    line = refused(run, *data, "--optimizer", "sgd", "--lr", "1e30", "--warmup-epochs", 0, "--epochs", 3)
    assert "cross_entropy" in line and "triplet" in line and ".jpg" in line and "not finite in epoch" in line


class Code:
    def __reduce__(self):
        return print, ("ran",)


def test_checkpoints_that_do_not_fit(run, baggage, tmp_path):
    data = ["--dataset", "mvb", "--data", baggage, "--output", tmp_path, "--epochs", 1, "--name", "bags"]
    assert run(train_reid, *SMALL, *data)[0] == 0
    last = tmp_path / "bags" / "last.pth"
    line = refused(run, *data, "--backbone", "resnet34", "--resume")
    assert "backbone is resnet18 there and resnet34 here" in line
    other = tmp_path / "detector.pth"
    torch.save({**load_checkpoint(last), "kind": "mask_rcnn"}, other)
    assert "kind mask_rcnn" in refused(run, *data, "--resume", other)
    bad = tmp_path / "bad.pth"
    bad.write_bytes(pickle.dumps({"kind": "reid", "model": Code()}, protocol=2))
    for option in ("--resume", "--weights"):
        assert "never run" in refused(run, *data, option, bad)
    bad.write_bytes(last.read_bytes()[:-1000])
    assert "damaged" in refused(run, *data, "--resume", bad)


def test_a_run_folder_that_cannot_be_written(run, baggage, tmp_path):
    (tmp_path / "runs").write_text("a file where a folder should be")
    line = refused(run, "--dataset", "mvb", "--data", baggage, "--output", tmp_path / "runs", "--epochs", 1)
    assert "another --output" in line
