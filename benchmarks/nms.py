"""Our non-maximum suppression beside torchvision's, in one process and taking turns: medians and their ratio.

    python -m benchmarks.nms
    python -m benchmarks.nms --boxes 1000 20000 --threshold 0.5 --device cuda

Three kinds of boxes: `scattered` ones mostly stay and cost most; `crowded` ones are many around few objects, as a
trained network proposes them, and mostly go; `levels` are crowded ones in five groups (batched_nms), as an RPN on a
feature pyramid has them. Both must keep as many boxes. 1.00 means equally fast, less is faster than torchvision.
"""

import argparse
from functools import partial

import torch
import torchvision

from benchmarks.turns import medians
from core.layers.boxes import batched_nms, nms


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = (1000, 2000, 8000)
    parser.add_argument(
        "--boxes", type=int, nargs="+", default=sizes, help="numbers of boxes (default: 1000 2000 8000)"
    )
    parser.add_argument("--threshold", type=float, default=0.7, help="IoU from which a box goes (default: 0.7)")
    parser.add_argument("--steps", type=int, default=15, help="measured calls of each (default: 15)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if any")
    return parser


def main(args):
    print(
        f"IoU threshold {args.threshold}, {args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for kind, make in (("scattered", scattered_boxes), ("crowded", crowded_boxes), ("levels", crowded_boxes)):
        for count in args.boxes:
            torch.manual_seed(0)
            inputs = [make(count).to(args.device), torch.rand(count, device=args.device)]
            functions = {"ours": nms, "torchvision": torchvision.ops.nms}
            if kind == "levels":
                inputs.append(torch.randint(5, (count,), device=args.device))
                functions = {"ours": batched_nms, "torchvision": torchvision.ops.batched_nms}
            functions = {of: partial(function, *inputs, args.threshold) for of, function in functions.items()}
            kept, reference = (len(function()) for function in functions.values())
            if kept != reference:
                raise RuntimeError(f"{kind}, {count} boxes: ours keeps {kept}, torchvision {reference}")
            ours, theirs = medians(functions, args.device, args.steps, warmup=3).values()
            print(
                f"{kind}, {count} boxes, {kept} kept: ours {1e3 * ours:.2f} ms, "
                f"torchvision {1e3 * theirs:.2f} ms, ratio {ours / theirs:.2f}"
            )


def scattered_boxes(count):
    """(count, 4) boxes of 0 to 150 pixels a side, anywhere in 800 x 1333."""
    corner = torch.rand(count, 2) * torch.tensor([1333.0, 800.0])
    return torch.cat((corner, corner + 150 * torch.rand(count, 2)), dim=1)


def crowded_boxes(count, objects=20):
    """(count, 4) boxes around a few objects, off by a tenth of their size."""
    centre, size = torch.rand(objects, 2) * torch.tensor([1333.0, 800.0]), 30 + 200 * torch.rand(objects, 2)
    chosen = torch.randint(objects, (count,))
    centre = centre[chosen] + 0.1 * size[chosen] * torch.randn(count, 2)
    size = size[chosen] * (0.15 * torch.randn(count, 2)).exp()
    return torch.cat((centre - size / 2, centre + size / 2), dim=1).clamp(min=0)


if __name__ == "__main__":
    main(get_parser().parse_args())
