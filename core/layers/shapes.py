"""The shapes that an operator asks for, checked where a caller comes in; the size that a detector asks for."""

import math

from torch import Tensor


def fitted_size(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """(h, w) of a picture whose shorter side becomes min_size, or less where the longer would exceed max_size."""
    scale = min(min_size / min(height, width), max_size / max(height, width))
    return max(math.floor(height * scale), 1), max(math.floor(width * scale), 1)


def check_shapes(**tensors: tuple[Tensor, ...]) -> None:
    """Raise ValueError for the first tensor that has another shape than the one beside it: boxes=(boxes, "N", 4).

    A letter is any size, the same in all of them; ... in front is any number of sizes. No value is looked at, so a GPU
    is not waited for.
    """
    known = {}
    for name, (tensor, *sides) in tensors.items():
        shape, sizes = tuple(tensor.shape), dict(known)
        expected, compared = (sides[1:], shape[1 - len(sides) :]) if sides[:1] == [...] else (sides, shape)
        if len(compared) != len(expected) or any(
            size != (sizes.setdefault(side, size) if isinstance(side, str) else side)
            for size, side in zip(compared, expected, strict=True)
        ):
            wanted = ", ".join("..." if side is ... else str(known.get(side, side)) for side in sides)
            has = "have" if name.endswith("s") else "has"
            raise ValueError(f"{name} {has} shape {shape}, expected ({wanted}{',' * (len(sides) == 1)})")
        known = sizes
