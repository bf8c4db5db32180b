"""Networks as files for production: any batch size, the network's own answers, and what is refused."""

import json
import sys

import pytest
import torch
from torch import nn

from core.engine.export import export_network, for_retrieval
from core.errors import InputError
from core.models.reid import ReIDOutput, build_reid_model

CPU = torch.device("cpu")
STATE = {
    "input_size": [64, 32],
    "normalisation": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]},
    "distance": "cosine",
    "threshold": {"distance": 0.4},
}


def network(backbone="resnet18", **options):
    torch.manual_seed(0)
    built = build_reid_model(backbone, 3, mask_size=[16, 8], **options)
    for module in built.modules():  # as if it had seen pictures
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(std=0.1)
    return built.eval()


NETWORKS = {
    "masks": {"backbone": "resnet18_with_mask", "mask_pooling": "branch", "mask_decoder": "light"},
    "lmbn": {"backbone": "resnet18", "model": "lmbn_r", "branches": ["global"]},  # the name of a keyword
}


@pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated")
@pytest.mark.parametrize("name", NETWORKS)
def test_torchscript(name, tmp_path):
    ours, path = network(**NETWORKS[name]), tmp_path / "file.pt"
    line = export_network(path, "torchscript", ours, STATE, CPU)
    extra = {"carousel.json": ""}
    loaded = torch.jit.load(path, _extra_files=extra)
    assert json.loads(extra["carousel.json"]) == {
        "input_size": [64, 32],
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.2, 0.2],
        "distance": "cosine",
        "threshold": {"distance": 0.4},
    }
    with torch.no_grad():
        for batch in (1, 3):
            images = torch.randn(batch, 3, 64, 32)
            found, expected = loaded(images), ours(images, return_mask=name == "masks")
            torch.testing.assert_close(found[0], expected.embedding)
            if name == "masks":
                torch.testing.assert_close(found[1], expected.mask)
    assert "images (N, 3, 64, 32), RGB in [0, 1] minus [0.5, 0.4, 0.3] over [0.2, 0.2, 0.2] -> embedding (N, " in line
    assert ("mask (N, 1, 16, 8)" in line) == (name == "masks") and "largest difference from the network 0.0e+00" in line
    assert not any("classifier" in key for key, _ in loaded.named_parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx(name, tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    ours, path = network(**NETWORKS[name]), tmp_path / "file.onnx"
    ours.embed = "before"
    line = export_network(path, "onnx", ours, STATE, CPU)
    # The threshold is of embeddings after the neck.
    metadata = {one.key: json.loads(one.value) for one in onnx.load(path).metadata_props}
    assert metadata == {"input_size": [64, 32], **STATE["normalisation"], "distance": "cosine"}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_outputs()] == ["embedding", "mask"][: 1 + (name == "masks")]
    for batch in (1, 3):
        images = torch.randn(batch, 3, 64, 32)
        with torch.no_grad():
            expected = ours(images).embedding
        (found, *_) = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
    difference = float(line.split("largest difference from the network ")[1].split(",")[0])
    assert 0 <= difference < 1e-4


class Counting(nn.Module):
    """An embedding that is multiplied by the number of pictures, which a trace holds for ever."""

    mask_decoder, embed = None, "after"

    def forward(self, images, return_mask=None):
        return ReIDOutput(images.mean(dim=(2, 3)) * int(images.shape[0]), [], [])


def test_a_file_of_other_answers_is_not_written(tmp_path):
    with pytest.raises(InputError, match="of 1 pictures its embedding differs from the network's") as caught:
        export_network(tmp_path / "file.pt", "torchscript", Counting(), STATE, CPU)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match="pip install onnx onnxruntime"):
        export_network(tmp_path / "file.onnx", "onnx", network(), STATE, CPU)
    assert list(tmp_path.iterdir()) == []


def test_what_an_onnx_file_cannot_hold(tmp_path):
    """A predicted mask whose size is no multiple of stage 4's has to be resized by area."""
    pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    odd = build_reid_model("resnet18_with_mask", 0, mask_size=[15, 8], mask_pooling="soft", mask_decoder="light").eval()
    with pytest.raises(InputError, match="use --export torchscript") as caught:
        export_network(tmp_path / "file.onnx", "onnx", odd, STATE, CPU)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("resnet18_with_mask", {"mask_pooling": "branch", "mask_size": [8, 8]}),
        ("osnet_x0_25", {}),
        ("resnet18", {"model": "pcb", "parts": 2}),
    ],
)
def test_a_network_for_retrieval_has_no_classifier_and_the_same_embedding(backbone, options):
    network = build_reid_model(backbone, 5, **options)
    copy, without = for_retrieval(network), build_reid_model(backbone, 0, **options)
    assert {key: value.shape for key, value in copy.state_dict().items()} == {
        key: value.shape for key, value in without.state_dict().items()
    }
    images = torch.randn(2, 3, 64, 32)
    assert network.training and not copy.training
    with torch.no_grad():
        found, expected = copy(images), network.eval()(images)
    assert found.logits == [] and len(expected.logits) > 0
    torch.testing.assert_close(found.embedding, expected.embedding, rtol=0, atol=0)
