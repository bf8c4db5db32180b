"""What the scripts that train ReID share before their first epoch: recipes, settled options, network, optimisers."""

import torch

from core.engine import distributed, reid
from core.engine.object_masks import predicted_masks
from core.engine.optim import build_optimizer, build_scheduler, parameter_groups
from core.engine.options import arguments_of
from core.engine.step import Step
from core.errors import InputError
from core.losses import build_loss, needs_cosines, needs_logits, needs_mask, needs_pairs
from core.models.reid import MODELS, build_reid_model
from core.models.weights import load_weights

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
    # Herzog et al. 2021, "Lightweight Multi-Branch Network for Person Re-Identification"; settings of its code, which
    # crops out of 1.05 times the size where we pad.
    "lightmbn": {
        "model": "lmbn_n", "height": 384, "width": 128, "ids_per_batch": 6, "images_per_id": 8, "embedding_dim": 512,
        "optimizer": "adam", "lr": 6e-4, "weight_decay": 5e-4, "epochs": 130, "schedule": "cosine_to_min",
        "min_lr": 6e-7, "warmup": "count", "warmup_steps": 10, "label_smoothing": 0.1, "margin": 0.7,
        "flip": 0.5, "pad": 10, "erasing": 0.5,
    },
    # Sun et al. 2018, "Beyond Part Models"; settings of its code.
    "pcb": {
        "model": "pcb", "neck": "none", "height": 384, "width": 128, "ids_per_batch": 64,
        "images_per_id": 1, "embedding_dim": 256, "dropout": 0.5, "optimizer": "sgd", "nesterov": True,
        "momentum": 0.9, "lr": 0.01, "head_lr": 0.1, "weight_decay": 5e-4, "epochs": 60, "schedule": "step",
        "step_size": 40, "gamma": 0.1, "label_smoothing": 0.0, "flip": 0.5, "pad": 0, "erasing": 0.0,
    },
    # Wang et al. 2018, "Learning Discriminative Features with Multiple Granularities".
    "mgn": {
        "model": "mgn", "height": 384, "width": 128, "ids_per_batch": 16, "images_per_id": 4, "embedding_dim": 256,
        "optimizer": "sgd", "momentum": 0.9, "lr": 0.01, "weight_decay": 5e-4, "epochs": 80, "schedule": "multistep",
        "milestones": [40, 60], "gamma": 0.1, "label_smoothing": 0.0, "margin": 1.2,
        "flip": 0.5, "pad": 0, "erasing": 0.0,
    },
    # Zhou et al. 2019, "Omni-Scale Feature Learning"; settings of torchreid.
    "osnet": {
        "backbone": "osnet_x1_0", "neck": "none", "height": 256, "width": 128, "ids_per_batch": 64,
        "images_per_id": 1, "optimizer": "amsgrad", "lr": 1.5e-3, "weight_decay": 5e-4, "epochs": 150,
        "freeze_epochs": 10, "schedule": "step", "step_size": 60, "gamma": 0.1, "label_smoothing": 0.1,
        "flip": 0.5, "pad": 0, "erasing": 0.0, "distance": "euclidean",
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
    "lightmbn": ("0.5*cross_entropy+0.5*multi_similarity",),
    "pcb": ("1*cross_entropy",),
    "mgn": ("0.125*cross_entropy+0.333*triplet",),  # the means over its 8 and 3 branches, as sums
    "osnet": ("1*cross_entropy",),
    "quick": ("1*cross_entropy+1*triplet", "1*combined_mask"),
}

# What the help says of a recipe: its published mAP / Rank-1, and where other data want other settings.
PUBLISHED = {
    "bot": "published: Market-1501 85.7 / 94.1, DukeMTMC 75.9 / 86.2, with the center loss 85.9 / 94.5, 76.4 / 86.4",
    "lightmbn": "published: Market-1501 91.5 / 96.3 (re-ranked 95.3 / 96.8), DukeMTMC 83.7 / 92.1, CUHK03 labeled 85.1 "
    "/ 87.2; with --model lmbn_r Market-1501 90.5 / 96.1. CUHK03 wants --ids-per-batch 8 --epochs 180 --lr 3.5e-4, "
    "or ends ten points lower",
    "pcb": "published: Market-1501 77.4 / 92.3",
    "mgn": "published: Market-1501 86.9 / 95.7, DukeMTMC 78.4 / 88.7",
    "osnet": "published: Market-1501 82.6 / 94.2; with --backbone osnet_x0_25 --lr 0.003 --epochs 180 --step-size 80 "
    "--ids-per-batch 128 Market-1501 75.0 / 91.2",
}


def default_recipe(args):
    return "quick" if args.data is None and args.dataset in (None, *reid.BACKGROUNDS) else "bot"


