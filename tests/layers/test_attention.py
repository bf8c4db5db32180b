import pytest
import torch

from core.layers.attention import (
    ATTENTIONS,
    CBAM,
    FEATURE_ERASINGS,
    BatchDropBlock,
    ChannelSelfAttention,
    PositionSelfAttention,
    SqueezeExcitation,
    TopDropBlock,
)


def close(actual, expected):
    torch.testing.assert_close(actual, torch.as_tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name, block",
    [
        ("SE_Module", SqueezeExcitation(16, reduction=4, squeeze=False)),
        ("PAM_Module", PositionSelfAttention(16)),
        ("CAM_Module", ChannelSelfAttention()),
    ],
)
def test_golden(name, block, golden, golden_keys, fill_weights):
    arrays, entry = golden("model_heads_attention"), golden_keys("model_heads_attention")[name]
    assert {key: list(value.shape) for key, value in block.state_dict().items()} == entry["keys"]
    fill_weights.fill_state_dict(block).eval()
    x = torch.as_tensor(arrays[f"{name}/input"]).requires_grad_()
    out = block(x)
    close(out, arrays[f"{name}/eval_out"])
    out.square().sum().backward()
    close(x.grad, arrays[f"{name}/grad_input_of_sum_of_squares"])


def test_the_most_active_rows_are_dropped_golden(golden):
    arrays = golden("model_heads_attention")
    x = torch.as_tensor(arrays["BatchDropTop/input"])
    out = TopDropBlock(0.33).train()(x)
    assert torch.equal(out, torch.as_tensor(arrays["BatchDropTop/train_out"]))
    kept = torch.as_tensor(arrays["BatchDropTop/mask"])[:, None, :, None].bool()
    assert torch.equal(out != 0, kept & (x != 0))


def test_squeeze_and_excitation_by_hand():
    """Channel means 2 and -1, a first layer that adds them, a second that gives (s, -s): sigmoid(1) and sigmoid(-1)."""
    block = SqueezeExcitation(2, reduction=2)
    with torch.no_grad():
        block.fc1.weight.fill_(1)
        block.fc2.weight.copy_(torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1))
        block.fc1.bias.zero_()
        block.fc2.bias.zero_()
    x = torch.tensor([[1.0, 3.0], [-1.0, -1.0]]).reshape(1, 2, 1, 2)
    torch.testing.assert_close(block(x), x * torch.tensor([1.0, -1.0]).sigmoid().reshape(1, 2, 1, 1))


def test_cbam_by_hand():
    """One channel: its weight is sigmoid(mlp(mean) + mlp(max)); then a 1x1 at the middle of the 7x7 adds both maps."""
    block = CBAM(1, reduction=1)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        block[0].mlp[0].weight.fill_(1)
        block[0].mlp[2].weight.fill_(2)
        block[1].conv.weight[0, :, 3, 3] = torch.tensor([1.0, 3.0])
    x = torch.tensor([1.0, 2.0, 6.0]).reshape(1, 1, 1, 3)
    by_channel = x * torch.tensor(2.0 * 3 + 2.0 * 6).sigmoid()  # mean 3, maximum 6
    torch.testing.assert_close(block(x), by_channel * (by_channel + 3 * by_channel).sigmoid())


@pytest.mark.parametrize("name", ATTENTIONS)
def test_shape_gradient_and_empty_batch(name):
    block = ATTENTIONS[name](16)
    x = torch.randn(2, 16, 5, 3, requires_grad=True)
    out = block(x)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad.abs().sum() > 0 and all(parameter.grad is not None for parameter in block.parameters())
    if name.endswith("self"):
        assert torch.equal(out, x)  # until gamma moves
    assert block(torch.zeros(0, 16, 5, 3)).shape == (0, 16, 5, 3)


def test_batch_drop_erases_one_rectangle_in_all_pictures():
    torch.manual_seed(0)
    block, x = BatchDropBlock(0.5, 0.25), torch.ones(3, 2, 8, 4)
    gone = block(x) == 0
    assert gone.sum().item() == 3 * 2 * 4 * 1 and torch.equal(gone[:1, :1].expand_as(gone), gone)
    rows = gone[0, 0].any(dim=1).nonzero().flatten()
    assert rows.max() - rows.min() == 3
    assert len({tuple((block(x) == 0).nonzero()[0].tolist()) for _ in range(20)}) > 1


@pytest.mark.parametrize("name", FEATURE_ERASINGS)
def test_nothing_is_erased_in_evaluation(name):
    x = torch.randn(2, 3, 6, 4)
    assert torch.equal(FEATURE_ERASINGS[name]().eval()(x), x)
