"""What is expected of a point's depth before its rays say anything."""

import numpy as np
import pytest

from spark3r_ros.refine.keyframes import (
    FIRMEST_SIGMA,
    FLAT_PRIOR_SIGMA,
    NETWORK_SIGMA,
    SIGMA_PX,
    Keyframe,
    inverse_depth_priors,
    normalised,
)
from spark3r_ros.refine.landmarks import LandmarkTable

K = np.array([[500.0, 0, 319.5], [0, 500.0, 239.5], [0, 0, 1]])
NEAR, FAR = 2.0, 8.0


def two_walls(num_points: int = 400) -> tuple[Keyframe, np.ndarray]:
    """A keyframe at the origin, and the depth [N] of its points: a near wall in the left half, a far one beside it."""
    uv = np.random.default_rng(0).uniform([0, 0], [640, 480], (num_points, 2))
    uv = uv[np.abs(uv[:, 0] - 320) > 60]
    keyframe = Keyframe(0, np.arange(len(uv)), uv, np.zeros_like(uv))
    return keyframe, np.where(uv[:, 0] < 320, NEAR, FAR)


def known(keyframe: Keyframe, depth: np.ndarray, rows: np.ndarray, sigma: float = 0.05) -> LandmarkTable:
    table = LandmarkTable()
    xyz = np.c_[normalised(keyframe.uv[rows], K), np.ones(len(rows))] * depth[rows, None]
    table.put(keyframe.ids[rows], xyz, np.full(len(rows), sigma), np.zeros(len(rows), int), np.zeros((len(rows), 3)))
    return table


def priors(keyframe: Keyframe, table: LandmarkTable) -> tuple[np.ndarray, np.ndarray]:
    """Of all its points: depth, and relative sigma."""
    count = len(keyframe.ids)
    expected, sigma = inverse_depth_priors([keyframe], np.eye(4)[None], table, np.zeros(count, int), np.arange(count))
    return 1.0 / expected, sigma


def test_a_point_is_expected_where_its_neighbours_are():
    """Regression: points that were known were pulled to the depth of the whole image."""
    keyframe, depth = two_walls()
    rows = np.arange(0, len(depth), 2)
    expected, sigma = priors(keyframe, known(keyframe, depth, rows))
    np.testing.assert_allclose(expected, depth)
    np.testing.assert_array_equal(sigma, FLAT_PRIOR_SIGMA)


def test_of_a_network_the_shape_between_neighbours_counts():
    """It has one wall three times too deep and the other at half of its depth; a relief of 20% on both is true."""
    keyframe, depth = two_walls()
    depth = depth * np.random.default_rng(1).uniform(0.9, 1.1, len(depth))
    keyframe.network_depth = depth * np.where(keyframe.uv[:, 0] < 320, 3.0, 0.5)
    keyframe.network_error = np.full(len(depth), 0.1)
    rows = np.arange(0, len(depth), 2)
    expected, sigma = priors(keyframe, known(keyframe, depth, rows))
    np.testing.assert_allclose(expected, depth)
    np.testing.assert_allclose(sigma, NETWORK_SIGMA * 0.1)


def test_where_nothing_is_known_the_network_is_taken_at_its_word():
    keyframe, depth = two_walls()
    keyframe.network_depth, keyframe.network_error = depth.copy(), np.full(len(depth), 0.1)
    np.testing.assert_allclose(priors(keyframe, LandmarkTable())[0], depth)
    unsure = known(keyframe, 5 * depth, np.arange(len(depth)), sigma=0.5)
    np.testing.assert_allclose(priors(keyframe, unsure)[0], depth)


def test_without_network_and_neighbours_it_is_one():
    keyframe, _ = two_walls()
    np.testing.assert_array_equal(priors(keyframe, LandmarkTable())[0], 1.0)


@pytest.mark.parametrize(
    ("error", "sigma"),
    [(0.001, FIRMEST_SIGMA), (0.2, NETWORK_SIGMA * 0.2), (5.0, FLAT_PRIOR_SIGMA)],
)
def test_a_network_is_believed_as_much_as_it_believes_itself(error, sigma):
    keyframe, depth = two_walls()
    keyframe.network_depth, keyframe.network_error = depth, np.full(len(depth), error)
    np.testing.assert_allclose(priors(keyframe, LandmarkTable())[1], sigma)
    keyframe.sigma_px = 2 * SIGMA_PX  # a blurred image: tracks are doubted, priors must not win for it
    np.testing.assert_allclose(priors(keyframe, LandmarkTable())[1], 2 * sigma)


def test_points_that_were_recognised_later_have_no_network():
    keyframe, depth = two_walls()
    keyframe.network_depth, keyframe.network_error = depth.copy(), np.full(len(depth), 0.1)
    keyframe.add(np.array([10_000, 10_001]), np.array([[100.0, 200.0], [500.0, 200.0]]), np.zeros((2, 2)))
    expected, sigma = priors(keyframe, known(keyframe, depth, np.arange(len(depth))))
    np.testing.assert_allclose(expected[-2:], [NEAR, FAR])
    np.testing.assert_array_equal(sigma[-2:], FLAT_PRIOR_SIGMA)
    np.testing.assert_allclose(sigma[:-2], NETWORK_SIGMA * 0.1)
