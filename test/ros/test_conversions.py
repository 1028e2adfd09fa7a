"""Messages to arrays and back, without a network; and the parts of a ROS installation against our own."""

import array

import numpy as np
import pytest
from nav_msgs.msg import Odometry
from rclpy.serialization import deserialize_message, serialize_message
from rig import image
from sensor_msgs.msg import CameraInfo, PointCloud2
from tf2_msgs.msg import TFMessage

from spark3r_ros import calibration, encodings, geometry
from spark3r_ros.frame import CameraModel, PointBatch
from spark3r_ros.ros import conversions, diagnostics, optional, placement, stamps
from spark3r_ros.ros.sync import History, interpolated_pose


def camera_info(**fields):
    msg = CameraInfo(width=640, height=480, distortion_model="plumb_bob", d=[0.1, -0.2, 0.001, 0.002, 0.05])
    msg.k = [500.0, 0, 320, 0, 510, 240, 0, 0, 1]
    msg.p = [450.0, 0, 318, 0, 0, 460, 238, 0, 0, 0, 1, 0]
    for name, value in fields.items():
        setattr(msg, name, value)
    return msg


def test_camera_info_plain():
    camera = calibration.camera_from_info(camera_info(), 640, 480, rectified=False)
    assert (camera.width, camera.height, camera.distortion_model) == (640, 480, "plumb_bob")
    np.testing.assert_array_equal(camera.K, [[500, 0, 320], [0, 510, 240], [0, 0, 1]])
    assert camera.distortion == (0.1, -0.2, 0.001, 0.002, 0.05)


def test_camera_info_of_rectified_images_uses_p():
    camera = calibration.camera_from_info(camera_info(), 640, 480, rectified=True)
    assert (camera.K[0, 0], camera.K[1, 2], camera.distortion_model) == (450, 238, "none")


def test_camera_info_with_region_and_binning():
    msg = camera_info(binning_x=2, binning_y=2)
    msg.roi.x_offset, msg.roi.y_offset, msg.roi.width, msg.roi.height = 100, 40, 400, 300
    camera = calibration.camera_from_info(msg, 200, 150, rectified=False)
    # a point that falls on full-resolution pixel (u, v) falls on ((u - x0) - 0.5) / 2 of the binned region
    point = np.array([0.1, -0.05, 1.0])
    full = geometry.project(point, np.array(msg.k).reshape(3, 3))
    np.testing.assert_allclose(geometry.project(point, camera.K), (full - [100, 40] - np.array([0.5, 0.5])) / 2)


def test_an_uncalibrated_camera_is_none():
    assert calibration.camera_from_info(camera_info(k=[0.0] * 9), 640, 480, rectified=False) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 320}, "320 x 480"),
        ({"distortion_model": "brown"}, "'brown'"),
        ({"d": [0.1, 0.2, 0.3]}, "3 coefficients"),
        ({"k": [-5.0, 0, 1, 0, 5, 1, 0, 0, 1]}, "-5"),
    ],
)
def test_bad_camera_info_is_named(fields, message):
    with pytest.raises(calibration.CalibrationError, match=message):
        calibration.camera_from_info(camera_info(**fields), 640, 480, rectified=False)


@pytest.mark.parametrize(("model", "count"), [("plumb_bob", 4), ("rational_polynomial", 8), ("equidistant", 4)])
def test_distortion_models(model, count):
    msg = camera_info(distortion_model=model, d=[0.01] * count)
    camera = calibration.camera_from_info(msg, 640, 480, rectified=False)
    assert (camera.distortion_model, len(camera.distortion)) == (model, count)


def test_camera_info_there_and_back():
    camera = CameraModel(64, 48, np.array([[50.0, 0, 31], [0, 51, 23], [0, 0, 1]]))
    msg = conversions.camera_info_message("cam", 5, camera)
    back = calibration.camera_from_info(msg, 64, 48, rectified=False)
    np.testing.assert_array_equal(back.K, camera.K)
    assert back.distortion_model == "none"


def test_stamps_are_exact():
    for stamp_ns in (1, 999_999_999, 1_341_847_980_822_978_123, 2_147_483_647_999_999_999):
        assert stamps.to_ns(stamps.to_msg(stamp_ns)) == stamp_ns


