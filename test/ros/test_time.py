"""Simulated time, jumps, bag loops, silence, diagnostics."""

import time

import numpy as np
import pytest
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from fake import WINDOW
from nav_msgs.msg import Odometry
from rig import CAMERA, MS, now_ns, statuses
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage, Image
from tf2_msgs.msg import TFMessage

from spark3r_ros.ros import stamps

SECOND = stamps.NS_PER_S


class Warnings(list):
    """What the process logged as warnings, from its standard error."""

    def __init__(self, capfd):
        super().__init__()
        self._capfd = capfd

    def read(self):
        self.extend(line for line in self._capfd.readouterr().err.splitlines() if line.startswith("[WARN]"))
        return self


def tick(r, publisher, stamp_ns):
    publisher.publish(Clock(clock=stamps.to_msg(stamp_ns)))
    r.until(lambda: r.node.get_clock().now().nanoseconds == stamp_ns)


def test_simulated_time_dates_transforms_and_diagnostics(rig):
    r = rig(use_sim_time=True)
    clock = r.publisher(Clock, "/clock")
    tf = r.listen(TFMessage, "/tf")
    diagnostics = r.listen(DiagnosticArray, "/diagnostics")
    start = 1000 * SECOND
    tick(r, clock, start)
    r.send(1, start_ns=start)
    before = len(tf)
    for i in range(1, 11):
        tick(r, clock, start + i * 50 * MS)
    r.until(lambda: len(tf) >= before + 8)  # 20 Hz of simulated time
    newest = stamps.to_ns(tf[-1].transforms[0].header.stamp)
    assert start + 400 * MS < newest <= start + 700 * MS
    r.until(lambda: diagnostics and diagnostics[-1].header.stamp.sec == 1000)


def test_a_stopped_clock_does_not_silence_diagnostics(rig):
    r = rig(use_sim_time=True, no_data_timeout=0.5)
    diagnostics = r.listen(DiagnosticArray, "/diagnostics")
    r.until(lambda: diagnostics and "nobody publishes" in statuses(diagnostics[-1])["spark3r: input"]["message"])


def test_a_bag_loop_resets_once_whichever_comes_first(rig):
    for clock_first in (True, False):
        r = rig(use_sim_time=True, remap=[f"__node:=spark3r_{int(clock_first)}"])
        clock = r.publisher(Clock, "/clock")
        start = 1000 * SECOND
        for i in range(20):
            tick(r, clock, start + i * 500 * MS)
            r.send(1, start_ns=start + i * 500 * MS)
        before = r.stats.poses
        if clock_first:
            tick(r, clock, start)
        r.send(1, start_ns=start)
        tick(r, clock, start + MS)
        r.send(WINDOW, start_ns=start + 500 * MS)
        assert (r.stats.restarts, r.fake.resets) == (1, 1)
        assert r.stats.poses == before + 1 + WINDOW
        assert r.node._images.newest_ns < start + 2 * SECOND
        r.close()


def test_stamps_that_jump_back_reset_and_forward_do_not(rig, capfd):
    r = rig()
    warnings = Warnings(capfd)
    odometry = r.listen(Odometry, "/spark3r/odometry")
    start = now_ns()
    r.send(3, start_ns=start)
    r.send(3, start_ns=start + 60 * SECOND)
    assert r.stats.restarts == 0
    r.send(3, start_ns=start - 3600 * SECOND)
    assert (r.stats.restarts, r.fake.resets) == (1, 1)
    r.until(lambda: len(odometry) == 9)
    r.until(warnings.read)
    r.spin(0.2)
    assert len(warnings.read()) == 1, warnings
    assert "image stamps jumped back by 3660.066 s: reconstruction, context and transforms are reset" in warnings[0]
    assert odometry[6].pose.pose.position.x == 0
    assert odometry[3].twist.covariance[0] == 1e6, "no velocity across a gap"


def test_the_image_that_shows_a_jump_is_used_after_the_reset(rig):
    r = rig()
    tf = r.listen(TFMessage, "/tf")
    r.send(2)
    r.fake.gate.clear()
    r.send(1, wait=False)
    r.until(lambda: r.stats.images == 3)  # in work
    r.send(1, start_ns=now_ns() - 3600 * SECOND, wait=False)
    r.until(lambda: r.stats.restarts == 1)
    r.spin(0.2)
    dates = [stamps.to_ns(t.header.stamp) for m in tf for t in m.transforms if t.child_frame_id == "odom"]
    assert min(dates) > now_ns() - 1800 * SECOND, "the old map -> odom is not sent at the new time"
    r.fake.gate.set()
    r.until(r.is_idle)
    assert (r.stats.poses, r.fake.resets) == (4, 1)
    assert not r.stats.dropped.total()


