"""Messages to arrays and back. Pure functions of messages and numpy arrays; nothing here talks to a network."""

from __future__ import annotations

import array
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from geometry_msgs.msg import Pose, PoseStamped, Quaternion, Transform, TransformStamped
from nav_msgs.msg import Odometry, Path
from rclpy.serialization import serialize_message
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, PointCloud2, PointField
from std_msgs.msg import Header
from tf2_msgs.msg import TFMessage

from spark3r_ros import encodings, geometry
from spark3r_ros.frame import CameraModel, PointBatch
from spark3r_ros.ros import optional, stamps


@dataclass(frozen=True, eq=False)
class WireImage:
    """sensor_msgs/Image as it came, serialised; ``data`` lies in it. As a message rclpy copies it twice more."""

    stamp_ns: int
    frame_id: str
    height: int
    width: int
    encoding: str
    is_bigendian: int
    step: int
    data: memoryview

    @classmethod
    def read(cls, wire: bytes) -> WireImage:
        """CDR: four bytes of its own, then numbers at multiples of their size; strings begin with a length."""
        order = "<" if wire[1] & 1 else ">"
        sec, nanosec, length = struct.unpack_from(order + "iII", wire, 4)
        frame_id, at = _text(wire, 16, length)
        height, width, length = struct.unpack_from(order + "III", wire, at + -at % 4)
        encoding, at = _text(wire, at + -at % 4 + 12, length)
        is_bigendian, at = wire[at], at + 1
        step, size = struct.unpack_from(order + "II", wire, at + -at % 4)
        data = memoryview(wire)[at + -at % 4 + 8 :][:size]
        return cls(sec * stamps.NS_PER_S + nanosec, frame_id, height, width, encoding, is_bigendian, step, data)


def _text(wire: bytes, at: int, length: int) -> tuple[str, int]:
    """A string of so many bytes with its closing zero, and where it ends."""
    return wire[at : at + length - 1].decode(errors="replace"), at + length


def decode_image(msg: Image | WireImage) -> np.ndarray:
    """A raw image as [H, W, 3] uint8 RGB. Raises ImageError; unknown encodings are tried with cv_bridge first."""
    if msg.encoding == "rgb8" and msg.step == 3 * msg.width and len(msg.data) == msg.step * msg.height > 0:
        return np.frombuffer(msg.data, np.uint8).reshape(msg.height, msg.width, 3)  # the message is ours: no copy
    if msg.encoding not in encodings.ENCODINGS:
        other = optional.decode_with_cv_bridge(msg)
        if other is not None:
            return other
    return encodings.decode(msg.encoding, msg.data, msg.height, msg.width, msg.step, bool(msg.is_bigendian))


def decode_compressed(msg: CompressedImage) -> np.ndarray:
    """A JPEG or PNG image as [H, W, 3] uint8 RGB. Raises ImageError."""
    return encodings.decode_compressed(msg.data, f"compressed image of format {msg.format!r}")


def decode_depth(msg: Image) -> np.ndarray:
    """Depth [H, W] float32 in metres, NaN where unknown (REP-118). Raises ImageError."""
    return encodings.decode_depth(msg.encoding, msg.data, msg.height, msg.width, msg.step, bool(msg.is_bigendian))


# ---- poses ----------------------------------------------------------------------------------------------------------


def matrix_from_transform(transform: Transform) -> np.ndarray:
    """T_parent_child [4, 4]. ValueError when the quaternion is not one."""
    q, t = transform.rotation, transform.translation
    return _matrix((q.x, q.y, q.z, q.w), (t.x, t.y, t.z))


def matrix_from_pose(pose: Pose) -> np.ndarray:
    """T_parent_body [4, 4]. ValueError when the quaternion is not one."""
    q, p = pose.orientation, pose.position
    return _matrix((q.x, q.y, q.z, q.w), (p.x, p.y, p.z))


def _matrix(quat_xyzw: tuple[float, ...], translation: tuple[float, ...]) -> np.ndarray:
    norm = float(np.linalg.norm(quat_xyzw))
    if not (abs(norm - 1.0) < 0.01 and np.all(np.isfinite(translation))):
        raise ValueError(f"quaternion {quat_xyzw} and translation {translation} are not a rigid transform")
    return geometry.make_T(optional.matrix_from_quat_xyzw(np.array(quat_xyzw)), np.array(translation))


def transform_message(parent: str, child: str, stamp_ns: int, T_parent_child: np.ndarray) -> TransformStamped:
    msg = TransformStamped(header=Header(stamp=stamps.to_msg(stamp_ns), frame_id=parent), child_frame_id=child)
    t = msg.transform.translation
    t.x, t.y, t.z = T_parent_child[:3, 3].tolist()
    _set_quaternion(msg.transform.rotation, T_parent_child)
    return msg


