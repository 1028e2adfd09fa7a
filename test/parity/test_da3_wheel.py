"""Depth-Anything-3 against its own package at other resolutions and frame counts than the fixtures'."""

import importlib
import sys
import warnings
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.parity import load_fill
from spark3r_ros.backbone import load_backbone
from spark3r_ros.backbone.checkpoint import convert, differences
from spark3r_ros.backbone.model import inverse_T
from spark3r_ros.backbone.registry import MODELS, skeleton

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from depth_anything_3.cfg import create_object, load_config
        from depth_anything_3.registry import MODEL_REGISTRY
except ImportError as error:
    pytest.skip(f"depth-anything-3 is not installed ({error})", allow_module_level=True)

MEAN, STD = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def without_memory(name):
    """The original on the meta device, where building it takes no time."""
    linspace = torch.linspace  # whose values its constructor reads back
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(torch, "linspace", lambda *args, **kwargs: linspace(*args, **{**kwargs, "device": "cpu"}))
        return create_object(load_config(MODEL_REGISTRY[name])).eval()


def both(golden, name):
    """The original with the fixtures' weights, and ours on the same memory."""
    original = without_memory(name).to_empty(device="cpu")
    state, fill = original.state_dict(), load_fill(golden)
    for key, value in state.items():
        value.copy_(torch.from_numpy(fill.tensor(key, tuple(value.shape))))
    return original, load_backbone(name, state)


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("da3-small", "da3-small"),
        ("da3-giant", "da3-giant"),
        ("da3metric-large", "da3metric-large"),
        ("da3nested-giant-large", "da3-giant"),
        ("da3nested-giant-large", "da3metric-large"),
    ],
)
def test_every_key_of_the_original_has_its_place(theirs, ours, prefix):
    state = {prefix + key: value for key, value in without_memory(theirs).state_dict().items()}
    wrong = differences(skeleton(MODELS[ours]).state_dict(), convert(state, MODELS[ours].keys))
    assert not any(wrong.values()), wrong


def agree(original, backbone, images):
    with torch.inference_mode():
        theirs = original(((images - MEAN) / STD)[None])
    ours = backbone(images)
    close(ours.depth, theirs["depth"][0])
    close(1 / (1 - ours.confidence), theirs["depth_conf"][0])
    close(inverse_T(ours.T_world_camera)[:, :3], theirs["extrinsics"][0])
    close(ours.intrinsics, theirs["intrinsics"][0])


def close(ours, theirs, tolerance=1e-3):
    """In units of the original's standard deviation, as with the fixtures."""
    assert float((ours - theirs).abs().max() / theirs.std()) < tolerance


def test_image_sizes(monkeypatch):
    """Of the original's own preprocessing; only what makes tensors of its images is replaced (it needs torchvision)."""
    transforms = ModuleType("torchvision.transforms")
    transforms.ToTensor = lambda: lambda image: torch.zeros(3, image.height, image.width)
    transforms.Normalize = lambda *_, **__: torch.nn.Identity()
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(transforms=transforms))
    monkeypatch.setitem(sys.modules, "torchvision.transforms", transforms)
    processor = importlib.import_module("depth_anything_3.utils.io.input_processor").InputProcessor()
    rule, rng = MODELS["da3-small"].spec.resize, np.random.default_rng(0)
    for height, width in [(480, 640), (1080, 1920), (287, 504), *rng.integers(64, 1400, (60, 2)).tolist()]:
        tensor, *_ = processor([np.zeros((height, width, 3), np.uint8)], num_workers=1)
        assert rule.plan(height, width).size == tensor.shape[-2:], (height, width)


@pytest.fixture(scope="module")
def small(shared):
    return both(shared("golden"), "da3-small")


@pytest.mark.parametrize(
    ("num_frames", "height", "width", "seed"), [(1, 84, 70, 2), (2, 70, 98, 3), (5, 56, 84, 4), (8, 42, 42, 5)]
)
def test_any_view_at_other_sizes(shared, small, num_frames, height, width, seed):
    """From three frames on this includes the choice of the reference frame."""
    agree(*small, torch.from_numpy(load_fill(shared("golden")).images(num_frames, height, width, seed)))


@pytest.mark.large
def test_giant(shared):
    """Its gated feed-forward has no fixture."""
    agree(*both(shared("golden"), "da3-giant"), torch.from_numpy(load_fill(shared("golden")).images(3, 56, 70, 6)))


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
