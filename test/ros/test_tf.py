"""Each TF mode against the recorded tree; and our own buffer against what tf2 promises."""

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticArray
from fake import SPEED, truth
from nav_msgs.msg import Odometry
from rig import CAMERA, MS, matrix, now_ns, statuses
from tf2_msgs.msg import TFMessage

from spark3r_ros import geometry
from spark3r_ros.ros import conversions, optional, outputs, stamps
from spark3r_ros.ros.placement import T_BODY_OPTICAL
from spark3r_ros.ros.tf import OwnBuffer, Tf2Buffer, TransformError

# A camera 0.3 m ahead and 0.5 m above the base, tilted down by 20 degrees and turned left by 30.
T_BASE_CAMERA = (
    geometry.make_T(geometry.so3_exp([0, 0, np.radians(30)]), np.array([0.3, 0.1, 0.5]))
    @ geometry.make_T(geometry.so3_exp([0, np.radians(20), 0]), np.zeros(3))
    @ T_BODY_OPTICAL
)


def tree(messages, buffer=None):
    """A buffer filled with what was published."""
    buffer = buffer or OwnBuffer()
    for message in messages:
        for t in message.transforms:
            buffer.insert(t, static=False)
    return buffer


def links(messages):
    return {(t.header.frame_id, t.child_frame_id) for m in messages for t in m.transforms}


def is_known(messages, target, source, stamp_ns):
    try:
        tree(messages).lookup(target, source, stamp_ns)
    except TransformError:
        return False
    return True


def tracking_message(diagnostics):
    return statuses(diagnostics[-1])["spark3r: tracking"]["message"]


def recorded(r):
    """Only what the node under test sends: the peer's own transforms are told apart by their child."""
    return r.listen(TFMessage, "/tf")


def test_odom_to_base_with_a_tilted_camera(rig):
    r = rig(base_frame="base_link")
    tf = recorded(r)
    r.send_tf(("base_link", CAMERA, 0, T_BASE_CAMERA), static=True)
    odometry = r.listen(Odometry, "/spark3r/odometry")
    sent = r.send(10)
    r.until(lambda: len(odometry) == 10 and is_known(tf, "map", "base_link", sent[-1]))
    assert links(tf) == {("map", "odom"), ("odom", "base_link")}
    for stamp, message in zip(sent, odometry):
        # the map starts at the base, level, and the camera moves along its own tilted axis
        T_map_base = T_BASE_CAMERA @ truth(sent[0], stamp) @ geometry.inverse(T_BASE_CAMERA)
        np.testing.assert_allclose(tree(tf).lookup("odom", "base_link", stamp), T_map_base, atol=1e-9)
        np.testing.assert_allclose(conversions.matrix_from_pose(message.pose.pose), T_map_base, atol=1e-9)
        assert (message.header.frame_id, message.child_frame_id) == ("odom", "base_link")
    np.testing.assert_allclose(tree(tf).lookup("map", "odom", None), np.eye(4), atol=1e-12)
    linear = odometry[-1].twist.twist.linear
    np.testing.assert_allclose([linear.x, linear.y, linear.z], SPEED * T_BASE_CAMERA[:3, 2], atol=1e-6)


def test_corrections_go_to_map_to_odom_and_odom_never_jumps(rig):
    r = rig(base_frame="base_link")
    tf = recorded(r)
    r.send_tf(("base_link", CAMERA, 0, T_BASE_CAMERA), static=True)
    sent = r.send(3)
    correction = geometry.make_T(geometry.so3_exp([0, 0.1, 0]), np.array([1.0, 0.2, -0.5]))  # in optical axes of start
    r.fake.T_map_odom = correction
    sent += r.send(3)
    expected = T_BASE_CAMERA @ correction @ geometry.inverse(T_BASE_CAMERA)
    r.until(lambda: is_known(tf, "odom", "base_link", sent[-1]))
    r.until(lambda: np.allclose(tree(tf).lookup("map", "odom", None), expected, atol=1e-9))
    for stamp in sent:
        T = T_BASE_CAMERA @ truth(sent[0], stamp) @ geometry.inverse(T_BASE_CAMERA)
        np.testing.assert_allclose(tree(tf).lookup("odom", "base_link", stamp), T, atol=1e-9)


