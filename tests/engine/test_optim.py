"""Optimisers, schedules against the golden arrays, and a schedule that is resumed.

Of lr_schedules.npz one thing is not compared: the warm-up of lightmbn_warmup_cosine_multiplier_2, which rises above the
base rate and which LightMBN itself does not use.
"""

import io
import math

import numpy as np
import pytest
import torch

from core.engine.optim import (
    OPTIMIZERS,
    SCHEDULES,
    WARMUPS,
    build_optimizer,
    build_scheduler,
    cosine_factor,
    parameter_groups,
)
from core.errors import InputError
from core.models.reid import build_reid_model


def make(lr=1.0, name="sgd", **options):
    return build_optimizer([torch.nn.Parameter(torch.zeros(2))], name, lr, **options)


def rates(lr, length, schedule, **options):
    """The rate in use in each of `length` epochs."""
    optimizer = make(lr)
    scheduler = build_scheduler(optimizer, schedule, **{"epochs": length, **options})
    used = []
    for _ in range(length):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return np.array(used)


MULTISTEP = {
    "strong_baseline_warmup_multistep_linear": (3.5e-4, dict(milestones=[40, 70], warmup_steps=10)),
    "strong_baseline_warmup_ends_after_milestone": (1e-3, dict(milestones=[5, 15], warmup_steps=10)),
    "openunreid_warmup_multi_step": (3.5e-4, dict(milestones=[40, 70], warmup_steps=10)),
    "openunreid_multi_step": (3.5e-4, dict(milestones=[15, 30])),
    "fastreid_warmup_linear": (3.5e-4, dict(warmup_steps=20, warmup_factor=0.1)),
    "lightmbn_warmup_multistep": (6e-4, dict(milestones=[60, 90], gamma=0.5, warmup_steps=10, warmup="count")),
    "strong_baseline_warmup_multistep_constant": (
        3.5e-4,
        dict(milestones=[20, 40], warmup_steps=5, warmup_factor=1 / 3, warmup="constant"),
    ),
    "fastreid_warmup_exp": (3.5e-4, dict(warmup_steps=20, warmup_factor=0.1, warmup="exponential")),
}


@pytest.mark.parametrize("case", MULTISTEP)
def test_multistep_golden(golden, case):
    expected = golden("lr_schedules")[case]
    lr, options = MULTISTEP[case]
    np.testing.assert_allclose(rates(lr, len(expected), "multistep", **options), expected, rtol=1e-10)


def test_step_golden(golden):
    expected = golden("lr_schedules")["openunreid_single_step"]
    np.testing.assert_allclose(rates(3.5e-4, 50, "step", step_size=20), expected, rtol=1e-10)


def test_cosine_golden(golden):
    expected = golden("lr_schedules")["openunreid_cosine"]
    np.testing.assert_allclose(rates(3.5e-4, 60, "cosine", min_lr=1e-6), expected, rtol=1e-10)


def test_linear_golden(golden):
    expected = golden("lr_schedules")["openunreid_linear"]
    np.testing.assert_allclose(rates(2e-4, 51, "linear", decay_from=25), expected, rtol=1e-10)


def test_lightmbn_cosine_golden(golden):
    expected = golden("lr_schedules")["lightmbn_warmup_cosine_multiplier_1"]
    ours = rates(6e-4, 120, "cosine_to_min", warmup_steps=10, warmup="count", min_lr=6e-7)
    np.testing.assert_allclose(ours, expected, rtol=1e-10)

    expected = golden("lr_schedules")["lightmbn_warmup_cosine_multiplier_2"]
    ours = rates(3.5e-4, 60, "cosine_to_min", warmup_steps=10, min_lr=3.5e-7)
    np.testing.assert_allclose(ours[10:], expected[10:], rtol=1e-10)


