"""Ranks, devices and collectives: the one file that knows about them.

A script calls `run_script(main, args)`; `main` calls `setup()` first and uses the functions below without asking
whether it is one process or sixty-four: without a process group each of them is what it means for one process.

Under torchrun CUDA tensors travel by NCCL, everything else (Python objects, CPU tensors, barriers) by gloo. When
a collective breaks or times out, the message names the ranks that did not come (core.engine.attendance), not a socket.

Tested with gloo on CPU. The NCCL paths are written after the documentation of torch and have not run on several GPUs.
"""

import contextlib
import errno
import functools
import inspect
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.rendezvous import rendezvous

from core.data.loading import why_reader_died
from core.engine.attendance import Attendance
from core.engine.terminal import guard_streams
from core.errors import InputError
from core.files import printable

SECONDS_OTHER_RANKS_WAIT = 3.0  # before they report a failure: torchrun stops them meanwhile if rank 0 has failed too
REFUSALS = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EROFS, errno.EIO)
FAILED_COLLECTIVE = ("gloo", "Timed out", "timed out", "Connection closed", "Connection reset", "NCCL", "Socket")


class Terminated(KeyboardInterrupt):
    """SIGTERM has come, which machines that are taken back send."""


class CollectiveError(RuntimeError):
    """A collective that did not finish: one line with this rank, the collective and the ranks that did not come."""


class _Group(NamedTuple):
    store: dist.Store  # of the launcher; rank 0's where there is no launcher
    timeout: timedelta
    attendance: Attendance


_group: _Group | None = None  # set by setup(), unset by cleanup()
_main_first_calls = 0
_last_words: Callable[[], str] = str  # set by at_termination()
_undo_on_input_error: list[Callable[[], None]] = []


def setup(device: str | None = None, timeout_minutes: float = 10) -> torch.device:
    """Choose this process's device and, under torchrun, join the process group.

    device: "cuda", "mps", "cpu" (also "cuda:1" in a run of one process); None takes the first of them that is there.
    timeout_minutes: how long a collective may wait for the slowest rank before the run ends.

    Raises InputError if the device isn't on this machine, or if there are more processes than GPUs on it.
    """
    global _group
    launched = "WORLD_SIZE" in os.environ  # torchrun with one process, too: what runs there is what runs on many
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_end_with_launcher, args=(os.getppid(),), daemon=True).start()
    chosen = _choose_device(device, processes=int(os.environ["WORLD_SIZE"]) if launched else 1)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    # gloo doesn't carry MPS tensors: torchrun with one process on a Mac is one process.
    if launched and chosen.type != "mps" and not dist.is_initialized():
        timeout = timedelta(minutes=timeout_minutes)
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" and dist.is_nccl_available() else "gloo"
        # If NCCL hangs, its watchdog names rank and operation and ends the process: no CPU thread waits for the GPU.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
        try:
            store, this_rank, size = next(rendezvous("env://", timeout=timeout))
            store = dist.PrefixStore(_attempt(), store)
            dist.init_process_group(backend, store=store, rank=this_rank, world_size=size, timeout=timeout)
        except RuntimeError as error:  # gloo's and the store's errors have no narrower class in common
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            line = str(error).splitlines()[0]
            raise CollectiveError(f"rank {rank()}: could not join the others at {where}: {line}") from error
        store = dist.PrefixStore("carousel", store)
        _group = _Group(store, timeout, Attendance(store, this_rank, size))
        sys.excepthook = functools.partial(_end_after_fault, sys.excepthook)  # torch's, which marks lines with the rank
    return chosen


def _end_with_launcher(launcher: int) -> None:
    """Watches torchrun: killed by SIGKILL it leaves its ranks running, and if started again it would meet them."""
    while os.getppid() == launcher:
        time.sleep(1)
    try:
        _say_line(f"error: rank {rank()}: torchrun, which started it, is gone")
    finally:  # whoever read the lines may be gone, too
        os._exit(1)


def _attempt() -> str:
    """Where in the launcher's store this attempt keeps its keys.

    The trap: torchrun keeps its store when it starts the processes again, so that they read addresses of dead ones and
    wait for them. On one machine the number of restarts tells attempts apart. On several machines each launcher has a
    count of its own, so run_ddp.sh tells torchrun to use a fresh store instead.
    """
    one_machine = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') if one_machine else 0}"


