import io

import numpy as np
import pytest
from PIL import Image

from baggage import perceptual_hash
from baggage.perceptual_hash import BITS, cosine_basis, find_copies, hash_bits, neighbours, picture_grids


def noise(seed, size=(180, 140)):
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def grids_of(pictures):
    grids, colors = zip(*map(picture_grids, pictures), strict=True)
    return np.stack(grids), np.stack(colors)


def test_cosine_basis_by_hand_and_orthonormal():
    half = np.sqrt(0.5)
    np.testing.assert_allclose(cosine_basis(2), [[half, half], [half, -half]], atol=1e-12)
    np.testing.assert_allclose(cosine_basis(32) @ cosine_basis(32).T, np.eye(32), atol=1e-12)


def test_bits_are_the_frequencies_of_the_picture():
    x = np.arange(32) + 0.5
    wave = 128 + 60 * np.cos(np.pi * 3 * x / 32)[None].repeat(32, 0)  # frequency 3 from left to right, and no other
    frequencies = cosine_basis(32) @ wave @ cosine_basis(32).T
    assert abs(frequencies[0, 3]) > 900 and np.abs(np.delete(frequencies.ravel(), [0, 3])).max() < 1e-9
    bits = hash_bits(wave[None])
    assert bits.shape == (1, BITS) and bits[0, 2]  # the constant part is left out, so frequency 3 is the third bit


def test_brightness_and_contrast_change_no_bit():
    (grid,), _ = grids_of([noise(0)])
    np.testing.assert_array_equal(hash_bits(grid[None]), hash_bits(grid[None] * 0.5 + 40))


def test_neighbours_are_those_of_all_pairs():
    random = np.random.default_rng(0)
    bits = random.random((300, 40)) < 0.5
    distance = (bits[:, None] != bits[None]).sum(2)
    for chunk in (1, 7, 300, 1000):
        pairs = {(a, int(b)) for a, others in neighbours(bits, 12, chunk) for b in others}
        assert pairs == {(a, b) for a, b in zip(*np.nonzero(distance <= 12), strict=True) if a < b}
    assert 0 < len(pairs) < 2000


def test_copies_and_what_is_none():
    pictures = [noise(seed) for seed in range(12)]
    buffer = io.BytesIO()
    pictures[3].save(buffer, "JPEG", quality=40)
    pictures += [pictures[5].resize((120, 94)), Image.open(buffer).convert("RGB"), pictures[5]]
    red, green, blue = pictures[7].split()
    pictures.append(Image.merge("RGB", (blue, green, red)))  # another colour
    pictures.append(Image.fromarray(255 - np.asarray(pictures[8])))
    assert find_copies(*grids_of(pictures)) == [[3, 13], [5, 12, 14]]


def test_a_chain_is_one_group():
    grids, colors = grids_of([noise(0)] * 3)
    grids = grids.astype(np.float64)
    basis = cosine_basis(32)
    # Each step brings other frequencies over the median; first and last are not neighbours.
    for step in (1, 2):
        grids[step] = grids[0] + sum(200 * np.outer(basis[k], basis[15]) for k in range(8 * step))
    bits = hash_bits(grids)
    limit = max((bits[0] != bits[1]).sum(), (bits[1] != bits[2]).sum())
    assert (bits[0] != bits[2]).sum() > limit
    assert find_copies(grids, colors, most_bits=limit) == [[0, 1, 2]]


def test_equal_pictures_are_compared_once(monkeypatch):
    compared = []
    monkeypatch.setattr(perceptual_hash, "hash_bits", lambda grids: compared.append(len(grids)) or hash_bits(grids))
    pictures = [noise(0), noise(1), noise(0, (120, 94)), noise(2)]  # the third is a copy of the first
    order = np.arange(5000) % 3
    order[-1] = 3
    grids, colors = (values[order] for values in grids_of(pictures))
    groups = [np.flatnonzero((order == 0) | (order == 2)).tolist(), np.flatnonzero(order == 1).tolist()]
    assert find_copies(grids, colors) == groups and compared == [4]


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_to_compare(count):
    grids, colors = np.zeros((count, 32, 32), np.uint8), np.zeros((count, 8, 8, 3), np.uint8)
    assert find_copies(grids, colors) == []
