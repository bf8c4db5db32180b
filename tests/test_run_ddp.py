"""run_ddp.sh as a person calls it: what it starts, with which settings, and what its check says."""

import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import collectives

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "run_ddp.sh"
OURS = re.compile("NPROC|NNODES|NODE_RANK|MASTER_|MAX_RESTARTS|OMP_|NCCL_|TORCH_|PYTHON$|RANK$|WORLD_SIZE")


def environment(**settings):
    kept = {name: value for name, value in os.environ.items() if not OURS.search(name)}
    return {**kept, "PYTHON": sys.executable, **settings}


def run(*arguments, cwd=None, **settings):
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment(**settings), capture_output=True, text=True, timeout=600, cwd=cwd)


@pytest.fixture
def pretend(tmp_path):
    """Function: GPUs, cores -> an interpreter that claims to have them and prints how torchrun would be started."""

    def make(gpus, cores):
        python = tmp_path / "python"
        python.write_text(
            f'#!/bin/sh\nif [ "$1" = -c ]; then echo {gpus} {cores}; exit; fi\n'
            'echo "$@"; env | grep -E "^(OMP|NCCL|TORCH)_" || true\n'
        )
        python.chmod(python.stat().st_mode | stat.S_IXUSR)
        return str(python)

    return make


def test_help_shows_the_commands_and_every_variable():
    ended = run("--help")
    assert ended.returncode == 0 and ended.stderr == ""
    for word in ("--check", "NPROC", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "MAX_RESTARTS", "PYTHON"):
        assert word in ended.stdout
    assert "set -" not in ended.stdout


@pytest.mark.parametrize("gpus, cores, processes, threads", [(8, 64, 8, 8), (0, 12, 1, 12), (4, 2, 4, 1)])
def test_without_arguments_it_trains_the_default_on_what_the_machine_has(pretend, gpus, cores, processes, threads):
    ended = run(PYTHON=pretend(gpus, cores))
    first, *settings = ended.stdout.splitlines()
    assert ended.returncode == 0
    assert f"--nproc-per-node {processes} --standalone" in first
    assert first.endswith(f"{ROOT}/train_reid.py")
    assert f"OMP_NUM_THREADS={threads}" in settings


def test_options_alone_are_those_of_the_default_script(pretend):
    ended = run("--recipe", "bot", NPROC="3", PYTHON=pretend(8, 8))
    assert ended.stdout.splitlines()[0].endswith(f"{ROOT}/train_reid.py --recipe bot")
    assert "--nproc-per-node 3" in ended.stdout


def test_nothing_is_switched_off_and_settings_of_a_person_win(pretend):
    ended = run(PYTHON=pretend(2, 4))
    assert "P2P" not in ended.stdout and "IB_" not in ended.stdout
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING=1" in ended.stdout
    ended = run(PYTHON=pretend(2, 4), NCCL_DEBUG="INFO", TORCH_NCCL_ASYNC_ERROR_HANDLING="3", OMP_NUM_THREADS="7")
    for setting in ("NCCL_DEBUG=INFO", "TORCH_NCCL_ASYNC_ERROR_HANDLING=3", "OMP_NUM_THREADS=7"):
        assert setting in ended.stdout.splitlines()


