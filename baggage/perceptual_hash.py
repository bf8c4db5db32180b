"""Near-copies among many pictures: a perceptual hash, compared without ever holding N x N numbers.

The hash is the usual one from the discrete cosine transform (Zauner 2010, "Implementation and benchmarking of
perceptual image hash functions", section 3.2, with more bits): the picture's grey values on a 32 x 32 grid, the 16 x 16
lowest frequencies of their DCT-II, and of each whether it lies above their median. Saving again, scaling and small
changes of brightness leave nearly all bits as they are.

The trap with bags: two that differ in colour alone, and two views of one, have hashes that lie near each other. So
there are many bits (255, where 63 are usual), few may differ, and pictures that agree are compared in colour as well.
"""

import numpy as np
from PIL import Image

GRID, FREQUENCIES = 32, 16
BITS = FREQUENCIES * FREQUENCIES - 1  # the constant part says only how bright a picture is
COLORS = 8  # the picture as 8 x 8 colours
# Of 255 bits, so many may differ between copies. Measured on synthetic bags: the nearest two of 990 different pictures
# differ in 56, of 3,780 in 46; a copy saved with JPEG quality 20 in 20 at most, one of half the size in 10, one that is
# a fifth brighter in 20, one that lost 1% on each side in 24.
MOST_BITS = 28
MOST_COLOR = 10.0  # mean difference of the colours of copies, in grey levels of 0 .. 255
CHUNK = 512  # pictures compared with all others at once


def picture_grids(picture):
    """What is kept of a picture (PIL, RGB): grey values uint8 (32, 32) and colours uint8 (8, 8, 3)."""
    small = picture.resize((GRID, GRID), Image.Resampling.BILINEAR)  # Pillow's averages all it covers: noise goes
    colors = small.resize((COLORS, COLORS), Image.Resampling.BOX)
    return np.asarray(small.convert("L")), np.asarray(colors)


def hash_bits(grids):
    """Grey values (N, 32, 32) -> bool (N, 255)."""
    basis = cosine_basis(GRID)[:FREQUENCIES]  # (16, 32)
    frequencies = basis @ np.asarray(grids, np.float64).reshape(-1, GRID, GRID) @ basis.T  # (N, 16, 16)
    frequencies = frequencies.reshape(-1, FREQUENCIES * FREQUENCIES)[:, 1:]  # (N, 255)
    return frequencies > np.median(frequencies, axis=1, keepdims=True)


def cosine_basis(size):
    """The orthonormal DCT-II as a matrix (size, size): frequency k in row k."""
    places = (2 * np.arange(size) + 1) * np.pi / (2 * size)
    basis = np.cos(np.arange(size)[:, None] * places) * np.sqrt(2 / size)
    basis[0] /= np.sqrt(2)
    return basis


def neighbours(bits, most_bits=MOST_BITS, chunk=CHUNK):
    """Which hashes differ in at most `most_bits` bits.

    All N^2 / 2 pairs are compared, `chunk` rows at a time, so memory is chunk x N; 23,000 pictures take seconds.

    Args:
        bits: bool (N, B).

    Yields:
        (index, others): the neighbours of a picture that come after it, int64 (K,); pictures without any are left out.
    """
    signs = np.where(bits, 1, -1).astype(np.float32)  # (N, B); of two rows, the product's sum is B - 2 * distance
    for start in range(0, len(signs), chunk):
        agreement = signs[start : start + chunk] @ signs[start:].T  # (chunk, N - start); whole numbers, so exact
        near = np.triu(agreement >= bits.shape[1] - 2 * most_bits, 1)
        for row in np.flatnonzero(near.any(1)):
            yield start + int(row), start + np.flatnonzero(near[row])


def find_copies(grids, colors, most_bits=MOST_BITS, most_color=MOST_COLOR):
    """Groups of pictures that are copies of each other, as lists of indices in rising order.

    Args:
        grids, colors: of N pictures, uint8 (N, 32, 32) and (N, 8, 8, 3), from `picture_grids`.
        most_bits: bits of the hash that may differ. most_color: mean difference of the colours, in grey levels, after
            both pictures were brought to the same mean brightness.
    """
    equal = {}  # a picture that is there a thousand times has a million pairs, and is compared once
    for index, (grid, color) in enumerate(zip(grids, colors, strict=True)):
        equal.setdefault(grid.tobytes() + color.tobytes(), []).append(index)
    equal = list(equal.values())
    first = [indices[0] for indices in equal]
    colors = np.asarray(colors[first], np.float32).reshape(-1, COLORS * COLORS * 3)
    colors = colors * (128 / np.maximum(colors.mean(1, keepdims=True), 1))
    labels = np.arange(len(colors))  # a group's label is its first picture
    for index, others in neighbours(hash_bits(grids[first]), most_bits):
        others = others[labels[others] != labels[index]]  # what is in its group needs no comparing
        alike = np.abs(colors[others] - colors[index]).mean(1) <= most_color
        linked = np.unique(labels[[index, *others[alike]]])
        if len(linked) > 1:
            labels[np.isin(labels, linked)] = linked[0]
    groups = {}
    for indices, label in zip(equal, labels.tolist(), strict=True):
        groups.setdefault(label, []).extend(indices)
    return [sorted(group) for group in groups.values() if len(group) > 1]
