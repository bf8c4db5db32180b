"""MVB as it lies on the disk, faults and all: what the reader for training (core.data.mvb) refuses, this one lists.

    survey = inspect(root)        every picture that the lists (or the names) speak of, those that lie there unlisted,
                                  and what is wrong with them
    survey.faults += identity_faults(survey.pictures)

The rules of an entry are those of core.data.mvb; a fault is found once, where it is, and what follows from it (a list
that can't be read leaves all its pictures without metadata) is not listed again.
"""

import math
import os
import posixpath
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from baggage.faults import make_fault
from baggage.identity_checks import compare_ids, compare_lists, usual_ids
from core.data.images import IMAGE_SUFFIXES, folder_entries, list_files, list_images
from core.data.mvb import (
    BAG_NAME,
    CONVERTED,
    INSIDE,
    ORIGINAL,
    SIDES,
    TEST_PARTS,
    check_box,
    check_identity,
    check_mask,
    check_name,
    check_size,
    find_layout,
    image_folder,
    parse_name,
    picture_path,
    read_list,
)
from core.data.samples import find_root
from core.errors import InputError
from core.files import printable

FIELDS = ("id", "datatype", "material", "dimsize")  # the name may say the first two, and nothing has to say the others


class Picture(NamedTuple):
    """A picture that the data speak of, or one that lies there unlisted; `exists` says whether it is there.

    path: None where the entry names no picture in the folder that its split keeps its side in.
    Of an unlisted one only path, part (None outside the folders of all three) and where are known.
    part: "train", "gallery" or "probe". source: "g" (before security) or "p". identity: one value for each bag ("0010"
    and 10 are the same). name: as the data call it; this and the material can be printed. box: (x1, y1, x2, y2) in
    pixels of the stored picture, not clipped. mask: COCO run lengths. size: (width, height) that its entry says. where:
    as in `Fault`.
    """

    path: str | None
    exists: bool
    part: str | None
    source: str | None
    identity: int | str | None
    name: str | None
    where: str
    view: int | None = None
    material: str | None = None
    size: tuple | None = None
    box: tuple | None = None
    mask: dict | None = None


class Survey(NamedTuple):
    root: Path
    layout: str  # "original" or "converted"
    pictures: list  # that an entry (converted: a name) describes; all numbers are theirs
    unlisted: list  # those beside them, which are looked at and count nowhere
    faults: list
    both: bool  # whether the other layout lies beside it

    @property
    def files(self):
        return self.pictures + self.unlisted

    def key(self, picture):
        return from_root(picture.path, self.root)


def from_root(path, root):
    """A path from the data's root on, with / on every system, as the data and the faults write it."""
    return Path(os.path.relpath(path, root)).as_posix()


def inspect(root):
    """Survey of MVB, or data in one of its layouts, in its own folder or the one around it; of both, the converted.

    Raises InputError where nothing there belongs to MVB.
    """
    root = find_root(root, ("MVB", "SuitcaseReID_Processed"), INSIDE, "mvb")
    layout, both = find_layout(root)
    read = _read_original if layout == "original" else _read_converted
    return Survey(root, layout, *read(root), both)


# The converted layout ------------------------------------------------------------------------------------------------


def _read_converted(root):
    pictures, unlisted, faults = [], [], []
    for part, folder in CONVERTED.items():
        paths = list_images(root / folder) if (root / folder).is_dir() else []
        if not paths:
            found = "holds no pictures" if (root / folder).is_dir() else "no such folder"
            faults.append(make_fault("missing_part", folder, f"{found}, so there is no {part}"))
        for path in paths:
            match, where = BAG_NAME.match(os.path.basename(path)), f"{folder}/{os.path.basename(path)}"
            if match is None:
                message = "its name doesn't say identity, side and view as 0010_p_3.jpg does"
                faults.append(make_fault("picture_without_metadata", where, message, (where,)))
                unlisted.append(_unlisted(path, part, where))
                continue
            name, number, _ = parse_name(os.path.basename(path))
            pictures.append(Picture(path, True, part, match[2], number, name, where, int(match[3])))
    return pictures, unlisted, faults


def _unlisted(path, part, where):
    return Picture(path, True, part, source=None, identity=None, name=None, where=where)


# The original layout -------------------------------------------------------------------------------------------------


