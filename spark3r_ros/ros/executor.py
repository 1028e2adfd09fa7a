"""An executor that spends less on every message."""

from __future__ import annotations

import time
from typing import Any

from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.subscription import Subscription

REST_S = 0.1  # how long all but messages and timers may wait while messages stream in
_REST: dict[str, tuple[()]] = {"clients": (), "services": (), "waitables": ()}


class LeanExecutor(SingleThreadedExecutor):
    """rclpy's, which builds its wait set twice for each message: it triggers itself after every callback.

    In a node with many services a wait set costs as much as taking a 640x480 image. Here the second one has only the
    timers, which trigger themselves when a callback resets them; it returns at once. And while messages come, services,
    clients, events and tasks are looked for ten times a second, or when a timer fires or something else wakes it.
    """

    _has_run = False
    _is_streaming = False  # the last callback was that of a message
    _rest_seen = 0.0  # when the rest was looked for, time.monotonic()

    def spin_once(self, timeout_sec: float | None = None) -> None:
        super().spin_once(timeout_sec)
        self._has_run = True

    def wait_for_ready_callbacks(self, *args: Any, **kwargs: Any) -> Any:
        ready = super().wait_for_ready_callbacks(*args, **kwargs)
        self._is_streaming = isinstance(ready[1], Subscription)
        return ready

    def get_nodes(self) -> list[Any]:
        """Asked for whenever a wait set is built."""
        nodes = super().get_nodes()
        now = time.monotonic()
        if self._has_run:
            self._has_run = False
            self.wake()  # in case that nothing has triggered it
            return [_Part(node, subscriptions=(), guards=(), **_REST) for node in nodes]
        if self._is_streaming and now - self._rest_seen < REST_S:
            self._is_streaming = False  # when something else wakes it, it is looked for
            return [_Part(node, **_REST) for node in nodes]
        self._rest_seen = now
        return nodes


class _Part:
    """A node that keeps some of its entities to itself, and its pending tasks."""

    def __init__(self, node: Node, **hidden: tuple[()]) -> None:
        self._node = node
        self.__dict__.update(hidden)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node, name)
