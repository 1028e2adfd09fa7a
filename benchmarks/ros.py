#!/usr/bin/env python3
"""What the ROS node costs beside the reconstruction, with fakes that answer at once, over real DDS.

usage: .venv/bin/python -m benchmarks.ros [--seconds 20] [--minutes 0] [--nice 0]

* CPU per 640x480 image: the node's process against a bare rclpy subscriber in another process, fed by the same camera,
  over the whole run and as the median of its seconds.
* Latency from the camera's publish() to the odometry's arrival at another process, less the reconstruction's own time;
  and how much of that passes inside the node.
* A cloud of 300,000 points from arrays to the wire: building the message and publish(), with a subscriber.
* ``--minutes``: a soak at 30 Hz; images sent, poses received and the node's own counters, so that a loss has a place;
  memory of the node at its start and end.

Prints a table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from scripts import ros_domain

ROOT = Path(__file__).resolve().parent.parent
WIDTH, HEIGHT, RATE_HZ = 640, 480, 30.0
NUM_POINTS = 300_000
PAGE = os.sysconf("SC_PAGE_SIZE")


def fake_reconstructor() -> type:
    """The one of the tests."""
    spec = importlib.util.spec_from_file_location("fake", ROOT / "test" / "ros" / "fake.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fake"] = module
    spec.loader.exec_module(module)
    return module.FakeReconstructor


# ---- the processes that are measured ---------------------------------------------------------------------------------


def bare_subscriber() -> None:
    """The least that a node in Python can do with images."""
    import rclpy
    from rclpy.qos import QoSProfile
    from sensor_msgs.msg import Image

    rclpy.init()
    node = rclpy.create_node("bare")
    node.create_subscription(Image, "image", lambda msg: None, QoSProfile(depth=10))
    rclpy.spin(node)


def node_under_test() -> None:
    """The real entry point around the fake reconstructor of the tests: a window every eight frames."""
    from spark3r_ros.ros.node import main

    main(["--ros-args", "-p", "base_frame:=''"], make_reconstructor=fake_reconstructor())


def node_alone() -> None:
    """The same without any reconstruction: every image is answered with the same pose at once."""
    from spark3r_ros.frame import FramePose, ScaleEstimate, TrackingState, Update
    from spark3r_ros.ros.node import main

    T, covariance, state = np.eye(4), np.eye(6) * 1e-4, TrackingState.TRACKING
    scale = ScaleEstimate(0.0, 0.01, "depth")
    nothing = Update(T_map_odom=T, state=state, scale=scale)

    class Still(fake_reconstructor()):  # type: ignore[misc]
        def track(self, frame: Any) -> Update:
            pose = FramePose(frame.stamp_ns, frame.frame_id, T, T, covariance, state)
            return Update(poses=(pose,), T_map_odom=T, state=state, scale=scale)

        def update_map(self) -> Update:
            return nothing

    main(["--ros-args", "-p", "base_frame:=''"], make_reconstructor=Still)


def camera(count: int, listeners: int) -> None:
    """Images at RATE_HZ with the time of their publish() in the stamp; ends when all are acknowledged.

    One that is late is not followed by a burst: cameras have none.
    """
    import rclpy
    from rclpy.duration import Duration
    from rclpy.qos import QoSProfile
    from sensor_msgs.msg import Image

    from spark3r_ros.ros import stamps

    rclpy.init()
    node = rclpy.create_node("camera")
    publisher = node.create_publisher(Image, "image", QoSProfile(depth=10))
    msg = Image(width=WIDTH, height=HEIGHT, encoding="rgb8", step=3 * WIDTH)
    msg.header.frame_id = "camera_optical_frame"
    msg.data.frombytes(np.random.default_rng(0).integers(0, 256, 3 * WIDTH * HEIGHT, dtype=np.uint8).tobytes())
    wait(lambda: publisher.get_subscription_count() == listeners, "the camera's listeners did not come up")
    time.sleep(0.5)  # the listeners' own discovery of each other
    due = time.monotonic()
    for _ in range(count):
        time.sleep(max(due - time.monotonic(), 0))
        due = max(due, time.monotonic() - 0.5 / RATE_HZ) + 1 / RATE_HZ
        msg.header.stamp = stamps.to_msg(time.time_ns())
        publisher.publish(msg)
    publisher.wait_for_all_acked(Duration(seconds=10))


ROLES: dict[str, Callable[..., None]] = {
    "bare": bare_subscriber,
    "node": node_under_test,
    "alone": node_alone,
    "camera": camera,
}


class Process:
    """One of the roles in a process of its own."""

    def __init__(self, role: str, *arguments: str) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the process
        command = [sys.executable, "-m", "benchmarks.ros", "--role", role, *arguments]
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=self._log, stderr=subprocess.STDOUT)

    def cpu_s(self) -> float:
        """Of all threads, from the scheduler's own nanoseconds; ticks of 10 ms would be too coarse."""
        tasks = Path(f"/proc/{self._process.pid}/task").iterdir()
        return 1e-9 * sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)

    def memory_mb(self) -> float:
        return int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]) * PAGE / 2**20

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        self._process.kill()  # nothing to save, and it must not outlive the benchmark
        self._process.wait()
        self._log.close()


