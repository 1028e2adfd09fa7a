"""Keyframes with what they saw, and the bundle adjustment problem of a set of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.spatial import cKDTree

from spark3r_ros.geometry import inverse
from spark3r_ros.refine.bundle import Problem, Solution
from spark3r_ros.refine.landmarks import LandmarkTable, among, first_inverse_depth

SIGMA_PX = 0.3  # of a track's position; larger ones let the depth priors win: turns come out too small, steps too long
INSTANT_SIGMA = 0.002  # seconds: the time that a row of an image shows, as blur and shutter leave it open
FLAT_PRIOR_SIGMA = 3.0  # of an inverse depth about which nothing is known but that of its neighbours in the image
NETWORK_SIGMA = 4.0  # of an inverse depth from a network, in errors that it expects: whole surfaces share these
FIRMEST_SIGMA = 0.2  # and however sure it is, no less


def sigma_px(speed: float) -> float:
    """Of a track's position in an image that moves at ``speed`` px/s."""
    return float(np.hypot(SIGMA_PX, INSTANT_SIGMA * speed))


@dataclass(eq=False)
class Keyframe:
    id: int
    ids: np.ndarray  # [N] track numbers, ascending
    uv_read: np.ndarray  # [N, 2] undistorted pixels
    shutter: np.ndarray  # [N, 2] px/s: what to subtract per second of the sensor's readout
    readout: float = 0.0  # seconds
    sigma_px: float = SIGMA_PX  # of its observations
    T_world_camera: np.ndarray | None = None
    good: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))  # [N] not found to be an outlier
    network_depth: np.ndarray = field(default_factory=lambda: np.zeros(0))  # [N] about world scale; NaN where unknown
    network_error: np.ndarray = field(default_factory=lambda: np.zeros(0))  # [N] relative, as the network expects it

    def __post_init__(self) -> None:
        self.good = np.ones(len(self.ids), bool)
        self.network_depth = np.full(len(self.ids), np.nan)
        self.network_error = np.full(len(self.ids), np.nan)

    @property
    def uv(self) -> np.ndarray:
        """Undistorted pixels [N, 2] as a sensor that reads all rows at once would have seen them."""
        return self.uv_read - self.readout * self.shutter

    def add(self, ids: np.ndarray, uv_read: np.ndarray, shutter: np.ndarray) -> None:
        """Observations that were recognised later."""
        fresh = ~among(ids, self.ids)
        count = int(fresh.sum())
        order = np.argsort(np.concatenate([self.ids, ids[fresh]]), kind="stable")
        self.ids = np.concatenate([self.ids, ids[fresh]])[order]
        self.uv_read = np.concatenate([self.uv_read, uv_read[fresh]])[order]
        self.shutter = np.concatenate([self.shutter, shutter[fresh]])[order]
        self.good = np.concatenate([self.good, np.ones(count, bool)])[order]
        self.network_depth = np.concatenate([self.network_depth, np.full(count, np.nan)])[order]
        self.network_error = np.concatenate([self.network_error, np.full(count, np.nan)])[order]


@dataclass(frozen=True, eq=False)
class Assembled:
    problem: Problem
    ids: np.ndarray  # [P] track numbers of the points
    keyframes: tuple[Keyframe, ...]  # [K]


def normalised(uv: np.ndarray, K: np.ndarray) -> np.ndarray:
    """Undistorted pixels [N, 2] to z = 1."""
    return (uv - K[:2, 2]) / np.array([K[0, 0], K[1, 1]])


def assemble(
    keyframes: Sequence[Keyframe],
    T_world_camera: np.ndarray,
    is_free: np.ndarray,
    table: LandmarkTable,
    K: np.ndarray,
    focal_sigma: float = 0.0,
    readout_sigma: float = 0.0,
    max_points: int = 0,
) -> Assembled | None:
    """The points that at least two of the keyframes see, one of them free; None when there are fewer than eight.

    Points in ``table`` start there, the others from all their observations. ``max_points`` > 0 keeps those that most
    keyframes see.
    """
    rows = [np.flatnonzero(k.good) for k in keyframes]
    ids = np.concatenate([k.ids[r] for k, r in zip(keyframes, rows)])
    camera = np.repeat(np.arange(len(keyframes)), [len(r) for r in rows])
    observation = np.concatenate(rows)
    order = np.argsort(ids, kind="stable")
    ids, camera, observation = ids[order], camera[order], observation[order]
    unique, point, count = np.unique(ids, return_inverse=True, return_counts=True)
    wanted = (count >= 2) & (np.bincount(point, is_free[camera], len(unique)) > 0)
    if 0 < max_points < wanted.sum():
        best = np.argsort(-(count * wanted), kind="stable")[:max_points]
        wanted = np.zeros(len(unique), bool)
        wanted[best] = True
    if wanted.sum() < 8:
        return None
    keep = wanted[point]
    number = np.cumsum(wanted) - 1
    order, camera, observation, point = order[keep], camera[keep], observation[keep], number[point[keep]]
    uv_read = np.concatenate([k.uv_read[r] for k, r in zip(keyframes, rows)])[order]
    shutter = np.concatenate([k.shutter[r] for k, r in zip(keyframes, rows)])[order]
    readout = keyframes[0].readout
    unique = unique[wanted]
    starts = np.searchsorted(point, np.arange(len(unique)))
    anchor = camera[starts]
    where, found = table.find(unique)
    prior, prior_sigma = inverse_depth_priors(keyframes, T_world_camera, table, anchor, observation[starts])
    xy = normalised(uv_read - readout * shutter, K)
    noise = np.array([k.sigma_px for k in keyframes])
    information = (noise[anchor] / K[0, 0] / prior / prior_sigma) ** 2
    inverse_depth, _ = first_inverse_depth(T_world_camera, xy, camera, point, anchor, xy[starts], prior, information)
    rays = np.concatenate([xy[starts], np.ones((len(starts), 1))], axis=1) / inverse_depth[:, None]
    xyz = np.einsum("pij,pj->pi", T_world_camera[anchor, :3, :3], rays) + T_world_camera[anchor, :3, 3]
    xyz[found] = table.xyz[where[found]]
    problem = Problem(
        T_world_camera=T_world_camera,
        is_free=is_free,
        focal=np.array([K[0, 0], K[1, 1]]),
        centre=K[:2, 2],
        xyz=xyz,
        anchor=anchor,
        camera=camera,
        point=point,
        uv=uv_read,
        shutter=shutter,
        sigma_px=noise[camera],
        prior_inverse_depth=prior,
        prior_sigma=prior_sigma,
        focal_sigma=focal_sigma,
        readout=readout,
        readout_sigma=readout_sigma,
    )
    return Assembled(problem, unique, tuple(keyframes))


