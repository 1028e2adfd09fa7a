"""Recognising a place: the joint solve of both cameras, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from spark3r_ros import geometry
from spark3r_ros.config import LoopConfig
from spark3r_ros.places import Place, PlaceStore, recognise

TRUTH = geometry.se3_exp(np.array([0.3, -0.1, 0.2, 0.05, 0.2, -0.02]))  # T_place_query, place units
LOG_SCALE = 0.4  # of place units per query unit


def seen(number: int, xyz: np.ndarray, orb: np.ndarray, noise: float, depth_noise: float, seed: int) -> Place:
    """A place that knows points [N, 3] of its own camera, with noise in rays and depths."""
    rng = np.random.default_rng(seed)
    xy = xyz[:, :2] / xyz[:, 2:] + rng.normal(0, noise, (len(xyz), 2))
    depth = xyz[:, 2] * np.exp(rng.normal(0, depth_noise, len(xyz)))
    return Place(number, np.ones(4, np.float32), xy.astype(np.float32), depth.astype(np.float32), orb)


def two_views(count=150, noise=0.001, depth_noise=0.05, log_scale=LOG_SCALE, seed=0) -> tuple[Place, Place]:
    """Query and place of the same corners."""
    rng = np.random.default_rng(seed)
    points = np.concatenate([rng.uniform(-1, 1, (count, 2)), rng.uniform(2, 5, (count, 1))], axis=1)
    points[:, :2] *= points[:, 2:] * 0.5
    orb = rng.integers(0, 256, (count, 32), np.uint8)
    place = seen(3, points, orb, noise, depth_noise, seed + 1)
    mine = geometry.transform(geometry.inverse(TRUTH), points) * np.exp(-log_scale)
    return seen(9, mine, orb, noise, depth_noise, seed + 2), place


def pose_error(sighting) -> tuple[float, float, float]:
    scale = float(geometry.scale_of(sighting.S_place_query))
    off = geometry.inverse(TRUTH) @ geometry.make_T(
        sighting.S_place_query[:3, :3] / scale, sighting.S_place_query[:3, 3]
    )
    return float(geometry.rotation_angle(off[:3, :3])), float(np.linalg.norm(off[:3, 3])), np.log(scale) - LOG_SCALE


def test_both_cameras_give_pose_and_scale():
    query, place = two_views()
    sighting = recognise(query, place, LoopConfig())
    rotation, shift, log_scale = pose_error(sighting)
    assert rotation < 0.01
    assert shift < 0.03
    assert log_scale == pytest.approx(0, abs=0.02)
    assert 100 < sighting.num_inliers == len(sighting.inlier_xy) == len(sighting.inlier_xyz) <= 150


def test_a_sighting_of_few_corners_is_doubted():
    """Over many seeds errors are larger where fewer corners agree, in proportion to what ``doubt`` says."""
    error, doubt = {}, {}
    for count in (60, 200):
        seen_again = []
        for seed in range(12):
            query, place = two_views(count, 0.002, 0.04, seed=10 * seed)
            seen_again.append(recognise(dataclasses.replace(query, depth=np.full(count, np.nan)), place, LoopConfig()))
        error[count] = np.median([pose_error(s)[0] for s in seen_again])
        doubt[count] = np.median([s.doubt for s in seen_again])
    assert doubt[200] == 1.0
    assert doubt[60] > 1.5
    assert error[60] > 1.5 * error[200]


def test_the_joint_solve_is_better_than_one_direction():
    joint, single = [], []
    for seed in range(12):
        query, place = two_views(100, 0.002, 0.04, seed=10 * seed)
        joint.append(pose_error(recognise(query, place, LoopConfig())))
        blind = dataclasses.replace(query, depth=np.full(100, np.nan, np.float32))
        single.append(pose_error(recognise(blind, place, LoopConfig())))
    rms_joint, rms_single = (np.sqrt(np.mean(np.square(e), axis=0)) for e in (joint, single))
    assert rms_joint[0] < rms_single[0]
    assert rms_joint[1] < rms_single[1]


def test_a_query_without_depth_has_no_scale():
    query, place = two_views()
    sighting = recognise(dataclasses.replace(query, depth=np.full(150, np.nan, np.float32)), place, LoopConfig())
    assert sighting.log_scale == 0.0
    assert np.isnan(sighting.scale_spread)
    assert geometry.scale_of(sighting.S_place_query) == pytest.approx(1)


def test_depths_that_contradict_each_other_are_refused():
    """What the query believes of the distances does not fit the place's: not the same place, or no depth."""
    query, place = two_views()
    skewed = query.depth * np.exp(1.5 * query.xy[:, 0]).astype(np.float32)
    assert recognise(dataclasses.replace(query, depth=skewed), place, LoopConfig()) is None


def test_other_corners_are_not_recognised():
    query, _ = two_views(seed=0)
    _, place = two_views(seed=50)
    assert recognise(query, place, LoopConfig()) is None


def test_matches_that_fit_no_camera_are_refused():
    query, place = two_views()
    shuffled = np.random.default_rng(0).permutation(150)
    assert recognise(dataclasses.replace(query, orb=query.orb[shuffled]), place, LoopConfig()) is None


def test_few_corners_are_not_enough():
    query, place = two_views(count=20)
    assert recognise(query, place, LoopConfig(min_inliers=25)) is None
    assert recognise(query, place, LoopConfig(min_inliers=12)) is not None


def test_places_that_look_alike_come_first_and_apart():
    store = PlaceStore()
    rng = np.random.default_rng(0)
    none = np.zeros((0, 2), np.float32)
    for number in range(100):
        descriptor = rng.normal(0, 1, 16).astype(np.float32)
        store.add(Place(number, descriptor, none, none[:, 0], np.zeros((0, 32), np.uint8)))
    best = store.similar(store[40].descriptor, count=3, spacing=3)
    assert best[0].keyframe_id == 40
    assert len(best) == 3
    assert min(abs(p.keyframe_id - q.keyframe_id) for p in best for q in best if p is not q) > 3
    assert all(p.keyframe_id < 20 for p in store.similar(store[40].descriptor, 5, 0, before=20))
    assert store.similar(store[40].descriptor, 5, 0, before=0) == []


def test_places_lie_in_memory_that_is_claimed_once():
    store = PlaceStore(capacity=2, max_corners=60)
    views = {number: dataclasses.replace(two_views(50 + number)[1], keyframe_id=number) for number in (0, 1, 2, 20)}
    kept = {number: store.add(views[number]) for number in (0, 20, 1, 2)}  # 20 has too many corners, 2 comes too late
    own = {number for number, place in kept.items() if place.xy is views[number].xy}
    assert own == {20, 2}
    store.remove(0)
    kept[5] = store.add(dataclasses.replace(views[2], keyframe_id=5))
    assert np.shares_memory(kept[5].xy, kept[0].xy)
    for number, wanted in ((1, views[1]), (2, views[2]), (20, views[20]), (5, views[2])):
        assert store[number] is kept[number]
        for name in ("descriptor", "xy", "depth", "orb"):
            np.testing.assert_array_equal(getattr(store[number], name), getattr(wanted, name))
