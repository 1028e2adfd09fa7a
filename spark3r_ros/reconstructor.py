"""The corridor: frames in; poses, points and depth out. One method, ``push``, reads like the method section.

Three frames of reference, all in model scale:

* *window*: the gauge of one backbone pass.
* *world*: where windows are joined and frames are tracked. Never corrected backwards.
* *map*: world after loop closure and relocalisation, ``S_map_world``. Corrections live here and nowhere else.

Output units (metres once the scale is known) are made in ``_Output`` only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch

from spark3r_ros import geometry
from spark3r_ros.alignment import Link, View, align
from spark3r_ros.backbone import Backbone, load_backbone
from spark3r_ros.config import Config
from spark3r_ros.frame import (
    CameraModel,
    DepthImage,
    Frame,
    FramePose,
    Gauge,
    PointBatch,
    ScaleEstimate,
    TrackingState,
    Update,
    WindowReport,
)
from spark3r_ros.loops import LoopCloser, step_edge
from spark3r_ros.places import PlaceStore, describe, make_place
from spark3r_ros.point_map import KeyframePoints, PointMap, keyframe_points, trusted
from spark3r_ros.preprocess import FrameError, NetworkImage, Preprocessor, scale_intrinsics
from spark3r_ros.refine import DepthPrior, Refiner
from spark3r_ros.scale import OdometrySource, ScaleFilter, from_depth, from_height, from_model
from spark3r_ros.solver import Solution, Solver
from spark3r_ros.tracking import LOST_SIGMA, Estimate, NetworkTracker
from spark3r_ros.tracks import FeatureTracker, Tracks
from spark3r_ros.trajectory import Trajectory
from spark3r_ros.windows import DepthMap, Gate, Keyframe, Window, gate

__all__ = ["FrameError", "Reconstructor"]

PLACE_CONFIDENCE = 0.2  # of depths that places keep: outliers are found when places are matched

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Seen:
    """A frame after looking at it."""

    frame: Frame
    index: int
    network: NetworkImage
    gray: np.ndarray  # [H, W] uint8, as it came from the camera
    tracks: Tracks
    gate: Gate


@dataclass(frozen=True, eq=False)
class Solved:
    """What a window solve brought."""

    report: WindowReport
    keyframes: list[Keyframe]  # those that are new in the map
    camera: CameraModel  # of their depth images


class Reconstructor:
    """One camera stream to poses, dense points and depth. Owned by one thread; same input, same output.

    Args:
        config: all parameters.
        backbone: a loaded model; None loads ``config.model``.
    """

    def __init__(self, config: Config, backbone: Backbone | None = None) -> None:
        self.config = config
        self._device = _device(config.model.device)
        if backbone is None:
            backbone = load_backbone(config.model.name, config.model.checkpoint or None, self._device)
        self._backbone = backbone
        self.reset()

    def reset(self) -> None:
        """Forget the stream and the map."""
        self._preprocess: Preprocessor | None = None
        self._window = Window(self.config.window)
        self._keyframes: dict[int, Keyframe] = {}
        self._points = PointMap(self.config.map)
        self._trajectory = Trajectory()
        self._waiting: list[Seen] = []  # frames that came before the first window was solved
        self._last_stamp_ns = -(2**63)
        self._num_frames = 0
        self._num_windows = 0
        self._S_map_world = np.eye(4)
        self._T_odom_camera = np.eye(4)
        self._T_map_odom = np.eye(4)
        self._state = TrackingState.INITIALISING
        self._scale_filter = ScaleFilter(self.config.scale)
        self._odometry = OdometrySource(self.config.scale)
        self._places = PlaceStore()
        self._loops = LoopCloser(self.config.loops, self._places)
        self._corrections = 0
        self._last_report: WindowReport | None = None
        self._reported = (False, 0)  # at the last update: whether the scale was metric, how many corrections there were

    # -- the method ----------------------------------------------------------------------------------------------

    def push(self, frame: Frame) -> Update:
        """Take one frame; returns the poses that are known now, and what else the frame caused.

        Every frame gets exactly one pose, in stamp order: at once, or, before the first window is solved, with it.

        Raises:
            FrameError: the frame cannot be used; the stream goes on without it.
        """
        seen = self._see(frame)
        if not self._num_windows:
            return self._initialise(seen)
        estimate = self._track(seen)
        self._advance_odometry(estimate.T_world_camera)
        keyframe = self._add_keyframe(seen, estimate.T_world_camera) if seen.gate is Gate.KEYFRAME else None
        self._record(seen, estimate, keyframe)
        solved = self._solve_window() if self._window.is_full else None
        return self._update([self._pose_of(seen, estimate)], solved)

    def finish(self) -> Update:
        """The stream has ended: solve what is pending, so that every frame has had its pose."""
        if not self._num_windows:
            return self._start() if self._waiting else self._update([], None)
        solved = self._solve_window() if self._window.new else None
        self._apply_loops()
        self._refresh_odom()
        return self._update([], solved)

    # -- looking at a frame --------------------------------------------------------------------------------------

    def _see(self, frame: Frame) -> Seen:
        """Check, undistort, resize, follow features, decide whether it is a keyframe."""
        if frame.stamp_ns <= self._last_stamp_ns:
            raise FrameError(f"stamp {frame.stamp_ns} ns is not after the last one, {self._last_stamp_ns} ns")
        if self._preprocess is None:
            self._open_camera(frame)
        assert self._preprocess is not None
        self._preprocess.check(frame)
        gray = cv2.cvtColor(frame.image, cv2.COLOR_RGB2GRAY)
        tracks = self._features.track(gray)
        decision = Gate.KEYFRAME
        if self._keyframes:
            seconds = 1e-9 * (frame.stamp_ns - self._newest.stamp_ns)
            decision = gate(self.config.window, tracks.flow_px / frame.image.shape[1], tracks.survival, seconds)
        self._last_stamp_ns = frame.stamp_ns
        self._num_frames += 1
        return Seen(frame, self._num_frames - 1, self._preprocess(frame), gray, tracks, decision)

    def _open_camera(self, frame: Frame) -> None:
        """The first frame decides about image size and intrinsics."""
        if frame.image.ndim != 3 or min(frame.image.shape[:2]) < 16:
            raise FrameError(f"image must be [H, W, 3] with sides of at least 16 pixels, got {list(frame.image.shape)}")
        self._preprocess = Preprocessor(frame, self._backbone.fit_size(*frame.image.shape[:2]))
        self._preprocess.check(frame)
        self._solver = Solver(self.config, self._backbone, self._device, self._preprocess.valid)
        self._solver.K = self._preprocess.K
        self._features = FeatureTracker(self.config.refine, frame.camera)
        self._tracker = NetworkTracker(self._solver)
        self._refiner: Refiner | None = None
        if self._refine_is_on:
            height, width = frame.image.shape[:2]
            self._refiner = Refiner(self.config.refine, width, height, frame.camera)

    @property
    def _refine_is_on(self) -> bool:
        mode = self.config.refine.mode
        return mode == "on" or (mode == "auto" and self._backbone.spec.name == "nano")

    @property
    def _newest(self) -> Keyframe:
        return self._keyframes[max(self._keyframes)]

    def _add_keyframe(self, seen: Seen, T_world_camera: np.ndarray) -> Keyframe:
        keyframe = Keyframe(
            id=len(self._keyframes),
            frame_index=seen.index,
            stamp_ns=seen.frame.stamp_ns,
            frame_id=seen.frame.frame_id,
            rgb=seen.network.rgb,
            metric_depth=seen.network.depth,
            T_odom_base=seen.frame.T_odom_base,
            corners=describe(seen.gray, seen.frame.camera, self.config.loops.corners),
        )
        self._keyframes[keyframe.id] = keyframe
        self._move(keyframe, T_world_camera)
        tracks = self._features.set_keyframe(keyframe.id)
        if self._refiner is not None:
            self._refiner.add_keyframe(keyframe.id, tracks, T_world_camera if self._num_windows else None)
            self._follow_refiner([*self._window.keyframes, keyframe])
        self._window.add(keyframe)
        return keyframe

    def _follow_refiner(self, keyframes: Sequence[Keyframe]) -> None:
        """Take over the poses that the sparse map has for these keyframes."""
        assert self._refiner is not None
        for keyframe in keyframes:
            T = self._refiner.pose(keyframe.id)
            if T is not None:
                self._move(keyframe, T)

    def _move(self, keyframe: Keyframe, T_world_camera: np.ndarray) -> None:
        """Give a keyframe its pose in the world, and so in the map."""
        keyframe.T_world_camera = T_world_camera
        keyframe.T_map_camera = geometry.apply_similarity_to_pose(self._S_map_world, T_world_camera)
        keyframe.scale = float(geometry.scale_of(self._S_map_world))

    # -- before the first window ---------------------------------------------------------------------------------

    def _initialise(self, seen: Seen) -> Update:
        """Collect frames until the first window is full, or until too many wait."""
        crowded = len(self._waiting) + 1 >= self.config.window.max_pending
        if seen.gate is Gate.KEYFRAME or (crowded and seen.gate is not Gate.STATIC):
            self._add_keyframe(seen, np.eye(4))
        self._waiting.append(seen)
        return self._start() if self._window.is_full or crowded else self._update([], None)

    def _start(self) -> Update:
        """Solve the first window and give every waiting frame its pose."""
        solved = self._solve_window()
        waiting, self._waiting = self._waiting, []
        by_frame = {k.frame_index: k for k in self._keyframes.values()}
        poses = []
        for seen in waiting:
            keyframe = by_frame.get(seen.index)
            estimate = self._track(seen)
            if keyframe is not None:
                estimate = replace(estimate, T_world_camera=keyframe.T_world_camera)
            self._advance_odometry(estimate.T_world_camera)
            self._record(seen, estimate, keyframe or self._keyframe_before(seen.index))
            poses.append(self._pose_of(seen, estimate))
        return self._update(poses, solved)

    def _keyframe_before(self, index: int) -> Keyframe:
        return max((k for k in self._keyframes.values() if k.frame_index <= index), key=lambda k: k.id)

    # -- tracking ------------------------------------------------------------------------------------------------

    def _track(self, seen: Seen) -> Estimate:
        """Pose of one frame: from the sparse map when enough of its points agree, else by asking the network."""
        if self._refiner is not None:
            guess = self._trajectory.world_pose(-1, self._keyframes) if len(self._trajectory) else None
            tracked = self._refiner.track(seen.tracks, guess)
            if tracked is not None and tracked.is_reliable:
                return Estimate(tracked.T_world_camera, tracked.covariance, _inlier_confidence(tracked.num_inliers))
        return self._tracker.track(seen.network.rgb)

    # -- windows -------------------------------------------------------------------------------------------------

    def _solve_window(self) -> Solved:
        """One pass of the network over the window, joined to the map."""
        started = time.perf_counter()
        self._apply_loops()
        keyframes, overlap, new = self._window.keyframes, self._window.overlap, list(self._window.new)
        solution = self._solver.solve(keyframes, self._window.previous_of(keyframes))
        self._solver.learn_intrinsics(solution.K)
        link = self._join(keyframes, len(overlap), solution)
        if self._refiner is not None and len(keyframes) > 1:
            self._refine(self._refiner, keyframes)
        self._solver.commit(keyframes)
        for keyframe in new:
            self._points.set(keyframe.id, self._points_of(keyframe, keyframes))
        self._measure_scale(new, link, solution.gauge)
        self._remember(new, solution.descriptors[len(overlap) :], link)
        for keyframe in self._window.slide():
            keyframe.retire()
        self._tracker.rebase(keyframes[-1], self._window.previous_of(keyframes[-1:]), link)
        self._state = TrackingState.TRACKING if len(self._keyframes) > 1 else TrackingState.INITIALISING
        self._num_windows += 1
        self._last_report = self._report(len(keyframes), link, time.perf_counter() - started)
        return Solved(self._last_report, new, self._depth_camera(solution.K))

    def _join(self, keyframes: Sequence[Keyframe], num_overlap: int, solution: Solution) -> Link | None:
        """Bring a solved window into the world: poses of its new keyframes, depth of all of them."""
        link = None
        S = geometry.inverse(solution.T_window_camera[0])  # the first camera is the origin of the world
        if num_overlap:
            there = [_view(k) for k in keyframes[:num_overlap]]
            here = [View(*v) for v in zip(solution.T_window_camera, solution.depth, solution.confidence, strict=True)]
            link = align(there, here[:num_overlap], solution.K, self.config.alignment, solution.same_gauge)
            S = link.S_map_window
        scale = float(geometry.scale_of(S))
        for i, keyframe in enumerate(keyframes):
            T = geometry.apply_similarity_to_pose(S, solution.T_window_camera[i])
            if i < num_overlap:  # old pose and new one are blended, so that no step is left at the boundary
                T = geometry.interpolate_pose(keyframe.T_world_camera, T, (i + 1) / (num_overlap + 1))
            else:
                keyframe.dense = DepthMap(scale * solution.depth[i], solution.confidence[i], solution.K)
            self._move(keyframe, T)
        return link

    def _refine(self, refiner: Refiner, keyframes: Sequence[Keyframe]) -> None:
        """Adjust the window's poses to its feature tracks, and the new depths to the landmarks."""
        assert self._preprocess is not None
        T_network = np.stack([k.T_world_camera for k in keyframes])
        priors = {k.id: DepthPrior(k.dense.depth, k.dense.K) for k in keyframes if k.dense is not None}
        refined = refiner.solve([k.id for k in keyframes], T_network, priors)
        if refined is None:
            return
        if self._preprocess.camera is None:  # the sparse map estimates the focal length too, and locks it
            self._solver.K = scale_intrinsics(refined.K, *self._preprocess.ratio)
        for keyframe, T_world_camera, factor in zip(
            keyframes, refined.T_world_camera, refined.depth_scale, strict=True
        ):
            self._move(keyframe, T_world_camera)
            dense = keyframe.dense
            if dense is not None:
                K = dense.K if self._solver.K is None else self._solver.K
                keyframe.dense = replace(dense, depth=(factor * dense.depth).astype(np.float32), K=K)

    # -- places and loops ----------------------------------------------------------------------------------------

    def _remember(self, new: Sequence[Keyframe], descriptors: np.ndarray, link: Link | None) -> None:
        """Make places of new keyframes, join them to the pose graph, look for loops, and have the graph solved."""
        assert self._preprocess is not None
        for keyframe, descriptor in zip(new, descriptors, strict=True):
            dense, corners = keyframe.dense, keyframe.corners
            assert dense is not None
            assert corners is not None
            keyframe.median_depth = float(np.median(dense.depth))
            keyframe.place = make_place(
                keyframe.id, descriptor, corners, dense, dense.K, self._preprocess.ratio, PLACE_CONFIDENCE
            )
            keyframe.corners = None
            if keyframe.id - 1 in self._keyframes:
                before = self._keyframes[keyframe.id - 1]
                T = geometry.inverse(before.T_world_camera) @ keyframe.T_world_camera
                doubt = link.sigma if link is not None and keyframe is new[0] else 0.0
                self._loops.edges.append(step_edge(before.id, keyframe.id, T, keyframe.median_depth, doubt))
            if self.config.loops.enabled:
                S_map, path = self._graph()
                self._loops.search(keyframe.place, S_map, path, keyframe.median_depth)
            self._places.add(keyframe.place)
        if self._loops.is_due:
            self._loops.submit(self._graph()[0])

    def _graph(self) -> tuple[dict[int, np.ndarray], np.ndarray]:
        """Nodes of the pose graph and the length of the path up to each keyframe, map units."""
        solved = [k for k in self._keyframes.values() if k.place is not None]
        positions = np.stack([k.T_map_camera[:3, 3] for k in solved])
        lengths = np.r_[0.0, np.cumsum(np.linalg.norm(np.diff(positions, axis=0), axis=1))]
        path = np.zeros(solved[-1].id + 1)
        path[[k.id for k in solved]] = lengths
        return {k.id: k.S_map_keyframe for k in solved}, path

    def _apply_loops(self) -> None:
        """Take over a solved pose graph. Happens when the window after the loop is solved, however long it took."""
        if not self._loops.is_running:
            return
        moved = self._loops.collect()
        for number, S in moved.items():
            keyframe = self._keyframes[number]
            keyframe.scale = float(geometry.scale_of(S))
            keyframe.T_map_camera = geometry.make_T(geometry.project_to_so3(S[:3, :3]), S[:3, 3])
        last = self._keyframes[max(moved)]
        self._S_map_world = last.S_map_keyframe @ geometry.inverse(last.T_world_camera)
        for number in range(last.id + 1, len(self._keyframes)):
            self._move(self._keyframes[number], self._keyframes[number].T_world_camera)
        self._scale_filter.restart({k.id: k.scale for k in self._keyframes.values()})
        self._corrections += 1

    def _measure_scale(self, new: Sequence[Keyframe], link: Link | None, gauge: Gauge) -> None:
        """Ask every source of metric scale about the new keyframes."""
        measurements = self._odometry.add(new)
        for keyframe in new:
            measurements += [
                m for m in (from_depth(keyframe), from_height(keyframe, self.config.scale.camera_height)) if m
            ]
        if gauge is Gauge.METRIC:
            log_scale, sigma = (link.log_scale, link.sigma) if link else (0.0, 0.0)
            measurements.append(from_model(new[-1], log_scale, sigma))
        for m in measurements:
            self._scale_filter.add(m, self._keyframes[m.keyframe_id].scale)

    @property
    def _scale(self) -> ScaleEstimate:
        return self._scale_filter.estimate

    def _points_of(self, keyframe: Keyframe, window: Sequence[Keyframe]) -> KeyframePoints:
        dense, rgb = keyframe.dense, keyframe.rgb
        assert dense is not None
        assert rgb is not None
        baseline = _baseline(keyframe, window)
        return keyframe_points(dense.depth, dense.confidence, rgb, dense.K, baseline, self.config.map)

    def _report(self, num_frames: int, link: Link | None, seconds: float) -> WindowReport:
        context = self._solver.context
        return WindowReport(
            index=self._num_windows - 1,
            num_frames=num_frames,
            residual=link.residual if link else float("nan"),
            log_scale=link.log_scale if link else 0.0,
            sigma=link.sigma if link else 0.0,
            accepted=link.accepted if link else True,
            seconds=seconds,
            context_bytes=context.bytes if context is not None else 0,
            context_budget=context.budget_bytes if context is not None else 0,
        )

    def _depth_camera(self, K: np.ndarray) -> CameraModel:
        assert self._preprocess is not None
        height, width = self._preprocess.size
        return CameraModel(width, height, K)

    # -- poses and output ----------------------------------------------------------------------------------------

    def _advance_odometry(self, T_world_camera: np.ndarray) -> None:
        """Add the motion since the last frame, as it was seen before anything corrected the map."""
        if len(self._trajectory):
            T_last_camera = geometry.inverse(self._trajectory.world_pose(-1, self._keyframes)) @ T_world_camera
            T_last_camera[:3, 3] *= self._unit
            moved = self._T_odom_camera @ T_last_camera
            self._T_odom_camera = geometry.make_T(geometry.project_to_so3(moved[:3, :3]), moved[:3, 3])

    def _record(self, seen: Seen, estimate: Estimate, keyframe: Keyframe | None) -> None:
        """Append a frame to the path; a keyframe's own frame is where the keyframe is."""
        keyframe = keyframe or self._newest
        is_own = keyframe.frame_index == seen.index
        T_world_camera = keyframe.T_world_camera if is_own else estimate.T_world_camera
        self._trajectory.append(seen.frame.stamp_ns, T_world_camera, keyframe)

    @property
    def _unit(self) -> float:
        """Output units per world unit, here and now."""
        return float(geometry.scale_of(self._S_map_world)) * self._scale.metres_per_unit

    def _pose_of(self, seen: Seen, estimate: Estimate) -> FramePose:
        """What is given out for the frame placed last."""
        T_map_camera = self._refresh_odom()
        to_output = np.diag([self._unit] * 3 + [1.0] * 3)
        cov = to_output @ estimate.covariance @ to_output
        if self._state is TrackingState.LOST:
            cov = np.eye(6) * LOST_SIGMA**2
        is_keyframe = self._newest.frame_index == seen.index
        return FramePose(
            seen.frame.stamp_ns, seen.frame.frame_id, self._T_odom_camera, T_map_camera, cov, self._state, is_keyframe
        )

    def _refresh_odom(self) -> np.ndarray:
        """Let map -> odom take whatever the map's corrections moved; T_map_camera [4, 4] of the last frame."""
        if not len(self._trajectory):
            return np.eye(4)
        T_map_camera = self._to_output(self._trajectory.pose(-1, self._keyframes))
        self._T_map_odom = T_map_camera @ geometry.inverse(self._T_odom_camera)
        return T_map_camera

    def _to_output(self, T: np.ndarray) -> np.ndarray:
        """Poses [..., 4, 4] from model scale to output units."""
        moved = T.copy()
        moved[..., :3, 3] *= self._scale.metres_per_unit
        return moved

    def _update(self, poses: Sequence[FramePose], solved: Solved | None) -> Update:
        return Update(
            poses=tuple(poses),
            points=self._batch([k.id for k in solved.keyframes]) if solved else None,
            depth=self._depth_image(solved) if solved else None,
            window=solved.report if solved else None,
            T_map_odom=self._T_map_odom,
            map_changed=self._map_changed(),
            state=self._state,
            scale=self._scale,
        )

    def _map_changed(self) -> bool:
        """Whether what was given out earlier has other coordinates now; asked once per update."""
        now = (self._scale.is_metric, self._corrections)
        changed, self._reported = self._reported != now, now
        return changed

    def _batch(self, keyframe_ids: Sequence[int]) -> PointBatch:
        points = self._points.gather({k: self._keyframes[k].S_map_keyframe for k in keyframe_ids})
        xyz = points.xyz * np.float32(self._scale.metres_per_unit)
        stamp = max((self._keyframes[k].stamp_ns for k in keyframe_ids), default=0)
        return PointBatch(stamp, xyz, points.rgb, points.confidence)

    def _depth_image(self, solved: Solved) -> DepthImage:
        keyframe = solved.keyframes[-1]
        dense = keyframe.dense
        assert dense is not None
        keep = trusted(dense.depth, dense.confidence, np.inf, self.config.map)
        depth = np.where(keep, dense.depth * self._unit, np.nan).astype(np.float32)
        return DepthImage(keyframe.stamp_ns, keyframe.frame_id, depth, dense.confidence, solved.camera)

    # -- what can be asked ---------------------------------------------------------------------------------------

    def trajectory(self) -> list[tuple[int, np.ndarray]]:
        """(stamp_ns, best T_map_camera [4, 4]) of every frame so far, in output units."""
        stamps, poses = self._trajectory.poses(self._keyframes)
        return [(int(s), T) for s, T in zip(stamps, self._to_output(poses), strict=True)]

    def keyframe_poses(self) -> list[tuple[int, np.ndarray]]:
        """(stamp_ns, T_map_camera [4, 4]) of every solved keyframe, in output units."""
        solved = [k for k in self._keyframes.values() if k.place is not None]
        return [(k.stamp_ns, self._to_output(k.T_map_camera)) for k in solved]

    def map_points(self) -> PointBatch:
        """The whole map, in output units."""
        return self._batch(list(self._keyframes))

    def status(self) -> dict[str, object]:
        """Figures for diagnostics."""
        report = self._last_report
        return {
            "state": self._state.value,
            "frames": self._num_frames,
            "frames_waiting": len(self._waiting),
            "keyframes": len(self._keyframes),
            "windows": self._num_windows,
            "points": len(self._points),
            "loops": self._loops.num_loops,
            "loops_refused": self._loops.num_refused,
            "map_corrections": self._corrections,
            "context_bytes": report.context_bytes if report else 0,
            "context_budget": report.context_budget if report else 0,
            "window_residual": report.residual if report else float("nan"),
            "window_seconds": report.seconds if report else float("nan"),
            "scale": self._scale.metres_per_unit,
            "scale_sigma": self._scale.sigma,
            "scale_source": self._scale.source,
        }

    def save_map(self, path: str | Path) -> None:
        raise NotImplementedError

    def load_map(self, path: str | Path) -> None:
        raise NotImplementedError


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _inlier_confidence(num_inliers: int) -> float:
    """A few dozen points that agree are as good as many."""
    return 1.0 - float(np.exp(-num_inliers / 30))


def _view(keyframe: Keyframe) -> View:
    assert keyframe.dense is not None, f"keyframe {keyframe.id} has no depth"
    return View(keyframe.T_world_camera, keyframe.dense.depth, keyframe.dense.confidence)


def _baseline(keyframe: Keyframe, window: Sequence[Keyframe]) -> float:
    """Largest distance from this camera to another of its window."""
    centre = keyframe.T_world_camera[:3, 3]
    return max(float(np.linalg.norm(k.T_world_camera[:3, 3] - centre)) for k in window)
