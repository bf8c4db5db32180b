import builtins
import errno
import os
import pickle
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from core.engine import checkpoint, distributed
from core.engine.checkpoint import (
    fingerprint,
    load_checkpoint,
    lock_run,
    open_output,
    open_run,
    release_run,
    restore,
    save_checkpoint,
    save_run,
    weights_alone,
)
from core.engine.distributed import Terminated
from core.errors import InputError
from core.files import atomic_write

STATE = {"kind": "reid", "epoch": 3, "best": 0.5, "model": {"weight": torch.arange(4.0)}, "ema": [], "network": {}}
STATE |= {"input_size": [64, 32], "normalisation": {"mean": [0.5] * 3, "std": [0.5] * 3}, "identities": ["red"]}
STATE |= {"distance": "cosine", "args": {}}


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    save_checkpoint(tmp_path / "last.pth", STATE)
    state = load_checkpoint(tmp_path / "last.pth", "reid")
    assert state["epoch"] == 3 and torch.equal(state["model"]["weight"], STATE["model"]["weight"])
    assert [path.name for path in tmp_path.iterdir()] == ["last.pth"]


def test_best_has_what_is_used_and_last_what_goes_on(tmp_path):
    averaged = [{"n_averaged": torch.tensor(3), "module.weight": torch.ones(4)}]
    state = {**STATE, "ema": averaged, "optimizers": [{"state": {}}], "scheduler": {}, "scaler": {}, "loss": {}}
    save_run(tmp_path, state, improved=True)
    save_run(tmp_path, {**state, "epoch": 4}, improved=False)
    best, last = (load_checkpoint(tmp_path / name) for name in ("best.pth", "last.pth"))
    assert (best["epoch"], last["epoch"]) == (3, 4)
    assert last.keys() == state.keys() and best.keys() == STATE.keys()  # no optimisers
    assert torch.equal(best["model"]["weight"], torch.ones(4)) and fingerprint(best) == fingerprint(last)


def test_what_a_run_begins_with_may_be_the_best_and_is_nothing_to_go_on_from(tmp_path):
    """Restarted, it begins anew in its folder, as does one that was killed before."""
    folder, _ = open_run(tmp_path, "bags")
    save_run(folder, {**STATE, "epoch": 0}, improved=True)
    assert [path.name for path in folder.iterdir()] == ["best.pth"]
    assert open_run(tmp_path, "bags", "auto") == (folder, None)


def test_weights_alone_are_not_resumed(tmp_path):
    """And a folder that has nothing else is not written into: last.pth was removed to make room."""
    folder, _ = open_run(tmp_path, "bags")
    save_run(folder, STATE, improved=True)
    state = load_checkpoint(folder / "best.pth", "reid")
    with pytest.raises(InputError, match="weights alone.*resume last.pth, or begin a new run with --weights") as error:
        restore(state, folder / "best.pth", ("model", torch.nn.Linear(2, 2)))
    assert "\n" not in str(error.value) and str(folder / "best.pth") in str(error.value)
    (folder / "last.pth").unlink()
    with pytest.raises(InputError, match="--resume: no run bags"):
        open_run(tmp_path, "bags", "auto")


class FullDisk:
    """A file on a disk with room for 100 bytes."""

    def __init__(self, file):
        self.file, self.room = file, 100

    def write(self, data):
        if len(memoryview(data).cast("B")) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= len(data)
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_full_disk_is_one_line_and_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    path = tmp_path / "last.pth"
    save_checkpoint(path, STATE)
    real = builtins.open
    monkeypatch.setattr(builtins, "open", lambda *args: FullDisk(real(*args)) if args[1] == "wb" else real(*args))
    with pytest.raises(InputError, match="No space left on device") as error:
        save_checkpoint(path, {**STATE, "epoch": 4, "model": {"weight": torch.zeros(10_000)}})
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    monkeypatch.undo()
    assert load_checkpoint(path)["epoch"] == 3
    assert [file.name for file in tmp_path.iterdir()] == ["last.pth"]


