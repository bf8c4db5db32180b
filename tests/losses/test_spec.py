"""The loss specification: parsing, its errors, the weighted sum, and several processes against one."""

import threading
from types import SimpleNamespace

import pytest
import torch

from core.errors import InputError
from core.losses.identity import CrossEntropyLoss
from core.losses.mask import GaussianMaskRegressionLoss
from core.losses.metric import SoftmaxTripletLoss, TripletLoss
from core.losses.spec import (
    COSINE_LOSSES,
    KNOWN_LOSSES,
    METRIC_LOSSES,
    PAIR_LOSSES,
    SCORE_LOSSES,
    build_loss,
    needs_cosines,
    needs_logits,
    needs_mask,
    needs_pairs,
    parse_spec,
)

SUITCASE = "1*cross_entropy+1*softmax_triplet+0.05*gaussian_mask"


def make_batch(seed=0, size=8, dtype=torch.float64):
    """A network output with gradients, labels of 4 identities, target masks: the later the picture, the fuller."""
    generator = torch.Generator().manual_seed(seed)
    leaves = {
        "features": torch.randn(size, 6, generator=generator, dtype=dtype).requires_grad_(),
        "logits": torch.randn(size, 4, generator=generator, dtype=dtype).requires_grad_(),
        "mask": torch.rand(size, 1, 5, 4, generator=generator, dtype=dtype).requires_grad_(),
    }
    fullness = torch.linspace(0, 1, size, dtype=dtype).view(-1, 1, 1, 1)
    targets = torch.rand(size, 1, 5, 4, generator=generator, dtype=dtype) * fullness
    return leaves, torch.arange(size) % 4, targets


def output_of(leaves, part=slice(None)):
    return SimpleNamespace(
        features=[leaves["features"][part]], logits=[leaves["logits"][part]], mask=leaves["mask"][part]
    )


def test_parse():
    assert parse_spec(SUITCASE) == [(1.0, "cross_entropy"), (1.0, "softmax_triplet"), (0.05, "gaussian_mask")]
    assert parse_spec(" 5e-4 * center + triplet ") == [(5e-4, "center"), (1.0, "triplet")]
    assert parse_spec("0*focal_mask") == [(0.0, "focal_mask")]


def test_both_spellings():
    assert parse_spec("0.5*CrossEntropy+0.5*MSLoss") == parse_spec("0.5*cross_entropy+0.5*multi_similarity")
    theirs = ["CrossEntropy", "Triplet", "MSLoss", "Focal", "CenterLoss", "RankedLoss"]  # LightMBN
    ours = ["cross_entropy", "triplet", "multi_similarity", "focal", "center", "ranked_list"]
    assert [parse_spec(name)[0][1] for name in theirs] == ours
    classes = {name: type(build_loss(name, 4, 6).losses[name]).__name__ for name in KNOWN_LOSSES}
    assert {name: parse_spec(written)[0][1] for name, written in classes.items()} == {name: name for name in classes}


@pytest.mark.parametrize(
    "spec, message",
    [
        ("1*cross_entropi", f"unknown loss 'cross_entropi'.*{', '.join(KNOWN_LOSSES)}; is it cross_entropy?"),
        ("1*triplet + 2*CirclLoss", r"unknown loss 'CirclLoss' in term 2 \(from column 12\).*; is it circle\?$"),
        ("1*GroupLoss", "unknown loss 'GroupLoss'.*combined_mask$"),
        ("", "a loss name is missing"),
        ("1*triplet+", "a loss name is missing"),
        ("1*", "a loss name is missing"),
        ("one*triplet", "'one' is no weight"),
        ("*triplet", "'' is no weight"),
        ("2*3*triplet", r"'2\*3' is no weight"),
        ("-1*triplet", "weight -1 .*from 0 up"),
        ("nan*triplet", "weight nan .*finite"),
        ("inf*triplet", "weight inf .*finite"),
        ("1*triplet+2*triplet", "triplet stands twice"),
        ("ms+circle+MultiSimilarity", "multi_similarity stands twice, again in term 3"),
        ("arcface+triplet+focal", "arcface reads cosines and focal class scores"),
        ("1,triplet", "unknown loss '1,triplet'"),
    ],
)
def test_parse_errors_are_one_line(spec, message):
    with pytest.raises(InputError, match=message) as caught:
        parse_spec(spec)
    assert "\n" not in str(caught.value)
    assert repr(spec) in str(caught.value)


