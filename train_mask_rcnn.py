"""Train Mask R-CNN (He et al. 2017) on any data in COCO's format.

One process, one GPU or the CPU:
    python train_mask_rcnn.py
    python train_mask_rcnn.py --data COCO --backbone resnet50 --weights imagenet
    python train_mask_rcnn.py --train-images IMAGES \\
        --train-annotations instances.json --val-fraction 0.2 --weights coco
All GPUs of a machine:
    bash run_ddp.sh train_mask_rcnn.py --data COCO --lr 0.04 --amp bf16
Several machines, the same line on each (NODE_RANK 0, 1, ...):
    NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 \\
        bash run_ddp.sh train_mask_rcnn.py --data COCO --lr 0.08 --amp bf16

Without --data the run renders scenes of baggage on a belt and trains on them.
Everything lands in runs/<name>/.
"""

import sys
import time
from pathlib import Path

from core.engine import options
from core.engine.options import arguments_of

RECIPES = {
    # He et al. 2017 and Lin et al. 2017 as torchvision's reference trains them: 12 epochs of COCO.
    "paper": {
        "backbone_name": "resnet50", "min_size": 800, "max_size": 1333, "batch_size": 4, "augmentation": 1,
        "optimizer": "sgd", "lr": 0.005, "momentum": 0.9, "weight_decay": 1e-4, "epochs": 12,
        "schedule": "multistep", "milestones": [8, 11], "gamma": 0.1,
        "warmup_steps": 1000, "warmup_factor": 0.001,
    },
    # Small pictures and few steps: from nothing to usable masks in minutes on two CPU cores. Half of the RoIs may be
    # objects, and the rate stays high to the end while the weights that are kept are an average: both found on nuts.
    "quick": {
        "backbone_name": "resnet18", "min_size": 192, "max_size": 300, "batch_size": 2, "augmentation": 1,
        "weights": "none", "box_batch_size_per_image": 32, "box_positive_fraction": 0.5,
        "rpn_pre_nms_top_n_train": 500, "rpn_post_nms_top_n_train": 200,
        "rpn_pre_nms_top_n_test": 500, "rpn_post_nms_top_n_test": 200,
        "optimizer": "adamw", "lr": 4e-4, "weight_decay": 1e-4, "clip_gradient": 5.0, "ema": 0.98,
        "epochs": 6, "iterations_per_epoch": 50,
        "schedule": "cosine", "min_lr": 1.5e-4, "warmup_steps": 30, "warmup_factor": 0.001,
    },
}  # fmt: skip
# Option, the argument of `MaskRCNN` that it sets, type, default (that of the argument), help.
MASK_RCNN_OPTIONS = {
    "region proposals": (
        ("--rpn-fg-iou", "rpn_fg_iou_thresh", options.fraction, 0.7, "an anchor is an object from this IoU on"),
        ("--rpn-bg-iou", "rpn_bg_iou_thresh", options.fraction, 0.3, "and background below this one"),
        ("--rpn-samples", "rpn_batch_size_per_image", options.positive_int, 256, "anchors per picture in the loss"),
        ("--rpn-positives", "rpn_positive_fraction", options.fraction, 0.5, "part of them that are objects"),
        ("--rpn-nms", "rpn_nms_thresh", options.fraction, 0.7, "IoU above which a proposal is dropped"),
        ("--pre-nms-train", "rpn_pre_nms_top_n_train", options.positive_int, 2000, "proposals per level"),
        ("--post-nms-train", "rpn_post_nms_top_n_train", options.positive_int, 2000, "proposals per picture"),
        ("--pre-nms-test", "rpn_pre_nms_top_n_test", options.positive_int, 1000, "the same for evaluation"),
        ("--post-nms-test", "rpn_post_nms_top_n_test", options.positive_int, 1000, "the same for evaluation"),
    ),
    "regions of interest": (
        ("--rois-per-image", "box_batch_size_per_image", options.positive_int, 512, "proposals in the loss"),
        ("--roi-positives", "box_positive_fraction", options.fraction, 0.25, "part of them that are objects"),
        ("--box-roi-size", "box_roi_output_size", options.positive_int, 7, "RoIAlign for boxes, bins a side"),
        ("--mask-roi-size", "mask_roi_output_size", options.positive_int, 14, "for masks, half a mask's side"),
        ("--roi-samples", "roi_sampling_ratio", options.positive_int, 2, "RoIAlign's samples a bin and side"),
        ("--roi-fg-iou", "box_fg_iou_thresh", options.fraction, 0.5, "a proposal is an object from here on"),
        ("--min-score", "box_score_thresh", options.fraction, 0.05, "detections below it are dropped"),
        ("--nms", "box_nms_thresh", options.fraction, 0.5, "IoU above which a detection is dropped"),
        ("--detections", "box_detections_per_img", options.positive_int, 100, "most detections per picture"),
    ),
}


