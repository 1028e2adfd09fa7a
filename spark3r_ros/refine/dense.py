"""Dense depth of one keyframe from the window's other cameras: optical flow, read along epipolar lines that are known.

Once poses are adjusted, every pixel that flow can follow has a measured depth. The network's depth is the prior: it
alone speaks where flow cannot (blank walls, what only one camera sees), corrected by the measurements around. The
result says how sure it is of each pixel, on the scale of the network's own confidence.

Legend: H x W pixels of the network's image, N = H * W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from spark3r_ros.geometry import inverse, project, transform, unproject

CONFIDENCE_UNIT = 0.1  # confidence = 1 / (1 + expected relative error of the depth / this), as nano says it
MAX_VIEWS = 3
_MIN_PARALLAX, _MAX_PARALLAX = 0.015, 0.5  # baseline over depth of a camera that is worth comparing with
_MIN_OVERLAP = 0.35  # share of the image that it must see
_FLOW_SIGMA = 0.35  # pixels; flow is never better ...
_FLOW_SIGMA_PER_ERROR = 0.7  # ... and worse by this share of its round trip and of its distance to the epipolar line
_MAX_ERROR = 2.0  # pixels of either, beyond which flow is wrong
_SPREAD = 0.06  # of the image's width: how far a measurement speaks for the network's depth around it
_PRIOR_FLOOR = 0.1  # relative: the network's depth is never trusted more
_RANGE = (0.1, 10.0)  # of the inverse depth over the prior's


@dataclass(frozen=True, eq=False)
class DenseView:
    """One keyframe of a window."""

    gray: np.ndarray  # [H, W] uint8, undistorted
    T_world_camera: np.ndarray  # [4, 4]
    rotation_sigma: float = 0.0  # rad; what little parallax cannot be told from


def dense_depth(
    view: DenseView, others: Sequence[DenseView], depth: np.ndarray, confidence: np.ndarray, K: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Depth and confidence [H, W] float32 of a view from the flow to others of its window.

    Args:
        view: the keyframe.
        others: those that may have seen the same; the best few are used.
        depth: [H, W] of the network, world units.
        confidence: [H, W] in [0, 1); 0: the lens saw nothing there.
        K: [3, 3] in pixels of H x W, of all views.
    """
    height, width = depth.shape
    rays = unproject(np.ones((height, width)), K).reshape(-1, 3).astype(np.float32)
    prior = 1.0 / np.maximum(depth.ravel().astype(np.float32), 1e-6)
    prior_sigma = np.maximum(expected_error(confidence.ravel().astype(np.float32)), _PRIOR_FLOOR)  # relative
    distance = float(np.median(depth))
    measured = [_measure(view, o, distance, rays, K) for o in _worth_comparing(view, others, depth, rays, K)]
    if not measured:
        return depth.astype(np.float32), confidence.astype(np.float32)
    rhos, weights = (np.stack(column) for column in zip(*measured, strict=True))  # [V, N]
    rho, information, _ = _fuse(rhos, weights, prior, prior_sigma)
    prior, prior_sigma = _corrected(prior, prior_sigma, rho, information, height, width)
    rho, information, prior_information = _fuse(rhos, weights, prior, prior_sigma)
    sigma = (information + prior_information) ** -0.5 / rho
    sure = np.where(confidence.ravel() > 0, 1.0 / (1.0 + 0.8 * sigma / CONFIDENCE_UNIT), 0.0)
    return (1.0 / rho).reshape(height, width).astype(np.float32), sure.reshape(height, width).astype(np.float32)


def expected_error(confidence: np.ndarray) -> np.ndarray:
    """Relative depth error that a confidence in [0, 1) stands for."""
    return CONFIDENCE_UNIT * (1.0 / np.clip(confidence, 1e-3, 1.0) - 1.0)


def _worth_comparing(
    view: DenseView, others: Sequence[DenseView], depth: np.ndarray, rays: np.ndarray, K: np.ndarray
) -> list[DenseView]:
    """Up to MAX_VIEWS other views with enough parallax and overlap, best first."""
    height, width = depth.shape
    points = rays[::37] * depth.ravel()[::37, None]
    distance = float(np.median(points[:, 2]))
    scored = []
    for number, other in enumerate(others):
        T = inverse(other.T_world_camera) @ view.T_world_camera
        parallax = float(np.linalg.norm(T[:3, 3])) / distance
        moved = transform(T, points)
        uv = project(np.maximum(moved, [-np.inf, -np.inf, 1e-6]), K)
        inside = (moved[:, 2] > 0) & (uv >= 0).all(axis=1) & (uv[:, 0] < width) & (uv[:, 1] < height)
        if _MIN_PARALLAX < parallax < _MAX_PARALLAX and inside.mean() > _MIN_OVERLAP:
            scored.append((min(parallax, 0.15) * float(inside.mean()), -number, other))
    scored.sort(key=lambda s: s[:2], reverse=True)
    return [other for _, _, other in scored[:MAX_VIEWS]]


