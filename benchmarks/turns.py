"""Functions timed by turns in one process, so that what else the machine does hits them alike."""

import statistics
import time

import torch


def medians(functions, device, steps, warmup=1, clock=None):
    """Median seconds of each function over `steps` turns; `functions` and result by name.

    They take turns at going first. `warmup` turns before, which choose kernels and fill caches, don't count. clock:
    `time.process_time` counts this process alone, on the CPU; by default the wall clock.
    """
    clock = clock or time.perf_counter
    names, seconds = list(functions), {name: [] for name in functions}
    for turn in range(warmup + steps):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            _synchronize(device)
            start = clock()
            result = functions[name]()
            _synchronize(device)
            seconds[name].append(clock() - start)
            del result  # its memory is given back outside of the time of the next
    return {name: statistics.median(values[warmup:]) for name, values in seconds.items()}


def peak_bytes(functions, device):
    """Peak memory of a call of each function, by name, beyond what was held before it; of a CUDA device."""
    peaks = {}
    for name, function in functions.items():
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        peaks[name] = torch.cuda.max_memory_allocated(device) - held
    return peaks


def beside(values, unit, scale, digits=1):
    """The line "ours 1.0 ms, torchvision 2.0 ms, ratio 0.500" of what the functions above return, ours first."""
    (_, ours), (name, theirs) = ((name, scale * value) for name, value in values.items())
    return f"ours {ours:.{digits}f} {unit}, {name} {theirs:.{digits}f} {unit}, ratio {ours / theirs:.3f}"


def is_cuda(device):
    return torch.device(device).type == "cuda"


def _synchronize(device):
    if is_cuda(device):
        torch.cuda.synchronize(device)
    elif torch.device(device).type == "mps":
        torch.mps.synchronize()
