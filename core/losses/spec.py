"""A loss from its specification: "1*cross_entropy+1*softmax_triplet+0.05*gaussian_mask" -> one module."""

import difflib
import math

from torch import nn

from core.errors import InputError
from core.losses.identity import CrossEntropyLoss, FocalLoss
from core.losses.margin import ArcFaceLoss, CircleSoftmaxLoss, CosFaceLoss
from core.losses.mask import CombinedMaskLoss, FocalMaskLoss, GaussianMaskRegressionLoss
from core.losses.metric import CenterLoss, SemihardTripletLoss, SoftmaxTripletLoss, TripletLoss
from core.losses.precision import at_least_float32
from core.losses.similarity import CircleLoss, MultiSimilarityLoss, RankedListLoss

SCORE_LOSSES = ("cross_entropy", "focal")  # on the scores of a classifier
COSINE_LOSSES = ("arcface", "cosface", "circle_softmax")  # on the cosines of one
IDENTITY_LOSSES = SCORE_LOSSES + COSINE_LOSSES
# Of two pictures of one identity, and one of another:
PAIR_LOSSES = ("triplet", "softmax_triplet", "semihard_triplet", "multi_similarity", "circle", "ranked_list")
METRIC_LOSSES = (*PAIR_LOSSES, "center")  # on features
MASK_LOSSES = ("gaussian_mask", "focal_mask", "combined_mask")  # on the predicted mask
KNOWN_LOSSES = IDENTITY_LOSSES + METRIC_LOSSES + MASK_LOSSES


def _plain(name):
    """One spelling of many: "CrossEntropy", "cross_entropy" and "CrossEntropyLoss" are all "crossentropy"."""
    return name.lower().replace("_", "").removesuffix("loss")


NAMES = {_plain(name): name for name in KNOWN_LOSSES}
# LightMBN's MSLoss and RankedLoss, and our own class GaussianMaskRegressionLoss.
NAMES |= {"ms": "multi_similarity", "ranked": "ranked_list", "gaussianmaskregression": "gaussian_mask"}


def parse_spec(spec):
    """Read "1*cross_entropy+0.05*gaussian_mask" -> [(1.0, "cross_entropy"), (0.05, "gaussian_mask")].

    A name alone has weight 1. A name may also be written as its class is, with or without Loss: MultiSimilarity,
    MultiSimilarityLoss, and as in LightMBN MSLoss.

    Raises InputError, with the place, for an unknown name, a name given twice, a weight that is no number, negative or
    not finite, and for losses on cosines beside losses on class scores.
    """
    terms = parse_terms(spec, NAMES)
    cosines, scores = ([name for _, name in terms if name in group] for group in (COSINE_LOSSES, SCORE_LOSSES))
    if cosines and scores:
        raise InputError(
            f"{cosines[0]} reads cosines and {scores[0]} class scores in the loss {spec!r}, and a network has one "
            "classifier: leave one of them out"
        )
    return terms


def parse_terms(spec, names):
    """[(weight, name), ...] of a weighted sum; `names`: spelling, as `_plain` makes it, -> name. See `parse_spec`."""
    terms, column = [], 1
    for number, term in enumerate(spec.split("+"), start=1):
        where = f"in term {number} (from column {column}) of the loss {spec!r}"
        weight, star, name = term.rpartition("*")
        terms.append((_parse_weight(weight, where) if star else 1.0, _parse_name(name.strip(), names, where)))
        if terms[-1][1] in (known for _, known in terms[:-1]):
            raise InputError(f"{terms[-1][1]} stands twice, again {where}: add up its weights")
        column += len(term) + 1
    return terms


def _parse_name(name, names, where):
    if _plain(name) not in names:
        near = difflib.get_close_matches(_plain(name), names, n=1)
        what = f"unknown loss {name!r}" if name else "a loss name is missing"
        hint = f"; is it {names[near[0]]}?" if near else ""
        known = ", ".join(dict.fromkeys(names.values()))
        raise InputError(f"{what} {where}: write WEIGHT*NAME+..., with names of {known}{hint}")
    return names[_plain(name)]


def _parse_weight(text, where):
    try:
        weight = float(text)
    except ValueError:
        raise InputError(f"{text.strip()!r} is no weight {where}: write for example 0.5*triplet") from None
    if not 0 <= weight < math.inf:
        raise InputError(f"weight {text.strip()} {where}: give a finite number from 0 up")
    return weight


def _names(spec, group):
    return [name for _, name in parse_spec(spec) if name in group]


def needs_mask(spec):
    """Does this specification ask for a predicted mask (and so for a decoder and for mask targets)?"""
    return bool(_names(spec, MASK_LOSSES))


def needs_logits(spec):
    """Does this specification ask for class scores or cosines (and so for a classifier)?"""
    return bool(_names(spec, IDENTITY_LOSSES))


def needs_cosines(spec):
    """Does this specification ask for cosines in place of class scores?"""
    return bool(_names(spec, COSINE_LOSSES))


def needs_pairs(spec):
    """Is a part of it 0 for ever where batches have one picture of each identity, or one identity? A weight of 0 asks
    for nothing."""
    return any(name in PAIR_LOSSES and weight for weight, name in parse_spec(spec))


ONE_BRANCH = ("global",)


