"""Principal components against a singular value decomposition, and on cases worked out by hand."""

import pytest
import torch

from core.errors import InputError
from core.retrieval import distance, projection
from core.retrieval.projection import principal_components


def reference(features, k=2):
    centred = features.double() - features.double().mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    return u[:, :k] * s[:k], s[:k].square() / s.square().sum()


def test_by_hand():
    """Along (3, 4) the points lie at -5, 0 and 5, across it at 0: one direction holds everything."""
    coordinates, explained = principal_components(torch.tensor([[7.0, 4.0], [10.0, 8.0], [13.0, 12.0]]))
    torch.testing.assert_close(coordinates, torch.tensor([[-5.0, 0.0], [0.0, 0.0], [5.0, 0.0]]))
    torch.testing.assert_close(explained, torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert coordinates.dtype == torch.float32


def test_variances_by_hand():
    """A cross with arms of 3 and 1 over 0: squares 18 and 2. The sign makes the largest component positive."""
    cross = torch.tensor([[0.0, -3.0], [0.0, 3.0], [1.0, 0.0], [-1.0, 0.0]])
    coordinates, explained = principal_components(cross)
    torch.testing.assert_close(coordinates, cross.flip(1))
    torch.testing.assert_close(explained, torch.tensor([0.9, 0.1], dtype=torch.float64))
    assert torch.equal(principal_components(-cross)[0], -coordinates)  # the directions stay as they are


@pytest.mark.parametrize("count, dim", [(400, 48), (40, 300), (12, 2), (2, 40), (300, 1)])
def test_as_a_singular_value_decomposition(count, dim):
    generator = torch.Generator().manual_seed(count)
    features = torch.randn(count, dim, generator=generator) * torch.exp(-0.1 * torch.arange(dim)) + 10
    coordinates, explained = principal_components(features)
    expected, shares = reference(features)
    kept = expected.shape[1]
    sign = (expected * coordinates[:, :kept]).sum(0).sign()
    assert (coordinates[:, :kept] - expected * sign).abs().max() < 1e-2 * expected.abs().max()
    assert (explained[:kept] - shares).abs().max() < 1e-6
    assert (coordinates[:, kept:] == 0).all() and (explained[kept:] == 0).all()


def test_chunks_and_repetition_change_nothing(monkeypatch):
    features = torch.randn(200, 30, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 31)
    whole = principal_components(features)
    assert torch.equal(principal_components(features.numpy())[0], whole[0])
    monkeypatch.setattr(distance, "CHUNK_ELEMENTS", 210)  # seven rows at a time
    chunked = principal_components(features)
    torch.testing.assert_close(chunked[0], whole[0], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(chunked[1], whole[1])


@pytest.mark.parametrize("features", [torch.zeros(0, 4), torch.randn(1, 4), torch.full((50, 7), 0.1)])
def test_nothing_varies(features):
    coordinates, explained = principal_components(features, k=3)
    assert coordinates.shape == (len(features), 3) and (coordinates == 0).all() and explained.tolist() == [0, 0, 0]


def test_what_is_refused():
    with pytest.raises(InputError, match="not finite"):
        principal_components(torch.tensor([[1.0, torch.nan], [0.0, 1.0]]))
    with pytest.raises(InputError, match="shape"):
        principal_components(torch.zeros(3))


def test_a_wide_network_is_followed_to_the_end(monkeypatch):
    """Where the variances hardly differ the rounds end, and what is said of the variance still holds for the points."""
    features = torch.randn(300, 200, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(projection, "MOST_ROUNDS", 4)
    coordinates, explained = principal_components(features)
    total = (features - features.mean(0)).square().sum()
    measured = coordinates.square().sum(0) / total
    assert (measured.double() - explained).abs().max() < 1e-6
    assert (explained <= reference(features)[1] + 1e-9).all() and explained[0] > 0.9 * reference(features)[1][0]