def dates_of_map_to_odom(messages):
    return [stamps.to_ns(t.header.stamp) for m in messages for t in m.transforms if t.child_frame_id == "odom"]


def test_map_to_odom_is_resent_at_20_hz_dated_ahead(rig):
    r = rig(transform_tolerance=0.25)
    tf = recorded(r)
    begin = now_ns()
    sent = r.send(2)
    r.until(lambda: tf)
    before = len(tf)
    r.until(lambda: len(tf) >= before + 22)
    dates = dates_of_map_to_odom(tf)[before:]
    assert dates == sorted(dates)
    assert sent[-1] + 250 * MS <= dates[0]
    assert dates[-1] <= sent[-1] + 250 * MS + now_ns() - begin, "the time of an image that would arrive now, and 0.25 s"
    assert 45 * MS <= np.median(np.diff(dates)) <= 60 * MS


@pytest.mark.parametrize("tf_mode", ["map_to_odom", "odom_to_base"])
def test_map_to_odom_keeps_20_hz_while_images_come_and_poses_do_not(rig, tf_mode):
    """Every image restarts the timer: at 30 Hz it never fires, and images stand in for it."""
    r = rig(base_frame="base_link", tf_mode=tf_mode, queue_size=100)
    tf = recorded(r)
    r.send_tf(("base_link", CAMERA, 0, T_BASE_CAMERA), static=True)
    if tf_mode == "map_to_odom":
        drive(r, r._next_ns - 10 * MS, 20, lambda stamp_ns: np.eye(4))
    r.send(2)
    r.until(lambda: dates_of_map_to_odom(tf))
    r.fake.gate.clear()
    before = len(dates_of_map_to_odom(tf))
    for _ in range(30):
        r.send(1, wait=False)
        r.spin(0.033)
    dates = dates_of_map_to_odom(tf)[before:]
    assert len(dates) >= 20
    assert np.median(np.diff(dates)) <= 50 * MS


def drive(r, sent_from, count, T_odom_base):
    """The robot's own odometry in TF, 100 Hz around the images."""
    dates = [sent_from + i * 10 * MS for i in range(count)]
    r.send_tf(*(("odom", "base_link", date, T_odom_base(date)) for date in dates))


def test_map_to_odom_corrects_a_robot_whose_odometry_slips(rig):
    r = rig(base_frame="base_link", tf_mode="map_to_odom")
    tf = recorded(r)
    odometry = r.listen(Odometry, "/spark3r/odometry")
    r.send_tf(("base_link", CAMERA, 0, T_BASE_CAMERA), static=True)
    start = now_ns()
    T0 = geometry.make_T(geometry.so3_exp([0, 0, 1.0]), np.array([5.0, 6.0, 0.0]))  # the robot did not start at zero

    def robot(stamp_ns):  # it believes that it moves at 90 % of the speed
        T = geometry.inverse(T_BASE_CAMERA)
        step = T_BASE_CAMERA @ truth(start, stamp_ns) @ T
        step[:3, 3] *= 0.9
        return T0 @ step

    drive(r, start, 60, robot)
    sent = r.send(10, start_ns=start + 5 * MS)
    moved = T_BASE_CAMERA @ truth(sent[0], sent[-1]) @ geometry.inverse(T_BASE_CAMERA)
    expected = robot(sent[0]) @ moved @ geometry.inverse(robot(sent[-1]))

    def ours():
        return [t for m in tf for t in m.transforms if t.child_frame_id == "odom"]

    r.until(lambda: ours() and np.allclose(matrix(ours()[-1].transform), expected, atol=1e-6))
    assert links(tf) == {("map", "odom"), ("odom", "base_link")}  # the second is the robot's
    assert {t.header.frame_id for t in ours()} == {"map"}
    np.testing.assert_allclose(matrix(ours()[0].transform), np.eye(4), atol=1e-12)
    assert odometry[-1].header.frame_id == "map"
    frame = r.fake.frames[-1]
    np.testing.assert_allclose(frame.T_odom_base, robot(frame.stamp_ns), atol=1e-6)


