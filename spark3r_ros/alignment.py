"""How one solved window joins the map: scale from depths, rotation and translation from cameras, and a dense check.

A window comes in its own gauge. Its first ``overlap`` keyframes are already in the map, so each of them says how the
window must be scaled (its depth, seen in its own camera), turned and moved (its pose). ``align`` combines what they say
into one similarity ``S_map_window``, measures how well the overlap then agrees, and refuses to let a bad link bend the
map: the newest overlap camera then keeps its place and the scale falls back to the prior.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spark3r_ros import geometry
from spark3r_ros.config import AlignmentConfig

MAX_SAMPLES = 3000  # pixels per frame that vote: more only costs time
MIN_SAMPLES = 50
SIGMA_FLOOR = 0.003  # of log scale: depth maps of a network are never better than this
ONE_FRAME_SIGMA = 0.02  # spread that one frame alone cannot show; enters as one pseudo observation


@dataclass(frozen=True, eq=False)
class View:
    """One camera with its depth, either in the map or in the window's gauge."""

    T: np.ndarray  # [4, 4] T_map_camera or T_window_camera
    depth: np.ndarray  # [H, W] in the same unit as T's translation; NaN or <= 0 where unknown
    confidence: np.ndarray  # [H, W] in [0, 1)


@dataclass(frozen=True, eq=False)
class Link:
    """How a window hangs on the map."""

    S_map_window: np.ndarray  # [4, 4] similarity
    log_scale: float
    sigma: float  # of log_scale, after the prior
    residual: float  # median distance of the overlap's points to where the map has them, over depth; NaN: no overlap
    rotation_sigma: float  # rad, spread of what the overlap cameras say
    translation_sigma: float  # over median depth, spread of what the overlap cameras say
    accepted: bool
    dense_log_scale: float  # of the dense similarity, which checks log_scale


def weighted_median(values: np.ndarray, weights: np.ndarray) -> float:
    """Value [N] at half of the total weight [N]."""
    order = np.argsort(values, kind="stable")
    cumulative = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(cumulative, 0.5 * cumulative[-1])])


def robust_log_ratio(target: np.ndarray, source: np.ndarray, weights: np.ndarray) -> float | None:
    """Log of the factor that brings depths ``source`` [N] to ``target`` [N]: weighted median, then IRLS towards L1.

    None when fewer than ``MIN_SAMPLES`` pairs are usable.
    """
    with np.errstate(invalid="ignore"):
        usable = np.isfinite(target) & np.isfinite(source) & (target > 0) & (source > 0) & (weights > 0)
    if usable.sum() < MIN_SAMPLES:
        return None
    log_ratio, w = np.log(target[usable] / source[usable]), weights[usable]
    centre = weighted_median(log_ratio, w)
    for _ in range(5):
        error = np.abs(log_ratio - centre)
        floor = max(1e-4, 0.1 * float(np.median(error)))  # L1 weights are infinite at zero
        irls = w / np.maximum(error, floor)
        centre = float(irls @ log_ratio / irls.sum())
    return centre


def shrink(value: float, sigma: float, prior_sigma: float | None) -> tuple[float, float]:
    """Posterior mean and sigma of a log scale under a zero-mean normal prior; None: no prior."""
    if prior_sigma is None:
        return value, sigma
    information = 1 / sigma**2 + 1 / prior_sigma**2
    return value / sigma**2 / information, information**-0.5


def scale_from_depths(
    map_views: Sequence[View], window_views: Sequence[View], prior_sigma: float | None
) -> tuple[float, float] | None:
    """Log scale of the window and its sigma: each overlap frame votes in its own camera, sigma is the votes' spread."""
    votes: list[float] = []
    for there, here in zip(map_views, window_views, strict=True):
        rows = _samples(there, here)
        vote = robust_log_ratio(there.depth.ravel()[rows], here.depth.ravel()[rows], _weights(there, here)[rows])
        if vote is not None:
            votes.append(vote)
    if not votes:
        return None
    mean = float(np.median(votes))
    variance = (float(np.sum((np.array(votes) - mean) ** 2)) + ONE_FRAME_SIGMA**2) / len(votes)
    return shrink(mean, max(SIGMA_FLOOR, (variance / len(votes)) ** 0.5), prior_sigma)


def cameras_to_cameras(map_T: np.ndarray, window_T: np.ndarray, scale: float) -> tuple[np.ndarray, float, float]:
    """Similarity of given scale between poses [N, 4, 4]: chordal mean, mean translation; and their RMS spreads."""
    R_each = map_T[:, :3, :3] @ np.swapaxes(window_T[:, :3, :3], 1, 2)
    R = geometry.project_to_so3(R_each.sum(axis=0))
    t_each = map_T[:, :3, 3] - scale * window_T[:, :3, 3] @ R.T
    t = np.median(t_each, axis=0) if len(t_each) > 2 else t_each.mean(axis=0)
    rotation_spread = float(np.sqrt(np.mean(geometry.rotation_angle(R_each @ R.T) ** 2)))
    return geometry.make_T(scale * R, t), rotation_spread, float(np.sqrt(np.mean(np.sum((t_each - t) ** 2, axis=1))))