class Interrupted(FullDisk):
    def write(self, data):
        if len(memoryview(data).cast("B")) > self.room:
            raise Terminated
        return self.file.write(data)


def test_sigterm_while_a_checkpoint_is_written_is_still_sigterm(tmp_path, monkeypatch):
    path, real = tmp_path / "last.pth", builtins.open
    save_checkpoint(path, STATE)
    monkeypatch.setattr(builtins, "open", lambda *args: Interrupted(real(*args)) if args[1] == "wb" else real(*args))
    with pytest.raises(Terminated):
        save_checkpoint(path, {**STATE, "epoch": 4, "model": {"weight": torch.zeros(10_000)}})
    monkeypatch.undo()
    assert load_checkpoint(path)["epoch"] == 3 and [file.name for file in tmp_path.iterdir()] == ["last.pth"]


@pytest.mark.parametrize("fault", [RuntimeError("a bug"), KeyError("a bug"), ValueError("a bug")])
def test_a_fault_of_ours_is_not_the_disks(tmp_path, fault):
    """Also torch's RuntimeError, where no error of the system is behind it; and the temporary file is gone."""
    with pytest.raises(type(fault)) as caught, atomic_write(tmp_path / "last.pth"):
        raise fault
    assert caught.value is fault and not list(tmp_path.iterdir())


def test_the_folder_is_on_the_disk_before_the_write_counts_as_done(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(os.fstat(descriptor).st_ino), real(descriptor)))
    save_run(tmp_path, STATE, improved=True)
    best, last, folder = ((tmp_path / name).stat().st_ino for name in ("best.pth", "last.pth", "."))
    assert synced == [best, folder, last, folder]  # a file, its name


@pytest.mark.parametrize(("number", "refused"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_file_system_that_cannot_sync_folders_is_used_and_a_failing_disk_is_not(
    tmp_path, monkeypatch, number, refused
):
    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("this system has no /proc to tell a folder's descriptor by")
    monkeypatch.setattr(os, "fsync", fsync)
    if refused:
        with pytest.raises(InputError, match="Input/output error"):
            save_checkpoint(tmp_path / "last.pth", STATE)
    else:
        save_checkpoint(tmp_path / "last.pth", STATE)


FULL = """
import numpy as np
import torch
from core.visualize.retrieval import augmentation_sheet
from core.visualize.curves import curves
from core.engine.checkpoint import save_checkpoint
from core.engine.log import RunLog
from core.errors import InputError
from core.files import atomic_write
from argparse import Namespace

log = RunLog("disk", Namespace(tensorboard=False, wandb=False), {})
said = open("said.txt", "w")  # not stderr, where libraries speak, too
def features():
    with atomic_write("disk/features.npz") as file:
        np.savez(file, a=np.zeros(9), b=np.random.rand(100_000))
def long_log():
    for _ in range(1000):
        log.say("x" * 1000)
for action in (
    lambda: save_checkpoint("disk/last.pth", {"weight": torch.rand(100_000)}),
    features,
    lambda: augmentation_sheet("disk/sheet.png", torch.rand(24, 3, 64, 64)),
    long_log,
    lambda: curves("disk/curves.png", [{"epoch": 1, "loss": 2.0}], {}),
    lambda: log.epoch({"epoch": 1, "loss": 2.0}),
):
    try:
        action()
    except InputError as error:
        print(error, file=said)
"""


def test_on_a_disk_that_is_really_full_everything_is_one_line(tmp_path):
    (tmp_path / "disk").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
    mount = "mount -t tmpfs -o size=64k tmpfs disk"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here")
    script = f"{mount} && \"{sys.executable}\" -c '{FULL}' && ls -A disk >>said.txt"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "said.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in lines[:6]] == [
        f"can't write disk/{name}"
        for name in ("last.pth", "features.npz", "sheet.png", "train.log", "curves.png", "train.log")
    ], done.stderr
    assert all("No space left on device" in line for line in lines[:6])
    assert lines[6:] == [".lock", "args.json", "train.log"]  # and no half-written file


def test_a_fault_of_ours_while_writing_keeps_its_kind_and_the_old_file(tmp_path):
    save_checkpoint(tmp_path / "last.pth", STATE)
    with pytest.raises(KeyError), atomic_write(tmp_path / "last.pth") as file:
        file.write(b"half")
        raise KeyError("a bug")
    assert load_checkpoint(tmp_path / "last.pth")["epoch"] == 3


class Code:
    def __reduce__(self):
        return print, ("ran",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        (b"", "damaged"),
        (b"not a checkpoint", "damaged"),
        (pickle.dumps(Code()), "never run|damaged"),
        ({"weights": torch.zeros(2)}, "not a checkpoint of Carousel"),
        ({"kind": "mask_rcnn"}, "kind mask_rcnn, reid is needed"),
        ({"kind": "reid", "model": Code()}, "never run"),
        ({key: value for key, value in STATE.items() if key not in ("network", "ema")}, "lacks ema, network"),
    ],
)
def test_what_is_no_checkpoint_is_one_line(tmp_path, capsys, content, said):
    path = tmp_path / "last.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError, match=said) as error:
        load_checkpoint(path, "reid")
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert capsys.readouterr().out == ""


