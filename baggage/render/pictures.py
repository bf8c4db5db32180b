"""Pictures of bags: where they stand, under which light, and what a camera makes of it.

Two camera sets: before security (even light, a grey belt, sharp pictures) and after it (lamps of another colour and
from the side, other floors, trays, rails and other bags in the way, blur and noise).
"""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from baggage.render.models import Bag, solid
from baggage.render.raycast import Light, Placed, look_at, part_corners, render

LEAST_VISIBLE = 0.15  # of a picture has to show its bag
LYING = {"hard_shell": 0.35, "soft_suitcase": 0.35, "backpack": 0.4, "briefcase": 0.3, "duffel": 0.0, "box": 0.0}


class Identity(NamedTuple):
    number: int
    bag: Bag


class Setting(NamedTuple):
    """A camera set: what stands around the bags, the light, and what the camera does to the picture."""

    backdrop: object  # callable (x, y) -> (H, W, 3)
    light: Light
    cast: np.ndarray  # (3,) white balance
    gamma: float
    blur: float  # pixels
    drag: int  # pixels of motion blur
    noise: float
    quality: int  # of the JPEG


# One picture of one bag ----------------------------------------------------------------------------------------------


def place(bag, x, y, yaw, lying):
    """Put a bag on the belt at (x, y), turned by `yaw`, standing or on its back."""
    cosine, sine = np.cos(yaw), np.sin(yaw)
    rotation = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1.0]])
    if lying:
        rotation = rotation @ np.array([[1.0, 0, 0], [0, 0, -1.0], [0, 1.0, 0]])  # the front looks up
    placed = Placed(bag.parts, rotation, np.array([x, y, 0.0]))
    lowest = min(part_corners(part, placed)[:, 2].min() for part in bag.parts)
    return placed._replace(position=np.array([x, y, -lowest]))


def stand(identity, datatype, view, views, rng):
    """How a bag stands and is seen: the placed bag, the camera's place (3,), what it looks at (3,), and the setting."""
    lying = rng.random() < LYING[identity.bag.kind]
    if datatype == "g":  # a ring of cameras: evenly spaced views
        yaw, pitch = 2 * np.pi * (view + rng.uniform(-0.3, 0.3)) / views, rng.uniform(0.45, 0.8)
    else:
        yaw, pitch = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 1.05)
    setting = before_security(rng) if datatype == "g" else after_security(rng)
    target = place(identity.bag, 0.0, 0.0, yaw, lying)
    distance = rng.uniform(1.7, 2.4)
    middle = np.array([0.0, 0.0, target.position[2] * 0.9])
    position = middle + distance * np.array([0.0, -np.cos(pitch), np.sin(pitch)])
    position[0] += rng.uniform(-0.25, 0.25)
    return target, position, middle, setting


def take_picture(identity, others, datatype, view, views, rng):
    """A cropped picture of one bag, (H, W, 3) uint8, its visible mask (H, W), and the JPEG's quality."""
    target, position, middle, setting = stand(identity, datatype, view, views, rng)
    camera = frame_object(position, middle, target, (0.02, 0.12) if datatype == "g" else (-0.03, 0.16), rng)
    around = [] if datatype == "g" else clutter(identity, others, target, rng)
    picture, masks = render(camera, [target, *around], setting.backdrop, setting.light)
    if masks[0].mean() < LEAST_VISIBLE:  # what stands before the bag hides it
        picture, masks = render(camera, [target], setting.backdrop, setting.light)
    return expose(picture, setting, rng), masks[0], setting.quality


