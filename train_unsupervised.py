"""Train a re-identification network without labels, or with another domain's.

One process, one GPU or the CPU:
    torchrun train_unsupervised.py --target market1501:PATH
    torchrun train_unsupervised.py --method spcl --source dukemtmc:PATH \\
        --target market1501:PATH
    torchrun train_unsupervised.py --target pictures:FOLDER --weights FILE
All GPUs of a machine, here 4 (P is per process: 4 x 4 identities):
    bash run_ddp.sh train_unsupervised.py --target NAME:PATH --ids-per-batch 4
Several machines, the same line on each (NODE_RANK 0, 1, ...):
    NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 \\
        bash run_ddp.sh train_unsupervised.py --target msmt17:PATH --amp bf16

Each epoch the pictures of the target are clustered by what the network sees,
and the clusters are learned as if they were identities. Identities that the
target's data name only judge the result. Everything lands in runs/<name>/.
"""

import sys

from core.engine import options
from core.engine.options import arguments_of

# Neighbors in the Jaccard distance up to which pictures are near, where --eps gives none.
EPS = {"strong_baseline": [0.6], "uda_tp": [0.6], "mmt": [0.7], "spcl": [0.58, 0.6, 0.62], "cluster_contrast": [0.6]}
WITH_CLASSIFIER = ("strong_baseline", "mmt")
# OpenUnReID on 4 GPUs of 16 pictures; of each set of the run as many.
OPENUNREID = {
    "height": 256, "width": 128, "ids_per_batch": 16, "images_per_id": 4, "iterations_per_epoch": 400,
    "pooling": "gem", "flip": 0.5, "pad": 10, "erasing": 0.5, "batch_norm_group": 16, "optimizer": "adam", "lr": 3.5e-4,
    "weight_decay": 5e-4, "epochs": 50, "schedule": "step", "step_size": 20, "gamma": 0.1, "eval_every": 5,
}  # fmt: skip
RECIPES = {
    "strong_baseline": OPENUNREID,
    "uda_tp": OPENUNREID,  # Song et al. 2020, "Unsupervised Domain Adaptive Re-Identification: Theory and Practice"
    "mmt": {**OPENUNREID, "ema": 0.999},  # Ge et al. 2020, "Mutual Mean-Teaching"
    "spcl": OPENUNREID,  # Ge et al. 2020, "Self-paced Contrastive Learning with Hybrid Memory"
    # Dai et al. 2021, "Cluster Contrast": 4 GPUs of 64 pictures; 400 iterations for MSMT17 and VeRi-776.
    "cluster_contrast": {**OPENUNREID, "images_per_id": 16, "iterations_per_epoch": 200, "batch_norm_group": 64},
    # Small pictures and few epochs: the whole run in minutes on two CPU cores.
    "quick": {
        "backbone": "resnet18", "height": 64, "width": 64, "ids_per_batch": 8, "images_per_id": 4,
        "iterations_per_epoch": 20, "pooling": "gem", "flip": 0.5, "pad": 4, "erasing": 0.3, "k1": 15, "min_samples": 3,
        "optimizer": "adam", "lr": 3.5e-4, "weight_decay": 5e-4, "epochs": 8, "schedule": "cosine", "min_lr": 1e-5,
        "ema": 0.9,
    },
}  # fmt: skip
PUBLISHED = {
    "strong_baseline": "mAP / Rank-1: Market-1501 without labels 70.5 / 87.9, from DukeMTMC 75.6 / 90.9",
    "uda_tp": "mAP / Rank-1: Market-1501 without labels 34.7 / 58.6, from DukeMTMC 52.3 / 76.0; no source "
    "in its batches: train on the source by train_reid.py, then give --weights",
    "mmt": "mAP / Rank-1: Market-1501 without labels 74.3 / 88.1, from DukeMTMC 80.9 / 92.2",
    "spcl": "mAP / Rank-1: Market-1501 without labels 76.0 / 89.5, from DukeMTMC 78.2 / 90.5",
    "cluster_contrast": "mAP / Rank-1: Market-1501 without labels 82.1 / 92.3",
}


