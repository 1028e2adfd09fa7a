"""The pose of one frame from points whose places are known."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from spark3r_ros.geometry import inverse, make_T, project_to_so3, se3_exp, so3_exp

GATE_CHI2 = 9.21  # 99 % of a 2D residual
MIN_INLIERS = 12
_LOSS = 1.5  # Cauchy scale in standard deviations
_STEP_TOLERANCE = 3e-5  # rad, and of the scene's distance: a few hundredths of a pixel
_TRUST_CHI2 = 36.0  # six sigmas: blur and shutter push points past the gate, a wrong pose pushes them past this
_TRUST_SHARE = 0.4  # below this share of points within that, the start is doubted and a sample consensus is tried


@dataclass(frozen=True, eq=False)
class Landmarks:
    """Points with the places where one frame sees them."""

    xyz: np.ndarray  # [N, 3] world
    depth_axis: np.ndarray  # [N, 3] world: one standard deviation of the point along its anchor's ray
    uv: np.ndarray  # [N, 2] undistorted pixels


@dataclass(frozen=True, eq=False)
class PoseFit:
    T_world_camera: np.ndarray  # [4, 4]
    covariance: np.ndarray  # [6, 6] x y z, rotation; in the camera frame
    inlier: np.ndarray  # [N] bool
    trusted_share: float  # of the points: those that a right pose explains, if not well
    residual_px: float  # median of the inliers; NaN without any


def fit_pose(landmarks: Landmarks, K: np.ndarray, T_guess: np.ndarray, sigma_px: float) -> PoseFit:
    """The pose near ``T_guess``, or by sample consensus when too few points agree with that."""
    fit = _gauss_newton(landmarks, K, T_guess, sigma_px)
    if fit.inlier.sum() >= MIN_INLIERS and fit.trusted_share >= _TRUST_SHARE:
        return fit
    start = sample_consensus(landmarks, K, sigma_px)
    if start is None:
        return fit
    again = _gauss_newton(landmarks, K, start, sigma_px)
    return again if again.inlier.sum() > 1.2 * fit.inlier.sum() else fit


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
    """The points as a camera at some pose sees them; N points, in standard deviations of a pixel."""

    residual: np.ndarray  # [N, 2]
    J: np.ndarray  # [N, 2, 6] by the pose: x y z, rotation; in the camera frame
    spread: np.ndarray  # [N, 2] residual for one standard deviation of the point's depth
    squared: np.ndarray  # [N] Mahalanobis length of the residual: pixel noise and what the uncertain depth adds
    depth: np.ndarray  # [N]
    front: np.ndarray  # [N] bool


def _look(landmarks: Landmarks, K: np.ndarray, T: np.ndarray, sigma_px: float) -> _Look:
    points = (landmarks.xyz - T[:3, 3]) @ T[:3, :3]
    axis = landmarks.depth_axis @ T[:3, :3]
    front = points[:, 2] > 1e-6
    inv_z = 1.0 / np.where(front, points[:, 2], 1.0)[:, None]
    xy = points[:, :2] * inv_z
    focal = np.array([K[0, 0], K[1, 1]])
    by_xy = focal / sigma_px
    residual = (xy * focal + K[:2, 2] - landmarks.uv) / sigma_px
    by_z = by_xy * inv_z
    J = np.zeros((len(points), 2, 6))
    J[:, 0, 0], J[:, 1, 1] = -by_z.T
    J[:, :, 2] = by_z * xy
    J[:, 0, 3], J[:, 1, 3] = by_xy[0] * xy[:, 0] * xy[:, 1], by_xy[1] * (1.0 + xy[:, 1] ** 2)
    J[:, 0, 4], J[:, 1, 4] = -by_xy[0] * (1.0 + xy[:, 0] ** 2), -by_xy[1] * xy[:, 0] * xy[:, 1]
    J[:, 0, 5], J[:, 1, 5] = by_xy[0] * xy[:, 1], -by_xy[1] * xy[:, 0]
    spread = by_z * (axis[:, :2] - xy * axis[:, 2:])
    explained = (residual * spread).sum(axis=1) ** 2 / (1.0 + (spread**2).sum(axis=1))
    return _Look(residual, J, spread, (residual**2).sum(axis=1) - explained, points[:, 2], front)


def _normal_equations(look: _Look, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """H [6, 6] and g [6]; a residual's inverse covariance is 1 - s s' / (1 + s's), with s its ``spread``."""
    J = look.J.reshape(-1, 6)
    weighted = J * np.repeat(weight, 2)[:, None]
    J_spread = np.einsum("nip,ni->np", look.J, look.spread)
    taken = J_spread * (weight / (1.0 + (look.spread**2).sum(axis=1)))[:, None]
    H = weighted.T @ J - taken.T @ J_spread
    return H, weighted.T @ look.residual.ravel() - taken.T @ (look.residual * look.spread).sum(axis=1)


def _gauss_newton(landmarks: Landmarks, K: np.ndarray, T_guess: np.ndarray, sigma_px: float) -> PoseFit:
    T = T_guess.copy()
    damping, H = 1e-6, np.eye(6)
    for i in range(15):
        look = _look(landmarks, K, T, sigma_px)
        loss = _LOSS * (4.0 if i < 3 else 1.0)  # wide at first: the guess may be many pixels off
        H, g = _normal_equations(look, np.where(look.front, 1.0 / (1.0 + look.squared / loss**2), 0.0))
        xi = -np.linalg.solve(H + np.diag(np.diag(H) * damping + 1e-9), g)
        distance = float(np.median(np.abs(look.depth)))
        xi = np.clip(xi, -0.5 * distance, 0.5 * distance)
        T = T @ se3_exp(xi)
        if i >= 4 and np.abs(xi).max() < _STEP_TOLERANCE * min(distance, 1.0):
            break
    T[:3, :3] = project_to_so3(T[:3, :3])
    look = _look(landmarks, K, T, sigma_px)
    inlier = look.front & (look.squared < GATE_CHI2)
    length = sigma_px * np.linalg.norm(look.residual[inlier], axis=1)
    residual_px = float(np.median(length)) if inlier.any() else float("nan")
    noise = max(1.0, float(look.squared[inlier].mean()) / 2.0) if inlier.any() else 1.0
    covariance = np.linalg.pinv(H, hermitian=True) * noise
    trusted_share = float((look.front & (look.squared < _TRUST_CHI2)).mean())
    return PoseFit(T, covariance, inlier, trusted_share, residual_px)


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
