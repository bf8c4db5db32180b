"""Generator, discriminator and siamese network: golden outputs and keys, sizes that they take, gradients."""

import pytest
import torch

from core.models.gan import PatchDiscriminator, ResNetGenerator, SiameseMetricNet, _ReflectionPad, nearest_size

NETWORKS = {
    "resnet_9blocks": (ResNetGenerator, "generator", (1, 3, 32, 32)),
    "resnet_6blocks": (lambda: ResNetGenerator(blocks=6), "generator", (1, 3, 32, 32)),
    "patchgan_3layers": (PatchDiscriminator, "discriminator", (1, 3, 64, 32)),
    "metricnet": (SiameseMetricNet, "metricnet", (2, 3, 256, 128)),
}


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_golden(name, golden, golden_keys, fill_weights):
    build, images, shape = NETWORKS[name]
    network, expected = build(), torch.from_numpy(golden("model_gan")[f"{name}/out"])
    entry = golden_keys("model_gan")[name]
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == entry["keys"]
    assert sum(parameter.numel() for parameter in network.parameters()) == entry["parameter_count"]
    fill_weights.fill_state_dict(network).eval()
    output = network(fill_weights.make_input(images, shape))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_weights_start_small_and_biases_from_zero():
    torch.manual_seed(0)
    for network in (ResNetGenerator(32, 1), PatchDiscriminator(32), SiameseMetricNet(32)):
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                assert not parameter.any()
            else:
                assert parameter.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("layers, patch", [(1, 16), (2, 34), (3, 70)])
def test_a_patch_is_all_that_one_answer_depends_on(layers, patch):
    """Without the norms, which see the whole picture, the gradient of one answer covers the patch."""
    network = PatchDiscriminator(1, layers)
    for module in network.modules():
        if isinstance(module, torch.nn.InstanceNorm2d):
            module.forward = lambda x: x
        elif isinstance(module, torch.nn.Conv2d):
            torch.nn.init.ones_(module.weight)
    images = torch.ones(1, 3, 128, 128, requires_grad=True)
    answers = network(images)  # (1, 1, h, w)
    assert answers.shape[-2:] == (128 // 2**layers - 2,) * 2
    answers[0, 0, answers.shape[2] // 2, answers.shape[3] // 2].backward()
    rows, columns = images.grad[0, 0].nonzero().T
    assert (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == (patch, patch)


@pytest.mark.parametrize(
    "size, discriminator_layers, siamese_layers, nearest",
    [(256, 3, 3, 256), (30, 1, 2, 32), (29, 1, 0, 28), (4, 1, 0, 8), (20, 3, 0, 24), (32, 3, 3, 64), (66, 3, 3, 68)],
)
def test_sizes(size, discriminator_layers, siamese_layers, nearest):
    assert nearest_size(size, discriminator_layers, siamese_layers) == nearest
    images = torch.rand(2, 3, nearest, nearest, generator=torch.Generator().manual_seed(0)) * 2 - 1
    output = ResNetGenerator(2, 1)(images)
    assert output.shape == images.shape and output.abs().max() <= 1
    assert PatchDiscriminator(2, discriminator_layers)(output).numel()
    if siamese_layers:
        rows = SiameseMetricNet(4, siamese_layers, nearest, nearest).eval()(output)
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(2))


def test_every_weight_has_a_gradient():
    torch.manual_seed(0)
    generator, judges = ResNetGenerator(4, 2), [PatchDiscriminator(4, 2), SiameseMetricNet(4, 2, 16, 32)]
    images = generator(torch.randn(2, 3, 16, 32))
    sum(judge(images).square().mul(torch.rand(judge(images).shape)).sum() for judge in judges).backward()
    for network in (generator, *judges):
        assert all(parameter.grad.any() for parameter in network.parameters())


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("pad, size", [(1, (2, 3)), (3, (4, 6))])
def test_padding_with_a_gradient_in_a_fixed_order(deterministic, pad, size):
    images = torch.rand(2, 3, *size, requires_grad=True)
    weights = torch.rand(2, 3, size[0] + 2 * pad, size[1] + 2 * pad)
    outputs = [module(images) for module in (_ReflectionPad(pad), torch.nn.ReflectionPad2d(pad))]
    gradients = [torch.autograd.grad((output * weights).sum(), images)[0] for output in outputs]
    assert torch.equal(*outputs)
    torch.testing.assert_close(*gradients)
