"""`python -m scripts.demo RECORDING`, as users run it: every image has its pose, live and offline."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from spark3r_ros.export import read_tum

pytest.importorskip("evo", reason="evo is not installed")
ROOT = Path(__file__).resolve().parents[2]


def test_a_recording_live_and_offline(shared, tmp_path, domain):
    sequence = shared("data", "tum_fr1_plant19")
    command = [
        sys.executable,
        "-m",
        "scripts.demo",
        sequence,
        "--offline",
        "--out",
        tmp_path,
        "--set",
        "window.size:=5",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-3000:]
    said = dict(re.findall(r"^ *(\S.*?)  +(.*)$", result.stdout, re.M))
    assert (said["frames in"], said["poses out"]) == ("17", "17")
    assert said["stamp difference"] == "0 ns at most"
    assert said["offline"].startswith("17 frames in, 17 poses out")
    for name in ("ATE of the poses", "ATE"):
        assert re.match(r"\d\.\d+ m after Sim\(3\), .*% of 0\.\d+ m", said[name]), said[name]
    stamps = [stamp for stamp, _ in read_tum(sequence / "poses.txt")]
    for folder in (tmp_path, tmp_path / "offline"):
        assert [stamp for stamp, _ in read_tum(folder / "trajectory.tum")] == stamps
        assert (folder / "map.ply").is_file()
        assert (folder / "report.png").is_file()


def test_a_recording_that_is_not_there(tmp_path):
    command = [sys.executable, "-m", "scripts.demo", tmp_path / "nowhere", "--out", tmp_path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert re.fullmatch(r"demo: .*nowhere does not exist.*\n", result.stderr)
