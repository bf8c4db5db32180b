"""A script of this repository as a person starts it, and what its run has logged."""

import csv
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_script(*command, **environment):
    """Run `python *command` in the root of the repository; ends with its report if it fails."""
    command, environment = list(map(str, command)), {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    if done.returncode:
        report = done.stderr.decode(errors="replace")
        sys.exit(f"{' '.join(command)} ended with exit code {done.returncode}:\n{report}")


def last_row(run):
    """What the last line of a run's log.csv says, dict of str by column."""
    with open(run / "log.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))[-1]
