"""train_unsupervised.py as a person runs it: every method, resumed, with two processes, and what it refuses."""

import csv
import json
import shutil

import pytest
import torch
from PIL import Image

import evaluate
import train_unsupervised
from core.engine import distributed, options
from core.engine.checkpoint import load_checkpoint
from core.errors import InputError

pytestmark = pytest.mark.usefixtures("no_pictures")
METHODS = ["strong_baseline", "uda_tp", "mmt", "spcl", "cluster_contrast"]
SMALL = [
    "--recipe",
    "quick",
    "--backbone",
    "osnet_x0_25",
    "--weights",
    "none",
    "--height",
    "32",
    "--width",
    "32",
    "--pad",
    "2",
    "--workers",
    "0",
]
SMALL += ["--ids-per-batch", "4", "--images-per-id", "2", "--device", "cpu", "--iterations-per-epoch", "1"]
SMALL += ["--k1", "6", "--k2", "3", "--min-samples", "2", "--epochs", "2"]


@pytest.fixture
def other(baggage, tmp_path):
    """The baggage set in another folder."""
    return shutil.copytree(baggage, tmp_path / "other")


def read_log(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_recipes_are_the_published_ones_and_fit_the_options():
    def parse(*argv):
        script = train_unsupervised
        return options.parse(script.get_parser(), script.RECIPES, script.default_recipe, list(argv))

    assert parse().recipe == "quick"
    spcl = parse("--method", "spcl", "--target", "market1501:x")
    assert (spcl.recipe, spcl.batch_norm_group, spcl.step_size, spcl.iterations_per_epoch) == ("spcl", 16, 20, 400)
    assert parse("--target", "market1501").images_per_id == 16
    known = vars(train_unsupervised.get_parser().parse_args([]))
    assert all(set(recipe) <= set(known) for recipe in train_unsupervised.RECIPES.values())
    assert set(train_unsupervised.RECIPES) == {*METHODS, "quick"} == {*train_unsupervised.PUBLISHED, "quick"}


def test_a_run_with_two_targets_from_beginning_to_end(run, baggage, other, tmp_path, monkeypatch):
    """The second target is of pictures that nobody has named."""
    monkeypatch.undo()  # its pictures too
    line = [*SMALL, "--method", "spcl", "--target", f"mvb:{baggage}", f"pictures:{other / 'MVB_train'}"]
    code, said, error = run(train_unsupervised, *line, "--skip-broken", "--output", tmp_path, "--name", "bags")
    assert code == 0, error
    assert "24 pictures without labels" in said and "clusters of" in said and "of 6 identities" not in said
    folder = tmp_path / "bags"
    pictures = {"clusters mvb.png", "clusters pictures.png", "augmentation.png", "rank_list.png", "curves.png"}
    assert {path.name for path in folder.iterdir()} == pictures | {
        "args.json", "log.csv", "train.log", "last.pth", "best.pth"
    }  # fmt: skip
    assert all(min(Image.open(folder / name).size) > 100 for name in pictures)
    rows = read_log(folder)
    assert [row["epoch"] for row in rows] == ["0", "1", "2"] and rows[0]["mAP"] == rows[0]["mAP mvb"] != ""
    assert "mAP pictures" not in rows[0] and "purity pictures" not in rows[2]
    for name in ("clusters mvb", "outliers mvb", "cluster_size mvb", "purity mvb", "NMI mvb", "ARI mvb"):
        assert float(rows[2][name]) >= -0.5 and (
            name[0] in "pNA" or float(rows[2][name.replace("mvb", "pictures")]) >= 0
        )
    state = load_checkpoint(folder / "best.pth", "reid")
    assert state["network"]["num_domains"] == 2 and any(".dsbn.1." in key for key in state["model"])
    code, said, error = run(evaluate, folder / "best.pth", "--device", "cpu", "--workers", 0)
    assert code == 0 and "mAP" in said, error


@pytest.mark.parametrize("method", ["mmt", "spcl"])
def test_resumed_between_labellings_it_ends_with_the_same_weights(
    run, baggage, other, tmp_path, method, one_thread, monkeypatch
):
    line = [*SMALL, "--method", method, "--target", f"mvb:{baggage}", "--label-every", 2, "--epochs", 3]
    line += ["--source", f"mvb:{other}"] if method == "spcl" else []
    line += ["--schedule", "step", "--output", tmp_path, *(["--eps", 0.4] if method == "mmt" else [])]
    assert run(train_unsupervised, *line, "--name", "straight")[0] == 0

    def killed(models, pseudo, loader, step, *how, train=train_unsupervised.train_one_epoch):
        if step.epoch == 1:
            raise InputError("killed")
        return train(models, pseudo, loader, step, *how)

    with monkeypatch.context() as patch:
        patch.setattr(train_unsupervised, "train_one_epoch", killed)
        assert run(train_unsupervised, *line, "--name", "stopped")[0] == 2
    code, said, error = run(train_unsupervised, *line, "--name", "stopped", "--resume")
    assert code == 0 and "after epoch 1" in said, error
    one, two = (load_checkpoint(tmp_path / name / "last.pth") for name in ("straight", "stopped"))
    assert len(one["ema"]) == (2 if method == "mmt" else 1)
    for key in ("model", "loss", "ema", "optimizers"):
        assert_equal(one[key], two[key], key)


def assert_equal(one, two, where):
    """Nested dicts, lists and tensors, equal bit by bit."""
    assert type(one) is type(two), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    elif isinstance(one, (dict, list)):
        assert len(one) == len(two), where
        for key in one if isinstance(one, dict) else range(len(one)):
            assert_equal(one[key], two[key], f"{where} {key}")
    else:
        assert one == two, where


def test_true_labels_of_the_target_change_nothing(run, baggage, other, tmp_path, one_thread):
    path = other / "MVB_train" / "Info" / "train.json"
    content = json.loads(path.read_text())
    ids = [entry["id"] for entry in content["image"]]
    for entry, new in zip(content["image"], ids[5:] + ids[:5], strict=True):
        entry["id"] = new
    path.write_text(json.dumps(content))
    for name, root in (("true", baggage), ("false", other)):
        line = [*SMALL, "--target", f"mvb:{root}", "--output", tmp_path, "--name", name, "--epochs", 1]
        assert run(train_unsupervised, *line, "--method", "uda_tp", "--keep-outliers")[0] == 0
    states = [load_checkpoint(tmp_path / name / "last.pth") for name in ("true", "false")]
    assert_equal(*(state["model"] for state in states), "model")
    assert read_log(tmp_path / "true")[1]["purity"] != read_log(tmp_path / "false")[1]["purity"]


@pytest.mark.slow
def test_two_processes_have_the_labels_and_losses_of_one(run, run_on_two, baggage, other, tmp_path, one_thread):
    line = [*SMALL, "--method", "spcl", "--target", f"mvb:{baggage}", "--source", f"mvb:{other}"]
    # Adam would turn rounding into steps of full size.
    line += ["--batch-norm-group", 4, "--optimizer", "sgd", "--lr", 0.01, "--output", tmp_path]
    assert run(train_unsupervised, *line, "--name", "one")[0] == 0
    run_on_two(train_unsupervised, *line, "--name", "two", "--ids-per-batch", 2)
    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    for alone, together in zip(one[1:], two[1:], strict=True):
        for name in alone:
            if name not in ("images_per_second", "epoch"):
                assert float(together[name]) == pytest.approx(float(alone[name]), rel=1e-3, abs=1e-3), name
    labels = [load_checkpoint(tmp_path / name / "last.pth")["loss"]["labels"] for name in ("one", "two")]
    assert_equal(*labels, "labels")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "uda_tp", "--source", "mvb:x"], "learns from one set, the target"),
        (["--eps", "0.5", "0.4", "0.6", "--method", "spcl"], "takes 3, ascending"),
        (["--eps", "0.5", "0.6"], "takes 1"),
        (["--clusters", "5", "--method", "spcl"], "has no k-means"),
        (["--batch-norm-group", "3"], "a process has 8 pictures"),
        (["--batch-norm-group", "16"], "1 processes"),
        (["--min-samples", "20"], "24 training pictures are too few to cluster; with --min-samples 20"),
        (["--eps", "0", "--min-samples", "8"], "epoch 1: all 24 pictures of"),
        (["--eps", "0.99", "--k1", "24"], "epoch 1: all pictures fell into one cluster"),
        (["--source", "mvb:BAGGAGE/."], "is given twice"),
        (["--source", "nothing:BAGGAGE"], "unknown data set 'nothing'"),
        (["--target", "pictures:EMPTY"], "holds no pictures"),
        (["--method", "uda_tp", "--images-per-id", "1"], "4 labels with 1 pictures"),
        (["--ids-per-batch", "1", "--images-per-id", "1"], "1 labels with 1 pictures"),
        (["--source", "pictures:BAGGAGE"], "pictures have no labels"),
        (["--target", "market1501+folder"], "one by one"),
        (["--eps", "0.01", "--method", "spcl"], "-0.01"),
    ],
)
def test_bad_input_is_one_line(run, baggage, tmp_path, arguments, said):
    places = {"BAGGAGE": str(baggage), "EMPTY": str(tmp_path)}
    for word, place in places.items():
        arguments = [argument.replace(word, place) for argument in arguments]
    line = [*SMALL, "--target", f"mvb:{baggage}", "--output", tmp_path / "runs", *arguments]
    code, _, error = run(train_unsupervised, *line)
    assert code == 2 and error.count("\n") == 1 and said in error, error


