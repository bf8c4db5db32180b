"""The benchmarks that a person runs seldom, in small, so that they go on running."""

import shutil

import pytest
import torch

import train_reid
from benchmarks import mask_decoder, mask_guidance
from core.engine import options
from core.models.mask_rcnn import MaskRCNN

TINY = ["--height", "32", "--width", "32", "--pad", "2", "--mask-size", "8", "8"]
TINY += ["--ids-per-batch", "4", "--images-per-id", "2", "--iterations-per-epoch", "1"]


@pytest.fixture(scope="module")
def bags(baggage, tmp_path_factory):
    """Options of train_reid.py for a small set of its own: predicted masks are kept beside it."""
    root = shutil.copytree(baggage, tmp_path_factory.mktemp("bags") / "baggage")
    return [*TINY, "--dataset", "mvb", "--data", str(root)]


@pytest.fixture(scope="module")
def mask_checkpoint(tmp_path_factory):
    """Of a small Mask R-CNN that was never trained, but sees something everywhere."""
    torch.manual_seed(0)
    sizes = {"min_size": 32, "max_size": 48, "box_roi_output_size": 2, "rpn_post_nms_top_n_test": 20}
    network = MaskRCNN("resnet18", 2, **sizes)
    with torch.no_grad():
        network.roi_heads.box_predictor.cls_score.bias.copy_(torch.tensor([-2.0, 1.0]))
    state = {"kind": "mask_rcnn", "model": network.state_dict(), "ema": None, "network": network.options, "args": {}}
    path = tmp_path_factory.mktemp("masks") / "best.pth"
    torch.save({**state, "categories": [[1, "bag"]], "epoch": 1, "best": 0.1}, path)
    return path


@pytest.mark.parametrize(("mask", "pooling"), mask_guidance.ways(mask_guidance.MASKS, mask_guidance.POOLINGS))
def test_train_reid_accepts_each_line_of_mask_guidance(mask, pooling, bags, mask_checkpoint, tmp_path):
    line = ["--mask-checkpoint", str(mask_checkpoint), "--", *bags, "--epochs", "0"]
    arguments = mask_guidance.arguments_of(mask, pooling, 0, mask_guidance.get_parser().parse_args(line), tmp_path)
    train_reid.main(options.parse(train_reid.get_parser(), train_reid.RECIPES, train_reid.default_recipe, arguments))
    assert (tmp_path / f"{mask}-{pooling}-0" / "log.csv").is_file()


@pytest.mark.slow
def test_mask_guidance(bags, tmp_path, capsys):
    line = ["--masks", "none", "instance", "--poolings", "soft", "off", "--seeds", "3", "--parallel", "1"]
    line += ["--output", str(tmp_path / "runs")]
    line += ["--", *bags, "--epochs", "1"]
    mask_guidance.main(mask_guidance.get_parser().parse_args(line))
    rows = [row.split(" | ")[:2] for row in capsys.readouterr().out.splitlines() if row.startswith("| ")]
    assert rows[2:] == [["| none", "off"], ["| instance", "soft"], ["| instance", "off"]]


def test_mask_decoder(capsys):
    line = ["--backbone", "resnet18", "--batch", "4", "--size", "32", "32", "--mask-size", "8", "8", "--steps", "1"]
    mask_decoder.main(mask_decoder.get_parser().parse_args([*line, "--mask-pooling", "soft", "--device", "cpu"]))
    rows = [row.split()[:-4] for row in capsys.readouterr().out.splitlines()[1:]]
    decoders = [["no", "decoder"], ["full"], ["light"]]
    assert rows == [[*what, *name] for what in (["training", "step"], ["evaluation"]) for name in decoders]
