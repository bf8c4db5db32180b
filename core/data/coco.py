"""Object detection data in the COCO format (Lin et al. 2014, arXiv:1405.0312): pictures, categories, outlined objects.

data = for_training(read_coco("annotations/instances_train2017.json", "train2017"))
for note in data.notes: print(note)

A label is 1 .. K, the place of a category among `data.categories`; 0 is the background. The file's own category ids,
which may have gaps, are `data.categories[label - 1].id`. Boxes are (x1, y1, x2, y2) in pixels, corners of pixels being
whole numbers; boxes and outlines are those of a picture of `width` x `height` pixels, as the file says.
"""

import contextlib
import io
import os
from itertools import starmap
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from core.data.coco_checks import (
    FARTHEST,
    MIN_SIDE,
    BrokenEntries,
    EntryFault,
    check_box,
    check_name,
    check_outline,
    check_reference,
    check_size,
    entries_by_id,
    fault_line,
    merge_by_file,
    number_ids,
    read_json,
)
from core.data.coco_files import find_pictures
from core.data.coco_masks import check_against_masks, encode_mask, in_pixels
from core.data.coco_views import settle_view
from core.data.randomness import derive_seed
from core.data.samples import clip_box, listed_path
from core.errors import InputError
from core.files import printable


class CocoCategory(NamedTuple):
    """A class of objects: the id that the annotation file gives it, and its name."""

    id: int
    name: str


class CocoAnnotation(NamedTuple):
    """An object: label 1 .. K; box (x1, y1, x2, y2) in pixels; segmentation, a list of polygons (x, y, x, y, ... in
    pixels) or COCO's run lengths {"size": [height, width], "counts": ...}; crowd, whether it is a region of many
    objects; area in pixels; id, as in the file."""

    label: int
    box: tuple[float, float, float, float]
    segmentation: list | dict
    crowd: bool
    area: float
    id: int


class CocoPicture(NamedTuple):
    """A picture: id as in the file, path, width and height in pixels, and the objects in it (there may be none)."""

    id: int
    path: str
    width: int
    height: int
    annotations: list[CocoAnnotation]


class CocoData(NamedTuple):
    """What an annotation file says. categories: in the order of their labels. notes: lines for the log.
    dropped: what `for_training` left out, reason -> number of objects. upright: whether the objects of a picture whose
    width and height fit both views lie on the one turned upright by its EXIF orientation, and not on the stored one.
    bits: of 16 those that the pictures use, as `core.data.images.bits_in_use` finds it."""

    pictures: list[CocoPicture]
    categories: list[CocoCategory]
    annotations_path: str
    notes: list[str]
    dropped: dict[str, int]
    upright: bool = True
    bits: int = 16

    @property
    def view(self):
        """How `core.data.coco_images.read_as_annotated` reads the pictures."""
        return {"upright": self.upright, "bits": self.bits}


def coco_paths(root, split):
    """(images folder, annotation file) of `split` ("train" or "val") in the layout of COCO 2017."""
    root = Path(os.path.expanduser(root))
    return root / f"{split}2017", root / "annotations" / f"instances_{split}2017.json"