def dense_similarity(source: np.ndarray, target: np.ndarray, weights: np.ndarray, iterations: int = 8) -> np.ndarray:
    """Robust similarity [4, 4] from points [N, 3] to points [N, 3]: IRLS (Cauchy) over the trace form of Umeyama."""
    w = weights
    S = geometry.umeyama(source, target, w)
    for _ in range(iterations):
        error = np.linalg.norm(geometry.transform(S, source) - target, axis=1)
        width = max(1.4826 * weighted_median(error, weights), 1e-9)
        w = weights / (1 + (error / width) ** 2) ** 2
        S = geometry.umeyama(source, target, w)
    return S


def align(
    map_views: Sequence[View], window_views: Sequence[View], K: np.ndarray, config: AlignmentConfig, same_gauge: bool
) -> Link:
    """The similarity that brings a window into the map, from its overlap: the same cameras in both, oldest first.

    ``same_gauge``: the window attended to the map's context, so its scale is expected to be the map's and the prior on
    log scale applies. A window of a free gauge has no such expectation.
    """
    prior_sigma = config.scale_prior_sigma if same_gauge and config.scale_prior else None
    estimate = scale_from_depths(map_views, window_views, prior_sigma)
    log_scale, sigma = estimate if estimate is not None else (0.0, 1.0)
    if config.mode == "rigid":
        log_scale = 0.0
    map_T, window_T = np.stack([v.T for v in map_views]), np.stack([v.T for v in window_views])
    S, rotation_spread, shift = cameras_to_cameras(map_T, window_T, float(np.exp(log_scale)))
    target, source, weights, depth = _overlap_points(map_views, window_views, K)
    enough = len(target) >= MIN_SAMPLES
    S_dense = dense_similarity(source, target, weights / depth**2) if enough else S
    dense_log_scale = float(np.log(geometry.scale_of(S_dense)))
    if config.mode == "dense":
        S, log_scale = S_dense, dense_log_scale
    residual = _residual(S, source, target, weights, depth) if enough else float("nan")
    median_depth = weighted_median(depth, weights) if enough else 1.0
    if estimate is not None:  # scale that cameras and points disagree on is not known better than that
        sigma = float(np.hypot(sigma, 0.5 * (dense_log_scale - log_scale)))
    accepted = estimate is not None and residual <= config.max_residual
    if not accepted:
        log_scale = log_scale if not same_gauge and estimate is not None else 0.0
        S, _, _ = cameras_to_cameras(map_T[-1:], window_T[-1:], float(np.exp(log_scale)))
        sigma = max(sigma, config.bad_link_sigma)
    root_n = len(map_T) ** 0.5
    spreads = (rotation_spread / root_n, shift / median_depth / root_n)
    return Link(S, log_scale, sigma, residual, *spreads, accepted, dense_log_scale)


def _weights(there: View, here: View) -> np.ndarray:
    return np.minimum(there.confidence, here.confidence).ravel().astype(float)


def _samples(there: View, here: View) -> np.ndarray:
    """Evenly spread pixel indices, at most MAX_SAMPLES, over the confident half of the frame."""
    weights = _weights(there, here)
    confident = np.flatnonzero(weights >= np.median(weights))
    return confident[:: max(1, len(confident) // MAX_SAMPLES)]


def _overlap_points(
    map_views: Sequence[View], window_views: Sequence[View], K: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The overlap's points in the map [N, 3] and in the window [N, 3], their weights [N] and map depths [N]."""
    parts = []
    for there, here in zip(map_views, window_views, strict=True):
        rows = _samples(there, here)
        d_there, d_here = there.depth.ravel()[rows].astype(float), here.depth.ravel()[rows].astype(float)
        w = _weights(there, here)[rows]
        with np.errstate(invalid="ignore"):
            ok = (d_there > 0) & (d_here > 0) & np.isfinite(d_there) & np.isfinite(d_here) & (w > 0)
        rays = _rays(rows[ok], there.depth.shape, K)
        p_there = geometry.transform(there.T, rays * d_there[ok, None])
        p_here = geometry.transform(here.T, rays * d_here[ok, None])
        parts.append((p_there, p_here, w[ok], d_there[ok]))
    target, source, weights, depth = (np.concatenate(column) for column in zip(*parts, strict=True))
    return target, source, weights, depth


def _rays(rows: np.ndarray, shape: tuple[int, ...], K: np.ndarray) -> np.ndarray:
    """Rays [N, 3] with z = 1 through flat pixel indices [N]."""
    v, u = np.divmod(rows, shape[1])
    return np.stack([(u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1], np.ones(len(rows))], axis=1)


def _residual(S: np.ndarray, source: np.ndarray, target: np.ndarray, weights: np.ndarray, depth: np.ndarray) -> float:
    return weighted_median(np.linalg.norm(geometry.transform(S, source) - target, axis=1) / depth, weights)
