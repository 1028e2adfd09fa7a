"""Every topic: type, QoS, frame, stamp, content."""

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticArray
from fake import SPEED, WINDOW
from nav_msgs.msg import Odometry, Path
from rclpy.qos import DurabilityPolicy, ReliabilityPolicy
from rig import BEST_EFFORT, CAMERA, LATCHED, MS, statuses
from sensor_msgs.msg import CameraInfo, Image, PointCloud2
from tf2_msgs.msg import TFMessage
from visualization_msgs.msg import Marker, MarkerArray

from spark3r_ros.frame import TrackingState
from spark3r_ros.ros import conversions, interface, stamps


def test_every_output_is_there_with_its_type_and_qos(rig):
    r = rig()
    for output in interface.OUTPUTS:
        topic = r.node.resolve_topic_name(output.topic)
        r.until(lambda topic=topic: r.peer.count_publishers(topic))
        info = r.peer.get_publishers_info_by_topic(topic)[0]
        package, _, _ = output.kind.__module__.partition(".")
        assert info.topic_type == f"{package}/msg/{output.kind.__name__}"
        assert info.qos_profile.reliability == output.profile.reliability
        assert info.qos_profile.durability == output.profile.durability


def test_latched_and_reliable_topics_are_those_of_the_contract():
    latched = {o.topic for o in interface.OUTPUTS if o.profile.durability == DurabilityPolicy.TRANSIENT_LOCAL}
    best_effort = {o.topic for o in interface.OUTPUTS if o.profile.reliability == ReliabilityPolicy.BEST_EFFORT}
    assert latched == {"~/path", "~/map", "~/keyframes"}
    assert best_effort == {"~/depth", "~/depth/camera_info", "~/depth_relative"}


def test_odometry_is_one_per_image_with_its_stamp(rig):
    r = rig()
    got = r.listen(Odometry, "/spark3r/odometry")
    start = 1_341_847_980_822_978_123  # a stamp that does not survive a float
    sent = r.send(20, start_ns=start, step_ns=33_333_333)
    r.until(lambda: len(got) == 20)
    assert [stamps.to_ns(m.header.stamp) for m in got] == sent
    assert {(m.header.frame_id, m.child_frame_id) for m in got} == {("odom", CAMERA)}
    last = got[-1]
    seconds = 1e-9 * (sent[-1] - sent[0])
    assert last.pose.pose.position.x == pytest.approx(SPEED * seconds)  # the camera looks along x of a z-up frame
    assert last.twist.twist.linear.z == pytest.approx(SPEED)  # and moves along its own optical axis
    assert last.pose.covariance[0] > got[0].pose.covariance[0] > 0


def test_the_first_twist_is_unknown(rig):
    r = rig()
    got = r.listen(Odometry, "/spark3r/odometry")
    r.send(2)
    r.until(lambda: len(got) == 2)
    assert got[0].twist.covariance[0] == 1e6
    assert got[1].twist.covariance[0] < 1


def test_lost_is_said_and_no_pose_is_confident(rig):
    r = rig()
    got = r.listen(Odometry, "/spark3r/odometry")
    tf = r.listen(TFMessage, "/tf")
    diagnostics = r.listen(DiagnosticArray, "/diagnostics")
    r.send(2)
    r.until(lambda: len(got) == 2)
    r.fake.state = TrackingState.LOST
    r.until(lambda: len(odom_transforms(tf)) == 2)
    r.send(3)
    r.until(lambda: len(got) == 5)
    assert all(m.pose.covariance[0] == 1e6 and m.twist.covariance[35] == 1e6 for m in got[2:])
    r.spin(0.2)
    assert len(odom_transforms(tf)) == 2, "a transform is a confident pose"
    r.until(lambda: diagnostics and statuses(diagnostics[-1])["spark3r: tracking"]["state"] == "lost")
    assert statuses(diagnostics[-1])["spark3r: tracking"]["level"] == b"\x02"
    r.fake.state = TrackingState.TRACKING  # recognised a keyframe
    r.send(2)
    r.until(lambda: len(got) == 7 and len(odom_transforms(tf)) == 4)
    assert got[-1].pose.covariance[0] < 1
    r.until(lambda: statuses(diagnostics[-1])["spark3r: tracking"]["level"] == b"\x00")


