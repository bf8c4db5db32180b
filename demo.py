"""Find the objects in pictures: boxes, classes and masks, drawn and as JSON.

One picture, several, a folder, a pattern:
    python demo.py photo.jpg
    python demo.py photo.jpg belt.png --weights runs/NAME/best.pth --score 0.7
    python demo.py photos/ --classes suitcase backpack
    python demo.py "photos/**/*.jpg" --device cuda --amp fp16

The network is that of --weights: a checkpoint of train_mask_rcnn.py, or torchvision's COCO file of Mask R-CNN. Without
it the newest best.pth of a Mask R-CNN under runs/ is taken (last.pth of a run that was not evaluated), and where there
is none, the published COCO weights.

For each picture there is a folder <--output>/<its name> with
    sheet.jpg           six panels: the picture; boxes with class and score; masks; masks over the picture; masks and
                        classes; all together. Each is a file, too: original, boxes, masks, overlay, classes, all
    instances.json      of each instance the class, score, box [x1, y1, x2, y2] in pixels, and the mask as a run-length
                        code that pycocotools.mask.decode reads; both are of the upright picture: turned as its
                        EXIF orientation says, as viewers show it
and index.html shows them all. A folder that exists is never overwritten, the next free number is added.
"""

import glob
import json
import os
import sys
from pathlib import Path

import torch
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

from core import visualize
from core.data.images import IMAGE_SUFFIXES, list_images, read_image
from core.engine import detection, distributed, options
from core.engine.checkpoint import check_checkpoint, load_checkpoint, open_run
from core.engine.coco_evaluation import encode_detections
from core.engine.detection_pictures import instances
from core.engine.logger import progress_is_shown
from core.engine.updater import autocast
from core.errors import InputError
from core.files import atomic_write, distinct_names, make_folder
from core.models import weights
from core.models.mask_rcnn import MaskRCNN
from core.models.mask_rcnn_weights import (
    COCO_CATEGORIES,
    COCO_LABELS,
    HEAD_KEYS,
    PUBLISHED_COCO,
    load_detection_weights,
    rename_old_keys,
)

THUMBNAIL = (640, 480)  # pixels at most
JPEG_LIMIT = 65500  # pixels; a picture with a longer side is written as PNG


def get_parser():
    parser = options.Parser(__doc__)
    parser.add_argument("pictures", nargs="+", help="files, folders, patterns such as 'photos/*.jpg'")
    parser.add_argument("--weights", metavar="PATH", help="a checkpoint of train_mask_rcnn.py, or torchvision's file")
    parser.add_argument(
        "--score",
        type=options.fraction,
        default=0.5,
        help="least score of what is shown; below the network's own --min-score (0.05 unless trained otherwise) "
        "changes nothing",
    )
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="show only these (default: all)")
    parser.add_argument("--output", default="runs/demo", metavar="FOLDER", help="folder for the results")
    options.add_device_options(parser, timeout=False)
    return parser


def list_pictures(patterns):
    """Paths of the pictures that files, folders and patterns name, each once, in that order.

    Raises InputError for one that names none. A file that is named itself needs no suffix of a picture.
    """
    found = {}
    for pattern in patterns:
        if os.path.isdir(pattern):
            paths = list_images(pattern)
            if not paths:
                raise InputError(f"{pattern}: no pictures in this folder; for those in its folders give '{pattern}/**'")
        elif os.path.exists(pattern):
            paths = [pattern]
        else:
            matches = sorted(glob.glob(pattern, recursive=True))
            paths = [path for path in matches if path.lower().endswith(IMAGE_SUFFIXES) and os.path.isfile(path)]
            if not paths:
                raise InputError(f"{pattern}: no such picture; check the path")
        for path in paths:
            found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def load_network(path, device):
    """The network, its classes ((category id, name), or None, for label 1, 2, ...), and a line about its weights."""
    path, content = (path, weights.load_file(path)) if path else newest_checkpoint("runs")
    if path is None:
        path = published_file()
        content = weights.load_file(path)
    if isinstance(content, dict) and "kind" in content:
        check_checkpoint(content, path, "mask_rcnn")
        network, state = detection.network_from_checkpoint(path, device, state=content)
        return network, state["categories"], f"weights: {path}, epoch {state['epoch']}"
    state = rename_old_keys(weights.find_state_dict(content, path))
    if len(state.get(HEAD_KEYS[0], ())) != len(COCO_LABELS) + 1:
        raise InputError(f"{path} is neither a checkpoint of train_mask_rcnn.py nor torchvision's COCO file")
    network = MaskRCNN("resnet50", len(COCO_LABELS) + 1, norm="frozen")
    report = load_detection_weights(network, str(path), "resnet50", COCO_CATEGORIES)
    return network.to(device).eval(), COCO_LABELS, report.message