def get_parser():
    parser = options.Parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--data", metavar="ROOT", help="folder in the layout of COCO 2017 (default: rendered scenes)")
    for split in ("train", "val"):
        group.add_argument(f"--{split}-images", metavar="FOLDER", help=f"pictures to {split}")
        group.add_argument(f"--{split}-annotations", metavar="FILE", help="their annotations, COCO JSON with masks")
    group.add_argument("--val-fraction", type=options.fraction_below_one, default=0.0, help="part of train held out")
    group.add_argument("--workers", type=options.non_negative_int, default=2, help="processes that read, per rank")
    options.add_broken_options(group)

    group = parser.add_argument_group("batches and augmentation")
    group.add_argument(
        "--batch-size",
        type=options.positive_int,
        help="pictures per process; scale --lr with the global batch (0.005 at 4; Goyal et al. 2017)",
    )
    group.add_argument("--iterations-per-epoch", type=options.non_negative_int, default=0, help="batches; 0: one pass")
    group.add_argument(
        "--augmentation",
        type=int,
        choices=[0, 1, 2, 3],
        help="0 none; 1 flip; 2 also sizes, colour, greyscale; 3 also large-scale jitter with a crop, rotation, "
        "perspective, motion blur",
    )
    group.add_argument("--flip", type=options.fraction, default=0.5, help="probability of mirroring left and right")
    group.add_argument("--vertical-flip", type=options.fraction, default=0.0, help="and top and bottom")
    group.add_argument("--crop-size", type=options.positive_int, nargs=2, metavar=("H", "W"), help="of level 3, pixels")
    group.add_argument("--augmentation-preview", action="store_true", help="draw pictures under each level, and stop")

    add_network_options(parser)
    options.add_optimizer_options(parser, per_update=True)
    options.add_run_options(parser)
    parser.set_defaults(**RECIPES["paper"])
    return parser


def anchor_sizes(text):
    """One level of --anchor-sizes: "32" -> 32, "32,40" -> [32, 40]."""
    sizes = [options.positive_int(part) for part in text.split(",")]
    return sizes if len(sizes) > 1 else sizes[0]


def add_network_options(parser):
    group = parser.add_argument_group("network")
    group.add_argument("--backbone", dest="backbone_name", choices=options.BACKBONES[:4], help="of the FPN")
    group.add_argument("--weights", default="imagenet", help="imagenet, coco (published files), none, or a file's path")
    group.add_argument(
        "--norm", choices=("batch", "frozen", "sync"), help="of the backbone (default: frozen with weights, else batch)"
    )
    group.add_argument(
        "--trainable-layers",
        type=int,
        choices=range(6),
        help="stages of the backbone that learn, from the last (default: 3 with weights, else 5)",
    )
    group.add_argument("--min-size", type=options.positive_int, help="shorter side, pixels, after resizing")
    group.add_argument("--max-size", type=options.positive_int, help="limit of the longer side, pixels")
    group.add_argument("--anchor-sizes", type=anchor_sizes, nargs=5, metavar="PIXELS", help="P2 to P6; several: 32,40")
    group.add_argument("--aspect-ratios", type=options.positive_float, nargs="+", help="of the anchors, height / width")
    parser.set_defaults(anchor_sizes=[32, 64, 128, 256, 512], aspect_ratios=[0.5, 1.0, 2.0])

    for title, rows in MASK_RCNN_OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, argument, kind, default, text in rows:
            group.add_argument(name, dest=argument, type=kind, default=default, help=text)


