import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from core.layers.mask_decoder import MASK_DECODERS, LightMaskDecoder, MaskDecoder, convolve_doubled

both = pytest.mark.parametrize("decoder_class", MASK_DECODERS.values())


def test_golden(golden, golden_keys, fill_weights):
    arrays, keys = golden("model_openunreid"), golden_keys("model_openunreid")["MaskDecoder_32"]["keys"]
    decoder = MaskDecoder(32, mask_size=(20, 12))
    assert {key: list(value.shape) for key, value in decoder.state_dict().items()} == keys
    fill_weights.fill_state_dict(decoder).eval()
    expected = torch.from_numpy(arrays["MaskDecoder_32/out"])
    out = decoder(fill_weights.make_input("mask_decoder", (1, 32, 3, 2)))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_worked_by_hand():
    """Every convolution passes one channel on through its centre, so ReLU(x) is all that happens to it."""
    decoder = MaskDecoder(1, mask_size=(16, 8)).eval()
    with torch.no_grad():
        for convolution in (decoder.conv1, decoder.conv2, decoder.conv3, decoder.conv4):
            convolution.weight.zero_()
            convolution.weight[0, 0, 1, 1] = 1.0
        decoder.mask_pred.weight.zero_()
        decoder.mask_pred.weight[0, 0] = 2.0
        decoder.mask_pred.bias.fill_(-3.0)
        mask = decoder(torch.tensor([[[[1.5], [-8.0]]]]))  # (1, 1, 2, 1)
    assert mask.shape == (1, 1, 16, 8)
    top, bottom = torch.sigmoid(torch.tensor(2 * 1.5 - 3)), torch.sigmoid(torch.tensor(-3.0))
    # The corners lie outside both feature positions' centres: no mixing. BatchNorm divides by sqrt(1 + 1e-5).
    torch.testing.assert_close(mask[0, 0, 0], top.expand(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(mask[0, 0, -1], bottom.expand(8), atol=1e-4, rtol=0)
    assert (mask[0, 0, :, 0].diff() <= 0).all()


def test_light_worked_by_hand():
    """Its 1x1 convolution passes on the channel, the 3x3 one too through its centre."""
    decoder = LightMaskDecoder(1, mask_size=(8, 4)).eval()
    with torch.no_grad():
        for convolution in (decoder.conv1, decoder.conv2):
            convolution.weight.zero_()
            middle = convolution.weight.shape[-1] // 2
            convolution.weight[0, 0, middle, middle] = 1.0
        decoder.mask_pred.weight.zero_()
        decoder.mask_pred.weight[0, 0] = 2.0
        decoder.mask_pred.bias.fill_(-3.0)
        mask = decoder(torch.tensor([[[[1.5], [-8.0]]]]))  # (1, 1, 2, 1)
    assert mask.shape == (1, 1, 8, 4)
    torch.testing.assert_close(mask[0, 0, 0], torch.sigmoid(torch.tensor(0.0)).expand(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(mask[0, 0, -1], torch.sigmoid(torch.tensor(-3.0)).expand(4), atol=1e-4, rtol=0)


def test_multiply_adds():
    """At 256 x 128 pixels, where stage 3 is 16 x 8: enlarging first, as the original does, would take 2.4 billion."""
    work = {}
    for name, decoder_class in MASK_DECODERS.items():
        with FlopCounterMode(display=False) as counter:
            decoder_class(1024).eval()(torch.zeros(1, 1024, 16, 8))
        work[name] = counter.get_total_flops() / 2
    assert work["full"] == pytest.approx(1.29e9, rel=0.01)
    assert work["light"] < work["full"] / 40


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (4, 2), (5, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_convolving_what_is_doubled_without_doubling_it(size, bias):
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(3, 4, 3, padding=1, bias=bias).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    plain = convolution(F.interpolate(x, scale_factor=2, mode="bilinear"))
    out = convolve_doubled(x, convolution)
    torch.testing.assert_close(out, plain)
    weight = torch.randn_like(plain)
    inputs = [x, *convolution.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad((out * weight).sum(), inputs),
        torch.autograd.grad((plain * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_convolving_what_is_doubled_under_autocast():
    convolution, x = torch.nn.Conv2d(8, 4, 3, padding=1), torch.randn(2, 8, 6, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = convolve_doubled(x, convolution)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), convolve_doubled(x, convolution), rtol=0.02, atol=0.02)


@both
def test_training_starts_with_a_mask_of_one_half_that_has_a_gradient(decoder_class):
    torch.manual_seed(0)
    decoder = decoder_class(16, mask_size=(24, 24))
    mask = decoder(torch.randn(2, 16, 3, 3))
    assert (mask - 0.5).abs().max() < 0.2
    mask.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in decoder.parameters())
    assert decoder.conv1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("in_channels, mask_size", [(256, (32, 16)), (8, (5, 7))])
def test_any_channels_and_any_mask_size(in_channels, mask_size):
    mask = MaskDecoder(in_channels, mask_size).eval()(torch.randn(2, in_channels, 4, 2))
    assert mask.shape == (2, 1, *mask_size)
    assert mask.min() >= 0 and mask.max() <= 1


@both
def test_sigmoid_and_resize_compute_in_float32_under_autocast(decoder_class, monkeypatch):
    dtypes = []
    interpolate = F.interpolate
    monkeypatch.setattr(F, "interpolate", lambda x, **options: dtypes.append(x.dtype) or interpolate(x, **options))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mask = decoder_class(8, (16, 16)).eval()(torch.randn(1, 8, 2, 2))
    assert mask.dtype == torch.float32
    assert dtypes[-1] == torch.float32


@both
def test_empty_batch(decoder_class):
    assert decoder_class(8, (16, 16)).eval()(torch.zeros(0, 8, 2, 2)).shape == (0, 1, 16, 16)


@both
def test_gradient(decoder_class):
    torch.manual_seed(0)
    decoder = decoder_class(2, (4, 4)).double().eval()
    features = torch.randn(1, 2, 2, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(decoder, (features,))