def test_a_truncated_checkpoint_is_one_line(tmp_path):
    path = tmp_path / "last.pth"
    save_checkpoint(path, STATE)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(InputError, match="damaged"):
        load_checkpoint(path)


def test_a_run_folder_is_never_taken_twice(tmp_path):
    folders = [open_run(tmp_path / "runs", "bags")[0] for _ in range(3)]
    assert [folder.name for folder in folders] == ["bags", "bags-2", "bags-3"]


@pytest.mark.parametrize(("newest", "runs"), [("bags-10", 10), ("bags-2", 2), ("bags", 1)])
def test_resume_takes_the_latest_run_by_its_number_whatever_the_clock_says(tmp_path, newest, runs):
    """The clock was set back: the first run has the latest time. Later folders without a checkpoint don't count."""
    for number in range(12):
        folder, _ = open_run(tmp_path, "bags")
        if number < runs:
            save_checkpoint(folder / "last.pth", {**STATE, "epoch": number})
            os.utime(folder / "last.pth", (2e9 - number, 2e9 - number))
    other, _ = open_run(tmp_path, "bags-and-more")
    save_checkpoint(other / "last.pth", STATE)
    assert open_run(tmp_path, "bags", "auto") == (tmp_path / newest, tmp_path / newest / "last.pth")


@pytest.mark.parametrize("resume", ["auto", "path"])
def test_who_resumes_a_run_clears_what_was_left_half_written_in_it(tmp_path, resume):
    folder, _ = open_run(tmp_path, "bags")
    save_checkpoint(folder / "last.pth", STATE)
    (folder / ".last.pth.123.tmp").write_bytes(b"half a checkpoint")
    own, _ = open_run(tmp_path, "bags", "auto" if resume == "auto" else str(folder / "last.pth"))
    release_run(lock_run(own))
    assert [path.name for path in folder.iterdir()] == ["last.pth"]


def test_resume_without_a_run_of_this_name_is_an_error_that_names_those_there_are(tmp_path):
    with pytest.raises(InputError, match="no run typo in .*, there is no run; check --name and --output, or leave"):
        open_run(tmp_path, "typo", "auto")
    for name in ("bags", "cars"):
        save_checkpoint(open_run(tmp_path, name)[0] / "last.pth", STATE)
    with pytest.raises(InputError, match="no run typo in .*, there are bags, cars; check --name and --output") as error:
        open_run(tmp_path, "typo", "auto")
    assert "\n" not in str(error.value) and sorted(path.name for path in tmp_path.iterdir()) == ["bags", "cars"]