def test_several_machines(pretend):
    settings = {"PYTHON": pretend(8, 64), "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}
    first = run(**settings).stdout.splitlines()[0]
    assert "--nnodes 2" in first and "--node-rank 1 --master-addr 10.0.0.1 --master-port 29500" in first
    restarting = run(**settings, MAX_RESTARTS="3", MASTER_PORT="4000").stdout.splitlines()[0]
    assert "--rdzv-backend c10d --rdzv-endpoint 10.0.0.1:4000" in restarting and "--max-restarts 3" in restarting
    assert "is_host=0" in restarting


@pytest.mark.parametrize(
    "arguments, settings, text",
    [
        (["no_such.py"], {}, "no script no_such.py"),
        ([], {"NNODES": "2"}, "needs MASTER_ADDR"),
        ([], {"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "numbered from 0"),
        ([], {"NPROC": "many"}, "NPROC=many: give a whole number"),
        ([], {"NPROC": "0"}, "give at least 1"),
        ([], {"PYTHON": "/no/such/python"}, "no interpreter /no/such/python"),
    ],
)
def test_bad_settings_get_one_line(pretend, arguments, settings, text):
    ended = run(*arguments, **{"PYTHON": pretend(1, 1), **settings})
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.startswith("error: ") and text in ended.stderr and ended.stderr.count("\n") == 1


def test_without_torch_it_says_so(tmp_path):
    python = tmp_path / "python"  # isolated and without site-packages, hence without torch
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    python.chmod(0o755)
    ended = run(PYTHON=str(python))
    assert ended.returncode == 2
    assert "has no torch: pip install -r requirements.txt" in ended.stderr and ended.stderr.count("\n") == 1


def test_a_script_is_started_on_every_rank_from_any_folder(tmp_path):
    # A file per rank: what two processes print into one pipe may be mixed within a line.
    (tmp_path / "mine.py").write_text(
        "import os, sys; print(os.environ['WORLD_SIZE'], sys.argv[1:], file=open(os.environ['RANK'] + '.txt', 'w'))"
    )
    ended = run("mine.py", "--epochs", "3", NPROC="2", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    said = {path.name: path.read_text() for path in tmp_path.glob("*.txt")}
    assert said == {"0.txt": "2 ['--epochs', '3']\n", "1.txt": "2 ['--epochs', '3']\n"}


def test_check_prints_ranks_and_bandwidth(tmp_path):
    ended = run("--check", "--device", "cpu", "--sizes", "0.1", "--repeat", "2", NPROC="2", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    lines = [line.split() for line in ended.stdout.splitlines() if line]
    assert [line[0] for line in lines[:3]] == ["rank", "0", "1"]
    for line, name in zip(lines[4:8], ("all_reduce", "all_gather", "broadcast", "barrier"), strict=True):
        assert line[0] == name and float(line[2]) > 0
        assert name == "barrier" or float(line[3]) >= 0
    assert ended.stdout.endswith("all four collectives give the right values on all ranks (2)\n")


def test_bad_options_of_the_check_are_one_line(run):
    code, _, said = run(collectives, "--timeout", "abc")
    assert code == 2 and said.startswith("error: argument --timeout: 'abc' is not a finite number above 0")
    assert said.count("\n") == 1


def test_it_can_be_run_as_it_is():
    assert os.access(SCRIPT, os.X_OK)


def test_check_names_the_rank_that_hangs():
    """One real rank is stopped (SIGSTOP) while the check measures; the other one names it."""
    if not os.path.isdir("/proc/self"):
        pytest.skip("this system has no /proc to find the rank's process in")
    command = ["bash", str(SCRIPT), "--check", "--device", "cpu", "--sizes", "1", "--repeat", "1000000"]
    command += ["--timeout", "0.05"]
    job = subprocess.Popen(
        command, env=environment(NPROC="2"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        for line in job.stdout:  # bash became torchrun by exec, so that its children are the ranks
            if line.startswith("collective"):
                break
        time.sleep(0.3)
        stopped = None
        for process in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((process / "stat").read_text().rsplit(") ", 1)[1].split()[1])
                if parent == job.pid and b"\0RANK=1\0" in b"\0" + (process / "environ").read_bytes():
                    stopped = int(process.name)
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # a process that ended while we looked, or somebody else's
        assert stopped, job.communicate()
        os.kill(stopped, signal.SIGSTOP)
        try:
            said = ""
            for line in job.stderr:
                said = line
                if line.startswith("error"):
                    break
        finally:
            os.kill(stopped, signal.SIGCONT)
        assert re.match(r"error: rank 0: [\w ]+ did not finish within 3 s: rank 1 (stopped|did not arrive)", said)
    finally:
        job.kill()
        job.wait()
