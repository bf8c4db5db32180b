import torch
from torchvision.ops import FeaturePyramidNetwork as TorchvisionFPN
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from core.layers.fpn import FeaturePyramidNetwork


def stages(*sizes, channels=(4, 6, 8)):
    return [torch.randn(2, c, *size) for c, size in zip(channels, sizes, strict=True)]


def test_equals_torchvisions_also_for_odd_sizes():
    torch.manual_seed(0)
    ours, theirs = FeaturePyramidNetwork((4, 6, 8), 5), TorchvisionFPN([4, 6, 8], 5, LastLevelMaxPool())
    theirs.load_state_dict(ours.state_dict())
    for sizes in (((8, 12), (4, 6), (2, 3)), ((9, 13), (5, 7), (3, 4)), ((1, 5), (1, 3), (1, 2))):
        maps = stages(*sizes)
        expected = theirs({str(i): stage for i, stage in enumerate(maps)})
        pyramid = ours(maps)
        assert list(pyramid) == ["0", "1", "2", "pool"] == list(expected)
        for name in pyramid:
            torch.testing.assert_close(pyramid[name], expected[name])


def test_initialised_as_torchvisions():
    torch.manual_seed(0)
    ours = FeaturePyramidNetwork((64, 128), 256)
    for name, parameter in ours.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all()
        else:  # kaiming_uniform with a = 1: variance 1 / fan_in
            fan_in = parameter[0].numel()
            torch.testing.assert_close(parameter.std() * fan_in**0.5, torch.tensor(1.0), rtol=0.02, atol=0)


def test_worked_by_hand():
    """One channel, weights 1 in the middle, biases 0: every map is the sum of its stage and the upsampled ones."""
    fpn = FeaturePyramidNetwork((1, 1), 1)
    for parameter in fpn.parameters():
        torch.nn.init.zeros_(parameter)
    for i in range(2):
        fpn.inner_blocks[i][0].weight.data.fill_(1)
        fpn.layer_blocks[i][0].weight.data[..., 1, 1] = 1
    fine, coarse = torch.arange(8.0).view(1, 1, 2, 4), torch.tensor([[[[10.0, 20.0]]]])
    pyramid = fpn([fine, coarse])
    assert pyramid["0"].tolist() == [[[[10, 11, 22, 23], [14, 15, 26, 27]]]]
    assert pyramid["1"].tolist() == [[[[10, 20]]]] and pyramid["pool"].tolist() == [[[[10]]]]


def test_empty_batch_and_gradient():
    fpn = FeaturePyramidNetwork((2, 3), 2).double()
    empty = fpn([torch.zeros(0, 2, 4, 4).double(), torch.zeros(0, 3, 2, 2).double()])
    assert {name: tuple(level.shape) for name, level in empty.items()} == {
        "0": (0, 2, 4, 4),
        "1": (0, 2, 2, 2),
        "pool": (0, 2, 1, 1),
    }
    maps = [torch.randn(1, c, n, n, dtype=torch.float64, requires_grad=True) for c, n in ((2, 3), (3, 2))]
    assert torch.autograd.gradcheck(lambda *maps: tuple(fpn(maps).values()), maps)