def read_coco(annotations, images, *, categories=None, skip_broken=False, upright=True):
    """Read and check an annotation file.

    Pictures keep the order of the file, annotations the order within their picture. Entries of one picture, as some
    exporters write one for each object, become one, with the id of the first. A file that gives a picture no
    width and height gets those of the picture itself; an annotation without `iscrowd` is a single object, and so are
    all where every one is flagged as a crowd, which CVAT does with masks; one without `area` gets that of its mask.
    Outlines in fractions of their picture become pixels. Ids that are texts are numbered. Boxes and areas are held
    against the masks: see `core.data.coco_masks`. What was not as it should be is said in `notes`.

    Width and height are compared with the headers of 2,000 pictures at most, spread evenly; in others, or where a
    header can't be read, a wrong size is found when the picture is read.

    Args:
        annotations: path of the JSON file.
        images: folder that its file names start from.
        categories: list of (id, name) by which to label, of a training file or a checkpoint: categories are then
            matched by name (where two have one name, by id too, else the first), and `categories` of the result are
            these in their order, with the ids of this file. None: the file's own, by id.
        upright: `CocoData.upright` where the pictures of the file don't tell: that of the training.
        skip_broken: leave out pictures that are not there and entries that are at fault, and say it in `notes`. Width
            and height are then not compared with the headers, as `split_broken` finds what is wrong.

    Returns:
        CocoData.

    Raises:
        InputError: the file or a picture is missing, or the file is not as the format wants it. It is `BrokenEntries`
            where `skip_broken` leaves some objects.
    """
    content = read_json(annotations)
    notes = number_ids(content, annotations)
    names = {
        number: printable(check_name(category, "name", f"{annotations}, category {number}"))
        for number, category in entries_by_id(content, "categories", annotations).items()
    }
    listed = list(starmap(CocoCategory, names.items()))
    ordered, labels = _own_labels(listed) if categories is None else _labels_by_name(listed, categories, annotations)
    pictures, first_ids, lines, broken = _read_pictures(content, annotations, images)
    notes += lines
    listed, faults, entries = (
        entries_by_id(content, "annotations", annotations),
        [],
        {number: [] for number in pictures},
    )
    for number, entry in listed.items():
        where = f"{annotations}, annotation {number}"
        try:
            first = _picture_of(entry, first_ids, where)
            category = check_reference(entry, "category_id", where)
            if category not in labels:
                raise _unknown_category(category, names, ordered, where)
            if first is not None:
                entries[first].append(entry)
        except EntryFault as fault:
            faults.append(fault)
    upright, lines, line = settle_view(pictures, entries, annotations, not skip_broken, upright)
    notes += lines
    crowds = [entry.get("iscrowd", 0) for some in entries.values() for entry in some]
    if all_crowds := bool(crowds) and all(crowd == 1 for crowd in crowds):
        notes.append(
            f"{annotations}: every object is flagged iscrowd ({len(crowds)}): they are taken as single objects"
        )
    for picture in pictures.values():
        for entry in entries[picture.id]:
            where = f"{annotations}, annotation {entry['id']}"
            try:
                found = _read_annotation(entry, labels[entry["category_id"]], picture, where, faults)
                picture.annotations.append(found._replace(crowd=found.crowd and not all_crowds))
            except EntryFault as fault:
                faults.append(fault)
    broken = [line for line in (*broken, line, fault_line(faults, len(listed), "annotations", annotations)) if line]
    if broken and not skip_broken:
        error = BrokenEntries if any(picture.annotations for picture in pictures.values()) else InputError
        raise error(f"{'; '.join(broken)}; correct or remove what is at fault")
    notes = [f"left out: {line}" for line in broken] + notes
    notes += in_pixels(pictures, annotations) + check_against_masks(pictures.values(), annotations)
    return CocoData(list(pictures.values()), ordered, str(annotations), notes, {}, upright)


def _own_labels(listed):
    """The file's categories by id, and category id -> label."""
    ordered = sorted(listed)
    return ordered, {category.id: label for label, category in enumerate(ordered, 1)}


def _labels_by_name(listed, wanted, path):
    """The categories `wanted` with this file's ids (one that it lacks gets a free id), and category id -> label."""
    wanted = [CocoCategory(*category) for category in wanted]
    backwards = list(enumerate(wanted, 1))[::-1]  # so that of two alike the first one counts
    exact = {category: label for label, category in backwards}
    by_name = {category.name: label for label, category in backwards}
    found = {category.id: exact.get(category) or by_name.get(category.name) for category in sorted(listed)}
    labels = {number: label for number, label in found.items() if label is not None}
    if not labels:
        raise InputError(
            f"{path}: its categories ({_name_list(listed)}) have no name in common with those of the model or the "
            f"training data ({_name_list(wanted)}); give annotations of the same categories"
        )
    ids = {label: number for number, label in reversed(labels.items())}
    free = max([*found, *(category.id for category in wanted)]) + 1
    ordered = []
    for label, category in enumerate(wanted, 1):
        number = ids.get(label, category.id if category.id not in found else free)
        free += number == free
        ordered.append(CocoCategory(number, category.name))
    return ordered, labels


def _unknown_category(category, names, ordered, where):
    if category not in names:
        reason = f"category {category} is not listed under categories; list it or correct the category_id"
        return EntryFault(where, reason, kind="category not listed")
    known = f"category {names[category]!r} is not one of the model's or the training data's ({_name_list(ordered)})"
    return EntryFault(where, f"{known}; remove its annotations or train with it", kind="category not known")


