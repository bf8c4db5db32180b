"""Baggage rendered by ourselves: a ReID set in the original MVB layout, and belt scenes of the same bags in COCO's.

    <root>/MVB_train/Image/0001_g_1.jpg ...            training identities, both cameras
    <root>/MVB_train/Info/train.json
    <root>/MVB_val/Image/{gallery,probe}/*.jpg         identities never seen in training
    <root>/MVB_val/Info/{val_gallery,val_probe}.json
    <root>/scenes/{train2017,val2017}/*.jpg            several bags on a belt
    <root>/scenes/annotations/instances_{train,val}2017.json
    <root>/synthetic.json                              what made the set; written last

Layout and names follow MVB (Zhang et al. 2019, "MVB: A Large-Scale Dataset for Baggage Re-Identification"): 'g' is the
multi-view camera before security, 'p' the one after it. Each entry has two fields more than MVB's: `bbox` (x, y, width,
height; pixels) and `segmentation` (COCO's compressed RLE), both of the visible part. In the scenes each annotation
carries `identity`, the number of the MVB entries' `id`; the bags of val2017 are mostly of the held-out identities.

All randomness is a function of (seed, what is drawn, identity, picture): no picture takes its numbers from another one,
and order, processes and cores change nothing.

With background="hard" the same bags stand in loose crops, among other bags and on loud floors, in both cameras: what a
network must learn to look past. That set has no scenes.
"""

import contextlib
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from baggage.render.looks import CATEGORIES, design
from baggage.render.models import make_bag
from baggage.render.pictures import Identity, take_picture, take_scene
from baggage.render.surroundings import take_hard_picture
from core.errors import InputError, as_written
from core.files import folder_beside

VERSION = 2  # of the pictures: raise it whenever they change
HARD_VERSION = 1  # of what stands around the bags with background="hard"
MARKER = "synthetic.json"
TAKE = {"plain": take_picture, "hard": take_hard_picture}  # how a picture of one bag is taken
GROUP_SIZE = 6  # identities that share kind, size and colour
GROUP, MEMBER, PAINT, GALLERY, PROBE, SCENE = range(6)  # streams of random numbers


def make_synthetic_baggage(
    root,
    *,
    background="plain",
    seed=0,
    train_identities=150,
    test_identities=30,
    gallery_views=5,
    probe_views=6,
    train_scenes=100,
    val_scenes=40,
    progress=True,
):
    """Render the set into `root` and return it as a Path; at once where it is already there with the same parameters.

    background: "plain", or "hard" (the module's docstring says what that is), which makes no scenes, whatever their
    numbers.

    The pictures are written beside `root` and moved there when all are done, so an interrupted run leaves no half set,
    and processes that make the same set at the same time do not disturb each other. A set of other parameters in
    `root` is replaced; a folder with anything else in it raises InputError.
    """
    root = Path(root)
    if background not in TAKE:
        raise ValueError(f"background {background!r} is none of {', '.join(TAKE)}")
    parameters = dict(
        version=VERSION,
        seed=seed,
        train_identities=train_identities,
        test_identities=test_identities,
        gallery_views=gallery_views,
        probe_views=probe_views,
        train_scenes=train_scenes,
        val_scenes=val_scenes,
    )
    if background == "hard":
        parameters.update(train_scenes=0, val_scenes=0, background="hard", hard_version=HARD_VERSION)
    if is_complete(root, parameters):
        return root
    check_place(root)
    try:
        with folder_beside(root) as partial:
            write_set(partial, parameters, progress)
            (partial / MARKER).write_text(json.dumps(parameters, indent=1) + "\n")
            put_in_place(partial, root, parameters)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise InputError(f"{root} can't be made ({error}): give a folder that you may write to") from error
    return root


def settle_synthetic_baggage(root, background, say):
    """Makes the set at `root`, and says so, unless it is there.

    Raises InputError where `root` holds the set with the other background, or of another version of Carousel.
    """
    parameters = parameters_of(Path(root))
    if parameters is None:
        check_place(Path(root))
        say(f"rendering the synthetic baggage set with a {background} background into {root}, about two minutes")
        make_synthetic_baggage(root, background=background)
    elif parameters.get("background", "plain") != background:
        raise InputError(
            f"{root} holds the synthetic baggage set with a {parameters.get('background', 'plain')} background, "
            f"the one with a {background} background is wanted: give another folder, or another data set"
        )
    elif (parameters["version"], parameters.get("hard_version", HARD_VERSION)) != (VERSION, HARD_VERSION):
        raise InputError(f"{root} was rendered by another version of Carousel: remove it, and it is rendered anew")


def check_place(root):
    """Raises InputError where `root` holds anything but a synthetic set."""
    if root.exists() and not (root.is_dir() and ((root / MARKER).is_file() or not any(root.iterdir()))):
        raise InputError(
            f"{root} exists and is not a synthetic baggage set: give another folder for it, or move it away"
        )


def parameters_of(root):
    """What the set in `root` was made with; None where there is no whole set.

    Raises InputError where a person has made something else of its synthetic.json.
    """
    try:
        text = (root / MARKER).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    with as_written(root / MARKER, "remove the folder, and the set is rendered anew"):
        parameters = json.loads(text)
        if not isinstance(parameters["version"], int):
            raise TypeError("no version")
    return parameters


