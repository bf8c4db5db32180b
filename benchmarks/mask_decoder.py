"""What seeing the object costs: the ReID network with each mask decoder beside the plain one, in one process by turns.

    python -m benchmarks.mask_decoder
    python -m benchmarks.mask_decoder --backbone resnet101 --batch 32 --size 256 128 --steps 20 --device cuda --amp

A training step is forward, identity, triplet (and mask) loss, backward and an update by Adam; evaluation is the
embedding alone, and with `--mask-pooling` the mask that it is pooled with. The medians are compared: 1.00 is the time
of the network without a decoder.
"""

import argparse
from functools import partial

import torch

from benchmarks.turns import medians
from core.layers.mask_decoder import MASK_DECODERS
from core.losses.spec import build_loss
from core.models.reid import MASK_POOLINGS, build_reid_model

IDENTITIES = 100


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet101", help="default: resnet101")
    parser.add_argument("--batch", type=int, default=8, help="pictures in a batch, of pairs (default: 8)")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(256, 128), help="height, width, pixels (default: 256 128)"
    )
    parser.add_argument("--mask-size", type=int, nargs=2, default=(256, 256), help="of the masks (default: 256 256)")
    parser.add_argument("--mask-pooling", choices=MASK_POOLINGS, default="off", help="default: off")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each network (default: 5)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if any")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--channels-last", action="store_true", help="channels_last memory format")
    return parser


class Contender:
    """A network, its loss and its optimiser."""

    def __init__(self, decoder, args):
        pooling = args.mask_pooling if decoder else "off"
        layout = torch.channels_last if args.channels_last else torch.contiguous_format
        self.network = build_reid_model(
            args.backbone, IDENTITIES, with_mask=bool(decoder), mask_decoder=decoder or "full",
            mask_size=tuple(args.mask_size), mask_pooling=pooling,
        ).to(args.device, memory_format=layout)  # fmt: skip
        spec = "cross_entropy+triplet" + ("+combined_mask" if decoder else "")
        self.loss = build_loss(spec, IDENTITIES, self.network.feature_dim)
        self.optimizer = torch.optim.Adam(self.network.parameters())
        self.amp = torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.amp)

    def training_step(self, images, labels, masks):
        self.network.train()
        with self.amp:
            output = self.network(images)
        self.optimizer.zero_grad()
        sum(self.loss(output, labels, masks).values()).backward()
        self.optimizer.step()

    @torch.inference_mode()
    def evaluation(self, images, labels, masks):
        self.network.eval()
        with self.amp:
            self.network(images)


def main(args):
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    images = torch.randn(args.batch, 3, *args.size).to(args.device, memory_format=layout)
    labels = torch.arange(args.batch, device=args.device) // 2
    masks = (torch.rand(args.batch, 1, *args.mask_size, device=args.device) > 0.5).float()
    contenders = {name or "no decoder": Contender(name, args) for name in (None, *MASK_DECODERS)}
    print(f"{args.backbone}, {args.batch} x {args.size[0]} x {args.size[1]}, mask pooling {args.mask_pooling}")
    for what in ("training_step", "evaluation"):
        steps = {name: partial(getattr(one, what), images, labels, masks) for name, one in contenders.items()}
        seconds = medians(steps, args.device, args.steps)
        for name, median in seconds.items():
            ratio = median / seconds["no decoder"]
            print(f"{what.replace('_', ' '):<14} {name:<11} {1e3 * median:8.1f} ms  ratio {ratio:.3f}")


if __name__ == "__main__":
    main(get_parser().parse_args())
