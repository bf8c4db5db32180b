"""What a run leaves behind as text and numbers, alone, resumed, on another rank, and without the packages it needs."""

import csv
import json
import os
import subprocess
import sys
import types
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from core.engine import coco_evaluation
from core.engine import log as log_module
from core.engine.log import RunLog
from core.engine.terminal import Terminal
from core.errors import InputError
from core.retrieval.ranking import METRIC_NAMES

START = {"epoch": 0, "mAP": 0.25, "mINP": 0.125, "rank1": 0.5, "rank5": 0.75, "rank10": 1.0}


def options(**more):
    return Namespace(**{"lr": 3.5e-4, "loss": "triplet", "tensorboard": False, "wandb": False, **more})


def trained(epoch, **more):
    return {"epoch": epoch, "lr": 3.5e-4, "loss": 1.5, "triplet": 1.5, "images_per_second": 123.456, **more}


def read_log(folder):
    with open(folder / "log.csv", newline="") as file:
        reader = csv.DictReader(file)
        return reader.fieldnames, list(reader)


def test_an_epoch_is_one_tidy_line(tmp_path, capsys):
    log = RunLog(tmp_path, options(), METRIC_NAMES)
    log.say("data: 3 pictures")
    log.epoch(START)
    log.epoch(trained(1) | {key: value for key, value in START.items() if key != "epoch"})
    log.close()
    metrics = "mAP 25.0  mINP 12.5  Rank-1 50.0  Rank-5 75.0"
    said = capsys.readouterr().out
    assert said == (
        "data: 3 pictures\n"
        f"epoch   0  {metrics}  Rank-10 100.0\n"
        f"epoch   1  lr 3.50e-04  loss 1.5000  123.5 images/s  {metrics}\n"  # what fits; log.csv has the rest
    )
    assert (tmp_path / "train.log").read_text() == said


@pytest.mark.parametrize("metrics", [{}, METRIC_NAMES, coco_evaluation.METRIC_NAMES])
@pytest.mark.parametrize("parts", [0, 1, 6, 30])
def test_the_line_of_an_epoch_fits(tmp_path, capsys, parts, metrics):
    row = trained(300, **{f"loss_part_{number}": 1234.5 for number in range(parts)}, **dict.fromkeys(metrics, 1.0))
    RunLog(tmp_path, options(), metrics).epoch(row)
    (line,) = capsys.readouterr().out.splitlines()
    assert len(line) <= 100 and line.startswith("epoch 300  lr 3.50e-04  loss 1.5000  ")
    assert not metrics or next(iter(metrics.values())) in line
    assert set(read_log(tmp_path)[0]) == set(row)


def test_people_read_sums_over_branches_and_the_file_has_each(tmp_path, capsys):
    log = RunLog(tmp_path, options(), METRIC_NAMES)
    branches = {"cross_entropy/global": 2.0, "cross_entropy/part": 3.0}
    log.epoch({"epoch": 1, "lr": 0.1, "loss": 6.0, **branches, "triplet": 1.0})
    assert capsys.readouterr().out == "epoch   1  lr 1.00e-01  loss 6.0000  cross_entropy 5.0000  triplet 1.0000\n"
    columns, _ = read_log(tmp_path)
    assert columns == ["epoch", "lr", "loss", *branches, "triplet"]


def test_columns_hold_everything_that_was_ever_logged_and_the_metrics_last(tmp_path):
    """An evaluation may come late, and a part of the loss may join later: earlier lines are empty there."""
    log = RunLog(tmp_path, options(), METRIC_NAMES)
    log.epoch(trained(1))
    assert "mAP" not in read_log(tmp_path)[0]
    log.epoch(trained(2, gaussian_mask=0.25, mAP=0.5, mINP=0.25, rank1=0.5, rank5=0.5, rank10=0.5))
    columns, rows = read_log(tmp_path)
    assert columns == [
        *("epoch", "lr", "loss", "triplet", "images_per_second", "gaussian_mask"),
        *("mAP", "mINP", "rank1", "rank5", "rank10"),
    ]
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert (rows[0]["gaussian_mask"], rows[1]["gaussian_mask"], rows[1]["mAP"]) == ("", "0.25", "0.5")
    assert float(rows[0]["images_per_second"]) == 123.456  # not rounded as it is for people


def test_a_resumed_run_repeats_no_epoch(tmp_path):
    log = RunLog(tmp_path, options(), METRIC_NAMES)
    for row in (START, trained(1), trained(2), trained(3)):
        log.epoch(row)
    log.say("killed here")
    log = RunLog(tmp_path, options(), METRIC_NAMES, resume_epoch=1)  # the checkpoint of epoch 2 was not written
    log.epoch(trained(2, loss=7.0))
    _, rows = read_log(tmp_path)
    assert [(row["epoch"], row["loss"]) for row in rows] == [("0", ""), ("1", "1.5"), ("2", "7.0")]
    assert rows[0]["mAP"] == "0.25"
    lines = (tmp_path / "train.log").read_text().splitlines()  # it tells what happened, so it keeps everything
    assert len(lines) == 6 and "killed here" in lines


def test_a_new_run_ignores_an_old_log_and_a_resumed_one_may_have_none(tmp_path):
    RunLog(tmp_path, options(), METRIC_NAMES, resume_epoch=5).epoch(trained(6))
    RunLog(tmp_path, options(), METRIC_NAMES).epoch(trained(1))
    assert [row["epoch"] for row in read_log(tmp_path)[1]] == ["1"]


