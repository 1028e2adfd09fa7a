"""Launch files and the files they bring along."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import yaml
from diagnostic_msgs.msg import DiagnosticArray
from nav_msgs.msg import Odometry
from rcl_interfaces.srv import GetParameters
from rclpy.parameter import parameter_value_to_python
from rclpy.qos import QoSProfile
from rig import image, statuses
from sensor_msgs.msg import Image
from test_processes import Listener

from spark3r_ros import bags
from spark3r_ros.frame import Frame
from spark3r_ros.ros import interface, parameters, stamps
from spark3r_ros.ros.outputs import place_file

ROOT = Path(__file__).resolve().parents[2]
LAUNCH_FILES = sorted((ROOT / "launch").glob("*.launch.py"))
CONFIGS = sorted((ROOT / "config").glob("*.yaml"))
PROFILE_VARIABLES = ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE")


def described(path):
    """The launch description of a file; skips the test where launch is missing."""
    pytest.importorskip("launch.actions", reason="launch is not installed here")
    pytest.importorskip("launch_ros.actions", reason="launch_ros is not installed here")
    spec = importlib.util.spec_from_file_location(path.name.split(".")[0], path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.generate_launch_description()


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda p: p.name)
def test_every_argument_is_described(path):
    description = described(path)
    from launch.actions import DeclareLaunchArgument

    arguments = [e for e in description.entities if isinstance(e, DeclareLaunchArgument)]
    assert arguments
    assert all(a.description and a.description != "no description given" for a in arguments)


def run(path, monkeypatch, **arguments):
    """What a launch file would start, as (executable or command, parameters, remappings), without starting it."""
    described(path)
    from launch.actions import ExecuteProcess, IncludeLaunchDescription
    from launch.launch_description_sources import PythonLaunchDescriptionSource
    from launch_ros.actions import Node
    from launch_ros.substitutions import FindPackageShare

    from launch import LaunchContext

    monkeypatch.setattr(FindPackageShare, "perform", lambda self, context: str(ROOT))
    for name in PROFILE_VARIABLES:  # launch sets them in this process; they are put back after the test
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    context = LaunchContext()
    context.launch_configurations.update(arguments)
    started = []

    def visit(entity):
        condition = getattr(entity, "condition", None)
        if condition is not None and not condition.evaluate(context):
            return
        if isinstance(entity, Node):
            entity._perform_substitutions(context)
            started.append(entity)
            return
        if isinstance(entity, ExecuteProcess):
            started.append(entity)
            return
        if isinstance(entity, IncludeLaunchDescription):
            assert isinstance(entity.launch_description_source, PythonLaunchDescriptionSource)
        for child in entity.visit(context) or []:
            visit(child)

    for entity in described(path).entities:
        visit(entity)
    return started, context


def settings(node):
    """Parameters that a launched node gets on top of its YAML, by name."""
    merged = {}
    for path, is_file in node._Node__expanded_parameter_arguments or []:
        if is_file:
            content = yaml.safe_load(Path(path).read_text())
            for group in content.values():
                merged.update(group["ros__parameters"])
    return merged


def test_live(monkeypatch):
    started, _ = run(
        ROOT / "launch" / "live.launch.py", monkeypatch, model="nano", tf_mode="off", image_topic="/cam/image"
    )
    (node,) = started
    assert node.node_package == "spark3r_ros"
    got = settings(node)
    assert (got["model.name"], got["tf_mode"], got["use_sim_time"]) == ("nano", "off", False)
    assert got["drop_policy"] == "newest"
    assert "base_frame" not in got, "an argument that was not given changes nothing"
    assert ("image", "/cam/image") in node.expanded_remapping_rules
    parameters.build_configs({k: v for k, v in got.items() if k != "use_sim_time"})


@pytest.mark.parametrize(("distribution", "wanted"), [("humble", 0), ("jazzy", 0), ("kilted", 1)])
def test_the_dds_profile_is_set_by_the_name_that_the_distribution_reads(monkeypatch, distribution, wanted):
    monkeypatch.setenv("ROS_DISTRO", distribution)
    _, context = run(ROOT / "launch" / "live.launch.py", monkeypatch)
    assert context.environment[PROFILE_VARIABLES[wanted]].endswith("config/fastdds_shm.xml")
    assert PROFILE_VARIABLES[1 - wanted] not in context.environment


@pytest.mark.parametrize("rviz", ["true", "false"])
def test_rviz(monkeypatch, rviz):
    started, _ = run(ROOT / "launch" / "live.launch.py", monkeypatch, rviz=rviz)
    assert [n.node_package for n in started] == ["spark3r_ros", "rviz2"][: 2 if rviz == "true" else 1]


def test_replay(monkeypatch):
    (node, player), _ = run(ROOT / "launch" / "replay.launch.py", monkeypatch, bag="/bags/one", rate="0.5", loop="true")
    got = settings(node)
    assert (got["use_sim_time"], got["drop_policy"]) == (True, "never")
    words = [word for part in player.cmd for word in [part[0].text]]
    assert words[1:5] == ["-m", "spark3r_ros.ros.player", "/bags/one", "--rate"]
    assert "--wait-for" in words


def test_replay_offline(monkeypatch):
    (process,), _ = run(ROOT / "launch" / "replay.launch.py", monkeypatch, bag="/bags/one", offline="true", out="/out")
    words = [part[0].text for part in process.cmd]
    assert words[1:] == ["-m", "spark3r_ros.cli", "map", "/bags/one", "--out", "/out", "--topic", "/camera/image_raw"]


def test_localization(monkeypatch):
    (node,), _ = run(ROOT / "launch" / "localization.launch.py", monkeypatch, map_file="/maps/office.map")
    got = settings(node)
    assert (got["map_file"], got["load_map_on_start"]) == ("/maps/office.map", True)


def test_multi_camera(monkeypatch):
    started, _ = run(ROOT / "launch" / "multi_camera.launch.py", monkeypatch, cameras="front, rear")
    assert [n.expanded_node_namespace for n in started] == ["/front", "/rear"]
    assert [settings(n)["tf_mode"] for n in started] == ["odom_to_base", "off"]
    for node in started:
        parameters.build_configs({k: v for k, v in settings(node).items() if k != "use_sim_time"})


# ---- really launched -------------------------------------------------------------------------------------------------

LAUNCH = """
import sys
from launch import LaunchDescription, LaunchService
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
service = LaunchService(noninteractive=True)
arguments = [word.split(":=") for word in sys.argv[2:]]
service.include_launch_description(LaunchDescription([
    IncludeLaunchDescription(PythonLaunchDescriptionSource(sys.argv[1]), launch_arguments=arguments)]))