def odom_transforms(messages):
    return [t for m in messages for t in m.transforms if t.header.frame_id == "odom"]


def test_points_of_a_window(rig):
    r = rig()
    got = r.listen(PointCloud2, "/spark3r/points")
    sent = r.send(WINDOW)
    cloud = r.until(lambda: got and got[-1])
    assert cloud.header.frame_id == "map"
    assert stamps.to_ns(cloud.header.stamp) == sent[-1]
    points = np.frombuffer(cloud.data, conversions.POINT)
    assert len(points) == cloud.width == r.fake.num_points
    assert cloud.is_dense
    assert [f.name for f in cloud.fields] == ["x", "y", "z", "rgb", "confidence"]
    assert points["x"].min() == pytest.approx(1, abs=1e-5)  # z of the camera is x of the map
    assert set(points["rgb"]) == {10 << 16 | 20 << 8 | 30}
    assert np.all(points["confidence"] == np.float32(0.5))


@pytest.mark.parametrize("topic", ["points", "map"])
def test_clouds_are_built_only_for_listeners(rig, topic):
    r = rig()
    writes = []
    writer = {"points": r.node._outputs._cloud, "map": r.node._outputs._map_cloud}[topic]
    publisher = r.node._outputs._publishers[f"~/{topic}"]
    r.until(lambda: not publisher.get_subscription_count())  # one of the test before may still be known
    write = writer.write
    writer.write = lambda *a: writes.append(1) or write(*a)
    r.send(WINDOW)
    assert not writes
    got = r.listen(PointCloud2, f"/spark3r/{topic}")
    r.send(WINDOW)
    r.until(lambda: got)
    assert len(writes) == len(got) == 1


def test_the_map_holds_all_points_in_the_map_frame(rig):
    r = rig()
    got = r.listen(PointCloud2, "/spark3r/map", LATCHED)
    sent = r.send(WINDOW)
    r.until(lambda: got)
    points = np.frombuffer(got[-1].data, conversions.POINT)
    assert (len(points), got[-1].header.frame_id) == (r.fake.num_points, "map")
    assert stamps.to_ns(got[-1].header.stamp) == sent[-1]
    assert points["x"].max() == pytest.approx(2, abs=1e-5)


def test_map_path_and_keyframes_reach_who_comes_late(rig):
    r = rig()
    r.send(2 * WINDOW)
    got = r.listen(PointCloud2, "/spark3r/map", LATCHED)
    paths = r.listen(Path, "/spark3r/path", LATCHED)
    frusta = r.listen(MarkerArray, "/spark3r/keyframes", LATCHED)
    r.until(lambda: got and paths and frusta)
    assert got[-1].header.frame_id == paths[-1].header.frame_id == "map"
    assert len(paths[-1].poses) == 2
    marker = frusta[-1].markers[0]
    assert marker.type == Marker.LINE_LIST
    assert len(marker.points) == 2 * 16
    more = r.listen(Path, "/spark3r/path", LATCHED)
    r.until(lambda: more)
    assert more[-1] == paths[-1]


def test_path_is_bounded_and_corrected(rig):
    r = rig(path_length=3)
    paths = r.listen(Path, "/spark3r/path", LATCHED)
    r.send(6 * WINDOW)
    r.until(lambda: paths and stamps.to_ns(paths[-1].header.stamp) == r.fake._last_ns)
    first = paths[-1].poses[0]
    assert len(paths[-1].poses) == 3
    r.fake._keyframes = [(s, _lifted(T)) for s, T in r.fake._keyframes]  # a loop was closed
    r.send(WINDOW)
    r.until(lambda: stamps.to_ns(paths[-1].header.stamp) == r.fake._last_ns)
    assert paths[-1].poses[0].pose.position.z == pytest.approx(first.pose.position.z + 1)


