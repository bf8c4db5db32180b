"""What every data set of pictures needs around its DataLoader: how a broken picture is met."""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from core.errors import InputError


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
        collate_fn=collate,
        **sampling,
    )


def batches(loader):
    """The batches of a DataLoader; a broken picture's InputError is raised here, in one line.

    Raised in the worker, torch would put the worker's whole traceback into the message. So it travels as the batch:
    `PictureDataset` returns it, and the collate function passes it on.
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