def _read_original(root):
    pictures, unlisted, faults, ids = [], [], [], {}
    for split in ORIGINAL:
        present = {key for key in _files_below(root, f"{split}/Image") if key.lower().endswith(IMAGE_SUFFIXES)}
        listed, meant, unnamed = _read_split(root, split, ids, faults)
        found = set()
        absent = Counter()  # entries whose whole folder lacks
        for key, picture in listed.items():
            folder = image_folder(split, picture.source)
            if picture.path is None:
                pass  # named already
            elif not (root / folder).is_dir():
                absent[folder] += 1
            elif os.path.isfile(picture.path):
                found.add(key)
                picture = picture._replace(exists=True)
            else:
                faults.append(make_fault("metadata_without_picture", picture.where, f"there is no {key}"))
            pictures.append(picture)
        for folder, count in absent.items():
            faults.append(
                make_fault("missing_part", folder, f"no such folder, and {count} entries list pictures in it")
            )
        others = _others(root, present, found)
        unlisted += [_unlisted(os.path.join(root, key), _part_of(split, key), key) for key in others]
        strays = _others(root, set(others), meant)
        if len(strays) > unnamed:  # else they may be those that the lists speak of, and don't name
            faults += [make_fault("picture_without_metadata", key, "no entry lists it", (key,)) for key in strays]
    compare_lists(ids, faults)
    return pictures, unlisted, faults


def _others(root, files, known):
    """Those of `files` that are none of `known`, under whatever name: a folder may have two. All from the root on."""
    places = {os.path.realpath(root / key) for key in known - files}
    return [key for key in sorted(files - known) if os.path.realpath(root / key) not in places]


def _part_of(split, key):
    """Which of PARTS keeps its pictures where a file below the split's folder lies, or None."""
    if split == "MVB_train":
        return "train"
    return next((part for side, part in TEST_PARTS.items() if key.startswith(f"{image_folder(split, side)}/")), None)


def _meant_file(root, split, entry):
    """The picture on the disk that an entry means, from the root on, or None.

    It lies on the side of security that the entry's datatype says. Where none does, another fault may hide which one
    was meant: then the side that the name says counts, and the other one at last.
    """
    name = entry["image_name"]
    match = BAG_NAME.match(name)
    for side in (entry.get("datatype"), match and match[2], *SIDES):
        if isinstance(side, str) and side in SIDES:
            key = posixpath.normpath(f"{image_folder(split, side)}/{name}")
            if os.path.isfile(root / key):
                return key
    return None


def _read_split(root, split, ids, faults):
    """What the lists of MVB_train or MVB_val say; in `ids` each list gets what `usual_ids` says of it.

    Returns:
        ({path from the root on, or where an entry without one stands: Picture}, the paths of the pictures on the disk
        that any entry means, how many entries name no picture, infinite where a list can't be read)
    """
    lists = [f"{split}/Info/train.json"]
    if split == "MVB_val":
        lists = [f"{split}/Info/{entry.name}" for entry in folder_entries(root / split / "Info")]
        lists = [name for name in lists if name.endswith(".json")]
        if not lists:
            faults.append(
                make_fault("missing_part", f"{split}/Info", "no *.json there, so there is neither gallery nor probe")
            )
    listed, meant, unnamed, refused = {}, set(), 0 if lists else math.inf, 0
    for name in lists:
        entries = _read_list(root, name, faults)
        if entries is None:
            unnamed = math.inf
            continue
        checked = []
        for index, entry in enumerate(entries):
            where = f"{name}, entry {index}"
            image_name = _tried(faults, where, check_name, entry)
            if image_name is None:
                unnamed += 1
                continue
            meant.add(_meant_file(root, split, entry))
            picture = _read_entry(root, split, entry, f"{where} ({image_name})", faults)
            if picture is None:
                refused += 1  # it says its side, perhaps
            else:
                checked.append((entry, picture))
        _compare_entries(checked, faults)
        compare_ids(checked, faults)
        ids[name] = usual_ids(checked)
        _add_entries(root, name, [picture for _, picture in checked], listed, faults)
    if not unnamed and not refused:
        _check_sides(split, listed.values(), faults)
    return listed, meant - {None}, unnamed


