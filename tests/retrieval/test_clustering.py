"""Pseudo labels: golden numbers of OpenUnReID, scikit-learn's DBSCAN, and cases worked out by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from core.errors import InputError
from core.retrieval import clustering, reciprocal
from core.retrieval.clustering import (
    NearPairs,
    cluster,
    cluster_centers,
    dbscan,
    jaccard_distance,
    k_means,
    near_pairs,
    self_paced_cluster,
    with_own_labels,
)


def blobs(seed=0, num_images=150, identities=8, noise=0.35):
    generator = torch.Generator().manual_seed(seed)
    centers = F.normalize(torch.randn(identities, 12, generator=generator))
    ids = torch.randint(identities, (num_images,), generator=generator)
    return centers[ids] + noise * torch.randn(num_images, 12, generator=generator), ids


@pytest.fixture
def arrays(golden):
    return golden("clustering")


@pytest.mark.parametrize("k1", [20, 30])
def test_jaccard_golden(arrays, k1):
    expected = arrays[f"jaccard_k1_{k1}_k2_6"]
    np.testing.assert_allclose(jaccard_distance(arrays["features"], k1, 6), expected, atol=1e-5)
    pairs = near_pairs(arrays["features"], k1, 6, eps=0.5)
    row, column = np.nonzero(expected <= 0.5)
    assert torch.equal(pairs.row, torch.from_numpy(row)) and torch.equal(pairs.column, torch.from_numpy(column))
    np.testing.assert_allclose(pairs.distance, expected[row, column], atol=1e-5)


@pytest.mark.parametrize(("k1", "eps"), [(30, 0.6), (30, 0.5), (20, 0.5)])
def test_dbscan_golden(arrays, k1, eps):
    found = cluster(arrays["features"], k1=k1, eps=eps)
    for labels, case in ((found, "minus1"), (with_own_labels(found), "own_label")):
        case = f"dbscan_k1_{k1}_eps_{eps}_outliers_{case}"
        assert labels.tolist() == arrays[f"{case}/labels"].tolist()
        assert labels.max() + 1 == arrays[f"{case}/num_classes"]
        if f"{case}/centers" in arrays:
            centers = cluster_centers(torch.from_numpy(arrays["features"]), labels)
            np.testing.assert_allclose(centers, arrays[f"{case}/centers"], atol=1e-5)


@pytest.mark.parametrize(("k1", "eps"), [(30, (0.58, 0.6, 0.62)), (30, (0.45, 0.5, 0.55)), (20, (0.4, 0.5, 0.6))])
def test_self_paced_golden(arrays, k1, eps):
    case = f"spcl_k1_{k1}_eps_{'_'.join(map(str, eps))}"
    labels, threshold = self_paced_cluster(arrays["features"], k1=k1, eps=eps)
    assert labels.tolist() == arrays[f"{case}/labels"].tolist()
    assert labels.max() + 1 == arrays[f"{case}/num_classes"] and threshold == arrays[f"{case}/indep_thres"]
    stricter, same = self_paced_cluster(arrays["features"], k1=k1, eps=eps, threshold=threshold / 2)
    assert stricter.tolist() == arrays[f"{case}/labels_given_half_threshold"].tolist() and same == threshold / 2


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("eps", "min_samples"), [(0.2, 2), (0.4, 4), (0.6, 4), (0.75, 12)])
def test_dbscan_equals_scikit_learn(seed, eps, min_samples):
    sklearn = pytest.importorskip("sklearn.cluster", reason="scikit-learn is not installed")
    features, _ = blobs(seed)
    distance = jaccard_distance(features, 15, 4)
    expected = sklearn.DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit_predict(distance.numpy())
    labels = cluster(features, k1=15, k2=4, eps=eps, min_samples=min_samples)
    assert labels.tolist() == expected.tolist()


def test_dbscan_by_hand():
    """On a line at 0 1 2, 4, 6 7 8, 20; eps 2, 4 samples: 2 and 6 are core, 4 is near both and goes to the first."""
    positions = torch.tensor([6.0, 20, 8, 7, 4, 2, 1, 0])
    distance = (positions[:, None] - positions).abs()
    row, column = (distance <= 2).nonzero(as_tuple=True)
    pairs = NearPairs(row, column, distance[row, column], 8)
    assert dbscan(pairs, 2, 4).tolist() == [0, -1, 0, 0, 0, 1, 1, 1]
    assert dbscan(pairs, 2, 5).tolist() == [-1] * 8
    assert dbscan(pairs, 1, 2).tolist() == [0, -1, 0, 0, -1, 1, 1, 1]


def test_a_chain_is_one_cluster_in_few_rounds(monkeypatch):
    rounds = []
    monkeypatch.setattr(torch, "equal", lambda a, b, equal=torch.equal: rounds.append(0) or equal(a, b))
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    assert (clustering._first_of_component(order[:-1], order[1:], 5000) == 0).all()
    assert len(rounds) <= 20


def test_chunks_do_not_change_labels(monkeypatch):
    features, _ = blobs()
    whole = self_paced_cluster(features, k1=15)
    for name, value in (("PAIRS_PER_CHUNK", 50), ("CHUNK_ELEMENTS", 300)):
        monkeypatch.setattr(reciprocal, name, value)
    assert torch.equal(self_paced_cluster(features, k1=15)[0], whole[0])


def test_fewer_images_than_neighbors_and_copies_of_one():
    assert cluster(torch.eye(3)).tolist() == [-1, -1, -1]
    assert self_paced_cluster(torch.eye(3))[0].tolist() == [0, 1, 2]
    assert cluster(torch.ones(9, 4)).tolist() == [0] * 9
    features, _ = blobs(num_images=12, identities=2, noise=0.1)
    assert len(jaccard_distance(features, 30, 6)) == 12


@pytest.mark.parametrize("num_clusters", [1, 8, 40])
def test_k_means_is_a_fixed_point_and_the_same_for_a_seed(num_clusters):
    features, _ = blobs()
    labels = k_means(features, num_clusters, seed=3)
    assert torch.equal(labels, k_means(features, num_clusters, seed=3))
    appearance = [int((labels == label).nonzero()[0]) for label in range(labels.max() + 1)]
    assert appearance == sorted(appearance)
    unit = F.normalize(features)
    assert torch.equal(torch.cdist(unit, cluster_centers(unit, labels)).argmin(1), labels)


def test_k_means_finds_what_lies_apart():
    features, ids = blobs(noise=0.02)
    labels = k_means(features, 8, seed=2)
    assert len(set(zip(labels.tolist(), ids.tolist(), strict=True))) == 8
    assert k_means(torch.ones(5, 3), 2).max() <= 1


def test_bad_input_is_named():
    with pytest.raises(InputError, match="start at 1"):
        cluster(torch.eye(4), k1=0)
    with pytest.raises(InputError, match="eps is 1"):
        near_pairs(torch.eye(4), eps=1.0)
    with pytest.raises(InputError, match="not finite"):
        cluster(torch.eye(4) * torch.nan)
    with pytest.raises(InputError, match="5 clusters of 4 images"):
        k_means(torch.eye(4), 5)
