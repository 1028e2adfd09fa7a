"""The refiner on a stream of tracks with known truth: bootstrap, windows, tracking, and what a camera does not tell."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from sightings import HEIGHT, WIDTH, K, World, ahead, around, in_first_camera, sideways, turning

from spark3r_ros.camera import distort_points
from spark3r_ros.config import RefineConfig
from spark3r_ros.frame import CameraModel
from spark3r_ros.geometry import inverse, make_T, rotation_angle, so3_exp, so3_log, transform
from spark3r_ros.refine import DepthPrior, RefinedWindow, Refiner, TrackedPose
from spark3r_ros.refine import pose as pose_module
from spark3r_ros.refine import refiner as refiner_module
from spark3r_ros.tracks import LateMatches, Tracks

CAMERA = CameraModel(WIDTH, HEIGHT, K)
EVERY = 2  # frames from one keyframe to the next
WINDOW = 6  # keyframes of a window


@dataclass(eq=False)
class Stream:
    """A refiner that was fed, and what it said."""

    refiner: Refiner
    truth: np.ndarray
    poses: dict[int, TrackedPose | None] = field(default_factory=dict)  # by frame
    windows: list[RefinedWindow] = field(default_factory=list)


def run(world: World, truth, camera=CAMERA, settings=None, network=None, depths=None, tracks=None, **quality) -> Stream:
    """Every second frame is a keyframe, every window has WINDOW of them and shares half with the one before."""
    stream = Stream(Refiner(RefineConfig(**(settings or {})), WIDTH, HEIGHT, camera), truth)
    refiner, keyframes = stream.refiner, []
    for frame, T in enumerate(truth):
        seen = world.tracks(T, frame, **quality) if tracks is None else tracks(frame)
        stream.poses[frame] = refiner.track(seen)
        if frame % EVERY:
            continue
        refiner.add_keyframe(frame, seen)
        keyframes.append(frame)
        if len(keyframes) == WINDOW:
            T_network = network(keyframes) if network and not refiner.is_initialised else None
            given = {i: depths(i) for i in keyframes} if depths else None
            window = refiner.solve(keyframes, T_network, given)
            if window is not None:
                stream.windows.append(window)
            keyframes = keyframes[WINDOW // 2 :]
    return stream


def keyframe_poses(stream: Stream) -> tuple[np.ndarray, np.ndarray]:
    """Estimated and true [N, 4, 4], both relative to the first keyframe, the scale of the estimate corrected."""
    ids = [i for i in range(0, len(stream.truth), EVERY) if stream.refiner.pose(i) is not None]
    estimate = in_first_camera(np.stack([stream.refiner.pose(i) for i in ids]))
    truth = in_first_camera(stream.truth[ids])
    return scaled_to(estimate, truth), truth


def scaled_to(estimate, truth):
    moved = estimate.copy()
    a, b = estimate[:, :3, 3].ravel(), truth[:, :3, 3].ravel()
    moved[:, :3, 3] *= (a @ b) / max(a @ a, 1e-12)
    return moved


def errors(estimate, truth) -> tuple[float, float]:
    """Largest error of position, in the units of the truth, and of rotation, in degrees."""
    R = np.swapaxes(estimate[:, :3, :3], 1, 2) @ truth[:, :3, :3]
    return (
        float(np.linalg.norm(estimate[:, :3, 3] - truth[:, :3, 3], axis=1).max()),
        float(np.degrees(rotation_angle(R)).max()),
    )


@pytest.fixture(scope="module")
def walk() -> Stream:
    """Past a scene, without network."""
    return run(ahead(500, nearest=2.5), sideways(24, step=0.05, turn_deg=0.4))


def test_the_map_starts_with_the_first_window(walk):
    before = range(EVERY * (WINDOW - 1) + 1)
    assert all(walk.poses[frame] is None for frame in before)
    assert all(walk.poses[frame].is_reliable for frame in range(before.stop, len(walk.truth)))
    assert walk.refiner.is_initialised
    assert walk.windows[0].start.split()[0] in ("essential", "homography", "rotation")
    assert [w.start for w in walk.windows[1:]] == ["map"] * (len(walk.windows) - 1)
    assert len(walk.windows) == 3
    assert walk.windows[1].keyframe_ids == (6, 8, 10, 12, 14, 16)


def test_keyframes_are_exact_to_the_noise(walk):
    metres, degrees = errors(*keyframe_poses(walk))
    assert metres < 0.012  # of 1.2 m, 4 m from the scene: 0.2 px of noise are 1.6 mm there
    assert degrees < 0.1


def test_frames_in_between_are_as_exact_as_their_covariance_says(walk):
    first = walk.refiner.pose(0)
    frames = [i for i, pose in walk.poses.items() if pose is not None]
    estimate = np.stack([inverse(first) @ walk.poses[i].T_world_camera for i in frames])
    truth = in_first_camera(walk.truth)[frames]
    scale = scaled_to(estimate, truth)
    metres, degrees = errors(scale, truth)
    assert metres < 0.015
    assert degrees < 0.12
    for pose in (walk.poses[i] for i in frames):
        np.testing.assert_allclose(pose.covariance, pose.covariance.T)
        assert (np.linalg.eigvalsh(pose.covariance) > 0).all()
        assert pose.num_inliers > 100
        assert 0.1 < pose.residual_px < 0.5


def test_the_covariance_covers_the_error_of_tracking(walk):
    """Noise of one frame only: many draws of it against the same map scatter as the covariance says."""
    world = ahead(500, nearest=2.5)
    frame = len(walk.truth) - 2
    poses = [walk.refiner.track(World(world.xyz, seed).tracks(walk.truth[frame], frame)) for seed in range(10, 50)]
    middle = poses[0].T_world_camera
    drawn = []
    for pose in poses:
        difference = inverse(middle) @ pose.T_world_camera
        drawn.append(np.concatenate([difference[:3, 3], so3_log(difference[:3, :3])]))
    said = np.sqrt(np.diag(np.mean([pose.covariance for pose in poses], axis=0)))
    ratio = np.std(drawn, axis=0) / said
    assert (ratio > 0.2).all()  # a map's own error is part of what is said
    assert (ratio < 1.5).all()


def test_tracking_does_not_move_the_map(walk):
    """Frames from before the first window are posed afterwards, as often as wanted."""
    before = walk.refiner.pose(0).copy(), walk.refiner.num_landmarks
    world = ahead(500, nearest=2.5)
    poses = [walk.refiner.track(world.tracks(walk.truth[3], 3)) for _ in range(2)]
    assert (poses[0].T_world_camera == poses[1].T_world_camera).all()
    assert poses[0].is_reliable
    assert (walk.refiner.pose(0) == before[0]).all()
    assert walk.refiner.num_landmarks == before[1]
    between = inverse(walk.refiner.pose(2)) @ poses[0].T_world_camera
    assert np.degrees(rotation_angle(between[:3, :3].T @ (inverse(walk.truth[2]) @ walk.truth[3])[:3, :3])) < 0.1


def test_a_fast_turn_is_taken_from_the_points(walk, monkeypatch):
    """20 degrees from one frame to the next: too far for the adjustment alone, without a search among samples."""
    monkeypatch.setattr(pose_module, "sample_consensus", lambda *_: None)
    world, frame = ahead(500, nearest=2.5), len(walk.truth) - 1
    T_before = walk.refiner.track(world.tracks(walk.truth[frame], frame)).T_world_camera
    turn = make_T(so3_exp(np.radians([4.0, 20.0, -3.0])), np.zeros(3))
    turned = walk.refiner.track(world.tracks(walk.truth[frame] @ turn, frame + 1), T_before)
    assert turned.is_reliable
    R = (inverse(T_before @ turn) @ turned.T_world_camera)[:3, :3]
    assert np.degrees(rotation_angle(R)) < 0.2


def test_a_camera_does_not_jump_by_the_distance_of_the_scene(walk):
    """Points that say so were taken for others, or the guess is wrong: either way nobody should trust the pose."""
    world, frame = ahead(500, nearest=2.5), len(walk.truth) - 1
    seen = world.tracks(walk.truth[frame], frame)
    T = walk.refiner.track(seen).T_world_camera
    near, far = (walk.refiner.track(seen, T @ make_T(np.eye(3), np.array([x, 0, 0]))) for x in (0.1, 20.0))
    assert near.is_reliable
    assert not far.is_reliable
    assert far.covariance[0, 0] > 0.01


def test_an_adjustment_that_throws_a_camera_away_is_not_taken(monkeypatch):
    world, truth = ahead(500, nearest=2.5), sideways(2 * EVERY * WINDOW)
    refiner = run(world, truth[: EVERY * WINDOW]).refiner
    number = EVERY * WINDOW
    seen = world.tracks(truth[number], number)
    tracked = refiner.track(seen)
    adjust = refiner_module.adjust

    def wild(*args):
        solution = adjust(*args)
        return replace(solution, T_world_camera=solution.T_world_camera + make_T(np.zeros((3, 3)), [20.0, 0, 0]))

    monkeypatch.setattr(refiner_module, "adjust", wild)
    before = refiner.pose(number - EVERY)
    refiner.add_keyframe(number, seen, tracked)
    assert (refiner.pose(number) == tracked.T_world_camera).all()
    assert (refiner.pose(number - EVERY) == before).all()


def test_windows_report_what_they_know(walk):
    for window in walk.windows:
        assert window.T_world_camera.shape == (WINDOW, 4, 4)
        assert 0.05 < window.residual_px < 0.5
        assert window.parallax_deg > 3.0
        assert 0.5 < window.confidence < 1.0
        np.testing.assert_array_equal(window.depth_scale, 1.0)
        assert len(window.xyz) > 100
    last = walk.windows[-1]
    for i, T in zip(last.keyframe_ids, last.T_world_camera):
        np.testing.assert_array_equal(T, walk.refiner.pose(i))


def test_without_a_network_the_first_keyframe_is_the_origin_and_the_median_depth_one(walk):
    first = walk.windows[0]
    np.testing.assert_allclose(first.T_world_camera[0], np.eye(4), atol=1e-9)
    assert np.median(first.xyz[:, 2]) == pytest.approx(1.0, abs=0.1)


def test_a_known_camera_is_honoured(walk):
    np.testing.assert_array_equal(walk.refiner.K, K)
    assert all((window.K == K).all() for window in walk.windows)


def test_the_same_tracks_give_the_same_bits(walk):
    again = run(ahead(500, nearest=2.5), walk.truth[:14])
    assert (again.windows[0].T_world_camera == walk.windows[0].T_world_camera).all()
    assert (again.windows[0].xyz == walk.windows[0].xyz).all()
    for i in range(11, 14):
        assert (again.poses[i].T_world_camera == walk.poses[i].T_world_camera).all()
        assert (again.poses[i].covariance == walk.poses[i].covariance).all()


@pytest.mark.parametrize("step", [0.0, 0.01, 0.03])
@pytest.mark.parametrize("prior", ["no depth", "flat depth"])
def test_turns_keep_their_size(step, prior):
    """Regression: depth priors outweighed the tracks, and cameras that turn came out up to 3% short."""
    truth = turning(20, 1.5, step)
    flat = DepthPrior(np.full((60, 80), 4.0), np.full((60, 80), 0.2), scaled_camera(80))
    depths = (lambda i: flat) if prior == "flat depth" else None
    stream = run(around(2500), truth, depths=depths, noise_px=0.2)
    last = max(i for i in range(0, len(truth), EVERY))
    between = (inverse(stream.refiner.pose(0)) @ stream.refiner.pose(last))[:3, :3]
    wanted = (inverse(truth[0]) @ truth[last])[:3, :3]
    assert rotation_angle(between) == pytest.approx(rotation_angle(wanted), rel=0.01)
    online = inverse(stream.refiner.pose(0)) @ stream.poses[len(truth) - 1].T_world_camera
    assert rotation_angle(online[:3, :3]) == pytest.approx(np.radians(1.5) * (len(truth) - 1), rel=0.01)
    if step == 0:  # regression: a frame without a guess was fitted from a keyframe's pose, and ran away by many depths
        assert np.ptp([T[:3, 3] for T in map(stream.refiner.pose, range(0, len(truth), EVERY))], axis=0).max() < 0.1


def scaled_camera(width):
    small = K.copy()
    small[:2] *= width / WIDTH
    return small


def test_a_pure_rotation_claims_no_translation():
    stream = run(around(2500), turning(14, 1.5))
    window = stream.windows[0]
    assert window.confidence < 0.1
    assert window.parallax_deg < 1.0
    moved = np.linalg.norm(window.T_world_camera[:, :3, 3] - window.T_world_camera[0, :3, 3], axis=1)
    assert moved.max() < 0.03  # of the typical depth


def test_a_keyframe_that_moves_fast_is_believed_less():
    """Two of the keyframes are blurred; those that are told their speed do less harm to the others."""
    world, truth = around(1500), sideways(16)
    blurred = (4, 12)

    def error(speed: float) -> float:
        def tracks(frame):
            seen = world.tracks(truth[frame], frame, noise_px=2.5 if frame in blurred else 0.2)
            return replace(seen, motion=np.array([[0, 0, speed], [0, 0, 0.0]])) if frame in blurred else seen

        estimate, true = keyframe_poses(run(world, truth, tracks=tracks))
        sharp = [i for i in range(len(true)) if i * EVERY not in blurred]
        return errors(estimate[sharp], true[sharp])[0]

    told, untold = error(1200.0), error(0.0)
    assert told < 0.8 * untold
    assert told < 0.02


def test_outliers_among_the_tracks_are_survived():
    stream = run(ahead(500, nearest=2.5), sideways(18, step=0.05, turn_deg=0.4), outliers=0.15)
    metres, degrees = errors(*keyframe_poses(stream))
    assert metres < 0.02
    assert degrees < 0.15


def test_world_and_scale_are_those_of_the_network_of_the_first_window():
    world, truth = ahead(500, nearest=2.5), sideways(18, step=0.05, turn_deg=0.4)
    placed = make_T(so3_exp(np.array([0.2, -0.5, 1.0])), np.array([3.0, 1.0, -2.0]))
    stream = run(world, truth, network=lambda ids: placed @ truth[ids])
    ids = range(0, len(truth), EVERY)
    estimate = np.stack([stream.refiner.pose(i) for i in ids])
    metres, degrees = errors(estimate, placed @ truth[::EVERY])
    assert metres < 0.05
    assert degrees < 0.1
    np.testing.assert_allclose(stream.windows[0].T_world_camera[0], placed, atol=1e-9)


def depth_image(world: World, T: np.ndarray, factor: float) -> DepthPrior:
    """The nearest point's depth at every pixel of a small image, times an unknown factor."""
    small = scaled_camera(64)
    ids, uv = world.seen(T)
    z = transform(inverse(T), world.xyz[ids])[:, 2]
    grid = np.stack(np.meshgrid(np.arange(64), np.arange(48)), axis=-1).reshape(-1, 1, 2)
    place = (uv - K[:2, 2]) * (small[0, 0] / K[0, 0]) + small[:2, 2]
    nearest = ((grid - place) ** 2).sum(axis=2).argmin(axis=1)
    return DepthPrior(factor * z[nearest].reshape(48, 64), np.full((48, 64), 0.1), small)


