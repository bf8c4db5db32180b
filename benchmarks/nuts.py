"""Mask R-CNN from scratch on eleven photographs of nuts, with several seeds: mean AP of masks and boxes, and spread.

    python -m benchmarks.nuts --data ../shared/data/nuts_coco -- --amp bf16      # about four minutes a seed on 2 cores

The reference, torchvision's MaskRCNN with the same backbone, budget and pictures, reached mask AP 0.705, 0.680, 0.682
and box AP 0.533, 0.468, 0.492 with seeds 0, 1, 2.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.runs import last_row, run_script


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder nuts_coco")
    parser.add_argument("--seeds", type=int, nargs="*", default=range(3), help="default: 0 to 2")
    parser.add_argument("--output", help="keep the runs there")
    parser.add_argument("options", nargs="*", help="after --: more options for train_mask_rcnn.py")
    return parser


def train(seed, args, folder):
    """Metrics after the last epoch of a run with this seed, and its minutes."""
    data = Path(args.data).absolute()
    command = ["train_mask_rcnn.py", "--recipe", "quick", "--vertical-flip", 0.5]
    command += ["--min-size", 256, "--max-size", 400, "--rois-per-image", 64]
    command += ["--epochs", 6, "--iterations-per-epoch", 50, "--eval-every", 6]  # 300 steps, as the reference
    for split in ("train", "val"):
        command += [f"--{split}-images", data / "images"]
        command += [f"--{split}-annotations", data / "annotations" / f"instances_{split}.json"]
    command += ["--seed", seed, "--output", folder, "--name", f"nuts-{seed}", *args.options]
    start = time.perf_counter()
    run_script(*command)
    last = last_row(folder / f"nuts-{seed}")
    return {name: float(last[name]) for name in ("mask_AP", "mask_AP50", "box_AP")}, (time.perf_counter() - start) / 60


def main(args):
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            metrics, minutes = train(seed, args, Path(args.output or folder).absolute())
            rows.append(metrics)
            numbers = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            print(f"seed {seed}: {numbers}; {minutes:.1f} minutes", flush=True)
    for name in rows[0]:
        values = [row[name] for row in rows]
        print(f"{name}: mean {statistics.mean(values):.3f}, from {min(values):.3f} to {max(values):.3f}")


if __name__ == "__main__":
    main(get_parser().parse_args())
