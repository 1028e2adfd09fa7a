"""The pose of one frame from points whose places are known, more or less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from spark3r_ros.geometry import inverse, make_T, project_to_so3, so3_exp

GATE_CHI2 = 9.21  # 99 % of a 2D residual
MIN_INLIERS = 12
_LOSS = 1.5  # Cauchy scale in standard deviations
_WIDE = (4.0, 4.0, 4.0)  # times that in the first steps: the guess may be many pixels off
_MAX_STEPS = 15
_STEP_TOLERANCE = 5e-5  # rad, and of the scene's distance: a few hundredths of a pixel
_NEAR_TOLERANCE = 1e-3  # the same where another fit follows
_TRUST_CHI2 = 36.0  # six sigmas: blur and shutter push points past the gate, a wrong pose pushes them past this
_TRUST_SHARE = 0.7  # below this share of points within that, the pose is doubted
_KNOWN_SIGMA = 0.3  # of a relative depth that says where a point is
_MIN_KNOWN = 24
_UNKNOWN_WEIGHT = 0.3  # of all points of unknown depth, against all of known depth


@dataclass(frozen=True, eq=False)
class Landmarks:
    """Points with the places where one frame sees them."""

    xyz: np.ndarray  # [N, 3] world
    ray: np.ndarray  # [N, 3] world: to the point from where its depth was measured
    depth_sigma: np.ndarray  # [N] relative standard deviation of the depth along it; 0: the point is where it is
    uv: np.ndarray  # [N, 2] undistorted pixels

    def select(self, which: np.ndarray) -> Landmarks:
        """Those of ``which`` [N] bool."""
        return Landmarks(self.xyz[which], self.ray[which], self.depth_sigma[which], self.uv[which])


@dataclass(frozen=True, eq=False)
class PoseFit:
    T_world_camera: np.ndarray  # [4, 4]
    covariance: np.ndarray  # [6, 6] x y z, rotation; in the camera frame
    inlier: np.ndarray  # [N] bool
    trusted: np.ndarray  # [N] bool: those that a right pose explains, if not well
    residual_px: float  # median of the inliers, each point at its best depth; NaN without any


def fit_pose(landmarks: Landmarks, K: np.ndarray, T_guess: np.ndarray, sigma_px: float) -> PoseFit:
    """The pose near ``T_guess``, or another one when too few points agree with that and more with the other one.

    Points of known depth decide where the pose is; then the others help, together by less than those. A point of
    unknown depth says only on which line it should be seen, so any that slide along an edge agree on some wrong step,
    and there are hundreds of them after a turn. With fewer than 24 of known depth all count alike.

    Known depths may be wrong together, as of a pattern that was taken for itself one period away. So when many points
    disagree, the pose is looked for from all of them alike and by sample consensus, too.
    """
    known = landmarks.depth_sigma < _KNOWN_SIGMA
    if known.sum() < _MIN_KNOWN:
        known = np.ones(len(known), bool)
    weight = np.where(known, 1.0, min(1.0, _UNKNOWN_WEIGHT * known.sum() / max(int((~known).sum()), 1)))
    sure = landmarks.select(known)

    def fit_from(points: Landmarks, T: np.ndarray) -> PoseFit:
        near, _ = _descend(points, np.ones(len(points.uv)), K, T, sigma_px, _WIDE, _NEAR_TOLERANCE)
        return _settled(landmarks, weight, K, near, sigma_px)

    best = fit_from(sure, T_guess)
    if best.inlier.sum() >= MIN_INLIERS and best.trusted.mean() >= _TRUST_SHARE:
        return best
    start = sample_consensus(sure, K, sigma_px)
    others = [fit_from(landmarks, T_guess)] + ([fit_from(sure, start)] if start is not None else [])
    return max([best, *others], key=lambda fit: int(fit.inlier.sum()))


def sample_consensus(landmarks: Landmarks, K: np.ndarray, sigma_px: float) -> np.ndarray | None:
    """T_world_camera [4, 4] from minimal samples; None when nothing agrees. OpenCV draws from a fixed seed."""
    if len(landmarks.uv) < 6:
        return None
    try:
        found, rotation, translation, inliers = cv2.solvePnPRansac(
            landmarks.xyz, landmarks.uv, K, None, iterationsCount=200, reprojectionError=4.0 * sigma_px,
            confidence=0.999, flags=cv2.SOLVEPNP_SQPNP,
        )  # fmt: skip
    except cv2.error:  # OpenCV 5 asserts when a sample is degenerate
        return None
    if not found or inliers is None or not np.isfinite(translation).all():
        return None
    return inverse(make_T(so3_exp(rotation.ravel()), translation.ravel()))


@dataclass(frozen=True, eq=False)
class _Look:
    """The points as a camera at some pose sees them, each at its best depth; N points, in sigmas of a pixel."""

    residual: np.ndarray  # [N, 2]
    J: np.ndarray  # [N, 2, 6] by the pose: x y z, rotation; in the camera frame
    spread: np.ndarray  # [N, 2] by the point's inverse depth, for one standard deviation of it
    pull: np.ndarray  # [N] of the residual and the depth's own doubt on the inverse depth
    squared: np.ndarray  # [N] Mahalanobis length of the residual: pixel noise and what the uncertain depth adds
    front: np.ndarray  # [N] bool: before the camera


def _look(landmarks: Landmarks, K: np.ndarray, T: np.ndarray, sigma_px: float) -> _Look:
    focal = np.array([K[0, 0], K[1, 1]])
    by_xy = focal / sigma_px
    observed = (landmarks.uv - K[:2, 2]) / focal
    points = (landmarks.xyz - T[:3, 3]) @ T[:3, :3]
    baseline = points - landmarks.ray @ T[:3, :3]
    change = _inverse_depth_change(points, baseline, landmarks.depth_sigma, observed, sigma_px / focal[0])
    nearer = 1.0 / (1.0 + change)[:, None]
    points = (points + change[:, None] * baseline) * nearer
    front = points[:, 2] > 1e-6
    inv_z = 1.0 / np.where(front, points[:, 2], 1.0)[:, None]
    xy = points[:, :2] * inv_z
    residual = (xy - observed) * by_xy
    by_z = by_xy * inv_z
    J = np.zeros((len(points), 2, 6))
    J[:, 0, 0], J[:, 1, 1] = -by_z.T
    J[:, :, 2] = by_z * xy
    J[:, 0, 3], J[:, 1, 3] = by_xy[0] * xy[:, 0] * xy[:, 1], by_xy[1] * (1.0 + xy[:, 1] ** 2)
    J[:, 0, 4], J[:, 1, 4] = -by_xy[0] * (1.0 + xy[:, 0] ** 2), -by_xy[1] * xy[:, 0] * xy[:, 1]
    J[:, 0, 5], J[:, 1, 5] = by_xy[0] * xy[:, 1], -by_xy[1] * xy[:, 0]
    spread = by_z * (baseline[:, :2] - xy * baseline[:, 2:]) * nearer * landmarks.depth_sigma[:, None]
    moved = change / np.maximum(landmarks.depth_sigma, 1e-12)
    pull = (residual * spread).sum(axis=1) + moved
    squared = (residual**2).sum(axis=1) + moved**2 - pull**2 / (1.0 + (spread**2).sum(axis=1))
    return _Look(residual, J, spread, pull, squared, front)


def _inverse_depth_change(
    points: np.ndarray, baseline: np.ndarray, depth_sigma: np.ndarray, observed: np.ndarray, sigma: float
) -> np.ndarray:
    """By which share [N] the inverse depth at the anchor should change, given where the camera is.

    ``points`` [N, 3] and the places ``baseline`` [N, 3] of their anchors in the camera frame; a point with its inverse
    depth changed by d projects to where ``points + d * baseline`` does, on the line that joins both. The place on that
    line is weighed against ``depth_sigma`` [N]; ``observed`` [N, 2] and its ``sigma`` are normalised (z = 1). Residuals
    along the line would turn with it: only after this step is the rest linear in the pose, however wrong the depth.
    """
    line = baseline[:, :2] * points[:, 2:] - points[:, :2] * baseline[:, 2:]
    line /= np.maximum(np.linalg.norm(line, axis=1), 1e-12)[:, None]
    along = (line * observed).sum(axis=1)
    missing = along * points[:, 2] - (line * points[:, :2]).sum(axis=1)
    slope = (line * baseline[:, :2]).sum(axis=1) - along * baseline[:, 2]
    change = missing * slope * depth_sigma**2 / ((slope * depth_sigma) ** 2 + (sigma * points[:, 2]) ** 2 + 1e-300)
    return change.clip(-0.9, 9.0)


def _normal_equations(look: _Look, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """H [6, 6] and g [6], the points' depths eliminated."""
    J = look.J.reshape(-1, 6)
    weighted = J * np.repeat(weight, 2)[:, None]
    J_spread = np.einsum("nip,ni->np", look.J, look.spread)
    taken = J_spread * (weight / (1.0 + (look.spread**2).sum(axis=1)))[:, None]
    H = weighted.T @ J - taken.T @ J_spread
    return H, weighted.T @ look.residual.ravel() - taken.T @ look.pull


