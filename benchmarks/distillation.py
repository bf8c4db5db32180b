"""Does distillation help? A student alone, self-distilled, and taught by each kind of lesson, over seeds.

    W=../shared/weights/osnet_x0_25_market1501.pth
    python -m benchmarks.distillation --teacher-options "--backbone osnet_x0_25 --weights $W --height 128 --width 128" \
        -- --dataset market1501 --data ../shared/data/coil100_reid
    python -m benchmarks.distillation --teacher-options "--backbone resnet18 --height 96 --width 96 --epochs 30"

Student: ResNet-18 from scratch, 64 x 64 pixels, 8 epochs of 20 batches. First the teacher is trained (or it is named by
--teacher), then every other run is a plain `train_reid.py` or `train_kd.py` line with one thread; as many run side by
side as there are cores. The weights of the terms make their gradients about as large as that of cross entropy and
triplets after the first steps. "gap": part of the way from the student alone to its teacher, in mAP.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.runs import last_row, run_script

RECIPE = ["--recipe", "quick", "--weights", "none", "--eval-every", "100", "--workers", "0", "--device", "cpu"]
TAUGHT = {
    "logits": "1*logits",
    "features": "5*features",
    "hints": "5*features",
    "attention": "5*attention",
    "relational": "25*relational",
    "similarity": "200*similarity",
    "retrieval": "1*retrieval",
    "logits+retrieval": "1*logits+1*retrieval",
}
KINDS = {
    "alone": [],
    "self-2": ["--kd", "5*self", "--teacher-stage", "2"],
    "self-3": ["--kd", "5*self", "--teacher-stage", "3"],
    "self-4": ["--kd", "5*self", "--teacher-stage", "4"],
    "mutual": ["--teacher", "mutual", "--kd", "1*logits", "--temperature", "1"],
    "mutual-retrieval": ["--teacher", "mutual", "--kd", "1*retrieval"],
    "ema": ["--teacher", "ema", "--kd", "1*retrieval", "--ema", "0.95"],
    **{kind: ["--kd", spec] for kind, spec in TAUGHT.items()},
}
KINDS["hints"] += ["--hint-stages", "3"]


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS), help="default: all")
    parser.add_argument("--seeds", type=int, nargs="*", default=range(3), help="default: 0 to 2")
    parser.add_argument("--teacher", help="its run folder, of this benchmark before; without it one is trained")
    parser.add_argument("--teacher-options", default="--backbone resnet18", help="of its train_reid.py, in one string")
    parser.add_argument("--parallel", type=int, default=os.cpu_count(), help="runs at a time (default: all cores)")
    parser.add_argument("--output", help="keep the runs, and results.json, there")
    parser.add_argument("options", nargs="*", help="after --: more options for every run")
    return parser


def command_of(kind, seed, teacher, args, folder):
    """The script of a run and its options, list of str."""
    options = KINDS[kind] + (["--teacher", str(teacher / "last.pth")] if kind in TAUGHT else [])
    script = "train_kd.py" if options else "train_reid.py"
    where = ["--seed", str(seed), "--output", str(folder), "--name", f"{kind}-{seed}"]
    return [script, *RECIPE, "--backbone", "resnet18", *options, *args.options, *where]


def scores(run):
    """mAP and Rank-1 of the last epoch, in per cent."""
    last = last_row(run)
    return {metric: 100 * float(last[metric]) for metric in ("mAP", "rank1")}


def train(kind, seed, teacher, args, folder):
    run_script(*command_of(kind, seed, teacher, args, folder), OMP_NUM_THREADS="1")
    for checkpoint in (folder / f"{kind}-{seed}").glob("*.pth"):
        checkpoint.unlink()
    result = {"kind": kind, "seed": seed, **scores(folder / f"{kind}-{seed}")}
    print(f"{kind}, seed {seed}: mAP {result['mAP']:.1f}, Rank-1 {result['rank1']:.1f}", flush=True)
    return result


def table(results, teacher):
    """Mean and standard deviation over the seeds, a line for each kind; teacher: its scores."""
    values = {kind: [] for kind in dict.fromkeys(one["kind"] for one in results)}
    for one in results:
        values[one["kind"]].append((one["mAP"], one["rank1"]))
    means = {kind: statistics.mean(mean_ap for mean_ap, _ in found) for kind, found in values.items()}
    lines = ["| student | mAP | Rank-1 | gap |", "| --- | --- | --- | --- |"]
    lines.append(f"| (the teacher) | {teacher['mAP']:.1f} | {teacher['rank1']:.1f} | |")
    for kind, found in values.items():
        cells = []
        for column in zip(*found, strict=True):
            spread = f" ± {statistics.stdev(column):.1f}" if len(column) > 1 else ""
            cells.append(f"{statistics.mean(column):.1f}{spread}")
        gap = teacher["mAP"] - means.get("alone", teacher["mAP"])
        closed = f"{(means[kind] - means['alone']) / gap:.2f}" if gap else ""
        lines.append(f"| {kind} | {' | '.join(cells)} | {closed} |")
    return "\n".join(lines)


def main(args):
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.output or temporary).absolute()
        if folder.is_dir() and any(folder.iterdir()):
            sys.exit(f"{folder} is not empty: its runs would be taken for new ones; give another --output")
        teacher = Path(args.teacher or folder / "teacher").absolute()
        if not args.teacher:
            where = ["--output", folder, "--name", "teacher"]
            run_script("train_reid.py", *RECIPE, *args.options, *shlex.split(args.teacher_options), *where)
        best = scores(teacher)
        print(f"teacher: mAP {best['mAP']:.1f}, Rank-1 {best['rank1']:.1f}", flush=True)
        jobs = [(kind, seed) for seed in args.seeds for kind in args.kinds]
        with ThreadPoolExecutor(args.parallel) as pool:
            results = list(pool.map(lambda job: train(*job, teacher, args, folder), jobs))
        if args.output:
            (folder / "results.json").write_text(json.dumps({"teacher": best, "students": results}, indent=1))
    print(table(results, best))


if __name__ == "__main__":
    main(get_parser().parse_args())
