"""Our Mask R-CNN beside torchvision's, in one process and taking turns: a training step and inference, as ratios.

    python -m benchmarks.mask_rcnn
    python -m benchmarks.mask_rcnn --backbone resnet18 --norm batch --batch 2 --size 256 400 --min-size 256 --rois 64
    python -m benchmarks.mask_rcnn --batch 4 --steps 20 --amp --channels-last

Both have the same weights, see the same pictures with the same objects, and draw the same samples. Inference ends with
full-resolution masks in both. The medians of their times are compared, so 1.00 means equally fast and less is faster
than torchvision. On CUDA their peak memory beyond the weights is compared too.
"""

import argparse
from functools import partial

import torch
import torchvision
from torchvision.models.detection import MaskRCNN as TorchvisionMaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from benchmarks.turns import beside, is_cuda, medians, peak_bytes
from core.models.mask_rcnn import BACKBONES, MaskRCNN, paste_masks

NUM_CLASSES = 91


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=BACKBONES, default="resnet50", help="default: resnet50")
    parser.add_argument("--norm", choices=("frozen", "batch"), default="frozen", help="default: frozen")
    parser.add_argument("--batch", type=int, default=1, help="pictures in a batch (default: 1)")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(480, 640), help="height and width, pixels (default: 480 640)"
    )
    parser.add_argument("--min-size", type=int, default=480, help="shorter side in the network, pixels (default: 480)")
    parser.add_argument("--max-size", type=int, default=800, help="longest side in the network, pixels (default: 800)")
    parser.add_argument("--rois", type=int, default=512, help="proposals trained on for each picture (default: 512)")
    parser.add_argument("--objects", type=int, default=8, help="objects in each picture (default: 8)")
    parser.add_argument("--detections", type=int, default=100, help="detections of each picture (default: 100)")
    parser.add_argument("--steps", type=int, default=7, help="measured steps of each network (default: 7)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if any")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--channels-last", action="store_true", help="channels_last memory format")
    return parser


def main(args):
    torch.manual_seed(0)
    models = build_models(args)
    images, targets = make_batch(args)
    print(
        f"mask_rcnn_{args.backbone}_fpn, norm {args.norm}, {args.batch} x 3 x {args.size[0]} x {args.size[1]} resized "
        f"to {args.min_size}, {args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}"
    )
    amp = torch.autocast(images[0].device.type, torch.bfloat16, enabled=args.amp)
    for name, step in (("training step", training_step), ("inference", inference)):
        steps = {of: partial(amp(step), model, images, targets) for of, model in models.items()}
        print(f"{name}: {beside(medians(steps, args.device, args.steps), 'ms', 1e3, digits=0)}")
        if is_cuda(args.device):
            print(f"{name}: {beside(peak_bytes(steps, args.device), 'MiB', 2**-20, digits=0)}")


def build_models(args):
    """Both networks with the same weights, random but with as many detections as a trained network has at the most."""
    options = {
        "min_size": args.min_size,
        "max_size": args.max_size,
        "box_batch_size_per_image": args.rois,
        "box_detections_per_img": args.detections,
        "box_score_thresh": 1 / NUM_CLASSES,
    }
    ours = MaskRCNN(args.backbone, NUM_CLASSES, norm=args.norm, **options)
    layer = {"norm_layer": torch.nn.BatchNorm2d} if args.norm == "batch" else {}
    backbone = resnet_fpn_backbone(backbone_name=args.backbone, weights=None, trainable_layers=5, **layer)
    theirs = TorchvisionMaskRCNN(backbone, NUM_CLASSES, **options)
    theirs.load_state_dict(ours.state_dict())
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    return {
        name: model.to(args.device, memory_format=layout) for name, model in (("ours", ours), ("torchvision", theirs))
    }


def make_batch(args):
    height, width = args.size
    images, targets = [], []
    for _ in range(args.batch):
        corner = torch.rand(args.objects, 2) * torch.tensor([0.7 * width, 0.7 * height])
        side = (0.05 + 0.25 * torch.rand(args.objects, 2)) * torch.tensor([width, height])
        boxes = torch.cat((corner, corner + side), dim=1)
        masks = torch.zeros(args.objects, height, width, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        labels = torch.randint(1, NUM_CLASSES, (args.objects,))
        target = {"boxes": boxes, "labels": labels, "masks": masks}
        targets.append({key: value.to(args.device) for key, value in target.items()})
        images.append(torch.rand(3, height, width).to(args.device))
    return images, targets


def training_step(model, images, targets):
    torch.manual_seed(0)  # the same samples for both
    sum(model.train()(images, targets).values()).backward()
    model.zero_grad(set_to_none=True)


@torch.inference_mode()
def inference(model, images, _):
    for detection, image in zip(model.eval()(images), images, strict=True):
        if detection["masks"].shape[-2:] != image.shape[-2:]:
            paste_masks(detection["masks"], detection["boxes"], image.shape[-2:])


if __name__ == "__main__":
    main(get_parser().parse_args())
