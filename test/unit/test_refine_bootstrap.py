"""The first window: of several starts the one that explains the tracks, on every kind of motion."""

import numpy as np
import pytest
from sightings import K, ahead, around, forward, in_first_camera, perturbed, sideways, turning, wall

from spark3r_ros.geometry import rotation_angle, umeyama
from spark3r_ros.refine import bootstrap
from spark3r_ros.refine.bootstrap import best_start, rays, rotation_chain
from spark3r_ros.refine.keyframes import Keyframe

FRAMES = 5


def keyframes(world, T_world_camera, **quality) -> list[Keyframe]:
    seen = [world.tracks(T, number, **quality) for number, T in enumerate(T_world_camera)]
    return [Keyframe(i, s.ids, s.uv, np.zeros_like(s.uv)) for i, s in enumerate(seen)]


def rotation_errors_deg(T, truth) -> np.ndarray:
    T, truth = in_first_camera(T), in_first_camera(truth)
    return np.degrees(rotation_angle(np.swapaxes(T[:, :3, :3], 1, 2) @ truth[:, :3, :3]))


def position_error(T, truth) -> float:
    """Largest, as a share of the path's length, after the best similarity."""
    S = umeyama(T[:, :3, 3], truth[:, :3, 3])
    moved = T[:, :3, 3] @ S[:3, :3].T + S[:3, 3]
    length = np.linalg.norm(np.diff(truth[:, :3, 3], axis=0), axis=1).sum()
    return float(np.linalg.norm(moved - truth[:, :3, 3], axis=1).max() / length)


MOVING = {
    "scene": (ahead(300), sideways(FRAMES)),
    "wall": (wall(300), sideways(FRAMES)),
    "forward": (ahead(300, nearest=3.0), forward(FRAMES)),
    "wide turn": (around(2500), turning(FRAMES, 8.0, step=0.15)),
}


@pytest.mark.parametrize("case", MOVING)
def test_motion_is_found_without_a_network(case):
    world, truth = MOVING[case]
    start = best_start(keyframes(world, truth, outliers=0.15), K, None, 0.0)
    assert rotation_errors_deg(start.T_world_camera, truth).max() < 0.3
    assert position_error(start.T_world_camera, truth) < 0.03
    np.testing.assert_array_equal(start.K, K)


def test_pure_rotation_is_found_without_a_network():
    truth = turning(FRAMES, 4.0)
    start = best_start(keyframes(around(3000), truth), K, None, 0.0)
    assert (
        rotation_errors_deg(start.T_world_camera, truth).max() < 0.2
    )  # of 16: a weak prior lets depths and a tiny step explain a part
    moved = np.linalg.norm(start.T_world_camera[:, :3, 3] - start.T_world_camera[0, :3, 3], axis=1)
    assert moved.max() < 0.02  # of the typical depth, which is 1


def test_a_good_network_is_not_worse_than_no_network():
    world, truth = MOVING["scene"]
    seen = keyframes(world, truth)
    start = best_start(seen, K, perturbed(truth, np.random.default_rng(0), 0.005, 0.002), 0.0)
    alone = best_start(seen, K, None, 0.0)
    assert start.cost <= alone.cost
    assert position_error(start.T_world_camera, truth) < 0.02


@pytest.mark.parametrize("unit", [0.2, 1.0, 3.0])
def test_the_network_is_chosen_where_two_views_have_too_few_tracks(unit):
    """Whatever its unit of length: priors expect a depth of one."""
    world, truth = ahead(28), sideways(FRAMES, 0.3, 4.0)
    network = truth.copy()
    network[:, :3, 3] *= unit
    start = best_start(keyframes(world, truth), K, network, 0.0)
    assert start.name == "network"
    assert position_error(start.T_world_camera, truth) < 0.05


@pytest.mark.parametrize("case", ["scene", "wall"])
def test_a_bad_network_is_not_chosen(case):
    world, truth = MOVING[case]
    wrong = truth[::-1].copy()  # the camera goes backwards, with turns that nobody made
    wrong = perturbed(wrong, np.random.default_rng(1), 0.3, 0.3)
    seen = keyframes(world, truth)
    start = best_start(seen, K, wrong, 0.0)
    assert start.name != "network"
    assert rotation_errors_deg(start.T_world_camera, truth).max() < 0.3
    assert position_error(start.T_world_camera, truth) < 0.03


def test_the_focal_length_moves_towards_the_truth_when_it_is_free():
    world, truth = around(2000), turning(FRAMES, 6.0, step=0.1)
    guess = K.copy()
    guess[[0, 1], [0, 1]] *= 1.15
    start = best_start(keyframes(world, truth), guess, None, 0.3)
    assert abs(np.log(start.K[0, 0] / K[0, 0])) < 0.03
    assert start.K[0, 0] == pytest.approx(start.K[1, 1])


def test_too_few_tracks_give_no_start():
    assert best_start(keyframes(ahead(5), sideways(FRAMES)), K, sideways(FRAMES), 0.0) is None


def test_the_same_tracks_give_the_same_bits():
    world, truth = MOVING["scene"]
    first, again = (best_start(keyframes(world, truth, outliers=0.2), K, None, 0.0) for _ in range(2))
    assert first.name == again.name
    assert (first.T_world_camera == again.T_world_camera).all()
    assert first.cost == again.cost


def test_rotation_chain_needs_four_common_tracks():
    truth = turning(4, 3.0)
    seen = keyframes(around(2000), truth, noise_px=0.1)
    np.testing.assert_allclose(rotation_chain(seen, K)[:, :3, :3], truth[:, :3, :3], atol=1e-3)
    seen[2].good[:] = False
    chain = rotation_chain(seen, K)
    assert (chain[2] == chain[1]).all()
    assert (chain[:, :3, 3] == 0).all()


def test_rays_have_unit_length_and_the_centre_looks_along_z():
    directions = rays(np.array([K[:2, 2], [0.0, 0.0], [640.0, 480.0]]), K)
    np.testing.assert_allclose(directions[0], [0, 0, 1])
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1.0)


def test_starts_that_agree_end_the_search(monkeypatch):
    tried = []
    adjustment = bootstrap._short_adjustment
    monkeypatch.setattr(bootstrap, "_short_adjustment", lambda *a: tried.append(a) or adjustment(*a))
    world, truth = MOVING["scene"]
    start = best_start(keyframes(world, truth), K, truth, 0.0)
    assert position_error(start.T_world_camera, truth) < 0.02
    assert len(tried) <= 5  # of ten: the network, a rotation, and pairs until two agree
