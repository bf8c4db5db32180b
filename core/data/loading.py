"""What every loop over a DataLoader needs, whatever its pictures are for."""

from core.errors import InputError


def batches(loader):
    """The batches of a DataLoader; a broken picture's InputError is raised here, in one line.

    Raised in the worker, torch would put the worker's whole traceback into the message. So it travels as the batch:
    the data set's `__getitems__` returns it, and the collate function passes it on.
    """
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield batch
