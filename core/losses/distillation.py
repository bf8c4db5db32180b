"""Losses of knowledge distillation: what one network says, beside what a teacher, or a deeper stage of its own, says.

Each takes (student, teacher) and returns a scalar, 0 for an empty batch. No gradient reaches the teacher's side.
`build_distillation` makes the weighted sum of them that a specification describes.
"""

import torch
from torch import nn
from torch.nn import functional as F

from core.errors import InputError
from core.losses.precision import at_least_float32, in_float32
from core.losses.similarity import LEFT_OUT
from core.losses.spec import parse_terms

EMBEDDING_LOSSES = ("relational", "similarity", "retrieval")  # on all pairs of a batch
DISTILLATION_LOSSES = ("logits", "features", "attention", *EMBEDDING_LOSSES, "self")


class LogitLoss(nn.Module):
    """T^2 KL(p_teacher || p_student) of softmax(logits / T), the mean over the batch (Hinton et al. 2015, section 2).

    The factor T^2 keeps the size of the gradient whatever T is. At T = 1 it is the mimicry loss of deep mutual learning
    (Zhang et al. 2018, section 3.1).

    Shape: (B, C), (B, C) -> scalar.
    """

    def __init__(self, temperature=4.0):
        super().__init__()
        self.temperature = temperature

    @in_float32
    def forward(self, student, teacher):
        student, teacher = (F.log_softmax(one / self.temperature, dim=1) for one in (student, teacher.detach()))
        divergence = F.kl_div(student, teacher, log_target=True, reduction="sum")
        return self.temperature**2 * divergence / max(len(student), 1)


class FeatureLoss(nn.Module):
    """Squared distance of two features of unit length, 2 - 2 cos, the mean over the batch and the positions of a map.

    The hint loss of FitNets (Romero et al. 2015, equation 3, without the factor 1/2) on normalised features, so that
    networks whose features differ in scale can be compared. The adapter that the equation calls r is not part of it.

    Shape: (B, D) or (B, D, h, w), twice -> scalar.
    """

    @in_float32
    def forward(self, student, teacher):
        cosine = F.cosine_similarity(student, teacher.detach())  # (B,) or (B, h, w)
        return (2 - 2 * cosine).sum() / max(cosine.numel(), 1)


class AttentionLoss(nn.Module):
    """Squared distance of two attention maps, the sums of squares over channels scaled to unit length; the batch mean.

    Attention transfer (Zagoruyko and Komodakis 2017, equation 2 with F_sum^2 and p = 2). As in the authors' code the
    distance is squared; they also divide by the number of positions, and the equation has a factor 1/2.

    Shape: maps (B, C, h, w), (B, C', h, w) -> scalar.
    """

    @in_float32
    def forward(self, student, teacher):
        student, teacher = (F.normalize(one.square().sum(1).flatten(1)) for one in (student, teacher.detach()))
        return (student - teacher).square().sum() / max(len(student), 1)


class RelationalLoss(nn.Module):
    """Distances and angles among the embeddings of a batch (Park et al. 2019, "Relational Knowledge Distillation").

    Distances of all pairs, divided by their mean (section 3.2.1), plus `angle_weight` times the cosines of the angles
    of all triplets (section 3.2.2), both under the Huber loss; means over pairs and triplets. The weight 2 is that of
    the paper for metric learning (section 4.1). Needs B^3 + B^2 D numbers.

    Shape: (B, D), (B, D') -> scalar.
    """

    def __init__(self, angle_weight=2.0):
        super().__init__()
        self.angle_weight = angle_weight

    @in_float32
    def forward(self, student, teacher):
        pairs = max(len(student) * (len(student) - 1), 1)
        triplets = max(pairs * (len(student) - 2), 1)
        distances, angles = zip(*(self._relations(one, pairs) for one in (student, teacher.detach())), strict=True)
        by_angle = F.smooth_l1_loss(*angles, reduction="sum") / triplets
        return F.smooth_l1_loss(*distances, reduction="sum") / pairs + self.angle_weight * by_angle

    @staticmethod
    def _relations(embeddings, pairs):
        """(B, B) distances over their mean, (B, B, B) cosines of the angles at the first of three."""
        differences = embeddings[None] - embeddings[:, None]  # (B, B, D)
        distances = torch.linalg.vector_norm(differences, dim=2)  # (B, B)
        directions = differences / distances[..., None].clamp(min=1e-6)
        mean = distances.sum() / pairs
        return distances / mean.clamp(min=1e-6), directions @ directions.transpose(1, 2)


