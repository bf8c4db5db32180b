"""Checkpoints and run folders: written whole or not at all, read without running code, never overwritten.

A checkpoint is a dict of tensors and plain values: `kind` ("reid", "mask_rcnn", "gan"), `model`, `epoch`, `best`,
`args`, and what is needed to use it without them. `evaluate.py` and `demo.py` need only its path.
"""

import os
import re
from pathlib import Path

import torch

from core.engine import distributed
from core.errors import InputError
from core.models.weights import load_file


def save_checkpoint(path, state):
    """Write `state` to `path` so that a crash at any moment leaves the old file or the new one, both whole.

    Raises InputError where the disk is full or the folder can't be written to; the old file is untouched then.
    """
    with atomic_write(path) as file:
        torch.save(state, file)


def save_run(folder, state, improved):
    """Write `last.pth`, and `best.pth` too if this epoch `improved`: one file under two names, so it is written once.

    The best comes first: a run that is killed between the two repeats the epoch and finds the same best again.
    """
    last, best = Path(folder) / "last.pth", Path(folder) / "best.pth"
    if not improved:
        save_checkpoint(last, state)
        return
    save_checkpoint(best, state)
    link = last.with_name(f".{last.name}.{os.getpid()}.tmp")
    try:
        os.link(best, link)
        os.replace(link, last)
    except OSError:  # a file system without hard links
        save_checkpoint(last, state)


def make_folder(path):
    """Make a folder and those above it where they are missing. Raises InputError where that is refused."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"can't make the folder {path}: {error.strerror}; give another --output") from error


class atomic_write:
    """Context manager: a binary file that appears under `path` only once it is complete and on the disk."""

    def __init__(self, path):
        self.path = Path(path)
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")

    def __enter__(self):
        try:
            self.file = open(self.temporary, "wb")
        except OSError as error:
            raise InputError(f"can't write {self.path}: {error.strerror}; give another --output") from error
        return self.file

    def __exit__(self, kind, error, traceback):
        # torch's zip writer reports a full disk as RuntimeError, after the OSError of the file beneath it.
        if isinstance(error, OSError | RuntimeError):
            self._discard()
            reason = error.strerror if isinstance(error, OSError) else _root_cause(error)
            raise InputError(f"can't write {self.path}: {reason}; what was there before is whole") from error
        if error is not None:
            self._discard()
            return
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            os.replace(self.temporary, self.path)
        except OSError as failure:
            self._discard()
            raise InputError(
                f"can't write {self.path}: {failure.strerror}; what was there before is whole"
            ) from failure

    def _discard(self):
        try:
            self.file.close()
        except OSError:
            # A full disk fails again when the buffer is flushed; the descriptor is closed all the same.
            self.file = None
        self.temporary.unlink(missing_ok=True)


def _root_cause(error):
    cause = error.__cause__ or error.__context__
    return cause.strerror if isinstance(cause, OSError) else str(error).splitlines()[0]


def load_checkpoint(path, kind=None):
    """Read a checkpoint of Carousel onto the CPU.

    Raises InputError if the file is missing, not whole, holds code, is no checkpoint of ours or not of `kind`.
    """
    state = load_file(path)
    if not isinstance(state, dict) or "kind" not in state:
        raise InputError(f"{path} is not a checkpoint of Carousel (no kind in it); to start from weights use --weights")
    if kind is not None and state["kind"] != kind:
        raise InputError(f"{path} is a checkpoint of kind {state['kind']}, {kind} is needed here")
    return state


def open_run(output, name, resume=None):
    """Choose the run folder (rank 0 chooses, all ranks learn) and the checkpoint to continue from.

    A folder that exists is never written into, except to resume the run in it: `name`, `name-2`, `name-3`, ...

    Args:
        resume: None, "auto" (the newest `last.pth` of a run under this name) or the path of a checkpoint.

    Returns:
        (folder, checkpoint path or None)
    """
    return distributed.on_main(lambda: _choose_run(Path(output), name, resume))


def _choose_run(output, name, resume):
    if resume not in (None, "auto"):
        if not Path(resume).is_file():
            raise InputError(f"--resume {resume}: no such file; without a path the run's newest checkpoint is taken")
        return Path(resume).resolve().parent, Path(resume)
    if resume == "auto":
        found = [path for folder in _runs_named(output, name) for path in [folder / "last.pth"] if path.is_file()]
        if found:
            newest = max(found, key=lambda path: path.stat().st_mtime_ns)
            for leftover in newest.parent.glob(".*.tmp"):  # of a run that was killed while writing
                leftover.unlink()
            return newest.parent, newest
    folder, number = output / name, 2
    while True:
        try:
            folder.mkdir(parents=True)
            return folder, None
        except FileExistsError:
            if not folder.is_dir() or output.is_file():
                raise InputError(f"{output} is a file; give another --output") from None
            folder, number = output / f"{name}-{number}", number + 1
        except OSError as error:
            raise InputError(f"can't make the run folder {folder}: {error.strerror}; give another --output") from error


def _runs_named(output, name):
    pattern = re.compile(re.escape(name) + r"(-\d+)?")
    return [folder for folder in output.glob(f"{name}*") if folder.is_dir() and pattern.fullmatch(folder.name)]
