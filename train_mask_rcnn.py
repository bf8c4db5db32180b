"""Train Mask R-CNN (He et al. 2017) on any data in COCO's format.

One process, one GPU or the CPU:
    python train_mask_rcnn.py
    python train_mask_rcnn.py --data COCO --backbone resnet50 --weights imagenet
    python train_mask_rcnn.py --train-images IMAGES --train-annotations instances.json --val-fraction 0.2 --weights coco
All GPUs of a machine:
    bash run_ddp.sh train_mask_rcnn.py --data COCO --lr 0.04 --batch-size 4 --amp bf16
Several machines, the same line on each (NODE_RANK 0, 1, ...):
    NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash run_ddp.sh train_mask_rcnn.py --data COCO --lr 0.08 --amp bf16

Without --data the run renders scenes of baggage on a belt and trains on them. Everything lands in runs/<name>/.
"""

import sys
import time
from pathlib import Path

import torch

from core.data.detection_transforms import training_sizes
from core.engine import detection, detection_pictures, distributed, options, training
from core.engine.checkpoint import load_checkpoint, open_run, save_run
from core.engine.coco_evaluation import per_class_table, summary_table
from core.engine.log import Announcer, RunLog, check_loggers
from core.engine.updater import Updater, seed_everything
from core.errors import InputError
from core.files import make_folder
from core.models.detection_weights import load_detection_weights
from core.models.mask_rcnn import BACKBONES, NORMS, MaskRCNN

RECIPES = {
    # He et al. 2017 and Lin et al. 2017 as torchvision's reference trains them: 12 epochs of COCO.
    "paper": {
        "backbone": "resnet50", "min_size": 800, "max_size": 1333, "batch_size": 4, "augmentation": 1,
        "optimizer": "sgd", "lr": 0.005, "momentum": 0.9, "weight_decay": 1e-4, "epochs": 12,
        "schedule": "multistep", "milestones": [8, 11], "gamma": 0.1,
        "warmup_iterations": 1000, "warmup_factor": 0.001,
    },
    # Small pictures and few steps: from nothing to usable masks in minutes on two CPU cores. Half of the RoIs may be
    # objects, and the rate stays high to the end while the weights that are kept are an average: both found on nuts.
    "quick": {
        "backbone": "resnet18", "min_size": 192, "max_size": 300, "batch_size": 2, "augmentation": 1,
        "weights": "none", "rois_per_image": 32, "roi_positives": 0.5, "pre_nms_train": 500, "post_nms_train": 200,
        "pre_nms_test": 500, "post_nms_test": 200, "optimizer": "adamw", "lr": 4e-4, "weight_decay": 1e-4,
        "clip_gradient": 5.0, "ema": 0.98, "epochs": 6, "iterations_per_epoch": 50,
        "schedule": "cosine", "min_lr": 1.5e-4, "warmup_iterations": 30, "warmup_factor": 0.001,
    },
}  # fmt: skip


