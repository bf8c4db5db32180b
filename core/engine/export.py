"""A trained ReID network for production: one file, ONNX or TorchScript, checked against the network before it appears.

The trap: a file that was traced with one picture may have that one for ever (torchreid#585), so each is compared at
several batch sizes.
"""

import copy
import io
import json
import keyword
import warnings

import torch
from torch import nn

from core.errors import InputError
from core.files import atomic_write

SUFFIXES = {"onnx": ".onnx", "torchscript": ".pt", "weights": ".weights.pth"}  # the last are a checkpoint
BATCH_SIZES = (1, 2, 7)
TOLERANCE = 1e-3  # of the largest value


def for_retrieval(network):
    """A copy of a network as retrieval runs it: in evaluation mode, without the classifiers of its training."""
    network = copy.deepcopy(network).eval()
    for module in network.modules():
        if isinstance(getattr(module, "classifier", None), torch.nn.Module):
            module.classifier = None
    if getattr(network, "mask_branch", None) is not None:
        network.mask_branch = network.mask_branch[:2]  # reduction and neck
    return network


class Embedder(nn.Module):
    """Normalised pictures (B, 3, H, W) -> the outputs of `names`: embedding (B, D), and where the network has a decoder
    mask (B, 1, h, w) in [0, 1]."""

    def __init__(self, network):
        super().__init__()
        self.network = for_retrieval(network)
        for module in self.network.modules():  # a TorchScript file can't be read where a part is called "global"
            parts = module._modules.items()
            module._modules = {name + "_" * keyword.iskeyword(name): part for name, part in parts}
        self.names = ["embedding"] + ["mask"] * (network.mask_decoder is not None)

    def forward(self, images):
        output = self.network(images, return_mask="mask" in self.names)
        return tuple(getattr(output, name) for name in self.names)


def export_network(path, form, network, state, device):
    """Write a network to `path` as `form`, "onnx" or "torchscript", with an input of any batch size.

    The file carries what its input must be (size, mean and standard deviation of RGB in [0, 1]), and the distance and
    threshold of its checkpoint `state`: an ONNX file as metadata, a TorchScript file as its extra file carousel.json.
    TorchScript runs on the kind of device that `network` and `device` are, ONNX anywhere.

    Returns the line that says what was written. Raises InputError, and writes nothing, where a package is missing,
    torch can't export the network, or the file's answers are not the network's.
    """
    device = torch.device("cpu") if form == "onnx" else device
    module = Embedder(network).to(device).eval()
    size = state["input_size"]
    metadata = {"input_size": size, **state["normalisation"]}
    kept = ("distance", "threshold") if network.embed == "after" else ("distance",)  # the threshold is of these
    metadata |= {key: state[key] for key in kept if state.get(key)}
    example = torch.randn(2, 3, *size, device=device)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that both forms are old, and that shapes become constants, which is looked at
        content, run = (_onnx if form == "onnx" else _torchscript)(module, example, metadata)
        shapes, difference = _compare(path, run, module, size, device)
    with atomic_write(path) as file:
        file.write(content)
    outputs = ", ".join(f"{name} {shape}" for name, shape in zip(module.names, shapes, strict=True))
    return (
        f"written to {path} ({len(content) / 1e6:.1f} MB): images (N, 3, {size[0]}, {size[1]}), RGB in [0, 1] "
        f"minus {metadata['mean']} over {metadata['std']} -> {outputs}; largest difference from the network "
        f"{difference:.1e}, in batches of {', '.join(map(str, BATCH_SIZES))}"
    )


def _compare(path, run, module, size, device):
    """Shapes of the outputs as text, and the largest difference of their values between file and network."""
    generator, largest = torch.Generator().manual_seed(0), 0.0
    for count in BATCH_SIZES:
        images = torch.randn(count, 3, *size, generator=generator)
        expected = [output.float().cpu() for output in module(images.to(device))]
        for name, ours, theirs in zip(module.names, expected, run(images), strict=True):
            difference = float((ours - theirs).abs().max()) if ours.shape == theirs.shape else torch.inf
            if not difference <= TOLERANCE * float(ours.abs().max()):
                raise InputError(
                    f"{path} is not written: of {count} pictures its {name} differs from the network's by "
                    f"{difference:.1e}; please report it"
                )
            largest = max(largest, difference)
    return [f"(N, {', '.join(map(str, output.shape[1:]))})" for output in expected], largest


def _torchscript(module, example, metadata):
    """(The file's bytes; function: (B, 3, H, W) on the CPU -> its outputs, as whoever reads the file gets them)."""
    traced = torch.jit.trace(module, example, check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file, _extra_files={"carousel.json": json.dumps(metadata)})
    loaded = torch.jit.load(io.BytesIO(file.getvalue()), map_location=example.device)
    return file.getvalue(), lambda images: [out.cpu() for out in loaded(images.to(example.device))]


def _onnx(module, example, metadata):
    """As `_torchscript`, by torch's older exporter: from 2.11 to 2.15 it takes all our networks, the newer does not."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise InputError(f"--export onnx needs two packages: pip install onnx onnxruntime ({error})") from error
    file, batch = io.BytesIO(), {name: {0: "batch"} for name in ("images", *module.names)}
    names = {"input_names": ["images"], "output_names": module.names, "dynamic_axes": batch}
    try:
        torch.onnx.export(module, (example,), file, dynamo=False, **names)
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"torch can't write this network as ONNX ({reason}); use --export torchscript") from error
    model = onnx.load_model_from_string(file.getvalue())
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in metadata.items()})
    content = model.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda images: map(torch.from_numpy, session.run(None, {"images": images.numpy()}))
