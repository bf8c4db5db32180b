"""Losses of distillation: golden numbers, cases by hand, empty batches, gradients, and the weighted sum of them."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from core.errors import InputError
from core.losses import CrossEntropyLoss, TripletLoss
from core.losses.distillation import (
    DISTILLATION_LOSSES,
    AttentionLoss,
    FeatureLoss,
    LogitLoss,
    RelationalLoss,
    RetrievalLoss,
    SelfDistillationLoss,
    SimilarityPreservingLoss,
    build_distillation,
    parse_distillation,
)
from core.models.reid import ReIDOutput

LOSSES = [
    (LogitLoss(2.0), (6, 5)),
    (FeatureLoss(), (6, 5)),
    (FeatureLoss(), (3, 4, 2, 2)),
    (AttentionLoss(), (4, 3, 2, 2)),
    (RelationalLoss(), (6, 5)),
    (SimilarityPreservingLoss(), (6, 5)),
    (RetrievalLoss(0.5), (6, 5)),
    (SelfDistillationLoss(), (6, 5)),
]
each_loss = pytest.mark.parametrize(("loss", "shape"), LOSSES, ids=lambda one: type(one).__name__)


def pair(shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for _ in range(2)]


def at_angles(*degrees, length=1.0):
    radians = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    return length * torch.stack([radians.cos(), radians.sin()], dim=1)


def test_self_distillation_golden(golden):
    """One step of the original: the sum of its losses and the gradient of each of its inputs."""
    arrays = {name: torch.tensor(value) for name, value in golden("loss_kd").items()}
    names = ("score", "feat", "out1", "out2", "out3", "out4")
    inputs = {name: arrays[name].requires_grad_() for name in names}
    labels = arrays["labels"].long()
    plain = CrossEntropyLoss(0.1)(inputs["score"], labels) + TripletLoss(0.3)(inputs["feat"], labels)
    distance = SelfDistillationLoss()(inputs["out1"], inputs["out3"])
    value = plain + 0.03 * distance
    for found, name in ((plain, "no_kd/value"), (distance, "dist_out1_out3"), (value, "kd_coefficient_0.03/value")):
        torch.testing.assert_close(found, arrays[name], rtol=1e-5, atol=0)
    gradients = torch.autograd.grad(value, list(inputs.values()), allow_unused=True)
    for name, gradient in zip(names, gradients, strict=True):
        expected = arrays[f"kd_coefficient_0.03/grad_{name}"]
        gradient = torch.zeros_like(expected) if gradient is None else gradient
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


@each_loss
def test_zero_where_both_agree_and_for_an_empty_batch(loss, shape):
    student, _ = pair(shape)
    assert loss(student, student.clone()).item() == pytest.approx(0, abs=1e-12)
    empty = student[:0]
    assert loss(empty, empty).item() == 0
    assert loss(student[:1], pair(shape)[1][:1]).isfinite()


@each_loss
def test_gradients_reach_the_student_alone(loss, shape):
    student, teacher = pair(shape)
    loss(student, teacher).backward()
    assert student.grad.isfinite().all() and student.grad.any() and teacher.grad is None
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher), student)


@each_loss
def test_half_precision_is_computed_in_float32(loss, shape):
    student, teacher = (one.detach().bfloat16() for one in pair(shape))
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(student, teacher)
    assert torch.equal(value, loss(student.float(), teacher.float()))


def test_logits_by_hand():
    """T = 2: softmax of (ln 3, 0) is 3/4 and 1/4, the student says 1/2 and 1/2; the second picture agrees."""
    teacher = torch.tensor([[2 * math.log(3), 0.0], [1.0, 1.0]])
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert LogitLoss(2.0)(torch.zeros(2, 2), teacher).item() == pytest.approx(4 * divergence / 2)


def test_features_by_hand():
    """Right angles are 2, 60 degrees 1, whatever the lengths; the mean over pictures and positions."""
    assert FeatureLoss()(at_angles(0, 0, length=3), at_angles(90, 60)).item() == pytest.approx(1.5)
    maps = [at_angles(*degrees).T.view(1, 2, 1, 2) for degrees in ((0, 0), (90, 0))]
    assert FeatureLoss()(*maps).item() == pytest.approx(1.0)


def test_attention_by_hand():
    """Sums of squares (9, 16) and (4, 0) are the unit vectors (9, 16) / sqrt(337) and (1, 0)."""
    student = torch.tensor([[[[3.0, 0.0]], [[0.0, 4.0]]]])  # (1, 2, 1, 2)
    teacher = torch.tensor([[[[2.0, 0.0]]]])
    expected = 2 - 2 * 9 / math.sqrt(9**2 + 16**2)
    assert AttentionLoss()(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_relational_by_hand():
    """The student's triangle has the sides 3, 4, 5, the teacher's is equilateral; sizes of both don't matter."""
    student = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, 0.0, 1.0], [7.0, 0.0, 1.0], [3.5, 7 * math.sqrt(0.75), 1.0]], dtype=torch.float64)
    by_distance = 2 * sum(0.5 * (side / 4 - 1) ** 2 for side in (3, 4, 5)) / 6
    by_angle = 2 * sum(0.5 * (cosine - 0.5) ** 2 for cosine in (0, 3 / 5, 4 / 5)) / 6
    assert RelationalLoss()(student, teacher).item() == pytest.approx(by_distance + 2 * by_angle)
    assert RelationalLoss(0.0)(5 * student, 2 * teacher).item() == pytest.approx(by_distance)