def default_recipe(args):
    return args.method if args.target else "quick"


def get_parser():
    parser = options.Parser(__doc__)
    group = parser.add_argument_group("method and data")
    group.add_argument("--method", choices=EPS, default="cluster_contrast", help="see the recipe of the same name")
    group.add_argument(
        "--target", nargs="+", default=[], metavar="NAME:PATH", help="set to learn without labels, with a name of "
        "train_reid.py --dataset, or pictures: any below the folder (default: synthetic)"
    )  # fmt: skip
    group.add_argument(
        "--source", nargs="+", default=[], metavar="NAME:PATH", help="set with labels to learn beside it"
    )
    options.add_picture_options(group)
    group = parser.add_argument_group("pseudo labels")
    group.add_argument("--label-every", type=options.positive_int, default=1, help="epochs between new labels")
    group.add_argument("--k1", type=options.positive_int, default=30, help="neighbours of the Jaccard distance")
    group.add_argument("--k2", type=options.positive_int, default=6, help="neighbours that share an encoding")
    group.add_argument(
        "--eps", type=options.fraction_below_one, nargs="+", help="Jaccard distance of neighbours in DBSCAN; for spcl "
        "three, tight to loose, or the middle of three 0.02 apart (default: 0.6, for mmt 0.7)"
    )  # fmt: skip
    group.add_argument("--min-samples", type=options.positive_int, default=4, help="pictures around a core of DBSCAN")
    group.add_argument("--clusters", type=options.non_negative_int, default=0, help="of k-means, e.g. 500; 0: DBSCAN")
    group.add_argument("--keep-outliers", action="store_true", help="as clusters of one (spcl always keeps them)")
    options.add_reid_batch_options(parser, masks=False)
    group = parser.add_argument_group("network")
    group.add_argument("--backbone", default="resnet50", help="as in train_reid.py")
    options.add_branch_options(group)
    group.add_argument(
        "--batch-norm-group", type=options.non_negative_int, default=0, help="pictures that BatchNorm sees at a time, "
        "on however many GPUs; 0: those of a process"
    )  # fmt: skip
    options.add_optimizer_options(parser)
    options.add_reid_evaluation_options(parser)
    options.add_run_options(parser)
    return parser


if __name__ == "__main__":
    options.answer_help(get_parser(), RECIPES, PUBLISHED)  # before torch is imported, which takes seconds

import torch
from torch import nn

from core.data.loading import build_loader
from core.data.reid_images import ReIDImages, collate
from core.data.samplers import JointBatches, LabelSampler
from core.data.transforms import build_transform
from core.engine import distributed, reid, reid_pictures
from core.engine.checkpoint import check_same_network, restore
from core.engine.epoch import Epoch, seed_everything
from core.engine.log import Announcer, check_loggers
from core.engine.optim import build_optimizer, build_scheduler
from core.engine.pseudo_labels import PseudoLabels, column_of, load_domains
from core.engine.reid_run import ReIDRun
from core.engine.reid_training import dry_run
from core.engine.step import Step, autocast, memory_format
from core.errors import InputError
from core.layers.norm import group_batch_norm, to_domain_specific, use_domain
from core.losses import CrossEntropyLoss, SoftCrossEntropyLoss, SoftmaxTripletLoss, SoftSoftmaxTripletLoss, TripletLoss
from core.models.reid import build_reid_model
from core.models.weights import load_weights
from core.retrieval.agreement import AGREEMENT_NAMES
from core.retrieval.ranking import METRIC_NAMES


