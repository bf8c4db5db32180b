"""Training without labels beside direct transfer and training with labels, over methods, tasks and seeds.

    python -m benchmarks.unsupervised                    # hours on two cores: 3 tasks, 5 methods, 2 seeds
    python -m benchmarks.unsupervised --tasks coil100 --methods spcl --seeds 0 -- --epochs 2

Tasks: coil100 without labels (USL); coil100 -> coil20 and, of the synthetic bags, before -> after security (UDA), each
domain searched within itself. USL starts from a published OSNet x0.25 of persons, UDA from that network trained on the
source, which is the direct transfer; uda_tp has no source in its batches. The ceiling is train_reid.py on the labels of
the target. Everything is a plain line of a script; each run has one thread, and as many run side by side as there are
cores.
"""

import argparse
import os
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.runs import ROOT, log_rows, run_script
from core.data.reid_datasets import load_reid_dataset

METHODS = ("strong_baseline", "uda_tp", "mmt", "spcl", "cluster_contrast")
TASKS = {"coil100": ("coil100",), "coil": ("coil100", "coil20"), "security": ("before", "after")}  # target is last
NETWORK = ["--recipe", "quick", "--backbone", "osnet_x0_25", "--height", "128", "--width", "128", "--pad", "8"]
NETWORK += ["--epochs", "8", "--iterations-per-epoch", "25", "--eval-every", "4", "--workers", "0", "--device", "cpu"]
LABELS = {"coil100": ["--k1", "20"], "coil": ["--k1", "20"]}
LABELS["security"] = ["--k1", "8", "--k2", "3", "--min-samples", "2"]


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS), help="default: all")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS, help="default: all")
    parser.add_argument("--seeds", type=int, nargs="*", default=range(2), help="default: 0 and 1")
    parser.add_argument("--shared", default=ROOT.parent / "shared", help="folder with data/ and weights/ of the issue")
    parser.add_argument("--bags", default=ROOT / "data" / "synthetic", help="the synthetic set of train_reid.py")
    parser.add_argument("--parallel", type=int, default=os.cpu_count(), help="runs at a time (default: all cores)")
    parser.add_argument("--output", help="keep the runs there")
    parser.add_argument("options", nargs="*", help="after --: more options for every run")
    return parser


def sets(args, folder):
    """name -> NAME:PATH of the sets that the tasks name; the bags are parted by the side of security."""
    data = Path(args.shared).absolute() / "data"
    found = {name: f"market1501:{data / f'{name}_reid'}" for name in ("coil100", "coil20")}
    if "security" in args.tasks:
        bags = load_reid_dataset("synthetic", args.bags)
        for side, name in enumerate(("before", "after")):
            for part, samples in (("train", bags.train), ("test", bags.query + bags.gallery)):
                for sample in samples:
                    if sample.camera % 2 == side:
                        link = folder / name / part / sample.name / Path(sample.path).name
                        link.parent.mkdir(parents=True, exist_ok=True)
                        link.symlink_to(Path(sample.path).absolute())
            found[name] = f"folder:{folder / name}"
    return found


def supervised(name, place, seed, folder, args):
    """train_reid.py on one set; returns the folder of the run."""
    dataset, _, root = place.partition(":")
    weights = ["--weights", Path(args.shared).absolute() / "weights" / "osnet_x0_25_market1501.pth"]
    line = ["train_reid.py", *NETWORK, *weights, "--dataset", dataset, "--data", root, "--seed", seed, *args.options]
    run_script(*line, "--output", folder, "--name", name, OMP_NUM_THREADS="1")
    return folder / name


def unsupervised(task, method, seed, places, folder, args):
    """A run of train_unsupervised.py; returns its folder."""
    *source, target = TASKS[task]
    weights = Path(args.shared).absolute() / "weights" / "osnet_x0_25_market1501.pth"
    line = ["train_unsupervised.py", "--method", method, "--target", places[target], *NETWORK, *LABELS[task]]
    if source:
        weights = folder / f"source-{task}-{seed}" / "last.pth"
        line += ["--source", places[source[0]]] if method != "uda_tp" else []
    line += ["--weights", weights, "--seed", seed, *args.options]
    run_script(*line, "--output", folder, "--name", f"{task}-{method}-{seed}", OMP_NUM_THREADS="1")
    return folder / f"{task}-{method}-{seed}"


def report(task, way, seed, run):
    """One line, and the numbers of the last epoch, in per cent; of the first one, too, which is direct transfer."""
    first, *_, last = log_rows(run)
    numbers = {key: 100 * float(last[key]) for key in ("mAP", "rank1", "NMI") if last.get(key)}
    minutes = (run / "train.log").read_text().rpartition("done in ")[2].split(" minutes")[0]
    numbers |= {"direct": 100 * float(first["mAP"]), "minutes": float(minutes)}
    print(f"{task} {way} {seed}: {', '.join(f'{key} {value:.1f}' for key, value in numbers.items())}", flush=True)
    return {"task": task, "way": way, **numbers}


def table(rows):
    lines = ["| task | way | mAP before | mAP | Rank-1 | NMI | minutes |", "|" + " --- |" * 7]
    for task, way in dict.fromkeys((row["task"], row["way"]) for row in rows):
        cells = []
        for key in ("direct", "mAP", "rank1", "NMI", "minutes"):
            values = [row[key] for row in rows if (row["task"], row["way"]) == (task, way) and key in row]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "")
        lines.append(f"| {task} | {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(args):
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(args.parallel) as pool:
        folder = Path(args.output or temporary).absolute()
        places = sets(args, folder)
        jobs = [(task, seed) for task in args.tasks for seed in args.seeds]
        from_source = [(task, seed) for task, seed in jobs if len(TASKS[task]) > 1]

        def pretrain(job):
            supervised(f"source-{job[0]}-{job[1]}", places[TASKS[job[0]][0]], job[1], folder, args)

        def train(job):
            task, seed, way = job
            if way == "labels":
                run = supervised(f"{task}-labels-{seed}", places[TASKS[task][-1]], seed, folder, args)
            else:
                run = unsupervised(task, way, seed, places, folder, args)
            return report(task, way, seed, run)

        list(pool.map(pretrain, from_source))

        ways = [(task, seed, way) for way in (*args.methods, "labels") for task, seed in jobs]
        rows = list(pool.map(train, ways))
    print(table(rows))


if __name__ == "__main__":
    main(get_parser().parse_args())