def _measure(
    view: DenseView, other: DenseView, distance: float, rays: np.ndarray, K: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Inverse depth [N] of every pixel by its flow to another view, and the information [N] behind it; 0: none.

    Flow is computed to the other image as a plane at ``distance`` would bring it here, so that only the parallax
    is left to find.
    """
    height, width = view.gray.shape
    T = inverse(other.T_world_camera) @ view.T_world_camera
    H = K @ (T[:3, :3] + np.outer(T[:3, 3], [0, 0, 1.0]) / distance) @ np.linalg.inv(K)
    brought = cv2.warpPerspective(
        other.gray, H, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE
    )
    forward, backward = _flow(view.gray, brought, 1), _flow(brought, view.gray, 0)
    v, u = np.mgrid[:height, :width].astype(np.float32)
    x, y = u + forward[..., 0], v + forward[..., 1]
    back = cv2.remap(backward, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    round_trip = np.hypot(forward[..., 0] + back[..., 0], forward[..., 1] + back[..., 1]).ravel()
    found = np.stack([x.ravel(), y.ravel(), np.ones(x.size, np.float32)])  # [3, N] in the image that was brought here
    qx, qy, qz = (np.linalg.inv(K) @ H).astype(np.float32) @ found  # rays of the other camera
    far_x, far_y, far_z = T[:3, :3].astype(np.float32) @ rays.T  # the same without parallax
    focal, centre, (tx, ty, tz) = K[[0, 1], [0, 1]].tolist(), K[:2, 2].tolist(), T[:3, 3].tolist()
    with np.errstate(divide="ignore", invalid="ignore"):
        qx, qy = qx / qz, qy / qz
        slope_x, slope_y = tx - qx * tz, ty - qy * tz
        value_x, value_y = qx * far_z - far_x, qy * far_z - far_y
        square = np.maximum(slope_x**2 + slope_y**2, 1e-12)
        rho = (slope_x * value_x + slope_y * value_y) / square
        z = far_z + rho * tz
        off_line = np.abs(slope_x * value_y - slope_y * value_x) * focal[0] / (np.sqrt(square) * np.abs(z))
        column, row = focal[0] * qx + centre[0], focal[1] * qy + centre[1]
        inside = (qz > 0) & (column > 0) & (column < width - 1) & (row > 0) & (row < height - 1)
        good = inside & (rho > 0) & (z > 0) & (round_trip < _MAX_ERROR) & (off_line < _MAX_ERROR)
        doubt = focal[0] * float(np.hypot(view.rotation_sigma, other.rotation_sigma))
        sigma = np.hypot(_FLOW_SIGMA + _FLOW_SIGMA_PER_ERROR * (round_trip + off_line), doubt)  # pixels
        weight = square * (focal[0] / (sigma * z)) ** 2
    return np.where(good, rho, 0.0), np.where(good, weight, 0.0)


def _flow(first: np.ndarray, second: np.ndarray, smoothing: int) -> np.ndarray:
    """Flow [H, W, 2] between two images [H, W] uint8; ``smoothing``: iterations of variational refinement."""
    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
    flow.setFinestScale(0)
    flow.setVariationalRefinementIterations(smoothing)
    return flow.calc(first, second, None)  # type: ignore[call-overload]


def _fuse(
    rhos: np.ndarray, weights: np.ndarray, prior: np.ndarray, prior_sigma: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inverse depth [N] from measurements [V, N] and a prior of relative sigma [N], robustly (Cauchy).

    Returns it with the information [N] of the measurements and of the prior that agree with it.
    """
    prior_weight = (prior * prior_sigma) ** -2.0
    rho = (weights * rhos).sum(axis=0) + prior_weight * prior
    rho /= weights.sum(axis=0) + prior_weight
    for _ in range(4):
        agreeing = weights / (1.0 + weights * (rhos - rho) ** 2 / 4.0)
        robust, moment = agreeing.sum(axis=0), (agreeing * rhos).sum(axis=0)
        pull = prior_weight / (1.0 + prior_weight * (prior - rho) ** 2 / 4.0)
        rho = np.clip((moment + pull * prior) / (robust + pull), _RANGE[0] * prior, _RANGE[1] * prior)
    return rho, robust, pull


def _corrected(
    prior: np.ndarray, prior_sigma: np.ndarray, rho: np.ndarray, information: np.ndarray, height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """The prior [N] after the measurements around have corrected it, and its relative sigma [N]."""
    trust = information * rho**2  # of log inverse depth
    trust = trust / (trust + 1.0 / 0.03**2)  # a measurement speaks for its surroundings up to 3 %
    log_ratio = np.log(rho / prior)

    def spread(values: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(values.reshape(height, width), (0, 0), _SPREAD * width).ravel()

    support = spread(trust)
    mean = spread(trust * log_ratio) / (support + 0.02)
    variance = spread(trust * (log_ratio - mean) ** 2) / (support + 0.02)
    share = support / (support + 0.02)
    sigma = np.sqrt(share * np.maximum(variance, 0.02**2) + (1.0 - share) * prior_sigma**2)
    return prior * np.exp(mean), sigma
