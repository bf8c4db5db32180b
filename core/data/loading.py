"""What every data set of pictures needs around its DataLoader: how a broken picture is met."""

from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

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


def find_broken(samples, read, num_threads=8):
    """Read everything once, before a run: for each sample the InputError that `read(sample)` raises, or None."""

    def problem(sample):
        try:
            read(sample)
        except InputError as error:
            return error
        return None

    with ThreadPoolExecutor(num_threads) as pool:  # decoding releases the interpreter's lock
        return list(tqdm(pool.map(problem, samples), "checking pictures", len(samples), unit="img", disable=None))
