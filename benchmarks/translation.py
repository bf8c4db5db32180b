"""A training step of train_translation.py beside one in plain PyTorch, with the same networks, in one process by turns.

    python -m benchmarks.translation
    python -m benchmarks.translation --channels 64 --blocks 9 --layers 3 --size 256 128 --batch 8 --device cuda --amp

The reference is a loop as people write it: each network called once for each purpose, no checks, no groups.
The medians are compared: 1.00 means equally fast, less is faster than the reference. The last line is our own step
without the identity loss. --memory compares the peak beyond what is held before a step, too; on the CPU of the first
step, in which Adam's moments are made.
"""

import argparse
import random
from functools import partial

import torch
from torch.nn import functional as F

import train_translation
from benchmarks.fresh_process import measure
from benchmarks.turns import is_cuda, medians, peak_bytes
from core.engine import distributed, options
from core.losses.adversarial import ImagePool


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["cyclegan", "spgan"], default="spgan", help="default: spgan")
    parser.add_argument("--channels", type=int, default=16, help="of the first convolutions (default: 16)")
    parser.add_argument("--blocks", type=int, default=3, help="residual blocks of a generator (default: 3)")
    parser.add_argument("--layers", type=int, default=2, help="of discriminators and siamese network (default: 2)")
    parser.add_argument("--size", type=int, nargs=2, default=(64, 64), help="height, width, pixels (default: 64 64)")
    parser.add_argument("--batch", type=int, default=4, help="pictures of each domain (default: 4)")
    parser.add_argument("--steps", type=int, default=15, help="measured steps of each (default: 15)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if any")
    parser.add_argument("--memory", action="store_true", help="also the peak memory of a step")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    return parser


class OneBatch:
    """A loader of one batch, for `Epoch`."""

    def __init__(self, source, target):
        self.batch = {"source": source, "target": target, "path": [""] * (len(source) + len(target))}
        self.batch_sampler = self

    def set_epoch(self, epoch):
        pass

    def __len__(self):
        return 1

    def __iter__(self):
        yield self.batch


class Ours:
    def __init__(self, networks, args, device):
        self.networks, self.args, self.device = networks, args, device
        self.steps = [
            train_translation.build_step([networks[name] for name in part if name in networks], args, device, 1)
            for part in (train_translation.GENERATORS, train_translation.JUDGES)
        ]
        self.models = {name: distributed.wrap(network, device) for name, network in networks.items()}
        self.pools = {name: ImagePool(args.pool) for name in ("target_pool", "source_pool")}

    def step(self, source, target):
        train_translation.train_one_epoch(
            self.networks, self.models, self.pools, OneBatch(source, target), *self.steps, self.args, self.device
        )


