"""Pictures whose background is the difficulty: one bag in a loose crop, other bags around it, and a loud floor.

The bag that is meant is the one nearest the middle and the only one that is whole. Nothing else tells it from its
neighbours, which are bags of the same set, and the floor wears the colours and patterns of bags: whoever embeds the
whole picture embeds mostly something else. Both camera sets are alike in this.
"""

import numpy as np

from baggage.render.art import PATTERNS
from baggage.render.looks import ACCENTS, BASES
from baggage.render.pictures import LYING, expose, place, ramp, stand
from baggage.render.raycast import Surface, cast, cast_part, look_at, part_corners, render

FLOORS = ("checks", "tartan", "stripes", "bands", "slanted", "chevrons", "dots", "camouflage", "marble")
COLORS = np.array([*BASES, *ACCENTS])
MOST_HIDDEN = 0.05  # of the bag that is meant, by all its neighbours together
LEAST_SEEN = 0.03  # of the picture has to show a neighbour
ATTEMPTS = 24  # to place the neighbours; most fail for one of the two reasons above, or at another bag


def take_hard_picture(identity, others, datatype, view, views, rng):
    """A loose crop around one bag among others: arguments and results are those of `pictures.take_picture`."""
    target, position, middle, setting = stand(identity, datatype, view, views, rng)
    setting = setting._replace(backdrop=busy_floor(rng))
    camera = frame_loosely(position, middle, target, rng)
    around = neighbours(identity, others, target, camera, rng)
    picture, masks = render(camera, [target, *around], setting.backdrop, setting.light)
    return expose(picture, setting, rng), masks[0], setting.quality


def frame_loosely(position, middle, target, rng):
    """A camera at `position` whose picture holds the whole bag, off the middle, on about 25 to 45% of its pixels."""
    unit = look_at(position, middle, 1.0, (0, 0), (0.0, 0.0))
    spread = unit.project(np.concatenate([part_corners(part, target) for part in target.parts]))
    corner, extent = spread.min(0), np.ptp(spread, axis=0)
    focal = 48 / extent.max()
    size = tuple(int(n) for n in np.ceil(extent * focal))
    small = unit._replace(focal=focal, center=tuple(-corner * focal), size=size)
    # Corners of parts lie outside round bags: how large and where the bag is, only its silhouette says.
    silhouette = cast(small, [target]).owner.reshape(size[::-1]) == 0
    rows, columns = (np.flatnonzero(silhouette.any(axis)) for axis in (1, 0))
    low = corner + np.array([columns[0], rows[0]]) / focal
    extent = np.array([columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]) / focal

    pixels = silhouette.sum() / focal**2  # area of the bag, in the units of low and extent
    growth = max(pixels / rng.uniform(0.25, 0.45) / extent.prod(), 1.2)  # of the picture over the bag's box
    stretch = rng.uniform(-0.5, 0.5) * np.log(growth / 1.1)
    room = (np.sqrt(growth) * np.exp([stretch / 2, -stretch / 2]) - 1) * extent
    low, extent = low - rng.uniform(0.08, 0.92, 2) * room, extent + room
    focal = rng.uniform(140, 220) / extent.max()
    size = tuple(int(n) for n in np.maximum(np.round(extent * focal), 48))
    return unit._replace(focal=focal, center=tuple(-low * focal), size=size)


def neighbours(identity, others, target, camera, rng):
    """Bags of other identities around the target, cut by the border of the picture, that leave the target in sight.

    Two to four; one in the few pictures (about 4%) where no more found a place, none where there are no others.
    """
    others = [other for other in others if other.number != identity.number]
    width, height = (n // 4 for n in camera.size)
    small = camera.scaled(1 / 4)._replace(size=(width, height))
    surface = cast(small, [target])
    own = surface.owner == 0
    placed, wanted = [], int(rng.integers(2, 5))
    for _ in range(ATTEMPTS if others else 0):
        bag = others[int(rng.integers(len(others)))].bag
        bag = place(bag, 0, 0, rng.uniform(0, 2 * np.pi), rng.random() < LYING[bag.kind])
        angle, gap = rng.uniform(0, 2 * np.pi), rng.uniform(0.01, 0.25)
        away = np.array([np.cos(angle), np.sin(angle)])
        bag = bag._replace(position=bag.position + [*(away * (reach(target, away) + gap + reach(bag, -away))), 0])
        if any(touch(bag, other) for other in placed):
            continue
        trial = Surface(*(values.copy() for values in surface))
        cast_part(small, bag, bag.parts[0], len(placed) + 1, trial)
        seen = (trial.owner == len(placed) + 1).reshape(height, width)
        at_border = seen[0].any() or seen[-1].any() or seen[:, 0].any() or seen[:, -1].any()
        hidden = (trial.owner[own] != 0).mean()
        if at_border and seen.mean() > LEAST_SEEN and hidden < MOST_HIDDEN:
            placed, surface = [*placed, bag], trial
            if len(placed) == wanted:
                break
    return placed


def reach(placed, direction):
    """How far a bag's body stands out from its position along a direction (2,) on the floor, metres."""
    return float(((part_corners(placed.parts[0], placed) - placed.position)[:, :2] @ direction).max()) + 0.02


def touch(one, other):
    """Whether two bags may overlap: nothing parts them along the line between their middles."""
    between = (other.position - one.position)[:2]
    distance = np.hypot(*between) + 1e-9
    return reach(one, between / distance) + reach(other, -between / distance) > distance


# Floors --------------------------------------------------------------------------------------------------------------


def busy_floor(rng):
    """A belt and the floor around it, both loud, in any direction: a function of world coordinates."""
    inside, outside = printed(rng), printed(rng)
    angle, shift, width = rng.uniform(0, np.pi), rng.uniform(-0.3, 0.3), rng.uniform(0.2, 0.6)
    rail = rng.choice([0.0, 0.05])

    def backdrop(x, y):
        across = np.abs(np.float32(np.cos(angle)) * y - np.float32(np.sin(angle)) * x - np.float32(shift))
        off_belt = ramp(across - width, 0.012)[..., None]
        off_rail = ramp(across - width - rail, 0.012)[..., None]
        return inside(x, y) * (1 - off_belt) + 0.55 * (off_belt - off_rail) + outside(x, y) * off_rail

    return backdrop


def printed(rng):
    """A surface with a pattern of bags, turned and larger, in two colours of theirs that stand apart."""
    pattern, angle = FLOORS[int(rng.integers(len(FLOORS)))], rng.uniform(0, 2 * np.pi)
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    period = rng.uniform(0.04, 0.1)
    colors = COLORS[rng.permutation(len(COLORS))]
    apart = np.abs(colors - colors[0]).sum(1)
    first, second = colors[0], colors[np.argmax(apart > 0.7)]
    key = int(rng.integers(2**32))  # what the pattern draws is drawn when the picture is

    def color(x, y):
        a, b = cosine * x + sine * y, cosine * y - sine * x
        mix, _ = PATTERNS[pattern](a, b, np.zeros_like(a), a, b, period, np.random.default_rng(key))
        mix = np.asarray(mix, np.float32)[..., None]
        return (first * (1 - mix) + second * mix).astype(np.float32)

    return color
