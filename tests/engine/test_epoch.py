"""One epoch of ReID training as train_reid.py runs it: what is random in it, what it reports, where it stops."""

import math
from argparse import Namespace

import pytest
import torch
from torch import nn

from core.data.reid_datasets import load_reid_dataset
from core.engine import distributed, reid
from core.engine.epoch import Epoch, seed_everything
from core.engine.reid_training import build_step
from core.errors import InputError
from core.losses import build_loss
from core.models.reid import ReIDOutput, build_reid_model
from train_reid import train_one_epoch

CPU = torch.device("cpu")
OPTIONS = {
    "height": 16, "width": 16, "workers": 0, "ids_per_batch": 2, "images_per_id": 2, "seed": 0, "center_lr": 0.5,
    "head_lr": 0.0, "iterations_per_epoch": 0, "flip": 0.5, "pad": 2, "autoaugment": False, "blur": 0.0, "erasing": 0.5,
    "optimizer": "adam", "lr": 1e-3, "weight_decay": 0.0, "momentum": 0.0, "epochs": 3, "schedule": "step",
    "milestones": [], "step_size": 9, "gamma": 0.1, "min_lr": 0.0, "warmup_steps": 0, "warmup_factor": 0.0,
    "clip_gradient": 0.0, "accumulate": 1, "ema": 0.0, "amp": "off", "channels_last": False, "hide_background": 0.0,
    "mask_target": None, "mask_size": (4, 4), "sigma_ratio": 0.1,
}  # fmt: skip


class Tiny(nn.Module):
    """A network with dropout for pictures of 16x16."""

    def __init__(self, num_classes):
        super().__init__()
        self.embed = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8), nn.Dropout(0.5))
        self.classifier = nn.Linear(8, num_classes)

    def forward(self, images):
        feature = self.embed(images)
        return ReIDOutput(feature, [feature], [self.classifier(feature)])


@pytest.fixture
def data(baggage):
    return load_reid_dataset("mvb", baggage)


def options(**changes):
    return Namespace(**{**OPTIONS, **changes})


def parts_for(data, args, loader=None, network=None):
    """Network, loss, loader and `Step`."""
    torch.manual_seed(0)
    network = network or Tiny(len({sample.id for sample in data.train}))
    criterion = build_loss("cross_entropy+0.5*triplet", 6, 8)
    loader = loader or reid.build_train_loader(args, data, CPU)
    return network, criterion, loader, build_step(network, criterion, args, CPU, len(loader))


def train(data, epochs, loader=None, network=None, **changes):
    """Weights after each epoch."""
    args = options(**changes)
    network, criterion, loader, step = parts_for(data, args, loader, network)
    weights = []
    for epoch in epochs:
        step.epoch = epoch - 1
        train_one_epoch(network, criterion, loader, step, args, CPU)
        weights.append(torch.cat([value.flatten().clone() for value in network.state_dict().values()]))
    return weights


def test_the_number_of_workers_changes_nothing(data):
    """Neither the pictures nor dropout, in no epoch: a loader draws seeds for its workers, and more in its first."""
    alone, with_worker = (train(data, (1, 2), workers=workers) for workers in (0, 1))
    for first, second in zip(alone, with_worker, strict=True):
        assert torch.equal(first, second)


def test_an_epoch_is_the_same_for_a_loader_that_is_new_and_one_that_is_not(data):
    used = reid.build_train_loader(options(workers=1), data, CPU)
    train(data, (1,), loader=used)
    torch.rand(7)  # nor does it matter what was drawn before
    assert torch.equal(train(data, (2,), loader=used)[0], train(data, (2,), workers=1)[0])
    assert not torch.equal(train(data, (1,))[0], train(data, (2,))[0])


def test_a_real_network_with_dropout_on_any_number_of_workers(data):
    def weights(workers):
        torch.manual_seed(1)
        network = build_reid_model("resnet18", 6, dropout=0.5)
        return train(data, (1,), network=network, workers=workers, height=32, width=32)[0]

    assert torch.equal(weights(0), weights(1))