def _choose_device(name: str | None, processes: int) -> torch.device:
    if name is None:
        if torch.cuda.is_available():
            name = "cuda"
        else:
            # gloo doesn't carry MPS tensors, so several processes on a Mac share its CPU.
            name = "mps" if torch.backends.mps.is_available() and processes == 1 else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cuda", "mps", "cpu"):
        raise InputError(f"unknown device {name!r}: give cuda, mps or cpu")
    if device.type == "mps" and processes > 1:
        raise InputError("device mps serves one process: start the script without torchrun, or give cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("there is no MPS device on this machine: give cpu")
    if device.type == "cuda":
        gpus = torch.cuda.device_count()
        if gpus == 0:
            raise InputError("there is no CUDA device that this installation of torch can use: give cpu")
        index = int(os.environ.get("LOCAL_RANK", 0)) if processes > 1 or device.index is None else device.index
        if index >= gpus:
            raise InputError(f"device cuda:{index} is asked for and this machine has {gpus}: start fewer processes")
        device = torch.device("cuda", index)
    return device


def cleanup() -> None:
    """Leave the process group. For the normal end of a run; after a failure it could wait forever (see run_script)."""
    global _group
    if dist.is_initialized():
        dist.destroy_process_group()
    _group = None


def run_script(main: Callable[[Any], None], args: Any) -> None:
    """Run `main(args)` and end the process as a person expects.

    InputError: one line, `error: ...`, exit code 2; so are a file that the system refuses and processes that read
    pictures and died. CollectiveError: one line, exit code 1. SIGTERM: one line (`at_termination`), exit code 143.
    KeyboardInterrupt: nothing, exit code 130. Every other exception is a fault of ours: traceback, exit code 1.

    In a run of several processes rank 0 speaks at once; the others wait a few seconds, in which torchrun, having seen
    rank 0 exit, stops them. So what fails on every rank is reported once, and what fails on rank 3 alone still is, as
    `error (rank 3): ...`. The line goes into torchrun's error file, too, so that its report has it.
    """
    _undo_on_input_error.clear()
    at_termination(str)
    guard_streams()
    terminate = signal.signal(signal.SIGTERM, _terminate)
    try:
        main(args)
    except (KeyboardInterrupt, InputError, OSError, RuntimeError) as error:
        if (code := _report(error)) is None:
            raise
        _exit_after_failure(code)
    finally:
        sys.stdout.flush()
        signal.signal(signal.SIGTERM, terminate)
    cleanup()


def _report(error: BaseException) -> int | None:
    """Say it in this rank's turn; returns the exit code, None for a fault of ours, of which nothing is said."""
    reader_terminated = "killed by signal: Terminated" in str(error)  # it had the signal first
    if isinstance(error, Terminated) or reader_terminated:
        if is_main():
            _say_line(f"stopped by SIGTERM{_last_words()}")
        return 143
    if isinstance(error, KeyboardInterrupt):
        return 130
    line = str(error) if isinstance(error, CollectiveError) else _bad_input(error)
    if line is None:
        return None
    _wait_for_main()  # which may still be writing into what is undone
    for undo in reversed(_undo_on_input_error if not isinstance(error, CollectiveError) else ()):
        undo()
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"timestamp": str(int(time.time())), "py_callstack": line}  # what the report shows
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": line, "extraInfo": extra}}, file)
    who = "error" if is_main() or isinstance(error, CollectiveError) else f"error (rank {rank()})"
    _say_line(f"{who}: {line}")
    return 1 if isinstance(error, CollectiveError) else 2


def _bad_input(error: Exception) -> str | None:
    """One line about an error that a person, not a programmer, has to answer; None for others."""
    if isinstance(error, InputError):
        return printable(error)
    if isinstance(error, OSError) and error.filename is not None and error.errno in REFUSALS:
        return printable(f"can't open {error.filename}: {error.strerror}; give a path that can be read and written")
    if lost := why_reader_died(error):
        return f"{lost}; give --workers 0, which needs none, fewer --workers, or more of it (docker run --shm-size)"
    return None


def _terminate(*_: Any) -> NoReturn:
    """Handler of SIGTERM. Groups of processes get it twice, from their launcher too: the second one changes nothing."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


def at_termination(words: Callable[[], str]) -> None:
    """What a process stopped by SIGTERM says behind "stopped by SIGTERM"."""
    global _last_words
    _last_words = words


def undo_on_input_error(undo: Callable[[], None]) -> None:
    """Have `run_script` call this where an InputError ends the run, on the rank that raises it."""
    _undo_on_input_error.append(undo)


def _end_after_fault(report: Callable, kind: type, error: BaseException, trace: TracebackType | None) -> NoReturn:
    """sys.excepthook of a process in a group: the usual traceback, in this rank's turn and with no hang at the end."""
    _wait_for_main()
    report(kind, error, trace)
    _exit_after_failure(1)


def _say_line(line: str) -> None:
    """One write, text and line break: print's two would mix with those of other ranks where nothing is buffered."""
    sys.stderr.write(f"{line}\n")


