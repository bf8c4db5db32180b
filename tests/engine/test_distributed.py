"""What core.engine.distributed promises, shown by two real gloo processes on this machine's CPU."""

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks import collectives
from core.engine import distributed
from core.engine.distributed import CollectiveError
from core.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


def test_without_a_process_group_everything_means_one_process():
    x = torch.randn(3, 2, requires_grad=True)
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.gather_with_gradient(x) is x
    assert distributed.gather_with_gradient(torch.tensor(2.0)).shape == (1,)
    assert torch.equal(distributed.all_gather_variable(x), x) and not distributed.all_gather_variable(x).requires_grad
    assert torch.equal(distributed.all_reduce_mean(x), x) and torch.equal(distributed.all_reduce_sum(x), x)
    assert distributed.broadcast_object("a") == "a" and distributed.gather_objects("a") == ["a"]
    with distributed.main_first():
        distributed.barrier()
    distributed.average_gradients([torch.nn.Parameter(torch.ones(1))])
    distributed.cleanup()


def several_collectives(rank):
    warnings.simplefilter("error")  # a new name of torch's, of which it warns
    device = distributed.setup("cpu", timeout_minutes=0.5)
    network = distributed.wrap(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)), device)
    distributed.gather_with_gradient(network(torch.rand(4, 3))).sum().backward()
    distributed.average_buffers(network)
    distributed.interleave(torch.zeros(2))
    distributed.group_of(2)
    rows = {
        "lengths 1 and 3": distributed.all_gather_variable(torch.full((2 * rank + 1, 2), float(rank))),
        "rank 0 has none": distributed.all_gather_variable(torch.arange(3 * rank)),
        "nobody has any": distributed.all_gather_variable(torch.zeros(0, 4, dtype=torch.bfloat16)),
        "bool": distributed.all_gather_variable(torch.tensor([rank == 0])),
        "labels": distributed.gather_with_gradient(torch.tensor([rank, 7])),
        "scalar": distributed.gather_with_gradient(torch.tensor(float(rank))),
        "mean": distributed.all_reduce_mean(torch.tensor([rank, 4.0])),
        "sum": distributed.all_reduce_sum(torch.tensor([rank, 1 << 40])),
    }
    center = torch.nn.Parameter(torch.zeros(2))
    if rank == 1:  # rank 0 has none: it counts as zero
        center.grad = torch.tensor([2.0, 6.0])
    distributed.average_gradients([center])
    rows["centre"] = center.grad
    objects = distributed.gather_objects({"rank": rank}), distributed.broadcast_object(f"from {rank}")
    distributed.cleanup()
    # numpy: a tensor would travel through shared memory that dies with this process
    return (
        {k: (tuple(v.shape), v.double().numpy()) for k, v in rows.items()},
        objects,
        str(device),
        dist.is_initialized(),
    )


def test_collectives_give_every_rank_the_same(launch):
    results, codes, _ = launch(several_collectives)
    assert codes == [0, 0]
    for rows, objects, device, still_in_group in results:
        values = {name: value.tolist() for name, (_, value) in rows.items()}
        assert values["lengths 1 and 3"] == [[0, 0], [1, 1], [1, 1], [1, 1]]
        assert values["rank 0 has none"] == [0, 1, 2]
        assert rows["nobody has any"][0] == (0, 4)
        assert values["bool"] == [True, False]
        assert values["labels"] == [0, 7, 1, 7]
        assert values["scalar"] == [0, 1]
        assert values["mean"] == [0.5, 4]
        assert values["sum"] == [1, 2 << 40]
        assert values["centre"] == [1, 3]
        assert objects == ([{"rank": 0}, {"rank": 1}], "from 0")
        assert device == "cpu" and not still_in_group


def pair_loss(embeddings):
    """Depends on every pair of the batch, so that a gradient confined to one rank's rows would be wrong."""
    return torch.logsumexp((embeddings @ embeddings.T).flatten(), 0)


def make_network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()


def gradient_of_ddp(rank, images, own_weight):
    distributed.setup("cpu", timeout_minutes=0.5)
    network = torch.nn.parallel.DistributedDataParallel(make_network())
    embeddings = network(torch.from_numpy(images).chunk(2)[rank])
    loss = pair_loss(distributed.gather_with_gradient(embeddings)) * (rank + 1 if own_weight else 1)
    loss.backward()
    half = torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)
    distributed.gather_with_gradient(
        half
    ).square().sum().backward()  # under AMP the gradient has the type of its tensor
    result = [p.grad.numpy() for p in network.parameters()], str(half.grad.dtype), half.grad.float().mean().item()
    distributed.cleanup()
    return result