def set_pose(pose: Pose, T: np.ndarray) -> None:
    pose.position.x, pose.position.y, pose.position.z = T[:3, 3].tolist()
    _set_quaternion(pose.orientation, T)


def _set_quaternion(q: Quaternion, T: np.ndarray) -> None:
    q.x, q.y, q.z, q.w = optional.quat_xyzw_from_matrix(T[:3, :3])


def set_odometry(
    msg: Odometry,
    T_parent_child: np.ndarray,
    pose_covariance: np.ndarray,
    twist: np.ndarray,
    twist_covariance: np.ndarray,
) -> None:
    """Fill all but header and frames: pose and its covariance [6, 6] about the parent's axes, twist in the child."""
    set_pose(msg.pose.pose, T_parent_child)
    msg.pose.covariance = pose_covariance.ravel()
    linear, angular = msg.twist.twist.linear, msg.twist.twist.angular
    linear.x, linear.y, linear.z, angular.x, angular.y, angular.z = twist.tolist()
    msg.twist.covariance = twist_covariance.ravel()


# What goes out with every image is serialised once; then only its stamps and numbers are written, into the bytes: rclpy
# walks every field of a message in Python, which costs more than sending it. Where they stand is found by marks. No
# layout is assumed but that numbers that follow each other in the message do so on the wire.

_MARK_S, _MARK_M = 0x5EC0DE00, 1.2345678901234567e300  # + i: never seen in a name


def _places(data: bytearray, index: int) -> tuple[int, int]:
    """Where the marked stamp and the marked number ``index`` stand."""
    return data.index(struct.pack("=i", _MARK_S + index)), data.index(struct.pack("=d", _MARK_M * (index + 1)))


class OdometryWriter:
    """nav_msgs/Odometry between two frames, as bytes for ``Publisher.publish``; equal to ``set_odometry``."""

    def __init__(self, parent: str, child: str) -> None:
        msg = Odometry(header=Header(frame_id=parent), child_frame_id=child)
        msg.header.stamp.sec, msg.pose.pose.position.x = _MARK_S, _MARK_M
        self._data = bytearray(serialize_message(msg))
        self._stamp, numbers = _places(self._data, 0)
        self._numbers = np.frombuffer(self._data, np.float64, 7 + 36 + 6 + 36, numbers)

    def write(
        self, stamp_ns: int, T_parent_child: np.ndarray, pose_covariance: np.ndarray, twist: np.ndarray,
        twist_covariance: np.ndarray,
    ) -> bytes:  # fmt: skip
        struct.pack_into("=iI", self._data, self._stamp, *divmod(stamp_ns, stamps.NS_PER_S))
        numbers = self._numbers
        numbers[:3] = T_parent_child[:3, 3]
        numbers[3:7] = optional.quat_xyzw_from_matrix(T_parent_child[:3, :3])
        numbers[7:43] = pose_covariance.ravel()
        numbers[43:49] = twist
        numbers[49:] = twist_covariance.ravel()
        return bytes(self._data)


class TransformWriter:
    """tf2_msgs/TFMessage with transforms between (parent, child) frames, as bytes for ``Publisher.publish``."""

    def __init__(self, links: Sequence[tuple[str, str]]) -> None:
        msg = TFMessage()
        for i, (parent, child) in enumerate(links):
            item = TransformStamped(header=Header(frame_id=parent), child_frame_id=child)
            item.header.stamp.sec, item.transform.translation.x = _MARK_S + i, _MARK_M * (i + 1)
            msg.transforms.append(item)
        self._data = bytearray(serialize_message(msg))
        self._places = [_places(self._data, i) for i in range(len(links))]

    def write(self, transforms: Sequence[tuple[int, np.ndarray]]) -> bytes:
        """``transforms``: (stamp_ns, T_parent_child) of each link."""
        for (stamp, numbers), (stamp_ns, T) in zip(self._places, transforms):
            struct.pack_into("=iI", self._data, stamp, *divmod(stamp_ns, stamps.NS_PER_S))
            quat_xyzw = optional.quat_xyzw_from_matrix(T[:3, :3])
            struct.pack_into("=7d", self._data, numbers, *T[:3, 3].tolist(), *quat_xyzw)
        return bytes(self._data)


