"""Train a re-identification network with a teacher, or as its own teacher.

A deep stage teaches the shallow ones of the same network:
    torchrun train_kd.py --backbone resnet50 --kd self --teacher-stage 3
A trained network teaches a smaller one (knowledge distillation):
    torchrun train_kd.py --backbone resnet18 --teacher runs/NAME/best.pth \\
        --kd "1*logits+2*retrieval" --baseline
    torchrun train_kd.py --backbone resnet18 --teacher FILE \\
        --teacher-backbone osnet_x0_25 --kd retrieval
Two students teach each other; a student learns from the mean of its own past:
    torchrun train_kd.py --backbone resnet18 --teacher mutual
    torchrun train_kd.py --backbone resnet18 --teacher ema --kd retrieval
All GPUs of a machine, or of several (see run_ddp.sh):
    bash run_ddp.sh train_kd.py --backbone resnet18 --teacher runs/NAME/best.pth
    NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash run_ddp.sh train_kd.py ...

Data, recipes and everything else are those of train_reid.py, and the checkpoint
is one of the student alone. Published: fast-reid on Market-1501, taught by
R101-ibn: mAP 81.2 -> 85.8 of R18-ibn, 84.9 -> 87.8 of R34-ibn.
"""

import math
import sys
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

from core.engine import options
from core.engine.options import arguments_of
from core.engine.recipes import PUBLISHED, RECIPES, default_recipe


def get_parser():
    parser = options.Parser(__doc__)
    options.add_reid_data_options(parser)
    options.add_reid_batch_options(parser)
    options.add_reid_network_options(parser)
    options.add_reid_loss_options(parser)
    add_distillation_options(parser)
    options.add_optimizer_options(parser)
    options.add_reid_evaluation_options(parser)
    options.add_run_options(parser)
    return parser


def add_distillation_options(parser):
    group = parser.add_argument_group("distillation")
    group.add_argument(
        "--kd",
        metavar="SUM",
        help=f'self, or a sum of what is learned from the teacher, e.g. "1*logits+0.03*features+2*relational"; names: '
        f"{', '.join(options.DISTILLATION_LOSSES)} (default: logits with a --teacher)",
    )
    group.add_argument(
        "--teacher",
        metavar="PATH",
        help="a checkpoint; a published file of weights, with --teacher-backbone; mutual: a second student, which "
        "learns from the first; ema: the mean of the student's own past, with the decay of --ema (0.999 if not given)",
    )
    group.add_argument("--teacher-backbone", help="of a published file, or of the second student")
    group.add_argument("--teacher-model", choices=options.MODELS, help="of the same (default: bot, or the student's)")
    group.add_argument("--temperature", type=options.positive_float, default=4.0, help="of logits")
    group.add_argument("--retrieval-temperature", type=options.positive_float, default=0.1, help="of retrieval")
    group.add_argument(
        "--hint-stages", type=options.stages, default=[], metavar="N,N", help="maps that features compares, e.g. 3"
    )
    group.add_argument(
        "--teacher-stage", type=int, choices=[2, 3, 4], default=3, help="in self it teaches all stages below it"
    )
    group.add_argument("--feature-loss-weight", type=options.non_negative_float, default=0.03, help="factor of self")
    group.add_argument("--baseline", action="store_true", help="train the student alone, too, for the last table")
    return group


if __name__ == "__main__":
    options.answer_help(get_parser(), RECIPES, PUBLISHED)  # before torch is imported, which takes seconds

import torch
from torch import nn
from torch.nn import functional as F

from core.data.randomness import seeded
from core.engine import distributed, reid, reid_training
from core.engine.complexity import complexity
from core.engine.epoch import Epoch, seed_everything
from core.engine.log import Announcer
from core.engine.published import load_state
from core.engine.reid_run import ReIDRun
from core.engine.step import autocast, memory_format
from core.errors import InputError
from core.losses import needs_cosines, needs_logits
from core.losses.distillation import build_distillation, parse_distillation
from core.models.reid import MODELS


class Teacher(NamedTuple):
    """A frozen network, the (height, width) of the pictures that it sees, and what its checkpoint says of it."""

    network: nn.Module
    size: tuple[int, int]
    state: dict


class Student(NamedTuple):
    """A network that learns, its loss, and the `Distillation` that it learns by (None: it learns alone)."""

    network: nn.Module
    criterion: nn.Module
    lesson: nn.Module | None


