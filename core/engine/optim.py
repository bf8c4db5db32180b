"""Optimisers, and learning rate schedules as pure functions of time: of the epoch, or of the update within it.

For an exponential moving average of the weights torch has what is needed:
`AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))` of torch.optim.swa_utils.
"""

import math

import torch

from core.errors import InputError

OPTIMIZERS = ("adam", "adamw", "amsgrad", "nadam", "sgd")
SCHEDULES = ("step", "multistep", "linear", "cosine", "cosine_to_min", "one_cycle")
WARMUPS = ("linear", "constant", "exponential", "count")


def parameter_groups(network, head_lr):
    """The parameters of a network for `build_optimizer`; with `head_lr` above 0 the head has that rate, the backbone
    the optimiser's own."""
    if not head_lr:
        return [{"params": list(network.parameters())}]
    backbone = list(network.backbone.parameters())
    known = set(map(id, backbone))
    head = [parameter for parameter in network.parameters() if id(parameter) not in known]
    return [{"params": backbone}, {"params": head, "lr": head_lr}]


def build_optimizer(parameters, name, lr, *, weight_decay=0.0, momentum=0.9, nesterov=False):
    """The optimiser of a name.

    Args:
        parameters: parameters, or torch's parameter groups (dicts) where some have settings of their own. The weight
            decay is for all of them, BatchNorm and biases included, as in the published recipes.
        name: "adam" (weight decay as L2 in the gradient), "amsgrad" (Adam that never takes larger steps again), "nadam"
            (Adam with Nesterov's momentum), "adamw" (decoupled weight decay) or "sgd". InputError otherwise.
        lr: above 0. InputError otherwise.
        momentum, nesterov: of sgd.
    """
    _require(0 < lr < math.inf, f"learning rate is {lr}: give a number above 0")
    _require(name in OPTIMIZERS, f"unknown optimiser {name!r}: use one of {', '.join(OPTIMIZERS)}")
    how = {"lr": lr, "weight_decay": weight_decay}
    if name == "sgd":
        _require(momentum or not nesterov, "--nesterov needs a --momentum above 0")
        return torch.optim.SGD(parameters, **how, momentum=momentum, nesterov=nesterov)
    if name == "amsgrad":
        return torch.optim.Adam(parameters, **how, amsgrad=True)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "nadam": torch.optim.NAdam}[name](parameters, **how)


def warmup_factor_at(step, steps, start, kind="linear"):
    """What the rate is multiplied with: `start` in step 0, 1 from step `steps` on.

    Steps are epochs in re-identification (Luo et al. 2019, section 3.1) and updates in detection (Goyal et al. 2017,
    section 2.2). On the way there it is "linear", "constant" (`start`), "exponential" (fast-reid), or, whatever
    `start` says, "count": 1/steps, 2/steps, ... 1 (LightMBN).
    """
    if step >= steps:
        return 1.0
    progress = step / steps
    if kind == "count":
        return (step + 1) / steps
    if kind == "exponential":
        return start ** (1 - progress)
    return start if kind == "constant" else start * (1 - progress) + progress


