import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d as TorchvisionFrozen

from core.layers.norm import (
    IBN,
    DomainSpecificBatchNorm,
    FrozenBatchNorm2d,
    GroupedBatchNorm,
    freeze_batch_norm,
    group_batch_norm,
    to_domain_specific,
    use_domain,
)


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


def random_batch_norm(channels=5):
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(channels)
    for tensor in (layer.weight.data, layer.bias.data, layer.running_mean):
        tensor.normal_()
    layer.running_var.uniform_(0.1, 3)
    return layer


def test_frozen_equals_torchvisions_and_batch_norm_in_evaluation():
    layer = random_batch_norm()
    frozen, reference = FrozenBatchNorm2d(5), TorchvisionFrozen(5)
    frozen.load_state_dict(layer.state_dict())
    reference.load_state_dict(layer.state_dict())
    assert list(frozen.state_dict()) == list(reference.state_dict())
    x = torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(frozen.train()(x), reference(x))
    torch.testing.assert_close(frozen(x), layer.eval()(x))
    assert frozen(x[:0]).shape == (0, 5, 3, 4) and not list(frozen.parameters())


def test_frozen_worked_by_hand():
    layer = FrozenBatchNorm2d(1, eps=1.0)
    values = {"weight": 3.0, "bias": 10.0, "running_mean": 2.0, "running_var": 8.0}
    layer.load_state_dict({name: torch.tensor([value]) for name, value in values.items()})
    assert layer(torch.tensor([[[[2.0, 8.0]]]])).tolist() == [[[[10.0, 16.0]]]]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_frozen_keeps_the_layout_and_the_type(layout):
    layer = FrozenBatchNorm2d(4)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        out = layer(torch.randn(2, 4, 3, 5).to(dtype).contiguous(memory_format=layout))
        assert out.dtype == dtype and out.is_contiguous(memory_format=layout)


def test_frozen_beyond_the_range_of_half_precision():
    """The published COCO weights have channels that are always 0, with such a variance and weight: a scale of 1e14."""
    layer = FrozenBatchNorm2d(3, eps=0.0)
    layer.running_var.copy_(torch.tensor([5.6e-45, 5.6e-45, 1.0]))
    layer.weight.copy_(torch.tensor([1e-8, -1e-8, 2.0]))
    layer.bias.copy_(torch.tensor([0.5, 1e6, 3.0]))
    x = torch.zeros(1, 3, 1, 1)
    assert layer(x).flatten().tolist() == [0.5, 1e6, 3.0]
    out = layer(x.half())
    assert out.dtype == torch.float16 and out.flatten().tolist() == [0.5, 65504, 3.0]
    layer.running_mean.fill_(1e-4)  # bias - mean * scale beyond it too
    assert layer(x.half()).flatten().tolist() == [-65504, 65504, pytest.approx(3.0, abs=1e-2)]


def test_frozen_gradient():
    layer = FrozenBatchNorm2d(3).double()
    layer.load_state_dict(random_batch_norm(3).state_dict())
    assert torch.autograd.gradcheck(layer, (torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True),))


def test_freezing_a_network_keeps_its_outputs_and_its_files():
    network = nn.Sequential(nn.Conv2d(3, 5, 1), random_batch_norm(), nn.Sequential(IBN(5)))
    state = {key: value.clone() for key, value in network.state_dict().items()}
    x = torch.randn(2, 3, 4, 4)
    expected = network.eval()(x)
    frozen = freeze_batch_norm(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in frozen.modules())
    torch.testing.assert_close(frozen.train()(x), expected)
    torch.testing.assert_close(frozen.train()(x), frozen.eval()(x))
    frozen.load_state_dict(state)  # strict, though the file has counters of batches
    assert isinstance(freeze_batch_norm(nn.BatchNorm2d(2)), FrozenBatchNorm2d)


def small_network(fill_weights=None):
    """The network of the golden file: its BatchNorms are parts 1 and 5."""
    torch.manual_seed(0)
    parts = [
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ]
    network = nn.Sequential(*parts, nn.BatchNorm1d(4))
    return fill_weights.fill_state_dict(network) if fill_weights else network


