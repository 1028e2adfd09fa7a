"""The pose of one frame from points whose places are known."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from spark3r_ros.geometry import hat, inverse, make_T, project_to_so3, se3_exp, so3_exp

GATE_CHI2 = 9.21  # 99 % of a 2D residual
MIN_INLIERS = 12
_LOSS = 1.5  # Cauchy scale in standard deviations
_STEP_TOLERANCE = 1e-5  # rad, and of the scene's distance: less than a hundredth of a pixel
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


def _residuals(
    landmarks: Landmarks, K: np.ndarray, T: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Residuals [N, 2], Jacobian of pixels by camera point [N, 2, 3], camera points [N, 3], in front [N] bool."""
    points = (landmarks.xyz - T[:3, 3]) @ T[:3, :3]
    front = points[:, 2] > 1e-6
    inv_z = 1.0 / np.where(front, points[:, 2], 1.0)
    projected = points[:, :2] * inv_z[:, None] * np.array([K[0, 0], K[1, 1]])
    J = np.zeros((len(points), 2, 3))
    J[:, 0, 0], J[:, 1, 1] = K[0, 0] * inv_z, K[1, 1] * inv_z
    J[:, :, 2] = -projected * inv_z[:, None]
    return projected + K[:2, 2] - landmarks.uv, J, points, front


def _information(J: np.ndarray, axis: np.ndarray, sigma_px: float) -> np.ndarray:
    """Inverse covariance [N, 2, 2] of residuals: pixel noise plus what the uncertain depth of the point adds."""
    spread = (J @ axis[..., None])[..., 0]
    outer = spread[:, :, None] * spread[:, None, :]
    length = (spread**2).sum(axis=1)[:, None, None]
    return (np.eye(2) - outer / (sigma_px**2 + length)) / sigma_px**2


def _gauss_newton(landmarks: Landmarks, K: np.ndarray, T_guess: np.ndarray, sigma_px: float) -> PoseFit:
    T = T_guess.copy()
    damping, H = 1e-6, np.eye(6)
    for i in range(15):
        residual, J, points, front = _residuals(landmarks, K, T)
        information = _information(J, landmarks.depth_axis @ T[:3, :3], sigma_px)
        squared = np.einsum("ni,nij,nj->n", residual, information, residual)
        loss = _LOSS * (4.0 if i < 3 else 1.0)  # wide at first: the guess may be many pixels off
        weight = np.where(front, 1.0 / (1.0 + squared / loss**2), 0.0)
        J_pose = np.concatenate([-J, J @ hat(points)], axis=2)  # [N, 2, 6]
        weighted = np.swapaxes(J_pose, 1, 2) @ (information * weight[:, None, None])  # [N, 6, 2]
        H = np.tensordot(weighted, J_pose, axes=((0, 2), (0, 1)))
        g = np.einsum("nij,nj->i", weighted, residual)
        xi = -np.linalg.solve(H + np.diag(np.diag(H) * damping + 1e-9), g)
        distance = float(np.median(np.abs(points[:, 2])))
        xi = np.clip(xi, -0.5 * distance, 0.5 * distance)
        T = T @ se3_exp(xi)
        if i >= 4 and np.abs(xi).max() < _STEP_TOLERANCE * min(distance, 1.0):
            break
    T[:3, :3] = project_to_so3(T[:3, :3])
    residual, J, points, front = _residuals(landmarks, K, T)
    information = _information(J, landmarks.depth_axis @ T[:3, :3], sigma_px)
    squared = np.einsum("ni,nij,nj->n", residual, information, residual)
    inlier = front & (squared < GATE_CHI2)
    length = np.linalg.norm(residual[inlier], axis=1)
    residual_px = float(np.median(length)) if inlier.any() else float("nan")
    noise = max(1.0, float(squared[inlier].mean()) / 2.0) if inlier.any() else 1.0
    covariance = np.linalg.pinv(H, hermitian=True) * noise
    return PoseFit(T, covariance, inlier, float((front & (squared < _TRUST_CHI2)).mean()), residual_px)


def align_rays(rays_world: np.ndarray, rays_camera: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Rotation R_world_camera [3, 3] that turns unit rays [N, 3] into each other, robustly, and its inliers [N] bool.

    ``threshold`` in radians. For frames that see nothing whose depth is known. What rays close to each other leave
    open does not turn.
    """
    still = 1e-6 * np.eye(3)
    weight = np.ones(len(rays_world))
    R = np.eye(3)
    for _ in range(20):
        R = project_to_so3((rays_world * weight[:, None]).T @ rays_camera + still)
        error = np.linalg.norm(rays_world - rays_camera @ R.T, axis=1)
        scale = max(float(np.median(error)), threshold / 3)
        weight = 1.0 / (1.0 + (error / scale) ** 2) ** 2
    return R, np.asarray(error < threshold)
