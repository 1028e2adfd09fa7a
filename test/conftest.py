"""What all tests share: the place of shared data and a ROS environment that reaches nobody else."""

import fcntl
import itertools
import os
import shutil
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("SPARK3R_SHARED", ROOT.parent / "shared"))


def claim_domain():
    """A ROS_DOMAIN_ID of 1-101 that no other test session on this machine uses; the returned file holds the claim.

    Another one at every call: what nodes of an earlier test left in the discovery of theirs is not seen.
    """
    first = next(FIRST_DOMAIN) % 101
    for domain in itertools.islice(itertools.cycle(range(1, 102)), first, first + 101):
        claim = Path(tempfile.gettempdir(), f"spark3r_test_domain_{domain}").open("a")  # noqa: SIM115 - held for the session
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            claim.close()
        else:
            return domain, claim
    raise RuntimeError("all ROS domains from 1 to 101 are taken by other test sessions")


def pytest_configure(config):
    """Before anything imports rclpy: a domain of our own, this machine only, logs that go away."""
    domain, config.stash[CLAIM] = claim_domain()
    config.stash[LOGS] = tempfile.mkdtemp(prefix="spark3r_test_logs_")
    os.environ["ROS_DOMAIN_ID"] = str(domain)
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    os.environ["ROS_LOG_DIR"] = config.stash[LOGS]


def pytest_unconfigure(config):
    shutil.rmtree(config.stash[LOGS], ignore_errors=True)
    config.stash[CLAIM].close()


@pytest.fixture
def domain(monkeypatch):
    """A ROS domain for one test and the processes that it starts."""
    domain, claim = claim_domain()
    monkeypatch.setenv("ROS_DOMAIN_ID", str(domain))
    yield domain
    claim.close()


FIRST_DOMAIN = itertools.count(os.getpid())
CLAIM = pytest.StashKey()
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