def wait(condition: Callable[[], Any], problem: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"benchmark: {problem}")
        time.sleep(0.02)


# ---- measurements ----------------------------------------------------------------------------------------------------


class Odometer:
    """Receives odometry in this process."""

    def __init__(self, node: Any) -> None:
        from nav_msgs.msg import Odometry
        from rclpy.executors import SingleThreadedExecutor
        from rclpy.qos import QoSProfile

        self._node = node
        self.latencies_ms: list[float] = []
        self.count = 0
        node.create_subscription(Odometry, "/spark3r/odometry", self._on_odometry, QoSProfile(depth=1000))
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(node)

    def _on_odometry(self, msg: Any) -> None:
        now_ns = time.time_ns()
        self.count += 1
        if len(self.latencies_ms) < 10_000:
            self.latencies_ms.append(1e-6 * (now_ns - msg.header.stamp.sec * 10**9 - msg.header.stamp.nanosec))

    def spin_once(self) -> None:
        self._executor.spin_once(timeout_sec=0.1)

    def spin_while(self, condition: Callable[[], bool], on_second: Callable[[], None] = lambda: None) -> None:
        last = time.monotonic()
        while condition():
            self.spin_once()
            if time.monotonic() - last >= 1.0:
                last = time.monotonic()
                on_second()


def measure_frames(node: Any, seconds: float) -> dict[str, float]:
    """CPU of node and bare subscriber under the same images, and latency."""
    odometer = Odometer(node)
    count = int(seconds * RATE_HZ)
    bare, tested = Process("bare"), Process("alone")
    used: list[tuple[float, float]] = []  # by both since the beginning, every second
    try:
        wait(lambda: node.count_subscribers("/image") == 2, "the two subscribers did not come up")
        before = bare.cpu_s(), tested.cpu_s()
        source = Process("camera", "--count", str(count), "--listeners", "2")
        try:
            odometer.spin_while(
                lambda: source.is_running,
                lambda: used.append((bare.cpu_s(), tested.cpu_s())) if odometer.count else None,
            )
        finally:
            source.close()
        deadline = time.monotonic() + 2
        odometer.spin_while(lambda: odometer.count < count and time.monotonic() < deadline)
        total = 1e3 * (bare.cpu_s() - before[0]) / count, 1e3 * (tested.cpu_s() - before[1]) / count
    finally:
        bare.close()
        tested.close()
    by_second = np.diff(np.array(used), axis=0)  # [seconds, 2]
    return {
        "images": count,
        "poses": odometer.count,
        "bare_cpu_ms": total[0],
        "node_cpu_ms": total[1],
        "cpu_ratio": total[1] / total[0],
        "cpu_ratio_median_second": float(np.median(by_second[:, 1] / by_second[:, 0])),
        "latency_ms_median": float(np.median(odometer.latencies_ms)),
        "latency_ms_p95": float(np.percentile(odometer.latencies_ms, 95)),
    }


def measure_bare_latency(node: Any, seconds: float) -> dict[str, float]:
    """Camera to subscriber without a node between: what of the latency is the camera's and the middleware's."""
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.qos import QoSProfile
    from sensor_msgs.msg import Image

    got: list[float] = []

    def on_image(msg: Any) -> None:
        got.append(1e-6 * (time.time_ns() - msg.header.stamp.sec * 10**9 - msg.header.stamp.nanosec))

    subscription = node.create_subscription(Image, "image", on_image, QoSProfile(depth=10))
    source = Process("camera", "--count", str(int(seconds * RATE_HZ)))
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        while source.is_running:
            executor.spin_once(timeout_sec=0.1)
    finally:
        source.close()
        executor.remove_node(node)
        node.destroy_subscription(subscription)
    return {"middleware_ms_median": float(np.median(got))}


