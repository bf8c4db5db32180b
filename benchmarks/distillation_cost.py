"""What distillation adds to a training step, beyond the student's own step and the teacher's forward pass.

    python -m benchmarks.distillation_cost
    python -m benchmarks.distillation_cost --teacher resnet101 --batch 64 --size 256 128 --amp bf16

All take turns in one process. The ratio is that of the distilled step to the step of the student alone, plus the
forward pass of the teacher where there is one: 1.00 means that losses and adapters cost nothing.
"""

import argparse
import time
from functools import partial

import torch
from torch import nn

from benchmarks.turns import medians
from core.engine.step import AMP_TYPES, autocast
from core.losses import build_loss
from core.losses.distillation import DISTILLATION_LOSSES, build_distillation
from core.models.reid import build_reid_model

ALL = "+".join(name for name in DISTILLATION_LOSSES if name != "self")


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="resnet18", help="default: resnet18")
    parser.add_argument("--teacher", default="resnet50", help="default: resnet50")
    parser.add_argument("--batch", type=int, default=32, help="pictures in a batch (default: 32)")
    parser.add_argument("--size", type=int, nargs=2, default=(128, 64), help="height and width (default: 128 64)")
    parser.add_argument("--kd", nargs="*", default=[*DISTILLATION_LOSSES, ALL], help="default: each, and all at once")
    parser.add_argument("--hint-stages", type=int, nargs="*", default=[3], help="of features (default: 3)")
    parser.add_argument("--steps", type=int, default=9, help="turns (default: 9)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if any")
    parser.add_argument("--amp", choices=AMP_TYPES, default="off", help="mixed precision (default: off)")
    return parser


def main(args):
    device = torch.device(args.device)
    labels = torch.arange(args.batch, device=device) // 4
    student, teacher = (build_reid_model(name, len(labels)).to(device) for name in (args.student, args.teacher))
    teacher.eval().requires_grad_(False)
    images = torch.randn(args.batch, 3, *args.size, device=device)
    criterion = build_loss("cross_entropy+triplet", len(labels), student.feature_dim)

    @torch.no_grad()
    def look():
        with autocast(device, args.amp):
            return teacher(images, return_stages=True)

    def step(lesson=None, taught=False):
        with autocast(device, args.amp):
            output = student(images, return_stages=True)
        losses = criterion(output, labels)
        if lesson:
            losses |= lesson(output, look() if taught else output)
        sum(losses.values()).backward()
        optimizer.step()  # parameters without a gradient, the adapters of other lessons, stay as they are
        optimizer.zero_grad()

    how = {"hint_stages": args.hint_stages}
    lessons = nn.ModuleDict({kd: build_distillation(kd, student, teacher, **how) for kd in args.kd})
    optimizer = torch.optim.Adam([*student.parameters(), *lessons.to(device).parameters()])
    cases = {"student": step, "teacher": look}
    cases |= {kd: partial(step, lesson, taught=kd != "self") for kd, lesson in lessons.items()}
    clock = time.process_time if device.type == "cpu" else None  # other work on the machine doesn't count
    found = medians(cases, device, args.steps, warmup=2, clock=clock)
    print(f"student {1e3 * found['student']:.1f} ms, teacher {1e3 * found['teacher']:.1f} ms")
    for kd in lessons:
        plain = found["student"] + (kd != "self") * found["teacher"]
        print(f"{kd}: {1e3 * found[kd]:.1f} ms, ratio {found[kd] / plain:.3f}")


if __name__ == "__main__":
    main(get_parser().parse_args())
