"""Train a re-identification network with labels: BoT baseline, IBN, mask-guided.

One process, one GPU or the CPU:
    torchrun train_reid.py --backbone resnet101_with_mask
    torchrun train_reid.py --dataset market1501 --data PATH
All GPUs of a machine:
    bash run_ddp.sh train_reid.py --dataset market1501 --data PATH --gather
Several machines, the same line on each (NODE_RANK 0, 1, ...):
    NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash run_ddp.sh train_reid.py ...

Without --data the run makes a small set of baggage pictures and trains on it.
Everything lands in runs/<name>/.
"""

import sys

from core.engine import options
from core.engine.recipes import PUBLISHED, RECIPES, default_recipe


def get_parser():
    parser = options.Parser(__doc__)
    options.add_reid_data_options(parser, several=True)
    group = options.add_reid_batch_options(parser)
    group.add_argument("--augmentation-preview", action="store_true", help="draw pictures for the network, and stop")
    options.add_reid_network_options(parser)
    options.add_reid_loss_options(parser)
    options.add_optimizer_options(parser)
    options.add_reid_evaluation_options(parser)
    options.add_run_options(parser)
    return parser


if __name__ == "__main__":
    options.answer_help(get_parser(), RECIPES, PUBLISHED)  # before torch is imported, which takes seconds

from core.engine import distributed, reid, reid_pictures
from core.engine.epoch import Epoch, seed_everything
from core.engine.log import Announcer, preview
from core.engine.reid_run import ReIDRun
from core.engine.reid_training import build_loaders, build_network, build_step, load_data, settle
from core.engine.step import autocast, memory_format
from core.errors import InputError


def train_one_epoch(model, criterion, loader, step, args, device, frozen=()):
    """One pass over the training pictures; returns the row of the log.

    frozen: modules of the model that stay in evaluation mode.
    """
    model.train()
    for module in frozen:
        module.eval()
    progress = Epoch(loader, step.epoch + 1, args.seed)
    for batch in progress:
        images = batch["image"].to(device, non_blocking=True, memory_format=memory_format(args))  # (B, 3, H, W)
        labels = batch["id"].to(device)  # (B,)
        masks = reid.target_masks(batch, args.mask_target, args.mask_size, args.sigma_ratio, device)  # (B, 1, h, w)
        with step.forward(model), autocast(device, args.amp):
            output = model(images)  # embedding (B, D); features, logits: a list of branches; mask (B, 1, h, w)
        losses = criterion(output, labels, masks)  # name -> weighted scalar
        progress.add(step(losses, batch["path"]))
    rate = step.end_epoch()
    return {"epoch": step.epoch, "lr": rate, **progress.row()}


def main(args):
    device = distributed.setup(args.device, args.timeout)  # joins the process group, where torchrun started one
    seed_everything(args.seed, args.deterministic)
    if args.sync_batch_norm and device.type != "cuda":
        raise InputError(f"--sync-batch-norm works on CUDA alone, this run is on {device.type}")
    settle(args)  # what is wrong with the options is said before data are made
    say = Announcer()
    data = load_data(args, say)
    network, criterion, network_options = build_network(args, data, say)
    data, loaders = build_loaders(args, data, device, say)
    if args.augmentation_preview:
        return preview(args.output, lambda path: reid_pictures.draw_augmentations(path, loaders[0].dataset))
    network, criterion = network.to(device, memory_format=memory_format(args)), criterion.to(device)
    step = build_step(network, criterion, args, device, len(loaders[0]))

    run = ReIDRun(args, say, network, network_options, criterion, step, data, loaders, device)
    first_epoch = step.epoch + 1
    for epoch in run.epochs():
        if epoch in (first_epoch, args.freeze_epochs + 1):  # DDP listens to the parameters that want a gradient now
            frozen = reid.freeze(network, network.backbone, epoch <= args.freeze_epochs, args.freeze_batch_norm)
            model = distributed.wrap(network, device, compiled=args.compile)  # DistributedDataParallel
        run.end_epoch(train_one_epoch(model, criterion, loaders[0], step, args, device, frozen))
    run.close()


if __name__ == "__main__":
    distributed.run_script(
        lambda argv: main(options.parse(get_parser(), RECIPES, default_recipe, argv, PUBLISHED)), sys.argv[1:]
    )