def test_needs_mask():
    assert needs_mask(SUITCASE)
    assert needs_mask("1*focal_mask")
    assert needs_mask("1*combined_mask")
    assert not needs_mask("1*cross_entropy+1*triplet+1*softmax_triplet+5e-4*center")


def test_needs_pairs():
    assert needs_pairs(SUITCASE) and needs_pairs("triplet") and needs_pairs("cross_entropy+0.1*softmax_triplet")
    assert not needs_pairs("cross_entropy+0*triplet+0.0*softmax_triplet")
    assert not needs_pairs("1*cross_entropy+1*center+1*gaussian_mask")


def test_needs_logits_and_cosines():
    assert {name for name in KNOWN_LOSSES if needs_logits(name)} == {*SCORE_LOSSES, *COSINE_LOSSES}
    assert {name for name in KNOWN_LOSSES if needs_cosines(name)} == set(COSINE_LOSSES)


@pytest.mark.parametrize("name", METRIC_LOSSES)
@pytest.mark.parametrize("labels", [range(8), [3] * 8])
def test_pair_losses_are_those_that_are_0_without_pairs(name, labels):
    """No identity with two pictures; a single identity."""
    leaves, _, _ = make_batch()
    parts = build_loss(name, 8, 6)(output_of(leaves), torch.tensor(list(labels)))
    assert (parts[name].item() == 0) == (name in PAIR_LOSSES)


def test_parts_are_weighted_and_in_order():
    leaves, labels, targets = make_batch()
    loss = build_loss(SUITCASE, 4, 6, label_smoothing=0.1, mask_kind="l1", mask_threshold=0.1)
    parts = loss(output_of(leaves), labels, targets)
    assert list(parts) == ["cross_entropy", "softmax_triplet", "gaussian_mask"]
    assert torch.equal(parts["cross_entropy"], CrossEntropyLoss(0.1)(leaves["logits"], labels))
    assert torch.equal(parts["softmax_triplet"], SoftmaxTripletLoss()(leaves["features"], labels))
    assert torch.equal(parts["gaussian_mask"], 0.05 * GaussianMaskRegressionLoss("l1", 0.1)(leaves["mask"], targets))


@pytest.mark.parametrize("left_out", [SCORE_LOSSES, COSINE_LOSSES])
def test_every_known_loss_is_built_and_trains(left_out):
    leaves, labels, targets = make_batch(dtype=torch.float32)
    names = [name for name in KNOWN_LOSSES if name not in left_out]
    loss = build_loss("+".join(f"0.5*{name}" for name in names), 4, 6)
    output = output_of({**leaves, "logits": leaves["logits"].tanh()})
    parts = loss(output, labels, targets)
    assert list(parts) == names
    sum(parts.values()).backward()
    assert all(leaf.grad.abs().sum() > 0 for leaf in leaves.values())
    assert [name for name, _ in loss.named_parameters()] == ["losses.center.centers"]
    assert loss.losses["center"].centers.grad.abs().sum() > 0


def test_options_reach_their_losses():
    loss = build_loss("circle+arcface+cosface+circle_softmax", 4, 6, cosine_margin=0.1, scale=8.0).losses
    assert all((part.margin, part.scale) == (0.1, 8.0) for part in loss.values())
    loss = build_loss("circle+arcface+cosface+circle_softmax", 4, 6).losses
    assert [(part.margin, part.scale) for part in loss.values()] == [(0.25, 128), (0.5, 64), (0.35, 64), (0.25, 128)]
    loss = build_loss("triplet+semihard_triplet+multi_similarity", 4, 6, margin=0.7).losses
    assert [part.margin for part in loss.values()] == [0.7] * 3
    with pytest.raises(InputError, match="multi-similarity margin is soft"):
        build_loss("triplet+multi_similarity", 4, 6, margin=None)


def test_parameter_scale_is_the_weight_of_the_centers():
    assert build_loss("1*triplet+5e-4*center", 4, 6).parameter_scale == 5e-4
    assert build_loss("1*triplet", 4, 6).parameter_scale == 1
    assert build_loss("0*center", 4, 6).parameter_scale == 1


def two_branches():
    batches = [make_batch(seed) for seed in (0, 1)]
    output = SimpleNamespace(**{key: [leaves[key] for leaves, _, _ in batches] for key in ("features", "logits")})
    return output, batches[0][1], dict(logit_names=["global", "part"], feature_names=["global", "part"])