def measure_cloud(node: Any, repeats: int = 30) -> dict[str, float]:
    """From arrays to the wire, with a subscriber."""
    from rclpy.qos import QoSProfile
    from sensor_msgs.msg import PointCloud2

    from spark3r_ros.frame import PointBatch
    from spark3r_ros.ros.conversions import CloudWriter

    rng = np.random.default_rng(0)
    xyz = rng.normal(size=(NUM_POINTS, 3)).astype(np.float32)
    rgb = rng.integers(0, 256, (NUM_POINTS, 3), dtype=np.uint8)
    batch = PointBatch(1, xyz, rgb, rng.random(NUM_POINTS, dtype=np.float32))
    publisher = node.create_publisher(PointCloud2, "points", QoSProfile(depth=1))
    node.create_subscription(PointCloud2, "points", lambda msg: None, QoSProfile(depth=1))
    wait(lambda: publisher.get_subscription_count(), "the cloud's subscriber was not found")
    writer, build, send, cpu = CloudWriter(), [], [], []
    for _ in range(repeats):
        begin, cpu_begin = time.perf_counter(), time.thread_time()
        msg = writer.write("map", batch, np.eye(4))
        built = time.perf_counter()
        publisher.publish(msg)
        send.append(1e3 * (time.perf_counter() - built))
        build.append(1e3 * (built - begin))
        cpu.append(1e3 * (time.thread_time() - cpu_begin))
        time.sleep(0.02)
    total = np.array(build) + np.array(send)
    return {
        "cloud_build_ms": float(np.median(build)),
        "cloud_publish_ms": float(np.median(send)),
        "cloud_ms": float(np.median(total)),
        "cloud_ms_best": float(total.min()),
        "cloud_cpu_ms": float(np.median(cpu)),
    }


def soak(node: Any, minutes: float) -> dict[str, float]:
    """Thirty images a second for a long time."""
    from diagnostic_msgs.msg import DiagnosticArray
    from rclpy.qos import QoSProfile

    odometer = Odometer(node)
    counters: dict[str, str] = {}  # of the node's last diagnostics: where images went that have no pose
    node.create_subscription(
        DiagnosticArray,
        "/diagnostics",
        lambda msg: counters.update((pair.key, pair.value) for pair in msg.status[0].values),
        QoSProfile(depth=10),
    )
    count = int(60 * minutes * RATE_HZ)
    tested = Process("node")
    memory: list[float] = []
    try:
        wait(lambda: node.count_subscribers("/image") == 1, "the node did not come up")
        source = Process("camera", "--count", str(count))
        try:
            wait(lambda: odometer.spin_once() or odometer.count, "the node gives no pose")
            begin = time.monotonic()
            odometer.spin_while(lambda: source.is_running, lambda: memory.append(tested.memory_mb()))
            rate_hz = count / (time.monotonic() - begin)
        finally:
            source.close()
        deadline = time.monotonic() + 5
        odometer.spin_while(lambda: time.monotonic() < deadline)
        cpu_s = tested.cpu_s()
    finally:
        tested.close()
    settled = np.array(memory[min(60, len(memory) // 4) :])  # the first minute fills caches
    hours = np.arange(len(settled)) / 3600
    return {
        "soak_minutes": minutes,
        "soak_images": count,
        "soak_rate_hz": rate_hz,
        "soak_poses": odometer.count,
        "soak_node_images": int(counters["images"]),
        "soak_node_poses": int(counters["poses"]),
        **{f"soak_node_{name}": int(value) for name, value in counters.items() if name.startswith("dropped")},
        "soak_lost_by_middleware": int(counters["lost_by_middleware"]),
        "soak_memory_mb_first": float(settled[:30].mean()),
        "soak_memory_mb_last": float(settled[-30:].mean()),
        "soak_memory_mb_per_hour": float(np.polyfit(hours, settled, 1)[0]),
        "soak_cpu_percent": 100 * cpu_s / (60 * minutes),
    }


def report(result: dict[str, float]) -> None:
    print("| figure | value |\n|---|---|")
    for name, value in result.items():
        print(f"| {name} | {value:.3f} |" if isinstance(value, float) else f"| {name} | {value} |")
    print(json.dumps({"benchmark": "ros", **result}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of the frame measurement")
    parser.add_argument("--minutes", type=float, default=0.0, help="of the soak; 0: none, and only it otherwise")
    parser.add_argument("--nice", type=int, default=0, help="priority of everything, 19 is the lowest")
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--listeners", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        ROLES[options.role](*([options.count, options.listeners] if options.role == "camera" else []))
        return
    os.nice(options.nice)
    domain, claim = ros_domain.claim()
    os.environ["ROS_DOMAIN_ID"] = str(domain)
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    os.environ["FASTDDS_DEFAULT_PROFILES_FILE"] = str(ROOT / "config" / "fastdds_shm.xml")
    os.environ["ROS_LOG_DIR"] = tempfile.mkdtemp(prefix="spark3r_benchmark_")
    import rclpy

    rclpy.init()
    node = rclpy.create_node("benchmark")
    if options.minutes:
        report(soak(node, options.minutes))
    else:
        frames = measure_frames(node, options.seconds)
        middleware = measure_bare_latency(rclpy.create_node("listener"), min(options.seconds, 10.0))
        report(frames | middleware | measure_cloud(node))
    node.destroy_node()
    rclpy.shutdown()
    claim.close()


if __name__ == "__main__":
    main()
