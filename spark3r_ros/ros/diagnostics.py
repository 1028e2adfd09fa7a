"""What the node counts, and the DiagnosticArray made of it once a second."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

from spark3r_ros.frame import ScaleEstimate, TrackingState, WindowReport

_LATENCIES = 300  # newest ones that the percentiles are of: ten seconds at 30 Hz
_RATE_TICKS = 5

# Why an image did not become a pose. Every image that arrives is counted under exactly one of these or is used.
DROP_REASONS = {
    "queue_full": "the reconstruction was slower than the camera and drop_policy is newest",
    "bad_image": "the image could not be decoded",
    "bad_frame": "the reconstruction refused the frame",
    "zero_stamp": "the header carries no stamp",
    "old_stamp": "not newer than the image before",
    "other_camera": "another frame_id than the images before",
    "paused": "the node was paused",
    "restart": "waiting in the queue when the node was reset, paused or deactivated, or time jumped back",
    "failed": "the reconstruction raised an unexpected error",
}


class Statistics:
    """Counters written by the executor and by the worker, each its own; read once a second."""

    def __init__(self) -> None:
        self.images = 0
        self.poses = 0
        self.points = 0
        self.windows = 0
        self.restarts = 0
        self.lost_by_middleware = 0
        self.dropped: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()  # camera_info, depth and transforms that could not be used
        self.state = TrackingState.INITIALISING
        self.scale = ScaleEstimate()
        self.window: WindowReport | None = None
        self.last_image: float | None = None  # time.monotonic()
        self.worker_error = ""
        self._arrivals: dict[int, float] = {}  # of images that have no pose yet, by stamp
        self._latencies: deque[float] = deque(maxlen=_LATENCIES)
        self._ticks: deque[tuple[float, int, int]] = deque([(time.monotonic(), 0, 0)], maxlen=_RATE_TICKS + 1)

    def image_arrived(self) -> None:
        self.images += 1
        self.last_image = time.monotonic()

    def image_taken(self, stamp_ns: int, arrival: float) -> None:
        self._arrivals[stamp_ns] = arrival

    def pose_sent(self, stamp_ns: int) -> None:
        self.poses += 1
        arrival = self._arrivals.pop(stamp_ns, None)
        if arrival is not None:
            self._latencies.append(time.monotonic() - arrival)

    def frame_dropped(self, reason: str, count: int = 1, stamp_ns: int | None = None) -> None:
        assert reason in DROP_REASONS, reason
        self.dropped[reason] += count
        if stamp_ns is not None:
            self._arrivals.pop(stamp_ns, None)

    def forget_arrivals(self) -> None:
        self._arrivals.clear()
        self._latencies.clear()

    def latency_percentiles_ms(self) -> tuple[float, float]:
        """p50 and p95 from the image's arrival to its odometry, NaN before the first."""
        if not self._latencies:
            return math.nan, math.nan
        ranked = sorted(self._latencies)  # nearest rank: numpy's percentile costs more than the rest of the message
        return 1e3 * ranked[len(ranked) // 2], 1e3 * ranked[int(0.95 * len(ranked))]

    def rates_hz(self) -> tuple[float, float]:
        """Images in and poses out per second, over the last calls of this method."""
        now = time.monotonic()
        self._ticks.append((now, self.images, self.poses))
        then, images, poses = self._ticks[0]
        if now - then < 1e-3:
            return 0.0, 0.0
        return (self.images - images) / (now - then), (self.poses - poses) / (now - then)


def input_status(
    name: str, stats: Statistics, subscription: Mapping[str, Any], problem: str, waiting: int
) -> DiagnosticStatus:
    """``problem``: a sentence about missing or doubtful input, or empty."""
    rate_in, rate_out = stats.rates_hz()
    p50, p95 = stats.latency_percentiles_ms()
    values = {
        **subscription,
        "input_rate_hz": rate_in,
        "output_rate_hz": rate_out,
        "latency_p50_ms": p50,
        "latency_p95_ms": p95,
        "images": stats.images,
        "poses": stats.poses,
        "waiting": waiting,
        "lost_by_middleware": stats.lost_by_middleware,
        "dropped": sum(stats.dropped.values()),
        **{f"dropped_{reason}": stats.dropped[reason] for reason in DROP_REASONS},
        **{f"refused_{kind}": count for kind, count in sorted(stats.refused.items())},
        "restarts": stats.restarts,
    }
    level = DiagnosticStatus.WARN if problem else DiagnosticStatus.OK
    return _status(f"{name}: input", level, problem or f"{rate_in:.1f} images/s, {rate_out:.1f} poses/s", values)


def tracking_status(name: str, stats: Statistics, problem: str, details: Mapping[str, Any]) -> DiagnosticStatus:
    """State, scale and the last window; ``details``: the reconstruction's own figures."""
    report, scale = stats.window, stats.scale
    values: dict[str, Any] = {
        "state": stats.state.value,
        "scale_is_metric": scale.is_metric,
        "scale_metres_per_unit": scale.metres_per_unit,
        "scale_sigma": scale.sigma,
        "scale_source": scale.source,
        "points": stats.points,
        "windows": stats.windows,
        "context_bytes": report.context_bytes if report else 0,
        "context_budget_bytes": report.context_budget if report else 0,
        "window_residual": report.residual if report else math.nan,
        "window_accepted": report.accepted if report else "",
        "window_seconds": report.seconds if report else math.nan,
    }
    values.update({key: value for key, value in details.items() if key not in values})
    if stats.worker_error:
        return _status(f"{name}: tracking", DiagnosticStatus.ERROR, stats.worker_error, values)
    if stats.state is TrackingState.LOST:
        return _status(f"{name}: tracking", DiagnosticStatus.ERROR, "lost: no pose can be trusted", values)
    if problem:
        return _status(f"{name}: tracking", DiagnosticStatus.WARN, problem, values)
    return _status(f"{name}: tracking", DiagnosticStatus.OK, stats.state.value, values)


def array_message(stamp: Any, statuses: list[DiagnosticStatus]) -> DiagnosticArray:
    msg = DiagnosticArray(status=statuses)
    msg.header.stamp = stamp
    return msg


def _status(name: str, level: bytes, message: str, values: Mapping[str, Any]) -> DiagnosticStatus:
    pairs = [KeyValue(key=key, value=_text(value)) for key, value in values.items()]
    return DiagnosticStatus(level=level, name=name, message=message, hardware_id="spark3r", values=pairs)


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
