"""Losses, forward and backward, beside a plain reference, in one process and taking turns: medians and their ratio.

    python -m benchmarks.losses

The references are the widespread way of writing them: the triplet loss keeps the whole distance matrix in the graph,
the mask loss indexes its pixels, Gaussian masks are made one picture after the other. 1.00 means equally fast, less is
faster than the reference.
"""

import argparse

import torch
from torch.nn import functional as F

from benchmarks.turns import medians
from core.losses.mask import GaussianMaskRegressionLoss, gaussian_masks
from core.losses.metric import TripletLoss


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps (default: cpu)")
    parser.add_argument("--repetitions", type=int, default=50, help="measured calls of each (default: 50)")
    return parser


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


def main(args):
    device = args.device
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
        own, other = medians({"ours": ours, "reference": reference}, device, args.repetitions).values()
        print(f"{name}: {own * 1e3:.2f} ms, reference {other * 1e3:.2f} ms, ratio {own / other:.2f}")


if __name__ == "__main__":
    main(get_parser().parse_args())