def test_an_epoch_reports_means_of_the_parts_as_they_are_minimised(data):
    args = options()
    network, criterion, loader, step = parts_for(data, args)
    seen, modes = [], []

    def spy(output, labels, targets):
        modes.append((network.training, network.embed.training))
        parts = criterion(output, labels, targets)
        seen.append({name: value.item() for name, value in parts.items()})
        return parts

    row = train_one_epoch(network, spy, loader, step, args, CPU, frozen=[network.embed])
    assert list(row) == ["epoch", "lr", "loss", "cross_entropy", "triplet", "images_per_second"]
    assert row["epoch"] == step.epoch == 1 and row["lr"] == 1e-3 and row["images_per_second"] > 0
    assert len(seen) == len(loader) == 6 and set(modes) == {(True, False)}
    for name in ("cross_entropy", "triplet"):
        assert row[name] == pytest.approx(sum(parts[name] for parts in seen) / len(seen))
    assert row["loss"] == pytest.approx(row["cross_entropy"] + row["triplet"])


@pytest.mark.parametrize("kind", ["box", None])
def test_targets_are_made_of_each_batch(data, kind):
    args = options(mask_target=kind)
    network, _, loader, step = parts_for(data, args)
    received = []

    def criterion(output, labels, targets):
        received.append(targets)
        return {"some": output.logits[0].square().mean()}

    train_one_epoch(network, criterion, loader, step, args, CPU)
    assert len(received) == len(loader)
    assert all(targets is None if kind is None else targets.shape == (4, 1, 4, 4) for targets in received)


def nan_on_rank_1(rank, data, whole_script):
    """The message that stops the epoch, and the pictures of the batch that this rank was at."""
    batches = []

    def main(_):
        distributed.setup("cpu", timeout_minutes=0.5)
        args = options()
        network, criterion, loader, step = parts_for(data, args)
        step.epoch = 2
        model = distributed.wrap(network, CPU)
        collate = loader.collate_fn

        def noted(items):
            batch = collate(items)
            batches.append(batch["path"])
            return batch

        def spoilt(output, labels, targets):
            parts = criterion(output, labels, targets)
            number = len(batches) - 1
            return {**parts, "triplet": parts["triplet"] * math.nan} if (rank, number) == (1, 1) else parts

        loader.collate_fn = noted
        train_one_epoch(model, spoilt, loader, step, args, CPU)

    if whole_script:
        distributed.run_script(main, None)
    try:
        main(None)
    except InputError as error:
        distributed.barrier()
        distributed.cleanup()
        return str(error), batches


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_with_its_report(launch, data):
    results, codes, _ = launch(nan_on_rank_1, data, False)
    assert codes == [0, 0]
    (message, batches_of_0), (same, batches_of_1) = results
    assert message == same and len(batches_of_0) == len(batches_of_1) == 2  # both in the second step
    assert "not finite in epoch 3, step 1, on rank 1 (cross_entropy " in message and "triplet nan)" in message
    assert "cross_entropy nan" not in message
    assert message.endswith("pictures of the batch: " + " ".join(batches_of_1[-1]))
    assert not set(batches_of_0[-1]) & set(batches_of_1[-1])


def test_a_script_ends_with_that_one_line(launch, data):
    _, codes, errors = launch(nan_on_rank_1, data, True)
    assert codes == [2, 2]
    assert errors[0].startswith("error: the loss is not finite") and errors[0].count("\n") == 1


class Loader(list):
    """Batches without pictures; the batch sampler notes the epoch that it is told."""

    def __init__(self, *sizes):
        super().__init__({"path": ["x.jpg"] * size} for size in sizes)
        self.batch_sampler, self.told = self, []

    def set_epoch(self, epoch):
        self.told.append(epoch)


def test_several_steps_of_a_batch_are_parts_of_one_loss():
    """As a GAN has them: the means of both are added up."""
    loader = Loader(2, 3)
    progress = Epoch(loader, 4, seed=0)
    for number, _ in enumerate(progress):
        progress.add({"generator": 1.0 + number})
        progress.add({"discriminator": 10.0})
    row = progress.row()
    assert loader.told == [4] and row.pop("images_per_second") == pytest.approx(5 / progress.seconds)
    assert row == {"loss": 11.5, "generator": 1.5, "discriminator": 10.0}


def test_what_is_drawn_in_an_epoch_is_a_function_of_seed_and_epoch():
    def drawn(epoch, seed):
        return [torch.rand(1).item() for _ in Epoch(Loader(1, 1), epoch, seed)]

    assert drawn(1, 0) == drawn(1, 0)
    assert len({drawn(epoch, seed)[0] for epoch in (1, 2) for seed in (0, 1)}) == 4


def test_seeding_repeats_the_initial_weights():
    weights = []
    for _ in range(2):
        seed_everything(7)
        weights.append(nn.Linear(3, 3).weight)
    assert torch.equal(*weights)