def test_depths_give_the_scale_and_get_their_own_corrected():
    world, truth = ahead(300, nearest=2.5), sideways(18, step=0.05, turn_deg=0.4)
    factor = dict.fromkeys(range(12), 1.0) | dict.fromkeys(range(12, 18), 1.3)  # later windows: a network that drifts
    stream = run(world, truth, depths=lambda i: depth_image(world, truth[i], factor[i]))
    estimate = in_first_camera(np.stack([stream.refiner.pose(i) for i in range(0, len(truth), EVERY)]))
    length, wanted = (np.linalg.norm(T[-1, :3, 3]) for T in (estimate, in_first_camera(truth[::EVERY])))
    assert length == pytest.approx(wanted, rel=0.03)
    last = stream.windows[-1]
    for i, scale in zip(last.keyframe_ids, last.depth_scale):
        assert scale * factor[i] == pytest.approx(1.0, rel=0.04)


def test_a_network_that_is_sure_outweighs_a_little_parallax_and_one_that_is_not_does_not():
    world, truth = ahead(300, nearest=2.5), sideways(18, step=0.002)

    def relief(error: float) -> float:
        flat = DepthPrior(np.full((60, 80), 4.0), np.full((60, 80), error), scaled_camera(80))
        window = run(world, truth, depths=lambda i: flat, noise_px=0.3).windows[0]
        z = transform(inverse(window.T_world_camera[0]), window.xyz)[:, 2]
        return float(np.std(np.log(z[z > 0])))

    assert relief(0.01) < 0.7 * relief(10.0)


