"""Feature tracks: which pixel of this frame shows the same point as which pixel of earlier frames.

Corners are followed from frame to frame by pyramidal Lucas-Kanade, which starts where dense flow between thumbnails
says, with a check backwards that starts from the flow back; then they are settled on their patch in the last keyframe,
turned as the image has turned since, so that errors do not add up in between. When too few survive (blur, a jump),
matched ORB corners tell where to look for the points of the last keyframes. Where frames come slowly baselines are
wide: SIFT descriptors find the points again; such finds may name points of an earlier keyframe that nobody had asked
for, which is what ``Tracks.late`` reports.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import cv2
import numpy as np
from scipy.spatial import cKDTree

from spark3r_ros.camera import undistort_points
from spark3r_ros.config import RefineConfig
from spark3r_ros.frame import CameraModel
from spark3r_ros.matching import hamming, mutual_best

_WINDOW = (17, 17)
_LEVELS = 4  # of the pyramid above the image itself, where nothing says where to look
_GUIDED_LEVELS = 1  # where something does: more only find what looks alike
_SETTLING_LEVELS = 0  # and where it is known to a pixel or two
_THUMBNAIL = (80, 60)  # pixels: for dense flow
_CORNERS, _CORNERS_SCALE = 500, 0.5  # that guide from a keyframe: how many, in an image of which size
_GUIDES = 3  # nearest matches that say how a point has moved
_NEIGHBOURS = 5  # nearest points that say whether it has
_ALIKE = 0.0125  # of the image's width, that its motion may differ from theirs
_STOP = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 20, 0.02)
_FORWARD_BACKWARD_PX = 0.8
_TURNED = 0.03  # by which a patch has been turned or scaled, as a share of its size, before that is undone
_PLANE_PX = 4.0  # from the homography of most points, to be of them
_SETTLE_PX = 2.0  # a point that its keyframe patch moves further than this is kept where the chain left it
_EPIPOLAR_PX = 1.5
_MIN_MATCHES = 16
SLOW_S = 0.3  # seconds between frames that leave time, and bring baselines, for descriptors of the whole image
CALM_S = 0.5  # seconds between keyframes that leave time for more points
_MORE_POINTS = 4 / 3  # times as many then, and
_DESCRIBED = 8 / 3  # so many with descriptors
_KEPT_KEYFRAMES = 6  # that descriptors are compared with
_DESCRIBED_LATE = 2  # of them that get corners or descriptors when none were needed at their time
_GRID = (8, 6)
_MAX_MOTION_INTERVAL = 0.2  # seconds between frames beyond which their difference is no velocity


_Field = Callable[[np.ndarray], np.ndarray]  # how pixels [N, 2] move [N, 2]


@dataclass(frozen=True, eq=False)
class LateMatches:
    """Points of an earlier keyframe that were recognised only now."""

    keyframe_id: int
    ids: np.ndarray  # [N] int64
    uv: np.ndarray  # [N, 2] pixels of the keyframe's image as it came from the camera


@dataclass(frozen=True, eq=False)
class Tracks:
    """The points that one frame shows."""

    ids: np.ndarray  # [N] int64 ascending; the same number is the same point of the scene
    uv: np.ndarray  # [N, 2] pixels of the image as it came from the camera (distorted)
    flow_px: float  # median motion since the last keyframe; NaN before the first, inf when no point is shared with it
    survival: float  # share of the last keyframe's points that are still seen
    motion: np.ndarray  # [2, 3] px/s: image velocity of a pixel (u, v, 1); zero when unknown
    late: tuple[LateMatches, ...] = ()

    @property
    def speed(self) -> float:
        """px/s: median over the points of how fast they move through the image; 0 when unknown."""
        velocity = self.uv @ self.motion[:, :2].T + self.motion[:, 2]
        return float(np.median(np.linalg.norm(velocity, axis=1))) if len(velocity) else 0.0


@dataclass(eq=False)
class _Keyframe:
    id: int
    gray: np.ndarray
    ids: np.ndarray  # [N] ascending
    uv: np.ndarray  # [N, 2]
    features: _Features | None = None
    corners: tuple[np.ndarray, np.ndarray] | None = None  # see ``_corners``


@dataclass(eq=False)
class _Features:
    """SIFT features; those that were never given out as an observation are not ``known``."""

    uv: np.ndarray  # [F, 2]
    descriptors: np.ndarray  # [F, 128] unit length
    ids: np.ndarray  # [F]; -1: no number yet
    known: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))


class FeatureTracker:
    """Follows points through a video. Same images, same tracks, bit for bit."""

    def __init__(self, config: RefineConfig, camera: CameraModel | None = None) -> None:
        self._config = config
        self._camera = camera
        self._dense_flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
        self._orb = cv2.ORB.create(_CORNERS, nlevels=4, fastThreshold=7)
        self._sift = cv2.SIFT.create(nfeatures=round(_DESCRIBED * config.features), contrastThreshold=0.02)
        self._gray: np.ndarray | None = None
        self._ids = np.zeros(0, np.int64)
        self._uv = np.zeros((0, 2))
        self._features: _Features | None = None  # of the current frame, when descriptors were needed
        self._keyframes: deque[_Keyframe] = deque(maxlen=_KEPT_KEYFRAMES)
        self._next_id = 0
        self._stamp_ns = 0
        self._is_slow = True  # until the second frame
        self._keyframe_ns = -(2**63)
        self._motion = np.zeros((2, 3))

    def track(self, gray: np.ndarray, stamp_ns: int | None = None) -> Tracks:
        """Follow all points into ``gray`` [H, W] uint8. ``ValueError`` when the image changes size or type.

        With stamps the image velocity is measured too, which tells how a rolling shutter bends the image.
        """
        if gray.dtype != np.uint8 or gray.ndim != 2:
            raise ValueError(f"tracking needs a grey uint8 image, got {gray.dtype} of shape {gray.shape}")
        if self._gray is not None and gray.shape != self._gray.shape:
            raise ValueError(f"the image size changed from {self._gray.shape} to {gray.shape}; reset the tracker")
        previous, self._gray, self._features = self._gray, gray, None
        late: tuple[LateMatches, ...] = ()
        seconds = 0.0 if stamp_ns is None else 1e-9 * (stamp_ns - self._stamp_ns)
        self._is_slow = previous is None or not 0 < seconds < SLOW_S
        if previous is not None and self._keyframes:
            ids, uv = self._ids, self._uv
            self._follow(previous, gray)
            enough = max(self._config.min_survival * len(ids), _MIN_MATCHES * 2)
            if len(self._ids) < enough and not self._is_slow:
                self._find_again(gray, enough)
            elif len(self._ids) < enough:
                late = self._match(gray)
                if self._keyframes[-1].gray is previous:
                    ids, uv = _with_late(ids, uv, late, self._keyframes[-1].id)
            self._measure_motion(ids, uv, seconds)
        self._stamp_ns = stamp_ns or 0
        return self._tracks(late)

    def set_keyframe(self, keyframe_id: int) -> Tracks:
        """Make the frame just tracked a keyframe: new points fill the empty parts of the image.

        Returns the frame's tracks with them. ``RuntimeError`` before the first frame.
        """
        if self._gray is None:
            raise RuntimeError("set_keyframe needs a tracked frame; call track first")
        if self._features is None:
            is_calm = self._is_slow or self._stamp_ns - self._keyframe_ns >= 1e9 * CALM_S
            self._add(self._detect(self._gray, self._config.features * (_MORE_POINTS if is_calm else 1.0)))
        else:
            self._adopt_features(self._features)
        self._keyframe_ns = self._stamp_ns
        self._keyframes.append(_Keyframe(keyframe_id, self._gray, self._ids, self._uv, self._features))
        return self._tracks(())

    def _tracks(self, late: tuple[LateMatches, ...]) -> Tracks:
        if not self._keyframes:
            return Tracks(self._ids, self._uv, float("nan"), 1.0, self._motion, late)
        last = self._keyframes[-1]
        ids, uv = _with_late(last.ids, last.uv, late, last.id)
        _, here, there = np.intersect1d(self._ids, ids, assume_unique=True, return_indices=True)
        if len(here) == 0:
            return Tracks(self._ids, self._uv, float("inf"), 0.0, self._motion, late)
        flow = float(np.median(np.linalg.norm(self._uv[here] - uv[there], axis=1)))
        return Tracks(self._ids, self._uv, flow, len(here) / max(len(last.ids), 1), self._motion, late)

    def _measure_motion(self, ids: np.ndarray, uv: np.ndarray, seconds: float) -> None:
        """Fit the image velocity since the previous frame's points ``ids`` [N] at ``uv`` [N, 2]."""
        self._motion = np.zeros((2, 3))
        _, here, there = np.intersect1d(self._ids, ids, assume_unique=True, return_indices=True)
        if not 0 < seconds <= _MAX_MOTION_INTERVAL or len(here) < _MIN_MATCHES:
            return
        place = np.concatenate([self._uv[here], np.ones((len(here), 1))], axis=1)
        velocity = (self._uv[here] - uv[there]) / seconds
        weight = np.ones(len(here))
        for _ in range(5):
            motion = np.linalg.lstsq(place * weight[:, None], velocity * weight[:, None], rcond=None)[0]
            error = np.linalg.norm(place @ motion - velocity, axis=1)
            weight = 1.0 / np.sqrt(1.0 + (error / (np.median(error) + 1e-6)) ** 2)
        self._motion = motion.T

    # Following

    def _follow(self, previous: np.ndarray, gray: np.ndarray) -> None:
        there, back = self._coarse_flow(previous, gray)
        uv, good = _flow(previous, gray, self._uv, self._uv + there(self._uv), _GUIDED_LEVELS, back)
        if not good.all():  # near things, which thumbnails do not show: try again from standstill
            again, good_again = _flow(previous, gray, self._uv[~good], self._uv[~good])
            uv[~good], good[~good] = again, good_again
        self._keep(good, uv)
        self._settle(gray)
        self._reject_outliers()

    def _coarse_flow(self, image0: np.ndarray, image1: np.ndarray) -> tuple[_Field, _Field]:
        """Where pixels move between thumbnails of two images, and back: a camera that turns moves everything far."""
        scale = np.array(_THUMBNAIL) / image0.shape[::-1]
        small0, small1 = (cv2.resize(image, _THUMBNAIL, interpolation=cv2.INTER_AREA) for image in (image0, image1))

        def field(source: np.ndarray, target: np.ndarray) -> _Field:
            flow = self._dense_flow.calc(source, target, None)  # type: ignore[call-overload]

            def moved(uv: np.ndarray) -> np.ndarray:
                x, y = np.round((uv + 0.5) * scale - 0.5).clip(0, np.array(_THUMBNAIL) - 1).astype(int).T
                return np.asarray(flow[y, x] / scale)

            return moved

        return field(small0, small1), field(small1, small0)

    def _find_again(self, gray: np.ndarray, enough: float) -> None:
        """Follow the points of the last keyframes from there, to where matched corners near them have moved."""
        here = self._corners(gray)
        for keyframe in itertools.islice(reversed(self._keyframes), _DESCRIBED_LATE):
            if keyframe.corners is None:
                keyframe.corners = self._corners(keyframe.gray)
            lost = ~np.isin(keyframe.ids, self._ids)
            ids, uv0 = keyframe.ids[lost], keyframe.uv[lost]
            moved = self._moved(keyframe.corners, here, uv0)
            if moved is not None:
                uv, good = _flow(keyframe.gray, gray, uv0, uv0 + moved, _GUIDED_LEVELS)
                good[good] = self._moves_alike(keyframe, uv0[good], uv[good])
                self._put(np.concatenate([self._ids, ids[good]]), np.concatenate([self._uv, uv[good]]))
            if len(self._ids) >= enough:
                break
        self._reject_outliers()

    def _corners(self, gray: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ORB corners [N, 2] of an image and their descriptors [N, 32]."""
        small = cv2.resize(gray, None, fx=_CORNERS_SCALE, fy=_CORNERS_SCALE, interpolation=cv2.INTER_AREA)
        keypoints, descriptors = self._orb.detectAndCompute(small, None)
        uv = (np.array([k.pt for k in keypoints], dtype=float).reshape(-1, 2) + 0.5) / _CORNERS_SCALE - 0.5
        return uv, np.zeros((0, 32), np.uint8) if descriptors is None else descriptors

    def _moved(
        self, there: tuple[np.ndarray, np.ndarray], here: tuple[np.ndarray, np.ndarray], uv: np.ndarray
    ) -> np.ndarray | None:
        """How the points ``uv`` [N, 2] have moved [N, 2]: as the matched corners nearest to them. None: none match."""
        if min(len(there[0]), len(here[0])) < _MIN_MATCHES:
            return None
        rows, columns = mutual_best(hamming(there[1], here[1]))
        uv0, uv1 = there[0][rows], here[0][columns]
        if len(uv0) < _MIN_MATCHES:
            return None
        inlier = self._epipolar_inliers(uv0, uv1)
        if inlier.sum() < _MIN_MATCHES:
            return None
        uv0, uv1 = uv0[inlier], uv1[inlier]
        return np.asarray(np.median((uv1 - uv0)[_nearest(uv, uv0, _GUIDES)], axis=1))

    def _moves_alike(self, keyframe: _Keyframe, uv0: np.ndarray, uv1: np.ndarray) -> np.ndarray:
        """[N] bool: points that have moved as those near them which are followed already.

        A pattern that repeats looks the same one period away, and moves there as a whole. What a camera that turns
        moves everything by is a homography; what is left is parallax, and neighbours share it.
        """
        _, here, there = np.intersect1d(self._ids, keyframe.ids, assume_unique=True, return_indices=True)
        if len(here) < _MIN_MATCHES or len(uv0) == 0:
            return np.ones(len(uv0), bool)
        kept0, kept1, width = keyframe.uv[there], self._uv[here], keyframe.gray.shape[1]
        H, _ = cv2.findHomography(kept0, kept1, cv2.RANSAC, _ALIKE * width, maxIters=500)
        if H is None:
            return np.ones(len(uv0), bool)
        kept, found = (b - cv2.perspectiveTransform(a[:, None], H)[:, 0] for a, b in ((kept0, kept1), (uv0, uv1)))
        nearest = _nearest(uv0, kept0, _NEIGHBOURS)
        return np.asarray(np.linalg.norm(found - np.median(kept[nearest], axis=1), axis=1) < _ALIKE * width)

    def _settle(self, gray: np.ndarray) -> None:
        """Move points to where they match their patch in the last keyframe best."""
        last = self._keyframes[-1]
        _, here, there = np.intersect1d(self._ids, last.ids, assume_unique=True, return_indices=True)
        if len(here) == 0:
            return
        patches, uv0 = _turned(last.gray, last.uv[there], self._uv[here])
        uv, good = _flow(patches, gray, uv0, self._uv[here], _SETTLING_LEVELS)
        good &= np.linalg.norm(uv - self._uv[here], axis=1) < _SETTLE_PX
        self._uv = self._uv.copy()
        self._uv[here[good]] = uv[good]

    def _reject_outliers(self) -> None:
        last = self._keyframes[-1]
        _, here, there = np.intersect1d(self._ids, last.ids, assume_unique=True, return_indices=True)
        moved = np.linalg.norm(self._uv[here] - last.uv[there], axis=1) > _EPIPOLAR_PX
        if moved.sum() < _MIN_MATCHES:  # no epipolar geometry in a camera that stands still
            return
        inlier = self._epipolar_inliers(last.uv[there], self._uv[here])
        keep = np.ones(len(self._ids), bool)
        keep[here[~inlier]] = False
        self._keep(keep, self._uv)

    def _epipolar_inliers(self, uv0: np.ndarray, uv1: np.ndarray) -> np.ndarray:
        """[N] bool: matches that agree with one fundamental matrix."""
        if self._camera is not None:
            uv0, uv1 = undistort_points(self._camera, uv0), undistort_points(self._camera, uv1)
        try:
            _, mask = cv2.findFundamentalMat(uv0, uv1, cv2.USAC_MAGSAC, _EPIPOLAR_PX, 0.999, 300)
        except cv2.error:  # OpenCV 5 asserts when no sample gives a model: a camera that stands still
            return np.ones(len(uv0), bool)
        return np.zeros(len(uv0), bool) if mask is None else mask.ravel().astype(bool)

    def _keep(self, keep: np.ndarray, uv: np.ndarray) -> None:
        self._ids, self._uv = self._ids[keep], uv[keep]

    def _put(self, ids: np.ndarray, uv: np.ndarray) -> None:
        """Make these the points, in order of their numbers."""
        order = np.argsort(ids, kind="stable")
        self._ids, self._uv = ids[order], uv[order]

    # New points

    def _detect(self, gray: np.ndarray, wanted: float) -> np.ndarray:
        """New corners [N, 2], strongest first in each cell of a grid, away from the points that are followed."""
        height, width = gray.shape
        distance = max(5, round(0.012 * width))
        response = cv2.cornerMinEigenVal(gray, 5)
        peak = response >= cv2.dilate(response, np.ones((5, 5), np.uint8))
        mask = np.zeros_like(gray)
        border = _WINDOW[0] // 2
        mask[border:-border, border:-border] = 255
        for x, y in np.round(self._uv).astype(int):
            cv2.circle(mask, (int(x), int(y)), distance, 0, -1)
        floor = max(1e-4 * float(response.max()), 2e-5)
        v, u = np.nonzero(peak & (mask > 0) & (response > floor))
        order = np.argsort(-response[v, u], kind="stable")
        v, u = v[order], u[order]
        columns, rows = _GRID
        cells = (v * rows // height) * columns + u * columns // width
        quota = self._cell_quota(width, height, wanted).tolist()
        chosen: list[tuple[int, int]] = []
        taken = mask == 0
        for x, y, cell in zip(u.tolist(), v.tolist(), cells.tolist()):
            if quota[cell] > 0 and not taken[y, x]:
                quota[cell] -= 1
                chosen.append((x, y))
                taken[max(0, y - distance) : y + distance + 1, max(0, x - distance) : x + distance + 1] = True
        return np.array(chosen, dtype=float).reshape(-1, 2)

    def _cell_quota(self, width: int, height: int, wanted: float) -> np.ndarray:
        columns, rows = _GRID
        cell = (self._uv[:, 1] * rows / height).astype(int).clip(0, rows - 1) * columns
        cell += (self._uv[:, 0] * columns / width).astype(int).clip(0, columns - 1)
        per_cell = math.ceil(wanted / (columns * rows))
        return per_cell - np.bincount(cell, minlength=columns * rows)

    def _add(self, uv: np.ndarray) -> np.ndarray:
        ids = np.arange(self._next_id, self._next_id + len(uv), dtype=np.int64)
        self._next_id += len(uv)
        self._ids, self._uv = np.concatenate([self._ids, ids]), np.concatenate([self._uv, uv])
        return ids

    def _adopt_features(self, features: _Features) -> None:
        """Features of a keyframe that has no number yet become new points."""
        fresh = np.flatnonzero(features.ids < 0)
        features.ids[fresh] = self._add(features.uv[fresh])
        features.known[:] = True

    # Wide baselines

    def _match(self, gray: np.ndarray) -> tuple[LateMatches, ...]:
        """Find the points of the last keyframes by their descriptors."""
        self._features = here = self._extract(gray)
        pairs = []
        for age, keyframe in enumerate(reversed(self._keyframes)):
            if keyframe.features is None and age < _DESCRIBED_LATE:
                keyframe.features = self._extract(keyframe.gray)
                count = len(keyframe.features.ids)
                keyframe.features.ids = np.arange(self._next_id, self._next_id + count, dtype=np.int64)
                self._next_id += count
            if keyframe.features is not None:
                pairs.append((keyframe, self._match_features(here, keyframe.features)))
        late = [_claim(here, keyframe, matches) for keyframe, matches in pairs]
        self._take_over(here)
        return tuple(found for found in late if len(found.ids))

    def _extract(self, gray: np.ndarray) -> _Features:
        keypoints, descriptors = self._sift.detectAndCompute(gray, None)
        uv = np.array([k.pt for k in keypoints], dtype=float).reshape(-1, 2)
        if len(uv) == 0:
            return _Features(uv, np.zeros((0, 128), np.float32), np.zeros(0, np.int64), np.zeros(0, bool))
        _, first = np.unique(np.round(uv, 1), axis=0, return_index=True)  # one orientation per place
        first.sort()
        root = np.sqrt(descriptors[first] / np.maximum(descriptors[first].sum(axis=1, keepdims=True), 1e-9))
        return _Features(uv[first], root, np.full(len(first), -1, np.int64), np.zeros(len(first), bool))

    def _match_features(self, here: _Features, there: _Features) -> np.ndarray:
        """[N, 2] feature numbers here and there: mutual best, clearly better than the second, on one epipolar line."""
        if min(len(here.ids), len(there.ids)) < _MIN_MATCHES:
            return np.zeros((0, 2), int)
        similarity = here.descriptors @ there.descriptors.T
        best = similarity.argmax(axis=1)
        rows = np.arange(len(best))
        first = similarity[rows, best]
        similarity_of_others = similarity.copy()
        similarity_of_others[rows, best] = -1.0
        second = similarity_of_others.max(axis=1)
        distinct = (1.0 - first) < self._config.match_ratio**2 * (1.0 - second)
        mutual = similarity.argmax(axis=0)[best] == rows
        pairs = np.stack([rows, best], axis=1)[distinct & mutual]
        if len(pairs) < _MIN_MATCHES:
            return np.zeros((0, 2), int)
        inlier = self._epipolar_inliers(there.uv[pairs[:, 1]], here.uv[pairs[:, 0]])
        if inlier.sum() < max(_MIN_MATCHES, 0.3 * len(pairs)):
            return np.zeros((0, 2), int)
        return pairs[inlier]

    def _take_over(self, here: _Features) -> None:
        """The numbered features replace points that were followed to the same place."""
        numbered = here.ids >= 0
        ids, uv = here.ids[numbered], here.uv[numbered]
        if len(ids) == 0:
            return
        distance = np.linalg.norm(self._uv[:, None] - uv[None], axis=2).min(axis=1)
        apart = ~np.isin(self._ids, ids) & (distance > 3.0)
        self._put(np.concatenate([self._ids[apart], ids]), np.concatenate([self._uv[apart], uv]))


def _with_late(
    ids: np.ndarray, uv: np.ndarray, late: tuple[LateMatches, ...], keyframe_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """A keyframe's points with those that were recognised only now."""
    for found in late:
        if found.keyframe_id == keyframe_id:
            ids, uv = np.concatenate([ids, found.ids]), np.concatenate([uv, found.uv])
    return ids, uv


def _claim(here: _Features, keyframe: _Keyframe, matches: np.ndarray) -> LateMatches:
    """Give the features here the numbers of their matches, unless a later keyframe has named them already."""
    there = keyframe.features
    assert there is not None
    mine, theirs = matches[:, 0], matches[:, 1]
    free = (here.ids[mine] < 0) & ~np.isin(there.ids[theirs], here.ids)
    mine, theirs = mine[free], theirs[free]
    here.ids[mine] = there.ids[theirs]
    fresh = theirs[~there.known[theirs]]
    there.known[fresh] = True
    return LateMatches(keyframe.id, there.ids[fresh], there.uv[fresh])


def _nearest(uv: np.ndarray, others: np.ndarray, count: int) -> np.ndarray:
    """Rows [N, count] of the others [M, 2] nearest to each of ``uv`` [N, 2]; M >= ``count`` >= 2."""
    return np.asarray(cKDTree(others).query(uv, count)[1])


def _turned(image: np.ndarray, uv0: np.ndarray, uv1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The image as it looks when its points ``uv0`` [N, 2] have come to ``uv1`` [N, 2], and where it shows them then.

    Lucas-Kanade compares patches as they are, and a camera that rolls or comes closer turns and scales them: by the
    homography that most points agree with. Where that does so by less than ``_TURNED``, or there is none, the image
    and its points come back as they were.
    """
    H = None
    if len(uv0) >= _MIN_MATCHES:
        H, _ = cv2.findHomography(uv0, uv1, cv2.RANSAC, _PLANE_PX, maxIters=200)
    height, width = image.shape
    if H is None or H[2] @ (width / 2, height / 2, 1.0) <= 0:  # the image's middle is not seen by such a camera
        return image, uv0
    x, y, w = H @ (width / 2, height / 2, 1.0)
    linear = (H[:2, :2] - np.outer((x / w, y / w), H[2, :2])) / w
    if not np.linalg.norm(linear - np.eye(2), 2) > _TURNED:
        return image, uv0
    turned = cv2.warpPerspective(image, H, (width, height), borderMode=cv2.BORDER_REPLICATE)
    return turned, cv2.perspectiveTransform(uv0[:, None], H)[:, 0]


def _flow(
    image0: np.ndarray,
    image1: np.ndarray,
    uv0: np.ndarray,
    guess: np.ndarray,
    levels: int = _LEVELS,
    back: _Field | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Positions [N, 2] in image1 of the points uv0 [N, 2] and whether they came back to where they started [N].

    The way back starts as the field ``back`` says, or with the step that ``guess`` was, undone.
    """

    def follow(a: np.ndarray, b: np.ndarray, uv: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if len(uv) == 0:
            return np.zeros((0, 2)), np.zeros(0, bool)
        uv, start = (np.ascontiguousarray(x, dtype=np.float32).reshape(-1, 1, 2) for x in (uv, start))
        moved, found, _ = cv2.calcOpticalFlowPyrLK(
            a, b, uv, start,
            winSize=_WINDOW, maxLevel=levels, criteria=_STOP, flags=cv2.OPTFLOW_USE_INITIAL_FLOW,
        )  # fmt: skip
        return moved.reshape(-1, 2).astype(float), found.ravel() > 0

    uv1, good = follow(image0, image1, uv0, guess)
    height, width = image1.shape
    good &= (uv1 > 1).all(axis=1) & (uv1[:, 0] < width - 2) & (uv1[:, 1] < height - 2)
    start = uv1[good] + (uv0[good] - guess[good] if back is None else back(uv1[good]))
    again, found = follow(image1, image0, uv1[good], start)
    good[good] = found & (np.linalg.norm(again - uv0[good], axis=1) < _FORWARD_BACKWARD_PX)
    return uv1, good
