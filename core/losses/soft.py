"""What a student learns from the soft labels of another network's mean teacher (MMT: Ge et al. 2020, "Mutual
Mean-Teaching"). No gradient reaches the teacher."""

from torch import nn
from torch.nn import functional as F

from core.losses.metric import distances_to, hardest_pairs, mean_of_complete
from core.losses.precision import in_float32


class SoftCrossEntropyLoss(nn.Module):
    """Cross entropy with the teacher's class probabilities (equation 7), the mean over the batch.

    Shape: logits (B, K), the teacher's logits (B, K) -> scalar; 0 for an empty batch.
    """

    @in_float32
    def forward(self, logits, teacher_logits):
        target = teacher_logits.detach().softmax(1)
        return F.cross_entropy(logits, target, reduction="sum") / max(len(logits), 1)


class SoftSoftmaxTripletLoss(nn.Module):
    """`SoftmaxTripletLoss` whose soft label is the teacher's own softmax of the two distances (equation 8).

    The pairs are mined on the student: its hardest positive and negative of each anchor, and the teacher's distances
    for those. As there the gradient flows to all three pictures; OpenUnReID's reaches the anchor alone.

    Shape: embeddings (B, D), the teacher's embeddings (B, E), labels (B,) -> scalar.
    """

    @in_float32
    def forward(self, embeddings, teacher_embeddings, labels):
        positive, negative, complete = hardest_pairs(embeddings, labels)
        violation = distances_to(embeddings, positive) - distances_to(embeddings, negative)  # (B,)
        teacher = teacher_embeddings.detach()
        soft = (distances_to(teacher, positive) - distances_to(teacher, negative)).sigmoid()  # (B,)
        return mean_of_complete(soft * F.softplus(-violation) + (1 - soft) * F.softplus(violation), complete)
