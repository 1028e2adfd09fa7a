"""The renderer: depth and poses agree, the same seed gives the same picture, paths stay in free space."""

import numpy as np
import pytest

from spark3r_ros.geometry import inverse, project, transform, unproject
from training.generate import make_sequence, scaled
from training.paths import PATH_KINDS, camera_path
from training.scenes import Scene, camera_matrix
from training.textures import texture_bank


@pytest.fixture(scope="module")
def textures():
    return texture_bank(8, seed=5)


@pytest.mark.parametrize("distortion", [(), (-0.15, 0.03, 0.0, 0.0)])
def test_depth_and_poses_agree_by_reprojection(textures, distortion):
    scene = Scene(3, "room", textures)
    K = camera_matrix(96, 72, 65)
    path = camera_path("orbit", 120, seed=1)
    depth = scene.render(path[0], K, 96, 72)[1]
    other = scene.render(path[3], K, 96, 72, distortion)[1]
    points = transform(inverse(path[3]) @ path[0], unproject(depth.astype(float), K).reshape(-1, 3))
    normalised = points[:, :2] / points[:, 2:]
    r2 = (normalised**2).sum(axis=1, keepdims=True)
    k1, k2 = distortion[:2] if distortion else (0.0, 0.0)
    uv = project(np.concatenate([normalised * (1 + k1 * r2 + k2 * r2**2), np.ones_like(r2)], axis=1), K)
    cells = np.round(uv).astype(int)
    inside = (points[:, 2] > 0.1) & (cells >= 0).all(axis=1) & (cells < [96, 72]).all(axis=1)
    seen = other[cells[inside, 1], cells[inside, 0]]
    error = np.abs(seen / points[inside, 2] - 1)
    assert inside.mean() > 0.7
    assert np.median(error) < 0.01
    assert (error < 0.05).mean() > 0.9  # the rest is hidden in the other view


def test_depth_is_exact_in_an_empty_direction(textures):
    scene = Scene(0, "room", textures)
    half = scene.room_half_size
    up = np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])  # the optical axis is the world's z
    up[:3, 3] = [0, 0, half[2] - 0.4]  # just below the ceiling, above everything
    depth = scene.render(up, camera_matrix(32, 24, 40), 32, 24)[1]
    assert np.allclose(depth, 0.4, atol=1e-6)


def test_rendering_is_deterministic_and_seeds_differ(textures):
    K, pose = camera_matrix(48, 36, 60), camera_path("handheld", 10, seed=2)[4]
    first, again, other = (Scene(seed, "room", textures).render(pose, K, 48, 36)[0] for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()
    assert first.std() > 5


@pytest.mark.parametrize("kind", PATH_KINDS)
def test_paths_are_smooth_and_free(textures, kind):
    scenes = [Scene(seed, "hall" if kind == "circuit" else "room", textures) for seed in range(3)]
    for seed, scene in enumerate(scenes):
        path = camera_path(kind, 600, seed, loops=2)
        assert path.shape == (600, 4, 4)
        assert scene.clearance(path[:, :3, 3]).min() > 0.1
        steps = np.linalg.norm(np.diff(path[:, :3, 3], axis=0), axis=1)
        assert steps.max() < 0.2
        assert np.allclose(np.linalg.det(path[:, :3, :3]), 1)


def test_a_circuit_comes_back(textures):
    path = camera_path("circuit", 2000, seed=4, loops=2)
    assert np.linalg.norm(path[0, :3, 3] - path[1000, :3, 3]) < 0.6
    assert np.linalg.norm(path[0, :3, 3] - path[-1, :3, 3]) < 0.1


def test_unknown_layouts_and_paths_are_refused():
    with pytest.raises(ValueError, match="layout must be one of room, hall, clutter, got 'attic'"):
        Scene(0, "attic")
    with pytest.raises(ValueError, match="path kind must be one of"):
        camera_path("spiral", 10, 0)


def test_sequences_repeat_and_are_consistent(textures):
    first = make_sequence([0, 7, 1], 72, 96, textures)
    again = make_sequence([0, 7, 1], 72, 96, textures)
    assert all((getattr(first, name) == getattr(again, name)).all() for name in ("rgb", "motion", "depth"))
    assert first.rgb.shape == (8, 36, 48, 3)
    assert first.motion.shape == (8, 6, 18, 24)
    # Flow to the frame before agrees with depth and poses where the round trip closes.
    K_cells = scaled(first.K.astype(float), 0.25)
    errors = []
    for i in range(1, 8):
        T = inverse(first.T_world_camera[i - 1].astype(float)) @ first.T_world_camera[i].astype(float)
        uv = project(transform(T, unproject(first.depth[i].astype(float), K_cells).reshape(-1, 3)), K_cells)
        x, y = np.meshgrid(np.arange(24), np.arange(18))
        truth = 4 * (uv - np.stack([x, y], axis=-1).reshape(-1, 2))
        flow = first.motion[i, :2].astype(float).reshape(2, -1).T
        good = first.motion[i, 2].ravel() < 0.5
        errors.append(np.linalg.norm(flow - truth, axis=1)[good])
    assert np.median(np.concatenate(errors)) < 1.0  # pixels
