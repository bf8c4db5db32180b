"""Checkpoints and run folders: written whole or not at all, read without running code, never overwritten.

A checkpoint is a dict of tensors and plain values: `kind` ("reid", "mask_rcnn", "gan"), `model`, `epoch`, `best`,
`args`, and what is needed to use it without them. `evaluate.py` and `demo.py` need only its path.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import socket
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch

from core.engine import distributed
from core.errors import STRANGE, InputError
from core.files import atomic_write, lock_for_process
from core.models.weights import best_weights, load_file
from core.retrieval.distance import METRICS

# What a checkpoint of each kind must hold for its network to be used; what only training needs is checked there.
REQUIRED = {
    "reid": (
        *("model", "ema", "network", "input_size", "normalisation", "identities", "distance", "args"),
        *("epoch", "best"),
    ),
    "mask_rcnn": ("model", "ema", "network", "categories", "args", "epoch", "best"),
    "gan": ("model", "ema", "network", "input_size", "normalisation", "args", "epoch"),
}


def _is_plain(value):
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str)) or _are_options(value)


def _are_options(value):
    return isinstance(value, dict) and all(isinstance(key, str) and _is_plain(value[key]) for key in value)


def _are_args(value):
    """Options, of which those that say where the data lie are text, or lists of it."""
    places = [value.get(name) for name in ("dataset", "data", *PLACES)] if _are_options(value) else [0]
    places = [one for place in places for one in (place if isinstance(place, list) else [place])]
    return all(place is None or isinstance(place, str) for place in places)


def _are_weights(value):
    tensors = value.items() if isinstance(value, dict) else [(0, 0)]
    return all(isinstance(key, str) and isinstance(tensor, torch.Tensor) for key, tensor in tensors)


def _is_threshold(value):
    """As `core.retrieval.threshold.Threshold._asdict` has it."""
    if not isinstance(value, dict) or "distance" not in value:
        return False
    numbers, strangers = [value[key] for key in value if key != "strangers"], value.get("strangers")
    tables = [] if strangers is None else strangers.values() if isinstance(strangers, dict) else [None]
    return _are(numbers, (int, float)) and _are([*tables], list)


def _are(value, kinds, count=None):
    return (
        isinstance(value, (list, tuple))
        and len(value) == (count or len(value))
        and all(isinstance(one, kinds) for one in value)
    )


PLACES = ("protocol", "val_images", "val_annotations", "train_images", "train_annotations", "source", "target")
# What a field of a checkpoint must be where it is there; what is in `network` and the optimisers shows when it is used.
FIELDS = {
    "model": _are_weights,
    "ema": lambda value: value is None
    or _are_weights(value)
    or isinstance(value, list)
    and all(map(_are_weights, value)),
    "network": _are_options,
    "args": _are_args,
    "input_size": lambda value: _are(value, int, 2) and min(value) > 0 and max(value) < 10_000,
    "normalisation": lambda value: (
        isinstance(value, dict) and all(_are(value.get(name), (int, float), 3) for name in ("mean", "std"))
    ),
    "identities": lambda value: _are(value, (str, type(None))),
    "categories": lambda value: (
        _are(value, (list, tuple)) and all(_are(one, (int, str), 2) and isinstance(one[1], str) for one in value)
    ),
    "distance": lambda value: value in METRICS,
    "epoch": lambda value: isinstance(value, int) and value >= 0,
    "best": lambda value: isinstance(value, (int, float)),
    "bits": lambda value: value is None or isinstance(value, int),
    "view": _are_options,
    "threshold": lambda value: value is None or _is_threshold(value),
}


def save_checkpoint(path, state):
    """Write `state` to `path` so that a crash at any moment leaves the old file or the new one, both whole.

    Raises InputError where the disk is full or the folder can't be written to; the old file is untouched then.
    """
    with atomic_write(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # the trap: interrupted, torch's writer fails to close its file and raises this
            if isinstance(error.__context__, KeyboardInterrupt):
                raise error.__context__ from None
            raise


def save_run(folder, state, improved):
    """Write `last.pth` and, if this epoch `improved`, before it `best.pth`, which is `weights_alone`.

    The best comes first: a run that is killed between the two repeats the epoch and finds the same best again. Epoch 0,
    the network that the run begins with, may be the best; there is nothing in it to go on from.
    """
    if improved:
        save_checkpoint(Path(folder) / "best.pth", weights_alone(state))
    if state["epoch"]:
        save_checkpoint(Path(folder) / "last.pth", state)


def load_checkpoint(path, *kinds, mmap=False):
    """Read a checkpoint of Carousel onto the CPU, with `mmap` each tensor only when it is used.

    Raises InputError if the file is missing, not whole, holds code, or is not what `check_checkpoint` wants.
    """
    return check_checkpoint(load_file(path, mmap), path, *kinds)


def check_checkpoint(state, path, *kinds):
    """The content `state` of the file at `path` if it is a checkpoint of ours, and of one of `kinds` if there are any.

    Raises InputError otherwise, also where it lacks something that its kind must hold (`REQUIRED`).
    """
    if not isinstance(state, dict) or not isinstance(state.get("kind"), str):
        raise InputError(f"{path} is not a checkpoint of Carousel (no kind in it): give one that a training has left")
    if kinds and state["kind"] not in kinds:
        raise InputError(
            f"{path} is a checkpoint of kind {state['kind']}, {' or '.join(kinds)} is needed here: give another file"
        )
    missing = [key for key in REQUIRED.get(state["kind"], ()) if key not in state]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}: it is not whole, or another version of Carousel wrote it")
    wrong = [key for key, is_right in FIELDS.items() if key in state and not is_right(state[key])]
    if wrong:
        shown = " ".join(repr(state[wrong[0]]).split())[:60]
        raise InputError(f"{path} is not as a run wrote it: its {wrong[0]} can't be {shown}; get it again")
    return state


def weights_alone(state):
    """A checkpoint without what only training needs: its weights that count, and what is needed to use them."""
    left_out = ("optimizers", "scheduler", "scaler", "loss", "message")
    return {**{key: state[key] for key in state if key not in left_out}, "model": best_weights(state), "ema": []}


def fingerprint(state):
    """What tells one trained network from another: the sha256, in hexadecimal, of all that shapes its answers.

    That is the weights that count (averaged ones where there are any), the network's options and its input size: the
    same for best.pth and for a copy of it, another one after an epoch more. Galleries and cached masks keep it.

    Args:
        state: a checkpoint, as `load_checkpoint` gives it.
    """
    digest = hashlib.sha256()
    for key, tensor in sorted(best_weights(state).items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())  # numpy knows no bfloat16
    options = {"network": state["network"], "input_size": state.get("input_size")}
    digest.update(json.dumps(options, sort_keys=True).encode())
    return digest.hexdigest()


def all_options(args):
    """The options and the number of processes, which is one too: of torchrun."""
    return {**vars(args), "processes": distributed.world_size()}


# Options that say where and how a run is done, not what it computes.
RUN_ALONE = {"name", "output", "resume", "data", "workers", "device", "timeout", "eval_every", "eval_batch_size"}
RUN_ALONE |= {"tensorboard", "wandb", "recipe", "compile", "skip_broken", "max_megapixels"}


def changed_options(saved, args, without_effect=()):
    """What a resumed run has otherwise than its checkpoint, for the line that says that it goes on; "" if nothing.

    Everything follows the new options; of the optimiser only what it has gathered is kept.
    """
    changed = [
        f"{key} {saved[key]} -> {value}"
        for key, value in all_options(args).items()
        if key in saved and key not in RUN_ALONE.union(without_effect) and saved[key] != value
    ]
    return f"; changed: {', '.join(changed)}" if changed else ""


def check_same_network(state, path, network_options):
    """Raise InputError where a checkpoint was trained with other network options, naming what differs."""
    saved = state["network"]
    differing = [key for key in network_options if saved.get(key) != network_options[key]]
    if differing:
        listed = ", ".join(f"{key} is {saved.get(key)} there and {network_options[key]} here" for key in differing)
        raise InputError(f"{path} holds another network: {listed}; give the options it was started with")


def restore(state, path, *holders):
    """Put what a checkpoint holds back where it came from. Raises InputError where it doesn't fit.

    holders: pairs of a key of the checkpoint, None for all of it, and the module or `Step` that it belongs to.
    """
    if "optimizers" not in state:
        raise InputError(
            f"{path} holds weights alone, as best.pth and exported ones do: resume last.pth, or begin a new run with "
            f"--weights {path}"
        )
    try:
        for key, holder in holders:
            holder.load_state_dict(state if key is None else state[key])
    except STRANGE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"can't continue from {path}: {reason}; give the options it was started with") from error


def open_run(output, name, resume=None):
    """Choose the run folder (rank 0 chooses, all ranks learn) and the checkpoint to continue from.

    A folder that exists is never written into, except to resume the run in it: `name`, `name-2`, `name-3`, ... One that
    is new goes again where an InputError ends the run before it has saved anything.

    Args:
        resume: None, "auto" (last.pth of the latest run under this name; where all died before it, the latest folder
            anew, so that restarts don't leave a trail of folders) or the path of a checkpoint.

    Returns:
        (folder, checkpoint path or None)

    Raises InputError where there is nothing to resume and no launcher that begins and restarts runs by one command.
    """
    folder, checkpoint, made = distributed.on_main(lambda: _choose_run(Path(output), name, resume))
    distributed.undo_on_input_error(partial(_remove_unused, made))
    return folder, checkpoint


def _remove_unused(made):
    """Remove new folders, the deepest first: one without files, or a training's that has finished no epoch."""
    with suppress(OSError):
        for folder in made:
            if (folder / "args.json").is_file() and not (folder / "last.pth").exists():
                shutil.rmtree(folder)
            else:
                folder.rmdir()


def lock_run(folder):
    """Keep a run folder for this process while it lives, and remove what a killed one left half written in it.

    Returns the open lock file, for `release_run`. On a file system without locks nothing is refused or removed.
    Raises InputError where a run that is alive holds the folder, or it can't be written to.
    """
    path = Path(folder) / ".lock"
    while True:
        try:
            file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - it stays open
        except OSError as error:
            raise InputError(f"can't write {path}: {error.strerror}; give another --output") from error
        try:
            lock_for_process(file)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return file
            file.seek(0)
            owner = file.read()
            file.close()
            raise InputError(
                f"{folder}: its run is alive ({owner}); wait for its end or stop it, or begin another with --name"
            ) from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        file.close()  # the run before has removed what this lock is on: take the next
    file.truncate(0)
    with suppress(OSError):  # a full disk: what the run writes next will tell
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
    for leftover in path.parent.glob(".*.tmp"):
        leftover.unlink()
    return file


def release_run(lock):
    """Give a run folder up; lock: of `lock_run`."""
    with suppress(OSError):  # Windows removes no open file: there it stays
        os.unlink(lock.name)
    lock.close()


@contextmanager
def open_output(output):
    """Context with a new folder for results beside no run: `output`, or where that exists, `output-2`, ...

    Created early so that bad paths fail fast; removed if empty.
    Raises InputError where it can't be made, or has no name to which a number could be added.
    """
    path = Path(output)
    if path.name in ("", ".."):
        raise InputError(f"--output {output} is there already, and nothing is overwritten: name a new folder")
    made = [folder for folder in path.parents if not os.path.exists(folder)]  # the deepest first
    try:
        made.insert(0, open_run(path.parent, path.name)[0])
        yield made[0]
    finally:
        with suppress(OSError):  # the first one that holds something, and so do those above it
            for folder in filter(os.path.isdir, made):
                folder.rmdir()


def _choose_run(output, name, resume):
    if resume not in (None, "auto"):
        if not Path(resume).is_file():
            raise InputError(f"--resume {resume}: no such file; without a path the run's newest checkpoint is taken")
        return Path(resume).resolve().parent, Path(resume), []
    if resume == "auto":
        folders = _runs_named(output, name)
        for folder in folders:
            if os.path.isfile(folder / "last.pth"):
                return folder, folder / "last.pth", []
        for folder in folders:
            if _died_early(folder):
                return folder, None, []
        if not distributed.is_restarted():
            raise InputError(_nothing_to_resume(output, name))
    folder, number = output / name, 2
    while True:
        made = [folder, *(path for path in folder.parents if not os.path.exists(path))]
        try:
            folder.mkdir(parents=True)
            return folder, None, made
        except OSError as error:
            if not os.path.isdir(folder):
                raise InputError(_why_no_folder(folder, error)) from error
            folder, number = output / f"{name}-{number}", number + 1


def _died_early(folder):
    """Whether a run without last.pth has finished no epoch: at most it has saved what it began with."""
    best = folder / "best.pth"
    return not os.path.lexists(best) or load_checkpoint(best, mmap=True)["epoch"] == 0


def _nothing_to_resume(output, name):
    runs = sorted(path.parent.name for path in (output / name).parent.glob("*/last.pth"))
    known = f"there are {', '.join(runs[:5])}{', ...' * (len(runs) > 5)}" if runs else "there is no run"
    return (
        f"--resume: no run {name} in {(output / name).parent} to go on with, {known}; check --name and --output, or "
        "leave --resume out to begin one"
    )


def _why_no_folder(folder, error):
    for path in (folder, *folder.parents):
        if os.path.isfile(path):
            return f"{path} is a file where a folder is needed; move it, or give another --output"
    return f"can't make the run folder {folder}: {error.strerror}; give another --output"


def _runs_named(output, name):
    """Folders `name`, `name-2`, ..., the latest first: by their number, since a clock may be set back.

    Compared as text, since a name may hold what is a wildcard to glob.
    """
    parent = (output / name).parent
    if not os.path.isdir(parent):
        return []
    pattern = re.compile(re.escape((output / name).name) + r"(?:-(\d+))?")
    numbered = [(pattern.fullmatch(folder.name), folder) for folder in parent.iterdir() if folder.is_dir()]
    return [folder for match, folder in sorted(numbered, key=lambda one: -int(one[0] and one[0][1] or 1)) if match]
