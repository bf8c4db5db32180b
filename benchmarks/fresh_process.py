"""Time and peak memory of one function call, in a process of its own."""

import multiprocessing
import time
from typing import NamedTuple


class Measurement(NamedTuple):
    seconds: float  # wall clock, best of the repeats
    cpu_seconds: float  # of all threads, in that repeat; a thread that waits actively counts
    peak_gib: float  # highest resident memory during the call, beyond what was resident before it; Linux only
    value: object  # what the function returned


def _resident_gib(field):
    with open("/proc/self/status") as status:
        kib = next(int(line.split()[1]) for line in status if line.startswith(field + ":"))
    return kib / 2**20


def _child(sender, make_inputs, function, arguments, repeats):
    inputs = make_inputs(*arguments)
    seconds = []
    for _ in range(repeats):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # sets the high-water mark back to what is resident now
        before, wall, cpu = _resident_gib("VmRSS"), time.perf_counter(), time.process_time()
        value = function(*inputs)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        seconds.append((wall, cpu))
        if len(seconds) == 1:  # later repeats find the memory of the first still resident
            peak = _resident_gib("VmHWM") - before
    sender.send(Measurement(*min(seconds), peak, value))


def measure(make_inputs, function, arguments, repeats=1):
    """Call function(*make_inputs(*arguments)) in a fresh process; only the function is measured.

    Both functions have to be importable by name; the result travels back through a pipe.

    Raises:
        RuntimeError: the process died, by an exception or by a signal.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, make_inputs, function, arguments, repeats))
    process.start()
    sender.close()  # with this end open, too, the pipe would not end when the child dies
    try:
        measurement = receiver.recv()  # before join: a child waits until all that it sends is read
    except (EOFError, OSError):  # it ended before, or in the middle
        measurement = None
    process.join()
    if measurement is None or process.exitcode:
        raise RuntimeError(f"{function.__name__} ended with exit code {process.exitcode}; its report, if any, is above")
    return measurement


def print_table(measurements, reference):
    """One line per (name, Measurement); the ratios are to the one named `reference`."""
    times = dict(measurements)
    print(f"{'':32s} {'seconds':>9s} {'cpu s':>8s} {'peak GiB':>9s} {'ratio':>7s}")
    for name, m in measurements:
        ratio = f"{m.seconds / times[reference].seconds:7.3f}" if reference in times else "      -"
        print(f"{name:32s} {m.seconds:9.2f} {m.cpu_seconds:8.2f} {m.peak_gib:9.2f} {ratio}")
