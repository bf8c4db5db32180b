"""Leaks: what an evaluation shares with the training, or its queries with their gallery. Each kind is one line to say.

Pictures are compared byte for byte, under whatever path; copies that were saved anew are not found.
"""

import hashlib
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

from tqdm import tqdm

from core.files import printable


def reid_leaks(dataset, protocol, shared_names=True):
    """Lines about pictures and identities of query and gallery that are trained on, and queries that find themselves.

    Args:
        dataset: ReIDDataset; with an empty `train` only the queries are looked at.
        protocol: of its evaluation. A copy that it leaves out does no harm: under "market1501" one of the query's
            identity and camera, under "vehicleid", whose query and gallery are one set, the picture itself.
        shared_names: whether train and test number their identities together.
    """
    train, query, gallery = dataset[:3]
    tested = {sample.path: sample for sample in (*query, *gallery)}
    lines = [_trained_on([sample.path for sample in train], tested, "query and gallery")]
    known = {_name(sample) for sample in train} if shared_names else set()
    names = {_name(sample): sample for sample in tested.values() if sample.name}
    both = [sample for name, sample in names.items() if name in known]
    if both:
        lines.append(
            f"warning: {len(both)} of {len(names)} identities of query and gallery are in train too, by their names; "
            f"the first is {printable(both[0].name)} ({printable(both[0].path)}): the metrics will be too good"
        )
    lines.append(_asked_and_found(query, gallery, protocol))
    return [line for line in lines if line]


def detection_leaks(train, val):
    """Lines about pictures of val that are trained on: `CocoData` each."""
    line = _trained_on([picture.path for picture in train.pictures], [picture.path for picture in val.pictures], "val")
    return [line] if line else []


def common_files(paths, others):
    """{path: its size or digest} of all files that are in both lists, byte for byte, the same path included.

    What can't be read is in none, nor is an empty file: whoever reads the picture says so. A file is read only where
    its size is in both lists; the time grows with the number of files, not with that of pairs.
    """
    contents = dict.fromkeys((*paths, *others)) if paths and others else {}
    for measure in (os.path.getsize, _digest):
        with ThreadPoolExecutor(8) as pool:  # on a network disk each file is waited for
            values = pool.map(partial(_measured, measure), contents)
            bar = tqdm(values, "looking for copies", len(contents), unit="img", leave=False, disable=None)
            measured = dict(zip(contents, bar, strict=True))
        both = {measured.get(path) for path in paths} & {measured.get(path) for path in others}
        contents = {path: value for path, value in measured.items() if value and value in both}
    return contents


def _measured(measure, path):
    with suppress(OSError):  # not there, or not to be read: None
        return measure(path)


def _digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()


def _trained_on(train, tested, where):
    """The line about the pictures `tested` that are among those of `train` (paths), or None."""
    contents = common_files(train, tested)
    found = [path for path in tested if path in contents]
    if not found:
        return None
    original = next(path for path in train if contents.get(path) == contents[found[0]])
    return (
        f"warning: {len(found)} of {len(tested)} pictures of {where} are in train too, byte for byte; the first is "
        f"{printable(found[0])}, in train {printable(original)}: the metrics will be too good"
    )


def _asked_and_found(query, gallery, protocol):
    """The line about queries whose picture is in the gallery and counts there, or None."""
    counts = {
        "market1501": lambda asked, found: (asked.id, asked.camera) != (found.id, found.camera),
        "no_camera": lambda asked, found: True,
        "vehicleid": lambda asked, found: asked.path != found.path,
    }[protocol]
    contents = common_files([sample.path for sample in query], [sample.path for sample in gallery])
    copies = defaultdict(list)
    for sample in gallery:
        if sample.path in contents:
            copies[contents[sample.path]].append(sample)
    pairs = []
    for asked in query:
        same = copies.get(contents.get(asked.path), ())
        found = next((one for one in same if counts(asked, one)), None)
        if found:
            pairs.append((asked, found))
    if not pairs:
        return None
    asked, found = pairs[0]
    return (
        f"warning: {len(pairs)} of {len(query)} query pictures are in the gallery too, byte for byte; the first is "
        f"{printable(asked.path)}, in the gallery {printable(found.path)}: the metrics will be too good, or too bad "
        "where the copy has another identity"
    )


def _name(sample):
    """What the data call the identity; 0010 and 10 are the same."""
    return int(sample.name) if sample.name.isdecimal() else sample.name