def test_a_launcher_that_restarts_begins_a_run_with_resume(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    folder, found = open_run(tmp_path, "bags", "auto")
    assert folder.is_dir() and found is None
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")  # of torchrun alone
    with pytest.raises(InputError, match="no run other"):
        open_run(tmp_path, "other", "auto")


def test_a_run_that_dies_before_its_first_checkpoint_restarts_in_its_folder(tmp_path):
    """As torchrun does it, again and again: one folder, not a trail of them."""
    first = open_run(tmp_path, "bags")
    assert [open_run(tmp_path, "bags", "auto") for _ in range(2)] == [first, first]
    assert [path.name for path in tmp_path.rglob("*")] == ["bags"]


def test_what_changed_is_said_the_number_of_processes_too(monkeypatch):
    saved = {"lr": 0.1, "epochs": 3, "workers": 4, "processes": 1, "gone": 5}
    args = Namespace(lr=0.1, epochs=6, workers=0, new=2)
    assert checkpoint.changed_options(saved, args) == "; changed: epochs 3 -> 6"
    assert checkpoint.changed_options(saved, args, {"epochs"}) == ""
    monkeypatch.setattr(checkpoint.distributed, "world_size", lambda: 2)
    assert checkpoint.changed_options(saved, args) == "; changed: epochs 3 -> 6, processes 1 -> 2"


HOLDER = """
import os, sys, time
from core.engine.checkpoint import lock_run
lock = lock_run(sys.argv[1])
if os.fork() == 0:  # as a DataLoader's worker, which notices seconds later that its parent is gone
    time.sleep(30)
print("locked", flush=True)
time.sleep(30)
"""


def test_a_run_folder_belongs_to_one_run_while_it_lives(tmp_path):
    """Killed, it leaves the folder to the next at once, though its workers live on."""
    leftover = tmp_path / ".last.pth.123.tmp"
    leftover.write_bytes(b"half a checkpoint")
    command, root = [sys.executable, "-c", HOLDER, str(tmp_path)], Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, start_new_session=True) as holder:
        try:
            assert holder.stdout.readline() == b"locked\n" and not leftover.exists()
            leftover.write_bytes(b"what the live run is writing")
            with pytest.raises(InputError, match=rf"alive \(process {holder.pid} on .*\); wait for its end") as caught:
                lock_run(tmp_path)
            assert "\n" not in str(caught.value) and leftover.exists()
            holder.kill()
            holder.wait()
            lock_run(tmp_path).close()
            assert not leftover.exists()
        finally:
            os.killpg(holder.pid, signal.SIGKILL)


def test_a_lock_that_the_run_before_removes_is_not_held(tmp_path, monkeypatch):
    """It has ended between the opening of the file and the lock on it: the next file is taken."""
    opened, lock = [], checkpoint.lock_for_process

    def ends_meanwhile(file):
        opened.append(file)
        if len(opened) == 1:
            os.unlink(file.name)
        lock(file)

    monkeypatch.setattr(checkpoint, "lock_for_process", ends_meanwhile)
    held = lock_run(tmp_path)
    assert len(opened) == 2 and opened[0].closed and os.path.samestat(os.fstat(held.fileno()), os.stat(held.name))
    release_run(held)
    assert held.closed and not list(tmp_path.iterdir())


def test_a_file_system_without_locks_does_without(tmp_path, monkeypatch):
    def no_locks(file):
        raise OSError(errno.ENOLCK, "No locks available")

    leftover = tmp_path / ".last.pth.123.tmp"
    leftover.write_bytes(b"perhaps of a live run")
    monkeypatch.setattr(checkpoint, "lock_for_process", no_locks)
    lock_run(tmp_path).close()
    assert leftover.exists()