def default_recipe(args):
    return "quick" if args.data is None and not args.train_annotations else "paper"


if __name__ == "__main__":
    options.answer_help(get_parser(), RECIPES)  # before torch is imported, which takes seconds

import torch

from core.data.detection_transforms import training_sizes
from core.engine import coco_evaluation, detection, detection_pictures, distributed
from core.engine.checkpoint import check_same_network
from core.engine.epoch import Epoch, seed_everything
from core.engine.log import Announcer, check_loggers, preview
from core.engine.optim import build_optimizer, build_scheduler
from core.engine.run import Run, open_or_resume
from core.engine.step import Step, autocast, memory_format
from core.errors import InputError
from core.models.detection_weights import PUBLISHED_COCO, load_detection_weights
from core.models.mask_rcnn import SIZE_DIVISIBLE, MaskRCNN
from core.models.weights import Unfilled


def network_options(args, num_classes, pretrained):
    """The arguments of `MaskRCNN`, plain values, which the checkpoint keeps."""
    layers = (3 if pretrained else 5) if args.trainable_layers is None else args.trainable_layers
    return {
        **arguments_of(MaskRCNN, args),
        "backbone_name": args.backbone_name,
        "num_classes": num_classes,
        "norm": args.norm or ("frozen" if pretrained else "batch"),
        "trainable_layers": layers,
        "min_size": list(training_sizes(args.augmentation, args.min_size)),
        "box_bg_iou_thresh": args.box_fg_iou_thresh,
    }


# What decides about the shapes of the weights, so that a resumed run can't have it otherwise.
SHAPES = ("backbone_name", "num_classes", "anchor_sizes", "aspect_ratios", "box_roi_output_size")


def check_network(args):
    """Raises InputError for options that no network can have, and for --weights, before data are made."""
    built = network_options(args, 2, pretrained=args.weights != "none")
    with Unfilled():
        network = MaskRCNN(**built)
    is_published = args.weights == "coco" and args.backbone_name in PUBLISHED_COCO
    if args.weights not in ("none", "imagenet") and not is_published and not args.resume:
        load_detection_weights(network, args.weights, args.backbone_name, [(1, "object")])
    if args.epochs and built["norm"] == "batch" and args.batch_size == 1 and min(built["min_size"]) <= SIZE_DIVISIBLE:
        raise InputError(
            f"--batch-size 1 with --min-size {args.min_size}: BatchNorm sees a single value in the last stage; give a "
            "larger one, or --norm frozen"
        )


def build_network(args, categories, say):
    """(the network with the weights it starts from, whether it knows the classes already).

    With weights the BatchNorm is frozen and the first two stages stay as they are, as in the paper. A network that
    starts from nothing, because that is wanted or because the published file can't be had, must learn all of it.
    """

    def build(pretrained):
        return MaskRCNN(**network_options(args, len(categories) + 1, pretrained))

    network = build(pretrained=args.weights != "none")
    with distributed.main_first():  # one process downloads, the others find the file
        report = load_detection_weights(network, args.weights, args.backbone_name, categories)
    say(f"warning: {report.message}" if report.warning else report.message)
    warning, detects = distributed.broadcast_object((report.warning, report.detects))
    return (build(pretrained=False) if warning else network), detects


