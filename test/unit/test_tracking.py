"""What a pose is wrong by: its own fit, the keyframes that hold it, and the instant of its image."""

from __future__ import annotations

import numpy as np
import pytest
from oracle import Oracle, orbit

from spark3r_ros.config import Config, with_values
from spark3r_ros.geometry import make_T, se3_exp, so3_exp
from spark3r_ros.reconstructor import Reconstructor
from spark3r_ros.refine import TrackedPose
from spark3r_ros.tracking import INDEPENDENT_POINTS, TIMING_SIGMA, Estimate, turn_rates, with_drift
from spark3r_ros.windows import Keyframe

OWN = np.diag([0.01, 0.02, 0.03, 0.001, 0.002, 0.003]) ** 2


def keyframe(number, T, covariance=None):
    made = Keyframe(number, number, number, "", None, T, T, median_depth=2.0)
    if covariance is not None:
        made.covariance = covariance
    return made


def test_the_errors_of_the_keyframes_add_up_with_their_levers():
    T_keyframe = make_T(so3_exp(np.array([0.1, -0.7, 0.2])), np.array([1.0, 2.0, -0.5]))
    T_frame = T_keyframe @ make_T(so3_exp(np.array([0.0, 0.4, 0.0])), np.array([0.3, 0.0, 1.5]))
    covariance = np.diag([0.02, 0.01, 0.03, 0.01, 0.02, 0.005]) ** 2
    got = with_drift(Estimate(T_frame, OWN, 1.0), {7: 1.0}, {7: keyframe(7, T_keyframe, covariance)}, 0.0).covariance
    rng = np.random.default_rng(0)
    moved = []
    for xi in rng.multivariate_normal(np.zeros(6), covariance, 20000) * 0.1:  # small, so that first order is exact
        there = T_keyframe @ se3_exp(xi) @ np.linalg.inv(T_keyframe) @ T_frame
        step = np.linalg.inv(T_frame) @ there
        moved.append([*step[:3, 3], step[2, 1], step[0, 2], step[1, 0]])
    np.testing.assert_allclose(got, OWN + np.cov(np.array(moved).T) / 0.01, atol=0.03 * np.abs(got).max())


def test_what_many_keyframes_share_is_averaged_not_fused():
    T = np.eye(4)
    keyframes = {1: keyframe(1, T, OWN), 2: keyframe(2, T, 4 * OWN)}
    got = with_drift(Estimate(T, OWN, 1.0), {1: 0.25, 2: 0.75}, keyframes, 0.0).covariance
    np.testing.assert_allclose(got, OWN * (1 + 0.25 + 0.75 * 4))


def test_points_that_err_together_count_as_a_few():
    tracked = TrackedPose(np.eye(4), OWN, 30 * INDEPENDENT_POINTS, 0.2, True, {1: 1.0})
    got = with_drift(Estimate(np.eye(4), OWN, 1.0, tracked), {1: 1.0}, {1: keyframe(1, np.eye(4))}, 0.0).covariance
    np.testing.assert_allclose(got, 30 * OWN)


def test_doubt_is_of_the_fit_and_not_of_the_keyframes():
    covariance = np.eye(6)
    known = {1: keyframe(1, np.eye(4), covariance)}
    once, twice = (with_drift(Estimate(np.eye(4), OWN, 1.0), {1: 1.0}, known, 0.0, d).covariance for d in (1.0, 2.0))
    np.testing.assert_allclose(twice - once, 3 * OWN)


def test_a_turning_camera_knows_less():
    got = with_drift(Estimate(np.eye(4), OWN, 1.0), {1: 1.0}, {1: keyframe(1, np.eye(4))}, 3.0).covariance - OWN
    assert np.sqrt(np.trace(got[3:, 3:])) == pytest.approx(3.0 * TIMING_SIGMA)
    assert np.sqrt(np.trace(got[:3, :3])) == pytest.approx(3.0 * TIMING_SIGMA * 2.0)  # at the scene's distance


@pytest.mark.parametrize("refine", ["on", "off"])
def test_the_longer_the_way_the_less_is_known(refine):
    stream = orbit(100, loops=0.8)
    options = {"refine.mode": refine, "window.size": 6, "window.overlap": 2, "loops.enabled": False}
    options |= {"window.first_flow": 1.0, "window.first_seconds": 3.0}  # keyframes alike from the first to the last
    reconstructor = Reconstructor(with_values(Config(), options), Oracle(stream))
    poses = [p for frame in stream.frames for p in reconstructor.push(frame).poses]
    frames = np.array([np.sqrt(np.trace(p.covariance[:3, :3])) for p in poses])
    keyframes = [np.sqrt(np.trace(k.covariance[:3, :3])) for k in reconstructor._keyframes.values()]
    assert np.median(keyframes[-4:]) > 1.5 * np.median(keyframes[1:5])
    assert np.median(frames[-10:]) > 1.5 * np.median(keyframes[1:5])  # early frames are a scout's, which knows less


def test_turn_rates_are_those_of_the_faster_neighbour():
    angles = np.cumsum([0.0, 0.1, 0.4, 0.0])
    T = make_T(so3_exp(angles[:, None] * np.array([0.0, 1.0, 0.0])), np.zeros((4, 3)))
    np.testing.assert_allclose(turn_rates(T, np.array([0, 1, 2, 4]) * 10**9), [0.1, 0.4, 0.4, 0.0], atol=1e-6)
    np.testing.assert_array_equal(turn_rates(T[:1], np.array([5])), [0.0])
