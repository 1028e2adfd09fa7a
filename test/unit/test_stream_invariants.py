"""What holds for every stream, with the shipped nano on rendered scenes: one pose per frame, stamps in order, a finite
pose or none that is trusted, and the same result whenever and wherever it is computed."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spark3r_ros import reconstructor as reconstructor_module
from spark3r_ros.backbone import load_backbone
from spark3r_ros.config import Config, with_values
from spark3r_ros.frame import CameraModel, Frame, FramePose, TrackingState
from spark3r_ros.geometry import rotation_angle
from spark3r_ros.reconstructor import MAX_GROWTH, NEAR_FRAMES, Reconstructor
from spark3r_ros.refine import PendingWindow
from spark3r_ros.solver import Solver
from spark3r_ros.windows import Support
from training.paths import camera_path
from training.scenes import Scene, camera_matrix

WIDTH, HEIGHT = 160, 120
K = camera_matrix(WIDTH, HEIGHT, 65.0)
ROOT = Path(__file__).resolve().parents[2]


def rendered(kind: str, count: int, seed: int) -> list[np.ndarray]:
    scene = Scene(seed, "room")
    return [scene.render(T, K, WIDTH, HEIGHT)[0] for T in camera_path(kind, count, seed, 0.3)]


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return rendered("orbit", 50, 3)


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("nano")


def push_all(reconstructor: Reconstructor, frames: list[Frame]) -> list[FramePose]:
    poses = [p for f in frames for p in reconstructor.push(f).poses]
    return [*poses, *reconstructor.finish().poses]


def as_frames(images: list[np.ndarray], stamps=None, camera: bool = True) -> list[Frame]:
    model = CameraModel(WIDTH, HEIGHT, K) if camera else None
    stamps = range(0, len(images) * 10**8, 10**8) if stamps is None else stamps
    return [Frame(int(s), image, "camera", model) for s, image in zip(stamps, images, strict=True)]


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_every_frame_has_exactly_one_pose_in_stamp_order(images, backbone, data):
    """Whatever the camera does - stand still, jump, go dark - and however the stream is cut into windows."""
    rows, position = [], 0
    for _ in range(data.draw(st.integers(1, 6))):
        move = data.draw(st.sampled_from(["on", "back", "still", "jump", "dark"]))
        for _ in range(data.draw(st.integers(1, 9))):
            position += {"on": 1, "back": -1, "jump": 11}.get(move, 0)
            rows.append(-1 if move == "dark" else position % len(images))
    stamps = np.cumsum(data.draw(st.lists(st.integers(1, 10**9), min_size=len(rows), max_size=len(rows))))
    size = data.draw(st.integers(2, 8))
    config = with_values(
        Config(),
        {
            "window.size": size,
            "window.overlap": data.draw(st.integers(1, size - 1)),
            "window.first_seconds": data.draw(st.floats(0, 5)),
            "window.max_pending": data.draw(st.integers(1, 40)),
            "refine.mode": data.draw(st.sampled_from(["on", "off"])),
            "context.enabled": data.draw(st.booleans()),
        },
    )
    dark = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    frames = as_frames([dark if r < 0 else images[r] for r in rows], stamps, data.draw(st.booleans()))
    poses = push_all(Reconstructor(config, backbone), frames)
    assert [p.stamp_ns for p in poses] == [f.stamp_ns for f in frames]
    for p in poses:
        assert np.isfinite(p.T_odom_camera).all()
        assert np.isfinite(p.T_map_camera).all()
        np.testing.assert_allclose(p.T_map_camera[:3, :3] @ p.T_map_camera[:3, :3].T, np.eye(3), atol=1e-6)
        assert np.linalg.eigvalsh(p.covariance).min() > 0
        assert p.state is not TrackingState.LOST or p.covariance[0, 0] > 1e3


def test_a_refused_frame_leaves_no_trace(images, backbone):
    from spark3r_ros.reconstructor import FrameError

    frames = as_frames(images[:25])
    bad = dataclasses.replace(frames[12], stamp_ns=frames[12].stamp_ns + 1, image=np.zeros((60, 80, 3), np.uint8))
    whole, disturbed = Reconstructor(Config(), backbone), Reconstructor(Config(), backbone)
    expected = push_all(whole, frames)
    poses = [p for f in frames[:13] for p in disturbed.push(f).poses]
    for refused in (bad, frames[3], dataclasses.replace(bad, image=bad.image.astype(float))):
        with pytest.raises(FrameError):
            disturbed.push(refused)
    poses += push_all(disturbed, frames[13:])
    assert digest(poses) == digest(expected)


# -- lost --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refine", ["on", "off"])
def test_a_cut_is_noticed_and_the_way_back_found(refine, backbone, images):
    """The stream jumps to another room without a gap: no frame of it is tracked in the map of the first."""
    others = rendered("orbit", 12, 8)
    rows = [*images[:40], *others, *images[39:19:-1]]
    options = {"refine.mode": refine, "window.first_size": 8, "window.keyframe_flow": 0.06}
    reconstructor = Reconstructor(with_values(Config(), options), backbone)
    poses = push_all(reconstructor, as_frames(rows))
    assert [p.stamp_ns for p in poses] == list(range(0, len(rows) * 10**8, 10**8))
    assert all(p.state is TrackingState.TRACKING for p in poses[1:40])
    elsewhere = poses[46:52]  # half a second after the cut
    assert all(p.state is TrackingState.LOST and p.covariance[0, 0] > 1e3 for p in elsewhere)
    back = [p for p in poses[52:] if p.state is TrackingState.TRACKING and p.covariance[0, 0] < 1]
    assert back, "not found again"


# -- the same result, bit for bit --------------------------------------------------------------------------------------


def digest(poses: list[FramePose], reconstructor: Reconstructor | None = None) -> str:
    found = hashlib.sha256()
    for p in poses:
        for part in (p.T_odom_camera, p.T_map_camera, p.covariance):
            found.update(np.ascontiguousarray(part).tobytes())
        found.update(f"{p.stamp_ns} {p.state.value} {p.is_keyframe}".encode())
    if reconstructor is not None:
        cloud = reconstructor.map_points()
        for part in (cloud.xyz, cloud.rgb, cloud.confidence):
            found.update(np.ascontiguousarray(part).tobytes())
        for _, T in reconstructor.trajectory():
            found.update(T.tobytes())
    return found.hexdigest()


def there_and_back(refine: str) -> str:
    """A path that sees its places twice, so that loops are closed too, as one number."""
    images = rendered("orbit", 24, 3)
    options = {"refine.mode": refine, "loops.min_gap": 4, "window.keyframe_flow": 0.03}
    options["window.min_keyframe_interval"] = 0.0  # so short a path needs all keyframes that it can have
    reconstructor = Reconstructor(with_values(Config(), options), load_backbone("nano"))
    poses = push_all(reconstructor, as_frames([*images, *images[::-1]]))
    status = reconstructor.status()
    assert status["keyframes"] > 10
    return f"{digest(poses, reconstructor)} {status['loops']} loops, {status['map_corrections']} corrections"


@pytest.mark.parametrize("refine", ["on", "off"])
def test_another_process_gives_the_same_bit_for_bit(refine):
    code = f"from test_stream_invariants import there_and_back; print(there_and_back({refine!r}))"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}"}
    command = [sys.executable, "-c", code]
    other = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert other.stdout.strip() == there_and_back(refine)
    assert not other.stdout.strip().endswith(" 0 loops, 0 corrections")


def test_reset_gives_the_same_again(images, backbone):
    reconstructor = Reconstructor(Config(), backbone)
    frames = as_frames(images[:20])
    first = digest(push_all(reconstructor, frames), reconstructor)
    reconstructor.reset()
    assert digest(push_all(reconstructor, frames), reconstructor) == first


class Slow:
    """The backbone on a machine where it takes its time."""

    def __init__(self, backbone, seconds: float) -> None:
        self._backbone, self._seconds = backbone, seconds

    def __getattr__(self, name: str):
        return getattr(self._backbone, name)

    def __call__(self, *args, **kwargs):
        time.sleep(self._seconds)
        return self._backbone(*args, **kwargs)


def test_how_fast_the_network_is_changes_nothing(images, backbone, monkeypatch):
    """Windows are solved, adjusted and looked at beside the stream; when they join the map is decided by stamps, not
    by the clock.
    """
    config = with_values(Config(), {"window.keyframe_flow": 0.02, "refine.mode": "on"})
    frames = as_frames([*images, *images[-2:20:-1]])
    results = []
    adjust, deepen = PendingWindow.adjust, reconstructor_module.dense_depth
    for network, seconds in ((backbone, 0.0), (Slow(backbone, 0.3), 0.2)):
        monkeypatch.setattr(PendingWindow, "adjust", lambda pending, s=seconds: time.sleep(s) or adjust(pending))
        monkeypatch.setattr(reconstructor_module, "dense_depth", lambda *a, s=seconds: time.sleep(s) or deepen(*a))
        reconstructor = Reconstructor(config, network)
        updates = [reconstructor.push(f) for f in frames]
        last = reconstructor.finish()
        windows = [i for i, u in enumerate(updates) if u.window is not None]
        poses = np.stack([p.T_odom_camera for u in [*updates, last] for p in u.poses])
        results.append((windows, poses, reconstructor.map_points().xyz))
    assert len(results[0][0]) >= 3
    assert results[0][0] == results[1][0]
    assert np.array_equal(results[0][1], results[1][1])
    assert np.array_equal(results[0][2], results[1][2])


@pytest.fixture(scope="module")
def fast_images() -> list[np.ndarray]:
    """A camera that turns so fast that every frame would be a keyframe."""
    return rendered("orbit", 120, 3)[::4]


def keyframe_gaps(images, backbone, **values) -> tuple[Reconstructor, np.ndarray]:
    """Seconds between keyframes once the map has begun."""
    options = {"window.keyframe_flow": 0.02, "loops.enabled": False}  # the map is the sparse map's world
    config = with_values(Config(), options | {f"window.{k}": v for k, v in values.items()})
    reconstructor = Reconstructor(config, backbone)
    poses = push_all(reconstructor, as_frames(images))
    assert [p.stamp_ns for p in poses] == [i * 10**8 for i in range(len(images))]
    stamps = np.array([stamp for stamp, _ in reconstructor.keyframe_poses()])
    return reconstructor, 1e-9 * np.diff(stamps[stamps > 15 * 10**8])


def test_between_hasty_keyframes_the_sparse_map_has_its_own(fast_images, backbone):
    there_and_back = [*fast_images, *fast_images[-2::-1]]  # long enough after the first window has joined
    reconstructor, gaps = keyframe_gaps(there_and_back, backbone, min_keyframe_interval=0.15)
    assert len(gaps) >= 4
    assert (gaps > 0.15).all()
    known = [view for number, view in reconstructor._sparse.items() if number in reconstructor._refiner]
    supports = [view for view in known if isinstance(view, Support)]
    assert len(supports) >= 3
    poses = reconstructor.trajectory()
    for view in supports:  # its frame is where the sparse map has it, whatever was adjusted since
        assert np.allclose(poses[view.frame_index][1], reconstructor._refiner.pose(view.frame_index), atol=1e-9)


def test_hasty_keyframes_may_be_allowed(fast_images, backbone):
    reconstructor, gaps = keyframe_gaps(fast_images, backbone, min_keyframe_interval=0.0)
    assert (gaps < 0.15).any()
    assert not any(isinstance(view, Support) for view in reconstructor._sparse.values())


class Noted(Reconstructor):
    """How many keyframes each window had; none begins before the one before has joined."""

    def reset(self):
        super().reset()
        self.sizes = []

    def _begin_window(self, stamp_ns):
        assert all(job.is_joined for job in self._jobs)
        self.sizes.append(len(self._window.keyframes))
        super()._begin_window(stamp_ns)


SMALL_WINDOWS = {
    "window.keyframe_flow": 0.02,
    "window.min_keyframe_interval": 0.0,
    "window.size": 4,
    "window.overlap": 2,
}


def test_a_window_waits_until_the_one_before_has_joined(fast_images, backbone):
    """It grows meanwhile, up to a bound, and the frame that completes it is not held up."""
    reconstructor = Noted(with_values(Config(), SMALL_WINDOWS), backbone)
    push_all(reconstructor, as_frames(fast_images))
    assert max(reconstructor.sizes[1:-1]) > 4
    assert max(reconstructor.sizes) <= MAX_GROWTH * 4
    assert not reconstructor._jobs


def test_a_window_that_waits_grows_no_further_than_the_context_holds(fast_images, backbone):
    """Regression: a budget that binds ended the stream with an error."""
    config = with_values(Config(), SMALL_WINDOWS)
    first = Reconstructor(config, backbone)
    push_all(first, as_frames(fast_images[:1]))
    least = Solver(config, backbone, first._solver.device, first._solver.valid).context.bytes
    reconstructor = Noted(with_values(config, {"context.budget_mb": least / 2**20}), backbone)
    assert len(push_all(reconstructor, as_frames(fast_images))) == len(fast_images)
    assert max(reconstructor.sizes) == 4


def test_a_camera_that_begins_to_move_is_soon_placed(images, backbone):
    """By the points of its first frames, until the first window joins; what both say is one path in one scale."""
    reconstructor = Reconstructor(with_values(Config(), {"refine.mode": "on"}), Slow(backbone, 0.2))
    updates, scouted = [], []
    for frame in as_frames(images):
        updates.append(reconstructor.push(frame))
        scouted.append(reconstructor._scout is not None)
    first = scouted.index(True)
    assert first <= 5
    assert len(updates[first].poses) == first
    assert all(len(u.poses) == 1 for u in updates[first + 1 :])
    joined = scouted.index(False, first)
    assert joined > first + 8
    reconstructor.finish()
    given = np.stack([p.T_odom_camera for u in updates for p in u.poses])[: joined + 5, :3, 3]
    mapped = np.stack([T for _, T in reconstructor.trajectory()])[: joined + 5, :3, 3]
    path = np.linalg.norm(np.diff(mapped, axis=0), axis=1)
    assert np.linalg.norm(given - mapped, axis=1).max() < 0.1 * path.sum()
    steps = np.linalg.norm(np.diff(given, axis=0), axis=1)
    assert steps[joined - 2 : joined + 3].max() < 2 * np.median(path)  # nor does it jump when the map takes over


def test_a_first_window_that_fails_is_followed_by_another(images, backbone):
    """The node goes on after an error; keyframes that came meanwhile are not left behind."""

    class Failing(Slow):
        calls = 0

        def __call__(self, *args, **kwargs):
            self.calls += 1
            if self.calls == 1:
                raise RuntimeError("out of memory")
            return super().__call__(*args, **kwargs)

    options = {"refine.mode": "on", "window.keyframe_flow": 0.02, "window.min_keyframe_interval": 0.0}
    reconstructor = Reconstructor(with_values(Config(), options), Failing(backbone, 0.0))
    errors, poses = [], []
    for frame in as_frames([*images, *images[-2::-1]]):
        poses += reconstructor.track(frame).poses
        try:
            reconstructor.update_map()
        except RuntimeError as error:
            errors.append(str(error))
            late = [k for k, _ in reconstructor._start_views if k.frame_index not in reconstructor._refiner]
            assert late
    assert errors == ["out of memory"]
    assert len(poses) == 2 * len(images) - 1
    assert reconstructor.status()["windows"] >= 1
    assert reconstructor._scout is None


def test_a_camera_that_begins_slowly_hardly_waits(backbone):
    """Near its origin it has its poses at once, as uncertain as they are, and the scout goes on from there."""
    scene, truth = Scene(3, "room"), camera_path("orbit", 3600, 3, 0.3)[:100]
    reconstructor = Reconstructor(with_values(Config(), {"refine.mode": "on"}), backbone)
    still = [scene.render(truth[0], K, WIDTH, HEIGHT)[0]] * 40
    poses, scouted = [], 0
    for frame in as_frames([*still, *(scene.render(T, K, WIDTH, HEIGHT)[0] for T in truth)]):
        update = reconstructor.push(frame)
        poses += update.poses
        assert reconstructor.status()["frames_waiting"] <= 1
        scouted += reconstructor._scout is not None
        assert len(reconstructor._near) <= NEAR_FRAMES
        assert len(reconstructor._scouted) <= NEAR_FRAMES + scouted
    assert scouted
    assert all(p.state is TrackingState.INITIALISING for p in poses[:42])
    sigmas = np.array([np.sqrt(p.covariance[3, 3]) for p in poses])
    assert (sigmas[:40] == sigmas[0]).all()
    near = next(i for i, p in enumerate(poses) if p.state is TrackingState.TRACKING)
    assert sigmas[near - 1] > 2 * sigmas[0]
    R_true = np.swapaxes(truth[:1, :3, :3], 1, 2) @ truth[:, :3, :3]
    R = np.stack([p.T_odom_camera[:3, :3] for p in poses])[40:]
    off = rotation_angle(np.swapaxes(R, 1, 2) @ R_true)
    assert (off[: near - 40] < 3 * sigmas[40:near]).all()


def test_slow_cameras_wait_for_the_first_window(images, backbone):
    reconstructor = Reconstructor(with_values(Config(), {"refine.mode": "on"}), backbone)
    for frame in as_frames(images[::2], stamps=range(0, 25 * 5 * 10**8, 5 * 10**8)):
        reconstructor.push(frame)
        assert reconstructor._scout is None
    assert reconstructor.status()["frames_waiting"] == 0


def test_no_frame_does_two_pieces_of_a_window(images, backbone):
    """Beside the stream a window comes into the map in pieces that fit between two frames."""

    class Noted(Reconstructor):
        def reset(self):
            super().reset()
            self.noted = {"align": [], "refine": [], "join": []}

        def _align(self, *args):
            self.noted["align"].append(self._num_frames)
            return super()._align(*args)

        def _refine(self, *args):
            self.noted["refine"].append(self._num_frames)
            return super()._refine(*args)

        def _join_window(self, *args):
            self.noted["join"].append(self._num_frames)
            super()._join_window(*args)

    reconstructor = Noted(with_values(Config(), {"window.keyframe_flow": 0.03, "refine.mode": "on"}), backbone)
    for frame in as_frames(images):
        reconstructor.push(frame)
    align, refine, join = (reconstructor.noted[name] for name in ("align", "refine", "join"))
    assert len(join) >= 3
    assert all(b == a + 1 for a, b in zip(align, refine, strict=False))
    assert all(b > a for a, b in zip(refine, join, strict=False))


def test_the_first_poses_do_not_wait_for_the_first_points(images, backbone):
    """Dense depth of the first window is made piece by piece while the stream goes on; nothing is lost at its end."""
    reconstructor = Reconstructor(Config(), backbone)
    updates = [reconstructor.push(f) for f in as_frames(images)]
    posed = next(i for i, u in enumerate(updates) if len(u.poses) > 1)
    assert updates[posed].state is TrackingState.TRACKING
    assert updates[posed].points is None
    shown = next(i for i, u in enumerate(updates) if u.points is not None)
    assert posed < shown <= posed + 30
    short = Reconstructor(Config(), backbone)
    for frame in as_frames(images[: posed + 1]):
        assert short.push(frame).points is None
    end = short.finish()
    assert end.points is not None
    assert len(end.points.xyz) > 0
