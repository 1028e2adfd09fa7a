"""Nodes under test over real DDS; skipped where ROS 2 is missing."""

import gc

import pytest

rclpy = pytest.importorskip("rclpy", reason="ROS 2 is not installed here")
pytest.importorskip("tf2_msgs", reason="tf2_msgs is not installed here")

from rig import Rig  # noqa: E402


@pytest.fixture
def ros(domain):
    """rclpy for one test, in a domain of its own."""
    rclpy.init(domain_id=domain)
    yield
    rclpy.try_shutdown()
    gc.collect()  # a node in a reference cycle would stay in the discovery of later tests


@pytest.fixture
def rig(ros):
    """Builds nodes under test: ``rig(tf_mode="off")`` is a running one with a fake reconstructor."""
    made = []

    def build(**parameters):
        made.append(Rig(**parameters))
        return made[-1]

    yield build
    for one in made:
        one.close()
