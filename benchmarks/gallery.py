"""A gallery built, searched and changed at its full size, beside brute force in numpy.

    python -m benchmarks.gallery                                  # 100,000 entries of 512 dimensions: seconds
    python -m benchmarks.gallery --entries 1000000 --dim 2048     # 4 GB on the disk, which is written once
    python -m benchmarks.gallery --entries 1000000 --dim 2048 --kill 10   # 4 GB more at each kill; minutes

Entries are made on the fly, a chunk at a time, from a few thousand identities. Build and searches run in a process of
their own each; peak memory is what the call adds. Brute force reads the same float16 vectors in chunks, multiplies in
float32 and keeps the nearest; its results are compared with ours. With --kill a process that adds entries is killed
(SIGKILL) at random moments, and the gallery is opened after each: it has to hold what it held before, or that and all
that was added.
"""

import argparse
import multiprocessing
import os
import random
import re
import signal
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import torch

from benchmarks.fresh_process import measure, print_table
from recognition.gallery import Entries, add_to_gallery, build_gallery, open_gallery

CHUNK = 4096
FINGERPRINT = "0" * 64


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=100_000, help="entries of the gallery (default: 100000)")
    parser.add_argument("--dim", type=int, default=512, help="feature size (default: 512)")
    parser.add_argument("--queries", type=int, default=100, help="queries (default: 100)")
    parser.add_argument("--matches", type=int, default=10, help="nearest entries of each (default: 10)")
    parser.add_argument("--device", default="cpu", help="where our search computes (default: cpu)")
    parser.add_argument(
        "--folder", default=None, help="where the file is made (default: the system's temporary folder)"
    )
    parser.add_argument("--kill", type=int, default=0, help="times that an addition is killed (default: 0)")
    return parser


