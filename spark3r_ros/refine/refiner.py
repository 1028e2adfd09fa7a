"""The sparse map behind the stream: keyframes, their points, and the three ways of using them.

``track`` poses one frame, ``add_keyframe`` grows the map by one keyframe, ``solve`` adjusts a window.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from spark3r_ros.camera import undistort_points
from spark3r_ros.config import RefineConfig
from spark3r_ros.frame import CameraModel
from spark3r_ros.geometry import inverse, make_T
from spark3r_ros.refine.bootstrap import best_start, rays
from spark3r_ros.refine.bundle import Problem, Solution, adjust, without
from spark3r_ros.refine.keyframes import (
    Assembled,
    Keyframe,
    assemble,
    inverse_depth_priors,
    normalised,
    sigma_px,
    write_back,
)
from spark3r_ros.refine.landmarks import LandmarkTable, among, first_inverse_depth
from spark3r_ros.refine.pose import MIN_INLIERS, PoseFit, align_rays, fit_pose
from spark3r_ros.tracks import Tracks

logger = logging.getLogger(__name__)

_GATE_PX = 3.0
_DEFAULT_FOCAL = 0.85  # times the image width, when nothing is known
_DEFAULT_FOCAL_SIGMA = 0.3  # of its logarithm
_LOCKED_FOCAL_SIGMA = 0.003
_READOUT_SIGMA = 0.02  # seconds: a sensor's readout time, before anything is known about it
_LOCKED_READOUT_SIGMA = 0.001
_MODEL_DOUBT = 3.0  # the adjustment's own sigma of a camera parameter is too good by this much: residuals correlate
_LOCAL_FREE = 4  # keyframes that move when one is added
_LOCAL_POINTS = 300  # best-seen points that they are adjusted with
_WINDOW_POINTS = 700  # and that a window is adjusted with
_MAX_FIXED = 8  # older keyframes that hold them
_MIN_SHARED = 15  # tracks that make two keyframes neighbours
_RAY_THRESHOLD = 0.02  # radians
_UNSEEN_STEP = 0.2  # of the scene's distance: how far a camera may have moved where only its rotation is known


@dataclass(frozen=True, eq=False)
class DepthPrior:
    """A network's depth of one keyframe, in the scale of the world."""

    depth: np.ndarray  # [h, w] z along the optical axis; not finite or <= 0 where unknown
    error: np.ndarray  # [h, w] relative, as the network expects it
    K: np.ndarray  # [3, 3] of this depth image, undistorted


@dataclass(frozen=True, eq=False)
class TrackedPose:
    """The pose of one frame against the map."""

    T_world_camera: np.ndarray  # [4, 4]
    covariance: np.ndarray  # [6, 6] x y z, rotation about x y z; in the camera frame
    num_inliers: int
    residual_px: float  # median of the inliers; NaN without any
    is_reliable: bool  # False: too few points agreed; translation is a guess and the covariance says so
    anchors: Mapping[int, float]  # keyframes whose points hold it, with their shares of them: their errors are its own


@dataclass(frozen=True, eq=False)
class RefinedWindow:
    keyframe_ids: tuple[int, ...]
    T_world_camera: np.ndarray  # [S, 4, 4]
    K: np.ndarray  # [3, 3] of the undistorted camera image
    depth_scale: np.ndarray  # [S] multiply the network's depth by it; 1 where nothing could be compared
    xyz: np.ndarray  # [N, 3] the window's points, world
    residual_px: float  # median
    parallax_deg: float  # median over points of the widest angle between two of the window's rays
    confidence: float  # in [0, 1): of the translations; pure rotation and blank walls are near 0
    start: str  # which start won: "network", "essential 0-4", "rotation", ... or "map" after the first window


@dataclass(frozen=True, eq=False)
class PendingWindow:
    """A window between ``Refiner.begin`` and ``Refiner.end``."""

    window: list[Keyframe]
    depths: Mapping[int, DepthPrior]
    start: str
    assembled: Assembled | None
    iterations: int

    def adjust(self) -> Solution | None:
        """The work of it; touches nothing of the map and may run in any thread."""
        return None if self.assembled is None else _adjusted(self.assembled.problem, self.iterations)