def settle_distillation(args):
    """Options that belong together, before anything is read or made; the default of --kd. Raises InputError."""
    if not args.kd and not args.teacher:
        raise InputError("nobody teaches: give --kd self, or a --teacher (a checkpoint, mutual, ema)")
    args.kd = args.kd or "logits"
    learned = [name for name in parse_distillation(args.kd) if name != "self"]
    if learned and not args.teacher:
        raise InputError(f"--kd {args.kd}: {learned[0]} needs a --teacher (a checkpoint, mutual, ema)")
    if args.teacher and not learned:
        raise InputError(
            f"--kd {args.kd}: nothing is learned from --teacher {args.teacher}: leave it out, or add terms"
        )
    if args.teacher in (None, "ema") and args.teacher_backbone:
        raise InputError("--teacher-backbone is of a --teacher that is a published file, or mutual: leave it out")
    if args.resume not in (None, "auto") and args.baseline:
        raise InputError("--baseline makes two runs: give --resume without a path, and both are continued")
    if args.teacher == "ema":
        args.ema = args.ema or 0.999


def load_teacher(args, device, say):
    """`Teacher` of a file; None where there is none. Raises InputError for a file that has no network of ReID."""
    if args.teacher in (None, "mutual", "ema"):
        return None
    what = {"backbone": args.teacher_backbone, "model": args.teacher_model or "bot", "prefix": "--teacher-"}
    state = load_state(args.teacher, "reid", **what)
    network, _ = reid.network_from_checkpoint(args.teacher, device, state)
    network = network.requires_grad_(False).to(memory_format=memory_format(args))
    say(f"teacher: {args.teacher}, {state['network']['backbone']} at {state['input_size'][0]}x{state['input_size'][1]}")
    return Teacher(network, tuple(state["input_size"]), state)


def check_students(args, teacher):
    """Raises InputError for students, and lessons, that can't be, before data are made."""
    student = reid_training.settle(args)
    other = reid_training.settle(second_student(args)) if args.teacher == "mutual" else student
    build_distillation(
        args.kd, student, teacher.network if teacher else other, **arguments_of(build_distillation, args)
    )


def second_student(args):
    """The options of the student that --teacher mutual adds."""
    model = args.teacher_model or args.model
    neck = args.neck if model == args.model else MODELS[model].neck
    return changed(args, backbone=args.teacher_backbone or args.backbone, model=model, neck=neck)


def check_classes(args, teacher, data):
    """Raises InputError where logits are learned from a teacher whose classes are not those of the student."""
    if "logits" not in parse_distillation(args.kd):
        return
    advice = "leave logits out of --kd, the other terms need no classes"
    if teacher and teacher.state["identities"] != reid.identities_of(data.train):
        raise InputError(f"the classes of {args.teacher} are not the identities of the training data: {advice}")
    own = {"num_classes": needs_logits(args.loss), "cosine": needs_cosines(args.loss)}
    for who, network in (("student", own), ("teacher", teacher.state["network"] if teacher else own)):
        if network.get("cosine") or not network["num_classes"]:
            what = "cosines and no class scores" if network["num_classes"] else "no classifier"
            raise InputError(f"the {who} has {what}, by its --loss: {advice}")


def build_students(args, data, teacher, say):
    """([Student], what the first is built of): it is evaluated and saved; a second one where --teacher is mutual.

    Without --kd it learns alone. What is random in distillation has seeds of its own, so that the first student starts
    as it does in train_reid.py.
    """
    built = [reid_training.build_network(args, data, say)]
    if args.teacher == "mutual":
        with seeded("second student", args.seed):
            built.append(reid_training.build_network(second_student(args), data, say))
    how = arguments_of(build_distillation, args)
    how["gather"] = distributed.gather_with_gradient if args.gather else None
    students = []
    for (network, criterion, _), other in zip(built, reversed(built), strict=True):
        with seeded("adapters", args.seed):
            teaches = teacher.network if teacher else other[0]
            lesson = build_distillation(args.kd, network, teaches, **how) if args.kd else None
        students.append(Student(network, criterion, lesson))
    return students, built[0][2]


def train_one_epoch(models, students, teacher, loader, step, args, device, frozen=()):
    """One pass over the training pictures; returns the row of the log.

    models: the students as training calls them. frozen: their modules that stay in evaluation mode.
    """
    for model in models:
        model.train()
    for module in frozen:
        module.eval()
    progress = Epoch(loader, step.epoch + 1, args.seed)
    for batch in progress:
        images = batch["image"].to(device, non_blocking=True, memory_format=memory_format(args))  # (B, 3, H, W)
        labels = batch["id"].to(device)  # (B,)
        masks = reid.target_masks(batch, args.mask_target, args.mask_size, args.sigma_ratio, device)  # (B, 1, h, w)
        with step.forward(*models), autocast(device, args.amp):
            outputs = [model(images, return_stages=True) for model in models]  # stages: four maps (B, C, h, w)
        if teacher:
            with torch.no_grad(), autocast(device, args.amp):  # frozen, in evaluation mode, at its own size
                targets = [teacher.network(resized(images, teacher.size), return_stages=True)]
        else:
            targets = outputs[::-1]  # two students learn from each other, a single one from itself
        losses = {}  # name -> weighted scalar
        for prefix, student, output, target in zip(("", "second/"), students, outputs, targets, strict=False):
            parts = student.criterion(output, labels, masks)
            parts |= student.lesson(output, target) if student.lesson else {}
            losses |= {prefix + name: value for name, value in parts.items()}
        progress.add(step(losses, batch["path"]))
    rate = step.end_epoch()
    return {"epoch": step.epoch, "lr": rate, **progress.row()}


