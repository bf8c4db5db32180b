"""Weights to start from: published ImageNet files, or any file of weights a person has.

`load_weights` is what a script calls. It changes the model's tensors in place and returns a line for the log.
"""

import argparse
import hashlib
import http.client
import pickle
import re
import struct
import types
import urllib.error
import urllib.request
import uuid
import warnings
import zipfile
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from core.errors import InputError
from core.models.published_keys import BODY, bare, own_names
from core.models.reid import BACKBONES

# torchvision's IMAGENET1K_V1 weights and IBN-Net's releases; eight digits of the file's sha256 are part of its name.
PUBLISHED = {
    "resnet18": "https://download.pytorch.org/models/resnet18-f37072fd.pth",
    "resnet34": "https://download.pytorch.org/models/resnet34-b627a593.pth",
    "resnet50": "https://download.pytorch.org/models/resnet50-0676ba61.pth",
    "resnet101": "https://download.pytorch.org/models/resnet101-63fe2227.pth",
    "resnet152": "https://download.pytorch.org/models/resnet152-394f9c45.pth",
    "resnet50_ibn_a": "https://github.com/XingangPan/IBN-Net/releases/download/v1.0/resnet50_ibn_a-d9d0bb7b.pth",
    "resnet101_ibn_a": "https://github.com/XingangPan/IBN-Net/releases/download/v1.0/resnet101_ibn_a-59ea0ac6.pth",
}