def test_domain_specific_golden(golden, golden_keys, fill_weights):
    arrays = {key.removeprefix("dsbn/"): torch.from_numpy(value) for key, value in golden("model_openunreid").items()}

    def check(found, name):
        torch.testing.assert_close(found, arrays[name], rtol=1e-4, atol=1e-4 * arrays[name].abs().max().item())

    network, images = small_network(fill_weights), arrays["input"]
    check(network.eval()(images), "plain_eval_out")
    network = to_domain_specific(network, 2)
    assert sorted(network.state_dict()) == sorted(golden_keys("model_openunreid")["dsbn_after_2_domains"]["keys"])
    check(network.eval()(images), "eval_out_before_training")
    check(network.train()(images), "train_out")
    for name, norm in (("bn2d", network[1]), ("bn1d", network[5])):
        for domain in (0, 1):
            check(norm.dsbn[domain].running_mean, f"{name}_domain{domain}_running_mean")
    check(network[1].dsbn[0].running_var, "bn2d_domain0_running_var")
    check(network[1].dsbn[1].running_var, "bn2d_domain1_running_var")
    check(network.eval()(images), "eval_out_target_minus1")
    use_domain(network, 0)
    check(network(images), "eval_out_target_0")


def test_domains_share_nothing():
    layer = to_domain_specific(random_batch_norm(), 3).train()
    assert isinstance(layer, DomainSpecificBatchNorm)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    x = torch.randn(6, 5, 3, 2)
    x[2:4] += 7
    out = layer(x)
    torch.testing.assert_close(out[2:4], random_batch_norm()(x[2:4]))
    (gradient,) = torch.autograd.grad(out[2:4].sum(), layer.dsbn[1].bias)
    assert (gradient == 12).all()
    moved = {key for key, value in layer.state_dict().items() if not torch.equal(value, before[key])}
    assert len(moved) == 3 * 3 and layer.dsbn[1].running_mean.mean() > layer.dsbn[0].running_mean.mean() + 0.5
    with pytest.raises(ValueError, match="equal parts"):
        layer(x[:4])


def test_groups_are_what_processes_are():
    """Output, gradient and statistics of one batch in 3 groups: those of 3 processes, statistics averaged."""
    network = group_batch_norm(small_network(), 4)
    assert list(network.state_dict()) == list(small_network().state_dict())
    processes = [small_network() for _ in range(3)]
    x = torch.randn(12, 3, 6, 5)
    out = network(x)
    shares = [process(share) for process, share in zip(processes, x.split(4), strict=True)]
    torch.testing.assert_close(out, torch.cat(shares))
    out.square().mean().backward()
    for share in shares:
        share.square().mean().backward()
    for (name, parameter), *others in zip(*(one.named_parameters() for one in (network, *processes)), strict=True):
        mean = torch.stack([other.grad for _, other in others]).mean(0)
        torch.testing.assert_close(parameter.grad, mean, msg=lambda text, name=name: f"{name}: {text}")
    for name, buffer in network.named_buffers():
        mean = torch.stack([process.get_buffer(name).double() for process in processes]).mean(0)
        torch.testing.assert_close(buffer.double(), mean, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="groups of 4"):
        network(x[:6])


def test_a_group_of_the_whole_batch_is_a_plain_batch_norm():
    x = torch.randn(4, 3, 6, 5)
    one, two = small_network(), group_batch_norm(small_network(), 4)
    assert torch.equal(one(x), two(x))
    assert all(torch.equal(value, two.state_dict()[key]) for key, value in one.state_dict().items())
    assert torch.equal(one.eval()(x[:3]), two.eval()(x[:3]))


def test_groups_within_domains_and_what_is_not_trained():
    network = small_network()
    network[5].bias.requires_grad_(False)
    network = to_domain_specific(group_batch_norm(network, 2), 2)
    assert all(isinstance(norm, GroupedBatchNorm) for norm in (*network[1].dsbn, *network[5].dsbn))
    assert [norm.bias.requires_grad for norm in network[5].dsbn] == [False, False]
    x = torch.randn(8, 3, 6, 5)
    torch.testing.assert_close(network(x)[4:6], small_network()(x[4:6]))
