"""The demo's figures are right, and its sample is made once."""

import contextlib
import errno
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from scripts import demo, ros_domain
from spark3r_ros import export, geometry
from spark3r_ros.sources import open_source

pytest.importorskip("evo", reason="evo is not installed")
RNG = np.random.default_rng(5)


def path(count=40):
    angles = np.linspace(0, 5, count)
    poses = geometry.se3_exp(np.stack([np.cos(angles), np.sin(angles), angles / 4, *(angles / 9,) * 3], axis=1))
    return [(1_700_000_000_000_000_000 + 50_000_000 * i, T) for i, T in enumerate(poses)]


def moved(poses, S):
    return [(stamp, geometry.apply_similarity_to_pose(S, T)) for stamp, T in poses]


def test_a_similar_trajectory_has_no_error():
    truth = path()
    S = geometry.similarity(0.3, geometry.se3_exp(np.array([1, 2, 3, 0.5, -0.4, 0.3])))
    estimate = moved(truth, S)[3:]
    accuracy = demo.compare(estimate, truth)
    assert accuracy.ate < 1e-9
    assert accuracy.length == pytest.approx(export.path_length(truth[3:]))
    np.testing.assert_allclose([T for _, T in accuracy.truth[3:]], [T for _, T in estimate], atol=1e-9)


def test_the_error_is_in_metres_of_the_truth():
    truth = path(2000)
    noisy = [(stamp, T @ geometry.make_T(np.eye(3), RNG.normal(0, 0.01, 3))) for stamp, T in truth]
    shrunk = moved(noisy, geometry.similarity(0.1, np.eye(4)))
    assert demo.compare(shrunk, truth).ate == pytest.approx(0.01 * np.sqrt(3), rel=0.05)


def test_the_sample_is_rendered_once(tmp_path, monkeypatch):
    frames = list(demo.rendered(3))
    monkeypatch.setattr(demo, "rendered", lambda count, hall: iter(frames))
    bag, truth = demo.sample(tmp_path)
    written = [frame.stamp_ns for frame in open_source(bag)]
    assert [stamp for stamp, _ in export.read_tum(truth)] == written == [frame.stamp_ns for frame, _ in frames]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["room", "room_truth.tum"]
    monkeypatch.setattr(demo, "rendered", lambda count, hall: pytest.fail("rendered again"))
    assert demo.sample(tmp_path) == (bag, truth)
    odometry = [(written[0], np.eye(4)), (written[2] + 7, np.eye(4))]
    assert demo.largest_stamp_difference(written, odometry) == 7


def test_the_hall_is_another_sample(tmp_path):
    bag, truth = demo.sample(tmp_path, 2)
    room, hall = (next(iter(demo.rendered(1, hall)))[0] for hall in (False, True))
    assert (bag.name, truth.name) == ("hall_2", "hall_2_truth.tum")
    np.testing.assert_array_equal(next(iter(open_source(bag))).image, hall.image)
    assert not np.array_equal(room.image, hall.image)


@pytest.mark.parametrize("words", [["--hall", "-1"], ["--hall", "3", "recording"]])
def test_a_hall_is_a_number_of_images(words, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["demo", *words])
    with pytest.raises(SystemExit) as end:
        demo.main()
    assert end.value.code == 2
    assert "--hall takes the number of images" in capsys.readouterr().err


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(folder, hall):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(demo, "sample", full)
    monkeypatch.setattr("sys.argv", ["demo", "--out", str(tmp_path)])
    monkeypatch.setattr(demo, "prepare_ros", lambda out: contextlib.nullcontext())
    with pytest.raises(SystemExit, match=rf"^demo: .*No space left on device: make room under {tmp_path}, or choose"):
        demo.main()


def test_every_demo_has_a_domain_of_its_own(tmp_path, monkeypatch):
    for name in ("ROS_AUTOMATIC_DISCOVERY_RANGE", "FASTDDS_DEFAULT_PROFILES_FILE", "ROS_LOG_DIR"):
        monkeypatch.setenv(name, "as it was")
    monkeypatch.setenv("ROS_DOMAIN_ID", "42")
    domains = []
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(demo.prepare_ros(tmp_path))
            domains.append(int(os.environ["ROS_DOMAIN_ID"]))
    assert len(set(domains)) == 3
    assert set(domains) <= set(ros_domain.DOMAINS)


def test_the_dds_profile_is_shipped():
    assert Path(demo.PROFILE).is_file()


def test_any_recording_becomes_a_bag(tmp_path):
    """A bag is played as it is; a folder is made one, and again when it has changed."""
    images = RNG.integers(0, 255, (3, 48, 64, 3), dtype=np.uint8)
    folder = tmp_path / "room"
    folder.mkdir()
    for i in range(2):
        cv2.imwrite(str(folder / f"{i}.png"), images[i, :, :, ::-1])
    bag = demo.as_bag(folder, tmp_path)
    assert bag == tmp_path / "room_bag"
    assert demo.as_bag(bag, tmp_path / "elsewhere") == bag
    np.testing.assert_array_equal([frame.image for frame in open_source(bag)], images[:2])
    cv2.imwrite(str(folder / "2.png"), images[2, :, :, ::-1])
    assert len(open_source(demo.as_bag(folder, tmp_path))) == 3
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["room", "room_bag"]


def test_the_truth_in_a_folder_is_used(tmp_path):
    assert demo.known_truth(tmp_path) is None
    (tmp_path / "poses.txt").touch()
    assert demo.known_truth(tmp_path) == tmp_path / "poses.txt"


def test_latency_is_from_publish_to_arrival():
    stamps = [10, 20, 30, 40, 50, 60]
    got = demo.Received(sent=[0.0, 0.1, 0.2, 0.3, 0.9, 1.0])
    got.odometry = [(stamp, np.eye(4)) for stamp in (10, 20, 40, 50, 60)]  # the third image brought no pose
    got.arrived = [0.02, 0.85, 0.85, 0.91, 1.01]
    assert demo.latency_line(stamps, got) == "20 ms median, 710 ms p95, 750 ms at most"
    assert demo.latency_line(stamps, demo.Received()) == "no pose"