@pytest.mark.parametrize("own_weight", [False, True])
def test_gather_with_gradient_under_ddp_equals_one_process(launch, own_weight):
    """With the same loss on every rank; and with another one on each (weights 1 and 2), the gradient of their mean."""
    images = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).double()
    network = make_network()
    (pair_loss(network(images)) * (1.5 if own_weight else 1)).backward()
    results, codes, _ = launch(gradient_of_ddp, images.numpy(), own_weight)
    assert codes == [0, 0]
    for gradients, half_type, half_gradient in results:
        for parameter, gradient in zip(network.parameters(), gradients, strict=True):
            torch.testing.assert_close(torch.from_numpy(gradient), parameter.grad, rtol=1e-10, atol=1e-12)
        assert half_type == "torch.bfloat16" and half_gradient == 4  # two ranks, each 2 x


def data_made_once(rank, path):
    distributed.setup("cpu", timeout_minutes=0.5)
    with distributed.main_first():
        made = path.exists()
        if rank == 0:
            time.sleep(0.3)
            path.write_text("data")
    distributed.barrier()  # rank 0 keeps the store: it stays until rank 1 has read that it is done
    return made


def test_main_first_lets_the_others_find_what_rank_0_made(launch, tmp_path):
    assert launch(data_made_once, tmp_path / "data")[0] == [False, True]


def fail_first(rank, kind):
    distributed.setup("cpu", timeout_minutes=0.5)
    try:
        with distributed.main_first():
            if rank == 0:
                raise kind("disk is full")
            raise AssertionError("rank 1 has to stay out")
    except (InputError, OSError, CollectiveError) as error:
        distributed.gather_objects(None)  # rank 0 keeps the store: it stays until rank 1 has read it
        return type(error).__name__, str(error)


@pytest.mark.parametrize("kind, other", [(InputError, "InputError"), (OSError, "CollectiveError")])
def test_main_first_when_rank_0_fails(launch, kind, other):
    results, _, _ = launch(fail_first, kind)
    assert results[0] == (kind.__name__, "disk is full")
    assert results[1][0] == other and results[1][1].endswith("disk is full")


def rank_1_does_not_come(rank, how):
    def main(_):
        distributed.setup("cpu", timeout_minutes=1 / 60)
        distributed.all_reduce_mean(torch.ones(1))
        if rank == 1 and how == "late":
            time.sleep(2)
        elif rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        distributed.gather_objects("here")

    distributed.run_script(main, None)


@pytest.mark.parametrize("how, text", [("late", "did not finish within 1 s"), ("killed", "broke off after")])
def test_a_rank_that_does_not_come_is_named_with_the_collective(launch, how, text):
    _, codes, errors = launch(rank_1_does_not_come, how)
    assert codes[0] == 1
    assert errors[0].startswith(f"error: rank 0: gather of objects {text}")
    assert errors[0].endswith("rank 1 did not arrive (last seen at: all_reduce)\n")


def rank_1_stops_inside(rank, how):
    def main(_):
        distributed.setup("cpu", timeout_minutes=1 / 60)
        with distributed.collective("gradients"):
            if rank == 1 and how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif rank == 1:
                time.sleep(4)
            dist.all_reduce(torch.ones(1))

    distributed.run_script(main, None)


@pytest.mark.parametrize("how", ["stuck", "killed"])
def test_a_rank_that_stops_inside_a_collective_is_named(launch, how):
    _, _, errors = launch(rank_1_stops_inside, how)
    assert errors[0].startswith("error: rank 0: gradients ")
    assert errors[0].endswith(": rank 1 stopped or died in it\n")


def fail_in_script(rank, failures):
    def main(failure):
        distributed.setup("cpu", timeout_minutes=0.5)
        distributed.barrier()  # both are in the group before one ends
        if failure is not None:
            raise failure
        if None in failures:
            distributed.barrier()

    distributed.run_script(main, failures[rank])
    return "finished"


def test_run_script_in_a_group_finishes(launch):
    assert launch(fail_in_script, [None, None])[:2] == (["finished"] * 2, [0, 0])


def test_run_script_reports_bad_input_and_interruption(launch):
    _, codes, errors = launch(fail_in_script, [InputError("no folder x"), KeyboardInterrupt()])
    assert codes == [2, 130]
    assert errors == ["error: no folder x\n", ""]


def test_run_script_reports_what_fails_on_another_rank_alone(launch):
    _, codes, errors = launch(fail_in_script, [None, InputError("bad picture")])
    assert codes == [1, 2]  # rank 0 was left alone in the barrier
    assert errors[1] == "error (rank 1): bad picture\n"


def test_run_script_keeps_the_traceback_of_a_fault_and_does_not_hang(launch):
    _, codes, errors = launch(fail_in_script, [None, KeyError("a fault of ours")])
    assert codes[1] == 1
    assert "Traceback" in errors[1] and "KeyError: 'a fault of ours'" in errors[1]


