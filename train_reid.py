"""Train a re-identification network with labels: BoT baseline, IBN, mask-guided.

One process, one GPU or the CPU:
    torchrun train_reid.py --backbone resnet101_with_mask
    torchrun train_reid.py --dataset market1501 --data PATH --backbone resnet50
All GPUs of a machine:
    bash run_ddp.sh train_reid.py --dataset market1501 --data PATH --backbone resnet50 --gather
Several machines, the same line on each (NODE_RANK 0, 1, ...):
    NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash run_ddp.sh train_reid.py --dataset msmt17 --data PATH --amp bf16

Without --data the run makes a small set of baggage pictures and trains on it. Everything lands in runs/<name>/.
"""

import sys
import time

import torch

from core.engine import distributed, options, reid, reid_pictures
from core.engine.checkpoint import changed_options, load_checkpoint, open_run, save_run
from core.engine.epoch import Epoch, seed_everything
from core.engine.log import Announcer, RunLog, check_loggers, preview
from core.engine.object_masks import predicted_masks
from core.engine.optim import build_optimizer, build_scheduler
from core.engine.options import arguments_of
from core.engine.step import Step, autocast, memory_format
from core.errors import InputError
from core.losses import build_loss, needs_logits, needs_mask, needs_pairs
from core.models.reid import build_reid_model
from core.models.weights import load_weights
from core.retrieval.ranking import METRIC_NAMES

RECIPES = {
    # Luo et al. 2019, "Bag of Tricks and A Strong Baseline for Deep Person Re-identification"; add the center loss
    # with --loss "1*cross_entropy+1*triplet+0.0005*center".
    "bot": {
        "height": 256, "width": 128, "ids_per_batch": 16, "images_per_id": 4, "pooling": "avg",
        "optimizer": "adam", "lr": 3.5e-4, "weight_decay": 5e-4, "epochs": 120, "schedule": "multistep",
        "milestones": [40, 70], "gamma": 0.1, "warmup_steps": 10, "warmup_factor": 0.01,
        "label_smoothing": 0.1, "margin": 0.3, "flip": 0.5, "pad": 10, "erasing": 0.5, "mask_target": "gaussian",
    },
    # The suitcase fork of OpenUnReID on MVB.
    "suitcase": {
        "height": 256, "width": 256, "ids_per_batch": 8, "images_per_id": 4, "pooling": "gem", "dropout": 0.3,
        "optimizer": "adam", "lr": 5e-4, "weight_decay": 5e-4, "epochs": 100, "iterations_per_epoch": 200,
        "schedule": "cosine", "min_lr": 5e-5, "label_smoothing": 0.1,
        "flip": 0.5, "pad": 10, "autoaugment": True, "blur": 0.3, "erasing": 0.7,
        "mask_target": "gaussian", "sigma_ratio": 0.1, "mask_threshold": 0.1,
    },
    # Small pictures and few epochs: the whole run in minutes on two CPU cores.
    "quick": {
        "height": 64, "width": 64, "ids_per_batch": 8, "images_per_id": 4, "pooling": "avg",
        "optimizer": "adam", "lr": 1e-3, "weight_decay": 5e-4, "epochs": 8, "iterations_per_epoch": 20,
        "schedule": "cosine", "min_lr": 1e-5,
        "warmup_steps": 1, "warmup_factor": 0.1, "label_smoothing": 0.1, "margin": 0.3,
        "flip": 0.5, "pad": 4, "erasing": 0.3,
    },
}  # fmt: skip

# What --loss is where none is given; the second part is added for a backbone with a mask decoder.
LOSSES = {
    "bot": ("1*cross_entropy+1*triplet", "0.05*gaussian_mask"),
    "suitcase": ("1*cross_entropy+1*softmax_triplet", "0.05*gaussian_mask"),
    "quick": ("1*cross_entropy+1*triplet", "1*combined_mask"),
}


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


def default_recipe(args):
    return "quick" if args.data is None and args.dataset in (None, *reid.BACKGROUNDS) else "bot"


