"""The first window: several independent guesses of its poses, and the one that explains the tracks best.

Two-view starts fail in different ways (an essential matrix on planes, a homography off them, both on pure rotation, a
network on what it was not trained for), and a wrong start is what makes the tails of the error. So several image pairs
are tried with both, next to the network's poses and a pure rotation; each is adjusted for a few iterations on the same
tracks, and the robust cost decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from spark3r_ros.geometry import inverse, make_T, transform
from spark3r_ros.refine.bundle import Solution, adjust
from spark3r_ros.refine.keyframes import Assembled, Keyframe, assemble, normalised
from spark3r_ros.refine.landmarks import LandmarkTable, first_inverse_depth
from spark3r_ros.refine.pose import Landmarks, align_rays, fit_pose

_MIN_COMMON = 30  # tracks of an image pair
_MAX_PAIRS = 2  # four end no better (96 rendered windows) and cost up to half as much again
_PLACED_TOGETHER = 3  # frames that join a chain between two adjustments
_START_POINTS = 250  # tracks that starts are compared on
_SAME_COST = 1.01  # starts that end within 1 % of the lowest cost have ended in the same place
_RAY_THRESHOLD = 0.02  # radians


@dataclass(frozen=True, eq=False)
class Start:
    name: str
    T_world_camera: np.ndarray  # [S, 4, 4]
    K: np.ndarray
    cost: float


def best_start(
    keyframes: Sequence[Keyframe], K: np.ndarray, T_network: np.ndarray | None, focal_sigma: float
) -> Start | None:
    """The start [S, 4, 4] with the lowest robust cost after a short adjustment; None when tracks are too few.

    No more are tried when two that came from different places have ended at the same lowest cost. A pure rotation does
    not count: far from the truth it ends where a bad network ends.
    """
    best: Start | None = None
    costs: list[float] = []
    for name, T in _guesses(keyframes, K, T_network):
        solved = _short_adjustment(keyframes, T, K, focal_sigma, 8)
        if solved is None:
            continue
        _, solution = solved
        if best is None or solution.cost < best.cost:
            refined = K.copy()
            refined[[0, 1], [0, 1]] = solution.focal
            best = Start(name, solution.T_world_camera, refined, solution.cost)
        if name != "rotation":
            costs.append(solution.cost)
        if sum(cost < _SAME_COST * best.cost for cost in costs) >= 2:
            break
    return best


def _guesses(
    keyframes: Sequence[Keyframe], K: np.ndarray, T_network: np.ndarray | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and poses [S, 4, 4], made one at a time."""
    if T_network is not None:
        yield "network", _to_unit_depth(keyframes, T_network, K)
    yield "rotation", rotation_chain(keyframes, K)
    for first, second in _pairs(keyframes):
        for name, T_first_second in _two_view(keyframes[first], keyframes[second], K):
            yield f"{name} {first}-{second}", _chain(keyframes, K, first, second, T_first_second)


def _to_unit_depth(keyframes: Sequence[Keyframe], T: np.ndarray, K: np.ndarray) -> np.ndarray:
    """Poses [S, 4, 4] scaled around the first, so that the median depth is about 1, as the priors expect."""
    free = np.arange(len(keyframes)) > 0
    assembled = assemble(keyframes, T, free, LandmarkTable(), K, max_points=_START_POINTS)
    if assembled is None:
        return T
    problem = assembled.problem
    local = transform(inverse(T[problem.anchor]), problem.xyz[:, None])[:, 0]
    scaled = T.copy()
    scaled[:, :3, 3] = T[0, :3, 3] + (T[:, :3, 3] - T[0, :3, 3]) / np.median(local[:, 2])
    return scaled


def _short_adjustment(
    keyframes: Sequence[Keyframe], T: np.ndarray, K: np.ndarray, focal_sigma: float, iterations: int
) -> tuple[Assembled, Solution] | None:
    free = np.arange(len(keyframes)) > 0
    assembled = assemble(keyframes, T, free, LandmarkTable(), K, focal_sigma, max_points=_START_POINTS)
    return None if assembled is None else (assembled, adjust(assembled.problem, iterations))


