"""Lens distortion: pixels of the camera's image to pixels of an ideal pinhole with the same K, and back."""

from __future__ import annotations

import cv2
import numpy as np

from spark3r_ros.frame import CameraModel

_STOP = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 50, 1e-10)


def undistort_points(camera: CameraModel, uv: np.ndarray) -> np.ndarray:
    """Pixels [N, 2] of the distorted image to pixels [N, 2] of a pinhole with the same K.

    ``ValueError`` for an unknown distortion model.
    """
    uv = np.asarray(uv, dtype=np.float64).reshape(-1, 2)
    if not has_distortion(camera) or len(uv) == 0:
        return uv.copy()
    K, coefficients = camera.K.astype(float), np.array(camera.distortion, dtype=float)
    points = np.ascontiguousarray(uv.reshape(-1, 1, 2))
    if camera.distortion_model == "equidistant":
        return cv2.fisheye.undistortPoints(points, K, coefficients[:4], P=K, criteria=_STOP).reshape(-1, 2)
    return cv2.undistortPoints(points, K, coefficients, P=K, criteria=_STOP).reshape(-1, 2)


def distort_points(camera: CameraModel, uv: np.ndarray) -> np.ndarray:
    """Pixels [N, 2] of the pinhole to pixels [N, 2] of the distorted image: the inverse of ``undistort_points``."""
    uv = np.asarray(uv, dtype=np.float64).reshape(-1, 2)
    if not has_distortion(camera) or len(uv) == 0:
        return uv.copy()
    K, coefficients = camera.K.astype(float), np.array(camera.distortion, dtype=float)
    rays = np.concatenate([(uv - K[:2, 2]) / np.diag(K)[:2], np.ones((len(uv), 1))], axis=1).reshape(-1, 1, 3)
    zero = np.zeros(3)
    if camera.distortion_model == "equidistant":
        return cv2.fisheye.projectPoints(rays, zero, zero, K, coefficients[:4])[0].reshape(-1, 2)
    return cv2.projectPoints(rays, zero, zero, K, coefficients)[0].reshape(-1, 2)


def has_distortion(camera: CameraModel) -> bool:
    """Whether the camera's image differs from a pinhole's; ``ValueError`` for an unknown distortion model."""
    known = ("none", "", "plumb_bob", "rational_polynomial", "equidistant")
    if camera.distortion_model not in known:
        raise ValueError(
            f"distortion_model must be one of plumb_bob, rational_polynomial, equidistant, none; "
            f"got {camera.distortion_model!r}"
        )
    return camera.distortion_model not in ("none", "") and any(camera.distortion)
