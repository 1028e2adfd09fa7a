"""The package installs where pip, colcon, `ros2 run` and launch look, and its core works without ROS."""

import ast
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import spark3r_ros

ROOT = Path(__file__).resolve().parents[2]
ROS_PACKAGES = {
    "rclpy", "sensor_msgs", "nav_msgs", "geometry_msgs", "std_srvs", "diagnostic_msgs", "tf2_msgs", "cv_bridge",
    "sensor_msgs_py", "tf_transformations", "launch", "launch_ros",
}  # fmt: skip
# keys of rosdep that are used here and are no ROS packages
ROSDEP_KEYS = {f"python3-{name}" for name in ("numpy", "opencv", "scipy", "yaml", "matplotlib", "tqdm", "pytest")}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """The package installed by pip, not editable, from a copy of the sources."""
    folder = tmp_path_factory.mktemp("packaging")
    unwanted = shutil.ignore_patterns(".*", "build", "install", "log", "out", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "source", ignore=unwanted)
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    command += ["--no-compile", "--ignore-installed"]  # without the latter pip removes the editable installation
    result = subprocess.run(
        [*command, "--prefix", folder / "prefix", folder / "source"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return folder / "prefix"


def test_files_are_where_ros_looks(prefix):
    assert (prefix / "share/ament_index/resource_index/packages/spark3r_ros").is_file()
    assert (prefix / "share/spark3r_ros/package.xml").is_file()
    for folder in ("launch", "config"):
        expected = {path.name for path in (ROOT / folder).iterdir() if path.is_file()}
        assert expected, f"{folder}/ is empty"
        assert {path.name for path in (prefix / "share/spark3r_ros" / folder).iterdir()} == expected


def test_executables(prefix):
    node = prefix / "lib/spark3r_ros/spark3r_node"  # `ros2 run spark3r_ros spark3r_node`, launch's Node
    for executable in (node, prefix / "bin/spark3r", prefix / "bin/spark3r_node"):
        assert os.access(executable, os.X_OK), executable
    compile(node.read_text(), str(node), "exec")


def test_package_data(prefix):
    [package] = prefix.glob("lib/python*/site-packages/spark3r_ros")
    for name in ("py.typed", "weights/nano.safetensors", "reduction/factors/nano.json"):
        assert (package / name).is_file(), name


def test_installed_package_runs(prefix):
    [site] = prefix.glob("lib/python*/site-packages")
    result = subprocess.run(
        [sys.executable, "-P", prefix / "bin/spark3r", "--version"],
        env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.stdout.strip() == spark3r_ros.__version__, result.stderr


def test_manifest():
    root = ET.parse(ROOT / "package.xml").getroot()
    depends = {element.text for element in root if element.tag.endswith("depend")}
    assert root.get("format") == "3"
    assert root.findtext("version") == spark3r_ros.__version__
    assert root.findtext("license") == "Apache-2.0"
    assert root.findtext("export/build_type") == "ament_python"
    assert depends >= ROS_PACKAGES
    python_keys = {name for name in depends if name.startswith("python3-")}
    assert python_keys <= ROSDEP_KEYS
    assert not any("pip" in name for name in depends), "pip keys keep a package off the build farm"


def test_every_ros_package_that_is_imported_is_declared():
    """Those of spark3r_ros/ros/optional.py may be missing and need not be declared."""
    depends = {element.text for element in ET.parse(ROOT / "package.xml").getroot() if element.tag.endswith("depend")}
    lines = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "spark3r_ros" / "ros").glob("*.py"))
    imported = set(re.findall(r"^ *(?:from|import) (rclpy|\w+_(?:msgs|srvs|interfaces))\b", lines, re.M))
    assert len(imported) > 10
    assert imported - depends == set()


def test_every_other_package_that_is_imported_can_be_had():
    """On a ROS machine: rosdep brings the keys of package.xml, pip what docs/install.md names."""
    sources = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "spark3r_ros").rglob("*.py")]
    nodes = [node for source in sources for node in ast.walk(source)]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    imported = {name.partition(".")[0] for name in names}
    ours = {"", "spark3r_ros", "rclpy", "ament_index_python", "tf2_ros", "tf_transformations", "cv_bridge"}
    ros = {name for name in imported if re.fullmatch(r"\w+_(msgs|srvs|interfaces)", name)}
    [line] = re.findall(r"^pip install (.+?) +#", (ROOT / "docs/install.md").read_text(encoding="utf-8"), re.M)
    by_pip = set(re.findall(r"[a-z_]+", re.sub(r'"(\w+).*?"', r"\1", line)))
    by_rosdep = {key.removeprefix("python3-") for key in ROSDEP_KEYS} | {"cv2"}
    assert imported - sys.stdlib_module_names - ours - ros == (by_pip | by_rosdep) & imported
    assert by_pip <= imported, "no longer needed"


WITHOUT_ROS = """
import importlib, pkgutil, sys
for name in ("rclpy", "sensor_msgs", "tf2_msgs", "builtin_interfaces"):
    sys.modules[name] = None
import spark3r_ros
names = [m.name for m in pkgutil.walk_packages(spark3r_ros.__path__, "spark3r_ros.", onerror=lambda name: None)]
names = [name for name in names if not name.startswith("spark3r_ros.ros")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def test_everything_but_the_ros_room_imports_without_ros():
    result = subprocess.run([sys.executable, "-c", WITHOUT_ROS], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 20
