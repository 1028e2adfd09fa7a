"""How many metres one unit of the map is: a filter on log scale and the sources that feed it.

A source says ``log(metres per world unit)`` with a sigma. The filter believes nothing until two sources, or one source
repeatedly, agree, and more sources agree than contradict; from then on a chi-square gate keeps out what contradicts.
Nothing is ever rescaled inside: only the output converts.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spark3r_ros import geometry
from spark3r_ros.alignment import robust_log_ratio
from spark3r_ros.config import ScaleConfig
from spark3r_ros.frame import ScaleEstimate
from spark3r_ros.windows import Keyframe

logger = logging.getLogger(__name__)

DEPTH_SIGMA = 0.03  # of log scale from one depth image: sensor and network bias, not pixel noise
HEIGHT_SIGMA = 0.08  # one ground plane: mounting height, pitch of the robot
MODEL_SIGMA = 0.1  # one window of a metric network
ODOMETRY_SIGMA = 0.03  # share of a baseline: wheel slip, drift of the camera's own track
GROUND_RANSAC_ROUNDS = 100
GROUND_TILT = np.cos(np.radians(50.0))  # a camera may look up or down by this much


@dataclass(frozen=True)
class Measurement:
    """One opinion about the scale."""

    log_scale: float  # of metres per world unit
    sigma: float
    source: str
    keyframe_id: int  # where the world unit was the one meant; a loop correction may have stretched it


class ScaleFilter:
    """Fuses measurements into metres per map unit."""

    KEPT = 200  # measurements, for starting again after a loop correction

    def __init__(self, config: ScaleConfig) -> None:
        self.config = config
        self.num_rejected = 0
        self._accepted: deque[Measurement] = deque(maxlen=self.KEPT)
        self._candidates: deque[tuple[float, Measurement]] = deque(maxlen=10)
        self._base = self._estimate = ScaleEstimate()  # base: of the saved map that this one goes on from
        self._information: dict[str, float] = {}

    @property
    def estimate(self) -> ScaleEstimate:
        return self._estimate

    def add(self, measurement: Measurement, keyframe_scale: float) -> bool:
        """Take one measurement; False when it is refused (or waits for others to agree).

        ``keyframe_scale``: map units per world unit at the measurement's keyframe.
        """
        value = measurement.log_scale - float(np.log(keyframe_scale))
        if not self._estimate.is_metric:
            return self._start(value, measurement)
        drifted = float(np.hypot(self._estimate.sigma, self.config.drift))
        if abs(value - self._estimate.log_scale) > self.config.gate * np.hypot(drifted, measurement.sigma):
            self.num_rejected += 1
            return False
        self._fuse(value, drifted, measurement)
        return True

    def _start(self, value: float, measurement: Measurement) -> bool:
        """Begin when enough of the last opinions agree with this one, and more sources do than contradict it.

        A source contradicts when no more than half of its own last opinions agree. So one of two that differ never
        wins by speaking more often: nobody can know which of them lies.
        """
        self._candidates.append((value, measurement))
        agreeing = [
            (v, m) for v, m in self._candidates
            if abs(v - value) <= self.config.gate * np.hypot(m.sigma, measurement.sigma)
        ]  # fmt: skip
        needed = 1 if measurement.source == "model" else self.config.confirmations
        if len(agreeing) < needed:
            return False
        told, backed = Counter(m.source for _, m in self._candidates), Counter(m.source for _, m in agreeing)
        against = [s for s in told if s != measurement.source and 2 * backed[s] <= told[s]]
        if 2 * len(against) >= len(told):
            self.num_rejected += 1
            if self.num_rejected == 1:
                logger.warning(
                    "scale stays unknown: %s says %.3g m per unit, %s contradicts: check or switch off one of them",
                    measurement.source, np.exp(value), " and ".join(against),
                )  # fmt: skip
            return False
        self._candidates.clear()
        sigma = float("inf")
        for v, m in agreeing:
            self._fuse(v, sigma, m)
            sigma = self._estimate.sigma
        return True

    def _fuse(self, value: float, sigma: float, measurement: Measurement) -> None:
        prior, new = (0.0 if np.isinf(sigma) else sigma**-2), measurement.sigma**-2
        mean = (prior * self._estimate.log_scale + new * value) / (prior + new)
        self._information[measurement.source] = self._information.get(measurement.source, 0.0) + new
        source = max(self._information, key=lambda s: (self._information[s], s))
        floored = max((prior + new) ** -0.5, self.config.min_sigma)
        self._estimate = ScaleEstimate(mean, floored, source)
        self._accepted.append(measurement)

    def resume(self, estimate: ScaleEstimate) -> None:
        """Go on with the scale of a saved map."""
        self._base = self._estimate = estimate
        self._believe_base()

    def _believe_base(self) -> None:
        self._estimate = self._base
        self._information = {self._base.source: self._base.sigma**-2} if self._base.is_metric else {}

    def restart(self, keyframe_scale: Mapping[int, float]) -> None:
        """A loop correction stretched keyframes: fuse again what was accepted, with their new scales."""
        history = list(self._accepted)
        self._accepted.clear()
        self._believe_base()
        for m in history:
            if m.keyframe_id in keyframe_scale:
                value = m.log_scale - float(np.log(keyframe_scale[m.keyframe_id]))
                self._fuse(value, float(np.hypot(self._estimate.sigma, self.config.drift)), m)


def from_depth(keyframe: Keyframe) -> Measurement | None:
    """The robot's depth image over the network's depth, in this keyframe's camera."""
    if keyframe.metric_depth is None or keyframe.dense is None:
        return None
    log_ratio = robust_log_ratio(
        keyframe.metric_depth.ravel().astype(float),
        keyframe.dense.depth.ravel().astype(float),
        keyframe.dense.confidence.ravel().astype(float),
    )
    return None if log_ratio is None else Measurement(log_ratio, DEPTH_SIGMA, "depth", keyframe.id)