def _wait_for_main() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which torchrun stops those that wait
    if not is_main():
        time.sleep(SECONDS_OTHER_RANKS_WAIT)


def _exit_after_failure(code: int) -> NoReturn:
    """End this process now.

    A process group can't be left in good order while the other ranks sit in a collective: destroying it, which NCCL
    also does when the interpreter unloads, waits for them and may never return. So with a group, Python's own shutdown
    is skipped once everything that was logged or printed is flushed; the workers of a DataLoader see that their parent
    is gone and end by themselves.
    """
    if not dist.is_initialized():
        sys.exit(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def rank() -> int:
    """Number of this process among all; before setup() what torchrun says, so that early errors are told once, too."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_restarted() -> bool:
    """Whether a launcher starts this command again where it fails: the first start and the others are alike then."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


def is_main() -> bool:
    """Whether this process writes the files and speaks for all."""
    return rank() == 0


@contextlib.contextmanager
def collective(name: str) -> Iterator[None]:
    """Name what happens inside, so that a rank that doesn't come is named when it breaks or times out.

    Raises CollectiveError instead of torch's message about a socket. Also for collectives that are not ours:
    `with collective("gradients"): loss.backward()`. Every rank has to enter it in the same order. Under NCCL the call
    returns before the collective has run: there torch's watchdog ends the process, with rank and operation in its log.
    """
    if _group is None:
        yield
        return
    start = time.monotonic()
    try:
        _group.attendance.start(name)
        yield
    except RuntimeError as error:
        known = isinstance(error, dist.DistError) or any(sign in str(error) for sign in FAILED_COLLECTIVE)
        if isinstance(error, CollectiveError) or not known:
            raise
        seconds, limit = time.monotonic() - start, _group.timeout.total_seconds()
        how = f"did not finish within {limit:g} s" if seconds >= limit else f"broke off after {seconds:.1f} s"
        raise CollectiveError(f"rank {rank()}: {name} {how}: {_group.attendance.who_is_missing()}") from error


def barrier(name: str = "barrier") -> None:
    """Wait until every rank is here (on the CPU: work queued on a GPU is not waited for)."""
    if dist.is_initialized():
        with collective(name):
            dist.all_reduce(torch.zeros(1))


@contextlib.contextmanager
def main_first(timeout_minutes: float = 60) -> Iterator[None]:
    """Rank 0 does what is inside first, the others after it: to download a file or to make data once.

    If rank 0 fails, the others don't wait for it but raise, InputError if that is what rank 0 raised. The wait has its
    own limit, since a download may take longer than any collective should.
    """
    global _main_first_calls
    if _group is None or world_size() == 1:
        yield
        return
    _main_first_calls += 1
    key = f"main_first/{_main_first_calls}"
    if is_main():
        try:
            yield
        except BaseException as error:  # nothing is caught for good: the others are told, then it goes on its way
            kind = "input" if isinstance(error, InputError) else "failed"
            _group.store.set(key, f"{kind} {printable(error) or type(error).__name__}")
            raise
        _group.store.set(key, "done ")
        return
    try:
        _group.store.wait([key], timedelta(minutes=timeout_minutes))
        outcome, message = _group.store.get(key).decode().split(" ", 1)
    except dist.DistError as error:
        line = str(error).splitlines()[0]
        raise CollectiveError(f"rank {rank()}: gave up after waiting for what rank 0 does first: {line}") from error
    if outcome == "input":
        raise InputError(message)
    if outcome == "failed":
        raise CollectiveError(f"rank {rank()}: rank 0 failed at what it does first: {message}")
    yield


def broadcast_object(value: Any) -> Any:
    """Rank 0's value (anything that pickles), on every rank. What the other ranks pass is ignored."""
    if not dist.is_initialized():
        return value
    box = [value]
    with collective("broadcast of an object"):
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value (anything that pickles) in the order of ranks, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    with collective("gather of objects"):
        dist.all_gather_object(values, value)
    return values


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks of a tensor of the same shape everywhere; a new tensor, no gradient."""
    total = tensor.detach().clone()
    if dist.is_initialized():
        with collective("all_reduce"):
            dist.all_reduce(total)
    return total


def all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """Mean over ranks of a float tensor of the same shape everywhere; a new tensor, no gradient."""
    return all_reduce_sum(tensor) / world_size()


def all_gather_variable(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenate the ranks' tensors along dim 0, whose length may differ: (N_r, ...) -> (sum of N_r, ...).

    The trap: no gradient passes, and every rank holds the whole result. For losses there is gather_with_gradient. All
    other dimensions and the type must be the same on every rank; a rank without rows passes (0, ...).
    """
    tensor = tensor.detach()
    if not dist.is_initialized():
        return tensor
    lengths = _all_gather(torch.tensor([len(tensor)], device=tensor.device)).tolist()
    longest = max(lengths)
    padded = tensor.new_zeros(longest, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    gathered = _all_gather(padded)  # (W * longest, ...)
    return torch.cat([part[:length] for part, length in zip(gathered.split(longest or 1), lengths, strict=False)])


def gather_into(output: torch.Tensor, tensor: torch.Tensor, **how: Any) -> Any:
    """torch's all-gather into one tensor, which has a new name since 2.14 and warns under the old one."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(output, tensor, **how)


def _all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """(N, ...) of the same shape on every rank -> (W * N, ...)."""
    gathered = tensor.new_empty(world_size() * tensor.shape[0], *tensor.shape[1:])
    if gathered.numel():
        with collective("all_gather"):
            gather_into(gathered, tensor.contiguous())
    return gathered


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):  # (N, ...) -> (W * N, ...)
        return _all_gather(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):  # (W * N, ...) -> (N, ...)
        total = gradient.clone(memory_format=torch.contiguous_format)
        with collective("all_reduce of the gathered gradient"):
            dist.all_reduce(total)
        return total.chunk(world_size())[rank()]


def gather_with_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenate the ranks' tensors along dim 0, with gradient: (N, ...) -> (W * N, ...); () -> (W,).

    For losses over the global batch under DDP. Let z_r(w) be what rank r passes, z all of them, L_s(z) the loss that
    rank s computes. DDP gives the weights w the mean over ranks of the gradients computed there: 1/W sum_r J_r^T b_r,
    where J_r = dz_r/dw and b_r is what this function's backward returns on rank r. With b_r = sum_s dL_s/dz_r (an
    all-reduce of the gradient, and its own slice) that is sum_r J_r^T d(1/W sum_s L_s)/dz_r: the gradient of the mean
    of the ranks' losses. If every rank computes the same L over the whole batch, it is exactly that of one process.

    The traps: tensors must have the same shape on every rank, and every rank must call backward through it, since that
    is a collective as well. Integers (labels) pass without gradient. Without a process group: the tensor itself.
    """
    tensor = torch.atleast_1d(tensor)
    if not dist.is_initialized():
        return tensor
    return _GatherWithGradient.apply(tensor) if tensor.requires_grad else _all_gather(tensor)


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its mean over ranks: for parameters outside DDP, such as the centres of a loss.

    A missing gradient counts as zero, because a rank that left a parameter out would leave the others waiting.
    """
    if not dist.is_initialized():
        return
    for parameter in parameters:
        if parameter.requires_grad:
            gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            parameter.grad = all_reduce_mean(gradient)


def average_buffers(module: torch.nn.Module) -> None:
    """Replace each float buffer (BatchNorm's statistics) by its mean over ranks, so that all evaluate one network.

    Counters (integers) are the same everywhere already.
    """
    if world_size() == 1:
        return
    buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    if buffers:
        means = all_reduce_mean(torch.cat([buffer.flatten() for buffer in buffers]))
        for buffer, mean in zip(buffers, means.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(mean.view_as(buffer))


def interleave(rows: torch.Tensor) -> torch.Tensor:
    """All N rows in order, out of the ranks' shares: rank r holds rows r, r + W, r + 2W, ... of them."""
    gathered = all_gather_variable(rows)  # (N, ...), one rank after the other
    order = (torch.arange(len(gathered)) % world_size()).argsort(stable=True)
    return torch.empty_like(gathered).index_copy_(0, order.to(rows.device), gathered)


def on_main(function: Callable[[], Any]) -> Any:
    """What `function` returns on rank 0, on every rank; the others wait. If it raises, every rank does."""
    result = None
    with main_first():
        if is_main():
            result = function()
    return broadcast_object(result)


def group_of(size: int) -> dist.ProcessGroup:
    """The process group of this rank and its neighbours, `size` in a row. Every rank has to call it."""
    return dist.new_subgroups(size)[0]


def wrap(network: torch.nn.Module, device: torch.device, compiled: bool = False) -> torch.nn.Module:
    """The network as training calls it: under DDP where there is a process group, compiled if asked for.

    DDP listens to the parameters that want a gradient now: wrap anew after freezing or unfreezing. Buffers are not
    exchanged in each step: every rank's BatchNorm follows its own batches until `average_buffers` joins them.
    """
    if dist.is_initialized():
        ddp = torch.nn.parallel.DistributedDataParallel
        # broadcast_buffers is called forward_sync_buffers in newer versions of torch.
        renamed = "forward_sync_buffers" in inspect.signature(ddp).parameters
        buffers = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
        with collective("joining DDP"):
            network = ddp(network, device_ids=[device.index] if device.type == "cuda" else None, **buffers)
    return torch.compile(network) if compiled else network
