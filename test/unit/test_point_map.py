"""Which pixels are trusted, how they are fused, and that the map keeps its bound."""

from dataclasses import replace

import numpy as np
import pytest

from spark3r_ros.config import MapConfig
from spark3r_ros.geometry import make_T, similarity, so3_exp
from spark3r_ros.point_map import KeyframePoints, PointMap, depth_edges, keyframe_points, trusted, voxel_fuse

NO_PARALLAX = MapConfig(min_parallax=0.0)
K = np.array([[20.0, 0, 9.5], [0, 20.0, 7.5], [0, 0, 1.0]])


def points(count, seed=0, confidence=None) -> KeyframePoints:
    rng = np.random.default_rng(seed)
    given = rng.random(count) if confidence is None else np.full(count, confidence)
    return KeyframePoints(
        rng.normal(0, 1, (count, 3)).astype(np.float32),
        rng.integers(0, 256, (count, 3), dtype=np.uint8),
        given.astype(np.float32),
    )


# Trust


@pytest.mark.parametrize("axis", [0, 1])
def test_both_sides_of_a_depth_step_are_edges(axis):
    depth = np.full((6, 8), 2.0)
    step = [slice(None), slice(None)]
    step[axis] = slice(3, None)
    depth[tuple(step)] = 2.5
    edge = depth_edges(depth, 0.08)
    expected = np.zeros((6, 8), bool)
    step[axis] = slice(2, 4)
    expected[tuple(step)] = True
    np.testing.assert_array_equal(edge, expected)


def test_the_step_counts_relative_to_the_nearer_side():
    below, above = (np.array([[1.0, 1.0 + jump]]) for jump in (0.079, 0.081))
    assert not depth_edges(below, 0.08).any()
    assert depth_edges(above, 0.08).all()
    assert not depth_edges(100 * below, 0.08).any()
    assert depth_edges(100 * above[:, ::-1], 0.08).all()
    assert not depth_edges(np.array([[2.0, 2.0, 2.0]]), 0.0).any()


def test_unknown_depth_makes_no_noise_and_is_not_trusted():
    depth = np.full((5, 5), 2.0)
    depth[2, 2], depth[0, 0], depth[4, 4], depth[0, 4] = np.nan, np.inf, 0.0, -1.0
    mask = trusted(depth, np.ones((5, 5)), 1.0, NO_PARALLAX)
    assert not mask[[2, 0, 4, 0], [2, 0, 4, 4]].any()
    assert mask[3, 1]


def test_confidence_and_edges_and_parallax_decide_together():
    config = MapConfig(min_confidence=0.5, max_depth_jump=0.08, min_parallax=0.02)
    depth = np.full((4, 6), 2.0)
    confidence = np.full((4, 6), 0.5)
    assert trusted(depth, confidence, 0.04, config).all()
    assert not trusted(depth, confidence, 0.0399, config).any()
    confidence[1, 1] = 0.49
    depth[:, 5] = 4.0
    mask = trusted(depth, confidence, 0.04, config)
    expected = np.ones((4, 6), bool)
    expected[1, 1] = False
    expected[:, 4:] = False
    np.testing.assert_array_equal(mask, expected)


def test_only_points_near_enough_for_their_parallax_are_trusted():
    depth = np.tile(np.linspace(1.0, 1.7, 15), (4, 1))
    mask = trusted(depth, np.ones_like(depth), 0.01325, MapConfig(min_parallax=0.01))
    np.testing.assert_array_equal(mask, depth <= 1.3)
    assert trusted(depth, np.ones_like(depth), 0.0, NO_PARALLAX).all()


# Fusion


def test_a_voxel_becomes_the_weighted_mean_of_its_points():
    three = KeyframePoints(
        np.array([[0.1, 0.2, 0.3], [0.9, 0.4, 0.7], [1.5, 0.5, 0.5]], np.float32),
        np.array([[0, 100, 200], [40, 100, 0], [9, 9, 9]], np.uint8),
        np.array([1.0, 3.0, 0.5], np.float32),
    )
    fused = voxel_fuse(three, 1.0)
    np.testing.assert_allclose(fused.xyz, [[0.7, 0.35, 0.6], [1.5, 0.5, 0.5]], rtol=1e-6)
    np.testing.assert_array_equal(fused.rgb, [[30, 100, 50], [9, 9, 9]])
    np.testing.assert_array_equal(fused.confidence, np.float32([3.0, 0.5]))
    assert (fused.xyz.dtype, fused.rgb.dtype, fused.confidence.dtype) == (np.float32, np.uint8, np.float32)