def _descend(
    landmarks: Landmarks,
    weight: np.ndarray,
    K: np.ndarray,
    T: np.ndarray,
    sigma_px: float,
    wide: Sequence[float] = (),
    tolerance: float = _STEP_TOLERANCE,
) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Newton on a Cauchy loss, ``wide`` times as wide in the first steps: T [4, 4] and H [6, 6] there."""
    H = np.eye(6)
    distance = float(np.median(np.abs((landmarks.xyz - T[:3, 3]) @ T[:3, 2])))
    for i in range(_MAX_STEPS):
        look = _look(landmarks, K, T, sigma_px)
        loss = _LOSS * (wide[i] if i < len(wide) else 1.0)
        H, g = _normal_equations(look, np.where(look.front, weight / (1.0 + look.squared / loss**2), 0.0))
        xi = -np.linalg.solve(H + np.diag(np.diag(H) * 1e-6 + 1e-9), g)
        xi = np.clip(xi, -0.5 * distance, 0.5 * distance)
        T = T @ make_T(cv2.Rodrigues(xi[3:])[0], xi[:3])  # as se3_exp, which takes ten times as long for one
        if i >= len(wide) and np.abs(xi).max() < tolerance * min(distance, 1.0):
            break
    return T, H


def _settled(landmarks: Landmarks, weight: np.ndarray, K: np.ndarray, T: np.ndarray, sigma_px: float) -> PoseFit:
    """The fit to all points from a pose ``T`` near it."""
    T, H = _descend(landmarks, weight, K, T, sigma_px)
    T[:3, :3] = project_to_so3(T[:3, :3])
    look = _look(landmarks, K, T, sigma_px)
    squared = np.where(look.front, look.squared, np.inf)
    inlier = squared < GATE_CHI2
    length = sigma_px * np.linalg.norm(look.residual[inlier], axis=1)
    residual_px = float(np.median(length)) if inlier.any() else float("nan")
    noise = max(1.0, float(squared[inlier].mean()) / 2.0) if inlier.any() else 1.0
    covariance = np.linalg.pinv(H, hermitian=True) * noise
    return PoseFit(T, covariance, inlier, squared < _TRUST_CHI2, residual_px)


def align_rays(rays_world: np.ndarray, rays_camera: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Rotation R_world_camera [3, 3] that turns unit rays [N, 3] into each other, robustly, and its inliers [N] bool.

    ``threshold`` in radians. For frames that see nothing whose depth is known. What rays close to each other leave
    open does not turn.
    """
    still = 1e-6 * np.eye(3)
    weight = np.ones(len(rays_world))
    R = np.zeros((3, 3))
    for _ in range(20):
        before = R
        R = project_to_so3((rays_world * weight[:, None]).T @ rays_camera + still)
        error = np.linalg.norm(rays_world - rays_camera @ R.T, axis=1)
        if np.abs(R - before).max() < _STEP_TOLERANCE:
            break
        scale = max(float(np.median(error)), threshold / 3)
        weight = 1.0 / (1.0 + (error / scale) ** 2) ** 2
    return R, np.asarray(error < threshold)
