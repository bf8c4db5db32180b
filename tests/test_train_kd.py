"""train_kd.py as a person runs it: as train_reid.py where nothing is learned, each kind of teacher, bad input."""

import csv

import pytest
import torch

import train_kd
import train_reid
from core.engine import log, options, reid, reid_pictures, reid_training
from core.engine.checkpoint import load_checkpoint
from core.engine.complexity import Complexity
from core.losses.distillation import DISTILLATION_LOSSES
from core.models.reid import build_reid_model

SMALL = ["--backbone", "osnet_x0_25", "--weights", "none", "--height", "32", "--width", "32", "--pad", "2"]
SMALL += ["--ids-per-batch", "4", "--images-per-id", "2", "--iterations-per-epoch", "1", "--eval-every", "9"]
SMALL += ["--workers", "0", "--device", "cpu", "--warmup-epochs", "0", "--epochs", "2"]
# What a step has beside the gradient.
EVERYTHING = ["--dropout", "0.3", "--ema", "0.9", "--clip-gradient", "1", "--head-lr", "0.01"]
EVERYTHING += ["--loss", "cross_entropy+triplet+0.0005*center"]
ALL_TERMS = "+".join(f"0*{name}" for name in DISTILLATION_LOSSES)


def start(script, *arguments):
    parsed = options.parse(script.get_parser(), script.RECIPES, script.default_recipe, list(map(str, arguments)))
    script.main(parsed)


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """They take most of the time of so short a run, as does what a network costs; both have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "curves", lambda *_: None)
        for name in ("draw_augmentations", "draw_rank_list"):
            patch.setattr(reid_pictures, name, lambda *_: None)
        patch.setattr(
            train_kd, "complexity", lambda network, *_: Complexity(network.embedding_dim * 10**6, 2e6, None, 3)
        )
        yield


@pytest.fixture(scope="module")
def runs(baggage, tmp_path_factory):
    """Folder of runs, in which `plain` is one of train_reid.py."""
    folder = tmp_path_factory.mktemp("runs")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start(train_reid, *SMALL, *EVERYTHING, "--dataset", "mvb", "--data", baggage, "--output", folder, "--name", "plain")
    yield folder
    torch.set_num_threads(threads)


@pytest.fixture
def distil(run, runs, baggage, tmp_path):
    """Function: options of train_kd.py -> (what it said, folder of its run)."""

    def command(*arguments, name="run", to=tmp_path):
        data = ["--dataset", "mvb", "--data", baggage, "--output", to, "--name", name]
        code, said, err = run(train_kd, *SMALL, *data, *arguments)
        assert code == 0, err
        return said, to / name

    return command


def last(folder):
    return load_checkpoint(folder / "last.pth", "reid")


def assert_same(first, second):
    """Of two nested dicts and lists of tensors."""
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict | list):
        assert len(first) == len(second)
        for key in first if isinstance(first, dict) else range(len(first)):
            assert_same(first[key], second[key])


def losses_of(folder, epoch=1):
    with open(folder / "log.csv", newline="") as file:
        row = list(csv.DictReader(file))[epoch]
    known = {"epoch", "lr", "loss", "images_per_second", "mAP", "mINP", "rank1", "rank5", "rank10"}
    return {key: float(value) for key, value in row.items() if key not in known}


def test_with_weight_0_and_as_baseline_it_is_train_reid_bit_by_bit(distil, runs):
    """All terms, with adapters, from a teacher; then the student alone in the same call."""
    how = ["--teacher", runs / "plain" / "last.pth", "--kd", ALL_TERMS, "--hint-stages", "3", "--baseline"]
    said, folder = distil(*EVERYTHING, *how)
    plain = last(runs / "plain")
    for found in (last(folder), last(folder.with_name("run-alone"))):
        for key in ("model", "ema", "network", "identities", "input_size", "distance"):
            assert_same(found[key], plain[key])
    assert set(losses_of(folder).values()) - set(losses_of(runs / "plain").values()) == {0.0}
    table = said.splitlines()[-4:]
    assert table == (folder / "train.log").read_text().splitlines()[-4:]
    assert [line[:18].strip() for line in table] == ["", "teacher", "student alone", "student distilled"]
    assert table[2].split()[2:] == table[3].split()[2:] and table[3].split()[-3:] == ["512.00", "2.0", "3.0"]
    network, _ = reid.network_from_checkpoint(folder / "best.pth", "cpu")
    assert network.embedding_dim == 512


def test_its_own_past_changes_nothing_with_weight_0(distil, runs):
    _, folder = distil(*EVERYTHING, "--teacher", "ema", "--kd", "0*logits+0*retrieval")
    assert_same(last(folder)["model"], last(runs / "plain")["model"])


def test_a_second_student_changes_nothing_with_weight_0(distil, baggage, tmp_path):
    """Without dropout, which is drawn for both students in turn."""
    distil("--epochs", "1", "--teacher", "mutual", "--kd", "0*logits+0*retrieval")
    data = ["--dataset", "mvb", "--data", baggage, "--output", tmp_path]
    start(train_reid, *SMALL, "--epochs", "1", *data, "--name", "plain")
    assert_same(last(tmp_path / "run")["model"], last(tmp_path / "plain")["model"])


@pytest.mark.parametrize(
    "how",
    [
        ["--teacher", "mutual", "--teacher-backbone", "osnet_x0_5", "--kd", "logits+features+self", *EVERYTHING],
        ["--teacher", "ema", "--kd", "retrieval+0.1*features", "--hint-stages", "2", "--ema", "0.5"],
    ],
)
def test_resumed_it_ends_with_the_same_bits(distil, how):
    said, whole = distil(*how, name="whole")
    distil(*how, "--epochs", "1", name="parts")
    _, parts = distil(*how, "--resume", name="parts")
    whole, parts = last(whole), last(parts)
    for key in ("model", "ema", "loss", "optimizers"):
        assert_same(whole[key], parts[key])
    assert not any("adapter" in key for key in whole["model"])
    assert said.splitlines()[-1].startswith("second student" if "mutual" in how else "student distilled")


def test_self_distillation(distil):
    how = ["--backbone", "resnet18", "--epochs", "1"]
    said, folder = distil(*how, "--kd", "self", "--teacher-stage", "4", "--feature-loss-weight", "0.1")
    losses = losses_of(folder)
    assert list(losses) == ["cross_entropy", "triplet", "self/stage1", "self/stage2", "self/stage3"]
    network = build_reid_model("resnet18", 6)  # the checkpoint is of the plain network, key for key
    network.load_state_dict(last(folder)["model"])
    assert "self/stage1" not in said  # the line of an epoch has their sum, where there is room for it


def test_the_teacher_is_frozen_and_sees_its_own_size_once_a_batch(distil, runs, tmp_path, monkeypatch):
    state = last(runs / "plain") | {"input_size": [48, 40]}
    torch.save(state, tmp_path / "teacher.pth")
    calls, load = [], reid.network_from_checkpoint

    def watched(path, device, state):
        network, state = load(path, device, state)
        how = torch.is_grad_enabled, lambda: torch.is_autocast_enabled("cpu")
        network.register_forward_pre_hook(
            lambda module, images: calls.append((module.training, tuple(images[0].shape), *(one() for one in how)))
        )
        return network, state

    monkeypatch.setattr(reid, "network_from_checkpoint", watched)
    said, _ = distil("--teacher", tmp_path / "teacher.pth", "--kd", "logits+retrieval", "--amp", "bf16")
    assert "teacher.pth, osnet_x0_25 at 48x40" in said
    assert calls[:2] == [(False, (8, 3, 48, 40), False, True)] * 2
    # Then it is evaluated, at its own size too: query and gallery.
    assert {(training, shape[2:], grad) for training, shape, grad, _ in calls} == {(False, (48, 40), False)}
    assert [shape[0] for _, shape, *_ in calls[2:]] == [6, 6]


def test_a_published_file_teaches_a_network_of_another_kind(distil, shared_data):
    path = shared_data.parent / "weights" / "osnet_x0_25_market1501.pth"
    if not path.exists():
        pytest.skip("../shared/weights is not on this machine")
    how = ["--teacher", path, "--teacher-backbone", "osnet_x0_25", "--kd", "features+relational"]
    said, folder = distil(*how, "--model", "lmbn_r", "--height", "64", "--branches", "global,part", "--epochs", "1")
    assert "osnet_x0_25 at 256x128" in said
    assert losses_of(folder)["features/embedding"] > 0
    assert said.splitlines()[-2].startswith("teacher ")


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(run, run_on_two, runs, baggage, tmp_path):
    """Adapters, which DDP does not know, with the network; a frozen BatchNorm, since it follows each process."""
    how = [*SMALL, "--dataset", "mvb", "--data", baggage, "--output", tmp_path, "--gather", "--freeze-batch-norm"]
    how += ["--teacher", runs / "plain" / "last.pth", "--kd", "logits+features+relational+attention+retrieval"]
    how += ["--hint-stages", "3", "--optimizer", "sgd", "--lr", "0.01", "--embedding-dim", "64"]
    assert run(train_kd, *how, "--name", "one")[0] == 0
    run_on_two(train_kd, *how, "--ids-per-batch", 2, "--name", "two")
    for epoch in (1, 2):
        assert losses_of(tmp_path / "two", epoch) == pytest.approx(losses_of(tmp_path / "one", epoch), abs=1e-4)
    one, two = last(tmp_path / "one"), last(tmp_path / "two")
    for part in ("model", "loss"):
        for key, value in one[part].items():
            torch.testing.assert_close(two[part][key], value, rtol=1e-3, atol=1e-4)


# Bad input


def refused(run, *arguments):
    code, _, err = run(train_kd, *SMALL, *arguments)
    lines = [line for line in err.splitlines() if line.startswith("error")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nobody teaches: give --kd self, or a --teacher"),
        (["--kd", "1*logits"], "logits needs a --teacher"),
        (["--kd", "1*logit", "--teacher", "ema"], "unknown loss 'logit'"),
        (["--kd", "self", "--teacher", "ema"], "nothing is learned from --teacher ema"),
        (["--teacher", "ema", "--teacher-backbone", "resnet18"], "--teacher-backbone is of"),
        (["--teacher", "no/such.pth"], "no such file: no/such.pth"),
        (["--kd", "self", "--teacher-stage", "1"], "argument --teacher-stage: invalid choice"),
        (["--kd", "features", "--teacher", "ema", "--hint-stages", "3,5"], "--hint-stages: '5' is not a stage from 1"),
        (["--kd", "self", "--model", "pcb", "--height", "96"], "self compares stages, and the student has none"),
        (
            ["--kd", "attention", "--teacher", "mutual", "--teacher-model", "mgn", "--height", "64"],
            "and the teacher has none",
        ),
        (["--teacher", "mutual", "--teacher-backbone", "resnet51"], "unknown backbone 'resnet51'"),
        (["--teacher", "mutual", "--loss", "triplet"], "the student has no classifier"),
        (["--teacher", "mutual", "--loss", "arcface"], "the student has cosines and no class scores"),
        (["--kd", "self", "--baseline", "--resume", "last.pth"], "give --resume without a path"),
    ],
)
def test_bad_options_are_one_line(run, baggage, tmp_path, arguments, said):
    assert said in refused(run, "--dataset", "mvb", "--data", baggage, "--output", tmp_path, *arguments)
    assert not list(tmp_path.iterdir())  # refused before anything is made


def test_teachers_that_do_not_fit(run, runs, distil, baggage, tmp_path, monkeypatch):
    state = last(runs / "plain")
    data = ["--dataset", "mvb", "--data", baggage, "--output", tmp_path / "runs"]

    def saved(**changes):
        torch.save(state | changes, tmp_path / "teacher.pth")
        return ["--teacher", tmp_path / "teacher.pth"]

    other = saved(identities=["a", *state["identities"][1:]])
    assert "are not the identities of the training data: leave logits out" in refused(run, *data, *other)
    distil(*other, "--kd", "features+retrieval", "--epochs", "0")  # which need no classes
    assert "kind mask_rcnn, reid is needed" in refused(run, *data, *saved(kind="mask_rcnn"))
    assert "the teacher has cosines" in refused(run, *data, *saved(network=state["network"] | {"cosine": True}))
    torch.save(state["model"], tmp_path / "weights.pth")
    weights = ["--teacher", tmp_path / "weights.pth"]
    assert "--teacher-backbone" in refused(run, *data, *weights)
    monkeypatch.setattr("core.models.weights.nearest", lambda _: "")  # it builds every backbone
    assert "weights.pth is of another backbone" in refused(run, *data, *weights, "--teacher-backbone", "resnet18")
    assert not (tmp_path / "runs").exists()


def test_a_second_student_of_another_model_has_the_neck_of_its_own(baggage):
    line = [*SMALL, "--dataset", "mvb", "--data", str(baggage), "--teacher", "mutual", "--teacher-model", "mgn"]
    line += ["--backbone", "resnet18", "--height", "64"]
    args = options.parse(train_kd.get_parser(), train_kd.RECIPES, train_kd.default_recipe, line)
    train_kd.settle_distillation(args)
    reid_training.settle(args)
    data = reid_training.load_data(args, lambda line: None)
    students, _ = train_kd.build_students(args, data, None, lambda line: None)
    necks = [{type(m.neck) for m in student.network.modules() if hasattr(m, "neck")} for student in students]
    assert necks == [{torch.nn.BatchNorm1d}, {torch.nn.Identity}]
