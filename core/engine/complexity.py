"""What a network costs where it embeds pictures: parameters, multiply-adds, memory, speed."""

import ctypes
import os
import statistics
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from core.engine.export import for_retrieval
from core.engine.step import autocast

RESET = Path("/proc/self/clear_refs")  # Linux


class Complexity(NamedTuple):
    """Of a network without its classifiers, which retrieval does not run.

    parameters: all of them, also of a mask decoder that runs on demand alone.
    multiply_adds: of one picture, in all convolutions and matrix products, attention's too; no norms, no activations.
    peak_memory: bytes in one batch. CUDA: all that was allocated, weights included. CPU: by how much the process grew
        (Linux). None: not measured there.
    images_per_second: median of a few batches.
    """

    parameters: int
    multiply_adds: int
    peak_memory: int | None
    images_per_second: float

    def columns(self):
        """Heading -> value, in the units in which people compare networks."""
        return {
            "parameters (M)": self.parameters / 1e6,
            "multiply-adds (M)": self.multiply_adds / 1e6,
            "peak memory (MiB)": None if self.peak_memory is None else self.peak_memory / 2**20,
            "images/s": self.images_per_second,
        }

    def __str__(self):
        known = ", ".join(f"{name} {value:.2f}" for name, value in self.columns().items() if value is not None)
        what = "multiply-adds of convolutions and matrix products, memory on CPU is by how much the process grew"
        return f"{known}; without classifiers, {what}"


@torch.no_grad()
def complexity(network, input_size, device, *, batch_size=32, amp="off", repeats=3):
    """`Complexity` of a ReID network on `device`, by pictures of `input_size` (height, width) in batches; seconds."""
    network = for_retrieval(network).to(device)
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, *input_size, device=device))
    images = torch.randn(batch_size, 3, *input_size, device=device)

    def embed():
        with autocast(device, amp):
            network(images)
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()

    peak_memory = _peak_memory(embed, device)  # the first batch, which also chooses kernels
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        embed()
        seconds.append(time.perf_counter() - start)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Complexity(parameters, counter.get_total_flops() // 2, peak_memory, batch_size / statistics.median(seconds))


def _peak_memory(function, device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or not os.access(RESET, os.W_OK):
        return function()
    with suppress(OSError, AttributeError):  # glibc alone: what was freed before is given back, or it hides the growth
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    RESET.write_text("5")  # the highest mark falls to what is held now
    before = _resident("VmRSS")
    function()
    return max(_resident("VmHWM") - before, 0)


def _resident(which):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))
