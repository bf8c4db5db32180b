"""Memories of unit features that embeddings are compared with, when there are no classes to classify.

    losses = {"memory": memory(embeddings, indexes)}
    step(losses, batch["path"])
    memory.update(distributed.all_gather_variable(embeddings), distributed.all_gather_variable(indexes))

What is remembered is a buffer: no gradient reaches it, and a checkpoint holds it. Where several processes train, each
updates with the embeddings of all, so that all remember the same.
"""

import torch
import torch.nn.functional as F
from torch import nn

from core.losses.precision import in_float32

EPS = 1e-6  # of SpCL's logarithm: a probability far below it has no gradient to speak of


class ClusterMemory(nn.Module):
    """One centroid for each cluster: cross entropy over cosine similarities / temperature.

    Source: Dai et al. 2021, "Cluster Contrast for Unsupervised Person Re-Identification", ClusterNCE.

    Args:
        centers: (C, D), what is remembered at first; unit vectors are made of them.
        temperature: above 0.
        momentum: m of the update, the part of the old feature that stays.

    Shape: embeddings (B, D), indexes (B,) of their clusters -> scalar; 0 for an empty batch.
    """

    def __init__(self, centers, temperature=0.05, momentum=0.1):
        super().__init__()
        self.temperature, self.momentum = temperature, momentum
        self.register_buffer("features", F.normalize(centers.detach().float()))  # (C, D)

    @in_float32
    def forward(self, embeddings, indexes):
        logits = F.normalize(embeddings) @ self.features.T / self.temperature  # (B, C)
        return F.cross_entropy(logits, indexes, reduction="sum") / max(len(indexes), 1)

    @torch.no_grad()
    def update(self, embeddings, indexes):
        """f <- m f + (1 - m) x, made a unit vector again, for each embedding x in order and the feature f it is of.

        To be called after the gradient was computed: embeddings (B, D), indexes (B,) as in `forward`.
        """
        unit = F.normalize(embeddings.float())
        # The n-th embedding of each feature, for all features at once.
        turns = (indexes[:, None] == indexes).tril(-1).sum(1)  # (B,)
        for turn in range(int(turns.max()) + 1 if len(turns) else 0):
            index, new = indexes[turns == turn], unit[turns == turn]
            mixed = self.momentum * self.features[index] + (1 - self.momentum) * new
            self.features[index] = F.normalize(mixed)


class HybridMemory(ClusterMemory):
    """Source class centroids, and the feature of every target picture; pictures with one label are one prototype.

    Ge et al. 2020 ("Self-paced Contrastive Learning with Hybrid Memory", equations 1, 3 and 4): an embedding is
    compared with the mean of the features of each label, be that a class, a cluster or a picture by itself.

    Args:
        features: (N, D), what is remembered at first; unit vectors are made of them.
        labels: (N,) of the features, from 0; a number without features is no label. `relabel` gives others.

    Shape: embeddings (B, D), indexes (B,) of the features that are of the same class or picture -> scalar.
    """

    def __init__(self, features, labels, temperature=0.05, momentum=0.2):
        super().__init__(features, temperature, momentum)
        self.register_buffer("labels", labels)

    def relabel(self, labels):
        self.labels.copy_(labels)

    @in_float32
    def forward(self, embeddings, indexes):
        sizes = self.labels.bincount()[:, None]  # (C, 1)
        sums = self.features.new_zeros(len(sizes), self.features.shape[1]).index_add_(0, self.labels, self.features)
        similarity = F.normalize(embeddings) @ (sums / sizes.clamp(min=1)).T / self.temperature  # (B, C)
        similarity = similarity.masked_fill(sizes.T == 0, -torch.inf)
        probability = similarity.softmax(1).gather(1, self.labels[indexes][:, None])  # (B, 1)
        return -(probability + EPS).log().sum() / max(len(indexes), 1)
