"""Depth-Anything-3 against its own package at other resolutions and frame counts than the fixtures'."""

import warnings

import pytest
import torch

from benchmarks.parity import load_fill, weights
from spark3r_ros.backbone import load_backbone
from spark3r_ros.backbone.model import inverse_T

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from depth_anything_3.cfg import create_object, load_config
        from depth_anything_3.registry import MODEL_REGISTRY
except ImportError as error:
    pytest.skip(f"depth-anything-3 is not installed ({error})", allow_module_level=True)

MEAN, STD = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def both(golden, name):
    state = weights(golden, name)
    original = create_object(load_config(MODEL_REGISTRY[name])).eval()
    original.load_state_dict(state, strict=True)
    return original, load_backbone(name, state)


def close(ours, theirs, tolerance=1e-3):
    assert float((ours - theirs).abs().max() / theirs.std()) < tolerance


@pytest.fixture(scope="module")
def small(shared):
    return both(shared("golden"), "da3-small")


@pytest.mark.parametrize(
    ("num_frames", "height", "width", "seed"), [(1, 84, 70, 2), (2, 70, 98, 3), (5, 56, 84, 4), (8, 42, 42, 5)]
)
def test_any_view_at_other_sizes(shared, small, num_frames, height, width, seed):
    """From three frames on this includes the choice of the reference frame."""
    original, backbone = small
    images = torch.from_numpy(load_fill(shared("golden")).images(num_frames, height, width, seed))
    with torch.inference_mode():
        theirs = original(((images - MEAN) / STD)[None])
    ours = backbone(images)
    close(ours.depth, theirs["depth"][0])
    close(1 / (1 - ours.confidence), theirs["depth_conf"][0])
    close(inverse_T(ours.T_world_camera)[:, :3], theirs["extrinsics"][0])
    close(ours.intrinsics, theirs["intrinsics"][0])


@pytest.mark.large
def test_metric_depth(shared):
    """Where there is sky the original's wrapper overwrites depth afterwards; the network's output is compared."""
    golden = shared("golden")
    original, backbone = both(golden, "da3metric-large")
    images = torch.from_numpy(load_fill(golden).images(2, 56, 70, 3))
    K = torch.tensor([[150.0, 0, 35], [0, 150, 28], [0, 0, 1]])
    with torch.inference_mode():
        theirs = original(((images - MEAN) / STD)[None])
    raw = []
    backbone.model.register_forward_hook(lambda _, args, out: raw.append(out))
    ours = backbone(images, intrinsics=K)
    close(raw[0].extras["sky"][0], theirs["sky"][0])
    ground = theirs["sky"][0] < 0.3
    assert ground.float().mean() > 0.5
    close(raw[0].extras["raw_depth"][0][ground], theirs["depth"][0][ground])
    close(ours.depth, raw[0].extras["raw_depth"][0] * 150 / 300, 1e-6)
    assert torch.isnan(ours.T_world_camera).all()
