"""Every topic and service of the node, once: the node creates them from here and docs/ros.md is checked against it."""

from __future__ import annotations

from dataclasses import dataclass

from diagnostic_msgs.msg import DiagnosticArray
from nav_msgs.msg import Odometry, Path
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, PointCloud2
from tf2_msgs.msg import TFMessage
from visualization_msgs.msg import MarkerArray

from spark3r_ros.ros import qos


@dataclass(frozen=True)
class Output:
    topic: str
    kind: type
    profile: QoSProfile
    doc: str


@dataclass(frozen=True)
class Input:
    topic: str
    kinds: tuple[type, ...]
    profile: QoSProfile
    doc: str


@dataclass(frozen=True)
class Service:
    name: str
    doc: str


OUTPUTS = (
    Output(
        "~/odometry", Odometry, qos.ODOMETRY, "one per used image, with its stamp; covariance; twist in the child frame"
    ),
    Output("~/path", Path, qos.LATCHED, "keyframes so far, corrected, at most `path_length` poses; `map_frame`"),
    Output("~/points", PointCloud2, qos.NEWEST, "new points of a window: x y z rgb confidence; `map_frame`"),
    Output("~/map", PointCloud2, qos.LATCHED, "all points, every `map_period` seconds while it changes; `map_frame`"),
    Output("~/depth", Image, qos.SENSOR, "32FC1 metres, NaN unknown (REP-118); only while the scale is metric"),
    Output("~/depth/camera_info", CameraInfo, qos.SENSOR, "intrinsics of `~/depth`, with its stamp"),
    Output("~/depth_relative", Image, qos.SENSOR, "32FC1 in model units, while the scale is not metric"),
    Output("~/keyframes", MarkerArray, qos.LATCHED, "camera frusta of the keyframes; `map_frame`"),
    Output("/tf", TFMessage, qos.TF, "as `tf_mode` says"),
    Output("/diagnostics", DiagnosticArray, qos.ODOMETRY, "once a second"),
)

INPUTS = (
    Input(
        "image",
        (Image, CompressedImage),
        qos.image_profile(ReliabilityPolicy.RELIABLE, keep_all=False),
        "the camera; `image_transport` says which type, `reliability` may make it best effort",
    ),
    Input("camera_info", (CameraInfo,), qos.SENSOR, "optional: intrinsics and distortion"),
    Input("depth", (Image,), qos.SENSOR, "optional: 16UC1 or 32FC1, registered to the image; makes the scale metric"),
    Input("odom", (Odometry,), qos.ROBOT_ODOMETRY, "optional: the robot's own odometry; makes the scale metric"),
    Input("/tf", (TFMessage,), qos.TF, "the robot's odometry in `map_to_odom`, and a camera that moves on the robot"),
    Input("/tf_static", (TFMessage,), qos.TF_STATIC, "`base_frame` <- camera"),
)

SERVICES = (
    Service("~/reset", "forget window, context and map and start anew with the next image"),
    Service("~/pause", "leave images unused until resumed; they are counted"),
    Service("~/resume", "use images again"),
    Service("~/save_map", "solve what is pending and write the map to `map_file`"),
    Service("~/load_map", "replace the map by `map_file` and localise in it"),
)
