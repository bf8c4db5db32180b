"""A gallery that a person keeps: embeddings, whose they are, where they come from, and a small picture of each.

    build_gallery("bags.gallery", Entries(vectors, identities, sources, thumbnails), fingerprint=...)
    with open_gallery("bags.gallery") as gallery:
        distances, identities, rows = gallery.identify(queries, k=5)

One file (`recognition.gallery_file`), searched exactly and piece by piece (`recognition.gallery_reader`). Every
change writes a new file and renames it: a crash leaves the old gallery or the new one, both whole, and a gallery that
is open goes on showing what it held when it was opened. The trap: Windows refuses to rename over a file that somebody
has open, so here `atomic_write` is entered before the old gallery, and leaves after it; a reader elsewhere makes the
change fail there. The price is that adding one entry copies the file. Vectors come in chunks and are gone when written,
so that memory does not grow with them.
"""

import os
from collections import Counter
from contextlib import ExitStack
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from core.errors import InputError
from core.files import atomic_write
from core.retrieval.distance import METRICS, row_chunks
from recognition.gallery_file import Rows, nameless_file, resolved, sole_writer, write_gallery
from recognition.gallery_reader import Gallery, open_gallery
from recognition.gallery_search import can_be_squared, lengths

__all__ = [
    "Entries",
    "Gallery",
    "add_to_gallery",
    "build_gallery",
    "merge_galleries",
    "open_gallery",
    "remove_from_gallery",
]

DTYPE = "float16"  # of a new gallery: 2 bytes for each number; one of "float32" is read, searched and added to as well


class Entries(NamedTuple):
    """What goes into a gallery, some entries at a time. All that is given has length n; n = 0 is allowed."""

    vectors: object  # (n, D) features, a tensor on any device or an array
    identities: list  # of str
    sources: list | None = None  # of str, where each comes from: no two entries have the same, "" for none
    thumbnails: list | None = None  # of bytes, a JPEG file each, b"" for none


def build_gallery(path, entries, *, fingerprint, metric="cosine", info=None):
    """Write a new gallery to the file `path`, taking the entries one chunk at a time.

    Args:
        entries: Entries, or an iterable of them (a generator, so that they never lie in memory together).
        fingerprint: of the network that made the vectors, as text.
        metric: "cosine" (the vectors are stored as unit vectors) or "euclidean".
        info: dict of plain values (JSON) to keep; "reid", the path of the checkpoint, is named in messages; "masks" is
            true where the pictures were cut out along masks.

    Returns:
        the number of entries.

    Raises:
        InputError: the file exists, another process writes it, no entries, vectors that are not finite, of unequal
            sizes, too large for float16 or zero with cosine, a source that is given twice, a disk that is full.
    """
    if metric not in METRICS:
        raise InputError(f"a gallery with metric {metric!r}: choose from {', '.join(METRICS)}")
    header = {"metric": metric, "dtype": DTYPE, "fingerprint": fingerprint, "info": dict(info or {})}
    path = resolved(path)
    with sole_writer(path):
        if os.path.lexists(path):
            raise InputError(f"{path} exists; remove it, or give another name")
        with atomic_write(path) as file:
            count = write_gallery(file, path.parent, _prepared(entries, header), header)
            if count == 0:
                raise InputError(f"nothing to build the gallery {path} from: not one entry; check the pictures")
            return count


def add_to_gallery(path, entries, *, fingerprint):
    """Add entries to the gallery in the file `path`, after those that it has.

    An entry whose source is in the gallery already takes the place of that one: who gives the same path again, with
    another identity or the same, has the picture once, as it was given last. A file that was moved has another path,
    so it is another entry.

    Args:
        entries: as in `build_gallery`.
        fingerprint: of the network that made the vectors; it must be the gallery's.

    Returns:
        (added, replaced): entries with a new source, entries that took the place of an old one.

    Raises:
        InputError: as `open_gallery` and `build_gallery`; another network or size of vectors.
    """
    path = resolved(path)
    with (
        sole_writer(path),
        atomic_write(path) as file,
        open_gallery(path) as old,
        nameless_file(path.parent) as place,
    ):
        old.require(fingerprint, "the network of the new entries")
        header = _header_of(old)
        write_gallery(place, path.parent, _prepared(entries, header), header)
        with Gallery(place, f"what is added to {path}") as new:
            keep = ~np.isin(old.source_digests(), new.source_digests()[new.has_source])
            write_gallery(file, path.parent, chain(old.rows(keep), new.rows()), header)
            replaced = int((~keep).sum())
            return len(new) - replaced, replaced


def remove_from_gallery(path, names):
    """Remove every entry of these identities, of these pictures, or in these folders, from the gallery `path`.

    The gallery may become empty; it keeps its network and takes new entries.

    Args:
        names: each of an identity or, where there is none of this name, of a file or folder that entries come from;
            it need not be there any more.

    Returns:
        how many entries were removed.

    Raises:
        InputError: as `open_gallery`; a name that is neither (nothing is removed then).
    """
    path = resolved(path)
    with sole_writer(path), atomic_write(path) as file, open_gallery(path) as old:
        numbers = {name: number for number, name in enumerate(old.names)}
        gone = np.isin(old.numbers, [numbers[name] for name in names if name in numbers])
        for name in names:
            if name not in numbers:
                file_or_folder = os.path.abspath(name)
                places = tuple(os.path.join(place, "") for place in (name, file_or_folder))
                here = np.array([f"{source}{os.sep}".startswith(places) for source in old.sources()], bool)  # (N,)
                if not here.any():
                    what = f"no identity {name!r} and no picture {file_or_folder}"
                    raise InputError(f"the gallery {path} has {what}; nothing was removed")
                gone |= here
        write_gallery(file, path.parent, old.rows(~gone), _header_of(old))
        return int(gone.sum())