def test_by_hand():
    np.testing.assert_allclose(rates(8.0, 5, "step", step_size=2, gamma=0.5), [8, 8, 4, 4, 2])
    np.testing.assert_allclose(rates(1.0, 4, "multistep", milestones=[1, 3], gamma=0.1), [1, 0.1, 0.1, 0.01])
    # warm-up from 0.2 over 2 epochs, then a cosine over 4 down to 0.5
    half = (1 + math.sqrt(0.5)) / 2
    expected = [0.2, 0.6, 1, 0.5 + 0.5 * half, 0.75, 1.5 - (0.5 + 0.5 * half)]
    np.testing.assert_allclose(
        rates(1.0, 6, "cosine", warmup_steps=2, warmup_factor=0.2, min_lr=0.5), expected, rtol=1e-12
    )
    np.testing.assert_allclose(rates(1.0, 5, "linear", decay_from=1), [1, 1, 0.75, 0.5, 0.25])
    warm = {
        kind: rates(1.0, 3, "step", step_size=9, warmup_steps=2, warmup_factor=0.25, warmup=kind) for kind in WARMUPS
    }
    expected = {"linear": 0.625, "constant": 0.25, "exponential": 0.5, "count": 1.0}
    for kind, second in expected.items():
        np.testing.assert_allclose(warm[kind], [0.5 if kind == "count" else 0.25, second, 1.0])


def test_one_cycle_is_torchs_without_its_momentum():
    for length in (10, 300):
        reference = torch.optim.lr_scheduler.OneCycleLR(make(1.0), 4e-4, total_steps=length + 1, cycle_momentum=False)
        expected = [reference.get_last_lr()[0]]
        for _ in range(length - 1):
            reference.optimizer.step()
            reference.step()
            expected.append(reference.get_last_lr()[0])
        # torch puts the peak on step 0.3 * total - 1, half a step beside ours: both are compared over time, not steps
        ours = rates(4e-4, length, "one_cycle")
        assert ours[0] == pytest.approx(4e-4 / 25, rel=1e-6) and ours.max() <= 4e-4
        np.testing.assert_allclose(ours, expected, atol=4e-4 * 6 / length)


def test_rates_per_update_by_hand():
    """Two updates an epoch: warm-up over 3 updates from 0.1, the drop at epoch 2 falls on update 4."""
    used = rates(
        1.0, 6, "multistep", epochs=3, steps_per_epoch=2, warmup_steps=3, warmup_factor=0.1, milestones=[2], gamma=0.1
    )
    np.testing.assert_allclose(used, [0.1, 0.4, 0.7, 1.0, 0.1, 0.1])
    for schedule in ("cosine", "cosine_to_min", "linear"):
        half_epochs = rates(1.0, 4, schedule, epochs=2, steps_per_epoch=2)
        np.testing.assert_allclose(half_epochs, rates(1.0, 4, schedule, epochs=4), rtol=1e-12, atol=1e-12)


def test_cosine_stays_low_after_its_end():
    assert cosine_factor(100, 50, 5, 0.1) == pytest.approx(0.1)
    assert cosine_factor(3, 5, 5, 0.1) == 1  # nothing but warm-up


def test_groups_keep_their_proportion():
    groups = [
        {"params": [torch.nn.Parameter(torch.zeros(1))]},
        {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 10.0},
    ]
    optimizer = build_optimizer(groups, "adamw", 1.0)
    scheduler = build_scheduler(optimizer, "cosine", epochs=2, min_lr=0.1)
    for expected in ([1.0, 10.0], [0.55, 5.5], [0.1, 1.0]):
        np.testing.assert_allclose(scheduler.get_last_lr(), expected)
        optimizer.step()
        scheduler.step()


