import pytest
import torch

from core.retrieval.agreement import agreement


def random_labels(seed, clusters):
    return torch.randint(clusters, (80,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("clusters", "identities"), [(1, 5), (5, 1), (7, 7), (60, 6), (2, 30)])
def test_equals_scikit_learn(clusters, identities):
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    labels, truth = random_labels(0, clusters), random_labels(1, identities)
    found = agreement(labels - 1, truth * 10)
    assert found["NMI"] == pytest.approx(metrics.normalized_mutual_info_score(truth, labels), abs=1e-9)
    assert found["ARI"] == pytest.approx(metrics.adjusted_rand_score(truth, labels), abs=1e-9)
    table = metrics.cluster.contingency_matrix(truth, labels)
    assert found["purity"] == pytest.approx(table.max(0).sum() / 80)


def test_by_hand():
    """Clusters {a a b} and {b}: 3 of 4 are right; of 3 pairs together 1 is right, of 2 that should be 1 is found."""
    found = agreement(torch.tensor([0, 0, 0, 1]), torch.tensor([5, 5, 7, 7]))
    assert found["purity"] == 0.75
    assert found["ARI"] == pytest.approx((1 - 3 * 2 / 6) / ((3 + 2) / 2 - 1))


def test_the_same_but_for_the_numbers_and_nothing_at_all():
    labels = random_labels(0, 9)
    assert agreement(labels, 100 - labels) == pytest.approx({"purity": 1, "NMI": 1, "ARI": 1})
    assert agreement(labels[:1], labels[:1]) == {"purity": 1, "NMI": 1, "ARI": 1}