class Plain:
    def __init__(self, networks, args, device):
        self.networks, self.args, self.device = networks.train(), args, device
        by_name = list(networks.named_parameters())
        generators = [parameter for name, parameter in by_name if name.startswith("to_")]
        self.judges = [parameter for name, parameter in by_name if not name.startswith("to_")]
        self.generator_adam, self.judge_adam = (
            torch.optim.Adam(parameters, args.lr, betas=(args.beta1, 0.999)) for parameters in (generators, self.judges)
        )
        self.pools = {"is_target": [], "is_source": []}

    def older(self, name, images):
        pool, shown = self.pools[name], []
        for image in images.detach().split(1):
            if len(pool) < self.args.pool:
                pool.append(image)
            elif random.random() < 0.5:
                place = random.randrange(len(pool))
                pool[place], image = image, pool[place]
            shown.append(image)
        return torch.cat(shown)

    def contrast(self, first, second, same):
        distance = F.pairwise_distance(first, second)
        return (distance.square() if same else (2 - distance).clamp(min=0).square()).mean()

    def gan(self, name, images, real):
        answer = self.networks[name](images)
        return F.mse_loss(answer, torch.full_like(answer, float(real)))

    def step(self, source, target):
        args, net = self.args, self.networks
        for parameter in self.judges:
            parameter.requires_grad_(False)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=args.amp == "bf16"):
            as_target, as_source = net["to_target"](source), net["to_source"](target)
            loss = self.gan("is_target", as_target, True) + self.gan("is_source", as_source, True)
            loss += args.cycle * F.l1_loss(net["to_source"](as_target), source)
            loss += args.cycle * F.l1_loss(net["to_target"](as_source), target)
            loss += args.identity * F.l1_loss(net["to_target"](target), target)
            loss += args.identity * F.l1_loss(net["to_source"](source), source)
            if "siamese" in net:
                a, b, c, d = (net["siamese"](images) for images in (source, target, as_target, as_source))
                alike = self.contrast(a, c, True) + self.contrast(b, d, True)
                loss += args.contrastive * (alike + 0.5 * (self.contrast(c, b, False) + self.contrast(d, a, False))) / 4
        self.generator_adam.zero_grad()
        loss.backward()
        self.generator_adam.step()
        for parameter in self.judges:
            parameter.requires_grad_(True)
        as_target, as_source = as_target.detach(), as_source.detach()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=args.amp == "bf16"):
            loss = 0.0
            for name, real, fake in (("is_target", target, as_target), ("is_source", source, as_source)):
                loss = loss + 0.5 * (self.gan(name, real, True) + self.gan(name, self.older(name, fake), False))
            if "siamese" in net:
                a, b, c, d = (net["siamese"](images) for images in (source, target, as_target, as_source))
                alike = self.contrast(a, c, True) + self.contrast(b, d, True)
                loss = loss + (alike + 2 * self.contrast(a, b, False)) / 3
        self.judge_adam.zero_grad()
        loss.backward()
        self.judge_adam.step()
        loss.item()  # what is logged


def settings(args, **changes):
    """The options of train_translation.py that ours are."""
    line = ["--method", args.method, "--channels", args.channels, "--blocks", args.blocks]
    line += ["--discriminator-layers", args.layers, "--siamese-layers", args.layers]
    line += ["--height", args.size[0], "--width", args.size[1], "--amp", "bf16" if args.amp else "off"]
    script = train_translation
    parsed = options.parse(script.get_parser(), script.RECIPES, script.default_recipe, list(map(str, line)))
    vars(parsed).update(changes)
    return parsed


def prepare(name, args):
    """(a contender, source, target)."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    networks, _ = train_translation.build_networks(settings(args))
    kind, changes = (Plain, {}) if name == "plain" else (Ours, {} if name == "ours" else {"identity": 0.0})
    source, target = (torch.rand(args.batch, 3, *args.size, device=device) * 2 - 1 for _ in range(2))
    return kind(networks.to(device), settings(args, **changes), device), source, target


def take_step(contender, source, target):
    contender.step(source, target)


def main(args):
    size = " x ".join(map(str, (args.batch, *args.size)))
    print(f"{args.method}, {args.channels} channels, {args.blocks} blocks, {size}, {args.device}")
    names = ("ours", "plain", "without identity")
    steps = {name: partial(take_step, *prepare(name, args)) for name in names}
    seconds = medians(steps, args.device, args.steps, warmup=3)
    mebibytes = {}
    if args.memory and is_cuda(args.device):
        mebibytes = {name: peak / 2**20 for name, peak in peak_bytes(steps, args.device).items()}
    elif args.memory:
        mebibytes = {name: 2**10 * measure(prepare, take_step, (name, args)).peak_gib for name in names}
    for name in ("ours", "without identity"):
        ratio = seconds[name] / seconds["plain"]
        line = f"{name}: {1e3 * seconds[name]:.1f} ms, plain PyTorch {1e3 * seconds['plain']:.1f} ms, ratio {ratio:.3f}"
        print(line + (f"; {mebibytes[name]:.0f} MiB, {mebibytes['plain']:.0f} MiB" if mebibytes else ""))


if __name__ == "__main__":
    main(get_parser().parse_args())
