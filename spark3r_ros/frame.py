"""What travels through the corridor: a Frame in; poses, points and depth out.

Conventions, everywhere in this package:

* ``T_a_b`` maps points from frame b to frame a: ``p_a = T_a_b @ p_b``. 4x4, float64 outside of networks.
* Cameras are optical frames: x right, y down, z forward (REP-103).
* Shapes: S frames, H x W pixels, N points. Stamps are integer nanoseconds.
* ``map`` is the best current estimate and may be corrected; ``odom`` is smooth and never jumps (REP-105).
* Lengths are in *model scale* until a metric source has spoken; ``ScaleEstimate.is_metric`` tells.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class CameraModel:
    """Pinhole intrinsics with lens distortion, in pixels of an image of ``width`` x ``height``.

    ``distortion_model``: ``none``, ``plumb_bob`` (4 or 5 coefficients), ``rational_polynomial`` (8) or
    ``equidistant`` (4), in the order of sensor_msgs/CameraInfo.
    """

    width: int
    height: int
    K: np.ndarray  # [3, 3]
    distortion_model: str = "none"
    distortion: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class Frame:
    """One camera image with what the robot knows about it."""

    stamp_ns: int
    image: np.ndarray  # [H, W, 3] uint8 RGB
    frame_id: str = ""
    camera: CameraModel | None = None
    depth: np.ndarray | None = None  # [H, W] float32 metres, NaN where unknown; a source of metric scale
    T_odom_base: np.ndarray | None = None  # [4, 4] metres, the robot's own odometry; a source of metric scale


class TrackingState(str, Enum):
    INITIALISING = "initialising"  # nothing places a camera that moves yet
    TRACKING = "tracking"
    LOST = "lost"  # poses are extrapolated, their covariance is huge


class Gauge(str, Enum):
    """What fixes world frame and scale of a prediction."""

    ANCHORED = "anchored"  # world is the reference camera, scale is the model's
    FREE = "free"  # defined up to a similarity
    METRIC = "metric"  # lengths are metres


@dataclass(frozen=True, eq=False)
class Prediction:
    """What every backbone returns for S frames, in pixels of the images that it was given."""

    T_world_camera: torch.Tensor  # [S, 4, 4]
    intrinsics: torch.Tensor  # [S, 3, 3]
    depth: torch.Tensor  # [S, H, W] z along the optical axis; metres only when the gauge is metric
    confidence: torch.Tensor  # [S, H, W] in [0, 1)
    gauge: Gauge
    descriptors: torch.Tensor  # [S, C] unit length: generalised mean of the encoder's patch tokens, for loops


@dataclass(frozen=True)
class ScaleEstimate:
    """Metres per model unit."""

    log_scale: float = 0.0
    sigma: float = float("inf")  # of log_scale
    source: str = "none"

    @property
    def is_metric(self) -> bool:
        return self.source != "none"

    @property
    def metres_per_unit(self) -> float:
        return float(np.exp(self.log_scale)) if self.is_metric else 1.0


@dataclass(frozen=True, eq=False)
class FramePose:
    """The pose of one input frame. Exactly one is given out per frame, in stamp order."""

    stamp_ns: int
    frame_id: str
    T_odom_camera: np.ndarray  # [4, 4]
    T_map_camera: np.ndarray  # [4, 4] best estimate at the time it was given out
    covariance: np.ndarray  # [6, 6] of T_odom_camera: x y z, rotation about x y z, in the camera frame
    state: TrackingState
    is_keyframe: bool = False


@dataclass(frozen=True, eq=False)
class PointBatch:
    """Points of one solved window, in the map frame."""

    stamp_ns: int  # of the window's last frame
    xyz: np.ndarray  # [N, 3] float32
    rgb: np.ndarray  # [N, 3] uint8
    confidence: np.ndarray  # [N] float32 in [0, 1)


@dataclass(frozen=True, eq=False)
class DepthImage:
    """Depth of one keyframe at the backbone's resolution."""

    stamp_ns: int
    frame_id: str
    depth: np.ndarray  # [H, W] float32 z, NaN where not trusted
    confidence: np.ndarray  # [H, W] float32
    camera: CameraModel  # of this depth image; undistorted


@dataclass(frozen=True)
class WindowReport:
    """How one window joined the map: for diagnostics and benchmarks."""

    index: int
    num_frames: int
    residual: float  # median relative disagreement of the overlap frames with the map; NaN for the first window
    log_scale: float  # of the window against the map
    sigma: float  # of log_scale
    accepted: bool  # False: the residual was bad and the link was carried by the prior instead
    seconds: float
    context_bytes: int
    context_budget: int


@dataclass(frozen=True, eq=False)
class Update:
    """What one frame caused, in output units (metres when ``scale.is_metric``)."""

    poses: tuple[FramePose, ...] = ()
    points: PointBatch | None = None
    depth: DepthImage | None = None
    window: WindowReport | None = None
    T_map_odom: np.ndarray = field(default_factory=lambda: np.eye(4))
    map_changed: bool = False  # earlier keyframes moved: path and map must be read again
    state: TrackingState = TrackingState.INITIALISING
    scale: ScaleEstimate = ScaleEstimate()
