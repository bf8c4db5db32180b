"""How well pseudo labels agree with true ones: for judging a clustering, never for making one."""

# What `agreement` tells, as columns of a log.
AGREEMENT_NAMES = ("purity", "NMI", "ARI")


def agreement(labels, truth):
    """dict of `AGREEMENT_NAMES`, each 1 where two labellings of N pictures are the same one but for their numbers.

    purity: share of the pictures that have the commonest true label of their cluster. NMI: mutual information over the
    mean of the two entropies. ARI: the Rand index, adjusted for chance (Hubert and Arabie 1985), 0 for random labels.

    Args:
        labels, truth: (N,) integers; any numbers.
    """
    (_, label), (_, true) = (values.unique(return_inverse=True) for values in (labels, truth))
    both, count = (label * len(truth) + true).unique(return_counts=True)  # cells of the table that are not empty
    cluster, shared = both // len(truth), count.double()
    largest = shared.new_zeros(len(labels)).scatter_reduce(0, cluster, shared, "amax")
    sizes, true_sizes = label.bincount().double(), true.bincount().double()
    entropies = [_entropy(part) for part in (sizes, true_sizes, shared)]
    mean = (entropies[0] + entropies[1]) / 2
    nmi = (entropies[0] + entropies[1] - entropies[2]) / mean if mean > 0 else 1.0
    agreeing, pairs, true_pairs = (float((part * (part - 1) / 2).sum()) for part in (shared, sizes, true_sizes))
    by_chance = pairs * true_pairs / max(len(labels) * (len(labels) - 1) / 2, 1)
    best = (pairs + true_pairs) / 2
    ari = (agreeing - by_chance) / (best - by_chance) if best > by_chance else 1.0
    return dict(zip(AGREEMENT_NAMES, (float(largest.sum()) / max(len(labels), 1), nmi, ari), strict=True))


def _entropy(counts):
    share = counts / counts.sum()
    return float(-(share * share.log()).sum())