def get_parser():
    parser = options.Parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--data", metavar="ROOT", help="folder in the layout of COCO 2017 (default: rendered scenes)")
    for split in ("train", "val"):
        group.add_argument(f"--{split}-images", metavar="FOLDER", help=f"pictures to {split}")
        group.add_argument(f"--{split}-annotations", metavar="FILE", help="their annotations, COCO JSON with masks")
    group.add_argument(
        "--val-fraction", type=options.fraction_below_one, default=0.0, help="part of the training pictures held out"
    )
    group.add_argument("--workers", type=options.non_negative_int, default=2, help="processes that read, per rank")
    group.add_argument("--skip-broken", action="store_true", help="leave unreadable pictures out instead of stopping")

    group = parser.add_argument_group("batches and augmentation")
    group.add_argument(
        "--batch-size",
        type=options.positive_int,
        help="pictures per process; for n times as many in an update give n times the --lr, which is 0.005 for 4 (the "
        "linear scaling rule, Goyal et al. 2017)",
    )
    group.add_argument(
        "--iterations-per-epoch", type=options.non_negative_int, default=0, help="0: every picture about once"
    )
    group.add_argument(
        "--augmentation",
        type=int,
        choices=[0, 1, 2, 3],
        help="0 none; 1 flip; 2 also sizes, colour, greyscale; 3 also large-scale jitter with a crop, rotation, "
        "perspective, motion blur",
    )
    group.add_argument("--flip", type=options.fraction, default=0.5, help="probability of mirroring left and right")
    group.add_argument("--vertical-flip", type=options.fraction, default=0.0, help="and top and bottom")
    group.add_argument(
        "--crop-size",
        type=options.positive_int,
        nargs=2,
        metavar=("H", "W"),
        help="of level 3, pixels (default: as the picture)",
    )
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
    group.add_argument("--backbone", choices=BACKBONES, help="of the FPN")
    group.add_argument(
        "--weights", default="imagenet", help="imagenet, coco (published files), none, or the path of a file"
    )
    group.add_argument(
        "--norm",
        choices=NORMS,
        help="BatchNorm of the backbone (default: frozen with weights, else batch)",
    )
    group.add_argument(
        "--trainable-layers",
        type=int,
        choices=range(6),
        help="stages of the backbone that learn, from the last (default: 3 with weights, else 5)",
    )
    group.add_argument("--min-size", type=options.positive_int, help="shorter side, pixels, after resizing")
    group.add_argument("--max-size", type=options.positive_int, help="limit of the longer side, pixels")
    group.add_argument(
        "--anchor-sizes",
        type=anchor_sizes,
        nargs=5,
        metavar="PIXELS",
        default=[32, 64, 128, 256, 512],
        help="of P2 to P6; several on a level as 32,40",
    )
    group.add_argument(
        "--aspect-ratios", type=options.positive_float, nargs="+", default=[0.5, 1.0, 2.0], help="height / width"
    )

    group = parser.add_argument_group("region proposals")
    group.add_argument(
        "--rpn-fg-iou", type=options.fraction, default=0.7, help="an anchor is an object from this IoU on"
    )
    group.add_argument("--rpn-bg-iou", type=options.fraction, default=0.3, help="and background below this one")
    group.add_argument("--rpn-samples", type=options.positive_int, default=256, help="anchors per picture in the loss")
    group.add_argument("--rpn-positives", type=options.fraction, default=0.5, help="part of them that are objects")
    group.add_argument("--rpn-nms", type=options.fraction, default=0.7, help="IoU above which a proposal is dropped")
    group.add_argument("--pre-nms-train", type=options.positive_int, default=2000, help="proposals per level")
    group.add_argument("--post-nms-train", type=options.positive_int, default=2000, help="proposals per picture")
    group.add_argument("--pre-nms-test", type=options.positive_int, default=1000, help="the same for evaluation")
    group.add_argument("--post-nms-test", type=options.positive_int, default=1000, help="the same for evaluation")

    group = parser.add_argument_group("regions of interest")
    group.add_argument("--rois-per-image", type=options.positive_int, default=512, help="proposals in the loss")
    group.add_argument("--roi-positives", type=options.fraction, default=0.25, help="part of them that are objects")
    group.add_argument("--box-roi-size", type=options.positive_int, default=7, help="RoIAlign for boxes, bins a side")
    group.add_argument("--mask-roi-size", type=options.positive_int, default=14, help="for masks, half a mask's side")
    group.add_argument("--roi-samples", type=options.positive_int, default=2, help="RoIAlign's samples a bin and side")
    group.add_argument("--roi-fg-iou", type=options.fraction, default=0.5, help="a proposal is an object from here on")
    group.add_argument("--min-score", type=options.fraction, default=0.05, help="detections below it are dropped")
    group.add_argument("--nms", type=options.fraction, default=0.5, help="IoU above which a detection is dropped")
    group.add_argument("--detections", type=options.positive_int, default=100, help="most detections per picture")


def default_recipe(args):
    return "quick" if args.data is None and not args.train_annotations else "paper"


