"""Frechet distance between two sets of features: by hand, and against the formula with a root of a matrix."""

import pytest
import torch

from core.retrieval.domain_distance import frechet_distance


def features(count, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, 5, generator=generator, dtype=dtype) @ torch.randn(
        5, 5, generator=generator, dtype=dtype
    )
    return mixed + seed


def test_by_hand():
    """Variances 1 and 9, 4 and 4 along the axes, means (0, 0) and (3, 4)."""
    square = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]) * (3 / 2) ** 0.5  # covariance 1 in both directions
    first, second = square * torch.tensor([1.0, 3.0]), square * 2 + torch.tensor([3.0, 4.0])
    assert frechet_distance(first, second) == pytest.approx(25 + (1 - 2) ** 2 + (3 - 2) ** 2)


def test_formula():
    first, second = features(40, 0), features(30, 1)
    product = torch.linalg.eigvals(first.T.cov() @ second.T.cov()).real.clamp(min=0).sqrt().sum()
    expected = (first.mean(0) - second.mean(0)).square().sum() + (first.T.cov() + second.T.cov()).trace() - 2 * product
    assert frechet_distance(first, second) == pytest.approx(expected.item())
    assert frechet_distance(second, first) == pytest.approx(expected.item())


def test_a_set_is_at_no_distance_from_itself_in_another_order():
    one = features(20, 2, torch.float32)
    assert frechet_distance(one, one.flip(0)) == pytest.approx(0, abs=1e-9)


def test_fewer_pictures_than_features():
    assert frechet_distance(features(3, 0), features(2, 0)) >= 0