def _read_list(root, name, faults):
    """The entries of a list, unchecked, or None where it can't be read."""
    if not (root / name).exists():
        faults.append(make_fault("missing_part", name, "no such list, so its pictures count nowhere"))
        return None
    try:
        return read_list(root / name)
    except InputError as error:
        message = f"{str(error).removeprefix(f'{root / name}: ')}; its pictures count nowhere"
        faults.append(make_fault("metadata", name, message))
        return None


def _tried(faults, where, check, *arguments):
    """What `check` makes of its arguments, or None and a fault."""
    try:
        return check(*arguments)
    except InputError as error:
        faults.append(make_fault("metadata", where, error))
        return None


def _read_entry(root, split, entry, where, faults):
    """Picture of an entry, or None where it doesn't say of which bag; every wrong field is a fault of its own."""
    bag = _tried(faults, where, check_identity, entry)
    if bag is None:
        return None
    name, side = entry["image_name"], bag["datatype"]
    match = BAG_NAME.match(name)
    return Picture(
        path=_tried(faults, where, picture_path, root, split, side, name),
        exists=False,
        part="train" if split == "MVB_train" else TEST_PARTS[side],
        source=side,
        identity=bag["identity"],
        name=printable(bag["name"]),
        where=where,
        view=int(match[3]) if match else None,
        material=_tried(faults, where, _check_material, entry.get("material")),
        size=_tried(faults, where, check_size, entry.get("dimsize")),
        box=_tried(faults, where, check_box, entry.get("bbox")),  # its size is compared with the picture's
        mask=_tried(faults, where, check_mask, entry.get("segmentation")),
    )


def _check_material(material):
    """The material as it can be printed, or None. A space more makes no other material."""
    if material is None:
        return None
    if not isinstance(material, str) or not material.strip():
        raise InputError(f"material has to be a text, found {material!r:.80}")
    return printable(" ".join(material.split()))


def _compare_entries(checked, faults):
    """Faults of entries beside each other and beside their names; `checked` is one list's [(entry, Picture)]."""
    usual = [field for field in FIELDS if sum(field in entry for entry, _ in checked) * 2 > len(checked)]
    named = [(match, bag.identity) for entry, bag in checked if (match := BAG_NAME.match(entry["image_name"]))]
    # A word disagrees with a number only where names and ids are else the same.
    words_too = sum(int(match[1]) == identity for match, identity in named) * 2 > len(named)
    for entry, picture in checked:
        match = BAG_NAME.match(entry["image_name"])
        if match and int(match[1]) != picture.identity and (words_too or isinstance(picture.identity, int)):
            message = f"the name says identity {match[1]}, the entry {picture.name}"
            faults.append(make_fault("name_disagrees", picture.where, message))
        if match and match[2] != picture.source:
            message = f"the name says {match[2]!r}, the entry's datatype {picture.source!r}"
            faults.append(make_fault("name_disagrees", picture.where, message))
        for field in usual:
            if entry.get(field) is None:
                message = f"has no {field}, and most entries of this list have one"
                faults.append(make_fault("metadata", picture.where, message))


def _add_entries(root, name, pictures, listed, faults):
    """Put one list's pictures into `listed`. A second list may repeat the first one, as core.data.mvb has it."""
    here = set()
    for picture in pictures:
        key = from_root(picture.path, root) if picture.path else picture.where
        known = listed.setdefault(key, picture)
        if known.identity != picture.identity:
            names = f"{picture.name}, and {known.name} in {known.where}"
            faults.append(make_fault("listed_twice", picture.where, f"of identity {names}"))
        elif key in here:
            faults.append(make_fault("listed_twice", picture.where, f"listed before: {known.where}"))
        here.add(key)


def _check_sides(split, pictures, faults):
    """A side that no entry of the split has is one fault, and not one of each identity."""
    sides = {picture.source for picture in pictures}
    for side, part in TEST_PARTS.items():
        if side not in sides:
            lacks = f"so there is no {part}" if split == "MVB_val" else f"so nothing was seen {SIDES[side]}"
            faults.append(make_fault("missing_part", f"{split}/Info", f"no entry with datatype {side!r}, {lacks}"))


def _files_below(root, folder):
    """Paths of all files in a folder and in those below it, from the root on; hidden ones are left out."""
    paths = list_files(root / folder, recursive=True) if (root / folder).is_dir() else []
    return {from_root(path, root) for path in paths}
