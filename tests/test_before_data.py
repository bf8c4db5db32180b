"""What is wrong with the options of a training is one line before data are rendered, which takes minutes, or read."""

import importlib
import re
import sys

import pytest
import torch

BATCH_OF_ONE = ["--weights", "none", "--loss", "cross_entropy", "--ids-per-batch", 1, "--images-per-id", 1]
BAD = {
    "train_reid": [
        (["--backbone", "resnet5O"], "unknown backbone 'resnet5O'; use one of resnet18"),
        (["--model", "pcb", "--backbone", "resnet18_with_mask"], "no choice of a mask decoder"),
        (["--loss", "1*triplett"], "unknown loss 'triplett'"),
        (["--loss", "gaussian_mask", "--backbone", "resnet18"], "use --backbone resnet18_with_mask"),
        (["--pooling", "median"], "invalid choice: 'median'"),
        (["--weights", "no.pth"], "no such file: no.pth"),
        (["--mask-target", "predicted", "--mask-checkpoint", "no.pth", "--hide-background", 1], "no such file: no.pth"),
        (["--model", "pcb", "--height", 32, "--weights", "none"], "6 parts of a map of 2 rows"),
        (["--attention", "se", "--backbone", "osnet_x0_25"], "attention is for ResNets"),
        (["--images-per-id", 1], "compares two identities or more"),
        (BATCH_OF_ONE, "BatchNorm sees a single value, that of 1 picture of 64x64 pixels"),  # in the neck
        ([*BATCH_OF_ONE, "--neck", "none", "--height", 32, "--width", 32, "--last-stride", 2], "a single value"),
        (["--height", 1, "--width", 1, "--weights", "none"], "pictures of a single pixel can't be made"),
        (["--wandb"], "needs the package wandb"),
    ],
    "train_kd": [
        (["--kd", "self", "--backbone", "resnet5O"], "unknown backbone 'resnet5O'"),
        (["--kd", "selv"], "needs a --teacher|unknown loss"),
        (["--teacher", "mutual", "--weights", "none", "--teacher-backbone", "resnet5O"], "unknown backbone 'resnet5O'"),
        (["--kd", "self", "--model", "mgn", "--weights", "none", "--height", 128], "the student has none"),
        (["--teacher", "mutual", "--kd", "attention", "--teacher-model", "mgn", "--weights", "none", "--height", 128],
         "the teacher has none"),
        (["--kd", "self", *BATCH_OF_ONE], "BatchNorm sees a single value"),
    ],
    "train_unsupervised": [
        (["--backbone", "resnet5O"], "unknown backbone 'resnet5O'"),
        (["--weights", "no.pth"], "no such file: no.pth"),
        (["--batch-norm-group", 1, "--weights", "none"], "BatchNorm sees a single value"),
        (["--method", "dbscan"], "invalid choice: 'dbscan'"),
    ],
    "train_translation": [
        (["--height", 33], "--height 33: the networks take multiples of 4"),
        (["--wandb"], "needs the package wandb"),
    ],
    "train_mask_rcnn": [
        (["--weights", "no.pth"], "no such file: no.pth"),
        (["--weights", "coco"], "COCO weights are published for resnet50, not for resnet18"),
        (["--anchor-sizes", 8, 16, 32, 64, "128,256"], "give one size, or equally many, for each of the 5 levels"),
        (["--batch-size", 1, "--min-size", 32], "BatchNorm sees a single value in the last stage"),
        (["--wandb"], "needs the package wandb"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("script", "arguments", "message"), [(name, *row) for name, rows in BAD.items() for row in rows]
)
def test_bad_options_are_one_line_before_data_are_made(run, tmp_path, monkeypatch, script, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    code, out, err = run(importlib.import_module(script), "--device", "cpu", *arguments)
    assert code == 2 and err.count("\n") == 1 and re.search(message, err), err
    assert out == "" and [path.name for path in tmp_path.iterdir()] == ["other.pth"]
