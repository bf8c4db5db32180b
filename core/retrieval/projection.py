"""Features on a plane: principal components, by subspace iteration."""

import torch

from core.errors import InputError
from core.retrieval.distance import as_features, row_chunks

OVERSAMPLING = 24  # directions followed beside the wanted ones: the gap behind them decides how fast these settle
MOST_ROUNDS = 100
SETTLED = 1e-7  # change of the variances in a round, as a part of the total
NOTHING = 1e-20  # a variance below this part of the squared mean is the rounding of the mean


@torch.no_grad()
def principal_components(features, k=2):
    """The k directions in which features vary most, and where each feature lies along them.

    Subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4), in float64 on the CPU: the rows are read in
    chunks once a round, and neither a D x D nor an N x N matrix is built. The trap of all such plots: two points may
    be near on it and far from each other; `explained` says how much of the whole is seen.

    Args:
        features: (N, D); N = 0 is allowed.
        k: directions; those beyond min(N, D), or beyond what varies, have coordinates 0.

    Returns:
        coordinates (N, k) float32 around their mean, the direction of the largest variance first, and explained (k,)
        float64: the share of the total variance along each. The same features give the same answer; of the two signs
        of a direction the one counts that makes its largest component positive.

    Raises:
        InputError: not (N, D), or not finite.
    """
    features = as_features(features, "the").cpu()
    count, dim = features.shape
    coordinates, explained = torch.zeros(count, k), torch.zeros(k, dtype=torch.float64)
    if not count:
        return coordinates, explained
    centre = sum(features[rows].double().sum(0) for rows in row_chunks(count, dim)) / count  # (D,)
    total = sum((features[rows].double() - centre).square().sum() for rows in row_chunks(count, dim))
    if not torch.isfinite(total):
        raise InputError("the features are not finite, or too large to be squared: check that training was stable")
    if total <= NOTHING * count * centre.square().sum():
        return coordinates, explained
    directions, variances = _leading_directions(features, centre, total, k)  # (D, j), (j,)
    found = int((variances > 1e-12 * total).sum())
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))  # (1, j)
    directions = directions * largest.sign()
    for rows in row_chunks(count, dim):
        coordinates[rows, :found] = ((features[rows].double() - centre) @ directions[:, :found]).float()
    explained[:found] = variances[:found] / total
    return coordinates, explained


def _leading_directions(features, centre, total, k):
    """The min(k, N, D) directions (D, j) of largest variance, and the sums of squares (j,) along them."""
    count, dim = features.shape
    width = min(k + OVERSAMPLING, count, dim)
    start = torch.randn(dim, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    directions, before = torch.linalg.qr(start).Q, torch.zeros(width, dtype=torch.float64)
    for _ in range(MOST_ROUNDS):
        product = torch.zeros_like(directions)  # scatter matrix (D, D) times directions (D, width)
        for rows in row_chunks(count, dim):
            centred = features[rows].double() - centre  # (n, D)
            product += centred.T @ (centred @ directions)
        # Rayleigh-Ritz: the eigenvectors within the subspace, largest first, then one step of the power method.
        variances, turn = torch.linalg.eigh(directions.T @ product)
        variances, turn = variances.flip(0), turn.flip(1)
        found = directions @ turn
        if ((variances - before)[:k].abs() < SETTLED * total).all():
            break
        before, directions = variances, torch.linalg.qr(product @ turn).Q
    return found[:, :k], variances[:k]
