"""Points and cameras whose truth is known, and the tracks that a tracker of a given quality would see of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spark3r_ros.geometry import inverse, make_T, project, so3_exp, transform
from spark3r_ros.tracks import Tracks
from training.scenes import camera_matrix

WIDTH, HEIGHT = 640, 480
K = camera_matrix(WIDTH, HEIGHT, 65.0)


@dataclass(frozen=True, eq=False)
class World:
    xyz: np.ndarray  # [N, 3]; a point's number is its track number
    seed: int = 0

    def seen(self, T_world_camera: np.ndarray, K: np.ndarray = K) -> tuple[np.ndarray, np.ndarray]:
        """Numbers [N] of the points inside the image, ascending, and their exact pixels [N, 2]."""
        local = transform(inverse(T_world_camera), self.xyz)
        uv = project(local, K)
        inside = (local[:, 2] > 0.1) & (uv >= 2).all(axis=1) & (uv < [WIDTH - 2, HEIGHT - 2]).all(axis=1)
        return np.flatnonzero(inside), uv[inside]

    def tracks(
        self, T_world_camera: np.ndarray, number: int, *, noise_px: float = 0.2, outliers: float = 0.0, limit: int = 0
    ) -> Tracks:
        """What frame ``number`` shows: pixel noise, a share of outliers that are anywhere, at most ``limit`` points."""
        rng = np.random.default_rng([self.seed, number, 5])
        ids, uv = self.seen(T_world_camera)
        if limit:
            ids, uv = ids[:limit], uv[:limit]
        uv = uv + rng.normal(0, noise_px, uv.shape)
        wrong = rng.random(len(ids)) < outliers
        uv[wrong] = rng.uniform(2, [WIDTH - 2, HEIGHT - 2], (int(wrong.sum()), 2))
        return Tracks(ids.astype(np.int64), uv, 0.0, 1.0, np.zeros((2, 3)))


def around(count: int, seed: int = 0, nearest: float = 2.0, farthest: float = 6.0) -> World:
    """Points on all sides of the origin."""
    rng = np.random.default_rng([seed, 1])
    direction = rng.normal(size=(count, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    return World(direction * rng.uniform(nearest, farthest, (count, 1)), seed)


def ahead(count: int, seed: int = 0, nearest: float = 2.0, farthest: float = 6.0) -> World:
    """Points in front of cameras near the origin that look along z."""
    rng = np.random.default_rng([seed, 2])
    z = rng.uniform(nearest, farthest, count)
    return World(np.stack([rng.uniform(-0.7, 0.7, count) * z, rng.uniform(-0.5, 0.5, count) * z, z], axis=1), seed)


def wall(count: int, seed: int = 0, slope: float = 0.3) -> World:
    """Points on a plane about 3 in front of the origin."""
    rng = np.random.default_rng([seed, 3])
    x, y = rng.uniform(-2.5, 2.5, count), rng.uniform(-2.0, 2.0, count)
    return World(np.stack([x, y, 3.0 + slope * x - 0.2 * y], axis=1), seed)


def sideways(num_frames: int, step: float = 0.12, turn_deg: float = 1.0) -> np.ndarray:
    """T_world_camera [N, 4, 4]: to the right, a little up and forward, and around; the first at the origin."""
    i = np.arange(num_frames)[:, None]
    rotation = np.radians(turn_deg) * i * np.array([0.3, -1.0, 0.2])
    return make_T(so3_exp(rotation), step * i * np.array([1.0, -0.2, 0.25]))


def forward(num_frames: int, step: float = 0.2) -> np.ndarray:
    """T_world_camera [N, 4, 4]: along the optical axis with a slight sway."""
    i = np.arange(num_frames)[:, None]
    sway = 0.01 * np.sin(i * np.array([1.7, 2.3, 0.9]))
    return make_T(so3_exp(sway), step * i * np.array([0.0, 0.0, 1.0]) + sway)


def turning(num_frames: int, degrees: float, step: float = 0.0) -> np.ndarray:
    """T_world_camera [N, 4, 4]: about the vertical by ``degrees`` a frame, ``step`` to the side on the way."""
    i = np.arange(num_frames)[:, None]
    return make_T(so3_exp(np.radians(degrees) * i * np.array([0, 1.0, 0])), step * i * np.array([1.0, 0.1, 0.0]))


def in_first_camera(T_world_camera: np.ndarray) -> np.ndarray:
    return inverse(T_world_camera[0]) @ T_world_camera


def perturbed(T: np.ndarray, rng: np.random.Generator, metres: float, radians: float) -> np.ndarray:
    """T [..., 4, 4] with noise in its own frame."""
    shape = T.shape[:-2]
    return T @ make_T(so3_exp(rng.normal(0, radians, (*shape, 3))), rng.normal(0, metres, (*shape, 3)))
