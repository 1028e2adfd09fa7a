"""What comes in: encodings, compressed, QoS, stamps, frames, calibration, depth, odometry, and what is refused."""

import cv2
import numpy as np
import pytest
from fake import WINDOW
from nav_msgs.msg import Odometry
from rclpy.qos import ReliabilityPolicy
from rig import BEST_EFFORT, CAMERA, MS, RELIABLE, image, now_ns
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from spark3r_ros import encodings, geometry
from spark3r_ros.ros import inputs, stamps


def last_image(r):
    return r.fake.frames[-1].image


def test_encodings_may_change_in_mid_stream(rig):
    r = rig()
    rgb = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    r.send(encoding="rgb8", data=rgb.tobytes())
    np.testing.assert_array_equal(last_image(r), rgb)
    r.send(encoding="bgr8", data=rgb[..., ::-1].tobytes())
    np.testing.assert_array_equal(last_image(r), rgb)
    r.send(encoding="mono8", data=rgb[..., 0].tobytes())
    np.testing.assert_array_equal(last_image(r), np.repeat(rgb[..., :1], 3, axis=2))
    assert r.stats.poses == 3


def test_padded_rows_and_big_endian_samples_through_dds(rig):
    r = rig()
    publisher = r.camera()
    mono = np.random.default_rng(1).integers(0, 65536, (48, 64), dtype=np.uint16)
    padded = np.zeros((48, 70), ">u2")
    padded[:, :64] = mono
    msg = Image(width=64, height=48, encoding="mono16", step=140, is_bigendian=1)
    msg.header.frame_id, msg.header.stamp = CAMERA, stamps.to_msg(now_ns())
    msg.data.frombytes(padded.tobytes())
    publisher.publish(msg)
    r.until(lambda: r.stats.poses == 1)
    np.testing.assert_array_equal(last_image(r)[..., 1], mono >> 8)


