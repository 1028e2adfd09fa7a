"""The transforms that tf_mode asks for: one per pose, and map -> odom again and again."""

from __future__ import annotations

import time

import numpy as np
from geometry_msgs.msg import TransformStamped
from rclpy.node import Node
from rclpy.publisher import Publisher
from tf2_msgs.msg import TFMessage

from spark3r_ros import geometry
from spark3r_ros.config import NodeConfig
from spark3r_ros.ros import conversions, stamps

RESEND_S = 0.05


class TransformOutput:
    """Publishes on /tf; poses come from the worker, ``image_arrived`` and ``resend`` from the executor."""

    def __init__(self, node: Node, config: NodeConfig, publisher: Publisher):
        self.config = config
        self._node = node
        self._publisher = publisher
        self._pose, self._map_to_odom = TransformStamped(), TransformStamped()  # the worker's, used again and again
        self._newest: tuple[int, int] | None = None  # stamp of the newest image, and the node's clock at its arrival
        self.restart()

    def restart(self) -> None:
        """Send no map -> odom until the next pose. The newest image may be one of the time after already."""
        self._T_map_odom: np.ndarray | None = None
        self._due = 0.0  # when image_arrived sends again

    def image_arrived(self, stamp_ns: int) -> None:
        """Stands in for the timer while images come faster than it fires."""
        self._newest = (stamp_ns, self._node.get_clock().now().nanoseconds)
        if time.monotonic() >= self._due:
            self.resend()

    def resend(self) -> None:
        """map -> odom, dated transform_tolerance after the present: the time of images that would arrive now."""
        T_map_odom = self._T_map_odom
        if T_map_odom is not None and self._newest is not None:
            map_to_odom = TransformStamped()  # not the worker's: this is the executor's thread
            self._fill(map_to_odom, self.config.map_frame, self.config.odom_frame, self._present_ns(), T_map_odom)
            # half the period: the next image may come just before the whole one and the one after it far too late
            self._publish([map_to_odom], 0.5 * RESEND_S)

    def send(self, parent: str, child: str, stamp_ns: int, T_parent_child: np.ndarray) -> None:
        """The transform of one pose, and map -> odom beside it."""
        self._fill(self._pose, parent, child, stamp_ns, T_parent_child)
        if self._T_map_odom is None:
            self._publish([self._pose])
        else:
            self._fill_map_to_odom(self._present_ns(), self._T_map_odom)
            self._publish([self._pose, self._map_to_odom], 0.9 * RESEND_S)  # the next pose brings it along

    def set_map_to_odom(self, T_map_odom: np.ndarray, stamp_ns: int) -> None:
        """Send this from now on; the first one also for ``stamp_ns``, so that nothing before it has to be known."""
        first, self._T_map_odom = self._T_map_odom is None, T_map_odom
        if first:
            self._fill_map_to_odom(stamp_ns, T_map_odom)
            self._publish([self._map_to_odom])

    def _present_ns(self) -> int:
        assert self._newest is not None, "a pose without an image"
        stamp_ns, clock_ns = self._newest
        elapsed_ns = max(self._node.get_clock().now().nanoseconds - clock_ns, 0)
        return stamp_ns + elapsed_ns + int(self.config.transform_tolerance * stamps.NS_PER_S)

    def _fill_map_to_odom(self, stamp_ns: int, T_map_odom: np.ndarray) -> None:
        self._fill(self._map_to_odom, self.config.map_frame, self.config.odom_frame, stamp_ns, T_map_odom)

    def _fill(self, msg: TransformStamped, parent: str, child: str, stamp_ns: int, T_parent_child: np.ndarray) -> None:
        if self.config.invert_tf:
            parent, child, T_parent_child = child, parent, geometry.inverse(T_parent_child)
        conversions.set_transform(msg, parent, child, stamp_ns, T_parent_child)

    def _publish(self, transforms: list[TransformStamped], due_s: float = 0.0) -> None:
        self._due = time.monotonic() + due_s
        self._publisher.publish(TFMessage(transforms=transforms))