def build_loss(
    spec,
    num_classes,
    feature_dim,
    *,
    label_smoothing=0.0,
    margin=0.3,
    cosine_margin=None,
    scale=None,
    mask_kind="mse",
    mask_threshold=0.0,
    gather=None,
    logit_names=ONE_BRANCH,
    feature_names=ONE_BRANCH,
):
    """The weighted sum that a specification describes.

    Args:
        spec: see `parse_spec`, whose InputError it raises.
        num_classes, feature_dim: of the model, for the centers.
        label_smoothing: see CrossEntropyLoss.
        margin: of triplet, semihard_triplet and multi_similarity (softmax_triplet keeps its own soft label of 0).
        cosine_margin, scale: of circle and the losses on cosines; None: each one's own.
        mask_kind, mask_threshold: see GaussianMaskRegressionLoss.
        gather: None, or a function tensor -> the tensors of all processes concatenated along dimension 0, whose
            backward adds up the gradients of all processes. Then the metric losses see the global batch, and the
            threshold of the mask loss counts the global batch's pixels. Every process must call the loss, since this
            is a collective.
        logit_names, feature_names: names of the branches, in the order of the output's `logits` and `features`.

    Returns:
        LossSum.
    """
    given = {name: value for name, value in (("margin", cosine_margin), ("scale", scale)) if value is not None}

    def centers():
        each = [CenterLoss(num_classes, feature_dim) for _ in feature_names]
        return each[0] if len(each) == 1 else nn.ModuleList(each)

    builders = {
        "cross_entropy": lambda: CrossEntropyLoss(label_smoothing),
        "focal": FocalLoss,
        "arcface": lambda: ArcFaceLoss(**given),
        "cosface": lambda: CosFaceLoss(**given),
        "circle_softmax": lambda: CircleSoftmaxLoss(**given),
        "triplet": lambda: TripletLoss(margin),
        "softmax_triplet": SoftmaxTripletLoss,
        "semihard_triplet": lambda: SemihardTripletLoss(margin),
        "multi_similarity": lambda: MultiSimilarityLoss(margin),
        "circle": lambda: CircleLoss(**given),
        "ranked_list": RankedListLoss,
        "center": centers,
        "gaussian_mask": lambda: GaussianMaskRegressionLoss(mask_kind, mask_threshold, gather),
        "focal_mask": FocalMaskLoss,
        "combined_mask": lambda: CombinedMaskLoss(mask_kind),
    }
    weights = {name: weight for weight, name in parse_spec(spec)}
    losses = {name: builders[name]() for name in weights}
    return LossSum(weights, losses, gather, logit_names, feature_names)


class LossSum(nn.Module):
    """Named, weighted losses over one model output. The dict that it returns is what is minimised and what is logged.

    Losses on logits and on features are summed over the branches of the output, as in LightMBN. The centers of
    CenterLoss, a set for each branch, are parameters of this module, not of the model.

    The value of every process, averaged over the processes as DDP averages gradients, is the value of the global
    batch: for cross entropy and the plain mask losses because their means are over equal shares, for the others if
    `gather` is given.
    """

    def __init__(self, weights, losses, gather=None, logit_names=ONE_BRANCH, feature_names=ONE_BRANCH):
        super().__init__()
        self.weights = weights
        self.losses = nn.ModuleDict(losses)
        self.gather = gather
        self.logit_names, self.feature_names = logit_names, feature_names

    @property
    def parameter_scale(self):
        """The weight that this module's parameters (the centers) see in their gradient; 1 where there are none.

        Divided by it, the gradient moves the centers at a pace that does not depend on their weight (Luo et al. 2019).
        """
        return self.weights.get("center") or 1.0

    def forward(self, output, labels, target_masks=None):
        """The weighted parts.

        Args:
            output: ReIDOutput, of which features [(B, D)], logits [(B, C)] and mask (B, 1, h, w) are read as needed;
                logits are cosines where the specification asks for them.
            labels: (B,) integers 0..C-1.
            target_masks: (B, 1, h, w) in [0, 1] where a mask loss is in the sum.

        Returns:
            dict name -> weighted scalar, in the order of the specification; the caller adds them up. Of several
            branches each has an entry: "triplet/global", "triplet/part".
        """
        features, feature_labels = output.features, labels
        if self.gather is not None and any(name in METRIC_LOSSES for name in self.weights):
            features = [self.gather(at_least_float32(feature)) for feature in features]  # [(W * B, D)]
            feature_labels = self.gather(labels)  # (W * B,)
        parts = {}
        for name, weight in self.weights.items():
            loss = self.losses[name]
            if name in MASK_LOSSES:
                parts[name] = weight * self._mask_loss(loss, name, output.mask, target_masks)
                continue
            branches, inputs, targets = self.logit_names, output.logits, labels
            if name in METRIC_LOSSES:
                branches, inputs, targets = self.feature_names, features, feature_labels
            each = loss if isinstance(loss, nn.ModuleList) else [loss] * len(branches)
            for branch, one, entry in zip(branches, each, inputs, strict=True):
                key = name if len(branches) == 1 else f"{name}/{branch}"
                parts[key] = weight * one(entry, targets)
        return parts

    @staticmethod
    def _mask_loss(loss, name, mask, target_masks):
        if mask is None or target_masks is None:
            missing = "predicted mask" if mask is None else "target masks"
            raise ValueError(f"{name} has no {missing}: build the model and the data set with masks (see needs_mask)")
        return loss(mask, target_masks)