def load_data(args, say):
    """`ReIDData`, said in a few lines so that a person can stop a run that is not the one they meant.

    What was settled goes into `args`, which the run folder and the checkpoints keep.
    """
    published = MODELS[args.model]
    args.backbone, args.neck = args.backbone or published.backbone, args.neck or published.neck
    args.dropout = published.dropout if args.dropout is None else args.dropout
    args.loss = args.loss or "+".join(LOSSES[args.recipe][: 1 + args.backbone.endswith("_with_mask")])
    check_pairs(args)
    if args.recipe == "quick":
        say(
            "recipe quick: small pictures and few epochs, for a whole run in minutes; --dataset and --data name your "
            "own pictures, --recipe bot or suitcase trains in earnest"
        )
    data = reid.load_data(args, say, training=True)
    args.dataset, args.data, args.protocol = data.name, data.root, data.protocol
    args.mask_target = settled_mask_target(args, data)
    network = args.backbone if args.model == "bot" else f"{args.model}-{args.backbone}"
    args.name = args.name or f"reid-{args.dataset}-{network}"
    where = data.root if isinstance(data.root, str) else " and ".join(data.root)
    say(f"data: {data.name} in {where}: {reid.describe(data)}; protocol {data.protocol}")
    processes = distributed.world_size()
    identities = len({sample.id for sample in data.train})
    if processes <= identities < args.ids_per_batch * processes:
        wanted, args.ids_per_batch = args.ids_per_batch, identities // processes
        say(f"--ids-per-batch {wanted} is more than the {identities} identities give: it is {args.ids_per_batch} now")
        check_pairs(args)
    batch = args.ids_per_batch * args.images_per_id
    say(
        f"batch: {args.ids_per_batch} identities x {args.images_per_id} pictures x {processes} processes "
        f"x {args.accumulate} batches an update = {batch * processes * args.accumulate} pictures"
    )
    if args.recipe == "suitcase" and not args.backbone.endswith("_with_mask"):
        say(f"recipe suitcase learns masks too, with --backbone {args.backbone}_with_mask")
    target = f", mask target {args.mask_target}" if args.mask_target else ""
    say(f"network: {network}; loss: {args.loss}{target}")
    return data


def check_pairs(args):
    """Raises InputError where the loss compares pictures, and what it sees together has nothing to compare."""
    identities = args.ids_per_batch * (distributed.world_size() if args.gather else 1)
    if args.epochs and needs_pairs(args.loss) and min(identities, args.images_per_id) < 2:
        raise InputError(
            f"--loss {args.loss} compares two identities or more with two pictures of each, a batch has {identities} "
            f"and {args.images_per_id}: give more --ids-per-batch (or --gather), --images-per-id, or another --loss"
        )


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
    if wants_mask and args.mask_threshold and args.mask_target != "gaussian":
        say(f"--mask-threshold is for Gaussian targets: every pixel counts with --mask-target {args.mask_target}")
    # A classifier or decoder that no loss asks for would be a parameter without gradient, which DDP refuses.
    num_classes = len({sample.id for sample in data.train})
    network_options = {"backbone": args.backbone, "num_classes": num_classes if needs_logits(args.loss) else 0}
    network_options |= {**arguments_of(build_reid_model, args), "with_mask": wants_mask}
    network_options["cosine"] = needs_cosines(args.loss)
    network = build_reid_model(**network_options)
    with torch.inference_mode():
        network.eval()(torch.zeros(1, 3, args.height, args.width))  # more parts than rows are refused before any work
    network.train()
    with distributed.main_first():  # one process downloads, the others find the file
        report = load_weights(network, args.weights, args.backbone)
    say(f"warning: {report.message}" if report.warning else report.message)
    if args.freeze_epochs and not report.loaded:
        say(f"warning: --freeze-epochs {args.freeze_epochs} keeps a backbone of random weights: give --weights, or 0")
    if args.sync_batch_norm:
        network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
    how = arguments_of(build_loss, args) | {"gather": distributed.gather_with_gradient if args.gather else None}
    how |= {"logit_names": network.logit_names, "feature_names": network.feature_names}
    how["mask_threshold"] = args.mask_threshold if args.mask_target == "gaussian" else 0.0
    return network, build_loss(args.loss, num_classes, network.feature_dim, **how), network_options


def build_loaders(args, data, device, say):
    """(data, with predicted masks where --mask-checkpoint is given; loaders of training, query and gallery).

    Predicting takes hours, where the data is large: after whatever may be wrong with the options.
    """
    if args.mask_checkpoint:
        masked = predicted_masks(data.train, data.root, args.mask_checkpoint, device, amp=args.amp, say=say)
        data = data._replace(train=masked)
    train_loader = reid.build_train_loader(args, data, device)
    if args.mask_target in ("gaussian", "box") and not train_loader.dataset.has_boxes:
        say("the data has no boxes: the mask target is made from the centre of each picture")
    return data, (train_loader, *reid.query_gallery_loaders(args, data, device))


def build_step(network, criterion, args, device, batches_per_epoch, *, peers=(), adapters=()):
    """`Step` with the optimiser of the network, and one of the loss where it has parameters.

    peers: (network, criterion) of others that learn with it. adapters: parameters of no network that learn as it does.
    """
    networks, criteria = zip((network, criterion), *peers, strict=True)
    groups = [group for one in networks for group in parameter_groups(one, args.head_lr)]
    groups += [{"params": list(adapters)}] if adapters else []
    optimizer = build_optimizer(groups, args.optimizer, args.lr, **arguments_of(build_optimizer, args))
    schedule = {**arguments_of(build_scheduler, args), "epochs": max(args.epochs, 1)}
    optimizers = [optimizer]
    # The pace of the centers does not depend on the weight of their loss (Luo et al. 2019).
    if centers := [parameter for one in criteria for parameter in one.parameters()]:
        optimizers.append(torch.optim.SGD(centers, lr=args.center_lr / criterion.parameter_scale))
    scheduler = build_scheduler(optimizer, args.schedule, **schedule)
    return Step(networks, optimizers, scheduler, args, device, batches_per_epoch=batches_per_epoch)
