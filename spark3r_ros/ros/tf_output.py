"""The transforms that tf_mode asks for: one per pose, and map -> odom again and again."""

from __future__ import annotations

import time

import numpy as np
from rclpy.node import Node
from rclpy.publisher import Publisher
from tf2_msgs.msg import TFMessage

from spark3r_ros import geometry
from spark3r_ros.config import NodeConfig
from spark3r_ros.ros import conversions, stamps

RESEND_S = 0.05
_Transform = tuple[str, str, int, np.ndarray]  # parent, child, stamp_ns, T_parent_child


class TransformOutput:
    """Publishes on /tf; poses come from the worker, ``image_arrived`` and ``resend`` from the executor."""

    def __init__(self, node: Node, config: NodeConfig, publisher: Publisher):
        self.config = config
        self._node = node
        self._publisher = publisher
        self._writers: dict[tuple[tuple[str, str], ...], conversions.TransformWriter] = {}
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
            parent, child, stamp_ns, T = self._map_to_odom(self._present_ns(), T_map_odom)
            # half the period: the next image may come just before the whole one and the one after it far too late
            self._due = time.monotonic() + 0.5 * RESEND_S
            message = conversions.transform_message(parent, child, stamp_ns, T)  # the writers are the worker's
            self._publisher.publish(TFMessage(transforms=[message]))

    def send(self, parent: str, child: str, stamp_ns: int, T_parent_child: np.ndarray) -> None:
        """The transform of one pose, and map -> odom beside it."""
        transforms = [self._directed(parent, child, stamp_ns, T_parent_child)]
        if self._T_map_odom is not None:
            transforms.append(self._map_to_odom(self._present_ns(), self._T_map_odom))
            self._due = time.monotonic() + 0.9 * RESEND_S  # the next pose brings it along
        self._publish(transforms)

    def set_map_to_odom(self, T_map_odom: np.ndarray, stamp_ns: int) -> None:
        """Send this from now on; the first one also for ``stamp_ns``, so that nothing before it has to be known."""
        first, self._T_map_odom = self._T_map_odom is None, T_map_odom
        if first:
            self._publish([self._map_to_odom(stamp_ns, T_map_odom)])

    def _present_ns(self) -> int:
        assert self._newest is not None, "a pose without an image"
        stamp_ns, clock_ns = self._newest
        elapsed_ns = max(self._node.get_clock().now().nanoseconds - clock_ns, 0)
        return stamp_ns + elapsed_ns + int(self.config.transform_tolerance * stamps.NS_PER_S)

    def _map_to_odom(self, stamp_ns: int, T_map_odom: np.ndarray) -> _Transform:
        return self._directed(self.config.map_frame, self.config.odom_frame, stamp_ns, T_map_odom)

    def _directed(self, parent: str, child: str, stamp_ns: int, T_parent_child: np.ndarray) -> _Transform:
        if self.config.invert_tf:
            return child, parent, stamp_ns, geometry.inverse(T_parent_child)
        return parent, child, stamp_ns, T_parent_child

    def _publish(self, transforms: list[_Transform]) -> None:
        links = tuple((parent, child) for parent, child, _, _ in transforms)
        if links not in self._writers:
            self._writers[links] = conversions.TransformWriter(links)
        self._publisher.publish(self._writers[links].write([(stamp_ns, T) for _, _, stamp_ns, T in transforms]))