def inverse_depth_priors(
    keyframes: Sequence[Keyframe], T: np.ndarray, table: LandmarkTable, anchor: np.ndarray, observation: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Inverse depth [P] expected at the anchors, and sigma [P] of its logarithm, no firmer when the image is blurred.

    It is that of the known points next to it in the image, or a network's times what those are deeper than the network
    has them: of a network only the shape between neighbours counts, not that of the whole image. A known point is one
    of its own neighbours, so that the rest of the image does not pull at it.
    """
    prior, sigma = np.ones(len(anchor)), np.full(len(anchor), FLAT_PRIOR_SIGMA)
    for k, keyframe in enumerate(keyframes):
        mine = np.flatnonzero(anchor == k)
        if len(mine) == 0:
            continue
        known, depth = _known_depths(keyframe, T[k], table)
        rows, uv = observation[mine], keyframe.uv
        prior[mine] = 1.0 / _of_neighbours(uv[rows], uv[known], depth)
        given, ratio = np.isfinite(keyframe.network_depth[rows]), depth / keyframe.network_depth[known]
        network, told, both = mine[given], rows[given], np.isfinite(ratio)
        proportion = _of_neighbours(uv[told], uv[known[both]], ratio[both])
        prior[network] = 1.0 / (keyframe.network_depth[told] * proportion)
        sigma[network] = np.clip(NETWORK_SIGMA * keyframe.network_error[told], FIRMEST_SIGMA, FLAT_PRIOR_SIGMA)
        sigma[mine] *= keyframe.sigma_px / SIGMA_PX
    return prior, sigma


def _known_depths(keyframe: Keyframe, T: np.ndarray, table: LandmarkTable) -> tuple[np.ndarray, np.ndarray]:
    """Rows [N] and depths [N] of the well-known points that a keyframe sees."""
    rows, found = table.find(keyframe.ids)
    found &= table.depth_sigma[rows] < 0.3 if len(table) else False
    depth = (table.xyz[rows[found]] - T[:3, 3]) @ T[:3, 2]
    return np.flatnonzero(found)[depth > 0], depth[depth > 0]


def _of_neighbours(uv: np.ndarray, known_uv: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Median value [N] of the five known points nearest to each pixel [N, 2]; 1 without any."""
    if len(known_uv) < 5:
        return np.full(len(uv), float(np.median(values)) if len(values) else 1.0)
    return np.asarray(np.median(values[cKDTree(known_uv).query(uv, 5)[1]], axis=1))


def write_back(
    assembled: Assembled, solution: Solution, table: LandmarkTable, later: Sequence[Keyframe], gate_px: float
) -> np.ndarray:
    """Store poses and points; flag outliers; drop points that lost their observations. Returns inliers [M] bool.

    Points that were left out of the problem follow their anchors. Keyframes that are ``later`` than the problem, and
    their points, follow its last camera.
    """
    problem = assembled.problem
    inlier = solution.residual_px < gate_px
    left_out = ~among(table.ids, assembled.ids)
    step = np.eye(4)
    for k in np.flatnonzero(problem.is_free):
        keyframe, T_new = assembled.keyframes[k], solution.T_world_camera[k]
        assert keyframe.T_world_camera is not None
        step = T_new @ inverse(keyframe.T_world_camera)
        table.move(left_out & (table.anchor == keyframe.id), step)
        keyframe.T_world_camera = T_new
    for keyframe in later:
        if keyframe.T_world_camera is not None:
            keyframe.T_world_camera = step @ keyframe.T_world_camera
            table.move(left_out & (table.anchor == keyframe.id), step)
    for number, keyframe in enumerate(assembled.keyframes):
        bad = assembled.ids[problem.point[(problem.camera == number) & ~inlier]]
        keyframe.good[np.searchsorted(keyframe.ids, bad)] = False
    support = np.bincount(problem.point, inlier, len(assembled.ids))
    usable = (support >= 2) & np.isfinite(solution.xyz).all(axis=1)
    table.drop(assembled.ids[~usable])
    anchor_ids = np.array([k.id for k in assembled.keyframes])[problem.anchor]
    origin = solution.T_world_camera[problem.anchor, :3, 3]
    table.put(
        assembled.ids[usable], solution.xyz[usable], solution.depth_sigma[usable], anchor_ids[usable], origin[usable]
    )
    return inlier
