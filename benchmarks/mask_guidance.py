"""Does it help to know where the object is? ReID with each kind of mask, with and without mask pooling, over seeds.

    python -m benchmarks.mask_guidance --mask-checkpoint runs/mask-rcnn-scenes-resnet18/best.pth
    python -m benchmarks.mask_guidance --masks none instance --poolings off soft --seeds 0 --parallel 1 -- --epochs 2

Bags among other bags on restless floors (`--dataset synthetic_hard`); ResNet-18 with the light decoder, 64 x 64 pixels,
5 epochs of 20 batches; from scratch, or from weights: `-- --weights PATH`. Every run is a plain `train_reid.py` line;
what differs is --backbone, --mask-target, --mask-pooling and --seed. Each has one thread, and as many run side by side
as there are cores, so times are not comparable with those of a run alone. For predicted masks the set's boxes say which
bag is meant.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.runs import last_row, run_script

MASKS = ("none", "gaussian", "box", "instance", "predicted")
POOLINGS = ("off", "soft", "branch")


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", nargs="*", choices=MASKS, default=MASKS, help="default: all")
    parser.add_argument("--poolings", nargs="*", choices=POOLINGS, default=POOLINGS[:2], help="default: off soft")
    parser.add_argument("--seeds", type=int, nargs="*", default=range(3), help="default: 0 to 2")
    parser.add_argument("--mask-checkpoint", help="of train_mask_rcnn.py, for predicted masks")
    parser.add_argument("--parallel", type=int, default=os.cpu_count(), help="runs at a time (default: all cores)")
    parser.add_argument("--output", help="keep the runs, and results.json, there")
    parser.add_argument("options", nargs="*", help="after --: more options for train_reid.py")
    return parser


def ways(masks, poolings):
    """(mask, pooling) of each run; without a mask there is none to pool with."""
    return [(mask, pooling) for mask in masks for pooling in poolings if mask != "none" or pooling == "off"]


def arguments_of(mask, pooling, seed, args, folder):
    """What train_reid.py is called with, list of str, for a run that lands in folder / f"{mask}-{pooling}-{seed}"."""
    arguments = ["--recipe", "quick", "--dataset", "synthetic_hard", "--weights", "none"]
    if mask == "none":
        arguments += ["--backbone", "resnet18"]
    else:
        arguments += ["--backbone", "resnet18_with_mask", "--mask-decoder", "light", "--mask-size", 64, 64]
        arguments += ["--mask-target", mask, "--mask-pooling", pooling]
    if mask == "predicted":
        arguments += ["--mask-checkpoint", Path(args.mask_checkpoint).absolute()]
    arguments += ["--lr", 5e-4, "--epochs", 5, "--eval-every", 5, "--workers", 0, "--device", "cpu"]
    arguments += ["--seed", seed, "--output", folder, "--name", f"{mask}-{pooling}-{seed}", *args.options]
    return list(map(str, arguments))


def train(mask, pooling, seed, args, folder):
    """mAP and Rank-1 after the last epoch of a run, in per cent, and its minutes."""
    name = f"{mask}-{pooling}-{seed}"
    start = time.perf_counter()
    run_script("train_reid.py", *arguments_of(mask, pooling, seed, args, folder), OMP_NUM_THREADS="1")
    last = last_row(folder / name)
    for checkpoint in (folder / name).glob("*.pth"):
        checkpoint.unlink()
    result = {"mask": mask, "pooling": pooling, "seed": seed, "minutes": (time.perf_counter() - start) / 60}
    result |= {"mAP": 100 * float(last["mAP"]), "rank1": 100 * float(last["rank1"])}
    print(f"{name}: mAP {result['mAP']:.1f}, Rank-1 {result['rank1']:.1f}, {result['minutes']:.1f} minutes", flush=True)
    return result


def table(results):
    """Mean and standard deviation over the seeds, one line for each way."""
    lines = ["| mask | mask pooling | mAP | Rank-1 |", "| --- | --- | --- | --- |"]
    for mask, pooling in dict.fromkeys((one["mask"], one["pooling"]) for one in results):
        cells = []
        for metric in ("mAP", "rank1"):
            values = [one[metric] for one in results if (one["mask"], one["pooling"]) == (mask, pooling)]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {mask} | {pooling} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(args):
    if "predicted" in args.masks and not args.mask_checkpoint:
        sys.exit("predicted masks need --mask-checkpoint; or name the --masks without it")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.output or temporary).absolute()
        if folder.is_dir() and any(folder.iterdir()):
            sys.exit(f"{folder} is not empty: its runs would be taken for new ones; give another --output")
        jobs = [(*way, seed) for seed in args.seeds for way in ways(args.masks, args.poolings)]
        # What the first run makes for all, the data and the predicted masks, two at once would make twice.
        alone = [next(job for job in jobs if job[0] == "predicted")] if "predicted" in args.masks else jobs[:1]
        results = [train(*job, args, folder) for job in alone]
        with ThreadPoolExecutor(args.parallel) as pool:
            results += pool.map(lambda job: train(*job, args, folder), [job for job in jobs if job not in alone])
        if args.output:
            (folder / "results.json").write_text(json.dumps(results, indent=1))
    print(table(results))


if __name__ == "__main__":
    main(get_parser().parse_args())
