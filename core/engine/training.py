"""One epoch of any training, and what its loss dict tells: the same for re-identification and for detection."""

import time

import torch
from tqdm import tqdm

from core.data.loading import batches
from core.data.randomness import derive_seed
from core.engine import distributed
from core.engine.log import progress_is_shown
from core.errors import InputError


def train_one_epoch(model, compute_losses, loader, updater, *, epoch, seed, frozen=()):
    """One pass over `loader`; returns the mean of the loss, of each of its parts, and images per second over all ranks.

    Args:
        model: the network, wrapped for DDP or not.
        compute_losses: batch -> dict of the weighted parts of the loss; it calls the model.
        loader: its batches are dicts with a list "path"; its batch sampler has `set_epoch`.
        frozen: modules kept in evaluation mode (a frozen backbone, BatchNorm with `--freeze-batch-norm`).

    Raises InputError on every rank together when a part of the loss is not finite on any of them.
    """
    model.train()
    for module in frozen:
        module.eval()
    # Dropout and the choice of RoIs are functions of (seed, epoch, rank), so a resumed run repeats them.
    torch.manual_seed(derive_seed("dropout", seed, epoch, distributed.rank()))
    loader.batch_sampler.set_epoch(epoch)
    sums, images, start = {}, 0, time.perf_counter()
    bar = tqdm(batches(loader), f"epoch {epoch}", len(loader), leave=False, disable=not progress_is_shown())
    for step, batch in enumerate(bar):
        with updater.batch(model, step, len(loader)) as backward:
            parts = compute_losses(batch)
            means = checked_means(parts, batch["path"], epoch, step)
            backward(sum(parts.values()))
        for name, value in means.items():
            sums[name] = sums.get(name, 0.0) + value
        images += len(batch["path"])
        bar.set_postfix(loss=f"{sum(means.values()):.3f}")
    distributed.average_buffers(model)
    if updater.ema:
        distributed.average_buffers(updater.ema)
    seconds = time.perf_counter() - start
    parts = {name: value / len(loader) for name, value in sums.items()}
    return {
        "loss": sum(parts.values()),
        **parts,
        "images_per_second": images * distributed.world_size() / seconds,
    }


def checked_means(parts, paths, epoch, step):
    """Each part's mean over the ranks; one small collective per step also tells all ranks of any that is not finite."""
    means = distributed.all_reduce_mean(torch.stack([value.detach() for value in parts.values()])).tolist()
    if not all(map(torch.isfinite, torch.tensor(means))):
        own = {name: value.item() for name, value in parts.items()}
        everyone = distributed.gather_objects((own, list(paths)))
        rank, (values, paths) = next(
            (rank, report)
            for rank, report in enumerate(everyone)
            if not torch.tensor(list(report[0].values())).isfinite().all()
        )
        listed = ", ".join(f"{name} {value}" for name, value in values.items())
        raise InputError(
            f"the loss is not finite in epoch {epoch}, step {step}, on rank {rank} ({listed}); try a lower --lr, "
            f"--clip-gradient or --amp off; pictures of the batch: {' '.join(paths)}"
        )
    return dict(zip(parts, means, strict=True))


def changed_options(saved, args, without_effect):
    """What a resumed run has otherwise than its checkpoint, for the line that says that it goes on; "" if nothing.

    The optimiser goes on with its saved settings; everything else follows the new options.
    """
    changed = [
        f"{key} {saved[key]} -> {value}"
        for key, value in vars(args).items()
        if key in saved and key not in without_effect | RUN_ALONE and saved[key] != value
    ]
    return f"; changed (lr and weight decay stay as saved): {', '.join(changed)}" if changed else ""


# Options that say where and how a run is done, not what it computes.
RUN_ALONE = {"name", "output", "resume", "data", "workers", "device", "timeout", "eval_every", "eval_batch_size"}
RUN_ALONE |= {"epochs", "tensorboard", "wandb", "recipe", "compile"}


def check_same_network(state, path, network_options):
    """Raise InputError where a checkpoint was trained with other network options, naming what differs."""
    saved = state["network"]
    differing = [key for key in network_options if saved.get(key) != network_options[key]]
    if differing:
        listed = ", ".join(f"{key} is {saved.get(key)} there and {network_options[key]} here" for key in differing)
        raise InputError(f"{path} holds another network: {listed}; give the options it was started with")


def restore(state, path, *holders):
    """Put what a checkpoint holds back where it came from. Raises InputError where it doesn't fit.

    holders: pairs of a key of the checkpoint, None for all of it, and the module or `Updater` that it belongs to.
    """
    try:
        for key, holder in holders:
            holder.load_state_dict(state if key is None else state[key])
    except (KeyError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"can't continue from {path}: {reason}; give the options it was started with") from error