def merge_galleries(path, paths):
    """Write the entries of the galleries `paths`, in that order, to the file `path`, new or one of them.

    Two entries that are equal in source, identity and vector become one, and a gallery that is named twice counts once.
    Of `info` stays what all of them say.

    Returns:
        (count, shared): the number of entries; the names of the identities that are in more than one, sorted.

    Raises:
        InputError: as `open_gallery`; no galleries; another network, metric or size; cut-outs and whole pictures; one
            source with two different entries: which of them is right, only a person knows; a file `path` that is none
            of them.
    """
    if not paths:
        raise InputError(f"no galleries to merge into {path}; give at least one")
    path, parts = resolved(path), {resolved(part): part for part in paths}
    with sole_writer(path), ExitStack() as stack:
        if os.path.lexists(path) and path not in parts:
            raise InputError(f"{path} is there already: merge it, too, or give another name")
        file = stack.enter_context(atomic_write(path))
        galleries = [stack.enter_context(open_gallery(part)) for part in parts.values()]
        for other in galleries[1:]:
            _refuse_mixture(galleries[0], other)
        kept = [~same for same in _repetitions(galleries)]
        header = _header_of(galleries[0])
        infos = [other.info for other in galleries]
        header["info"] = {key: value for key, value in infos[0].items() if all(i.get(key) == value for i in infos)}
        chunks = chain.from_iterable(other.rows(keep) for other, keep in zip(galleries, kept, strict=True))
        count = write_gallery(file, path.parent, chunks, header)
        among = Counter(chain.from_iterable(other.names for other in galleries))
        return count, sorted(name for name, number in among.items() if number > 1)


def _refuse_mixture(first, other):
    other.require(first.fingerprint, f"that of {first.path}", masks=first.masks)
    for what in ("metric", "dim", "dtype"):
        ours, theirs = getattr(first, what), getattr(other, what)
        if ours != theirs:
            raise InputError(f"{first.path} has {what} {ours} and {other.path} {theirs}: they can't be merged")


def _repetitions(galleries):
    """For each gallery a mask (N,), True for entries that an earlier gallery has too."""
    masks, first = [], {}
    for index, gallery in enumerate(galleries):
        digests, mask = gallery.source_digests(), np.zeros(len(gallery), bool)
        for row in gallery.has_source.nonzero()[0].tolist():
            place = first.setdefault(digests[row], (index, row))
            mask[row] = place != (index, row)
            if mask[row]:
                _refuse_difference(galleries[place[0]], place[1], gallery, row)
        masks.append(mask)
    return masks


def _refuse_difference(first, first_row, other, row):
    a, b = first.vectors(first_row, first_row + 1), other.vectors(row, row + 1)
    if first.identity_of(first_row) != other.identity_of(row) or not np.array_equal(a, b):
        raise InputError(
            f"{first.path} and {other.path} hold different entries from {other.source(row)!r}; remove it from one"
        )


def _header_of(gallery):
    return {key: getattr(gallery, key) for key in ("metric", "dim", "dtype", "fingerprint", "info")}


def _prepared(entries, header):
    """Entries -> Rows as they are stored; sets header["dim"] from the first chunk where it is not known."""
    for chunk in [entries] if isinstance(entries, Entries) else entries:
        vectors = torch.as_tensor(chunk.vectors).detach()
        if vectors.ndim != 2 or vectors.shape[1] == 0:
            raise InputError(f"embeddings have shape {tuple(vectors.shape)}: give one row of numbers per entry")
        if vectors.shape[1] != header.setdefault("dim", vectors.shape[1]):
            raise InputError(
                f"embeddings have {vectors.shape[1]} dimensions and those of the gallery {header['dim']}: extract all "
                "with the same network"
            )
        count = len(vectors)
        sources = [""] * count if chunk.sources is None else [str(source) for source in chunk.sources]
        thumbnails = [b""] * count if chunk.thumbnails is None else list(chunk.thumbnails)
        identities = list(chunk.identities)
        if not count == len(identities) == len(sources) == len(thumbnails):
            counts = f"{len(identities)} identities, {len(sources)} sources, {len(thumbnails)} thumbnails"
            raise InputError(f"{count} embeddings with {counts}: give one of each for each entry")
        for identity in identities:
            if not isinstance(identity, str):
                raise InputError(f"identity {identity!r} is no text; give names, such as {str(identity)!r}")
        for part in row_chunks(count, header["dim"]):  # a chunk may be as large as the caller likes
            stored, norms = _stored(vectors[part].cpu(), header, sources[part])
            yield Rows(stored, norms, identities[part], sources[part], thumbnails[part])


def _stored(vectors, header, sources):
    """(n, D) -> (n, D) array in the gallery's dtype, of unit vectors for cosine, and their lengths (n,) float32."""
    vectors = vectors if vectors.dtype == torch.float64 else vectors.float()
    norms = torch.linalg.vector_norm(vectors, dim=1, keepdim=True, dtype=torch.float64)
    if header["metric"] == "cosine":
        vectors = vectors / torch.where(norms > 0, norms, 1).to(vectors.dtype)
    stored = vectors.to(getattr(torch, header["dtype"])).numpy()
    stored_norms, norms = lengths(stored).astype(np.float32), norms[:, 0].numpy()
    good = np.isfinite(norms) & can_be_squared(stored_norms) & ((norms > 0) | (header["metric"] == "euclidean"))
    if not good.all():
        row = int((~good).nonzero()[0][0])
        large = f"is not finite, or too large for {header['dtype']}"
        fault = "is zero and has no direction" if norms[row] == 0 else large
        raise InputError(f"the embedding of {sources[row] or f'entry {row}'} {fault}: check the network that made it")
    return stored, stored_norms