def test_relational_of_two_equal_pictures_has_a_gradient():
    student, teacher = pair((4, 3))
    student = torch.cat([student, student[:1]]).detach().requires_grad_()
    RelationalLoss()(student, torch.cat([teacher, teacher[1:2]])).backward()
    assert student.grad.isfinite().all()


def test_similarity_preserving_by_hand():
    """Rows of G: (1, cos 60) / sqrt(1.25) for the student, (1, 0) for the teacher."""
    row = [(1 / math.sqrt(1.25) - 1) ** 2, (0.5 / math.sqrt(1.25)) ** 2]
    assert SimilarityPreservingLoss()(at_angles(0, 60), at_angles(0, 90)).item() == pytest.approx(2 * sum(row) / 4)


def test_retrieval_by_hand():
    """At 0, 60 and 90 degrees; the teacher finds all three equally alike. No picture asks for itself."""
    student, teacher = at_angles(0, 60, 90, length=2), torch.eye(3, dtype=torch.float64)
    expected = 0.0
    for to_others in ((0.5, 0.0), (0.5, math.cos(math.pi / 6)), (0.0, math.cos(math.pi / 6))):
        exponents = [math.exp(value / 0.5) for value in to_others]
        expected += sum(0.5 * math.log(0.5 / (one / sum(exponents))) for one in exponents) / 3
    assert RetrievalLoss(0.5)(student, teacher).item() == pytest.approx(expected)
    assert RetrievalLoss()(student[:1], teacher[:1]).item() == 0


# The sum


def network(embedding_dim=6, stage_channels=(2, 3, 4, 5), logit_names=("global",)):
    return SimpleNamespace(embedding_dim=embedding_dim, stage_channels=stage_channels, logit_names=list(logit_names))


