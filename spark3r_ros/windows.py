"""Which frames become keyframes, and which keyframes are solved together."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from spark3r_ros.config import WindowConfig
from spark3r_ros.tracks import SLOW_S

if TYPE_CHECKING:
    from spark3r_ros.places import Corners, Place


class Gate(Enum):
    """What becomes of a frame."""

    STATIC = "static"  # the camera has not moved since the last keyframe
    MOVING = "moving"  # moved, but not far enough: tracked only
    SUPPORT = "support"  # far enough, but too soon: brings points to follow, the network does not see it
    KEYFRAME = "keyframe"


def gate(
    config: WindowConfig, flow: float, survival: float, seconds: float, is_next: bool = False, starting: bool = False
) -> Gate:
    """Decide about one frame.

    The frame right after a keyframe tells how fast features are lost: the one after it will show the square of its
    share. Where frames come slowly that may be too little to be placed, so there it is what counts.

    Args:
        config: thresholds.
        flow: median optical flow since the last keyframe, as a share of the image width.
        survival: share of the last keyframe's features that are still tracked.
        seconds: time since the last keyframe.
        is_next: the frame before is the last keyframe.
        starting: no window is solved yet and all frames wait for one.
    """
    far, late = config.keyframe_flow, config.max_keyframe_interval
    if starting:
        far, late = min(far, config.first_flow), min(late, config.first_seconds)
    looks_ahead = is_next and seconds >= SLOW_S and flow >= config.static_flow
    shown = survival**2 if looks_ahead else survival
    if shown < config.min_survival or flow >= far:
        return Gate.KEYFRAME
    if flow < config.static_flow:
        return Gate.STATIC
    return Gate.KEYFRAME if seconds >= late else Gate.MOVING


@dataclass(frozen=True, eq=False)
class DepthMap:
    """What the network saw of one keyframe, in world units."""

    depth: np.ndarray  # [h, w] float32
    confidence: np.ndarray  # [h, w] float32
    K: np.ndarray  # [3, 3]


@dataclass(eq=False)
class Keyframe:
    """A frame that the map remembers. What is needed only while it can be solved again is dropped by ``retire``."""

    id: int
    frame_index: int
    stamp_ns: int
    frame_id: str
    rgb: np.ndarray | None  # [h, w, 3] uint8, network size
    T_world_camera: np.ndarray = field(default_factory=lambda: np.eye(4))  # model scale, as solved
    T_map_camera: np.ndarray = field(default_factory=lambda: np.eye(4))  # the same after loop corrections
    covariance: np.ndarray = field(default_factory=lambda: np.zeros((6, 6)))  # of T_world_camera, in the camera frame
    segment: int = 0  # keyframes tracked in one go; after being lost a new one begins
    scale: float = 1.0  # map units per world unit here: a loop correction may stretch a keyframe
    dense: DepthMap | None = None
    median_depth: float = 1.0  # distance of the scene, world units
    travelled: float = 0.0  # length of the path up to here when it was solved, map units
    num_inliers: int | None = None  # tracked points that tie it to the sparse map; None: none was asked
    is_solved: bool = False  # has had its window, and so is a node of the pose graph
    place: Place | None = None  # how it looks; None: not solved yet, or forgotten
    corners: Future[Corners] | None = None  # what place is made from once there is depth
    metric_depth: np.ndarray | None = None  # [h, w] float32 metres, NaN unknown: a source of scale
    T_odom_base: np.ndarray | None = None  # [4, 4] metres: a source of scale

    @property
    def S_map_keyframe(self) -> np.ndarray:
        """Similarity [4, 4] that brings stored points into the map."""
        S = self.T_map_camera.copy()
        S[:3, :3] *= self.scale
        return S

    def retire(self) -> None:
        """Drop the images of a keyframe that has left the window, and corners if it was never solved."""
        self.rgb = self.dense = self.metric_depth = self.corners = None


@dataclass(eq=False)
class Support:
    """A frame that only the sparse map remembers: where a camera turns fast, its points bridge two keyframes."""

    frame_index: int
    row: int  # in the trajectory
    keyframe: Keyframe  # the one before, that its place in the trajectory is relative to
    T_world_camera: np.ndarray  # [4, 4]
    covariance: np.ndarray  # [6, 6] as a keyframe's

    @property
    def median_depth(self) -> float:
        return self.keyframe.median_depth


class Window:
    """The sliding window: the last solved keyframes (overlap and motion history) and the new ones behind them."""

    MOTION_FRAMES = 2  # images before the first of a pass, for backbones with motion tokens

    def __init__(self, config: WindowConfig) -> None:
        self.config = config
        self._history: deque[Keyframe] = deque(maxlen=config.overlap + self.MOTION_FRAMES)  # solved, oldest first
        self._new: list[Keyframe] = []

    @property
    def overlap(self) -> list[Keyframe]:
        return list(self._history)[-self.config.overlap :]

    @property
    def new(self) -> Sequence[Keyframe]:
        return self._new

    @property
    def keyframes(self) -> list[Keyframe]:
        return self.overlap + self._new

    @property
    def is_full(self) -> bool:
        return len(self.overlap) + len(self._new) >= self.config.size

    @property
    def can_start(self) -> bool:
        """Whether there are enough keyframes for a window without overlap."""
        return len(self._new) >= min(self.config.first_size, self.config.size)

    def add(self, keyframe: Keyframe) -> None:
        self._new.append(keyframe)

    def previous_of(self, keyframes: Sequence[Keyframe]) -> list[Keyframe]:
        """Up to MOTION_FRAMES keyframes right before the first of ``keyframes``, oldest first."""
        everything = [*self._history, *self._new]
        first = next((i for i, k in enumerate(everything) if k is keyframes[0]), len(everything))
        return everything[max(0, first - self.MOTION_FRAMES) : first]

    def slide(self) -> list[Keyframe]:
        """The window has been solved: new keyframes become history. Returns those that have left for good."""
        held = [*self._history, *self._new]
        self._history.extend(self._new)
        self._new = []
        return [k for k in held if all(k is not kept for kept in self._history)]

    def clear(self) -> list[Keyframe]:
        """Forget everything; returns what was held."""
        held = [*self._history, *self._new]
        self._history.clear()
        self._new = []
        return held
