"""Lost and found: blackouts, kidnapping, and a saved map that is recognised in a second run."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from oracle import LARGE, Oracle, Stream, render

from spark3r_ros import geometry
from spark3r_ros.config import Config, WindowConfig, with_values
from spark3r_ros.frame import TrackingState
from spark3r_ros.map_file import MapFileError
from spark3r_ros.reconstructor import Reconstructor
from spark3r_ros.recovery import Watch
from training.paths import camera_path

OPTIONS = {"refine.mode": "off", "window.size": 6, "window.overlap": 2, "window.first_seconds": 100.0}


def at(stream: Stream, rows, blank=()) -> Stream:
    """Frames in another order at even times; ``blank``: positions where the lens is covered."""
    frames = []
    for i, row in enumerate(rows):
        f = stream.frames[row]
        image = np.full_like(f.image, 9) if i in blank else f.image
        frames.append(dataclasses.replace(f, stamp_ns=i * 10**8, image=image))
    return dataclasses.replace(
        stream, frames=frames, T_world_camera=stream.T_world_camera[rows], depth=stream.depth[rows]
    )


@pytest.fixture(scope="module")
def stream():
    return render(camera_path("orbit", 50, 3, 0.25), 3, size=LARGE)


class Blinking(Oracle):
    """Says so when it sees nothing."""

    def __call__(self, images, **options):
        prediction = super().__call__(images, **options)
        dark = images.flatten(1).std(dim=1) < 0.01
        confidence = prediction.confidence * (~dark)[:, None, None]
        return dataclasses.replace(prediction, confidence=confidence)


def run(stream: Stream, reconstructor: Reconstructor):
    updates = [*(reconstructor.push(f) for f in stream.frames), reconstructor.finish()]
    return updates, [p for u in updates for p in u.poses]


def make(stream: Stream, **options) -> Reconstructor:
    return Reconstructor(with_values(Config(), OPTIONS | options), Blinking(stream))


def test_a_blackout_is_noticed_and_the_place_found_again(stream):
    rows = [*range(40), *range(39, 9, -1)]
    dark = set(range(40, 52))
    covered = at(stream, rows, dark)
    _, poses = run(covered, make(covered))
    states = [p.state for p in poses]
    assert len(poses) == len(rows)
    assert states[39] is TrackingState.TRACKING
    assert states[51] is TrackingState.LOST
    assert poses[51].covariance[0, 0] > 1e3
    found = next(i for i in range(52, len(rows)) if states[i] is TrackingState.TRACKING)
    assert found <= 53
    assert poses[found].covariance[0, 0] < 1.0
    T_first = np.linalg.inv(covered.T_world_camera[0])
    for i in range(found, len(rows)):
        truth = (T_first @ covered.T_world_camera[i])[:3, 3] * 0.5
        assert np.linalg.norm(poses[i].T_map_camera[:3, 3] - truth) < 0.06
    assert np.max(np.linalg.norm(np.diff([p.T_map_camera[:3, 3] for p in poses[found:]], axis=0), axis=1)) < 0.1
    assert all(np.isfinite(p.T_odom_camera).all() for p in poses)


def test_a_found_camera_doubts_its_scale_until_a_loop_tells_it(stream):
    """Its first keyframes have just left the places that it sees again; they belong to another segment."""
    rows = [*range(50), *[49] * 12, *range(49, 0, -1)]
    covered = at(stream, rows, set(range(50, 62)))
    sigmas = []
    for has_loops in (False, True):
        reconstructor = make(covered, **{"loops.enabled": has_loops, "window.first_size": 2})
        _, poses = run(covered, reconstructor)
        assert (reconstructor.status()["loops"] > 0) is has_loops
        sigmas.append([np.sqrt(np.trace(p.covariance[:3, :3])) for p in poses])
    travelled = np.linalg.norm(covered.T_world_camera[-1, :3, 3] - covered.T_world_camera[70, :3, 3]) * 0.5
    assert sigmas[0][-1] > 0.08 * travelled
    assert sigmas[0][75] == pytest.approx(sigmas[1][75])
    assert sigmas[1][-1] < 0.6 * sigmas[0][-1]


def test_a_kidnapped_camera_that_sees_nothing_known_goes_on_without_confidence(stream):
    other = render(camera_path("handheld", 40, 5, 1.0), 8, size=LARGE)
    frames = [*at(stream, list(range(42)), set(range(34, 42))).frames]
    frames += [dataclasses.replace(f, stamp_ns=(42 + i) * 10**8) for i, f in enumerate(other.frames)]
    both = dataclasses.replace(
        stream,
        frames=frames,
        T_world_camera=np.concatenate([stream.T_world_camera[:42], other.T_world_camera]),
        depth=np.concatenate([stream.depth[:42], other.depth]),
    )
    _, poses = run(both, make(both))
    assert len(poses) == len(frames)
    assert any(p.state is TrackingState.LOST for p in poses)
    assert all(p.covariance[0, 0] > 1e3 for p in poses[45:])


def test_a_saved_map_is_found_again(stream, tmp_path):
    first = make(at(stream, list(range(50))))
    run(at(stream, list(range(50))), first)
    path = tmp_path / "room.map"
    first.save_map(path)
    rows = list(range(5, 45, 2))
    second_stream = at(stream, rows)
    second = make(second_stream)
    second.load_map(path)
    assert len(second.map_points().xyz) == len(first.map_points().xyz)
    updates, poses = run(second_stream, second)
    assert len(poses) == len(rows)
    assert poses[0].state is TrackingState.TRACKING
    T_first = np.linalg.inv(stream.T_world_camera[0])
    for pose, row in zip(poses, rows, strict=True):
        truth = (T_first @ stream.T_world_camera[row])[:3, 3] * 0.5
        assert np.linalg.norm(pose.T_map_camera[:3, 3] - truth) < 0.08
    assert updates[0].map_changed


def test_keyframes_from_before_the_place_was_known_do_not_decide_where_it_is(stream, tmp_path):
    """Regression: a window of a found camera in which no keyframe had recognised anything was believed."""
    first = make(at(stream, list(range(25, 50))))
    run(at(stream, list(range(25, 50))), first)
    first.save_map(tmp_path / "half.map")
    walk = at(stream, list(range(50)))
    second = make(walk, **{"window.keyframe_flow": 0.05})
    second.load_map(tmp_path / "half.map")
    _, poses = run(walk, second)
    found = next(i for i, p in enumerate(poses) if p.state is TrackingState.TRACKING and p.covariance[0, 0] < 1.0)
    assert found > 3
    T_first = np.linalg.inv(stream.T_world_camera[25])
    for pose, T in list(zip(poses, walk.T_world_camera, strict=True))[found:]:
        assert np.linalg.norm(pose.T_map_camera[:3, 3] - (T_first @ T)[:3, 3] * 0.5) < 0.1


def test_a_map_survives_two_round_trips(stream, tmp_path):
    first = make(at(stream, list(range(30))))
    run(at(stream, list(range(30))), first)
    first.save_map(tmp_path / "a.map")
    second = make(stream)
    second.load_map(tmp_path / "a.map")
    second.save_map(tmp_path / "b.map")
    assert (tmp_path / "a.map").read_bytes() == (tmp_path / "b.map").read_bytes()


def test_a_map_of_another_model_is_refused(stream, tmp_path):
    first = make(at(stream, list(range(20))))
    run(at(stream, list(range(20))), first)
    first.save_map(tmp_path / "a.map")
    other = make(stream)
    other._backbone.spec.name = "giant"
    with pytest.raises(MapFileError, match="made with model oracle, this is giant"):
        other.load_map(tmp_path / "a.map")


def test_an_empty_map_can_be_saved_and_loaded(stream, tmp_path):
    make(stream).save_map(tmp_path / "empty.map")
    reconstructor = make(at(stream, list(range(20))))
    reconstructor.load_map(tmp_path / "empty.map")
    _, poses = run(at(stream, list(range(20))), reconstructor)
    assert len(poses) == 20


def test_watch_waits_before_it_calls_tracking_lost():
    watch = Watch(WindowConfig())
    assert not watch.frame(0, 0.9)
    assert not watch.frame(4 * 10**8, 0.0)
    assert not watch.frame(8 * 10**8, 0.0)
    assert watch.frame(10 * 10**8, 0.0)
    assert not watch.frame(11 * 10**8, 0.9)
    assert not watch.frame(99 * 10**8, 0.0)  # a slow camera: one bad frame is not a while


def test_watch_counts_windows_that_do_not_fit():
    watch = Watch(WindowConfig())
    assert not watch.window(False)
    assert not watch.window(True)
    assert not watch.window(False)
    assert watch.window(False)


def test_a_loop_moves_keyframes_path_and_cloud_while_odometry_stays_smooth(stream):
    rows = [*range(40), *range(38, -1, -1), *range(1, 40)]
    there_and_back = at(stream, rows)
    oracle = Blinking(there_and_back, pose_noise=0.01)
    options = OPTIONS | {"loops.min_gap": 6, "context.enabled": False, "window.keyframe_flow": 0.06}
    reconstructor = Reconstructor(with_values(Config(), options), oracle)
    moved, odometry = 0, []
    for frame in there_and_back.frames:
        before = dict(reconstructor.keyframe_poses()), dict(reconstructor.trajectory()), reconstructor.map_points().xyz
        corrections = reconstructor.status()["map_corrections"]
        update = reconstructor.push(frame)
        odometry += [p.T_odom_camera for p in update.poses]
        if reconstructor.status()["map_corrections"] == corrections:
            continue
        assert update.map_changed
        after = dict(reconstructor.keyframe_poses()), dict(reconstructor.trajectory()), reconstructor.map_points().xyz
        for old, new in zip(before[:2], after[:2], strict=True):
            moved += any(not np.allclose(new[s], T, atol=1e-4) for s, T in old.items())
        moved += not np.allclose(after[2][: len(before[2])], before[2], atol=1e-4)
    assert reconstructor.status()["loops"] > 0
    assert moved >= 3
    steps = np.linalg.norm(np.diff([T[:3, 3] for T in odometry], axis=0), axis=1)
    truth = np.linalg.norm(np.diff(there_and_back.T_world_camera[:, :3, 3], axis=0), axis=1) * oracle.first_scale
    assert np.all(np.abs(steps - truth) < 0.08)  # noise of two poses, and no step from any correction


def test_a_keyframe_that_a_later_window_moves_keeps_its_own_correction(stream, monkeypatch):
    """Hung on the newest correction, it would leave a step between itself and the keyframe before."""
    there_and_back = at(stream, [*range(40), *range(38, -1, -1), *range(1, 40)])
    options = OPTIONS | {"loops.min_gap": 6, "context.enabled": False, "window.keyframe_flow": 0.06}
    oracle = Blinking(there_and_back, pose_noise=0.01)
    reconstructor = Reconstructor(with_values(Config(), options), oracle)
    take_over, corrected, worlds, moved = reconstructor._apply_loops, {}, {}, 0

    def note():
        take_over()
        for k in reconstructor._keyframes.values():
            corrected[k.id] = k.S_map_keyframe @ geometry.inverse(k.T_world_camera)
            worlds[k.id] = k.T_world_camera

    monkeypatch.setattr(reconstructor, "_apply_loops", note)
    for frame in there_and_back.frames:
        reconstructor.push(frame)
        for number, S_map_world in corrected.items():
            keyframe = reconstructor._keyframes[number]
            now = keyframe.S_map_keyframe @ geometry.inverse(keyframe.T_world_camera)
            np.testing.assert_allclose(now, S_map_world, atol=1e-9)
            is_own = not np.allclose(S_map_world, reconstructor._S_map_world, atol=1e-4)
            moved += is_own and not np.allclose(keyframe.T_world_camera, worlds[number], atol=1e-4)
    assert moved > 0
    reconstructor.finish()
    assert not reconstructor._loops.is_unsolved
