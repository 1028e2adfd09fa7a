"""Across processes, with the entry points that users start: the real node on a real recording, and endings."""

import contextlib
import fcntl
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from nav_msgs.msg import Odometry
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import DurabilityPolicy, QoSProfile
from rig import CAMERA, statuses
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, PointCloud2

from spark3r_ros import bags, geometry, sources
from spark3r_ros.export import read_tum
from spark3r_ros.ros import conversions, player, stamps

ROOT = Path(__file__).resolve().parents[2]
FRAMES = 120


@contextlib.contextmanager
def node_process(tmp_path, *parameters, remap=(), script=None):
    """``spark3r_node`` with parameters as a process; yields it, its log is ``tmp_path / node.log``."""
    words = [w for p in parameters for w in ("-p", p)] + [w for r in remap for w in ("-r", r)]
    command = [sys.executable, *(script or ["-m", "spark3r_ros.ros.node"]), "--ros-args", *words]
    with (tmp_path / "node.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment())
    try:
        yield process
    finally:
        process.terminate()  # not killed: that leaves broken memory to those who share it
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "FASTDDS_DEFAULT_PROFILES_FILE": str(ROOT / "config/fastdds_shm.xml")}


class Listener:
    def __init__(self, *topics):
        self.node = rclpy.create_node("listener")
        self.got = {topic: [] for _, topic, _ in topics}
        for kind, topic, profile in topics:
            self.node.create_subscription(kind, topic, self.got[topic].append, profile)
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self.node)

    def spin(self, seconds=0.0):
        self._executor.spin_once(timeout_sec=seconds)

    def deactivate(self, node, timeout=200):
        client = self.node.create_client(ChangeState, f"{node}/change_state")
        self.until(client.service_is_ready, timeout)
        request = ChangeState.Request()
        request.transition.id = Transition.TRANSITION_DEACTIVATE
        future = client.call_async(request)
        self.until(future.done, timeout)
        assert future.result().success

    def until(self, condition, timeout):
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, "timed out"
            self.spin(0.1)


def make_bag(folder, source):
    """The first frames of a sequence as a rosbag2; what scripts/make_bag.py does for all of them."""
    bag = folder / "bag"
    bags.write_bag(itertools.islice(sources.open_source(source), FRAMES), bag)
    return bag


def rmse_after_similarity(estimate, truth):
    source, target = np.array([T[:3, 3] for T in estimate]), np.array([T[:3, 3] for T in truth])
    moved = geometry.transform(geometry.umeyama(source, target), source)
    return float(np.sqrt(np.mean(np.sum((moved - target) ** 2, axis=1))))


def test_a_real_recording_through_the_real_node(ros, tmp_path, shared):
    sequence = shared("data", "tum_fr3_office")
    bag = make_bag(tmp_path, sequence)
    sent_ns = [frame.stamp_ns for frame in sources.open_source(bag)]
    listener = Listener(
        (Odometry, "/spark3r/odometry", QoSProfile(depth=1000)),
        (PointCloud2, "/spark3r/points", QoSProfile(depth=10)),
        (DiagnosticArray, "/diagnostics", QoSProfile(depth=10)),
    )
    odometry, clouds = listener.got["/spark3r/odometry"], listener.got["/spark3r/points"]

    def all_taken():
        values = statuses(listener.got["/diagnostics"][-1])["spark3r: input"]
        return (values["images"], values["waiting"]) == (str(FRAMES), "0")

    parameters = ("base_frame:=''", "drop_policy:=never", "use_sim_time:=true", "model.device:=cpu")
    remap = ("image:=/camera/image_raw", "camera_info:=/camera/camera_info")
    with node_process(tmp_path, *parameters, remap=remap) as process:
        report = player.play(
            listener.node, bag, rate=2.0, wait_for=["/camera/image_raw"], wait_s=60,
            on_message=lambda topic: listener.spin(),
        )  # fmt: skip
        assert report.sent["/camera/image_raw"] == FRAMES
        listener.until(all_taken, timeout=200)
        listener.deactivate("/spark3r")  # the last window is not full: it is solved now
        listener.until(lambda: len(odometry) >= FRAMES, timeout=60)
        assert process.poll() is None, (tmp_path / "node.log").read_text()
    assert [stamps.to_ns(m.header.stamp) for m in odometry] == sent_ns, "every stamp, bit for bit, in order"
    truth = dict(read_tum(sequence / "poses.txt"))
    nearest = [min(truth, key=lambda t, s=s: abs(t - s)) for s in sent_ns]
    estimate = [conversions.matrix_from_pose(m.pose.pose) for m in odometry]
    assert rmse_after_similarity(estimate, [truth[s] for s in nearest]) < 0.03
    assert clouds
    assert all(m.header.frame_id == "map" for m in clouds)


def fake_node(tmp_path):
    """A script that starts the real node with a fake reconstructor."""
    path = tmp_path / "fake_node.py"
    path.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from fake import FakeReconstructor\nfrom spark3r_ros.ros import node\n"
        "sys.exit(node.main(make_reconstructor=FakeReconstructor))\n"
    )
    return [str(path)]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_cleanly_when_asked_twice(ros, tmp_path, how):
    listener = Listener()
    with node_process(tmp_path, "base_frame:=''", script=fake_node(tmp_path)) as process:
        listener.until(lambda: listener.node.count_subscribers("/image"), timeout=60)
        process.send_signal(how)
        process.send_signal(how)  # launch passes Ctrl-C on, and the terminal sent it already
        assert process.wait(timeout=60) == 0
    log = (tmp_path / "node.log").read_text()
    assert "Traceback" not in log, log


