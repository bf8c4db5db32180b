"""Files of other projects, as they are."""

import argparse
import json
import os

import numpy as np
import pytest
import torch
from torch.nn import BatchNorm1d

import evaluate
from core.data.reid_images import ReIDImages
from core.data.samples import Sample
from core.data.transforms import build_transform
from core.engine import reid
from core.engine.published import load_state
from core.errors import InputError
from core.models.pcb import pcb
from core.models.published_keys import own_names
from core.models.reid import build_reid_model
from core.models.resnet import resnet18


@pytest.fixture
def osnet(shared_data):
    path = shared_data.parent / "weights" / "osnet_x0_25_market1501.pth"
    if not path.exists():
        pytest.skip("../shared/weights is not on this machine")
    return path


def saved(content, folder):
    torch.save(content, folder / "w.pth")
    return folder / "w.pth"


@pytest.mark.parametrize("name", ["coil20_reid", "coil100_reid"])
@torch.inference_mode()
def test_embeddings_of_torchreid(name, osnet, shared_data, golden):
    arrays = golden("published_osnet")
    network, state = reid.network_from_checkpoint(osnet, "cpu", state=load_state(osnet, "reid", backbone="osnet_x0_25"))
    assert state["input_size"] == [256, 128] and "751 other identities left out, as expected" in state["message"]
    files = [os.path.basename(str(file)) for file in arrays[f"market1501/{name}/query_files"]]
    transform = build_transform(*state["input_size"], training=False, **state["normalisation"])
    samples = [Sample(str(shared_data / name / "query" / file), 0, 0) for file in files]
    images = torch.stack([image["image"] for image in ReIDImages(samples, transform)])
    if f"market1501/{name}/images" in arrays:
        torch.testing.assert_close(images[:2], torch.as_tensor(arrays[f"market1501/{name}/images"]), rtol=0, atol=1e-5)
    expected = torch.as_tensor(arrays[f"market1501/{name}/query_embeddings"])
    torch.testing.assert_close(network(images).embedding, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["coil20_reid", "coil100_reid"])
def test_results_of_torchreid(name, osnet, shared_data, golden, run, tmp_path):
    arguments = ["--backbone", "osnet_x0_25", "--dataset", "market1501", "--data", shared_data / name]
    code, said, err = run(evaluate, osnet, *arguments, "--output", tmp_path, "--workers", 0, "--rank-list", 0)
    assert code == 0, err
    assert "565 of 565 tensors" in said
    result = json.loads((tmp_path / "market1501" / "metrics.json").read_text())["results"]["plain"]
    expected = golden("published_osnet")[f"market1501/{name}/mAP_rank1"]
    assert [result["mAP"], result["rank1"]] == pytest.approx(list(expected), abs=1e-3)


def test_what_a_file_has_settles_the_network(tmp_path):
    """fast-reid's names, GeM, a reduction; and a Namespace beside the weights, which is read without running code."""
    source = build_reid_model("resnet18", 5, pooling="gem", embedding_dim=16)
    theirs = {"neck.": "heads.bottleneck.0.", "classifier.": "heads.", "pooling.": "heads.pool_layer."}
    state = source.state_dict()
    for own, other in theirs.items():
        state = {key.replace(own, other) if key.startswith(own) else key: value for key, value in state.items()}
    path = tmp_path / "model.pth"
    torch.save(
        {"model_state_dict": {f"module.{k}": v for k, v in state.items()}, "args": argparse.Namespace(a=1)}, path
    )
    made = load_state(path, "reid", backbone="resnet18")
    network, _ = reid.network_from_checkpoint(path, "cpu", state=made)
    images = torch.randn(2, 3, 64, 32)
    torch.testing.assert_close(network(images).embedding, source.eval()(images).embedding)
    for prefix in ("--", "--teacher-"):  # only options that the script has
        with pytest.raises(InputError, match=f"not a checkpoint of Carousel .* give {prefix}backbone, the") as caught:
            load_state(path, "reid", prefix=prefix)
        assert "--weights" not in str(caught.value)


def test_numbers_of_a_training_loop_beside_the_weights(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"state_dict": resnet18(0).state_dict(), "rank1": np.float64(0.9), "epoch": 3}, path)
    assert load_state(path, "reid", backbone="resnet18")["network"]["neck"] == "none"