@pytest.mark.parametrize("factor", [0.8, 1.3])
def test_an_unknown_focal_length_is_found_and_then_locked(factor):
    """The first guess is 0.85 of the width; the real one is a factor of it."""
    real = K.copy()
    real[[0, 1], [0, 1]] = 0.85 * WIDTH * factor
    world = around(2500)
    truth = turning(30, 2.0, step=0.06)

    def tracks(frame):
        ids, uv = world.seen(truth[frame], real)
        noise = np.random.default_rng(frame).normal(0, 0.2, uv.shape)
        return Tracks(ids, uv + noise, 0.0, 1.0, np.zeros((2, 3)))

    stream = run(world, truth, camera=None, tracks=tracks)
    found = [window.K[0, 0] / real[0, 0] for window in stream.windows]
    assert abs(found[-1] - 1) < 0.01
    assert (stream.windows[-1].K == stream.windows[-2].K).all()
    assert stream.refiner.K[0, 0] == stream.refiner.K[1, 1]
    metres, degrees = errors(*keyframe_poses(stream))
    assert degrees < 0.01 * 57
    assert metres < 0.05


def test_lens_distortion_of_a_known_camera_is_taken_out():
    camera = CameraModel(WIDTH, HEIGHT, K, "plumb_bob", (-0.2, 0.05, 0.001, -0.001))
    world, truth = ahead(500, nearest=2.5), sideways(14, step=0.05, turn_deg=0.4)

    def tracks(frame):
        seen = world.tracks(truth[frame], frame)
        return Tracks(seen.ids, distort_points(camera, seen.uv), 0.0, 1.0, seen.motion)

    metres, degrees = errors(*keyframe_poses(run(world, truth, camera=camera, tracks=tracks)))
    assert metres < 0.012
    assert degrees < 0.1