def test_map_to_odom_is_held_until_the_scale_is_metric(rig):
    r = rig(base_frame="base_link", tf_mode="map_to_odom")
    r.fake.is_metric = False
    tf = recorded(r)
    diagnostics = r.listen(DiagnosticArray, "/diagnostics")
    r.send_tf(("base_link", CAMERA, 0, T_BASE_CAMERA), static=True)
    start = now_ns()
    drive(r, start, 40, lambda stamp_ns: np.eye(4))
    r.send(8, start_ns=start + 5 * MS)
    r.spin(0.2)
    held = [matrix(t.transform) for m in tf for t in m.transforms if t.child_frame_id == "odom"]
    assert held
    assert np.allclose(held, np.eye(4))
    r.until(lambda: diagnostics and "is held" in tracking_message(diagnostics))


def test_map_to_odom_from_the_odometry_topic(rig):
    r = rig(base_frame="base_link", tf_mode="map_to_odom", odom_source="topic")
    tf = recorded(r)
    r.send_tf(("base_link", CAMERA, 0, T_BASE_CAMERA), static=True)
    publisher = r.publisher(Odometry, "odom")
    start = now_ns()
    for i in range(30):
        message = Odometry()
        message.header.stamp = stamps.to_msg(start + i * 10 * MS)
        message.pose.pose.orientation.w = 1.0
        publisher.publish(message)
    history = r.node._companions._odometry
    r.until(lambda: history.nearest(start + 290 * MS, 0) is not None)
    sent = r.send(5, start_ns=start + 5 * MS)
    expected = T_BASE_CAMERA @ truth(sent[0], sent[-1]) @ geometry.inverse(T_BASE_CAMERA)
    r.until(lambda: tf and np.allclose(matrix(tf[-1].transforms[0].transform), expected, atol=1e-9))
    assert links(tf) == {("map", "odom")}


def test_map_to_camera(rig):
    r = rig(tf_mode="map_to_camera")
    tf = recorded(r)
    odometry = r.listen(Odometry, "/spark3r/odometry")
    sent = r.send(5)
    r.until(lambda: len(tf) == 5 and len(odometry) == 5)
    assert links(tf) == {("map", CAMERA)}
    T = tree(tf).lookup("map", CAMERA, sent[-1])
    np.testing.assert_allclose(T, T_BODY_OPTICAL @ truth(sent[0], sent[-1]), atol=1e-9)
    assert (odometry[-1].header.frame_id, odometry[-1].child_frame_id) == ("map", CAMERA)


def test_off_publishes_no_transform(rig):
    r = rig(tf_mode="off")
    tf = recorded(r)
    odometry = r.listen(Odometry, "/spark3r/odometry")
    r.send(5)
    r.until(lambda: len(odometry) == 5)
    r.spin(0.2)
    assert not tf


def test_inverted_transforms_hang_below_the_base(rig):
    r = rig(base_frame="base_link", invert_tf=True, odom_frame="visual_odom", map_frame="visual_map")
    tf = recorded(r)
    r.send_tf(("base_link", CAMERA, 0, T_BASE_CAMERA), static=True)
    drive(r, now_ns(), 5, lambda stamp_ns: np.eye(4))  # an EKF owns odom -> base_link
    sent = r.send(5)
    r.until(lambda: is_known(tf, "base_link", "visual_map", sent[-1]))
    assert links(tf) == {("odom", "base_link"), ("base_link", "visual_odom"), ("visual_odom", "visual_map")}
    T = T_BASE_CAMERA @ truth(sent[0], sent[-1]) @ geometry.inverse(T_BASE_CAMERA)
    np.testing.assert_allclose(tree(tf).lookup("visual_odom", "base_link", sent[-1]), T, atol=1e-9)