def load_data(args, say):
    """`ReIDData`, said in a few lines so that a person can stop a run that is not the one they meant.

    What was settled goes into `args`, which the run folder and the checkpoints keep.
    """
    args.loss = args.loss or "+".join(LOSSES[args.recipe][: 1 + args.backbone.endswith("_with_mask")])
    identities = args.ids_per_batch * (distributed.world_size() if args.gather else 1)  # that the loss sees together
    if args.epochs and needs_pairs(args.loss) and min(identities, args.images_per_id) < 2:
        raise InputError(
            f"--loss {args.loss} compares two identities or more with two pictures of each, a batch has {identities} "
            f"and {args.images_per_id}: give more --ids-per-batch (or --gather), --images-per-id, or another --loss"
        )
    if args.recipe == "quick":
        say(
            "recipe quick: small pictures and few epochs, for a whole run in minutes; --dataset and --data name your "
            "own pictures, --recipe bot or suitcase trains in earnest"
        )
    data = reid.load_data(args, say, training=True)
    args.dataset, args.data, args.protocol = data.name, data.root, data.protocol
    args.mask_target = settled_mask_target(args, data)
    args.name = args.name or f"reid-{args.dataset}-{args.backbone}"
    say(f"data: {data.name} in {data.root}: {reid.describe(data)}; protocol {data.protocol}")
    processes, batch = distributed.world_size(), args.ids_per_batch * args.images_per_id
    say(
        f"batch: {args.ids_per_batch} identities x {args.images_per_id} pictures x {processes} processes "
        f"x {args.accumulate} batches an update = {batch * processes * args.accumulate} pictures"
    )
    if args.recipe == "suitcase" and not args.backbone.endswith("_with_mask"):
        say(f"recipe suitcase learns masks too, with --backbone {args.backbone}_with_mask")
    target = f", mask target {args.mask_target}" if args.mask_target else ""
    say(f"network: {args.backbone}; loss: {args.loss}{target}")
    return data


def settled_mask_target(args, data):
    """What masks are regressed on; None where no loss regresses masks. Raises InputError where needed masks lack."""
    if (args.mask_target == "predicted") != bool(args.mask_checkpoint):
        raise InputError("--mask-target predicted and --mask-checkpoint PATH belong together: give both or neither")
    if args.mask_checkpoint and not needs_mask(args.loss) and not args.hide_background:
        raise InputError(
            "--mask-target predicted: nothing would use the masks: use a --backbone ..._with_mask, or --hide-background"
        )
    has_masks = bool(args.mask_checkpoint) or all(sample.mask is not None for sample in data.train)
    if args.hide_background and not has_masks:
        raise InputError(
            "--hide-background needs a mask of every training picture: use data with segmentation, or --mask-target "
            "predicted with --mask-checkpoint"
        )
    wanted = args.mask_target or ("instance" if has_masks else "gaussian")
    return wanted if needs_mask(args.loss) else None


def build_network(args, data, say):
    """(network with its weights, loss, arguments of the network); a decoder only where a loss asks for masks."""
    wants_mask, has_decoder = needs_mask(args.loss), args.backbone.endswith("_with_mask")
    if wants_mask and not has_decoder:
        raise InputError(f"--loss {args.loss} needs a mask: use --backbone {args.backbone}_with_mask")
    if has_decoder and not wants_mask:
        say(f"no loss in {args.loss} uses a mask: no mask decoder is built")
    if args.mask_decoder != "full" and not wants_mask:
        raise InputError(f"--mask-decoder {args.mask_decoder}: use a --backbone ..._with_mask and a --loss with a mask")
    if args.mask_pooling != "off" and not wants_mask:
        raise InputError(
            f"--mask-pooling {args.mask_pooling} needs a mask that is learned: use a --backbone ..._with_mask, and a "
            "--loss with a mask in it such as 1*combined_mask"
        )
    if args.mask_pooling == "branch" and "center" in args.loss:
        raise InputError("--loss center has one center for each identity, --mask-pooling branch two features: use soft")
    if wants_mask and args.mask_threshold and args.mask_target != "gaussian":
        say(f"--mask-threshold is for Gaussian targets: every pixel counts with --mask-target {args.mask_target}")
    # A classifier or decoder that no loss asks for would be a parameter without gradient, which DDP refuses.
    num_classes = len({sample.id for sample in data.train})
    network_options = {"backbone": args.backbone, "num_classes": num_classes if needs_logits(args.loss) else 0}
    network_options |= {**arguments_of(build_reid_model, args), "with_mask": wants_mask}
    network = build_reid_model(**network_options)
    with distributed.main_first():  # one process downloads, the others find the file
        report = load_weights(network, args.weights, args.backbone)
    say(f"warning: {report.message}" if report.warning else report.message)
    if args.sync_batch_norm:
        network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
    how = arguments_of(build_loss, args) | {"gather": distributed.gather_with_gradient if args.gather else None}
    how["mask_threshold"] = args.mask_threshold if args.mask_target == "gaussian" else 0.0
    return network, build_loss(args.loss, num_classes, network.feature_dim, **how), network_options


def build_step(network, criterion, args, device, batches_per_epoch):
    """`Step` with the optimiser of the network, and one of the loss where it has parameters."""
    optimizer = build_optimizer(network.parameters(), args.optimizer, args.lr, **arguments_of(build_optimizer, args))
    schedule = {**arguments_of(build_scheduler, args), "epochs": max(args.epochs, 1)}
    optimizers = [optimizer]
    # The pace of the centers does not depend on the weight of their loss (Luo et al. 2019).
    if list(criterion.parameters()):
        optimizers.append(torch.optim.SGD(criterion.parameters(), lr=args.center_lr / criterion.parameter_scale))
    scheduler = build_scheduler(optimizer, args.schedule, **schedule)
    return Step([network], optimizers, scheduler, args, device, batches_per_epoch=batches_per_epoch)


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
    rate = step.scheduler.get_last_lr()[0]
    step.end_epoch()
    return {"epoch": step.epoch, "lr": rate, **progress.row()}


