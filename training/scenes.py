"""A ray caster for textured rooms full of boxes and ellipsoids: RGB, exact depth, any pinhole camera with distortion.

``Scene(seed).render(T_world_camera, K, width, height)`` is all that the demo and the benchmarks need. The world is
z-up, in metres; cameras are optical frames (x right, y down, z forward). Layouts:

* ``room``: things in the middle and along the walls, a free ring between them (radius 1.5 to 2.3 m)
* ``hall``: a bigger room with a free closed circuit (``paths.camera_path("circuit", ...)``)
* ``clutter``: things anywhere, for training; ask ``clearance`` where a camera fits
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numba
import numpy as np

from spark3r_ros.geometry import inverse, so3_exp
from training.textures import TEXTURE_SIZE, mip_offsets, texture_bank

ROOM, BOX, ELLIPSOID = 0, 1, 2
TILE = 16  # pixels per side of a culling tile
HALL_HALF_SIZE = (6.5, 5.0, 1.6)
CIRCUIT_HALF_SIZE = (4.6, 3.1)  # centre line of the hall's free lane
LANE = 0.75  # half width of the free lane


class Scene:
    """A random room. The same seed and layout give the same scene on every machine."""

    def __init__(self, seed: int, layout: str = "room", textures: np.ndarray | None = None) -> None:
        if layout not in LAYOUTS:
            raise ValueError(f"scene layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
        rng = np.random.default_rng([seed, 11])
        self.textures = texture_bank(32, seed) if textures is None else textures
        bodies = LAYOUTS[layout](rng)
        count = len(bodies)
        self.kind = np.array([b[0] for b in bodies], np.int64)
        self.centre = np.array([b[1] for b in bodies], float)  # [B, 3]
        self.half_size = np.array([b[2] for b in bodies], float)  # [B, 3]
        self.R_world_body = so3_exp(np.array([b[3] for b in bodies], float))  # [B, 3, 3]
        self.texture = rng.integers(0, len(self.textures), (count, 6))
        self.texels_per_metre = 2.0 ** rng.uniform(5.5, 8.5, (count, 6))
        self.texture_turn = rng.integers(0, 4, (count, 6)) * (np.pi / 2) + rng.normal(0, 0.02, (count, 6))
        self.texture_shift = rng.uniform(0, TEXTURE_SIZE, (count, 6, 2))
        self.tint = np.clip(rng.uniform(0.5, 1.1, (count, 6, 1)) + rng.normal(0, 0.06, (count, 6, 3)), 0.2, 1.3)
        plain = rng.random((count, 6)) < rng.choice([0.0, 0.1, 0.4])  # painted walls: hardly any texture
        self.contrast = np.where(plain, rng.uniform(0.0, 0.15, (count, 6)), 1.0)
        self.light = rng.normal(0, 1, 3) + np.array([0, 0, 1.5])
        self.light /= np.linalg.norm(self.light)
        self.ambient = float(rng.uniform(0.35, 0.8))

    @property
    def room_half_size(self) -> np.ndarray:
        """Half extents [3] of the room, which is centred at the origin."""
        return self.half_size[0]

    def render(
        self,
        T_world_camera: np.ndarray,
        K: np.ndarray,
        width: int,
        height: int,
        distortion: tuple[float, ...] = (),
    ) -> tuple[np.ndarray, np.ndarray]:
        """RGB [height, width, 3] uint8 and z-depth [height, width] float32 metres; ``distortion`` as in OpenCV."""
        rays = _rays(tuple(np.asarray(K, float).ravel()), width, height, tuple(distortion))
        R_world_camera = T_world_camera[:3, :3]
        R_body_camera = np.swapaxes(self.R_world_body, 1, 2) @ R_world_camera
        origin = np.einsum("bji,bj->bi", self.R_world_body, T_world_camera[:3, 3] - self.centre)
        rgb = np.empty((height, width, 3), np.uint8)
        depth = np.empty((height, width), np.float32)
        _cast(
            rays, 1.0 / K[0, 0], self.kind, self.half_size, R_body_camera, origin,
            self.R_world_body, self.texture, self.texels_per_metre, self.texture_turn, self.texture_shift, self.tint,
            self.contrast, self.textures, mip_offsets(), self.light, self.ambient, rgb, depth,
        )  # fmt: skip
        return rgb, depth

    def clearance(self, points: np.ndarray) -> np.ndarray:
        """Distance [N] in metres (a lower bound) from points [N, 3] to the nearest surface; negative: inside."""
        nearest = np.min(self.room_half_size - np.abs(points), axis=1)
        for body in range(1, len(self.kind)):
            local = (points - self.centre[body]) @ self.R_world_body[body]
            if self.kind[body] == BOX:
                outside = np.abs(local) - self.half_size[body]
                distance = np.linalg.norm(np.maximum(outside, 0), axis=1) + np.minimum(outside.max(axis=1), 0)
            else:
                distance = (np.linalg.norm(local / self.half_size[body], axis=1) - 1) * self.half_size[body].min()
            nearest = np.minimum(nearest, distance)
        return nearest


def _body(rng: np.random.Generator, centre: tuple[float, float], size: float, floor: float, stand: bool) -> tuple:
    """One box or ellipsoid near the horizontal position ``centre``; ``stand``: on the floor, else floating, turned."""
    kind = BOX if rng.random() < 0.65 else ELLIPSOID
    half = size * np.array([rng.uniform(0.4, 1.0), rng.uniform(0.4, 1.0), rng.uniform(0.4, 1.6)])
    if stand:
        half[2] = min(half[2] * rng.uniform(1, 3), 0.48 * -2 * floor)
        return kind, (*centre, floor + half[2]), half, (0, 0, rng.uniform(0, np.pi))
    return kind, (*centre, rng.uniform(0.8 * floor, -0.8 * floor)), half, rng.normal(0, 1, 3)


def _room_layout(rng: np.random.Generator) -> list[tuple]:
    half = np.array([4.0, 3.6, 1.5]) * rng.uniform(0.95, 1.1, 3)
    bodies = [(ROOM, (0, 0, 0), half, (0, 0, 0))]
    for _ in range(int(rng.integers(5, 9))):
        place = tuple(rng.uniform(-0.75, 0.75, 2))
        bodies.append(_body(rng, place, rng.uniform(0.15, 0.4), -half[2], rng.random() < 0.8))
    for _ in range(int(rng.integers(9, 15))):
        angle = rng.uniform(0, 2 * np.pi)
        place = (half[0] * 0.93 * np.cos(angle), half[1] * 0.93 * np.sin(angle))
        bodies.append(_body(rng, place, rng.uniform(0.2, 0.5), -half[2], rng.random() < 0.6))
    return bodies


def _hall_layout(rng: np.random.Generator) -> list[tuple]:
    half = np.array(HALL_HALF_SIZE)
    bodies = [(ROOM, (0, 0, 0), half, (0, 0, 0))]
    inner = np.array(CIRCUIT_HALF_SIZE) - LANE - 0.9
    for _ in range(18):
        place = tuple(rng.uniform(-inner, inner))
        bodies.append(_body(rng, place, rng.uniform(0.25, 0.6), -half[2], rng.random() < 0.8))
    for _ in range(26):
        side = rng.integers(4)
        along = rng.uniform(-0.9, 0.9)
        place = [(along * half[0], half[1]), (along * half[0], -half[1]), (half[0], along * half[1]),
                 (-half[0], along * half[1])][side]  # fmt: skip
        bodies.append(_body(rng, place, rng.uniform(0.25, 0.6), -half[2], rng.random() < 0.5))
    return bodies


def _clutter_layout(rng: np.random.Generator) -> list[tuple]:
    half = rng.uniform([1.5, 1.5, 1.2], [6.0, 6.0, 2.5])
    bodies = [(ROOM, (0, 0, 0), half, (0, 0, 0))]
    for _ in range(int(rng.integers(8, 45))):
        place = tuple(rng.uniform(-half[:2], half[:2]))
        bodies.append(_body(rng, place, rng.uniform(0.1, 0.6), -half[2], rng.random() < 0.4))
    return bodies


LAYOUTS = {"room": _room_layout, "hall": _hall_layout, "clutter": _clutter_layout}


@lru_cache(maxsize=64)
def _rays(K: tuple[float, ...], width: int, height: int, distortion: tuple[float, ...]) -> np.ndarray:
    """Viewing rays [height, width, 3] with z = 1 of every pixel centre."""
    camera = np.array(K).reshape(3, 3)
    x, y = np.meshgrid(np.arange(width, dtype=float), np.arange(height, dtype=float))
    rays = np.ones((height, width, 3))
    if distortion:
        pixels = np.stack([x, y], axis=-1).reshape(-1, 1, 2)
        criteria = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 40, 1e-9)
        undistorted = cv2.undistortPoints(pixels, camera, np.array(distortion), criteria=criteria)
        rays[..., :2] = undistorted.reshape(height, width, 2)
    else:
        rays[..., 0] = (x - camera[0, 2]) / camera[0, 0]
        rays[..., 1] = (y - camera[1, 2]) / camera[1, 1]
    return rays


@numba.njit(cache=True, fastmath=True, inline="always")
def _hit_box(o, d, half, inside):  # type: ignore[no-untyped-def]
    """Ray parameter (inf: no hit) and face axis of the nearest box surface; ``inside``: the far surface."""
    near, far = -np.inf, np.inf
    near_axis, far_axis = 0, 0
    for axis in range(3):
        if abs(d[axis]) < 1e-12:
            if abs(o[axis]) > half[axis]:
                return np.inf, 0
            continue
        t0 = (-half[axis] - o[axis]) / d[axis]
        t1 = (half[axis] - o[axis]) / d[axis]
        if t0 > t1:
            t0, t1 = t1, t0
        if t0 > near:
            near, near_axis = t0, axis
        if t1 < far:
            far, far_axis = t1, axis
    if inside:
        return far, far_axis
    if near <= 1e-4 or near >= far:
        return np.inf, 0
    return near, near_axis


@numba.njit(cache=True, fastmath=True, inline="always")
def _hit_ellipsoid(o, d, half):  # type: ignore[no-untyped-def]
    a, b, c = 0.0, 0.0, -1.0
    for axis in range(3):
        os, ds = o[axis] / half[axis], d[axis] / half[axis]
        a += ds * ds
        b += os * ds
        c += os * os
    disc = b * b - a * c
    if disc <= 0:
        return np.inf
    t = (-b - np.sqrt(disc)) / a
    return t if t > 1e-4 else np.inf


@numba.njit(cache=True, fastmath=True, inline="always")
def _sample(texture, offsets, u, v, lod, out):  # type: ignore[no-untyped-def]
    """Trilinear look-up of a mip-mapped texture with wrap-around; u, v in level-0 texels."""
    top = len(offsets) - 2
    lod = min(max(lod, 0.0), top * 1.0)
    low = int(lod)
    share = lod - low
    out[:] = 0.0
    for step in range(2):
        level = min(low + step, top)
        weight = share if step == 1 else 1.0 - share
        if weight < 1e-3:
            continue
        size = TEXTURE_SIZE >> level
        scale = 1.0 / (1 << level)
        x = u * scale - 0.5
        y = v * scale - 0.5
        fx, fy = np.floor(x), np.floor(y)
        ax, ay = x - fx, y - fy
        x0, y0 = int(fx) & (size - 1), int(fy) & (size - 1)
        x1, y1 = (x0 + 1) & (size - 1), (y0 + 1) & (size - 1)
        base = offsets[level]
        for channel in range(3):
            upper = texture[base + y0 * size + x0, channel] * (1 - ax) + texture[base + y0 * size + x1, channel] * ax
            lower = texture[base + y1 * size + x0, channel] * (1 - ax) + texture[base + y1 * size + x1, channel] * ax
            out[channel] += weight * (upper * (1 - ay) + lower * ay)


@numba.njit(cache=True, fastmath=True)
def _visible(rays, row, col, rows, cols, kind, half_size, centre_camera, visible):  # type: ignore[no-untyped-def]
    """Bodies whose bounding sphere may meet the tile's cone of rays; returns their number."""
    height, width = rays.shape[0], rays.shape[1]
    r1, c1 = min(row + rows, height) - 1, min(col + cols, width) - 1
    axis = rays[row, col] + rays[r1, col] + rays[row, c1] + rays[r1, c1]
    axis = axis / np.sqrt(np.sum(axis * axis))
    cos_tile = 1.0
    for r in (row, r1):
        for c in (col, c1):
            ray = rays[r, c]
            cos_tile = min(cos_tile, np.sum(axis * ray) / np.sqrt(np.sum(ray * ray)))
    angle_tile = np.arccos(cos_tile) + 0.01
    count = 0
    for body in range(len(kind)):
        if kind[body] == ROOM:
            visible[count] = body
            count += 1
            continue
        half = half_size[body]
        radius = np.sqrt(np.sum(half * half)) if kind[body] == BOX else max(half[0], max(half[1], half[2]))
        centre = centre_camera[body]
        distance = np.sqrt(np.sum(centre * centre))
        if distance > radius:
            cos_body = min(max(np.sum(axis * centre) / distance, -1.0), 1.0)
            if np.arccos(cos_body) > angle_tile + np.arcsin(radius / distance):
                continue
        visible[count] = body
        count += 1
    return count