def test_inverted_map_to_odom(rig):
    r = rig(base_frame="base_link", invert_tf=True, tf_mode="map_to_odom")
    tf = recorded(r)
    r.send_tf(("base_link", CAMERA, 0, T_BASE_CAMERA), static=True)
    start = now_ns()
    drive(r, start, 60, lambda stamp_ns: np.eye(4))  # wheels that do not turn
    sent = r.send(5, start_ns=start + 5 * MS)
    moved = T_BASE_CAMERA @ truth(sent[0], sent[-1]) @ geometry.inverse(T_BASE_CAMERA)

    def ours():
        return [t for m in tf for t in m.transforms if t.child_frame_id == "map"]

    r.until(lambda: ours() and np.allclose(matrix(ours()[-1].transform), geometry.inverse(moved), atol=1e-6))
    assert links(tf) == {("odom", "map"), ("odom", "base_link")}


def test_one_node_per_camera_keeps_one_parent_per_frame(rig):
    """As launch/multi_camera.launch.py starts them."""
    front = rig(namespace="/front", base_frame="base_link", map_frame="front/map")
    rear = rig(namespace="/rear", base_frame="base_link", tf_mode="off", map_frame="rear/map", odom_frame="rear/odom")
    tf = recorded(front)
    sides = {
        "front": (front, T_BASE_CAMERA),
        "rear": (rear, geometry.make_T(geometry.so3_exp([0, 0, 3.1]), np.zeros(3))),
    }
    got = {side: r.listen(Odometry, f"/{side}/spark3r/odometry") for side, (r, _) in sides.items()}
    for side, (r, T) in sides.items():
        r.send_tf(("base_link", f"{side}_optical", 0, T @ T_BODY_OPTICAL if side == "rear" else T), static=True)
        r.send(3, frame_id=f"{side}_optical")
        r.until(lambda side=side: len(got[side]) == 3)
    front.until(lambda: ("odom", "base_link") in links(tf))
    assert links(tf) == {("front/map", "odom"), ("odom", "base_link")}
    assert {(m.header.frame_id, m.child_frame_id) for m in got["front"]} == {("odom", "base_link")}
    assert {(m.header.frame_id, m.child_frame_id) for m in got["rear"]} == {("rear/odom", "base_link")}
    assert got["front"][-1].pose.pose.position.x > 0 > got["rear"][-1].pose.pose.position.x


def test_a_second_parent_is_never_given(rig):
    r = rig(base_frame="base_link")
    tf = recorded(r)
    diagnostics = r.listen(DiagnosticArray, "/diagnostics")
    r.send_tf(("base_link", CAMERA, 0, T_BASE_CAMERA), static=True)
    drive(r, now_ns(), 5, lambda stamp_ns: np.eye(4))
    r.send(5)
    r.until(lambda: diagnostics and "already has the parent 'odom'" in tracking_message(diagnostics))
    assert links(tf) == {("odom", "base_link")}
    assert len(tf) == 1, "only the robot's"


def test_a_missing_base_makes_the_camera_the_body(rig):
    r = rig(base_frame="base_link", base_wait=1.5)
    tf = recorded(r)
    odometry = r.listen(Odometry, "/spark3r/odometry")
    sent = r.send(2, wait=False)
    r.until(lambda: r.fake.frames and r.fake.frames[-1].stamp_ns == sent[-1])
    assert not odometry, "the first poses wait for TF"
    r.until(lambda: len(odometry) == 2)
    assert [stamps.to_ns(m.header.stamp) for m in odometry] == sent
    assert odometry[0].child_frame_id == CAMERA
    assert links(tf) <= {("map", "odom"), ("odom", CAMERA)}


