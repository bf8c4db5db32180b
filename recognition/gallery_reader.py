"""A gallery open for reading: its entries, and the exact search in them.

The vectors stay in the file and are read piece by piece, so that a gallery may be larger than the memory. What has a
fixed size for each entry (32 bytes) and the names are in memory.
"""

import json
import os
import zlib

import numpy as np
import torch

from core.errors import InputError
from core.retrieval.distance import as_features
from recognition.gallery_file import DTYPES, Rows, damaged, digests_of, read_header
from recognition.gallery_search import can_be_squared, nearest_groups

# Values of the vectors that are read at a time, 32 MB as float32; no result depends on it.
CHUNK_ELEMENTS = 8_000_000
COPIED_ROWS = 1024  # entries at a time, from one gallery to another


def open_gallery(path):
    """Open the gallery in the file `path` for reading.

    Raises InputError: missing, empty, not a gallery, of a newer version, truncated or damaged.
    """
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115 (the gallery keeps it open)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such gallery; check the path, or build one") from error
    except OSError as error:
        raise InputError(f"can't read the gallery {path}: {error.strerror}; give the file of a gallery") from error
    try:
        return Gallery(file, path)
    except InputError:
        file.close()
        raise


class Gallery:
    """A gallery open for reading (`open_gallery`); a context manager. Its rows are numbered 0 .. len - 1.

    Damage is noticed before anything comes of it: that of a source or a thumbnail when it is read, that of the vectors
    by the first search and by `rows`, all other when the gallery is opened. Only `vectors` gives what is in the file.

    Attributes:
        dim: D, the size of an embedding.
        metric: "cosine" (the vectors are unit vectors) or "euclidean".
        dtype: "float16" or "float32", of the stored vectors.
        fingerprint: of the network that made the embeddings (`core.engine.checkpoint.fingerprint`).
        info: dict of plain values that whoever built it wanted to keep.
        names: list of str, the identities, each once, in the order of their first entry.
        numbers: (N,) int32, the identity of each row as an index into `names`.
    """

    def __init__(self, file, path):
        self.file, self.path = file, path
        header = read_header(file, path)
        self.dim, self.metric, self.dtype = header["dim"], header["metric"], header["dtype"]
        self.fingerprint, self.info = header["fingerprint"], header["info"]
        self._sections, self._count = header["sections"], header["count"]
        self._vectors_are_whole = False  # known once all were read
        self.names = self._names()
        self.numbers, self.norms = self._array("numbers", "<i4"), self._array("norms", "<f4")
        self._ends = {name: self._array(f"{name[:-1]}_ends", "<i8") for name in ("sources", "thumbnails")}
        self._sums = {name: self._array(f"{name[:-1]}_sums", "<u4") for name in self._ends}
        for name, ends in self._ends.items():
            if (np.diff(ends, prepend=0) < 0).any() or (ends[-1] if len(ends) else 0) != self._sections[name][1]:
                raise damaged(path)
        if len(self) and not 0 <= self.numbers.min() <= self.numbers.max() < len(self.names):
            raise damaged(path)
        if not np.bincount(self.numbers, minlength=len(self.names)).all():  # an identity without entries
            raise damaged(path)
        if not (can_be_squared(self.norms) & (self.norms >= 0)).all():
            raise damaged(path)
        if self.metric == "cosine" and not self.norms.all():
            raise damaged(path)

    @property
    def has_source(self):
        """(N,) bool, False where the source is ""."""
        return np.diff(self._ends["sources"], prepend=0) > 0

    def __len__(self):
        return self._count

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.file.close()

    def identity_of(self, row):
        """The name of one row's identity."""
        return self.names[self.numbers[row]]

    def source(self, row):
        """Where one row comes from, "" if that was not given."""
        row = range(len(self))[row]
        return _text(self._items("sources", row, row + 1)[0])

    def thumbnail(self, row):
        """The picture of one row as the bytes of a JPEG file, b"" if none was given."""
        row = range(len(self))[row]
        return self._items("thumbnails", row, row + 1)[0]

    def vectors(self, start=0, stop=None):
        """The stored vectors of the rows start .. stop - 1, (n, D) numpy array in the gallery's dtype."""
        stop = len(self) if stop is None else stop
        vectors = np.empty((stop - start, self.dim), DTYPES[self.dtype])
        self._read("vectors", start * self.dim * vectors.itemsize, memoryview(vectors).cast("B"))
        return vectors

    @property
    def masks(self):
        """Whether its pictures were cut out along masks, as `info` says, and are not whole."""
        return bool(self.info.get("masks"))

    def require(self, fingerprint, who, masks=None):
        """Raise InputError unless the gallery can be compared with features of another origin.

        Args:
            fingerprint: of the network that made them. who: names that network (its path).
            masks: whether their pictures were cut out along masks; None where that is as the gallery's.
        """
        if masks not in (None, self.masks):
            how = {True: "cut out along masks", False: "taken whole"}
            raise InputError(
                f"the pictures of the gallery {self.path} were {how[self.masks]} and the others {how[masks]}: they "
                "can't be compared; make both with masks, or both without"
            )
        if fingerprint == self.fingerprint:
            return
        ours, theirs, reid = self.fingerprint[:12], fingerprint[:12], self.info.get("reid")
        if isinstance(reid, str) and os.path.abspath(who) == reid:
            raise InputError(
                f"the gallery {self.path} was built with {who} when that was network {ours}; by now it is {theirs}, "
                "trained further or replaced: build the gallery again, or use a copy of the network as it was"
            )
        path = f" ({reid})" if isinstance(reid, str) else ""
        raise InputError(
            f"the gallery {self.path} was built with network {ours}{path} and {who} is {theirs}: distances between "
            "them mean nothing; build it again with this one, or use that"
        )

    def search(self, queries, k, device="cpu"):
        """The k nearest rows of each query, exactly: what brute force over the stored vectors finds.

        Args:
            queries: (Q, D) features; Q = 0 is allowed.
            k: how many, >= 1; min(k, N) are returned.
            device: where the distances are computed; the result is the same on each.

        Returns:
            distances (Q, k) float32 in the gallery's metric, rows (Q, k) int64, on the CPU; nearest first, equal
            distances in the order of the rows.

        Raises:
            InputError: an empty gallery, queries of another size or not finite, k below 1, damaged vectors.
        """
        return self._nearest(queries, k, device, None)

    def identify(self, queries, k, device="cpu"):
        """The k nearest identities of each query, each by its nearest row, exactly.

        Args and raises: as `search`; min(k, number of identities) are returned.

        Returns:
            distances (Q, k) float32, identities (Q, k) int64 into `names`, rows (Q, k) int64, nearest first.
        """
        distances, rows = self._nearest(queries, k, device, self.numbers)
        return distances, torch.from_numpy(self.numbers.astype(np.int64))[rows], rows

    def _nearest(self, queries, k, device, groups):
        queries = as_features(queries, "query").cpu().double().numpy()
        if len(self) == 0:
            raise InputError(f"the gallery {self.path} is empty: there is nothing to search; add pictures to it")
        if k < 1:
            raise InputError(f"search with k {k}: it starts at 1")
        if queries.shape[1] != self.dim:
            raise InputError(
                f"query features have {queries.shape[1]} dimensions and those of the gallery {self.path} {self.dim}: "
                "extract both with the same network"
            )
        rows = min(len(self), max(1, CHUNK_ELEMENTS // self.dim))
        count = len(self) if groups is None else len(self.names)
        return nearest_groups(self._chunks(rows), queries, self.metric, k, groups, count, torch.device(device))

    def _chunks(self, size):
        """Yield (first row, vectors (n, D), norms (n,)); the vectors lie in one buffer, which the next overwrites."""
        buffer, checksum = np.empty((size, self.dim), DTYPES[self.dtype]), 0
        for start in range(0, len(self), size):
            vectors = buffer[: min(size, len(self) - start)]
            self._read("vectors", start * self.dim * buffer.itemsize, memoryview(vectors).cast("B"))
            if not self._vectors_are_whole:
                checksum = zlib.crc32(vectors, checksum)
            yield start, vectors, self.norms[start : start + len(vectors)]
        if not self._vectors_are_whole:
            self._verify("vectors", checksum)
            self._vectors_are_whole = True

    def rows(self, keep=None):
        """Yield the entries as Rows, some at a time: all, or those where `keep` (N,) is True.

        Everything is read, so that at the end InputError is raised where something was damaged.
        """
        checksum = 0
        for start in range(0, len(self), COPIED_ROWS):
            stop = min(len(self), start + COPIED_ROWS)
            kept = np.arange(stop - start) if keep is None else keep[start:stop].nonzero()[0]
            vectors = self.vectors(start, stop)
            sources, thumbnails = self._items("sources", start, stop), self._items("thumbnails", start, stop)
            checksum = zlib.crc32(vectors, checksum)
            if len(kept) == 0:
                continue
            yield Rows(
                vectors[kept],
                self.norms[start:stop][kept],
                [self.names[number] for number in self.numbers[start:stop][kept]],
                [_text(sources[i]) for i in kept],
                [thumbnails[i] for i in kept],
            )
        self._verify("vectors", checksum)

    def sources(self):
        """Yield where each row comes from, "" if that was not given."""
        for start in range(0, len(self), COPIED_ROWS):
            yield from map(_text, self._items("sources", start, min(len(self), start + COPIED_ROWS)))

    def source_digests(self):
        """(N,) `digests_of` the sources; those of rows without a source are digests of ""."""
        return digests_of(self.sources())

    def twins(self):
        """Pairs (row, earlier row) of entries with the same thumbnail: of one picture under two paths, most likely."""
        sums, sizes = self._sums["thumbnails"], np.diff(self._ends["thumbnails"], prepend=0)
        order = np.lexsort((sizes, sums))  # stable: equal ones in the order of the rows
        alike = (np.diff(sums[order]) == 0) & (np.diff(sizes[order]) == 0) & (sizes[order[1:]] > 0)
        pairs = zip(order[1:][alike].tolist(), order[:-1][alike].tolist(), strict=True)
        return sorted(pair for pair in pairs if self.thumbnail(pair[0]) == self.thumbnail(pair[1]))

    def _items(self, name, start, stop):
        ends = self._ends[name][max(0, start - 1) : stop].tolist()
        if start == 0:
            ends.insert(0, 0)
        content = bytearray(ends[-1] - ends[0])
        self._read(name, ends[0], memoryview(content))
        items = [bytes(content[a - ends[0] : b - ends[0]]) for a, b in zip(ends, ends[1:], strict=False)]
        if list(map(zlib.crc32, items)) != self._sums[name][start:stop].tolist():
            raise damaged(self.path, name)
        return items

    def _names(self):
        content = bytearray(self._sections["names"][1])
        self._read("names", 0, memoryview(content))
        self._verify("names", zlib.crc32(content))
        try:
            names = json.loads(content)
        except ValueError as error:
            raise damaged(self.path) from error
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise damaged(self.path)
        return names

    def _array(self, name, kind):
        values = np.empty(len(self), kind)
        self._read(name, 0, memoryview(values).cast("B"))
        self._verify(name, zlib.crc32(values))
        return values

    def _verify(self, name, checksum):
        """Raise InputError unless `checksum` is the CRC-32 of the section."""
        if self._sections[name][2] != checksum:
            raise damaged(self.path, name)

    def _read(self, name, start, target):
        """Fill `target` with the bytes of a section from `start` on. Plain reads: mapped pages count as memory."""
        self.file.seek(self._sections[name][0] + start)
        while len(target):
            count = self.file.readinto(target)
            if not count:
                raise InputError(f"{self.path} was cut short while it was read; take a copy that is whole")
            target = target[count:]


def _text(content):
    return content.decode("utf-8", "surrogateescape")
