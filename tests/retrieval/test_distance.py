import numpy as np
import pytest
import torch

from core.errors import InputError
from core.retrieval.distance import DistanceTo, nearest, order_keys, pairwise_distance, smallest


def test_by_hand():
    query, gallery = torch.tensor([[0.0, 1.0]]), torch.tensor([[3.0, 5.0], [0.0, -2.0], [1.0, 0.0], [0.0, 0.0]])
    expected = torch.tensor([[5.0, 3.0, 2**0.5, 1.0]])
    torch.testing.assert_close(pairwise_distance(query, gallery), expected)
    # 5 / sqrt(34); opposite; orthogonal; a zero vector has cosine 0
    expected = torch.tensor([[1 - 5 / 34**0.5, 2.0, 1.0, 1.0]])
    torch.testing.assert_close(pairwise_distance(query, gallery, "cosine"), expected)
    zeros = torch.zeros(1, 2)
    assert pairwise_distance(zeros, zeros, "cosine").item() == 1
    assert pairwise_distance(zeros, zeros).item() == 0


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_equals_float64_by_differences(metric, offset):
    """An offset shared by all features, as in a young network, must not cost the digits."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(40, 64, generator=generator) + offset
    gallery = torch.randn(90, 64, generator=generator) + offset
    gallery[:5] = query[:5]
    gallery[5:9] = query[5:9] + 1e-4
    q, g = query.double(), gallery.double()
    if metric == "cosine":
        expected = 1 - torch.nn.functional.normalize(q) @ torch.nn.functional.normalize(g).T
        torch.testing.assert_close(pairwise_distance(query, gallery, metric).double(), expected, rtol=1e-3, atol=1e-8)
    else:
        expected = (q[:, None] - g[None]).norm(dim=2)
        torch.testing.assert_close(pairwise_distance(query, gallery, metric).double(), expected, rtol=2e-5, atol=1e-7)
    assert (pairwise_distance(query, gallery, metric)[range(5), range(5)] == 0).all()
    assert pairwise_distance(q, g, metric).dtype == torch.float64


def test_empty_query_keeps_its_shape_and_numpy_is_taken():
    assert pairwise_distance(torch.zeros(0, 3), torch.ones(4, 3)).shape == (0, 4)
    assert pairwise_distance(np.zeros((2, 3), np.float32), np.ones((4, 3), np.float32)).shape == (2, 4)
    assert pairwise_distance(torch.ones(2, 3).half(), torch.ones(4, 3).half()).dtype == torch.float32


def test_bad_input_is_named():
    good = torch.ones(3, 2)
    with pytest.raises(InputError, match="gallery is empty"):
        pairwise_distance(good, torch.zeros(0, 2))
    with pytest.raises(InputError, match="unknown distance 'manhattan'"):
        pairwise_distance(good, good, "manhattan")
    with pytest.raises(InputError, match="query features have 3 dimensions"):
        pairwise_distance(torch.ones(3, 3), good)
    with pytest.raises(InputError, match="gallery features have shape"):
        pairwise_distance(good, torch.ones(3))
    for bad in (float("nan"), float("inf"), 1e30):  # 1e30 squared is beyond float32
        with pytest.raises(InputError, match="query features are not finite"):
            pairwise_distance(torch.full((1, 2), bad), good)
        with pytest.raises(InputError, match="gallery features are not finite"):
            pairwise_distance(good, torch.tensor([[bad, 1.0], [0.0, 0.0]]))
    with pytest.raises(InputError, match="chunk size 0"):
        nearest(good, good, 1, chunk_size=0)


def test_autocast_does_not_reach_the_distances():
    features = torch.randn(30, 16, generator=torch.Generator().manual_seed(0))
    plain = pairwise_distance(features, features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pairwise_distance(features, features), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_order_keys_are_a_stable_sort(dtype):
    values = torch.randint(-3, 4, (50, 200), generator=torch.Generator().manual_seed(0)) * 0.37
    values[values == 0] *= torch.where(torch.arange((values == 0).sum()) % 2 == 0, 1.0, -1.0)  # 0.0 and -0.0 are equal
    values[:, 7], values[:, 9] = float("inf"), float("-inf")
    values = values.to(dtype)
    keys = order_keys(values)
    expected = values.argsort(dim=1, stable=True)
    assert torch.equal(keys.argsort(dim=1), expected)
    assert (keys.sort(1).values.diff(dim=1) > 0).all()
    assert torch.equal(smallest(values, 30), expected[:, :30])


@pytest.mark.parametrize("chunk_size", [None, 1, 7])
def test_nearest_equals_a_stable_sort(chunk_size):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(20, 8, generator=generator)
    gallery = torch.randn(50, 8, generator=generator)
    distance = pairwise_distance(query, gallery)
    junk = torch.rand(20, 50, generator=generator) < 0.5
    junk[3] = torch.arange(50) >= 2  # two are left
    for mask in (None, junk):
        masked = distance if mask is None else distance.masked_fill(mask, torch.inf)
        expected = masked.sort(dim=1, stable=True)
        distances, indices = nearest(query, gallery, 10, chunk_size=chunk_size, junk=mask)
        torch.testing.assert_close(distances, expected.values[:, :10])
        assert torch.equal(indices, expected.indices[:, :10].masked_fill(expected.values[:, :10].isinf(), -1))
    assert (indices[3, 2:] == -1).all() and (indices[3, :2] >= 0).all()
    assert nearest(query, gallery, 99)[1].shape == (20, 50)


def test_nearest_settles_duplicates_in_gallery_order():
    gallery = torch.tensor([[2.0, 0.0], [1.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
    distances, indices = nearest(torch.tensor([[1.0, 0.0]]), gallery, 4)
    assert indices.tolist() == [[1, 3, 0, 2]]
    assert distances.tolist() == [[0, 0, 1, 1]]


def test_one_gallery_serves_many_chunks():
    features = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    distance_to = DistanceTo(features)
    parts = torch.cat([distance_to(features[:11]), distance_to(features[11:])])
    torch.testing.assert_close(parts, torch.cdist(features.double(), features.double()).float(), atol=1e-5, rtol=1e-5)
    assert (parts.diagonal() == 0).all()
