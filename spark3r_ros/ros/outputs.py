"""What the node says: odometry, transforms, path, clouds, depth, markers. Written by the worker, one Update at a time.

Nothing is built that nobody listens to. Odometry and transforms are sent for every pose; the rest once per window.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

import numpy as np
from geometry_msgs.msg import Point
from rclpy.node import Node
from rclpy.publisher import Publisher
from std_msgs.msg import ColorRGBA
from visualization_msgs.msg import Marker, MarkerArray

from spark3r_ros import geometry
from spark3r_ros.config import NodeConfig
from spark3r_ros.frame import DepthImage, FramePose, PointBatch, TrackingState, Update
from spark3r_ros.ros import conversions, interface, qos, stamps
from spark3r_ros.ros.diagnostics import Statistics
from spark3r_ros.ros.inputs import Companions
from spark3r_ros.ros.placement import UNKNOWN, Placement, TwistEstimator, covariance_in_parent
from spark3r_ros.ros.tf import TransformError, Transforms
from spark3r_ros.ros.tf_output import TransformOutput

if TYPE_CHECKING:
    from spark3r_ros.reconstructor import Reconstructor

_MOST_PENDING = 1000  # updates that may wait for the place of the camera on the robot


class Outputs:
    """All publishers of the node, and where the reconstruction stands in the robot's world."""

    def __init__(
        self, node: Node, config: NodeConfig, stats: Statistics, transforms: Transforms, companions: Companions
    ):
        self.config = config
        self._node = node
        self._stats = stats
        self._transforms = transforms
        self._companions = companions
        self._publishers: dict[str, Publisher] = {
            o.topic: node.create_publisher(o.kind, o.topic, o.profile, event_callbacks=qos.NO_PUBLISHER_EVENTS)
            for o in interface.OUTPUTS
            if o.topic != "/diagnostics"
        }
        self.tf = TransformOutput(node, config, self._publishers["/tf"])
        self._cloud, self._map_cloud = conversions.CloudWriter(), conversions.CloudWriter()
        self._may_check_parents = True
        self.restart(None)

    def destroy(self) -> None:
        for publisher in self._publishers.values():
            self._node.destroy_publisher(publisher)
        self._publishers.clear()

    def restart(self, T_map_world: np.ndarray | None) -> None:
        """Begin anew with the next pose; ``T_map_world`` is known when a map was loaded."""
        self._placement: Placement | None = None
        self._odometry: conversions.OdometryWriter | None = None  # its frames are known with the placement
        self._known_T_map_world = T_map_world
        self._pending: list[Update] = []
        self._pending_since = 0.0
        self._twist = TwistEstimator()
        self._set_mount(np.eye(4))
        self._mount_is_static = False
        self.tf.restart()
        self._changed_since = {"~/path": True, "~/keyframes": True, "~/map": True}
        self._map_sent = -float("inf")
        self.problem = ""

    @property
    def has_static_mount(self) -> bool:
        """Whether base <- camera is known and will not change, or is not needed."""
        return self._placement is not None and (self._mount_is_static or self._placement.body == self._placement.camera)

    # ---- one update ------------------------------------------------------------------------------------------------

    def publish(self, update: Update, reconstruction: Reconstructor) -> None:
        """Send what one frame caused; the first updates wait until the camera's place on the robot is known."""
        self._stats.state, self._stats.scale = update.state, update.scale
        if not (update.poses or update.window is not None or update.map_changed):
            return  # most frames change no map: nothing to send, or to keep room for
        self._pending.append(update)
        if self._flush():
            self.refresh(reconstruction)

    def refresh(self, reconstruction: Reconstructor) -> None:
        """Send path, keyframes and map to those who listen, when they changed; called once a second as well."""
        self._flush()
        if self._placement is None:
            return
        if self._is_due("~/path") or self._is_due("~/keyframes"):
            self._send_keyframes(reconstruction.keyframe_poses())
        if self._is_due("~/map") and time.monotonic() - self._map_sent >= self.config.map_period:
            self._map_sent = time.monotonic()
            self._send_cloud("~/map", self._map_cloud, reconstruction.map_points())
            self._changed_since["~/map"] = False

    def _flush(self) -> bool:
        """Send the updates that wait, if they may go; True when the map changed."""
        if self._placement is None and not self._find_place():
            del self._pending[:-_MOST_PENDING]
            return False
        pending, self._pending = self._pending, []
        for update in pending:
            self._send(update)
        changed = any(update.window is not None or update.map_changed for update in pending)
        if changed:
            self._changed_since = dict.fromkeys(self._changed_since, True)
        return changed

    def _send(self, update: Update) -> None:
        place = self._placement
        assert place is not None
        for pose in update.poses:
            self._send_pose(place, pose, update)
        if update.window is not None:
            self._stats.windows += 1
            self._stats.window = update.window
        if update.points is not None:
            self._stats.points += len(update.points.xyz)
            if self._has_listener("~/points"):
                self._send_cloud("~/points", self._cloud, update.points)
        if update.depth is not None:
            self._send_depth(update.depth, is_metric=update.scale.is_metric)

    # ---- poses -----------------------------------------------------------------------------------------------------

    def _send_pose(self, place: Placement, pose: FramePose, update: Update) -> None:
        self._follow_mount(place, pose.stamp_ns)
        T_odom_body = place.T_odom_camera(pose) @ self._T_camera_body
        is_lost = pose.state is TrackingState.LOST
        in_map = self.config.tf_mode in ("map_to_odom", "map_to_camera")
        T_parent_body = place.T_map_camera(pose) @ self._T_camera_body if in_map else T_odom_body
        covariance = covariance_in_parent(pose.covariance, self._adjoint_body_camera, T_parent_body)
        twist, twist_covariance = self._twist.update(pose.stamp_ns, T_odom_body, covariance)
        if is_lost:
            covariance = twist_covariance = UNKNOWN
        if self._odometry is None:
            parent = self.config.map_frame if in_map else self.config.odom_frame
            self._odometry = conversions.OdometryWriter(parent, place.body)
        msg = self._odometry.write(pose.stamp_ns, T_parent_body, covariance, twist, twist_covariance)
        self._publishers["~/odometry"].publish(msg)
        self._stats.pose_sent(pose.stamp_ns)
        if not is_lost:
            self._send_transforms(place, pose, T_parent_body, update)

    def _send_transforms(self, place: Placement, pose: FramePose, T_parent_body: np.ndarray, update: Update) -> None:
        """``T_parent_body``: as in the odometry."""
        config, mode = self.config, self.config.tf_mode
        if self.problem or mode == "off":
            return
        if mode == "odom_to_base":
            self.tf.set_map_to_odom(place.T_map_odom(update.T_map_odom), pose.stamp_ns)
            self.tf.send(config.odom_frame, place.body, pose.stamp_ns, T_parent_body)
        elif mode == "map_to_camera":
            self.tf.send(config.map_frame, place.camera, pose.stamp_ns, place.T_map_camera(pose))
        elif update.scale.is_metric:  # map_to_odom; in model units the robot's odometry cannot be compared
            T_odom_base = self._companions.T_odom_base(pose.stamp_ns)
            if T_odom_base is not None:
                self.tf.set_map_to_odom(T_parent_body @ geometry.inverse(T_odom_base), pose.stamp_ns)

    def _follow_mount(self, place: Placement, stamp_ns: int) -> None:
        """The camera may move on the robot (pan and tilt); while its place is late, the last one counts."""
        if place.body == place.camera or self._mount_is_static:
            return
        with contextlib.suppress(TransformError):
            self._set_mount(self._transforms.lookup(place.body, place.camera, stamp_ns))

    def _set_mount(self, T_body_camera: np.ndarray) -> None:
        self._T_camera_body = geometry.inverse(T_body_camera)
        self._adjoint_body_camera = geometry.adjoint(T_body_camera)

    # ---- the place of the reconstruction ---------------------------------------------------------------------------

    def _find_place(self) -> bool:
        """Fix the placement at the first pose; False while it has to wait for TF."""
        pose = next((p for update in self._pending for p in update.poses), None)
        if pose is None:
            return False
        config, camera = self.config, pose.frame_id
        self._pending_since = self._pending_since or time.monotonic()
        is_patient = time.monotonic() - self._pending_since < config.base_wait
        base = config.base_frame if config.base_frame not in ("", camera) else None
        T_base_camera = self._mount(base, camera, pose.stamp_ns) if base else None
        T_map_base = self._companions.T_odom_base(pose.stamp_ns) if config.tf_mode == "map_to_odom" else np.eye(4)
        if is_patient and ((base and T_base_camera is None) or T_map_base is None):
            return False
        self.problem = self._conflict(base, camera, T_base_camera)
        if self.problem:
            self._node.get_logger().warning(self.problem)
        self._placement = Placement.at_first_pose(
            pose, camera, base, T_base_camera,
            np.eye(4) if T_map_base is None else T_map_base, self._known_T_map_world,
        )  # fmt: skip
        if T_base_camera is not None and base:
            self._set_mount(T_base_camera)
            self._mount_is_static = self._transforms.is_static(base, camera)
        if config.tf_mode == "map_to_odom" and not self.problem and self._known_T_map_world is None:
            self.tf.set_map_to_odom(np.eye(4), pose.stamp_ns)
        return True

    def _mount(self, base: str, camera: str, stamp_ns: int) -> np.ndarray | None:
        for stamp in (stamp_ns, None):
            try:
                return self._transforms.lookup(base, camera, stamp)
            except TransformError:
                continue
        return None

    def _conflict(self, base: str | None, camera: str, T_base_camera: np.ndarray | None) -> str:
        """Why publishing transforms would break the robot's tree, or an empty string. Checked before the first one."""
        mode, may_check = self.config.tf_mode, self._may_check_parents
        self._may_check_parents = False  # later our own transforms come back and look like somebody else's
        if base and T_base_camera is None:
            parent = self._transforms.parent_of(camera) if may_check else None
            known = f"; {camera!r} hangs on {parent!r}, set base_frame to that or its root" if parent else ""
            if mode == "map_to_odom":
                return f"no transform {base!r} <- {camera!r} in TF{known}: map -> odom cannot be published"
            if parent and mode != "off":
                return f"no transform {base!r} <- {camera!r} in TF{known}: no transform is published"
            self._node.get_logger().warning(
                f"no transform {base!r} <- {camera!r} within {self.config.base_wait:g} s: the camera itself is "
                "tracked, and taken to look straight ahead; set base_frame to '' if that is meant"
            )
            return ""
        child = {"odom_to_base": base or camera, "map_to_camera": camera}.get(mode)
        parent = self._transforms.parent_of(child) if child and may_check and not self.config.invert_tf else None
        if parent:
            remedy = "set tf_mode to map_to_odom, or invert_tf" if child == base else "set base_frame and odom_to_base"
            return f"{child!r} already has the parent {parent!r} in TF: no transform is published; {remedy}"
        if T_base_camera is not None and np.allclose(T_base_camera[:3, :3], np.eye(3), atol=1e-3):
            self._node.get_logger().warning(
                f"{camera!r} has the axes of {base!r}: is it an optical frame (z ahead)? Set camera_frame if it is not"
            )
        return ""

    # ---- maps ------------------------------------------------------------------------------------------------------

    def _has_listener(self, topic: str) -> bool:
        return self._publishers[topic].get_subscription_count() > 0

    def _is_due(self, topic: str) -> bool:
        return self._changed_since[topic] and self._has_listener(topic)

    def _send_cloud(self, topic: str, writer: conversions.CloudWriter, points: PointBatch) -> None:
        assert self._placement is not None
        self._publishers[topic].publish(writer.write(self.config.map_frame, points, self._placement.T_map_world))

    def _send_depth(self, depth: DepthImage, *, is_metric: bool) -> None:
        """REP-118 on ~/depth, where others take it for metres; on a topic of its own while it is not."""
        topic = "~/depth" if is_metric else "~/depth_relative"
        if self._has_listener(topic):
            msg = conversions.depth_message(depth.frame_id, depth.stamp_ns, depth.depth)
            self._publishers[topic].publish(msg)
        if is_metric and self._has_listener("~/depth/camera_info"):
            info = conversions.camera_info_message(depth.frame_id, depth.stamp_ns, depth.camera)
            self._publishers["~/depth/camera_info"].publish(info)

    def _send_keyframes(self, keyframes: Sequence[tuple[int, np.ndarray]]) -> None:
        assert self._placement is not None
        T_map_world, frame = self._placement.T_map_world, self.config.map_frame
        cameras = [(stamp, T_map_world @ T) for stamp, T in conversions.thin(keyframes, self.config.path_length)]
        if self._is_due("~/path"):
            bodies = [(stamp, T @ self._T_camera_body) for stamp, T in cameras]
            self._publishers["~/path"].publish(conversions.path_message(frame, bodies))
        if self._is_due("~/keyframes"):
            self._publishers["~/keyframes"].publish(frusta(frame, cameras))
        self._changed_since["~/path"] = self._changed_since["~/keyframes"] = False

    # ---- the place of the map, kept beside its file ----------------------------------------------------------------

    def _T_map_world(self) -> np.ndarray:
        if self._placement is None:
            raise ValueError("there is no map yet: no pose has been given out")
        return self._placement.T_map_world

    def in_map_frame(self, points: PointBatch) -> PointBatch:
        """Points of the reconstruction as they stand in map_frame."""
        xyz = geometry.transform(self._T_map_world(), points.xyz).astype(np.float32)
        return dataclasses.replace(points, xyz=xyz)

    def save_place(self, map_file: FilePath) -> None:
        """Write where the map's world stands in map_frame, so that a loaded map is level again."""
        text = json.dumps({"T_map_world": self._T_map_world().tolist()}, indent=1)
        place_file(map_file).write_text(text + "\n")


