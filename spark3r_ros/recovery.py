"""When tracking is lost, and how a lost camera is found again."""

from __future__ import annotations

import numpy as np

from spark3r_ros import geometry
from spark3r_ros.alignment import View
from spark3r_ros.config import LoopConfig, WindowConfig
from spark3r_ros.places import Place, PlaceStore, Sighting, recognise
from spark3r_ros.windows import Keyframe

CANDIDATES = 5  # similar places that a lost frame is compared with
BAD_WINDOWS = 2  # refused links in a row


class Watch:
    """Decides that tracking is lost: by poses without confidence for a while, or by windows that do not fit the map."""

    def __init__(self, config: WindowConfig) -> None:
        self.config = config
        self._has_tracked = False
        self._bad_ns: int | None = None  # first of the frames without confidence; None: the last one was well tracked
        self._bad_windows = 0

    def frame(self, stamp_ns: int, confidence: float) -> bool:
        """Take note of a tracked frame; True: tracking is lost."""
        if confidence >= self.config.lost_confidence or not self._has_tracked:
            self._has_tracked, self._bad_ns = True, None
        elif self._bad_ns is None:
            self._bad_ns = stamp_ns
        return self._bad_ns is not None and stamp_ns - self._bad_ns > 1e9 * self.config.lost_seconds

    def window(self, accepted: bool) -> bool:
        """Take note of a solved window; True: tracking is lost."""
        self._bad_windows = 0 if accepted else self._bad_windows + 1
        return self._bad_windows >= BAD_WINDOWS

    def restart(self) -> None:
        self._has_tracked, self._bad_ns, self._bad_windows = False, None, 0


def find_again(query: Place, places: PlaceStore, near: int | None, config: LoopConfig) -> Sighting | None:
    """The place that a frame without depth sees best; ``near``: keyframe that it was last seen at."""
    candidates = list(places.similar(query.descriptor, CANDIDATES, spacing=1))
    if near is not None and near in places and all(c.keyframe_id != near for c in candidates):
        candidates.insert(0, places[near])
    sightings = [s for s in (recognise(query, c, config) for c in candidates) if s is not None]
    return max(sightings, key=lambda s: (s.num_inliers, -s.place.keyframe_id), default=None)


def sighted_pose(sighting: Sighting, keyframe: Keyframe, S_map_world: np.ndarray) -> np.ndarray:
    """T_world_camera [4, 4] of a frame that sees the place of ``keyframe``."""
    S_world_camera = geometry.inverse(S_map_world) @ keyframe.S_map_keyframe @ sighting.S_place_query
    return geometry.make_T(geometry.project_to_so3(S_world_camera[:3, :3]), S_world_camera[:3, 3])


def sparse_view(
    sighting: Sighting, keyframe: Keyframe, S_map_world: np.ndarray, T_world_camera: np.ndarray, K: np.ndarray,
    shape: tuple[int, int],
) -> View:  # fmt: skip
    """What the map knows of a found frame: depth [h, w] in world units at the corners that it recognised."""
    unit = keyframe.scale / float(geometry.scale_of(S_map_world))  # world units per unit of the place
    pixels = np.rint(sighting.inlier_xy * np.array([K[0, 0], K[1, 1]]) + K[:2, 2]).astype(int)
    inside = (pixels >= 0).all(axis=1) & (pixels[:, 0] < shape[1]) & (pixels[:, 1] < shape[0])
    depth, confidence = np.full(shape, np.nan, np.float32), np.zeros(shape, np.float32)
    column, row = pixels[inside].T
    depth[row, column] = sighting.inlier_xyz[inside, 2] * unit
    confidence[row, column] = 0.9
    return View(T_world_camera, depth, confidence)
