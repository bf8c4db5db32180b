"""One optimiser step: by hand, and as the trainings need it that have several networks, averages and optimisers."""

import math
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from core.engine import distributed
from core.engine.optim import build_scheduler
from core.engine.reid_training import build_step
from core.engine.step import MeanTeacher, Step, autocast
from core.errors import InputError
from core.losses import build_loss
from core.models.reid import ReIDOutput

OPTIONS = {
    "optimizer": "sgd", "lr": 0.1, "weight_decay": 0.0, "momentum": 0.0, "epochs": 4, "schedule": "multistep",
    "milestones": [2], "step_size": 1, "gamma": 0.1, "min_lr": 0.0, "warmup_steps": 0, "warmup_factor": 0.0,
    "clip_gradient": 0.0, "accumulate": 1, "ema": 0.0, "amp": "off", "channels_last": False, "center_lr": 0.5,
    "head_lr": 0.0,
}  # fmt: skip
CPU = torch.device("cpu")


def make(spec="cross_entropy", batches=1, **changes):
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    network.backbone = nn.Identity()  # all of it is the head
    criterion = build_loss(spec, num_classes=2, feature_dim=2)
    return network, build_step(network, criterion, SimpleNamespace(**{**OPTIONS, **changes}), CPU, batches)


def run(step, network, losses):
    """The next batches; batch i has the loss losses[i](network)."""
    for loss in losses:
        with step.forward(network):
            value = loss(network)
        step({"some": value}, ["x.jpg"])


def mean_of(inputs):
    return lambda network: network(inputs).square().mean()


def test_accumulated_batches_are_one_large_batch():
    torch.manual_seed(1)
    inputs = torch.randn(8, 3)
    whole, step = make()
    run(step, whole, [mean_of(inputs)])
    parts, step = make(accumulate=4, batches=4)
    run(step, parts, [mean_of(part) for part in inputs.split(2)])
    torch.testing.assert_close(parts.weight, whole.weight)


def test_the_last_group_of_an_epoch_may_be_smaller_and_counts_with_its_own_mean():
    torch.manual_seed(1)
    inputs = torch.randn(3, 3)
    whole, step = make(batches=2)
    run(step, whole, [mean_of(inputs[:2]), mean_of(inputs[2:])])
    parts, step = make(accumulate=2, batches=3)
    run(step, parts, [mean_of(part) for part in inputs.split(1)])
    torch.testing.assert_close(parts.weight, whole.weight)


def test_groups_begin_anew_with_each_epoch():
    """Three batches an epoch in groups of two: after five batches the second update of epoch 2 is still to come."""
    network, step = make(accumulate=2, batches=3)
    weights = []
    for batch in range(6):
        run(step, network, [mean_of(torch.ones(1, 3))])
        weights.append(network.weight.detach().clone())
        if batch == 2:
            step.end_epoch()
    changes = [not torch.equal(before, after) for before, after in zip(weights, weights[1:], strict=False)]
    assert changes == [True, True, False, True, True] and step.epoch == 1
    with pytest.raises(ValueError, match="end_epoch"):
        run(step, network, [mean_of(torch.ones(1, 3))])


def test_the_rate_may_change_with_every_update():
    """Two batches an update and three batches an epoch are two updates; the warm-up lasts both of them."""
    network, step = make(accumulate=2, batches=3, warmup_steps=2, warmup_factor=0.5, milestones=[])
    step.per_update = True
    used = []
    for _ in range(3):
        used += step.scheduler.get_last_lr()
        run(step, network, [mean_of(torch.ones(1, 3))])
    assert step.end_epoch() == pytest.approx((0.05 + 0.075) / 2)  # the mean over its updates, which the log has
    assert used == pytest.approx([0.05, 0.05, 0.075]) and step.scheduler.get_last_lr() == pytest.approx([0.1])


def test_clipping_bounds_the_step_by_hand():
    network, step = make(clip_gradient=1.0)
    before = network.weight.detach().clone()
    run(step, network, [lambda net: 30 * net.weight[0, 0] + 40 * net.weight[0, 1]])  # gradient (30, 40), norm 50
    torch.testing.assert_close(network.weight - before, torch.tensor([[-0.06, -0.08, 0], [0, 0, 0]]))


