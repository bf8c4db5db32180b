"""Bags: how each kind is built from solids and painted, after its look.

A bag stands with its bottom down (z up), its front towards +y and its width along x, in metres around its middle.
"""

from typing import NamedTuple

import numpy as np

from baggage.render.art import Skin, flat_faces, sticker_image
from baggage.render.looks import ACCENTS, KINDS, METAL, RUBBER, STEEL
from baggage.render.raycast import Part

UPRIGHT = np.eye(3)
ALONG_X = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])  # a part's y axis lies along the bag's x


class Bag(NamedTuple):
    parts: list[Part]  # the body first
    kind: str
    category: str
    material: str


def make_bag(look, rng):
    """Build and paint a bag."""
    build = {
        "hard_shell": hard_shell,
        "soft_suitcase": soft_suitcase,
        "backpack": backpack,
        "duffel": duffel,
        "briefcase": briefcase,
        "box": box,
    }[look.kind]
    category, material = KINDS[look.kind]
    return Bag(build(look, rng), look.kind, category, material)


def solid(center, half, color, corner=0.01, edge=0.01, rotation=UPRIGHT, gloss=0.3):
    """A part of one colour."""
    half = np.asarray(half, float)
    edge, corner = min(edge, half.min()), min(corner, half[0], half[2])
    return Part(np.asarray(center, float), rotation, half, (corner, corner), edge, 0.0, flat_faces(color), gloss)


def rod(start, end, radius, color, gloss=0.3):
    """A round bar from one point to another."""
    start, end = np.asarray(start, float), np.asarray(end, float)
    length = np.linalg.norm(end - start)
    along = (end - start) / length
    across = np.cross(along, [0.0, 0.0, 1.0] if abs(along[2]) < 0.9 else [1.0, 0.0, 0.0])
    across /= np.linalg.norm(across)
    rotation = np.stack([across, np.cross(along, across), along], axis=1)
    half = (radius, radius, length / 2 + radius)
    return solid((start + end) / 2, half, color, radius, radius, rotation, gloss)


def arch(start, end, rise, radius, color, pieces=3, gloss=0.3):
    """A handle: a bent bar from start to end whose middle stands out by the vector `rise`."""
    start, end, rise = (np.asarray(v, float) for v in (start, end, rise))
    share = np.linspace(0, 1, pieces + 1)[:, None]
    height = (1 - (2 * share - 1) ** 4) if pieces <= 3 else (1 - (2 * share - 1) ** 2)
    points = start + (end - start) * share + rise * height
    return [rod(a, b, radius, color, gloss) for a, b in zip(points[:-1], points[1:], strict=True)]


def body(skin, corners, edge, bulge=0.0, gloss=0.1, center=(0, 0, 0), rotation=UPRIGHT):
    """The painted part of a finished skin."""
    half = skin.half.astype(float)
    limit = min(half[0], half[2])
    corners = tuple(min(corner, limit) for corner in corners)
    return Part(np.asarray(center, float), rotation, half, corners, min(edge, half.min()), bulge, skin.finish(), gloss)


def stick(skin, rng, faces, count, room=0.62, size=(0.07, 0.13)):
    """Put stickers on faces, drawn with weights by the order given: the first are the most likely."""
    weights = 1.0 / np.arange(1, len(faces) + 1)
    for _ in range(count):
        face = int(rng.choice(faces, p=weights / weights.sum()))
        u, v = (1, 2) if face < 2 else (0, 2) if face < 4 else (0, 1)
        spot = rng.uniform(-room, room, 2) * skin.half[[u, v]]
        largest = 1.5 * min(skin.half[u], skin.half[v])
        skin.sticker(face, spot, min(rng.uniform(*size), largest), rng.uniform(-40, 40), sticker_image(rng))


def telescope(look, back, top, extension):
    """The pull-out handle of a trolley."""
    spread = 0.45 * look.half[0]
    ends = [(-spread, back, top), (spread, back, top)]
    bars = [rod(end, np.add(end, (0, 0, extension)), 0.009, METAL, 0.8) for end in ends]
    grip = solid((0, back, top + extension), (spread + 0.02, 0.016, 0.014), look.dark, 0.012, 0.012)
    return [*bars, grip]


def wheels(look, inset_y):
    """Four wheels under a case; options[5] settles their colour."""
    a, _, b = look.half
    color = look.accent if look.options[5] < 0.3 else RUBBER
    spots = [(x * (a - 0.05), y * inset_y) for x in (-1, 1) for y in (-1, 1)]
    tyres = [solid((x, y, -b - 0.018), (0.026, 0.014, 0.026), color, 0.026, 0.006, ALONG_X) for x, y in spots]
    return tyres


