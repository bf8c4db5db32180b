"""Two real gloo processes on this machine's CPU. They are forked from a server that has torch imported, to be quick."""

import multiprocessing
import os
import socket

import pytest
import torch

from core.engine import distributed


def enter(function, rank, world_size, port, folder, connection, arguments):
    """Body of a forked process: the environment that torchrun would give it, then `function(rank, *arguments)`."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.dup2(os.open(folder / f"stderr{rank}", os.O_WRONLY | os.O_CREAT), 2)
    torch.set_num_threads(1)
    distributed.SECONDS_OTHER_RANKS_WAIT = 0.3
    connection.send(function(rank, *arguments))


@pytest.fixture
def launch(tmp_path):
    """Function: (function, *arguments) -> what it returns on two ranks (None: nothing), exit codes, standard errors."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.collectives", "core.engine.reid"])
    processes = []

    def start(function, *arguments, world_size=2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        for rank, (_, sender) in enumerate(pipes):
            job = (function, rank, world_size, port, tmp_path, sender, arguments)
            processes.append(context.Process(target=enter, args=job))
            processes[-1].start()
            sender.close()
        results = []
        for process, (receiver, _) in zip(processes, pipes, strict=True):
            try:
                results.append(receiver.recv() if receiver.poll(300) else None)
            except EOFError:  # it ended without a result
                results.append(None)
            process.join(30)
        errors = [(tmp_path / f"stderr{rank}").read_text() for rank in range(world_size)]
        return results, [process.exitcode for process in processes], errors

    yield start
    for process in processes:
        process.kill()
