import pytest
import torch
import torch.nn.functional as F

from core.layers.pooling import GeM, build_pooling


@pytest.fixture
def arrays(golden):
    return {
        name.removeprefix("gem/"): torch.from_numpy(array)
        for name, array in golden("model_openunreid").items()
        if name.startswith("gem/")
    }


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_gem_golden_with_gradients(arrays):
    layer, x = GeM(), arrays["input"].requires_grad_()
    out = layer(x)
    close(out, arrays["out_p3"].flatten(1))
    (out * arrays["loss_weight"].flatten(1)).sum().backward()
    close(x.grad, arrays["grad_input"])
    close(layer.p.grad, arrays["grad_p"])
    close(GeM(p=4.6)(x), arrays["out_p4.6"].flatten(1))


def test_gem_key_is_that_of_the_original(golden_keys):
    assert golden_keys("model_openunreid")["resnet50_gem"]["keys"]["global_pooling.p"] == [1]
    assert {key: list(value.shape) for key, value in GeM().state_dict().items()} == {"p": [1]}


def test_worked_by_hand():
    x = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]], [[-4.0, 0.0], [0.0, 0.0]]]])  # (1, 2, 2, 2)
    torch.testing.assert_close(build_pooling("avg")(x), torch.tensor([[3.0, -1.0]]))
    torch.testing.assert_close(build_pooling("max")(x), torch.tensor([[6.0, 0.0]]))
    # ((1 + 8 + 27 + 216) / 4)^(1/3) = 63^(1/3); a channel without a positive value gives eps.
    torch.testing.assert_close(build_pooling("gem")(x), torch.tensor([[63 ** (1 / 3), 1e-6]]))


@pytest.mark.parametrize("name, expected", [("avg", 5.25), ("max", 6.0), ("gem", (675 / 4) ** (1 / 3))])
def test_positions_that_count_more(name, expected):
    """Of 1, 2, 3 and 6 only 3 and 6 count, 6 three times as much: (3 + 18) / 4, and (27 + 648) / 4 with cubes."""
    x = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]])
    weights = torch.tensor([[[[0.0, 0.0], [1 / 3, 1.0]]]])
    torch.testing.assert_close(build_pooling(name)(x, weights), torch.tensor([[expected]]))


@pytest.mark.parametrize("name", ["avg", "max", "gem"])
def test_equal_weights_change_nothing(name):
    torch.manual_seed(0)
    x, pooling = torch.rand(2, 3, 4, 4), build_pooling(name)
    torch.testing.assert_close(pooling(x, torch.ones(2, 1, 4, 4)), pooling(x))
    heights = torch.tensor([0.2, 0.7])[:, None, None, None]  # of each picture its own
    torch.testing.assert_close(pooling(x, heights.expand(2, 1, 4, 4)), pooling(x))


@pytest.mark.parametrize("name", ["avg", "max", "gem"])
def test_gradient_with_weights(name):
    torch.manual_seed(0)
    pooling = build_pooling(name).double()
    x = torch.rand(1, 2, 2, 3, dtype=torch.float64).add_(0.1).requires_grad_()
    weights = torch.rand(1, 1, 2, 3, dtype=torch.float64).add_(0.1)
    assert torch.autograd.gradcheck(lambda x: pooling(x, weights), (x,))


def test_gem_lies_between_average_and_maximum():
    torch.manual_seed(0)
    x = torch.rand(3, 5, 4, 4) + 0.1
    torch.testing.assert_close(GeM(p=1.0)(x), x.mean(dim=(2, 3)))
    torch.testing.assert_close(GeM(p=300.0)(x), x.amax(dim=(2, 3)), rtol=0.02, atol=0)


@pytest.mark.parametrize("p", [3.0, 8.0, 20.0])
def test_gem_of_dead_and_of_huge_channels_stays_finite(p):
    """The plain formula gives 0 * inf for a channel of zeros from p = 7.5 on, and inf for large values."""
    x = torch.zeros(1, 2, 3, 3)
    x[:, 1] = 1e6
    x.requires_grad_()
    layer = GeM(p=p)
    out = layer(x)
    torch.testing.assert_close(out, torch.tensor([[1e-6, 1e6]]))
    out.sum().backward()
    assert x.grad.isfinite().all() and layer.p.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gem_computes_in_float32_under_autocast(dtype):
    torch.manual_seed(0)
    x = (50 * torch.rand(2, 3, 8, 4)).to(dtype)  # 50^3 is beyond float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = GeM()(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, GeM()(x.float()))


@pytest.mark.parametrize("name", ["avg", "max", "gem"])
def test_empty_batch(name):
    assert build_pooling(name)(torch.zeros(0, 7, 4, 3)).shape == (0, 7)


@pytest.mark.parametrize("name", ["avg", "max", "gem"])
def test_gradient(name):
    torch.manual_seed(0)
    layer = build_pooling(name).double()
    x = (torch.rand(2, 3, 3, 2, dtype=torch.float64) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *parameters: layer(x), (x, *layer.parameters()))
    assert torch.autograd.gradgradcheck(lambda x, *parameters: layer(x), (x, *layer.parameters()))


@pytest.mark.parametrize("name, reference", [("avg", F.adaptive_avg_pool2d), ("max", F.adaptive_max_pool2d)])
def test_against_torch_with_channels_last(name, reference):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 5, 3).to(memory_format=torch.channels_last)
    torch.testing.assert_close(build_pooling(name)(x), reference(x, 1).flatten(1))


def test_unknown_pooling_is_named():
    with pytest.raises(ValueError, match="'median'; known: avg, max, gem"):
        build_pooling("median")
