"""Dense depth: flow between posed keyframes measures what the network only guesses, and says how sure it is."""

import cv2
import numpy as np
import pytest

from spark3r_ros.refine import DenseView, dense_depth
from training.paths import camera_path
from training.scenes import Scene, camera_matrix

SIZE = (192, 144)
K = camera_matrix(*SIZE, 63.0)


@pytest.fixture(scope="module")
def window():
    """Views and true depths of a hand-held camera in a textured room."""
    scene, path = Scene(5, "room"), camera_path("handheld", 60, 5)[::8]
    pictures = [scene.render(T, K, *SIZE) for T in path]
    views = [DenseView(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), T) for (rgb, _), T in zip(pictures, path, strict=True)]
    return views, [depth for _, depth in pictures]


def guess(true_depth, seed=0):
    """What a poor network says: smooth errors of a third, and little confidence."""
    rng = np.random.default_rng(seed)
    error = cv2.resize(rng.normal(0, 0.35, (4, 5)).astype(np.float32), SIZE, interpolation=cv2.INTER_CUBIC)
    return true_depth * np.exp(error), np.full(true_depth.shape, 0.25, np.float32)


def relative_error(depth, true_depth):
    return np.abs(depth / true_depth - 1)


def test_measured_depth_is_far_better_than_the_guess(window):
    views, truth = window
    depth, confidence = guess(truth[3])
    found, sure = dense_depth(views[3], [v for v in views if v is not views[3]], depth, confidence, K)
    before, after = relative_error(depth, truth[3]), relative_error(found, truth[3])
    assert np.median(after) < 0.2 * np.median(before)
    assert np.mean(after) < 0.5 * np.mean(before)
    assert (sure > 0.5).mean() > 0.5
    assert found.dtype == sure.dtype == np.float32


def test_confidence_orders_errors(window):
    views, truth = window
    depth, confidence = guess(truth[3])
    found, sure = dense_depth(views[3], views[:3] + views[4:], depth, confidence, K)
    error = relative_error(found, truth[3])
    worst, best = np.quantile(sure, [0.25, 0.75])
    assert np.mean(error[sure >= best]) < 0.3 * np.mean(error[sure <= worst])
    assert np.mean(error[sure > 0.7]) < 0.05


def test_without_parallax_the_network_speaks(window):
    views, truth = window
    depth, confidence = guess(truth[3])
    same_place = [DenseView(v.gray, views[3].T_world_camera) for v in views[:3]]
    for others in ([], same_place):
        found, sure = dense_depth(views[3], others, depth, confidence, K)
        assert np.array_equal(found, depth.astype(np.float32))
        assert np.array_equal(sure, confidence)


def test_pixels_that_the_lens_never_saw_stay_without_confidence(window):
    views, truth = window
    depth, confidence = guess(truth[3])
    confidence[:20] = 0
    _, sure = dense_depth(views[3], views[:3] + views[4:], depth, confidence, K)
    assert (sure[:20] == 0).all()
    assert sure[30:].max() > 0.5


def test_other_cameras_in_wrong_places_are_not_believed(window):
    """Flow that lies off the epipolar lines says that poses are wrong: no confidence, no damage to speak of."""
    views, truth = window
    depth, confidence = guess(truth[3])
    turn = np.eye(4)
    turn[:3, :3] = cv2.Rodrigues(np.array([0.0, 0.0, 0.3]))[0]
    wrong = [DenseView(v.gray, v.T_world_camera @ turn) for v in views[:3]]
    _, sure = dense_depth(views[3], wrong, depth, confidence, K)
    assert (sure > 0.5).mean() < 0.35


def test_same_input_same_depth(window):
    views, truth = window
    depth, confidence = guess(truth[3])
    first, again = (dense_depth(views[3], views[:3] + views[4:], depth, confidence, K) for _ in range(2))
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])


def test_cameras_whose_turn_is_doubtful_measure_less(window):
    views, truth = window
    depth, confidence = guess(truth[3])
    doubtful = [DenseView(v.gray, v.T_world_camera, 0.02) for v in views]
    _, sure = dense_depth(views[3], views[:3] + views[4:], depth, confidence, K)
    _, less = dense_depth(doubtful[3], doubtful[:3] + doubtful[4:], depth, confidence, K)
    assert (less <= sure + 0.05).mean() > 0.9
    assert (less > 0.5).mean() < 0.5 * (sure > 0.5).mean()