def _name_list(categories):
    names = [category.name for category in categories]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _read_pictures(content, annotations, images):
    """As `merge_by_file`: CocoPicture still without annotations, and some without size; the id of an entry that can't
    be used leads to None. Also lines about these. Raises InputError where there are no others, or entries of one file
    disagree."""
    if not os.path.isdir(images):
        raise InputError(f"{images}: no such folder; give the folder with the pictures of {annotations}")
    listed, names, sizes, faults = entries_by_id(content, "images", annotations), {}, {}, []
    for number, entry in listed.items():
        where = f"{annotations}, image {number}"
        try:
            sizes[number] = check_size(entry, where)
            names[number] = name = check_name(entry, "file_name", where)
        except EntryFault as fault:
            faults.append(fault)
        else:
            listed_path(images, name, f"{where}: file_name {name!r:.200}")
    broken = [fault_line(faults, len(listed), "images", annotations)]
    paths, line, why = find_pictures(names, images)
    notes = [f"{annotations}: {line}"] if line else []
    missing = [name for number, name in names.items() if number not in paths]
    if missing:
        line = f"{annotations}: {len(missing)} of {len(listed)} pictures listed there are not on disk"
        broken.append(f"{line}, the first is {os.path.join(images, missing[0])}; {why}")
    if not paths:
        raise InputError("; ".join(filter(None, broken)))
    pictures, first_ids, lines = merge_by_file(
        {number: CocoPicture(number, path, *sizes[number], []) for number, path in paths.items()}, annotations
    )
    return pictures, dict.fromkeys(listed) | first_ids, notes + lines, broken


def _picture_of(entry, first_ids, where):
    """The id of an annotation's picture, None where that is left out."""
    number = check_reference(entry, "image_id", where)
    if number not in first_ids:
        reason = f"image {number} is not listed under images; list it or remove this"
        raise EntryFault(where, reason, kind="image not listed")
    return first_ids[number]


def _read_annotation(entry, label, picture, where, faults):
    box = check_box(entry.get("bbox"), where)
    if not entry.get("segmentation"):
        raise EntryFault(
            where,
            "has no segmentation; a box alone trains no mask: outline the object, or, where a mask of the whole box "
            "will do, write it as a polygon, [[x, y, x + width, y, x + width, y + height, x, y + height]]",
        )
    segmentation = check_outline(entry["segmentation"], picture.width, picture.height, where, faults)
    crowd, area = entry.get("iscrowd", 0), entry.get("area")
    if crowd not in (0, 1):
        raise EntryFault(where, f"iscrowd has to be 0 or 1, found {crowd!r:.80}")
    if area is None:
        area = coco_mask.area(encode_mask(segmentation, picture.width, picture.height))
    elif type(area) not in (int, float) or not 0 <= area <= FARTHEST**2:
        raise EntryFault(where, f"area has to be a number of pixels, 0 or more, found {area!r:.80}")
    return CocoAnnotation(label, box, segmentation, bool(crowd), float(area), entry["id"])


def for_training(data):
    """The data without what a network can't learn from: crowd regions, boxes without area, boxes outside of their
    picture, empty masks. What is left is clipped to the picture, and its masks are compressed run lengths.

    The pictures all stay: one without objects trains as a negative. `dropped` counts what was left out, and one line
    about it joins `notes`. Raises InputError where nothing is left.
    """
    dropped = dict.fromkeys(("crowd regions", "boxes without area", "boxes outside the picture", "empty masks"), 0)
    pictures = []
    for picture in data.pictures:
        kept = []
        for annotation in picture.annotations:
            usable, reason = _usable(annotation, picture.width, picture.height)
            if reason is None:
                kept.append(usable)
            else:
                dropped[reason] += 1
        pictures.append(picture._replace(annotations=kept))
    dropped = {reason: count for reason, count in dropped.items() if count}
    left, lost = sum(len(picture.annotations) for picture in pictures), sum(dropped.values())
    reasons = ", ".join(f"{reason} ({count})" for reason, count in dropped.items())
    if not left:
        raise InputError(f"{data.annotations_path}: no object to train on" + (f"; left out: {reasons}" * bool(lost)))
    notes = [f"{data.annotations_path}: {lost} of {left + lost} objects left out: {reasons}"] if lost else []
    if dropped.get("crowd regions", 0) > left:
        notes[0] += "; a crowd region is of many objects: where each is of one, as masks of CVAT are, set iscrowd to 0"
    return data._replace(pictures=pictures, notes=data.notes + notes, dropped=dropped)