def points(n, seed=0):
    rng = np.random.default_rng(seed)
    xyz = rng.normal(size=(n, 3)).astype(np.float32)
    rgb = rng.integers(0, 256, (n, 3), dtype=np.uint8)
    return PointBatch(7, xyz, rgb, rng.random(n, dtype=np.float32))


def test_cloud_is_moved_free_of_nan_and_reuses_its_buffer():
    writer = conversions.CloudWriter()
    T = geometry.make_T(geometry.so3_exp([0.3, -0.2, 0.9]), np.array([1.0, 2.0, 3.0]))
    for n in (1000, 10, 0, 500):
        batch = points(n, seed=n)
        batch.xyz[::7, 1] = np.nan
        batch.xyz[3::7, 0] = np.inf
        msg = writer.write("map", batch, T)
        good = np.isfinite(batch.xyz).all(axis=1)
        got = np.frombuffer(bytes(msg.data), conversions.POINT)
        assert len(got) == good.sum() == msg.width
        assert msg.row_step == len(msg.data) == msg.width * msg.point_step
        xyz = np.stack([got["x"], got["y"], got["z"]], axis=1)
        np.testing.assert_allclose(xyz, geometry.transform(T, batch.xyz[good]).reshape(-1, 3), atol=1e-5)
        rgb = np.stack([got["rgb"] >> 16, got["rgb"] >> 8 & 255, got["rgb"] & 255], axis=1)
        np.testing.assert_array_equal(rgb, batch.rgb[good])
        np.testing.assert_array_equal(got["confidence"], batch.confidence[good])


def test_resize_keeps_the_array():
    data = array.array("B", b"abcdef")
    conversions.resize(data, 3)
    assert data.tobytes() == b"abc"
    conversions.resize(data, 5)
    assert data.tobytes() == b"abc\0\0"


def test_thin_keeps_first_and_last():
    assert conversions.thin(range(5), 10) == [0, 1, 2, 3, 4]
    thinned = conversions.thin(range(1000), 7)
    assert len(thinned) == 7
    assert (thinned[0], thinned[-1]) == (0, 999)


def test_covariance_follows_a_rigidly_attached_body():
    """Against samples: move the camera a little, see how the body moves about the parent's axes."""
    rng = np.random.default_rng(0)
    T_parent_camera = geometry.make_T(geometry.so3_exp(rng.normal(size=3)), rng.normal(size=3))
    T_camera_body = geometry.make_T(geometry.so3_exp(rng.normal(size=3)), rng.normal(size=3))
    root = rng.normal(size=(6, 6)) * 1e-3
    covariance = root @ root.T
    samples = rng.multivariate_normal(np.zeros(6), covariance, size=20000)
    T_parent_body = T_parent_camera @ T_camera_body
    moved = T_parent_camera @ geometry.se3_exp(samples) @ T_camera_body
    translation = moved[:, :3, 3] - T_parent_body[:3, 3]
    rotation = geometry.so3_log(moved[:, :3, :3] @ T_parent_body[:3, :3].T)
    expected = np.cov(np.hstack([translation, rotation]).T)
    adjoint = geometry.adjoint(geometry.inverse(T_camera_body))
    got = placement.covariance_in_parent(covariance, adjoint, T_parent_body)
    np.testing.assert_allclose(got, expected, atol=0.05 * np.abs(expected).max())


def test_twist_is_in_the_body_and_unknown_after_a_gap():
    twist = placement.TwistEstimator()
    covariance = np.diag([1e-4] * 3 + [1e-6] * 3)
    velocity = np.array([0.5, 0.0, 0.1])
    T = geometry.make_T(geometry.so3_exp([0, 0, 1.0]), np.zeros(3))
    _, unknown = twist.update(0, T, covariance)
    assert unknown[0, 0] == placement.HUGE_VARIANCE
    step = geometry.make_T(geometry.so3_exp([0, 0, 0.02]), velocity * 0.1)
    value, known = twist.update(100_000_000, T @ step, covariance * 2)
    np.testing.assert_allclose(value, [*velocity, 0, 0, 0.2], atol=1e-12)
    np.testing.assert_allclose(np.diag(known), [1e-2] * 3 + [1e-4] * 3, rtol=1e-6)
    _, stale = twist.update(5_000_000_000, T, covariance)
    assert stale[0, 0] == placement.HUGE_VARIANCE


