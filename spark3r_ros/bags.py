"""Write frames as a rosbag2 recording, without ROS."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from spark3r_ros.frame import CameraModel, Frame
from spark3r_ros.sources import CAMERA_INFO, COMPRESSED, IMAGE, NS_PER_S

STORAGES = ("sqlite3", "mcap")


def write_bag(
    frames: Iterable[Frame],
    path: str | Path,
    *,
    storage: str = "mcap",
    jpeg: bool = False,
    namespace: str = "/camera",
    frame_id: str = "camera_optical_frame",
) -> int:
    """Record images, and CameraInfo where a frame has a camera; stamps are kept to the nanosecond.

    Topics are ``namespace``/image_raw, or ``namespace``/image_raw/compressed with ``jpeg``, and
    ``namespace``/camera_info. Returns the number of frames. Raises FileExistsError when ``path`` exists.
    """
    from rosbags.rosbag2 import StoragePlugin, Writer
    from rosbags.typesys import Stores, get_typestore

    if Path(path).exists():
        raise FileExistsError(f"{path} exists already")
    messages = _Messages(get_typestore(Stores.ROS2_KILTED), frame_id)
    plugin = {"sqlite3": StoragePlugin.SQLITE3, "mcap": StoragePlugin.MCAP}[storage]
    topic, kind = (f"{namespace}/image_raw/compressed", COMPRESSED) if jpeg else (f"{namespace}/image_raw", IMAGE)
    count = 0
    with Writer(Path(path), version=9, storage_plugin=plugin) as writer:
        image_connection = writer.add_connection(topic, kind, typestore=messages.typestore)
        info_connection: Any = None
        for frame in frames:
            if frame.camera is not None:
                if info_connection is None:
                    info_connection = writer.add_connection(
                        f"{namespace}/camera_info", CAMERA_INFO, typestore=messages.typestore
                    )
                writer.write(info_connection, frame.stamp_ns, messages.info(frame.stamp_ns, frame.camera))
            data = messages.jpeg(frame) if jpeg else messages.image(frame)
            writer.write(image_connection, frame.stamp_ns, data)
            count += 1
    return count


class _Messages:
    """Serialised messages from frames."""

    def __init__(self, typestore: Any, frame_id: str) -> None:
        self.typestore = typestore
        self._frame_id = frame_id

    def _header(self, stamp_ns: int) -> Any:
        sec, nanosec = divmod(stamp_ns, NS_PER_S)
        types = self.typestore.types
        return types["std_msgs/msg/Header"](types["builtin_interfaces/msg/Time"](sec, nanosec), self._frame_id)

    def _serialise(self, kind: str, *fields: Any) -> bytes:
        return bytes(self.typestore.serialize_cdr(self.typestore.types[kind](*fields), kind))

    def image(self, frame: Frame) -> bytes:
        height, width = frame.image.shape[:2]
        data = np.ascontiguousarray(frame.image).reshape(-1)
        return self._serialise(IMAGE, self._header(frame.stamp_ns), height, width, "rgb8", 0, 3 * width, data)

    def jpeg(self, frame: Frame) -> bytes:
        bgr = cv2.cvtColor(frame.image, cv2.COLOR_RGB2BGR)
        data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].reshape(-1)
        return self._serialise(COMPRESSED, self._header(frame.stamp_ns), "rgb8; jpeg compressed bgr8", data)

    def info(self, stamp_ns: int, camera: CameraModel) -> bytes:
        model = "plumb_bob" if camera.distortion_model == "none" else camera.distortion_model
        coefficients = np.array(camera.distortion or (0.0,) * 5)
        projection = np.hstack([camera.K, np.zeros((3, 1))])
        region = self.typestore.types["sensor_msgs/msg/RegionOfInterest"](0, 0, 0, 0, False)
        matrices = (camera.K.ravel(), np.eye(3).ravel(), projection.ravel())
        return self._serialise(
            CAMERA_INFO,
            self._header(stamp_ns),
            camera.height,
            camera.width,
            model,
            coefficients,
            *matrices,
            0,
            0,
            region,
        )
