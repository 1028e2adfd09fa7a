"""Installs under pip, colcon and colcon --symlink-install; metadata that ROS needs goes through data_files."""

import re
from pathlib import Path

from setuptools import find_packages, setup

NAME = "spark3r_ros"
SHARE = f"share/{NAME}"
ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / NAME / "__init__.py").read_text(encoding="utf-8")).group(1)


def files(folder: str) -> list[str]:
    """The files right inside ``folder``, relative to this one as data_files wants them."""
    return sorted(f"{folder}/{path.name}" for path in (ROOT / folder).glob("*") if path.is_file())


setup(
    name=NAME,
    version=VERSION,
    description="Camera poses, TF and dense point clouds from a plain camera stream",
    license="Apache-2.0",
    maintainer="spark3r_ros maintainers",
    maintainer_email="spark3r_ros@example.com",
    python_requires=">=3.10",
    packages=find_packages(include=[NAME, f"{NAME}.*"]),
    package_data={NAME: ["py.typed", "weights/*", "reduction/factors/*.json"]},
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (SHARE, ["package.xml"]),
        (f"{SHARE}/launch", files("launch")),
        (f"{SHARE}/config", files("config")),
        # pip puts console scripts into bin/; ros2 run and launch look here
        (f"lib/{NAME}", ["scripts/spark3r_node"]),
    ],
    # never ROS itself: it comes from the system or from requirements/ros.txt
    install_requires=[
        "gtsam>=4.3",
        "huggingface_hub>=1",
        "matplotlib",
        "numpy>=1.26",
        "opencv-python-headless",
        "rosbags>=0.10",
        "safetensors",
        "scipy",
        "setuptools",
        "threadpoolctl",
        "torch>=2.4",
        "tqdm",
    ],
    extras_require={"test": ["pytest", "hypothesis", "evo", "PyYAML"], "viewer": ["viser"]},
    entry_points={
        "console_scripts": ["spark3r = spark3r_ros.cli:main", "spark3r_node = spark3r_ros.ros.node:main"],
    },
    zip_safe=False,
)
