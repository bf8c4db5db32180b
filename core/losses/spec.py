"""A loss from its specification: "1*cross_entropy+1*softmax_triplet+0.05*gaussian_mask" -> one module."""

import math

import torch
from torch import nn

from core.errors import InputError
from core.losses.identity import CrossEntropyLoss
from core.losses.mask import CombinedMaskLoss, FocalMaskLoss, GaussianMaskRegressionLoss
from core.losses.metric import CenterLoss, SoftmaxTripletLoss, TripletLoss
from core.losses.precision import at_least_float32

IDENTITY_LOSSES = ("cross_entropy",)  # on logits
METRIC_LOSSES = ("triplet", "softmax_triplet", "center")  # on features
PAIR_LOSSES = ("triplet", "softmax_triplet")  # of two pictures of one identity, and one of another
MASK_LOSSES = ("gaussian_mask", "focal_mask", "combined_mask")  # on the predicted mask
KNOWN_LOSSES = IDENTITY_LOSSES + METRIC_LOSSES + MASK_LOSSES


def parse_spec(spec):
    """Read "1*cross_entropy+0.05*gaussian_mask" -> [(1.0, "cross_entropy"), (0.05, "gaussian_mask")].

    A name alone has weight 1. Raises InputError for an unknown name, a name given twice, and a weight that is no
    number, negative or not finite.
    """
    terms = []
    for term in spec.split("+"):
        weight, star, name = term.rpartition("*")
        weight, name = _parse_weight(weight, spec) if star else 1.0, name.strip()
        if name not in KNOWN_LOSSES:
            what = f"unknown loss {name!r}" if name else "a loss name is missing"
            raise InputError(
                f"{what} in the loss {spec!r}: write WEIGHT*NAME+..., with names of {', '.join(KNOWN_LOSSES)}"
            )
        if name in (known for _, known in terms):
            raise InputError(f"{name} stands twice in the loss {spec!r}: add up its weights")
        terms.append((weight, name))
    return terms


def _parse_weight(text, spec):
    try:
        weight = float(text)
    except ValueError:
        raise InputError(f"{text.strip()!r} is no weight in the loss {spec!r}: write for example 0.5*triplet") from None
    if not 0 <= weight < math.inf:
        raise InputError(f"weight {text.strip()} in the loss {spec!r}: give a finite number from 0 up")
    return weight


def needs_mask(spec):
    """Does this specification ask for a predicted mask (and so for a decoder and for mask targets)?"""
    return any(name in MASK_LOSSES for _, name in parse_spec(spec))


def needs_logits(spec):
    """Does this specification ask for class scores (and so for a classifier)?"""
    return any(name in IDENTITY_LOSSES for _, name in parse_spec(spec))


def needs_pairs(spec):
    """Is a part of it 0 for ever where batches have one picture of each identity, or one identity? A weight of 0 asks
    for nothing."""
    return any(name in PAIR_LOSSES and weight for weight, name in parse_spec(spec))


def build_loss(
    spec,
    num_classes,
    feature_dim,
    *,
    label_smoothing=0.0,
    margin=0.3,
    mask_kind="mse",
    mask_threshold=0.0,
    gather=None,
):
    """The weighted sum that a specification describes.

    Args:
        spec: see `parse_spec`, whose InputError it raises.
        num_classes, feature_dim: of the model, for the centers.
        label_smoothing, margin: see CrossEntropyLoss, TripletLoss (softmax_triplet keeps its own soft label of 0).
        mask_kind, mask_threshold: see GaussianMaskRegressionLoss.
        gather: None, or a function tensor -> the tensors of all processes concatenated along dimension 0, whose
            backward adds up the gradients of all processes. Then the metric losses see the global batch, and the
            threshold of the mask loss counts the global batch's pixels. Every process must call the loss, since this
            is a collective.

    Returns:
        LossSum.
    """
    builders = {
        "cross_entropy": lambda: CrossEntropyLoss(label_smoothing),
        "triplet": lambda: TripletLoss(margin),
        "softmax_triplet": SoftmaxTripletLoss,
        "center": lambda: CenterLoss(num_classes, feature_dim),
        "gaussian_mask": lambda: GaussianMaskRegressionLoss(mask_kind, mask_threshold, gather),
        "focal_mask": FocalMaskLoss,
        "combined_mask": lambda: CombinedMaskLoss(mask_kind),
    }
    weights = {name: weight for weight, name in parse_spec(spec)}
    return LossSum(weights, {name: builders[name]() for name in weights}, gather)


class LossSum(nn.Module):
    """Named, weighted losses over one model output. The dict that it returns is what is minimised and what is logged.

    Losses on logits and on features are averaged over the branches of the output. The centers of CenterLoss are
    parameters of this module, not of the model.

    The value of every process, averaged over the processes as DDP averages gradients, is the value of the global
    batch: for cross entropy and the plain mask losses because their means are over equal shares, for the others if
    `gather` is given.
    """

    def __init__(self, weights, losses, gather=None):
        super().__init__()
        self.weights = weights
        self.losses = nn.ModuleDict(losses)
        self.gather = gather

    @property
    def parameter_scale(self):
        """The weight that this module's parameters (the centers) see in their gradient; 1 where there are none.

        Divided by it, the gradient moves the centers at a pace that does not depend on their weight (Luo et al. 2019).
        """
        return self.weights.get("center") or 1.0

    def forward(self, output, labels, target_masks=None):
        """The weighted parts.

        Args:
            output: ReIDOutput, of which features [(B, D)], logits [(B, C)] and mask (B, 1, h, w) are read as needed.
            labels: (B,) integers 0..C-1.
            target_masks: (B, 1, h, w) in [0, 1] where a mask loss is in the sum.

        Returns:
            dict name -> weighted scalar, in the order of the specification; the caller adds them up.
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
            elif name in METRIC_LOSSES:
                parts[name] = weight * torch.stack([loss(feature, feature_labels) for feature in features]).mean()
            else:
                parts[name] = weight * torch.stack([loss(logits, labels) for logits in output.logits]).mean()
        return parts

    @staticmethod
    def _mask_loss(loss, name, mask, target_masks):
        if mask is None or target_masks is None:
            missing = "predicted mask" if mask is None else "target masks"
            raise ValueError(f"{name} has no {missing}: build the model and the data set with masks (see needs_mask)")
        return loss(mask, target_masks)
