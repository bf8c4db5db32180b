"""MVB from its original layout into the converted one: three folders, and all that is known stands in the names.

    <out>/bounding_box_train/0010_g_1.jpg ...   <out>/query   <out>/bounding_box_test

What a name can't hold is lost: material, box and mask.
"""

import json
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

from core.data.images import IMAGE_SUFFIXES
from core.data.mvb import CONVERTED
from core.errors import InputError
from core.files import atomic_write, folder_beside, sync_folder

NAMES = "identities.json"  # number -> name as the data write it, where identities are no numbers
LARGEST = 10**9  # an identity that stands in a name as it is


def check_target(out):
    """Raise InputError where `out` is there already, unless it is an empty folder, or can't be written to."""
    out = Path(os.path.expanduser(out))
    target = Path(os.path.abspath(out))
    # os.path and not Path, which raises OSError at names that are too long.
    folder = next(parent for parent in target.parents if os.path.exists(parent))
    try:
        if os.path.exists(target) and not (os.path.isdir(target) and not os.listdir(target)):
            raise InputError(f"{out} is there already; give a folder that is not")
        with tempfile.TemporaryDirectory(dir=folder, prefix=".", suffix=".partial") as probe:
            (Path(probe) / target.relative_to(folder)).mkdir(parents=True)  # all that lacks, by its names
    except OSError as error:
        raise InputError(f"{out} can't be written ({error.strerror}); give another folder") from error


def convert(pictures, out, copy=False):
    """Write the pictures (`baggage.inspection.Picture`) of an original MVB in the converted layout.

    All of it appears at once, when it is complete. A picture is a hard link to its original, which takes no room, else
    (another disk, or `copy`) a copy.

    Returns:
        Counter: "linked", "copied".

    Raises:
        InputError: `out` is there already or can't be written to, or nothing is left to convert.
    """
    check_target(out)
    if not pictures:
        raise InputError("no picture is listed, there and readable, so there is nothing to convert")
    out = Path(os.path.abspath(os.path.expanduser(out)))
    numbers, done = identity_numbers(pictures), Counter()
    try:
        with folder_beside(out) as partial:
            for folder in CONVERTED.values():
                (partial / folder).mkdir(parents=True)
            for picture, name in zip(pictures, target_names(pictures, numbers), strict=True):
                done[_place(picture.path, partial / name, copy)] += 1
            if any(identity != number for identity, number in numbers.items()):
                names = {}
                for picture in pictures:
                    names.setdefault(picture.identity, picture.name)
                names = {str(number): names[identity] for identity, number in numbers.items()}
                with atomic_write(partial / NAMES) as file:
                    file.write(json.dumps(names, indent=1).encode())
            if out.is_dir():
                out.rmdir()  # empty
            os.rename(partial, out)
            sync_folder(out.parent)
    except OSError as error:
        raise InputError(f"{out} can't be written ({error.strerror or error}); give another folder") from error
    return done


def _place(source, target, copy):
    source = os.path.realpath(source)  # a link to a picture is not what should be linked to
    if copy:
        shutil.copy2(source, target)
        return "copied"
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without hard links: what else is wrong, copying says
        return _place(source, target, copy=True)
    return "linked"


def identity_numbers(pictures):
    """Identity -> the number that stands for it in the names: its own where all have one, else its place by name."""
    identities = {picture.identity for picture in pictures}
    if all(isinstance(identity, int) and 0 <= identity < LARGEST for identity in identities):
        return {identity: identity for identity in identities}
    return {identity: number for number, identity in enumerate(sorted(identities, key=str))}


def target_names(pictures, numbers):
    """For each picture its path below the new folder: identity with zeros before it, side, view, its own suffix.

    A picture whose name says no view has view 0. Of two that would have one name, the second gets a number after the
    view, 0010_g_1_2.jpg, as in the suitcase set: the reader takes no notice of it.
    """
    width = max([4, *(len(str(number)) for number in numbers.values())])
    names, taken = [], set()
    for picture in pictures:
        stem = f"{numbers[picture.identity]:0{width}d}_{picture.source}_{picture.view or 0}"
        name, number = f"{CONVERTED[picture.part]}/{stem}", 2
        while name in taken:
            name, number = f"{CONVERTED[picture.part]}/{stem}_{number}", number + 1
        taken.add(name)
        suffix = os.path.splitext(picture.path)[1].lower()
        names.append(name + (suffix if suffix in IMAGE_SUFFIXES else ".jpg"))
    return names
