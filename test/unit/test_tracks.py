"""Feature tracks on rendered frames: they are where the points really are, and wrong ones are thrown away."""

from dataclasses import dataclass

import cv2
import numpy as np
import pytest

from spark3r_ros.config import RefineConfig
from spark3r_ros.geometry import inverse, make_T, project, so3_exp, transform
from spark3r_ros.tracks import FeatureTracker, Tracks, _turned
from training.scenes import Scene, camera_matrix
from training.textures import texture_bank

WIDTH, HEIGHT = 320, 240
K = camera_matrix(WIDTH, HEIGHT, 65.0)
CONFIG = RefineConfig(features=300)


@dataclass(frozen=True, eq=False)
class Views:
    gray: np.ndarray  # [N, H, W]
    depth: np.ndarray  # [N, H, W]
    T_world_camera: np.ndarray  # [N, 4, 4]

    def moved(self, uv: np.ndarray, a: int, b: int) -> tuple[np.ndarray, np.ndarray]:
        """Where view b shows what view a has at uv [N, 2], and whether nothing hides it there [N] bool."""
        column, row = np.rint(uv).astype(int).T
        rays = np.concatenate([(uv - K[:2, 2]) / np.diag(K)[:2], np.ones((len(uv), 1))], axis=1)
        local = transform(
            inverse(self.T_world_camera[b]) @ self.T_world_camera[a], rays * self.depth[a][row, column, None]
        )
        there = project(local, K)
        inside = (local[:, 2] > 0) & (there >= 0).all(axis=1) & (there <= [WIDTH - 1, HEIGHT - 1]).all(axis=1)
        cell = np.rint(there).clip(0, [WIDTH - 1, HEIGHT - 1]).astype(int)
        return there, inside & (np.abs(self.depth[b][cell[:, 1], cell[:, 0]] / local[:, 2] - 1) < 0.03)


def render(poses, seed=3) -> Views:
    scene = Scene(seed, "room", texture_bank(8, seed=5))
    images = [scene.render(T, K, WIDTH, HEIGHT) for T in poses]
    gray = np.stack([cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY) for rgb, _ in images])
    return Views(gray, np.stack([depth for _, depth in images]).astype(float), np.stack(poses))


def path(num_frames, step_m, turn_deg) -> list[np.ndarray]:
    i = np.arange(num_frames)[:, None]
    level = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])  # looks along the world's y, image down is -z
    turn = so3_exp(np.radians(turn_deg) * i * np.array([0.1, 1.0, 0.05]))
    return list(make_T(level @ turn, np.array([0.0, -0.8, 0.0]) + step_m * i * np.array([1.0, 0.1, 0.05])))


@pytest.fixture(scope="module")
def walk() -> Views:
    return render(path(10, 0.02, 0.8))


@pytest.fixture(scope="module")
def followed(walk) -> list[Tracks]:
    return follow(walk)


def follow(views, config=CONFIG, **options) -> list[Tracks]:
    """The first frame is the keyframe."""
    tracker = FeatureTracker(config)
    tracker.track(views.gray[0], 0 if options else None)
    first = tracker.set_keyframe(0)
    step = options.get("interval_ns", 0)
    return [first, *(tracker.track(gray, i * step if step else None) for i, gray in enumerate(views.gray[1:], 1))]


def tracked_errors(views, first, tracks, frame) -> tuple[np.ndarray, np.ndarray]:
    """Pixels between tracks of a frame and the truth [N], and whether the true place is visible [N]."""
    _, here, there = np.intersect1d(tracks.ids, first.ids, return_indices=True)
    true, visible = views.moved(first.uv[there], 0, frame)
    return np.linalg.norm(tracks.uv[here] - true, axis=1), visible


def test_tracks_are_where_the_points_are(walk, followed):
    assert len(followed[0].ids) > 150
    for frame in (1, 5, 9):
        error, visible = tracked_errors(walk, followed[0], followed[frame], frame)
        assert np.median(error[visible]) < 0.15
        assert (error[visible] < 1.0).mean() > 0.95
    assert followed[9].survival > 0.5


def test_errors_do_not_add_up(walk, followed):
    late = np.median(tracked_errors(walk, followed[0], followed[9], 9)[0])
    early = np.median(tracked_errors(walk, followed[0], followed[2], 2)[0])
    assert late < early + 0.1


