"""From a loss to new weights: mixed precision, accumulation, clipping, averaged weights; flags of one step."""

import contextlib
import os

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from core.engine import distributed
from core.engine.optim import build_optimizer, build_scheduler
from core.errors import InputError

AMP_TYPES = {"off": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def autocast(device, amp):
    """Mixed precision as a switch: `amp` is "off", "fp16" or "bf16"."""
    return torch.autocast(device.type, AMP_TYPES[amp], enabled=amp != "off")


def seed_everything(seed, deterministic=False):
    """Seed torch, and with `deterministic` ask for the same bits on a GPU, too.

    Operators without a deterministic kernel warn instead of stopping the run.
    """
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at the first CUDA call
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic, warn_only=True)


def freeze(network, part, frozen, batch_norm=False):
    """Let `part` of `network` learn or not.

    Args:
        part: submodule whose parameters stop learning while `frozen`.
        batch_norm: every BatchNorm keeps its statistics (its weight and bias still learn).

    Returns:
        the modules that `train_one_epoch` must keep in evaluation mode.
    """
    for parameter in part.parameters():
        parameter.requires_grad_(not frozen)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise InputError("--freeze-epochs leaves nothing to learn: the loss trains no part but the frozen backbone")
    kept = [m for m in network.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)] if batch_norm else []
    return [*kept, part] if frozen else kept


class Updater:
    """Optimisers, learning-rate schedule, gradient scaler and averaged weights of one run.

    Args:
        network: the bare network (not wrapped for DDP), on its device.
        loss: `LossSum`, or an empty module where the network computes its losses itself. If it has parameters, the
            centers of the center loss, they get plain SGD of their own as in Luo et al. 2019, at a rate that does not
            depend on the weight of that loss.
        args: optimiser options of `core.engine.options`, `amp`, `channels_last`.
        batches_per_epoch: None for a learning rate per epoch, with `args.warmup_epochs`; a number for one per update,
            with `args.warmup_iterations`.
    """

    def __init__(self, network, loss, args, device, batches_per_epoch=None):
        self.network, self.loss, self.device = network, loss, device
        self.accumulate, self.clip = args.accumulate, args.clip_gradient
        self.memory_format = torch.channels_last if args.channels_last else torch.preserve_format
        network.to(memory_format=self.memory_format)
        optimizer = build_optimizer(
            network.parameters(), args.optimizer, lr=args.lr, weight_decay=args.weight_decay, momentum=args.momentum
        )
        self.optimizers = [optimizer]
        if list(loss.parameters()):
            rate = args.center_lr / loss.parameter_scale
            self.optimizers.append(torch.optim.SGD(loss.parameters(), lr=rate))
        self.rate_per_update = batches_per_epoch is not None
        steps = -(-batches_per_epoch // self.accumulate) if self.rate_per_update else 1
        self.scheduler = build_scheduler(
            optimizer,
            args.schedule,
            epochs=max(args.epochs, 1),
            steps_per_epoch=steps,
            warmup_steps=args.warmup_iterations if self.rate_per_update else args.warmup_epochs,
            warmup_factor=args.warmup_factor,
            milestones=args.milestones,
            step_size=args.step_size,
            gamma=args.gamma,
            min_lr=args.min_lr,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        self.ema = (
            AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(args.ema), use_buffers=True) if args.ema else None
        )

    @property
    def averaged(self):
        """The network to evaluate: the averaged one where there is one."""
        return self.ema.module if self.ema else self.network

    @property
    def learning_rate(self):
        return self.scheduler.get_last_lr()[0]

    def to_device(self, images):
        return images.to(self.device, non_blocking=True, memory_format=self.memory_format)

    @contextlib.contextmanager
    def batch(self, model, step, steps):
        """One batch of an epoch of `steps`; yields the function that takes the loss backward.

        Gradients add up, and the last batch of each group updates the weights. The last group of an epoch may be
        smaller; each group counts with the mean of its batches. DDP exchanges gradients only in the batch that
        updates.
        """
        group_start = step - step % self.accumulate
        group_size = min(self.accumulate, steps - group_start)
        updates = step == group_start + group_size - 1

        def backward(loss):
            with distributed.collective("gradients"):
                self.scaler.scale(loss / group_size).backward()

        no_sync = getattr(model, "no_sync", None)
        with no_sync() if no_sync and not updates else contextlib.nullcontext():
            yield backward
        if updates:
            self._update()

    def _update(self):
        distributed.average_gradients(self.loss.parameters())
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.clip)
        scale = self.scaler.get_scale()
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update_parameters(self.network)
        overflowed = self.scaler.get_scale() < scale  # then no step was taken
        if self.rate_per_update and not overflowed:
            self.scheduler.step()

    def end_epoch(self):
        if not self.rate_per_update:
            self.scheduler.step()

    def state_dict(self):
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
        }

    def load_state_dict(self, state):
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        if bool(self.ema) != bool(state["ema"]):
            raise ValueError(f"it was saved {'with' if state['ema'] else 'without'} averaged weights (--ema)")
        if self.ema:
            self.ema.load_state_dict(state["ema"])