def test_histories_find_interpolate_and_stay_short():
    history = History(5)
    for i in range(20):
        history.add(i * 10, geometry.make_T(np.eye(3), np.array([float(i), 0, 0])))
    assert history.nearest(0, 10) is None
    assert history.nearest(184, 5)[0, 3] == 18
    assert interpolated_pose(history, 175, 0, 0.0)[0, 3] == pytest.approx(17.5)
    assert interpolated_pose(history, 170, 0, 0.0)[0, 3] == 17
    assert interpolated_pose(history, 194, 5, 0.0)[0, 3] == 19
    assert interpolated_pose(history, 300, 5, 0.0) is None
    history.clear()
    assert history.nearest(190, 100) is None


@pytest.mark.parametrize("frame_id", ["", "c", "ca", "cam", "camera"])  # lengths move what follows
@pytest.mark.parametrize("encoding", ["rgb8", "mono8", "bayer_rggb8"])
def test_an_image_read_from_the_wire_equals_the_message(frame_id, encoding):
    msg = image(1_341_847_980_822_978_123, frame_id, encoding=encoding, size=(7, 5))
    msg.is_bigendian, msg.step = 1, 23
    wire = conversions.WireImage.read(serialize_message(msg))
    assert (wire.stamp_ns, wire.frame_id) == (stamps.to_ns(msg.header.stamp), msg.header.frame_id)
    for name in ("height", "width", "encoding", "is_bigendian", "step"):
        assert getattr(wire, name) == getattr(msg, name)
    assert wire.data == msg.data


def test_an_unknown_encoding_is_refused_by_name():
    with pytest.raises(encodings.ImageError, match="jpeg2000"):
        conversions.decode_image(image(1, encoding="jpeg2000"))


# ---- equal to what a ROS installation brings -------------------------------------------------------------------------


def test_equal_to_tf_transformations():
    if optional.tf_transformations is None:
        pytest.skip("tf_transformations is not installed here")
    rng = np.random.default_rng(0)
    for R in geometry.so3_exp(rng.normal(size=(200, 3)) * 2):
        own, other = geometry.quat_xyzw_from_matrix(R), np.array(optional.quat_xyzw_from_matrix(R))
        assert min(np.abs(own - other).max(), np.abs(own + other).max()) < 1e-7
        np.testing.assert_allclose(optional.matrix_from_quat_xyzw(other), R, atol=1e-7)


def test_equal_to_sensor_msgs_py():
    point_cloud2 = pytest.importorskip("sensor_msgs_py.point_cloud2", reason="sensor_msgs_py is not installed here")
    batch = points(1000)
    own: PointCloud2 = conversions.CloudWriter().write("map", batch, np.eye(4))
    declared = point_cloud2.dtype_from_fields(own.fields, own.point_step)
    other = point_cloud2.create_cloud(own.header, own.fields, np.frombuffer(own.data, declared))
    other.is_dense = own.is_dense  # it does not look
    assert other == own
    read = point_cloud2.read_points(own, field_names=["x", "y", "z"], skip_nans=True)
    np.testing.assert_array_equal(np.stack([read["x"], read["y"], read["z"]], axis=1), batch.xyz)


@pytest.mark.parametrize(
    "encoding", ["rgb8", "bgr8", "rgba8", "bgra8", "mono8", "bayer_rggb8", "bayer_gbrg8", "yuv422"]
)
def test_equal_to_cv_bridge(encoding):
    if optional.cv_bridge is None:
        pytest.skip("cv_bridge is not installed here, or does not work with this NumPy")
    channels = {"rgba8": 4, "bgra8": 4, "rgb8": 3, "bgr8": 3, "yuv422": 2}.get(encoding, 1)
    data = np.random.default_rng(0).integers(0, 256, 48 * 64 * channels, dtype=np.uint8)
    msg = image(1, encoding=encoding, data=data.tobytes())
    msg.step = 64 * channels
    other = optional.decode_with_cv_bridge(msg)
    np.testing.assert_array_equal(conversions.decode_image(msg), other)


