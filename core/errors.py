"""The one error that a person, not a programmer, has to answer."""


class InputError(ValueError):
    """Something a person gave can't be used: data, options, a checkpoint.

    The message is one line: what is wrong, where, and what to do. Scripts print it and exit with code 2
    (`core.engine.distributed.run_script`); every other exception is a fault of ours and keeps its traceback.
    """
