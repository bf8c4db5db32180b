"""Where the pictures of an annotation file lie. Many files were written on another machine, or for another folder."""

import os
import posixpath
import unicodedata
from collections import defaultdict

from core.data.images import walk_folders
from core.data.samples import missing_on_disk


def find_pictures(names, folder):
    """Find each picture by its file_name or, where that leads to none, beyond doubt.

    That is: in its folder there is one whose name differs by case, Unicode form or \\ for /; or no name at all leads
    to a picture, and each of them to one at most if folders are left out before it, or put there.

    Args:
        names: image id -> file_name.

    Returns:
        (image id -> path of those that are found; line for the log, or ""; what is known of the first that is not)
    """
    paths = {number: os.path.normpath(os.path.join(folder, name)) for number, name in names.items()}
    missing = set(missing_on_disk(paths.values()))
    if not missing:
        return paths, "", ""
    lost = {number: _plain(names[number]) for number, path in paths.items() if path in missing}
    there = set(paths.values()) - missing
    by_key, by_name = defaultdict(list), defaultdict(list)
    for parent, files in walk_folders(folder):
        for path in (os.path.join(parent, name) for name in files):
            key = _plain(os.path.relpath(path, folder))
            by_name[posixpath.basename(key)].append((key, path))
            if path not in there:
                by_key[key].append(path)

    candidates = {number: by_key[key] for number, key in lost.items()}
    if not there and not any(candidates.values()):
        candidates = {
            number: [path for key, path in by_name[posixpath.basename(name)] if _is_end(key, name)]
            for number, name in lost.items()
        }
        if any(len(some) > 1 for some in candidates.values()):
            return {}, "", _why(candidates, by_name, lost, folder)
    moved = {number: some[0] for number, some in candidates.items() if len(some) == 1}
    paths = {number: moved.get(number, path) for number, path in paths.items() if number in moved or path in there}
    line = ""
    if moved:
        number, path = next(iter(moved.items()))
        line = f"pictures found by another name or folder than their file_name has ({len(moved)}), such as {path} for "
        line += f"{names[number]!r:.200}"
    left = {number: some for number, some in candidates.items() if number not in moved}
    return paths, line, _why(left, by_name, lost, folder) if left else ""


def _plain(name):
    return unicodedata.normalize("NFC", posixpath.normpath(name.replace("\\", "/"))).casefold()


def _is_end(key, name):
    return f"/{key}".endswith(f"/{name}") or f"/{name}".endswith(f"/{key}")


def _why(candidates, by_name, lost, folder):
    """What is known of the first of `candidates` (image id -> paths) that has several or none."""
    number = next(number for number, some in candidates.items() if len(some) != 1)
    name = posixpath.basename(lost[number])
    stem = posixpath.splitext(name)[0]
    others = [path for key, some in by_name.items() if posixpath.splitext(key)[0] == stem for _, path in some]
    if candidates[number] or others:
        alike = " and ".join((candidates[number] or others)[:2])
        return f"{alike} may be meant: correct file_name, or give the folder that the names start from"
    return (
        f"nor is one like it in {folder} or below, in another case or Unicode form, with / for \\ or of another "
        "suffix: check the folder, and whether the set is complete"
    )