def path_message(frame_id: str, poses: Sequence[tuple[int, np.ndarray]]) -> Path:
    """Poses as (stamp_ns, T_frame_body); the header carries the last stamp."""
    msg = Path(header=Header(frame_id=frame_id))
    if not poses:
        return msg
    T = np.stack([pose for _, pose in poses])  # [N, 4, 4]
    quats = geometry.quat_xyzw_from_matrix(T[:, :3, :3])
    rows = np.concatenate([T[:, :3, 3], quats], axis=1).tolist()
    for (stamp_ns, _), row in zip(poses, rows):
        item = PoseStamped(header=Header(stamp=stamps.to_msg(stamp_ns), frame_id=frame_id))
        p, q = item.pose.position, item.pose.orientation
        p.x, p.y, p.z, q.x, q.y, q.z, q.w = row
        msg.poses.append(item)
    msg.header.stamp = stamps.to_msg(poses[-1][0])
    return msg


# ---- points and depth -----------------------------------------------------------------------------------------------

POINT = np.dtype([("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("rgb", "<u4"), ("confidence", "<f4")])
POINT_FIELDS = [
    # rgb is packed 0x00RRGGBB and declared as a float, as PCL and RViz want it
    PointField(name=name, offset=POINT.fields[name][1], datatype=PointField.FLOAT32, count=1)  # type: ignore[index]
    for name in ("x", "y", "z", "rgb", "confidence")
]


class CloudWriter:
    """Fills one PointCloud2 again and again; its buffer is reused, so the message must be sent before the next."""

    def __init__(self) -> None:
        self._msg = PointCloud2(height=1, fields=POINT_FIELDS, point_step=POINT.itemsize, is_dense=True)

    def write(self, frame_id: str, points: PointBatch, T_frame_points: np.ndarray) -> PointCloud2:
        """The points moved by T [4, 4]; points that are not finite are left out."""
        xyz, rgb, confidence = points.xyz, points.rgb, points.confidence
        finite = np.isfinite(xyz)
        if not finite.all():
            keep = finite.all(axis=1)
            xyz, rgb, confidence = xyz[keep], rgb[keep], confidence[keep]
        resize(self._msg.data, len(xyz) * POINT.itemsize)
        if len(xyz):
            self._fill(xyz, rgb, confidence, T_frame_points)
        msg = self._msg
        msg.header.frame_id = frame_id
        msg.header.stamp = stamps.to_msg(points.stamp_ns)
        msg.width = len(xyz)
        msg.row_step = len(xyz) * POINT.itemsize
        return msg

    def _fill(self, xyz: np.ndarray, rgb: np.ndarray, confidence: np.ndarray, T: np.ndarray) -> None:
        """Write straight into the message's own data, column by column: POINT as floats and as bytes."""
        floats = np.frombuffer(self._msg.data, np.float32).reshape(len(xyz), 5)
        octets = np.frombuffer(self._msg.data, np.uint8).reshape(len(xyz), POINT.itemsize)
        floats[:, :3] = cv2.transform(np.ascontiguousarray(xyz)[:, None], T[:3].astype(np.float32))[:, 0]
        floats[:, 4] = confidence
        octets[:, 15] = 0
        for channel in range(3):
            octets[:, 14 - channel] = rgb[:, channel]


def resize(data: array.array, size: int) -> None:
    """Make a message's byte array ``size`` long without walking its bytes."""
    if len(data) > size:
        del data[size:]
    elif len(data) < size:
        data.frombytes(bytes(size - len(data)))


def depth_message(frame_id: str, stamp_ns: int, depth: np.ndarray) -> Image:
    """[H, W] float32 as 32FC1; metres, NaN where unknown (REP-118)."""
    height, width = depth.shape
    msg = Image(
        header=Header(stamp=stamps.to_msg(stamp_ns), frame_id=frame_id),
        height=height, width=width, encoding="32FC1", is_bigendian=0, step=4 * width,
    )  # fmt: skip
    msg.data.frombytes(np.ascontiguousarray(depth, dtype="<f4").data.cast("B"))
    return msg


def camera_info_message(frame_id: str, stamp_ns: int, camera: CameraModel) -> CameraInfo:
    """An undistorted pinhole camera."""
    K = camera.K
    return CameraInfo(
        header=Header(stamp=stamps.to_msg(stamp_ns), frame_id=frame_id),
        height=camera.height, width=camera.width, distortion_model="plumb_bob", d=[0.0] * 5,
        k=K.astype(float).ravel(), r=np.eye(3).ravel(), p=np.hstack([K, np.zeros((3, 1))]).astype(float).ravel(),
    )  # fmt: skip


def thin(items: Sequence, most: int) -> list:
    """At most ``most`` of the items, evenly spread, first and last always among them."""
    if len(items) <= most:
        return list(items)
    picked: Iterable[int] = np.unique(np.linspace(0, len(items) - 1, most).round().astype(int))
    return [items[i] for i in picked]
