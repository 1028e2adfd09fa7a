"""Short histories of what arrives beside the images: written by the executor, read by the worker."""

from __future__ import annotations

import bisect
import threading
import time
from typing import Generic, TypeVar

import numpy as np

from spark3r_ros import geometry

Value = TypeVar("Value")


class History(Generic[Value]):
    """The last values of one topic by stamp."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._stamps: list[int] = []
        self._values: list[Value] = []
        self._last_arrival = -float("inf")
        self._arrived = threading.Condition()

    def add(self, stamp_ns: int, value: Value) -> None:
        with self._arrived:
            at = bisect.bisect_right(self._stamps, stamp_ns)
            self._stamps.insert(at, stamp_ns)
            self._values.insert(at, value)
            del self._stamps[: -self._capacity], self._values[: -self._capacity]
            self._last_arrival = time.monotonic()
            self._arrived.notify_all()

    def clear(self) -> None:
        with self._arrived:
            self._stamps.clear()
            self._values.clear()

    @property
    def is_alive(self) -> bool:
        """Whether something arrived within the last second."""
        return time.monotonic() - self._last_arrival < 1.0

    def nearest(self, stamp_ns: int, tolerance_ns: int, wait_s: float = 0.0) -> Value | None:
        """The value closest to a stamp, None when none is close enough; waits for one that is late."""
        with self._arrived:
            self._wait(stamp_ns, wait_s)
            if not self._stamps:
                return None
            after = min(bisect.bisect_left(self._stamps, stamp_ns), len(self._stamps) - 1)
            best = min(after, max(after - 1, 0), key=lambda i: abs(self._stamps[i] - stamp_ns))
            return self._values[best] if abs(self._stamps[best] - stamp_ns) <= tolerance_ns else None

    def around(self, stamp_ns: int, wait_s: float = 0.0) -> tuple[tuple[int, Value], tuple[int, Value]] | None:
        """The two values on either side of a stamp, None when it is not between two."""
        with self._arrived:
            self._wait(stamp_ns, wait_s)
            after = bisect.bisect_left(self._stamps, stamp_ns)
            if after == len(self._stamps):
                return None
            before = after if self._stamps[after] == stamp_ns else after - 1
            if before < 0:
                return None
            return (self._stamps[before], self._values[before]), (self._stamps[after], self._values[after])

    def _wait(self, stamp_ns: int, wait_s: float) -> None:
        deadline = time.monotonic() + wait_s
        while self.is_alive and (not self._stamps or self._stamps[-1] < stamp_ns):
            left = deadline - time.monotonic()
            if left <= 0 or not self._arrived.wait(left):
                return


def interpolated_pose(
    history: History[np.ndarray], stamp_ns: int, tolerance_ns: int, wait_s: float
) -> np.ndarray | None:
    """A pose [4, 4] at a stamp: between two samples, or the nearest one when it is within the tolerance."""
    found = history.around(stamp_ns, wait_s)
    if found is None:
        return history.nearest(stamp_ns, tolerance_ns)
    (stamp0, T0), (stamp1, T1) = found
    if stamp1 == stamp0:
        return T0
    return geometry.interpolate_pose(T0, T1, (stamp_ns - stamp0) / (stamp1 - stamp0))
