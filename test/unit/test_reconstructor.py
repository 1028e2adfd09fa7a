"""The corridor on a rendered stream with an ideal backbone: what goes in, what comes out, and when."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from oracle import LARGE, Oracle, ate, orbit, render

from spark3r_ros import geometry
from spark3r_ros.config import Config, with_values
from spark3r_ros.frame import FramePose, Gauge, TrackingState, Update
from spark3r_ros.reconstructor import FrameError, Reconstructor

OPTIONS = {"refine.mode": "off", "window.size": 6, "window.overlap": 2}


@pytest.fixture(scope="module")
def stream():
    return orbit(60, loops=0.25)


def run(stream, oracle=None, **options) -> tuple[Reconstructor, list[Update]]:
    config = with_values(Config(), OPTIONS | {k.replace("__", "."): v for k, v in options.items()})
    reconstructor = Reconstructor(config, oracle if oracle is not None else Oracle(stream))
    return reconstructor, [*(reconstructor.push(f) for f in stream.frames), reconstructor.finish()]


def poses_of(updates: list[Update]) -> list[FramePose]:
    return [p for u in updates for p in u.poses]


def test_every_frame_gets_one_pose_in_stamp_order(stream):
    _, updates = run(stream)
    assert [p.stamp_ns for p in poses_of(updates)] == [f.stamp_ns for f in stream.frames]


def started(updates: list[Update]) -> int:
    """Number of the frame that the first window was solved with."""
    return next(i for i, u in enumerate(updates) if u.poses and i > 0)


def test_frames_after_the_first_window_get_their_pose_at_once(stream):
    _, updates = run(stream)
    first = started(updates)
    assert len(updates[0].poses) == 1  # where the world begins
    assert len(updates[first].poses) == first
    assert all(len(u.poses) == 1 for u in updates[first + 1 : -1])


def test_a_camera_that_stands_still_has_a_pose_from_the_first_frame_on(stream):
    still = [dataclasses.replace(stream.frames[0], stamp_ns=i * 10**8) for i in range(30)]
    moving = [dataclasses.replace(f, stamp_ns=f.stamp_ns + 30 * 10**8) for f in stream.frames[1:]]
    reconstructor, updates = run(dataclasses.replace(stream, frames=still + moving), Oracle(stream))
    assert all(len(u.poses) == 1 for u in updates[:30])
    assert all((p.T_odom_camera == np.eye(4)).all() for p in poses_of(updates[:30]))
    assert all(p.state is TrackingState.INITIALISING for p in poses_of(updates[:30]))
    assert [p.stamp_ns for p in poses_of(updates)] == [f.stamp_ns for f in still + moving]
    estimated = np.stack([T[:3, 3] for _, T in reconstructor.trajectory()])[29:]
    assert ate(estimated, stream.T_world_camera[:, :3, 3])[0] < 2e-3


def test_a_camera_that_nothing_counts_as_standing_is_mapped_like_any_other(stream):
    frames = [dataclasses.replace(stream.frames[0], stamp_ns=i * 10**8) for i in range(80)]
    _, updates = run(dataclasses.replace(stream, frames=frames), Oracle(stream), window__static_flow=0.0)
    assert [p.stamp_ns for p in poses_of(updates)] == [f.stamp_ns for f in frames]
    assert any(u.window for u in updates[:-1])


def test_an_ideal_backbone_gives_an_exact_path(stream):
    reconstructor, _ = run(stream)
    estimated = np.stack([T[:3, 3] for _, T in reconstructor.trajectory()])
    error, scale = ate(estimated, stream.T_world_camera[:, :3, 3])
    assert error < 1e-3
    assert scale == pytest.approx(2.0, rel=0.01)


def test_without_context_the_overlap_carries_scale_and_pose(stream):
    reconstructor, updates = run(stream, Oracle(stream, scale_noise=0.3), context__enabled=False)
    estimated = np.stack([T[:3, 3] for _, T in reconstructor.trajectory()])
    assert ate(estimated, stream.T_world_camera[:, :3, 3])[0] < 2e-3
    assert all(u.window.accepted for u in updates if u.window)


def test_a_nonsense_window_is_reported_and_does_not_poison_the_scale(stream):
    oracle = Oracle(stream)
    oracle.broken = {2}
    _, updates = run(stream, oracle, window__keyframe_flow=0.06)
    windows = [u.window for u in updates if u.window]
    assert [w.accepted for w in windows].count(False) >= 1
    assert not windows[2].accepted
    assert windows[2].sigma > 0.1
    assert windows[-1].log_scale == pytest.approx(0, abs=0.05)


def test_a_window_that_loses_the_camera_is_still_reported(stream):
    oracle = Oracle(stream)
    oracle.broken = {2, 3}
    _, updates = run(stream, oracle, window__keyframe_flow=0.06)
    lost = next(u for u in updates if u.state is TrackingState.LOST)
    assert lost.window is not None
    assert not lost.window.accepted
    assert lost.depth is not None
    assert len(poses_of(updates)) == len(stream.frames)


def test_odometry_never_jumps_and_map_to_odom_takes_corrections(stream):
    reconstructor = Reconstructor(with_values(Config(), OPTIONS), Oracle(stream, pose_noise=0.02, depth_noise=0.05))
    corrections = []
    for frame in stream.frames:
        answer = reconstructor.track(frame)
        map_update = reconstructor.update_map()
        assert map_update.poses == ()
        if answer.poses:
            last = answer.poses[-1]
            assert np.all(np.isfinite(last.T_odom_camera))
            np.testing.assert_allclose(answer.T_map_odom @ last.T_odom_camera, last.T_map_camera, atol=1e-9)
            corrections.append(np.abs(map_update.T_map_odom - answer.T_map_odom).max())
    assert max(corrections) > 1e-3, "a window moves the camera in the map, not the odometry"


def test_a_map_update_that_nobody_asks_for_is_done_before_the_next_frame(stream):
    asked, updates = run(stream)
    left = Reconstructor(with_values(Config(), OPTIONS), Oracle(stream))
    poses = [p for frame in stream.frames for p in left.track(frame).poses]
    rest = left.finish()
    for ours, theirs in zip([*poses, *rest.poses], poses_of(updates), strict=True):
        np.testing.assert_array_equal(ours.T_map_camera, theirs.T_map_camera)
    assert rest.points is not None
    assert len(rest.points.xyz) == sum(len(u.points.xyz) for u in updates if u.points is not None)
    np.testing.assert_array_equal(left.map_points().xyz, asked.map_points().xyz)


def test_static_frames_never_become_keyframes():
    poses = np.repeat(orbit(1).T_world_camera, 12, axis=0)
    stream = render(poses)
    for i, f in enumerate(stream.frames):  # tell them apart, the oracle knows frames by their pixels
        f.image[0, 0] = i
    stream = dataclasses.replace(stream)
    reconstructor, updates = run(stream)
    assert reconstructor.status()["keyframes"] == 1
    poses_out = poses_of(updates)
    assert len(poses_out) == 12
    for p in poses_out:
        np.testing.assert_allclose(p.T_map_camera, np.eye(4), atol=1e-3)


def test_the_world_begins_at_a_single_frame():
    stream = orbit(1)
    _, updates = run(stream)
    (pose,) = poses_of(updates)
    assert (pose.T_map_camera == np.eye(4)).all()
    assert pose.is_keyframe
    assert updates[-1].window.num_frames == 1


def test_finish_without_frames_is_empty():
    reconstructor = Reconstructor(Config(), Oracle(orbit(1)))
    assert reconstructor.finish().poses == ()
    assert reconstructor.trajectory() == []
    assert len(reconstructor.map_points().xyz) == 0


def test_points_lie_on_the_scene(stream):
    reconstructor, _ = run(stream)
    points = reconstructor.map_points()
    assert len(points.xyz) > 1000
    T_world_first = stream.T_world_camera[0]
    world = geometry.transform(T_world_first, points.xyz * 2.0)
    camera = geometry.transform(geometry.inverse(T_world_first), world)
    pixels = np.rint(geometry.project(camera, stream.K)).astype(int)
    inside = (camera[:, 2] > 0) & (pixels >= 1).all(axis=1) & (pixels[:, 0] < 159) & (pixels[:, 1] < 119)
    seen = stream.depth[0][pixels[inside, 1], pixels[inside, 0]]
    off = (seen - camera[inside, 2]) / seen  # positive: in front of the surface that the first camera sees
    assert np.mean(off > 0.05) < 0.1


def test_tracking_costs_one_frame_per_pass(stream):
    oracle = Oracle(stream)
    run(stream, oracle)
    sizes = set(oracle.passes)
    assert 1 in sizes
    assert max(sizes) == 6


def test_single_frames_of_another_scale_are_pinned_to_their_keyframe(stream):
    reconstructor, _ = run(stream, Oracle(stream, query_scale=1.4), window__keyframe_flow=0.15)
    estimated = np.stack([T[:3, 3] for _, T in reconstructor.trajectory()])
    assert reconstructor.status()["keyframes"] < 30  # most frames are tracked only
    assert ate(estimated, stream.T_world_camera[:, :3, 3])[0] < 2e-3


def test_same_input_same_output(stream):
    a, b = (poses_of(run(stream, Oracle(stream, pose_noise=0.01))[1]) for _ in range(2))
    for p, q in zip(a, b, strict=True):
        np.testing.assert_array_equal(p.T_map_camera, q.T_map_camera)
        np.testing.assert_array_equal(p.covariance, q.covariance)


def test_reset_starts_over(stream):
    reconstructor, first = run(stream)
    reconstructor.reset()
    assert reconstructor.trajectory() == []
    again = [*(reconstructor.push(f) for f in stream.frames), reconstructor.finish()]
    assert len(poses_of(again)) == len(poses_of(first))


def test_frames_that_cannot_be_used_are_refused(stream):
    reconstructor, _ = run(stream)
    last = stream.frames[-1]
    with pytest.raises(FrameError, match="not after the last one"):
        reconstructor.push(last)
    later = dataclasses.replace(last, stamp_ns=last.stamp_ns + 10**8)
    with pytest.raises(FrameError, match="size changed"):
        reconstructor.push(dataclasses.replace(later, image=np.zeros((60, 80, 3), np.uint8)))
    with pytest.raises(FrameError, match="uint8"):
        reconstructor.push(dataclasses.replace(later, image=later.image.astype(float)))


def test_a_depth_image_makes_everything_metric(stream):
    frames = [dataclasses.replace(f, depth=d) for f, d in zip(stream.frames, stream.depth, strict=True)]
    metric = dataclasses.replace(stream, frames=frames)
    reconstructor, updates = run(metric, Oracle(stream))
    assert updates[-1].scale.is_metric
    assert updates[-1].scale.source == "depth"
    assert updates[-1].scale.metres_per_unit == pytest.approx(2.0, rel=0.01)
    estimated = np.stack([T[:3, 3] for _, T in reconstructor.trajectory()])
    assert ate(estimated, stream.T_world_camera[:, :3, 3])[1] == pytest.approx(1.0, rel=0.01)
    assert sum(u.map_changed for u in updates) == 1
    first = started(updates)
    steps = [np.linalg.norm(p.T_odom_camera[:3, 3] - q.T_odom_camera[:3, 3])
             for p, q in zip(poses_of(updates)[1:], poses_of(updates), strict=False)]  # fmt: skip
    assert max(steps[first:]) < 3 * np.median(steps)  # odometry does not jump when the unit becomes metres


def test_robot_odometry_makes_it_metric(stream):
    T = geometry.inverse(stream.T_world_camera[0]) @ stream.T_world_camera
    frames = [dataclasses.replace(f, T_odom_base=t) for f, t in zip(stream.frames, T, strict=True)]
    _, updates = run(dataclasses.replace(stream, frames=frames), Oracle(stream), scale__max_lever=0.0)
    assert updates[-1].scale.source == "odometry"
    assert updates[-1].scale.metres_per_unit == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize("refine", ["on", "off"])
def test_a_metric_backbone_is_metric_from_the_first_window(refine):
    """Also where a scout has set the units before there was one."""
    stream = orbit(60, loops=0.25, size=LARGE)
    reconstructor, updates = run(stream, Oracle(stream, gauge=Gauge.METRIC), refine__mode=refine)
    assert updates[-1].scale.source == "model"
    path = np.stack([T[:3, 3] for _, T in reconstructor.trajectory()])
    assert ate(path, stream.T_world_camera[:, :3, 3])[1] == pytest.approx(1.0, rel=0.01)
    if refine == "off":
        assert updates[-1].scale.metres_per_unit == pytest.approx(1.0, rel=0.01)


def test_state_is_initialising_until_the_first_window(stream):
    _, updates = run(stream)
    first = started(updates)
    assert all(u.state is TrackingState.INITIALISING for u in updates[:first])
    assert updates[first].state is TrackingState.TRACKING