def test_the_map_is_bounded_and_tracking_goes_on():
    truth = turning(40, 4.0, step=0.03)
    stream = run(around(2500), truth, settings={"max_keyframes": 6})
    kept = [i for i in range(0, len(truth), EVERY) if stream.refiner.pose(i) is not None]
    assert kept == list(range(28, 40, 2))
    seen = np.unique(np.concatenate([around(2500).seen(truth[i])[0] for i in kept]))
    assert stream.refiner.num_landmarks <= len(seen)
    assert all(stream.poses[i].is_reliable for i in range(12, len(truth)))
    relative = inverse(stream.refiner.pose(28)) @ stream.refiner.pose(38)
    assert np.degrees(rotation_angle(relative[:3, :3])) == pytest.approx(40.0, rel=0.01)


def test_a_lone_observation_has_a_depth_that_nobody_should_trust():
    """New points of a single keyframe get their neighbours' depth with a wide sigma, then their own."""
    world, truth = ahead(500, nearest=2.5), sideways(16, step=0.05, turn_deg=0.4)
    stream = run(world, truth[:12])
    refiner, table = stream.refiner, stream.refiner._table
    fresh = ahead(40, seed=7, nearest=2.5)
    both = World(np.concatenate([world.xyz, fresh.xyz]))
    refiner.add_keyframe(12, both.tracks(truth[12], 12))
    lone = np.arange(500, 540)
    rows, found = table.find(lone)
    assert found.sum() > 20
    assert (table.depth_sigma[rows[found]] > 0.5).all()
    depth = np.abs((table.xyz[rows[found]] - refiner.pose(12)[:3, 3]) @ refiner.pose(12)[:3, 2])
    typical = np.median(table.xyz[:, 2])
    assert ((depth > 0.3 * typical) & (depth < 3 * typical)).all()
    for frame in (14, 15):
        refiner.add_keyframe(frame, both.tracks(truth[frame], frame))
    refiner.solve([8, 10, 12, 14, 15])
    rows, found = table.find(lone)
    assert np.median(table.depth_sigma[rows[found]]) < 0.2