def test_branches_are_summed_and_each_has_its_share():
    output, labels, names = two_branches()
    parts = build_loss("2*cross_entropy+1*triplet", 4, 6, **names)(output, labels)
    assert list(parts) == ["cross_entropy/global", "cross_entropy/part", "triplet/global", "triplet/part"]
    assert torch.equal(parts["triplet/part"], TripletLoss()(output.features[1], labels))
    assert torch.equal(parts["cross_entropy/global"], 2 * CrossEntropyLoss()(output.logits[0], labels))


def test_features_and_logits_may_have_other_branches():
    output, labels, names = two_branches()
    output.logits.append(output.logits[0])
    names = {"logit_names": ["global", "drop", "part"], "feature_names": ["global"]}
    output.features.pop()
    parts = build_loss("focal+circle", 4, 6, **names)(output, labels)
    assert list(parts) == ["focal/global", "focal/drop", "focal/part", "circle"]
    with pytest.raises(ValueError, match="longer"):
        build_loss("focal+circle", 4, 6)(output, labels)


def test_each_branch_has_its_centers():
    output, labels, names = two_branches()
    loss = build_loss("0.1*center", 4, 6, **names)
    assert list(loss.state_dict()) == ["losses.center.0.centers", "losses.center.1.centers"]
    parts = loss(output, labels)
    assert torch.equal(parts["center/part"], 0.1 * loss.losses["center"][1](output.features[1], labels))
    assert loss.parameter_scale == 0.1


def test_a_mask_loss_without_masks_is_refused():
    leaves, labels, targets = make_batch()
    output = SimpleNamespace(features=[leaves["features"]], logits=[leaves["logits"]], mask=None)
    with pytest.raises(ValueError, match="gaussian_mask has no predicted mask"):
        build_loss("1*gaussian_mask", 4, 6)(output, labels, targets)
    with pytest.raises(ValueError, match="gaussian_mask has no target masks"):
        build_loss("1*gaussian_mask", 4, 6)(output_of(leaves), labels)


class FakeProcesses:
    """`gather` for threads that stand for processes: each puts its tensor down, waits, and takes them all."""

    def __init__(self, count):
        self.slots = [None] * count
        self.barrier = threading.Barrier(count, timeout=20)
        self.local = threading.local()

    def gather(self, tensor):
        self.slots[self.local.rank] = tensor
        self.barrier.wait()
        everyone = torch.cat(self.slots)
        self.barrier.wait()
        return everyone

    def run(self, function):
        results, failures = [None] * len(self.slots), []

        def work(rank):
            self.local.rank = rank
            try:
                results[rank] = function(rank)
            except BaseException as error:
                failures.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(self.slots))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return results


@pytest.mark.parametrize("name", KNOWN_LOSSES)
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.95, 1.0])
def test_mean_over_processes_is_the_global_value(name, threshold):
    """Values and gradients. Threshold 0.95 leaves pixels on the last process only, 1.0 on none."""
    count = 4
    leaves, labels, targets = make_batch(size=16)
    if threshold == 0.95:
        assert (targets[12:] >= threshold).any()
        assert not (targets[:12] >= threshold).any()

    def build(gather):
        torch.manual_seed(0)  # the same centers everywhere
        return build_loss(f"0.5*{name}", 4, 6, mask_threshold=threshold, gather=gather)

    expected = build(None)(output_of(leaves), labels, targets)[name]
    expected_gradients = torch.autograd.grad(expected, list(leaves.values()), allow_unused=True)

    processes = FakeProcesses(count)
    losses = [build(processes.gather) for _ in range(count)]

    def one_process(rank):
        part = slice(4 * rank, 4 * rank + 4)
        return losses[rank](output_of(leaves, part), labels[part], targets[part])[name]

    value = sum(processes.run(one_process)) / count
    torch.testing.assert_close(value, expected)
    gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient)


def test_without_gather_a_local_triplet_misses_pairs():
    """The test above can fail: each process alone holds one picture of an identity and so no positive."""
    leaves, labels, _ = make_batch(size=16)
    loss = build_loss("1*triplet", 4, 6)
    assert all(loss(output_of(leaves, slice(4 * r, 4 * r + 4)), labels[:4])["triplet"] == 0 for r in range(4))
    assert loss(output_of(leaves), labels)["triplet"] > 0


def test_gathers_in_float32_and_once():
    calls = []

    def gather(tensor):
        calls.append(tensor.dtype)
        return tensor

    leaves, labels, targets = make_batch(dtype=torch.bfloat16)
    loss = build_loss("1*triplet+1*softmax_triplet+1*gaussian_mask", 4, 6, gather=gather)
    loss(output_of(leaves), labels, targets)
    assert calls == [torch.float32, torch.int64, torch.int64]
