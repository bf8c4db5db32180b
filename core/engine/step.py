"""One optimiser step: AMP, accumulation, clipping, averaged weights; no rank goes on from a loss that is not finite.

    with step.forward(model), autocast(device, args.amp):
        output = model(batch["image"])
    step(criterion(output, batch["id"]), batch["path"])

Networks that learn together (mutual teaching) share a Step; adversaries (a GAN) have one each, called in turn.
"""

import contextlib
import math
import statistics

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from core.engine import distributed
from core.errors import InputError

AMP_TYPES = {"off": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def autocast(device, amp):
    """Mixed precision as a switch: `amp` is "off", "fp16" or "bf16"."""
    return torch.autocast(device.type, AMP_TYPES[amp], enabled=amp != "off")


def memory_format(args):
    """torch's layout of the weights and pictures that `--channels-last` asks for."""
    return torch.channels_last if args.channels_last else torch.preserve_format


class MeanTeacher(AveragedModel):
    """A teacher whose parameters are the moving average of its student's (Tarvainen and Valpola 2017).

    In contrast to averages that are only evaluated, its BatchNorm follows its own passes in training mode.
    """

    def __init__(self, student, decay):
        super().__init__(student, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def update_parameters(self, student):
        own, new = ([value.detach() for value in network.parameters()] for network in (self.module, student))
        self.multi_avg_fn(own, new, self.n_averaged)


class Step:
    """From the losses of a batch to new weights.

    Args:
        networks: bare networks (not wrapped for DDP), on their device.
        optimizers: they step together. Parameters that are in no network (the centers of a loss) are unknown to DDP:
            their gradients are averaged over ranks here.
        scheduler: `LambdaLR` of the first optimiser; stepped after each update if `per_update`, else after each epoch.
        args: `amp`, `accumulate`, `clip_gradient` (norm of each network; 0: none), `ema` (decay; 0: no averages).
        batches_per_epoch: the last group of an epoch may be smaller than `accumulate`.
        teachers: the averages are called in training, too (`MeanTeacher`).

    Attributes:
        epoch: epochs that are finished.
        averages: an `AveragedModel` for each network, in their order; empty without `args.ema`.
    """

    def __init__(
        self, networks, optimizers, scheduler, args, device, *, batches_per_epoch, per_update=False, teachers=False
    ):
        self.networks, self.optimizers, self.scheduler = networks, optimizers, scheduler
        self.batches_per_epoch, self.per_update = batches_per_epoch, per_update
        self.accumulate, self.clip = args.accumulate, args.clip_gradient
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        evaluated = {"multi_avg_fn": get_ema_multi_avg_fn(args.ema), "use_buffers": True}
        self.averages = [
            MeanTeacher(network, args.ema) if teachers else AveragedModel(network, **evaluated)
            for network in (networks if args.ema else ())
        ]
        known = {id(parameter) for network in networks for parameter in network.parameters()}
        trained = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        self.unknown_to_ddp = [parameter for parameter in trained if id(parameter) not in known]
        self.epoch = self.batch = 0  # finished epochs; batches of the current one
        self.rates = []  # learning rates of its updates
        self.steps_per_epoch = -(-batches_per_epoch // self.accumulate) if per_update else 1  # of the scheduler

    @property
    def evaluated(self):
        """The networks to evaluate: the averaged ones where there are any."""
        return [average.module for average in self.averages] or self.networks

    def _group(self):
        """(batches that share the next update, whether the coming batch is the last of them)."""
        place = self.batch % self.accumulate
        size = min(self.accumulate, self.batches_per_epoch - self.batch + place)
        return size, place == size - 1

    @contextlib.contextmanager
    def forward(self, *models):
        """Around the forward pass, which tells DDP whether to exchange gradients: only in the batch that updates."""
        _, updates = self._group()
        with distributed.collective("forward"), contextlib.ExitStack() as stack:
            for model in models:
                if not updates and hasattr(model, "no_sync"):
                    stack.enter_context(model.no_sync())
            yield

    def __call__(self, losses, paths):
        """Take a batch's losses backward; the last batch of a group updates the weights with the group's mean.

        Args:
            losses: dict name -> weighted scalar; their sum is minimised.
            paths: of the pictures of the batch, for the message.

        Returns:
            dict name -> mean over ranks, a float: what is minimised is what is logged.

        Raises:
            InputError: on every rank together where a part is not finite on any of them.
            ValueError: the epoch has had all its batches.
        """
        if self.batch == self.batches_per_epoch:
            raise ValueError(f"the epoch has {self.batches_per_epoch} batches: call end_epoch first")
        means = distributed.all_reduce_mean(torch.stack([value.detach() for value in losses.values()])).tolist()
        if not all(map(math.isfinite, means)):
            raise InputError(self._not_finite(losses, paths))
        size, updates = self._group()
        with distributed.collective("gradients"):
            self.scaler.scale(sum(losses.values()) / size).backward()
        if updates:
            self._update()
        self.batch += 1
        return dict(zip(losses, means, strict=True))

    def _update(self):
        distributed.average_gradients(self.unknown_to_ddp)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        for network in self.networks if self.clip else ():
            torch.nn.utils.clip_grad_norm_(network.parameters(), self.clip)
        scale = self.scaler.get_scale()
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        for average, network in zip(self.averages, self.networks, strict=bool(self.averages)):
            average.update_parameters(network)
        overflowed = self.scaler.get_scale() < scale  # then no step was taken
        if not overflowed:
            self.rates += self.scheduler.get_last_lr()[:1]
        if self.per_update and not overflowed:
            self.scheduler.step()

    def _not_finite(self, losses, paths):
        own = {name: value.item() for name, value in losses.items()}
        everyone = distributed.gather_objects((own, list(paths)))
        rank = next(i for i, (values, _) in enumerate(everyone) if not all(map(math.isfinite, values.values())))
        values, paths = everyone[rank]
        listed = ", ".join(f"{name} {value}" for name, value in values.items())
        return (
            f"the loss is not finite in epoch {self.epoch + 1}, step {self.batch}, on rank {rank} ({listed}); try a "
            f"lower --lr, --clip-gradient or --amp off; pictures of the batch: {' '.join(paths)}"
        )

    def end_epoch(self):
        """Each rank's BatchNorm has followed its own batches: from here on all ranks have the same statistics.

        Returns the learning rate of the epoch, the mean over its updates.
        """
        rates, self.rates = self.rates or self.scheduler.get_last_lr()[:1], []
        for network in (*self.networks, *self.averages):
            distributed.average_buffers(network)
        if not self.per_update:
            self.scheduler.step()
        self.epoch, self.batch = self.epoch + 1, 0
        return statistics.fmean(rates)

    def state_dict(self):
        return {
            "epoch": self.epoch,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scheduler": {**self.scheduler.state_dict(), "steps_per_epoch": self.steps_per_epoch},
            "scaler": self.scaler.state_dict(),
            "ema": [average.state_dict() for average in self.averages],
        }

    def load_state_dict(self, state):
        """Go on where the state was saved; settings of the optimisers, the rate included, are those of now.

        Where an epoch has another number of updates now, the schedule goes on at the same part of the training.
        Raises ValueError where the state is of other optimisers or averages.
        """
        saved = state["ema"] or []
        saved = [saved] if isinstance(saved, dict) else saved  # a single one, in older checkpoints
        if bool(self.averages) != bool(saved):
            raise ValueError(f"it was saved {'with' if saved else 'without'} averaged weights (--ema)")
        for average, values in zip(self.averages, saved, strict=True):
            average.load_state_dict(values)
        for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
            groups, before = optimizer.state_dict()["param_groups"], values["param_groups"]
            if len(groups) != len(before):
                raise ValueError(f"it was saved {'with' if len(before) > 1 else 'without'} --head-lr")
            if any(_gathers(now) != _gathers(then) for now, then in zip(groups, before, strict=True)):
                raise ValueError("it was saved with another --optimizer")
            groups = [{**now, "params": then["params"]} for now, then in zip(groups, before, strict=True)]
            optimizer.load_state_dict({"state": values["state"], "param_groups": groups})
        self.scaler.load_state_dict(state["scaler"])
        self.epoch = state["epoch"]
        self._go_to(state["scheduler"])

    def _go_to(self, saved):
        """The rate that the schedule of now has at the time of a saved one."""
        scheduler, saved = self.scheduler, dict(saved)
        then = saved.pop("steps_per_epoch", self.steps_per_epoch)  # older checkpoints don't say it
        time = round(saved["last_epoch"] * self.steps_per_epoch / then)
        rates = [base * factor(time) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler.load_state_dict(saved | {"base_lrs": scheduler.base_lrs, "last_epoch": time, "_last_lr": rates})


def _gathers(group):
    """What an optimiser with this parameter group gathers: AdamW the same as Adam, the others each something else."""
    return [bool(group.get(key)) for key in ("betas", "momentum_decay", "amsgrad")]
