"""Translate pictures into the look of another domain: CycleGAN, SPGAN.

Pictures for train_reid.py to learn from. One process, one GPU or the CPU:
    python train_translation.py --translate data/translated
    python train_translation.py --source market1501:PATH \\
        --target dukemtmc:PATH --method spgan --translate OUT
All GPUs of a machine:
    bash run_ddp.sh train_translation.py --source market1501:PATH \\
        --target msmt17:PATH --amp bf16 --translate OUT
Several machines, the same line on each (NODE_RANK 0, 1, ...):
    NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 \\
        bash run_ddp.sh train_translation.py --source ... --target ...
With a trained network, any set:
    python train_translation.py --weights runs/NAME/last.pth \\
        --source market1501:PATH --translate OUT

Without --source and --target the run makes a small set of baggage pictures, and
translates those from before security into the look of those from after it.
Everything lands in runs/<name>/, the translated set in OUT.
"""

import sys
import time

from core.engine import options
from core.engine.options import arguments_of

PUBLISHED = {
    "height": 256, "width": 128, "batch_size": 8, "epochs": 50, "iterations_per_epoch": 200, "flip": 0.5,
    "channels": 64, "blocks": 9, "discriminator_layers": 3, "siamese_layers": 3, "cycle": 10.0, "pool": 50,
    "optimizer": "adam", "lr": 2e-4, "beta1": 0.5, "weight_decay": 0.0, "eval_every": 5,
}  # fmt: skip
# As in OpenUnReID; but here the generators learn in every batch, and SPGAN's siamese network from the first epoch on.
RECIPES = {
    # Zhu et al. 2017
    "cyclegan": {**PUBLISHED, "method": "cyclegan", "identity": 0.5, "schedule": "linear", "decay_from": 25},
    # Deng et al. 2018, at a constant rate
    "spgan": {
        **PUBLISHED, "method": "spgan", "identity": 5.0, "contrastive": 2.0, "schedule": "multistep", "milestones": []
    },
    # Small pictures and networks: the whole run in minutes on two CPU cores.
    "quick": {
        **PUBLISHED, "method": "spgan", "height": 64, "width": 64, "batch_size": 4, "channels": 16, "blocks": 3,
        "discriminator_layers": 2, "identity": 5.0, "contrastive": 2.0, "epochs": 10, "iterations_per_epoch": 50,
        "lr": 1e-3, "schedule": "linear", "decay_from": 5, "eval_every": 2,
    },
}  # fmt: skip


def get_parser():
    parser = options.Parser(__doc__)
    options.add_domain_options(parser)
    group = parser.add_argument_group("networks and losses")
    group.add_argument("--method", choices=["cyclegan", "spgan"], help="spgan: with a siamese network and its loss")
    group.add_argument("--channels", type=options.positive_int, default=64, help="of each network's first convolution")
    group.add_argument("--blocks", type=options.non_negative_int, default=9, help="residual blocks of the generators")
    group.add_argument(
        "--discriminator-layers", type=options.positive_int, default=3, help="1, 2, 3: patches of 16, 34, 70 pixels"
    )
    group.add_argument(
        "--siamese-layers", type=options.positive_int, default=3, help="each makes the picture four times smaller"
    )
    group.add_argument("--cycle", type=options.non_negative_float, default=10.0, help="weight: there and back")
    group.add_argument("--identity", type=options.non_negative_float, default=5.0, help="weight: own look is kept")
    group.add_argument("--contrastive", type=options.non_negative_float, default=2.0, help="weight of spgan's loss")
    group.add_argument(
        "--pool", type=options.non_negative_int, default=50, help="older translations that the discriminators see too"
    )
    group = options.add_optimizer_options(parser)
    group.add_argument("--beta1", type=options.fraction_below_one, default=0.5, help="momentum of adam")

    group = parser.add_argument_group("translation")
    group.add_argument("--translate", metavar="OUT", help="write the source set in the target's look into a new folder")
    group.add_argument("--weights", metavar="CHECKPOINT", help="translate with this run's network; trains nothing")
    group.add_argument(
        "--feature-distance", metavar="CHECKPOINT", help="of train_reid.py: say how near OUT is to the target for it"
    )
    options.add_published_options(parser)
    options.add_run_options(parser)
    return parser


def default_recipe(args):
    return "quick" if args.source is None and args.target is None else args.method or "spgan"


if __name__ == "__main__":
    options.answer_help(get_parser(), RECIPES)  # before torch is imported, which takes seconds

import torch
from torch import nn

from core.data.randomness import derive_seed
from core.engine import distributed, reid, translation
from core.engine.checkpoint import check_same_network, load_checkpoint, restore
from core.engine.epoch import Epoch, seed_everything
from core.engine.log import Announcer, check_loggers
from core.engine.optim import build_optimizer, build_scheduler
from core.engine.published import load_state
from core.engine.run import Run
from core.engine.step import Step, autocast, memory_format
from core.errors import InputError, as_written
from core.losses.adversarial import ImagePool, contrastive_loss, gan_loss, l1_loss
from core.losses.precision import at_least_float32
from core.models.gan import PatchDiscriminator, ResNetGenerator, SiameseMetricNet, nearest_size