def test_late_matches_join_their_keyframe():
    world, truth = ahead(400, nearest=2.5), sideways(14, step=0.05, turn_deg=0.4)
    stream = run(world, truth[:12])
    refiner = stream.refiner
    old = refiner._keyframes[10]
    extra = ahead(30, seed=8, nearest=2.5)
    ids, uv = extra.seen(truth[10])
    late = LateMatches(10, ids.astype(np.int64) + 1000, uv)
    seen = world.tracks(truth[12], 12)
    before = len(old.ids)
    refiner.track(Tracks(seen.ids, seen.uv, 0.0, 1.0, seen.motion, (late, LateMatches(77, late.ids, late.uv))))
    assert len(old.ids) == before + len(ids)
    assert (np.diff(old.ids) > 0).all()
    assert refiner._table.find(late.ids)[1].all()


def test_a_frame_that_shares_nothing_has_no_pose():
    stream = run(ahead(500, nearest=2.5), sideways(12, step=0.05, turn_deg=0.4))
    strange = Tracks(np.arange(5000, 5050), np.full((50, 2), 100.0), 0.0, 0.0, np.zeros((2, 3)))
    assert stream.refiner.track(strange) is None
    guess = sideways(12)[11]
    guessed = stream.refiner.track(strange, guess)
    assert not guessed.is_reliable
    np.testing.assert_allclose(guessed.T_world_camera, guess, atol=1e-9)
    assert np.sqrt(guessed.covariance[0, 0]) > 0.5  # half of the typical depth