def test_averaged_weights_follow_by_hand():
    network, step = make(ema=0.5, batches=2)
    run(step, network, [lambda net: net.weight[0, 0]])  # the first update copies
    first = network.weight[0, 0].item()
    run(step, network, [lambda net: net.weight[0, 0]])
    (averaged,) = step.evaluated
    assert averaged is not network and make()[1].evaluated[0] is not averaged
    assert averaged.weight[0, 0].item() == pytest.approx((first + first - 0.1) / 2)


def test_the_schedule_is_stepped_once_an_epoch():
    _, step = make()
    rates = []
    for _ in range(4):
        rates += step.scheduler.get_last_lr()
        step.optimizers[0].step()
        step.end_epoch()
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01]) and step.epoch == 4


@pytest.mark.parametrize("weight", [1.0, 0.0005])
def test_centers_move_at_their_own_rate_whatever_the_weight_of_their_loss(weight):
    network, step = make(f"{weight}*center")
    (centers,) = step.unknown_to_ddp
    with torch.no_grad():
        centers.zero_()
    features = torch.tensor([[2.0, 0.0]])
    output = ReIDOutput(features, [features], [], None)
    criterion = build_loss(f"{weight}*center", num_classes=2, feature_dim=2)
    criterion.losses["center"].centers = centers
    step({**criterion(output, torch.tensor([0])), "nothing": 0 * network.weight.sum()}, ["x.jpg"])
    unit = build_loss("center", num_classes=2, feature_dim=2)
    with torch.no_grad():
        next(unit.parameters()).zero_()
    sum(unit(output, torch.tensor([0])).values()).backward()
    torch.testing.assert_close(centers, -0.5 * next(unit.parameters()).grad)


def test_saved_and_loaded_it_goes_on_as_if_nothing_had_happened():
    torch.manual_seed(1)
    batches = [mean_of(torch.randn(4, 3)) for _ in range(4)]
    settings = {"optimizer": "adam", "ema": 0.9}
    straight, step = make(**settings)
    for batch in batches:
        run(step, straight, [batch])
        step.end_epoch()
    first, before = make(**settings)
    for batch in batches[:2]:
        run(before, first, [batch])
        before.end_epoch()
    second, after = make(**settings)
    second.load_state_dict(first.state_dict())
    after.load_state_dict(before.state_dict())
    for batch in batches[2:]:
        run(after, second, [batch])
        after.end_epoch()
    assert torch.equal(second.weight, straight.weight)
    assert torch.equal(after.evaluated[0].weight, step.evaluated[0].weight)
    assert after.scheduler.get_last_lr() == step.scheduler.get_last_lr() and after.epoch == 4


def test_a_resumed_schedule_is_that_of_now():
    """More epochs, and another base rate: in every epoch the rate of a run that never stopped, and the moments stay."""
    settings = {"optimizer": "adam", "schedule": "cosine", "min_lr": 0.001}

    def rates_of(step, epochs):
        rates = []
        for _ in range(epochs):
            rates += step.scheduler.get_last_lr()
            assert step.optimizers[0].param_groups[0]["lr"] == rates[-1]
            run(step, network, [mean_of(torch.ones(4, 3))])
            step.end_epoch()
        return rates

    network, whole = make(**settings, epochs=12, lr=0.2)
    expected = rates_of(whole, 12)
    network, short = make(**settings, epochs=6)
    rates_of(short, 6)
    network, longer = make(**settings, epochs=12, lr=0.2, weight_decay=0.5)
    longer.load_state_dict(short.state_dict())
    assert longer.optimizers[0].param_groups[0]["weight_decay"] == 0.5
    moments = [next(iter(step.optimizers[0].state.values()))["exp_avg"] for step in (short, longer)]
    assert torch.equal(*moments)
    assert rates_of(longer, 6) == expected[6:]