def network_options(args, num_classes, pretrained):
    """The arguments of `MaskRCNN`, plain values, which the checkpoint keeps."""
    return {
        "backbone_name": args.backbone,
        "num_classes": num_classes,
        "norm": args.norm or ("frozen" if pretrained else "batch"),
        "trainable_layers": (3 if pretrained else 5) if args.trainable_layers is None else args.trainable_layers,
        "min_size": list(training_sizes(args.augmentation, args.min_size)),
        "max_size": args.max_size,
        "anchor_sizes": list(args.anchor_sizes),
        "aspect_ratios": list(args.aspect_ratios),
        "rpn_fg_iou_thresh": args.rpn_fg_iou,
        "rpn_bg_iou_thresh": args.rpn_bg_iou,
        "rpn_batch_size_per_image": args.rpn_samples,
        "rpn_positive_fraction": args.rpn_positives,
        "rpn_nms_thresh": args.rpn_nms,
        "rpn_pre_nms_top_n_train": args.pre_nms_train,
        "rpn_post_nms_top_n_train": args.post_nms_train,
        "rpn_pre_nms_top_n_test": args.pre_nms_test,
        "rpn_post_nms_top_n_test": args.post_nms_test,
        "box_batch_size_per_image": args.rois_per_image,
        "box_positive_fraction": args.roi_positives,
        "box_fg_iou_thresh": args.roi_fg_iou,
        "box_bg_iou_thresh": args.roi_fg_iou,
        "box_roi_output_size": args.box_roi_size,
        "mask_roi_output_size": args.mask_roi_size,
        "roi_sampling_ratio": args.roi_samples,
        "box_score_thresh": args.min_score,
        "box_nms_thresh": args.nms,
        "box_detections_per_img": args.detections,
    }


# What decides about the shapes of the weights, so that a resumed run can't have it otherwise.
SHAPES = ("backbone_name", "num_classes", "anchor_sizes", "aspect_ratios", "box_roi_output_size")


def build_network(args, categories, say):
    """The network with the weights it starts from.

    With weights the BatchNorm is frozen and the first two stages stay as they are, as in the paper. A network that
    starts from nothing, because that is wanted or because the published file can't be had, must learn all of it.
    """

    def build(pretrained):
        return MaskRCNN(**network_options(args, len(categories) + 1, pretrained))

    network = build(pretrained=args.weights != "none")
    with distributed.main_first():  # one process downloads, the others find the file
        report = load_detection_weights(network, args.weights, args.backbone, categories)
    say(f"warning: {report.message}" if report.warning else report.message)
    return build(pretrained=False) if distributed.broadcast_object(report.warning) else network


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
    training.check_same_network(state, path, fixed)
    return MaskRCNN(**{**saved, **wanted})


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
        f"network: Mask R-CNN, {args.backbone} FPN, {built['norm']} BatchNorm, {built['trainable_layers']} of 5 stages "
        f"learn; shorter side {args.min_size}, longer at most {args.max_size} pixels; augmentation {args.augmentation}"
    )
    if args.crop_size and args.augmentation < 3:
        say("--crop-size belongs to --augmentation 3 and has no effect here")
    if 3 * args.warmup_iterations > updates > 0:
        say(
            f"warning: the warm-up of {args.warmup_iterations} updates takes more than a third of all {updates}: give "
            "fewer --warmup-iterations or more --epochs"
        )


# Options whose change a resumed run need not mention.
WITHOUT_EFFECT = {"skip_broken", "train_images", "train_annotations", "val_images", "val_annotations"}