def test_a_run_of_another_method_or_other_pictures_is_not_continued(run, baggage, other, tmp_path):
    line = [*SMALL, "--output", tmp_path, "--name", "bags", "--epochs", 1]
    assert run(train_unsupervised, *line, "--target", f"mvb:{baggage}", "--clusters", 3)[0] == 0
    code, _, error = run(train_unsupervised, *line, "--target", f"mvb:{baggage}", "--method", "mmt", "--resume")
    assert code == 2 and "was trained with --method cluster_contrast" in error
    code, _, error = run(train_unsupervised, *line, "--target", f"pictures:{other}", "--resume")
    assert code == 2 and "its labels are of other pictures ([24]) than those of the sets now" in error


def test_averages_share_the_batch_norm_of_several_processes(run, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        monkeypatch.setattr(distributed, "group_of", lambda size: torch.distributed.new_group([0]))
        args = options.parse(
            *(train_unsupervised.get_parser(), train_unsupervised.RECIPES, train_unsupervised.default_recipe),
            ["--method", "mmt", "--ids-per-batch", "2", "--backbone", "resnet18", "--weights", "none"],
        )
        args.ema, args.batch_norm_group = 0.9, 16
        networks, _ = train_unsupervised.build_networks(args, 2, torch.device("cpu"), print)
        step = train_unsupervised.build_step(networks, args, torch.device("cpu"))
        for network in (*networks, *(average.module for average in step.averages)):
            train_unsupervised.set_batch_norm_group(network, args, torch.device("cuda"))
            norms = [module for module in network.modules() if isinstance(module, torch.nn.SyncBatchNorm)]
            assert norms and all(norm.process_group is not None for norm in norms)
        trained = {id(p) for group in step.optimizers[0].param_groups for p in group["params"]}
        assert trained == {id(p) for network in networks for p in network.parameters()}
    finally:
        torch.distributed.destroy_process_group()
