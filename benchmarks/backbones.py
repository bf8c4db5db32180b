"""Our ResNet beside torchvision's, our OSNet beside torchreid's: a training step and inference, as ratios.

    python -m benchmarks.backbones
    python -m benchmarks.backbones --network resnet101 --batch 64 --size 256 128 --steps 50 --amp --channels-last
    python -m benchmarks.backbones --network osnet_x1_0 --torchreid torchreid/reid/models/osnet.py

In one process, by turns. Both start from the same weights and see the same pictures; the medians of their times are
compared, so 1.00 means equally fast and less is faster. On CUDA peak memory beyond the weights is compared too.
"""

import argparse
import importlib.util
from functools import partial

import torch
import torchvision

from benchmarks.turns import beside, is_cuda, medians, peak_bytes
from core.models.osnet import OSNETS
from core.models.resnet import RESNETS


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    networks = [name for name in RESNETS if hasattr(torchvision.models, name)] + list(OSNETS)
    parser.add_argument("--network", choices=networks, default="resnet50", help="default: resnet50")
    parser.add_argument("--torchreid", metavar="FILE", help="its osnet.py or osnet_ain.py, for an OSNet")
    parser.add_argument("--batch", type=int, default=8, help="pictures in a batch (default: 8)")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(128, 64), help="height and width, pixels (default: 128 64)"
    )
    parser.add_argument("--steps", type=int, default=15, help="measured steps of each network (default: 15)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if any")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--channels-last", action="store_true", help="channels_last memory format")
    return parser


def main(args):
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    images = torch.randn(args.batch, 3, *args.size).to(args.device, memory_format=layout)
    name = "torchreid" if args.network in OSNETS else "torchvision"
    models = {"ours": (RESNETS | OSNETS)[args.network](), name: reference(args)}
    models[name].load_state_dict(models["ours"].state_dict())
    for model in models.values():
        model.to(args.device, memory_format=layout)

    print(
        f"{args.network}, {args.batch} x 3 x {args.size[0]} x {args.size[1]}, {args.device}, torch {torch.__version__}"
    )
    amp = torch.autocast(images.device.type, torch.bfloat16, enabled=args.amp)
    for name, step in (("training step", training_step), ("inference", inference)):
        steps = {of: partial(amp(step), model, images) for of, model in models.items()}
        print(f"{name}: {beside(medians(steps, args.device, args.steps, warmup=3), 'ms', 1e3)}")
        if is_cuda(args.device):
            print(f"{name}: {beside(peak_bytes(steps, args.device), 'MiB', 2**-20, digits=0)}")


def reference(args):
    """The network of the other project, with random weights."""
    if args.network not in OSNETS:
        return getattr(torchvision.models, args.network)()
    if not args.torchreid:
        raise SystemExit(f"error: {args.network} needs --torchreid FILE, the osnet.py of torchreid")
    spec = importlib.util.spec_from_file_location("torchreid_osnet", args.torchreid)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, args.network)(num_classes=1000, pretrained=False)


def training_step(model, images):
    model.train()(images).logsumexp(dim=1).mean().backward()
    model.zero_grad(set_to_none=True)


@torch.inference_mode()
def inference(model, images):
    model.eval()(images)


if __name__ == "__main__":
    main(get_parser().parse_args())
