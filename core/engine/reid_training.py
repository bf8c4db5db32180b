"""What the scripts that train ReID share before their first epoch: settled options, network, optimisers."""

import torch

from core.data.transforms import build_transform
from core.engine import distributed, reid
from core.engine.checkpoint import load_checkpoint
from core.engine.log import check_loggers
from core.engine.object_masks import predicted_masks
from core.engine.optim import build_optimizer, build_scheduler, parameter_groups
from core.engine.options import arguments_of
from core.engine.recipes import LOSSES
from core.engine.step import Step
from core.errors import InputError
from core.losses import build_loss, needs_cosines, needs_logits, needs_mask, needs_pairs
from core.models.reid import MODELS, build_reid_model
from core.models.weights import Unfilled, load_weights


def settle(args):
    """Options that hang on others; the network as `dry_run` leaves it.

    Raises InputError for what is wrong whatever the data are, before any are made.
    """
    published = MODELS[args.model]
    args.backbone, args.neck = args.backbone or published.backbone, args.neck or published.neck
    args.dropout = published.dropout if args.dropout is None else args.dropout
    args.loss = args.loss or "+".join(LOSSES[args.recipe][: 1 + args.backbone.endswith("_with_mask")])
    check_loggers(args)
    check_masks(args)
    if args.mask_checkpoint:
        load_checkpoint(args.mask_checkpoint, "mask_rcnn")
    return check_batch(args)


def load_data(args, say):
    """`ReIDData`, said in a few lines so that a person can stop a run that is not the one they meant.

    What was settled goes into `args`, which the run folder and the checkpoints keep.
    """
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
        check_batch(args)
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


def check_batch(args):
    """Raises InputError where the loss compares pictures and a batch has none to compare, and as `dry_run`."""
    identities = args.ids_per_batch * (distributed.world_size() if args.gather else 1)  # that the loss sees together
    if args.epochs and needs_pairs(args.loss) and min(identities, args.images_per_id) < 2:
        raise InputError(
            f"--loss {args.loss} compares two identities or more with two pictures of each, a batch has {identities} "
            f"and {args.images_per_id}: give more --ids-per-batch (or --gather), --images-per-id, or another --loss"
        )
    normalised = 0 if args.freeze_batch_norm or args.sync_batch_norm else args.ids_per_batch * args.images_per_id
    return dry_run(args, network_options(args, num_classes=2), normalised)


def dry_run(args, network_options, normalised):
    """The network that the options mean, of weights that mean nothing, after black pictures have gone through it.

    normalised: pictures that BatchNorm sees at a time; 0: it doesn't learn.
    Returns the network. Raises InputError for options that make none, for pictures that it can't take, for --weights.
    """
    build_transform(args.height, args.width, training=True, **arguments_of(build_transform, args))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        with Unfilled():
            network = build_reid_model(**network_options)
        images = torch.zeros(min(max(normalised, 1), 2), 3, args.height, args.width)  # more of them change nothing
        try:
            network.train(bool(normalised and args.epochs))(images)
        except ValueError as error:  # torch's, of BatchNorm
            if "more than 1 value per channel" not in str(error):
                raise
            raise InputError(
                f"BatchNorm sees a single value, that of {normalised} picture of {args.height}x{args.width} pixels: "
                "give it more pictures at a time"
            ) from error
    if args.weights not in ("none", "imagenet"):
        load_weights(network, args.weights, network_options["backbone"])
    return network


def check_masks(args):
    """Raises InputError for options of masks that don't go together."""
    wants_mask = needs_mask(args.loss)
    if (args.mask_target == "predicted") != bool(args.mask_checkpoint):
        raise InputError("--mask-target predicted and --mask-checkpoint PATH belong together: give both or neither")
    if args.mask_checkpoint and not wants_mask and not args.hide_background:
        raise InputError(
            "--mask-target predicted: nothing would use the masks: use a --backbone ..._with_mask, or --hide-background"
        )
    if wants_mask and not args.backbone.endswith("_with_mask"):
        raise InputError(f"--loss {args.loss} needs a mask: use --backbone {args.backbone}_with_mask")
    if args.mask_decoder != "full" and not wants_mask:
        raise InputError(f"--mask-decoder {args.mask_decoder}: use a --backbone ..._with_mask and a --loss with a mask")
    if args.mask_pooling != "off" and not wants_mask:
        raise InputError(
            f"--mask-pooling {args.mask_pooling} needs a mask that is learned: use a --backbone ..._with_mask, and a "
            "--loss with a mask in it such as 1*combined_mask"
        )


def settled_mask_target(args, data):
    """What masks are regressed on; None where no loss regresses masks. Raises InputError where needed masks lack."""
    has_masks = bool(args.mask_checkpoint) or all(sample.mask is not None for sample in data.train)
    if args.hide_background and not has_masks:
        raise InputError(
            "--hide-background needs a mask of every training picture: use data with segmentation, or --mask-target "
            "predicted with --mask-checkpoint"
        )
    wanted = args.mask_target or ("instance" if has_masks else "gaussian")
    return wanted if needs_mask(args.loss) else None


def network_options(args, num_classes):
    """The arguments of `build_reid_model`. A classifier or decoder that no loss asks for would be a parameter without
    gradient, which DDP refuses."""
    own = {"backbone": args.backbone, "num_classes": num_classes if needs_logits(args.loss) else 0}
    own |= {**arguments_of(build_reid_model, args), "with_mask": needs_mask(args.loss)}
    return {**own, "cosine": needs_cosines(args.loss)}


def build_network(args, data, say):
    """(network with its weights, loss, arguments of the network); a decoder only where a loss asks for masks."""
    wants_mask = needs_mask(args.loss)
    if args.backbone.endswith("_with_mask") and not wants_mask:
        say(f"no loss in {args.loss} uses a mask: no mask decoder is built")
    if wants_mask and args.mask_threshold and args.mask_target != "gaussian":
        say(f"--mask-threshold is for Gaussian targets: every pixel counts with --mask-target {args.mask_target}")
    num_classes = len({sample.id for sample in data.train})
    options = network_options(args, num_classes)
    network = build_reid_model(**options)
    learns = {parameter for parameter in network.parameters() if parameter.requires_grad}
    if args.freeze_epochs and learns <= set(network.backbone.parameters()):
        raise InputError("--freeze-epochs leaves nothing to learn: the loss trains no part but the frozen backbone")
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
    return network, build_loss(args.loss, num_classes, network.feature_dim, **how), options


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
