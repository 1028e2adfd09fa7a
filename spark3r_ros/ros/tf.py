"""Transforms in and out: a listener with tf2's own buffer where it is installed, a small one otherwise."""

from __future__ import annotations

import bisect
import threading
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import numpy as np
from geometry_msgs.msg import TransformStamped
from rclpy.callback_groups import CallbackGroup
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rclpy.subscription import Subscription
from rclpy.time import Time
from tf2_msgs.msg import TFMessage

from spark3r_ros import geometry
from spark3r_ros.ros import conversions, optional, qos, stamps

CACHE_NS = 10 * stamps.NS_PER_S


class TransformError(LookupError):
    """No transform between two frames at the time asked for."""


class Buffer(Protocol):
    """History of transforms; ``stamp_ns`` None means the newest time at which the whole chain is known.

    ``insert`` raises ValueError for what is no rigid transform, ``lookup`` TransformError.
    """

    def insert(self, msg: TransformStamped, *, static: bool) -> None: ...

    def lookup(self, target: str, source: str, stamp_ns: int | None) -> np.ndarray: ...

    def clear(self) -> None: ...


class OwnBuffer:
    """Linear and spherical interpolation over the last ten seconds, as tf2 does; it never extrapolates."""

    def __init__(self) -> None:
        self._links: dict[str, _Link] = {}

    def insert(self, msg: TransformStamped, *, static: bool) -> None:
        child, parent = _name(msg.child_frame_id), _name(msg.header.frame_id)
        link = self._links.get(child)
        if link is None or link.parent != parent or link.static != static:
            link = self._links[child] = _Link(parent, static)
        link.insert(stamps.to_ns(msg.header.stamp), conversions.matrix_from_transform(msg.transform))

    def lookup(self, target: str, source: str, stamp_ns: int | None) -> np.ndarray:
        up_source, up_target = self._chain(source), self._chain(target)
        common = next((f for f in up_source if f in up_target), None)
        if common is None:
            raise TransformError(f"{target!r} and {source!r} are not connected")
        up_source = up_source[: up_source.index(common)]
        up_target = up_target[: up_target.index(common)]
        if stamp_ns is None:
            moving = [self._links[f].stamps[-1] for f in up_source + up_target if not self._links[f].static]
            stamp_ns = min(moving, default=0)
        T_common_source = self._compose(up_source, stamp_ns)
        T_common_target = self._compose(up_target, stamp_ns)
        return geometry.inverse(T_common_target) @ T_common_source

    def clear(self) -> None:
        self._links.clear()

    def _chain(self, frame: str) -> list[str]:
        chain = [frame]
        while chain[-1] in self._links and len(chain) < 1000:
            chain.append(self._links[chain[-1]].parent)
            if chain[-1] in chain[:-1]:
                raise TransformError(f"the transforms above {frame!r} form a loop")
        return chain

    def _compose(self, chain: Iterable[str], stamp_ns: int) -> np.ndarray:
        T = np.eye(4)
        for frame in chain:
            T = self._links[frame].at(stamp_ns, frame) @ T
        return T


class _Link:
    def __init__(self, parent: str, static: bool):
        self.parent = parent
        self.static = static
        self.stamps: list[int] = []
        self._transforms: list[np.ndarray] = []

    def insert(self, stamp_ns: int, T: np.ndarray) -> None:
        if self.static:
            self.stamps, self._transforms = [stamp_ns], [T]
            return
        at = bisect.bisect_left(self.stamps, stamp_ns)
        if at < len(self.stamps) and self.stamps[at] == stamp_ns:
            self._transforms[at] = T
            return
        self.stamps.insert(at, stamp_ns)
        self._transforms.insert(at, T)
        if self.stamps[-1] - self.stamps[0] > 2 * CACHE_NS:  # seldom, so that the lists are rarely moved
            keep = bisect.bisect_left(self.stamps, self.stamps[-1] - CACHE_NS)
            del self.stamps[:keep], self._transforms[:keep]

    def at(self, stamp_ns: int, child: str) -> np.ndarray:
        if self.static:
            return self._transforms[0]
        after = bisect.bisect_left(self.stamps, stamp_ns)
        if after < len(self.stamps) and self.stamps[after] == stamp_ns:
            return self._transforms[after]
        if after == 0 or after == len(self.stamps):
            raise TransformError(f"{self.parent!r} <- {child!r} is not known at {stamp_ns} ns")
        before = after - 1
        ratio = (stamp_ns - self.stamps[before]) / (self.stamps[after] - self.stamps[before])
        return geometry.interpolate_pose(self._transforms[before], self._transforms[after], ratio)


class Tf2Buffer:
    """The buffer of tf2_ros behind the same interface."""

    def __init__(self) -> None:
        self._buffer = optional.tf2_ros.Buffer(cache_time=Duration(nanoseconds=CACHE_NS))

    def insert(self, msg: TransformStamped, *, static: bool) -> None:
        conversions.matrix_from_transform(msg.transform)  # ValueError; tf2 itself prints a line and goes on without it
        add = self._buffer.set_transform_static if static else self._buffer.set_transform
        add(msg, "spark3r")

    def lookup(self, target: str, source: str, stamp_ns: int | None) -> np.ndarray:
        try:
            found = self._buffer.lookup_transform(target, source, Time(nanoseconds=stamp_ns or 0))
        except optional.tf2_ros.TransformException as error:
            raise TransformError(str(error)) from None
        return conversions.matrix_from_transform(found.transform)

    def clear(self) -> None:
        self._buffer.clear()


