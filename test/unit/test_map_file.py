"""The map file: what goes in comes out, and what is damaged is refused."""

from __future__ import annotations

import numpy as np
import pytest

from spark3r_ros import map_file
from spark3r_ros.frame import ScaleEstimate
from spark3r_ros.loops import loop_edge, step_edge
from spark3r_ros.map_file import MapFileError, SavedMap
from spark3r_ros.places import Place
from spark3r_ros.point_map import KeyframePoints
from spark3r_ros.windows import Keyframe


@pytest.fixture
def saved() -> SavedMap:
    rng = np.random.default_rng(0)
    keyframes, points = [], {}
    for number in (0, 1, 4):
        n = 5 + number
        place = Place(
            number,
            rng.random(8).astype(np.float32),
            rng.random((n, 2)).astype(np.float32),
            rng.random(n).astype(np.float32),
            rng.integers(0, 255, (n, 32), np.uint8),
        )
        T = np.eye(4)
        T[:3, 3] = number
        keyframes.append(
            Keyframe(
                number,
                number,
                10 * number,
                "cam",
                None,
                T_map_camera=T,
                scale=1.5,
                median_depth=2.0,
                travelled=0.5 * number,
                is_solved=True,
                place=place,
            )
        )
        points[number] = KeyframePoints(
            rng.random((n, 3)).astype(np.float32),
            rng.integers(0, 255, (n, 3), np.uint8),
            rng.random(n).astype(np.float32),
        )
    del points[1]
    edges = (step_edge(0, 1, np.eye(4), 1.0), loop_edge(0, 4, 2 * np.eye(4), 1.0))
    return SavedMap("nano", ScaleEstimate(0.3, 0.01, "odometry"), tuple(keyframes), points, edges)


def test_round_trip(saved, tmp_path):
    map_file.write(tmp_path / "deep" / "room.map", saved)
    loaded = map_file.read(tmp_path / "deep" / "room.map")
    assert loaded.model == saved.model
    assert loaded.scale == saved.scale
    assert loaded.points.keys() == saved.points.keys()
    for a, b in zip(loaded.keyframes, saved.keyframes, strict=True):
        assert (a.id, a.stamp_ns, a.frame_id, a.scale, a.median_depth, a.travelled) == (
            b.id, b.stamp_ns, b.frame_id, b.scale, b.median_depth, b.travelled,
        )  # fmt: skip
        np.testing.assert_array_equal(a.T_map_camera, b.T_map_camera)
        for name in ("descriptor", "xy", "depth", "orb"):
            np.testing.assert_array_equal(getattr(a.place, name), getattr(b.place, name))
    for number, cloud in saved.points.items():
        np.testing.assert_array_equal(loaded.points[number].xyz, cloud.xyz)
    for e, f in zip(loaded.edges, saved.edges, strict=True):
        assert (e.first, e.second, e.is_loop, e.sigmas) == (f.first, f.second, f.is_loop, f.sigmas)
        np.testing.assert_array_equal(e.S_first_second, f.S_first_second)


def test_a_forgotten_place_stays_forgotten_and_its_keyframe_stays(saved, tmp_path):
    saved.keyframes[1].place = None
    map_file.write(tmp_path / "room.map", saved)
    loaded = map_file.read(tmp_path / "room.map")
    assert [k.id for k in loaded.keyframes] == [0, 1, 4]
    assert [k.place is None for k in loaded.keyframes] == [False, True, False]
    assert all(k.is_solved for k in loaded.keyframes)


def test_the_same_map_is_the_same_file(saved, tmp_path):
    map_file.write(tmp_path / "a", saved)
    map_file.write(tmp_path / "b", saved)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_one_wrong_byte_is_noticed(saved, tmp_path):
    path = tmp_path / "room.map"
    map_file.write(path, saved)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(MapFileError, match="checksum"):
        map_file.read(path)


def test_a_cut_file_is_noticed(saved, tmp_path):
    path = tmp_path / "room.map"
    map_file.write(path, saved)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(MapFileError, match="checksum"):
        map_file.read(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(MapFileError, match="No such file"):
        map_file.read(tmp_path / "none.map")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(MapFileError, match="not a spark3r map"):
        map_file.read(tmp_path / "text")


def test_another_version_is_refused(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(map_file, "VERSION", 99)
    map_file.write(tmp_path / "room.map", saved)
    monkeypatch.undo()
    with pytest.raises(MapFileError, match="version 99"):
        map_file.read(tmp_path / "room.map")


def test_a_failed_write_leaves_the_old_map(saved, tmp_path, monkeypatch):
    path = tmp_path / "room.map"
    map_file.write(path, saved)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(map_file.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        map_file.write(path, saved)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
