"""train_translation.py as a person runs it: what it leaves behind and translates, how it goes on, what it refuses."""

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import train_reid
import train_translation
from benchmarks import translation as benchmark
from core.data.reid_datasets import load_reid_dataset
from core.engine import options
from core.engine import run as core_run
from core.engine.checkpoint import REQUIRED, load_checkpoint
from core.losses.adversarial import ImagePool
from core.models.reid import build_reid_model

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--height", "16", "--width", "16", "--channels", "2", "--blocks", "1", "--discriminator-layers", "1"]
TINY += ["--siamese-layers", "2", "--batch-size", "2", "--workers", "0", "--device", "cpu", "--epochs", "2"]
TINY += ["--iterations-per-epoch", "3"]


@pytest.fixture(scope="session")
def looks(tmp_path_factory):
    """Options --source and --target for two sets in the layout `folder`: red pictures of 20x16 pixels, grey ones."""
    root = tmp_path_factory.mktemp("looks")
    for name, tint in (("red", (1, 0.2, 0.1)), ("grey", (0.6, 0.6, 0.6))):
        random = np.random.default_rng(len(name))
        for path in ("train/a", "train/b", "test/c", "test/d"):
            (root / name / path).mkdir(parents=True)
            for number in range(2 + (name == "red")):
                pixels = random.integers(0, 256, (16, 20, 1)) * np.array(tint)
                Image.fromarray(pixels.astype(np.uint8)).save(root / name / path / f"{number}.png")
    return ["--source", f"folder:{root / 'red'}", "--target", f"folder:{root / 'grey'}"]


@pytest.fixture(scope="session")
def reid_checkpoint(tmp_path_factory):
    """Of a small ReID network that was never trained."""
    torch.manual_seed(0)
    network = {"backbone": "resnet18", "num_classes": 2}
    state = {"kind": "reid", "model": build_reid_model(**network).state_dict(), "ema": [], "network": network}
    state |= {"input_size": [32, 32], "normalisation": {"mean": [0.5] * 3, "std": [0.5] * 3}, "identities": ["a", "b"]}
    path = tmp_path_factory.mktemp("reid") / "best.pth"
    torch.save({**state, "distance": "cosine", "args": {}, "epoch": 1, "best": 0.1}, path)
    return path


def parse(*argv):
    script = train_translation
    return options.parse(script.get_parser(), script.RECIPES, script.default_recipe, list(map(str, argv)))


