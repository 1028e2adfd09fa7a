"""Plays a rosbag2 into DDS without rosbag2: raw messages as they were recorded, and /clock beside them.

``python -m spark3r_ros.ros.player BAG`` does what ``ros2 bag play --clock 100 BAG`` does on a ROS machine. It waits for
its subscribers before the first message, and for its last messages to be taken before it ends.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from rclpy.duration import Duration
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rosbags.rosbag2 import Reader
from rosgraph_msgs.msg import Clock

from spark3r_ros.ros import stamps

_ACKNOWLEDGED_S = 10.0  # how long the last messages may take to arrive


class PlayError(Exception):
    """The bag cannot be played; the message says why and what to do."""


@dataclass
class Report:
    """What was played."""

    sent: Counter[str] = field(default_factory=Counter)  # messages by topic
    late_ms: list[float] = field(default_factory=list)  # of each message against its time in the bag
    wall_s: float = 0.0

    def __str__(self) -> str:
        topics = ", ".join(f"{topic} {count}" for topic, count in sorted(self.sent.items()))
        late = f"{np.median(self.late_ms):.1f} ms late (median)" if self.late_ms else "nothing sent"
        return f"{sum(self.sent.values())} messages in {self.wall_s:.1f} s, {late}: {topics}"


def play(
    node: Node,
    bag: str | Path,
    *,
    rate: float = 1.0,
    loops: int = 1,
    topics: Iterable[str] = (),
    remap: Mapping[str, str] | None = None,
    reliable: bool = True,
    clock_hz: float = 100.0,
    wait_for: Iterable[str] = (),
    wait_s: float = 30.0,
    on_message: Callable[[str], None] = lambda topic: None,
) -> Report:
    """Publish the messages of a bag at their times.

    Args:
        node: publishes; nobody needs to spin it.
        rate: 2.0 is twice as fast as recorded.
        loops: how often the bag is played; /clock jumps back at every new start.
        topics: only these, as recorded; empty: all whose type can be imported.
        remap: recorded topic -> topic to publish on.
        reliable: no message is dropped for a slow subscriber: publishing waits. Off: as recorded.
        clock_hz: of /clock; 0: none.
        wait_for: topics, as published, that need a subscriber before the first message.
        on_message: called after each message with its topic.

    Raises:
        PlayError: no bag, no messages, or no subscribers within ``wait_s``.
    """
    path = Path(bag)
    if not (path / "metadata.yaml").is_file():
        raise PlayError(f"{path} is not a rosbag2: there is no {path / 'metadata.yaml'}")
    with Reader(path) as reader, contextlib.ExitStack() as undo:
        publishers = _publishers(node, reader, set(topics), dict(remap or {}), reliable)
        clock = node.create_publisher(Clock, "/clock", QoSProfile(depth=1)) if clock_hz > 0 else None
        for publisher in [*publishers.values(), *([clock] if clock else [])]:
            undo.callback(node.destroy_publisher, publisher)
        _wait_for_subscribers(node, wait_for, wait_s)
        report, started = Report(), time.monotonic()
        for _ in range(loops):
            _play_once(reader, publishers, clock, rate, clock_hz, report, on_message)
        for publisher in publishers.values():
            publisher.wait_for_all_acked(Duration(seconds=_ACKNOWLEDGED_S))
        report.wall_s = time.monotonic() - started
        return report


def _publishers(
    node: Node, reader: Reader, topics: set[str], remap: dict[str, str], reliable: bool
) -> dict[int, Publisher]:
    """A publisher per connection of the bag, by connection id."""
    unknown = topics - {c.topic for c in reader.connections}
    if unknown:
        raise PlayError(f"the bag has no topic {', '.join(sorted(unknown))}; it has {', '.join(sorted(reader.topics))}")
    publishers: dict[int, Publisher] = {}
    for connection in reader.connections:
        if connection.topic == "/clock" or (topics and connection.topic not in topics):
            continue
        kind = message_type(connection.msgtype)
        if kind is None:
            if topics:
                raise PlayError(f"{connection.topic}: {connection.msgtype} is not installed")
            node.get_logger().warning(f"{connection.topic} is left out: {connection.msgtype} is not installed")
            continue
        topic = remap.get(connection.topic, connection.topic)
        publishers[connection.id] = node.create_publisher(kind, topic, _profile(connection, reliable))
    if not publishers:
        raise PlayError("the bag has no topic that can be played")
    return publishers


def message_type(name: str) -> type | None:
    """The class of ``package/msg/Type``, None when its package is not installed."""
    package, *_, leaf = name.split("/")
    try:
        return getattr(importlib.import_module(f"{package}.msg"), leaf, None)
    except ImportError:
        return None


def _profile(connection: Any, reliable: bool) -> QoSProfile:
    offered = connection.ext.offered_qos_profiles
    recorded = offered[0] if offered else None
    latched = recorded is not None and recorded.durability.name == "TRANSIENT_LOCAL"
    best_effort = recorded is not None and recorded.reliability.name == "BEST_EFFORT" and not reliable
    return QoSProfile(
        depth=10,
        history=HistoryPolicy.KEEP_ALL if reliable else HistoryPolicy.KEEP_LAST,
        reliability=ReliabilityPolicy.BEST_EFFORT if best_effort else ReliabilityPolicy.RELIABLE,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE,
    )


def _wait_for_subscribers(node: Node, topics: Iterable[str], wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    missing = set(topics)
    while missing := {topic for topic in missing if not node.count_subscribers(topic)}:
        if time.monotonic() > deadline:
            raise PlayError(f"nobody subscribes to {', '.join(sorted(missing))} after {wait_s:g} s")
        time.sleep(0.02)


def _play_once(
    reader: Reader,
    publishers: Mapping[int, Publisher],
    clock: Publisher | None,
    rate: float,
    clock_hz: float,
    report: Report,
    on_message: Callable[[str], None],
) -> None:
    begin: tuple[int, float] | None = None
    for connection, stamp_ns, data in reader.messages([c for c in reader.connections if c.id in publishers]):
        if begin is None:
            begin, tick_ns = (stamp_ns, time.monotonic()), stamp_ns
        while clock is not None and tick_ns <= stamp_ns:
            _sleep_until(tick_ns, begin, rate)
            clock.publish(Clock(clock=stamps.to_msg(tick_ns)))
            tick_ns += int(stamps.NS_PER_S * rate / clock_hz)
        report.late_ms.append(_sleep_until(stamp_ns, begin, rate))
        publisher = publishers[connection.id]
        publisher.publish(data)
        report.sent[publisher.topic_name] += 1
        on_message(publisher.topic_name)


def _sleep_until(stamp_ns: int, begin: tuple[int, float], rate: float) -> float:
    """Sleep until a time of the bag; returns by how many milliseconds that was missed."""
    due = begin[1] + 1e-9 * (stamp_ns - begin[0]) / rate
    early = due - time.monotonic()
    if early > 0:
        time.sleep(early)
    return 1e3 * (time.monotonic() - due)


def main(args: list[str] | None = None) -> int:
    """Entry point of ``python -m spark3r_ros.ros.player``."""
    rclpy.init(args=args)
    words = rclpy.utilities.remove_ros_args(sys.argv if args is None else ["player", *args])[1:]
    parser = argparse.ArgumentParser(prog="spark3r_ros.ros.player", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bag", help="rosbag2 folder")
    parser.add_argument("--rate", type=float, default=1.0, help="2.0 is twice as fast as recorded")
    parser.add_argument("--loops", type=int, default=1, help="how often")
    parser.add_argument("--topics", nargs="*", default=[], help="only these")
    parser.add_argument("--remap", nargs="*", default=[], metavar="OLD:=NEW", help="recorded topic to published topic")
    parser.add_argument("--as-recorded", action="store_true", help="best-effort topics stay best effort")
    parser.add_argument("--wait-for", nargs="*", default=[], help="topics that need a subscriber first")
    options = parser.parse_args(words)
    node = Node("player")
    try:
        report = play(
            node, options.bag, rate=options.rate, loops=options.loops, topics=options.topics,
            remap=dict(pair.split(":=", 1) for pair in options.remap),
            reliable=not options.as_recorded, wait_for=options.wait_for,
        )  # fmt: skip
        node.get_logger().info(str(report))
        return 0
    except PlayError as error:
        node.get_logger().fatal(str(error))
        return 1
    except (KeyboardInterrupt, ExternalShutdownException):
        return 0
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # launch passes a second Ctrl-C on
        node.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    sys.exit(main())
