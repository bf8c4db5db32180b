"""Randomness as a function of numbers that are known anyway (seed, epoch, sample), so that no state has to be saved."""

import contextlib
import hashlib

import torch


def derive_seed(*parts):
    """One seed out of several numbers and names, e.g. `derive_seed("dropout", seed, epoch, rank)`.

    The parts are hashed: neighbouring epochs or samples get unrelated seeds, and a name in front keeps two uses of
    the same numbers apart. (`numpy.random.SeedSequence` pads with zeros, so (1,) and (1, 0) would be one seed.)

    Args:
        parts: integers (of any size and sign, numpy's too) and strings without "/".

    Returns:
        int in [0, 2^63): what torch, numpy and `random` all take. The same on every machine and in every version.
    """
    digest = hashlib.blake2b("/".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextlib.contextmanager
def seeded(*parts):
    """Inside the block torch's CPU generator starts at `derive_seed(*parts)`; afterwards it is as it was before.

    Generators on devices are neither read nor written (`torch.manual_seed` would seed them all), so dropout on a GPU
    does not notice.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(*parts))
        yield