def test_numbers_ascend_and_the_summary_is_of_the_last_keyframe(walk, followed):
    for tracks in followed:
        assert (np.diff(tracks.ids) > 0).all()
        assert len(tracks.uv) == len(tracks.ids)
    first, last = followed[0], followed[-1]
    _, here, there = np.intersect1d(last.ids, first.ids, return_indices=True)
    assert last.flow_px == pytest.approx(np.median(np.linalg.norm(last.uv[here] - first.uv[there], axis=1)))
    assert last.survival == pytest.approx(len(here) / len(first.ids))
    assert first.flow_px == 0.0
    assert first.survival == 1.0


def test_before_the_first_keyframe_there_is_no_flow(walk):
    tracks = FeatureTracker(CONFIG).track(walk.gray[0])
    assert len(tracks.ids) == 0
    assert np.isnan(tracks.flow_px)


def test_corners_are_spread_and_bounded(followed):
    uv = followed[0].uv
    assert len(uv) <= 4 / 3 * CONFIG.features + 48  # 48 cells, each rounded up
    cells = np.unique((uv * [8 / WIDTH, 6 / HEIGHT]).astype(int) @ [1, 8])
    assert len(cells) > 24  # of 48
    distance = np.linalg.norm(uv[:, None] - uv[None], axis=2) + 1e3 * np.eye(len(uv))
    assert distance.min() >= 5


def test_there_are_more_points_where_frames_come_slowly(walk):
    counts = []
    for seconds in (0.1, 0.6, 1.0):
        tracker = FeatureTracker(RefineConfig(features=150))
        tracker.track(walk.gray[0], 0)
        tracker.set_keyframe(0)
        for tenth in range(1, 6) if seconds == 0.6 else ():  # frames come fast, keyframes do not
            tracker.track(walk.gray[1], tenth * 10**8)
        tracker.track(walk.gray[1], round(seconds * 1e9))
        tracker._put(np.zeros(0, np.int64), np.zeros((0, 2)))  # the whole image is empty
        counts.append(len(tracker.set_keyframe(1).ids))
    assert 100 < counts[0] <= 150 + 48
    assert counts[1] == counts[2] > 1.2 * counts[0]


