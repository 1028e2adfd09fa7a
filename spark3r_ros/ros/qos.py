"""Quality of service of every topic, and the one place where distributions of ROS 2 differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy

try:  # Iron and later
    from rclpy.event_handler import PublisherEventCallbacks, SubscriptionEventCallbacks
except ImportError:  # Humble
    from rclpy.qos_event import PublisherEventCallbacks, SubscriptionEventCallbacks

# Deep enough for the longest time that Python keeps the executor from taking messages (garbage collection, a busy
# machine); the node's own queue decides what is dropped, not this one.
_INPUT_DEPTH = 10

SENSOR = QoSProfile(depth=_INPUT_DEPTH, reliability=ReliabilityPolicy.BEST_EFFORT)
ROBOT_ODOMETRY = QoSProfile(depth=100, reliability=ReliabilityPolicy.BEST_EFFORT)  # up to 200 Hz
ODOMETRY = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)
NEWEST = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
LATCHED = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
TF = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
TF_STATIC = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)


def image_profile(reliability: ReliabilityPolicy, *, keep_all: bool) -> QoSProfile:
    """``keep_all``: the middleware refuses messages instead of dropping them while the node's queue is full."""
    history = HistoryPolicy.KEEP_ALL if keep_all else HistoryPolicy.KEEP_LAST
    return QoSProfile(depth=_INPUT_DEPTH, history=history, reliability=reliability)


def choose_reliability(setting: str, offered: Iterable[ReliabilityPolicy]) -> ReliabilityPolicy:
    """``auto`` asks for what all publishers offer; with none in sight it starts with reliable."""
    if setting == "best_effort" or (setting == "auto" and ReliabilityPolicy.BEST_EFFORT in set(offered)):
        return ReliabilityPolicy.BEST_EFFORT
    return ReliabilityPolicy.RELIABLE


def subscription_events(
    incompatible_qos: Callable[[Any], None], message_lost: Callable[[Any], None]
) -> SubscriptionEventCallbacks:
    return SubscriptionEventCallbacks(
        incompatible_qos=incompatible_qos, message_lost=message_lost, use_default_callbacks=False
    )


# Every event handler costs each wake-up of the executor. Best-effort subscriptions fit every publisher; a subscriber
# that does not fit one of our publishers is told so on its own side.
NO_EVENTS = SubscriptionEventCallbacks(use_default_callbacks=False)
NO_PUBLISHER_EVENTS = PublisherEventCallbacks(use_default_callbacks=False)


class Gate(MutuallyExclusiveCallbackGroup):
    """A callback group whose entities the executor leaves alone while ``is_open`` says no.

    Of a subscription: the middleware keeps its messages, and holds a reliable publisher back.
    """

    def __init__(self, is_open: Callable[[], bool]):
        super().__init__()
        self._is_open = is_open

    def can_execute(self, entity: Any) -> bool:
        return self._is_open() and super().can_execute(entity)