def read_log(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def identities(root, layout="folder"):
    return [
        [(os.path.relpath(s.path, root), s.id, s.camera, s.box, s.mask, s.name) for s in part]
        for part in load_reid_dataset(layout, root)
    ]


def test_a_run_and_what_it_translates(run, looks, reid_checkpoint, tmp_path):
    arguments = [*TINY, *looks, "--output", tmp_path, "--name", "run", "--feature-distance", reid_checkpoint]
    code, said, err = run(train_translation, *arguments, "--eval-every", 2, "--translate", tmp_path / "new" / "out")
    assert code == 0, err
    folder, out = tmp_path / "run", tmp_path / "new" / "out"
    assert {path.name for path in folder.iterdir()} == {
        *("args.json", "log.csv", "train.log", "curves.png", "last.pth", "translation_002.jpg")
    }
    parts = ["gan", "cycle", "identity", "contrastive", "discriminator", "siamese"]
    rows = read_log(folder)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    for row in rows:
        assert float(row["loss"]) == pytest.approx(sum(float(row[part]) for part in parts), rel=1e-4)
    assert (folder / "train.log").read_text() in said and "Frechet distance to the target" in said

    source = looks[1].removeprefix("folder:")
    assert identities(out) == identities(source)
    note = json.loads((out / "translation.json").read_text())
    assert note["source"] == looks[1] and note["method"] == "spgan" and (note["epoch"], note["pictures"]) == (2, 12)
    old, new = (Image.open(Path(root) / "train" / "a" / "0.png") for root in (source, out))
    assert new.size == old.size and new.tobytes() != old.tobytes()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["out"]

    code, said, err = run(train_translation, "--weights", folder / "last.pth", "--translate", tmp_path / "again")
    assert code == 0, err
    for path in out.rglob("*.png"):
        assert (tmp_path / "again" / path.relative_to(out)).read_bytes() == path.read_bytes()

    small = ["--backbone", "resnet18", "--weights", "none", "--height", "32", "--width", "32", "--ids-per-batch", "2"]
    small += ["--images-per-id", "2", "--workers", "0", "--device", "cpu", "--epochs", "1", "--output", tmp_path]
    code, _, err = run(train_reid, *small, "--dataset", "folder", "--data", out)
    assert code == 0, err


def test_cyclegan_has_no_siamese_network(run, looks, tmp_path):
    code, _, err = run(train_translation, *TINY, *looks, "--method", "cyclegan", "--output", tmp_path, "--name", "run")
    assert code == 0, err
    assert set(read_log(tmp_path / "run")[0]) == {
        *("epoch", "lr", "loss", "gan", "cycle", "identity", "discriminator", "images_per_second")
    }
    assert not any("siamese" in key for key in load_checkpoint(tmp_path / "run" / "last.pth", "gan")["model"])


def test_one_side_of_security_in_the_look_of_the_other(run, baggage, tmp_path):
    """Pictures of the other cameras, boxes, masks and lists are as they were."""
    spec = f"mvb:{baggage}"
    arguments = [*TINY, "--source", spec, "--target", spec, "--source-cameras", 2, 4, "--target-cameras", 3, 5]
    arguments += ["--epochs", 0, "--output", tmp_path, "--name", "run", "--translate", tmp_path / "out"]
    code, said, err = run(train_translation, *arguments)
    assert code == 0 and "12 pictures of cameras [2, 4]" in said, err
    assert identities(tmp_path / "out", "mvb") == identities(baggage, "mvb")
    for part in load_reid_dataset("mvb", baggage):
        for sample in part:
            new, old = tmp_path / "out" / os.path.relpath(sample.path, baggage), Path(sample.path)
            assert Image.open(new).size == Image.open(old).size and Image.open(new).format == "JPEG"
            assert (new.read_bytes() == old.read_bytes()) == (sample.camera % 2 == 1)


HARD = ["--ema", "0.5", "--amp", "bf16", "--accumulate", "2", "--clip-gradient", "1", "--pool", "3", "--epochs", "3"]
HARD += ["--schedule", "linear", "--decay-from", "1", "--deterministic", "--eval-every", "9"]


def assert_same_run(first, second):
    logs = [[{**row, "images_per_second": ""} for row in read_log(folder)] for folder in (first, second)]
    assert logs[0] == logs[1]
    states = [load_checkpoint(folder / "last.pth", "gan") for folder in (first, second)]
    flat = [torch.utils._pytree.tree_flatten({**state, "args": None})[0] for state in states]
    for one, other in zip(*flat, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_resumed_with_its_pool_it_is_the_same_run(run, looks, tmp_path, monkeypatch):
    monkeypatch.setattr("core.engine.log.curves", lambda *_: None)
    arguments = [*TINY, *looks, *HARD, "--output", tmp_path]
    assert run(train_translation, *arguments, "--name", "whole")[0] == 0

    class Killed(Exception):
        pass

    def die(folder, state, improved):
        save_run(folder, state, improved)
        if state["epoch"] == 2:
            raise Killed

    save_run = core_run.save_run
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(core_run, "save_run", die)
        run(train_translation, *arguments, "--name", "killed")
    pool = load_checkpoint(tmp_path / "killed" / "last.pth")["target_pool"]["images"]
    assert len(pool) == 3
    code, said, err = run(train_translation, *arguments, "--name", "killed", "--resume")
    assert code == 0 and "after epoch 2\n" in said, err
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_killed_and_resumed_it_is_the_same_run(run, looks, tmp_path):
    arguments = [*TINY, *looks, *HARD, "--output", tmp_path, "--epochs", 5]
    command = [sys.executable, "train_translation.py", *map(str, arguments), "--name", "killed"]
    last = tmp_path / "killed" / "last.pth"
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while not last.exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and load_checkpoint(last)["epoch"] < 5
    code, said, err = run(train_translation, *arguments, "--name", "killed", "--resume")
    assert code == 0 and "continuing from" in said, err
    assert run(train_translation, *arguments, "--name", "whole")[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_recipes_are_the_published_ones_and_options_win():
    assert parse().recipe == "quick" and parse().method == "spgan"
    spgan = parse("--source", "a", "--target", "b")
    assert (spgan.recipe, spgan.identity, spgan.contrastive, spgan.schedule) == ("spgan", 5, 2, "multistep")
    cyclegan = parse("--source", "a", "--target", "b", "--method", "cyclegan", "--lr", "1e-3")
    assert (cyclegan.recipe, cyclegan.identity, cyclegan.lr, cyclegan.decay_from) == ("cyclegan", 0.5, 1e-3, 25)
    for args in (spgan, cyclegan):
        assert (args.height, args.width, args.batch_size, args.epochs, args.iterations_per_epoch) == (
            256,
            128,
            8,
            50,
            200,
        )
        assert (args.beta1, args.weight_decay, args.cycle, args.pool, args.blocks) == (0.5, 0, 10, 50, 9)


# The losses by hand: pictures of one value, translations that add to it, judges that say it ---------------------------


class Judges(dict):
    """Discriminators that return their picture, and a siamese network whose embedding is the picture's first value."""

    def __init__(self, siamese):
        super().__init__(is_target=lambda x: x, is_source=lambda x: 2 * x)
        if siamese:
            self["siamese"] = lambda x: x[:, :1, 0, 0]


def value(number):
    return torch.full((1, 3, 1, 1), float(number))


def test_losses_of_the_generators_by_hand():
    args = SimpleNamespace(cycle=10.0, identity=0.5, contrastive=2.0)
    calls = []

    def to_target(images):
        calls.append(images[0, 0, 0, 0].item())
        return images + 1

    source, target = value(0), value(0.25)
    how = (to_target, lambda x: x - 0.5, Judges(siamese=True), source, target)
    losses, as_target, as_source = train_translation.generator_losses(*how, args)
    assert (as_target[0, 0].item(), as_source[0, 0].item()) == (1, -0.25)
    # there and back adds 0.5 to both
    expected = {"gan": 0 + 1.5**2, "cycle": 10 * (0.5 + 0.5), "identity": 0.5 * (1 + 0.5)}
    alike, apart = 1**2 + 0.5**2, (2 - 0.75) ** 2 + (2 - 0.25) ** 2
    expected["contrastive"] = 2 * (alike + 0.5 * apart) / 4
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-4)
    assert calls == [0, -0.25, 0.25]

    calls.clear()
    args.identity = args.contrastive = 0.0  # then neither is computed
    losses, *_ = train_translation.generator_losses(*how, args)
    assert set(losses) == {"gan", "cycle"} and calls == [0, -0.25]


def test_losses_of_the_judges_by_hand():
    pools = {"target_pool": ImagePool(1), "source_pool": ImagePool(0)}
    images = (value(0), value(0.25), value(1), value(-0.25))
    losses = train_translation.judge_losses(Judges(siamese=True), pools, *images, torch.Generator())
    discriminator = 0.5 * (0.75**2 + 1**2) + 0.5 * (1**2 + 0.5**2)
    siamese = (1**2 + 0.5**2 + 2 * (2 - 0.25) ** 2) / 3
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(
        {"discriminator": discriminator, "siamese": siamese}, rel=1e-4
    )
    assert pools["target_pool"].images[0][0, 0, 0] == 1


def test_two_steps_are_those_of_plain_pytorch():
    line = ["--method", "cyclegan", "--channels", "2", "--blocks", "1", "--layers", "1", "--size", "8", "12"]
    args = benchmark.get_parser().parse_args([*line, "--batch", "2", "--device", "cpu"])
    torch.manual_seed(0)
    networks, _ = train_translation.build_networks(benchmark.settings(args))
    networks = networks.double()  # Adam turns rounding into steps of full size
    runs = [
        kind(deepcopy(networks), benchmark.settings(args), torch.device("cpu"))
        for kind in (benchmark.Ours, benchmark.Plain)
    ]
    batches = torch.randn(2, 2, 2, 3, 8, 12, dtype=torch.float64).tanh()
    for source, target in batches:
        for one in runs:
            one.step(source, target)
    ours, plain = (one.networks.state_dict() for one in runs)
    for key, weight in plain.items():
        torch.testing.assert_close(ours[key], weight, rtol=0, atol=1e-9)
        assert not torch.equal(weight, networks.state_dict()[key])


# Bad input ----------------------------------------------------------------------------------------------------------


def refused(run, *arguments):
    """The one line with which a run is refused."""
    code, _, err = run(train_translation, *TINY, *arguments)
    lines = [line for line in err.splitlines() if line.startswith("error")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--source", "folder:x"], "--source and --target belong together"),
        (["--source", "folder:no/such", "--target", "folder:x"], "no/such: no such folder"),
        (["--source", "market:x", "--target", "folder:x"], "unknown data set 'market'"),
        (["--height", "18"], "--height 18: the networks take multiples of 4 from 16 up, the nearest is 20"),
        (["--width", "8", "--method", "cyclegan", "--discriminator-layers", "3"], "from 24 up, the nearest is 24"),
        (["--source-cameras", "1", "2"], "no training pictures of the cameras 1, 2; it has those of 0"),
        (["--weights", "x.pth"], "give --translate OUT"),
        (["--feature-distance", "x.pth"], "give --translate OUT"),
        (["--weights", "no/such.pth", "--translate", "no/such/out"], "no such file: no/such.pth"),
        (["--feature-distance", "no/such.pth", "--translate", "no/such/out"], "no such file: no/such.pth"),
        (["--batch-size", "0"], "'0' is not a whole number above 0"),
    ],
)
def test_refused(run, looks, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = [] if "--source" in arguments else looks
    assert said in refused(run, *data, *arguments, "--output", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_source_and_target_the_same(run, looks, baggage, tmp_path):
    line = refused(run, "--source", looks[1], "--target", looks[1], "--output", tmp_path)
    assert "6 training pictures are both source and target" in line and not list(tmp_path.iterdir())


def test_a_set_that_can_only_be_searched(run, looks, tmp_path):
    root = looks[1].removeprefix("folder:")
    for part in ("query", "gallery"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "c").symlink_to(Path(root) / "test" / "c")
    line = refused(run, "--source", f"folder:{tmp_path}", *looks[2:], "--output", tmp_path / "runs")
    assert "--source" in line and "no training pictures; give another" in line


def test_a_folder_that_exists_is_not_translated_into(run, looks, tmp_path):
    (tmp_path / "out").mkdir()
    assert "out is there already" in refused(run, *looks, "--translate", tmp_path / "out", "--output", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_translated_set_is_there_whole_or_not_at_all(run, looks, tmp_path, monkeypatch):
    def full(self, *_, **__):
        if len(list((tmp_path / ".out.partial").rglob("*.png"))) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(self, *_, **__)

    save = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", full)
    arguments = [*looks, "--epochs", "0", "--output", tmp_path / "runs", "--translate", tmp_path / "out"]
    assert "out: No space left on device; make room" in refused(run, *arguments)
    assert not list(tmp_path.iterdir())


def test_another_network_is_not_continued_with(run, looks, tmp_path):
    arguments = [*looks, "--output", tmp_path, "--name", "run"]
    assert run(train_translation, *TINY, *arguments, "--epochs", "1")[0] == 0
    line = refused(run, *arguments, "--resume", "--channels", "4")
    assert "channels is 2 there and 4 here" in line


def test_a_checkpoint_of_another_kind(run, looks, reid_checkpoint, tmp_path):
    line = refused(run, "--weights", reid_checkpoint, "--translate", tmp_path / "out")
    assert "a checkpoint of kind reid, gan is needed here" in line
    torch.save({**dict.fromkeys(REQUIRED["gan"]), "kind": "gan"}, tmp_path / "last.pth")
    code, _, err = run(evaluate, tmp_path / "last.pth")
    assert code == 2 and "a checkpoint of kind gan" in err


def test_a_broken_picture_stops_the_run_or_is_left_out(run, looks, tmp_path):
    shutil.copytree(looks[1].removeprefix("folder:"), tmp_path / "data")
    (tmp_path / "data" / "train" / "a" / "1.png").write_bytes(b"no picture")
    arguments = ["--source", f"folder:{tmp_path / 'data'}", *looks[2:], "--output", tmp_path / "runs"]
    assert "1.png: can't be read as a picture" in refused(run, *arguments)
    assert not (tmp_path / "runs").exists()
    arguments += ["--translate", tmp_path / "out", "--skip-broken"]
    code, said, err = run(train_translation, *TINY, *arguments)
    assert code == 0 and "--skip-broken: 1 of 6 train pictures left out" in said, err
    assert not (tmp_path / "out" / "train" / "a" / "1.png").exists()
