import numpy as np
import pytest
import torch

import core.retrieval.reciprocal as reciprocal
from benchmarks.reference_retrieval import re_rank_dense
from core.errors import InputError
from core.retrieval.distance import pairwise_distance
from core.retrieval.ranking import evaluate_ranking
from core.retrieval.rerank import re_rank


def clustered(seed, num_images, dimensions, identities):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(identities, dimensions, generator=generator)
    noise = torch.randn(num_images, dimensions, generator=generator)
    return centres[torch.randint(identities, (num_images,), generator=generator)] + 0.6 * noise


@pytest.mark.parametrize("case", ["normalised", "raw", "lightmbn"])
@pytest.mark.parametrize("chunk_size", [None, 7])
def test_golden(golden, case, chunk_size):
    arrays = golden("rerank")
    features, num_query = arrays[f"{case}/features"], int(arrays[f"{case}/num_query"])
    names = [name for name in arrays if name.startswith(f"{case}/final")]
    assert names
    for name in names:  # <case>/final_k1_20_k2_6_lambda_0.3
        k1, k2, lambda_value = (float(word) for word in name.split("_")[2::2])
        result = re_rank(features[:num_query], features[num_query:], int(k1), int(k2), lambda_value, chunk_size)
        np.testing.assert_allclose(result, arrays[name], atol=1e-5)


@pytest.mark.parametrize(
    ("num_images", "k1", "k2", "lambda_value"),
    [(120, 20, 6, 0.3), (120, 5, 9, 0.0), (60, 1, 1, 0.5), (12, 20, 6, 0.3), (12, 30, 20, 0.3), (2, 20, 6, 0.3)],
)
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_dense_numpy(num_images, k1, k2, lambda_value, seed):
    """Also with fewer images than neighbours asked for, k2 beyond k1, and a single query (Q = 1)."""
    features = clustered(seed, num_images, 8, 10).double().numpy()
    for num_query in {1, num_images // 3} - {0}:
        query, gallery = features[:num_query], features[num_query:]
        expected = re_rank_dense(query, gallery, k1, k2, lambda_value)
        result = re_rank(query, gallery, k1, k2, lambda_value)
        np.testing.assert_allclose(result, expected, atol=1e-9)
        result = re_rank(query.astype(np.float32), gallery.astype(np.float32), k1, k2, lambda_value)
        assert result.dtype == torch.float32 and result.shape == (num_query, num_images - num_query)
        np.testing.assert_allclose(result, expected, atol=1e-5)


def test_duplicates_are_settled_in_index_order():
    """More copies of an image than neighbours: an image may miss its own list, as with a stable sort it does."""
    features = clustered(0, 12, 4, 6).double().repeat_interleave(8, dim=0)  # (96, 4)
    features = features[torch.randperm(96, generator=torch.Generator().manual_seed(0))]
    # Equal distances to both copies in both implementations need exact arithmetic: a grid of integers.
    features = (features * 4).round()
    query, gallery = features[:20], features[20:]
    expected = re_rank_dense(query.numpy(), gallery.numpy(), 5, 3, 0.3)
    difference = features[:, None] - features[None]
    assert (difference.square().sum(2) == 0).sum() > 96 * 7
    result = re_rank(query, gallery, 5, 3, 0.3)
    assert torch.isfinite(result).all()
    np.testing.assert_allclose(result, expected, atol=1e-9)


def test_all_features_equal():
    result = re_rank(torch.ones(3, 4), torch.ones(9, 4))
    assert torch.isfinite(result).all()
    torch.testing.assert_close(result, torch.zeros(3, 9))


def test_by_hand():
    """Two pairs far apart, k1 = 1 and k2 = 1: every image's set is its pair."""
    # Points 0 and 10 are queries, 1 and 9 the gallery.
    query, gallery = torch.tensor([[0.0], [10.0]]), torch.tensor([[1.0], [9.0]])
    # R of query 0: {0, 1}. The largest squared distance from 0 is 100, from 1 it is 81, so that the weights differ:
    a = np.exp(-1 / 100)
    b = np.exp(-1 / 81)
    of_query = np.array([1, a]) / (1 + a)  # of point 0 and of point 1, in the encoding of 0
    of_gallery = np.array([b, 1]) / (1 + b)  # the same two in the encoding of 1
    overlap = np.minimum(of_query, of_gallery).sum()
    near, far = 1 - overlap / (2 - overlap), 1.0
    expected = 0.7 * np.array([[near, far], [far, near]]) + 0.3 * np.array([[0.01, 0.81], [0.81, 0.01]])
    np.testing.assert_allclose(re_rank(query, gallery, k1=1, k2=1, lambda_value=0.3), expected, atol=1e-6)


def test_lambda_one_is_the_normalised_distance():
    features = clustered(0, 30, 4, 5)
    squared = torch.cdist(features, features).square()
    expected = (squared / squared.amax(1, keepdim=True))[:6, 6:]
    torch.testing.assert_close(re_rank(features[:6], features[6:], lambda_value=1.0), expected, atol=1e-5, rtol=0)


def test_chunks_do_not_change_the_result(monkeypatch):
    features = clustered(1, 150, 8, 10)
    whole = re_rank(features[:40], features[40:])
    for name, value in (("PAIRS_PER_CHUNK", 50), ("CHUNK_ELEMENTS", 300)):
        monkeypatch.setattr(reciprocal, name, value)
    for chunk_size in (1, 13):
        torch.testing.assert_close(
            re_rank(features[:40], features[40:], chunk_size=chunk_size), whole, atol=1e-6, rtol=0
        )


def test_it_helps_on_clusters():
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(15, (300,), generator=generator)
    features = torch.randn(15, 8, generator=generator)[ids] + torch.randn(300, 8, generator=generator)
    query, gallery, labels = features[:60], features[60:], (ids[:60], ids[60:], ids[:60], ids[60:])
    plain = evaluate_ranking(pairwise_distance(query, gallery), *labels, "no_camera")
    better = evaluate_ranking(re_rank(query, gallery), *labels, "no_camera")
    assert better.mean_ap > plain.mean_ap + 0.02


def test_bad_input_is_named():
    features = torch.eye(4)
    for empty in ((features[:0], features), (features, features[:0])):
        with pytest.raises(InputError, match="neither may be empty"):
            re_rank(*empty)
    with pytest.raises(InputError, match="dimensions"):
        re_rank(features, torch.eye(3))
    with pytest.raises(InputError, match="not finite"):
        re_rank(features * torch.nan, features)
    for parameters in ({"k1": 0}, {"k2": 0}, {"lambda_value": 1.5}, {"lambda_value": float("nan")}):
        with pytest.raises(InputError, match="k1 and k2 start at 1, lambda is 0..1"):
            re_rank(features, features, **parameters)
