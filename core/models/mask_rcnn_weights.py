"""Weights for Mask R-CNN to start from."""

import re

from torch import Tensor

# torchvision's names of 2019 and today's; each part may have something in front.
OLD_NAMES = (
    (re.compile(r"(rpn\.head\.conv)\.(weight|bias)$"), r"\1.0.0.\2"),
    (re.compile(r"(fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$"), r"\1.0.\2"),
    (re.compile(r"mask_head\.mask_fcn([1-4])\.(weight|bias)$"), lambda m: f"mask_head.{int(m[1]) - 1}.0.{m[2]}"),
)


def rename_old_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict with the names of torchvision's file of 2019 -> the same with today's; others stay as they are."""
    renamed = {}
    for key, value in state.items():
        for pattern, name in OLD_NAMES:
            key = pattern.sub(name, key)
        renamed[key] = value
    return renamed
