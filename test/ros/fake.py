"""A reconstructor without network: exact motion, instant answers, failures on demand; the node around it is real."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from spark3r_ros import geometry
from spark3r_ros.config import Config
from spark3r_ros.frame import (
    CameraModel,
    DepthImage,
    Frame,
    FramePose,
    PointBatch,
    ScaleEstimate,
    TrackingState,
    Update,
    WindowReport,
)
from spark3r_ros.preprocess import FrameError

SPEED = 0.5  # metres per second along the optical axis
WINDOW = 8
_NO_IMAGE = np.empty((0, 0, 3), np.uint8)


class FakeReconstructor:
    """Moves straight ahead with SPEED; a window every WINDOW frames. Attributes change its behaviour."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.delay_s = 0.0  # of every frame
        self.gate = threading.Event()  # cleared: track waits, as if a window were being solved
        self.map_gate = threading.Event()  # likewise of update_map
        self.map_gate.set()
        self.gate.set()
        self.map_changed = False  # of the next update, once
        self.num_points = 1000
        self.is_metric = True
        self.state = TrackingState.TRACKING
        self.T_map_odom = np.eye(4)
        self.error: Exception | None = None  # of track
        self.map_error: Exception | None = None  # of update_map
        self.frames: deque[Frame] = deque(maxlen=200)  # the newest ones; only the last one has its image
        self.resets = 0
        self.loaded: Path | None = None
        self.reset()
        self.resets = 0

    def reset(self) -> None:
        self.resets += 1
        self._count = 0
        self._first_ns: int | None = None
        self._last_ns = 0
        self._keyframes: list[tuple[int, np.ndarray]] = []
        self._size: tuple[int, ...] | None = None
        self._window: Frame | None = None  # the frame that completes one

    def track(self, frame: Frame) -> Update:
        if self.delay_s:
            time.sleep(self.delay_s)
        self.gate.wait()
        if self.error is not None:
            raise self.error
        self._size = self._size or frame.image.shape
        if frame.image.shape != self._size:
            raise FrameError(f"image size changed to {frame.image.shape}")
        if self.frames:
            self.frames[-1] = dataclasses.replace(self.frames[-1], image=_NO_IMAGE)
        self.frames.append(frame)
        self._first_ns = frame.stamp_ns if self._first_ns is None else self._first_ns
        T = np.eye(4)
        T[2, 3] = SPEED * 1e-9 * (frame.stamp_ns - self._first_ns)
        self._count += 1
        self._last_ns = frame.stamp_ns
        is_window = self._count % WINDOW == 0
        pose = FramePose(
            frame.stamp_ns, frame.frame_id, T, self.T_map_odom @ T, np.diag([1e-4] * 3 + [1e-6] * 3) * self._count,
            self.state, is_window,
        )  # fmt: skip
        if is_window:
            self._keyframes = [*self._keyframes[-500:], (frame.stamp_ns, self.T_map_odom @ T)]
        self._window = frame if is_window else None
        return self._update(poses=(pose,))

    def update_map(self) -> Update:
        self.map_gate.wait()
        if self.map_error is not None:
            raise self.map_error
        frame, self._window = self._window, None
        changed, self.map_changed = self.map_changed, False
        if frame is None:
            return self._update(map_changed=changed)
        return self._update(
            points=self._points(frame.stamp_ns),
            depth=self._depth(frame),
            window=self._report(),
            map_changed=changed,
        )

    def _update(self, **what: Any) -> Update:
        scale = ScaleEstimate(0.0, 0.01, "depth") if self.is_metric else ScaleEstimate()
        return Update(T_map_odom=self.T_map_odom, state=self.state, scale=scale, **what)

    def finish(self) -> Update:
        return Update(T_map_odom=self.T_map_odom, state=self.state)

    def keyframe_poses(self) -> list[tuple[int, np.ndarray]]:
        return list(self._keyframes)

    def map_points(self) -> PointBatch:
        return self._points(self._last_ns)

    def status(self) -> dict[str, object]:
        return {"frames": self._count}

    def save_map(self, path: Path) -> None:
        Path(path).write_text(json.dumps({"frames": self._count}))

    def load_map(self, path: Path) -> None:
        json.loads(Path(path).read_text())
        self.reset()
        self.loaded = Path(path)

    def _points(self, stamp_ns: int) -> PointBatch:
        n = self.num_points
        xyz = np.zeros((n, 3), np.float32)
        xyz[:, 2] = np.linspace(1, 2, n, dtype=np.float32)
        rgb = np.tile(np.array([[10, 20, 30]], np.uint8), (n, 1))
        return PointBatch(stamp_ns, xyz, rgb, np.full(n, 0.5, np.float32))

    def _depth(self, frame: Frame) -> DepthImage:
        depth = np.full((12, 16), 2.0, np.float32)
        depth[0, 0] = np.nan
        camera = CameraModel(16, 12, np.array([[20.0, 0, 8], [0, 20.0, 6], [0, 0, 1]]))
        return DepthImage(frame.stamp_ns, frame.frame_id, depth, np.ones_like(depth), camera)

    def _report(self) -> WindowReport:
        return WindowReport(self._count // WINDOW, WINDOW, 0.02, 0.0, 0.01, True, 0.1, 1 << 20, 1 << 28)


def truth(first_ns: int, stamp_ns: int) -> np.ndarray:
    """T_start_camera at a stamp."""
    return geometry.make_T(np.eye(3), np.array([0, 0, SPEED * 1e-9 * (stamp_ns - first_ns)]))
