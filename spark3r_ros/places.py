"""What a keyframe remembers of how its place looks, and how to recognise it: for loops, lost cameras and saved maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from spark3r_ros import geometry
from spark3r_ros.alignment import weighted_median
from spark3r_ros.camera import undistort_points
from spark3r_ros.config import LoopConfig
from spark3r_ros.frame import CameraModel
from spark3r_ros.matching import hamming, mutual_best
from spark3r_ros.preprocess import Resize
from spark3r_ros.windows import DepthMap

REPROJECTION = 0.006  # of rays with z = 1: three pixels at a focal length of 500
RANSAC_ROUNDS = 300
DEPTH_SIGMA = 0.1  # of the log of one corner's depth, as a network sees it
DISTINCT = 0.85  # of the second best match's distance that the best one stays below
MAX_BITS = 64  # of 256 in which two corners that match may differ
SURE_CORNERS = 100  # errors of sightings grow as corners get fewer, in proportion (measured on rendered circuits)


@dataclass(frozen=True, eq=False)
class Corners:
    """Described corners of one frame."""

    uv: np.ndarray  # [N, 2] float32 pixels of the undistorted camera image
    orb: np.ndarray  # [N, 32] uint8


@dataclass(frozen=True, eq=False)
class Place:
    """A keyframe as it can be recognised. Lengths are in the world units of its keyframe."""

    keyframe_id: int
    descriptor: np.ndarray  # [C] float32, unit length
    xy: np.ndarray  # [N, 2] float32 rays (z = 1) of the corners
    depth: np.ndarray  # [N] float32; NaN where it is not trusted
    orb: np.ndarray  # [N, 32] uint8

    @property
    def xyz(self) -> np.ndarray:
        """Corners [N, 3] in the camera of the keyframe."""
        return np.concatenate([self.xy, np.ones((len(self.xy), 1), np.float32)], axis=1) * self.depth[:, None]


@dataclass(frozen=True, eq=False)
class Sighting:
    """A place seen again."""

    place: Place
    S_place_query: np.ndarray  # [4, 4] similarity: query units and camera to the place's
    num_inliers: int
    log_scale: float  # place units per query unit; 0 when the query has no depth of its own
    scale_spread: float  # disagreement of the two cameras about it; NaN without the query's depth
    inlier_xyz: np.ndarray  # [M, 3] the agreeing corners in the query's camera, in the place's units
    inlier_xy: np.ndarray  # [M, 2] where the query sees them

    @property
    def doubt(self) -> float:
        """How much less certain it is than one of many corners."""
        return max(1.0, SURE_CORNERS / self.num_inliers)


def describe(gray: np.ndarray, camera: CameraModel | None, max_corners: int) -> Corners:
    """ORB corners of a camera image [H, W] uint8, spread over the image."""
    detector = cv2.ORB_create(nfeatures=3 * max_corners, fastThreshold=10)  # type: ignore[attr-defined]
    keypoints, orb = detector.detectAndCompute(gray, None)
    if orb is None:
        return Corners(np.zeros((0, 2), np.float32), np.zeros((0, 32), np.uint8))
    uv = np.array([k.pt for k in keypoints], np.float32)
    response = np.array([k.response for k in keypoints])
    keep = _spread(uv, response, gray.shape, max_corners)
    uv, orb = uv[keep], orb[keep]
    if camera is not None:
        uv = undistort_points(camera, uv).astype(np.float32)
    return Corners(uv, orb)


def _spread(uv: np.ndarray, response: np.ndarray, shape: tuple[int, ...], count: int) -> np.ndarray:
    """The strongest corners, in turn from each cell of an 8 x 6 grid."""
    cell = (uv[:, 0] * 8 // shape[1]).astype(int) * 6 + (uv[:, 1] * 6 // shape[0]).astype(int)
    order = np.lexsort((-response, cell))
    starts = np.r_[0, np.flatnonzero(np.diff(cell[order])) + 1]
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    best = np.lexsort((-response[order], rank))[:count]
    return np.sort(order[best])


def make_place(
    keyframe_id: int,
    descriptor: np.ndarray,
    corners: Corners,
    dense: DepthMap | None,
    K: np.ndarray,
    resize: Resize,
    min_confidence: float,
) -> Place:
    """Give the corners rays and depths.

    Args:
        keyframe_id: whose place it is.
        descriptor: [C].
        corners: of the camera image.
        dense: the keyframe's depth; None for a frame that has none.
        K: [3, 3] in pixels of the network's image.
        resize: from the camera's pixels to the network's.
        min_confidence: depths below are not trusted.
    """
    uv = resize.to_network(corners.uv)
    xy = ((uv - K[:2, 2]) / np.array([K[0, 0], K[1, 1]])).astype(np.float32)
    depth = np.full(len(xy), np.nan, np.float32)
    if dense is not None:
        height, width = dense.depth.shape
        column, row = np.rint(uv).astype(int).T
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        value, sure = dense.depth[row[inside], column[inside]], dense.confidence[row[inside], column[inside]]
        depth[inside] = np.where((sure >= min_confidence) & (value > 0), value, np.nan)
    return Place(keyframe_id, descriptor.astype(np.float32), xy, depth, corners.orb)


def recognise(query: Place, place: Place, config: LoopConfig) -> Sighting | None:
    """Where the query's camera stands relative to a place, or None when it does not see it.

    The pose comes from the place's corners seen by the query. When the query has depths too, the ratio of depths in the
    query's own camera gives the scale, the same the other way round must agree in scale and pose, and both are then
    solved jointly: one similarity that must explain what either camera sees of the other's corners.
    """
    mine, theirs = _match(query.orb, place.orb)
    forward = _pose(place.xyz[theirs], query.xy[mine], config.min_inliers)
    if forward is None:
        return None
    T_query_place, inlier = forward
    xyz = geometry.transform(T_query_place, place.xyz[theirs][inlier].astype(float))  # query camera, place units
    own = query.depth[mine][inlier].astype(float)
    known = np.isfinite(own)
    log_scale, spread = 0.0, float("nan")
    if known.sum() >= config.min_inliers // 2:
        log_scale = _log_ratio(xyz[known, 2], own[known])
        backward = _pose(query.xyz[mine], place.xy[theirs], config.min_inliers)
        if backward is None:
            return None
        spread = _disagreement(T_query_place, log_scale, backward, query, place, mine, theirs)
        if not spread <= config.max_scale_spread:
            return None
        pairs = _Pairs(place.xyz[theirs].astype(float), query.xyz[mine].astype(float), place.xy[theirs], query.xy[mine])
        T_query_place, log_scale = _solve_jointly(T_query_place, log_scale, pairs)
        if min(pairs.num_agreeing(T_query_place, log_scale)) < config.min_inliers:
            return None
        xyz = geometry.transform(T_query_place, place.xyz[theirs][inlier].astype(float))
    S_place_query = geometry.inverse(T_query_place) @ geometry.similarity(float(np.exp(log_scale)), np.eye(4))
    return Sighting(place, S_place_query, len(inlier), log_scale, spread, xyz, query.xy[mine][inlier])


def _log_ratio(target: np.ndarray, source: np.ndarray) -> float:
    ok = (target > 0) & (source > 0)
    return weighted_median(np.log(target[ok] / source[ok]), np.ones(int(ok.sum()))) if ok.any() else float("inf")


def _disagreement(
    T_query_place: np.ndarray,
    log_scale: float,
    backward: tuple[np.ndarray, np.ndarray],
    query: Place,
    place: Place,
    mine: np.ndarray,
    theirs: np.ndarray,
) -> float:
    """How far both directions are apart: in log scale, in radians, in translation over the distance of the scene."""
    T_place_query, inlier = backward
    xyz = geometry.transform(T_place_query, query.xyz[mine][inlier].astype(float))  # place camera, query units
    own = place.depth[theirs][inlier].astype(float)
    known = np.isfinite(own)
    if known.sum() < 5:
        return float("inf")
    back = _log_ratio(own[known], xyz[known, 2])
    moved = T_place_query.copy()
    moved[:3, 3] *= np.exp(log_scale)
    loop = T_query_place @ moved
    shift = float(np.linalg.norm(loop[:3, 3])) / float(np.median(own[known]))
    return max(abs(back - log_scale), float(geometry.rotation_angle(loop[:3, :3])), shift)


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Corners that two cameras share: M of them, each with what both know of it; NaN where a depth is not known."""

    place_xyz: np.ndarray  # [M, 3] camera and units of the place
    query_xyz: np.ndarray  # [M, 3] camera and units of the query
    place_xy: np.ndarray  # [M, 2] rays (z = 1)
    query_xy: np.ndarray  # [M, 2]

    def errors(self, T_query_place: np.ndarray, log_scale: np.ndarray) -> np.ndarray:
        """[..., 5, M] for poses [..., 4, 4] and log scales [...]: how far the place's corners lie off the query's rays
        (2), the query's off the place's (2), and by how much their depths differ in log; over the sigma of each, and
        zero where something is not known."""
        S_place_query = geometry.inverse(T_query_place)
        S_place_query[..., :3, :3] *= np.exp(log_scale)[..., None, None]
        forward = geometry.transform(T_query_place, self.place_xyz)  # [..., M, 3] query camera, place units
        backward = geometry.transform(S_place_query, self.query_xyz)
        rows = []
        with np.errstate(all="ignore"):
            for moved, rays in ((forward, self.query_xy), (backward, self.place_xy)):
                off = (moved[..., :2] / moved[..., 2:] - rays) / REPROJECTION
                off[~(moved[..., 2] > 0)] = np.nan
                rows += [off[..., 0], off[..., 1]]
            rows.append((np.log(forward[..., 2] / self.query_xyz[:, 2]) - log_scale[..., None]) / DEPTH_SIGMA)
        return np.nan_to_num(np.stack(rows, axis=-2), nan=0.0, posinf=0.0, neginf=0.0)

    def num_agreeing(self, T_query_place: np.ndarray, log_scale: float) -> tuple[int, int]:
        """Corners of the place that the query sees where they should be, and the other way round."""
        errors = self.errors(T_query_place, np.array(log_scale))
        there, back = (np.hypot(errors[i], errors[i + 1]) for i in (0, 2))
        return int(np.sum((there < 1) & (there > 0))), int(np.sum((back < 1) & (back > 0)))