def test_a_late_base_is_waited_for(rig):
    r = rig(base_frame="base_link", base_wait=20.0)
    odometry = r.listen(Odometry, "/spark3r/odometry")
    sent = r.send(3, wait=False)
    r.until(lambda: r.fake.frames and r.fake.frames[-1].stamp_ns == sent[-1])
    r.send_tf(("base_link", CAMERA, 0, T_BASE_CAMERA), static=True)
    sent += r.send(1)
    r.until(lambda: len(odometry) == 4)
    assert [stamps.to_ns(m.header.stamp) for m in odometry] == sent
    assert {m.child_frame_id for m in odometry} == {"base_link"}


def test_updates_that_say_nothing_take_no_room_from_poses_that_wait(rig, monkeypatch):
    monkeypatch.setattr(outputs, "_MOST_PENDING", 4)
    r = rig(base_frame="base_link", base_wait=20.0)
    odometry = r.listen(Odometry, "/spark3r/odometry")
    sent = r.send(4, wait=False)
    r.until(lambda: r.fake.frames and r.fake.frames[-1].stamp_ns == sent[-1])
    r.send_tf(("base_link", CAMERA, 0, T_BASE_CAMERA), static=True)
    sent += r.send(1)
    r.until(lambda: len(odometry) == 5)
    assert [stamps.to_ns(m.header.stamp) for m in odometry] == sent


def test_a_camera_with_another_parent_gets_no_second_one(rig):
    r = rig(base_frame="base_link", base_wait=0.1)
    tf = recorded(r)
    diagnostics = r.listen(DiagnosticArray, "/diagnostics")
    r.send_tf(("camera_link", CAMERA, 0, T_BODY_OPTICAL), static=True)
    r.send(1, wait=False)
    r.until(lambda: diagnostics and "'camera_link'" in tracking_message(diagnostics))
    assert not tf


def test_a_pan_tilt_head_moves_the_camera_on_the_base(rig):
    r = rig(base_frame="base_link")
    odometry = r.listen(Odometry, "/spark3r/odometry")
    start = now_ns()

    def head(stamp_ns):
        turn = geometry.so3_exp([0, 0, 1e-9 * (stamp_ns - start)])
        return geometry.make_T(turn, np.array([0.2, 0, 1.0])) @ T_BODY_OPTICAL

    r.send_tf(*(("base_link", CAMERA, start + i * 10 * MS, head(start + i * 10 * MS)) for i in range(30)))
    sent = r.send(5, start_ns=start + 5 * MS)
    r.until(lambda: len(odometry) == 5)
    T_start = head(sent[0])
    expected = T_start @ truth(sent[0], sent[-1]) @ geometry.inverse(head(sent[-1]))
    np.testing.assert_allclose(conversions.matrix_from_pose(odometry[-1].pose.pose), expected, atol=1e-6)


def test_a_transform_of_before_a_jump_back_does_not_hide_those_after_it(rig):
    r = rig()
    start = now_ns()
    r.send_tf(("odom", "base_link", start, np.eye(4)))
    r.node._transforms.clear()
    r.send_tf(("odom", "base_link", start + 20 * MS, np.eye(4)))  # was on its way
    for seconds in (5, 60):
        T = geometry.make_T(np.eye(3), np.array([seconds, 0.0, 0.0]))
        r.send_tf(("odom", "base_link", start - seconds * stamps.NS_PER_S, T))
        np.testing.assert_allclose(r.node._transforms.lookup("odom", "base_link", None), T)


# ---- the buffer -----------------------------------------------------------------------------------------------------


def random_T(rng):
    return geometry.make_T(geometry.so3_exp(rng.normal(size=3)), rng.normal(size=3))