GENERATORS, JUDGES = ("to_target", "to_source"), ("is_target", "is_source", "siamese")


def build_networks(args):
    """(ModuleDict of all networks, the options that shape their weights); InputError for sizes they can't take."""
    layers = (args.discriminator_layers, args.siamese_layers if args.method == "spgan" else 0)
    for side, size in (("height", args.height), ("width", args.width)):
        nearest = nearest_size(size, *layers)
        if nearest != size:
            raise InputError(
                f"--{side} {size}: the networks take multiples of 4 from {nearest_size(0, *layers)} up, the nearest is "
                f"{nearest}; or give fewer --discriminator-layers or --siamese-layers"
            )
    names = ("method", "channels", "blocks", "discriminator_layers", "siamese_layers")
    networks = {name: ResNetGenerator(args.channels, args.blocks) for name in GENERATORS}
    networks |= {name: PatchDiscriminator(args.channels, layers[0]) for name in JUDGES[:2]}
    if args.method == "spgan":
        networks["siamese"] = SiameseMetricNet(args.channels, layers[1], args.height, args.width)
    return nn.ModuleDict(networks), {name: getattr(args, name) for name in names}


def build_step(networks, args, device, batches_per_epoch):
    """`Step` of networks that learn together: the generators, or those that judge them."""
    parameters = [parameter for network in networks for parameter in network.parameters()]
    groups = [{"params": parameters, "betas": (args.beta1, 0.999)}]
    optimizer = build_optimizer(groups, args.optimizer, args.lr, **arguments_of(build_optimizer, args))
    schedule = {**arguments_of(build_scheduler, args), "epochs": max(args.epochs, 1)}
    scheduler = build_scheduler(optimizer, args.schedule, **schedule)
    return Step(networks, [optimizer], scheduler, args, device, batches_per_epoch=batches_per_epoch)


def generator_losses(to_target, to_source, judges, source, target, args):
    """(name -> weighted scalar, source in the target's look, target in the source's); all pictures (B, 3, H, W)."""
    as_target, as_source = to_target(source), to_source(target)
    back = l1_loss(to_source(as_target), source) + l1_loss(to_target(as_source), target)
    fooled = gan_loss(judges["is_target"](as_target), True) + gan_loss(judges["is_source"](as_source), True)
    losses = {"gan": fooled, "cycle": args.cycle * back}
    if args.identity:
        losses["identity"] = args.identity * (l1_loss(to_target(target), target) + l1_loss(to_source(source), source))
    if "siamese" in judges and args.contrastive:  # a translation is like its picture, and unlike the other domain
        rows = judges["siamese"](torch.cat((source, target, as_target, as_source))).chunk(4)  # (B, D) each
        alike = contrastive_loss(rows[0], rows[2], 1) + contrastive_loss(rows[1], rows[3], 1)
        apart = contrastive_loss(rows[2], rows[1], 0) + contrastive_loss(rows[3], rows[0], 0)
        losses["contrastive"] = args.contrastive * (alike + 0.5 * apart) / 4
    return losses, as_target, as_source


def judge_losses(judges, pools, source, target, as_target, as_source, coin):
    """name -> weighted scalar. The discriminators see older translations too."""
    losses = {"discriminator": 0.0}
    for domain, real, translated in (("target", target, as_target), ("source", source, as_source)):
        shown = translation.exchange(pools[f"{domain}_pool"], translated, coin)
        truth, lie = judges[f"is_{domain}"](torch.cat((real, shown))).chunk(2)  # (B, 1, h, w) each
        losses["discriminator"] += 0.5 * (gan_loss(truth, True) + gan_loss(lie, False))
    if "siamese" in judges:
        rows = judges["siamese"](torch.cat((source, target, as_target, as_source))).chunk(4)  # (B, D) each
        alike = contrastive_loss(rows[0], rows[2], 1) + contrastive_loss(rows[1], rows[3], 1)
        losses["siamese"] = (alike + 2 * contrastive_loss(rows[0], rows[1], 0)) / 3
    return losses