def test_a_wrong_parameter_ends_it_with_one_clear_line(tmp_path):
    with node_process(tmp_path, "windw.size:=4", script=fake_node(tmp_path)) as process:
        assert process.wait(timeout=60) == 1
    log = (tmp_path / "node.log").read_text()
    assert "unknown parameter 'windw.size'; did you mean window.size?" in log
    assert "Traceback" not in log


def test_a_model_that_is_not_there_ends_it_with_the_reason(tmp_path):
    with node_process(tmp_path, "model.checkpoint:=/nowhere/weights.safetensors") as process:
        assert process.wait(timeout=120) == 1
    log = (tmp_path / "node.log").read_text()
    assert "cannot configure" in log
    assert "/nowhere/weights.safetensors" in log
    assert "Traceback" not in log


@pytest.fixture
def swept_memory():
    """Removes shared memory that came during the test and that nobody alive holds: 64 MB of every killed process."""
    before = set(Path("/dev/shm").glob("fastdds_*"))
    yield
    for lock in set(Path("/dev/shm").glob("fastdds_*_el")) - before:
        with contextlib.suppress(FileNotFoundError, BlockingIOError), lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.with_name(lock.name.removesuffix("_el")).unlink(missing_ok=True)
            lock.unlink()


ASKER = """
import os, sys, time, rclpy
sys.path.insert(0, sys.argv[1])
from rig import CAMERA, image
from test_processes import Image, Listener, Odometry, QoSProfile
rclpy.init()
listener = Listener((Odometry, "/spark3r/odometry", QoSProfile(depth=100)))
publisher = listener.node.create_publisher(Image, "image", QoSProfile(depth=10))
got = listener.got["/spark3r/odometry"]
for _ in sys.stdin:
    before = len(got)
    def answered():
        publisher.publish(image(time.time_ns(), CAMERA))
        return len(got) > before
    listener.until(answered, timeout=60)
    print("answered", flush=True)
os._exit(0)
"""


def test_the_node_may_be_killed_and_started_again(swept_memory, domain, tmp_path):
    """Asked by another process, which ends without taking Fast DDS down: that may crash on memory of the killed."""
    command = [sys.executable, "-c", ASKER, str(Path(__file__).parent)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as asker:
        for _ in range(2):
            with node_process(tmp_path, "base_frame:=''", script=fake_node(tmp_path)) as process:
                print(file=asker.stdin, flush=True)
                assert asker.stdout.readline() == "answered\n"
                process.send_signal(signal.SIGKILL)  # nothing is cleaned up; the next one starts at once
                process.wait()


# ---- the player ------------------------------------------------------------------------------------------------------


def test_the_player_names_what_is_missing(ros, tmp_path):
    node = rclpy.create_node("player")
    with pytest.raises(player.PlayError, match=r"metadata\.yaml"):
        player.play(node, tmp_path)
    frames = [_frame(1_000_000_000 + i * 10_000_000) for i in range(5)]
    bags.write_bag(iter(frames), tmp_path / "bag")
    with pytest.raises(player.PlayError, match="no topic /other"):
        player.play(node, tmp_path / "bag", topics=["/other"])
    with pytest.raises(player.PlayError, match="nobody subscribes to /camera/image_raw"):
        player.play(node, tmp_path / "bag", wait_for=["/camera/image_raw"], wait_s=0.1)


def test_the_player_keeps_time_tells_it_and_loops(ros, tmp_path):
    stamps_ns = [1_000_000_000 + i * 20_000_000 for i in range(11)]
    bags.write_bag(iter([_frame(s) for s in stamps_ns]), tmp_path / "bag")
    listener = Listener(
        (Image, "/cam", QoSProfile(depth=100)), (Clock, "/clock", QoSProfile(depth=1000)),
    )  # fmt: skip
    report = player.play(
        listener.node, tmp_path / "bag", rate=2.0, loops=2, topics=["/camera/image_raw"],
        remap={"/camera/image_raw": "/cam"}, wait_for=["/cam"], on_message=lambda topic: listener.spin(),
    )  # fmt: skip
    listener.until(lambda: len(listener.got["/cam"]) == 22, timeout=60)
    assert [stamps.to_ns(m.header.stamp) for m in listener.got["/cam"]] == 2 * stamps_ns
    assert report.sent == {"/cam": 22}
    assert report.wall_s > 0.19, "twice 0.2 s at twice the speed"
    ticks = [stamps.to_ns(m.clock) for m in listener.got["/clock"]]
    assert sum(b < a for a, b in itertools.pairwise(ticks)) == 1, "one jump back"
    assert "22 messages" in str(report)


def test_latched_topics_are_played_latched():
    from types import SimpleNamespace as Some

    recorded = Some(durability=Some(name="TRANSIENT_LOCAL"), reliability=Some(name="RELIABLE"))
    profile = player._profile(Some(ext=Some(offered_qos_profiles=[recorded])), reliable=True)
    assert profile.durability == DurabilityPolicy.TRANSIENT_LOCAL


def _frame(stamp_ns):
    from spark3r_ros.frame import Frame

    return Frame(stamp_ns, np.zeros((48, 64, 3), np.uint8), CAMERA)