def test_the_head_has_a_rate_of_its_own():
    network = torch.nn.Module()
    network.backbone, network.classifier = torch.nn.Linear(2, 3), torch.nn.Linear(3, 4)
    optimizer = build_optimizer(parameter_groups(network, 0.5), "sgd", 0.1)
    assert [(group["lr"], len(group["params"][0])) for group in optimizer.param_groups] == [(0.1, 3), (0.5, 4)]
    scheduler = build_scheduler(optimizer, "step", epochs=2, gamma=0.1)
    optimizer.step()
    scheduler.step()
    np.testing.assert_allclose(scheduler.get_last_lr(), [0.01, 0.05])
    assert len(build_optimizer(parameter_groups(network, 0.0), "sgd", 0.1).param_groups) == 1
    lightmbn = build_reid_model("osnet_x0_25", 3, model="lmbn_n")  # its block behind the global branch is of the head
    backbone, head = (group["params"] for group in parameter_groups(lightmbn, 0.5))
    assert len(backbone) + len(head) == len(list(lightmbn.parameters()))
    assert {id(p) for p in head} >= {id(p) for p in lightmbn.branches["global"].bottleneck.parameters()}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_resumed_schedule_goes_on(schedule):
    """Through a file read with weights_only, as a checkpoint is."""
    options = dict(epochs=12, warmup_steps=3, milestones=[5], step_size=4, min_lr=1e-5)
    whole = rates(0.1, 12, schedule, **options)
    optimizer = make(0.1)
    scheduler = build_scheduler(optimizer, schedule, **options)
    for _ in range(6):
        optimizer.step()
        scheduler.step()
    file = io.BytesIO()
    torch.save({"scheduler": scheduler.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)

    optimizer = make(0.1)
    scheduler = build_scheduler(optimizer, schedule, **options)
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    for epoch in range(6, 12):
        assert optimizer.param_groups[0]["lr"] == whole[epoch]
        optimizer.step()
        scheduler.step()


def test_optimizers_by_hand():
    """One step from 2 with gradient 1, rate 0.1, decay 0.5: the decay is in the gradient of SGD and Adam only."""
    expected = {"sgd": 2 - 0.1 * (1 + 0.5 * 2), "adam": 2 - 0.1, "adamw": 2 - 0.1 * 0.5 * 2 - 0.1}
    expected["amsgrad"] = expected["adam"]
    # Dozat 2016: mu_1 and mu_2 mix the momentum of this step and of the next, as Adam they are freed of their start
    mu = [0.9 * (1 - 0.5 * 0.96 ** (step * 0.004)) for step in (1, 2)]
    expected["nadam"] = 2 - 0.1 * ((1 - mu[0]) / (1 - mu[0]) + mu[1] * 0.1 / (1 - mu[0] * mu[1]))
    for name, value in expected.items():
        parameter = torch.nn.Parameter(torch.tensor([2.0]))
        parameter.grad = torch.ones(1)
        build_optimizer([parameter], name, 0.1, weight_decay=0.5).step()
        assert parameter.item() == pytest.approx(value, rel=1e-5), name
    assert set(expected) == set(OPTIMIZERS)
    assert make(0.1, momentum=0.8).defaults["momentum"] == 0.8


def test_nesterov_by_hand():
    """Two steps with gradient 1 and momentum 0.5: plain 1, 1.5; Nesterov looks ahead 1.5, 1.75."""
    for nesterov, distance in ((False, 2.5), (True, 3.25)):
        parameter = torch.nn.Parameter(torch.zeros(1))
        optimizer = build_optimizer([parameter], "sgd", 1.0, momentum=0.5, nesterov=nesterov)
        for _ in range(2):
            parameter.grad = torch.ones(1)
            optimizer.step()
        assert parameter.item() == pytest.approx(-distance)


@pytest.mark.parametrize(
    "make_bad, message",
    [
        (lambda: make(name="lion"), "unknown optimiser 'lion'.*adam, adamw, amsgrad, nadam, sgd"),
        (lambda: make(momentum=0.0, nesterov=True), "--nesterov needs a --momentum above 0"),
        (lambda: make(0.0), "learning rate"),
        (lambda: make(math.nan), "learning rate"),
        (lambda: build_scheduler(make(), "poly", epochs=5), "unknown schedule 'poly'.*step, multistep, linear, cosine"),
        (
            lambda: build_scheduler(make(), "cosine", epochs=5, warmup="slow"),
            "unknown warm-up 'slow'.*linear, constant",
        ),
        (lambda: build_scheduler(make(), "cosine", epochs=0), "epochs"),
        (lambda: build_scheduler(make(), "cosine", epochs=5, min_lr=2.0), "--min-lr 2 of the cosine is above --lr 1"),
        (lambda: build_scheduler(make(), "cosine", epochs=5, warmup_steps=-1), "steps of warm-up"),
        (lambda: build_scheduler(make(), "cosine", epochs=5, warmup_factor=1.5), "warm-up starts"),
        (lambda: build_scheduler(make(), "step", epochs=5, step_size=0), "step size"),
        (lambda: build_scheduler(make(), "step", epochs=5, gamma=0.0), "gamma"),
    ],
)
def test_bad_options(make_bad, message):
    with pytest.raises(InputError, match=message):
        make_bad()