def resized(images, size):
    """(B, 3, H, W) -> (B, 3, *size)."""
    return images if images.shape[-2:] == size else F.interpolate(images, size, mode="bilinear", antialias=True)


def train(args, data, teacher, device, say):
    """A run from its first line to its last picture; returns its `ReIDRun`."""
    seed_everything(args.seed, args.deterministic)
    students, network_options = build_students(args, data, teacher, say)
    data, loaders = reid_training.build_loaders(args, data, device, say)
    networks, criteria, lessons = zip(*students, strict=True)
    networks = [network.to(device, memory_format=memory_format(args)) for network in networks]
    # What a resumed run needs and the saved network doesn't have.
    beside = nn.ModuleList([*criteria, *(lesson for lesson in lessons if lesson), *networks[1:]]).to(device)
    adapters = [parameter for lesson in lessons if lesson for parameter in lesson.parameters()]
    how = {"peers": list(zip(networks, criteria, strict=True))[1:], "adapters": adapters}
    step = reid_training.build_step(networks[0], criteria[0], args, device, len(loaders[0]), **how)
    if args.teacher == "ema":
        teacher = Teacher(step.averages[0].module.eval(), (args.height, args.width), {})

    run = ReIDRun(args, say, networks[0], network_options, beside, step, data, loaders, device)
    first_epoch = step.epoch + 1
    for epoch in run.epochs():
        if epoch in (first_epoch, args.freeze_epochs + 1):  # DDP listens to the parameters that want a gradient now
            how = (epoch <= args.freeze_epochs, args.freeze_batch_norm)
            frozen = [module for network in networks for module in reid.freeze(network, network.backbone, *how)]
            models = [distributed.wrap(network, device, compiled=args.compile) for network in networks]
        run.end_epoch(train_one_epoch(models, students, teacher, loaders[0], step, args, device, frozen))
    run.close()
    return run


def table(rows, device):
    """Text of rows (name, network, size, `Evaluation` or None): metrics in per cent, and what each network costs."""
    lines = [f"{'':<18}  mAP  Rank-1  parameters (M)  multiply-adds (M)  images/s"]
    for name, network, size, evaluation in rows:
        cost = complexity(network, size, device)
        mean_ap, rank1 = (100 * evaluation.metrics[key] if evaluation else math.nan for key in ("mAP", "rank1"))
        lines.append(
            f"{name:<18}{mean_ap:5.1f}{rank1:8.1f}{cost.parameters / 1e6:16.2f}{cost.multiply_adds / 1e6:19.1f}"
            f"{cost.images_per_second:10.1f}"
        )
    return "\n".join(lines)


def changed(args, **values):
    return Namespace(**{**vars(args), **values})


def main(args):
    device = distributed.setup(args.device, args.timeout)  # joins the process group, where torchrun started one
    if args.sync_batch_norm and device.type != "cuda":
        raise InputError(f"--sync-batch-norm works on CUDA alone, this run is on {device.type}")
    settle_distillation(args)
    say, name = Announcer(), args.name
    teacher = load_teacher(args, device, say)
    check_students(args, teacher)
    data = reid_training.load_data(args, say)
    args.name = name or args.name.replace("reid", "kd", 1)
    say(f"distillation: {args.kd}" + f", teacher {args.teacher}" * bool(args.teacher))
    check_classes(args, teacher, data)

    run, size, rows = train(args, data, teacher, device, say), (args.height, args.width), []
    if teacher:
        sized = changed(args, height=teacher.size[0], width=teacher.size[1])
        loaders = reid.query_gallery_loaders(sized, data, device)
        found = reid.evaluate(teacher.network, loaders, data, args, device)
        rows.append(("teacher", teacher.network, teacher.size, found))
    if args.baseline:
        beside = f"{args.name}-alone"  # of a run that was killed before, it may not have begun
        resume = args.resume if Path(args.output, beside).is_dir() else None
        alone = changed(args, kd=None, teacher=None, name=beside, resume=resume)
        baseline = train(alone, data, None, device, Announcer())
        rows.append(("student alone", baseline.step.evaluated[0], size, baseline.evaluation))
    rows.append(("student distilled", run.step.evaluated[0], size, run.evaluation))
    for network in run.step.evaluated[1:]:
        rows.append(("second student", network, size, reid.evaluate(network, run.eval_loaders, data, args, device)))
    run.log.say(table(rows, device))


if __name__ == "__main__":
    distributed.run_script(
        lambda argv: main(options.parse(get_parser(), RECIPES, default_recipe, argv, PUBLISHED)), sys.argv[1:]
    )
