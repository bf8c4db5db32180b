"""What all trainings do at the end of an epoch, and what is left where one is stopped, shown by a toy."""

import csv
import os
import signal
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

from core.engine import distributed
from core.engine.checkpoint import load_checkpoint
from core.engine.log import Announcer
from core.engine.run import Run


class Toy(Run):
    kind, score = "toy", "mAP"

    def __init__(self, args, scores):
        self.scores = scores
        super().__init__(args, Announcer(), SimpleNamespace(epoch=0), {"mAP": "mAP"})

    def _resume(self, state, path):
        self.step.epoch = state["epoch"]

    def _evaluate(self):
        score = self.scores[self.step.epoch]
        return {"mAP": score} if isinstance(score, float) else score()

    def _state(self, best, evaluated):
        weight = {"weight": torch.tensor(float(self.step.epoch))}
        common = {"kind": "toy", "epoch": self.step.epoch, "best": best, "args": {}, "ema": []}
        return {**common, "model": weight, "optimizers": [], "evaluated": evaluated}


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Function: scores of the epochs, options -> the toy run under run_script, as far as it came."""
    monkeypatch.setattr("core.engine.log.curves", lambda *_: None)

    def start(scores, **options):
        args = {"output": tmp_path, "name": "toy", "resume": None, "epochs": 3, "eval_every": 1}
        args |= {"tensorboard": False, "wandb": False, **options}
        made = []

        def main(args):
            made.append(Toy(args, scores))
            if not made[0].resumed:
                made[0].end_epoch({"epoch": 0})
            for epoch in made[0].epochs():
                if scores[epoch] is stopped_in_training:
                    stop()
                made[0].step.epoch = epoch
                made[0].end_epoch({"epoch": epoch, "loss": 1.0 / epoch})
            made[0].log.close()

        distributed.run_script(main, Namespace(**args))
        return made[0]

    return start


def stop():
    os.kill(os.getpid(), signal.SIGTERM)
    return {}


stopped_in_training = object()


def read_log(folder):
    with open(folder / "log.csv", newline="") as file:
        return [(row["epoch"], row.get("loss"), row["mAP"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    ("scores", "best", "of_epoch"),
    [((0.9, 0.5, 0.8, 0.85), 0.9, 0), ((0.1, 0.5, 0.8, 0.7), 0.8, 2), ((0.5, 0.5, 0.4, 0.5), 0.5, 0)]
    + [((0.2, 0.6, float("nan"), 0.4), 0.6, 1)],
)
def test_the_best_is_the_best_what_it_begins_with_too(train, tmp_path, scores, best, of_epoch):
    assert train(scores).best == best
    state = load_checkpoint(tmp_path / "toy" / "best.pth")
    assert (state["epoch"], state["best"], state["model"]["weight"].item()) == (of_epoch, best, of_epoch)
    assert load_checkpoint(tmp_path / "toy" / "last.pth")["best"] == best
    assert train(scores[:3] + (0.0, best - 0.01), epochs=4, resume="auto").best == best  # and stays so when resumed
    assert load_checkpoint(tmp_path / "toy" / "best.pth")["epoch"] == of_epoch


@pytest.mark.parametrize(
    ("scores", "words", "saved"),
    [
        ((0.1, stopped_in_training), "before an epoch was finished: --resume begins anew", None),
        ((0.1, 0.2, stopped_in_training), "with epoch 1 finished and saved: --resume goes on behind it", 1),
        ((0.1, 0.2, stop), "with epoch 2 trained and saved: --resume evaluates it and goes on", 2),
        ((stop,), "before an epoch was finished: --resume begins anew", None),
    ],
)
def test_sigterm_loses_no_epoch_that_was_trained_and_says_how_it_goes_on(train, tmp_path, capsys, scores, words, saved):
    with pytest.raises(SystemExit) as end:
        train(scores)
    folder, last = tmp_path / "toy", tmp_path / "toy" / "last.pth"
    assert end.value.code == 143
    assert capsys.readouterr().err == f"stopped by SIGTERM {words} ({folder})\n"
    assert (folder / "train.log").read_text().splitlines()[-1] == f"stopped by SIGTERM {words}"
    assert (load_checkpoint(last)["epoch"] if last.exists() else None) == saved
    assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]

    scores = (0.1, 0.2, 0.3, 0.25)
    run = train(scores, resume="auto")
    assert f"after epoch {saved}" in capsys.readouterr().out or saved is None
    assert run.best == 0.3 and load_checkpoint(folder / "best.pth")["epoch"] == 2
    rows = [(str(epoch), str(1.0 / epoch) if epoch else "", str(score)) for epoch, score in enumerate(scores)]
    assert read_log(folder) == rows
    state = load_checkpoint(last)
    assert state["epoch"] == 3 and state["evaluated"] and "unfinished" not in state


def test_an_epoch_that_is_not_evaluated_is_saved_without(train, tmp_path):
    train((0.1, 0.2, 0.3, 0.4), eval_every=2)
    assert [row[2] for row in read_log(tmp_path / "toy")] == ["0.1", "", "0.3", "0.4"]
