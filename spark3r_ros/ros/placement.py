"""Where the reconstruction stands in the robot's world, and which transforms say so.

Names: ``start`` is the reconstruction's odom frame and ``world`` its map frame, both with the first camera's optical
axes; ``odom``, ``map``, ``base`` and ``camera`` are the ROS frames. The ROS frames are z up (REP-103): level is what
the robot's base was at the first image, or, without a base, a camera that looks ahead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from spark3r_ros import geometry
from spark3r_ros.frame import FramePose
from spark3r_ros.ros import optional

# Body axes (x ahead, y left, z up) from optical axes (x right, y down, z ahead), REP-103.
T_BODY_OPTICAL = geometry.make_T(np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]), np.zeros(3))

HUGE_VARIANCE = 1e6  # (1 km)^2, (1000 rad)^2: says "unknown" to every filter
UNKNOWN = np.eye(6) * HUGE_VARIANCE
_TWIST_FLOOR = 1e-6  # variance of a step between two frames: 1 mm, 0.06 degrees
_LONGEST_STEP_S = 1.0


@dataclass(frozen=True, eq=False)
class Placement:
    """Fixed when the first pose is given out, until the next reset."""

    camera: str  # optical frame
    body: str  # whose pose is published: base_frame, or the camera itself when there is no base
    T_odom_start: np.ndarray
    T_start_odom: np.ndarray
    T_map_world: np.ndarray

    @classmethod
    def at_first_pose(
        cls,
        pose: FramePose,
        camera: str,
        base: str | None,
        T_base_camera: np.ndarray | None,
        T_map_base: np.ndarray,
        T_map_world: np.ndarray | None,
    ) -> Placement:
        """``T_map_base``: where the base is to be at the first pose; ``T_map_world``: known from a loaded map."""
        T_level_camera = T_BODY_OPTICAL if T_base_camera is None else T_base_camera
        T_odom_start = T_level_camera @ geometry.inverse(pose.T_odom_camera)
        if T_map_world is None:
            T_map_world = T_map_base @ T_level_camera @ geometry.inverse(pose.T_map_camera)
        body = camera if base is None or T_base_camera is None else base
        return cls(camera, body, T_odom_start, geometry.inverse(T_odom_start), T_map_world)

    def T_odom_camera(self, pose: FramePose) -> np.ndarray:
        return self.T_odom_start @ pose.T_odom_camera

    def T_map_camera(self, pose: FramePose) -> np.ndarray:
        return self.T_map_world @ pose.T_map_camera

    def T_map_odom(self, T_world_start: np.ndarray) -> np.ndarray:
        return self.T_map_world @ T_world_start @ self.T_start_odom


def covariance_in_parent(
    covariance: np.ndarray, adjoint_body_camera: np.ndarray, T_parent_body: np.ndarray
) -> np.ndarray:
    """[6, 6] of the camera's pose in its own axes to that of the body's pose about the parent's axes.

    The adjoint of T_body_camera brings it into the body's axes; nav_msgs/Odometry wants fixed axes of the parent.
    """
    to_parent = (T_parent_body[:3, :3] @ adjoint_body_camera.reshape(2, 3, 6)).reshape(6, 6)
    out = to_parent @ covariance @ to_parent.T
    return 0.5 * (out + out.T)


class TwistEstimator:
    """Velocity of the body in its own axes from two successive poses."""

    def __init__(self) -> None:
        self._last: tuple[int, np.ndarray, list[float]] | None = None

    def update(self, stamp_ns: int, T_odom_body: np.ndarray, covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Twist [6] (m/s or units/s, rad/s) and its covariance [6, 6].

        The covariance is what the pose's own grew by since the last frame; it is huge where there is no last frame.
        ``covariance``: of the pose, any axes (its block traces are used).
        """
        variances = covariance.diagonal().tolist()
        last, self._last = self._last, (stamp_ns, T_odom_body, variances)
        seconds = 0.0 if last is None else 1e-9 * (stamp_ns - last[0])
        if last is None or not 0.0 < seconds <= _LONGEST_STEP_S:
            return np.zeros(6), UNKNOWN
        R_last_odom = last[1][:3, :3].T
        step = R_last_odom @ (T_odom_body[:3, 3] - last[1][:3, 3])
        turn = rotation_vector(R_last_odom @ T_odom_body[:3, :3])
        out = np.zeros(36)
        for block in (0, 3):
            grown = sum(variances[block : block + 3]) - sum(last[2][block : block + 3])
            out[7 * block : 7 * block + 21 : 7] = min(max(grown / 3, _TWIST_FLOOR) / seconds**2, HUGE_VARIANCE)
        return np.array((*step.tolist(), *turn)) / seconds, out.reshape(6, 6)


def rotation_vector(R: np.ndarray) -> tuple[float, float, float]:
    """As geometry.so3_log for a single matrix, in plain floats."""
    x, y, z, w = optional.quaternion(R)
    sin_half = math.sqrt(x * x + y * y + z * z)
    if sin_half < 1e-12:
        return 0.0, 0.0, 0.0
    angle = 2 * math.atan2(sin_half, abs(w))
    factor = math.copysign(angle / sin_half, w)
    return factor * x, factor * y, factor * z
