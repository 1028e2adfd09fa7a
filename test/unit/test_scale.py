"""Metric scale: what each source measures, and what the filter believes."""

from __future__ import annotations

import numpy as np
import pytest

from spark3r_ros import geometry
from spark3r_ros.config import ScaleConfig
from spark3r_ros.scale import (
    Measurement,
    OdometrySource,
    ScaleFilter,
    from_depth,
    from_height,
    from_model,
    ground_height,
)
from spark3r_ros.windows import DepthMap, Keyframe

K = np.array([[100.0, 0, 79.5], [0, 100.0, 59.5], [0, 0, 1]])


def keyframe(number: int = 0, **values) -> Keyframe:
    return Keyframe(number, number, number, "camera", None, **values)


def feed(scale: ScaleFilter, values, source="odometry", sigma=0.03) -> list[bool]:
    return [scale.add(Measurement(v, sigma, source, i), 1.0) for i, v in enumerate(values)]


def test_scale_is_model_scale_until_enough_measurements_agree():
    scale = ScaleFilter(ScaleConfig())
    feed(scale, [0.7, -0.4])
    assert not scale.estimate.is_metric
    feed(scale, [0.71, 0.69])
    assert scale.estimate.is_metric
    assert scale.estimate.log_scale == pytest.approx(0.7, abs=0.02)
    assert scale.estimate.source == "odometry"


def test_a_lying_source_does_not_move_the_scale():
    scale = ScaleFilter(ScaleConfig())
    feed(scale, np.random.default_rng(0).normal(0.7, 0.03, 20))
    before = scale.estimate
    assert not any(feed(scale, [1.4] * 30, "depth"))
    assert scale.estimate.log_scale == before.log_scale
    assert scale.num_rejected == 30


def test_of_two_sources_that_contradict_neither_makes_it_metric(caplog):
    scale = ScaleFilter(ScaleConfig())
    for i in range(20):
        feed(scale, [1.4, 1.41], "depth")  # the liar speaks twice as often
        feed(scale, [0.7 + 0.01 * (i % 2)], "odometry")
    assert not scale.estimate.is_metric
    assert scale.num_rejected > 0
    assert "check or switch off one of them" in caplog.text
    assert len(caplog.records) == 1
    feed(scale, [0.7, 0.72, 0.69], "height", 0.08)  # two against one
    feed(scale, [0.7], "odometry")
    assert scale.estimate.is_metric
    assert scale.estimate.log_scale == pytest.approx(0.7, abs=0.03)
    assert not any(feed(scale, [1.4] * 30, "depth"))


def test_a_source_that_was_wrong_once_and_fell_silent_is_forgotten():
    scale = ScaleFilter(ScaleConfig())
    feed(scale, [-1.0], "height")
    assert not any(feed(scale, [0.5] * 9))
    assert feed(scale, [0.5]) == [True]
    assert scale.estimate.log_scale == pytest.approx(0.5)


def test_the_outliers_of_an_honest_source_do_not_count_against_it():
    scale = ScaleFilter(ScaleConfig())
    feed(scale, [0.5, 2.0, 0.51], "height", 0.05)
    feed(scale, [0.49, 0.5], "odometry")
    assert scale.estimate.log_scale == pytest.approx(0.5, abs=0.02)


def test_sigma_shrinks_but_never_below_the_floor():
    scale = ScaleFilter(ScaleConfig())
    feed(scale, [0.1] * 500)
    assert 0.005 <= scale.estimate.sigma < 0.012


def test_the_strongest_source_gives_the_name():
    scale = ScaleFilter(ScaleConfig())
    feed(scale, [0.1] * 3, "height", 0.1)
    feed(scale, [0.1] * 3, "depth", 0.03)
    assert scale.estimate.source == "depth"


def test_a_stretched_keyframe_says_the_scale_of_the_map():
    scale = ScaleFilter(ScaleConfig())
    for i in range(5):
        scale.add(Measurement(0.5, 0.03, "depth", i), keyframe_scale=2.0)
    assert scale.estimate.log_scale == pytest.approx(0.5 - np.log(2), abs=1e-6)
    scale.restart(dict.fromkeys(range(5), 1.0))
    assert scale.estimate.log_scale == pytest.approx(0.5, abs=1e-6)


def test_depth_image_gives_metres_per_unit():
    depth = np.random.default_rng(0).uniform(1, 3, (120, 160)).astype(np.float32)
    metric = 2.5 * depth
    metric[:40] = np.nan  # unknown
    metric[40:50] = 9.0  # wrong
    k = keyframe(dense=DepthMap(depth, np.full(depth.shape, 0.9, np.float32), K), metric_depth=metric)
    assert from_depth(k).log_scale == pytest.approx(np.log(2.5), abs=0.01)
    assert from_depth(keyframe()) is None


def floor_depth(height: float, pitch: float) -> np.ndarray:
    """Depth of a floor below a camera that looks down by ``pitch`` rad, and of a wall behind it at 6."""
    rays = geometry.unproject(np.ones((120, 160)), K) @ geometry.so3_exp(np.array([-pitch, 0, 0])).T
    with np.errstate(divide="ignore"):
        return np.where(rays[..., 1] > 0, np.minimum(height / np.maximum(rays[..., 1], 1e-9), 6.0), 6.0)


@pytest.mark.parametrize("pitch", [0.0, 0.3, 0.6])
def test_camera_height_over_the_ground_gives_scale(pitch):
    depth = floor_depth(0.8, pitch).astype(np.float32)
    depth *= np.random.default_rng(0).normal(1, 0.005, depth.shape).astype(np.float32)
    k = keyframe(dense=DepthMap(depth, np.full(depth.shape, 0.9, np.float32), K))
    assert from_height(k, camera_height=1.6).log_scale == pytest.approx(np.log(2), abs=0.03)
    assert from_height(k, camera_height=0.0) is None


def test_no_ground_no_height():
    wall = geometry.unproject(np.full((60, 160), 3.0), K).reshape(-1, 3)
    assert ground_height(wall) is None
    assert ground_height(wall[:10]) is None


def travel(step_metres: float, units_per_metre: float, turn: float = 0.0) -> list[Keyframe]:
    frames = []
    for i in range(12):
        T = geometry.make_T(geometry.so3_exp(np.array([0, 0, turn * i])), np.array([step_metres * i, 0, 0]))
        world = np.eye(4)
        world[:3, 3] = [0, 0, step_metres * i * units_per_metre]
        frames.append(keyframe(i, T_odom_base=T, T_world_camera=world))
    return frames


def test_odometry_measures_over_a_long_enough_baseline():
    source = OdometrySource(ScaleConfig())
    measurements = source.add(travel(0.1, 0.5))
    assert len(measurements) == 3
    for m in measurements:
        assert m.log_scale == pytest.approx(np.log(2), abs=1e-6)


def test_odometry_trusts_turns_less():
    straight = OdometrySource(ScaleConfig()).add(travel(0.1, 0.5))[0]
    turning = OdometrySource(ScaleConfig()).add(travel(0.1, 0.5, turn=0.1))[0]
    assert turning.sigma > 3 * straight.sigma


def test_odometry_that_stands_still_says_nothing():
    assert OdometrySource(ScaleConfig()).add(travel(0.0, 0.5)) == []
    assert OdometrySource(ScaleConfig()).add([keyframe(i) for i in range(5)]) == []


def test_a_metric_model_speaks_alone():
    scale = ScaleFilter(ScaleConfig())
    assert scale.add(from_model(keyframe(), 0.2, 0.01), 1.0)
    assert scale.estimate.source == "model"
    assert scale.estimate.log_scale == pytest.approx(-0.2)