@pytest.mark.parametrize("batches, accumulate", [(10, 1), (4, 2), (20, 1)])
def test_a_resumed_schedule_of_updates_goes_on_at_its_time(batches, accumulate):
    """Ten updates an epoch, then two or twenty, since the batch, --accumulate or the processes changed."""
    how = {"schedule": "cosine", "epochs": 8}

    def make_per_update(batches, accumulate):
        network, step = make(**how, accumulate=accumulate, batches=batches)
        args = SimpleNamespace(**{**OPTIONS, **how, "accumulate": accumulate})
        updates = -(-batches // accumulate)
        scheduler = build_scheduler(step.optimizers[0], "cosine", epochs=8, steps_per_epoch=updates)
        return network, Step(
            [network], step.optimizers, scheduler, args, CPU, batches_per_epoch=batches, per_update=True
        )

    network, before = make_per_update(10, 1)
    for _ in range(3):
        run(before, network, [mean_of(torch.ones(1, 3))] * 10)
        before.end_epoch()
    network, after = make_per_update(batches, accumulate)
    after.load_state_dict(before.state_dict())
    assert after.scheduler.last_epoch == 3 * -(-batches // accumulate)
    assert after.scheduler.get_last_lr() == pytest.approx([0.1 * (1 + math.cos(math.pi * 3 / 8)) / 2])
    assert after.optimizers[0].param_groups[0]["lr"] == after.scheduler.get_last_lr()[0]


def test_a_state_of_before_several_averages_is_read():
    """Then `ema` was the state of the only average, or None."""
    _, saved = make(ema=0.9)
    state = saved.state_dict()
    (average,) = state["ema"]
    _, step = make(ema=0.9)
    with torch.no_grad():
        step.evaluated[0].weight.zero_()
    step.load_state_dict({**state, "ema": average})
    assert torch.equal(step.evaluated[0].weight, saved.evaluated[0].weight)
    make()[1].load_state_dict({**state, "ema": None})
    with pytest.raises(ValueError, match="saved with averaged weights"):
        make()[1].load_state_dict({**state, "ema": average})
    with pytest.raises(ValueError, match="saved without averaged weights"):
        step.load_state_dict({**state, "ema": None})


def test_a_run_is_not_continued_with_another_optimiser():
    """Adam and SGD gather other things; AdamW gathers what Adam does."""
    _, saved = make(optimizer="adam")
    for name in ("sgd", "nadam", "amsgrad", "adamw"):
        _, step = make(optimizer=name)
        if name == "adamw":
            step.load_state_dict(saved.state_dict())
        else:
            with pytest.raises(ValueError, match="another --optimizer"):
                step.load_state_dict(saved.state_dict())


def test_a_run_is_not_continued_with_other_rates_of_its_parts():
    (_, one), (_, two) = make(), make(head_lr=0.5)
    for step, saved, said in ((one, two, "with --head-lr"), (two, one, "without --head-lr")):
        with pytest.raises(ValueError, match=f"saved {said}"):
            step.load_state_dict(saved.state_dict())
    two.load_state_dict(make(head_lr=0.25)[1].state_dict())
    assert [group["lr"] for group in two.optimizers[0].param_groups] == [0.1, 0.5]


def test_the_schedule_of_updates_waits_for_a_step_that_overflowed():
    network, step = make(amp="fp16", warmup_steps=4, warmup_factor=0.5, batches=2)
    step.per_update = True
    run(step, network, [lambda net: (net.weight * 1e38).sum()])
    assert step.scheduler.last_epoch == 0
    run(step, network, [mean_of(torch.ones(1, 3))])
    assert step.scheduler.last_epoch == 1


def test_half_precision_is_a_switch():
    layer, inputs = nn.Linear(4, 4), torch.randn(2, 4)
    for amp, dtype in (("off", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        with autocast(CPU, amp):
            assert layer(inputs).dtype == dtype


def test_a_gradient_that_overflows_in_fp16_is_skipped_and_the_scale_lowered():
    network, step = make(amp="fp16")
    before, scale = network.weight.detach().clone(), step.scaler.get_scale()
    run(step, network, [lambda net: (net.weight * 1e38).sum()])
    assert torch.equal(network.weight, before)
    assert step.scaler.get_scale() < scale


# Several networks, and adversaries: each as a training of two epochs of three batches -------------------------------


class Batches:
    """Batches of two pictures of 3 numbers with a label, a function of (epoch, batch, rank)."""

    def __init__(self, rank):
        self.rank = rank

    def of(self, epoch):
        for number in range(3):
            generator = torch.Generator().manual_seed(100 * epoch + 10 * number + self.rank)
            yield torch.randn(4, 3, generator=generator), torch.randint(2, (4,), generator=generator)


def adam_step(networks, changes, rate_of=lambda epoch: 0.5**epoch):
    optimizer = torch.optim.Adam([p for network in networks for p in network.parameters()], lr=0.01, betas=(0.5, 0.9))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_of)
    args = SimpleNamespace(**{"accumulate": 2, "clip_gradient": 1.0, "ema": 0.0, "amp": "bf16", **changes})
    return Step(networks, [optimizer], scheduler, args, CPU, batches_per_epoch=3)


class Mutual:
    """Two classifiers, each of which learns from the mean of the other's past, as in mutual mean teaching."""

    def __init__(self, rank, changes):
        self.networks = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)) for _ in range(2)]
        self.step = adam_step(self.networks, {"ema": 0.9, **changes})
        self.models = [distributed.wrap(network, CPU) for network in self.networks]
        self.holders = [*self.networks, self.step]

    def train(self, images, labels, spoil):
        with self.step.forward(*self.models), autocast(CPU, "bf16"):
            outputs = [model(images) for model in self.models]
            with torch.no_grad():
                teachers = [average(images).softmax(1) for average in self.step.averages]
        losses = {}
        for number, output in enumerate(outputs):
            losses[f"hard_{number}"] = F.cross_entropy(output.float(), labels) * spoil
            losses[f"soft_{number}"] = F.cross_entropy(output.float(), teachers[1 - number].float())
        return self.step(losses, ["x.jpg"])

    def end_epoch(self):
        self.step.end_epoch()


