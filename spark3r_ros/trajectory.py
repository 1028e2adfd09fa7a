"""Where every frame was: relative to its keyframe, so that moving keyframes moves the path."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from spark3r_ros import geometry
from spark3r_ros.windows import Keyframe


class Trajectory:
    """One row per frame in stamp order: stamp, keyframe and ``T_keyframe_camera`` in world units."""

    def __init__(self) -> None:
        self._count = 0
        self._stamps = np.empty(256, dtype=np.int64)
        self._keyframes = np.empty(256, dtype=np.int32)
        self._relative = np.empty((256, 3, 4))

    def __len__(self) -> int:
        return self._count

    def append(self, stamp_ns: int, T_world_camera: np.ndarray, keyframe: Keyframe) -> None:
        if self._count == len(self._stamps):
            self._stamps = np.concatenate([self._stamps, np.empty_like(self._stamps)])
            self._keyframes = np.concatenate([self._keyframes, np.empty_like(self._keyframes)])
            self._relative = np.concatenate([self._relative, np.empty_like(self._relative)])
        self._stamps[self._count] = stamp_ns
        self._count += 1
        self.replace(self._count - 1, T_world_camera, keyframe)

    def replace(self, row: int, T_world_camera: np.ndarray, keyframe: Keyframe) -> None:
        """Give frame ``row`` (-1: the last) a better pose."""
        row = row if row >= 0 else self._count + row
        relative = geometry.inverse(keyframe.T_world_camera) @ T_world_camera
        self._keyframes[row] = keyframe.id
        self._relative[row] = relative[:3]

    def keyframe(self, row: int, keyframes: Mapping[int, Keyframe]) -> Keyframe:
        """That frame ``row`` is relative to."""
        return keyframes[int(self._keyframes[row])]

    @property
    def last_stamp_ns(self) -> int:
        return int(self._stamps[self._count - 1])

    def world_pose(self, row: int, keyframes: Mapping[int, Keyframe]) -> np.ndarray:
        """T_world_camera [4, 4] of one frame (-1: the last) as its keyframe stands now."""
        row = row if row >= 0 else self._count + row
        relative = geometry.make_T(self._relative[row, :, :3], self._relative[row, :, 3])
        return keyframes[int(self._keyframes[row])].T_world_camera @ relative

    def pose(self, row: int, keyframes: Mapping[int, Keyframe]) -> np.ndarray:
        """T_map_camera [4, 4] of one frame (-1: the last) as the map stands now."""
        return self._moved(np.array([row if row >= 0 else self._count + row]), keyframes)[0]

    def poses(self, keyframes: Mapping[int, Keyframe]) -> tuple[np.ndarray, np.ndarray]:
        """Stamps [N] and T_map_camera [N, 4, 4] of all frames as the map stands now."""
        return self._stamps[: self._count].copy(), self._moved(np.arange(self._count), keyframes)

    def _moved(self, rows: np.ndarray, keyframes: Mapping[int, Keyframe]) -> np.ndarray:
        if len(rows) == 0:
            return np.zeros((0, 4, 4))
        used, inverse = np.unique(self._keyframes[rows], return_inverse=True)
        T = np.stack([keyframes[int(k)].T_map_camera for k in used])[inverse]
        scale = np.array([keyframes[int(k)].scale for k in used])[inverse]
        relative = geometry.make_T(self._relative[rows, :, :3], self._relative[rows, :, 3] * scale[:, None])
        return T @ relative