class SimilarityPreservingLoss(nn.Module):
    """|| G_teacher - G_student ||_F^2 / B^2, G the similarities of a batch with rows of unit length.

    Tung and Mori 2019, equations 1 to 3; there of the last map, here of embeddings, which every network has.

    Shape: (B, D), (B, D') -> scalar.
    """

    @in_float32
    def forward(self, student, teacher):
        student, teacher = (F.normalize(one @ one.T) for one in (student, teacher.detach()))  # (B, B)
        return (student - teacher).square().sum() / max(student.numel(), 1)


class RetrievalLoss(nn.Module):
    """Each picture asks for the others of the batch: KL(p_teacher || p_student) of softmax(cosine / t), the batch mean.

    Probabilistic knowledge transfer (Passalis and Tefas 2018) with the kernel of CompRess (Koohpayegani et al. 2020):
    what the teacher ranks first counts most, and what it ranks last hardly at all.

    Shape: (B, D), (B, D') -> scalar; 0 where a picture has no other.
    """

    def __init__(self, temperature=0.1):
        super().__init__()
        self.temperature = temperature

    @in_float32
    def forward(self, student, teacher):
        student, teacher = (self._answers(F.normalize(one)) for one in (student, teacher.detach()))
        return F.kl_div(student, teacher, log_target=True, reduction="sum") / max(len(student), 1)

    def _answers(self, unit):
        similarities = unit @ unit.T / self.temperature  # (B, B)
        itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
        return similarities.masked_fill(itself, LEFT_OUT).log_softmax(dim=1)


class SelfDistillationLoss(nn.Module):
    """Euclidean distance of the features of two stages, as one vector each (reid_strong_baseline_KD: `torch.dist`).

    One number for the batch and not divided by its size, so it grows with the root of it.

    Shape: (B, D), (B, D) -> scalar.
    """

    @in_float32
    def forward(self, student, teacher):
        return torch.dist(student, teacher.detach())


def parse_distillation(spec):
    """Read "1*logits+0.03*features" -> {"logits": 1.0, "features": 0.03}; InputError as of `parse_terms`."""
    return {name: weight for weight, name in parse_terms(spec, {name: name for name in DISTILLATION_LOSSES})}


def build_distillation(
    spec, student, teacher, *, temperature=4.0, retrieval_temperature=0.1, hint_stages=(), teacher_stage=3,
    feature_loss_weight=0.03, gather=None,
):  # fmt: skip
    """The weighted sum that a specification describes.

    Args:
        spec: see `parse_distillation`.
        student, teacher: networks, of which `embedding_dim`, `stage_channels` and the student's `logit_names` are read.
        temperature: T of logits. retrieval_temperature: t of retrieval.
        hint_stages: stages of 1 to 4 whose maps `features` compares beside the embeddings.
        teacher_stage: of 2 to 4, which in `self` teaches all stages below it.
        feature_loss_weight: another factor of `self`.
        gather: see `core.losses.spec.build_loss`; then losses on pairs compare the global batch.

    Returns:
        Distillation.

    Raises:
        InputError: a term needs stages and a network has none.
    """
    builders = {
        "logits": lambda: LogitLoss(temperature),
        "features": FeatureLoss,
        "attention": AttentionLoss,
        "relational": RelationalLoss,
        "similarity": SimilarityPreservingLoss,
        "retrieval": lambda: RetrievalLoss(retrieval_temperature),
        "self": SelfDistillationLoss,
    }
    weights = parse_distillation(spec)
    stages = {"attention": (1, 2, 3, 4), "features": tuple(hint_stages), "self": tuple(range(1, teacher_stage))}
    stages = {name: stages.get(name, ()) for name in weights}
    for name in weights:
        for who, network in (("student", student), ("teacher", student if name == "self" else teacher)):
            if stages[name] and not network.stage_channels:
                raise InputError(f"{name} compares stages, and the {who} has none: it is a network of several branches")
    adapters = {}
    if "features" in weights and student.embedding_dim != teacher.embedding_dim:
        adapters["features/embedding"] = nn.Linear(student.embedding_dim, teacher.embedding_dim)
    for stage in stages.get("features", ()):
        channels = (one.stage_channels[stage - 1] for one in (student, teacher))
        adapters[f"features/stage{stage}"] = nn.Conv2d(*channels, kernel_size=1)
    for stage in stages.get("self", ()):
        channels = (student.stage_channels[one - 1] for one in (stage, teacher_stage))
        adapters[f"self/stage{stage}"] = nn.Linear(*channels)
    if "self" in weights:
        weights["self"] *= feature_loss_weight
    losses = {name: builders[name]() for name in weights}
    return Distillation(weights, losses, adapters, stages, teacher_stage, gather, student.logit_names)