class Adversaries:
    """A least-squares GAN; its discriminator learns after the generator, in the same batch."""

    def __init__(self, rank, changes):
        self.generator, self.discriminator = nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
        self.steps = [adam_step([network], changes) for network in (self.generator, self.discriminator)]
        self.models = [distributed.wrap(network, CPU) for network in (self.generator, self.discriminator)]
        self.networks = [self.generator, self.discriminator]
        self.holders = [*self.networks, *self.steps]

    def train(self, images, labels, spoil):
        generator_step, discriminator_step = self.steps
        generate, discriminate = self.models
        self.discriminator.requires_grad_(False)  # and not through DDP, which would wait for its gradients
        with generator_step.forward(generate), autocast(CPU, "bf16"):
            fake = generate(images)
            verdict = self.discriminator(fake)
        losses = {"generator": (verdict.float() - 1).square().mean(), "identity": (fake.float() - images).abs().mean()}
        means = generator_step(losses, ["x.jpg"])
        self.discriminator.requires_grad_(True)
        with discriminator_step.forward(discriminate), autocast(CPU, "bf16"):
            verdicts = discriminate(torch.cat([images + 1, fake.detach()])).float().chunk(2)
        real, fake = (verdicts[0] - 1).square().mean(), verdicts[1].square().mean() * spoil
        return means | discriminator_step({"real": real, "fake": fake}, ["x.jpg"])

    def end_epoch(self):
        for step in self.steps:
            step.end_epoch()


def trained(kind, rank=0, *, interrupted=False, spoil_on=None, **changes):
    """Two epochs; with `interrupted` everything is saved after the first and goes on in new objects.

    spoil_on: rank whose loss is nan in the second epoch's second batch. Returns all weights, averaged ones included.
    """
    torch.manual_seed(rank)  # each rank starts elsewhere: DDP gives all the weights of rank 0
    training = kind(rank, changes)
    for epoch in (1, 2):
        if interrupted and epoch == 2:
            states = [holder.state_dict() for holder in training.holders]
            training = kind(rank, changes)
            for holder, state in zip(training.holders, states, strict=True):
                holder.load_state_dict(state)
        for number, (images, labels) in enumerate(Batches(rank).of(epoch)):
            training.train(images, labels, math.nan if (spoil_on, epoch, number) == (rank, 2, 1) else 1.0)
        training.end_epoch()
    averages = [average for step in training.holders if isinstance(step, Step) for average in step.averages]
    return [value.flatten().double() for n in (*training.networks, *averages) for value in n.state_dict().values()]


TRAININGS = [Mutual, Adversaries]


@pytest.mark.parametrize("kind", TRAININGS)
def test_several_networks_are_resumed_bit_by_bit(kind):
    straight, resumed = torch.cat(trained(kind)), torch.cat(trained(kind, interrupted=True))
    assert torch.equal(straight, resumed) and straight.isfinite().all()
    assert not torch.equal(straight, torch.cat(trained(kind, accumulate=1)))


