"""The file of a gallery: how it is laid out, written in one pass, and who may write it.

    preamble   64 bytes: magic, version, where the header is, how long, and its CRC-32
    sections   vectors (N, D) float16 or float32; norms (N,) float32, the length of each stored vector; numbers (N,)
               int32, the identity as a number into `names`; names, a JSON list; sources and thumbnails, the bytes of
               all entries end to end; source_ends and thumbnail_ends (N,) int64, where each of them ends, and
               source_sums and thumbnail_sums (N,) uint32, the CRC-32 of each, so that one is checked without the rest
    header     JSON: metric, dim, count, dtype, fingerprint, info, and offset, length and CRC-32 of every section

All numbers are little-endian. Nothing in it is code, and a file that lacks its end is noticed from its size.
"""

import errno
import hashlib
import io
import json
import os
import re
import struct
import tempfile
import zlib
from array import array
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from core.errors import InputError

MAGIC = b"CAROUSEL GALLERY"
VERSION = 1
PREAMBLE = struct.Struct("<16sIIQQ")  # magic, version, CRC-32, offset and length of the header
ALIGNMENT = 64  # of every section; also the room kept for the preamble
DTYPES = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
COPY_BYTES = 1 << 22  # at a time, from one file to another

# Bytes of one entry in the sections that have a fixed size for each; the vectors' depends on D and the dtype.
FIXED = {"norms": 4, "numbers": 4, "source_ends": 8, "thumbnail_ends": 8, "source_sums": 4, "thumbnail_sums": 4}
SECTIONS = ("vectors", *FIXED, "names", "sources", "thumbnails")


class Rows(NamedTuple):
    """Entries as they are stored. All five have length n."""

    vectors: np.ndarray  # (n, D) in the gallery's dtype
    norms: np.ndarray  # (n,) float32
    identities: list  # of str
    sources: list  # of str, "" where there is none
    thumbnails: list  # of bytes, b"" where there is none


def digests_of(sources):
    """16 bytes for each source, (n,) of numpy's S16: what is compared instead of the texts, which would be large.

    Numpy drops zeros at the end of such a value; as all have the same length, no two become one by that.
    """
    digests = (hashlib.blake2b(source_bytes(source), digest_size=16).digest() for source in sources)
    return np.frombuffer(b"".join(digests), "S16")


def source_bytes(source):
    """UTF-8; a file name that is not UTF-8, which Python reads with surrogates, keeps its bytes."""
    return source.encode("utf-8", "surrogateescape")


def write_gallery(file, folder, chunks, header):
    """Write a gallery to the open, empty `file`; `chunks` are taken one at a time and none is kept.

    In memory: 48 bytes for each entry and the names. Sources and thumbnails wait in files without a name in `folder`
    until the vectors are all there; the system removes those by itself when the process is killed.

    Args:
        file: open for binary writing, at its start; left open.
        chunks: iterable of Rows.
        header: dict with metric, dim, dtype, fingerprint and info.

    Returns:
        the number of entries.

    Raises:
        InputError: two entries have the same source.
    """
    names, numbers, norms = {}, array("i"), array("f")
    source_ends, thumbnail_ends, digests = array("q"), array("q"), []
    source_sums, thumbnail_sums = array("I"), array("I")
    with nameless_file(folder) as sources, nameless_file(folder) as thumbnails:
        file.write(bytes(ALIGNMENT))
        checksum = 0
        for rows in chunks:
            vectors = np.ascontiguousarray(rows.vectors)
            file.write(vectors.data)
            checksum = zlib.crc32(vectors, checksum)
            norms.extend(rows.norms.tolist())
            numbers.extend(names.setdefault(identity, len(names)) for identity in rows.identities)
            _append(sources, source_ends, source_sums, [source_bytes(source) for source in rows.sources])
            _append(thumbnails, thumbnail_ends, thumbnail_sums, rows.thumbnails)
            digests.append(digests_of(source for source in rows.sources if source))
        _refuse_twins(digests, sources, source_ends)
        sections = {"vectors": (ALIGNMENT, file.tell() - ALIGNMENT, checksum)}
        for name, values, kind in (
            ("norms", norms, "<f4"),
            ("numbers", numbers, "<i4"),
            ("source_ends", source_ends, "<i8"),
            ("thumbnail_ends", thumbnail_ends, "<i8"),
            ("source_sums", source_sums, "<u4"),
            ("thumbnail_sums", thumbnail_sums, "<u4"),
        ):
            sections[name] = _put(file, np.asarray(values, kind).tobytes())
        sections["names"] = _put(file, json.dumps(list(names)).encode())
        sections["sources"], sections["thumbnails"] = _put(file, sources), _put(file, thumbnails)
    text = json.dumps({**header, "count": len(numbers), "sections": sections}).encode()
    offset, length, checksum = _put(file, text)
    file.seek(0)
    file.write(PREAMBLE.pack(MAGIC, VERSION, checksum, offset, length))
    return len(numbers)


def nameless_file(folder):
    """A file on the disk of `folder` that nobody sees, gone with the process however that ends."""
    return tempfile.TemporaryFile(dir=folder, prefix=".gallery.", suffix=".tmp")