@numba.njit(cache=True, fastmath=True)
def _cast(
    rays, pixel_angle, kind, half_size, R_body_camera, origin, R_world_body, texture_of, texels_per_metre, turn, shift,
    tint, contrast, textures, offsets, light, ambient, rgb, depth,
):  # type: ignore[no-untyped-def]  # fmt: skip
    height, width = depth.shape
    count_bodies = len(kind)
    centre_camera = np.empty((count_bodies, 3))
    for body in range(count_bodies):
        centre_camera[body] = -(R_body_camera[body].T @ origin[body])
    visible = np.empty(count_bodies, np.int64)
    d = np.empty(3)
    p = np.empty(3)
    normal = np.empty(3)
    colour = np.empty(3)
    for row in range(0, height, TILE):
        for col in range(0, width, TILE):
            count = _visible(rays, row, col, TILE, TILE, kind, half_size, centre_camera, visible)
            for y in range(row, min(row + TILE, height)):
                for x in range(col, min(col + TILE, width)):
                    best, hit, hit_axis = np.inf, 0, 0
                    r0, r1, r2 = rays[y, x, 0], rays[y, x, 1], rays[y, x, 2]
                    for k in range(count):
                        body = visible[k]
                        R = R_body_camera[body]
                        for i in range(3):
                            d[i] = R[i, 0] * r0 + R[i, 1] * r1 + R[i, 2] * r2
                        if kind[body] == ELLIPSOID:
                            t, axis = _hit_ellipsoid(origin[body], d, half_size[body]), 2
                        else:
                            t, axis = _hit_box(origin[body], d, half_size[body], kind[body] == ROOM)
                        if t < best:
                            best, hit, hit_axis = t, body, axis
                    R = R_body_camera[hit]
                    half = half_size[hit]
                    for i in range(3):
                        d[i] = R[i, 0] * r0 + R[i, 1] * r1 + R[i, 2] * r2
                        p[i] = origin[hit, i] + best * d[i]
                        normal[i] = 0.0
                    if kind[hit] == ELLIPSOID:
                        face = 0
                        norm = 0.0
                        for i in range(3):
                            normal[i] = p[i] / (half[i] * half[i])
                            norm += normal[i] * normal[i]
                        for i in range(3):
                            normal[i] /= np.sqrt(norm)
                        radius = (half[0] + half[1] + half[2]) / 3
                        u = np.arctan2(p[1] / half[1], p[0] / half[0]) * radius
                        v = np.arccos(min(max(p[2] / half[2], -1.0), 1.0)) * radius
                    else:
                        side = 1.0 if p[hit_axis] > 0 else -1.0
                        face = 2 * hit_axis + (1 if side > 0 else 0)
                        normal[hit_axis] = side
                        if hit_axis == 0:
                            u, v = p[1], p[2]
                        elif hit_axis == 1:
                            u, v = p[0], p[2]
                        else:
                            u, v = p[0], p[1]
                    length = np.sqrt(d[0] * d[0] + d[1] * d[1] + d[2] * d[2])
                    facing = abs(normal[0] * d[0] + normal[1] * d[1] + normal[2] * d[2]) / length
                    if kind[hit] == ROOM:
                        for i in range(3):
                            normal[i] = -normal[i]
                    density = texels_per_metre[hit, face]
                    footprint = best * length * pixel_angle * density / np.sqrt(max(facing, 0.05))
                    cos_turn, sin_turn = np.cos(turn[hit, face]), np.sin(turn[hit, face])
                    uu = (cos_turn * u - sin_turn * v) * density + shift[hit, face, 0]
                    vv = (sin_turn * u + cos_turn * v) * density + shift[hit, face, 1]
                    _sample(textures[texture_of[hit, face]], offsets, uu, vv, np.log2(max(footprint, 1e-6)), colour)
                    lambert = 0.0
                    W = R_world_body[hit]
                    for i in range(3):
                        lambert += light[i] * (W[i, 0] * normal[0] + W[i, 1] * normal[1] + W[i, 2] * normal[2])
                    shade = ambient + (1.0 - ambient) * max(lambert, 0.0)
                    for i in range(3):
                        value = 128.0 + (colour[i] - 128.0) * contrast[hit, face]
                        value = value * tint[hit, face, i] * shade
                        rgb[y, x, i] = np.uint8(min(max(value, 0.0), 255.0))
                    depth[y, x] = best


def camera_matrix(width: int, height: int, horizontal_fov_deg: float) -> np.ndarray:
    """K [3, 3] with square pixels and the principal point in the middle (pixel centres at integers)."""
    focal = 0.5 * width / np.tan(np.radians(horizontal_fov_deg) / 2)
    return np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1.0]])


def relative(T_world_a: np.ndarray, T_world_b: np.ndarray) -> np.ndarray:
    """T_a_b [4, 4]."""
    return inverse(T_world_a) @ T_world_b
