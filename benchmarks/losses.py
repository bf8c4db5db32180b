"""Losses, forward and backward, beside a plain reference: `python -m benchmarks.losses`.

The references are the widespread way of writing them: the triplet loss keeps the whole distance matrix in the graph,
the mask loss indexes its pixels, Gaussian masks are made one picture after the other. Both run by turns in the same
process; a ratio below 1 means that ours is faster.
"""

import argparse
import time

import torch
from torch.nn import functional as F

from core.losses.mask import GaussianMaskRegressionLoss, gaussian_masks
from core.losses.metric import TripletLoss


def reference_triplet(embeddings, labels, margin=0.3):
    """Batch-hard triplet loss over the whole distance matrix."""
    squares = embeddings.square().sum(dim=1, keepdim=True)
    distance = (squares + squares.T - 2 * embeddings @ embeddings.T).clamp(min=1e-12).sqrt()  # (B, B)
    same = labels[:, None] == labels[None, :]
    to_positive = distance.masked_fill(~same, float("-inf")).amax(dim=1)
    to_negative = distance.masked_fill(same, float("inf")).amin(dim=1)
    return F.relu(to_positive - to_negative + margin).mean()


def reference_mask_regression(prediction, target, threshold=0.1):
    """Mean squared error over the pixels above the threshold, picked by a boolean index."""
    counts = target >= threshold
    return F.mse_loss(prediction[counts], target[counts]) if counts.any() else F.mse_loss(prediction, target)


def reference_gaussian_masks(boxes, size, sigma_ratio=0.1):
    """Gaussians on a grid of coordinates, one box at a time."""
    rows, columns = torch.meshgrid(*[torch.linspace(0, 1, n, device=boxes.device) for n in size], indexing="ij")
    masks = []
    for x1, y1, x2, y2 in boxes:
        across = (columns - (x1 + x2) / 2) / ((x2 - x1) * sigma_ratio)
        down = (rows - (y1 + y2) / 2) / ((y2 - y1) * sigma_ratio)
        masks.append(torch.exp(-0.5 * (across.square() + down.square())))
    return torch.stack(masks)[:, None]


def best_seconds(functions, device, repetitions):
    """The shortest time of each function; they take turns, so that what else the machine does hits them alike."""
    best = [float("inf")] * len(functions)
    for _ in range(repetitions):
        for index, function in enumerate(functions):
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best[index] = min(best[index], time.perf_counter() - start)
    return best


def main(args):
    device = torch.device(args.device)
    torch.manual_seed(0)
    embeddings = torch.randn(64, 2048, device=device, requires_grad=True)
    labels = torch.arange(16, device=device).repeat_interleave(4)
    corners = torch.rand(32, 2, 2, device=device).sort(dim=1).values
    boxes = corners.flatten(1) * 0.8 + torch.tensor([0, 0, 0.2, 0.2], device=device)
    prediction = torch.rand(32, 1, 256, 256, device=device, requires_grad=True)
    target = gaussian_masks(boxes, (256, 256), 0.3)
    triplet, regression = TripletLoss(0.3), GaussianMaskRegressionLoss("mse", 0.1)
    cases = {
        "triplet, 64 x 2048, forward + backward": (
            lambda: torch.autograd.grad(triplet(embeddings, labels), embeddings)[0],
            lambda: torch.autograd.grad(reference_triplet(embeddings, labels), embeddings)[0],
        ),
        "mask mse over 0.1, 32 x 256 x 256, forward + backward": (
            lambda: torch.autograd.grad(regression(prediction, target), prediction)[0],
            lambda: torch.autograd.grad(reference_mask_regression(prediction, target), prediction)[0],
        ),
        "gaussian masks, 32 x 256 x 256": (
            lambda: gaussian_masks(boxes, (256, 256), 0.1),
            lambda: reference_gaussian_masks(boxes, (256, 256)),
        ),
    }
    for name, (ours, reference) in cases.items():
        torch.testing.assert_close(ours(), reference(), rtol=1e-4, atol=1e-6)
        own, other = best_seconds([ours, reference], device, args.repetitions)
        print(f"{name}: {own * 1e3:.2f} ms, reference {other * 1e3:.2f} ms, ratio {own / other:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps (default: cpu)")
    parser.add_argument("--repetitions", type=int, default=50, help="runs of which the fastest counts (default: 50)")
    main(parser.parse_args())