def _solve_jointly(T_query_place: np.ndarray, log_scale: float, pairs: _Pairs) -> tuple[np.ndarray, float]:
    """The pose and log scale (place units per query unit) that both cameras agree on best: IRLS (Cauchy)."""
    nudges = 1e-6 * np.eye(8, 7, -1)  # none, then one along each axis
    T_nudges = geometry.se3_exp(nudges[:, :6])
    for _ in range(8):
        errors = pairs.errors(T_nudges @ T_query_place, log_scale + nudges[:, 6]).reshape(8, -1)  # [8, 5 M]
        error, J = errors[0], (errors[1:] - errors[0]).T / 1e-6
        weight = 1 / (1 + error**2)
        step = np.linalg.lstsq((J * weight[:, None]).T @ J + 1e-9 * np.eye(7), -J.T @ (weight * error), rcond=None)[0]
        T_query_place, log_scale = geometry.se3_exp(step[:6]) @ T_query_place, log_scale + float(step[6])
        if np.abs(step).max() < 1e-4:  # a hundredth of what a sight is good to
            break
    return geometry.make_T(geometry.project_to_so3(T_query_place[:3, :3]), T_query_place[:3, 3]), log_scale


def _match(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of mutually best ORB descriptors that are clearly better than the second best."""
    none = np.zeros(0, int)
    if len(a) < 2 or len(b) < 2:
        return none, none
    distance = hamming(a, b)
    rows, columns = mutual_best(distance)
    first, second = distance[rows, columns], np.partition(distance[rows], 1, axis=1)[:, 1]
    good = (first < DISTINCT * second) & (first <= MAX_BITS)
    return rows[good], columns[good]


def _pose(xyz: np.ndarray, xy: np.ndarray, min_inliers: int) -> tuple[np.ndarray, np.ndarray] | None:
    """T_camera_points [4, 4] and inlier rows from points [N, 3] and the rays [N, 2] that see them."""
    usable = np.flatnonzero(np.isfinite(xyz).all(axis=1))
    if len(usable) < min_inliers:
        return None
    points, rays = np.ascontiguousarray(xyz[usable], float), np.ascontiguousarray(xy[usable], float)
    found, w, t, inliers = cv2.solvePnPRansac(
        points, rays, np.eye(3), None, iterationsCount=RANSAC_ROUNDS, reprojectionError=REPROJECTION,
        confidence=0.999, flags=cv2.SOLVEPNP_P3P,
    )  # fmt: skip
    if not found or inliers is None or len(inliers) < min_inliers:
        return None
    rows = inliers.ravel()
    for _ in range(2):  # three points make a rough pose, which misses some of those that agree with the refined one
        w, t = cv2.solvePnPRefineLM(points[rows], rays[rows], np.eye(3), None, w, t)
        T = geometry.make_T(geometry.so3_exp(w.ravel()), t.ravel())
        moved = geometry.transform(T, points)
        with np.errstate(divide="ignore", invalid="ignore"):
            error = np.linalg.norm(moved[:, :2] / moved[:, 2:] - rays, axis=1)
        rows = np.flatnonzero((error < REPROJECTION) & (moved[:, 2] > 0))
        if len(rows) < min_inliers:
            return None
    return T, usable[rows]


class PlaceStore:
    """All places by keyframe, and the lookup of those that look alike.

    Memory for ``capacity`` places of ``max_corners`` is claimed once; what does not fit in there has its own.
    """

    def __init__(self, capacity: int = 0, max_corners: int = 0) -> None:
        self._places: dict[int, Place] = {}
        rows = (capacity, max_corners)  # np.full makes them resident, np.zeros would not
        self._xy, self._depth = np.full((*rows, 2), 0, np.float32), np.full(rows, 0, np.float32)
        self._orb = np.full((*rows, 32), 0, np.uint8)
        self._free_rows = list(range(capacity))
        self._rows: dict[int, int] = {}  # by keyframe, of places that lie in these arrays
        self._descriptors = np.zeros((0, 0), np.float32)  # [capacity, C]
        self._ids = np.zeros(0, np.int64)  # [capacity]
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Place]:
        return iter(self._places.values())

    def __getitem__(self, keyframe_id: int) -> Place:
        return self._places[keyframe_id]

    def __contains__(self, keyframe_id: int) -> bool:
        return keyframe_id in self._places

    @property
    def ids(self) -> list[int]:
        return list(self._places)

    def add(self, place: Place) -> Place:
        """Returns the place as it is kept: good until it is removed."""
        if self._count == len(self._ids):
            more = max(64, self._count)
            room = np.zeros((more, len(place.descriptor)), np.float32)
            self._descriptors = np.concatenate([self._descriptors, room]) if self._count else room
            self._ids = np.concatenate([self._ids, np.zeros(more, np.int64)])
        self._descriptors[self._count] = place.descriptor
        self._ids[self._count] = place.keyframe_id
        self._count += 1
        if self._free_rows and len(place.xy) <= self._xy.shape[1]:
            place = self._moved(place)
        self._places[place.keyframe_id] = place
        return place

    def _moved(self, place: Place) -> Place:
        row = self._rows[place.keyframe_id] = self._free_rows.pop()
        count = len(place.xy)
        kept = replace(place, xy=self._xy[row, :count], depth=self._depth[row, :count], orb=self._orb[row, :count])
        kept.xy[:], kept.depth[:], kept.orb[:] = place.xy, place.depth, place.orb
        return kept

    def remove(self, keyframe_id: int) -> None:
        """Forget one place; the last descriptor moves into the row of its own."""
        del self._places[keyframe_id]
        if keyframe_id in self._rows:
            self._free_rows.append(self._rows.pop(keyframe_id))
        self._count -= 1
        row = int(np.flatnonzero(self._ids[: self._count + 1] == keyframe_id)[0])
        self._descriptors[row], self._ids[row] = self._descriptors[self._count], self._ids[self._count]

    def similar(self, descriptor: np.ndarray, count: int, spacing: int, before: int | None = None) -> Sequence[Place]:
        """Places that look most alike, best first, no two within ``spacing`` keyframes; only ids below ``before``.

        Descriptors are compared after the mean of all places is taken away: what all images of a scene share tells
        nothing about where in it they are.
        """
        known, ids = self._descriptors[: self._count], self._ids[: self._count]
        allowed = np.ones(self._count, bool) if before is None else ids < before
        if not allowed.any():
            return []
        mean = known.mean(axis=0)
        centred, wanted = known - mean, descriptor - mean
        norms = np.linalg.norm(centred, axis=1) * np.linalg.norm(wanted)
        score = np.where(allowed, centred @ wanted / np.maximum(norms, 1e-12), -np.inf)
        chosen: list[int] = []
        for row in np.argsort(-score, kind="stable"):
            if len(chosen) == count or not np.isfinite(score[row]):
                break
            if all(abs(int(ids[row]) - c) > spacing for c in chosen):
                chosen.append(int(ids[row]))
        return [self._places[c] for c in chosen]