def name_tag(look, at):
    """A coloured tag that hangs from a handle."""
    x, y, z = at
    return [solid((x, y, z - 0.045), (0.03, 0.004, 0.05), look.accent, 0.01, 0.004, gloss=0.5)]


def hard_shell(look, rng):
    a, d, b = look.half
    o = look.options
    skin = Skin(look.half, look.base, look.second, look.pattern, look.period, rng)
    skin.seam(1, 0.0, 0.016, look.accent * 0.9 if o[0] < 0.35 else np.array(RUBBER), -0.004)
    if o[1] < 0.3:
        skin.band(0, -0.03, 0.03, look.accent)
    elif o[1] < 0.42:
        skin.band(2, 0.0, 0.055, look.accent)
    skin.start_drawing()
    if o[2] < 0.35:  # corner guards
        for face in (2, 3):
            for sx, sz in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
                x, z, r = sx * a, sz * b, 0.11
                skin.polygon(
                    face, [(x, z), (x - sx * r, z), (x - sx * r * 0.7, z - sz * r * 0.7), (x, z - sz * r)], look.dark
                )
    for face in (2, 3):  # maker's badge
        skin.frame(face, (-0.035, b - 0.12, 0.035, b - 0.095), 0.008, STEEL, 0.01, fill=STEEL, relief=15)
    skin.frame(1, (-0.028, -0.02, 0.028, 0.05), 0.01, RUBBER, 0.01, fill=METAL, relief=20)  # lock
    stick(skin, rng, [3, 2, 1, 0, 5], int(rng.integers(1, 6)))
    skin.wear(rng, look.wear, hard=True)
    parts = [body(skin, (0.07 + 0.05 * o[3],) * 2, 0.045, 0.012, 0.35 + 0.6 * o[4])]
    parts += wheels(look, d - 0.05)
    parts += arch((-0.075, 0, b - 0.005), (0.075, 0, b - 0.005), (0, 0, 0.035), 0.012, look.dark)
    parts += arch((a - 0.005, 0, -0.08), (a - 0.005, 0, 0.08), (0.03, 0, 0), 0.011, look.dark)
    if o[6] < 0.55:
        parts += telescope(look, -d + 0.035, b - 0.01, 0.06 + 0.25 * (o[6] < 0.25))
    if o[7] < 0.35:
        parts += name_tag(look, (0.05, 0.03, b + 0.03))
    return parts


def pocket(look, rng, half, center, plain_color, texels=80):
    """A pocket on a soft bag's front, with its zip."""
    base = look.base * 0.92 if plain_color else look.accent
    skin = Skin(half, base, look.second, "plain" if plain_color else look.pattern, look.period, rng, texels)
    skin.start_drawing()
    a, _, b = half
    skin.frame(3, (-a + 0.008, -b + 0.008, a - 0.008, b - 0.008), 0.03, look.accent * 0.8, 0.006)
    zipped = [(-a * 0.75, b * 0.62), (a * 0.75, b * 0.62)]
    skin.zip(3, zipped, RUBBER, STEEL)
    stick(skin, rng, [3], int(rng.random() < 0.35), room=0.4, size=(0.06, 0.1))
    skin.wear(rng, 0.4 * look.wear, hard=False)
    return body(skin, (0.04, 0.04), 0.022, 0.012, 0.08, center)


def soft_suitcase(look, rng):
    a, d, b = look.half
    o = look.options
    skin = Skin(look.half, look.base, look.second, look.pattern, look.period, rng)
    skin.seam(1, 0.35 * d, 0.014, np.array(RUBBER), -0.003)
    if o[1] < 0.35:
        skin.band(0, -0.028, 0.028, look.accent)
    skin.start_drawing()
    for face in (2, 3):  # piping
        trim = look.accent if o[0] < 0.5 else look.dark
        skin.frame(face, (-a + 0.012, -b + 0.012, a - 0.012, b - 0.012), 0.05, trim, 0.012, relief=30)
    skin.zip(1, [(0.35 * d, -b * 0.8), (0.35 * d, b * 0.8)], RUBBER, STEEL)
    stick(skin, rng, [1, 0, 2, 5, 3], int(rng.integers(1, 4)), size=(0.06, 0.1))
    skin.wear(rng, 0.6 * look.wear, hard=False)
    parts = [body(skin, (0.045, 0.055), 0.03, 0.016, 0.06)]
    tall = o[2] < 0.5
    if tall:
        parts.append(pocket(look, rng, (a * 0.78, 0.03, b * 0.72), (0, d + 0.012, -0.1 * b), o[3] < 0.5))
    else:
        parts.append(pocket(look, rng, (a * 0.78, 0.03, b * 0.36), (0, d + 0.012, -0.48 * b), o[3] < 0.5))
        parts.append(pocket(look, rng, (a * 0.78, 0.022, b * 0.28), (0, d + 0.010, 0.42 * b), o[3] < 0.75))
    parts += wheels(look, d - 0.05)
    parts += arch(
        (-0.08, 0, b - 0.004), (0.08, 0, b - 0.004), (0, 0, 0.04), 0.013, look.accent if o[4] < 0.3 else look.dark
    )
    if o[6] < 0.7:
        parts += telescope(look, -d + 0.03, b - 0.01, 0.05 + 0.27 * (o[6] < 0.3))
    if o[7] < 0.45:
        parts += name_tag(look, (-0.05, 0.03, b + 0.035))
    return parts