def test_a_jump_back_forgets_moving_transforms_but_not_the_mount(rig):
    r = rig(base_frame="base_link")
    mount = np.eye(4)
    mount[0, 3] = 0.4
    start = now_ns()
    r.send_tf(("base_link", CAMERA, 0, mount), static=True)
    r.send_tf(("odom2", "wheel", start, np.eye(4)))
    r.send(2, start_ns=start)
    r.send(1, start_ns=start - 100 * SECOND)
    with pytest.raises(LookupError):
        r.node._transforms.lookup("odom2", "wheel", None)
    assert r.node._transforms.lookup("base_link", CAMERA, None)[0, 3] == pytest.approx(0.4)


# ---- silence and diagnostics ----------------------------------------------------------------------------------------


def input_message(diagnostics):
    return statuses(diagnostics[-1])["spark3r: input"]["message"] if diagnostics else ""


def test_after_five_seconds_it_warns_of_silence(rig, capfd):
    r = rig()
    warnings = Warnings(capfd)
    r.until(warnings.read)
    assert time.monotonic() - r.node._active_since >= 5, warnings
    assert "no images on /image (reliable) for 5 s: nobody publishes there; is the camera running" in warnings[0]


def test_silence_names_topic_qos_and_cause(rig):
    r = rig(no_data_timeout=0.2, remap=["image:=/front/image_raw"])
    diagnostics = r.listen(DiagnosticArray, "/diagnostics")
    start = "no images on /front/image_raw (reliable) for 0.2 s"
    r.until(lambda: f"{start}: nobody publishes there" in input_message(diagnostics))
    other = r.peer.create_publisher(Image, "/rear/image_raw", 10)
    where = " sensor_msgs/msg/Image is published on /rear/image_raw"
    r.until(lambda: input_message(diagnostics).endswith(where))  # and not the node's own depth
    r.peer.destroy_publisher(other)
    elsewhere = rclpy.Context()
    rclpy.init(context=elsewhere)
    stranger = rclpy.create_node("stranger", context=elsewhere)
    stranger.create_publisher(CompressedImage, "/front/image_raw", 10)
    r.until(lambda: "carries sensor_msgs/msg/CompressedImage" in input_message(diagnostics))
    stranger.destroy_node()
    rclpy.shutdown(context=elsewhere)
    r.camera(topic="/front/image_raw")
    r.until(lambda: "1 publisher(s) with matching QoS (reliable)" in input_message(diagnostics))
    values = statuses(diagnostics[-1])["spark3r: input"]
    assert (values["level"], values["topic"], values["publishers"]) == (b"\x01", "/front/image_raw", "1")
    r.send(1)
    r.node.node_config = r.node.node_config.__class__(base_frame="", no_data_timeout=60.0)
    r.until(lambda: "images/s" in input_message(diagnostics))


def test_diagnostics_say_everything_that_the_contract_names(rig):
    r = rig()
    diagnostics = r.listen(DiagnosticArray, "/diagnostics")
    for _ in range(3 * WINDOW):
        r.send(1)
    count = len(diagnostics)
    r.until(lambda: len(diagnostics) >= count + 2)
    got = statuses(diagnostics[-1])
    values = {**got["spark3r: input"], **got["spark3r: tracking"]}
    assert float(values["input_rate_hz"]) > 0
    assert float(values["output_rate_hz"]) > 0
    assert 0 < float(values["latency_p50_ms"]) <= float(values["latency_p95_ms"])
    assert values["dropped"] == "0"
    assert all(f"dropped_{reason}" in values for reason in ("queue_full", "bad_image", "paused", "restart"))
    assert (values["context_bytes"], values["context_budget_bytes"]) == (str(1 << 20), str(1 << 28))
    assert (values["window_residual"], values["scale_sigma"], values["scale_source"]) == ("0.02", "0.01", "depth")
    assert (values["scale_is_metric"], values["scale_metres_per_unit"]) == ("True", "1")
    assert values["state"] == "tracking"
    assert values["frames"] == str(3 * WINDOW)
    assert got["spark3r: tracking"]["level"] == b"\x00"


def test_diagnostics_come_once_a_second(rig):
    r = rig()
    diagnostics = r.listen(DiagnosticArray, "/diagnostics")
    r.until(lambda: len(diagnostics) >= 5)
    dates = [stamps.to_ns(m.header.stamp) for m in diagnostics]
    assert 0.9 < 1e-9 * np.median(np.diff(dates)) < 1.1


def test_an_unknown_scale_and_foreign_stamps_are_warned_of(rig):
    r = rig()
    r.fake.is_metric = False
    diagnostics = r.listen(DiagnosticArray, "/diagnostics")
    r.send(2, start_ns=1_341_847_980 * SECOND)
    r.until(lambda: "use_sim_time" in input_message(diagnostics))
    r.until(lambda: "model units" in statuses(diagnostics[-1])["spark3r: tracking"]["message"])