class Distillation(nn.Module):
    """Named, weighted losses of a student's output beside its teacher's; like `LossSum` a dict that is also the log.

    Adapters bring a feature of the student to the size of the teacher's. They learn, and exist in training only: they
    are parameters of this module and not of the network. Where sizes are equal, embeddings need none, and the student's
    embeddings become those of the teacher. `self` compares pooled stages; the original's adapters, attention and
    separable convolutions, are a fifth of the multiply-adds of a step, and that of its teacher stage never learns.

    Attributes:
        weights: term -> weight. stages: term -> stages that it compares.
    """

    def __init__(self, weights, losses, adapters, stages, teacher_stage, gather, logit_names):
        super().__init__()
        self.weights, self.stages, self.teacher_stage = weights, stages, teacher_stage
        self.losses, self.adapters = nn.ModuleDict(losses), nn.ModuleDict(adapters)
        self.gather, self.logit_names = gather, logit_names

    def forward(self, output, teacher):
        """(ReIDOutput of the student, of the teacher) -> dict name -> weighted scalar, of several branches or stages
        each with its share: "logits/global", "attention/stage1", "self/stage1"."""
        parts = {}
        for name, weight in self.weights.items():
            for key, student, target in self._compared(name, output, teacher):
                adapter = self.adapters[key] if key in self.adapters else nn.Identity()
                parts[key] = weight * self.losses[name](adapter(student), target)
        return parts

    def _compared(self, name, output, teacher):
        """(key of the part, what of the student, what of the teacher) for each comparison of a term."""
        if name == "logits":  # every branch learns from all of the teacher's together
            together = torch.stack(teacher.logits).mean(dim=0)  # (B, C)
            several = len(output.logits) > 1
            for branch, logits in zip(self.logit_names, output.logits, strict=True):
                yield f"logits/{branch}" if several else "logits", logits, together
        elif name in EMBEDDING_LOSSES:
            pair = [F.normalize(at_least_float32(one.embedding)) for one in (output, teacher)]
            yield name, *([self.gather(one) for one in pair] if self.gather else pair)
        elif name == "features":
            yield "features/embedding", at_least_float32(output.embedding), teacher.embedding
        for stage in self.stages[name]:
            student = at_least_float32(output.stages[stage - 1])
            if name == "self":
                target = output.stages[self.teacher_stage - 1].mean(dim=(2, 3))
                yield f"self/stage{stage}", student.mean(dim=(2, 3)), target
            else:
                yield f"{name}/stage{stage}", *_to_one_size(student, at_least_float32(teacher.stages[stage - 1]))


def _to_one_size(*maps):
    """Maps (B, C, h, w) averaged down to the fewest rows and the fewest columns among them."""
    size = [min(sides) for sides in zip(*(one.shape[-2:] for one in maps), strict=True)]
    return [one if list(one.shape[-2:]) == size else F.interpolate(one, size, mode="area") for one in maps]
