"""What every data set of pictures needs around its DataLoader: how a broken picture is met."""

import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

from core.errors import InputError

SHARED = "/dev/shm"  # where there is one, on Linux


class PictureDataset(Dataset):
    """A data set whose `self[key]` raises InputError where a picture is broken; see `batches`."""

    def __getitems__(self, keys):
        """A batch, as DataLoader asks for it: a list of items, or the InputError of the first that can't be had."""
        try:
            return [self[key] for key in keys]
        except InputError as error:
            return error


def build_loader(images, collate, device, workers, **sampling):
    """DataLoader of a `PictureDataset`; `sampling`: which of the pictures, in which batches."""
    return DataLoader(
        images,
        num_workers=workers,
        # A loader draws seeds for its workers, more of them in its first epoch: not from the stream of dropout.
        generator=torch.Generator(),
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        collate_fn=partial(_collate_and_share, collate),
        **sampling,
    )


def _collate_and_share(collate, items):
    """A batch, in shared memory where a worker makes it: where that is full, this is an error that travels. The trap:
    torch shares it in a thread of the worker's queue, whose error is printed and lost, and the run waits for ever."""
    batch = collate(items)
    for value in tree_leaves(batch) if get_worker_info() else ():
        if isinstance(value, torch.Tensor):
            value.share_memory_()
    return batch


def batches(loader):
    """The batches of a DataLoader; a broken picture's InputError is raised here, in one line.

    Raised in the worker, torch would put the worker's whole traceback into the message. So it travels as the batch:
    `PictureDataset` returns it, and the collate function passes it on.
    """
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield batch


# What torch says where one of the processes that read pictures is gone, or can't pass one on.
READER_DIED = re.compile(
    r"DataLoader worker \(pid.*?\) (?:is )?(?P<how>killed by signal: [\w ]+|exited unexpectedly)"
    r"|(?P<memory>unable to \w+ .*(?:</torch_|shared memory|shm).*)|received 0 items of ancdata"
)


def why_reader_died(error):
    """What `batches` failed of, where processes that read pictures did: a few words, None for any other error."""
    if (found := READER_DIED.search(str(error))) is None:
        return None
    how = found["how"] or found["memory"] or "too many open files"
    room = f", with {shutil.disk_usage(SHARED).free / 2**20:.1f} MiB free" if os.path.isdir(SHARED) else ""
    return f"a process that reads pictures failed ({how}); they pass them on through shared memory{room}"


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