def settle(args):
    """Options that hang on the method. Raises InputError for those that don't go together."""
    args.eps = args.eps or EPS[args.method]
    if args.method == "spcl":
        args.eps = [args.eps[0] - 0.02, args.eps[0], args.eps[0] + 0.02] if len(args.eps) == 1 else args.eps
        args.keep_outliers = True
    wanted = len(EPS[args.method])
    if len(args.eps) != wanted or args.eps != sorted(args.eps) or args.eps[0] < 0 or args.eps[-1] >= 1:
        listed = " ".join(f"{value:g}" for value in args.eps)
        raise InputError(f"--eps {listed}: {args.method} takes {wanted}, ascending, from 0 up and below 1")
    if args.method == "spcl" and args.clusters:
        raise InputError("--clusters: spcl compares clusterings of three eps and has no k-means: leave it out")
    if args.method == "uda_tp" and len(args.source + args.target) > 1:
        raise InputError(
            "--method uda_tp learns from one set, the target: train on the source by train_reid.py and give its "
            "checkpoint as --weights"
        )
    pairs = args.method in ("strong_baseline", "uda_tp", "mmt")  # their triplets need them
    if args.epochs and min(args.images_per_id if pairs else 2, args.ids_per_batch * args.images_per_id) < 2:
        raise InputError(
            f"{args.method} can't learn from {args.ids_per_batch} labels with {args.images_per_id} pictures of each in "
            "a batch: give more --images-per-id, or --ids-per-batch"
        )
    if args.method == "mmt":
        args.ema = args.ema or 0.999


def network_options(args):
    """The arguments of `build_reid_model`."""
    own = {"backbone": args.backbone, "num_classes": int(args.method in WITH_CLASSIFIER), "with_mask": False}
    return own | arguments_of(build_reid_model, args)


def build_networks(args, num_domains, device, say):
    """([network], network options): two networks for mmt."""
    own, networks = network_options(args), []
    for number in range(2 if args.method == "mmt" else 1):
        network = build_reid_model(**own)
        with distributed.main_first():  # one process downloads, the others find the file
            report = load_weights(network, args.weights, args.backbone)
        if not number:
            say(f"warning: {report.message}" if report.warning else report.message)
        for name, parameter in network.neck.named_parameters():  # memories learn it without a classifier, too
            parameter.requires_grad_(name == "weight" and args.method != "uda_tp")
        if num_domains > 1:
            network = to_domain_specific(network, num_domains)
        networks.append(network.to(device, memory_format=memory_format(args)))
    return networks, {**own, "num_domains": num_domains}


