"""Labels of several domains as one numbering, what they are compared with, and what is said of them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from core.data.samples import Sample
from core.engine.pseudo_labels import Domain, PseudoLabels, column_of, describe_labels, load_domains
from core.engine.reid import ReIDData


def domain(is_target, truth, name="bags"):
    train = [Sample(f"{number}.png", number, 0) for number in range(len(truth))]
    return Domain(ReIDData(train, [], [], name, name, "no_camera"), is_target, torch.tensor(truth), name)


class Sampler:
    def set_labels(self, labels):
        self.labels = labels.tolist()


def pseudo_labels(method, *domains, **options):
    args = SimpleNamespace(method=method, seed=0, **options)
    samplers = [Sampler() for _ in domains]
    step = SimpleNamespace(networks=[None], averages=[])
    return PseudoLabels(domains, [None] * len(domains), samplers, step, {}, args, torch.device("cpu"))


def test_one_numbering_of_all_domains():
    """Two classes of a source, a target with two clusters and an outlier, another target with one cluster."""
    domains = domain(False, [1, 0, 1]), domain(True, [0] * 4), domain(True, [0] * 2)
    pseudo = pseudo_labels("cluster_contrast", *domains)
    state = pseudo.state_dict()
    pseudo.load_state_dict({**state, "labels": [torch.tensor(x) for x in ([1, 0, 1], [1, -1, 0, 1], [0, 0])]})
    assert pseudo.labels.tolist() == pseudo.targets.tolist() == [1, 0, 1, 3, -1, 2, 3, 4, 4]
    assert [sampler.labels for sampler in pseudo.samplers] == [[1, 0, 1], [1, -1, 0, 1], [0, 0]]
    assert pseudo.several_targets
    with pytest.raises(ValueError, match="labels are of other pictures"):
        pseudo.load_state_dict({**state, "pictures": ["another"] * 3})


def test_slots_of_a_hybrid_memory():
    """The same source; each picture of the target has a slot, whose labels are those of the target's clusters."""
    pseudo = pseudo_labels("spcl", domain(False, [1, 0, 1]), domain(True, [0] * 3))
    labels = [torch.tensor([1, 0, 1]), torch.tensor([0, 1, 0])]
    memory = {"features": torch.eye(5), "labels": torch.tensor([0, 1, 2, 3, 2])}
    pseudo.load_state_dict({**pseudo.state_dict(), "labels": labels, "thresholds": [None, 0.25], "memory": memory})
    assert pseudo.targets.tolist() == [1, 0, 1, 2, 3, 4]
    assert torch.equal(pseudo.memory.labels, memory["labels"]) and pseudo.thresholds == [None, 0.25]
    assert torch.equal(pseudo.state_dict()["memory"]["features"], torch.eye(5))


def test_what_is_said_of_labels_by_hand():
    labels, bags = torch.tensor([0, 0, 0, 1, -1, 2]), domain(True, [4, 4, 7, 7, 7, 7])
    line, row = describe_labels(labels, bags, several=False)
    assert line == "bags: 1 clusters of 3.0 pictures, 3 outliers"
    assert (row["clusters"], row["outliers"], row["cluster_size"], row["clustered"]) == (1, 3, 3.0, 0.5)
    assert row["purity"] == pytest.approx(5 / 6)
    nothing = describe_labels(torch.full((6,), -1), bags._replace(truth=None), several=True)[1]
    assert nothing == {"clusters bags": 0, "outliers bags": 6, "cluster_size bags": 0.0, "clustered bags": 0.0}
    assert column_of("mAP", bags, several=False) == "mAP"


def test_two_targets_of_one_layout_have_columns_of_their_own(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype="uint8")).save(tmp_path / name / f"{number}.png")
    targets = [f"pictures:{tmp_path / name}" for name in ("a", "b")]
    args = SimpleNamespace(source=[], target=targets, protocol=None, skip_broken=False, val_fraction=0.2, min_samples=2)
    domains = load_domains(args, lambda line: None)
    assert [column_of("mAP", domain, several=True) for domain in domains] == ["mAP pictures-1", "mAP pictures-2"]
