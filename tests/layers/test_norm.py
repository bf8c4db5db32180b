import pytest
import torch

from core.layers.norm import IBN


def test_golden(golden, fill_weights):
    expected = torch.from_numpy(golden("model_resnet50_ibn_a")["ibn/out"])
    layer = IBN(64)
    for name, tensor in layer.state_dict().items():
        value = fill_weights.fill_value(f"layer1.0.bn1.{name}", tensor)
        if value is not None:
            tensor.copy_(value)
    out = layer.eval()(fill_weights.make_input("ibn_block", (2, 64, 6, 5)))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_worked_by_hand():
    """Two channels, two pictures of two positions. Channel 0, by picture: (1, 3) and (5, 5) -> (-1, 1) and (0, 0).
    Channel 1, over the batch: 0, 0, 4, 4 has mean 2 and deviation 2 -> -1, -1, 1, 1; picture by picture it'd be 0."""
    x = torch.tensor([[[[1.0, 3.0]], [[0.0, 0.0]]], [[[5.0, 5.0]], [[4.0, 4.0]]]])
    expected = torch.tensor([[[[-1.0, 1.0]], [[-1.0, -1.0]]], [[[0.0, 0.0]], [[1.0, 1.0]]]])
    torch.testing.assert_close(IBN(2)(x), expected, atol=1e-4, rtol=0)


def test_evaluation_uses_running_statistics_in_the_batch_half_alone():
    torch.manual_seed(0)
    layer = IBN(4).eval()
    x = 3 * torch.randn(2, 4, 5, 5) + 7
    out = layer(x)
    assert out[:, :2].mean().abs() < 1e-5, "instance half: each picture's own mean is taken off"
    torch.testing.assert_close(out[:, 2:], x[:, 2:] / (1 + 1e-5) ** 0.5)
    assert not any("running" in name for name in layer.IN.state_dict())


def test_odd_number_of_channels_gives_the_larger_part_to_the_batch():
    layer = IBN(5)
    assert (layer.IN.num_features, layer.BN.num_features) == (2, 3)
    assert layer(torch.randn(2, 5, 3, 3)).shape == (2, 5, 3, 3)


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(training):
    assert IBN(6).train(training)(torch.zeros(0, 6, 4, 3)).shape == (0, 6, 4, 3)


@pytest.mark.parametrize("training", [True, False])
def test_gradient(training):
    torch.manual_seed(0)
    layer = IBN(4).double().train(training)
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
