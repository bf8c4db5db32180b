"""What is painted on a bag: patterns of the material, zips and straps, stickers, and the wear of travel.

Everything is drawn with numpy and PIL on the six faces of a solid (`baggage.render.raycast.Part`), in metres, so that
a sticker has the same size on a rucksack and on a trunk. A face has colour and relief; the relief becomes the slopes by
which the ray caster bends the light.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

# Of the faces -x, +x, -y, +y, -z, +z: the axes that u (right) and v (up) follow.
FACE_AXES = ((1, 2), (1, 2), (0, 2), (0, 2), (0, 1), (0, 1))
RELIEF = 1e-4  # metres of one step of the 8-bit relief, 128 being the surface itself


# Patterns ------------------------------------------------------------------------------------------------------------
# Each takes points x, y, z on the surface (6, T, T), s and h (distance along and up the faces, continuous around the
# body's sides), a period in metres and a random generator, and returns the share of the second colour in [0, 1] and
# the relief in metres.


def wave(value, period):
    return 0.5 + 0.5 * np.cos(2 * np.pi / period * value)


def step(value):
    return (value > 0.5).astype(np.float32)


def clouds(x, y, z, period, rng, waves=7):
    """Smooth noise in [0, 1] about 0.5: a few plane waves in random directions."""
    total = np.zeros_like(x)
    for _ in range(waves):
        direction = rng.normal(size=3)
        direction *= rng.uniform(0.6, 1.7) / (np.linalg.norm(direction) * period)
        phase = rng.uniform(0, 2 * np.pi)
        total += np.sin(2 * np.pi * (x * direction[0] + y * direction[1] + z * direction[2]) + phase)
    return np.clip(0.5 + total / (1.6 * np.sqrt(waves) * 1.2), 0, 1)


def plain(x, y, z, s, h, period, rng):
    return 0 * x, 4e-4 * (wave(s, 0.02) + wave(h, 0.02))


def ribs(x, y, z, s, h, period, rng):
    profile = np.sqrt(wave(s, period * 0.8))
    return 0.5 * (profile < 0.3), 0.005 * profile


def cross_ribs(x, y, z, s, h, period, rng):
    profile = np.sqrt(wave(h, period))
    return 0.5 * (profile < 0.3), 0.006 * profile


def diamonds(x, y, z, s, h, period, rng):
    profile = np.minimum(wave(s + h, period * 1.6), wave(s - h, period * 1.6))
    return 0.35 * (profile < 0.08), 0.006 * np.sqrt(profile)


def checks(x, y, z, s, h, period, rng):
    return np.abs(step(wave(s, 2.4 * period)) - step(wave(h, 2.4 * period))), 0 * x


def tartan(x, y, z, s, h, period, rng):
    broad = 0.4 * step(wave(s, 3 * period)) + 0.4 * step(wave(h, 3 * period))
    thin = step(wave(s + 0.3 * period, 3 * period) - 0.46) + step(wave(h + 0.3 * period, 3 * period) - 0.46)
    return np.clip(broad + 0.5 * thin, 0, 1), 3e-4 * wave(s + h, 0.012)


def stripes(x, y, z, s, h, period, rng):
    return step(wave(s, 2 * period)), 0 * x


def bands(x, y, z, s, h, period, rng):
    return step(wave(h + 0.3 * period, 2.6 * period) - 0.12), 0 * x


def slanted(x, y, z, s, h, period, rng):
    return step(wave(s + h, 2.6 * period)), 0 * x


def chevrons(x, y, z, s, h, period, rng):
    return step(wave(h - np.abs((s / (3 * period) % 1) - 0.5) * 3 * period, 2 * period)), 0 * x


def dots(x, y, z, s, h, period, rng):
    return step(wave(s, 2 * period) * wave(h, 2 * period) - 0.05), 0 * x


def speckle(x, y, z, s, h, period, rng):
    return step(rng.random(x.shape, dtype=np.float32) - 0.32), 0 * x


def camouflage(x, y, z, s, h, period, rng):
    noise = clouds(x, y, z, 4 * period, rng)
    return 0.5 * (noise > 0.45) + 0.5 * (noise > 0.62), 3e-4 * wave(s - h, 0.012)


def marble(x, y, z, s, h, period, rng):
    return np.clip(1 - 9 * np.abs(clouds(x, y, z, 5 * period, rng) - 0.5), 0, 1), 0 * x


def two_tone(x, y, z, s, h, period, rng):
    return step(0.5 + 8 * (z + 0.02)), 0 * x


PATTERNS = {
    pattern.__name__: pattern
    for pattern in (plain, ribs, cross_ribs, diamonds, checks, tartan, stripes, bands, slanted, chevrons, dots, speckle)
    + (camouflage, marble, two_tone)
}


class Skin:
    """The six faces of a solid while they are being painted."""

    def __init__(self, half, base, second, pattern, period, rng, texels=144):
        self.half = np.asarray(half, np.float32)
        self.texels = texels
        grid = ((np.arange(texels) + 0.5) * 2 / texels - 1).astype(np.float32)
        u, v = np.broadcast_to(grid, (texels, texels)), np.broadcast_to(-grid[:, None], (texels, texels))
        self.points = np.zeros((3, 6, texels, texels), np.float32)  # metres
        for face, (axis_u, axis_v) in enumerate(FACE_AXES):
            self.points[axis_u, face], self.points[axis_v, face] = u * self.half[axis_u], v * self.half[axis_v]
            self.points[face // 2, face] = self.half[face // 2] * (1 if face % 2 else -1)
        x, y, z = self.points
        s = x.copy()
        s[:2] = y[:2]
        h = z.copy()
        h[4:] = y[4:]
        mix, relief = PATTERNS[pattern](x, y, z, s, h, period, rng)
        mix = np.asarray(mix, np.float32)[..., None]
        color = np.asarray(base, np.float32) * (1 - mix) + np.asarray(second, np.float32) * mix
        color *= (1 + 0.05 * rng.standard_normal(x.shape, dtype=np.float32))[..., None]  # grain
        self.color = np.clip(color, 0, 1)  # (6, T, T, 3)
        self.relief = relief.astype(np.float32)  # (6, T, T) metres
        self.images = self.draws = self.relief_draws = None

    def band(self, axis, low, high, color, relief=0.002):
        """A strap around the body: everything whose coordinate `axis` lies between low and high."""
        for face in range(6):
            if face // 2 == axis:
                continue
            place = self.points[axis, face]
            inside = (place > low) & (place < high)
            hem = inside & ((place < low + 0.006) | (place > high - 0.006))
            self.color[face][inside] = color
            self.color[face][hem] = np.asarray(color) * 0.65
            self.relief[face][inside] += relief

    def seam(self, axis, at, width, color, relief=-0.004):
        """A groove around the body, as between the two shells of a suitcase."""
        self.band(axis, at - width / 2, at + width / 2, color, relief)

    def start_drawing(self):
        """From arrays to PIL; bands and seams come before, shapes after."""
        self.images = [Image.fromarray((face * 255).astype(np.uint8)) for face in self.color]
        steps = np.clip(self.relief / RELIEF + 128, 0, 255).astype(np.uint8)
        self.reliefs = [Image.fromarray(face) for face in steps]
        self.draws = [ImageDraw.Draw(image) for image in self.images]
        self.relief_draws = [ImageDraw.Draw(image) for image in self.reliefs]

    def scale(self, face):
        """Texels per metre along u and v."""
        axis_u, axis_v = FACE_AXES[face]
        return self.texels / (2 * self.half[axis_u]), self.texels / (2 * self.half[axis_v])

    def pixels(self, face, points):
        """Metres from the middle of a face, (N, 2) as (u, v up) -> texels [(column, row), ...]."""
        scale_u, scale_v = self.scale(face)
        return [(float(self.texels / 2 + u * scale_u), float(self.texels / 2 - v * scale_v)) for u, v in points]

    def line(self, face, points, color, width, relief=0):
        """relief: steps of 0.1 mm."""
        texels = max(1, round(width * float(np.mean(self.scale(face)))))
        self.draws[face].line(self.pixels(face, points), fill=rgb(color), width=texels, joint="curve")
        if relief:
            self.relief_draws[face].line(self.pixels(face, points), fill=128 + relief, width=texels)

    def polygon(self, face, points, color, relief=0):
        self.draws[face].polygon(self.pixels(face, points), fill=rgb(color))
        if relief:
            self.relief_draws[face].polygon(self.pixels(face, points), fill=128 + relief)

    def frame(self, face, box, radius, color, width, fill=None, relief=0):
        """A rounded rectangle; box is (left, bottom, right, top) in metres from the middle of the face."""
        (left, top), (right, bottom) = self.pixels(face, [(box[0], box[3]), (box[2], box[1])])
        scale = float(np.mean(self.scale(face)))
        shape = dict(radius=radius * scale, width=max(1, round(width * scale)))
        self.draws[face].rounded_rectangle(
            (left, top, right, bottom), outline=rgb(color), fill=None if fill is None else rgb(fill), **shape
        )
        if relief:
            self.relief_draws[face].rounded_rectangle((left, top, right, bottom), outline=128 + relief, **shape)

    def zip(self, face, points, tape, pull):
        """A zip: dark tape, bright teeth, and its pull at the last point."""
        self.line(face, points, tape, 0.013, relief=-18)
        self.line(face, points, np.asarray(tape) * 0.3 + 0.5, 0.003)
        u, v = points[-1]
        self.polygon(face, [(u - 0.007, v), (u + 0.007, v), (u + 0.005, v - 0.035), (u - 0.005, v - 0.035)], pull, 25)

    def sticker(self, face, center, size, angle, image):
        """Lay a picture (RGBA) on a face: center and size in metres, angle in degrees."""
        scale_u, scale_v = self.scale(face)
        turned = image.rotate(angle, Image.Resampling.BICUBIC, expand=True)
        grown = size * turned.width / image.width
        shape = max(2, round(grown * scale_u)), max(2, round(grown * scale_v))
        turned = turned.resize(shape, Image.Resampling.BILINEAR)
        (column, row), *_ = self.pixels(face, [center])
        corner = round(column - shape[0] / 2), round(row - shape[1] / 2)
        self.images[face].paste(turned, corner, turned)
        self.reliefs[face].paste(134, corner, turned.getchannel("A"))

    def wear(self, rng, amount, hard):
        """Scratches, scuffs and, on hard shells, dents; amount 0 is new, 1 has seen the world."""
        for face in range(6):
            extent = self.half[list(FACE_AXES[face])]
            for _ in range(rng.poisson(3 * amount)):
                start = rng.uniform(-0.9, 0.9, 2) * extent
                end = start + rng.normal(size=2) * 0.07
                light = rng.random() < 0.7
                self.line(face, [start, end], (0.82, 0.8, 0.76) if light else (0.1, 0.1, 0.1), 0.003, relief=-12)
            if rng.random() < 0.5 * amount:
                middle = rng.uniform(-0.8, 0.8, 2) * extent
                blob = middle + rng.normal(size=(7, 2)) * 0.02
                order = np.argsort(np.arctan2(*(blob - middle).T))
                self.polygon(face, blob[order], np.clip(rng.uniform(0.55, 0.8) + np.zeros(3), 0, 1))
            if hard and rng.random() < 0.45 * amount:
                self.dent(face, rng.uniform(-0.7, 0.7, 2) * extent, rng.uniform(0.02, 0.045))

    def dent(self, face, center, radius):
        disc = Image.new("L", self.reliefs[face].size, 0)
        (left, top), (right, bottom) = self.pixels(face, [center + [-radius, radius], center + [radius, -radius]])
        ImageDraw.Draw(disc).ellipse((left, top, right, bottom), fill=200)
        disc = disc.filter(ImageFilter.GaussianBlur(float(np.mean(self.scale(face))) * radius * 0.35))
        self.reliefs[face].paste(40, (0, 0), disc)

    def finish(self):
        """-> the painted faces (6, T, T, 5) uint8: colour, and slopes with 128 for level and 64 steps per unit."""
        faces = np.full((6, self.texels, self.texels, 5), 128, np.uint8)
        for face in range(6):
            faces[face, ..., :3] = np.asarray(self.images[face])
            relief = self.reliefs[face].filter(ImageFilter.BoxBlur(0.7))
            heights = np.asarray(relief, np.float32) * RELIEF
            scale_u, scale_v = self.scale(face)
            down, right = np.gradient(heights)
            faces[face, ..., 3] = np.clip(128 + 64 * right * scale_u, 0, 255)
            faces[face, ..., 4] = np.clip(128 - 64 * down * scale_v, 0, 255)
        return faces


def flat_faces(color):
    """Faces of one even colour."""
    texel = np.array([*(np.clip(color, 0, 1) * 255), 128, 128]).astype(np.uint8)
    return np.broadcast_to(texel, (6, 1, 1, 5)).copy()


def rgb(color):
    return tuple(int(c) for c in np.clip(np.asarray(color) * 255, 0, 255))


# Stickers ------------------------------------------------------------------------------------------------------------

SIDE = 96  # pixels of a sticker while it is drawn


def star(center, radius, points=5, inner=0.42, turn=0.0):
    angle = np.arange(2 * points) * np.pi / points - np.pi / 2 + turn
    reach = np.where(np.arange(2 * points) % 2, inner, 1) * radius
    return [(center + r * np.cos(a), center + r * np.sin(a)) for a, r in zip(angle, reach, strict=True)]


def sticker_image(rng):
    """A small sticker without a word on it: (SIDE, SIDE) RGBA. Fourteen designs in random bright colours."""
    image = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    palette = [(226, 48, 48), (250, 190, 30), (40, 110, 215), (30, 160, 90), (245, 245, 240), (30, 30, 36)]
    palette += [(240, 120, 30), (150, 60, 170), (60, 190, 210), (245, 130, 170)]
    one, two, three = (palette[k] for k in rng.permutation(len(palette))[:3])
    full, middle = (4, 4, SIDE - 5, SIDE - 5), SIDE // 2
    design = int(rng.integers(14))
    if design == 0:  # roundel
        for inset, color in ((4, one), (18, two), (32, three)):
            draw.ellipse((inset, inset, SIDE - inset, SIDE - inset), fill=color)
    elif design == 1:  # star on a disc
        draw.ellipse(full, fill=one)
        draw.polygon(star(middle, 38), fill=two)
    elif design == 2:  # heart
        draw.ellipse((8, 12, 52, 56), fill=one)
        draw.ellipse((44, 12, 88, 56), fill=one)
        draw.polygon([(11, 44), (85, 44), (48, 90)], fill=one)
    elif design == 3:  # tricolour, upright
        for k, color in enumerate((one, two, three)):
            draw.rectangle((4 + 29 * k, 18, 33 + 29 * k, 78), fill=color)
    elif design == 4:  # tricolour, level
        for k, color in enumerate((one, two, three)):
            draw.rectangle((4, 16 + 21 * k, 92, 37 + 21 * k), fill=color)
    elif design == 5:  # cross flag
        draw.rectangle((4, 16, 92, 80), fill=one)
        draw.rectangle((26, 16, 42, 80), fill=two)
        draw.rectangle((4, 40, 92, 56), fill=two)
    elif design == 6:  # bar code
        draw.rectangle((4, 20, 92, 76), fill=(248, 248, 245))
        column = 10
        while column < 84:
            width = int(rng.integers(2, 7))
            draw.rectangle((column, 27, column + width, 64), fill=(15, 15, 15))
            column += width + int(rng.integers(2, 6))
        draw.rectangle((4, 68, 92, 76), fill=one)
    elif design == 7:  # smile
        draw.ellipse(full, fill=(250, 205, 40))
        draw.ellipse((28, 30, 38, 46), fill=(30, 30, 30))
        draw.ellipse((58, 30, 68, 46), fill=(30, 30, 30))
        draw.arc((24, 30, 72, 76), 20, 160, fill=(30, 30, 30), width=6)
    elif design == 8:  # sunset over hills
        draw.rounded_rectangle(full, 14, fill=one)
        draw.ellipse((30, 22, 66, 58), fill=two)
        draw.polygon([(4, 84), (36, 46), (58, 70), (72, 54), (92, 84), (90, 91), (6, 91)], fill=three)
    elif design == 9:  # a glass: fragile
        draw.rectangle((10, 4, 86, 92), fill=(250, 250, 245))
        draw.rectangle((16, 10, 80, 86), outline=(215, 40, 40), width=5)
        draw.polygon([(30, 18), (66, 18), (58, 46), (38, 46)], fill=(215, 40, 40))
        draw.rectangle((45, 46, 51, 70), fill=(215, 40, 40))
        draw.rectangle((34, 70, 62, 76), fill=(215, 40, 40))
    elif design == 10:  # aeroplane
        draw.ellipse(full, fill=one)
        draw.polygon(
            [(48, 10), (54, 24), (54, 40), (86, 60), (86, 68), (54, 58), (53, 74), (64, 84), (32, 84)], fill=two
        )
        draw.polygon(
            [(48, 10), (42, 24), (42, 40), (10, 60), (10, 68), (42, 58), (43, 74), (32, 84), (64, 84)], fill=two
        )
    elif design == 11:  # chequers
        for row, column in np.ndindex(4, 4):
            color = one if (row + column) % 2 else two
            draw.rectangle((4 + 22 * column, 4 + 22 * row, 25 + 22 * column, 25 + 22 * row), fill=color)
    elif design == 12:  # flower
        for angle in np.arange(6) * np.pi / 3:
            x, y = middle + 26 * np.cos(angle), middle + 26 * np.sin(angle)
            draw.ellipse((x - 18, y - 18, x + 18, y + 18), fill=one)
        draw.ellipse((34, 34, 62, 62), fill=two)
    else:  # burst
        draw.polygon(star(middle, 45, points=12, inner=0.75), fill=one)
        draw.ellipse((22, 22, 74, 74), fill=two)
        draw.polygon(star(middle, 22), fill=three)
    return image
