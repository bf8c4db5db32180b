"""How far two sets of pictures are apart, in the features of a network."""

import torch


def frechet_distance(first, second):
    """Squared Frechet distance between Gaussians with the means and covariances of two sets of features.

    |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)), as Heusel et al. 2017 use it (equation 6): 0 where both sets
    have the same mean and covariance, in units of a squared feature. Few pictures overestimate it, so compare only sets
    of about the same size.

    Args:
        first, second: (N, D), (M, D) of at least 2 rows.

    Returns:
        float. Computed in float64 on the CPU; memory is that of the features and of D x D numbers.
    """
    first, second = first.double().cpu(), second.double().cpu()
    difference = first.mean(dim=0) - second.mean(dim=0)  # (D,)
    # R^T R is a covariance; the trace of the root of their product is the sum of the singular values of R_1 R_2^T.
    roots = [_covariance_root(features) for features in (first, second)]  # (at most D, D)
    common = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return float(difference.square().sum() + sum(root.square().sum() for root in roots) - 2 * common)


def _covariance_root(features):
    centered = (features - features.mean(dim=0)) / (len(features) - 1) ** 0.5
    return torch.linalg.qr(centered, mode="r").R
