"""Joining a window to the map: what each estimator is, what outliers do to it, and that a bad link does no harm."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark3r_ros import geometry
from spark3r_ros.alignment import (
    ONE_FRAME_SIGMA,
    View,
    align,
    cameras_to_cameras,
    dense_similarity,
    robust_log_ratio,
    scale_from_depths,
    shrink,
)
from spark3r_ros.config import AlignmentConfig

K = np.array([[60.0, 0, 39.5], [0, 60.0, 29.5], [0, 0, 1]])
SHAPE = (60, 80)


def pose(seed: int, turn: float = 0.3, shift: float = 0.5) -> np.ndarray:
    return geometry.se3_exp(np.random.default_rng(seed).normal(0, 1, 6) * ([shift] * 3 + [turn] * 3))


def scene(seed: int) -> np.ndarray:
    """A smooth depth image [H, W] between 1 and 4."""
    rng = np.random.default_rng(seed)
    v, u = np.mgrid[: SHAPE[0], : SHAPE[1]] / 40
    return (2.5 + 0.7 * np.sin(3 * u + rng.uniform(0, 6)) + 0.7 * np.cos(2 * v + rng.uniform(0, 6))).astype(np.float32)


def views(
    count: int, log_scale: float, gauge: np.ndarray | None = None, seed: int = 0
) -> tuple[list[View], list[View]]:
    """The same cameras in the map and in a window: S_map_window = exp(log_scale) and the rigid ``gauge``."""
    gauge = pose(99) if gauge is None else gauge
    S_window_map = geometry.inverse(geometry.similarity(np.exp(log_scale), gauge))
    confidence = np.full(SHAPE, 0.9, np.float32)
    there, here = [], []
    for i in range(count):
        T, depth = pose(seed + i), scene(seed + i)
        there.append(View(T, depth, confidence))
        moved = geometry.apply_similarity_to_pose(S_window_map, T)
        here.append(View(moved, depth * np.float32(np.exp(-log_scale)), confidence))
    return there, here


def expected(log_scale: float) -> np.ndarray:
    return geometry.similarity(np.exp(log_scale), pose(99))


def spoiled(view: View, share: float, factor: float, seed: int = 0) -> View:
    """A share of the pixels is wrong by a factor, as behind a moving object."""
    wrong = np.random.default_rng(seed).random(SHAPE) < share
    return dataclasses.replace(view, depth=np.where(wrong, view.depth * np.float32(factor), view.depth))


# -- scale ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.45])
def test_depth_ratio_survives_outliers(share):
    rng = np.random.default_rng(0)
    source = rng.uniform(1, 5, 4000)
    target = 1.3 * source * np.exp(rng.normal(0, 0.02, 4000))
    target[rng.random(4000) < share] *= 2.5
    assert robust_log_ratio(target, source, np.ones(4000)) == pytest.approx(np.log(1.3), abs=0.03)
    if share >= 0.3:  # what it is robust against: the mean of the same ratios
        assert abs(np.log(target / source).mean() - np.log(1.3)) > 0.2


def test_depth_ratio_ignores_what_is_not_known():
    source, target = np.full(200, 2.0), np.full(200, 3.0)
    target[:40], source[40:80], target[80:90] = np.nan, 0.0, -1.0
    weights = np.ones(200)
    target[90:120], weights[90:120] = 100.0, 0.0
    assert robust_log_ratio(target, source, weights) == pytest.approx(np.log(1.5))
    assert robust_log_ratio(target[:130], source[:130], weights[:130]) is None  # ten pixels are no measurement


def test_each_overlap_frame_votes_in_its_own_camera():
    """One frame whose pose is far off still has the right depth ratio: poses play no part in scale."""
    there, here = views(3, 0.4)
    here[1] = dataclasses.replace(here[1], T=pose(7, shift=5.0))
    log_scale, _ = scale_from_depths(there, here, None)
    assert log_scale == pytest.approx(0.4, abs=1e-4)


def test_one_wrong_frame_of_three_is_outvoted():
    there, here = views(3, 0.1)
    here[2] = dataclasses.replace(here[2], depth=here[2].depth * np.float32(3))
    log_scale, sigma = scale_from_depths(there, here, None)
    assert log_scale == pytest.approx(0.1, abs=1e-4)
    assert sigma > 0.2  # and the disagreement is told


def test_sigma_comes_from_the_spread_of_frames_not_of_pixels():
    there, here = views(4, 0.0)
    _, agreeing = scale_from_depths(there, here, None)
    noisy = [
        dataclasses.replace(v, depth=v.depth * np.random.default_rng(i).normal(1, 0.1, SHAPE))
        for i, v in enumerate(here)
    ]
    _, noise = scale_from_depths(there, noisy, None)
    apart = [dataclasses.replace(v, depth=v.depth * np.exp(0.1 * (-1) ** i)) for i, v in enumerate(here)]
    _, spread = scale_from_depths(there, apart, None)
    assert noise == pytest.approx(agreeing, rel=0.2)
    assert spread > 3 * agreeing
    _, alone = scale_from_depths(there[:1], here[:1], None)
    assert alone == pytest.approx(ONE_FRAME_SIGMA, rel=1e-3)  # one frame cannot show a spread


@settings(max_examples=50, deadline=None)
@given(st.floats(-1, 1), st.floats(0.001, 0.5), st.floats(0.001, 0.5))
def test_the_prior_shrinks_log_scale_towards_zero(value, sigma, prior):
    mean, posterior = shrink(value, sigma, prior)
    assert abs(mean) <= abs(value)
    assert posterior < min(sigma, prior)
    assert mean == pytest.approx(value * prior**2 / (prior**2 + sigma**2))
    assert shrink(value, sigma, None) == (value, sigma)


def test_the_prior_applies_in_the_context_s_gauge_only():
    there, here = views(3, 0.05)
    pulled = align(there, here, K, AlignmentConfig(), same_gauge=True).log_scale
    free = align(there, here, K, AlignmentConfig(), same_gauge=False).log_scale
    off = align(there, here, K, AlignmentConfig(scale_prior=False), same_gauge=True).log_scale
    assert 0 < pulled < 0.048
    assert free == off == pytest.approx(0.05, abs=1e-4)


# -- cameras -------------------------------------------------------------------------------------------------------


def test_cameras_give_the_transform_exactly():
    there, here = views(3, 0.2)
    S, rotation_spread, shift = cameras_to_cameras(
        np.stack([v.T for v in there]), np.stack([v.T for v in here]), np.exp(0.2)
    )
    np.testing.assert_allclose(S, expected(0.2), atol=1e-6)
    assert rotation_spread < 1e-6
    assert shift < 1e-6


def test_the_chordal_mean_is_the_best_rotation():
    """It minimises the squared Frobenius distance to what the cameras say (Hartley 2013); its spread is reported."""
    rng = np.random.default_rng(1)
    window_T = np.stack([pose(i) for i in range(5)])
    noise = geometry.so3_exp(rng.normal(0, 0.1, (5, 3)))
    map_T = window_T.copy()
    map_T[:, :3, :3] = noise @ window_T[:, :3, :3]
    S, spread, _ = cameras_to_cameras(map_T, window_T, 1.0)

    def cost(R: np.ndarray) -> float:
        return float(np.sum((R @ window_T[:, :3, :3] - map_T[:, :3, :3]) ** 2))

    best = cost(S[:3, :3])
    for step in 0.02 * rng.normal(0, 1, (50, 3)):
        assert cost(geometry.so3_exp(step) @ S[:3, :3]) >= best
    R_noise = noise @ S[:3, :3].T
    assert spread == pytest.approx(np.sqrt(np.mean(geometry.rotation_angle(R_noise) ** 2)))


# -- points --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outliers", [0.1, 0.3, 0.45])
def test_dense_similarity_in_trace_form_keeps_scale_under_outliers(outliers):
    """Noise on both sides biases the ratio of RMS radii (VGGT-Long's form), the trace form hardly."""
    rng = np.random.default_rng(0)
    source = rng.normal(0, 1, (6000, 3)) + np.array([0, 0, 4.0])
    S = geometry.similarity(1.2, pose(3))
    target = geometry.transform(S, source) + rng.normal(0, 0.03, source.shape)
    wrong = rng.random(len(source)) < outliers
    target[wrong] += rng.normal(0, 2.0, (int(wrong.sum()), 3))
    found = dense_similarity(source, target, np.ones(len(source)))
    trace_error = abs(np.log(geometry.scale_of(found)) - np.log(1.2))
    spread = [np.sqrt(np.mean(np.sum((p - p.mean(axis=0)) ** 2, axis=1))) for p in (target, source)]
    assert trace_error < 5e-4
    assert abs(np.log(spread[0] / spread[1]) - np.log(1.2)) > 20 * trace_error
    np.testing.assert_allclose(found, S, atol=5e-3)


def test_a_dense_scale_that_disagrees_raises_sigma():
    there, here = views(3, 0.0)
    near = align(there, here, K, AlignmentConfig(), same_gauge=True)
    moved = [dataclasses.replace(v, T=geometry.make_T(v.T[:3, :3], 1.3 * v.T[:3, 3])) for v in here]
    far = align(there, moved, K, AlignmentConfig(), same_gauge=True)
    assert abs(near.dense_log_scale) < 1e-4
    assert far.sigma > near.sigma
    assert far.sigma >= 0.5 * abs(far.dense_log_scale - far.log_scale)


# -- the link ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["cameras", "dense"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_good_link_is_exact(mode, count):
    there, here = views(count, 0.3)
    link = align(there, here, K, AlignmentConfig(mode=mode), same_gauge=False)
    assert link.accepted
    assert link.residual < 1e-4
    np.testing.assert_allclose(link.S_map_window, expected(0.3), atol=2e-3)


def test_rigid_has_no_scale():
    there, here = views(2, 0.02)
    link = align(there, here, K, AlignmentConfig(mode="rigid"), same_gauge=True)
    assert link.log_scale == 0.0
    assert geometry.scale_of(link.S_map_window) == pytest.approx(1.0)


@pytest.mark.parametrize("mode", ["cameras", "dense"])
def test_moving_objects_in_the_overlap_do_not_bend_the_link(mode):
    there, here = views(3, 0.1)
    here = [spoiled(v, 0.3, 0.4, seed=i) for i, v in enumerate(here)]
    link = align(there, here, K, AlignmentConfig(mode=mode), same_gauge=False)
    assert link.accepted
    np.testing.assert_allclose(link.S_map_window, expected(0.1), atol=0.02)


@pytest.mark.parametrize("mode", ["cameras", "dense", "rigid"])
def test_a_bad_link_is_refused_and_told(mode):
    """Nonsense depth and poses: the newest overlap camera keeps its place, scale falls back to the prior's."""
    there, here = views(3, 0.0)
    rng = np.random.default_rng(0)
    here = [
        View(pose(50 + i, 1.0, 3.0), np.exp(rng.normal(0, 1, SHAPE)).astype(np.float32), v.confidence)
        for i, v in enumerate(here)
    ]
    config = AlignmentConfig(mode=mode)
    link = align(there, here, K, config, same_gauge=True)
    assert not link.accepted
    assert link.residual > config.max_residual
    assert link.sigma >= config.bad_link_sigma
    assert link.log_scale == 0.0
    newest = geometry.apply_similarity_to_pose(link.S_map_window, here[-1].T)
    np.testing.assert_allclose(newest, there[-1].T, atol=1e-9)


def test_overlap_without_any_depth_is_refused():
    there, here = views(2, 0.0)
    here = [dataclasses.replace(v, depth=np.full(SHAPE, np.nan, np.float32)) for v in here]
    link = align(there, here, K, AlignmentConfig(), same_gauge=True)
    assert not link.accepted
    assert np.isnan(link.residual)
    assert np.isfinite(link.S_map_window).all()


def test_a_bad_link_does_not_poison_the_chain():
    """Ten windows, the fifth is nonsense: scale and direction after it are those before it."""
    config = AlignmentConfig()
    S = np.eye(4)
    for window in range(10):
        there, here = views(2, 0.0, np.eye(4), seed=2 * window)
        there = [
            View(geometry.apply_similarity_to_pose(S, v.T), v.depth * np.float32(geometry.scale_of(S)), v.confidence)
            for v in there
        ]
        if window == 5:
            here = [
                dataclasses.replace(v, depth=np.exp(np.random.default_rng(0).normal(0, 2, SHAPE)).astype(np.float32))
                for v in here
            ]
        link = align(there, here, K, config, same_gauge=True)
        assert link.accepted == (window != 5)
        S = link.S_map_window
    assert geometry.scale_of(S) == pytest.approx(1.0, abs=1e-3)
    np.testing.assert_allclose(S, np.eye(4), atol=0.01)
