"""The names that other projects give to the parts of our networks, for `core.models.weights`.

torchvision, IBN-Net, torchreid, reid-strong-baseline, fast-reid, OpenUnReID and LightMBN.
"""

import re
from collections.abc import Collection

from torch import Tensor

# What stands before a name: wrappers of training loops, and the attribute that holds the backbone.
PREFIX = re.compile(r"(?:module|_orig_mod|model|net|network|backbone|backone|base|student)\.")
BODY = re.compile(r"(?:backbone|trunk|branches\.\w+\.deep)\.")  # before a backbone's own names in our networks

# Places in the nn.Sequential that LightMBN cuts out of a backbone.
STEM = {"resnet": ("conv1", "bn1", "", "", "layer1", "layer2", "layer3.0"), "osnet": ("conv1", "", "conv2", "conv3.0")}
DEEP = {"resnet": ("layer3", "layer4"), "osnet": ("conv3", "conv4", "conv5")}
LMBN_HEADS = {"0": "global", "1": "part", "2": "part_1", "3": "part_2", "4": "drop", "drop": "drop"}
MGN_HEADS = ("p1", "p2", "p3", "p2_1", "p2_2", "p3_1", "p3_2", "p3_3")
BN_NECK = {"bn": "neck", "classifier": "classifier", "reduction": "reduction"}


def _deep(kind, branch, place, rest):
    if kind == "resnet" and place == "0":  # counted anew there, from the second block of layer3
        block, _, rest = rest.partition(".")
        rest = f"{int(block) + 1}.{rest}"
    return [f"branches.{branch}.deep.{DEEP[kind][int(place)]}.{rest}"]


# (pattern of a whole name, function of the kind of backbone and the groups -> our names for it)
RULES = [
    # One branch.
    (r"(?:heads?\.)?(?:bottleneck|bnneck|feat_bn)(?:\.0)?\.(\w+)", lambda kind, name: [f"neck.{name}"]),
    (r"head\.feat_reduction\.(\w+)", lambda kind, name: [f"reduction.{name}"]),
    (r"fc\.([01])\.(\w+)", lambda kind, place, name: [f"reduction.{place}.{name}"]),
    (r"heads\.(?:classifier\.)?weight", lambda kind: ["classifier.weight"]),
    (r"classifier\.(bn|classifier)\.(\w+)", lambda kind, part, name: [f"{BN_NECK[part]}.{name}"]),
    (r"(?:global_pooling|heads\.pool_layer)\.p", lambda kind: ["pooling.p"]),
    # LightMBN.
    (r"(\d)\.(.+)", lambda kind, place, rest: [f"{STEM[kind][int(place)]}.{rest}"]),
    (
        r"(global|part|channel)(?:ial)?_branch\.(\d)\.(.+)",
        lambda kind, branch, place, rest: _deep(kind, branch, place, rest),
    ),
    (r"batch_drop_block\.drop_batch_bottleneck\.(.+)", lambda kind, rest: [f"branches.global.bottleneck.{rest}"]),
    (r"shared\.(\d\.\w+)", lambda kind, rest: [f"heads.channel_{half}.reduction.{rest}" for half in (1, 2)]),
    (
        r"reduction_ch_(\d)\.(\w+)\.(\w+)",
        lambda kind, half, part, name: [f"heads.channel_{int(half) + 1}.{BN_NECK[part]}.{name}"],
    ),
    (
        r"reduction_(\d|drop)\.([a-z]+)\.(\w+)",
        lambda kind, place, part, name: [f"heads.{LMBN_HEADS[place]}.{BN_NECK[part]}.{name}"],
    ),
    # MGN.
    (r"(p[123])\.(\d)\.(.+)", lambda kind, branch, place, rest: _deep(kind, branch, place, rest)),
    (r"reduction_(\d)\.(\d\.\w+)", lambda kind, place, rest: [f"heads.{MGN_HEADS[int(place)]}.reduction.{rest}"]),
    (r"fc_id_2048_(\d)\.(\w+)", lambda kind, place, name: [f"heads.{MGN_HEADS[int(place)]}.classifier.{name}"]),
    (
        r"fc_id_256_([12])_(\d)\.(\w+)",
        lambda kind, branch, place, name: [f"heads.p{int(branch) + 1}_{int(place) + 1}.classifier.{name}"],
    ),
    # PCB of LightMBN, then of torchreid.
    (
        r"classifier(\d)\.(\w+)\.(\w+)",
        lambda kind, place, part, name: [f"heads.part_{int(place) + 1}.{BN_NECK[part]}.{name}"],
    ),
    (r"global_branch\.([a-z]+)\.(\w+)", lambda kind, part, name: [f"heads.part.{BN_NECK[part]}.{name}"]),
    (r"conv5\.layers\.(\d\.\w+)", lambda kind, rest: [f"heads.part_{part}.reduction.{rest}" for part in range(1, 13)]),
    (r"classifier\.(\d)\.(\w+)", lambda kind, place, name: [f"heads.part_{int(place) + 1}.classifier.{name}"]),
]
RULES = [(re.compile(pattern), rule) for pattern, rule in RULES]


def bare(key: str) -> str:
    """The name without what loops and projects put before it."""
    while prefix := PREFIX.match(key):
        key = key[prefix.end() :]
    return key


def own_names(state: dict[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """The tensors of another project's file under the names of our network.

    A backbone's tensor goes to each copy of it, that of a shared layer to each head; what has no name in the network
    keeps its own.

    Args:
        own: the keys of the network's state_dict.
    """
    kind = "osnet" if any(".conv2.0.conv1." in key or key.startswith("conv2.0.conv1.") for key in own) else "resnet"
    places = {}  # a backbone's name for a tensor -> the names that its copies have
    for key in own:
        if BODY.match(key):
            places.setdefault(BODY.sub("", key, count=1), []).append(key)
    renamed = {}
    for key, tensor in state.items():
        plain = bare(key)
        try:
            names = next((rule(kind, *m.groups()) for pattern, rule in RULES if (m := pattern.fullmatch(plain))), [])
        except (LookupError, ValueError):  # it looks like one of theirs, and names a place that there isn't
            names = []
        meant = [found for name in (*names, plain) for found in places.get(name, [name])]
        renamed |= dict.fromkeys([name for name in meant if name in own] or [key], tensor)
    return renamed