def frame_object(position, middle, target, margins, rng):
    """A camera at `position` whose picture is a crop around the target, with a random margin on each side."""
    corners = np.concatenate([part_corners(part, target) for part in target.parts])
    unit = look_at(position, middle, 1.0, (0, 0), (0.0, 0.0))
    spread = unit.project(corners)
    low, high = spread.min(0), spread.max(0)
    extent = high - low
    low, high = low - rng.uniform(*margins, 2) * extent, high + rng.uniform(*margins, 2) * extent
    extent = high - low
    focal = rng.uniform(112, 200) / extent.max()
    size = tuple(int(n) for n in np.maximum(np.round(extent * focal), 48))
    return unit._replace(focal=focal, center=tuple(-low * focal), size=size)


def clutter(identity, others, target, rng):
    """What stands around and before a bag after security: a tray, another bag, a rail, curtain strips."""
    objects = []
    corners = part_corners(target.parts[0], target)
    reach = np.abs(corners[:, :2]).max(0)  # half extent on the belt
    if rng.random() < 0.45:
        objects.append(tray(reach + 0.05, rng))
    kind = rng.random()
    if kind < 0.45 and len(others) > 1:
        other = others[int(rng.integers(len(others)))]
        if other.number != identity.number:
            side = rng.choice([-1, 1])
            beside = place(other.bag, 0, 0, rng.uniform(0, 2 * np.pi), rng.random() < LYING[other.bag.kind])
            room = np.abs(part_corners(beside.parts[0], beside)[:, :2]).max(0)
            x = side * (reach[0] + room[0]) * rng.uniform(0.8, 1.05)
            y = rng.choice([-1, 1]) * (reach[1] + room[1]) * rng.uniform(0.55, 0.9)
            objects.append(beside._replace(position=beside.position + [x, y, 0]))
    elif kind < 0.62:  # a rail before the bag
        center = (0, -reach[1] - 0.12, rng.uniform(0.02, 0.10))
        rail = solid(center, (2.0, 0.02, 0.025), (0.7, 0.71, 0.74), 0.02, 0.015, gloss=0.8)
        objects.append(Placed([rail], np.eye(3), np.zeros(3)))
    elif kind < 0.78:  # lead curtain of the scanner
        strips = []
        height = corners[:, 2].max()
        edge = rng.choice([-1, 1]) * reach[0]
        for k in range(int(rng.integers(1, 4))):
            x = edge * (1 - 0.26 * k) + rng.normal() * 0.01
            center = (x, -reach[1] - 0.16, height * 0.75 + rng.uniform(0.0, 0.1))
            strips.append(solid(center, (0.045, 0.006, height * 0.75), (0.14, 0.15, 0.15), 0.01, 0.004))
        objects.append(Placed(strips, np.eye(3), np.zeros(3)))
    return objects


def tray(reach, rng):
    """A security tray around the origin: floor and four walls."""
    x, y = reach
    color = [(0.50, 0.53, 0.56), (0.28, 0.36, 0.46), (0.22, 0.23, 0.25), (0.62, 0.60, 0.55)][int(rng.integers(4))]
    height = rng.uniform(0.035, 0.06)
    walls = [solid((0, side * y, height), (x + 0.015, 0.012, height), color, 0.01, 0.01) for side in (-1, 1)]
    walls += [solid((side * x, 0, height), (0.012, y + 0.015, height), color, 0.01, 0.01) for side in (-1, 1)]
    floor = solid((0, 0, 0.003), (x, y, 0.003), np.array(color) * 0.8, 0.003, 0.003)
    return Placed([floor, *walls], np.eye(3), np.zeros(3))


# Places and cameras --------------------------------------------------------------------------------------------------


def grain(x, y, period):
    """Fine irregularity of a surface, (H, W) in [-1, 1], fixed in the world."""
    a, b = x * np.float32(6.3 / period), y * np.float32(6.3 / period)
    return np.sin(a + 1.7 * np.sin(b * 0.7)) * np.sin(b + 1.3 * np.sin(a * 0.6 + 1.0))


def ramp(distance, width):
    """0 before an edge, 1 behind it, with a slope of `width` metres that keeps the edge from looking jagged."""
    return np.clip(distance / width + 0.5, 0, 1)


