"""Files that a run leaves behind: there whole or not at all, and one line where they can't be written."""

import errno
import os
import re
from contextlib import suppress
from pathlib import Path

from core.errors import InputError


def make_folder(path):
    """Make a folder and those above it where they are missing. Raises InputError where that is refused."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"can't make the folder {path}: {error.strerror}; give another place") from error


def distinct_names(paths, taken=()):
    """A name for what is made of each file: its own without the suffix, numbered where two have the same.

    taken: names that are in use already. Upper and lower case count as one, as some file systems have it.
    """
    names, taken, numbers = [], {name.casefold() for name in taken}, {}
    for path in paths:
        name = stem = Path(path).stem.strip(".") or "picture"  # "..jpg" must not lead out of the folder
        number = numbers.setdefault(stem.casefold(), 1)  # where the search goes on: 20,000 may have one name
        while name.casefold() in taken:
            number += 1
            name = f"{stem}-{number}"
        numbers[stem.casefold()] = number
        taken.add(name.casefold())
        names.append(name)
    return names


def printable(text):
    """Text on one line that changes nothing but its own place. The trap: file names may hold line breaks, what moves a
    terminal's cursor or turns the direction of writing, and bytes that are no text, at which print stops."""
    return NOT_PRINTED.sub(lambda match: _escaped(match[0]), str(text))


def printable_lines(text):
    """The same for text of several lines."""
    return "\n".join(map(printable, text.split("\n")))


def lock_for_process(file):
    """Lock an open file for this process; the lock ends with the process however that ends. Raises OSError (EACCES,
    EAGAIN) where another process has it.

    The trap: a lock by flock lives on in the forked workers of a DataLoader when their parent is killed; this one is
    the process's own. It is given up, too, when the process closes another handle of the file.
    """
    if os.name == "posix":
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        import msvcrt

        file.seek(1 << 20)  # beyond what the file holds, so that others can read that
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)


# Control characters; separators of lines and paragraphs, directions of writing; surrogates, which stand for bytes.
NOT_PRINTED = re.compile("[\\0-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")


def _escaped(sign):
    is_byte = "\ud800" <= sign <= "\udfff"
    return "\N{REPLACEMENT CHARACTER}" if is_byte else sign.encode("unicode_escape").decode()


class atomic_write:
    """Context manager: a binary file that appears under `path` only once it is complete and on the disk.

    Raises InputError where the disk is full or the folder can't be written to; what was under `path` is as it was.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")

    def __enter__(self):
        try:
            self.file = open(self.temporary, "wb")
        except OSError as error:
            raise InputError(f"can't write {self.path}: {error.strerror}; give another place") from error
        return self.file

    def __exit__(self, kind, error, traceback):
        if error is None:
            try:
                self.file.flush()
                os.fsync(self.file.fileno())
                self.file.close()
                os.replace(self.temporary, self.path)
                sync_folder(self.path.parent)
                return
            except OSError as failure:
                error = failure
        self._discard()
        refusal = _system_error(error)
        if refusal is not None:
            reason = refusal.strerror or refusal
            raise InputError(f"can't write {self.path}: {reason}; what was there before is whole") from error

    def _discard(self):
        # A full disk fails again when the buffer is flushed, and a disk that is gone lets nothing be removed: the
        # error that is being reported says so already.
        with suppress(OSError):
            self.file.close()
        with suppress(OSError):
            self.temporary.unlink(missing_ok=True)


def _system_error(error):
    """The OSError behind a failed write, or None for any other fault.

    The trap: torch's zip writer reports a full disk as RuntimeError, and only its context holds the OSError.
    """
    while isinstance(error, RuntimeError):
        error = error.__cause__ or error.__context__
    return error if isinstance(error, OSError) else None


def sync_folder(folder):
    """Put a folder's list of names on the disk: without it a rename may be undone by a power cut (POSIX)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems can't, and need not
            raise
    finally:
        os.close(descriptor)