def common(a: Keyframe, b: Keyframe) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the tracks that both keyframes see."""
    _, rows_a, rows_b = np.intersect1d(a.ids, b.ids, assume_unique=True, return_indices=True)
    both = a.good[rows_a] & b.good[rows_b]
    return rows_a[both], rows_b[both]


def _pairs(keyframes: Sequence[Keyframe]) -> list[tuple[int, int]]:
    """Image pairs with many common tracks and much motion between them, best first, each end used at most twice."""
    scored = []
    for i in range(len(keyframes)):
        for j in range(i + 1, len(keyframes)):
            rows_i, rows_j = common(keyframes[i], keyframes[j])
            if len(rows_i) < _MIN_COMMON:
                continue
            motion = float(np.median(np.linalg.norm(keyframes[i].uv[rows_i] - keyframes[j].uv[rows_j], axis=1)))
            scored.append((min(len(rows_i), 150) * min(motion, 100.0), i, j))
    scored.sort(reverse=True)
    chosen: list[tuple[int, int]] = []
    for _, i, j in scored:
        if sum(i in pair for pair in chosen) < 2 and sum(j in pair for pair in chosen) < 2:
            chosen.append((i, j))
        if len(chosen) == _MAX_PAIRS:
            break
    return chosen


def _two_view(a: Keyframe, b: Keyframe, K: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """T_a_b candidates, one of an essential matrix and one of a homography."""
    rows_a, rows_b = common(a, b)
    xy_a, xy_b = normalised(a.uv[rows_a], K), normalised(b.uv[rows_b], K)
    threshold = 1.5 / K[0, 0]
    candidates = []
    E, mask = cv2.findEssentialMat(xy_a, xy_b, np.eye(3), method=cv2.RANSAC, prob=0.999, threshold=threshold)
    if E is not None and E.shape == (3, 3):
        _, R, t, _ = cv2.recoverPose(E, xy_a, xy_b, np.eye(3), mask=mask.copy())
        candidates.append(("essential", inverse(make_T(R, t.ravel()))))
    H, mask = cv2.findHomography(xy_a, xy_b, cv2.RANSAC, 2.0 * threshold, maxIters=500)
    if H is not None:
        _, rotations, translations, _ = cv2.decomposeHomographyMat(H, np.eye(3))
        poses = [inverse(make_T(R, t.ravel())) for R, t in zip(rotations, translations)]
        costs = [_two_view_cost(T, xy_a, xy_b, threshold) for T in poses]
        candidates.append(("homography", poses[int(np.argmin(costs))]))
    for _, T in candidates:  # scale: the median depth becomes 1, as the priors expect
        T[:3, 3] *= np.median(_two_view_inverse_depth(T, xy_a, xy_b))
    return candidates


def _two_view_cost(T_a_b: np.ndarray, xy_a: np.ndarray, xy_b: np.ndarray, threshold: float) -> float:
    """Robust reprojection cost of points in front of both cameras."""
    count = len(xy_a)
    inverse_depth = _two_view_inverse_depth(T_a_b, xy_a, xy_b)
    points = transform(inverse(T_a_b), np.c_[xy_a, np.ones(count)] / inverse_depth[:, None])
    error = np.linalg.norm(points[:, :2] / np.maximum(points[:, 2:], 1e-6) - xy_b, axis=1) / threshold
    return float(np.log1p(np.where(points[:, 2] > 0, error, 1e3) ** 2).sum())


def _two_view_inverse_depth(T_a_b: np.ndarray, xy_a: np.ndarray, xy_b: np.ndarray) -> np.ndarray:
    count = len(xy_a)
    T, weak = np.stack([np.eye(4), T_a_b]), np.full(count, 1e-12)
    second, first = np.ones(count, int), np.zeros(count, int)
    return first_inverse_depth(T, xy_b, second, np.arange(count), first, xy_a, np.ones(count), weak, floor=1e-3)[0]


def rotation_chain(keyframes: Sequence[Keyframe], K: np.ndarray) -> np.ndarray:
    """Poses [S, 4, 4] that only turn: each from the tracks it shares with the one before."""
    T = np.tile(np.eye(4), (len(keyframes), 1, 1))
    for i in range(1, len(keyframes)):
        T[i] = T[i - 1]
        rows_a, rows_b = common(keyframes[i - 1], keyframes[i])
        if len(rows_a) >= 4:
            R, _ = align_rays(rays(keyframes[i - 1].uv[rows_a], K), rays(keyframes[i].uv[rows_b], K), _RAY_THRESHOLD)
            T[i, :3, :3] = T[i - 1, :3, :3] @ R
    return T


def rays(uv: np.ndarray, K: np.ndarray) -> np.ndarray:
    """Undistorted pixels [N, 2] to unit rays [N, 3] of the camera."""
    xyz = np.concatenate([normalised(uv, K), np.ones((len(uv), 1))], axis=1)
    return xyz / np.linalg.norm(xyz, axis=1, keepdims=True)


def _chain(
    keyframes: Sequence[Keyframe], K: np.ndarray, first: int, second: int, T_first_second: np.ndarray
) -> np.ndarray:
    """Poses [S, 4, 4] of all keyframes from those of a pair: triangulate, pose the next best frames, adjust, repeat."""
    T = rotation_chain(keyframes, K)
    T = inverse(T[first]) @ T
    T[second] = T_first_second
    posed = [first, second]
    while len(posed) < len(keyframes):
        table, chosen = LandmarkTable(), sorted(posed)
        members = [keyframes[i] for i in chosen]
        free = np.array([i not in (first,) for i in chosen])
        assembled = assemble(members, T[chosen], free, table, K, max_points=_START_POINTS)
        if assembled is None:
            return T
        solution = adjust(assembled.problem, 3)
        T[chosen] = solution.T_world_camera
        support = np.bincount(assembled.problem.point, solution.residual_px < 4.0, len(assembled.ids))
        usable = (support >= 2) & (solution.depth_sigma < 0.5)
        rest = [i for i in range(len(keyframes)) if i not in posed]
        seen = {i: int(np.isin(keyframes[i].ids, assembled.ids[usable]).sum()) for i in rest}
        for index in sorted(rest, key=lambda i: -seen[i])[:_PLACED_TOGETHER]:
            neighbour = min(posed, key=lambda i: abs(i - index))
            guess = T[index].copy()
            guess[:3, 3] = T[neighbour][:3, 3]
            if seen[index] >= 8:
                guess = _posed(keyframes[index], assembled, solution, usable, K, guess)
            T[index] = guess
            posed.append(index)
    return T


def _posed(
    keyframe: Keyframe,
    assembled: Assembled,
    solution: Solution,
    usable: np.ndarray,
    K: np.ndarray,
    guess: np.ndarray,
) -> np.ndarray:
    ids = assembled.ids[usable]
    _, here, there = np.intersect1d(keyframe.ids, ids, assume_unique=True, return_indices=True)
    rows = np.flatnonzero(usable)[there]
    origin = solution.T_world_camera[assembled.problem.anchor[rows], :3, 3]
    points = Landmarks(solution.xyz[rows], solution.xyz[rows] - origin, solution.depth_sigma[rows], keyframe.uv[here])
    return fit_pose(points, K, guess, keyframe.sigma_px).T_world_camera