def output_of(made_for, seed=0, size=4):
    """A ReIDOutput of 4 pictures and 3 identities; the maps are `size` x 1 positions."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(shape, generator=generator).requires_grad_()

    stages = tuple(leaf(4, channels, size, 1) for channels in made_for.stage_channels)
    return ReIDOutput(leaf(4, made_for.embedding_dim), [], [leaf(4, 3) for _ in made_for.logit_names], None, stages)


def test_the_sum_of_all_terms_between_networks_of_other_sizes():
    """Each part is its weight times its loss; every adapter learns, the teacher does not."""
    student, teacher = network(logit_names=("a", "b")), network(7, (3, 3, 6, 8), ("x", "y", "z"))
    spec = "+".join(f"0.5*{name}" for name in DISTILLATION_LOSSES)
    how = {"hint_stages": [3, 4], "temperature": 2.0, "teacher_stage": 4, "feature_loss_weight": 0.1}
    lesson = build_distillation(spec, student, teacher, **how)
    output, target = output_of(student), output_of(teacher, 1, size=2)
    parts = lesson(output, target)
    stages = [f"{name}/stage{stage}" for name, last in (("attention", 4), ("self", 3)) for stage in range(1, last + 1)]
    assert list(parts) == [
        *("logits/a", "logits/b", "features/embedding", "features/stage3", "features/stage4"),
        *stages[:4], "relational", "similarity", "retrieval", *stages[4:],
    ]  # fmt: skip
    assert torch.equal(parts["logits/b"], 0.5 * LogitLoss(2.0)(output.logits[1], sum(target.logits) / 3))
    adapted = lesson.adapters["features/embedding"](output.embedding)
    assert torch.equal(parts["features/embedding"], 0.5 * FeatureLoss()(adapted, target.embedding))
    halved = output.stages[0].unflatten(2, (2, 2)).mean(3)  # 4 rows to the teacher's 2
    torch.testing.assert_close(parts["attention/stage1"], 0.5 * AttentionLoss()(halved, target.stages[0]))
    pooled = [stage.mean(dim=(2, 3)) for stage in output.stages]
    deep = lesson.adapters["self/stage2"](pooled[1])
    torch.testing.assert_close(parts["self/stage2"], 0.05 * torch.dist(deep, pooled[3]))
    sum(parts.values()).backward()
    assert all(parameter.grad.any() for parameter in lesson.parameters())
    assert output.embedding.grad.any() and all(stage.grad.any() for stage in output.stages)
    assert not any(one.grad is not None for one in (target.embedding, *target.logits, *target.stages))


@pytest.mark.parametrize("teacher_stage", [2, 3, 4])
def test_every_stage_below_the_teacher_learns_and_no_other(teacher_stage):
    student = network(stage_channels=(5, 5, 5, 5))
    lesson = build_distillation("self", student, student, teacher_stage=teacher_stage)
    for key in lesson.adapters:
        lesson.adapters[key] = nn.Identity()
    output = output_of(student)
    parts = lesson(output, output)
    sum(parts.values()).backward()
    assert [stage.grad is not None for stage in output.stages] == [number < teacher_stage for number in range(1, 5)]
    pooled = [stage.mean(dim=(2, 3)) for stage in output.stages]
    expected = [0.03 * torch.dist(one, pooled[teacher_stage - 1]) for one in pooled[: teacher_stage - 1]]
    assert torch.equal(torch.stack(list(parts.values())), torch.stack(expected))


def test_equal_sizes_need_no_adapter():
    assert not list(build_distillation("features+relational", network(), network()).parameters())
    assert [one.shape for one in build_distillation("features", network(), network(3)).parameters()] == [(3, 6), (3,)]


def test_pairs_of_the_global_batch():
    student = network()
    output, target = output_of(student), output_of(student, 1)
    two_processes = build_distillation("retrieval+logits", student, student, gather=lambda one: torch.cat([one, -one]))
    parts = two_processes(output, target)
    unit = [nn.functional.normalize(one.embedding) for one in (output, target)]
    assert torch.equal(parts["retrieval"], RetrievalLoss()(*(torch.cat([one, -one]) for one in unit)))
    assert torch.equal(parts["logits"], LogitLoss()(output.logits[0], target.logits[0]))


def test_parse():
    assert parse_distillation("1*logits+0.03*features+2*relational") == {"logits": 1, "features": 0.03, "relational": 2}
    assert parse_distillation("self") == {"self": 1}
    with pytest.raises(InputError, match="unknown loss 'logit'.*names of logits, features.*; is it logits"):
        parse_distillation("1*logit")
    with pytest.raises(InputError, match="unknown loss 'triplet'"):
        parse_distillation("1*triplet")
    with pytest.raises(InputError, match="stands twice"):
        parse_distillation("self+2*self")


@pytest.mark.parametrize(
    ("spec", "who"), [("self", "student"), ("attention", "student"), ("attention", "teacher"), ("features", "teacher")]
)
def test_stages_that_a_network_does_not_have(spec, who):
    networks = {"student": network(), "teacher": network(), who: network(stage_channels=())}
    with pytest.raises(InputError, match=f"{spec} compares stages, and the {who} has none"):
        build_distillation(spec, **networks, hint_stages=[3])
    if spec == "features":
        build_distillation(spec, **networks)
