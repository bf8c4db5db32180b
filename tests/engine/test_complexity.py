"""What a network costs: counts by hand and as published, without classifiers; memory and speed are there."""

import pytest
import torch
from torch import nn

from core.engine import complexity as room
from core.engine.complexity import Complexity, complexity
from core.models.reid import build_reid_model

CPU = torch.device("cpu")


class Attention(nn.Module):
    """Two groups of channels, attention over the positions, a Linear layer; and a classifier that does not count."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3, groups=1, bias=True), nn.Linear(4, 5)
        self.grouped, self.classifier = nn.Conv2d(4, 4, 1, groups=2, bias=False), nn.Linear(5, 1000)

    def forward(self, x):
        x = self.grouped(self.conv(x)).flatten(2)  # (B, 4, 24)
        x = x @ (x.transpose(1, 2) @ x)  # (B, 24, 24), (B, 4, 24)
        x = self.linear(x.mean(2))
        return x if self.classifier is None else self.classifier(x)


def test_counts_by_hand():
    """Pictures of 6 x 8: 4 x 6 positions are left."""
    cost = complexity(Attention(), (6, 8), CPU, batch_size=2, repeats=1)
    assert cost.parameters == (4 * 27 + 4) + 4 * 2 + (20 + 5)
    assert cost.multiply_adds == 24 * 4 * 27 + 24 * 4 * 2 + 24 * 24 * 4 + 4 * 24 * 24 + 20
    assert cost.images_per_second > 0


def test_osnet_as_published():
    """torchreid's table: 2.2 million parameters, 978.9 million multiply-adds at 256x128."""
    network = build_reid_model("osnet_x1_0", 751)
    cost = complexity(network, (256, 128), CPU, batch_size=1, repeats=1)
    assert cost.multiply_adds == 978_875_392
    assert cost.parameters == sum(part.numel() for part in build_reid_model("osnet_x1_0", 0).parameters())
    assert network.classifier is not None and network.training  # as it was


@pytest.mark.skipif(not room.RESET.exists(), reason="peak memory is read from /proc")
def test_the_memory_of_a_batch_is_what_it_takes():
    """8 pictures become 32 MiB, and twice as many twice as much."""
    network = nn.Sequential(nn.Conv2d(3, 64, 1, bias=False))
    peaks = [complexity(network, (128, 128), CPU, batch_size=size, repeats=1).peak_memory for size in (8, 16)]
    assert peaks[0] >= 31 * 2**20 and peaks[1] >= 63 * 2**20


def test_where_memory_is_not_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(room, "RESET", tmp_path / "missing")
    cost = complexity(Attention(), (6, 8), CPU, batch_size=2, repeats=1)
    assert cost.peak_memory is None and "peak memory" not in str(cost)


def test_in_the_units_in_which_people_compare():
    cost = Complexity(11_180_000, 250_000_000, 2**20, 78.3)
    assert list(cost.columns().values()) == [11.18, 250.0, 1.0, 78.3]
    assert str(cost).startswith(
        "parameters (M) 11.18, multiply-adds (M) 250.00, peak memory (MiB) 1.00, images/s 78.30;"
    )