def step_factor(epoch, step_size, gamma):
    """gamma once more every `step_size` epochs."""
    return gamma ** (epoch // step_size)


def multistep_factor(epoch, milestones, gamma):
    """gamma for every milestone that has been reached."""
    return gamma ** sum(milestone <= epoch for milestone in milestones)


def linear_factor(epoch, epochs, decay_from):
    """1 until epoch `decay_from`, then in a straight line to 0 at `epochs` (CycleGAN: Zhu et al. 2017)."""
    return min(max((epochs - epoch) / max(epochs - decay_from, 1), 0.0), 1.0)


def cosine_factor(epoch, epochs, warmup_epochs, min_lr_ratio):
    """Half a cosine from 1, when the warm-up ends, to min_lr_ratio at `epochs` (Loshchilov and Hutter 2017, eq. 5).

    The last epoch is epochs - 1, so it still runs a little above the minimum, as with torch's CosineAnnealingLR.
    LightMBN reaches the minimum in its last epoch: that is this function with epochs - 1 ("cosine_to_min").
    """
    progress = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1)
    progress = min(max(progress, 0.0), 1.0)
    return min_lr_ratio + (1 - min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2


ONE_CYCLE_RISE = 0.3  # part of the training in which the rate climbs
ONE_CYCLE_START, ONE_CYCLE_END = 1 / 25, 1 / 25e4  # of the highest rate


def one_cycle_factor(progress):
    """Half a cosine up to 1 and one down to almost nothing (Smith and Topin 2018), progress from 0 to 1.

    The numbers are those of torch's OneCycleLR; the momentum stays as it is.
    """
    if progress < ONE_CYCLE_RISE:
        start, end, part = ONE_CYCLE_START, 1.0, progress / ONE_CYCLE_RISE
    else:
        start, end, part = 1.0, ONE_CYCLE_END, min((progress - ONE_CYCLE_RISE) / (1 - ONE_CYCLE_RISE), 1.0)
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


def build_scheduler(
    optimizer,
    schedule,
    *,
    epochs,
    steps_per_epoch=1,
    warmup="linear",
    warmup_steps=0,
    warmup_factor=0.01,
    milestones=(),
    step_size=1,
    gamma=0.1,
    decay_from=0,
    min_lr=0.0,
):
    """The learning rate of every step, to be stepped once after each: an epoch, or an update.

    The schedule multiplies every group's own rate. Milestones and steps count from epoch 0 and act during the warm-up
    too, as in the strong baseline; the cosine begins when the warm-up ends.

    Args:
        schedule: "step" (step_size, gamma), "multistep" (milestones, gamma), "linear" (epochs, decay_from), "cosine"
            (epochs, min_lr), "cosine_to_min" (the same, whose last step is at the minimum), or "one_cycle", whose
            highest rate is the optimiser's own.
        epochs: length of the training.
        steps_per_epoch: how often the scheduler is stepped in an epoch.
        warmup, warmup_steps, warmup_factor: kind, steps and start of `warmup_factor_at`; 0 steps is no warm-up.
        milestones, step_size, decay_from: in epochs.
        min_lr: where the cosine ends, for a group at the optimiser's own rate; the others end at the same part of
            theirs.

    Returns:
        LambdaLR. Its state holds numbers only, so it is loaded with weights_only=True.

    Raises:
        InputError for an unknown schedule or a number out of range.
    """
    _require(epochs >= 1, f"{epochs} epochs: give at least 1")
    _require(warmup_steps >= 0, f"{warmup_steps} steps of warm-up: give 0 or more")
    _require(0 <= warmup_factor <= 1, f"warm-up starts at {warmup_factor}: give a part of the rate, 0 to 1")
    _require(step_size >= 1, f"step size is {step_size}: give at least 1 epoch")
    _require(0 < gamma < math.inf, f"gamma is {gamma}: give a number above 0")
    lr = optimizer.defaults["lr"]
    _require(warmup in WARMUPS, f"unknown warm-up {warmup!r}: use one of {', '.join(WARMUPS)}")
    if schedule in ("cosine", "cosine_to_min"):
        _require(0 <= min_lr <= lr, f"--min-lr {min_lr:g} of the cosine is above --lr {lr:g}")
    cosine = {"warmup_epochs": warmup_steps / steps_per_epoch, "min_lr_ratio": min_lr / lr if lr else 0.0}
    decays = {
        "step": lambda epoch: step_factor(epoch, step_size, gamma),
        "multistep": lambda epoch: multistep_factor(epoch, milestones, gamma),
        "linear": lambda epoch: linear_factor(epoch, epochs, decay_from),
        "cosine": lambda epoch: cosine_factor(epoch, epochs, **cosine),
        "cosine_to_min": lambda epoch: cosine_factor(epoch, epochs - 1 / steps_per_epoch, **cosine),
        "one_cycle": lambda epoch: one_cycle_factor(epoch / epochs),
    }
    _require(schedule in decays, f"unknown schedule {schedule!r}: use one of {', '.join(SCHEDULES)}")
    decay = decays[schedule]
    # A function and not an object: LambdaLR writes objects into its state.
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: warmup_factor_at(step, warmup_steps, warmup_factor, warmup) * decay(step / steps_per_epoch),
    )


def _require(condition, message):
    if not condition:
        raise InputError(message)
