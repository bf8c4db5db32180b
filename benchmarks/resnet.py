"""Our ResNet beside torchvision's, in one process and taking turns: a training step and inference, as ratios.

    python benchmarks/resnet.py
    python benchmarks/resnet.py --network resnet101 --batch 64 --size 256 128 --steps 50 --amp --channels-last

Both start from the same weights and see the same pictures; the medians of their times are compared, so 1.00 means
equally fast and less is faster than torchvision. On CUDA their peak memory beyond the weights is compared too.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # python puts only this file's folder on the path

from core.models.resnet import RESNETS


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    networks = [name for name in RESNETS if hasattr(torchvision.models, name)]
    parser.add_argument("--network", choices=networks, default="resnet50", help="default: resnet50")
    parser.add_argument("--batch", type=int, default=8, help="pictures in a batch (default: 8)")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(128, 64), help="height and width, pixels (default: 128 64)"
    )
    parser.add_argument("--steps", type=int, default=15, help="measured steps of each network (default: 15)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if any")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--channels-last", action="store_true", help="channels_last memory format")
    return parser


def main(args):
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    images = torch.randn(args.batch, 3, *args.size).to(args.device, memory_format=layout)
    models = {"ours": RESNETS[args.network](), "torchvision": getattr(torchvision.models, args.network)()}
    models["torchvision"].load_state_dict(models["ours"].state_dict())
    for model in models.values():
        model.to(args.device, memory_format=layout)

    print(
        f"{args.network}, {args.batch} x 3 x {args.size[0]} x {args.size[1]}, {args.device}, torch {torch.__version__}"
    )
    for name, step in (("training step", training_step), ("inference", inference)):
        times, memory = measure(step, models, images, args)
        ours, theirs = times["ours"], times["torchvision"]
        print(f"{name}: ours {1e3 * ours:.1f} ms, torchvision {1e3 * theirs:.1f} ms, ratio {ours / theirs:.3f}")
        if images.is_cuda:
            ours, theirs = memory["ours"] / 2**20, memory["torchvision"] / 2**20
            print(f"{name}: ours {ours:.0f} MiB, torchvision {theirs:.0f} MiB, ratio {ours / theirs:.3f}")


def measure(step, models, images, args):
    """Median seconds, and peak bytes beyond the weights, of `step` for each model; they take turns at going first."""
    times, memory = {name: [] for name in models}, {name: 0 for name in models}
    for turn in range(args.steps + 3):
        for name, model in sorted(models.items(), reverse=turn % 2 == 1):
            synchronize(images)
            held = torch.cuda.memory_allocated() if images.is_cuda else 0
            start = time.perf_counter()
            with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=args.amp):
                step(model, images)
            synchronize(images)
            if turn >= 3:  # the first turns choose kernels and fill caches
                times[name].append(time.perf_counter() - start)
            if images.is_cuda:
                memory[name] = torch.cuda.max_memory_allocated() - held
                torch.cuda.reset_peak_memory_stats()
    return {name: statistics.median(values) for name, values in times.items()}, memory


def training_step(model, images):
    model.train()(images).logsumexp(dim=1).mean().backward()
    model.zero_grad(set_to_none=True)


@torch.inference_mode()
def inference(model, images):
    model.eval()(images)


def synchronize(images):
    if images.is_cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(get_parser().parse_args())