def train_one_epoch(networks, models, pools, loader, generator_step, judge_step, args, device):
    """One pass, in each batch of which the generators learn and then, by turns, what judges them; the row of the log.

    networks: bare; models: the same under DDP.
    """
    networks.train()
    progress = Epoch(loader, generator_step.epoch + 1, args.seed)
    coin = torch.Generator().manual_seed(derive_seed("pool", args.seed, progress.epoch))  # the same on every rank
    generators, judges = ({name: models[name] for name in models if name in part} for part in (GENERATORS, JUDGES))
    for batch in progress:
        source, target = (
            batch[domain].to(device, non_blocking=True, memory_format=memory_format(args))  # (B, 3, H, W) in [-1, 1]
            for domain in ("source", "target")
        )
        for name in judges:  # they don't learn from this, so they are called without DDP, which waits for gradients
            networks[name].requires_grad_(False)
        with generator_step.forward(*generators.values()), autocast(device, args.amp):
            losses, *translated = generator_losses(*generators.values(), networks, source, target, args)
        progress.add(generator_step(losses, batch["path"]))
        for name in judges:
            networks[name].requires_grad_(True)
        translated = [at_least_float32(images.detach()) for images in translated]
        with judge_step.forward(*judges.values()), autocast(device, args.amp):
            losses = judge_losses(judges, pools, source, target, *translated, coin)
        progress.add(judge_step(losses, batch["path"]))
    rate = generator_step.end_epoch()
    judge_step.end_epoch()
    return {"epoch": generator_step.epoch, "lr": rate, **progress.row()}


class TranslationRun(Run):
    """A `Run` without a number to tell which epoch is best; its evaluation is a sheet to look at."""

    kind = "gan"

    def __init__(self, args, say, networks, network_options, steps, pools, domains, device):
        self.networks, self.network_options, self.steps, self.pools = networks, network_options, steps, pools
        self.domains, self.device = domains, device
        super().__init__(args, say, steps[0], {}, without_effect=("translate", "feature_distance"))

    def _resume(self, state, path):
        check_same_network(state, path, self.network_options)
        generator_step, judge_step = self.steps
        holders = (("model", self.networks), (None, generator_step), ("judges", judge_step), *self.pools.items())
        restore(state, path, *holders)

    def _evaluate(self):
        if distributed.is_main():
            sheet = self.folder / f"translation_{self.step.epoch:03}.jpg"
            translation.draw(sheet, self.step.evaluated, self.domains, self.args, self.device)
        return {}

    def _state(self, best, evaluated):
        return translation.checkpoint_state(self.networks, self.network_options, *self.steps, self.pools, self.args)


def main(args):
    device = distributed.setup(args.device, args.timeout)  # joins the process group, where torchrun started one
    seed_everything(args.seed, args.deterministic)
    say = Announcer()
    if args.translate:
        translation.check_new_folder(args.translate)
    elif args.weights or args.feature_distance:
        raise InputError("--weights and --feature-distance need a translated set: give --translate OUT")
    distance_in = None
    if args.feature_distance:
        state = load_state(args.feature_distance, "reid", backbone=args.backbone, model=args.model)
        distance_in = reid.network_from_checkpoint(args.feature_distance, device, state)
    if args.weights:
        return translate_alone(distance_in, args, device, say)
    check_loggers(args)
    networks, network_options = build_networks(args)  # what no network can be is said before data are made
    domains = translation.load_domains(args, say)
    networks = networks.to(device, memory_format=memory_format(args))
    loader = translation.BothDomains(args, *domains, device)
    generator_step, judge_step = (
        build_step([networks[name] for name in part if name in networks], args, device, len(loader))
        for part in (GENERATORS, JUDGES)
    )
    pools = {name: ImagePool(args.pool) for name in ("target_pool", "source_pool")}

    run = TranslationRun(args, say, networks, network_options, (generator_step, judge_step), pools, domains, device)
    models = {name: distributed.wrap(network, device, args.compile) for name, network in networks.items()}  # DDP
    for _ in run.epochs():
        run.end_epoch(train_one_epoch(networks, models, pools, loader, generator_step, judge_step, args, device))

    last, log = run.folder / "last.pth", run.log
    if args.translate:
        note = {"checkpoint": str(last.absolute()), "method": args.method, "epoch": generator_step.epoch}
        size = (args.height, args.width)
        translation.translate(generator_step.evaluated[0], domains, size, note, distance_in, args, device, log.say)
    else:
        if last.exists():
            log.say(f"next: python train_translation.py --weights {last} --translate OUT")
    log.say(f"done in {(time.perf_counter() - say.start) / 60:.1f} minutes, see {run.folder}")
    log.close()


def translate_alone(distance_in, args, device, say):
    """`--weights`: no training. Source and target are those of the checkpoint where none are given."""
    state = load_checkpoint(args.weights, "gan")
    with as_written(args.weights, "get it again, or give --source and --target"):
        for role in ("source", "target"):
            if getattr(args, role) is None:
                cameras = f"{role}_cameras"
                chosen = getattr(args, cameras) or state["args"][cameras]
                vars(args).update({role: state["args"][role], cameras: chosen})
    roles = ("source", "target") if distance_in else ("source",)
    domains = [translation.load_domain(r, getattr(args, r), getattr(args, f"{r}_cameras"), args, say) for r in roles]
    note = {"checkpoint": args.weights, "method": state["network"].get("method"), "epoch": state["epoch"]}
    generator = translation.generator_from_checkpoint(state, args.weights, device)
    translation.translate(generator, domains, state["input_size"], note, distance_in, args, device, say)


if __name__ == "__main__":
    distributed.run_script(lambda argv: main(options.parse(get_parser(), RECIPES, default_recipe, argv)), sys.argv[1:])
