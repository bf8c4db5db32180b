"""Our paste of instance masks beside torchvision's, in one process and taking turns: medians and their ratio.

    python -m benchmarks.paste
    python -m benchmarks.paste --instances 300 --size 1200 1600 --device cuda

`paste_masks` gives all values at full resolution, as torchvision does; `paste_mask_chunks` the masks themselves, one
bool per pixel, beside torchvision's values compared with 0.5. Two kinds of boxes: `objects` of 16 to 300 pixels a side
and `large` ones of up to the whole picture. 1.00 means equally fast, less is faster than torchvision.
"""

import argparse
from functools import partial

import torch
from torchvision.models.detection.roi_heads import paste_masks_in_image

from benchmarks.turns import beside, medians
from core.layers.masks import paste_mask_chunks, paste_masks


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=100, help="number of masks (default: 100)")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(800, 1333), help="height and width of the picture (default: 800 1333)"
    )
    parser.add_argument("--steps", type=int, default=9, help="measured calls of each (default: 9)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if any")
    return parser


def main(args):
    torch.manual_seed(0)
    size = tuple(args.size)
    masks = torch.rand(args.instances, 1, 28, 28, device=args.device)
    print(
        f"{args.instances} masks in {size[0]} x {size[1]}, {args.device}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )
    for kind, smallest, largest in (("objects", 16, 300), ("large", 300, max(size))):
        boxes = random_boxes(args.instances, size, smallest, largest).to(args.device)
        difference = (paste_masks(masks, boxes, size) - paste_masks_in_image(masks, boxes, size)).abs().max()
        if difference > 1e-4:
            raise RuntimeError(f"the values differ by {difference}")
        for what, functions in (
            ("paste_masks", {"ours": paste_masks, "torchvision": paste_masks_in_image}),
            ("paste_mask_chunks", {"ours": our_masks, "torchvision": their_masks}),
        ):
            steps = {of: partial(function, masks, boxes, size) for of, function in functions.items()}
            print(f"{kind}, {what}: {beside(medians(steps, args.device, args.steps), 'ms', 1e3)}")


def random_boxes(count, size, smallest, largest):
    """(count, 4) boxes of so many pixels a side in a picture of height, width; those over its edge are cut."""
    limit = torch.tensor([size[1], size[0]])
    centre, half = torch.rand(count, 2) * limit, (torch.rand(count, 2) * (largest - smallest) + smallest) / 2
    return torch.cat(((centre - half).clamp(min=0), (centre + half).minimum(limit)), dim=1)


def our_masks(masks, boxes, size):
    for _ in paste_mask_chunks(masks, boxes, size):
        pass


def their_masks(masks, boxes, size):
    return paste_masks_in_image(masks, boxes, size) >= 0.5


if __name__ == "__main__":
    main(get_parser().parse_args())