def is_complete(root, parameters):
    """Whether `root` holds a whole set made with these parameters."""
    return parameters_of(root) == parameters


def put_in_place(partial, root, parameters):
    """Rename a finished folder to `root`; whoever comes second with the same set leaves the first one's there."""
    if (root / MARKER).is_file() and not is_complete(root, parameters):
        old = partial.with_name(f"{partial.stem}-old.partial")
        with contextlib.suppress(FileNotFoundError):  # another process has just moved it away
            os.rename(root, old)
        shutil.rmtree(old, ignore_errors=True)
    try:
        os.rename(partial, root)
    except OSError:  # not empty: another process was first
        if not is_complete(root, parameters):
            raise


def write_set(root, parameters, progress):
    p = parameters
    total = p["train_identities"] + p["test_identities"]
    total = total * (1 + p["gallery_views"] + p["probe_views"]) + p["train_scenes"] + p["val_scenes"]
    with tqdm(total=total, desc="rendering baggage", unit="picture", disable=None if progress else True) as bar:
        train = make_identities(p["seed"], 0, p["train_identities"], 1, bar)
        test = make_identities(p["seed"], 1, p["test_identities"], 1 + p["train_identities"], bar)
        take = TAKE[p.get("background", "plain")]
        views = {"g": p["gallery_views"], "p": p["probe_views"]}
        write_pictures(root / "MVB_train/Image", root / "MVB_train/Info/train.json", take, train, views, p["seed"], bar)
        for name, datatype in (("gallery", "g"), ("probe", "p")):
            info = root / f"MVB_val/Info/val_{name}.json"
            one = {datatype: views[datatype]}
            write_pictures(root / f"MVB_val/Image/{name}", info, take, test, one, p["seed"], bar)
        if take is take_picture:
            write_scenes(root / "scenes", "train2017", train, train, p["train_scenes"], p["seed"], 0, bar)
            write_scenes(root / "scenes", "val2017", test, train, p["val_scenes"], p["seed"], 1, bar)


def random(seed, *key):
    """The random numbers of one thing."""
    return np.random.default_rng([seed, *key])


def make_identities(seed, split, count, first, bar):
    identities = []
    for index in range(count):
        group, member = divmod(index, GROUP_SIZE)
        look = design(group, member, random(seed, GROUP, split, group), random(seed, MEMBER, split, index))
        identities.append(Identity(first + index, make_bag(look, random(seed, PAINT, split, index))))
        bar.update()
    return identities


def write_pictures(folder, info, take, identities, views, seed, bar):
    """take: one of TAKE; views: datatype -> pictures of each identity."""
    folder.mkdir(parents=True)
    info.parent.mkdir(parents=True, exist_ok=True)
    entries = []
    for identity in identities:
        for datatype, count in views.items():
            for view in range(count):
                rng = random(seed, GALLERY if datatype == "g" else PROBE, identity.number, view)
                picture, mask, quality = take(identity, identities, datatype, view, count, rng)
                name = f"{identity.number:04d}_{datatype}_{view + 1}.jpg"
                (folder / name).write_bytes(jpeg(picture, quality))
                entries.append(
                    dict(
                        image_id=len(entries) + 1,
                        image_name=name,
                        id=f"{identity.number:04d}",
                        datatype=datatype,
                        material=identity.bag.material,
                        dimsize=[picture.shape[1], picture.shape[0]],
                        **visible(mask),
                    )
                )
                bar.update()
    info.write_text(json.dumps({"image": entries}))


def jpeg(picture, quality):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality, subsampling=0 if quality > 85 else 2)
    return buffer.getvalue()


def visible(mask):
    """Box (x, y, width, height) and RLE of a mask (H, W) bool."""
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return dict(
        bbox=[float(v) for v in coco_mask.toBbox(rle)],
        segmentation=dict(size=[int(n) for n in rle["size"]], counts=rle["counts"].decode("ascii")),
    )


def write_scenes(root, split, own, others, count, seed, stream, bar):
    """COCO's layout. Three bags of four come from `own`, the rest from `others`."""
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for index in range(count):
        rng = random(seed, SCENE, stream, index)
        picture, identities, masks, quality = take_scene(own, others, rng)
        name = f"{index + 1:012d}.jpg"
        (root / split / name).write_bytes(jpeg(picture, quality))
        images.append(dict(id=index + 1, file_name=name, height=picture.shape[0], width=picture.shape[1]))
        for identity, mask in zip(identities, masks, strict=True):
            if not mask.any():
                continue
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=index + 1,
                    category_id=CATEGORIES.index(identity.bag.category) + 1,
                    identity=identity.number,
                    iscrowd=0,
                    area=float(mask.sum()),
                    **visible(mask),
                )
            )
        bar.update()
    categories = [dict(id=k + 1, name=name, supercategory="baggage") for k, name in enumerate(CATEGORIES)]
    content = dict(info=dict(description="Carousel synthetic baggage"), licenses=[], images=images)
    content.update(annotations=annotations, categories=categories)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
