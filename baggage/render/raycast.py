"""A small ray caster for baggage: rounded solids with painted faces, seen by a pinhole camera, in plain numpy.

World coordinates are metres with z up; the belt is the plane z = 0. Every solid (`Part`) is the same convex shape, a
rounded rectangle drawn out along one axis with its edges rounded off. Its signed distance d is known in closed form
(Quilez, "2D and 3D distance functions"), and since d is convex along a ray, Newton's iteration from outside walks up to
the surface without ever passing it: six steps are enough, for all pixels of the part at once.
"""

from typing import NamedTuple

import numpy as np

NEWTON_STEPS = 6
SURFACE = 2e-3  # metres: a ray that ends this close to a surface has hit it
CORNERS = np.array([(x, y, z) for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)])  # of a cube


class Part(NamedTuple):
    """One solid of a bag, in the bag's coordinates."""

    center: np.ndarray  # (3,) metres
    rotation: np.ndarray  # (3, 3), columns are the part's axes x, y, z
    half: np.ndarray  # (3,) half sizes; the outline lies in x-z and is drawn out along y
    corners: tuple[float, float]  # radii of the outline's bottom and top corners
    edge: float  # radius between the outline and the two faces +y and -y
    bulge: float  # metres by which the faces +y and -y swell in their middle
    faces: np.ndarray  # (6, T, T, 5) uint8: red, green, blue, slope along u, slope along v; -x +x -y +y -z +z
    gloss: float  # 0 cloth ... 1 polished


class Placed(NamedTuple):
    """Parts that belong together (one bag, one tray) at a place of the world."""

    parts: list[Part]
    rotation: np.ndarray  # (3, 3)
    position: np.ndarray  # (3,)


class Camera(NamedTuple):
    position: np.ndarray  # (3,)
    axes: np.ndarray  # (3, 3), rows are right, down, forward
    focal: float  # pixels
    center: tuple[float, float]  # principal point, pixels
    size: tuple[int, int]  # width, height

    def project(self, points):
        """World points (N, 3) -> pixels (N, 2)."""
        local = (points - self.position) @ self.axes.T  # (N, 3)
        return self.focal * local[:, :2] / np.maximum(local[:, 2:], 1e-3) + np.asarray(self.center)

    def scaled(self, factor):
        """The same view with `factor` times as many pixels each way."""
        (width, height), (x, y) = self.size, self.center
        return self._replace(
            focal=self.focal * factor, center=(x * factor, y * factor), size=(width * factor, height * factor)
        )


class Light(NamedTuple):
    direction: np.ndarray  # (3,), towards the lamp
    color: np.ndarray  # (3,), of everything it lights
    ambient: float  # share of light that comes from everywhere
    strength: float


class Surface(NamedTuple):
    """What each pixel of a picture shows; N = width * height."""

    depth: np.ndarray  # (N,) along the camera's axis, inf where there is nothing
    color: np.ndarray  # (N, 3) in [0, 1]
    normal: np.ndarray  # (N, 3) in the world
    gloss: np.ndarray  # (N,)
    owner: np.ndarray  # (N,) index of the placed object, -1 where there is nothing


def look_at(position, target, focal, size, center=None):
    """A camera at `position` that looks at `target`, upright."""
    forward = (target - position) / np.linalg.norm(target - position)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    axes = np.stack([right, np.cross(forward, right), forward])
    return Camera(position, axes, focal, center or (size[0] / 2, size[1] / 2), size)


def part_corners(part, placed):
    """Corners of a part's bounding box in the world, (8, 3)."""
    in_bag = (CORNERS * part.half + CORNERS * [0, part.bulge, 0]) @ part.rotation.T + part.center
    return in_bag @ placed.rotation.T + placed.position