@pytest.mark.parametrize("spoil", ["bits", "zeros"])
def test_damaged_tensors_are_found_by_their_checksums(tmp_path, spoil):
    """Thirty flipped bits, one after another, all over the file's tensors; and a block of zeros in it."""
    path = tmp_path / "best.pth"
    save_checkpoint(path, {**STATE, "model": {f"weight{n}": torch.rand(100, 100) for n in range(5)}})
    good = path.read_bytes()
    random = torch.Generator().manual_seed(0)
    start, length = good.find(b"FB" * 8), len(good) - 4096  # padding before the first tensor; the directory at the end
    for place in torch.randint(max(start, 2048), length, (30,), generator=random).tolist():
        damaged = bytearray(good)
        if spoil == "bits":
            damaged[place] ^= 1 << (place % 8)
        else:
            damaged[place : place + 1000] = bytes(1000)
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="damaged") as caught:
            load_checkpoint(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.write_bytes(good)
    assert load_checkpoint(path)["epoch"] == 3


def test_a_restart_takes_the_newest_folder_and_a_checkpoint_before_any_folder_without(tmp_path):
    old, new = (open_run(tmp_path, "bags")[0] for _ in range(2))
    os.utime(old, (1e9, 1e9))
    assert open_run(tmp_path, "bags", "auto") == (new, None)
    save_checkpoint(old / "last.pth", STATE)
    assert open_run(tmp_path, "bags", "auto") == (old, old / "last.pth")


@pytest.mark.parametrize("name", ["bags[1]", "b*g", "wh?t", "group/bags", "a.b"])
def test_any_name_is_found_again_and_no_other_one(tmp_path, name):
    for other in ("bags1", "bag", "what", "bags", "axb"):
        save_checkpoint(open_run(tmp_path, other)[0] / "last.pth", STATE)
    folder, _ = open_run(tmp_path, name)
    save_checkpoint(folder / "last.pth", STATE)
    assert open_run(tmp_path, name, "auto") == (tmp_path / name, tmp_path / name / "last.pth")


def test_resume_from_a_path_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        open_run(tmp_path, "bags", str(tmp_path / "gone.pth"))


def test_results_go_into_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("results", "results-2"):
        with open_output("results") as folder:
            (folder / "report.md").touch()
        assert str(folder) == name and folder.is_dir()
    for output in (".", "..", "results/.."):
        with pytest.raises(InputError, match="name a new folder"), open_output(output):
            pass
    with pytest.raises(InputError, match="no pictures"), open_output("new/results"):
        raise InputError("no pictures")
    assert sorted(os.listdir()) == ["results", "results-2"]  # of a refusal nothing stays behind


def ended(main):
    """What is in the folder after a run that ends in an InputError or another one."""
    with pytest.raises((SystemExit, RuntimeError)):
        distributed.run_script(main, None)
    return sorted(os.listdir())


def test_a_run_that_saves_nothing_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def begin(output="runs", error=InputError, resume=None, saves=()):
        def main(_):
            folder, _ = open_run(output, "bags", resume)
            for name in ("args.json", "train.log", *saves):
                (folder / name).touch()
            raise error("a broken picture")

        return main

    os.mkdir("empty")
    assert ended(begin()) == ended(begin("new/runs")) == ended(begin("empty")) == ["empty"]
    assert ended(lambda _: open_run("runs", "bags") and refuse_at_once()) == ["empty"]
    assert ended(begin("fault", error=RuntimeError)) == ["empty", "fault"]  # its log may be needed
    assert ended(begin("fault", resume="auto")) == ["empty", "fault"]  # not its own
    ended(begin("saved", saves=["last.pth"]))
    assert sorted(os.listdir("saved/bags")) == ["args.json", "last.pth", "train.log"]
    ended(begin("saved"))
    assert os.listdir("saved") == ["bags"]


def refuse_at_once():
    raise InputError("other options")


def test_results_stay_where_an_error_comes_after_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def main(_):
        (open_run("results", "set")[0] / "metrics.json").touch()
        refuse_at_once()

    assert ended(main) == ["results"] and os.listdir("results/set") == ["metrics.json"]


def test_a_run_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "bags").write_text("a file where a folder should be")
    with pytest.raises(InputError, match="runs/bags is a file"):
        open_run(tmp_path / "runs", "bags")
    with pytest.raises(InputError, match="runs/bags is a file"):
        open_run(tmp_path / "runs" / "bags", "more")