@pytest.mark.parametrize(
    "failure, code, text",
    [
        (InputError("no such file"), 2, "error: no such file\n"),
        (KeyboardInterrupt(), 130, ""),
        (PermissionError(13, "Permission denied", "/root/x"), 2, "error: can't open /root/x: Permission denied; give "),
        (OSError(36, "File name too long", "y" * 300), 2, f"error: can't open {'y' * 300}: File name too long; give "),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. "), 143, "stopped by SIGTERM\n"),
    ],
)
def test_run_script_alone(capsys, failure, code, text):
    def main(args):
        raise args

    with pytest.raises(SystemExit) as end:
        distributed.run_script(main, failure)
    said = capsys.readouterr().err
    assert end.value.code == code and said.startswith(text) and said.count("\n") <= 1


@pytest.mark.parametrize(
    ("said_by_torch", "how"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ...", "killed by signal: Bus"),
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", "(killed by signal: Killed)"),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", "(exited unexpectedly)"),
        ("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback\n  File x\nRuntimeError: unable to "
         "write to file </torch_7_1_0>: No space left on device (28)", "(unable to write to file </torch_7_1_0>: No "),
        ("unable to open shared memory object </torch_7> in read-write mode: Too many open files (24)", "Too many o"),
        ("received 0 items of ancdata", "(too many open files)"),
    ],
)  # fmt: skip
def test_a_reader_of_pictures_that_dies_is_one_line_with_the_way_out(capsys, said_by_torch, how):
    def main(_):
        raise RuntimeError(said_by_torch)

    with pytest.raises(SystemExit) as end:
        distributed.run_script(main, None)
    said = capsys.readouterr().err
    assert end.value.code == 2 and how in said and "; give --workers 0" in said and said.count("\n") == 1


SMALL_SHARED_MEMORY = """
import torch
from core.data.loading import PictureDataset, batches, build_loader
from core.engine import distributed

class Pictures(PictureDataset):
    def __len__(self): return 8
    def __getitem__(self, key): return torch.zeros(3, 1000, 1000)

def main(workers):
    loader = build_loader(Pictures(), torch.stack, torch.device("cpu"), workers, batch_size=2)
    print(sum(len(batch) for batch in batches(loader)))

distributed.run_script(main, 0)
distributed.run_script(main, 2)
"""


def test_with_little_shared_memory_it_says_workers_0(tmp_path):
    (tmp_path / "script.py").write_text(SMALL_SHARED_MEMORY)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    mount = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no small /dev/shm can be mounted here")
    script = f'{mount} && exec "{sys.executable}" script.py'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "8\n"), done.stderr
    line = done.stderr.splitlines()[-1]  # torch's worker may have spoken before
    assert line.startswith("error: a process that reads pictures failed (") and "; give --workers 0" in line
    assert "Traceback" not in done.stderr


def test_sigterm_is_one_line_and_exit_code_143(capsys):
    def main(words):
        distributed.at_termination(lambda: words)
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:  # what was begun is put away, whatever else comes
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        distributed.run_script(main, " with epoch 3 saved")
    assert end.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().err == "stopped by SIGTERM with epoch 3 saved\n"


TORCHRUN = """
import os, sys, time
import torch
from core.engine import distributed
from core.errors import InputError

def main(how):
    distributed.setup("cpu")
    distributed.barrier()
    if how == "bad":
        raise InputError("no folder x: give --data")
    if how == "killed" and distributed.rank() == 1:
        os.kill(os.getpid(), 9)
    os.write(1, b"here\\n")
    while True:  # the ranks wait for each other, in C++
        distributed.barrier()
        time.sleep(0.01 + distributed.rank())

distributed.run_script(main, sys.argv[1])
"""


@pytest.mark.parametrize(("how", "code"), [("bad", 2), ("terminated", 143), ("killed", 137)])
def test_run_ddp_ends_as_its_ranks_did_without_a_report(tmp_path, how, code):
    script = tmp_path / "script.py"
    script.write_text(TORCHRUN)
    command = [sys.executable, ROOT / "core/engine/launch.py", "--standalone", "--nproc-per-node", "2", script, how]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as launcher:
        if how == "terminated":
            launcher.stdout.readline()
            time.sleep(0.5)
            launcher.terminate()
        said = launcher.communicate()[1].decode()
    assert launcher.returncode == code, said
    if how == "killed":  # rank 0 may have said that rank 1 is missing
        assert "error: rank 1 was ended by SIGKILL" in said and "Traceback" not in said
    else:
        assert said == {"bad": "error: no folder x: give --data\n", "terminated": "stopped by SIGTERM\n"}[how]