def test_few_points_give_a_rotation_and_say_that_the_rest_is_a_guess():
    world, truth = ahead(500, nearest=2.5), sideways(14, step=0.05, turn_deg=0.4)
    stream = run(world, truth[:12])
    few = world.tracks(truth[12], 12, limit=9)
    pose = stream.refiner.track(few)
    assert not pose.is_reliable
    assert np.isnan(pose.residual_px)
    assert pose.covariance[3, 3] < 0.01 < pose.covariance[0, 0]


def test_errors_name_what_is_wrong():
    world, truth = ahead(300, nearest=2.5), sideways(14, step=0.05)
    stream = run(world, truth[:12])
    with pytest.raises(ValueError, match="keyframe ids must grow, got 10 after 10"):
        stream.refiner.add_keyframe(10, world.tracks(truth[10], 10))
    with pytest.raises(KeyError):
        stream.refiner.solve([8, 99])


def test_any_frame_can_be_located_and_the_next_one_does_not_notice():
    world, truth = ahead(500, nearest=2.5), sideways(16, step=0.05, turn_deg=0.4)
    with pytest.raises(RuntimeError, match="call solve first"):
        Refiner(RefineConfig(), WIDTH, HEIGHT, CAMERA).locate(world.tracks(truth[3], 3), np.eye(4))
    plain, other = (run(world, truth[:14]) for _ in range(2))
    assert plain.refiner.pose(2) is not None
    found = other.refiner.locate(world.tracks(truth[3], 3), other.refiner.pose(2))
    assert found.is_reliable
    assert np.allclose(found.T_world_camera[:3, :3], (inverse(truth[0]) @ truth[3])[:3, :3], atol=0.005)
    seen = world.tracks(truth[14], 14)
    guess = plain.poses[13].T_world_camera
    assert np.array_equal(
        plain.refiner.track(seen, guess).T_world_camera, other.refiner.track(seen, guess).T_world_camera
    )


def test_too_few_tracks_make_no_map():
    stream = run(ahead(6), sideways(14, step=0.05))
    assert stream.windows == []
    assert not stream.refiner.is_initialised
    assert stream.refiner.num_landmarks == 0
    assert all(pose is None for pose in stream.poses.values())


