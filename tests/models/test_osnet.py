import pytest
import torch
from torch import nn

from core.models.osnet import OSNETS, ChannelGate, OSBlock, osnet_x0_25
from tests.models.test_resnet import check_keys, close

GOLDEN = ["osnet_x1_0", "osnet_x0_5", "osnet_x0_25", "osnet_ibn_x1_0", "osnet_ain_x1_0"]


@pytest.mark.parametrize("name", GOLDEN)
@torch.no_grad()
def test_golden(name, golden, golden_keys, fill_weights):
    arrays = golden("model_osnet")
    model = OSNETS[name](751)
    check_keys(model, golden_keys("model_osnet")[name])
    fill_weights.fill_state_dict(model).eval()
    images = fill_weights.make_input("osnet", arrays["input_shape"])
    close(images.flatten()[:8], arrays["input_head"])

    close(model.conv1(images).mean(dim=(2, 3)), arrays[f"{name}/conv1_mean"])
    stages = model.forward_stages(images)
    seen = ("pool2" if "ain" in name else "conv2", "pool3" if "ain" in name else "conv3", "conv4", "conv5")
    for stage, channels, layer in zip(stages, model.stage_channels, seen, strict=True):
        assert stage.shape[1] == channels
        close(stage.mean(dim=(2, 3)), arrays[f"{name}/{layer}_mean"])
    feature = model(images)
    close(feature, arrays[f"{name}/feature"])
    close(model.classifier(feature), arrays[f"{name}/logits"])


@torch.no_grad()
def test_blocks_golden(golden, golden_keys, fill_weights):
    arrays, keys = golden("model_osnet"), golden_keys("model_osnet")
    block, gate = OSBlock(32, 64), ChannelGate(32)
    check_keys(block, keys["OSBlock_32_64"])
    check_keys(gate, keys["ChannelGate_32"])
    fill_weights.fill_state_dict(block).eval()
    fill_weights.fill_state_dict(gate).eval()
    close(block(fill_weights.make_input("osblock", (2, 32, 7, 5))), arrays["OSBlock_32_64/out"])
    close(gate(fill_weights.make_input("gate", (2, 32, 4, 3))), arrays["ChannelGate_32/out"])


def test_training_returns_scores_and_every_weight_learns():
    model = osnet_x0_25(7)
    scores = model(torch.randn(4, 3, 64, 32))
    assert scores.shape == (4, 7)
    scores.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_without_classes_the_feature_is_returned():
    model = osnet_x0_25(0, feature_dim=48)
    assert model.classifier is None
    assert model(torch.randn(2, 3, 64, 32)).shape == (2, 48)
    assert model.eval()(torch.zeros(0, 3, 64, 32)).shape == (0, 48)


def test_the_gate_by_hand():
    """Zero weights but for the last bias: every channel is scaled by its sigmoid."""
    gate = ChannelGate(16)
    for parameter in gate.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        gate.fc2.bias.copy_(torch.tensor([0.0, float("inf")] * 8))
    assert torch.equal(gate(torch.ones(1, 16, 2, 2))[0, :2, 0, 0], torch.tensor([0.5, 1.0]))