def main(args):
    start = time.perf_counter()
    device = distributed.setup(args.device, args.timeout)  # joins the process group, where torchrun started one
    seed_everything(args.seed, args.deterministic)
    if args.sync_batch_norm and device.type != "cuda":
        raise InputError(f"--sync-batch-norm works on CUDA alone, this run is on {device.type}")
    say = Announcer()
    data = load_data(args, say)
    network, criterion, network_options = build_network(args, data, say)
    if args.mask_checkpoint:  # hours, where the data is large: after whatever may be wrong with the options
        masked = predicted_masks(data.train, data.root, args.mask_checkpoint, device, amp=args.amp, say=say)
        data = data._replace(train=masked)
    train_loader = reid.build_train_loader(args, data, device)
    if args.augmentation_preview:
        return preview(args.output, lambda path: reid_pictures.draw_augmentations(path, train_loader.dataset))
    eval_loaders = reid.query_gallery_loaders(args, data, device)
    if args.mask_target in ("gaussian", "box") and not train_loader.dataset.has_boxes:
        say("the data has no boxes: the mask target is made from the centre of each picture")
    network, criterion = network.to(device, memory_format=memory_format(args)), criterion.to(device)
    step = build_step(network, criterion, args, device, len(train_loader))

    check_loggers(args)
    folder, resumed = open_run(args.output, args.name, args.resume)
    best = -1.0
    if resumed:
        state = load_checkpoint(resumed, "reid")
        reid.resume(state, resumed, network, network_options, criterion, step, data)
        best = state["best"]
        say(f"continuing from {resumed} after epoch {step.epoch}{changed_options(state['args'], args)}")
    elif args.resume:
        say(f"--resume: no checkpoint of {args.name} under {args.output}, starting afresh")
    say(f"run folder: {folder}")
    log = RunLog(folder, args, METRIC_NAMES, say.said, resume_epoch=step.epoch if resumed else None)
    evaluation = None
    if not resumed:
        if distributed.is_main():
            reid_pictures.draw_augmentations(folder / "augmentation.png", train_loader.dataset)
        evaluation = reid.evaluate(step.evaluated[0], eval_loaders, data, args, device)
        log.epoch({"epoch": 0, **(evaluation.metrics if evaluation else {})})

    first_epoch = step.epoch + 1
    for epoch in range(first_epoch, args.epochs + 1):
        if epoch in (first_epoch, args.freeze_epochs + 1):  # DDP listens to the parameters that want a gradient now
            frozen = reid.freeze(network, network.backbone, epoch <= args.freeze_epochs, args.freeze_batch_norm)
            model = distributed.wrap(network, device, compiled=args.compile)  # DistributedDataParallel
        row = train_one_epoch(model, criterion, train_loader, step, args, device, frozen)
        is_evaluated = epoch % args.eval_every == 0 or epoch == args.epochs
        evaluation = reid.evaluate(step.evaluated[0], eval_loaders, data, args, device) if is_evaluated else None
        row |= evaluation.metrics if evaluation else {}
        log.epoch(row)
        improved = row.get("mAP", -1.0) > best
        best = row["mAP"] if improved else best
        threshold = evaluation and reid.threshold(evaluation.query, evaluation.gallery, data, args)
        if distributed.is_main():
            state = reid.checkpoint_state(network, network_options, criterion, step, best, args, data, threshold)
            save_run(folder, state, improved)

    if evaluation is None:  # a finished run that was resumed
        evaluation = reid.evaluate(step.evaluated[0], eval_loaders, data, args, device)
    if evaluation and distributed.is_main():
        draw_results(folder, step.evaluated[0], evaluation, eval_loaders[0].dataset, data, args, device)
    log.say(f"done in {(time.perf_counter() - start) / 60:.1f} minutes, see {folder}")
    if (folder / "best.pth").exists():
        log.say(f"best mAP {100 * best:.1f}; next: python evaluate.py {folder / 'best.pth'} --rerank")
    log.close()


def draw_results(folder, network, evaluation, images, data, args, device):
    """Whom the trained network finds, and with a mask decoder where it sees the object."""
    reid_pictures.draw_rank_list(folder / "rank_list.png", evaluation.query, evaluation.gallery, data, args.distance)
    if network.mask_decoder is not None:
        reid_pictures.draw_masks(folder / "masks.png", network, images, device)


if __name__ == "__main__":
    distributed.run_script(lambda argv: main(options.parse(get_parser(), RECIPES, default_recipe, argv)), sys.argv[1:])
