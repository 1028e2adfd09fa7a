#!/usr/bin/env python3
"""The main job from end to end: a rendered camera stream through real DDS into the real node, measured.

usage: make demo           (or: .venv/bin/python -m scripts.demo [RECORDING | --hall IMAGES] [--offline] [--out DIR])

Without arguments it renders a camera moving through a textured room (once, kept in out/demo), with exact poses; with
--hall a longer way round a larger hall. A recording of your own is a bag, or anything else that `spark3r map` takes,
which is made a bag first. The node is a process of its own; this process plays the bag, listens to what the node
publishes, and compares. ``--offline`` sends the same recording through `spark3r map` afterwards.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from scripts import ros_domain
from spark3r_ros import bags, export, geometry, sources
from spark3r_ros.config import Config, parameters
from spark3r_ros.frame import CameraModel, Frame, PointBatch

ROOT = Path(__file__).resolve().parent.parent
PROFILE = ROOT / "config" / "fastdds_shm.xml"
NODE, IMAGES = "/spark3r", "/camera/image_raw"
NUM_FRAMES, RATE_HZ, WIDTH, HEIGHT = 240, 10, 640, 480
HALL_ROUND = 2000  # images
FIRST_STAMP_NS = 1_700_000_000_123_456_789
SILENCE_S = 90.0  # without any news: the node is stuck


class DemoError(RuntimeError):
    """Why the demo cannot go on; one line."""


# ---- the recording ---------------------------------------------------------------------------------------------------


def rendered(num_frames: int = NUM_FRAMES, hall: bool = False) -> Iterator[tuple[Frame, np.ndarray]]:
    """Frames of a camera on its way around a room or through a hall, with their exact T_world_camera."""
    from training.paths import camera_path
    from training.scenes import Scene, camera_matrix

    if hall:
        whole = max(num_frames, HALL_ROUND)
        poses = camera_path("circuit", whole, 5, whole / HALL_ROUND)[:num_frames]
        scene, K = Scene(5, "hall"), camera_matrix(WIDTH, HEIGHT, 70)
    else:
        poses = camera_path("orbit", num_frames, seed=7)
        scene, K = Scene(7, "room"), camera_matrix(WIDTH, HEIGHT, 75)
    camera = CameraModel(WIDTH, HEIGHT, K)
    for i, T_world_camera in enumerate(poses):
        image, _ = scene.render(T_world_camera, K, WIDTH, HEIGHT)
        yield Frame(FIRST_STAMP_NS + i * sources.NS_PER_S // RATE_HZ, image, "camera", camera), T_world_camera


def sample(folder: Path, hall: int = 0) -> tuple[Path, Path]:
    """The rendered bag and its true trajectory, made when missing: of a room, or so many images of a hall."""
    name, count = (f"hall_{hall}", hall) if hall else ("room", NUM_FRAMES)
    bag, truth = folder / name, folder / f"{name}_truth.tum"
    if bag.exists() and truth.exists():
        return bag, truth
    poses = []

    def frames() -> Iterator[Frame]:
        shown = tqdm(rendered(count, bool(hall)), total=count, unit="frame", desc="rendering the sample")
        for frame, T_world_camera in shown:
            poses.append((frame.stamp_ns, T_world_camera))
            yield frame

    write_whole_bag(frames(), bag)
    export.write_tum(truth, poses)
    return bag, truth


def write_whole_bag(frames: Iterable[Frame], bag: Path) -> None:
    """Replace ``bag`` by one of these frames; what an interrupted run leaves is never taken for a bag."""
    with tempfile.TemporaryDirectory(dir=bag.parent) as unfinished:
        bags.write_bag(frames, Path(unfinished) / bag.name)
        shutil.rmtree(bag, ignore_errors=True)
        (Path(unfinished) / bag.name).rename(bag)


def as_bag(recording: Path, folder: Path) -> Path:
    """The recording itself when it is a bag, else a bag of its frames, made in ``folder``."""
    source = sources.open_source(recording)
    if isinstance(source, sources.BagSource):
        return recording
    bag = folder / f"{recording.resolve().stem}_bag"
    write_whole_bag(tqdm(source, unit="frame", desc="making a bag"), bag)
    return bag


def known_truth(recording: Path) -> Path | None:
    """The true poses that lie in a recording's folder, if any."""
    truth = recording / "poses.txt"
    return truth if truth.is_file() else None