def test_every_encoding_through_dds_with_padded_rows_and_either_byte_order(rig):
    r = rig()
    publisher = r.camera()
    rng = np.random.default_rng(2)
    for encoding, layout in encodings._LAYOUTS.items():
        shape = (48 * layout.planes // 2, 64 * layout.channels)
        samples = rng.integers(0, 2**layout.bits, shape).astype(f"u{layout.bits // 8}")
        expected = encodings.decode(encoding, samples.tobytes(), 48, 64, samples.strides[0])
        for order in "<>":
            padded = np.full((shape[0], shape[1] + 6), 7, samples.dtype.newbyteorder(order))
            padded[:, : shape[1]] = samples
            msg = image(now_ns(), encoding=encoding, data=padded.tobytes())
            msg.step, msg.is_bigendian = padded.strides[0], int(order == ">")
            before = r.stats.poses
            publisher.publish(msg)
            r.until(lambda before=before: r.stats.poses > before or r.stats.dropped["bad_image"])
            np.testing.assert_array_equal(last_image(r), expected, err_msg=f"{encoding} {order}")
    assert not r.stats.dropped


def test_bad_images_are_refused_counted_and_do_not_stop_the_stream(rig):
    r = rig()
    publisher = r.camera()
    r.send(2)
    for bad in (image(now_ns(), encoding="jpeg2000"), image(now_ns(), data=b"short"), image(now_ns(), size=(0, 0))):
        before = r.stats.dropped["bad_image"]
        bad.header.stamp = stamps.to_msg(r._next_ns)
        r._next_ns += MS
        publisher.publish(bad)
        r.until(lambda before=before: r.stats.dropped["bad_image"] == before + 1)
    r.send(2)
    assert r.stats.poses == 4


def test_compressed_images(rig):
    r = rig(image_transport="compressed", remap=["image:=image_raw/compressed"])
    publisher = r.publisher(CompressedImage, "image_raw/compressed", BEST_EFFORT)
    rgb = np.full((48, 64, 3), (200, 30, 60), np.uint8)
    for i, name in enumerate((".png", ".jpg")):
        msg = CompressedImage(format=name[1:])
        msg.header.frame_id, msg.header.stamp = CAMERA, stamps.to_msg(now_ns())
        msg.data.frombytes(cv2.imencode(name, rgb[..., ::-1])[1].tobytes())
        publisher.publish(msg)
        r.until(lambda i=i: r.stats.poses == i + 1)
        assert np.abs(last_image(r).astype(int) - rgb).max() <= (0 if name == ".png" else 4)
    msg.data = msg.data[: len(msg.data) // 2]
    msg.header.stamp = stamps.to_msg(now_ns())
    publisher.publish(msg)
    r.until(lambda: r.stats.dropped["bad_image"] == 1)


def test_a_changed_size_is_refused_and_then_taken_for_a_new_camera_mode(rig):
    r = rig()
    r.send(3)
    r.send(3, size=(32, 24))
    assert r.stats.dropped["bad_frame"] == 3
    assert r.fake.resets == 0
    r.send(1)  # it was a glitch
    r.send(12, size=(32, 24))
    assert r.fake.resets == 1
    assert r.stats.dropped["bad_frame"] == 3 + 9
    assert last_image(r).shape == (24, 32, 3)


# ---- QoS ------------------------------------------------------------------------------------------------------------


def test_auto_follows_a_best_effort_camera_that_comes_later(rig):
    r = rig()
    assert r.node._images.reliability is ReliabilityPolicy.RELIABLE
    r.camera(BEST_EFFORT)
    r.until(lambda: r.node._images.reliability is ReliabilityPolicy.BEST_EFFORT)
    r.until(lambda: r._image_publisher.get_subscription_count())
    r.send(3)
    assert r.stats.poses == 3


def test_auto_returns_to_reliable(rig):
    r = rig()
    publisher = r.camera(BEST_EFFORT)
    r.until(lambda: r.node._images.reliability is ReliabilityPolicy.BEST_EFFORT)
    r.peer.destroy_publisher(publisher)
    r.camera(RELIABLE)
    r.until(lambda: r.node._images.reliability is ReliabilityPolicy.RELIABLE)
    r.until(lambda: r._image_publisher.get_subscription_count())
    r.send(3)
    assert r.stats.poses == 3


def test_fixed_reliability_is_kept_and_the_mismatch_is_named(rig):
    r = rig(reliability="reliable", no_data_timeout=0.3)
    r.peer.create_publisher(Image, "image", BEST_EFFORT)
    r.until(lambda: "best_effort" in r.node._images.why_silent())
    assert r.node._images.reliability is ReliabilityPolicy.RELIABLE
    assert "set reliability to auto" in r.node._images.why_silent()


def test_publishers_of_either_reliability_are_heard_together(rig):
    r = rig()
    reliable = r.camera(RELIABLE)
    r.send(1)
    best_effort = r.peer.create_publisher(Image, "image", BEST_EFFORT)
    r.until(best_effort.get_subscription_count)
    r.until(reliable.get_subscription_count)
    r.send(1)
    r._image_publisher = best_effort
    r.send(1)
    assert r.stats.poses == 3
    assert r.node._images.reliability is ReliabilityPolicy.BEST_EFFORT


def test_best_effort_when_asked_for(rig):
    r = rig(reliability="best_effort")
    r.camera(RELIABLE)
    r.send(2)
    assert r.node._images.reliability is ReliabilityPolicy.BEST_EFFORT


# ---- stamps and frames ----------------------------------------------------------------------------------------------


def test_zero_old_and_repeated_stamps_are_refused_by_reason(rig):
    r = rig()
    start = now_ns()
    r.send(1, start_ns=start)
    r.send(1, start_ns=0)
    r.send(1, start_ns=start)
    r.send(1, start_ns=start - 200 * MS)
    r.send(1, start_ns=start + 33 * MS)
    assert (r.stats.dropped["zero_stamp"], r.stats.dropped["old_stamp"], r.stats.poses) == (1, 2, 2)


def test_two_cameras_on_one_topic_are_told_apart(rig):
    r = rig()
    other = r.peer.create_publisher(Image, "image", RELIABLE)
    r.camera()
    r.until(other.get_subscription_count)
    r.send(2)
    r.send(3, frame_id="other_optical_frame")
    r.send(2)
    assert (r.stats.poses, r.stats.dropped["other_camera"]) == (4, 3)
    assert r.node._images.describe()["publishers"] == 2


def test_an_empty_frame_id_needs_a_name(rig):
    r = rig()
    r.send(2, frame_id="")
    assert r.stats.dropped["other_camera"] == 2
    named = rig(camera_frame="my_optical_frame", remap=["__node:=second"])
    r.send(2, frame_id="")
    named.until(lambda: named.stats.poses == 2)
    assert named.fake.frames[-1].frame_id == "my_optical_frame"


# ---- what comes beside the images -----------------------------------------------------------------------------------


def calibration(frame_id=CAMERA, width=64, height=48):
    msg = CameraInfo(width=width, height=height, distortion_model="plumb_bob", d=[0.1, 0.0, 0.0, 0.0, 0.0])
    msg.k = [50.0, 0, 32, 0, 50, 24, 0, 0, 1]
    msg.p = [40.0, 0, 31, 0, 0, 40, 23, 0, 0, 0, 1, 0]
    msg.header.frame_id = frame_id
    return msg


def test_calibration_reaches_the_first_frame(rig, monkeypatch):
    monkeypatch.setattr(inputs, "_CAMERA_INFO_S", 20.0)
    r = rig()
    r.camera()
    publisher = r.publisher(CameraInfo, "camera_info")
    sent = r.send(1, wait=False)
    publisher.publish(calibration())  # after the image: the first frame waits for it
    r.until(lambda: r.stats.poses == 1)
    camera = r.fake.frames[-1].camera
    assert (camera.K[0, 0], camera.distortion_model, r.fake.frames[-1].stamp_ns) == (50, "plumb_bob", sent[0])
    r.send(1)
    assert r.fake.frames[-1].camera is camera, "converted once"


def test_rectified_images_use_p(rig):
    r = rig(image_is_rectified=True)
    r.camera()
    r.publisher(CameraInfo, "camera_info").publish(calibration())
    r.send(1)
    assert (r.fake.frames[-1].camera.K[0, 0], r.fake.frames[-1].camera.distortion_model) == (40, "none")


@pytest.mark.parametrize("fields", [{"frame_id": "other"}, {"width": 640}])
def test_a_calibration_that_does_not_fit_is_not_used(rig, fields):
    r = rig()
    r.camera()
    r.publisher(CameraInfo, "camera_info").publish(calibration(**fields))
    r.send(1)
    assert r.fake.frames[-1].camera is None
    assert r.stats.refused["camera_info"] == 1


def depth_image(stamp_ns, frame_id=CAMERA, millimetres=1500):
    msg = Image(width=64, height=48, encoding="16UC1", step=128)
    msg.header.stamp, msg.header.frame_id = stamps.to_msg(stamp_ns), frame_id
    msg.data.frombytes(np.full((48, 64), millimetres, np.uint16).tobytes())
    return msg


def test_depth_joins_its_image_even_when_it_is_late(rig, monkeypatch):
    monkeypatch.setattr(inputs, "_LATE_S", 20.0)
    r = rig()
    r.camera()
    publisher = r.publisher(Image, "depth")
    publisher.publish(depth_image(now_ns()))
    r.until(lambda: r.node._companions._depth.is_alive)
    start = r._next_ns = now_ns()
    for i in range(3):
        r.send(1, wait=False)
        publisher.publish(depth_image(start + i * 33 * MS + 5 * MS, millimetres=1000 + i))
        r.until(lambda i=i: r.stats.poses == i + 1)
        assert r.fake.frames[-1].depth[0, 0] == pytest.approx(1 + 0.001 * i)


def test_depth_of_another_time_or_frame_is_not_used(rig):
    r = rig()
    r.camera()
    publisher = r.publisher(Image, "depth")
    start = now_ns()
    publisher.publish(depth_image(start + 500 * MS))
    r.until(lambda: r.node._companions._depth.is_alive)
    r.send(1, start_ns=start)
    assert r.fake.frames[-1].depth is None
    assert r.stats.refused["depth_without_image"] == 1
    publisher.publish(depth_image(start + 600 * MS, frame_id="depth_frame"))
    r.until(lambda: r.node._companions._depth.nearest(start + 600 * MS, 0))
    r.send(1, start_ns=start + 600 * MS)
    assert r.fake.frames[-1].depth is None
    assert r.stats.refused["depth"] == 1


def test_odometry_is_interpolated_to_the_image(rig):
    r = rig()
    r.camera()
    publisher = r.publisher(Odometry, "odom")
    start = now_ns()
    for i in range(5):
        msg = Odometry()
        msg.header.stamp = stamps.to_msg(start + i * 20 * MS)
        msg.pose.pose.orientation.w = 1.0
        msg.pose.pose.position.x = float(i)
        publisher.publish(msg)
    r.until(lambda: r.node._companions._odometry.nearest(start + 80 * MS, 0) is not None)
    r.send(2, start_ns=start + 10 * MS)
    assert [f.T_odom_base[0, 3] for f in r.fake.frames] == pytest.approx([0.5, 2.15])


def odometry(stamp_ns, x=0.0, frame_id="", child_frame_id=""):
    msg = Odometry(child_frame_id=child_frame_id)
    msg.header.stamp, msg.header.frame_id = stamps.to_msg(stamp_ns), frame_id
    msg.pose.pose.orientation.w = 1.0
    msg.pose.pose.position.x = x
    return msg


def test_odometry_of_another_part_of_the_robot_is_carried_to_the_base(rig):
    r = rig(base_frame="base_link")
    r.camera()
    publisher = r.publisher(Odometry, "odom")
    start = now_ns()
    publisher.publish(odometry(start, 1.0, child_frame_id="base_footprint"))
    r.until(lambda: r.stats.refused["odometry"] == 1)  # TF does not know it yet
    T_footprint_base = geometry.make_T(np.eye(3), np.array([0.1, 0.0, 0.2]))
    r.send_tf(("base_footprint", "base_link", 0, T_footprint_base), ("base_link", CAMERA, 0, np.eye(4)), static=True)
    publisher.publish(odometry(start, 1.0, child_frame_id="base_footprint"))
    r.until(lambda: r.node._companions._odometry.nearest(start, 0) is not None)
    r.send(1, start_ns=start)
    np.testing.assert_allclose(r.fake.frames[-1].T_odom_base[:3, 3], [1.1, 0.0, 0.2])


def test_odometry_in_another_frame_than_odom_frame_is_refused_where_it_would_bend_the_tree(rig):
    r = rig(base_frame="base_link", tf_mode="map_to_odom", odom_source="topic")
    publisher = r.publisher(Odometry, "odom")
    publisher.publish(odometry(now_ns(), frame_id="wheel_odom", child_frame_id="base_link"))
    r.until(lambda: r.stats.refused["odometry"] == 1)
    publisher.publish(odometry(now_ns(), frame_id="odom", child_frame_id="base_link"))
    r.until(lambda: r.node._companions._odometry.is_alive)
    assert r.stats.refused["odometry"] == 1


def test_broken_odometry_is_refused(rig):
    r = rig()
    publisher = r.publisher(Odometry, "odom")
    msg = Odometry()
    msg.header.stamp = stamps.to_msg(now_ns())
    msg.pose.pose.orientation.w = 0.0
    publisher.publish(msg)
    r.until(lambda: r.stats.refused["odometry"] == 1)


# ---- dropping -------------------------------------------------------------------------------------------------------


def test_newest_wins_and_every_drop_is_counted(rig):
    r = rig(queue_size=2)
    r.camera()
    r.fake.gate.clear()
    sent = r.send(1, wait=False)
    r.until(lambda: r.stats.images == 1 and not r.node._worker.waiting)  # it is in work
    for i in range(1, 20):
        sent += r.send(1, wait=False)
        r.until(lambda i=i: r.stats.images == i + 1)
    r.fake.gate.set()
    r.until(r.is_idle)
    assert (r.stats.poses, r.stats.dropped["queue_full"]) == (3, 17)
    assert [f.stamp_ns for f in r.fake.frames] == [sent[0], sent[-2], sent[-1]], "the newest ones are used"


def test_never_drop_holds_the_messages_back(rig):
    r = rig(drop_policy="never", queue_size=2)
    r.camera()
    r.fake.delay_s = 0.02
    sent = r.send(60, wait=False)
    deepest = 0

    def done():
        nonlocal deepest
        deepest = max(deepest, r.node._worker.waiting)
        return r.stats.poses == 60

    r.until(done, timeout=20)
    assert deepest <= 2
    assert [f.stamp_ns for f in r.fake.frames] == sent
    assert not r.stats.dropped
    assert r.stats.lost_by_middleware == 0


def test_an_unexpected_error_is_said_and_survived(rig):
    r = rig()
    r.fake.error = RuntimeError("CUDA out of memory")
    r.send(2)
    assert r.stats.dropped["failed"] == 2
    assert "CUDA out of memory" in r.stats.worker_error
    r.fake.error = None
    r.send(WINDOW)
    assert r.stats.poses == WINDOW
    assert not r.stats.worker_error


def test_the_pose_goes_out_before_the_map_is_updated(rig):
    r = rig()
    r.send(1)
    r.fake.map_gate.clear()
    r.send(1, wait=False)
    r.until(lambda: r.stats.poses == 2)


def test_a_map_that_cannot_be_updated_is_said_and_takes_no_pose_away(rig):
    r = rig()
    r.fake.map_error = RuntimeError("CUDA out of memory")
    r.send(2)
    assert r.stats.poses == 2
    assert not r.stats.dropped
    assert "CUDA out of memory" in r.stats.worker_error
    r.fake.map_error = None
    r.send(WINDOW)
    assert r.stats.windows == 1
    assert not r.stats.worker_error
