"""A checkpoint of which a person, or a fault of a disk that kept its checksums, made something else: one line.

Each field of each kind, and each field of those that are dicts, with values of other types and shapes.
"""

import os
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

from core.data.coco import CocoCategory
from core.data.samples import Sample
from core.engine import detection, reid, translation
from core.engine.checkpoint import check_checkpoint, fingerprint, restore, weights_alone
from core.engine.optim import build_optimizer, build_scheduler
from core.engine.step import Step
from core.errors import InputError, as_written
from core.losses import build_loss
from core.losses.adversarial import ImagePool
from core.models.detection_weights import load_detection_weights
from core.models.gan import ResNetGenerator
from core.models.mask_rcnn import MaskRCNN
from core.models.reid import build_reid_model
from core.models.weights import load_weights
from recognition import networks

READ = [None]  # what the file holds: writing each would take long
CPU = torch.device("cpu")
ARGS = {"amp": "off", "accumulate": 1, "clip_gradient": 0, "ema": 0.5, "height": 64, "width": 32, "distance": "cosine"}
ARGS |= {
    "dataset": "mvb",
    "data": "data/mvb",
    "protocol": None,
    "source": "mvb:data",
    "target": "mvb:data",
    "name": "x",
}
STRANGE = (None, -5, "text", [None], {3: 4}, torch.zeros(2))


def step_of(network):
    optimizer = build_optimizer(network.parameters(), "adam", 1e-3)
    scheduler = build_scheduler(optimizer, "cosine", epochs=1)
    step = Step([network], [optimizer], scheduler, Namespace(**ARGS), CPU, batches_per_epoch=1)
    optimizer.step()
    step.epoch = 2
    return step


def a_reid_run():
    options = {"backbone": "osnet_x0_25", "num_classes": 2}
    network, criterion = build_reid_model(**options), build_loss("cross_entropy+0.1*center", 2, 512)
    samples = [Sample("a.jpg", 0, 0, None, None, "red"), Sample("b.jpg", 1, 0, None, None, "blue")]
    data = reid.ReIDData(samples, [], [], "mvb", "data", "no_camera")
    threshold = SimpleNamespace(_asdict=lambda: {"distance": 0.5, "false_accept_rate": 0.01, "true_accept_rate": 0.9})
    step = step_of(network)
    state = reid.checkpoint_state(network, options, criterion, step, 0.5, Namespace(**ARGS), data, threshold)

    def resume(state, path):
        reid.resume(state, path, network, options, criterion, step, data)

    def use(state, path):
        encoder = networks.load_encoder(str(path), CPU)
        load_weights(encoder.network, str(path), "osnet_x0_25")

    return state, resume, use


def a_detection_run():
    categories = [CocoCategory(3, "square"), CocoCategory(7, "disc")]
    network = MaskRCNN("resnet18", 3, norm="batch", min_size=64, max_size=64)
    data = SimpleNamespace(train=SimpleNamespace(categories=categories, view={"bits": 16}), paths={"data": "x"})
    step = step_of(network)
    state = detection.checkpoint_state(network, step, 0.5, Namespace(**ARGS), data)

    def resume(state, path):
        detection.resume(state, path, network, step, data)

    def use(state, path):
        detector = networks.load_detector(str(path), CPU)
        load_detection_weights(detector.network, str(path), "resnet18", categories)

    return state, resume, use


def a_translation_run():
    both = torch.nn.ModuleDict({"to_target": ResNetGenerator(4, 1), "to_source": ResNetGenerator(4, 1)})
    steps, pools = (step_of(both), step_of(both)), {name: ImagePool(2) for name in ("target_pool", "source_pool")}
    state = translation.checkpoint_state(both, {"channels": 4, "blocks": 1}, *steps, pools, Namespace(**ARGS))

    def resume(state, path):
        restore(state, path, ("model", both), (None, steps[0]), ("judges", steps[1]), *pools.items())

    def use(state, path):
        translation.generator_from_checkpoint(state, path, CPU)

    return state, resume, use


def strangers(state):
    """(what was changed, the state with it): each field, and each field of a dict in it, with each strange value."""
    for key, value in state.items():
        if key == "kind":
            continue
        for strange in STRANGE:
            yield f"{key} {strange!r}", {**state, key: strange}
        inner = value[0] if key in ("ema", "optimizers") and value else value
        if isinstance(inner, dict):
            for name in list(inner)[:2] if key in ("model", "ema", "loss", "judges") else inner:
                for strange in STRANGE[:: 1 + (key == "args")]:
                    changed = {**inner, name: strange}
                    yield f"{key}.{name} {strange!r}", {**state, key: [changed] if inner is not value else changed}


def outcome(function):
    """None where it works, the line where it is refused; anything else is raised."""
    try:
        function()
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 600, error
        return str(error)


def resumed(resume, state, path):
    with as_written(path):  # as `Run` does it
        resume(state, path)


def consequence(what, state, path, kind, resume, use):
    """The line that refuses it, None where it does no harm; anything else is raised."""
    line = outcome(lambda: check_checkpoint(state, path, kind))
    if line is None:
        READ[0] = state
        line = outcome(lambda: resumed(resume, state, path))
        if not what.startswith(("opt", "sch", "sca", "loss", "jud", "target", "source", "best", "args")):
            line = outcome(lambda: use(state, path)) or line
        outcome(lambda: fingerprint(state))
        outcome(lambda: weights_alone(state))
    return line


@pytest.mark.parametrize(("make", "every"), [(a_reid_run, 7), (a_detection_run, 25), (a_translation_run, 7)])
def test_every_field_of_another_type_is_one_line_or_does_no_harm(make, every, tmp_path, monkeypatch):
    """Some of the cases, each value in turn; CAROUSEL_FUZZ=1 takes them all."""
    for module in ("core.models.weights", "core.models.detection_weights", "core.engine.published"):
        monkeypatch.setattr(f"{module}.load_file", lambda *_: READ[0])
    torch.save({}, tmp_path / "last.pth")
    monkeypatch.setattr(MaskRCNN, "load_state_dict", lambda *_, **__: None)  # slow, and tested elsewhere
    monkeypatch.setattr("core.models.weights.nearest", lambda _: "")  # it builds every backbone
    state, resume, use = make()
    path, kind = tmp_path / "last.pth", state["kind"]
    assert consequence("nothing", state, path, kind, resume, use) is None
    cases = list(strangers(state))[:: 1 if os.environ.get("CAROUSEL_FUZZ") else every]
    lines = [consequence(what, changed, path, kind, resume, use) for what, changed in cases]
    assert len(cases) > 10 and sum(line is not None for line in lines) > 0.5 * len(cases)
    assert consequence("nothing", state, path, kind, resume, use) is None  # the run that refused them is as it was


def test_a_device_without_memory_is_no_fault_of_the_file():
    with pytest.raises(RuntimeError, match="CUDA out of memory"), as_written("last.pth"):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
