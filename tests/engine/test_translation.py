"""Translation on two processes, the pool that they share, and batches of two domains."""

import csv

import pytest
import torch
from PIL import Image

import train_translation
from core.engine import distributed, options, translation
from core.engine.checkpoint import load_checkpoint
from core.losses.adversarial import ImagePool

SMALL = ["--height", "16", "--width", "16", "--channels", "4", "--blocks", "1", "--discriminator-layers", "1"]
SMALL += ["--workers", "0", "--device", "cpu", "--iterations-per-epoch", "3", "--epochs", "2", "--pool", "5"]
# Adam would turn rounding into steps of full size; dropout is drawn for each rank.
SMALL += ["--method", "cyclegan", "--optimizer", "sgd", "--lr", "0.001", "--eval-every", "9"]


@pytest.fixture
def sets(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name in ("one", "two"):
        for path in ("train/a", "train/b", "test/c"):
            folder = tmp_path / name / path
            folder.mkdir(parents=True)
            for number in range(4):
                pixels = torch.randint(256, (16, 16, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    return ["--source", f"folder:{tmp_path / 'one'}", "--target", f"folder:{tmp_path / 'two'}"]


def train(rank, argv):
    script = train_translation
    script.main(options.parse(script.get_parser(), script.RECIPES, script.default_recipe, argv))
    distributed.cleanup()
    return True


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(sets, tmp_path, launch, one_thread):
    arguments = [*SMALL, *sets, "--output", str(tmp_path / "runs")]
    train(0, [*arguments, "--batch-size", "4", "--name", "one"])
    together = [*arguments, "--batch-size", "2", "--name", "two", "--translate", str(tmp_path / "out")]
    results, codes, errors = launch(train, together)
    assert results == [True, True], errors
    one, two = (load_checkpoint(tmp_path / "runs" / name / "last.pth", "gan") for name in ("one", "two"))
    for key, weight in one["model"].items():
        torch.testing.assert_close(two["model"][key], weight, rtol=1e-4, atol=1e-6)
    pools = [torch.stack(state["target_pool"]["images"]) for state in (one, two)]
    torch.testing.assert_close(*pools, rtol=1e-3, atol=1e-5)  # five of the 24 pictures, the same ones
    logs = []
    for name in ("one", "two"):
        with open(tmp_path / "runs" / name / "log.csv", newline="") as file:
            logs.append(
                [[float(row[part]) for part in ("gan", "cycle", "discriminator")] for row in csv.DictReader(file)]
            )
    torch.testing.assert_close(torch.tensor(logs[1]), torch.tensor(logs[0]), rtol=1e-4, atol=1e-5)
    assert len(list((tmp_path / "out").rglob("*.png"))) == 12


def test_without_a_group_the_pool_is_that_of_the_process():
    pool, images = ImagePool(2), torch.rand(3, 3, 2, 2)
    shown = translation.exchange(pool, images, torch.Generator().manual_seed(0))
    assert shown.shape == images.shape and torch.equal(shown[:2], images[:2]) and len(pool.images) == 2


def test_batches_of_two_domains_are_not_pairs(sets):
    """Both sets have eight pictures; were they drawn alike, the n-th of one would meet the n-th of the other."""
    argv = [*SMALL, *sets, "--iterations-per-epoch", "0", "--batch-size", "3"]
    script = train_translation
    args = options.parse(script.get_parser(), script.RECIPES, script.default_recipe, argv)
    loader = translation.BothDomains(args, *translation.load_domains(args, lambda line: None), torch.device("cpu"))
    loader.set_epoch(1)
    batches = list(loader)
    assert len(batches) == len(loader) == 3
    for batch in batches:
        assert batch["source"].shape == batch["target"].shape == (3, 3, 16, 16) and len(batch["path"]) == 6
        assert batch["source"].min() >= -1 and batch["source"].max() <= 1 and batch["source"].min() < 0
    names = [[path.split("/train/")[1] for path in batch["path"]] for batch in batches]
    assert len({name for batch in names for name in batch[:3]}) == 8
    assert [batch[:3] for batch in names] != [batch[3:] for batch in names]