def test_a_loop_is_seen_on_path_and_markers_without_a_new_window(rig):
    r = rig()
    paths = r.listen(Path, "/spark3r/path", LATCHED)
    frusta = r.listen(MarkerArray, "/spark3r/keyframes", LATCHED)
    r.send(WINDOW)
    r.until(lambda: paths and frusta)
    before = marker_tips(frusta)
    r.fake._keyframes = [(s, _lifted(T)) for s, T in r.fake._keyframes]
    r.fake.map_changed = True
    r.send(1)
    r.until(lambda: paths[-1].poses[0].pose.position.z == pytest.approx(1))
    r.until(lambda: np.allclose(marker_tips(frusta), before + np.array([0, 0, 1])))


def marker_tips(messages):
    """[N, 3] where the frusta of the newest message begin: the cameras."""
    points = np.array([[p.x, p.y, p.z] for p in messages[-1].markers[0].points])
    return points.reshape(-1, 16, 3)[:, 0]


def test_markers_stand_where_the_path_goes_and_go_with_a_reset(rig):
    r = rig()
    paths = r.listen(Path, "/spark3r/path", LATCHED)
    frusta = r.listen(MarkerArray, "/spark3r/keyframes", LATCHED)
    r.send(3 * WINDOW)
    r.until(lambda: paths and len(paths[-1].poses) == 3 and frusta and len(marker_tips(frusta)) == 3)
    positions = [[p.pose.position.x, p.pose.position.y, p.pose.position.z] for p in paths[-1].poses]
    np.testing.assert_allclose(marker_tips(frusta), positions, atol=1e-9)
    marker = frusta[-1].markers[0]
    assert (marker.header.frame_id, stamps.to_ns(marker.header.stamp)) == ("map", r.fake._last_ns)
    ends = np.array([[p.x, p.y, p.z] for p in marker.points]).reshape(-1, 16, 3)
    assert np.all(ends[..., 0] >= ends[:, :1, 0] - 1e-9), "they open ahead: along x of the map"
    assert r.call("/spark3r/reset").success
    r.send(1)
    r.until(lambda: frusta[-1].markers[0].action == Marker.DELETEALL)


def _lifted(T):
    T = T.copy()
    T[1, 3] -= 1  # optical y points down
    return T


def test_the_map_is_rate_limited(rig):
    r = rig(map_period=60.0)
    got = r.listen(PointCloud2, "/spark3r/map", LATCHED)
    r.send(3 * WINDOW, step_ns=10 * MS)
    r.until(lambda: got)
    r.spin(1.2)
    assert len(got) == 1


@pytest.mark.parametrize("is_metric", [True, False])
def test_depth_is_in_metres_or_says_that_it_is_not(rig, is_metric):
    r = rig()
    r.fake.is_metric = is_metric
    metric = r.listen(Image, "/spark3r/depth", BEST_EFFORT)
    relative = r.listen(Image, "/spark3r/depth_relative", BEST_EFFORT)
    info = r.listen(CameraInfo, "/spark3r/depth/camera_info", BEST_EFFORT)
    sent = r.send(WINDOW)
    image = r.until(lambda: (metric if is_metric else relative) and (metric or relative)[-1])
    assert (image.encoding, image.width, image.height, image.step) == ("32FC1", 16, 12, 64)
    assert (stamps.to_ns(image.header.stamp), image.header.frame_id) == (sent[-1], CAMERA)
    depth = conversions.decode_depth(image)
    assert np.isnan(depth[0, 0])
    assert depth[3, 3] == 2.0
    if is_metric:
        r.until(lambda: info)
        assert info[-1].header == image.header
        assert (info[-1].width, info[-1].height, info[-1].k[0]) == (16, 12, 20.0)
        assert not relative
    else:
        r.spin(0.2)
        assert not metric
        assert not info


def test_names_follow_namespace_and_remaps(rig):
    r = rig(namespace="/robot1", remap=["image:=camera/image_raw", "__node:=mapper"])
    got = r.listen(Odometry, "/robot1/mapper/odometry")
    r.camera(topic="camera/image_raw")
    r.send(2)
    r.until(lambda: len(got) == 2)
