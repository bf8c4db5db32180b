"""Do the collectives work between these processes, and how fast? What `bash run_ddp.sh --check` runs on every rank.

All-reduce, all-gather, broadcast and barrier are run with values that are known beforehand, then timed. A rank that
doesn't come, that hands out wrong values or that receives them is named. Exit code 0 if all is well, 1 if not.
"""

import argparse
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from core.engine import distributed, options
from core.engine.distributed import (
    CollectiveError,
    barrier,
    collective,
    gather_into,
    gather_objects,
    is_main,
    rank,
    world_size,
)
from core.errors import InputError

VALUES = 262_147  # floats that are checked; a prime number, so that no split over ranks or blocks comes out even


def get_parser() -> argparse.ArgumentParser:
    parser = options.Parser(__doc__, command="bash run_ddp.sh --check")
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument(
        "--sizes", type=options.positive_float, nargs="+", default=[1, 16, 64], help="sizes to time, in MB"
    )
    parser.add_argument(
        "--repeat", type=options.positive_int, default=5, help="times each size is run; the mean counts"
    )
    parser.add_argument(
        "--timeout", type=options.positive_float, default=1.0, help="minutes until a hung check is ended"
    )
    return parser


def main(args: argparse.Namespace) -> None:
    device = distributed.setup(args.device, args.timeout)
    if not dist.is_initialized():
        raise InputError("there is no process group to check: start with bash run_ddp.sh --check")
    barrier("first barrier")
    print_ranks(device)
    seconds = 60 * args.timeout
    check_values(device, seconds)
    print_bandwidth(device, args.sizes, args.repeat, seconds)
    barrier("last barrier")
    if is_main():
        print(f"all four collectives give the right values on all ranks ({world_size()})")


def print_ranks(device: torch.device) -> None:
    name = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
    places = gather_objects((socket.gethostname(), name))
    if is_main():
        print(f"{'rank':>4}  {'machine':<24}  device")
        for r, (host, name) in enumerate(places):
            print(f"{r:>4}  {host:<24}  {name}")
        print(flush=True)


def check_values(device: torch.device, timeout: float = 60) -> None:
    """Run each collective once with known values. Raises CollectiveError that names the ranks at fault."""
    pattern = torch.arange(VALUES, device=device, dtype=torch.float32) % 251  # sums over ranks stay exact in float32
    ranks = torch.arange(world_size(), device=device, dtype=torch.float32)
    mine = pattern + rank()

    total = mine.clone()
    run("all_reduce", partial(dist.all_reduce, total, async_op=True), device, timeout)
    right = gather_objects(torch.equal(total, pattern * world_size() + ranks.sum()))
    faults = [f"all_reduce gives rank {r} a wrong sum" for r in range(world_size()) if not right[r]]

    gathered = mine.new_empty(world_size() * VALUES)
    run("all_gather", partial(gather_into, gathered, mine, async_op=True), device, timeout)
    wrong = (gathered.view(-1, VALUES) != pattern + ranks[:, None]).any(1)  # (W,): what came from each rank
    faults += [f"all_gather: {fault}" for fault in blame(gather_objects(wrong.tolist()))]

    wrong = torch.zeros(world_size(), dtype=torch.bool)
    for source in range(world_size()):
        message = mine.clone() if rank() == source else torch.full_like(mine, -1)
        run(f"broadcast from rank {source}", partial(dist.broadcast, message, source, async_op=True), device, timeout)
        wrong[source] = not torch.equal(message, pattern + source)
    faults += [f"broadcast: {fault}" for fault in blame(gather_objects(wrong.tolist()))]
    if faults:
        raise CollectiveError("; ".join(faults))


def blame(wrong: list[list[bool]]) -> list[str]:
    """wrong[r][s]: what rank r holds of rank s is wrong. Returns sentences that name who is at fault.

    A rank is the sender at fault if all others get its values wrong, the receiver at fault if it gets those of all
    others wrong; what is left is told pair by pair. With two ranks nobody can say which end it is.
    """
    everyone = range(len(wrong))
    pairs = {(r, s) for r in everyone for s in everyone if wrong[r][s]}
    if len(wrong) <= 2:
        return [f"rank {s} sends or rank {r} receives wrong values" for r, s in sorted(pairs)]
    senders = [s for s in everyone if all(wrong[r][s] for r in everyone if r != s)]
    receivers = [r for r in everyone if all(wrong[r][s] for s in everyone if s != r)]
    rest = sorted((r, s) for r, s in pairs if s not in senders and r not in receivers)
    return (
        [f"rank {s} sends wrong values" for s in senders]
        + [f"rank {r} receives wrong values" for r in receivers]
        + [f"rank {r} receives wrong values from rank {s}" for r, s in rest]
    )


def run(name: str, start: Callable[[], Any], device: torch.device, timeout: float) -> None:
    """Start a collective and wait for its end, at most `timeout` seconds: CollectiveError names who is missing."""
    with collective(name):
        work = start()
        # NCCL runs on the GPU, where nothing can be raised: look whether it has finished, shortly before its watchdog
        # would end the process without telling which rank did not come.
        deadline = time.monotonic() + 0.9 * timeout
        while device.type == "cuda" and not work.is_completed():
            if time.monotonic() > deadline:
                raise RuntimeError("Timed out")
            time.sleep(1e-4)
        work.wait()


def print_bandwidth(device: torch.device, sizes: list[float], repeat: int, timeout: float) -> None:
    """Time each collective and print the bus bandwidth: what each link carries, whatever the number of ranks.

    As NVIDIA's nccl-tests define it (PERFORMANCE.md there): size / time, times 2 (W-1)/W for all-reduce, (W-1)/W for
    all-gather (size is that of the result), 1 for broadcast. With one rank nothing travels.
    """
    size = world_size()
    if is_main():
        print(f"{'collective':<12} {'size (MB)':>10} {'time (ms)':>10} {'bus bandwidth (GB/s)':>22}")
    for megabytes in sizes:
        part = torch.zeros(max(1, int(megabytes * 1e6 / 4 / size)), device=device)
        whole = part.new_zeros(part.numel() * size)
        timed = {
            "all_reduce": (partial(dist.all_reduce, whole, async_op=True), 2 * (size - 1) / size),
            "all_gather": (partial(gather_into, whole, part, async_op=True), (size - 1) / size),
            "broadcast": (partial(dist.broadcast, whole, 0, async_op=True), 1.0 if size > 1 else 0.0),
        }
        for name, (start, share) in timed.items():
            seconds = slowest_mean(partial(run, name, start, device, timeout), repeat)
            speed = f"{whole.numel() * 4 / seconds / 1e9 * share:.2f}" if share else "-"
            if is_main():
                print(f"{name:<12} {megabytes:>10g} {seconds * 1e3:>10.2f} {speed:>22}", flush=True)
    seconds = slowest_mean(barrier, repeat)
    if is_main():
        print(f"{'barrier':<12} {'-':>10} {seconds * 1e3:>10.2f} {'-':>22}\n")


def slowest_mean(action: Callable[[], None], repeat: int) -> float:
    """Mean time of `action` in seconds on the slowest rank, without the first two runs, which set up connections."""
    for _ in range(2):
        action()
    barrier("barrier before a measurement")
    start = time.perf_counter()
    for _ in range(repeat):
        action()
    return max(gather_objects((time.perf_counter() - start) / repeat))


if __name__ == "__main__":
    distributed.run_script(lambda argv: main(get_parser().parse_args(argv)), sys.argv[1:])
