"""The pictures that a gallery is made of: whom they show, cut out and embedded, and the small copies that it keeps."""

import io
import os
import sys
from collections import Counter

import numpy as np
from tqdm import tqdm

from core.data.images import list_files, list_images, open_image, read_image, say_unread
from core.data.mvb import parse_name
from core.engine.log import progress_is_shown
from core.errors import InputError
from core.files import printable
from recognition.gallery import Entries
from recognition.gallery_file import digests_of
from recognition.matching import cut_subject, embed

CHUNK = 128  # pictures between two writes into a gallery
THUMBNAIL = 96  # pixels of its longer side


def gallery_info(encoder, detector, classes=None):
    """What a gallery keeps about how it was made."""
    segment = detector and os.path.abspath(detector.path)
    reid = os.path.abspath(encoder.path)
    info = {"reid": reid, "segment": segment, "masks": detector is not None, "classes": classes}
    return {**info, "published": encoder.published} if encoder.published[0] else info


def name_identities(paths, root, known=()):
    """Whom each picture in a folder shows: its sub-folder's name, the number of an MVB name, else the name itself.

    Args:
        paths: of pictures in `root` or deeper; the first folder below `root` counts.
        known: identities of the gallery that they join: 10_g_1.jpg is of its "0010".

    Returns:
        List of str.
    """
    places = [os.path.relpath(path, root).split(os.sep) for path in paths]
    folders = {folder for folder, *below in places if below}
    numbers = {int(name): name for name in [*sorted(folders), *known] if name.isdecimal()}
    stems = Counter(os.path.splitext(name)[0] for name, *below in places if not below)
    identities = []
    for folder, *below in places:
        stem, parsed = os.path.splitext(folder)[0], parse_name(folder)
        if below:
            identities.append(folder)
        elif parsed:
            identities.append(numbers.setdefault(parsed[1], parsed[0]))
        else:
            identities.append(stem if stems[stem] == 1 else folder)  # bag.jpg and bag.png are two pictures
    return identities


def renamed(gallery, paths, identities):
    """Those pictures that a gallery has under another identity: list of (path, identity there, identity)."""
    sources = digests_of(os.path.abspath(path) for path in paths)
    _, numbers, rows = np.intersect1d(sources, gallery.source_digests(), return_indices=True)
    there = (
        (paths[number], gallery.identity_of(row), identities[number]) for number, row in zip(numbers, rows, strict=True)
    )
    return sorted((path, before, now) for path, before, now in there if before != now)


def pictures_of_each(gallery):
    """How many pictures a gallery has of each identity: dict by name."""
    return dict(zip(gallery.names, np.bincount(gallery.numbers, minlength=len(gallery.names)).tolist(), strict=True))


def grown(before, after):
    """Names of the identities that have more pictures than before, sorted; both as `pictures_of_each` gives them.

    Identities that are new don't count.
    """
    return sorted(name for name, count in before.items() if after.get(name, 0) > count)


def pictures_of_gallery(root, say=print):
    """Paths of the pictures in a folder and its sub-folders; those of kinds that are not read are counted in one line.

    Raises InputError where there are none.
    """
    say_unread(list_files(root, recursive=True), root, say)
    paths = list_images(root, recursive=True)
    if not paths:
        raise InputError(f"{root}: no pictures in this folder or its sub-folders; a gallery is made of pictures")
    return paths


class Subjects:
    """The pictures of a gallery, embedded in their order: an iterable of `Entries`, `CHUNK` pictures in each.

    Args:
        paths, identities: as from `pictures_of_gallery` and `name_identities`.
        encoder, detector: `recognition.networks`; without a detector whole pictures are embedded.
        bits: of 16 those in use, as `core.data.images.bits_in_use` finds it.

    Attributes, complete at the end:
        skipped: a line for each picture that can't be read. whole: paths of those in which no object was found, though
            there is a detector.
    """

    def __init__(self, paths, identities, encoder, detector, bits=16):
        self.pairs = list(zip(paths, identities, strict=True))
        self.encoder, self.detector, self.bits = encoder, detector, bits
        self.skipped, self.whole = [], []

    def __iter__(self):
        with tqdm(total=len(self.pairs), unit="picture", disable=not progress_is_shown()) as self.bar:
            for start in range(0, len(self.pairs), CHUNK):
                read = []
                cuts = self._cut_outs(self.pairs[start : start + CHUNK], read)
                features, thumbnails = embed(self.encoder, cuts, THUMBNAIL)
                if read:
                    identities, sources = [name for _, name in read], [os.path.abspath(path) for path, _ in read]
                    yield Entries(features, identities, sources, list(map(to_jpeg, thumbnails)))

    def _cut_outs(self, pairs, read):
        for path, identity in pairs:
            self.bar.update()
            try:
                picture = read_image(path, self.bits)
            except InputError as error:
                self.skipped.append(str(error))
                self.bar.write(f"skipped: {printable(error)}", file=sys.stderr)
                continue
            cut, is_found = cut_subject(picture, self.detector)
            if self.detector and not is_found:
                self.whole.append(path)
            read.append((path, identity))
            yield cut


def to_jpeg(picture):
    """Bytes of a small PIL picture."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def from_jpeg(content):
    """PIL picture, or None where a gallery keeps none, or a damaged one."""
    try:
        with open_image(content, formats=("JPEG",)) as image:  # a gallery may come from anywhere
            return image.convert("RGB")
    except InputError:
        return None
