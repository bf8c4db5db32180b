from types import SimpleNamespace

import pytest
import torch
from torch import nn

from core.engine.updater import Updater, autocast, freeze, seed_everything
from core.losses.spec import build_loss
from core.models.reid import ReIDOutput

OPTIONS = {
    "optimizer": "sgd", "lr": 0.1, "weight_decay": 0.0, "momentum": 0.0, "epochs": 4, "schedule": "multistep",
    "milestones": [2], "step_size": 1, "gamma": 0.1, "min_lr": 0.0, "warmup_epochs": 0, "warmup_factor": 0.0,
    "clip_gradient": 0.0, "accumulate": 1, "ema": 0.0, "amp": "off", "channels_last": False, "center_lr": 0.5,
}  # fmt: skip
CPU = torch.device("cpu")


def make(spec="cross_entropy", **changes):
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    loss = build_loss(spec, num_classes=2, feature_dim=2)
    return network, Updater(network, loss, SimpleNamespace(**{**OPTIONS, **changes}), CPU)


def run(updater, network, losses):
    """One epoch in which batch i has the loss losses[i](network)."""
    for step, loss in enumerate(losses):
        with updater.batch(network, step, len(losses)) as backward:
            backward(loss(network))


def mean_of(inputs):
    return lambda network: network(inputs).square().mean()


def test_accumulated_batches_are_one_large_batch():
    torch.manual_seed(1)
    inputs = torch.randn(8, 3)
    whole, updater = make()
    run(updater, whole, [mean_of(inputs)])
    parts, updater = make(accumulate=4)
    run(updater, parts, [mean_of(part) for part in inputs.split(2)])
    torch.testing.assert_close(parts.weight, whole.weight)


def test_the_last_group_of_an_epoch_may_be_smaller_and_counts_with_its_own_mean():
    torch.manual_seed(1)
    inputs = torch.randn(3, 3)
    whole, updater = make()
    run(updater, whole, [mean_of(inputs[:2]), mean_of(inputs[2:])])
    parts, updater = make(accumulate=2)
    run(updater, parts, [mean_of(part) for part in inputs.split(1)])
    torch.testing.assert_close(parts.weight, whole.weight)


def test_the_rate_may_change_with_every_update():
    """Two batches an update and three batches an epoch are two updates; the warm-up lasts both of them."""
    options = {**OPTIONS, "accumulate": 2, "warmup_iterations": 2, "warmup_factor": 0.5, "milestones": []}
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    updater = Updater(network, nn.Identity(), SimpleNamespace(**options), CPU, batches_per_epoch=3)
    used = []
    for step in range(3):
        with updater.batch(network, step, 3) as backward:
            used.append(updater.learning_rate)
            backward(network(torch.ones(1, 3)).sum())
    updater.end_epoch()
    assert used == pytest.approx([0.05, 0.05, 0.075]) and updater.learning_rate == pytest.approx(0.1)


def test_clipping_bounds_the_step_by_hand():
    network, updater = make(clip_gradient=1.0)
    before = network.weight.detach().clone()
    run(updater, network, [lambda net: 30 * net.weight[0, 0] + 40 * net.weight[0, 1]])  # gradient (30, 40), norm 50
    torch.testing.assert_close(network.weight - before, torch.tensor([[-0.06, -0.08, 0], [0, 0, 0]]))


def test_averaged_weights_follow_by_hand():
    network, updater = make(ema=0.5)
    run(updater, network, [lambda net: net.weight[0, 0]])  # the first update copies
    first = network.weight[0, 0].item()
    run(updater, network, [lambda net: net.weight[0, 0]])
    assert updater.averaged is not network
    assert updater.averaged.weight[0, 0].item() == pytest.approx((first + first - 0.1) / 2)


def test_the_schedule_is_stepped_once_an_epoch():
    _, updater = make()
    rates = []
    for _ in range(4):
        rates.append(updater.learning_rate)
        updater.optimizers[0].step()
        updater.end_epoch()
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("weight", [1.0, 0.0005])
def test_centers_move_at_their_own_rate_whatever_the_weight_of_their_loss(weight):
    network, updater = make(f"{weight}*center")
    centers = next(updater.loss.parameters())
    with torch.no_grad():
        centers.zero_()
    features = torch.tensor([[2.0, 0.0]])
    output = ReIDOutput(features, [features], [], None)
    with updater.batch(network, 0, 1) as backward:
        backward(sum(updater.loss(output, torch.tensor([0])).values()) + 0 * network.weight.sum())
    unit = build_loss("center", num_classes=2, feature_dim=2)
    with torch.no_grad():
        next(unit.parameters()).zero_()
    sum(unit(output, torch.tensor([0])).values()).backward()
    torch.testing.assert_close(centers, -0.5 * next(unit.parameters()).grad)


def test_saved_and_loaded_it_goes_on_as_if_nothing_had_happened():
    torch.manual_seed(1)
    batches = [mean_of(torch.randn(4, 3)) for _ in range(4)]
    settings = {"optimizer": "adam", "ema": 0.9}
    straight, updater = make(**settings)
    for batch in batches:
        run(updater, straight, [batch])
        updater.end_epoch()
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
    assert torch.equal(after.averaged.weight, updater.averaged.weight)
    assert after.learning_rate == updater.learning_rate


def test_half_precision_is_a_switch():
    layer, inputs = nn.Linear(4, 4), torch.randn(2, 4)
    for amp, dtype in (("off", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        with autocast(CPU, amp):
            assert layer(inputs).dtype == dtype


def test_a_gradient_that_overflows_in_fp16_is_skipped_and_the_scale_lowered():
    network, updater = make(amp="fp16")
    before, scale = network.weight.detach().clone(), updater.scaler.get_scale()
    run(updater, network, [lambda net: (net.weight * 1e38).sum()])
    assert torch.equal(network.weight, before)
    assert updater.scaler.get_scale() < scale


def test_freezing_stops_the_part_and_names_what_must_stay_in_evaluation_mode():
    network = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), nn.BatchNorm1d(2))
    assert freeze(network, network[0], frozen=True) == [network[0]]
    assert [p.requires_grad for p in network.parameters()] == [False] * 4 + [True] * 2
    assert freeze(network, network[0], frozen=False) == []
    assert all(p.requires_grad for p in network.parameters())
    assert freeze(network, network[0], frozen=False, batch_norm=True) == [network[0][1], network[1]]


def test_seeding_repeats_the_initial_weights():
    weights = []
    for _ in range(2):
        seed_everything(7)
        weights.append(nn.Linear(3, 3).weight)
    assert torch.equal(*weights)
