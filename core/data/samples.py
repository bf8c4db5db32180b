"""What a re-identification data set is made of, and what every reader of one needs."""

import os
import re
from itertools import product
from pathlib import Path
from typing import NamedTuple

from core.data.images import folder_entries, list_images
from core.errors import InputError

DRIVE = re.compile(r"[A-Za-z]:[\\/]")  # of Windows


class Sample(NamedTuple):
    """One picture.

    path: the file. id: identity; in training 0 .. C-1, in query and gallery the data set's own number.
    camera: from 0; only equality means something, so numbers may have gaps. box: (x1, y1, x2, y2) of the object in
    pixels, or None. mask: the object's pixels as COCO's run lengths {"size": [height, width], "counts": ...}, or None.
    name: the identity as the data calls it. bits: of 16 those in use, as `core.data.images.bits_in_use` finds it.
    """

    path: str
    id: int
    camera: int
    box: tuple[float, float, float, float] | None = None
    mask: dict | None = None
    name: str = ""
    bits: int = 16


class ReIDDataset(NamedTuple):
    """Training pictures of some identities; query and gallery pictures of others. A part may be empty."""

    train: list[Sample]
    query: list[Sample]
    gallery: list[Sample]


def relabel(samples):
    """The samples with identities 0 .. C-1, in the order of their own numbers, as a classifier wants them."""
    labels = {identity: label for label, identity in enumerate(sorted({sample.id for sample in samples}))}
    return [sample._replace(id=labels[sample.id]) for sample in samples]


def clip_box(box, width, height):
    """The part of box (x1, y1, x2, y2) that lies in a picture of width x height pixels; None where nothing is left."""
    x1, y1, x2, y2 = box
    x1, y1, x2, y2 = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def find_root(root, folders, inside, dataset):
    """The data set's own folder: `root`, or the folder in it that has a published name.

    Args:
        root: what the person gave.
        folders: published names of the data set's own folder, and of the one around it: it is looked for as `a` and
            as `a/b`.
        inside: what it holds; one of them is enough to know it, so that the reader can say which one is missing.
        dataset: name for the message.

    Returns:
        Path.

    Raises:
        InputError: `root` is no folder, can't be read, or holds nothing of that kind, or more than one.
    """
    root = Path(os.path.expanduser(root))
    if not os.path.isdir(root):  # Path.is_dir raises OSError at a name that is too long
        raise InputError(f"{root}: no such folder; give that of the set {dataset}")
    within = [root / folder for folder in (*folders, *("/".join(pair) for pair in product(folders, repeat=2)))]
    found = [path for path in (root, *within) if any(os.path.exists(path / part) for part in inside)]
    if root not in found:  # what is one folder under two names, as veri and VeRi are to some disks, is one
        found = list({os.stat(path)[1:3]: path for path in found}.values())
        if len(found) > 1:
            raise InputError(f"{root}: holds {dataset} twice, as {found[0]} and as {found[1]}; give one of them")
    if found:
        return found[0]
    here = f" (or {', '.join(folders)} with them)" if folders else ""
    content = ", ".join(entry.name for entry in folder_entries(root)[:5]) or "nothing"
    raise InputError(f"{root}: not laid out as {dataset}: expected {', '.join(inside)} in it{here}, found {content}")


def read_pictures(folder, parse, example, may_lack=False):
    """Samples of the pictures in a folder whose file names say what they show.

    Args:
        folder: the folder; sub-folders are not looked at.
        parse: file name -> (identity as named, identity, camera), or None where the name says nothing.
        example: a published name, for the message.
        may_lack: where the folder or its pictures are not there, there are no samples: who evaluates needs no `train`.

    Raises:
        InputError: no folder, no pictures, or names that `parse` can't read (how many, and the first).
    """
    paths = list_images(folder) if os.path.exists(folder) or not may_lack else []
    if not paths and may_lack:
        return []
    if not paths:
        raise InputError(f"{folder}: holds no pictures; expected names like {example}")
    parsed = [parse(os.path.basename(path)) for path in paths]
    strange = [path for path, meaning in zip(paths, parsed, strict=True) if meaning is None]
    if strange:
        raise InputError(
            f"{folder}: {len(strange)} of {len(paths)} pictures have no usable name, the first is "
            f"{os.path.basename(strange[0])}; expected names like {example}"
        )
    return [
        Sample(path, identity, camera, name=name) for path, (name, identity, camera) in zip(paths, parsed, strict=True)
    ]


def read_text(path):
    """Text of a file that belongs to a data set. Raises InputError where it is missing or not UTF-8 text."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}); the data set needs it") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not a text file; the data set needs it") from error


def listed_path(folder, name, what, root=""):
    """Path of a picture that a list names, from `folder` (below `root`) on. what: the field, for the message.

    Raises InputError where it leads out of there, as POSIX or as Windows reads it: a list may come from anywhere.
    """
    top = os.path.normpath(os.path.join(root, folder))
    paths = [os.path.normpath(os.path.join(top, spelling)) for spelling in (name, name.replace("\\", "/"))]
    if DRIVE.match(name) or not all(path.startswith(os.path.join(top, "")) for path in paths):
        raise InputError(f"{what} leads out of {folder}; name a picture in it")
    return paths[0]


def check_on_disk(samples, listing, may_lack=False):
    """The samples; InputError where pictures that `listing` names are not there: how many, and the first.

    It is raised, too, where a folder can't be read. may_lack: where not one of them is there, there are no samples.
    """
    missing = missing_on_disk(sample.path for sample in samples)
    if may_lack and len(missing) == len(samples):
        return []
    if missing:
        raise InputError(
            f"{listing}: {len(missing)} of {len(samples)} pictures listed there are not on disk, "
            f"the first is {missing[0]}; is the data set complete?"
        )
    return samples


def missing_on_disk(paths):
    """Those of the paths that are not there.

    Each folder is listed once; asking for 200,000 files one by one takes minutes on a network disk.
    """
    present = {}
    missing = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in present:
            present[folder] = {entry.name for entry in folder_entries(folder)}
        if name not in present[folder]:
            missing.append(path)
    return missing