def buffers():
    return [OwnBuffer, pytest.param(Tf2Buffer, marks=pytest.mark.skipif(optional.tf2_ros is None, reason="no tf2_ros"))]


@pytest.mark.parametrize("make", buffers())
def test_lookup_through_a_common_ancestor(make):
    rng = np.random.default_rng(0)
    a, b, c = (random_T(rng) for _ in range(3))
    buffer = make()
    buffer.insert(conversions.transform_message("root", "a", 100, a), static=True)
    buffer.insert(conversions.transform_message("a", "b", 100, b), static=True)
    buffer.insert(conversions.transform_message("root", "c", 100, c), static=True)
    np.testing.assert_allclose(buffer.lookup("c", "b", 5), geometry.inverse(c) @ a @ b, atol=1e-12)
    np.testing.assert_allclose(buffer.lookup("b", "c", None), geometry.inverse(a @ b) @ c, atol=1e-12)


@pytest.mark.parametrize("make", buffers())
def test_interpolation_and_no_extrapolation(make):
    rng = np.random.default_rng(1)
    T0, T1 = random_T(rng), random_T(rng)
    second = stamps.NS_PER_S
    buffer = make()
    buffer.insert(conversions.transform_message("odom", "base", 10 * second, T0), static=False)
    buffer.insert(conversions.transform_message("odom", "base", 11 * second, T1), static=False)
    middle = buffer.lookup("odom", "base", 10 * second + second // 4)
    np.testing.assert_allclose(middle, geometry.interpolate_pose(T0, T1, 0.25), atol=1e-9)
    np.testing.assert_allclose(buffer.lookup("odom", "base", None), T1, atol=1e-12)
    for outside in (9 * second, 12 * second):
        with pytest.raises(TransformError):
            buffer.lookup("odom", "base", outside)
    with pytest.raises(TransformError):
        buffer.lookup("odom", "nowhere", None)
    buffer.clear()
    with pytest.raises(TransformError):
        buffer.lookup("odom", "base", None)


@pytest.mark.parametrize("make", buffers())
def test_what_is_no_rigid_transform_is_refused(make):
    buffer = make()
    for field, value in (("rotation.w", 0.0), ("rotation.x", np.nan), ("translation.y", np.inf)):
        message = conversions.transform_message("odom", "base", 5, np.eye(4))
        part, axis = field.split(".")
        setattr(getattr(message.transform, part), axis, value)
        with pytest.raises(ValueError, match="rigid"):
            buffer.insert(message, static=False)


def test_the_buffer_forgets_after_ten_seconds_and_takes_late_transforms():
    buffer, second = OwnBuffer(), stamps.NS_PER_S
    for i in range(3000):
        buffer.insert(conversions.transform_message("odom", "base", i * second // 100, np.eye(4)), static=False)
    assert len(buffer._links["base"].stamps) <= 2001
    with pytest.raises(TransformError):
        buffer.lookup("odom", "base", second)
    late = geometry.make_T(np.eye(3), np.array([1.0, 0, 0]))
    buffer.insert(conversions.transform_message("odom", "base", 25 * second + 5, late), static=False)
    np.testing.assert_allclose(buffer.lookup("odom", "base", 25 * second + 5), late)


def test_a_loop_of_transforms_is_an_error():
    buffer = OwnBuffer()
    buffer.insert(conversions.transform_message("a", "b", 0, np.eye(4)), static=True)
    buffer.insert(conversions.transform_message("b", "a", 0, np.eye(4)), static=True)
    with pytest.raises(TransformError, match="loop"):
        buffer.lookup("a", "c", None)


def test_a_broken_transform_is_refused_and_counted(rig):
    r = rig()
    publisher = r.publisher(TFMessage, "/tf")
    message = conversions.transform_message("odom", "base", 1, np.eye(4))
    message.transform.rotation.w = 0.0
    publisher.publish(TFMessage(transforms=[message]))
    r.until(lambda: r.stats.refused["transform"] == 1)