def test_mutual_teaching_averages_each_network_by_itself():
    torch.manual_seed(0)
    training = Mutual(0, {"accumulate": 1})
    for images, labels in Batches(0).of(1):
        before = [network[0].weight.detach().clone() for network in training.networks]
        old = [average.module[0].weight.detach().clone() for average in training.step.averages]
        count = int(training.step.averages[0].n_averaged)
        training.train(images, labels, 1.0)
        for number, network in enumerate(training.networks):
            assert not torch.equal(network[0].weight, before[number])
            expected = network[0].weight if count == 0 else 0.9 * old[number] + 0.1 * network[0].weight
            torch.testing.assert_close(training.step.averages[number].module[0].weight, expected)


def train_on_a_rank(rank, kind, spoil_on):
    distributed.setup("cpu", timeout_minutes=0.5)
    try:
        weights = torch.cat(trained(kind, rank, spoil_on=spoil_on)).tolist()
    except InputError as error:
        weights = str(error)
    distributed.cleanup()
    return weights


@pytest.mark.parametrize("kind", TRAININGS)
def test_two_processes_end_with_the_same_networks(launch, kind):
    (first, second), codes, errors = launch(train_on_a_rank, kind, None)
    assert codes == [0, 0], errors
    assert first == second


@pytest.mark.parametrize("kind", TRAININGS)
def test_nan_in_one_of_several_networks_stops_both_ranks(launch, kind):
    (first, second), codes, errors = launch(train_on_a_rank, kind, 1)
    assert codes == [0, 0], errors
    assert first == second and first.startswith("the loss is not finite in epoch 2, step 1, on rank 1 (")
    assert ("fake nan" if kind is Adversaries else "hard_0 nan") in first


def gradients_while_they_accumulate(rank):
    """The gradient after the first and after the second batch of a group, before the update."""
    distributed.setup("cpu", timeout_minutes=0.5)
    network = nn.Linear(1, 1, bias=False)
    step = adam_step([network], {"accumulate": 3, "clip_gradient": 0.0})
    model, gradients = distributed.wrap(network, CPU), []
    network.weight.register_post_accumulate_grad_hook(lambda weight: gradients.append(weight.grad.item()))
    for number in range(3):
        with step.forward(model):
            output = model(torch.full((1, 1), 3.0 * (rank + 1)))
        step({"some": output.sum()}, ["x.jpg"])
        if number < 2:
            gradients.append(network.weight.grad.item())
    distributed.cleanup()
    return gradients


def test_ranks_exchange_gradients_only_in_the_batch_that_updates(launch):
    """A third of 3 on rank 0, of 6 on rank 1, each three times; then the mean of both."""
    results, codes, errors = launch(gradients_while_they_accumulate)
    assert codes == [0, 0], errors
    assert results[0][:4] == [1, 1, 2, 2] and results[1][:4] == [2, 2, 4, 4]


def test_mean_teacher_golden(golden, fill_weights):
    """There the teacher takes the student's weights of the update before its own pass, which is after that update."""
    arrays = {key.removeprefix("ema/"): torch.from_numpy(value) for key, value in golden("model_openunreid").items()}
    student = nn.Sequential(OrderedDict(fc=nn.Linear(6, 5), bn=nn.BatchNorm1d(5)))
    teacher = MeanTeacher(fill_weights.fill_state_dict(student), float(arrays["alpha"]))
    with torch.no_grad():
        for step, images in enumerate(arrays["inputs"]):
            found = {"student_out": student(images), "teacher_out": teacher(images)}
            found["teacher_fc_weight"] = teacher.module.fc.weight
            found["teacher_running_mean"] = teacher.module.bn.running_mean
            for name, value in found.items():
                expected = arrays[f"step{step}_{name}"]
                torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
            student.fc.weight += arrays[f"step{step}_delta"]
            teacher.update_parameters(student)


def test_step_with_teachers():
    """They start as their students are, and their statistics are their own; without, the first update is a copy."""
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    args = SimpleNamespace(**{**OPTIONS, "ema": 0.5})
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    scheduler = build_scheduler(optimizer, "multistep", epochs=1)
    step = Step([network], [optimizer], scheduler, args, CPU, batches_per_epoch=1, teachers=True)
    before = network[0].weight.detach().clone()
    step({"loss": network(torch.randn(4, 2)).square().sum() * 9}, [])
    (teacher,) = step.averages
    torch.testing.assert_close(teacher.module[0].weight, (before + network[0].weight) / 2)
    assert teacher.module[1].running_mean.tolist() == [0, 0] and step.evaluated == [teacher.module]
