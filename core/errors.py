"""The one error that a person, not a programmer, has to answer."""

from contextlib import contextmanager

# What reading content of another shape or type than expected raises.
STRANGE = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError, AssertionError)
STRANGE += (MemoryError, NotImplementedError, OSError)


class InputError(ValueError):
    """Something a person gave can't be used: data, options, a checkpoint.

    The message is one line: what is wrong, where, and what to do. Scripts print it and exit with code 2
    (`core.engine.distributed.run_script`); every other exception is a fault of ours and keeps its traceback.
    """


@contextmanager
def as_written(path, advice="mend it, or move it away"):
    """Context that uses what stands in a file of ours: what is of another shape or type there is an InputError."""
    try:
        yield
    except InputError:
        raise
    except STRANGE as error:
        if "out of memory" in str(error):  # of the device: the file is right
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path} is not as a run wrote it ({reason}); {advice}") from error