def _usable(annotation, width, height):
    """(the annotation clipped to its picture, None) or (None, why it is of no use)."""
    if annotation.crowd:
        return None, "crowd regions"
    if _shorter_side(annotation.box) < MIN_SIDE:
        return None, "boxes without area"
    box = clip_box(annotation.box, width, height)
    if box is None or _shorter_side(box) < MIN_SIDE:
        return None, "boxes outside the picture"
    mask = encode_mask(annotation.segmentation, width, height)
    if coco_mask.area(mask) == 0:
        return None, "empty masks"
    return annotation._replace(box=box, segmentation=mask), None


def _shorter_side(box):
    x1, y1, x2, y2 = box
    return min(x2 - x1, y2 - y1)


def without_empty_categories(parts):
    """The parts of a set, of the same categories, without those that have no object in any part.

    Returns:
        (list of `CocoData`, names of the categories left out, shortened, or "")
    """
    found = {one.label for part in parts for picture in part.pictures for one in picture.annotations}
    labels = {old: new for new, old in enumerate(sorted(found), 1)}
    empty = [category for label, category in enumerate(parts[0].categories, 1) if label not in labels]
    if not empty:
        return parts, ""

    def relabelled(part):
        pictures = [
            picture._replace(annotations=[one._replace(label=labels[one.label]) for one in picture.annotations])
            for picture in part.pictures
        ]
        return part._replace(pictures=pictures, categories=[part.categories[label - 1] for label in labels])

    return [relabelled(part) for part in parts], _name_list(empty)


def split_coco(data, val_fraction, seed):
    """Cut the pictures into (train, val), a function of `seed` alone; both keep the file's order, train the notes.

    A picture goes to val only if every category in it is left in train, so val may be smaller than asked for, but
    has one picture at least. It has one with an object, if need be one more than asked for, where train can spare it.

    Args:
        val_fraction: share of the pictures, 0 < val_fraction < 1.

    Raises:
        InputError: the share is out of range, or there is only one picture.
    """
    count = len(data.pictures)
    if not 0 < val_fraction < 1:
        raise InputError(f"val_fraction is {val_fraction:g}; give a share between 0 and 1, such as 0.2")
    if count < 2:
        raise InputError(f"{data.annotations_path}: its single picture can't be split; give a validation file, too")
    wanted = min(max(round(val_fraction * count), 1), count - 1)
    present = [{annotation.label for annotation in picture.annotations} for picture in data.pictures]
    left = np.zeros(len(data.categories) + 1, dtype=np.int64)  # pictures of train with a category
    for labels in present:
        left[list(labels)] += 1
    order = np.random.default_rng(derive_seed("split", seed)).permutation(count).tolist()
    val = set()
    for index in order:
        labels = list(present[index])
        if len(val) < wanted and (left[labels] > 1).all():
            left[labels] -= 1
            val.add(index)
    if not any(present[index] for index in val):
        spare = [index for index in order if present[index] and (left[list(present[index])] > 1).all()]
        val.update(spare[:1])
    val = val or {order[0]}
    train = [picture for index, picture in enumerate(data.pictures) if index not in val]
    return data._replace(pictures=train), data._replace(
        pictures=[data.pictures[index] for index in sorted(val)], notes=[]
    )


def coco_ground_truth(data):
    """`pycocotools.coco.COCO` of the data, made in memory and in silence, with the file's image and category ids.

    Annotations are numbered anew from 1: COCOeval marks an unmatched detection by the annotation id 0, so that a match
    with an object of id 0 would not count.
    """
    annotations = []
    for picture in data.pictures:
        for annotation in picture.annotations:
            x1, y1, x2, y2 = annotation.box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": picture.id,
                    "category_id": data.categories[annotation.label - 1].id,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": annotation.area,
                    "iscrowd": int(annotation.crowd),
                    "segmentation": annotation.segmentation,
                }
            )
    ground_truth = COCO()
    ground_truth.dataset = {
        "info": {},
        "images": [
            {"id": picture.id, "file_name": picture.path, "width": picture.width, "height": picture.height}
            for picture in data.pictures
        ],
        "annotations": annotations,
        "categories": [category._asdict() for category in data.categories],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth.createIndex()
    return ground_truth