def from_height(keyframe: Keyframe, camera_height: float) -> Measurement | None:
    """The known height of the camera over the ground plane that it sees in the lower half of the image."""
    if camera_height <= 0 or keyframe.dense is None:
        return None
    dense = keyframe.dense
    half = dense.depth.shape[0] // 2
    xyz = geometry.unproject(dense.depth.astype(float), dense.K)[half:].reshape(-1, 3)
    trusted = dense.confidence[half:].ravel() >= np.median(dense.confidence)
    height = ground_height(xyz[trusted & (xyz[:, 2] > 0)])
    if height is None:
        return None
    return Measurement(float(np.log(camera_height / height)), HEIGHT_SIGMA, "height", keyframe.id)


def ground_height(xyz: np.ndarray, min_share: float = 0.3) -> float | None:
    """Distance of the camera from the ground plane among points [N, 3] in its frame; None when there is no such plane.

    RANSAC with fixed seeds; a ground plane is below the camera, level within ``GROUND_TILT``, and explains at least
    ``min_share`` of the points. Of the planes that do, the lowest wins: a table is above the floor.
    """
    if len(xyz) < 100:
        return None
    sample = xyz[:: max(1, len(xyz) // 2000)]
    rng = np.random.default_rng(0)
    best: tuple[float, np.ndarray] | None = None
    for _ in range(GROUND_RANSAC_ROUNDS):
        a, b, c = sample[rng.choice(len(sample), 3, replace=False)]
        normal = np.cross(b - a, c - a)
        length = float(np.linalg.norm(normal))
        if length < 1e-12:
            continue
        normal = normal / length * (1.0 if normal[1] >= 0 else -1.0)  # pointing down, along the camera's y
        height = float(normal @ a)
        if normal[1] < GROUND_TILT or height <= 0:
            continue
        inlier = np.abs(sample @ normal - height) < 0.03 * height
        if inlier.mean() >= min_share and (best is None or inlier.mean() * height > best[0]):
            best = (float(inlier.mean()) * height, inlier)
    if best is None:
        return None
    plane = sample[best[1]]
    centre = plane.mean(axis=0)
    return float(abs(np.linalg.svd(plane - centre, full_matrices=False)[2][2] @ centre))


class OdometrySource:
    """Compares how far the robot's odometry and the camera say it went between two keyframes."""

    def __init__(self, config: ScaleConfig) -> None:
        self.config = config
        self._start: Keyframe | None = None

    def add(self, keyframes: Sequence[Keyframe]) -> list[Measurement]:
        """Measurements of new solved keyframes, each over a baseline that no other one used."""
        found = []
        for keyframe in keyframes:
            if keyframe.T_odom_base is None:
                continue
            if self._start is None:
                self._start = keyframe
                continue
            measurement = self._compare(self._start, keyframe)
            if measurement is not None:
                found.append(measurement)
                self._start = keyframe
        return found

    def _compare(self, start: Keyframe, end: Keyframe) -> Measurement | None:
        assert start.T_odom_base is not None
        assert end.T_odom_base is not None
        T_odom = geometry.inverse(start.T_odom_base) @ end.T_odom_base
        metres = float(np.linalg.norm(T_odom[:3, 3]))
        units = float(np.linalg.norm(end.T_world_camera[:3, 3] - start.T_world_camera[:3, 3]))
        if metres < self.config.min_baseline or units <= 0:
            return None
        # the camera is not where the robot turns: its lever arm adds motion that odometry does not count
        lever = 2 * self.config.max_lever * np.sin(0.5 * geometry.rotation_angle(T_odom[:3, :3]))
        sigma = float(np.hypot(ODOMETRY_SIGMA, lever / metres))
        return Measurement(float(np.log(metres / units)), sigma, "odometry", end.id)


def from_model(keyframe: Keyframe, log_scale: float, sigma: float) -> Measurement:
    """A metric network: ``log_scale`` is that of world units per metre of its depth."""
    return Measurement(-log_scale, float(np.hypot(MODEL_SIGMA, sigma)), "model", keyframe.id)