def test_points_that_vanish_are_dropped_by_the_check_backwards(walk):
    """Half of the image is painted over: its tracks must not live on somewhere else."""
    tracker = FeatureTracker(CONFIG)
    tracker.track(walk.gray[0])
    first = tracker.set_keyframe(0)
    covered = walk.gray[1].copy()
    covered[:, : WIDTH // 2] = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH // 2))
    tracks = tracker.track(covered)
    true, _ = walk.moved(first.uv, 0, 1)
    gone = first.ids[true[:, 0] < WIDTH // 2 - 12]
    kept = first.ids[true[:, 0] > WIDTH // 2 + 40]  # nearer ones are disturbed on the pyramid's coarse levels
    assert np.isin(gone, tracks.ids).mean() < 0.05
    assert np.isin(kept, tracks.ids).mean() > 0.8


def test_a_standing_camera_keeps_its_points(walk):
    tracks = follow(Views(np.repeat(walk.gray[:1], 4, axis=0), walk.depth, walk.T_world_camera))
    np.testing.assert_allclose(tracks[-1].uv, tracks[0].uv, atol=0.02)
    assert tracks[-1].survival > 0.98
    assert tracks[-1].flow_px < 0.02


def test_a_new_keyframe_fills_the_empty_part_with_new_numbers(walk):
    tracker = FeatureTracker(CONFIG)
    tracker.track(walk.gray[0])
    first = tracker.set_keyframe(0)
    for gray in walk.gray[1:]:
        seen = tracker.track(gray)
    second = tracker.set_keyframe(1)
    assert np.isin(seen.ids, second.ids).all()
    fresh = second.ids[~np.isin(second.ids, seen.ids)]
    assert len(fresh) > 10
    assert fresh.min() > first.ids.max()
    assert second.flow_px == 0.0


def test_a_wide_baseline_is_bridged_by_descriptors(walk):
    """From the first to the last frame in one step, further than corners can be followed."""
    views = render([path(1, 0, 0)[0], *(T for T in path(3, 0.35, 14.0)[1:2])])
    tracks = follow(views)[1]
    assert len(tracks.late) == 1
    late = tracks.late[0]
    assert late.keyframe_id == 0
    _, here, there = np.intersect1d(tracks.ids, late.ids, return_indices=True)
    true, visible = views.moved(late.uv[there], 0, 1)
    error = np.linalg.norm(tracks.uv[here] - true, axis=1)
    assert len(here) >= 25
    assert np.median(error[visible]) < 0.7
    assert (error < 3.0).mean() > 0.85
    assert 30 < tracks.flow_px < np.inf
    assert 0.0 < tracks.survival < 1.0


def test_a_fast_camera_finds_its_points_again():
    """After an image that showed nothing: from the keyframe, where corners say, and without new numbers."""
    views = render([path(1, 0, 0)[0], *(T for T in path(3, 0.1, 14.0)[1:2])])
    blank = np.full_like(views.gray[0], 128)
    tracker = FeatureTracker(CONFIG)
    tracker.track(views.gray[0], 10**18)
    first = tracker.set_keyframe(0)
    assert len(tracker.track(blank, 10**18 + 10**8).ids) == 0
    tracks = tracker.track(views.gray[1], 10**18 + 2 * 10**8)
    error, visible = tracked_errors(views, first, tracks, 1)
    assert tracks.survival > 0.5
    assert np.isin(tracks.ids, first.ids).all()
    assert np.median(error[visible]) < 0.3
    assert (error[visible] < 1.5).mean() > 0.9
    assert not tracks.late


def test_patches_are_turned_as_the_image_was(monkeypatch):
    """A camera that rolls by 1.5 degrees an image and comes closer."""
    i = np.arange(9)[:, None]
    roll = so3_exp(np.radians(1.5) * i * np.array([0.0, 0.0, 1.0]))
    start = path(1, 0, 0)[0]
    views = render([start @ T for T in make_T(roll, 0.04 * i * np.array([0.0, 0.0, 1.0]))])
    tracks = follow(views)
    monkeypatch.setattr("spark3r_ros.tracks._TURNED", np.inf)
    as_they_were = follow(views)
    for frame in (5, 8):
        error, visible = tracked_errors(views, tracks[0], tracks[frame], frame)
        before, visible_before = tracked_errors(views, as_they_were[0], as_they_were[frame], frame)
        assert np.median(error[visible]) < 0.5 * np.median(before[visible_before])
        assert len(error) >= 0.95 * len(before)


def test_what_has_hardly_turned_is_left_as_it_was(walk):
    uv, gray = follow(walk)[0].uv, walk.gray[0]
    for H in (np.diag([1.02, 1.02, 1.0]), np.array([[1.0, 0, 30], [0, 1, -20], [0, 0, 1]])):
        image, there = _turned(gray, uv, cv2.perspectiveTransform(uv[:, None], H)[:, 0])
        assert image is gray
        assert there is uv
    H = np.array([[1.05, 0.0, 3.0], [0.0, 1.05, -4.0], [0.0, 0.0, 1.0]])
    wanted = cv2.perspectiveTransform(uv[:, None], H)[:, 0]
    image, there = _turned(gray, uv, wanted)
    assert np.allclose(there, wanted, atol=1e-3)
    x, y = np.rint(uv[len(uv) // 2]).astype(int)
    x1, y1 = np.rint(H[:2] @ (x, y, 1)).astype(int)
    assert abs(int(image[y1, x1]) - int(gray[y, x])) < 25
    assert _turned(gray, uv[:9], wanted[:9])[0] is gray  # too few to tell


def test_points_found_where_a_pattern_repeats_are_told_by_those_around_them(walk):
    tracker = FeatureTracker(CONFIG)
    tracker.track(walk.gray[0])
    first = tracker.set_keyframe(0)
    now = tracker.track(walk.gray[4])
    uv = first.uv[~np.isin(first.ids, now.ids)]
    uv = np.concatenate([uv, first.uv])  # points that were lost, and as many as there are
    there, visible = walk.moved(uv, 0, 4)
    alike = tracker._moves_alike(tracker._keyframes[-1], uv, there)
    assert alike[visible].mean() > 0.8
    shifted = tracker._moves_alike(tracker._keyframes[-1], uv, there + np.array([0.05 * WIDTH, 0.0]))
    assert shifted[visible].mean() < 0.05
    assert tracker._moves_alike(tracker._keyframes[-1], uv[:0], there[:0]).shape == (0,)


def test_points_of_an_earlier_keyframe_are_found_where_the_last_one_shows_none():
    views = render([path(1, 0, 0)[0], *(T for T in path(3, 0.1, 14.0)[1:2])])
    other = render([path(1, 0, 0)[0] @ make_T(so3_exp(np.array([0, np.pi, 0])), np.zeros(3))], seed=8)
    tracker = FeatureTracker(CONFIG)
    tracker.track(views.gray[0], 10**18)
    first = tracker.set_keyframe(0)
    tracker.track(other.gray[0], 10**18 + 10**8)
    tracker.set_keyframe(1)
    tracks = tracker.track(views.gray[1], 10**18 + 2 * 10**8)
    assert np.isin(first.ids, tracks.ids).mean() > 0.5


def test_late_matches_are_told_once():
    """The same points are found again by the next frame: their numbers are the same, the keyframe has them by now."""
    first, second = path(1, 0, 0)[0], path(3, 0.35, 14.0)[1]
    views = render([first, second, second])
    tracker = FeatureTracker(RefineConfig(features=300, min_survival=1.0))
    tracker.track(views.gray[0])
    tracker.set_keyframe(0)
    found = tracker.track(views.gray[1])
    again = tracker.track(np.roll(views.gray[2], 1, axis=1))
    told = np.concatenate([late.ids for late in found.late])
    repeated = np.concatenate([late.ids for late in again.late] or [np.zeros(0, np.int64)])
    assert len(told) >= 25
    assert not np.isin(told, repeated).any()
    assert np.isin(told, again.ids).mean() > 0.5


def test_an_unrelated_image_shares_no_points():
    views = render([path(1, 0, 0)[0]])
    other = render([path(1, 0, 0)[0] @ make_T(so3_exp(np.array([0, np.pi, 0])), np.zeros(3))], seed=8)
    tracker = FeatureTracker(CONFIG)
    tracker.track(views.gray[0])
    tracker.set_keyframe(0)
    tracks = tracker.track(other.gray[0])
    assert tracks.survival < 0.05
    assert len(tracks.late) == 0
    blank = tracker.track(np.full((HEIGHT, WIDTH), 128, np.uint8))
    assert len(blank.ids) == 0
    assert blank.flow_px == np.inf
    assert blank.survival == 0.0


@pytest.mark.parametrize("shape", [(16, 16), (16, 640), (640, 16), (100, 3000)])
def test_images_of_any_shape_are_tracked(shape):
    noise = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)
    tracker = FeatureTracker(CONFIG)
    for i in range(3):
        tracker.track(np.roll(cv2.GaussianBlur(noise, (0, 0), 1.5), i, axis=1), (i + 1) * 10**8)
        tracker.set_keyframe(i)
    assert tracker.track(255 - noise, 4 * 10**8).survival < 0.5


def test_a_blank_image_gives_no_points():
    tracker = FeatureTracker(CONFIG)
    tracker.track(np.full((HEIGHT, WIDTH), 128, np.uint8))
    assert len(tracker.set_keyframe(0).ids) == 0


def test_the_image_velocity_is_measured_with_stamps(walk, followed):
    tracks = follow(walk, interval_ns=50_000_000)[3]
    _, here, there = np.intersect1d(followed[3].ids, followed[2].ids, return_indices=True)
    speed = (followed[3].uv[here] - followed[2].uv[there]) / 0.05
    fitted = followed[3].uv[here] @ tracks.motion[:, :2].T + tracks.motion[:, 2]
    assert np.linalg.norm(speed, axis=1).mean() > 50
    assert np.median(np.linalg.norm(fitted - speed, axis=1)) < 0.2 * np.median(np.linalg.norm(speed, axis=1))
    assert tracks.speed == pytest.approx(np.median(np.linalg.norm(speed, axis=1)), rel=0.2)
    assert (followed[3].motion == 0).all()  # no stamps
    assert followed[3].speed == 0
    assert (follow(walk, interval_ns=1_000_000_000)[3].motion == 0).all()  # too far apart to be a velocity


def test_the_same_images_give_the_same_bits(walk, followed):
    for first, again in zip(followed, follow(walk)):
        np.testing.assert_array_equal(first.ids, again.ids)
        np.testing.assert_array_equal(first.uv, again.uv)
    views = render([path(1, 0, 0)[0], path(3, 0.35, 14.0)[1]])
    first, again = (follow(views)[1] for _ in range(2))
    np.testing.assert_array_equal(first.uv, again.uv)
    np.testing.assert_array_equal(first.late[0].ids, again.late[0].ids)


def test_errors_name_the_values(walk):
    tracker = FeatureTracker(CONFIG)
    with pytest.raises(RuntimeError, match="needs a tracked frame; call track first"):
        tracker.set_keyframe(0)
    with pytest.raises(ValueError, match=r"grey uint8 image, got float64 of shape \(240, 320\)"):
        tracker.track(walk.gray[0].astype(float))
    with pytest.raises(ValueError, match=r"grey uint8 image, got uint8 of shape \(240, 320, 3\)"):
        tracker.track(np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    tracker.track(walk.gray[0])
    with pytest.raises(ValueError, match=r"from \(240, 320\) to \(120, 160\); reset the tracker"):
        tracker.track(walk.gray[0][::2, ::2].copy())
