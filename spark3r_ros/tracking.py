"""The pose of one frame between two window solves, from the network's view of its frozen context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from spark3r_ros import geometry
from spark3r_ros.alignment import Link, robust_log_ratio
from spark3r_ros.refine import TrackedPose
from spark3r_ros.solver import Solution, Solver
from spark3r_ros.windows import Keyframe, Support

MIN_ROTATION_SIGMA = 0.002  # rad
MIN_TRANSLATION_SIGMA = 0.002  # over median depth
# tracks of one frame err together (blur, shutter, lens, depths of one surface): as so many that do not. This and the
# next two were set on rendered streams: where positions are worst, they are off by one to two sigmas (docs/accuracy.md)
INDEPENDENT_POINTS = 3
FIRST_WINDOW_DOUBT = 2.0  # times the sigma of poses whose points were solved together with them
SCOUT_DOUBT = 4.0  # and of those that a scout gave, from the first few frames alone
TIMING_SIGMA = 0.005  # seconds between an image's stamp and the instant that it shows (exposure, readout)
LOST_SIGMA = 1e3  # rad and output units: nobody should fuse this


@dataclass(frozen=True, eq=False)
class Estimate:
    """Where a frame is, and how far that may be wrong."""

    T_world_camera: np.ndarray  # [4, 4]
    covariance: np.ndarray  # [6, 6] x y z in world units, rotation about x y z in rad; in the camera frame
    confidence: float  # in [0, 1]; 0: no information, the pose is a guess
    tracked: TrackedPose | None = None  # what the sparse map said, where that is where it comes from


def with_drift(
    estimate: Estimate,
    anchors: Mapping[int, float],
    keyframes: Mapping[int, Keyframe | Support],
    turn_rate: float,
    doubt: float = 1.0,
) -> Estimate:
    """Add what a pose is wrong by beyond its covariance against the keyframes that hold it.

    Points that hold it err together, which that covariance cannot know. The keyframes are wrong themselves: errors of a
    chain add up, and grow with levers. And nobody knows to the millisecond when a turning camera took its image, which
    little parallax can mistake for a step.

    Args:
        estimate: a pose and its covariance against the keyframes.
        anchors: their frames and shares in holding it. What they have is averaged, not fused: it is the same drift.
        keyframes: by frame.
        turn_rate: rad/s of the camera.
        doubt: times the sigma of the fit against the keyframes.
    """
    num_points = estimate.tracked.num_inliers if estimate.tracked is not None else 0
    covariance = doubt**2 * max(1.0, num_points / INDEPENDENT_POINTS) * estimate.covariance
    blur = (TIMING_SIGMA * turn_rate) ** 2 / 3
    distance = max((keyframes[number].median_depth for number in anchors), default=0.0)
    covariance += np.diag([blur * distance**2] * 3 + [blur] * 3)
    T_camera_world = geometry.inverse(estimate.T_world_camera)
    for number, share in anchors.items():
        keyframe = keyframes[number]
        A = geometry.adjoint(T_camera_world @ keyframe.T_world_camera)
        covariance += share * A @ keyframe.covariance @ A.T
    return replace(estimate, covariance=covariance)


def turn_rates(T_world_camera: np.ndarray, stamp_ns: np.ndarray) -> np.ndarray:
    """rad/s [S] at each of S poses [S, 4, 4] with stamps [S]: the faster of the ways to its neighbours."""
    R = T_world_camera[:, :3, :3]
    angles = geometry.rotation_angle(np.swapaxes(R[:-1], 1, 2) @ R[1:])
    steps = angles / (1e-9 * np.maximum(np.diff(stamp_ns), 1))
    return np.maximum(np.append(steps, 0.0), np.append(0.0, steps))


class NetworkTracker:
    """Poses frames relative to the newest solved keyframe.

    Both are seen by the same kind of pass (one frame that looks at the context), so what that pass gets wrong about
    places cancels in the motion between them, and the keyframe's depth in its own camera gives the scale: when a window
    has refreshed the context, pose and scale go on where they were. Without a context the two frames make a pass of
    their own.
    """

    def __init__(self, solver: Solver) -> None:
        self._solver = solver
        self._anchor: Keyframe | None = None

    def rebase(self, keyframe: Keyframe, previous: Sequence[Keyframe], link: Link | None) -> None:
        """Track against this keyframe from now on; called once after each window."""
        alone = 0.0 if previous else 1.0  # a single view has no scale: wrong by as much as the scene is away
        self._anchor, self._previous = keyframe, list(previous)
        self._window_scale = float(np.exp(link.log_scale)) if link is not None else 1.0
        self._sigmas = (link.rotation_sigma, link.translation_sigma) if link is not None else (0.0, alone)
        assert keyframe.dense is not None
        self._depth = float(np.median(keyframe.dense.depth))
        self._T_window_anchor: np.ndarray | None = None  # asked for when the first frame comes

    @property
    def anchor(self) -> Keyframe:
        """The keyframe that poses are relative to."""
        assert self._anchor is not None, "nothing has been solved yet"
        return self._anchor

    def track(self, rgb: np.ndarray) -> Estimate:
        """Pose of a frame [h, w, 3] uint8 after the anchor keyframe."""
        anchor = self.anchor
        assert anchor.rgb is not None
        if self._solver.has_context:
            if self._T_window_anchor is None:
                own = self._solver.query(anchor.rgb, self._previous)
                self._T_window_anchor = own.T_window_camera[0]
                self._window_scale = _own_scale(anchor, own) or self._window_scale
            seen = self._solver.query(rgb, [*self._previous[-1:], anchor])
            T_anchor_frame = geometry.inverse(self._T_window_anchor) @ seen.T_window_camera[0]
            T_anchor_frame[:3, 3] *= self._window_scale
        else:
            seen = self._solver.pair(anchor.rgb, rgb)
            T_anchor_frame = geometry.inverse(seen.T_window_camera[0]) @ seen.T_window_camera[1]
            T_anchor_frame[:3, 3] *= _own_scale(anchor, seen) or 1.0
        confidence = float(np.median(seen.confidence[-1]))
        doubt = 1 / max(confidence, 0.05)
        sigma_r = doubt * max(MIN_ROTATION_SIGMA, self._sigmas[0])
        sigma_t = doubt * self._depth * max(MIN_TRANSLATION_SIGMA, self._sigmas[1])
        return Estimate(
            anchor.T_world_camera @ T_anchor_frame, np.diag([sigma_t**2] * 3 + [sigma_r**2] * 3), confidence
        )


def _own_scale(anchor: Keyframe, seen: Solution) -> float | None:
    """World units per unit of a pass whose first frame is the anchor: median depth ratio in its own camera."""
    assert anchor.dense is not None
    weights = np.minimum(anchor.dense.confidence, seen.confidence[0]).ravel().astype(float)
    log_ratio = robust_log_ratio(anchor.dense.depth.ravel(), seen.depth[0].ravel(), weights)
    return float(np.exp(log_ratio)) if log_ratio is not None else None
