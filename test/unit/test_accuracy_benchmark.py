"""The rendered streams of the accuracy benchmark are what it says they are."""

import itertools

import numpy as np

from benchmarks import accuracy
from spark3r_ros import geometry


def test_slow_streams_have_wide_baselines():
    stream = accuracy.slow(3)
    T = stream.T_world_camera
    steps = geometry.inverse(T[:-1]) @ T[1:]
    assert len(T) == 16
    assert 0.2 < np.median(np.linalg.norm(steps[:, :3, 3], axis=1)) < 0.35
    assert 6 < np.degrees(np.median(geometry.rotation_angle(steps[:, :3, :3]))) < 10
    first, second = itertools.islice(stream.frames(), 2)
    assert second.stamp_ns - first.stamp_ns == 10**9
    assert stream.depth(1).shape == first.image.shape[:2]


def test_held_out_scenes_differ_and_repeat():
    one, two, again = (accuracy.held_out(i, 12).T_world_camera for i in (0, 1, 0))
    assert not np.allclose(one, two)
    np.testing.assert_array_equal(one, again)


def test_noise_is_one_grey_level_and_repeats():
    plain = accuracy.slow(3)
    (clean,), (one,), (again,), (other,) = (
        itertools.islice(stream.frames(), 1)
        for stream in (plain, accuracy.noisy(plain, 1), accuracy.noisy(plain, 1), accuracy.noisy(plain, 2))
    )
    np.testing.assert_array_equal(one.image, again.image)
    assert (one.image != other.image).any()
    assert one.stamp_ns == clean.stamp_ns
    inner = (clean.image > 5) & (clean.image < 250)
    assert 0.95 < np.std((one.image.astype(int) - clean.image)[inner]) < 1.1
