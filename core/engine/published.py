"""What another project wrote, as if it were a checkpoint of ours: for `evaluate.py`, `demo.py` and as a teacher."""

import re

from core.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from core.engine.checkpoint import check_checkpoint
from core.errors import InputError
from core.models.published_keys import own_names
from core.models.reid import MODELS, build_reid_model
from core.models.weights import COUNTER, Unfilled, copy_matching, described, find_state_dict, load_file

# What embeddings do without: counters, classifiers (torchvision's is fc), OpenUnReID's mask decoder, fast-reid's
# normalisation; and what `own_names` gave to parts that there aren't.
NOT_EMBEDDING = re.compile(
    rf"{COUNTER}$|classifier|mask|^heads\.part_|(?:^|\.)(?:fc\.(?:weight|bias)|pixel_mean|pixel_std)$"
)
MOST_PARTS = 12  # stripes that are looked for in a file


def load_state(path, *kinds, backbone=None, model="bot", prefix="--"):
    """The checkpoint at `path`; or, where it is another project's file and its `backbone` is told, one made of it.

    prefix: of the script's options `backbone` and `model`, for messages.
    Raises InputError for a file of another kind, and as `published_state`.
    """
    content = load_file(path)
    is_ours = isinstance(content, dict) and "kind" in content
    if is_ours and backbone:
        raise InputError(f"{path} is a checkpoint of Carousel, which knows its network: leave the backbone out")
    if is_ours:
        return check_checkpoint(content, path, *kinds)
    if not backbone:
        raise InputError(
            f"{path} is not a checkpoint of Carousel (no kind in it); for another project's weights of ReID give "
            f"{prefix}backbone, the network that they are of"
        )
    return published_state(path, content, backbone, model, prefix)


def published_state(path, content, backbone, model="bot", prefix="--"):
    """A state as ReID checkpoints hold it, of a published file: its network is what the file has tensors for.

    That is the neck, GeM's exponent, the size of a reduction, and the number of parts; pooling is average where the
    file can't tell. Pictures are ImageNet-normalised, 256x128, of networks of several branches 384x128.

    Args:
        content: what `load_file` made of `path`.
        backbone, model: see `build_reid_model`. prefix: as in `load_state`.

    Raises:
        InputError: the file is of another network (the nearest is named), or lacks a tensor that embeddings need.
    """
    options = {"backbone": backbone, "num_classes": 0, "model": model}
    with_classes = {**options, "num_classes": 1}  # a classifier says which part it is of
    whole = {"pooling": "gem"} if model == "bot" else {"parts": MOST_PARTS if model in ("pcb", "pyramid") else 0}
    with Unfilled():
        own = {
            *build_reid_model(**with_classes, neck="bnneck", **whole).state_dict(),
            "reduction.weight",
            "reduction.bias",
        }
        own |= {*build_reid_model(**with_classes, neck="none", **whole).state_dict()}
    state = find_state_dict(content, path)
    named = own_names(state, own)
    options["neck"] = "bnneck" if any(key.endswith("neck.running_mean") for key in named) else "none"
    if "pooling.p" in named:
        options["pooling"] = "gem"
    sizes = [len(tensor) for key, tensor in named.items() if re.search(r"reduction\.(0\.)?weight$", key)]
    options["embedding_dim"] = sizes[0] if sizes else 0
    if model in ("pcb", "pyramid"):
        heads = [key for key in named if key.startswith("heads.part_")]
        # torchreid's parts share one reduction, which `own_names` gives to as many heads as there are.
        heads = [key for key in heads if ".classifier." in key] or heads
        numbers = [int(key.split(".")[1].split("_")[-1]) for key in heads]
        options["parts"] = max(numbers, default=0)
    if {"base.conv1.weight", "bottleneck.weight"} <= {key.removeprefix("module.") for key in state}:
        options["stem_relu"] = False  # reid-strong-baseline
    network = build_reid_model(**options)
    report = copy_matching(network, content, described(content, path))
    needed = {key: value.numel() for key, value in network.state_dict().items() if not key.endswith(COUNTER)}
    if lacking := sorted(key for key, size in needed.items() if key not in named or named[key].numel() != size):
        raise InputError(
            f"{path} has no {lacking[0]} of that size, which {model} on {backbone} needs (and {len(lacking) - 1} "
            f"more): it is of another network; {prefix}model is one of {', '.join(MODELS)}"
        )
    if others := sorted(key for key in named if key not in needed and not NOT_EMBEDDING.search(key)):
        raise InputError(
            f"{path} also has {others[0]} (and {len(others) - 1} more), for which {model} on {backbone} has no place, "
            "so its embeddings would be others: it is of another network; what training alone needs, leave out"
        )
    return {
        "kind": "reid", "model": network.state_dict(), "ema": [], "network": options, "epoch": 0, "best": 0.0,
        "input_size": [256 if model == "bot" else 384, 128],
        "normalisation": {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)},
        "identities": [], "distance": "cosine", "args": dict.fromkeys(("dataset", "data", "protocol")),
        "message": report.message,
    }  # fmt: skip