def main(args):
    start = time.perf_counter()
    device = distributed.setup(args.device, args.timeout)
    seed_everything(args.seed, args.deterministic)
    if args.norm == "sync" and device.type != "cuda":
        raise InputError(f"--norm sync works on CUDA alone, this run is on {device.type}")

    say = Announcer()
    if args.recipe == "quick":
        say(
            "recipe quick: small pictures and few steps, for a whole run in minutes; --data names your own pictures, "
            "--recipe paper trains in earnest"
        )
    data = detection.load_data(args, say)
    if args.augmentation_preview:
        preview_augmentation(args, data)
        return
    train_loader = detection.build_train_loader(args, data.train, device)
    eval_loader = data.val and detection.build_eval_loader(data.val, device, workers=args.workers)
    args.name = args.name or f"mask-rcnn-{Path(args.data).resolve().name if args.data else 'coco'}-{args.backbone}"
    check_loggers(args)
    folder, resumed = open_run(args.output, args.name, args.resume) if args.resume else (None, None)
    state = load_checkpoint(resumed, "mask_rcnn") if resumed else None
    if state:
        network = rebuild_network(args, data.train.categories, state, resumed).to(device)
    else:
        network = build_network(args, data.train.categories, say).to(device)
    updater = Updater(network, torch.nn.Identity(), args, device, batches_per_epoch=len(train_loader))
    announce(say, args, data, network, updates=args.epochs * -(-len(train_loader) // args.accumulate))

    first_epoch, best = 1, -1.0
    if state:
        detection.restore(state, resumed, network, updater, data)
        first_epoch, best = state["epoch"] + 1, state["best"]
        changed = training.changed_options(state["args"], args, without_effect=WITHOUT_EFFECT)
        say(f"continuing from {resumed} after epoch {state['epoch']}{changed}")
    elif args.resume:
        say(f"--resume: no checkpoint of {args.name} under {args.output}, starting afresh")
    else:
        folder, _ = open_run(args.output, args.name)
    say(f"run folder: {folder}")
    log = RunLog(folder, args, say.said, resume_epoch=first_epoch - 1 if state else None)

    if args.compile:
        network.backbone.compile()  # the rest has shapes of its own in every picture
    model = distributed.wrap(network, device)
    result, dropped = None, 0
    for epoch in range(first_epoch, args.epochs + 1):
        row = {"epoch": epoch, "lr": updater.learning_rate}
        row |= detection.train_one_epoch(
            model, train_loader, updater, epoch=epoch, seed=args.seed, device=device, amp=args.amp
        )
        dropped += row.pop("dropped")
        updater.end_epoch()
        if epoch % args.eval_every == 0 or epoch == args.epochs:
            result = detection.evaluate(updater.averaged, eval_loader, data.val, device, amp=args.amp)
            row |= result.metrics if result else {}
        log.epoch(row)
        if result and "mask_AP" in row:
            log.say(summary_table(result))
        improved = row.get("mask_AP", -1.0) > best
        best = row["mask_AP"] if improved else best
        if distributed.is_main():
            state = detection.checkpoint_state(epoch, best, network, updater, args, data)
            save_run(folder, state, improved)

    if result is None:  # a finished run that was resumed, or --epochs 0
        result = detection.evaluate(updater.averaged, eval_loader, data.val, device, amp=args.amp)
    if dropped:
        log.say(f"augmentation: {dropped} times, over all epochs, an instance had left its picture and was dropped")
    show_results(log, folder, result, updater.averaged, eval_loader, data, args, device)
    log.say(f"done in {(time.perf_counter() - start) / 60:.1f} minutes, see {folder}")
    if (folder / "best.pth").exists():
        log.say(f"best mask AP {100 * best:.1f}; next: python evaluate.py {folder / 'best.pth'}")
    elif (folder / "last.pth").exists():
        log.say(f"next: python demo.py PICTURE --weights {folder / 'last.pth'}")
    log.close()


def preview_augmentation(args, data):
    """`<output>/augmentation.png`, one row of pictures for each level."""
    if not distributed.is_main():
        return
    path = Path(args.output) / "augmentation.png"
    make_folder(path.parent)
    detection_pictures.draw_augmentations(
        path, data.train, seed=args.seed, flip=args.flip, vertical_flip=args.vertical_flip, crop_size=args.crop_size
    )
    print(f"pictures under each level of --augmentation: {path}")


def show_results(log, folder, result, network, eval_loader, data, args, device):
    """The table of classes, and what the trained network finds in a few pictures."""
    if result is None or not distributed.is_main():
        return
    log.say(f"after the last epoch, by class:\n{per_class_table(result)}")
    detection_pictures.draw_predictions(
        folder / "predictions", network, eval_loader.dataset, data.val.categories, device, amp=args.amp
    )


if __name__ == "__main__":
    distributed.run_script(lambda argv: main(options.parse(get_parser(), RECIPES, default_recipe, argv)), sys.argv[1:])