def set_batch_norm_group(network, args, device):
    """BatchNorm of `network`, changed in place, sees `--batch-norm-group` pictures at a time: a part of a process's
    batch, or those of several. Comes after the averages are made: nobody can copy a group of processes.

    Raises InputError for a group that can't be.
    """
    size, batch = args.batch_norm_group, args.ids_per_batch * args.images_per_id
    if size in (0, batch):
        return
    if batch % size == 0:
        group_batch_norm(network, size)
        return
    if size % batch or distributed.world_size() % (size // batch):
        raise InputError(
            f"--batch-norm-group {size}: a process has {batch} pictures of a set, and there are "
            f"{distributed.world_size()} processes: give a number that divides a batch, or that whole batches make up"
        )
    if device.type != "cuda":
        raise InputError(f"--batch-norm-group {size} is more than the {batch} pictures of a process, which needs CUDA")
    nn.SyncBatchNorm.convert_sync_batchnorm(network, distributed.group_of(size // batch))


def build_train_loader(args, domains, device):
    """(loader of batches with P x K pictures of every set, for mmt in two views; their `LabelSampler`s)."""
    parts, samples = [], []
    for domain in domains:
        sampler = LabelSampler(
            [sample.id for sample in domain.data.train],
            args.ids_per_batch * args.images_per_id,
            args.images_per_id,
            fill=args.method != "spcl",
            seed=args.seed,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
        parts.append((sampler, len(samples)))
        samples += domain.data.train
    batches = JointBatches(parts * (2 if args.method == "mmt" else 1), args.iterations_per_epoch or None)
    transform = build_transform(args.height, args.width, training=True, **arguments_of(build_transform, args))
    images = ReIDImages(samples, transform, seed=args.seed)
    loader = build_loader(images, collate, device, args.workers, batch_sampler=batches)
    return loader, [sampler for sampler, _ in parts]


def build_step(networks, args, device):
    """One `Step` for all networks; those of mmt have mean teachers."""
    parameters = [parameter for network in networks for parameter in network.parameters()]
    optimizer = build_optimizer(parameters, args.optimizer, args.lr, **arguments_of(build_optimizer, args))
    schedule = {**arguments_of(build_scheduler, args), "epochs": max(args.epochs, 1)}
    scheduler = build_scheduler(optimizer, args.schedule, **schedule)
    return Step(networks, [optimizer], scheduler, args, device, batches_per_epoch=1, teachers=args.method == "mmt")


def train_one_epoch(models, pseudo, loader, step, args, device):
    """One pass over batches of pseudo labels; returns the row of the log. A batch holds one set after the other."""
    for model in (*models, *(step.averages if args.method == "mmt" else ())):
        model.train()
    cross_entropy, soft_cross_entropy = CrossEntropyLoss(label_smoothing=0.1), SoftCrossEntropyLoss()
    triplet, softmax_triplet, soft_triplet = TripletLoss(margin=0.3), SoftmaxTripletLoss(), SoftSoftmaxTripletLoss()
    gather = distributed.gather_with_gradient  # triplets are mined over the batches of all processes
    step.batches_per_epoch = len(loader)
    progress = Epoch(loader, step.epoch + 1, args.seed)
    for batch in progress:
        images = batch["image"].to(device, non_blocking=True, memory_format=memory_format(args))  # (B, 3, H, W)
        targets = pseudo.targets[batch["index"].to(device)]  # (B,) label, or slot of a hybrid memory
        if args.method == "mmt":
            views, labels = images.chunk(2), targets.chunk(2)[0]  # the same pictures, augmented twice: (B / 2, ...)
            with step.forward(*models), autocast(device, args.amp):
                outputs = [model(view) for model, view in zip(models, views, strict=True)]
                with torch.no_grad():
                    taught = [teacher(view) for teacher, view in zip(step.averages, views, strict=True)]
            losses = dict.fromkeys(
                ("cross_entropy", "soft_cross_entropy", "softmax_triplet", "soft_softmax_triplet"), 0
            )
            everyones = gather(labels)
            for own, teacher in zip(outputs, reversed(taught), strict=True):  # each learns from the other's teacher
                features, soft_features = gather(own.features[0]), gather(teacher.features[0])  # (W * B / 2, F)
                losses["cross_entropy"] += 0.5 * cross_entropy(own.logits[0], labels)
                losses["soft_cross_entropy"] += 0.5 * soft_cross_entropy(own.logits[0], teacher.logits[0])
                losses["softmax_triplet"] += 0.2 * softmax_triplet(features, everyones)
                losses["soft_softmax_triplet"] += 0.8 * soft_triplet(features, soft_features, everyones)
        else:
            with step.forward(*models), autocast(device, args.amp):
                output = models[0](images)  # embedding (B, D); features [(B, F)], logits [(B, C)]
            if pseudo.memory is not None:
                losses = {"memory": pseudo.memory(output.embedding, targets)}
            elif args.method == "uda_tp":
                losses = {"triplet": triplet(gather(output.features[0]), gather(targets))}
            else:
                losses = {
                    "cross_entropy": cross_entropy(output.logits[0], targets),
                    "softmax_triplet": softmax_triplet(gather(output.features[0]), gather(targets)),
                }
        progress.add(step(losses, batch["path"]))
        if pseudo.memory is not None:
            pseudo.memory.update(*map(distributed.all_gather_variable, (output.embedding, targets)))
    rate = step.end_epoch()
    return {"epoch": step.epoch, "lr": rate, **progress.row()}


class UnsupervisedRun(ReIDRun):
    """A `ReIDRun` with several targets, whose mean mAP counts, and with pseudo labels in its checkpoints.

    `criterion` is `PseudoLabels`.
    """

    def __init__(self, args, say, network, network_options, pseudo, step, domains, loader, device):
        self.targets = [
            (number, domain, reid.query_gallery_loaders(args, domain.data, device))
            for number, domain in enumerate(domains)
            if domain.is_target
        ]
        data = domains[-1].data
        loaders = (loader, *self.targets[-1][2])
        super().__init__(args, say, network, network_options, pseudo, step, data, loaders, device)

    def _metrics(self):
        shown = {"mAP": "mAP", "rank1": "Rank-1", "clustered": "clustered", **{name: name for name in AGREEMENT_NAMES}}
        names = {**dict.fromkeys((*METRIC_NAMES, "clusters", "outliers", "cluster_size")), **shown}
        several = self.criterion.several_targets
        return names | {
            column_of(key, domain, several): name and column_of(name, domain, several)
            for _, domain, _ in self.targets
            for key, name in names.items()
        }

    def _evaluate(self):
        metrics, scores = {}, []
        for number, domain, loaders in self.targets:
            network, several = self.step.evaluated[0], self.criterion.several_targets
            use_domain(network, number)
            evaluation = reid.evaluate(network, loaders, domain.data, self.args, self.device)
            if evaluation:
                self.evaluation, self.data = evaluation, domain.data  # of the last one are rank list and threshold
                metrics |= {column_of(key, domain, several): value for key, value in evaluation.metrics.items()}
                scores.append(evaluation.metrics["mAP"])
        return metrics | ({"mAP": sum(scores) / len(scores)} if scores else {})

    def _resume(self, state, path):
        before = state["args"].get("method")
        if before != self.args.method:
            raise InputError(f"{path} was trained with --method {before}: give the same, or start from its --weights")
        classes = state["network"]["num_classes"]
        if classes:
            self.criterion.set_classifiers(torch.zeros(classes, self.network.feature_dim))
        check_same_network(state, path, self.network_options)
        restore(state, path, ("model", self.network), ("loss", self.criterion), (None, self.step))

    def close(self):
        if distributed.is_main() and self.step.epoch:
            for number, domain, _ in self.targets:
                path = self.folder / f"{column_of('clusters', domain, self.criterion.several_targets)}.png"
                reid_pictures.draw_clusters(path, domain.data.train, self.criterion.parts[number])
        super().close()


def main(args):
    device = distributed.setup(args.device, args.timeout)  # joins the process group, where torchrun started one
    seed_everything(args.seed, args.deterministic)
    settle(args)
    check_loggers(args)
    dry_run(args, network_options(args), args.batch_norm_group or args.ids_per_batch * args.images_per_id)
    say = Announcer()
    domains = load_domains(args, say)
    last = domains[-1].data
    args.dataset, args.data, args.protocol = last.name, last.root, last.protocol  # what evaluate.py takes by itself
    args.name = args.name or f"{args.method}-{last.name}-{args.backbone}"
    networks, options_of_network = build_networks(args, len(domains), device, say)
    loader, samplers = build_train_loader(args, domains, device)
    processes, batch = distributed.world_size(), args.ids_per_batch * args.images_per_id
    say(
        f"method: {args.method}; batch: {args.ids_per_batch} labels x {args.images_per_id} pictures x {processes} "
        f"processes = {batch * processes} pictures of each set; BatchNorm sees {args.batch_norm_group or batch} of them"
    )
    step = build_step(networks, args, device)
    for network in (*networks, *(average.module for average in step.averages)):
        set_batch_norm_group(network, args, device)
    label_loaders = [reid.build_eval_loader(args, domain.data.train, device) for domain in domains]
    pseudo = PseudoLabels(domains, label_loaders, samplers, step, options_of_network, args, device)

    run = UnsupervisedRun(args, say, networks[0], options_of_network, pseudo, step, domains, loader, device)
    models = None
    for epoch in run.epochs():
        renewed = (epoch - 1) % args.label_every == 0
        columns = pseudo.renew(epoch, run.log.say) if renewed else {}
        if models is None or (renewed and args.method in WITH_CLASSIFIER):  # DDP has to know a new classifier
            models = [distributed.wrap(network, device, compiled=args.compile) for network in networks]
        run.end_epoch(train_one_epoch(models, pseudo, loader, step, args, device) | columns)
    run.close()


if __name__ == "__main__":
    distributed.run_script(
        lambda argv: main(options.parse(get_parser(), RECIPES, default_recipe, argv, PUBLISHED)), sys.argv[1:]
    )