def test_networks_of_parts_and_files_that_lack_something(tmp_path):
    source = pcb(5, resnet18(0, last_stride=1), parts=4, feature_dim=8).eval()
    path = saved(source.state_dict(), tmp_path)
    made = load_state(path, "reid", backbone="resnet18", model="pcb")
    assert (made["network"]["parts"], made["network"]["embedding_dim"], made["input_size"]) == (4, 8, [384, 128])
    images = torch.randn(1, 3, 64, 32)
    network, _ = reid.network_from_checkpoint(path, "cpu", state=made)
    torch.testing.assert_close(network(images).embedding, source(images).embedding)

    state = {key: value for key, value in source.state_dict().items() if "part_2.neck" not in key}
    with pytest.raises(InputError, match="w.pth has no heads.part_2.neck.bias of that size, which pcb on"):
        load_state(saved(state, tmp_path), "reid", backbone="resnet18", model="pcb")
    with pytest.raises(InputError, match="another backbone.*resnet18 is nearest: it fits 100 of its 100"):
        load_state(saved(resnet18(0).state_dict(), tmp_path), "reid", backbone="resnet50")
    with pytest.raises(InputError, match="checkpoint of Carousel, which knows its network: leave the backbone out"):
        load_state(saved({"kind": "reid"}, tmp_path), "reid", backbone="resnet18")


def test_names_that_only_look_like_those_of_a_known_project(tmp_path):
    """Places and parts that no network has; an nn.Sequential of torchvision's children."""
    state = resnet18(0).state_dict()
    numbered = {f"{number}.weight": torch.zeros(1) for number in range(10)}
    strange = (
        "classifier1.fc.weight",
        "p1.0.weight",
        "p1.9.weight",
        "reduction_9.bn.weight",
        "global_branch.conv.bias",
    )
    named = own_names({**state, **numbered, **dict.fromkeys(strange, torch.zeros(1))}, state)
    assert set(strange) < set(named)
    with pytest.raises(InputError, match="has no tensor that this model could take"):
        load_state(saved({f"9.{key}": value for key, value in state.items()}, tmp_path), "reid", backbone="resnet18")


def test_the_number_of_parts_of_torchreids_pcb(tmp_path):
    """One reduction for all of its parts, and a classifier for each."""
    source = pcb(5, resnet18(0, last_stride=1), parts=3, feature_dim=8, neck="none").eval()
    state = {}
    for key, value in source.state_dict().items():
        key = (
            key.replace("trunk.", "")
            .replace("branches.part.deep.", "")
            .replace("heads.part_1.reduction", "conv5.layers")
        )
        place = key.removeprefix("heads.part_")[0]
        if ".classifier." in key:
            key = f"classifier.{int(place) - 1}.{key.rpartition('.')[2]}"
        if not key.startswith("heads."):
            state[key] = value
    made = load_state(saved(state, tmp_path), "reid", backbone="resnet18", model="pcb")
    assert made["network"]["parts"] == 3
    network, _ = reid.network_from_checkpoint("w.pth", "cpu", state=made)
    images = torch.randn(1, 3, 64, 32)
    torch.testing.assert_close(network(images).embedding, source(images).embedding)


@pytest.mark.parametrize("name", ["heads.bottleneck.1.bias", "fc.0.weight", "backbone.NL_2.0.g.weight", "pixel_mean"])
def test_what_would_change_embeddings_and_has_no_place(name, tmp_path):
    """fast-reid's embedding layer, torchreid's fc512, non-local blocks; not the numbers of a normalisation."""
    state = {f"backbone.{key}": value for key, value in resnet18(10).state_dict().items()}
    path = saved({**state, name: torch.zeros(8)}, tmp_path)
    if name == "pixel_mean":
        assert load_state(path, "reid", backbone="resnet18")
        return
    with pytest.raises(InputError, match=f"also has {name} .*no place"):
        load_state(path, "reid", backbone="resnet18")


def test_a_neck_of_another_size(tmp_path):
    neck = {f"bottleneck.{key}": value for key, value in BatchNorm1d(8).state_dict().items()}
    state = resnet18(0).state_dict() | neck
    with pytest.raises(InputError, match="has no neck.bias of that size"):
        load_state(saved(state, tmp_path), "reid", backbone="resnet18")


@torch.no_grad()
def test_reid_strong_baseline_golden(golden, golden_keys, fill_weights, tmp_path):
    """Its ResNet has no ReLU behind the first BatchNorm; a file under its names is read so."""
    arrays, keys = golden("model_strong_baseline"), golden_keys("model_strong_baseline")["resnet50_bnneck"]["keys"]
    state = {key: fill_weights.fill_value(key, torch.zeros(shape)) for key, shape in keys.items()}
    path = saved({key: value for key, value in state.items() if value is not None}, tmp_path)
    network, _ = reid.network_from_checkpoint(path, "cpu", state=load_state(path, "reid", backbone="resnet50"))
    images = fill_weights.make_input("strong_baseline", arrays["input_shape"])
    for embed in ("after", "before"):
        network.embed = embed
        expected = torch.as_tensor(arrays[f"resnet50_bnneck/eval_{embed}"])
        atol = 1e-4 * expected.abs().max().item()
        torch.testing.assert_close(network(images).embedding, expected, rtol=1e-4, atol=atol)