def test_an_unwritable_run_folder(tmp_path, monkeypatch):
    def refuse(self, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # as root every folder can be written to, so it is simulated
    with pytest.raises(InputError, match="Permission denied") as error:
        open_run(tmp_path / "runs", "bags")
    assert "--output" in str(error.value)


def reid_state(**changes):
    generator = torch.Generator().manual_seed(0)
    model = {"a.weight": torch.rand(3, 2, generator=generator), "a.num_batches_tracked": torch.tensor(7)}
    return {**STATE, "model": model, "ema": None, "network": {"backbone": "x"}, "input_size": [8, 4], **changes}


def test_the_fingerprint_is_of_the_network_not_of_the_file(tmp_path):
    state = reid_state()
    own = fingerprint(state)
    assert len(own) == 64 and int(own, 16) >= 0
    save_checkpoint(tmp_path / "copy.pth", {**state, "epoch": 9, "args": {"name": "other"}})
    assert fingerprint(load_checkpoint(tmp_path / "copy.pth")) == own
    backwards = dict(reversed(state["model"].items()))
    assert fingerprint({**state, "model": backwards}) == own
    # Averaged weights are those that count: the plain ones beside them don't.
    averaged = {"n_averaged": torch.tensor(5), **{f"module.{key}": value for key, value in state["model"].items()}}
    assert fingerprint({**state, "ema": averaged, "model": {"a.weight": torch.zeros(3, 2)}}) == own


@pytest.mark.parametrize(
    "key, value",
    [
        ("model", {"a.weight": torch.rand(3, 2), "a.num_batches_tracked": torch.tensor(7)}),
        ("model", {**reid_state()["model"], "a.weight": reid_state()["model"]["a.weight"].reshape(2, 3)}),
        ("model", {**reid_state()["model"], "a.weight": reid_state()["model"]["a.weight"].bfloat16()}),
        ("model", {"b.weight": reid_state()["model"]["a.weight"], "a.num_batches_tracked": torch.tensor(7)}),
        ("network", {"backbone": "y"}),
        ("input_size", [4, 8]),
    ],
)
def test_another_network_has_another_fingerprint(key, value):
    assert fingerprint(reid_state(**{key: value})) != fingerprint(reid_state())


def test_a_mask_rcnn_without_input_size_has_a_fingerprint():
    state = reid_state(kind="mask_rcnn")
    del state["input_size"]
    assert fingerprint(state) != fingerprint(reid_state())


def test_weights_alone_are_a_checkpoint_of_the_same_network(tmp_path):
    """Of a network with averaged weights those are kept, under the plain name."""
    state = STATE | {"network": {"backbone": "x"}, "bits": 12}
    state |= {"model": {"w": torch.zeros(3)}, "ema": [{"module.w": torch.ones(3), "n_averaged": torch.tensor(1)}]}
    state |= {"optimizers": [1], "scheduler": {}, "scaler": {}, "loss": {"centers": torch.zeros(9)}}
    alone = weights_alone(state)
    save_checkpoint(tmp_path / "alone.pth", alone)
    read = load_checkpoint(tmp_path / "alone.pth", "reid")
    assert read["model"]["w"].tolist() == [1, 1, 1] and read["bits"] == 12
    assert not {"optimizers", "scheduler", "scaler", "loss"} & set(read)
    assert fingerprint(read) == fingerprint(state)