def rebuild_network(args, categories, state, path):
    """The network of a checkpoint that the run goes on from, which needs no other weights.

    BatchNorm and frozen stages are as they were, unless an option names them: where a run starts they follow from
    whether the published weights could be had, and that may be different today.
    """
    saved = state["network"]
    wanted = network_options(args, len(categories) + 1, pretrained=False)
    wanted["norm"] = args.norm or saved["norm"]
    if args.trainable_layers is None:
        wanted["trainable_layers"] = saved["trainable_layers"]
    fixed = {key: wanted[key] for key in (*SHAPES, "norm")}
    check_same_network(state, path, fixed)
    return MaskRCNN(**{**saved, **wanted})


def load_data(args, say):
    """`DetectionData`; what was settled goes into `args`, which the run folder and the checkpoints keep."""
    if args.recipe == "quick":
        say(
            "recipe quick: small pictures and few steps, for a whole run in minutes; --data names your own pictures, "
            "--recipe paper trains in earnest"
        )
    data = detection.load_data(args, say)
    vars(args).update(data.paths)
    folder = Path(args.data).resolve().name if args.data else "coco"
    args.name = args.name or f"mask-rcnn-{folder}-{args.backbone_name}"
    return data


def announce(say, args, data, network, updates):
    """What is about to happen, so that a person can stop a run that is not the one they meant."""
    say(f"data: {detection.describe(data)}")
    processes = distributed.world_size()
    say(
        f"batch: {args.batch_size} pictures x {processes} processes x {args.accumulate} batches an update = "
        f"{args.batch_size * processes * args.accumulate} pictures"
    )
    built = network.options
    say(
        f"network: Mask R-CNN, {args.backbone_name} FPN, {built['norm']} BatchNorm, {built['trainable_layers']} of 5 "
        f"stages learn; shorter side {args.min_size}, longer at most {args.max_size} pixels; "
        f"augmentation {args.augmentation}"
    )
    if args.crop_size and args.augmentation < 3:
        say("--crop-size belongs to --augmentation 3 and has no effect here")
    if 3 * args.warmup_steps > updates > 0:
        say(
            f"warning: the warm-up of {args.warmup_steps} updates takes more than a third of all {updates}: give "
            "fewer --warmup-iterations or more --epochs"
        )


