"""Packages of a ROS installation that the wheels from PyPI lack: used where they can be imported, never needed.

Each has an own counterpart, and a test that proves them equal wherever both exist.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from spark3r_ros import geometry

if TYPE_CHECKING:
    from sensor_msgs.msg import Image

try:  # needs transforms3d, whose older versions fail under newer NumPy when they are imported
    import tf_transformations
except (ImportError, AttributeError):
    tf_transformations = None

try:
    import tf2_ros
except ImportError:
    tf2_ros = None

# cv_bridge of Humble and Jazzy is compiled against NumPy 1 and its extension fails under NumPy 2 (vision_opencv#535),
# with whatever it raises; cv_bridge itself passes over that until the first use.
try:
    import cv_bridge.boost.cv_bridge_boost
except (ImportError, AttributeError, SystemError):
    cv_bridge = None


def decode_with_cv_bridge(msg: Image) -> np.ndarray | None:
    """An image of an encoding that our own decoder does not know, [H, W, 3] uint8 RGB; None when it cannot be had."""
    if cv_bridge is None:
        return None
    try:
        return np.ascontiguousarray(cv_bridge.CvBridge().imgmsg_to_cv2(msg, desired_encoding="rgb8"))
    except (cv_bridge.CvBridgeError, AttributeError, TypeError, ValueError, RuntimeError):
        return None  # AttributeError: it swaps bytes as only NumPy 1 can


Quaternion = tuple[float, float, float, float]  # x y z w


def quat_xyzw_from_matrix(R: np.ndarray) -> Quaternion:
    """[3, 3] to a unit quaternion."""
    if tf_transformations is None:
        return quaternion(R)
    T = np.eye(4)
    T[:3, :3] = R
    x, y, z, w = tf_transformations.quaternion_from_matrix(T)
    return float(x), float(y), float(z), float(w)


def quaternion(R: np.ndarray) -> Quaternion:
    """As geometry.quat_xyzw_from_matrix for a single matrix, in plain floats: a hundred times faster per message."""
    (a, b, c), (d, e, f), (g, h, i) = R.tolist()
    if a + e + i > 0:
        x, y, z, w = h - f, c - g, d - b, 1 + a + e + i
    elif a > e and a > i:
        x, y, z, w = 1 + a - e - i, b + d, c + g, h - f
    elif e > i:
        x, y, z, w = b + d, 1 + e - a - i, f + h, c - g
    else:
        x, y, z, w = c + g, f + h, 1 + i - a - e, d - b
    norm = math.sqrt(x * x + y * y + z * z + w * w)
    return x / norm, y / norm, z / norm, w / norm


def matrix_from_quat_xyzw(quat_xyzw: np.ndarray) -> np.ndarray:
    """A quaternion [4] of any length > 0 to [3, 3]."""
    if tf_transformations is None:
        return geometry.matrix_from_quat_xyzw(quat_xyzw)
    return np.asarray(tf_transformations.quaternion_matrix(quat_xyzw / np.linalg.norm(quat_xyzw)))[:3, :3]
