"""GAN and contrastive loss: golden numbers with gradients, by hand; the pool of older pictures."""

import pytest
import torch

from core.losses.adversarial import ImagePool, contrastive_loss, gan_loss, l1_loss

CLOSE = dict(rtol=1e-5, atol=1e-7)  # the tolerance of the golden file; gradients hold zeros


@pytest.fixture
def arrays(golden):
    return {key: torch.from_numpy(value.copy()) for key, value in golden("loss_gan").items()}


@pytest.mark.parametrize("case, real", [("lsgan_real", True), ("lsgan_fake", False)])
def test_gan_loss_golden(arrays, case, real):
    prediction = arrays["prediction"].requires_grad_()
    value = gan_loss(prediction, real)
    (gradient,) = torch.autograd.grad(value, prediction)
    torch.testing.assert_close(value, arrays[f"{case}/value"], **CLOSE)
    torch.testing.assert_close(gradient, arrays[f"{case}/grad"], **CLOSE)


def test_contrastive_loss_golden(arrays):
    first, second = arrays["sia/a"].requires_grad_(), arrays["sia/b"].requires_grad_()
    value = contrastive_loss(first, second, arrays["sia/label"])
    gradients = torch.autograd.grad(value, (first, second))
    torch.testing.assert_close(value, arrays["sia/value"], **CLOSE)
    torch.testing.assert_close(gradients, (arrays["sia/grad_a"], arrays["sia/grad_b"]), **CLOSE)
    for same in (0, 1):
        expected = arrays[f"sia/value_scalar_label_{same}"]
        torch.testing.assert_close(contrastive_loss(first, second, same), expected, **CLOSE)


def test_by_hand():
    assert gan_loss(torch.tensor([[[[1.0, 3.0]]]]), True).item() == 2.0  # 0 and 2^2
    assert l1_loss(torch.tensor([1.0, -1.0]), torch.tensor([0.0, 2.0])).item() == 2.0
    first, second = torch.tensor([[3.0, 4.0], [0.0, 0.5], [9.0, 0.0]]), torch.zeros(3, 2)
    value = contrastive_loss(first, second, torch.tensor([1.0, 0.0, 0.0]))  # 5^2, (2 - 0.5)^2, beyond the margin
    assert value.item() == pytest.approx((25 + 2.25) / 3, rel=1e-5)


def test_equal_embeddings_have_a_finite_gradient():
    rows = torch.ones(2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(contrastive_loss(rows, torch.ones(2, 3), 0), rows)
    assert gradient.isfinite().all()


def test_losses_in_half_precision():
    half = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    for loss in (lambda x: gan_loss(x, True), lambda x: l1_loss(x, 1 - x), lambda x: contrastive_loss(x, 1 - x, 0)):
        assert loss(half).dtype == torch.float32


def pictures(*values):
    return torch.tensor([float(value) for value in values])[:, None, None, None].expand(-1, 3, 2, 2)


def shown(pool, *values, seed=0):
    return pool.exchange(pictures(*values), torch.Generator().manual_seed(seed))[:, 0, 0, 0].tolist()


def test_the_pool_keeps_the_first_and_returns_new_or_old(monkeypatch):
    pool = ImagePool(2)
    assert shown(pool, 1, 2) == [1, 2]
    coins, places = iter([0.4, 0.5, 0.0]), iter([1, 1])
    monkeypatch.setattr(torch, "rand", lambda *_, **__: next(coins))
    monkeypatch.setattr(torch, "randint", lambda *_, **__: next(places))
    # 3 takes the place of 2, 4 passes, 5 takes the place of 3, which came a moment ago.
    assert shown(pool, 3, 4, 5) == [2, 4, 3]
    assert [image[0, 0, 0].item() for image in pool.images] == [1, 5]


def test_the_pool_returns_an_old_picture_in_half_of_the_cases():
    pool = ImagePool(50)
    shown(pool, *range(50))
    old = sum(value < 1000 for value in shown(pool, *range(1000, 1400)))
    assert 0 < old <= 50  # what was there at first
    again = sum(first != value for first, value in zip(shown(pool, *range(2000, 2400)), range(2000, 2400), strict=True))
    assert 160 <= again <= 240


def test_the_pool_goes_on_where_it_was_saved():
    pool, resumed = ImagePool(3), ImagePool(3)
    shown(pool, 1, 2, 3, 4)
    resumed.load_state_dict(pool.state_dict())
    assert shown(pool, *range(5, 25), seed=1) == shown(resumed, *range(5, 25), seed=1)


def test_a_pool_of_nothing_returns_what_comes():
    pool = ImagePool(0)
    assert shown(pool, 1, 2) == [1, 2] and not pool.images


def test_the_pool_holds_copies_without_a_graph():
    pool, images = ImagePool(4), pictures(1, 2).clone().requires_grad_()
    returned = pool.exchange(images * 1)
    assert not returned.requires_grad and not any(image.requires_grad for image in pool.images)
    assert all(image.untyped_storage().nbytes() == 3 * 2 * 2 * 4 for image in pool.images)