def newest_checkpoint(runs):
    """(path, content) of the newest Mask R-CNN under a folder, or (None, None); a file that is none is named.

    In each folder best.pth is what counts, and last.pth where there is none: of a training without evaluation.
    """
    best = {path.parent: path for name in ("last.pth", "best.pth") for path in Path(runs).rglob(name) if path.is_file()}
    for path in sorted(best.values(), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            state = load_checkpoint(path)
            if state["kind"] == "mask_rcnn":
                return path, state
        except InputError as error:
            print(f"skipped: {printable(error)}", file=sys.stderr)
    return None, None


def published_file():
    """The local copy of the published COCO weights, downloaded if need be."""
    url = PUBLISHED_COCO["resnet50"]
    try:
        return weights.fetch(url)
    except weights.DownloadError as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise InputError(
            f"no weights: no checkpoint of a Mask R-CNN is under runs/, and {url} can't be had ({error}); train with "
            f"`python train_mask_rcnn.py`, put that file into {folder}, or give --weights PATH"
        ) from error


def choose_labels(categories, wanted):
    """The labels 1, 2, ... to show; all classes of a name. Raises InputError for one that the network doesn't know."""
    names = [category[1].casefold() if category else None for category in categories]
    unknown = [name for name in wanted or () if name.casefold() not in names]
    if unknown:
        known = ", ".join(category[1] for category in categories if category)
        raise InputError(f"--classes {' '.join(unknown)}: the network doesn't know this; it knows {known}")
    chosen = {name.casefold() for name in wanted} if wanted else set(names) - {None}
    return [label for label, name in enumerate(names, start=1) if name in chosen]


@torch.inference_mode()
def find_instances(network, picture, categories, labels, device, *, score, amp):
    """COCO results (boxes, masks) of one PIL picture: what scores at least `score` and has one of these labels."""
    image = (pil_to_tensor(picture).float() / 255).to(device)  # (3, H, W)
    with autocast(device, amp):
        (found,) = network([image])
    kept = (found["scores"] >= score) & torch.isin(found["labels"], torch.tensor(labels, device=device))  # (N,)
    found = {name: value[kept] for name, value in found.items()}
    return encode_detections(found, (picture.height, picture.width), 0, [pair or (None, "") for pair in categories])


def write_picture(folder, name, picture, found, box_results, names):
    """Everything about one picture into its folder; returns its card for the page."""
    make_folder(folder)
    panels = visualize.instance_panels(picture, found, names)
    files = {}
    for panel, drawn in panels.items():
        files[panel] = f"{panel}.jpg" if max(drawn.size) <= JPEG_LIMIT else f"{panel}.png"
        save(folder / files[panel], drawn)
    caption = visualize.describe_instances(found)
    size = f"{picture.width} x {picture.height} pixels"
    visualize.instance_sheet(folder / "sheet.jpg", panels, name, f"{size}, {caption}")
    panels["all"].thumbnail(THUMBNAIL)
    save(folder / "thumbnail.jpg", panels["all"])
    rows = [
        {"class": one["label"], "category_id": result["category_id"]}
        | {"score": one["score"], "box": one["box"], "mask": one["rle"]}
        for one, result in zip(found, box_results, strict=True)
    ]
    lines = ",\n  ".join(map(json.dumps, rows))  # an instance on each line
    head = f'"picture": {json.dumps(name)}, "width": {picture.width}, "height": {picture.height}'
    with atomic_write(folder / "instances.json") as file:
        file.write(f'{{{head}, "instances": [\n  {lines}\n]}}\n'.encode())
    links = {"sheet": "sheet.jpg", **files, "JSON": "instances.json"}
    links = {word: f"{folder.name}/{file}" for word, file in links.items()}
    return visualize.Card(name, caption, f"{folder.name}/thumbnail.jpg", links["sheet"], links)


def save(path, picture):
    """Write a PIL picture, JPEG or PNG by its suffix, whole or not at all."""
    with atomic_write(path) as file:
        if path.suffix == ".jpg":
            picture.save(file, "JPEG", **visualize.JPEG)
        else:
            picture.save(file, "PNG")


def main(args):
    device = distributed.setup(args.device)
    paths = list_pictures(args.pictures)
    network, categories, message = load_network(args.weights, device)
    labels = choose_labels(categories, args.classes)
    print(message)
    output, _ = open_run(Path(args.output).parent, Path(args.output).name)
    names = {category[0]: category[1] for category in categories if category}
    cards, skipped = [], []
    folders = distinct_names(paths, taken={"index.html"})
    bar = tqdm(list(zip(paths, folders, strict=True)), disable=not progress_is_shown(), unit="picture")
    for path, folder in bar:
        try:
            picture = read_image(path)
        except InputError as error:
            skipped.append(str(error))
            bar.write(f"skipped: {printable(error)}", file=sys.stderr)
            continue
        results = find_instances(network, picture, categories, labels, device, score=args.score, amp=args.amp)
        found = instances(*results, names)
        cards.append(write_picture(output / folder, os.path.basename(path), picture, found, results[0], names.values()))
        bar.write(f"{printable(path)}: {cards[-1].caption}", file=sys.stdout)
    title = f"{len(cards)} picture{'s' * (len(cards) != 1)}"
    visualize.index_page(output / "index.html", title, f"{message}; score at least {args.score}", cards, skipped)
    print(f"written to {output}; {output / 'index.html'} shows it")
    if skipped:
        raise InputError(f"{len(skipped)} of {len(paths)} pictures were skipped, the first is {printable(skipped[0])}")


def printable(text):
    """The trap: a file name may hold bytes that are no text, and print stops at them."""
    return os.fsencode(str(text)).decode("utf-8", "replace")


if __name__ == "__main__":
    distributed.run_script(lambda argv: main(options.parse(get_parser(), argv=argv)), sys.argv[1:])