@pytest.mark.parametrize("is_bigendian", [False, True])
@pytest.mark.parametrize("encoding", ["16SC3", "32FC1", "8UC2", "nv24", "unheard_of"])
def test_what_cv_bridge_cannot_turn_into_colours_either_is_refused(encoding, is_bigendian):
    msg = image(1, encoding=encoding)
    msg.is_bigendian = int(is_bigendian)
    with pytest.raises(encodings.ImageError, match=encoding):
        conversions.decode_image(msg)


def test_the_quick_quaternion_equals_the_plain_one():
    rng = np.random.default_rng(0)
    turns = [*geometry.so3_exp(rng.normal(size=(300, 3)) * 2), *geometry.so3_exp(np.pi * np.eye(3)), np.eye(3)]
    for R in turns:
        np.testing.assert_allclose(placement.rotation_vector(R), geometry.so3_log(R), atol=1e-9)
        own, plain = np.array(optional.quaternion(R)), geometry.quat_xyzw_from_matrix(R)
        np.testing.assert_allclose(own * np.sign(own @ plain), plain, atol=1e-12)


@pytest.mark.parametrize("child", ["base_link", "b", "a/rather/long_name"])  # lengths move what follows
def test_odometry_as_bytes_equals_the_message(child):
    rng = np.random.default_rng(4)
    writer = conversions.OdometryWriter("odom", child)
    for stamp_ns in (1_341_847_980_822_978_123, 7):
        T = geometry.make_T(geometry.so3_exp(rng.normal(size=3)), rng.normal(size=3))
        covariance, twist, twist_covariance = rng.normal(size=(6, 6)), rng.normal(size=6), rng.normal(size=(6, 6))
        expected = Odometry(child_frame_id=child)
        expected.header.frame_id, expected.header.stamp = "odom", stamps.to_msg(stamp_ns)
        conversions.set_odometry(expected, T, covariance, twist, twist_covariance)
        got = writer.write(stamp_ns, T, covariance, twist, twist_covariance)
        assert deserialize_message(got, Odometry) == expected


@pytest.mark.parametrize("links", [[("map", "odom")], [("odom", "base_link"), ("map", "odom")], [("a", "bb")] * 3])
def test_transforms_as_bytes_equal_the_message(links):
    rng = np.random.default_rng(5)
    writer = conversions.TransformWriter(links)
    for _ in range(2):
        values = [
            (int(rng.integers(1, 2**60)), geometry.make_T(geometry.so3_exp(rng.normal(size=3)), rng.normal(size=3)))
            for _ in links
        ]
        expected = [conversions.transform_message(*link, *value) for link, value in zip(links, values)]
        assert deserialize_message(writer.write(values), TFMessage).transforms == expected


def test_set_odometry_fills_every_number():
    T = geometry.make_T(geometry.so3_exp([0.1, 0.2, 0.3]), np.array([1.0, 2, 3]))
    msg = Odometry()
    conversions.set_odometry(msg, T, np.arange(36.0).reshape(6, 6), np.arange(6.0), np.eye(6) * 4)
    np.testing.assert_allclose(conversions.matrix_from_pose(msg.pose.pose), T)
    np.testing.assert_array_equal(msg.pose.covariance, np.arange(36.0))
    assert (msg.twist.twist.linear.y, msg.twist.twist.angular.z) == (1.0, 5.0)
    assert msg.twist.covariance[35] == 4


def test_latency_percentiles_are_by_nearest_rank():
    stats = diagnostics.Statistics()
    assert np.isnan(stats.latency_percentiles_ms()).all()
    stats._latencies.extend(1e-3 * n for n in (5, 1, 4, 2, 3))
    assert stats.latency_percentiles_ms() == pytest.approx((3, 5))
    stats._latencies.extend(1e-3 * n for n in range(1, 301))
    assert stats.latency_percentiles_ms() == pytest.approx((151, 286))
