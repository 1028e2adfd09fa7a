"""The corridor: frames in; poses, points and depth out. Two methods read like the method section: ``track`` answers a
frame with its pose, ``update_map`` does what the frame means for the map while the next one is on its way.

Three frames of reference, all in model scale:

* *window*: the gauge of one backbone pass.
* *world*: where windows are joined and frames are tracked. Never corrected backwards.
* *map*: world after loop closure and relocalisation, ``S_map_world``. Corrections live here and nowhere else.

Output units (metres once the scale is known) are made in ``_Output`` only.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import takewhile
from pathlib import Path

import cv2
import numpy as np
from threadpoolctl import threadpool_limits

from spark3r_ros import geometry, map_file
from spark3r_ros.alignment import Link, View, align, robust_log_ratio
from spark3r_ros.backbone import Backbone, load_backbone
from spark3r_ros.config import Config
from spark3r_ros.device import choose_device
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
from spark3r_ros.loops import FIRST_DOUBT, NETWORK_DOUBT, Edge, LoopCloser, loop_edge, step_doubt, step_edge
from spark3r_ros.map_file import MapFileError, SavedMap
from spark3r_ros.memory import return_freed_memory
from spark3r_ros.places import Corners, Place, PlaceStore, Sighting, describe, make_place, recognise
from spark3r_ros.point_map import KeyframePoints, PointMap, keyframe_points, trusted
from spark3r_ros.preprocess import FrameError, NetworkImage, Preprocessor
from spark3r_ros.recovery import Watch, find_again, sighted_pose, sparse_view
from spark3r_ros.refine import DenseView, DepthPrior, RefinedWindow, Refiner, TrackedPose, dense_depth, expected_error
from spark3r_ros.scale import Measurement, OdometrySource, ScaleFilter, from_depth, from_height, from_model
from spark3r_ros.solver import Solution, Solver
from spark3r_ros.tracking import (
    FIRST_WINDOW_DOUBT,
    LOST_SIGMA,
    MIN_ROTATION_SIGMA,
    SCOUT_DOUBT,
    TIMING_SIGMA,
    Estimate,
    NetworkTracker,
    turn_rates,
    with_drift,
)
from spark3r_ros.tracks import FeatureTracker, Tracks
from spark3r_ros.trajectory import Trajectory
from spark3r_ros.windows import DepthMap, Gate, Keyframe, Support, Window, gate

__all__ = ["FrameError", "MapFileError", "Reconstructor"]

NETWORK_NS = 40_000_000  # per keyframe that the network may work beside the stream before the stream waits for it
START_NS = 75_000_000  # and the sparse map's start, per keyframe of the first window
ADJUST_NS = 20_000_000  # and its adjustment with a later one, per view
DENSE_NS = 90_000_000  # and dense depth after it, per new keyframe; the frames behind the join catch up meanwhile
SLOW_NS = 400_000_000  # between frames that leave time for a window
MAX_GROWTH = 2  # times window.size that a window may grow to while the one before it is on its way
SCOUT_FRAMES = 4  # that the scout's first look takes at least
SCOUT_VIEWS = 6  # and how many of them it keeps, keyframes aside
RETRACKED = 2  # frames of the scout that are placed again with each later one that is nothing to the map
PIECE_NS = 100_000_000  # of a window's further way into the map, one piece is done per so much time between frames
NEAR_FLOW = 0.008  # share of the image's width that points have moved by where a camera is still near its origin
NEAR_FRAMES = 30  # of these that are kept for the scout, and placed better later
FOUND_SCALE_SIGMA = 0.1  # of log scale, where one sighting of a place is all that tells it
SIGHTED_SIGMA = 0.01  # rad and share of the scene's distance, of a pose from recognised corners
PLACE_CONFIDENCE = 0.2  # of depths that places keep: outliers are found when places are matched

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Seen:
    """A frame after looking at it."""

    frame: Frame
    index: int
    preprocess: Preprocessor
    gray: np.ndarray  # [H, W] uint8, as it came from the camera
    tracks: Tracks
    gate: Gate

    @cached_property
    def network(self) -> NetworkImage:
        """The frame as the network takes it: keyframes, and frames that the sparse map cannot place."""
        return self.preprocess(self.frame)


@dataclass(frozen=True, eq=False)
class Tracked:
    """A frame that has its pose, and what is left to do about it."""

    seen: Seen
    estimate: Estimate
    interval_ns: int  # since the frame before
    role: Gate  # what it is going to be


@dataclass(eq=False)
class Job:
    """A window on its way into the map: with the network, aligned, joined, then finished keyframe by keyframe."""

    keyframes: list[Keyframe]
    new: list[Keyframe]  # those of them that were in no window before
    before_last: list[Keyframe]  # for motion tokens of the newest
    leaving: list[Keyframe]  # that no later window needs
    pieces: Iterator[int]  # the work, piece by piece; each says for how many ns the next goes on beside the stream
    due_ns: int = 0  # stamp from which on the next piece is done
    link: Link | None = None
    scale: float = 1.0  # world units per unit of the network
    solution: Solution | None = None
    located: dict[int, TrackedPose] = field(default_factory=dict)  # keyframes of the first window, on its points
    is_joined: bool = False
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class Examined:
    """What a new keyframe of a joined window shows."""

    dense: DepthMap
    points: KeyframePoints
    place: Place
    sighting: Sighting | None  # of an old place


@dataclass(frozen=True, eq=False)
class Solved:
    """What a window solve brought."""

    report: WindowReport
    keyframes: list[Keyframe]  # those that are new in the map
    camera: CameraModel  # of their depth images
    depth: DepthMap  # of the last one


class Reconstructor:
    """One camera stream to poses, dense points and depth. Owned by one thread; same input, same output.

    Args:
        config: all parameters.
        backbone: a loaded model; None loads ``config.model``.
    """

    def __init__(self, config: Config, backbone: Backbone | None = None) -> None:
        self.config = config
        self._device = choose_device(config.model.device)
        if backbone is None:
            backbone = load_backbone(config.model.name, config.model.checkpoint or None, self._device)
        self._backbone = backbone
        # dense flow depends on the stripes that OpenCV cuts an image into, and these on how many threads are free;
        # OpenBLAS threads spin between small products and take the core that the network works on
        cv2.setNumThreads(1)
        threadpool_limits(1, "blas")
        self._beside = ThreadPoolExecutor(max_workers=1, thread_name_prefix="window")
        self.reset()

    def reset(self) -> None:
        """Forget the stream and the map."""
        self._preprocess: Preprocessor | None = None
        self._window = Window(self.config.window)
        self._jobs: list[Job] = []  # windows on their way, oldest first; only the last may not be joined yet
        self._tracked: Tracked | None = None  # the last frame, while the map does not know it yet
        self._solved: list[Solved] = []  # windows that are finished and not told yet
        self._keyframes: dict[int, Keyframe] = {}
        self._sparse: dict[int, Keyframe | Support] = {}  # by frame: what the sparse map knows as its keyframes
        self._points = PointMap(self.config.map)
        self._trajectory = Trajectory()
        self._is_starting = True  # no window has joined the map
        self._waiting: list[Seen] = []  # moving frames from before anything could place them
        self._moving_since_ns = -(2**63)  # stamp of the last frame that stood still before them
        self._near: deque[tuple[int, Seen]] = deque(maxlen=NEAR_FRAMES)  # and the last ones before, by row
        self._scout: Refiner | None = None  # a rough sparse map that places frames until the first window has joined
        self._scouted: list[tuple[int, Tracks]] = []  # rows of the trajectory that it placed, to be placed better
        self._start_views: list[tuple[Keyframe, Tracks]] = []  # keyframes from before that, with their points
        self._last_stamp_ns = -(2**63)
        self._next_keyframe = 0
        self._segment, self._segment_from = 0, 0  # and its first keyframe
        self._unconnected_from: int | None = None  # first keyframe of a segment that no sighting ties to the map
        self._sightings: dict[int, Sighting] = {}  # by keyframe: what a camera that was lost has recognised
        self._recovering = False  # found, but no window is solved yet
        self._found: np.ndarray | None = None  # [3] world: where, while no loop has told the segment's scale
        self._watch = Watch(self.config.window)
        self._num_frames = 0
        self._num_windows = 0
        self._S_map_world = np.eye(4)
        self._T_odom_camera = np.eye(4)
        self._T_map_odom = np.eye(4)
        self._state = TrackingState.INITIALISING
        self._scale_filter = ScaleFilter(self.config.scale)
        self._odometry = OdometrySource(self.config.scale)
        self._places = PlaceStore(self.config.loops.max_places + self.config.window.size, self.config.loops.corners)
        self._loops = LoopCloser(self.config.loops, self._places)
        self._corrections = 0
        self._last_report: WindowReport | None = None
        self._reported = (False, 0)  # at the last update: whether the scale was metric, how many corrections there were

    # -- the method ----------------------------------------------------------------------------------------------

    def push(self, frame: Frame) -> Update:
        """Take one frame: ``track``, then ``update_map``; returns what both of them say, ``T_map_odom`` as it is after.

        Raises:
            FrameError: the frame cannot be used; the stream goes on without it.
        """
        poses = self.track(frame).poses
        return replace(self.update_map(), poses=poses)

    def track(self, frame: Frame) -> Update:
        """Answer one frame at once; returns the poses that are known now, and nothing about the map.

        Every frame gets exactly one pose, in stamp order: at once, or, when the camera begins to move, as soon as its
        first frames tell where they are.

        Raises:
            FrameError: the frame cannot be used; the stream goes on without it.
        """
        self._catch_up()
        interval_ns = frame.stamp_ns - self._last_stamp_ns
        seen = self._see(frame)
        if self._is_starting and self._scout is None:
            return self._answer(self._initialise(seen, interval_ns))
        segment = self._segment
        estimate = self._track_or_lose(seen)
        self._advance_odometry(estimate.T_world_camera)
        self._trajectory.append(frame.stamp_ns, estimate.T_world_camera, self._newest)
        if self._scout is not None:
            self._scouted.append((len(self._trajectory) - 1, seen.tracks))
        just_lost = segment != self._segment  # features start again with the next frame
        role = Gate.MOVING if just_lost or self._is_cut_off(seen, estimate) else seen.gate
        self._tracked = Tracked(seen, estimate, interval_ns, role)
        return self._answer([self._pose_of(seen, estimate, role is Gate.KEYFRAME)])

    def update_map(self) -> Update:
        """What the last frame means for the map: a keyframe, a window or a piece of one; returns what changed.

        Nobody's pose waits for it. Left out, it is done before the next frame.
        """
        self._catch_up()
        return self._update()

    def finish(self) -> Update:
        """The stream has ended: solve what is pending, so that every frame has had its pose."""
        self._catch_up()
        poses = self._start(self._last_stamp_ns) if self._waiting else []
        self._complete()
        if self._window.new:
            self._solve_window()
        while self._scouted:
            self._place_scouted()
        self._apply_loops()
        if self._loops.is_unsolved:
            self._solve_loops()
            self._apply_loops()
        self._refresh_odom()
        return replace(self._update(), poses=tuple(poses))

    def _catch_up(self) -> None:
        """The map's part of the last frame."""
        tracked, self._tracked = self._tracked, None
        if tracked is None:
            return
        stamp_ns = tracked.seen.frame.stamp_ns
        if tracked.role is Gate.KEYFRAME:
            keyframe = self._add_keyframe(tracked.seen, tracked.estimate)
            self._trajectory.replace(-1, keyframe.T_world_camera, keyframe)  # its own frame is where the keyframe is
            if self._scout is not None:
                self._scouted.pop()
        elif tracked.role is Gate.SUPPORT:
            self._add_support(tracked.seen, tracked.estimate)
        is_busy = tracked.role in (Gate.KEYFRAME, Gate.SUPPORT)
        self._work(stamp_ns, tracked.interval_ns, is_busy)
        if self._scout is None and not is_busy:
            for _ in range(RETRACKED):
                self._place_scouted()
        self._refresh_odom()

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
        tracks = self._features.track(gray, frame.stamp_ns)
        decision = self._decide(frame, gray, tracks)
        self._last_stamp_ns = frame.stamp_ns
        self._num_frames += 1
        return Seen(frame, self._num_frames - 1, self._preprocess, gray, tracks, decision)

    def _decide(self, frame: Frame, gray: np.ndarray, tracks: Tracks) -> Gate:
        """What becomes of the frame; one without corners is no keyframe."""
        newest = self._keyframes.get(self._next_keyframe - 1)
        decision = Gate.KEYFRAME  # the first frame of a segment
        if newest is not None and newest.segment == self._segment:
            seconds = 1e-9 * (frame.stamp_ns - max(newest.stamp_ns, self._moving_since_ns))
            flow = tracks.flow_px / frame.image.shape[1]
            is_next = newest.frame_index == self._num_frames - 1
            is_gathering = self._is_starting and not self._jobs
            decision = gate(self.config.window, flow, tracks.survival, seconds, is_next, is_gathering)
            if self._refiner is not None and not is_gathering and self._sparse_map.is_initialised:
                is_soon = seconds < self.config.window.min_keyframe_interval
                if is_soon and decision is Gate.KEYFRAME and len(tracks.ids) >= self.config.window.min_features:
                    decision = Gate.SUPPORT
                elif not is_soon and isinstance(next(reversed(self._sparse.values())), Support):
                    decision = Gate.KEYFRAME  # one that has waited
        few = self.config.window.min_features
        is_blank = len(tracks.ids) < few and self._num_frames > 0 and len(self._describe(frame, gray).uv) < few
        return Gate.MOVING if decision is Gate.KEYFRAME and is_blank else decision

    def _describe(self, frame: Frame, gray: np.ndarray) -> Corners:
        return describe(gray, frame.camera, self.config.loops.corners)

    def _open_camera(self, frame: Frame) -> None:
        """The first frame decides about image size and intrinsics."""
        if frame.image.ndim != 3 or min(frame.image.shape[:2]) < 16:
            raise FrameError(f"image must be [H, W, 3] with sides of at least 16 pixels, got {list(frame.image.shape)}")
        preprocess = Preprocessor(frame, self._backbone.resize(*frame.image.shape[:2]))
        preprocess.check(frame)
        self._solver = Solver(self.config, self._backbone, self._device, preprocess.valid)
        self._solver.K = preprocess.K
        self._preprocess = preprocess
        self._tracker = NetworkTracker(self._solver)
        self._restart_features()

    def _restart_features(self) -> None:
        """Nothing is tracked any more: new features and, with refine, a new sparse map."""
        assert self._preprocess is not None
        camera, (height, width) = self._preprocess.camera, self._preprocess.image_shape[:2]
        self._features = FeatureTracker(self.config.refine, camera)
        self._refiner = Refiner(self.config.refine, width, height, camera) if self._refine_is_on else None
        self._scout = None
        self._scouted.clear()

    @property
    def _refine_is_on(self) -> bool:
        mode = self.config.refine.mode
        return mode == "on" or (mode == "auto" and self._backbone.spec.name == "nano")

    @property
    def _newest(self) -> Keyframe:
        return self._keyframes[self._next_keyframe - 1]

    def _add_keyframe(self, seen: Seen, estimate: Estimate | None) -> Keyframe:
        """``estimate`` None: before the first window."""
        T_world_camera = estimate.T_world_camera if estimate is not None else np.eye(4)
        keyframe = Keyframe(
            id=self._next_keyframe,
            frame_index=seen.index,
            stamp_ns=seen.frame.stamp_ns,
            frame_id=seen.frame.frame_id,
            rgb=seen.network.rgb,
            metric_depth=seen.network.depth,
            T_odom_base=seen.frame.T_odom_base,
            corners=self._beside.submit(self._describe, seen.frame, seen.gray),
            segment=self._segment,
        )
        if keyframe.id:
            keyframe.median_depth = self._newest.median_depth  # until it has its own
        self._next_keyframe += 1
        self._keyframes[keyframe.id] = keyframe
        self._hang(keyframe, T_world_camera, self._S_map_world)
        if estimate is not None and self._state is not TrackingState.LOST:  # a lost camera's segment starts afresh
            keyframe.covariance = estimate.covariance
        keyframe.num_inliers = self._extend_sparse(keyframe, estimate)
        self._window.add(keyframe)
        return keyframe

    def _add_support(self, seen: Seen, estimate: Estimate) -> None:
        row, T_world_camera = len(self._trajectory) - 1, estimate.T_world_camera
        self._extend_sparse(Support(seen.index, row, self._newest, T_world_camera, estimate.covariance), estimate)

    def _extend_sparse(self, view: Keyframe | Support, estimate: Estimate | None) -> int | None:
        """New points to follow, and one more camera in the sparse map; tracked points that tie it to the others."""
        tracks = self._features.set_keyframe(view.frame_index)
        self._sparse[view.frame_index] = view
        if self._refiner is None:
            return None
        if self._is_starting and isinstance(view, Keyframe):
            self._start_views.append((view, tracks))
            if not self._jobs:
                self._gather(self._refiner)
        fit = None
        if self._scout is not None or not self._is_starting:
            tracked = estimate.tracked if estimate is not None else None
            is_keyframe = isinstance(view, Keyframe)  # a support is adjusted with the next one
            fit = self._sparse_map.add_keyframe(view.frame_index, tracks, tracked, adjust=is_keyframe)
            self._follow(self._sparse_map, self._window.keyframes[0] if self._window.keyframes else view)
        return fit.num_inliers if fit is not None and not self._is_starting else None

    def _gather(self, refiner: Refiner) -> None:
        """Tell the map of the first window its keyframes, those too that came while one failed."""
        for keyframe, tracks in self._start_views:
            if keyframe.frame_index not in refiner:
                refiner.add_keyframe(keyframe.frame_index, tracks)

    @property
    def _sparse_map(self) -> Refiner:
        """The one that places frames."""
        sparse_map = self._scout or self._refiner
        assert sparse_map is not None
        return sparse_map

    def _follow(self, sparse_map: Refiner, first: Keyframe | Support) -> None:
        """Take over the poses that it has from this frame on."""
        for view in self._sparse_since(first):
            T = sparse_map.pose(view.frame_index)
            if T is not None:
                self._place(view, T)

    def _sparse_since(self, first: Keyframe | Support) -> list[Keyframe | Support]:
        """What the sparse map knows from this frame on, in order."""
        views = reversed(self._sparse.values())
        return list(takewhile(lambda view: view.frame_index >= first.frame_index, views))[::-1]

    def _place(self, view: Keyframe | Support, T_world_camera: np.ndarray) -> None:
        """Take over the pose that the sparse map has."""
        if isinstance(view, Keyframe):
            self._move(view, T_world_camera)
        else:
            view.T_world_camera = T_world_camera
            self._trajectory.replace(view.row, T_world_camera, view.keyframe)

    def _move(self, keyframe: Keyframe, T_world_camera: np.ndarray) -> None:
        """Give a keyframe another pose in the world; its own correction stays, and so no step between it and others."""
        S_map_world = keyframe.S_map_keyframe @ geometry.inverse(keyframe.T_world_camera)
        self._hang(keyframe, T_world_camera, S_map_world)

    @staticmethod
    def _hang(keyframe: Keyframe, T_world_camera: np.ndarray, S_map_world: np.ndarray) -> None:
        """Give a keyframe its pose in the world, and so in the map."""
        keyframe.T_world_camera = T_world_camera
        keyframe.T_map_camera = geometry.apply_similarity_to_pose(S_map_world, T_world_camera)
        keyframe.scale = float(geometry.scale_of(S_map_world))

    # -- before the first window ---------------------------------------------------------------------------------

    def _initialise(self, seen: Seen, interval_ns: int) -> list[FramePose]:
        """The world begins where the camera stands; once it has left, frames wait for the scout, or without one for
        the first window.
        """
        if seen.gate is Gate.KEYFRAME:
            self._add_keyframe(seen, None)
        is_near = seen.gate is not Gate.KEYFRAME and seen.tracks.flow_px < NEAR_FLOW * seen.gray.shape[1]
        if not self._waiting and (is_near or seen.index == 0):
            return [self._pose_near_origin(seen)]
        self._waiting.append(seen)
        if self._can_start(seen.frame.stamp_ns):
            return self._start(seen.frame.stamp_ns)
        if interval_ns < SLOW_NS and self._send_scout():
            return self._pose_waiting()
        return []

    def _can_start(self, stamp_ns: int) -> bool:
        """Whether there is enough for the first window."""
        moved = 1e-9 * (stamp_ns - self._moving_since_ns) >= self.config.window.first_seconds
        crowded = len(self._waiting) >= self.config.window.max_pending
        return self._window.is_full or (self._window.can_start and moved) or crowded

    def _pose_near_origin(self, seen: Seen) -> FramePose:
        """Pose of the first frame, and of those that show nearly what it shows: turned, and as uncertain as that."""
        origin, T, sigma = self._keyframes[0], np.eye(4), MIN_ROTATION_SIGMA
        if seen.index:
            moved = seen.tracks.flow_px / seen.gray.shape[1]
            sigma = max(sigma, FIRST_WINDOW_DOUBT * moved)
            T = T if self._refiner is None else self._refiner.turned(origin.frame_index, seen.tracks)
            if moved > 0.25 * NEAR_FLOW:  # the others show the same
                self._near.append((len(self._trajectory), seen))
        if seen.gate is Gate.STATIC or seen.index == 0:
            self._moving_since_ns = seen.frame.stamp_ns
        self._advance_odometry(T)
        self._trajectory.append(seen.frame.stamp_ns, T, origin)
        return self._pose_of(seen, Estimate(T, np.eye(6) * sigma**2, 1.0), seen.index == 0)

    def _send_scout(self) -> bool:
        """Place the first frames without waiting for the network: by their points alone, roughly."""
        views = {keyframe.frame_index: tracks for keyframe, tracks in self._start_views}
        between = [seen for seen in [*(seen for _, seen in self._near), *self._waiting] if seen.index not in views]
        if self._refiner is None or len(views) + len(between) < SCOUT_FRAMES:
            return False
        assert self._preprocess is not None
        height, width = self._preprocess.image_shape[:2]
        scout = Refiner(self.config.refine, width, height, self._preprocess.camera)
        views |= {seen.index: seen.tracks for seen in between[:: -max(1, -(-len(between) // SCOUT_VIEWS))]}
        for index in sorted(views):
            scout.add_keyframe(index, views[index])
        if scout.solve(sorted(views)) is None:
            return False
        self._scout, self._state = scout, TrackingState.TRACKING
        self._follow(scout, self._start_views[0][0])
        self._scouted += [(row, seen.tracks) for row, seen in self._near]
        self._near.clear()
        return True

    def _start(self, stamp_ns: int) -> list[FramePose]:
        """Solve the first window and give every waiting frame its pose; the rest of it follows piece by piece."""
        self._begin_window(stamp_ns)
        job = self._jobs[0]
        while not job.is_joined:
            self._advance(job, stamp_ns)
        if self._refiner is None or not self._refiner.is_initialised:
            self._complete()
        elif len(job.keyframes) > 1:
            self._state = TrackingState.TRACKING
        return self._pose_waiting()

    def _pose_waiting(self) -> list[FramePose]:
        waiting, self._waiting = self._waiting, []
        by_frame = {k.frame_index: k for k in self._keyframes.values()}
        poses: list[FramePose] = []
        for seen in waiting:
            keyframe = by_frame.get(seen.index)
            estimate = self._track(seen)
            if keyframe is not None:
                estimate = replace(estimate, T_world_camera=keyframe.T_world_camera)
                keyframe.covariance = estimate.covariance
            self._advance_odometry(estimate.T_world_camera)
            anchor = keyframe or self._keyframe_before(seen.index)
            self._trajectory.append(seen.frame.stamp_ns, estimate.T_world_camera, anchor)
            if self._scout is not None and keyframe is None:
                self._scouted.append((len(self._trajectory) - 1, seen.tracks))
            poses.append(self._pose_of(seen, estimate, keyframe is not None))
        return poses

    def _dismiss_scout(self, scout: Refiner, refiner: Refiner, located: Mapping[int, TrackedPose]) -> None:
        """The first window has joined the map, which places frames from now on, and keyframes of the meantime first.

        ``located``: those of the window.
        """
        self._scout = None
        if not refiner.is_initialised:
            self._scouted.clear()
            return
        refiner.go_on_from(scout)
        rates = turn_rates(
            np.stack([keyframe.T_world_camera for keyframe, _ in self._start_views]),
            np.array([keyframe.stamp_ns for keyframe, _ in self._start_views]),
        )
        for keyframe, _ in self._start_views:
            keyframe.covariance = np.zeros((6, 6))
        before = self._start_views[0][0]
        for (keyframe, tracks), rate in zip(self._start_views, rates.tolist(), strict=True):
            doubt = 1.0
            if keyframe.frame_index in refiner:
                known = located.get(keyframe.frame_index)
                tracked, doubt = known or refiner.locate(tracks, keyframe.T_world_camera), FIRST_WINDOW_DOUBT
            else:
                T_scout = [scout.pose(k.frame_index) for k in (before, keyframe)]
                assert T_scout[0] is not None
                assert T_scout[1] is not None
                tracked = refiner.locate(tracks, before.T_world_camera @ geometry.inverse(T_scout[0]) @ T_scout[1])
                is_last = keyframe is self._start_views[-1][0]  # adjusts those before it, too
                refiner.add_keyframe(keyframe.frame_index, tracks, tracked, adjust=is_last)
                keyframe.num_inliers = tracked.num_inliers
                self._follow(refiner, self._start_views[0][0])
            estimate = Estimate(keyframe.T_world_camera, tracked.covariance, 1.0, tracked)
            estimate = with_drift(estimate, tracked.anchors, self._sparse, rate, doubt)
            keyframe.covariance, before = estimate.covariance, keyframe

    def _place_scouted(self) -> None:
        """Say of a frame that the scout placed, newest first, where the map has it; what was given out stays."""
        if not self._scouted:
            return
        assert self._refiner is not None
        row, tracks = self._scouted.pop()
        tracked = self._refiner.locate(tracks, self._trajectory.world_pose(row, self._keyframes))
        if tracked.is_reliable:
            self._trajectory.replace(row, tracked.T_world_camera, self._trajectory.keyframe(row, self._keyframes))

    def _keyframe_before(self, index: int) -> Keyframe:
        return max((k for k in self._keyframes.values() if k.frame_index <= index), key=lambda k: k.id)

    # -- tracking ------------------------------------------------------------------------------------------------

    def _track(self, seen: Seen) -> Estimate:
        """Pose of one frame: from the sparse map where there is one, else by asking the network."""
        guess = self._trajectory.world_pose(-1, self._keyframes) if len(self._trajectory) else None
        tracked = self._sparse_map.track(seen.tracks, guess) if self._refiner is not None else None
        if tracked is None:
            self._complete()  # the network has one context
            estimate = self._tracker.track(seen.network.rgb)
            estimate = self._with_drift(seen, estimate, {self._tracker.anchor.frame_index: 1.0})
            return replace(estimate, confidence=0.0) if self._overlaps_too_little(seen) else estimate
        confidence = _inlier_confidence(tracked.num_inliers) if tracked.is_reliable else 0.0
        estimate = Estimate(tracked.T_world_camera, tracked.covariance, confidence, tracked)
        anchors = {self._newest.frame_index: 1.0} if self._scout is not None else tracked.anchors
        return self._with_drift(seen, estimate, anchors)

    def _with_drift(self, seen: Seen, estimate: Estimate, anchors: Mapping[int, float]) -> Estimate:
        turn_rate = 0.0
        if len(self._trajectory):
            R_last = self._trajectory.world_pose(-1, self._keyframes)[:3, :3]
            seconds = 1e-9 * (seen.frame.stamp_ns - self._trajectory.last_stamp_ns)
            turn_rate = float(geometry.rotation_angle(R_last.T @ estimate.T_world_camera[:3, :3])) / seconds
        doubt = 1.0 if self._num_windows else SCOUT_DOUBT if self._scout is not None else FIRST_WINDOW_DOUBT
        return with_drift(estimate, anchors, self._sparse, turn_rate, doubt)

    def _overlaps_too_little(self, seen: Seen) -> bool:
        return seen.tracks.survival < self.config.window.lost_overlap

    def _is_cut_off(self, seen: Seen, estimate: Estimate) -> bool:
        """Whether nothing ties the frame to the map: made a keyframe, it would begin a second world inside this one."""
        tracks = self._state is TrackingState.TRACKING and not self._recovering and self._scout is None
        return tracks and estimate.confidence < self.config.window.lost_confidence and self._overlaps_too_little(seen)

    def _track_or_lose(self, seen: Seen) -> Estimate:
        """Track; when that has failed for a while, say so and look for the place among those that are known."""
        if self._scout is not None:
            return self._track(seen)
        if self._state is not TrackingState.LOST and not self._recovering:
            estimate = self._track(seen)
            if not self._watch.frame(seen.frame.stamp_ns, estimate.confidence):
                return estimate
            self._lose()
        return self._look_around(seen)

    # -- lost and found ------------------------------------------------------------------------------------------

    def _lose(self) -> None:
        """Tracking has failed: forget what only tracking needs, begin a new segment."""
        logger.warning("tracking is lost after %d frames; looking for known places", self._num_frames)
        self._complete()
        self._state = TrackingState.LOST
        self._recovering = False
        self._segment, self._segment_from = self._segment + 1, self._next_keyframe
        self._found = None
        self._sightings.clear()
        for keyframe in self._window.clear():
            keyframe.retire()
        self._restart_features()
        self._watch.restart()

    def _look_around(self, seen: Seen) -> Estimate:
        """Pose of a frame of a lost camera: of the place that it recognises, else the last one, without confidence."""
        sighting = self._recognise(seen)
        if sighting is None:
            if self._recovering and self._watch.frame(seen.frame.stamp_ns, 0.0):
                self._lose()
            held = self._trajectory.world_pose(-1, self._keyframes) if len(self._trajectory) else np.eye(4)
            return Estimate(held, np.eye(6) * LOST_SIGMA**2, 0.0)
        if self._state is TrackingState.LOST:
            logger.info("found again at keyframe %d with %d points", sighting.place.keyframe_id, sighting.num_inliers)
        self._state, self._recovering = TrackingState.TRACKING, True
        self._watch.frame(seen.frame.stamp_ns, 1.0)
        keyframe = self._keyframes[sighting.place.keyframe_id]
        T = sighted_pose(sighting, keyframe, self._S_map_world)
        self._sightings[seen.index] = sighting
        sigma = SIGHTED_SIGMA * sighting.doubt
        sigma_t = sigma * keyframe.median_depth * keyframe.scale / float(geometry.scale_of(self._S_map_world))
        covariance = np.diag([sigma_t**2] * 3 + [sigma**2] * 3)
        return Estimate(T, covariance, _inlier_confidence(sighting.num_inliers))

    def _recognise(self, seen: Seen) -> Sighting | None:
        assert self._preprocess is not None
        corners = self._describe(seen.frame, seen.gray)
        if not len(self._places) or len(corners.uv) < self.config.window.min_features:
            return None
        solution = self._solver.query(seen.network.rgb, [])
        query = make_place(-1, solution.descriptors[0], corners, None, solution.K, self._preprocess.resize, 0.0)
        near = max(self._sightings.items())[1].place.keyframe_id if self._sightings else None
        return find_again(query, self._places, near, self.config.loops)

    def _known_views(self, keyframes: Sequence[Keyframe], K: np.ndarray) -> dict[int, View]:
        """What the map knows of a window's cameras, by position: overlap, or places that a lost camera recognised."""
        known = {}
        for i, keyframe in enumerate(keyframes):
            sighting = self._sightings.get(keyframe.frame_index)
            if keyframe.dense is not None:
                known[i] = View(keyframe.T_world_camera, keyframe.dense.depth, keyframe.dense.confidence)
            elif sighting is not None:
                place = self._keyframes[sighting.place.keyframe_id]
                T = sighted_pose(sighting, place, self._S_map_world)
                shape = keyframe.rgb.shape[:2] if keyframe.rgb is not None else (0, 0)
                known[i] = sparse_view(sighting, place, self._S_map_world, T, K, shape)
        return known

    # -- windows -------------------------------------------------------------------------------------------------

    @property
    def _window_is_due(self) -> bool:
        """A full window, or, when a lost camera has been found, as little as will do and knows where it is."""
        found = self._recovering and self._window.can_start and self._has_sighting(self._window.keyframes)
        starts = self._scout is not None and not self._jobs and self._can_start(self._last_stamp_ns)
        return self._window.is_full or found or starts

    def _has_sighting(self, keyframes: Sequence[Keyframe]) -> bool:
        return any(k.frame_index in self._sightings for k in keyframes)

    def _work(self, stamp_ns: int, interval_ns: int, is_busy: bool) -> None:
        """Bring windows into the map; ``interval_ns``: since the frame before; ``is_busy``: the frame has cost much.

        While the sparse map tracks, the network works beside the stream and no frame waits for more than one piece of
        the rest. Which frame does which piece is decided by stamps and keyframes, so results do not depend on how fast
        the machine is. Tracking by the network needs the network: then the whole window is solved at once.
        """
        if self._window_is_due:
            found = self._recovering or self._state is TrackingState.LOST
            at_once = self._refiner is None or found or interval_ns >= SLOW_NS
            size = len(self._window.keyframes)
            is_largest = size >= MAX_GROWTH * self.config.window.size or not self._solver.can_solve(size + 1)
            if at_once or is_largest:
                self._complete()
            if all(job.is_joined for job in self._jobs):
                self._begin_window(stamp_ns)
                if at_once:
                    self._complete()
                return
        if self._jobs and stamp_ns >= self._jobs[0].due_ns + is_busy * PIECE_NS:
            for _ in range(max(1, interval_ns // PIECE_NS)):
                if self._jobs and stamp_ns >= self._jobs[0].due_ns:
                    self._advance(self._jobs[0], stamp_ns)

    def _solve_window(self) -> None:
        """The whole way of a window into the map, at once."""
        self._begin_window(0)
        self._complete()

    def _complete(self) -> None:
        """Finish the windows that are on their way."""
        while self._jobs:
            self._advance(self._jobs[0], 0)

    def _begin_window(self, stamp_ns: int) -> None:
        """Hand the window to the network."""
        self._apply_loops()
        keyframes, new = self._window.keyframes, list(self._window.new)
        previous, before_last = self._window.previous_of(keyframes), self._window.previous_of(keyframes[-1:])
        leaving = self._window.slide()
        job = Job(keyframes, new, before_last, leaving, pieces=iter(()))
        job.pieces = self._solve(job, previous)
        start_ns = max([stamp_ns] + [job.due_ns for job in self._jobs])  # dense depth of the window before comes first
        job.due_ns = start_ns + next(job.pieces)
        self._jobs.append(job)

    def _advance(self, job: Job, stamp_ns: int) -> None:
        """One piece of a window's way into the map; ``stamp_ns``: now."""
        started, wait_ns = time.perf_counter(), None
        try:
            wait_ns = next(job.pieces, None)
        finally:
            job.seconds += time.perf_counter() - started
            if wait_ns is None:  # done, or failed: it will not get better
                self._jobs.remove(job)
        if wait_ns is None:
            self._finish_window(job)
        else:
            job.due_ns = stamp_ns + wait_ns

    def _solve(self, job: Job, previous: Sequence[Keyframe]) -> Iterator[int]:
        """A window's way into the map; yields for how many nanoseconds the stream may go on before the next piece."""
        solved = self._beside.submit(self._solver.solve, job.keyframes, previous)
        yield NETWORK_NS * len(job.keyframes)
        job.solution = solution = solved.result()
        self._solver.learn_intrinsics(solution.K)
        aligned = self._align(job, solution)
        yield 0
        T_world_camera = self._place_window(job, solution, aligned.result() if aligned is not None else None)
        views = self._sparse_since(job.keyframes[0]) if self._refiner is not None else []
        views = [view for view in views if self._refiner is not None and view.frame_index in self._refiner]
        refined = self._refine(job, views, T_world_camera)
        yield (START_NS if self._scout is not None else ADJUST_NS) * len(views)
        self._join_window(job, T_world_camera, views, refined() if refined is not None else None)
        finished = self._examine(job, solution)
        yield DENSE_NS * len(job.new)
        for keyframe, examined in zip(job.new, finished, strict=True):
            if keyframe is not job.new[0]:
                yield 0
            self._finish_keyframe(job, keyframe, examined.result())

    def _join_window(
        self, job: Job, T_world_camera: np.ndarray, views: Sequence[Keyframe | Support], refined: RefinedWindow | None
    ) -> None:
        """Poses of the window in the world, of the network [S, 4, 4] or better of the sparse map; its keys into the
        context.
        """
        self._join(job, T_world_camera)
        if self._refiner is not None and refined is not None:
            self._take_refined(self._refiner, job.keyframes[0], views, refined)
        self._is_starting = False
        if self._scout is not None and self._refiner is not None:
            self._dismiss_scout(self._scout, self._refiner, job.located)
        self._start_views.clear()
        self._solver.commit(job.keyframes)
        job.is_joined = True

    def _finish_keyframe(self, job: Job, keyframe: Keyframe, examined: Examined) -> None:
        """Points, scale, place and loops of one new keyframe."""
        keyframe.dense, keyframe.corners = examined.dense, None
        self._points.set(keyframe.id, examined.points)
        self._measure_scale(keyframe)
        is_first = keyframe is job.new[0]
        self._remember(keyframe, examined, job.link.sigma if job.link is not None and is_first else 0.0)

    def _finish_window(self, job: Job) -> None:
        """All keyframes are in the map: what follows from the whole."""
        solution = job.solution
        assert solution is not None
        if solution.gauge is Gauge.METRIC:
            newest, said = job.new[-1], solution.depth[-1].ravel()
            assert newest.dense is not None
            log_scale = robust_log_ratio(newest.dense.depth.ravel(), said, newest.dense.confidence.ravel())
            if log_scale is not None:
                self._add_scale(from_model(newest, log_scale, job.link.sigma if job.link is not None else 0.0))
        self._loops.forget_places(self._keyframes)
        if self._loops.is_due:
            self._solve_loops()
        self._tracker.rebase(job.keyframes[-1], job.before_last, job.link)
        depth = job.new[-1].dense
        assert depth is not None
        self._settle(job.keyframes, job.link)  # a camera that is lost now gives up the window's depths
        self._num_windows += 1
        self._last_report = self._report(len(job.keyframes), job.link, job.seconds)
        self._solved.append(Solved(self._last_report, job.new, self._depth_camera(solution.K), depth))
        for keyframe in job.leaving:
            keyframe.retire()
        self._beside.submit(return_freed_memory)

    def _settle(self, keyframes: Sequence[Keyframe], link: Link | None) -> None:
        """The window is in the map: what that means for the state."""
        found = self._recovering and self._has_sighting(keyframes)
        if (self._recovering or self._state is TrackingState.LOST) and not found:  # nothing ties it to the map
            self._unconnected_from = keyframes[0].id
        self._state = TrackingState.TRACKING if len(keyframes) > 1 else TrackingState.INITIALISING
        self._recovering = False
        self._sightings.clear()
        if found:
            self._found = keyframes[0].T_world_camera[:3, 3]
        if self._watch.window(link is None or link.accepted or self._refiner is not None):
            self._lose()

    def _align(self, job: Job, solution: Solution) -> Future[Link] | None:
        """Link a solved window to what the map knows of its cameras; None where that is nothing."""
        known = self._known_views(job.keyframes, solution.K)
        if not known:
            return None
        here = [View(solution.T_window_camera[i], solution.depth[i], solution.confidence[i]) for i in known]
        there, options = list(known.values()), self.config.alignment
        return self._beside.submit(align, there, here, solution.K, options, solution.same_gauge)

    def _place_window(self, job: Job, solution: Solution, link: Link | None) -> np.ndarray:
        """Depth of the new keyframes, and poses [S, 4, 4] of the network, in the world."""
        job.link = link
        if link is not None:
            S = link.S_map_window
        else:  # the first camera stays where it was last seen, at first the origin of the world
            unit = geometry.similarity(self._unknown_scale(job.keyframes, solution), np.eye(4))
            S = job.keyframes[0].T_world_camera @ unit @ geometry.inverse(solution.T_window_camera[0])
        job.scale = float(geometry.scale_of(S))
        for keyframe, depth, confidence in zip(job.keyframes, solution.depth, solution.confidence, strict=True):
            if keyframe.dense is None:
                keyframe.dense = DepthMap(job.scale * depth, confidence, solution.K)
        return geometry.apply_similarity_to_pose(S, solution.T_window_camera)

    def _join(self, job: Job, T_world_camera: np.ndarray) -> None:
        """Take over poses [S, 4, 4] of the network."""
        overlap = len(job.keyframes) - len(job.new)
        for i, (keyframe, T) in enumerate(zip(job.keyframes, T_world_camera, strict=True)):
            if i < overlap:  # old pose and new one are blended, so that no step is left at the boundary
                T = geometry.interpolate_pose(keyframe.T_world_camera, T, (i + 1) / (overlap + 1))
            self._move(keyframe, T)

    def _refine(
        self, job: Job, views: Sequence[Keyframe | Support], T_world_camera: np.ndarray
    ) -> Callable[[], RefinedWindow | None] | None:
        """Begin to adjust these views to feature tracks, new ones from where the network has them [S, 4, 4]; returns
        what ends it.
        """
        refiner = self._refiner
        if refiner is None or len(job.keyframes) == 1:
            return None
        poses = {view.frame_index: view.T_world_camera for view in views}
        poses |= {keyframe.frame_index: T for keyframe, T in zip(job.keyframes, T_world_camera, strict=True)}
        priors = {k.frame_index: _prior(k.dense) for k in views if isinstance(k, Keyframe) and k.dense is not None}
        guess = [view.frame_index for view in views], np.stack([poses[v.frame_index] for v in views]), priors
        if self._scout is not None:  # which places frames meanwhile
            tracks = {keyframe.frame_index: tracks for keyframe, tracks in self._start_views}

            def start() -> RefinedWindow | None:
                refined = refiner.solve(*guess)
                if refined is not None:
                    for index, T in zip(refined.keyframe_ids, refined.T_world_camera, strict=True):
                        job.located[index] = refiner.locate(tracks[index], T)
                return refined

            return self._beside.submit(start).result
        if not refiner.is_calibrated:
            return partial(refiner.solve, *guess)
        pending = refiner.begin(*guess)
        assert pending is not None
        adjusted = self._beside.submit(pending.adjust)
        return lambda: refiner.end(pending, adjusted.result())

    def _take_refined(
        self, refiner: Refiner, first: Keyframe, views: Sequence[Keyframe | Support], refined: RefinedWindow
    ) -> None:
        """Depths of the adjusted views, and poses of all from the ``first`` on: later ones have followed."""
        assert self._preprocess is not None
        if self._preprocess.camera is None:  # the sparse map estimates the focal length too, and locks it
            self._solver.K = self._preprocess.resize.intrinsics_to_network(refined.K)
        for view, factor in zip(views, refined.depth_scale, strict=True):
            if isinstance(view, Keyframe) and view.dense is not None:
                K = view.dense.K if self._solver.K is None else self._solver.K
                view.dense = replace(view.dense, depth=(factor * view.dense.depth).astype(np.float32), K=K)
        self._follow(refiner, first)

    def _examine(self, job: Job, solution: Solution) -> list[Future[Examined]]:
        """Look closer at the new keyframes of a joined window, beside the stream."""
        assert self._preprocess is not None
        window, config, resize = job.keyframes, self.config, self._preprocess.resize
        rates = turn_rates(np.stack([k.T_world_camera for k in window]), np.array([k.stamp_ns for k in window]))
        sigmas = 0.5 * TIMING_SIGMA * rates  # half of the doubt about the instant is common to all frames
        is_deepened = self._refiner is not None and config.refine.dense
        views = [_dense_view(k, sigma) for k, sigma in zip(window, sigmas, strict=True)] if is_deepened else []

        def examine(
            keyframe: Keyframe, baseline: float, descriptor: np.ndarray, candidates: Sequence[Place]
        ) -> Examined:
            dense, rgb, corners = keyframe.dense, keyframe.rgb, keyframe.corners
            assert dense is not None
            assert rgb is not None
            assert corners is not None
            if views:
                own = window.index(keyframe)
                dense = _deepened(dense, views[own], views[:own] + views[own + 1 :])
            points = keyframe_points(dense.depth, dense.confidence, rgb, dense.K, baseline, config.map)
            place = make_place(keyframe.id, descriptor, corners.result(), dense, dense.K, resize, PLACE_CONFIDENCE)
            seen = (recognise(place, old, config.loops) for old in candidates)
            return Examined(dense, points, place, next((s for s in seen if s is not None), None))

        futures = []
        for keyframe, descriptor in zip(job.new, solution.descriptors[len(window) - len(job.new) :], strict=True):
            before = self._old_before(keyframe)
            candidates = self._loops.candidates(keyframe, descriptor, before, self._keyframes)
            baseline = _baseline(keyframe, window)  # now: the stream may move keyframes meanwhile
            futures.append(self._beside.submit(examine, keyframe, baseline, descriptor, candidates))
        return futures

    # -- places and loops ----------------------------------------------------------------------------------------

    def _old_before(self, keyframe: Keyframe) -> int:
        """Number of a keyframe before which a sighting of a place tells something new."""
        if self._unconnected_from is not None:
            return self._unconnected_from
        return max(keyframe.id - self.config.loops.min_gap, self._segment_from)

    def _remember(self, keyframe: Keyframe, examined: Examined, link_sigma: float) -> None:
        """Make a place of a new keyframe, join it to the pose graph and close loops.

        ``link_sigma``: of log scale, of the link between its window and the one before; 0 inside a window.
        """
        keyframe.median_depth = float(np.median(examined.dense.depth))
        keyframe.is_solved = True
        self._step(keyframe, link_sigma)
        loop = self._loops.judge(keyframe, examined.sighting, self._keyframes, self._unconnected_from)
        if loop is not None and self._unconnected_from is not None:
            self._connect(loop)
        elif loop is not None and not self._loops.is_urgent:  # the scale is confirmed
            self._found = None
        self._tie(keyframe)
        keyframe.place = self._places.add(examined.place)

    def _step(self, keyframe: Keyframe, link_sigma: float) -> None:
        """Join a new keyframe to the one before it; ``link_sigma``: of log scale, of the link between their windows."""
        before = self._keyframes.get(keyframe.id - 1)
        if before is None:
            return
        T = geometry.inverse(before.T_world_camera) @ keyframe.T_world_camera
        keyframe.travelled = before.travelled + keyframe.scale * float(np.linalg.norm(T[:3, 3]))
        if before.segment == keyframe.segment and before.is_solved:
            if keyframe.num_inliers is None:
                doubt = NETWORK_DOUBT if self._refiner is None else FIRST_DOUBT
                edge = step_edge(before.id, keyframe.id, T, keyframe.median_depth, doubt, link_sigma)
            else:  # the sparse map, not the link, holds the windows together
                edge = step_edge(before.id, keyframe.id, T, keyframe.median_depth, step_doubt(keyframe.num_inliers))
            self._loops.edges.append(edge)

    def _tie(self, keyframe: Keyframe) -> None:
        """A keyframe of a camera that was found again hangs on the place where it was found."""
        sighting = self._sightings.get(keyframe.frame_index)
        if sighting is not None:
            place = self._keyframes[sighting.place.keyframe_id]
            S = geometry.inverse(place.S_map_keyframe) @ keyframe.S_map_keyframe
            self._loops.edges.append(loop_edge(place.id, keyframe.id, S, place.median_depth, sighting.doubt))

    def _connect(self, loop: Edge) -> None:
        """Move a segment that hung on nothing to where a sighting says that it is."""
        assert self._unconnected_from is not None
        first, second = (self._keyframes[i].S_map_keyframe for i in (loop.first, loop.second))
        C = first @ loop.S_first_second @ geometry.inverse(second)
        self._S_map_world = C @ self._S_map_world
        for number in range(self._unconnected_from, self._next_keyframe):
            self._hang(self._keyframes[number], self._keyframes[number].T_world_camera, self._S_map_world)
        logger.info("segment of keyframe %d connected at keyframe %d", loop.second, loop.first)
        self._unconnected_from = None
        self._corrections += 1

    def _solve_loops(self) -> None:
        self._loops.submit({k.id: k.S_map_keyframe for k in self._keyframes.values() if k.is_solved})

    def _apply_loops(self) -> None:
        """Take over a solved pose graph. Happens when the window after the loop is solved, however long it took."""
        if not self._loops.is_running:
            return
        moved = self._loops.collect()
        S = np.stack(list(moved.values()))
        poses = geometry.make_T(geometry.project_to_so3(S[:, :3, :3]), S[:, :3, 3])
        for number, scale, T_map_camera in zip(moved, geometry.scale_of(S).tolist(), poses, strict=True):
            keyframe = self._keyframes[number]
            keyframe.scale, keyframe.T_map_camera = scale, T_map_camera
        last = self._keyframes[max(moved)]
        self._S_map_world = last.S_map_keyframe @ geometry.inverse(last.T_world_camera)
        for number in range(last.id + 1, self._next_keyframe):
            self._hang(self._keyframes[number], self._keyframes[number].T_world_camera, self._S_map_world)
        self._scale_filter.restart({k.id: k.scale for k in self._keyframes.values()})
        self._found = None
        self._corrections += 1

    def _measure_scale(self, keyframe: Keyframe) -> None:
        """Ask every source of metric scale about a new keyframe."""
        measurements = self._odometry.add([keyframe])
        measurements += [m for m in (from_depth(keyframe), from_height(keyframe, self.config.scale.camera_height)) if m]
        for m in measurements:
            self._add_scale(m)

    def _add_scale(self, measurement: Measurement) -> None:
        self._scale_filter.add(measurement, self._keyframes[measurement.keyframe_id].scale)

    @property
    def _scale(self) -> ScaleEstimate:
        return self._scale_filter.estimate

    def _unknown_scale(self, keyframes: Sequence[Keyframe], solution: Solution) -> float:
        """World units per window unit for a window that shares nothing with the map: as before, or as far away."""
        if not self._num_windows:
            return self._scouted_scale(keyframes, solution)
        if solution.same_gauge and self._last_report is not None:
            return float(np.exp(self._last_report.log_scale))
        before = [k.median_depth for k in self._keyframes.values() if k.is_solved]
        return before[-1] / float(np.median(solution.depth))

    def _scouted_scale(self, keyframes: Sequence[Keyframe], solution: Solution) -> float:
        """World units per unit of the first window: poses were given out in those of the scout."""
        if self._scout is None:
            return 1.0
        priors = [_prior(DepthMap(d, c, solution.K)) for d, c in zip(solution.depth, solution.confidence, strict=True)]
        ratios = [self._scout.depth_ratio(k.frame_index, p) for k, p in zip(keyframes, priors, strict=True)]
        known = [ratio for ratio in ratios if ratio is not None]
        return float(np.median(known)) if known else 1.0

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
        height, width = self._preprocess.resize.size
        return CameraModel(width, height, K)

    # -- poses and output ----------------------------------------------------------------------------------------

    def _advance_odometry(self, T_world_camera: np.ndarray) -> None:
        """Add the motion since the last frame, as it was seen before anything corrected the map."""
        if len(self._trajectory):
            T_last_camera = geometry.inverse(self._trajectory.world_pose(-1, self._keyframes)) @ T_world_camera
            T_last_camera[:3, 3] *= self._unit
            moved = self._T_odom_camera @ T_last_camera
            self._T_odom_camera = geometry.make_T(geometry.project_to_so3(moved[:3, :3]), moved[:3, 3])

    @property
    def _unit(self) -> float:
        """Output units per world unit, here and now."""
        return float(geometry.scale_of(self._S_map_world)) * self._scale.metres_per_unit

    def _pose_of(self, seen: Seen, estimate: Estimate, is_keyframe: bool) -> FramePose:
        """What is given out for the frame placed last."""
        T_map_camera = self._refresh_odom()
        to_output = np.diag([self._unit] * 3 + [1.0] * 3)
        cov = to_output @ (estimate.covariance + self._scale_doubt(estimate)) @ to_output
        if self._state is TrackingState.LOST or self._unconnected_from is not None:
            cov = np.eye(6) * LOST_SIGMA**2  # not where it is in the map, though its motion may be well known
        return FramePose(
            seen.frame.stamp_ns, seen.frame.frame_id, self._T_odom_camera, T_map_camera, cov, self._state, is_keyframe
        )

    def _scale_doubt(self, estimate: Estimate) -> np.ndarray:
        """Covariance [6, 6] of a found camera's way: its scale is that of one sighting until a loop tells it."""
        doubt = np.zeros(6)
        if self._found is not None:
            T = estimate.T_world_camera
            doubt[:3] = FOUND_SCALE_SIGMA * T[:3, :3].T @ (T[:3, 3] - self._found)
        return np.outer(doubt, doubt)

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

    def _answer(self, poses: Sequence[FramePose]) -> Update:
        return Update(poses=tuple(poses), T_map_odom=self._T_map_odom, state=self._state, scale=self._scale)

    def _update(self) -> Update:
        """What has happened to the map since the last one."""
        solved, self._solved = self._solved, []
        return replace(
            self._answer([]),
            points=self._batch([k.id for s in solved for k in s.keyframes]) if solved else None,
            depth=self._depth_image(solved[-1]) if solved else None,
            window=solved[-1].report if solved else None,
            map_changed=self._map_changed(),
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
        keyframe, dense = solved.keyframes[-1], solved.depth
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
        solved = [k for k in self._keyframes.values() if k.is_solved]
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
        """Write keyframes, places, points and pose graph to one file; ``OSError`` when that cannot be written."""
        self._catch_up()
        self._complete()
        keyframes = tuple(k for k in self._keyframes.values() if k.is_solved)
        known = {k.id for k in keyframes}
        points = {i: self._points[i] for i in known if i in self._points}
        edges = tuple(e for e in self._loops.edges if e.first in known and e.second in known)
        map_file.write(path, SavedMap(self._model_name, self._scale, keyframes, points, edges))

    def load_map(self, path: str | Path) -> None:
        """Start over inside a saved map: lost until the camera recognises a place.

        Raises:
            MapFileError: the file cannot be read, is damaged, or was made with another model.
        """
        saved = map_file.read(path)
        if saved.model != self._model_name:
            raise MapFileError(f"{path} was made with model {saved.model}, this is {self._model_name}; load that model")
        self.reset()
        for keyframe in saved.keyframes:
            self._keyframes[keyframe.id] = keyframe
            if keyframe.place is not None:
                keyframe.place = self._places.add(keyframe.place)
        for number, points in saved.points.items():
            self._points.set(number, points)
        self._loops.edges.extend(saved.edges)
        self._scale_filter.resume(saved.scale)
        self._next_keyframe = max(self._keyframes, default=-1) + 1
        self._segment, self._segment_from = 1, self._next_keyframe
        self._corrections += 1
        if self._keyframes:
            self._state = TrackingState.LOST
            self._is_starting = False

    @property
    def _model_name(self) -> str:
        return str(self._backbone.spec.name)


def _dense_view(keyframe: Keyframe, rotation_sigma: float) -> DenseView:
    assert keyframe.rgb is not None
    return DenseView(cv2.cvtColor(keyframe.rgb, cv2.COLOR_RGB2GRAY), keyframe.T_world_camera, rotation_sigma)


def _deepened(dense: DepthMap, view: DenseView, others: Sequence[DenseView]) -> DepthMap:
    depth, confidence = dense_depth(view, others, dense.depth, dense.confidence, dense.K)
    return replace(dense, depth=depth, confidence=confidence)


def _prior(dense: DepthMap) -> DepthPrior:
    """The network's depth, where it has any confidence."""
    known = dense.confidence > 0
    return DepthPrior(np.where(known, dense.depth, np.nan), expected_error(dense.confidence), dense.K)


def _inlier_confidence(num_inliers: int) -> float:
    """A few dozen points that agree are as good as many."""
    return 1.0 - float(np.exp(-num_inliers / 30))


def _baseline(keyframe: Keyframe, window: Sequence[Keyframe]) -> float:
    """Largest distance from this camera to another of its window."""
    centre = keyframe.T_world_camera[:3, 3]
    return max(float(np.linalg.norm(k.T_world_camera[:3, 3] - centre)) for k in window)