def backpack(look, rng):
    a, d, b = look.half
    o = look.options
    skin = Skin(look.half, look.base, look.second, look.pattern, look.period, rng)
    if o[1] < 0.3:
        skin.band(2, -0.02, 0.02, look.accent)
    skin.start_drawing()
    bow = [(-0.85 * a, -0.1 * b), (-0.8 * a, 0.45 * b), (-0.5 * a, 0.8 * b), (0.5 * a, 0.8 * b), (0.8 * a, 0.45 * b)]
    skin.zip(3, [*bow, (0.85 * a, -0.1 * b)], RUBBER, look.accent)
    skin.zip(5, [(-0.8 * a, 0.0), (0.8 * a, 0.0)], RUBBER, look.accent)
    stick(skin, rng, [3, 1, 0, 5], int(rng.integers(1, 4)), size=(0.05, 0.09))
    skin.wear(rng, 0.5 * look.wear, hard=False)
    parts = [body(skin, (0.05, 0.12), 0.05, 0.02, 0.05)]
    height = 0.5 if o[2] < 0.5 else 0.36
    parts.append(pocket(look, rng, (a * 0.72, 0.035, b * height), (0, d + 0.02, b * (height - 0.92)), o[3] < 0.5))
    if o[4] < 0.5:
        parts.append(pocket(look, rng, (a * 0.6, 0.02, b * 0.17), (0, d + 0.015, b * 0.42), o[3] > 0.5, texels=56))
    for side in (-1, 1):  # side nets, one with a bottle
        parts.append(solid((side * a, 0, -0.55 * b), (0.022, d * 0.55, b * 0.32), look.base * 0.6, 0.03, 0.02))
    if o[5] < 0.5:
        color = ACCENTS[int(o[5] * 2 * len(ACCENTS))]
        parts.append(rod((a + 0.02, 0, -0.6 * b), (a + 0.02, 0, -0.02 * b), 0.034, color, 0.8))
        parts.append(rod((a + 0.02, 0, 0.06 * b), (a + 0.02, 0, 0.10 * b), 0.022, RUBBER, 0.4))
    strap = look.accent if o[0] < 0.5 else look.base * 0.55
    for side in (-0.5, 0.5):
        top, low = (side * a, -d, b * 0.72), (side * a * 1.5, -d, -b * 0.75)
        parts += arch(top, low, (0, -0.05, 0), 0.019, strap, pieces=4)
    parts += arch((-0.05, -d * 0.5, b - 0.006), (0.05, -d * 0.5, b - 0.006), (0, 0, 0.045), 0.010, strap)
    return parts


def duffel(look, rng):
    length, depth, height = look.half
    o = look.options
    half = np.array([depth, length, height])  # drawn out along the bag's x
    skin = Skin(half, look.base, look.second, look.pattern, look.period, rng)
    strap = look.accent if o[0] < 0.6 else look.dark
    spread = 0.42 * length
    for side in (-1, 1):
        skin.band(1, side * spread - 0.018, side * spread + 0.018, strap)
    if o[1] < 0.4:  # end caps in another colour
        for low, high in ((-length, -0.78 * length), (0.78 * length, length)):
            skin.band(1, low, high, look.accent, 0.0)
    skin.start_drawing()
    skin.zip(5, [(0.0, -length * 0.8), (0.0, length * 0.8)], RUBBER, STEEL)
    for face in (2, 3):
        skin.frame(face, (-depth * 0.6, -height * 0.5, depth * 0.6, height * 0.4), 0.03, strap, 0.01, relief=25)
    stick(skin, rng, [1, 0, 3, 2], int(rng.integers(1, 4)), size=(0.07, 0.11))
    skin.wear(rng, 0.5 * look.wear, hard=False)
    parts = [body(skin, (0.7 * depth, 0.95 * depth), 0.04 + 0.03 * o[3], 0.025, 0.07, rotation=ALONG_X)]
    for side in (-1, 1):
        start, end = (-spread, side * depth * 0.62, height * 0.80), (spread, side * depth * 0.62, height * 0.80)
        rise = (0, -side * depth * (0.5 if o[4] < 0.5 else -0.35), 0.10 if o[4] < 0.5 else 0.02)
        parts += arch(start, end, rise, 0.012, strap, pieces=4)
    if o[2] < 0.5:
        parts.append(
            pocket(look, rng, (length * 0.34, 0.025, height * 0.5), (0, depth + 0.004, -0.1 * height), o[5] < 0.5)
        )
    if o[7] < 0.4:
        parts += name_tag(look, (length * 0.9, 0.0, height * 0.75))
    return parts


