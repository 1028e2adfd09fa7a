"""Files written are the files that other tools read."""

import json

import cv2
import numpy as np
import pytest

from spark3r_ros import export, geometry
from spark3r_ros.frame import PointBatch

RNG = np.random.default_rng(1)


def trajectory(count=20):
    twists = RNG.normal(0, 0.3, (count, 6))
    return [(1341847980822978001 + 33_000_000 * i, geometry.se3_exp(xi)) for i, xi in enumerate(twists)]


def cloud(count):
    rgb = RNG.integers(0, 255, (count, 3), dtype=np.uint8)
    return PointBatch(0, RNG.normal(size=(count, 3)).astype(np.float32), rgb, RNG.random(count, dtype=np.float32))


def test_tum_round_trip_is_exact_in_time(tmp_path):
    poses = trajectory()
    export.write_tum(tmp_path / "t.tum", poses)
    read = export.read_tum(tmp_path / "t.tum")
    assert [stamp for stamp, _ in read] == [stamp for stamp, _ in poses]
    for (_, expected), (_, found) in zip(poses, read):
        np.testing.assert_allclose(found, expected, atol=1e-8)


def test_tum_is_what_evo_reads(tmp_path):
    file_interface = pytest.importorskip("evo.tools.file_interface", reason="evo is not installed")
    poses = trajectory()
    export.write_tum(tmp_path / "t.tum", poses)
    read = file_interface.read_tum_trajectory_file(tmp_path / "t.tum")
    np.testing.assert_allclose(read.poses_se3, [T for _, T in poses], atol=1e-8)


def test_bad_tum_lines_are_named(tmp_path):
    (tmp_path / "t.tum").write_text("# stamp tx ty tz qx qy qz qw\n1.0 0 0 0 0 0 0\n")
    with pytest.raises(ValueError, match=r"t\.tum:2: "):
        export.read_tum(tmp_path / "t.tum")


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_ply_holds_every_point(tmp_path, count):
    points = cloud(count)
    export.write_ply(tmp_path / "map.ply", points)
    header, _, body = (tmp_path / "map.ply").read_bytes().partition(b"end_header\n")
    assert f"element vertex {count}\n".encode() in header
    dtype = np.dtype([("xyz", "<f4", 3), ("rgb", "u1", 3), ("confidence", "<f4")])
    vertices = np.frombuffer(body, dtype)
    np.testing.assert_array_equal(vertices["xyz"], points.xyz)
    np.testing.assert_array_equal(vertices["rgb"], points.rgb)
    np.testing.assert_array_equal(vertices["confidence"], points.confidence)


def test_json_has_no_nan(tmp_path):
    values = {
        "nan": float("nan"),
        "inf": [np.float32("inf")],
        "n": np.int64(3),
        "ok": True,
        "none": None,
        "path": tmp_path,
    }
    export.write_json(tmp_path / "report.json", values)
    read = json.loads((tmp_path / "report.json").read_text())
    assert read == {"nan": None, "inf": [None], "n": 3, "ok": True, "none": None, "path": str(tmp_path)}


def test_path_length():
    places = [(0, 0, 0), (2, 0, 0), (2, 3, 0)]
    corner = [(i, geometry.make_T(np.eye(3), np.array(p, float))) for i, p in enumerate(places)]
    assert export.path_length(corner) == 5.0
    assert export.path_length(corner[:1]) == 0.0


@pytest.mark.parametrize("up", ["-y", "z"])
@pytest.mark.parametrize(("poses", "points"), [(20, 500), (0, 0), (1, 0), (0, 3)])
def test_picture(tmp_path, up, poses, points):
    truth = trajectory(poses)
    export.plot_map(tmp_path / "report.png", trajectory(poses), cloud(points), up=up, truth=truth, title="a test")
    assert cv2.imread(str(tmp_path / "report.png")).shape == (660, 1320, 3)