def test_fusion_agrees_with_a_plain_loop():
    cloud = points(500)
    fused = voxel_fuse(cloud, 0.7)
    cells: dict[tuple, list[int]] = {}
    for i, xyz in enumerate(cloud.xyz):
        cells.setdefault(tuple(np.floor(xyz / 0.7).astype(int)), []).append(i)
    assert len(fused) == len(cells)
    for cell, (key, rows) in zip(range(len(fused)), sorted(cells.items())):
        weight = cloud.confidence[rows].astype(float)
        np.testing.assert_allclose(fused.xyz[cell], np.average(cloud.xyz[rows], 0, weight), atol=1e-5, err_msg=str(key))
        np.testing.assert_array_equal(fused.rgb[cell], np.rint(np.average(cloud.rgb[rows], 0, weight)))
        assert fused.confidence[cell] == cloud.confidence[rows].max()


def test_cells_on_both_sides_of_zero_stay_apart_and_no_points_are_fine():
    pair = KeyframePoints(np.float32([[-0.1, 0, 0], [0.1, 0, 0]]), np.zeros((2, 3), np.uint8), np.ones(2, np.float32))
    assert len(voxel_fuse(pair, 1.0)) == 2
    assert len(voxel_fuse(points(0), 1.0)) == 0


def test_points_without_confidence_count_alike():
    none = KeyframePoints(np.float32([[0.2, 0, 0], [0.4, 0, 0]]), np.zeros((2, 3), np.uint8), np.zeros(2, np.float32))
    np.testing.assert_allclose(voxel_fuse(none, 1.0).xyz, [[0.3, 0, 0]], rtol=1e-6)


def test_pixels_become_points_of_the_camera_with_their_colour():
    depth = np.full((16, 20), 2.0)
    rgb = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    config = MapConfig(voxel_size=1e-5, min_parallax=0.01)
    seen = keyframe_points(depth, np.ones((16, 20)), rgb, K, baseline=1.0, config=config)
    assert len(seen) == 16 * 20
    uv = seen.xyz[:, :2] / seen.xyz[:, 2:] * 20.0 + [9.5, 7.5]
    np.testing.assert_allclose(seen.xyz[:, 2], 2.0)
    cells = np.rint(uv).astype(int)
    np.testing.assert_allclose(uv, cells, atol=1e-4)
    np.testing.assert_array_equal(seen.rgb, rgb[cells[:, 1], cells[:, 0]])


def test_voxels_are_a_share_of_the_median_depth():
    depth, ones = np.full((16, 20), 2.0), np.ones((16, 20))
    rgb = np.zeros((16, 20, 3), np.uint8)
    config = MapConfig(voxel_size=0.2, min_parallax=0.0)
    coarse = keyframe_points(depth, ones, rgb, K, 0.0, config)
    assert 0 < len(coarse) < 60
    scaled = keyframe_points(10 * depth, ones, rgb, K, 0.0, config)
    assert len(scaled) == len(coarse)
    np.testing.assert_allclose(scaled.xyz, 10 * coarse.xyz, rtol=1e-5)


def test_a_keyframe_that_nothing_is_trusted_of_gives_no_points():
    depth, rgb = np.full((4, 4), 2.0), np.zeros((4, 4, 3), np.uint8)
    empty = keyframe_points(depth, np.zeros((4, 4)), rgb, K, 1.0, MapConfig())
    assert len(empty) == 0
    assert empty.xyz.shape == (0, 3)


# The map


