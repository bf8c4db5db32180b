"""Our RoIAlign beside torchvision's, in one process and taking turns: forward, forward and backward, as ratios.

    python -m benchmarks.roi_align
    python -m benchmarks.roi_align --rois 512 --output-size 14 --sampling-ratio 0 --channels-last --device cuda

`map` reads all boxes from one map of stride 4, `pyramid` from the level of four that fits the size of each, as a Mask
R-CNN does. Both must give the same numbers. 1.00 means equally fast, less is faster than torchvision.
"""

import argparse
from functools import partial

import torch
import torchvision

from benchmarks.turns import beside, medians
from core.layers.roi_align import MultiScaleRoIAlign, roi_align

STRIDES = {"0": 4, "1": 8, "2": 16, "3": 32}


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rois", type=int, default=1000, help="number of boxes (default: 1000)")
    parser.add_argument("--channels", type=int, default=256, help="channels of the maps (default: 256)")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(800, 1344), help="height and width of the picture (default: 800 1344)"
    )
    parser.add_argument("--output-size", type=int, default=7, help="bins of a box along each side (default: 7)")
    parser.add_argument("--sampling-ratio", type=int, default=2, help="samples of a bin; 0: as needed (default: 2)")
    parser.add_argument("--steps", type=int, default=7, help="measured calls of each (default: 7)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if any")
    parser.add_argument("--channels-last", action="store_true", help="channels_last memory format")
    return parser


def main(args):
    torch.manual_seed(0)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    height, width = args.size
    maps = {
        name: torch.randn(1, args.channels, height // stride, width // stride)
        .to(args.device, memory_format=layout)
        .requires_grad_()
        for name, stride in STRIDES.items()
    }
    cases = {
        "map": (maps["0"], random_boxes(args.rois, args.size, 216)),
        "pyramid": (maps, random_boxes(args.rois, args.size, 600)),
    }
    print(
        f"{args.rois} boxes, {args.channels} channels, {args.output_size} x {args.output_size} bins, {args.device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for name, (features, boxes) in cases.items():
        boxes = boxes.to(args.device)
        functions = {"ours": ours(name, args), "torchvision": theirs(name, args)}
        with torch.no_grad():
            difference = (functions["ours"](features, boxes) - functions["torchvision"](features, boxes)).abs().max()
        if difference > 1e-4:
            raise RuntimeError(f"{name}: the results differ by {difference}")
        for what, step in (("forward", forward), ("forward and backward", forward_backward)):
            steps = {of: partial(step, function, features, boxes) for of, function in functions.items()}
            print(f"{name}, {what}: {beside(medians(steps, args.device, args.steps), 'ms', 1e3)}")


def random_boxes(count, size, largest):
    """(count, 4) boxes of 16 to `largest` pixels a side in a picture of height, width; those over its edge are cut."""
    limit = torch.tensor([size[1], size[0]])
    centre, half = torch.rand(count, 2) * limit, (torch.rand(count, 2) * (largest - 16) + 16) / 2
    return torch.cat(((centre - half).clamp(min=0), (centre + half).minimum(limit)), dim=1)


def ours(name, args):
    if name == "map":
        return lambda features, boxes: roi_align(features, [boxes], args.output_size, 0.25, args.sampling_ratio)
    pool = MultiScaleRoIAlign(list(STRIDES), args.output_size, args.sampling_ratio)
    return lambda features, boxes: pool(features, [boxes], [tuple(args.size)])


def theirs(name, args):
    if name == "map":
        align = torchvision.ops.roi_align
        return lambda features, boxes: align(features, [boxes], args.output_size, 0.25, args.sampling_ratio)
    pool = torchvision.ops.MultiScaleRoIAlign(list(STRIDES), args.output_size, args.sampling_ratio)
    return lambda features, boxes: pool(features, [boxes], [tuple(args.size)])


@torch.no_grad()
def forward(function, features, boxes):
    function(features, boxes)


def forward_backward(function, features, boxes):
    out = function(features, boxes)
    maps = list(features.values()) if isinstance(features, dict) else [features]
    torch.autograd.grad(out, maps, torch.ones_like(out))


if __name__ == "__main__":
    main(get_parser().parse_args())