def lines(place, period, width):
    """1 on thin lines every `period` metres, 0 between them, with soft flanks."""
    return np.clip(1.5 - np.abs((place % period) - period / 2) / width, 0, 1)


def belt(tone, shift, width):
    """A rubber belt along x with steel rails on a tiled floor: a function of world coordinates."""

    def backdrop(x, y):
        rubber = 1 - 0.25 * lines(x + shift, 0.42, 0.008) + 0.04 * grain(x + shift, y, 0.05) + 0.03 * np.sin(y * 260)
        side = np.abs(y)
        steel = 0.58 + 0.14 * np.cos((side - width) * 60)
        joints = np.maximum(lines(x, 0.60, 0.008), lines(y, 0.60, 0.008))
        floor = 0.40 - 0.08 * joints + 0.015 * grain(x, y, 0.07)
        off_belt, off_rail = ramp(side - width, 0.012), ramp(side - width - 0.09, 0.012)
        around = steel + (floor - steel) * off_rail
        color = (rubber * (1 - off_belt))[..., None] * tone + (around * off_belt)[..., None]
        return color.astype(np.float32)

    return backdrop


def rollers(shift):
    def backdrop(x, y):
        phase = ((x + shift) % 0.11) / 0.11 * 2 - 1
        value = np.where(np.abs(phase) < 0.82, 0.30 + 0.5 * np.sqrt(np.maximum(1 - phase**2, 0)), 0.10)
        value = value + 0.03 * grain(x, y, 0.07)
        value = np.where(np.abs(y) > 0.55, 0.45, value)[..., None]
        return (value * np.array([0.95, 0.98, 1.0])).astype(np.float32)

    return backdrop


def floor_tiles(tone, shift):
    def backdrop(x, y):
        joint = np.maximum(lines(x + shift + 0.2, 0.40, 0.006), lines(y + shift + 0.2, 0.40, 0.006))
        odd = (np.floor((x + shift) / 0.40) + np.floor((y + shift) / 0.40)) % 2
        value = (1 + 0.06 * odd + 0.05 * grain(x, y, 0.11) - 0.35 * joint)[..., None]
        return (value * tone).astype(np.float32)

    return backdrop


def before_security(rng):
    """The even light and the grey belt of the first camera set."""
    direction = np.array([rng.normal() * 0.15, -0.35 + rng.normal() * 0.1, 1.0])
    return Setting(
        backdrop=belt(
            np.array([0.27, 0.28, 0.29]) * rng.uniform(0.9, 1.1), rng.uniform(0, 0.42), rng.uniform(0.45, 0.6)
        ),
        light=Light(direction / np.linalg.norm(direction), np.ones(3), 0.55, rng.uniform(1.10, 1.25)),
        cast=1 + rng.normal(size=3) * 0.01,
        gamma=1.0,
        blur=rng.uniform(0, 0.35),
        drag=0,
        noise=0.008,
        quality=92,
    )


def after_security(rng, worst=1.0):
    """Another hall: lamps of another colour, from the side, other floors, a camera that blurs and is noisy.

    worst: 0 for the mildest, 1 for the full range.
    """
    direction = np.array([rng.uniform(-1, 1), rng.uniform(-1.0, 0.4), rng.uniform(0.7, 1.3)])
    warm = (
        np.array([1.16, 0.98, 0.72]),
        np.array([0.78, 0.98, 1.16]),
        np.array([0.88, 1.08, 0.86]),
        np.array([1.1, 0.9, 1.08]),
    )
    color = 1 + (warm[int(rng.integers(4))] - 1) * rng.uniform(0.4, 1.3) * (0.4 + 0.6 * worst)
    tone = np.array([[0.55, 0.52, 0.47], [0.32, 0.37, 0.45], [0.62, 0.63, 0.62], [0.40, 0.33, 0.28]])[
        int(rng.integers(4))
    ]
    backdrops = (
        rollers(rng.uniform(0, 1)),
        floor_tiles(tone, rng.uniform(0, 1)),
        belt(tone * 0.5, rng.uniform(0, 1), 0.5),
    )
    return Setting(
        backdrop=backdrops[int(rng.integers(3))],
        light=Light(direction / np.linalg.norm(direction), color, rng.uniform(0.35, 0.55), rng.uniform(0.85, 1.35)),
        cast=1 + rng.normal(size=3) * 0.04 * worst,
        gamma=rng.uniform(0.8, 1.25),
        blur=rng.uniform(0.2, 0.4 + 0.7 * worst),
        drag=int(rng.integers(2, 6)) if rng.random() < 0.4 * worst else 0,
        noise=rng.uniform(0.01, 0.015 + 0.025 * worst),
        quality=int(rng.integers(62, 90)),
    )