def entries(count, dim, name="picture", seed=0):
    """Yield `count` entries in chunks: identities of about 50 entries each, around a centre."""
    identities = max(1, count // 50)
    for start in range(0, count, CHUNK):
        numbers = range(start, min(count, start + CHUNK))
        generator = torch.Generator().manual_seed(seed + start)
        vectors = torch.randn(len(numbers), dim, generator=generator)
        vectors[:, : dim // 4] += 2 * torch.randn(dim // 4, generator=generator)  # neighbours of one chunk are nearer
        bags = [f"bag-{number % identities:06d}" for number in numbers]
        yield Entries(vectors, bags, [f"{name}/{number:08d}.jpg" for number in numbers], [b"jpeg" * 8] * len(numbers))


def make_queries(path, num_queries, dim, matches, device):
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(num_queries, dim, generator=generator)
    with open_gallery(path) as gallery:
        for i in range(0, num_queries, 2):  # every second one lies near an entry
            row = i * len(gallery) // num_queries
            vector = torch.from_numpy(gallery.vectors(row, row + 1)[0].astype(np.float32))
            queries[i] = vector * dim**0.5 + 0.5 * queries[i]
    return path, queries, matches, device


def build(path, count, dim):
    return build_gallery(path, entries(count, dim), fingerprint=FINGERPRINT)


def generate(path, count, dim):
    return sum(len(chunk.vectors) for chunk in entries(count, dim))


def search(path, queries, matches, device):
    with open_gallery(path) as gallery:
        distances, rows = gallery.search(queries, matches, device)
    return distances.tolist(), rows.tolist()


def identify(path, queries, matches, device):
    with open_gallery(path) as gallery:
        return gallery.identify(queries, matches, device)[2].tolist()


def brute_force(path, queries, matches, device):
    """1 - cos in float32, a chunk of the file at a time, numpy alone."""
    queries = queries.numpy()
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    distances, rows = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    with open_gallery(path) as gallery:
        for start in range(0, len(gallery), CHUNK):
            vectors = gallery.vectors(start, min(len(gallery), start + CHUNK)).astype(np.float32)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            chunk = 1 - queries @ vectors.T  # (Q, n)
            columns = np.argpartition(chunk, min(matches, chunk.shape[1]) - 1, axis=1)[:, :matches]
            distances = np.concatenate([distances, np.take_along_axis(chunk, columns, 1)], 1)
            rows = np.concatenate([rows, columns + start], 1)
            order = np.argsort(distances, axis=1, kind="stable")[:, :matches]
            distances, rows = np.take_along_axis(distances, order, 1), np.take_along_axis(rows, order, 1)
    return distances.tolist(), rows.tolist()


def report_difference(ours, theirs):
    distances, rows = (np.array(part) for part in zip(ours, theirs, strict=True))
    differ = (rows[0] != rows[1]).any(1)
    print(f"largest difference of distances {np.abs(distances[0] - distances[1]).max():.2g}; ", end="")
    print(f"{differ.sum()} of {len(differ)} queries have other rows (float32 ties of the brute force, if any)")


def add(path, count, dim, name, started):
    """What is killed: `started` is set when the work begins."""
    started.set()
    add_to_gallery(path, entries(count, dim, name, seed=10**9), fingerprint=FINGERPRINT)


def run_addition(context, path, count, dim, name, kill_after):
    """Add in a process of its own, which is killed after `kill_after` seconds (None: never); the seconds it ran."""
    started = context.Event()
    process = context.Process(target=add, args=(str(path), count, dim, name, started))
    process.start()
    if not started.wait(120):
        raise RuntimeError("the process that adds entries did not start within two minutes")
    start = time.perf_counter()
    process.join(kill_after)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    elif process.exitcode != 0:
        raise RuntimeError(f"adding ended with exit code {process.exitcode}; its report is above")
    return time.perf_counter() - start


def checksum(path, count):
    """CRC-32 of all that a gallery holds in its first `count` entries, and how many there are."""
    crc = 0
    with open_gallery(path) as gallery:
        for rows in gallery.rows(np.arange(len(gallery)) < count):
            text = repr((rows.identities, rows.sources, rows.thumbnails)).encode()
            crc = zlib.crc32(text, zlib.crc32(rows.norms.tobytes(), zlib.crc32(rows.vectors.tobytes(), crc)))
        return crc, len(gallery)


def kill_while_adding(path, count, dim, times, seed=0):
    """Add `count` entries `times` times and kill each at a random moment of the time that an undisturbed one takes.

    Returns:
        seconds of the undisturbed addition, and for each kill (second, "old" or "new", bytes left over beside it).

    Raises:
        RuntimeError: the gallery is neither what it was nor that with all that was added.
    """
    context = multiprocessing.get_context("forkserver")  # a child starts at once, in a process that ran nothing yet
    context.set_forkserver_preload(["recognition.gallery"])
    path, moments, results = Path(path), random.Random(seed), []
    whole = run_addition(context, path, count, dim, "added", None)
    for number in range(times):
        size = checksum(path, 0)[1]
        before = checksum(path, size)
        second = moments.uniform(0, whole)
        run_addition(context, path, count, dim, f"added-{number}", second)
        after = checksum(path, size)
        if after not in (before, (before[0], size + count)):
            raise RuntimeError(f"killed after {second:.3f} s: the gallery held {before} and holds {after}")
        left = [file for file in path.parent.iterdir() if re.fullmatch(rf"\.{re.escape(path.name)}\..*tmp", file.name)]
        results.append((second, "old" if after == before else "new", sum(file.stat().st_size for file in left)))
    run_addition(context, path, count, dim, "last", None)  # the next writer is let in, and removes what was left
    return whole, results


def main(args):
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = str(Path(folder) / "bags.gallery")
        print(f"{args.entries} entries, {args.dim} dimensions, float16; {args.queries} queries, {args.matches} matches")
        size = (path, args.entries, args.dim)
        measurements = [
            ("build", measure(tuple_of, build, size)),
            ("  of that the entries", measure(tuple_of, generate, size)),
        ]
        inputs = (path, args.queries, args.dim, args.matches, args.device)
        reference = measure(make_queries, brute_force, inputs)
        ours = measure(make_queries, search, inputs)
        measurements += [("search", ours), ("identify", measure(make_queries, identify, inputs)), ("numpy", reference)]
        print_table(measurements, "numpy")
        print(f"file {os.path.getsize(path) / 2**30:.2f} GiB; ", end="")
        report_difference(ours.value, reference.value)
        if args.kill:
            whole, results = kill_while_adding(path, max(1, args.entries // 10), args.dim, args.kill)
            print(f"adding {max(1, args.entries // 10)} entries takes {whole:.2f} s; killed {args.kill} times:")
            for second, state, left in results:
                print(f"  after {second:7.2f} s: the {state} gallery, whole; {left / 2**20:.1f} MiB left beside it")
            left = sorted(file.name for file in Path(folder).iterdir())
            print(f"after one more addition the folder holds {', '.join(left)}")


def tuple_of(*arguments):
    return arguments


if __name__ == "__main__":
    main(get_parser().parse_args())