def signed_distance(part, x, y, z):
    """Distance to the part's surface, negative inside, and its gradient: four arrays like x, y, z."""
    edge, (half_x, half_y, half_z) = part.edge, part.half.tolist()  # Python numbers, so that float32 stays float32
    bottom, top = (max(radius - edge, 0.0) for radius in part.corners)
    radius = bottom if bottom == top else np.where(z > 0, np.float32(top), np.float32(bottom))
    out_x, out_z = np.abs(x) - (half_x - edge - radius), np.abs(z) - (half_z - edge - radius)
    beyond_x, beyond_z = np.maximum(out_x, 0), np.maximum(out_z, 0)
    length = np.sqrt(beyond_x * beyond_x + beyond_z * beyond_z)
    in_outline = length + np.minimum(np.maximum(out_x, out_z), 0) - radius
    flat = length < 1e-6
    inverse = 1 / np.where(flat, 1, length)
    slope_x = np.where(flat, out_x > out_z, beyond_x * inverse) * np.sign(x)
    slope_z = np.where(flat, out_x <= out_z, beyond_z * inverse) * np.sign(z)

    out_y = np.abs(y) - (half_y - edge)
    if part.bulge:
        dome_x, dome_z = 1 - (x / half_x) ** 2, 1 - (z / half_z) ** 2
        out_y = out_y - part.bulge * np.maximum(dome_x, 0) * np.maximum(dome_z, 0)
    beyond_outline, beyond_y = np.maximum(in_outline, 0), np.maximum(out_y, 0)
    length = np.sqrt(beyond_outline * beyond_outline + beyond_y * beyond_y)
    distance = length + np.minimum(np.maximum(in_outline, out_y), 0) - edge
    flat = length < 1e-6
    inverse = 1 / np.where(flat, 1, length)
    along_outline = np.where(flat, in_outline > out_y, beyond_outline * inverse)
    along_y = np.where(flat, in_outline <= out_y, beyond_y * inverse)
    gradient_x, gradient_z = along_outline * slope_x, along_outline * slope_z
    if part.bulge:
        gradient_x = gradient_x + along_y * np.maximum(dome_z, 0) * x * (2 * part.bulge / half_x**2)
        gradient_z = gradient_z + along_y * np.maximum(dome_x, 0) * z * (2 * part.bulge / half_z**2)
    return distance, gradient_x, along_y * np.sign(y), gradient_z


def paint(part, x, y, z, normal):
    """Colour (N, 3) and bumped normal (three arrays) at surface points, by box mapping of the six faces."""
    normal_x, normal_y, normal_z = normal
    size_x, size_y, size_z = np.abs(normal_x), np.abs(normal_y), np.abs(normal_z)
    on_x = (size_x > size_y) & (size_x >= size_z)
    on_z = ~on_x & (size_z > size_y)
    half_x, half_y, half_z = part.half.tolist()
    across = np.where(on_x, y / half_y, x / half_x)
    upward = np.where(on_z, y / half_y, z / half_z)
    main = np.where(on_x, normal_x, np.where(on_z, normal_z, normal_y))
    face = np.where(on_x, 0, np.where(on_z, 4, 2)) + (main > 0)
    texels = part.faces.shape[1]
    column = np.clip((across + 1) * (texels / 2), 0, texels - 1).astype(np.int32)
    row = np.clip((1 - upward) * (texels / 2), 0, texels - 1).astype(np.int32)
    texel = part.faces.reshape(-1, 5)[(face * texels + row) * texels + column]  # (N, 5)
    slope_u, slope_v = ((texel[:, k].astype(np.float32) - 128) / 64 for k in (3, 4))
    normal_x = normal_x - np.where(on_x, 0, slope_u)
    normal_y = normal_y - np.where(on_x, slope_u, np.where(on_z, slope_v, 0))
    normal_z = normal_z - np.where(on_z, 0, slope_v)
    return texel[:, :3] * np.float32(1 / 255), (normal_x, normal_y, normal_z)


def trace_part(part, origin, ray, limit, steps=NEWTON_STEPS):
    """Where rays meet a part: (indices of the rays that hit, their t, points, normals), all in part coordinates.

    origin: (3,); ray: three arrays (N,); limit: (N,) t behind which nothing is of interest.
    """
    reach = (part.half + [0, part.bulge, 0]).tolist()
    near, far = np.full(ray[0].shape, -np.inf, np.float32), limit
    for axis in range(3):  # slab test against the bounding box
        inverse = 1 / np.where(np.abs(ray[axis]) < 1e-9, np.float32(1e-9), ray[axis])
        one, other = (-reach[axis] - origin[axis]) * inverse, (reach[axis] - origin[axis]) * inverse
        near, far = np.maximum(near, np.minimum(one, other)), np.minimum(far, np.maximum(one, other))
    index = np.flatnonzero((near < far) & (near > 0))
    ray, t, far = [component[index] for component in ray], near[index], far[index]
    found = []  # of each step: the rays that have arrived (most of them at once: flat faces lie on the bounding box)
    for _ in range(steps):
        point = [origin[axis] + t * ray[axis] for axis in range(3)]
        distance, *gradient = signed_distance(part, *point)
        slope = gradient[0] * ray[0] + gradient[1] * ray[1] + gradient[2] * ray[2]
        arrived = np.abs(distance) < SURFACE
        done = np.flatnonzero(arrived)
        found.append([index[done], t[done], *(a[done] for a in (*point, *gradient))])
        t = t - distance / np.minimum(slope, np.float32(-1e-3))
        onward = np.flatnonzero(~arrived & (t < far))
        if not len(onward):
            break
        index, t, far, ray = index[onward], t[onward], far[onward], [component[onward] for component in ray]
    index, t, *rest = (np.concatenate(columns) for columns in zip(*found, strict=True))
    return index, t, rest[:3], rest[3:]


