"""Which pixels become points of the map, and the bounded store that keeps them.

Points are stored per keyframe in that keyframe's camera, so that moving a keyframe moves its points.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from spark3r_ros import geometry
from spark3r_ros.config import MapConfig


@dataclass(frozen=True, eq=False)
class KeyframePoints:
    """Points that one keyframe contributes, in its own camera."""

    xyz: np.ndarray  # [N, 3] float32
    rgb: np.ndarray  # [N, 3] uint8
    confidence: np.ndarray  # [N] float32

    def __len__(self) -> int:
        return len(self.xyz)

    def take(self, rows: np.ndarray) -> KeyframePoints:
        return KeyframePoints(self.xyz[rows], self.rgb[rows], self.confidence[rows])


def depth_edges(depth: np.ndarray, max_jump: float) -> np.ndarray:
    """Pixels [H, W] beside a relative depth step larger than ``max_jump``: they float between the surfaces."""
    edge = np.zeros(depth.shape, dtype=bool)
    with np.errstate(invalid="ignore", divide="ignore"):
        for axis in (0, 1):
            near = np.minimum(np.take(depth, range(1, depth.shape[axis]), axis),
                              np.take(depth, range(depth.shape[axis] - 1), axis))  # fmt: skip
            jump = np.abs(np.diff(depth, axis=axis)) > max_jump * near
            if axis == 0:
                edge[1:] |= jump
                edge[:-1] |= jump
            else:
                edge[:, 1:] |= jump
                edge[:, :-1] |= jump
    return edge


def trusted(depth: np.ndarray, confidence: np.ndarray, baseline: float, config: MapConfig) -> np.ndarray:
    """Mask [H, W] of pixels fit for the map.

    ``baseline`` is how far the cameras of the window are from this one; a point further than baseline / min_parallax
    has been seen from one direction only, so its depth is a guess.
    """
    with np.errstate(invalid="ignore"):
        mask = np.isfinite(depth) & (depth > 0) & (confidence >= config.min_confidence)
        mask &= ~depth_edges(depth, config.max_depth_jump)
        if config.min_parallax > 0:
            mask &= depth * config.min_parallax <= baseline
    return mask


def voxel_fuse(points: KeyframePoints, voxel_size: float) -> KeyframePoints:
    """One point per voxel: the confidence-weighted mean of those inside, with the best confidence."""
    if len(points) == 0:
        return points
    cells = np.floor(points.xyz / voxel_size).astype(np.int64)
    cells -= cells.min(axis=0)
    extent = cells.max(axis=0) + 1
    keys = (cells[:, 0] * extent[1] + cells[:, 1]) * extent[2] + cells[:, 2]
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(keys[order]) > 0])
    weight = np.maximum(points.confidence[order].astype(np.float64), 1e-6)
    total = np.add.reduceat(weight, starts)[:, None]
    xyz = np.add.reduceat(points.xyz[order] * weight[:, None], starts) / total
    rgb = np.add.reduceat(points.rgb[order] * weight[:, None], starts) / total
    confidence = np.maximum.reduceat(points.confidence[order], starts)
    return KeyframePoints(xyz.astype(np.float32), np.rint(rgb).astype(np.uint8), confidence.astype(np.float32))


def keyframe_points(
    depth: np.ndarray, confidence: np.ndarray, rgb: np.ndarray, K: np.ndarray, baseline: float, config: MapConfig
) -> KeyframePoints:
    """Trusted, fused points of one keyframe; depth and confidence [H, W], rgb [H, W, 3] uint8."""
    mask = trusted(depth, confidence, baseline, config)
    xyz = geometry.unproject(depth.astype(np.float64), K)[mask].astype(np.float32)
    points = KeyframePoints(xyz, rgb[mask], confidence[mask].astype(np.float32))
    if len(points) == 0:
        return points
    return voxel_fuse(points, config.voxel_size * float(np.median(depth[mask])))


def _more_confident_half(points: KeyframePoints) -> np.ndarray:
    """Rows [N // 2], ascending; of equals the first."""
    count = len(points) // 2
    least = -np.partition(-points.confidence, count)[count]  # the best that has to go
    better = points.confidence > least
    equal = np.flatnonzero(points.confidence == least)[: count - int(better.sum())]
    better[equal] = True
    return np.flatnonzero(better)


class PointMap:
    """Points by keyframe, never more than ``config.max_points`` in all, in memory that is claimed once.

    Each keyframe's points are one slice of the arrays. What is removed leaves gaps, which are closed when the end is
    reached.
    """

    def __init__(self, config: MapConfig) -> None:
        self.config = config
        rows = config.max_points + config.max_points // 8  # gaps
        self._all = KeyframePoints(  # np.full writes to it, which makes it resident; np.zeros would not
            np.full((rows, 3), 0, np.float32), np.full((rows, 3), 0, np.uint8), np.full(rows, 0, np.float32)
        )
        self.clear()

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, keyframe_id: int) -> KeyframePoints:
        """The points of one keyframe: a view, good until the map changes."""
        start, count = self._slices[keyframe_id]
        rows = slice(start, start + count)
        return KeyframePoints(self._all.xyz[rows], self._all.rgb[rows], self._all.confidence[rows])

    def __contains__(self, keyframe_id: int) -> bool:
        return keyframe_id in self._slices

    def set(self, keyframe_id: int, points: KeyframePoints) -> None:
        """Store or replace the points of a keyframe, and thin the densest keyframes so that the bound holds."""
        self.remove(keyframe_id)
        while self._total + len(points) > self.config.max_points:
            if self._densest_key() < (-len(points), keyframe_id):
                self._thin(heapq.heappop(self._densest)[1])
            else:
                points = points.take(_more_confident_half(points))
        if self._end + len(points) > len(self._all):
            self._close_gaps()
        self._write(keyframe_id, self._end, points)
        self._end += len(points)

    def remove(self, keyframe_id: int) -> None:
        _, count = self._slices.pop(keyframe_id, (0, 0))
        self._total -= count

    def clear(self) -> None:
        self._slices: dict[int, tuple[int, int]] = {}  # by keyframe: first row and number of rows; in order of rows
        self._densest: list[tuple[int, int]] = []  # heap of (-points, keyframe), with entries that hold no longer
        self._total = self._end = 0

    def _write(self, keyframe_id: int, start: int, points: KeyframePoints) -> None:
        rows = slice(start, start + len(points))
        self._all.xyz[rows], self._all.rgb[rows] = points.xyz, points.rgb
        self._all.confidence[rows] = points.confidence
        self._slices[keyframe_id] = start, len(points)
        self._total += len(points)
        heapq.heappush(self._densest, (-len(points), keyframe_id))

    def _densest_key(self) -> tuple[float, int]:
        """Entry of the keyframe with most points, of several the oldest; it is the first of the heap."""
        while self._densest:
            count, keyframe_id = self._densest[0]
            if keyframe_id in self._slices and self._slices[keyframe_id][1] == -count:
                return count, keyframe_id
            heapq.heappop(self._densest)
        return float("inf"), 0

    def _thin(self, keyframe_id: int) -> None:
        """Keep the more confident half of one keyframe's points."""
        points = self[keyframe_id]
        start, count = self._slices[keyframe_id]
        self._total -= count
        self._write(keyframe_id, start, points.take(_more_confident_half(points)))

    def _close_gaps(self) -> None:
        end = 0
        for keyframe_id, (start, count) in self._slices.items():
            if start != end:
                for array in (self._all.xyz, self._all.rgb, self._all.confidence):
                    array[end : end + count] = array[start : start + count]
            self._slices[keyframe_id] = end, count
            end += count
        self._end = end

    def gather(self, similarities: Mapping[int, np.ndarray]) -> KeyframePoints:
        """The points of the given keyframes, moved by their ``S_map_keyframe`` [4, 4], in order of the mapping."""
        parts = [(S, self[k]) for k, S in similarities.items() if k in self]
        if not parts:
            return KeyframePoints(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.uint8), np.zeros(0, np.float32))
        xyz = [geometry.transform(S, p.xyz.astype(np.float64)).astype(np.float32) for S, p in parts]
        return KeyframePoints(
            np.concatenate(xyz),
            np.concatenate([p.rgb for _, p in parts]),
            np.concatenate([p.confidence for _, p in parts]),
        )
