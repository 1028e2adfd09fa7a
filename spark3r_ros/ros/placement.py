"""Where the reconstruction stands in the robot's world, and which transforms say so.

Names: ``start`` is the reconstruction's odom frame and ``world`` its map frame, both with the first camera's optical
axes; ``odom``, ``map``, ``base`` and ``camera`` are the ROS frames. The ROS frames are z up (REP-103): level is what
the robot's base was at the first image, or, without a base, a camera that looks ahead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spark3r_ros import geometry
from spark3r_ros.frame import FramePose

# Body axes (x ahead, y left, z up) from optical axes (x right, y down, z ahead), REP-103.
T_BODY_OPTICAL = geometry.make_T(np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]), np.zeros(3))

HUGE_VARIANCE = 1e6  # (1 km)^2, (1000 rad)^2: says "unknown" to every filter
_TWIST_FLOOR = 1e-6  # variance of a step between two frames: 1 mm, 0.06 degrees
_LONGEST_STEP_S = 1.0


@dataclass(frozen=True, eq=False)
class Placement:
    """Fixed when the first pose is given out, until the next reset."""

    camera: str  # optical frame
    body: str  # whose pose is published: base_frame, or the camera itself when there is no base
    T_odom_start: np.ndarray
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
        return cls(camera, camera if base is None or T_base_camera is None else base, T_odom_start, T_map_world)

    def T_odom_camera(self, pose: FramePose) -> np.ndarray:
        return self.T_odom_start @ pose.T_odom_camera

    def T_map_camera(self, pose: FramePose) -> np.ndarray:
        return self.T_map_world @ pose.T_map_camera

    def T_map_odom(self, T_world_start: np.ndarray) -> np.ndarray:
        return self.T_map_world @ T_world_start @ geometry.inverse(self.T_odom_start)


def covariance_in_parent(covariance: np.ndarray, T_camera_body: np.ndarray, T_parent_body: np.ndarray) -> np.ndarray:
    """[6, 6] of the camera's pose in its own axes to that of the body's pose about the parent's axes.

    A small motion (dt, dw) of the camera, given in the camera's axes, moves a body that is rigidly attached to it by
    the adjoint of T_body_camera, given in the body's axes; nav_msgs/Odometry wants fixed axes of the parent.
    """
    T_body_camera = geometry.inverse(T_camera_body)
    R, t = T_body_camera[:3, :3], T_body_camera[:3, 3]
    adjoint = np.zeros((6, 6))
    adjoint[:3, :3] = adjoint[3:, 3:] = T_parent_body[:3, :3] @ R
    adjoint[:3, 3:] = T_parent_body[:3, :3] @ geometry.hat(t) @ R
    out = adjoint @ covariance @ adjoint.T
    return 0.5 * (out + out.T)


class TwistEstimator:
    """Velocity of the body in its own axes from two successive poses."""

    def __init__(self) -> None:
        self._last: tuple[int, np.ndarray, np.ndarray] | None = None

    def update(self, stamp_ns: int, T_odom_body: np.ndarray, covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Twist [6] (m/s or units/s, rad/s) and its covariance [6, 6].

        The covariance is what the pose's own grew by since the last frame; it is huge where there is no last frame.
        ``covariance``: of the pose, any axes (its block traces are used).
        """
        last, self._last = self._last, (stamp_ns, T_odom_body, covariance)
        seconds = 0.0 if last is None else 1e-9 * (stamp_ns - last[0])
        if last is None or not 0.0 < seconds <= _LONGEST_STEP_S:
            return np.zeros(6), np.eye(6) * HUGE_VARIANCE
        T_step = geometry.inverse(last[1]) @ T_odom_body
        twist = np.concatenate([T_step[:3, 3], geometry.so3_log(T_step[:3, :3])]) / seconds
        grown = np.array([np.trace(c[b, b]) / 3 for c in (covariance, last[2]) for b in (_XYZ, _RPY)])
        step = np.maximum(grown[:2] - grown[2:], _TWIST_FLOOR)
        return twist, np.diag(np.minimum(np.repeat(step, 3) / seconds**2, HUGE_VARIANCE))


_XYZ, _RPY = slice(0, 3), slice(3, 6)
