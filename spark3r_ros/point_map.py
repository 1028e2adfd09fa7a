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


class PointMap:
    """Points by keyframe, never more than ``config.max_points`` in all."""

    def __init__(self, config: MapConfig) -> None:
        self.config = config
        self._points: dict[int, KeyframePoints] = {}
        self._densest: list[tuple[int, int]] = []  # heap of (-points, keyframe), with entries that no longer hold
        self._total = 0

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, keyframe_id: int) -> KeyframePoints:
        return self._points[keyframe_id]

    def __contains__(self, keyframe_id: int) -> bool:
        return keyframe_id in self._points

    def set(self, keyframe_id: int, points: KeyframePoints) -> None:
        """Store or replace the points of a keyframe, then thin the densest keyframes until the bound holds."""
        self.remove(keyframe_id)
        self._put(keyframe_id, points)
        while self._total > self.config.max_points:
            self._thin(self._pop_densest())

    def _put(self, keyframe_id: int, points: KeyframePoints) -> None:
        self._points[keyframe_id] = points
        self._total += len(points)
        heapq.heappush(self._densest, (-len(points), keyframe_id))

    def _pop_densest(self) -> int:
        """The keyframe with most points, of several the oldest."""
        while True:
            count, keyframe_id = heapq.heappop(self._densest)
            if keyframe_id in self._points and len(self._points[keyframe_id]) == -count:
                return keyframe_id

    def remove(self, keyframe_id: int) -> None:
        old = self._points.pop(keyframe_id, None)
        if old is not None:
            self._total -= len(old)

    def clear(self) -> None:
        self._points.clear()
        self._densest.clear()
        self._total = 0

    def _thin(self, keyframe_id: int) -> None:
        """Keep the more confident half of one keyframe's points."""
        points = self._points[keyframe_id]
        best = np.sort(np.argsort(-points.confidence, kind="stable")[: len(points) // 2])
        self._total -= len(points)
        self._put(keyframe_id, points.take(best))

    def gather(self, similarities: Mapping[int, np.ndarray]) -> KeyframePoints:
        """The points of the given keyframes, moved by their ``S_map_keyframe`` [4, 4], in order of the mapping."""
        parts = [(S, self._points[k]) for k, S in similarities.items() if k in self._points]
        if not parts:
            return KeyframePoints(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.uint8), np.zeros(0, np.float32))
        xyz = [geometry.transform(S, p.xyz.astype(np.float64)).astype(np.float32) for S, p in parts]
        return KeyframePoints(
            np.concatenate(xyz),
            np.concatenate([p.rgb for _, p in parts]),
            np.concatenate([p.confidence for _, p in parts]),
        )