def test_the_bound_holds_and_the_least_confident_of_the_densest_keyframe_go():
    store = PointMap(MapConfig(max_points=1000))
    small, large = points(300, 1), points(900, 2)
    store.set(1, small)
    store.set(2, large)
    assert len(store) == 300 + 450
    assert len(store[1]) == 300
    np.testing.assert_array_equal(store[1].xyz, small.xyz)
    kept = store[2].confidence
    assert kept.min() >= np.sort(large.confidence)[450]
    rows = np.flatnonzero(large.confidence >= kept.min())
    np.testing.assert_array_equal(store[2].xyz, large.xyz[rows])  # order is kept


def test_the_bound_holds_for_any_order_of_additions():
    store = PointMap(MapConfig(max_points=1000))
    rng = np.random.default_rng(0)
    for i in range(60):
        store.set(int(rng.integers(0, 25)), points(int(rng.integers(0, 1500)), i))
        if rng.random() < 0.2:
            store.remove(int(rng.integers(0, 25)))
        assert len(store) <= 1000
        assert len(store) == sum(len(store[k]) for k in range(25) if k in store)


class PlainMap:
    """What PointMap does, keyframe by keyframe in arrays of their own."""

    def __init__(self, max_points):
        self.max_points, self.points = max_points, {}

    def set(self, number, added):
        self.points[number] = added
        while sum(len(p) for p in self.points.values()) > self.max_points:
            densest = min(self.points, key=lambda k: (-len(self.points[k]), k))
            p = self.points[densest]
            best = np.argsort(-p.confidence, kind="stable")[: len(p) // 2]
            self.points[densest] = p.take(np.sort(best))


@pytest.mark.parametrize("levels", [3, 1000])  # few: many points are equally confident
def test_one_block_of_memory_holds_what_separate_arrays_would(levels):
    store, plain = PointMap(MapConfig(max_points=1000)), PlainMap(1000)
    rng = np.random.default_rng(levels)
    for i in range(200):
        number, added = int(rng.integers(0, 25)), points(int(rng.choice([0, 1, 40, 500, 1500])), i)
        added = replace(added, confidence=np.round(levels * added.confidence) / np.float32(levels))
        store.set(number, added)
        plain.set(number, added)
        if rng.random() < 0.3:
            gone = int(rng.integers(0, 25))
            store.remove(gone)
            plain.points.pop(gone, None)
        for k in range(25):
            assert (k in store) == (k in plain.points)
            if k in store:
                for name in ("xyz", "rgb", "confidence"):
                    np.testing.assert_array_equal(getattr(store[k], name), getattr(plain.points[k], name))


def test_setting_again_replaces_and_removing_forgets():
    store = PointMap(MapConfig())
    store.set(4, points(30))
    store.set(4, points(20, 1))
    assert len(store) == len(store[4]) == 20
    store.remove(4)
    store.remove(4)
    assert len(store) == 0
    assert 4 not in store
    store.set(5, points(3))
    store.clear()
    assert len(store) == 0
    assert 5 not in store


def test_gathering_moves_points_by_their_similarity():
    store = PointMap(MapConfig())
    first, second = points(40, 1), points(25, 2)
    store.set(1, first)
    store.set(2, second)
    T = make_T(so3_exp(np.array([0.1, -0.7, 0.4])), np.array([1.0, 2.0, 3.0]))
    S = similarity(2.5, T)
    gathered = store.gather({2: S, 1: np.eye(4), 9: np.eye(4)})
    assert len(gathered) == 65
    np.testing.assert_allclose(gathered.xyz[:25], 2.5 * second.xyz @ T[:3, :3].T + T[:3, 3], atol=1e-5)
    np.testing.assert_array_equal(gathered.xyz[25:], first.xyz)
    np.testing.assert_array_equal(gathered.rgb, np.concatenate([second.rgb, first.rgb]))
    np.testing.assert_array_equal(gathered.confidence, np.concatenate([second.confidence, first.confidence]))
    assert gathered.xyz.dtype == np.float32
    np.testing.assert_array_equal(store[1].xyz, first.xyz)  # what is stored stays


def test_gathering_nothing_gives_no_points():
    empty = PointMap(MapConfig()).gather({3: np.eye(4)})
    assert len(empty) == 0
    assert empty.xyz.shape == empty.rgb.shape == (0, 3)
    assert empty.rgb.dtype == np.uint8