def _append(spool, ends, sums, items):
    spool.write(b"".join(items))
    sums.extend(map(zlib.crc32, items))
    end = ends[-1] if ends else 0
    for item in items:
        end += len(item)
        ends.append(end)


def _put(file, content):
    """Append bytes, or all of a file, at the next aligned place; (offset, length, CRC-32)."""
    file.write(bytes(-file.tell() % ALIGNMENT))
    offset, checksum = file.tell(), 0
    content = io.BytesIO(content) if isinstance(content, bytes) else content
    content.seek(0)
    while piece := content.read(COPY_BYTES):
        file.write(piece)
        checksum = zlib.crc32(piece, checksum)
    return offset, file.tell() - offset, checksum


def _refuse_twins(digests, sources, ends):
    """Raise InputError where two entries have the same source, and name it."""
    values, counts = np.unique(np.concatenate(digests or [np.empty(0, "S16")]), return_counts=True)
    if (counts < 2).all():
        return
    twin, start = values[counts > 1][0], 0
    for end in ends:
        sources.seek(start)
        text = sources.read(end - start)
        if text and digests_of([text.decode("utf-8", "surrogateescape")])[0] == twin:
            break
        start = end
    name = text.decode("utf-8", "replace")
    raise InputError(f"the source {name!r} is given twice; give each picture once, or name its parts (picture.jpg#2)")


def read_header(file, path):
    """The header of an open gallery, checked against the size of the file.

    Raises InputError: empty, another kind of file, of a newer version, truncated, damaged.
    """
    file.seek(0)  # which also flushes what was just written
    size = os.fstat(file.fileno()).st_size
    start = file.read(PREAMBLE.size)
    if size == 0:
        raise InputError(f"{path} is empty: it is no gallery; build it again")
    if start[:16] != MAGIC[: len(start)]:
        raise InputError(f"{path} is not a gallery; give the file of one, or build one")
    if len(start) < PREAMBLE.size:
        raise InputError(f"{path} is truncated ({size} bytes); take a copy that is whole, or build it again")
    _, version, checksum, offset, length = PREAMBLE.unpack(start)
    if version > VERSION:
        raise InputError(f"{path} has format {version} and this Carousel reads {VERSION}: update Carousel")
    if size < offset + length:
        raise InputError(
            f"{path} is truncated: {size} bytes of {offset + length}; take a copy that is whole, or build it again"
        )
    file.seek(offset)
    text = file.read(length)
    if zlib.crc32(text) != checksum:
        raise damaged(path)
    try:
        header = json.loads(text)
        _check_header(header, offset)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(path) from error
    return header


def damaged(path, section=None):
    where = f" in its {section}" if section else ": its parts don't fit together"
    return InputError(f"{path} is damaged{where}; take a copy that is whole, or build it again")


def _check_header(header, end):
    """ValueError, KeyError or TypeError where the sections can't be what the header says."""
    count, size = header["count"], DTYPES[header["dtype"]].itemsize * header["dim"]
    wanted = {"vectors": count * size} | {name: count * each for name, each in FIXED.items()}
    for name in SECTIONS:
        offset, length, _ = header["sections"][name]
        if offset < ALIGNMENT or length < 0 or offset + length > end or length != wanted.get(name, length):
            raise ValueError(name)
    if header["metric"] not in ("cosine", "euclidean") or count < 0 or header["dim"] < 1:
        raise ValueError("metric, count or dim")
    if not isinstance(header["fingerprint"], str) or not isinstance(header["info"], dict):
        raise TypeError("fingerprint or info")


@contextmanager
def sole_writer(path):
    """Nobody else writes the gallery `path` meanwhile; what killed writers left beside it is removed.

    A lock of the system (flock) on a file beside it, which ends with the process however that ends. Whoever holds it
    is the only writer, so every temporary file of this gallery is of one that is dead. The file itself can't be the
    lock: it may not exist yet, and a writer replaces it.

    Raises InputError where another process writes it, or the folder can't be written to or has no locks.
    """
    descriptor, lock = _take_lock(path)
    try:
        leftover = re.compile(re.escape(f".{path.name}.") + r"\d+\.tmp")  # of core.files.atomic_write
        for file in path.parent.iterdir():
            if leftover.fullmatch(file.name):
                file.unlink(missing_ok=True)
        yield
    finally:
        with suppress(OSError):  # a folder that lost its permissions; an empty lock that stays does no harm
            lock.unlink(missing_ok=True)
        os.close(descriptor)


def _take_lock(path):
    lock = path.with_name(f".{path.name}.lock")
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise InputError(f"can't write {path}: {error.strerror}; give another place for the gallery") from error
        try:
            _lock(descriptor)
            if os.path.exists(lock) and os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                return descriptor, lock
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise InputError(f"another process is writing {path}; wait until it is done and try again") from error
            if error.errno == errno.ENOENT:  # removed between the two looks: as below
                continue
            raise InputError(f"can't lock {path}: {error.strerror}; keep the gallery on a local disk") from error
        os.close(descriptor)  # the one before removed the file that this lock is on: take the next


def _lock(descriptor):
    if os.name == "posix":
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)


def resolved(path):
    """Where the file lies, links followed: a link to a gallery stays one when the gallery is written anew."""
    return Path(os.path.realpath(path))