def make_buffer() -> Buffer:
    return OwnBuffer() if optional.tf2_ros is None else Tf2Buffer()


class _Parent(NamedTuple):
    name: str
    static: bool
    stamp_ns: int  # of the last transform


class Transforms:
    """Listens to /tf_static and, while it is needed, to /tf. Filled by the executor, read by the worker."""

    def __init__(self, node: Node, group: CallbackGroup, on_bad: Callable[[str], None], buffer: Buffer | None = None):
        self._node = node
        self._group = group
        self._on_bad = on_bad
        self._buffer = buffer or make_buffer()
        self._parents: dict[str, _Parent] = {}
        self._static: dict[str, TransformStamped] = {}
        self._changed = threading.Condition()
        self._subscriptions: dict[str, Subscription] = {}
        self._listen("/tf_static", qos.TF_STATIC, self._on_static)
        self.listen_to_moving(True)

    def listen_to_moving(self, wanted: bool) -> None:
        """/tf may carry a thousand messages a second; it is left alone when nothing that moves is needed."""
        if wanted and "/tf" not in self._subscriptions:
            self._listen("/tf", qos.TF, self._on_moving)
        elif not wanted and "/tf" in self._subscriptions:
            self._node.destroy_subscription(self._subscriptions.pop("/tf"))

    def destroy(self) -> None:
        for subscription in self._subscriptions.values():
            self._node.destroy_subscription(subscription)
        self._subscriptions.clear()

    def lookup(self, target: str, source: str, stamp_ns: int | None, wait_s: float = 0.0) -> np.ndarray:
        """T_target_source [4, 4] at a stamp, or the newest for None; TransformError when it is not known.

        Waits up to ``wait_s`` for a transform that is late, when the two frames are connected at all.
        """
        target, source = _name(target), _name(source)
        if target == source:
            return np.eye(4)
        deadline = time.monotonic() + wait_s
        with self._changed:
            while True:
                try:
                    return self._buffer.lookup(target, source, stamp_ns)
                except TransformError:
                    left = deadline - time.monotonic()
                    if left <= 0 or not self._connected(target, source) or not self._changed.wait(left):
                        raise

    def parent_of(self, frame: str) -> str | None:
        parent = self._parents.get(_name(frame))
        return parent.name if parent else None

    def is_static(self, a: str, b: str) -> bool:
        """Whether two connected frames are joined by static transforms alone."""
        with self._changed:
            up_a, up_b = self._upwards(_name(a)), self._upwards(_name(b))
            between = [f for f in up_a + up_b if not (f in up_a and f in up_b)]
            return self._connected(_name(a), _name(b)) and all(self._parents[f].static for f in between)

    def clear(self) -> None:
        """Forget everything that moves; static transforms stay true."""
        with self._changed:
            self._buffer.clear()
            self._parents = {child: parent for child, parent in self._parents.items() if parent.static}
            for msg in self._static.values():
                self._buffer.insert(msg, static=True)

    def _listen(self, topic: str, profile: QoSProfile, callback: Callable[[TFMessage], None]) -> None:
        self._subscriptions[topic] = self._node.create_subscription(
            TFMessage, topic, callback, profile, callback_group=self._group, event_callbacks=qos.NO_EVENTS
        )

    def _on_static(self, msg: TFMessage) -> None:
        self._insert(msg, static=True)

    def _on_moving(self, msg: TFMessage) -> None:
        self._insert(msg, static=False)

    def _insert(self, msg: TFMessage, *, static: bool) -> None:
        with self._changed:
            for item in msg.transforms:
                child, stamp_ns = _name(item.child_frame_id), stamps.to_ns(item.header.stamp)
                if not static and self._is_of_earlier_time(child, stamp_ns):
                    self.clear()
                try:
                    self._buffer.insert(item, static=static)
                except ValueError as error:
                    self._on_bad(f"transform of {child!r} refused: {error}")
                    continue
                self._parents[child] = _Parent(_name(item.header.frame_id), static, stamp_ns)
                if static:
                    self._static[child] = item
            self._changed.notify_all()

    def _is_of_earlier_time(self, child: str, stamp_ns: int) -> bool:
        """Time went back, and a transform of before came after ``clear``: buffers refuse what is so much older."""
        before = self._parents.get(child)
        return before is not None and not before.static and stamp_ns < before.stamp_ns - stamps.JUMP_BACK_NS

    def _connected(self, a: str, b: str) -> bool:
        return not set(self._upwards(a)).isdisjoint(self._upwards(b))

    def _upwards(self, frame: str) -> list[str]:
        chain = [frame]
        while chain[-1] in self._parents and len(chain) < 1000:
            chain.append(self._parents[chain[-1]].name)
        return chain


def _name(frame: str) -> str:
    return frame.removeprefix("/")  # tf of ROS 1 wrote /base_link, and old drivers still do
