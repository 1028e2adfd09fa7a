"""Camera calibrations as people write them: CameraInfo messages (of any ROS library) and intrinsics.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spark3r_ros.frame import CameraModel

# number of coefficients that each model may have; "none" needs none
DISTORTION_MODELS = {"plumb_bob": (4, 5), "rational_polynomial": (8,), "equidistant": (4,)}


class CalibrationError(ValueError):
    """A calibration that does not describe the images; the message names what is wrong with it."""


def camera_from_info(info: Any, width: int, height: int, *, rectified: bool = False) -> CameraModel | None:
    """Intrinsics for images of ``width`` x ``height`` from a sensor_msgs/CameraInfo, binning and region applied.

    None when the camera says that it is not calibrated (K[0] = 0). CalibrationError when sizes or model do not fit.
    ``rectified``: the images are undistorted, so the left part of P counts and D does not.
    """
    if info.k[0] == 0.0:
        return None
    K = np.array(info.p, float).reshape(3, 4)[:, :3] if rectified else np.array(info.k, float).reshape(3, 3)
    binning = np.array([max(info.binning_x, 1), max(info.binning_y, 1)])
    full = (info.roi.width or info.width, info.roi.height or info.height)
    size = (full[0] // int(binning[0]), full[1] // int(binning[1]))
    if (width, height) != size:
        raise CalibrationError(f"CameraInfo is for {size[0]} x {size[1]} pixels, the images have {width} x {height}")
    K = K.copy()
    K[0, 2] -= info.roi.x_offset
    K[1, 2] -= info.roi.y_offset
    # the centre of the binned pixel 0 lies (b - 1) / 2 pixels to the right of that of the full pixel 0
    K[:2, 2] -= (binning - 1) / 2
    K[:2] /= binning[:, None]
    return make_camera(width, height, K, "none" if rectified else info.distortion_model, () if rectified else info.d)


def make_camera(width: int, height: int, K: np.ndarray, model: str, coefficients: Sequence[float]) -> CameraModel:
    """A checked CameraModel; all-zero coefficients mean no distortion whatever the model is called."""
    if not (np.isfinite(K).all() and K[0, 0] > 0 and K[1, 1] > 0):
        raise CalibrationError(f"focal lengths must be positive, got {K[0, 0]:g} and {K[1, 1]:g}")
    if not any(coefficients):
        return CameraModel(width, height, K)
    if model not in DISTORTION_MODELS:
        raise CalibrationError(f"distortion model {model!r} is not known; known: {', '.join(DISTORTION_MODELS)}")
    if len(coefficients) not in DISTORTION_MODELS[model]:
        raise CalibrationError(f"{model} does not have {len(coefficients)} coefficients")
    return CameraModel(width, height, K, model, tuple(float(c) for c in coefficients))


def read_intrinsics(path: Path) -> CameraModel:
    """intrinsics.json: width, height, fx, fy, cx, cy and, optionally, distortion with model and coeffs."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        K = np.array([[content["fx"], 0, content["cx"]], [0, content["fy"], content["cy"]], [0, 0, 1]], dtype=float)
        distortion = content.get("distortion") or {"model": "none", "coeffs": ()}
        size = int(content["width"]), int(content["height"])
        return make_camera(*size, K, distortion["model"], distortion["coeffs"])
    except KeyError as error:
        raise CalibrationError(f"{path} has no {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise CalibrationError(f"{path}: {error}") from error
