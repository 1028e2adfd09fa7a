"""spark3r map: every frame is pushed, every outcome is counted, every mistake is one clear line."""

import json
import shutil

import cv2
import numpy as np
import pytest

from spark3r_ros import cli, reconstructor
from spark3r_ros.backbone.registry import EMBEDDED
from spark3r_ros.config import Config
from spark3r_ros.export import read_tum
from spark3r_ros.frame import FramePose, PointBatch, ScaleEstimate, TrackingState, Update


class Recorder:
    """Stands in for the Reconstructor: poses count up, the last frame of a bad size is refused."""

    def __init__(self, config):
        self.config = config
        self.stamps = []

    def push(self, frame):
        if frame.image.shape[1] != 64:
            raise reconstructor.FrameError("another size")
        self.stamps.append(frame.stamp_ns)
        pose = FramePose(frame.stamp_ns, "camera", np.eye(4), np.eye(4), np.eye(6), TrackingState.TRACKING)
        return Update(poses=(pose,))

    def finish(self):
        return Update(scale=ScaleEstimate(0.0, 0.1, self.config.model.name))

    def trajectory(self):
        return [(stamp, np.eye(4)) for stamp in self.stamps]

    def keyframe_poses(self):
        return self.trajectory()[:1]

    def map_points(self):
        return PointBatch(0, np.zeros((3, 3), np.float32), np.zeros((3, 3), np.uint8), np.ones(3, np.float32))

    def status(self):
        return {"state": "tracking", "residual": float("nan")}


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(reconstructor, "Reconstructor", Recorder)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(5):
        cv2.imwrite(str(folder / f"{i}.png"), np.full((48, 64, 3), 40 * i, np.uint8))
    return folder


def test_map_writes_everything_and_loses_nothing(recorder, images, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["map", str(images), "--out", str(out), "--model", "some", "--fps", "10"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert (report["frames"], report["poses"], report["refused"]) == (5, 5, [])
    assert report["states"] == {"tracking": 5}
    assert (report["model"], report["unit"]) == ("some", "m")
    assert [stamp for stamp, _ in read_tum(out / "trajectory.tum")] == [i * 100_000_000 for i in range(5)]
    assert b"element vertex 3" in (out / "map.ply").read_bytes()
    assert cv2.imread(str(out / "report.png")) is not None
    assert "5 frames in, 5 poses out, 0 refused" in capsys.readouterr().out


def test_refused_frames_are_counted_and_named(recorder, images, tmp_path):
    cv2.imwrite(str(images / "9.png"), np.zeros((48, 32, 3), np.uint8))
    assert cli.main(["map", str(images), "--out", str(tmp_path / "out")]) == 1
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["frames"], report["poses"], report["refused"]) == (6, 5, ["frame 5: another size"])


def test_what_came_before_a_corrupt_image_is_kept(recorder, images, tmp_path, capsys):
    (images / "3.png").write_bytes(b"")
    assert cli.main(["map", str(images), "--out", str(tmp_path / "out")]) == 1
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["poses"] == 3
    assert "3.png is empty" in report["stopped_early"]
    assert "stopped early" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--set", "window.size"], "--set takes GROUP.FIELD=VALUE, got 'window.size'"),
        (["--set", "window.sice=3"], "unknown parameter 'window.sice'; did you mean window.size?"),
        (["--set", "window.size=1"], "window.size must be >= 2, got 1"),
        (["--set", "window.size=many"], "window.size takes a number (int), got 'many'"),
        (["--set", "loops.enabled=maybe"], "loops.enabled takes true or false, got 'maybe'"),
        (["--topic", "/image"], "topic applies to a bag only"),
    ],
)
def test_mistakes_are_one_line(recorder, images, tmp_path, capsys, more, says):
    assert cli.main(["map", str(images), "--out", str(tmp_path / "out"), *more]) == 1
    assert capsys.readouterr().err.strip() == f"spark3r: {says}"
    assert not (tmp_path / "out").exists()


def test_missing_source_is_one_line(tmp_path, capsys):
    assert cli.main(["map", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith(f"spark3r: {tmp_path / 'nowhere'} does not exist")


def test_settings_take_the_type_of_the_default():
    config = cli.build_config(["window.size=12", "context.budget_mb=64", "loops.enabled=False"], "vggt")
    assert (config.window.size, config.context.budget_mb, config.loops.enabled) == (12, 64.0, False)
    assert config.model.name == "vggt"
    assert cli.build_config([]) == Config()


def test_a_weights_file_and_a_device_of_ones_own(images, tmp_path, capsys, caplog):
    """--model takes a path, and says under which licence its weights are."""
    path = tmp_path / "mine.safetensors"
    shutil.copy(EMBEDDED, path)
    assert cli.build_config([], device="cuda").model.device == "cuda"
    with caplog.at_level("INFO"):
        status = cli.main(["map", str(images), "--out", str(tmp_path / "out"), "--model", str(path), "--device", "cpu"])
    assert status == 0
    assert "nano: weights under Apache-2.0" in caplog.text
    assert "5 frames in, 5 poses out" in capsys.readouterr().out
    command = ["map", str(images), "--out", str(tmp_path / "out"), "--model", str(tmp_path / "no.safetensors")]
    assert cli.main(command) == 1
    assert "spark3r: no checkpoint at" in capsys.readouterr().err


def test_models_are_listed_with_licences(capsys):
    assert cli.main(["models"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert "included" in lines["nano"]
    assert "Apache-2.0 / Apache-2.0" in lines["nano"]
    assert "non-commercial" in lines["vggt"]
    assert all("MiB" in line for line in lines.values())


def test_non_commercial_weights_need_a_word(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SPARK3R_CACHE", str(tmp_path))
    assert cli.main(["models", "get", "vggt"]) == 1
    assert "--accept-licence" in capsys.readouterr().err


def test_weights_that_are_there_are_not_fetched(tmp_path, monkeypatch, capsys):
    from spark3r_ros.backbone import registry

    monkeypatch.setenv("SPARK3R_CACHE", str(tmp_path))
    path = registry.weights_path("vggt")
    path.parent.mkdir(parents=True)
    path.touch()
    assert cli.main(["models", "get", "vggt", "--accept-licence"]) == 0
    assert capsys.readouterr().out.strip() == str(path)
    assert cli.main(["models", "get", "vgtt"]) == 1
    assert "unknown model 'vgtt'" in capsys.readouterr().err


def test_probe_writes_a_factor_file(images, tmp_path, capsys):
    from spark3r_ros.reduction.schedule import load_factor_file

    for i in range(5, 34):
        cv2.imwrite(str(images / f"{i}.png"), np.full((48, 64, 3), 7 * i, np.uint8))
    out = tmp_path / "factors.json"
    assert cli.main(["probe", str(images), "--out", str(out), "--set", "model.device=cpu"]) == 0
    assert load_factor_file(out).model == "nano"
    assert out.with_suffix(".png").is_file()
    assert "nano: sensitive layers" in capsys.readouterr().out


def test_probe_of_a_short_recording_is_one_line(images, tmp_path, capsys):
    assert cli.main(["probe", str(images), "--out", str(tmp_path / "factors.json")]) == 1
    assert "has 5 frames, the probe needs more than 32" in capsys.readouterr().err
