"""Setting up from nothing: what is missing is said in one line, what is right is left alone."""

import re
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest

from scripts import bootstrap
from scripts.bootstrap import ROOT

PIP_OUTPUTS = {
    "network": (
        "WARNING: Retrying after connection broken by 'NewConnectionError(<urllib3...>: Failed to establish a new "
        "connection: [Errno 111] Connection refused')': /simple/numpy/\n"
        "ERROR: Could not find a version that satisfies the requirement numpy==2.4.6 (from versions: none)\n"
        "ERROR: No matching distribution found for numpy==2.4.6\n",
        "cannot be reached: check the network",
    ),
    "disk": (
        "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n",
        "disk is full",
    ),
    "wheel": ("ERROR: No matching distribution found for gtsam==4.3.0\n", r"no gtsam==4\.3\.0 for Python 3"),
    "other": ("Collecting numpy\nERROR: something else\n", "^ERROR: something else$"),
    "nothing": ("", "no message"),
}


@pytest.mark.parametrize("case", PIP_OUTPUTS)
def test_reasons_of_pip(case):
    output, says = PIP_OUTPUTS[case]
    assert re.search(says, bootstrap.explain(output))


def test_other_pythons_are_refused(monkeypatch):
    bootstrap.check_machine()
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    with pytest.raises(bootstrap.SetupError, match=r"Python 3\.11 to 3\.13 is needed.*make PYTHON=python3\.11"):
        bootstrap.check_machine()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_a_python_that_is_not_there():
    result = subprocess.run(["make", "PYTHON=python3.99", "demo"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode
    assert result.stderr.startswith("setup: python3.99 is missing: install Python 3.11")


def test_other_machines_are_refused(monkeypatch):
    monkeypatch.setattr(bootstrap.platform, "machine", lambda: "riscv64")
    with pytest.raises(bootstrap.SetupError, match="x86_64 Linux only, this is riscv64"):
        bootstrap.check_machine()


def test_missing_compiler_and_headers(monkeypatch):
    bootstrap.check_compiler()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: None if name == "c++" else name)
        with pytest.raises(bootstrap.SetupError, match=r"c\+\+ is missing: install a C/C\+\+ compiler"):
            bootstrap.check_compiler()
    monkeypatch.setattr(bootstrap.sysconfig, "get_path", lambda name: "/nowhere")
    with pytest.raises(bootstrap.SetupError, match=r"Python\.h is missing: install the Python headers"):
        bootstrap.check_compiler()


def test_too_little_disk(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10e9, 9e9, 1e9))
    with pytest.raises(bootstrap.SetupError, match=r"1\.0 GB of disk are free .* are needed: make room"):
        bootstrap.check_disk()


def test_errors_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    with pytest.raises(SystemExit) as exit_:
        bootstrap.main()
    assert str(exit_.value).startswith("setup: Python 3.11")
    assert "\n" not in str(exit_.value)


def test_the_environment_is_not_polluted(monkeypatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", "/elsewhere")
    monkeypatch.setenv("_ROS_WHEELS_BOOTSTRAP_COMPLETE", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "kept")
    environment = bootstrap.clean_environment()
    assert "LD_LIBRARY_PATH" not in environment
    assert "_ROS_WHEELS_BOOTSTRAP_COMPLETE" not in environment
    assert environment["PIP_FIND_LINKS"] == "kept"


def test_requirements_are_pinned_and_agree_with_the_constraints():
    pins = bootstrap.pins()
    assert pins["torch"] == "2.13.0"
    for name in bootstrap.FILES + bootstrap.FILES_WITHOUT_DEPENDENCIES:
        for line in (ROOT / "requirements" / name).read_text().splitlines():
            assert not line or line.startswith("#") or re.fullmatch(r"[\w.-]+==[\w.]+", line), f"{name}: {line}"
    constraints = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements/constraints.txt").read_text(), re.M))
    for name, version in constraints.items():
        assert pins.get(name, version) == version


def test_a_second_run_does_nothing():
    if not (bootstrap.VENV / "requirements.stamp").exists() or sys.prefix != str(bootstrap.VENV):
        pytest.skip("these tests do not run in the environment that scripts/bootstrap.py made")
    result = subprocess.run(
        [sys.executable, ROOT / "scripts" / "bootstrap.py"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert re.fullmatch(r"setup: ready \(\d+ s\)\n", result.stdout)