class Refiner:
    """One map. ``camera`` None: the focal length is estimated, lens distortion taken for none."""

    def __init__(self, config: RefineConfig, width: int, height: int, camera: CameraModel | None = None) -> None:
        self._config = config
        self._camera = camera
        focal = _DEFAULT_FOCAL * width
        guess = np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1.0]])
        self.K = guess if camera is None else camera.K.astype(float).copy()
        self._height = height
        self._focal_sigma = _DEFAULT_FOCAL_SIGMA if camera is None else 0.0
        self._readout, self._readout_sigma = 0.0, _READOUT_SIGMA
        self._keyframes: dict[int, Keyframe] = {}
        self._motion: dict[int, np.ndarray] = {}  # [2, 3] of each keyframe, see Tracks
        self._table = LandmarkTable()
        self._windows = 0
        self._last: tuple[np.ndarray, np.ndarray] | None = None  # track numbers [N] and uv [N, 2] of the frame before

    @property
    def is_initialised(self) -> bool:
        return self._windows > 0

    @property
    def is_calibrated(self) -> bool:
        """Whether there is a map whose focal length stays as it is."""
        return self.is_initialised and self._focal_sigma == 0.0

    @property
    def num_landmarks(self) -> int:
        return len(self._table)

    def __contains__(self, keyframe_id: int) -> bool:
        return keyframe_id in self._keyframes

    def pose(self, keyframe_id: int) -> np.ndarray | None:
        """T_world_camera [4, 4] of a keyframe of the map; None before it has one."""
        keyframe = self._keyframes.get(keyframe_id)
        return None if keyframe is None else keyframe.T_world_camera

    # One frame

    def track(self, tracks: Tracks, T_guess: np.ndarray | None = None) -> TrackedPose | None:
        """Pose a frame against the map, starting at ``T_guess`` [4, 4], where the frame before was, or at the keyframe
        that it shares most with.

        None while there is no map, or when there is neither a guess nor a keyframe in common.
        """
        if not self.is_initialised:
            return None
        self._hear(tracks)
        uv_read, shutter = self._read(tracks.uv, tracks.motion)
        uv = uv_read - self._readout * shutter
        T_last_here = self._turn(tracks.ids, uv)
        if T_guess is None:
            nearest = self._nearest_keyframe(tracks.ids)
            if nearest is None:
                return None
            assert nearest.T_world_camera is not None
            guess = nearest.T_world_camera @ self._rotation(nearest.ids, nearest.uv, tracks.ids, uv)
        else:
            guess = T_guess @ T_last_here
        return self._located(tracks, uv, guess)

    def locate(self, tracks: Tracks, T_guess: np.ndarray) -> TrackedPose:
        """Pose a frame near ``T_guess`` [4, 4], whichever frame was tracked before. ``RuntimeError`` without a map."""
        if not self.is_initialised:
            raise RuntimeError("locate needs a map; call solve first")
        uv_read, shutter = self._read(tracks.uv, tracks.motion)
        return self._located(tracks, uv_read - self._readout * shutter, T_guess)

    def turned(self, keyframe_id: int, tracks: Tracks) -> np.ndarray:
        """T_keyframe_frame [4, 4] of a camera that has only turned since this keyframe; needs no map."""
        keyframe = self._keyframes[keyframe_id]
        return self._rotation(keyframe.ids, keyframe.uv, tracks.ids, self._read(tracks.uv, tracks.motion)[0])

    def go_on_from(self, other: Refiner) -> None:
        """Another map has tracked the same stream up to here: the frame before is its own."""
        self._last = other._last

    def _located(self, tracks: Tracks, uv: np.ndarray, guess: np.ndarray) -> TrackedPose:
        rows, found = self._table.find(tracks.ids)
        if found.sum() >= 6:
            rows = rows[found]
            fit = fit_pose(self._table.landmarks(rows, uv[found]), self.K, guess, sigma_px(tracks.speed))
            jump = float(np.linalg.norm(fit.T_world_camera[:3, 3] - guess[:3, 3]))
            if fit.inlier.sum() >= max(MIN_INLIERS, 0.2 * found.sum()) and jump < self._typical_depth():
                return self._tracked(fit, self._table.anchor[rows])
        return self._turned(tracks.ids, uv, guess)

    def _turn(self, ids: np.ndarray, uv: np.ndarray) -> np.ndarray:
        """Rotation [4, 4] of the points since the frame before: what a guess misses most when a camera turns fast."""
        last, self._last = self._last, (ids, uv)
        return np.eye(4) if last is None else self._rotation(*last, ids, uv)

    def _rotation(self, ids_a: np.ndarray, uv_a: np.ndarray, ids_b: np.ndarray, uv_b: np.ndarray) -> np.ndarray:
        """T_a_b [4, 4] that only turns: of two sets of points ``ids`` [N] at ``uv`` [N, 2]; identity of too few."""
        _, a, b = np.intersect1d(ids_a, ids_b, assume_unique=True, return_indices=True)
        if len(a) < MIN_INLIERS:
            return np.eye(4)
        R, inlier = align_rays(rays(uv_a[a], self.K), rays(uv_b[b], self.K), _RAY_THRESHOLD)
        return make_T(R, np.zeros(3)) if inlier.sum() >= MIN_INLIERS else np.eye(4)

    def _tracked(self, fit: PoseFit, anchor: np.ndarray) -> TrackedPose:
        """``anchor`` [N]: keyframes of the points that were fitted."""
        ids, counts = np.unique(anchor[fit.inlier], return_counts=True)
        anchors = dict(zip(ids.tolist(), (counts / counts.sum()).tolist(), strict=True))
        return TrackedPose(fit.T_world_camera, fit.covariance, int(fit.inlier.sum()), fit.residual_px, True, anchors)

    def _turned(self, ids: np.ndarray, uv: np.ndarray, guess: np.ndarray) -> TrackedPose:
        """Without enough points: the rotation against the nearest keyframe, the translation of the guess."""
        nearest, depth = self._nearest_keyframe(ids), self._typical_depth()
        covariance = np.diag([depth**2] * 3 + [1.0] * 3)
        T, inliers = guess.copy(), 0
        if nearest is not None and nearest.T_world_camera is not None:
            _, here, there = np.intersect1d(ids, nearest.ids, assume_unique=True, return_indices=True)
            if len(here) >= 8:
                R, inlier = align_rays(rays(nearest.uv[there], self.K), rays(uv[here], self.K), _RAY_THRESHOLD)
                inliers = int(inlier.sum())
                if inliers >= 8:
                    T[:3, :3] = nearest.T_world_camera[:3, :3] @ R
                    covariance = np.diag([(_UNSEEN_STEP * depth) ** 2] * 3 + [_RAY_THRESHOLD**2] * 3)
        anchors = {nearest.id: 1.0} if nearest is not None else {}
        return TrackedPose(T, covariance, inliers, float("nan"), False, anchors)

    # One keyframe

    def add_keyframe(
        self, keyframe_id: int, tracks: Tracks, pose: TrackedPose | None = None, adjust: bool = True
    ) -> TrackedPose | None:
        """Give depth to a keyframe's points and adjust it with its neighbours; before the first window: store.

        ``pose``: of the same frame, from ``track``; None: asked for here. ``adjust`` False leaves the adjustment to the
        next one. ``ValueError`` when the number is not larger than all before.
        """
        if self._keyframes and keyframe_id <= max(self._keyframes):
            raise ValueError(f"keyframe ids must grow, got {keyframe_id} after {max(self._keyframes)}")
        pose = pose or self.track(tracks)
        self._hear(tracks)
        noise = sigma_px(tracks.speed)
        keyframe = Keyframe(keyframe_id, tracks.ids, *self._read(tracks.uv, tracks.motion), self._readout, noise)
        self._motion[keyframe_id] = tracks.motion
        self._keyframes[keyframe_id] = keyframe
        if pose is None:
            return None
        keyframe.T_world_camera = pose.T_world_camera
        if pose.is_reliable and adjust:
            posed = self._posed()
            recent = posed[1:][-_LOCAL_FREE:]  # the first holds the world
            self._adjust(recent, self._neighbours(recent), iterations=4, max_points=_LOCAL_POINTS)
        self._extend([keyframe])
        self._forget()
        assert keyframe.T_world_camera is not None
        return replace(pose, T_world_camera=keyframe.T_world_camera)

    # One window

    def solve(
        self,
        keyframe_ids: Sequence[int],
        T_world_camera: np.ndarray | None = None,
        depths: Mapping[int, DepthPrior] | None = None,
    ) -> RefinedWindow | None:
        """Adjust the window's keyframes (all were added before); the first call makes the map.

        ``T_world_camera`` [S, 4, 4] and ``depths`` are a network's answer in the scale of the world; both may be None.
        None when the tracks do not allow a first map yet. ``KeyError`` for a keyframe that is not in the map.
        """
        pending = self.begin(keyframe_ids, T_world_camera, depths)
        return None if pending is None else self.end(pending, pending.adjust())

    def begin(
        self,
        keyframe_ids: Sequence[int],
        T_world_camera: np.ndarray | None = None,
        depths: Mapping[int, DepthPrior] | None = None,
    ) -> PendingWindow | None:
        """``solve`` up to the adjustment, which takes long, and may be done beside the stream.

        Frames may be tracked and keyframes added before ``end``: they follow the window's last keyframe then.
        """
        window = [self._keyframes[i] for i in sorted(keyframe_ids)]
        depths, start = depths or {}, "map"
        if not self.is_initialised:
            start = self._bootstrap(window, T_world_camera, depths)
            if not start:
                return None
        else:
            for i, keyframe in enumerate(window):
                if keyframe.T_world_camera is None and T_world_camera is not None:
                    keyframe.T_world_camera = T_world_camera[i]
        self._take_depths(window, depths)
        if self._focal_sigma > 0:  # the focal length moves: nothing that was solved with another one may hold still
            posed = self._posed()
            assembled, iterations = self._assemble(posed[1:], posed[:1], max_points=0, calibrate=True), 12
        else:
            posed = [k for k in window if k.T_world_camera is not None]
            fixed = self._neighbours(posed)
            if len(fixed) < 2:
                fixed, posed = fixed + posed[: 2 - len(fixed)], posed[2 - len(fixed) :]
            assembled, iterations = self._assemble(posed, fixed, max_points=_WINDOW_POINTS, calibrate=True), 5
        return PendingWindow(window, depths, start, assembled, iterations)

    def end(self, pending: PendingWindow, solution: Solution | None) -> RefinedWindow:
        """Take over what ``pending.adjust`` returned."""
        last = pending.window[-1].id
        later = [k for k in self._keyframes.values() if k.id > last]
        first = self._posed()[0]
        depth_before = self._typical_depth(first)
        is_taken = pending.assembled is not None and self._take_over(pending.assembled, solution, later)
        if self._focal_sigma > 0:
            T = first.T_world_camera
            assert T is not None
            self._move_world(np.eye(4), depth_before / self._typical_depth(first), T[:3, 3])
            is_known = is_taken and solution is not None and solution.focal_sigma < _LOCKED_FOCAL_SIGMA
            if self._windows >= 2 or is_known:
                self._focal_sigma = 0.0
        self._windows += 1
        self._extend(self._posed())
        return self._report(pending, solution if is_taken else None)

    def _bootstrap(self, window: list[Keyframe], T_network: np.ndarray | None, depths: Mapping[int, DepthPrior]) -> str:
        """Poses and points of the first window; the name of the start, empty when there is none."""
        start = best_start(window, self.K, T_network, self._focal_sigma)
        if start is None:
            return ""
        self.K = start.K
        for keyframe, T in zip(window, start.T_world_camera):
            keyframe.T_world_camera = T
        self._adjust(window[1:], window[:1], iterations=15, max_points=0, calibrate=True)
        scale, known = self._scale_to(window, depths)
        if not known and T_network is not None and (length := _path_length(T_network)) > 0:
            ours = np.stack([k.T_world_camera for k in window if k.T_world_camera is not None])
            scale = length / max(_path_length(ours), 1e-9)
        first = window[0].T_world_camera
        assert first is not None
        target = np.eye(4) if T_network is None else T_network[0]
        self._move_world(target @ inverse(first), scale, first[:3, 3])
        logger.info("first window: start %s, robust cost %.3f per observation", start.name, start.cost)
        return start.name

    def _scale_to(self, window: list[Keyframe], depths: Mapping[int, DepthPrior]) -> tuple[float, bool]:
        """World scale over the map's scale: of the network's depth, or what makes the median depth 1."""
        ratios = [self._depth_ratio(k, depths[k.id]) for k in window if k.id in depths]
        logs = np.log([r for r in ratios if r is not None])
        if len(logs):
            return float(np.exp(-np.median(logs))), True
        return 1.0 / self._typical_depth(window[0]), False

    def _move_world(self, T: np.ndarray, scale: float, origin: np.ndarray) -> None:
        """Scale the map around ``origin``, then move it by the rigid T."""
        for keyframe in self._keyframes.values():
            if keyframe.T_world_camera is not None:
                moved = keyframe.T_world_camera.copy()
                moved[:3, 3] = origin + scale * (moved[:3, 3] - origin)
                keyframe.T_world_camera = T @ moved
        for name in ("xyz", "origin"):
            points = origin + scale * (getattr(self._table, name) - origin)
            setattr(self._table, name, points @ T[:3, :3].T + T[:3, 3])

    # Adjustment

    def _adjust(
        self, free: list[Keyframe], fixed: list[Keyframe], iterations: int, max_points: int, calibrate: bool = False
    ) -> None:
        """Adjust the free keyframes and all they see, and store what comes out."""
        assembled = self._assemble(free, fixed, max_points, calibrate)
        if assembled is not None:
            self._take_over(assembled, _adjusted(assembled.problem, iterations), [])

    def _assemble(
        self, free: list[Keyframe], fixed: list[Keyframe], max_points: int, calibrate: bool
    ) -> Assembled | None:
        """``calibrate``: with what is not known yet about the camera."""
        focal_sigma = self._focal_sigma if calibrate else 0.0
        readout_sigma = self._readout_sigma if calibrate and self._readout_sigma > _LOCKED_READOUT_SIGMA else 0.0
        members = sorted(free + fixed, key=lambda k: k.id)
        T = np.stack([k.T_world_camera for k in members if k.T_world_camera is not None])
        free_ids = {k.id for k in free}
        is_free = np.array([k.id in free_ids for k in members])
        return assemble(members, T, is_free, self._table, self.K, focal_sigma, readout_sigma, max_points)

    def _take_over(self, assembled: Assembled, solution: Solution | None, later: list[Keyframe]) -> bool:
        """Store it, unless a camera would have moved by the distance of the scene: wrong matches led it there."""
        if solution is None:
            return False
        problem = assembled.problem
        moved = np.linalg.norm(solution.T_world_camera[:, :3, 3] - problem.T_world_camera[:, :3, 3], axis=1)
        if self.is_initialised and moved.max() > self._typical_depth():
            return False
        write_back(assembled, solution, self._table, later, _GATE_PX)
        if problem.focal_sigma > 0:
            self.K = self.K.copy()
            self.K[[0, 1], [0, 1]] = solution.focal
        if problem.readout_sigma > 0:
            self._learn_readout(solution)
        return True

    def _learn_readout(self, solution: Solution) -> None:
        """The window's estimate is the next window's prior."""
        self._readout = solution.readout
        self._readout_sigma = min(self._readout_sigma, _MODEL_DOUBT * solution.readout_sigma)
        for keyframe in self._keyframes.values():
            keyframe.readout = self._readout

    def _extend(self, keyframes: Sequence[Keyframe]) -> None:
        """Give a first depth to points of these keyframes that have none; a lone observation gets its prior."""
        posed = self._posed()
        if not posed:
            return
        wanted = np.unique(np.concatenate([k.ids[k.good] for k in keyframes if k.T_world_camera is not None]))
        wanted = wanted[~self._table.find(wanted)[1]]
        if len(wanted) == 0:
            return
        rows = [np.flatnonzero(k.good & among(k.ids, wanted)) for k in posed]
        ids = np.concatenate([k.ids[r] for k, r in zip(posed, rows)])
        order = np.argsort(ids, kind="stable")
        unique, starts, point = np.unique(ids[order], return_index=True, return_inverse=True)
        camera = np.repeat(np.arange(len(posed)), [len(r) for r in rows])[order]
        observation = np.concatenate(rows)[order]
        uv = np.concatenate([k.uv[r] for k, r in zip(posed, rows)])[order]
        T = np.stack([k.T_world_camera for k in posed if k.T_world_camera is not None])
        anchor = camera[starts]
        prior, sigma = inverse_depth_priors(posed, T, self._table, anchor, observation[starts])
        xy = normalised(uv, self.K)
        noise = np.array([k.sigma_px for k in posed])[anchor] / self.K[0, 0]
        inverse_depth, information = first_inverse_depth(
            T, xy, camera, point, anchor, xy[starts], prior, (noise / prior / sigma) ** 2
        )
        local = np.concatenate([xy[starts], np.ones((len(starts), 1))], axis=1) / inverse_depth[:, None]
        origin = T[anchor, :3, 3]
        xyz = np.einsum("pij,pj->pi", T[anchor, :3, :3], local) + origin
        anchor_ids = np.array([k.id for k in posed])[anchor]
        self._table.put(unique, xyz, noise / np.sqrt(information) / inverse_depth, anchor_ids, origin)

    # The network's depth

    def _sample(self, keyframe: Keyframe, prior: DepthPrior) -> tuple[np.ndarray, np.ndarray]:
        """Depth and its expected error [N] at the keyframe's tracks; NaN where there is none."""
        uv = normalised(keyframe.uv, self.K) * np.array([prior.K[0, 0], prior.K[1, 1]]) + prior.K[:2, 2]
        height, width = prior.depth.shape
        column, row = np.rint(uv).astype(int).T
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        values = np.full((2, len(uv)), np.nan)
        values[:, inside] = prior.depth[row[inside], column[inside]], prior.error[row[inside], column[inside]]
        depth, error = np.where(values[0] > 0, values, np.nan)
        return depth, error

    def depth_ratio(self, keyframe_id: int, prior: DepthPrior) -> float | None:
        """Map depth over a network's depth of a keyframe; None when the map does not have it, or has too few points."""
        return self._depth_ratio(self._keyframes[keyframe_id], prior) if keyframe_id in self else None

    def _depth_ratio(self, keyframe: Keyframe, prior: DepthPrior) -> float | None:
        """Map depth over the network's depth: median over well-known points; None with fewer than ten."""
        T = keyframe.T_world_camera
        rows, found = self._table.find(keyframe.ids)
        if T is None or not found.any():
            return None
        found &= self._table.depth_sigma[rows] < 0.2
        depth = (self._table.xyz[rows[found]] - T[:3, 3]) @ T[:3, 2]
        ratio = depth / self._sample(keyframe, prior)[0][found]
        ratio = ratio[np.isfinite(ratio) & (ratio > 0)]
        return float(np.median(ratio)) if len(ratio) >= 10 else None

    def _take_depths(self, window: list[Keyframe], depths: Mapping[int, DepthPrior]) -> None:
        for keyframe in window:
            if keyframe.id in depths:
                keyframe.network_depth, keyframe.network_error = self._sample(keyframe, depths[keyframe.id])

    # Book-keeping

    def _hear(self, tracks: Tracks) -> None:
        """Points that earlier keyframes turned out to show."""
        for late in tracks.late:
            keyframe = self._keyframes.get(late.keyframe_id)
            if keyframe is not None and not among(late.ids, keyframe.ids).all():
                keyframe.add(late.ids, *self._read(late.uv, self._motion[keyframe.id]))
                if keyframe.T_world_camera is not None:
                    self._extend([keyframe])

    def _read(self, uv: np.ndarray, motion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Undistorted pixels [N, 2] as read, and what a second of readout moved them [N, 2]."""
        late = uv[:, 1:] / self._height - 0.5
        shutter = late * (uv @ motion[:, :2].T + motion[:, 2])
        return (uv.astype(float) if self._camera is None else undistort_points(self._camera, uv)), shutter

    def _posed(self) -> list[Keyframe]:
        return [k for k in self._keyframes.values() if k.T_world_camera is not None]

    def _nearest_keyframe(self, ids: np.ndarray) -> Keyframe | None:
        shared = {k.id: int(among(ids, k.ids).sum()) for k in self._posed()}
        if not shared or max(shared.values()) == 0:
            return None
        return self._keyframes[max(shared, key=lambda i: (shared[i], i))]

    def _neighbours(self, free: list[Keyframe]) -> list[Keyframe]:
        """Posed keyframes outside of ``free`` that share the most tracks with it."""
        inside = {k.id for k in free}
        seen = np.unique(np.concatenate([k.ids[k.good] for k in free])) if free else np.zeros(0, np.int64)
        shared = [(int(among(k.ids, seen).sum()), k.id) for k in self._posed() if k.id not in inside]
        best = sorted((s for s in shared if s[0] >= _MIN_SHARED), reverse=True)[:_MAX_FIXED]
        return [self._keyframes[i] for _, i in best]

    def _forget(self) -> None:
        """Keep the map bounded: the oldest keyframes go, and the points that no kept keyframe sees."""
        excess = len(self._keyframes) - self._config.max_keyframes
        if excess <= 0:
            return
        gone = [self._keyframes.pop(keyframe_id) for keyframe_id in sorted(self._keyframes)[:excess]]
        unseen = np.unique(np.concatenate([k.ids for k in gone]))
        for keyframe in self._keyframes.values():
            unseen = unseen[~among(unseen, keyframe.ids)]
        self._table.drop(unseen)
        for keyframe in gone:
            del self._motion[keyframe.id]

    def _typical_depth(self, keyframe: Keyframe | None = None) -> float:
        """Median depth of the points that a keyframe (the last one) sees; 1 without any."""
        posed = self._posed()
        if keyframe is None and posed:
            keyframe = posed[-1]
        if keyframe is None or keyframe.T_world_camera is None:
            return 1.0
        rows, found = self._table.find(keyframe.ids)
        if not found.any():
            return 1.0
        T = keyframe.T_world_camera
        depth = (self._table.xyz[rows[found]] - T[:3, 3]) @ T[:3, 2]
        return float(np.median(depth[depth > 0])) if (depth > 0).any() else 1.0

    def _report(self, pending: PendingWindow, solution: Solution | None) -> RefinedWindow:
        window, depths, assembled = pending.window, pending.depths, pending.assembled
        scale = np.ones(len(window))
        for i, keyframe in enumerate(window):
            ratio = self._depth_ratio(keyframe, depths[keyframe.id]) if keyframe.id in depths else None
            scale[i] = 1.0 if ratio is None else ratio
        poses = [k.T_world_camera if k.T_world_camera is not None else make_T(np.eye(3), np.zeros(3)) for k in window]
        blank = RefinedWindow(
            tuple(k.id for k in window), np.stack(poses), self.K, scale,
            np.zeros((0, 3)), float("nan"), 0.0, 0.0, pending.start,
        )  # fmt: skip
        if assembled is None or solution is None:
            return blank
        finite = solution.residual_px[np.isfinite(solution.residual_px)]
        residual = float(np.median(finite)) if len(finite) else float("nan")
        parallax = _parallax(assembled, solution)
        kept = float((solution.residual_px < _GATE_PX).mean())
        known = float((solution.depth_sigma < 0.3).mean())
        confidence = kept * known * float(1.0 - np.exp(-parallax / 1.0)) * float(np.exp(-((residual / 3.0) ** 2)))
        return replace(
            blank, xyz=solution.xyz, residual_px=residual, parallax_deg=parallax, confidence=min(confidence, 0.999)
        )


def _adjusted(problem: Problem, iterations: int) -> Solution:
    """Adjust, drop outliers, adjust again."""
    solution = adjust(problem, iterations)
    inlier = solution.residual_px < _GATE_PX
    if inlier.mean() >= 0.98 or inlier.sum() <= 20:
        return solution
    again = adjust(_restarted(without(problem, inlier), solution), max(2, iterations // 3))
    residual = np.full(len(inlier), np.inf)
    residual[inlier] = again.residual_px
    return replace(again, residual_px=residual)


def _path_length(T_world_camera: np.ndarray) -> float:
    return float(np.linalg.norm(np.diff(T_world_camera[:, :3, 3], axis=0), axis=1).sum())


def _restarted(problem: Problem, solution: Solution) -> Problem:
    return replace(
        problem,
        T_world_camera=solution.T_world_camera,
        focal=solution.focal,
        xyz=solution.xyz,
    )


def _parallax(assembled: Assembled, solution: Solution) -> float:
    """Median over points of the widest angle in degrees between the anchor's ray and another."""
    problem = assembled.problem
    rays_here = solution.xyz[problem.point] - solution.T_world_camera[problem.camera, :3, 3]
    rays_anchor = (solution.xyz - solution.T_world_camera[problem.anchor, :3, 3])[problem.point]
    cosine = (rays_here * rays_anchor).sum(axis=1)
    cosine /= np.maximum(np.linalg.norm(rays_here, axis=1) * np.linalg.norm(rays_anchor, axis=1), 1e-12)
    widest = np.ones(len(assembled.ids))
    np.minimum.at(widest, problem.point, cosine)
    return float(np.degrees(np.median(np.arccos(np.clip(widest, -1.0, 1.0)))))