sys.exit(service.run())
"""


@contextlib.contextmanager
def launched(tmp_path, name, *arguments):
    """``ros2 launch spark3r_ros NAME`` from an installation of its own, whose node has a fake reconstructor."""
    pytest.importorskip("launch.actions", reason="launch is not installed here")
    pytest.importorskip("launch_ros.actions", reason="launch_ros is not installed here")
    prefix = tmp_path / "prefix"
    share, executable = prefix / "share" / "spark3r_ros", prefix / "lib" / "spark3r_ros" / "spark3r_node"
    for folder in (share, executable.parent, prefix / "share/ament_index/resource_index/packages"):
        folder.mkdir(parents=True)
    (prefix / "share/ament_index/resource_index/packages/spark3r_ros").touch()
    for folder in ("launch", "config"):
        (share / folder).symlink_to(ROOT / folder)
    executable.write_text(
        f"#!{sys.executable}\nimport sys; sys.path[:0] = {[str(ROOT), str(Path(__file__).parent)]!r}\n"
        "from fake import FakeReconstructor\nfrom spark3r_ros.ros import node\n"
        "sys.exit(node.main(make_reconstructor=FakeReconstructor))\n"
    )
    executable.chmod(0o755)
    paths = {
        "AMENT_PREFIX_PATH": f"{prefix}:{os.environ.get('AMENT_PREFIX_PATH', '')}",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }
    with (tmp_path / "launch.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(share / "launch" / name), *arguments],
            stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **paths}, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
        os.killpg(process.pid, signal.SIGINT)  # Ctrl-C reaches the whole group, and launch passes it on
        process.wait(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    text = (tmp_path / "launch.log").read_text()
    assert "Traceback" not in text, text
    assert "process has died" not in text, text


def parameter(listener, node, name):
    client = listener.node.create_client(GetParameters, f"{node}/get_parameters")
    listener.until(client.service_is_ready, 60)
    future = client.call_async(GetParameters.Request(names=[name]))
    listener.until(future.done, 60)
    return parameter_value_to_python(future.result().values[0])


def test_live_is_launched_with_its_arguments_and_ends_with_ctrl_c(ros, tmp_path):
    arguments = ("namespace:=robot", "base_frame:=camera", "image_topic:=/cam/image", "tf_mode:=map_to_camera")
    with launched(tmp_path, "live.launch.py", *arguments):
        listener = Listener((Odometry, "/robot/spark3r/odometry", QoSProfile(depth=10)))
        publisher = listener.node.create_publisher(Image, "/cam/image", QoSProfile(depth=10))
        listener.until(publisher.get_subscription_count, 60)
        assert parameter(listener, "/robot/spark3r", "tf_mode") == "map_to_camera"
        assert parameter(listener, "/robot/spark3r", "base_frame") == ""
        assert parameter(listener, "/robot/spark3r", "drop_policy") == "newest"
        publisher.publish(image(1_000_000_000))
        listener.until(lambda: listener.got["/robot/spark3r/odometry"], 60)


def test_replay_is_launched_plays_every_image_and_keeps_the_config(ros, tmp_path):
    stamps_ns = [1_000_000_000 + i * 20_000_000 for i in range(30)]
    frames = (Frame(s, np.zeros((48, 64, 3), np.uint8), "camera_optical_frame") for s in stamps_ns)
    bags.write_bag(frames, tmp_path / "bag")
    listener = Listener(
        (Odometry, "/spark3r/odometry", QoSProfile(depth=100)),
        (DiagnosticArray, "/diagnostics", QoSProfile(depth=10)),
    )
    odometry, diagnostics = listener.got["/spark3r/odometry"], listener.got["/diagnostics"]
    with launched(tmp_path, "replay.launch.py", f"bag:={tmp_path / 'bag'}", "rate:=0.1", "tf_mode:=off"):
        listener.until(lambda: diagnostics and statuses(diagnostics[-1])["spark3r: input"]["poses"] == "30", 60)
        listener.until(lambda: odometry and stamps.to_ns(odometry[-1].header.stamp) == stamps_ns[-1], 60)
        got = [stamps.to_ns(m.header.stamp) for m in odometry]
        assert got == stamps_ns[-len(got) :]  # the player waits for the node only: its rate leaves this listener time
        assert parameter(listener, "/spark3r", "use_sim_time") is True
        assert parameter(listener, "/spark3r", "drop_policy") == "never"
        assert parameter(listener, "/spark3r", "tf_mode") == "off", "an argument of live.launch.py"


def test_localization_is_launched_in_its_map(ros, tmp_path):
    (tmp_path / "office.map").write_text("{}")
    place_file(tmp_path / "office.map").write_text(json.dumps({"T_map_world": np.eye(4).tolist()}))
    listener = Listener()
    with launched(tmp_path, "localization.launch.py", f"map_file:={tmp_path / 'office.map'}", "base_frame:=robot"):
        listener.until(lambda: listener.node.count_subscribers("/camera/image_raw"), 60)
        assert parameter(listener, "/spark3r", "load_map_on_start") is True
        assert parameter(listener, "/spark3r", "tf_mode") == "map_to_odom"
        assert parameter(listener, "/spark3r", "base_frame") == "robot"


def test_multi_camera_is_launched(ros, tmp_path):
    listener = Listener()
    with launched(tmp_path, "multi_camera.launch.py", "cameras:=left,right"):
        for camera, mode in (("left", "odom_to_base"), ("right", "off")):
            listener.until(lambda camera=camera: listener.node.count_subscribers(f"/{camera}/image_raw"), 60)
            assert parameter(listener, f"/{camera}/spark3r", "tf_mode") == mode


# ---- the files beside them ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_key_of_a_yaml_exists_and_is_an_override(path):
    text = path.read_text()
    values = dict(yaml.safe_load(text)["/**"]["ros__parameters"])
    values.pop("use_sim_time", None)
    if values.get("load_map_on_start"):
        values["map_file"] = "/maps/one"
    parameters.build_configs(values)
    assert text.startswith("#")


def test_dds_profile_has_large_shared_memory():
    space = {"d": "http://www.eprosima.com"}
    root = ET.parse(ROOT / "config" / "fastdds_shm.xml").getroot()
    assert int(root.find(".//d:segment_size", space).text) >= 64 << 20
    assert root.find(".//d:participant", space).get("is_default_profile") == "true"


def test_rviz_and_foxglove_show_everything_at_once():
    rviz = yaml.safe_load((ROOT / "config" / "spark3r.rviz").read_text())["Visualization Manager"]
    shown = {d["Topic"]["Value"]: d["Topic"] for d in rviz["Displays"] if "Topic" in d}
    ours = {o.topic.replace("~", "/spark3r"): o for o in interface.OUTPUTS}
    wanted = {f"/spark3r/{name}" for name in ("path", "keyframes", "points", "map", "odometry")}
    assert wanted | {"/camera/image_raw"} <= set(shown)
    assert any(d["Class"].endswith("/TF") and d["Enabled"] for d in rviz["Displays"])
    for topic, settings in shown.items():
        if topic in ours:
            name = ours[topic].profile.reliability.name.replace("_", " ").title()
            assert settings["Reliability Policy"] == name
            durable = ours[topic].profile.durability.name.replace("_", " ").title()
            assert settings["Durability Policy"] == durable
    layout = json.loads((ROOT / "config" / "foxglove_layout.json").read_text())
    panels = layout["configById"]
    assert wanted <= set(panels["3D!spark3r"]["topics"])
    assert panels["Image!camera"]["imageMode"]["imageTopic"] == "/camera/image_raw"

    def leaves(node):
        return {node} if isinstance(node, str) else leaves(node["first"]) | leaves(node["second"])

    assert leaves(layout["layout"]) == set(panels)