def build_step(network, args, device, batches_per_epoch):
    """`Step` whose learning rate changes with each update."""
    optimizer = build_optimizer(network.parameters(), args.optimizer, args.lr, **arguments_of(build_optimizer, args))
    schedule = {**arguments_of(build_scheduler, args), "epochs": max(args.epochs, 1)}
    schedule["steps_per_epoch"] = -(-batches_per_epoch // args.accumulate)  # updates; rounded up
    scheduler = build_scheduler(optimizer, args.schedule, **schedule)
    return Step([network], [optimizer], scheduler, args, device, batches_per_epoch=batches_per_epoch, per_update=True)


def train_one_epoch(model, loader, step, args, device):
    """One pass over the training pictures.

    Returns:
        (row of the log, how many instances the augmentation of this rank moved out of their pictures)
    """
    model.train()
    progress, dropped = Epoch(loader, step.epoch + 1, args.seed), 0
    for batch in progress:
        images = [image.to(device, non_blocking=True) for image in batch["image"]]  # B of (3, H, W)
        targets = [  # B dicts of boxes (G, 4), labels (G,), masks (G, H, W)
            {name: value.to(device, non_blocking=True) for name, value in target.items()} for target in batch["target"]
        ]
        dropped += sum(batch["dropped"])
        with step.forward(model), autocast(device, args.amp):
            losses = model(images, targets)  # loss_objectness, _rpn_box_reg, _classifier, _box_reg, _mask
        progress.add(step(losses, batch["path"]))
    rate = step.end_epoch()
    return {"epoch": step.epoch, "lr": rate, **progress.row()}, dropped


class DetectionRun(Run):
    """A `Run` that draws what the network finds. With weights that know the classes epoch 0 is evaluated, too: what it
    begins with may stay the best."""

    kind, score = "mask_rcnn", "mask_AP"

    def __init__(self, args, say, network, detects, step, data, device, opened):
        self.network, self.data, self.device, self.result = network, data, device, None
        self.loader = data.val and detection.build_eval_loader(data.val, device, workers=args.workers)
        super().__init__(args, say, step, coco_evaluation.METRIC_NAMES, data.paths, opened)
        if detects and not self.resumed:
            self.end_epoch({"epoch": 0})

    def _resume(self, state, path):
        detection.resume(state, path, self.network, self.step, self.data)

    def _evaluate(self):
        network, amp = self.step.evaluated[0], self.args.amp
        self.result = detection.evaluate(network, self.loader, self.data.val, self.device, amp=amp)
        return self.result.metrics if self.result else {}

    def _state(self, best, evaluated):
        return detection.checkpoint_state(self.network, self.step, best, self.args, self.data)

    def end_epoch(self, row):
        super().end_epoch(row)
        if "mask_AP" in row:
            self.log.say(coco_evaluation.summary_table(self.result))

    def close(self, dropped):
        """The table of classes, and what the trained network finds in a few pictures; says what to do next.

        dropped: how many instances the augmentation of this rank moved out of their pictures.
        """
        if self.result is None:  # a finished run that was resumed, or --epochs 0
            self._evaluate()
        everywhere, say = round(distributed.all_reduce_sum(torch.tensor(float(dropped))).item()), self.log.say
        if everywhere:
            say(f"augmentation: {everywhere} times, over all epochs, an instance had left its picture and was dropped")
        if self.result and distributed.is_main():
            say(f"after the last epoch, by class:\n{coco_evaluation.per_class_table(self.result)}")
            shown = (self.step.evaluated[0], self.loader.dataset, self.data.val.categories, self.device)
            detection_pictures.draw_predictions(self.folder / "predictions", *shown, amp=self.args.amp)
        say(f"done in {(time.perf_counter() - self.start) / 60:.1f} minutes, see {self.folder}")
        if (self.folder / "best.pth").exists():
            say(f"best mask AP {100 * self.best:.1f}; next: python evaluate.py {self.folder / 'best.pth'}")
        elif (self.folder / "last.pth").exists():
            say(f"next: python demo.py PICTURE --weights {self.folder / 'last.pth'}")
        self.log.close()


def main(args):
    device = distributed.setup(args.device, args.timeout)  # joins the process group, where torchrun started one
    seed_everything(args.seed, args.deterministic)
    if args.norm == "sync" and device.type != "cuda":
        raise InputError(f"--norm sync works on CUDA alone, this run is on {device.type}")
    check_loggers(args)
    check_network(args)
    say = Announcer()
    data = load_data(args, say)
    if args.augmentation_preview:
        return preview(args.output, lambda path: detection_pictures.draw_augmentations(path, data.train, args))
    train_loader = detection.build_train_loader(args, data.train, device)

    opened = open_or_resume(args, DetectionRun.kind) if args.resume else None
    if opened and opened[-1]:
        network, detects = rebuild_network(args, data.train.categories, opened[-1], opened[1]), True
    else:
        network, detects = build_network(args, data.train.categories, say)
    network = network.to(device, memory_format=memory_format(args))
    step = build_step(network, args, device, len(train_loader))
    announce(say, args, data, network, updates=args.epochs * -(-len(train_loader) // args.accumulate))
    run = DetectionRun(args, say, network, detects, step, data, device, opened)

    if args.compile:
        network.backbone.compile()  # the rest has shapes of its own in every picture
    model = distributed.wrap(network, device)  # DistributedDataParallel, in a process group
    dropped = 0
    for _ in run.epochs():
        row, dropped_here = train_one_epoch(model, train_loader, step, args, device)
        dropped += dropped_here
        run.end_epoch(row)
    run.close(dropped)


if __name__ == "__main__":
    distributed.run_script(lambda argv: main(options.parse(get_parser(), RECIPES, default_recipe, argv)), sys.argv[1:])
