"""What a script says, on whatever terminal, pipe or file: never at the cost of what it does."""

import errno
import os
import re
import sys

from core.files import printable

TEXT = {
    "stdout": re.compile(r"[^\n\t]+"),
    "stderr": re.compile(r"(?:(?!\x1b\[A)[^\n\r])+"),  # a progress bar returns, and goes a line up
}


class Terminal:
    """sys.stdout or sys.stderr (name) in which nothing that is written fails.

    Names from data may hold what moves a terminal's cursor, or signs that its encoding lacks: both are escaped. Where
    nobody reads any more (`| head`) or nothing can be written (a full disk, a closed descriptor), what follows is
    dropped; on a full disk that is said once on stderr.
    """

    def __init__(self, name):
        self.name, self.stream = name, getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115 - it stays open

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        encoding = self.stream.encoding or "utf-8"
        shown = TEXT[self.name].sub(lambda match: printable(match[0]), text)
        self._try(self.stream.write, shown.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self):
        self._try(self.stream.flush)

    def _try(self, action, *arguments):
        try:
            action(*arguments)
        except ValueError:  # it is closed
            self.stream = open(os.devnull, "w")  # noqa: SIM115
        except OSError as error:
            old, self.stream = self.stream, open(os.devnull, "w")  # noqa: SIM115
            os.dup2(self.stream.fileno(), old.fileno())  # what its buffer still holds goes there at the end
            if self.name == "stdout" and error.errno != errno.EPIPE:
                sys.stderr.write(f"warning: what is printed is lost ({error.strerror}); the run goes on\n")


def guard_streams():
    """Make `Terminal`s of this process's stdout and stderr."""
    for name in TEXT:
        if not isinstance(getattr(sys, name), Terminal):
            setattr(sys, name, Terminal(name))