def test_args_hold_every_option_and_the_versions(tmp_path):
    RunLog(tmp_path, options(output=tmp_path, margin=None), METRIC_NAMES)
    args = json.loads((tmp_path / "args.json").read_text())
    assert args.pop("versions").keys() == {"torch", "torchvision", "cuda"}
    expected = {"lr": 3.5e-4, "loss": "triplet", "output": str(tmp_path), "margin": None}
    assert args == expected | {"tensorboard": False, "wandb": False}
    assert json.loads((tmp_path / "args.json").read_text())["versions"]["torch"] == torch.__version__


def test_curves_are_drawn_anew_with_each_epoch(tmp_path):
    log = RunLog(tmp_path, options(), METRIC_NAMES)
    log.epoch(trained(1))
    first = (tmp_path / "curves.png").read_bytes()
    log.epoch(trained(2, loss=0.5))
    assert first[:4] == b"\x89PNG" and (tmp_path / "curves.png").read_bytes() != first


@pytest.mark.parametrize("package, module", [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_package_that_is_missing_is_one_line(tmp_path, monkeypatch, package, module):
    monkeypatch.setitem(sys.modules, module, None)  # what an import that fails looks like
    with pytest.raises(InputError) as error:
        RunLog(tmp_path, options(**{package: True}), METRIC_NAMES)
    assert str(error.value) == f"--{package} needs the package {package}: pip install {package}"


def test_a_missing_package_is_told_before_there_is_a_folder(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    log_module.check_loggers(options())
    with pytest.raises(InputError, match="^--wandb needs the package wandb: pip install wandb$"):
        log_module.check_loggers(options(wandb=True))
    monkeypatch.setenv("RANK", "1")
    log_module.check_loggers(options(wandb=True))  # it is rank 0 that logs


def test_names_in_any_script_are_logged_whatever_the_locale(tmp_path):
    """Where the encoding of files is ASCII (LC_ALL=C without Python's UTF-8 mode), and a path is not."""
    program = (
        "from argparse import Namespace; from core.engine.log import RunLog\n"
        f"log = RunLog({str(tmp_path)!r}, Namespace(tensorboard=False, wandb=False), {{}})\n"
        "log.say('left out: \\u884c\\u674e.jpg'); log.epoch({'epoch': 1, 'loss \\u884c': 2.0})\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "PYTHONIOENCODING": "utf-8"}
    environment |= {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "\u884c\u674e.jpg" in (tmp_path / "train.log").read_text(encoding="utf-8")
    assert "loss \u884c" in (tmp_path / "log.csv").read_text(encoding="utf-8")


def test_packages_that_are_there_get_the_numbers(tmp_path, monkeypatch):
    calls = []

    class Recorder:
        def __init__(self, *values):
            self.values = values

        def __getattr__(self, name):
            return lambda *values, **named: calls.append((name, *values, *named.values()))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Recorder))
    monkeypatch.setitem(sys.modules, "wandb", Recorder())
    log = RunLog(tmp_path, options(tensorboard=True, wandb=True), METRIC_NAMES)
    assert log.tensorboard.values == (str(tmp_path),)
    log.epoch({"epoch": 3, "loss": 1.5, "mAP": 0.5})
    log.close()
    assert calls[0][:3] == ("init", "carousel", tmp_path.name)
    assert calls[1:] == [
        ("add_scalar", "loss", 1.5, 3), ("add_scalar", "mAP", 0.5, 3), ("flush",),
        ("log", {"loss": 1.5, "mAP": 0.5}, 3), ("close",), ("finish",),
    ]  # fmt: skip


def test_other_ranks_write_and_say_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setitem(sys.modules, "wandb", None)  # and import nothing
    log = RunLog(tmp_path, options(wandb=True), METRIC_NAMES, resume_epoch=1)
    log.say("hello")
    log.epoch(trained(1))
    log.close()
    assert not list(tmp_path.iterdir()) and capsys.readouterr() == ("", "")


def test_a_folder_that_is_gone_is_bad_input(tmp_path):
    with pytest.raises(InputError, match="gone/.lock"):
        RunLog(tmp_path / "gone", options(), METRIC_NAMES)


@pytest.mark.parametrize("rank, terminal, shown", [("0", True, True), ("0", False, False), ("1", True, False)])
def test_a_bar_is_for_rank_0_of_a_terminal(monkeypatch, rank, terminal, shown):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(isatty=lambda: terminal))
    assert log_module.progress_is_shown() == shown


def test_what_names_hold_is_written_as_it_is_shown(tmp_path, monkeypatch):
    """File names that are no UTF-8, half of a surrogate pair from JSON, what moves a terminal's cursor."""
    monkeypatch.setattr(sys, "stdout", Terminal("stdout"))
    log = RunLog(tmp_path, options(data="caf\udce9"), METRIC_NAMES, said=["\x1b[31mred"])
    log.say("two lines:\n\ud83e \u202eexe")
    log.epoch({"epoch": 1, "lr": 0.1, "loss": 1.0, "mAP caf\udce9": 0.5})
    log.close()
    lines = (tmp_path / "train.log").read_text("utf-8").splitlines()
    assert lines[:3] == [r"\x1b[31mred", "two lines:", r"\ufffd \u202eexe".replace(r"\ufffd", "\ufffd")]
    assert (tmp_path / "log.csv").read_text("utf-8").startswith(r"epoch,lr,loss,mAP caf\udce9")
    assert json.loads((tmp_path / "args.json").read_text("utf-8"))["data"] == "caf\udce9"