def test_run_script_alone_lets_faults_through():
    with pytest.raises(ZeroDivisionError):
        distributed.run_script(lambda args: 1 / args, 0)


def test_under_torchrun_bad_input_is_told_once_and_first(tmp_path):
    """By rank 0, and no other rank undoes before it what it may still be writing into."""
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib, time\n"
        "from core.engine import distributed\n"
        "from core.errors import InputError\n"
        "def main(args):\n"
        "    distributed.setup('cpu')\n"
        f"    undone = pathlib.Path({str(tmp_path / 'undone')!r})\n"
        "    distributed.undo_on_input_error(undone.touch)\n"
        "    time.sleep(0 if distributed.rank() else 1)\n"
        "    raise InputError('no folder x: give --data' if not undone.exists() else 'too early')\n"
        "distributed.run_script(main, None)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: no folder x: give --data\n")
    assert ended.stderr.count("no folder x") == 2 and "traceback : no folder x" in ended.stderr  # in torchrun's report


@pytest.mark.parametrize("is_read", [True, False])
def test_ranks_end_when_torchrun_is_gone(tmp_path, is_read):
    """SIGKILL ends torchrun alone; its ranks would go on in a folder that the next start takes.

    Also where nobody reads what they say any more, as after `torchrun ... 2>&1 | tee log` or a lost terminal.
    """
    script = tmp_path / "script.py"
    script.write_text(
        "import os, time\n"
        "from core.engine import distributed\n"
        "distributed.setup('cpu')\n"
        "os.write(1, b'here\\n')\n"
        "time.sleep(120)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as launcher:
        assert [launcher.stdout.readline() for _ in range(2)] == [b"here\n"] * 2
        if not is_read:
            launcher.stderr.close()
        launcher.kill()
        launcher.wait()
        said = launcher.stderr.read().decode() if is_read else ""
        assert launcher.stdout.read() == b""  # the last rank has closed it
    assert not is_read or all(f"error: rank {rank}: torchrun, which started it, is gone\n" in said for rank in range(2))


@pytest.mark.parametrize(
    "name, processes, text",
    [("tpu9", 1, "unknown device 'tpu9'"), ("xpu", 1, "unknown device"), ("mps", 2, "serves one process")],
)
def test_a_device_that_cannot_be_had(monkeypatch, name, processes, text):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(InputError, match=text):
        distributed.setup(name)


@pytest.mark.parametrize("gpus, rank, text", [(0, 0, "no CUDA device"), (2, 2, "cuda:2 .* this machine has 2")])
def test_more_processes_than_gpus(monkeypatch, gpus, rank, text):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    with pytest.raises(InputError, match=text):
        distributed.setup("cuda")


def test_device_by_default_is_what_the_machine_has(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert distributed.setup() == torch.device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert distributed.setup() == torch.device("cpu")


def check_with_a_fault(rank, fault):
    """What the check says if rank 1's gathered, summed or received values are spoilt on the way."""
    distributed.setup("cpu", timeout_minutes=0.5)

    class Spoilt:  # a finished collective whose result is damaged before anybody looks at it
        def __init__(self, work, tensor):
            self.work, self.tensor = work, tensor

        def wait(self):
            self.work.wait()
            self.tensor[-1] += 1

    if fault and rank == 1:
        original = getattr(dist, fault)
        setattr(dist, fault, lambda tensor, *rest, **options: Spoilt(original(tensor, *rest, **options), tensor))
    try:
        collectives.check_values(torch.device("cpu"))
    except CollectiveError as error:
        return str(error)
    return "right"


@pytest.mark.parametrize(
    "fault, text",
    [
        ("", "right"),
        ("all_reduce", "all_reduce gives rank 1 a wrong sum"),
        ("broadcast", "broadcast: rank 0 sends or rank 1 receives wrong values"),
    ],
)
def test_the_check_names_the_rank_with_wrong_values(launch, fault, text):
    results, codes, _ = launch(check_with_a_fault, fault)
    assert codes == [0, 0]
    assert results[0] == results[1] and results[0].startswith(text)


def test_blame_finds_sender_receiver_and_pair():
    def wrong(*pairs):
        return [[(receiver, sender) in pairs for sender in range(3)] for receiver in range(3)]

    assert collectives.blame(wrong()) == []
    assert collectives.blame(wrong((0, 1), (2, 1))) == ["rank 1 sends wrong values"]
    assert collectives.blame(wrong((2, 0), (2, 1))) == ["rank 2 receives wrong values"]
    assert collectives.blame(wrong((2, 0))) == ["rank 2 receives wrong values from rank 0"]
    assert collectives.blame([[False]]) == []
