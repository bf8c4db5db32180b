"""Losses compute in float32, whatever the network computed in."""

import functools

import torch


def at_least_float32(tensor):
    """float16 and bfloat16 become float32; everything else (float64, labels) stays as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def in_float32(forward):
    """Decorator for `forward(self, *tensors)` of a loss: autocast off, half-precision inputs widened.

    Half precision has 8 to 11 bits: distances of near features cancel to nothing in it, and a mean over the pixels of a
    batch of masks adds up more terms than it can count.
    """

    @functools.wraps(forward)
    def widened(self, *tensors):
        with torch.autocast(tensors[0].device.type, enabled=False):
            return forward(self, *map(at_least_float32, tensors))

    return widened