SHA256_IN_NAME = re.compile(r"-(?=\d*[a-f])([0-9a-f]{8,64})\.pth$")  # its start, as torch.hub has it; no date
CONNECTION_TIMEOUT = 5.0  # seconds
CHUNK = 1 << 20  # bytes
MOST_NESTED = 4  # dicts in dicts, which may even hold themselves
COUNTER = "num_batches_tracked"
DOMAIN = re.compile(r"\.dsbn\.\d+\.")  # of DomainSpecificBatchNorm
# Keys under which files keep their weights.
WRAPPERS = ("model", "state_dict", "model_state_dict", "net", "network", "weights")
# Plain values that files of training loops hold beside their weights; none of them runs code when it is read.
PLAIN = [argparse.Namespace, types.SimpleNamespace, np.dtype]
PLAIN += [type(np.dtype(kind)) for kind in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "?")]
PLAIN += [(np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"), np.float64(0).__reduce__()[0]]
# A path of another system can't be made here, and where Python keeps the classes depends on its version.
PLAIN += [
    (PureWindowsPath if name == "WindowsPath" else PurePosixPath, f"{module}.{name}")
    for module in ("pathlib", "pathlib._local")
    for name in ("PosixPath", "WindowsPath", "PurePosixPath")
]

# What torch.load raises on damaged files, found by flipping, cutting and inventing bytes; it has no error of its own.
BROKEN_FILE = (
    pickle.UnpicklingError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
    zipfile.BadZipFile,
    NotImplementedError,
)


class DownloadError(Exception):
    """A published file can't be had; the message is one line and says why."""


class WeightsReport(NamedTuple):
    """message: one line for the log. loaded: number of tensors taken. warning: what was asked for wasn't to be had.
    detects: a Mask R-CNN that has all it needs to find the classes of the data."""

    message: str
    loaded: int = 0
    warning: bool = False
    detects: bool = False


def load_weights(model: nn.Module, source: str, backbone: str) -> WeightsReport:
    """Give `model` the weights it starts from, in place.

    Under DDP only rank 0 needs to call it: DDP sends rank 0's parameters and buffers to all ranks when it wraps.

    Args:
        model: a network with a `backbone`, or a ResNet itself.
        source: "imagenet" (the published file for `backbone`), "none", or the path of a file: a checkpoint of ours (of
            which the averaged weights are taken where it has them), or what another project wrote (`published_keys`).
        backbone: its name; `_with_mask` at its end doesn't matter.

    Returns:
        WeightsReport. Where the published file can't be had, its `warning` is True and the model is as it was.

    Raises:
        InputError: the file is missing, broken, holds code, has no tensor for this model, or is of another backbone.
    """
    if source == "none":
        return WeightsReport("weights: none, training from scratch")
    if source != "imagenet":
        content = load_file(source)
        return copy_matching(model, content, described(content, source))
    url = PUBLISHED.get(backbone.removesuffix("_with_mask"))
    if url is None:
        return WeightsReport(
            f"weights: of {backbone} no ImageNet file is published that could be checked (torchreid's model zoo has "
            "one, to be named as a file): training from scratch",
            warning=True,
        )
    try:
        path = fetch(url)
    except DownloadError as error:
        return not_to_be_had(url, error)
    return copy_matching(model, load_file(path), path.name)


def fetch(url: str, timeout: float = CONNECTION_TIMEOUT) -> Path:
    """The local copy of a published file, downloaded into torch.hub's cache folder if it isn't there whole.

    Its sha256 must begin with the digits at the end of its name. It appears under that name only when it is complete
    and checked, so processes may call this at the same time, and a copy that isn't what it should be is replaced.

    Args:
        url: its name ends in `-<first digits of the sha256>.pth`.
        timeout: seconds to wait for a connection, and for data that stops coming.

    Raises:
        DownloadError: no connection, no such file, another checksum, or nowhere to write it.
    """
    name = url.rsplit("/", 1)[-1]
    digits = re.search(r"-([0-9a-f]{8,})\.", name).group(1)
    path = _cache_folder() / name
    partial = path.with_name(f"{name}.{uuid.uuid4().hex}.partial")
    try:
        if path.is_file() and _sha256(path).startswith(digits):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            digest = _download(url, partial, timeout)
            if not digest.startswith(digits):
                raise DownloadError(f"what came has the sha256 {digest[: len(digits)]}..., not {digits}...")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(_reason(error)) from error
    return path


def not_to_be_had(url: str, error: DownloadError) -> WeightsReport:
    advice = f"training from scratch; put the file into {_cache_folder()}, or name another file, or none"
    return WeightsReport(f"weights: {url} can't be had ({error}): {advice}", warning=True)


def _cache_folder() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _download(url: str, path: Path, timeout: float) -> str:
    """Write what `url` gives to `path`; returns its sha256 in hexadecimal."""
    digest = hashlib.sha256()
    with _connect(url, timeout) as answer, open(path, "xb") as file:
        total = int(answer.headers.get("Content-Length", 0)) or None
        with tqdm(total=total, desc=path.name.split(".")[0], unit="B", unit_scale=True, disable=None) as bar:
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
    return digest.hexdigest()


def _connect(url: str, timeout: float):
    """urlopen, in a thread of its own: its time-out doesn't cover the look-up of the name, which can take minutes."""
    thread = ThreadPoolExecutor(max_workers=1)
    try:
        return thread.submit(urllib.request.urlopen, url, timeout=timeout).result(timeout=2 * timeout)
    finally:
        thread.shutdown(wait=False)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(error: Exception) -> str:
    if type(error) is urllib.error.URLError and isinstance(error.reason, Exception):
        error = error.reason  # a wrapper around what really happened
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return (str(error) or type(error).__name__).splitlines()[0]


def load_file(path: str | Path, mmap: bool = False) -> object:
    """What torch.save wrote to `path`: tensors and plain values, on the CPU. Code in it is never run.

    mmap: read each tensor only when it is used, and compare no checksums; not for files older than torch 1.6.
    Raises InputError, in one line, where there is no such file, it is damaged, or it holds more than that.
    """
    if not Path(path).exists():
        raise InputError(f"no such file: {path}; check the path")
    try:
        if not mmap:
            _check_sums(path)
        # torch wonders at a pickle that it didn't write; the error below says it all.
        with torch.serialization.safe_globals(PLAIN), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror}; give the path of a file that can be read") from error
    except BROKEN_FILE as error:
        # Any text that begins with a "c" reads as a GLOBAL too: what it names must be able to be a name.
        if found := re.search(r"GLOBAL ([^\W\d]\w*(?:\.[^\W\d]\w*)*) (?:was not|whose module)", str(error)):
            raise InputError(
                f"{path} is not loaded: it holds code or objects ({found.group(1)}) besides tensors; they are never "
                "run: where you trust it, load it with torch and save its state_dict alone"
            ) from error
        raise InputError(f"{path} is damaged or no file that torch.save wrote; get it again") from error


def _check_sums(path: str | Path) -> None:
    """Raises RuntimeError where a part of the file is not what was written.

    torch's format is a zip archive, whose CRC-32 of each part torch writes and never reads. The trap: archives that
    were written without sums (`set_crc32_options(False)`) have 0 for all of them, and files of before torch 1.6 have
    none; of those, published ones have the start of their sha256 in the name.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            has_sums = any(part.CRC for part in archive.infolist())
            if has_sums and (part := archive.testzip()):
                raise RuntimeError(f"{part} is not what was written")
    elif (named := SHA256_IN_NAME.search(Path(path).name)) and not _sha256(path).startswith(named[1]):
        raise RuntimeError(f"its sha256 does not begin with {named[1]}")


def copy_matching(model: nn.Module, content: object, name: str | Path, leave: Collection[str] = ()) -> WeightsReport:
    """Copy into `model` the tensors of `content` that it has under the same name with the same shape.

    Args:
        content: a state_dict, or a dict with one under a name of `WRAPPERS`; with the names of ours or of another
            project (`published_keys.own_names`).
        name: what messages call it.
        leave: keys that keep the model's tensors; the line doesn't speak of them.

    Returns:
        WeightsReport; its line names the tensors of another size (heads, mostly), those the file lacks, and those of
        the file that the model has no use for.

    Raises:
        InputError: nothing fits, or the backbone is not the same network. The model is then as it was.
    """
    own = model.state_dict()
    found = find_state_dict(content, name)
    state = _align(found, own)
    state = {key: tensor for key, tensor in state.items() if key not in leave}
    fitting = {key: tensor for key, tensor in state.items() if key in own and own[key].shape == tensor.shape}
    if not any(fitting[key].dim() for key in fitting):  # BatchNorm's counters alone, single numbers, fit everywhere
        raise InputError(
            f"{name} has no tensor that this model could take; it is of another kind of network{nearest(found)}"
        )
    of_others = [len(state[key]) for key in state if key.endswith("classifier.weight") and key not in fitting]
    resized = [key for key in state if key in own and key not in fitting]
    # BatchNorm's counters: old files lack them, and a frozen BatchNorm has no use for them.
    missing = [key for key in own if key not in state and key not in leave and not key.endswith(COUNTER)]
    unused = [key for key in state if key not in own and not key.endswith(COUNTER)]
    _require_same_backbone(model, found, resized, missing, unused, name)
    resized, unused = ([key for key in keys if "classifier" not in key] for keys in (resized, unused))
    model.load_state_dict(fitting, strict=False)

    parts = [f"weights: {len(fitting)} of {len(own)} tensors from {name}"]
    if resized:
        sizes = [f"{key} {tuple(state[key].shape)} -> {tuple(own[key].shape)}" for key in resized]
        parts.append(f"of another size, not loaded: {_some(sizes)}")
    if missing:
        parts.append(f"not in the file: {_some(missing)}")
    if unused:
        parts.append(f"in the file alone: {_some([bare(key) for key in unused])}")
    if of_others:
        parts.append(f"a classifier of {of_others[0]} other identities left out, as expected")
    return WeightsReport("; ".join(parts), loaded=len(fitting))


def find_state_dict(content: object, name: str | Path) -> dict[str, Tensor]:
    """The state_dict in a loaded file, without the prefixes of DDP and torch.compile; InputError if there is none.

    Of a checkpoint of ours it is the averaged one where there is one, and of each domain-specific BatchNorm that of the
    last domain, which evaluation uses.
    """
    if _averaged(content):
        content = best_weights(content)
    for _ in range(MOST_NESTED):
        inner = (
            {key: value for key, value in content.items() if isinstance(value, dict)}
            if isinstance(content, dict)
            else {}
        )
        known = [key for key in WRAPPERS if key in inner]
        counts = {key: len(_tensors(value)) for key, value in inner.items()}
        first, second = (sorted(counts, key=counts.get, reverse=True) + [None, None])[:2]
        if not known and counts.get(first, 0) <= len(_tensors(content)):
            break
        if not known and 2 * counts.get(second, 0) > counts[first]:
            raise InputError(f"{name} holds weights as {first!r} and as {second!r}; save one of them alone")
        content = inner[known[0] if known else first]
    state = _tensors(content)
    if not state:
        raise InputError(f"{name} holds no weights (no names with tensors); give a file of a state_dict")
    state = {key.removeprefix("module.").removeprefix("_orig_mod."): value for key, value in state.items()}
    return {DOMAIN.sub(".", key): value for key, value in state.items()}  # in the order of domains: the last one stays


def _tensors(content: object) -> dict[str, Tensor]:
    items = content.items() if isinstance(content, dict) else ()
    return {key: value for key, value in items if isinstance(key, str) and isinstance(value, Tensor)}


def best_weights(state: dict) -> dict[str, Tensor]:
    """The weights of a checkpoint of ours that are used: the averaged ones where it has them."""
    if averaged := _averaged(state):
        return {key.removeprefix("module."): value for key, value in averaged.items() if key != "n_averaged"}
    return state["model"]


class Unfilled(TorchFunctionMode):
    """`with Unfilled():` networks draw no random weights: where a file gives them theirs, or where shapes are asked."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__.endswith(("normal_", "uniform_")):  # also kaiming_..., of torch.nn.init
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return function(*args, **(kwargs or {}))


def described(content: object, path: str | Path) -> str:
    """What the report calls a file: its path, that its averaged weights are taken, or that nothing vouches for it."""
    if _averaged(content):
        return f"{path} (its averaged weights)"
    if zipfile.is_zipfile(path) or SHA256_IN_NAME.search(Path(path).name):
        return str(path)
    return f"{path} (old format without checksums; sha256 {_sha256(path)[:16]}...)"


def _averaged(content: object) -> dict[str, Tensor] | None:
    """The averaged weights of a checkpoint of ours, of its first network: a list, in older ones a single dict."""
    averaged = content.get("ema") if isinstance(content, dict) and "kind" in content else None
    averaged = averaged[0] if isinstance(averaged, list) and averaged else averaged
    return averaged if isinstance(averaged, dict) and all(isinstance(key, str) for key in averaged) else None


def _align(state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The keys as they are, with `backbone.` put in front or taken away, or translated: whichever fits best."""
    variants = (
        state,
        {f"backbone.{key}": value for key, value in state.items()},
        {key.removeprefix("backbone."): value for key, value in state.items()},
        own_names(state, own),
    )
    best = max(variants, key=lambda variant: sum(key in own for key in variant))
    # A 1x1 convolution on what was pooled is a linear layer.
    is_linear = {key for key, value in best.items() if key in own and value.shape == (*own[key].shape, 1, 1)}
    return {key: value.flatten(1) if key in is_linear else value for key, value in best.items()}


def _require_same_backbone(model, state, resized, missing, unused, name):
    """Heads may differ; a backbone of which a part fits is another network, and half-loaded it would be worthless."""
    bodies = [BODY.sub("", key) for key in model.state_dict() if BODY.match(key)] or list(model.state_dict())
    body = {key.split(".")[0] for key in bodies} - {"fc", "classifier"}

    def in_body(key):
        return bare(BODY.sub("", key)).split(".")[0] in body and ".attention." not in key

    for how, keys in (("has other sizes of", resized), ("lacks", missing), ("also has", unused)):
        wrong = [key for key in keys if in_body(key)]
        if wrong:
            raise InputError(
                f"{name} is of another backbone: it {how} {_some(wrong)}; give the backbone it is of{nearest(state)}"
            )


def nearest(state: dict[str, Tensor]) -> str:
    """What a message says of the backbone of ours that most tensors of a file fit."""
    shapes = {bare(BODY.sub("", key)): value.shape for key, value in state.items() if not key.endswith(COUNTER)}
    best = ("", 0, 1)
    with Unfilled():
        for name, build in BACKBONES.items():
            own = {key: value.shape for key, value in build(0).state_dict().items() if not key.endswith(COUNTER)}
            fitting = sum(shapes.get(key) == shape for key, shape in own.items())
            best = max(best, (name, fitting, len(own)), key=lambda one: one[1] / one[2])
    name, fitting, total = best
    return f" ({name} is nearest: it fits {fitting} of its {total} tensors)" if fitting else ""


def _some(names: list[str], limit: int = 4) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
