"""The node under test in its own executor thread, and a second node that plays camera and robot, over real DDS."""

from __future__ import annotations

import contextlib
import threading
import time

import numpy as np
import rclpy
from fake import FakeReconstructor
from geometry_msgs.msg import TransformStamped
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image
from std_srvs.srv import Trigger
from tf2_msgs.msg import TFMessage

from spark3r_ros.ros import conversions, stamps
from spark3r_ros.ros.executor import LeanExecutor
from spark3r_ros.ros.node import Spark3rNode, start

CAMERA = "camera_optical_frame"
RELIABLE = QoSProfile(depth=100)
BEST_EFFORT = QoSProfile(depth=100, reliability=ReliabilityPolicy.BEST_EFFORT)
LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
MS = 1_000_000


def now_ns() -> int:
    return time.time_ns()


class Rig:
    """Keyword arguments are parameters of the node. ``remap``: remapping rules; ``started``: whether it is to run."""

    def __init__(self, *, remap=(), started=True, namespace="", **parameters):
        parameters = {"base_frame": "", **parameters}
        arguments = ["--ros-args"] + [word for rule in remap for word in ("-r", rule)]
        self.node = Spark3rNode(
            FakeReconstructor,
            parameter_overrides=[Parameter(name, value=value) for name, value in parameters.items()],
            cli_args=arguments,
            namespace=namespace,
        )
        self.executor = LeanExecutor()
        self.executor.add_node(self.node)
        if started:
            assert start(self.node)
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()
        self.peer = Node("peer", namespace=namespace)
        self._peer_executor = SingleThreadedExecutor()
        self._peer_executor.add_node(self.peer)
        self._image_publisher = None
        self._next_ns = now_ns()
        self._is_closed = False

    @property
    def fake(self) -> FakeReconstructor:
        return self.node._reconstructor

    @property
    def stats(self):
        return self.node.stats

    def _spin(self):
        with contextlib.suppress(ExternalShutdownException):
            self.executor.spin()

    def close(self):
        if self._is_closed:
            return
        self._is_closed = True
        if self.node._entities:
            self.fake.gate.set()
            self.fake.map_gate.set()
        self.executor.shutdown()
        self._thread.join()
        self.node.close()
        self._peer_executor.shutdown()
        self.peer.destroy_node()

    # ---- the peer --------------------------------------------------------------------------------------------------

    def until(self, condition, timeout=30.0):
        """Let the peer receive until the condition holds; its last value. Generous: a busy machine is no failure."""
        deadline = time.monotonic() + timeout
        while not (value := condition()):
            assert time.monotonic() < deadline, "timed out"
            self._peer_executor.spin_once(timeout_sec=0.02)
        return value

    def spin(self, seconds):
        """Let the peer receive for a while: to see that something does not come."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._peer_executor.spin_once(timeout_sec=0.02)

    def listen(self, kind, topic, profile=RELIABLE):
        """Messages of a topic as they come, in a list; the subscription is matched when this returns."""
        got = []
        self.peer.create_subscription(kind, topic, got.append, profile)
        full = self.peer.resolve_topic_name(topic)
        self.until(lambda: self.peer.count_publishers(full) and self.node.count_subscribers(full))
        return got

    def publisher(self, kind, topic, profile=RELIABLE):
        """A publisher that has found the node under test."""
        publisher = self.peer.create_publisher(kind, topic, profile)
        self.until(lambda: publisher.get_subscription_count() and self.node.count_publishers(publisher.topic_name))
        return publisher

    def camera(self, profile=RELIABLE, topic="image"):
        self._image_publisher = self.publisher(Image, topic, profile)
        return self._image_publisher

    def send(self, count=1, *, start_ns=None, step_ns=33 * MS, frame_id=CAMERA, size=(64, 48), wait=True, **fields):
        """Publish images; returns their stamps when all have been used or refused."""
        publisher = self._image_publisher or self.camera()
        start_ns = self._next_ns if start_ns is None else start_ns
        self._next_ns = start_ns + count * step_ns
        sent = []
        for i in range(count):
            before = self.stats.images
            publisher.publish(image(start_ns + i * step_ns, frame_id, size, **fields))
            sent.append(start_ns + i * step_ns)
            if wait:
                self.until(lambda before=before: self.stats.images > before)
                self.until(self.is_idle)
        return sent

    def is_idle(self):
        stats = self.stats
        return stats.images <= stats.poses + sum(stats.dropped.values())

    def call(self, service, timeout=30.0) -> Trigger.Response:
        client = self.peer.create_client(Trigger, service)
        self.until(client.service_is_ready)
        future = client.call_async(Trigger.Request())
        self.until(future.done, timeout)
        self.peer.destroy_client(client)
        return future.result()

    def send_tf(self, *transforms, static=False):
        """Transforms as (parent, child, stamp_ns, T_parent_child), known to the node when this returns."""
        topic, profile = ("/tf_static", LATCHED) if static else ("/tf", RELIABLE)
        publisher = self.__dict__.setdefault("_tf" + topic, None) or self.publisher(TFMessage, topic, profile)
        self.__dict__["_tf" + topic] = publisher
        messages: list[TransformStamped] = [conversions.transform_message(*t) for t in transforms]
        publisher.publish(TFMessage(transforms=messages))
        known = self.node._transforms
        parent, child, stamp_ns, _ = transforms[-1]
        self.until(lambda: _has(known, parent, child, None if static else stamp_ns))


def _has(transforms, parent, child, stamp_ns):
    try:
        transforms.lookup(parent, child, stamp_ns)
    except LookupError:
        return False
    return True


def image(stamp_ns, frame_id=CAMERA, size=(64, 48), encoding="rgb8", data=None) -> Image:
    width, height = size
    channels = {"rgb8": 3, "bgr8": 3, "mono8": 1}.get(encoding, 3)
    msg = Image(width=width, height=height, encoding=encoding, step=channels * width)
    msg.header.frame_id = frame_id
    msg.header.stamp = stamps.to_msg(stamp_ns)
    msg.data.frombytes(bytes(msg.step * height) if data is None else data)
    return msg


def matrix(transform) -> np.ndarray:
    return conversions.matrix_from_transform(transform)


def statuses(message) -> dict[str, dict[str, str]]:
    """A DiagnosticArray as {status name: {key: value}}, with its level and message among the values."""
    return {
        s.name: {"level": s.level, "message": s.message, **{v.key: v.value for v in s.values}} for s in message.status
    }


__all__ = ["CAMERA", "Rig", "image", "matrix", "now_ns", "rclpy", "statuses"]
