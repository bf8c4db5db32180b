import pytest
import torch
import torchvision

from core.layers.norm import IBN
from core.models.resnet import RESNETS, BasicBlock, ResNet, resnet18, resnet50, resnet50_ibn_a


def close(actual, expected):
    expected = torch.as_tensor(expected)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def check_keys(model, entry):
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == entry["keys"]
    assert sum(parameter.numel() for parameter in model.parameters()) == entry["parameter_count"]


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101"])
@torch.no_grad()
def test_golden(name, golden, golden_keys, fill_weights):
    arrays = golden("model_torchvision_resnet")
    model = RESNETS[name]()
    check_keys(model, golden_keys("model_torchvision_resnet")[name])
    fill_weights.fill_state_dict(model).eval()
    images = fill_weights.make_input("torchvision_resnet", arrays["input_shape"])
    close(images.flatten()[:8], arrays["input_head"])

    stem = model.maxpool(model.relu(model.bn1(model.conv1(images))))
    close(stem.mean(dim=(2, 3)), arrays[f"{name}/stem_mean"])
    stages = model.forward_stages(images)
    for number, (stage, channels) in enumerate(zip(stages, model.stage_channels, strict=True), start=1):
        assert stage.shape[1] == channels
        close(stage.mean(dim=(2, 3)), arrays[f"{name}/layer{number}_mean"])
        close(stage[:, :8, 0, 0], arrays[f"{name}/layer{number}_corner"])
    close(model(images), arrays[f"{name}/fc"])


@torch.no_grad()
def test_ibn_a_golden(golden, golden_keys, fill_weights):
    arrays, keys = golden("model_resnet50_ibn_a"), golden_keys("model_resnet50_ibn_a")
    check_keys(resnet50_ibn_a(), keys["resnet50_ibn_a_with_fc"])
    model = resnet50_ibn_a(num_classes=0, last_stride=1)
    check_keys(model, keys["resnet50_ibn_a_openunreid"])
    fill_weights.fill_state_dict(model).eval()
    for key in ("conv1.weight", "layer4.2.conv3.weight"):
        close(model.state_dict()[key].flatten()[:4], arrays[f"weight_check/{key}"])
    images = fill_weights.make_input("resnet50_ibn_a", arrays["input_shape"])
    stages = model.forward_stages(images)
    for number, stage in enumerate(stages, start=1):
        close(stage.mean(dim=(2, 3)), arrays[f"layer{number}_mean"])
    close(stages[3][:, :16, 0, 0], arrays["layer4_corner"])

    # The same weights with last stride 2: torchreid's variant, and what num_classes=0 returns.
    plain = resnet50_ibn_a(num_classes=0)
    plain.load_state_dict(model.state_dict())
    features = plain.eval()(images)
    close(features, arrays["last_stride_2/layer4_mean"])
    close(features, arrays["torchreid/feature"])


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_training_is_that_of_torchvision(name):
    """The same weights from the same seed, and with them the same scores, statistics and gradients."""
    torch.manual_seed(0)
    ours = RESNETS[name](num_classes=10, zero_init_residual=True)
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(num_classes=10, zero_init_residual=True)
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())

    images = torch.randn(2, 3, 64, 32)
    for model in (ours, theirs):
        model(images).square().sum().backward()
    for (key, mine), (other, reference) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert key == other
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-4, atol=1e-5)
    for key, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(key), buffer)


def test_resnet152_has_the_keys_of_torchvision():
    with torch.device("meta"):
        ours, theirs = RESNETS["resnet152"](), torchvision.models.resnet152()
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == shapes


def test_ibn_sits_in_the_first_three_stages_of_resnet101_ibn_a():
    with torch.device("meta"):
        model = RESNETS["resnet101_ibn_a"]()
    places = [name for name, module in model.named_modules() if isinstance(module, IBN)]
    blocks = [f"layer{stage}.{block}.bn1" for stage, depth in ((1, 3), (2, 4), (3, 23)) for block in range(depth)]
    assert places == blocks


@torch.no_grad()
def test_last_stride():
    images = torch.zeros(1, 3, 70, 35)
    for last_stride, size in ((2, (3, 2)), (1, (5, 3))):
        model = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=0, last_stride=last_stride).eval()
        sizes = [stage.shape[2:] for stage in model.forward_stages(images)]
        assert sizes == [(18, 9), (9, 5), (5, 3), size]
    with pytest.raises(ValueError, match="last_stride is 1 or 2, not 3"):
        resnet18(last_stride=3)


@torch.no_grad()
def test_empty_batch():
    model = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=7, ibn=True).eval()
    assert model(torch.zeros(0, 3, 64, 32)).shape == (0, 7)


@torch.no_grad()
def test_channels_last_gives_the_same_and_stays_channels_last():
    torch.manual_seed(0)
    model, images = resnet50(num_classes=0).eval(), torch.randn(2, 3, 64, 32)
    expected = model.forward_stages(images)
    model.to(memory_format=torch.channels_last)
    for stage, reference in zip(
        model.forward_stages(images.to(memory_format=torch.channels_last)), expected, strict=True
    ):
        assert stage.is_contiguous(memory_format=torch.channels_last)
        close(stage, reference)