def place_file(map_file: FilePath) -> FilePath:
    return map_file.with_name(map_file.name + ".place.json")


def load_place(map_file: FilePath) -> np.ndarray:
    """T_map_world [4, 4] of a saved map."""
    T = np.array(json.loads(place_file(map_file).read_text())["T_map_world"], dtype=float)
    if T.shape != (4, 4):
        raise ValueError(f"{place_file(map_file)} must hold a 4 x 4 matrix, got {list(T.shape)}")
    return T


def frusta(frame_id: str, cameras: Sequence[tuple[int, np.ndarray]]) -> MarkerArray:
    """One line-list marker with a frustum per camera; poses as (stamp_ns, T_frame_camera)."""
    marker = Marker(ns="keyframes", id=0, type=Marker.LINE_LIST, action=Marker.ADD)
    marker.header.frame_id = frame_id
    marker.pose.orientation.w = 1.0
    marker.scale.x = 0.005
    marker.color = ColorRGBA(r=0.1, g=0.6, b=1.0, a=0.9)
    if not cameras:
        marker.action = Marker.DELETEALL
        return MarkerArray(markers=[marker])
    marker.header.stamp = stamps.to_msg(cameras[-1][0])
    T = np.stack([pose for _, pose in cameras])  # [N, 4, 4]
    corners = geometry.transform(T, _frustum_lines())  # [N, 16, 3]
    marker.points = [Point(x=x, y=y, z=z) for x, y, z in corners.reshape(-1, 3).tolist()]
    return MarkerArray(markers=[marker])


def _frustum_lines(depth: float = 0.08) -> np.ndarray:
    """[16, 3] ends of the eight edges of a camera, optical axes."""
    tip = (0.0, 0.0, 0.0)
    ring = [(depth * x, 0.75 * depth * y, depth) for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    edges: list[Any] = []
    for i, corner in enumerate(ring):
        edges += [tip, corner, corner, ring[(i + 1) % 4]]
    return np.array(edges)