def cast(camera, objects):
    """The nearest surface at every pixel of a camera: objects (list of Placed) -> Surface."""
    width, height = camera.size
    pixels = width * height
    surface = Surface(
        np.full(pixels, np.inf, np.float32),
        np.zeros((pixels, 3), np.float32),
        np.zeros((pixels, 3), np.float32),
        np.zeros(pixels, np.float32),
        np.full(pixels, -1, np.int16),
    )
    for owner, placed in enumerate(objects):
        for part in placed.parts:
            cast_part(camera, placed, part, owner, surface)
    return surface


def cast_part(camera, placed, part, owner, surface):
    """Write one part into a surface, where it is nearer than what is there."""
    width, height = camera.size
    screen = camera.project(part_corners(part, placed))  # (8, 2)
    left, upper = np.clip(np.floor(screen.min(0)), 0, camera.size).astype(int)
    right, lower = np.clip(np.ceil(screen.max(0)) + 1, 0, camera.size).astype(int)
    if left >= right or upper >= lower:
        return
    to_world = placed.rotation @ part.rotation  # part -> world
    origin = to_world.T @ (camera.position - placed.position - placed.rotation @ part.center)
    to_part = (to_world.T @ camera.axes.T).astype(np.float32)  # camera -> part
    u = ((np.arange(left, right) + 0.5 - camera.center[0]) / camera.focal).astype(np.float32)
    v = ((np.arange(upper, lower) + 0.5 - camera.center[1]) / camera.focal).astype(np.float32)
    ray = [(to_part[k, 0] * u + (to_part[k, 1] * v + to_part[k, 2])[:, None]).ravel() for k in range(3)]
    limit = surface.depth.reshape(height, width)[upper:lower, left:right].ravel()
    hit, t, point, normal = trace_part(part, origin.astype(np.float32), ray, limit)
    nearer = np.flatnonzero(t < limit[hit])
    hit, t, point, normal = hit[nearer], t[nearer], [p[nearer] for p in point], [g[nearer] for g in normal]
    index = (upper + hit // (right - left)) * width + left + hit % (right - left)
    color, normal = paint(part, *point, normal)
    surface.depth[index] = t
    surface.color[index] = color
    turn = to_world.astype(np.float32)
    for k in range(3):
        surface.normal[index, k] = turn[k, 0] * normal[0] + turn[k, 1] * normal[1] + turn[k, 2] * normal[2]
    surface.gloss[index] = part.gloss
    surface.owner[index] = owner


def power(value, doublings):
    """value ** (2 ** doublings), without the slow general power."""
    for _ in range(doublings):
        value = value * value
    return value


def shade(camera, surface, light):
    """Light on the surfaces: (N, 3) colour, black where there is nothing."""
    seen = np.flatnonzero(surface.owner >= 0)
    normal = surface.normal[seen]
    nx, ny, nz = (normal[:, k] for k in range(3))
    inverse = 1 / np.sqrt(nx * nx + ny * ny + nz * nz + 1e-9)
    nx, ny, nz = nx * inverse, ny * inverse, nz * inverse
    width = camera.size[0]
    u = ((seen % width + 0.5 - camera.center[0]) / camera.focal).astype(np.float32)
    v = ((seen // width + 0.5 - camera.center[1]) / camera.focal).astype(np.float32)
    axes = camera.axes.astype(np.float32)
    rx, ry, rz = (axes[0, k] * u + axes[1, k] * v + axes[2, k] for k in range(3))
    above = np.float32(camera.position[2]) + surface.depth[seen] * rz  # height over the belt
    inverse = 1 / np.sqrt(rx * rx + ry * ry + rz * rz)
    rx, ry, rz = rx * inverse, ry * inverse, rz * inverse
    lx, ly, lz = (np.float32(c) for c in light.direction)
    diffuse = np.maximum(nx * lx + ny * ly + nz * lz, 0)
    sky = 0.62 + 0.38 * nz
    contact = 0.55 + 0.45 * np.clip(above / 0.12, 0, 1)
    cosine = -(nx * rx + ny * ry + nz * rz)
    mx, my, mz = rx + 2 * cosine * nx, ry + 2 * cosine * ny, rz + 2 * cosine * nz  # mirror direction
    lamp = np.maximum(mx * lx + my * ly + mz * lz, 0)
    strips = np.clip(4 * np.cos(6 * mx + 1.0) * np.clip(3 * mz - 0.6, 0, 1) - 2.6, 0, 1)  # ceiling lamps in the polish
    rim = power(np.clip(1 - cosine, 0, 1), 2)
    gloss = surface.gloss[seen]
    shine = gloss * (0.55 * power(lamp, 5) + 0.22 * strips + 0.18 * rim * sky)
    amount = contact * light.strength * (light.ambient * sky + (1 - light.ambient) * diffuse)
    shaded = np.zeros_like(surface.color)
    lit = surface.color[seen] * amount[:, None] + (shine * contact)[:, None]
    shaded[seen] = lit * light.color.astype(np.float32)
    return shaded


def ground(camera):
    """Where each pixel's ray meets the belt plane: x, y (height, width) metres; beyond the horizon, far away."""
    width, height = camera.size
    u = ((np.arange(width) + 0.5 - camera.center[0]) / camera.focal).astype(np.float32)
    v = ((np.arange(height) + 0.5 - camera.center[1]) / camera.focal).astype(np.float32)[:, None]
    axes = camera.axes.astype(np.float32)
    rx, ry, rz = (axes[0, k] * u + axes[1, k] * v + axes[2, k] for k in range(3))
    t = np.float32(camera.position[2]) / np.maximum(-rz, 0.02)
    return np.float32(camera.position[0]) + t * rx, np.float32(camera.position[1]) + t * ry


def contact_shadow(objects, x, y, light):
    """Share of light that reaches the belt at (x, y) between the objects, 0.35 to 1."""
    dark = np.zeros_like(x)
    for placed in objects:
        body = placed.parts[0]
        corners = part_corners(body, placed)
        middle = corners.mean(0)
        cover = middle - np.asarray(light.direction) * 0.25 * middle[2] / max(light.direction[2], 0.3)
        spread = (corners - middle)[:, :2]
        axis = placed.rotation[:2, 0] / max(np.linalg.norm(placed.rotation[:2, 0]), 1e-6)
        side = np.array([-axis[1], axis[0]])
        dx, dy = x - np.float32(cover[0]), y - np.float32(cover[1])
        along = np.abs(dx * np.float32(axis[0]) + dy * np.float32(axis[1])) - np.float32(np.abs(spread @ axis).max())
        across = np.abs(dx * np.float32(side[0]) + dy * np.float32(side[1])) - np.float32(np.abs(spread @ side).max())
        distance = np.hypot(np.maximum(along + 0.03, 0), np.maximum(across + 0.03, 0))
        dark = np.maximum(dark, np.exp(-((distance / 0.07) ** 2)))
    return 1 - 0.65 * dark


def render(camera, objects, backdrop, light, supersample=2):
    """A picture and the visible masks: (H, W, 3) float in [0, 1] (len(objects), H, W) bool.

    backdrop: callable (x, y) -> (H, W, 3), the colour of the belt plane at world coordinates, unlit.
    """
    fine = camera.scaled(supersample)
    surface = cast(fine, objects)
    corners = [(row, column) for row in range(supersample) for column in range(supersample)]
    share = np.float32(1 / supersample**2)
    fine_color = shade(fine, surface, light).reshape(fine.size[1], fine.size[0], 3)
    color = sum(fine_color[row::supersample, column::supersample] for row, column in corners) * share  # (H, W, 3)
    owner = surface.owner.reshape(fine.size[1], fine.size[0])
    owners = np.stack([owner[row::supersample, column::supersample] for row, column in corners])  # (S * S, H, W)
    cover = (owners >= 0).sum(0, dtype=np.float32) * share
    each = np.arange(len(objects), dtype=owner.dtype)[:, None, None, None]
    masks = (owners == each).sum(1, dtype=np.uint8) > supersample**2 // 2  # (len(objects), H, W)
    x, y = ground(camera)
    lit = contact_shadow(objects, x, y, light) * light.strength * (0.25 + 0.75 * max(light.direction[2], 0.4))
    floor = backdrop(x, y) * lit[..., None] * light.color.astype(np.float32)
    return color + floor * (1 - cover[..., None]), masks
