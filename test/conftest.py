"""What all tests share: the place of shared data and a ROS environment that reaches nobody else."""

import itertools
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from scripts import ros_domain

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("SPARK3R_SHARED", ROOT.parent / "shared"))


def pytest_configure(config):
    """Before anything imports rclpy: a domain of our own, this machine only, logs that go away."""
    domains, config.stash[CLAIMS] = zip(*(ros_domain.claim() for _ in range(4)))
    config.stash[LOGS] = tempfile.mkdtemp(prefix="spark3r_test_logs_")
    os.environ["ROS_DOMAIN_ID"] = str(domains[0])
    config.stash[DOMAINS] = itertools.cycle(domains[1:])
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    os.environ["ROS_LOG_DIR"] = config.stash[LOGS]


def pytest_unconfigure(config):
    shutil.rmtree(config.stash[LOGS], ignore_errors=True)
    for claim in config.stash[CLAIMS]:
        claim.close()


@pytest.fixture
def domain(monkeypatch, request):
    """A ROS domain for one test and the processes that it starts: nothing of the test before is in its discovery."""
    domain = next(request.config.stash[DOMAINS])
    monkeypatch.setenv("ROS_DOMAIN_ID", str(domain))
    return domain


CLAIMS, DOMAINS = pytest.StashKey(), pytest.StashKey()
LOGS = pytest.StashKey[str]()


def shared_path(*parts):
    """A file or folder of the shared data; skips the test where it is missing."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"shared data {'/'.join(parts)} is not beside the project (SPARK3R_SHARED points elsewhere)")
    return path


@pytest.fixture(scope="session")
def shared():
    """``shared("data", "tum_fr3_office")`` is that folder, or the test is skipped."""
    return shared_path
