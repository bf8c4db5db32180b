"""Looks: what kinds of bags there are, and how one identity differs from those that look like it.

Identities come in groups: the members of a group share kind, size and colour (as black trolleys do in life), and differ
in pattern, second colour, handles, straps, pockets, stickers and wear.
"""

from typing import NamedTuple

import numpy as np

KINDS = {  # kind -> (category, surface material as MVB names it)
    "hard_shell": ("suitcase", "hard"),
    "soft_suitcase": ("suitcase", "soft"),
    "backpack": ("backpack", "soft"),
    "duffel": ("duffel", "soft"),
    "briefcase": ("briefcase", "soft"),
    "box": ("box", "others"),
}
GROUP_KINDS = (  # of the groups in turn, so that a small set too has many kinds and every large one the same shares
    *("hard_shell", "soft_suitcase", "backpack", "duffel", "box"),
    *("hard_shell", "soft_suitcase", "briefcase", "hard_shell", "backpack"),
)
CATEGORIES = ("suitcase", "backpack", "duffel", "briefcase", "box")
HARD_PATTERNS = (
    "ribs",
    "cross_ribs",
    "diamonds",
    "plain",
    "stripes",
    "dots",
    "camouflage",
    "slanted",
    "marble",
    "checks",
)
SOFT_PATTERNS = (
    "plain",
    "tartan",
    "bands",
    "dots",
    "camouflage",
    "chevrons",
    "two_tone",
    "checks",
    "stripes",
    "speckle",
)
BOX_PATTERNS = ("plain", "plain", "plain", "bands", "two_tone", "speckle")
BASES = [  # red, green, blue in [0, 1]: what bags are dyed
    *((0.10, 0.10, 0.11), (0.13, 0.17, 0.30), (0.32, 0.33, 0.36), (0.42, 0.08, 0.13), (0.72, 0.12, 0.12)),
    *((0.07, 0.36, 0.40), (0.16, 0.30, 0.18), (0.55, 0.42, 0.29), (0.68, 0.69, 0.71), (0.33, 0.18, 0.42)),
    *((0.80, 0.40, 0.12), (0.75, 0.40, 0.52), (0.18, 0.40, 0.68), (0.82, 0.76, 0.62), (0.36, 0.22, 0.14)),
]
CARDBOARD = [(0.66, 0.50, 0.33), (0.58, 0.43, 0.28), (0.80, 0.78, 0.72), (0.72, 0.58, 0.40)]
ACCENTS = [
    *((0.85, 0.16, 0.16), (0.95, 0.72, 0.10), (0.14, 0.42, 0.82), (0.15, 0.58, 0.32), (0.90, 0.90, 0.86)),
    *((0.93, 0.45, 0.10), (0.55, 0.25, 0.65), (0.20, 0.70, 0.76), (0.92, 0.48, 0.66), (0.55, 0.56, 0.58)),
]
METAL, RUBBER, STEEL = (0.46, 0.47, 0.50), (0.09, 0.09, 0.10), (0.80, 0.81, 0.83)


class Look(NamedTuple):
    """Everything that tells one identity from another."""

    kind: str
    half: np.ndarray  # (3,) metres
    base: np.ndarray  # main colour
    second: np.ndarray  # the pattern's other colour
    accent: np.ndarray  # straps, zips, trim
    dark: np.ndarray  # handles, wheels
    pattern: str
    period: float  # metres
    options: tuple[float, ...]  # eight numbers in [0, 1) that settle handles, pockets and straps
    wear: float


def design(group, member, group_rng, member_rng):
    """The look of member number `member` of group number `group`.

    group_rng must be fresh from the group's seed every time: it gives what the members share.
    """
    kind = GROUP_KINDS[group % len(GROUP_KINDS)]
    colors = CARDBOARD if kind == "box" else BASES
    base = np.array(colors[group_rng.integers(len(colors))])
    half = group_half(kind, group_rng)
    kind_patterns = {"hard_shell": HARD_PATTERNS, "box": BOX_PATTERNS}.get(kind, SOFT_PATTERNS)
    patterns = group_rng.permutation(kind_patterns)
    accents = group_rng.permutation(len(ACCENTS))
    accent = np.array(ACCENTS[accents[member % 3]])
    base = np.clip(base * member_rng.uniform(0.95, 1.05) + member_rng.normal(size=3) * 0.006, 0.03, 0.95)
    tone = base * 0.55 if base.mean() > 0.3 else base * 0.6 + 0.2
    return Look(
        kind=kind,
        half=half * member_rng.uniform(0.95, 1.05, 3),
        base=base,
        second=accent if member_rng.random() < 0.25 else tone,
        accent=accent,
        dark=np.array((RUBBER, (0.28, 0.28, 0.30), METAL, (0.30, 0.20, 0.13))[member_rng.integers(4)]),
        pattern=str(patterns[member % len(patterns)]),
        period=member_rng.uniform(0.035, 0.055),
        options=tuple(member_rng.random(8)),
        wear=member_rng.uniform(0.1, 1.0),
    )


def group_half(kind, rng):
    """Half sizes of a group's bags, (3,) metres: width, depth, height."""
    low, high = {
        "hard_shell": ((0.19, 0.11, 0.27), (0.25, 0.15, 0.37)),
        "soft_suitcase": ((0.18, 0.10, 0.25), (0.24, 0.14, 0.35)),
        "backpack": ((0.15, 0.09, 0.21), (0.18, 0.12, 0.28)),
        "duffel": ((0.24, 0.13, 0.13), (0.33, 0.16, 0.16)),
        "briefcase": ((0.19, 0.06, 0.14), (0.22, 0.08, 0.17)),
        "box": ((0.17, 0.13, 0.11), (0.27, 0.20, 0.20)),
    }[kind]
    return rng.uniform(low, high)