def expose(picture, setting, rng):
    """What the camera makes of the light: (H, W, 3) float -> uint8."""
    picture = np.clip(picture * setting.cast.astype(np.float32), 0, 1.6)
    picture = 1 - np.exp(-1.35 * picture)  # a film's shoulder, so that highlights do not burn out
    picture = np.clip(picture / (1 - np.exp(-1.35)), 0, 1) ** np.float32(setting.gamma * 0.82)
    if setting.drag:
        picture = np.mean([np.roll(picture, k - setting.drag // 2, axis=1) for k in range(setting.drag)], axis=0)
    image = Image.fromarray((np.clip(picture, 0, 1) * 255).astype(np.uint8))
    if setting.blur > 0.1:
        image = image.filter(ImageFilter.GaussianBlur(setting.blur))
    noise = rng.standard_normal(picture.shape, dtype=np.float32) * np.float32(255 * setting.noise)
    return np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)


# Belt scenes ---------------------------------------------------------------------------------------------------------


def take_scene(own, others, rng):
    """Several bags on a belt: the picture (H, W, 3) uint8, identities and visible masks (N, H, W), JPEG quality."""
    setting = after_security(rng, worst=0.3) if rng.random() < 0.5 else before_security(rng)
    width = rng.uniform(0.55, 0.8)
    setting = setting._replace(
        backdrop=belt(np.array([0.27, 0.28, 0.29]) * rng.uniform(0.8, 1.6), rng.uniform(0, 0.42), width)
    )
    identities, objects = [], []
    for _ in range(int(rng.integers(4, 9))):
        pool = own if rng.random() < 0.75 else others
        identity = pool[int(rng.integers(len(pool)))]
        placed = place(identity.bag, 0, 0, rng.uniform(0, 2 * np.pi), rng.random() < LYING[identity.bag.kind])
        room = footprint(placed)
        for _ in range(15):
            spot = rng.uniform((-1.15, -width + 0.2), (1.15, width - 0.2))
            if all(np.hypot(*(spot - o.position[:2])) > 0.8 * (room + footprint(o)) for o in objects):
                identities.append(identity)
                objects.append(placed._replace(position=placed.position + [*spot, 0]))
                break
    size = int(rng.integers(384, 449)), int(rng.integers(272, 321))
    around, pitch, distance = rng.uniform(-0.45, 0.45), rng.uniform(0.6, 0.95), rng.uniform(3.0, 3.6)
    position = distance * np.array([np.sin(around) * np.cos(pitch), -np.cos(around) * np.cos(pitch), np.sin(pitch)])
    camera = look_at(position, np.array([0, 0, 0.12]), size[0] * distance / rng.uniform(2.6, 3.0), size)
    picture, masks = render(camera, objects, setting.backdrop, setting.light)
    return expose(picture, setting, rng), identities, masks, setting.quality


def footprint(placed):
    """Radius of a bag's place on the belt, metres."""
    corners = part_corners(placed.parts[0], placed)[:, :2]
    return float(np.hypot(*(corners - corners.mean(0)).T).max()) * 0.85
