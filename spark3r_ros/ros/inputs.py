"""What the node listens to: images and what arrives beside them. Callbacks only check, count and hand over."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from nav_msgs.msg import Odometry
from rclpy.callback_groups import CallbackGroup, MutuallyExclusiveCallbackGroup
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.subscription import Subscription
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from spark3r_ros import calibration
from spark3r_ros.config import NodeConfig
from spark3r_ros.encodings import ImageError
from spark3r_ros.frame import CameraModel, Frame
from spark3r_ros.ros import conversions, qos, stamps
from spark3r_ros.ros.conversions import WireImage
from spark3r_ros.ros.diagnostics import Statistics
from spark3r_ros.ros.sync import History, interpolated_pose
from spark3r_ros.ros.tf import TransformError, Transforms

IMAGE_TYPES = {"raw": Image, "compressed": CompressedImage}

_LATE_S = 0.05  # how long a frame waits for depth or odometry of its own time, when these are alive
_CAMERA_INFO_S = 0.5  # how long the first frame waits for a camera_info that somebody publishes
_QUIET_S = 5.0  # between two log lines of the same kind


@dataclass(frozen=True, eq=False)
class Taken:
    """An image on its way to the worker."""

    msg: WireImage | CompressedImage
    stamp_ns: int
    frame_id: str


class ImageInput:
    """The image subscription: reliability that follows the publishers, checks of stamp and frame, counting.

    Args:
        take: gets every image that passed the checks.
        time_went_back: gets a sentence when stamps jump back; called before ``take`` of the image that showed it.
    """

    def __init__(
        self,
        node: Node,
        config: NodeConfig,
        stats: Statistics,
        has_room: Callable[[], bool],
        take: Callable[[Taken], None],
        time_went_back: Callable[[str], None],
    ):
        self._node = node
        self.config = config
        self._stats = stats
        self._take = take
        self._time_went_back = time_went_back
        keep_all = config.drop_policy == "never"
        self._group = qos.Gate(has_room) if keep_all else MutuallyExclusiveCallbackGroup()
        self._keep_all = keep_all
        self._subscription: Subscription | None = None
        self.reliability = ReliabilityPolicy.RELIABLE
        self.is_paused = False
        self.newest_ns: int | None = None
        self.frame_id: str | None = None

    def open(self) -> None:
        self.forget()
        self._subscribe(qos.choose_reliability(self.config.reliability, self._offered()))

    def close(self) -> None:
        if self._subscription is not None:
            self._node.destroy_subscription(self._subscription)
            self._subscription = None

    def forget(self) -> None:
        """Take any stamp and any frame next: after a reset."""
        self.newest_ns = None
        self.frame_id = None

    @property
    def topic(self) -> str:
        return self._node.resolve_topic_name("image")

    def follow_publishers(self) -> None:
        """Re-create the subscription when the publishers offer another reliability than the one asked for."""
        offered = self._offered()
        if self._subscription is None or not offered:
            return
        wanted = qos.choose_reliability(self.config.reliability, offered)
        if wanted != self.reliability:
            self._node.get_logger().info(f"{self.topic}: publishers offer {wanted.name.lower()}, subscribing anew")
            self.close()
            self._subscribe(wanted)

    def describe(self) -> dict[str, Any]:
        publishers = self._node.get_publishers_info_by_topic(self.topic)
        return {
            "topic": self.topic,
            "type": IMAGE_TYPES[self.config.image_transport].__name__,
            "reliability": self.reliability.name.lower(),
            "publishers": len(publishers),
            "publisher_reliability": ", ".join(sorted({p.qos_profile.reliability.name.lower() for p in publishers})),
            "publisher_types": ", ".join(sorted({p.topic_type for p in publishers})),
        }

    def why_silent(self) -> str:
        """The likely cause of missing images, in words."""
        seen = self.describe()
        own_type = f"sensor_msgs/msg/{seen['type']}"
        start = f"no images on {self.topic} ({seen['reliability']}) for {self.config.no_data_timeout:g} s"
        if not seen["publishers"]:
            text = f"{start}: nobody publishes there; is the camera running, is the topic remapped right?"
            return text + self._elsewhere(own_type)
        if seen["publisher_types"] != own_type:
            text = f"{start}: it carries {seen['publisher_types']}, not {own_type}; set image_transport or the topic"
            return text + self._elsewhere(own_type)
        if self.reliability is ReliabilityPolicy.RELIABLE and "best_effort" in seen["publisher_reliability"]:
            return f"{start}: the publisher is best_effort, this subscription reliable; set reliability to auto"
        return (
            f"{start}: {seen['publishers']} publisher(s) with matching QoS ({seen['publisher_reliability']}) "
            "send nothing, or images are larger than the shared-memory segment of the publisher's DDS profile"
        )

    def _elsewhere(self, own_type: str) -> str:
        """Where other nodes publish such images."""
        own = self._node.get_name(), self._node.get_namespace()
        topics = [
            topic
            for topic, types in self._node.get_topic_names_and_types()
            if own_type in types and topic != self.topic
            for publisher in self._node.get_publishers_info_by_topic(topic)[:1]
            if (publisher.node_name, publisher.node_namespace) != own
        ]
        return f" {own_type} is published on {', '.join(sorted(topics))}" if topics else ""

    def _subscribe(self, reliability: ReliabilityPolicy) -> None:
        self.reliability = reliability
        is_raw = self.config.image_transport == "raw"
        self._subscription = self._node.create_subscription(
            IMAGE_TYPES[self.config.image_transport],
            "image",
            self._on_raw if is_raw else self._on_compressed,
            qos.image_profile(reliability, keep_all=self._keep_all),
            raw=is_raw,
            callback_group=self._group,
            event_callbacks=qos.subscription_events(self._on_incompatible_qos, self._on_message_lost),
        )

    def _offered(self) -> list[ReliabilityPolicy]:
        return [p.qos_profile.reliability for p in self._node.get_publishers_info_by_topic(self.topic)]

    def _on_incompatible_qos(self, event: Any) -> None:
        if self.config.reliability == "auto":
            self.follow_publishers()
        else:
            self._node.get_logger().warning(f"{self.topic}: a publisher's QoS does not fit {self.reliability.name}")

    def _on_message_lost(self, event: Any) -> None:
        self._stats.lost_by_middleware += event.total_count_change

    def _on_raw(self, wire: bytes) -> None:
        image = WireImage.read(wire)
        self._on_image(image, image.stamp_ns, image.frame_id)

    def _on_compressed(self, msg: CompressedImage) -> None:
        self._on_image(msg, stamps.to_ns(msg.header.stamp), msg.header.frame_id)

    def _on_image(self, msg: WireImage | CompressedImage, stamp_ns: int, frame_id: str) -> None:
        stats = self._stats
        stats.image_arrived()
        frame_id = self.config.camera_frame or frame_id
        if self.is_paused:
            stats.frame_dropped("paused")
        elif stamp_ns <= 0:
            self._refuse("zero_stamp", "image without a stamp: the driver must fill header.stamp")
        elif not frame_id:
            self._refuse("other_camera", "image without header.frame_id: name its optical frame in camera_frame")
        elif self.frame_id is not None and frame_id != self.frame_id:
            text = f"image of {frame_id!r} among those of {self.frame_id!r}: run one node per camera, or ~/reset"
            self._refuse("other_camera", text)
        elif self.newest_ns is not None and self.newest_ns - stamps.JUMP_BACK_NS <= stamp_ns <= self.newest_ns:
            self._refuse("old_stamp", f"image with stamp {stamp_ns} ns, not after {self.newest_ns} ns")
        else:
            if self.newest_ns is not None and stamp_ns < self.newest_ns:
                self._time_went_back(f"image stamps jumped back by {1e-9 * (self.newest_ns - stamp_ns):.3f} s")
            self.newest_ns, self.frame_id = stamp_ns, frame_id
            stats.image_taken(stamp_ns, time.monotonic())
            self._take(Taken(msg, stamp_ns, frame_id))

    def _refuse(self, reason: str, text: str) -> None:
        self._stats.frame_dropped(reason)
        self._node.get_logger().error(text, throttle_duration_sec=_QUIET_S)


class Companions:
    """camera_info, depth and the robot's odometry, as they were at the time of an image."""

    def __init__(self, node: Node, config: NodeConfig, stats: Statistics, transforms: Transforms, group: CallbackGroup):
        self._node = node
        self.config = config
        self._stats = stats
        self._transforms = transforms
        self._group = group
        self._camera_info: CameraInfo | None = None
        self._camera: tuple[tuple[Any, ...], CameraModel | None] | None = None
        self._depth: History[Image] = History(30)
        self._odometry: History[np.ndarray] = History(2000)
        self._subscriptions: list[Subscription] = []

    def open(self) -> None:
        self._listen(CameraInfo, "camera_info", self._on_camera_info)
        self._listen(Image, "depth", self._on_depth)
        if self.config.odom_source in ("auto", "topic"):
            self._listen(Odometry, "odom", self._on_odometry, qos.ROBOT_ODOMETRY)

    def close(self) -> None:
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions.clear()

    def clear(self) -> None:
        """Forget what moves with time; the calibration stays."""
        self._depth.clear()
        self._odometry.clear()

    def frame(self, taken: Taken) -> Frame:
        """Decode an image and put beside it what was known at its time. Raises ImageError."""
        if self.config.image_transport == "compressed":
            image = conversions.decode_compressed(taken.msg)
        else:
            image = conversions.decode_image(taken.msg)
        height, width = image.shape[:2]
        return Frame(
            stamp_ns=taken.stamp_ns,
            image=image,
            frame_id=taken.frame_id,
            camera=self._camera_of(width, height, taken.frame_id),
            depth=self._depth_at(taken),
            T_odom_base=self.T_odom_base(taken.stamp_ns),
        )

    def T_odom_base(self, stamp_ns: int) -> np.ndarray | None:
        """The robot's own odometry at a stamp, from the source that odom_source names."""
        source, config = self.config.odom_source, self.config
        tolerance_ns = int(config.sync_tolerance * stamps.NS_PER_S)
        if source == "topic" or (source == "auto" and self._odometry.is_alive):
            return interpolated_pose(self._odometry, stamp_ns, tolerance_ns, _LATE_S)
        if config.base_frame and (source == "tf" or (source == "auto" and config.tf_mode == "map_to_odom")):
            try:
                return self._transforms.lookup(config.odom_frame, config.base_frame, stamp_ns, _LATE_S)
            except TransformError:
                return None
        return None

    @property
    def uses_moving_transforms(self) -> bool:
        """Whether odometry may have to be read from /tf."""
        return self.config.odom_source == "tf" or (
            self.config.odom_source == "auto" and self.config.tf_mode == "map_to_odom"
        )

    def _listen(
        self, kind: type, topic: str, callback: Callable[[Any], None], profile: QoSProfile = qos.SENSOR
    ) -> None:
        subscription = self._node.create_subscription(
            kind, topic, callback, profile, callback_group=self._group, event_callbacks=qos.NO_EVENTS
        )
        self._subscriptions.append(subscription)

    def _on_camera_info(self, msg: CameraInfo) -> None:
        self._camera_info = msg

    def _on_depth(self, msg: Image) -> None:
        self._depth.add(stamps.to_ns(msg.header.stamp), msg)

    def _on_odometry(self, msg: Odometry) -> None:
        parent, odom = msg.header.frame_id, self.config.odom_frame
        if self.config.tf_mode == "map_to_odom" and parent and parent != odom:
            self._refuse("odometry", f"odometry is in {parent!r}, odom_frame is {odom!r}: set odom_frame to {parent!r}")
            return
        try:
            T_odom_base = conversions.matrix_from_pose(msg.pose.pose) @ self._T_child_base(msg.child_frame_id)
            self._odometry.add(stamps.to_ns(msg.header.stamp), T_odom_base)
        except (ValueError, TransformError) as error:
            self._refuse("odometry", str(error))

    def _T_child_base(self, child: str) -> np.ndarray:
        """Odometry may be that of another part of the robot, say base_footprint. TransformError when TF lacks it."""
        base = self.config.base_frame
        if not base or not child or child == base:
            return np.eye(4)
        return self._transforms.lookup(child, base, None)

    def _camera_of(self, width: int, height: int, frame_id: str) -> CameraModel | None:
        """The calibration for images of this size; None when the camera is not calibrated."""
        if self._camera_info is None and self._camera is None:
            self._wait_for_camera_info()
        msg = self._camera_info
        if msg is None:
            return None
        roi = msg.roi
        key = (width, height, frame_id, msg.header.frame_id, msg.width, msg.height, tuple(msg.k), tuple(msg.d),
               tuple(msg.p), msg.distortion_model, msg.binning_x, msg.binning_y,
               roi.x_offset, roi.y_offset, roi.width, roi.height)  # fmt: skip
        if self._camera is None or self._camera[0] != key:
            self._camera = (key, self._convert(msg, width, height, frame_id))
        return self._camera[1]

    def _convert(self, msg: CameraInfo, width: int, height: int, frame_id: str) -> CameraModel | None:
        if msg.header.frame_id != frame_id and not self.config.camera_frame:
            self._refuse("camera_info", f"camera_info is of {msg.header.frame_id!r}, the images are of {frame_id!r}")
            return None
        try:
            return calibration.camera_from_info(msg, width, height, rectified=self.config.image_is_rectified)
        except calibration.CalibrationError as error:
            self._refuse("camera_info", str(error))
            return None

    def _wait_for_camera_info(self) -> None:
        topic = self._node.resolve_topic_name("camera_info")
        deadline = time.monotonic() + _CAMERA_INFO_S
        while self._camera_info is None and time.monotonic() < deadline and self._node.count_publishers(topic):
            time.sleep(0.005)
        self._camera = ((), None)  # waited once

    def _depth_at(self, taken: Taken) -> np.ndarray | None:
        if not self._depth.is_alive:
            return None
        tolerance_ns = int(self.config.sync_tolerance * stamps.NS_PER_S)
        msg = self._depth.nearest(taken.stamp_ns, tolerance_ns, _LATE_S)
        if msg is None:
            self._stats.refused["depth_without_image"] += 1
            return None
        if msg.header.frame_id != taken.frame_id and not self.config.camera_frame:
            text = f"depth is of {msg.header.frame_id!r}, images of {taken.frame_id!r}: use depth aligned to colour"
            self._refuse("depth", text)
            return None
        try:
            return conversions.decode_depth(msg)
        except ImageError as error:
            self._refuse("depth", str(error))
            return None

    def _refuse(self, kind: str, text: str) -> None:
        self._stats.refused[kind] += 1
        self._node.get_logger().error(text, throttle_duration_sec=_QUIET_S)
