"""Where the intrinsics come from: CameraInfo with its lens model, or the first windows, after which they are locked."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import pytest
import torch
from oracle import Oracle, orbit

from spark3r_ros.camera import distort_points, has_distortion, undistort_points
from spark3r_ros.config import Config, with_values
from spark3r_ros.frame import CameraModel, Frame
from spark3r_ros.preprocess import FrameError, Preprocessor, Resize
from spark3r_ros.reconstructor import Reconstructor
from training.scenes import Scene, camera_matrix

WIDTH, HEIGHT = 320, 240
LENSES = {
    "plumb_bob": (-0.28, 0.09, 0.001, -0.0005, 0.0),
    "plumb_bob of four": (-0.28, 0.09, 0.001, -0.0005),
    "rational_polynomial": (0.6, -0.1, 0.0006, -0.0004, 0.02, 0.95, -0.05, 0.03),
    "equidistant": (-0.02, 0.004, -0.003, 0.0006),
}


def lens(name: str) -> CameraModel:
    K = camera_matrix(WIDTH, HEIGHT, 75.0)
    return CameraModel(WIDTH, HEIGHT, K, name.split()[0], LENSES[name])


def seen_through(camera: CameraModel, image: np.ndarray) -> np.ndarray:
    """The image that a lens makes of an ideal pinhole's [H, W, 3]: looked up backwards, one ray per pixel."""
    v, u = np.mgrid[: camera.height, : camera.width]
    ideal = undistort_points(camera, np.stack([u.ravel(), v.ravel()], axis=1)).astype(np.float32)
    ideal = ideal.reshape(camera.height, camera.width, 2)
    return cv2.remap(image, ideal[..., 0], ideal[..., 1], cv2.INTER_LINEAR)


def whole(height: int = HEIGHT, width: int = WIDTH) -> Resize:
    return Resize((0, 0, HEIGHT, WIDTH), (height, width))


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    pose = orbit(1).T_world_camera[0]
    rgb = Scene(3, "room").render(pose, camera_matrix(WIDTH, HEIGHT, 75.0), WIDTH, HEIGHT)[0]
    return cv2.GaussianBlur(rgb, (0, 0), 1.5)  # two interpolations follow


@pytest.mark.parametrize("name", LENSES)
def test_points_go_there_and_back(name):
    camera = lens(name)
    ideal = np.random.default_rng(0).uniform([40, 30], [WIDTH - 40, HEIGHT - 30], (200, 2))
    seen = distort_points(camera, ideal)
    assert np.abs(seen - ideal).max() > 2  # this lens does something
    np.testing.assert_allclose(undistort_points(camera, seen), ideal, atol=1e-3)


@pytest.mark.parametrize("name", LENSES)
def test_images_are_undistorted_with_their_model(name, picture):
    camera = lens(name)
    seen = seen_through(camera, picture)
    preprocess = Preprocessor(Frame(0, seen, camera=camera), whole())
    restored = preprocess(Frame(0, seen, camera=camera)).rgb
    inner = preprocess.valid.copy()
    inner[:20] = inner[-20:] = inner[:, :20] = inner[:, -20:] = False
    assert inner.mean() > 0.5
    off = np.abs(restored.astype(float) - picture)[inner]
    assert off.mean() < 2.0
    assert off.mean() < 0.3 * np.abs(seen.astype(float) - picture)[inner].mean()
    np.testing.assert_allclose(preprocess.K, camera.K)


def test_k_follows_the_resize(picture):
    camera = lens("plumb_bob")
    preprocess = Preprocessor(Frame(0, picture, camera=camera), whole(HEIGHT // 2, WIDTH // 2))
    np.testing.assert_allclose(preprocess.K[0, 0], camera.K[0, 0] / 2)
    np.testing.assert_allclose(preprocess.K[0, 2], (camera.K[0, 2] + 0.5) / 2 - 0.5)


def test_pixels_that_the_lens_never_saw_are_not_trusted(picture):
    camera = dataclasses.replace(lens("equidistant"), distortion=(1.0, 0.0, 0.0, 0.0))
    valid = Preprocessor(Frame(0, picture, camera=camera), whole()).valid
    assert valid[HEIGHT // 2, WIDTH // 2]
    assert not valid[0, 0]


def test_an_unknown_lens_is_refused(picture):
    camera = dataclasses.replace(lens("plumb_bob"), distortion_model="barrel")
    with pytest.raises(
        FrameError, match="must be one of plumb_bob, rational_polynomial, equidistant, none; got 'barrel'"
    ):
        Preprocessor(Frame(0, picture, camera=camera), whole())
    with pytest.raises(ValueError, match="barrel"):
        has_distortion(camera)


# -- estimated, then locked ----------------------------------------------------------------------------------------


class Guessing(Oracle):
    """Believes another focal length in every pass, unless it is told."""

    def __init__(self, stream) -> None:
        super().__init__(stream)
        self.told: list[float | None] = []
        self.guesses: list[float] = []

    def __call__(self, images, *, intrinsics=None, **options):
        prediction = super().__call__(images, intrinsics=intrinsics, **options)
        self.told.append(None if intrinsics is None else float(intrinsics[0, 0]))
        if intrinsics is not None or len(images) < 3:
            return prediction
        factor = 1 + 0.02 * self.rng.normal()
        self.guesses.append(float(self.stream.K[0, 0]) * factor)
        scale = torch.tensor([[factor, 1, 1], [1, factor, 1], [1, 1, 1]])
        return dataclasses.replace(prediction, intrinsics=prediction.intrinsics * scale)


def run(stream, oracle, **options) -> Reconstructor:
    settings = {"refine.mode": "off", "window.size": 6, "window.overlap": 2, "window.keyframe_flow": 0.06, **options}
    reconstructor = Reconstructor(with_values(Config(), settings), oracle)
    for frame in stream.frames:
        reconstructor.push(frame)
    reconstructor.finish()
    return reconstructor


def test_known_intrinsics_are_used_from_the_first_pass():
    stream = orbit(20, loops=0.1)
    oracle = Guessing(stream)
    run(stream, oracle)
    np.testing.assert_allclose(np.array(oracle.told, float), stream.K[0, 0], rtol=1e-6)


@pytest.mark.parametrize("windows", [1, 3])
def test_unknown_intrinsics_are_estimated_over_the_first_windows_then_locked(windows):
    stream = orbit(90, loops=0.375, camera=False)
    oracle = Guessing(stream)
    reconstructor = run(stream, oracle, **{"window.intrinsics_windows": windows})
    locked = [t for t in oracle.told if t is not None]
    assert len(oracle.guesses) == windows
    assert oracle.told.index(locked[0]) == len(oracle.told) - len(locked)  # once locked, always told
    assert len(set(locked)) == 1
    assert locked[0] == pytest.approx(np.median(oracle.guesses), rel=1e-5)
    np.testing.assert_allclose(reconstructor._solver.K[0, 0], locked[0], rtol=1e-5)


def test_locked_intrinsics_survive_being_lost():
    stream = orbit(60, loops=0.25, camera=False)
    oracle = Guessing(stream)
    reconstructor = run(stream, oracle)
    before = reconstructor._solver.K.copy()
    reconstructor._lose()
    np.testing.assert_array_equal(reconstructor._solver.K, before)