def test_what_comes_while_a_window_is_adjusted_follows_it():
    """Keyframes, their points and late matches; and the map is as consistent as if the window had been solved first."""
    world, truth = ahead(500, nearest=2.5), sideways(22, step=0.05, turn_deg=0.4)
    first, second = ahead(40, seed=7, nearest=2.5), ahead(30, seed=8, nearest=2.5)
    both = World(np.concatenate([world.xyz, first.xyz]))
    refiner = run(world, truth[:16]).refiner
    pending = refiner.begin([6, 8, 10, 12, 14])
    solution = pending.adjust()
    shift = make_T(np.eye(3), [0.02, -0.01, 0.03])
    solution = replace(  # as if much had been found wrong
        solution, T_world_camera=shift @ solution.T_world_camera, xyz=solution.xyz + shift[:3, 3]
    )
    ids, uv = second.seen(truth[14])
    late = (LateMatches(14, ids.astype(np.int64) + 1000, uv),)
    for frame in (16, 18):
        seen = both.tracks(truth[frame], frame)
        refiner.add_keyframe(frame, replace(seen, late=late), refiner.track(seen))
    lone = refiner._table.anchor > 14
    assert lone.sum() > 20
    before = {i: refiner.pose(i) for i in (14, 16, 18)}
    xyz, numbers = refiner._table.xyz[lone], refiner._table.ids[lone]
    window = refiner.end(pending, solution)
    np.testing.assert_array_equal(window.T_world_camera[-1], refiner.pose(14))
    assert np.linalg.norm(refiner.pose(14)[:3, 3] - before[14][:3, 3]) > 0.02
    for i in (16, 18):
        kept = inverse(before[14]) @ before[i]
        np.testing.assert_allclose(inverse(refiner.pose(14)) @ refiner.pose(i), kept, atol=1e-12)
    rows, found = refiner._table.find(np.setdiff1d(numbers, pending.assembled.ids))
    old = xyz[np.isin(numbers, refiner._table.ids[rows[found]])]
    here, there = (
        transform(inverse(T), p) for T, p in ((before[14], old), (refiner.pose(14), refiner._table.xyz[rows[found]]))
    )
    np.testing.assert_allclose(here, there, atol=1e-12)
    pose = refiner.track(both.tracks(truth[20], 20), refiner.pose(18))
    assert pose.is_reliable
    step = inverse(refiner.pose(18)) @ pose.T_world_camera
    true_step = inverse(truth[18]) @ truth[20]
    assert rotation_angle(step[:3, :3].T @ true_step[:3, :3]) < 0.003


def test_outliers_of_a_window_are_flagged_by_their_numbers():
    """A keyframe may have got more points since the window was begun."""
    world, truth = ahead(400, nearest=2.5), sideways(14, step=0.05, turn_deg=0.4)
    refiner = run(world, truth[:12]).refiner
    pending = refiner.begin([4, 6, 8, 10])
    solution = pending.adjust()
    problem, last = pending.assembled.problem, len(pending.assembled.keyframes) - 1
    worst = np.flatnonzero(problem.camera == last)[:20]
    residual = solution.residual_px.copy()
    residual[worst] = 50.0
    keyframe = refiner._keyframes[10]
    keyframe.add(np.arange(-30, 0), np.zeros((30, 2)), np.zeros((30, 2)))
    refiner.end(pending, replace(solution, residual_px=residual))
    flagged = keyframe.ids[~keyframe.good]
    assert set(pending.assembled.ids[problem.point[worst]]) <= set(flagged)
    assert (flagged >= 0).all()


def test_a_keyframe_may_be_adjusted_with_the_next_one():
    world, truth = ahead(500, nearest=2.5), sideways(22, step=0.05, turn_deg=0.4)
    refiner = run(world, truth[:14]).refiner
    seen = world.tracks(truth[14], 14)
    tracked = refiner.track(seen)
    left = refiner.add_keyframe(14, seen, tracked, adjust=False)
    np.testing.assert_array_equal(left.T_world_camera, tracked.T_world_camera)
    assert refiner.pose(14) is not None
    refiner.add_keyframe(16, world.tracks(truth[16], 16))
    assert not np.array_equal(refiner.pose(14), tracked.T_world_camera)
    np.testing.assert_allclose(refiner.pose(14), tracked.T_world_camera, atol=0.02)


def test_a_turn_needs_no_map():
    world, truth = ahead(300, nearest=2.5), turning(4, 0.4)
    refiner = Refiner(RefineConfig(), WIDTH, HEIGHT, CAMERA)
    refiner.add_keyframe(0, world.tracks(truth[0], 0))
    T = refiner.turned(0, world.tracks(truth[3], 3))
    assert not refiner.is_initialised
    np.testing.assert_array_equal(T[:3, 3], 0.0)
    assert np.degrees(rotation_angle(T[:3, :3].T @ (inverse(truth[0]) @ truth[3])[:3, :3])) < 0.05
    nothing = Tracks(np.zeros(0, np.int64), np.zeros((0, 2)), np.inf, 0.0, np.zeros((2, 3)))
    np.testing.assert_array_equal(refiner.turned(0, nothing), np.eye(4))
