"""What a run says and leaves behind as text and numbers: train.log, log.csv, args.json, curves.png."""

import csv
import io
import json
import sys
import time
from pathlib import Path

import torch
import torchvision

from core.engine import distributed
from core.engine.checkpoint import lock_run, release_run
from core.errors import InputError
from core.files import atomic_write, make_folder, printable_lines
from core.visualize.curves import curves, sum_branches

LINE_WIDTH = 100  # columns of the line of an epoch


class Announcer:
    """Called with a line it prints it, on rank 0; `said` keeps all lines for the log of a run folder.

    Lines printed before the run folder exists are buffered here. start: when it was made, of `time.perf_counter`.
    """

    def __init__(self):
        self.said, self.start = [], time.perf_counter()

    def __call__(self, text):
        self.said.append(text)
        if distributed.is_main():
            print(text, flush=True)


def preview(output, draw):
    """`--augmentation-preview`: rank 0 draws `<output>/augmentation.png`; draw: function of its path."""
    if distributed.is_main():
        make_folder(output)
        draw(Path(output) / "augmentation.png")
        print(f"what the network is shown: {Path(output) / 'augmentation.png'}")


class RunLog:
    """The log of one run; on ranks other than 0 every method does nothing.

    Args:
        folder: run folder, made by `open_run`. It is this run's until `close`, or the end of the process: a second run
            in it is refused (InputError, on every rank).
        args: the options, written to args.json with the versions of torch and CUDA. With `args.tensorboard` and
            `args.wandb` the numbers go there, too; those packages are imported only then.
        metrics: columns of an evaluation, each with what people call it, or None where only log.csv has it.
        said: lines that were printed before there was a folder; they begin train.log.
        resume_epoch: lines of log.csv after this epoch are dropped, since the run repeats them. None: a new run.
    """

    def __init__(self, folder, args, metrics, said=(), *, resume_epoch=None):
        self.folder, self.metrics = Path(folder), metrics
        self.active, self.lock = distributed.is_main(), None
        distributed.on_main(self._take_folder)
        self.rows = []
        self.tensorboard = self.wandb = None
        if not self.active:
            return
        if resume_epoch is not None and (self.folder / "log.csv").is_file():
            with open(self.folder / "log.csv", newline="", encoding="utf-8") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["epoch"]) <= resume_epoch]
        versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "cuda": torch.version.cuda}
        self._write("args.json", json.dumps({**vars(args), "versions": versions}, indent=2, default=str) + "\n")
        for text in said:
            self._keep(text)
        tensorboard, self.wandb = _import_loggers(args)
        if tensorboard:
            self.tensorboard = tensorboard.SummaryWriter(str(self.folder))
        if self.wandb:
            self.wandb.init(project="carousel", name=self.folder.name, dir=str(self.folder), config=vars(args))

    def _take_folder(self):
        self.lock = lock_run(self.folder)

    def say(self, text):
        """Print a line and keep it in train.log. Raises InputError where the disk is full."""
        if self.active:
            print(text, flush=True)
            self._keep(text)

    def _keep(self, text):
        path = self.folder / "train.log"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(printable_lines(text) + "\n")
        except OSError as error:
            raise InputError(f"can't write {path}: {error.strerror}; make room, or give another --output") from error

    def epoch(self, row):
        """Print one tidy line for an epoch, add it to log.csv and redraw curves.png.

        Args:
            row: dict with `epoch`, `lr`, `loss`, each loss part as it is minimised ("triplet", or of several branches
                "triplet/global", ...), `images_per_second`, and after an evaluation the metrics (fractions in [0, 1]).
        """
        if not self.active:
            return
        self.say(_line(row, self.metrics))
        self.rows.append(row)
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        columns.sort(key=lambda name: name in self.metrics)  # they come last
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        self._write("log.csv", text.getvalue())
        curves(self.folder / "curves.png", self.folder / "log.csv", self.metrics)
        numbers = {key: value for key, value in row.items() if key != "epoch"}
        if self.tensorboard:
            for key, value in numbers.items():
                self.tensorboard.add_scalar(key, value, row["epoch"])
            self.tensorboard.flush()
        if self.wandb:
            self.wandb.log(numbers, step=row["epoch"])

    def close(self):
        if self.lock:
            release_run(self.lock)
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()

    def _write(self, name, text):
        with atomic_write(self.folder / name) as file:
            file.write(text.encode("utf-8", "backslashreplace"))


def check_loggers(args):
    """Raise InputError, on every rank, where --tensorboard or --wandb asks for a package that rank 0 doesn't have.

    For the time before there is a run folder; `RunLog` imports the same packages.
    """
    distributed.on_main(lambda: any(_import_loggers(args)))


def _import_loggers(args):
    """Modules of TensorBoard and Weights & Biases, None where not asked for; only then are they imported."""
    return (
        _import("torch.utils.tensorboard", "tensorboard") if args.tensorboard else None,
        _import("wandb", "wandb") if args.wandb else None,
    )


def _line(row, metrics):
    """One epoch as a line for people: loss, its parts (of all branches), learning rate, speed, metrics in per cent.

    What doesn't fit into its columns is left to log.csv: of the parts, and then of the metrics, the last ones.
    """
    words, parts, measured = {}, [], []
    for key, value in sum_branches(row).items():
        if key == "epoch":
            words[key] = f"epoch {value:>3}"
        elif key == "lr":
            words[key] = f"lr {value:.2e}"
        elif key == "images_per_second":
            words[key] = f"{value:.1f} images/s"
        elif metrics.get(key):
            words[key] = f"{metrics[key]} {100 * value:.1f}"
            measured.append(key)
        elif key not in metrics:
            words[key] = f"{key} {value:.4f}"
            parts += [key] if key != "loss" else []
    while len("  ".join(words.values())) > LINE_WIDTH and (parts or measured):
        del words[(parts or measured).pop()]
    return "  ".join(words.values())


def _import(module, package):
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        raise InputError(f"--{package} needs the package {package}: pip install {package}") from error


def progress_is_shown():
    """A bar is drawn on rank 0 of a terminal; elsewhere the lines per epoch are enough."""
    return distributed.is_main() and sys.stderr.isatty()