# ---- the node and its listener ---------------------------------------------------------------------------------------


@dataclass
class Received:
    """What the node said."""

    odometry: list[tuple[int, np.ndarray]] = field(default_factory=list)
    arrived: list[float] = field(default_factory=list)  # when, monotonic seconds
    sent: list[float] = field(default_factory=list)  # when each image was published, in their order
    path: list[tuple[int, np.ndarray]] = field(default_factory=list)
    map: PointBatch | None = None
    points: int = 0
    clouds: int = 0
    problems: list[str] = field(default_factory=list)
    unused: dict[str, int] = field(default_factory=dict)  # images that brought no pose, by the node's own counters
    looked_at: int = 0  # images that the node has taken and does not keep waiting
    last_pose: float = field(default_factory=time.monotonic)


class Listener:
    """Subscribes to the node's topics in a thread of its own."""

    def __init__(self, node: Any) -> None:
        from diagnostic_msgs.msg import DiagnosticArray
        from nav_msgs.msg import Odometry
        from nav_msgs.msg import Path as PathMessage
        from rclpy.executors import SingleThreadedExecutor
        from rclpy.qos import DurabilityPolicy, QoSProfile
        from sensor_msgs.msg import PointCloud2

        self.got = Received()
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        node.create_subscription(Odometry, f"{NODE}/odometry", self._on_odometry, QoSProfile(depth=1000))
        node.create_subscription(PathMessage, f"{NODE}/path", self._on_path, latched)
        node.create_subscription(PointCloud2, f"{NODE}/points", self._on_points, QoSProfile(depth=10))
        node.create_subscription(PointCloud2, f"{NODE}/map", self._on_map, latched)
        node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(node)
        self._thread = threading.Thread(target=self._executor.spin, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._executor.shutdown()
        self._thread.join()

    def _on_odometry(self, msg: Any) -> None:
        from spark3r_ros.ros import conversions, stamps

        self.got.odometry.append((stamps.to_ns(msg.header.stamp), conversions.matrix_from_pose(msg.pose.pose)))
        self.got.last_pose = time.monotonic()
        self.got.arrived.append(self.got.last_pose)

    def _on_path(self, msg: Any) -> None:
        from spark3r_ros.ros import conversions, stamps

        self.got.path = [(stamps.to_ns(p.header.stamp), conversions.matrix_from_pose(p.pose)) for p in msg.poses]

    def _on_points(self, msg: Any) -> None:
        self.got.points += msg.width * msg.height
        self.got.clouds += 1

    def _on_map(self, msg: Any) -> None:
        from spark3r_ros.ros.conversions import POINT

        cloud = np.frombuffer(msg.data, POINT)
        xyz = np.stack([cloud["x"], cloud["y"], cloud["z"]], axis=1)
        rgb = (cloud["rgb"][:, None] >> np.array([16, 8, 0], np.uint32)).astype(np.uint8)
        self.got.map = PointBatch(0, xyz, rgb, cloud["confidence"])

    def _on_diagnostics(self, msg: Any) -> None:
        self.got.problems = [status.message for status in msg.status if status.level not in (b"\x00", b"\x01")]
        counters = {pair.key: pair.value for status in msg.status for pair in status.values}
        names = (name for name in counters if name.startswith("dropped_") or name == "lost_by_middleware")
        self.got.unused = {name: int(counters[name]) for name in names if counters[name] != "0"}
        self.got.looked_at = int(counters["images"]) - int(counters["waiting"])


@contextlib.contextmanager
def running_node(log: Path, settings: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """The node as a process; it is ended whatever happens."""
    arguments = ["--params-file", str(ROOT / "config" / "replay.yaml")]
    arguments += [word for setting in ("map_period:=0.5", *settings) for word in ("-p", setting)]
    remaps = ["-r", f"image:={IMAGES}", "-r", "camera_info:=/camera/camera_info"]
    command = [sys.executable, "-m", "spark3r_ros.ros.node", "--ros-args", *arguments, *remaps]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def deactivate(node: Any) -> None:
    """Ask the node to finish: it solves and publishes what is pending."""
    from lifecycle_msgs.msg import Transition
    from lifecycle_msgs.srv import ChangeState

    client = node.create_client(ChangeState, f"{NODE}/change_state")
    if not client.wait_for_service(10.0):
        raise DemoError("the node's change_state service is not there")
    request = ChangeState.Request(transition=Transition(id=Transition.TRANSITION_DEACTIVATE))
    future = client.call_async(request)
    wait(future.done, 300.0, "the node did not finish its last window")


def wait(condition: Any, seconds: float, problem: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise DemoError(problem)
        time.sleep(0.05)


class Progress:
    """A bar over the poses that came back, redrawn twice a second at most."""

    def __init__(self, total: int, got: Received) -> None:
        self._bar = tqdm(total=total, unit="pose", desc="the node loads its model")
        self._got = got
        self._drawn = 0.0

    def show(self, doing: str, sent: int) -> None:
        if time.monotonic() - self._drawn > 0.5:
            self._drawn = time.monotonic()
            self._bar.n = len(self._got.odometry)
            self._bar.set_description(doing, refresh=False)
            self._bar.set_postfix(sent=sent, points=self._got.points)

    def close(self) -> None:
        self._bar.n = len(self._got.odometry)
        self._bar.close()


def stream(bag: Path, rate: float, log: Path, settings: list[str]) -> tuple[int, Received, float]:
    """Play the bag into the node; returns images sent, what came back, and the seconds that it took."""
    import rclpy

    rclpy.init()
    node = rclpy.create_node("demo")
    listener = Listener(node)
    progress = Progress(len(sources.open_source(bag)), listener.got)
    try:
        with running_node(log, settings) as process:
            sent, start = play_into(node, bag, rate, process, progress, log, listener.got)
            until = time.monotonic() + SILENCE_S
            while listener.got.looked_at < sent and time.monotonic() < max(until, listener.got.last_pose + SILENCE_S):
                progress.show("the node catches up", sent)
                check_alive(process, log)
                time.sleep(0.1)
            deactivate(node)
            time.sleep(1.0)  # what the last window caused is on its way
        return sent, listener.got, listener.got.last_pose - start
    finally:
        progress.close()
        listener.close()
        node.destroy_node()
        rclpy.try_shutdown()


def play_into(
    node: Any, bag: Path, rate: float, process: subprocess.Popen[bytes], progress: Progress, log: Path, got: Received
) -> tuple[int, float]:
    """Play the bag when the node listens; returns the images sent and when the first one was."""
    from spark3r_ros.ros.player import PlayError, play

    def on_message(topic: str) -> None:
        if topic == IMAGES:
            got.sent.append(time.monotonic())
        check_alive(process, log)
        progress.show("playing", len(got.sent))

    try:
        played = play(node, bag, rate=rate, wait_for=[IMAGES], wait_s=120.0, on_message=on_message)
    except PlayError as error:
        raise DemoError(f"{error}: see {log}") from error
    return len(got.sent), time.monotonic() - played.wall_s


def check_alive(process: subprocess.Popen[bytes], log: Path) -> None:
    if process.poll() is not None:
        raise DemoError(f"the node ended with status {process.returncode}: see {log}")


# ---- the comparison --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Accuracy:
    """A trajectory against the truth, after Sim(3) alignment."""

    ate: float  # RMSE in metres
    length: float  # of the true path in metres
    truth: list[tuple[int, np.ndarray]]  # the true poses moved into the trajectory's frame and scale


def compare(trajectory: export.Trajectory, truth: export.Trajectory) -> Accuracy:
    """Absolute trajectory error by evo; poses belong together when their stamps differ by less than a millisecond."""
    from evo.core import metrics, sync
    from evo.core.trajectory import PoseTrajectory3D

    def to_evo(poses: export.Trajectory) -> PoseTrajectory3D:
        seconds = np.array([1e-9 * (stamp_ns - truth[0][0]) for stamp_ns, _ in poses])
        return PoseTrajectory3D(poses_se3=[T for _, T in poses], timestamps=seconds)

    reference, estimate = sync.associate_trajectories(to_evo(truth), to_evo(trajectory), max_diff=1e-3)
    R, t, scale = estimate.align(reference, correct_scale=True)
    error = metrics.APE(metrics.PoseRelation.translation_part)
    error.process_data((reference, estimate))
    S_map_truth = geometry.inverse(geometry.similarity(scale, geometry.make_T(R, t)))
    moved = [(stamp_ns, geometry.apply_similarity_to_pose(S_map_truth, T)) for stamp_ns, T in truth]
    return Accuracy(float(error.get_statistic(metrics.StatisticsType.rmse)), float(reference.path_length), moved)


def largest_stamp_difference(image_stamps: list[int], odometry: export.Trajectory) -> int:
    """Nanoseconds between each pose's stamp and the nearest image's."""
    images = np.array(image_stamps)
    return max((int(np.abs(images - stamp_ns).min()) for stamp_ns, _ in odometry), default=0)


def latency_line(image_stamps: list[int], got: Received) -> str:
    """From an image's publish() to its pose's arrival, of every image."""
    sent_at = dict(zip(image_stamps, got.sent))
    ms = [1e3 * (at - sent_at[s]) for (s, _), at in zip(got.odometry, got.arrived, strict=True) if s in sent_at]
    if not ms:
        return "no pose"
    return f"{np.median(ms):.0f} ms median, {np.quantile(ms, 0.95):.0f} ms p95, {max(ms):.0f} ms at most"


def accuracy_line(trajectory: export.Trajectory, truth: export.Trajectory) -> str:
    found = compare(trajectory, truth)
    return f"{found.ate:.4f} m after Sim(3), {100 * found.ate / found.length:.2f}% of {found.length:.2f} m"


def report(out: Path, recording: Path, sent: int, got: Received, seconds: float, truth_file: Path | None) -> None:
    """Write trajectory, map and picture, and say how it went."""
    cloud = got.map or PointBatch(0, np.zeros((0, 3), np.float32), np.zeros((0, 3), np.uint8), np.zeros(0, np.float32))
    stamps = [frame.stamp_ns for frame in sources.open_source(recording)]
    lines = [
        f"frames in            {sent}",
        f"poses out            {len(got.odometry)}",
        *(f"{name:20} {count} images" for name, count in got.unused.items()),
        f"stamp difference     {largest_stamp_difference(stamps, got.odometry)} ns at most",
        f"points published     {got.points} in {got.clouds} clouds; {len(cloud.xyz)} in the map",
        f"rates                {sent / seconds:.1f} frames/s in, {len(got.odometry) / seconds:.1f} poses/s out",
        f"image to pose        {latency_line(stamps, got)}",
        f"path                 {export.path_length(got.odometry):.2f} model units",
    ]
    shown: export.Trajectory = ()
    if truth_file is not None and len(got.odometry) > 2:
        truth = export.read_tum(truth_file)
        shown = compare(got.odometry, truth).truth
        lines.append(f"ATE of the poses     {accuracy_line(got.odometry, truth)}")
        if len(got.path) > 2:
            lines.append(f"ATE of the path      {accuracy_line(got.path, truth)}, {len(got.path)} keyframes")
    trajectory, ply, picture = out / "trajectory.tum", out / "map.ply", out / "report.png"
    export.write_tum(trajectory, got.odometry)
    export.write_ply(ply, cloud)
    title = f"{recording.name}: {len(got.odometry)} poses, {len(cloud.xyz)} points"
    export.plot_map(picture, got.odometry, cloud, up="z", truth=shown, title=title)
    lines += [f"trajectory (TUM)     {trajectory}", f"map (PLY)            {ply}", f"picture              {picture}"]
    lines += [f"the node says        {problem}" for problem in got.problems]
    print("\n".join(lines))


def offline(out: Path, recording: Path, settings: list[str], truth_file: Path | None) -> None:
    """The same recording through `spark3r map`; says how that went."""
    known = {parameter.name for parameter in parameters(Config())}
    pairs = [setting.split(":=", 1) for setting in settings]
    words = [word for name, value in pairs if name in known for word in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "spark3r_ros.cli", "map", str(recording), "--out", str(out), *words]
    status = subprocess.run(command, stdout=subprocess.DEVNULL).returncode  # its errors and progress are seen
    if status:
        raise DemoError(f"spark3r map ended with status {status}")
    found = json.loads((out / "report.json").read_text(encoding="utf-8"))
    lines = [
        f"offline              {found['frames']} frames in, {found['poses']} poses out, {found['points']} points",
        f"  rate               {found['frames_per_second']:.1f} frames/s",
        f"  path               {found['path_length']:.2f} {found['unit']}",
    ]
    trajectory = export.read_tum(out / "trajectory.tum")
    if truth_file is not None and len(trajectory) > 2:
        lines.append(f"  ATE                {accuracy_line(trajectory, export.read_tum(truth_file))}")
    print("\n".join([*lines, f"  files              {out}"]))


def prepare_ros(out: Path) -> IO[str]:
    """A domain of our own on this machine only, shared memory large enough for images, logs beside the results.

    Whatever domain the shell names is left alone: a robot may work there. The file that is returned holds the claim.
    """
    domain, claim = ros_domain.claim()
    os.environ["ROS_DOMAIN_ID"] = str(domain)
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    os.environ.setdefault("FASTDDS_DEFAULT_PROFILES_FILE", str(PROFILE))
    os.environ.setdefault("ROS_LOG_DIR", str(out / "log"))
    return claim


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    what = "rosbag2 with /camera/image_raw, folder of images or video; default: a rendered room"
    parser.add_argument("recording", nargs="?", type=Path, help=what)
    parser.add_argument("--hall", type=int, default=0, metavar="IMAGES", help="a rendered hall instead, of so many")
    parser.add_argument("--truth", type=Path, help="TUM file to compare with; default: poses.txt in the recording")
    parser.add_argument("--offline", action="store_true", help="then the same through `spark3r map`")
    parser.add_argument("--rate", type=float, default=1.0, help="2.0 is twice as fast as recorded")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "demo", help="where the results go")
    parser.add_argument("--set", action="append", default=[], metavar="NAME:=VALUE", help="a parameter of the node")
    options = parser.parse_args()
    if options.hall < 0 or (options.hall and options.recording):
        parser.error(f"--hall takes the number of images to render, and no recording beside it; got {options.hall}")
    with prepare_ros(options.out):
        print(f"ROS_DOMAIN_ID={os.environ['ROS_DOMAIN_ID']}, to look on from another terminal")
        run(options)


def run(options: argparse.Namespace) -> None:
    """From recording to report; ends the process with one line when something is wrong."""
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        if options.recording is None:
            bag, truth = sample(options.out, options.hall)
            recording = bag
        else:
            recording, truth = options.recording, options.truth or known_truth(options.recording)
            bag = as_bag(recording, options.out)
        sent, got, seconds = stream(bag, options.rate, options.out / "node.log", options.set)
        report(options.out, recording, sent, got, seconds, truth)
        if options.offline:
            offline(options.out / "offline", recording, options.set, truth)
    except (DemoError, sources.SourceError) as error:
        sys.exit(f"demo: {error}")
    except OSError as error:
        remedy = f": make room under {options.out}, or choose --out" if error.errno == errno.ENOSPC else ""
        sys.exit(f"demo: {error}{remedy}")
    except KeyboardInterrupt:
        sys.exit("demo: interrupted")
    if len(got.odometry) != sent:
        sys.exit(f"demo: {sent} frames in, but {len(got.odometry)} poses out: see {options.out / 'node.log'}")


if __name__ == "__main__":
    main()
