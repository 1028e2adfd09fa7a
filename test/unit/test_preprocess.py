"""Every model's resize rule, and that pixels, rays and images go to the network and back by the same map."""

import cv2
import numpy as np
import pytest

from spark3r_ros.backbone.registry import MODELS
from spark3r_ros.frame import CameraModel, Frame
from spark3r_ros.preprocess import Preprocessor, Resize, ResizeRule

RULES = {name: entry.spec.resize for name, entry in MODELS.items()}
CAMERAS = [
    (480, 640),
    (640, 480),
    (1080, 1920),
    (1920, 1080),
    (375, 1242),
    (100, 100),
    (97, 61),
    (3000, 4000),
    (40, 900),
]


@pytest.mark.parametrize(
    ("name", "camera", "size"),
    [
        ("vggt", (480, 640), (392, 518)),
        ("vggt", (640, 480), (518, 518)),  # taller than wide: cut to a square
        ("vggt", (1080, 1920), (294, 518)),
        ("pi3", (480, 640), (434, 574)),
        ("pi3x", (640, 480), (574, 434)),
        ("da3-small", (480, 640), (378, 504)),
        ("da3-giant", (640, 480), (504, 378)),
        ("da3metric-large", (1080, 1920), (280, 504)),  # 283.5 is nearer to 280 than to 294
        ("da3-base", (287, 504), (294, 504)),  # halves go up
        ("da3-base", (856, 1163), (378, 504)),  # 370.96 counts as 371, which is half-way
        ("omega", (480, 640), (448, 592)),
        ("omega", (300, 1000), (368, 720)),  # cut to 2 : 1
    ],
)
def test_sizes_are_those_of_the_originals(name, camera, size):
    assert RULES[name].plan(*camera).size == size


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("camera", CAMERAS)
def test_every_plan_fits_the_model_and_the_image(name, camera):
    rule = RULES[name]
    plan = rule.plan(*camera)
    assert all(side >= rule.patch and side % rule.patch == 0 for side in plan.size)
    top, left, height, width = plan.box
    assert top >= 0
    assert left >= 0
    assert top + height <= camera[0]
    assert left + width <= camera[1]
    if rule.mode == "area" and min(camera) > 50:
        assert plan.size[0] * plan.size[1] <= 255_000
    if min(plan.size) >= 8 * rule.patch:  # sides are rounded to patches, the image is not squashed further
        assert np.ptp(plan.ratio) / plan.ratio.mean() < 0.08


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("camera", CAMERAS)
def test_pixels_and_intrinsics_there_and_back(name, camera):
    plan = RULES[name].plan(*camera)
    K = np.array([[500.0, 0, camera[1] / 2 - 3], [0, 510, camera[0] / 2 + 2], [0, 0, 1]])
    uv = np.random.default_rng(0).uniform(0, 90, (50, 2))
    np.testing.assert_allclose(plan.to_camera(plan.to_network(uv)), uv)
    np.testing.assert_allclose(plan.intrinsics_to_camera(plan.intrinsics_to_network(K)), K)
    point = np.array([0.3, -0.2, 2.0])  # seen by both cameras at the same place
    seen = (K @ point / point[2])[:2]
    np.testing.assert_allclose((plan.intrinsics_to_network(K) @ point / point[2])[:2], plan.to_network(seen))


@pytest.mark.parametrize(("name", "camera"), [("vggt", (640, 480)), ("omega", (300, 1000)), ("vggt", (90, 120))])
def test_the_image_moves_as_its_pixels_do(name, camera):
    """A spot painted in the camera's image is found where ``to_network`` says: cut, shrunk and enlarged."""
    plan = RULES[name].plan(*camera)
    top, left, height, width = plan.box
    y, x = np.mgrid[: top * 2 + height, : left * 2 + width].astype(np.float64)
    spot = np.array([left + 0.3 * width, top + 0.6 * height])
    image = np.exp(-((x - spot[0]) ** 2 + (y - spot[1]) ** 2) / (0.02 * width) ** 2).astype(np.float32)
    small = plan.apply(image).astype(np.float64)
    assert small.shape == plan.size
    v, u = np.mgrid[: plan.size[0], : plan.size[1]]
    found = np.array([(small * u).sum(), (small * v).sum()]) / small.sum()
    np.testing.assert_allclose(found, plan.to_network(spot), atol=0.02)


def test_nearest_keeps_values():
    depth = np.where(np.arange(640) < 300, 1, 9).astype(np.float32) * np.ones((480, 1), np.float32)
    assert set(np.unique(RULES["vggt"].plan(480, 640).apply_nearest(depth))) == {1, 9}


def test_a_tall_camera_is_cut_and_not_squashed():
    """The whole way of a frame: image, depth and K, for a model that cuts."""
    image = np.zeros((640, 480, 3), np.uint8)
    cv2.circle(image, (240, 320), 60, (255, 255, 255), -1)
    K = np.array([[400.0, 0, 239.5], [0, 400, 319.5], [0, 0, 1]])
    frame = Frame(0, image, camera=CameraModel(480, 640, K), depth=np.full((640, 480), 2, np.float32))
    preprocess = Preprocessor(frame, RULES["vggt"].plan(640, 480))
    network = preprocess(frame)
    assert network.rgb.shape == (518, 518, 3)
    assert network.depth.shape == (518, 518)
    rows, columns = (np.ptp(np.nonzero(network.rgb[..., 0] > 127)[axis]) for axis in (0, 1))
    assert abs(rows - columns) <= 1
    np.testing.assert_allclose(preprocess.K[:2, :2], np.eye(2) * 400 * 518 / 480)
    np.testing.assert_allclose(preprocess.K[:2, 2], [258.5, 258.5])


def test_no_image_is_refused():
    with pytest.raises(ValueError, match="image sides must be >= 1, got 640x0"):
        ResizeRule(14, 504).plan(0, 640)


def test_resize_of_the_whole_image_is_plain_scaling():
    K = np.array([[500.0, 0, 319.5], [0, 500, 239.5], [0, 0, 1]])
    half = Resize((0, 0, 480, 640), (240, 320)).intrinsics_to_network(K)
    np.testing.assert_allclose(half, [[250, 0, 159.5], [0, 250, 119.5], [0, 0, 1]])