def briefcase(look, rng):
    a, d, b = look.half
    o = look.options
    skin = Skin(look.half, look.base, look.second, look.pattern, look.period, rng)
    skin.seam(1, 0.0, 0.012, look.dark)
    skin.start_drawing()
    if o[0] < 0.6:  # a flap with two clasps
        flap = look.accent if o[1] < 0.4 else look.base * 0.7
        skin.frame(3, (-a, -0.05 * b, a, b + 0.02), 0.03, flap * 0.7, 0.008, fill=flap, relief=25)
        skin.frame(5, (-a, -d, a, d), 0.0, flap, 0.01, fill=flap)
    for x in (-0.45 * a, 0.45 * a):
        skin.frame(3, (x - 0.018, -0.25 * b, x + 0.018, 0.15 * b), 0.008, look.dark, 0.006, fill=STEEL, relief=30)
    stick(skin, rng, [2, 3, 1, 0], int(rng.integers(1, 4)), size=(0.05, 0.08))
    skin.wear(rng, 0.6 * look.wear, hard=False)
    parts = [body(skin, (0.03, 0.04), 0.025, 0.008, 0.35)]
    parts += arch((-0.07, 0, b - 0.004), (0.07, 0, b - 0.004), (0, 0, 0.05), 0.011, look.dark)
    if o[2] < 0.5:
        parts += arch((-a, 0, b * 0.6), (a, 0, b * 0.6), (0, d * 1.2, b * 0.2), 0.009, look.accent, pieces=6)
    if o[7] < 0.5:
        parts += name_tag(look, (0.06, 0.03, b + 0.03))
    return parts


def box(look, rng):
    a, d, b = look.half
    o = look.options
    skin = Skin(look.half, look.base, look.second, look.pattern, look.period * 1.6, rng)
    tape = np.array((0.80, 0.68, 0.45)) if o[0] < 0.4 else look.accent
    skin.band(1, -0.028, 0.028, tape, 0.0005)
    if o[1] < 0.4:
        skin.band(0, -0.05 * a - 0.022, -0.05 * a + 0.022, tape if o[2] < 0.5 else np.array(RUBBER), 0.0005)
    skin.start_drawing()
    for face in (0, 1):  # hand holes
        skin.frame(
            face, (-0.045, 0.35 * b, 0.045, 0.35 * b + 0.028), 0.014, (0.08, 0.06, 0.05), 0.01, fill=(0.08, 0.06, 0.05)
        )
    if o[3] < 0.6:  # this way up
        for x in (-0.62 * a, -0.62 * a + 0.055):
            points = [
                (x, -0.35 * b),
                (x, 0.0),
                (x - 0.018, 0.0),
                (x + 0.008, 0.045),
                (x + 0.034, 0.0),
                (x + 0.016, 0.0),
            ]
            for face in (2, 3):
                skin.polygon(
                    face, [*points, (x + 0.016, -0.35 * b)], np.array((0.1, 0.1, 0.1)) if o[4] < 0.6 else look.accent
                )
    if o[5] < 0.7:  # the maker's print
        skin.frame(3, (0.05 * a, -0.7 * b, 0.8 * a, -0.1 * b), 0.02, look.accent, 0.01, fill=look.accent * 0.9)
        skin.frame(2, (-0.7 * a, -0.5 * b, 0.6 * a, -0.1 * b), 0.02, look.accent, 0.01, fill=None)
    stick(skin, rng, [3, 2, 1, 0, 5], int(rng.integers(2, 6)), size=(0.07, 0.12))
    skin.wear(rng, 0.7 * look.wear, hard=True)
    return [body(skin, (0.006, 0.006), 0.006, 0.004, 0.05)]
