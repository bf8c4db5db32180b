"""A script of this repository as a person starts it, and what its run has logged."""

import csv
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_script(*command, **environment):
    """Run `python *command` in the root of the repository; people see its bars, and why it fails if it does."""
    command, environment = list(map(str, command)), {**os.environ, **environment}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with exit code {done.returncode}")


def log_rows(run):
    """The lines of a run's log.csv, each a dict of str by column."""
    with open(run / "log.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def last_row(run):
    return log_rows(run)[-1]
