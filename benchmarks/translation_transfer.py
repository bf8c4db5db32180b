"""Does a translated source set teach more about the target than the source itself? COIL-100 in colour, COIL-20 in grey.

    OMP_NUM_THREADS=1 python -m benchmarks.translation_transfer --data ../shared/data     # both ways, seeds 0 and 1
    python -m benchmarks.translation_transfer --data ../shared/data --seeds 0 --directions coil100-coil20

Four networks are trained by the same recipe and asked about the target's query and gallery: on the source (direct
transfer), on the source translated by CycleGAN, by SPGAN, and on the target (the ceiling). The first three then go on
without labels on the target ("+ clusters", cluster_contrast). A translation takes about ten minutes of one core, a
network three. Runs, sheets and translated sets stay in --output, and aren't made again.
"""

import argparse
import json
import re
from pathlib import Path

from benchmarks.runs import run_script

TRANSLATION = ["--height", "48", "--width", "48", "--channels", "16", "--blocks", "3", "--batch-size", "4"]
TRANSLATION += ["--discriminator-layers", "2", "--siamese-layers", "2", "--epochs", "30", "--lr", "5e-4"]
TRANSLATION += ["--iterations-per-epoch", "100", "--schedule", "linear", "--decay-from", "15", "--eval-every", "5"]
REID = ["--backbone", "resnet18", "--weights", "none", "--height", "64", "--width", "64", "--pad", "4"]
REID += ["--ids-per-batch", "8", "--images-per-id", "4", "--epochs", "10", "--iterations-per-epoch", "30"]
REID += ["--schedule", "cosine", "--warmup-epochs", "0", "--eval-every", "10", "--workers", "1"]
CLUSTERS = ["--method", "cluster_contrast", "--epochs", "6", "--iterations-per-epoch", "20", "--ids-per-batch", "8"]
CLUSTERS += ["--recipe", "quick", "--pooling", "avg", "--lr", "1e-4", "--eval-every", "6", "--workers", "1"]


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder of coil100_reid and coil20_reid")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1], help="default: 0 1")
    parser.add_argument("--directions", nargs="*", default=["coil100-coil20", "coil20-coil100"], help="default: both")
    parser.add_argument("--methods", nargs="*", default=["cyclegan", "spgan"], help="default: both")
    parser.add_argument("--output", type=Path, default=Path("runs/transfer"), help="default: runs/transfer")
    return parser


def trained(data, name, seed, output):
    """last.pth of a network that learned from the set in the folder `data`."""
    path = output / name / "last.pth"
    if not path.exists():
        where = ["--dataset", "market1501", "--data", data, "--output", output, "--name", name]
        run_script("train_reid.py", *where, *REID, "--seed", seed)
    return path


def clustered(checkpoint, target, seed, output):
    """last.pth of the network in `checkpoint`, gone on without labels on the set in the folder `target`."""
    name = f"{checkpoint.parent.name}+{target.name}-{seed}"
    path = output / name / "last.pth"
    if not path.exists():
        where = ["--target", f"market1501:{target}", "--weights", checkpoint, "--output", output, "--name", name]
        run_script("train_unsupervised.py", *where, *CLUSTERS, "--seed", seed)
    return path


def asked(checkpoint, target):
    """(mAP, Rank-1) about the set in the folder `target`."""
    answers = checkpoint.parent / f"on-{target.name}"
    if not answers.exists():
        run_script("evaluate.py", checkpoint, "--dataset", "market1501", "--data", target, "--output", answers)
    found = json.loads((answers / "market1501" / "metrics.json").read_text())["results"]["plain"]
    return found["mAP"], found["rank1"]


def translated(source, target, method, seed, judge, output):
    """(folder of the translated set, Frechet distances before and after in the features of `judge`)."""
    name = f"{method}-{source.name}-{target.name}-{seed}"
    folder = output / "sets" / name
    if not folder.exists():
        domains = ["--source", f"market1501:{source}", "--target", f"market1501:{target}", "--method", method]
        where = ["--output", output, "--name", name, "--translate", folder, "--feature-distance", judge]
        run_script("train_translation.py", *domains, *TRANSLATION, "--seed", seed, *where)
    said = (output / name / "train.log").read_text()
    return folder, re.findall(r"source ([\d.]+), translated ([\d.]+)$", said, re.MULTILINE)[-1]


def main(args):
    output = args.output.absolute()
    print("| source-target | seed | learned from | mAP | Rank-1 | Frechet distance |", "| --- " * 6 + "|", sep="\n")
    for direction in args.directions:
        source, target = (args.data.absolute() / f"{name}_reid" for name in direction.split("-"))
        for seed in args.seeds:
            direct = trained(source, f"{source.name}-{seed}", seed, output)
            rows = [("source", direct, "")]
            for method in args.methods:
                folder, (before, after) = translated(source, target, method, seed, direct, output)
                network = trained(folder, f"on-{folder.name}", seed, output)
                rows.append((method, network, f"{before} -> {after}"))
            rows += [(f"{name} + clusters", clustered(network, target, seed, output), "") for name, network, _ in rows]
            rows.append(("target", trained(target, f"{target.name}-{seed}", seed, output), ""))
            for name, checkpoint, distance in rows:
                mean_ap, rank1 = asked(checkpoint, target)
                print(f"| {direction} | {seed} | {name} | {mean_ap:.3f} | {rank1:.3f} | {distance} |", flush=True)


if __name__ == "__main__":
    main(get_parser().parse_args())
