"""What every family must do, on toy sizes: the public result, batches, training, reduction, the GPU path's types."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch
from tiny_models import FAMILIES, images, tiny_model

from spark3r_ros.backbone import Backbone, heads
from spark3r_ros.backbone.trunk import PassOptions
from spark3r_ros.config import ContextConfig, ReductionConfig
from spark3r_ros.frame import Gauge
from spark3r_ros.reduction import FactorFile, save_factor_file

pytestmark = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def model(family):
    return tiny_model(family)


@pytest.fixture
def frames(model):
    patch = model.spec.trunk.patch
    return images(5, 3 * patch, 4 * patch)


def test_the_public_result(family, model, frames):
    out = Backbone(model)(frames)
    height, width = frames.shape[-2:]
    assert out.T_world_camera.shape == (5, 4, 4)
    assert out.intrinsics.shape == (5, 3, 3)
    assert out.depth.shape == out.confidence.shape == (5, height, width)
    assert out.gauge is (Gauge.FREE if family == "pi3" else Gauge.ANCHORED)
    R = out.T_world_camera[:, :3, :3]
    torch.testing.assert_close(R @ R.mT, torch.eye(3).expand(5, 3, 3), atol=1e-5, rtol=0)
    assert (torch.linalg.det(R) > 0).all()
    assert (out.T_world_camera[:, 3] == torch.tensor([0.0, 0, 0, 1])).all()
    assert (out.depth > 0).all()
    assert ((out.confidence >= 0) & (out.confidence < 1)).all()
    torch.testing.assert_close(out.intrinsics[:, 0, 2], torch.full((5,), width / 2))
    torch.testing.assert_close(out.descriptors.norm(dim=-1), torch.ones(5))
    assert out.depth.is_inference()
    with pytest.raises(FrozenInstanceError):
        out.depth = out.confidence


def test_descriptors_belong_to_one_frame(model, frames):
    backbone = Backbone(model)
    alone = torch.cat([backbone(frame[None]).descriptors for frame in frames])
    torch.testing.assert_close(backbone(frames).descriptors, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(2, 3, 50, 56), (2, 3, 0, 56), (0, 3, 112, 112), (2, 1, 112, 112), (3, 112, 112)])
def test_other_image_sizes_are_refused(model, shape):
    with pytest.raises(ValueError, match="multiples of|must be"):
        Backbone(model)(torch.zeros(shape))


def test_other_values_are_refused(model, frames):
    backbone = Backbone(model)
    with pytest.raises(ValueError, match=r"floating point in \[0, 1\], got torch.uint8; divide bytes by 255"):
        backbone((255 * frames).byte())
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 0 to 255"):
        backbone(255 * (frames > 0.5).float())
    with pytest.raises(ValueError, match=r"in \[0, 1\], got nan"):
        backbone(frames.log().sqrt())
    with pytest.raises(ValueError, match=r"intrinsics must be \[3, 3\], got \[5, 3, 3\]"):
        backbone(frames, intrinsics=torch.eye(3).expand(5, 3, 3))


def test_a_context_of_another_size_is_refused(model, frames):
    backbone, patch = Backbone(model), model.spec.trunk.patch
    context = backbone.new_context(ContextConfig(), 2 * patch, 2 * patch)
    with pytest.raises(ValueError, match=f"at {4 * patch}x{3 * patch}: make a new one"):
        backbone(frames, context=context)


def test_the_context_keeps_what_the_parameters_call_sensitive(model, frames, tmp_path):
    """One set of sensitive layers for reduction and context; a context of any such set fits the model."""
    backbone, size = Backbone(model), frames.shape[-2:]
    num_layers, config = model.spec.trunk.num_global, ContextConfig(frames=12)
    path = tmp_path / "factors.json"
    save_factor_file(path, FactorFile(model.spec.name, num_layers, (1,)))
    for reduction, sensitive in (
        (ReductionConfig(sensitive_layers="0"), {0}),
        (ReductionConfig(factor_file=str(path)), {1}),
        (ReductionConfig(sensitive_layers="none"), set()),
    ):
        context = backbone.new_context(config, *size, reduction)
        assert context.spec.sensitive == sensitive == backbone._sensitive(reduction)
        backbone(frames[:2], context=context, reduction=reduction)
        pages = [layer.page_capacity for layer in context._layers]
        assert pages == [
            12 if layer in sensitive else 5 if model.spec.name == "pi3" else 4 for layer in range(num_layers)
        ]
    with pytest.raises(ValueError, match=f"global layer {num_layers} is unknown, allowed are 0 to {num_layers - 1}"):
        backbone.new_context(config, *size, ReductionConfig(sensitive_layers=str(num_layers)))


def test_any_floating_point_type_will_do(model, frames):
    assert Backbone(model)(frames.double()).depth.dtype == torch.float32


def test_known_intrinsics_replace_the_estimate(model, frames):
    K = torch.tensor([[40.0, 0, 28], [0, 41, 21], [0, 0, 1]])
    assert (Backbone(model)(frames, intrinsics=K).intrinsics == K).all()


def test_a_batch_is_its_sequences(model, frames):
    two = torch.stack([frames[:2], frames[2:4]])
    with torch.inference_mode():
        batched, single = model(two), model(two[1:])
    torch.testing.assert_close(batched.depth[1], single.depth[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(batched.T_world_camera[1], single.T_world_camera[0], rtol=1e-4, atol=1e-5)


def test_every_weight_is_trained(model, frames):
    """Training sees windows as streaming does: a block-causal mask and thinned keys."""
    options = PassOptions(
        reduction=ReductionConfig(kv_factor=2, query_factor=1), window_ids=torch.tensor([0, 0, 0, 1, 1])
    )
    kwargs = {"points": True} if model.spec.name == "vggt" else {}
    out = model(frames[None], options, **kwargs)
    outputs = [out.depth, out.confidence, out.T_world_camera, out.intrinsics, *out.extras.values()]
    sum(o.float().sum() for o in outputs).backward()
    unused = {"encoder.cls_token"} if model.spec.trunk.plain else {"trunk.blocks.0.attn"}
    silent = {name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()}
    assert silent <= unused


@pytest.mark.parametrize("config", [ReductionConfig(kv_factor=1, query_factor=1, insensitive_multiplier=1)])
def test_reduction_by_one_is_the_dense_pass(model, frames, config):
    backbone = Backbone(model)
    dense, reduced = backbone(frames), backbone(frames, reduction=config)
    assert (dense.depth == reduced.depth).all()
    assert (dense.T_world_camera == reduced.T_world_camera).all()


@pytest.mark.parametrize("matching", ["input", "q", "k"])
def test_reduction_changes_little_between_equal_frames(model, frames, matching):
    """Frames that repeat lose nothing: merged queries are equal, and thinned keys say the same."""
    patch = model.spec.trunk.patch
    still = images(1, 3 * patch, 4 * patch).expand(4, -1, -1, -1)
    backbone = Backbone(model)
    context = backbone.new_context(ContextConfig(), *still.shape[-2:])
    backbone(still[:1], context=context)
    context.commit([0], [0])  # from here on all frames carry the same tokens
    dense = backbone(still, context=None if model.spec.name == "pi3" else context)
    config = ReductionConfig(kv_factor=1, query_factor=2, insensitive_multiplier=1, matching=matching)
    reduced = backbone(still, context=None if model.spec.name == "pi3" else context, reduction=config)
    torch.testing.assert_close(reduced.depth.log(), dense.depth.log(), atol=1e-4, rtol=0)
    torch.testing.assert_close(reduced.T_world_camera, dense.T_world_camera, atol=1e-4, rtol=0)


def test_dense_heads_go_through_long_windows_in_pieces(model, frames, monkeypatch):
    whole = Backbone(model)(frames).depth
    monkeypatch.setattr(heads, "FRAMES_PER_CHUNK", 2)
    torch.testing.assert_close(Backbone(model)(frames).depth, whole, rtol=1e-5, atol=1e-6)


def test_half_precision_path(model, frames, monkeypatch):
    """As on a GPU: attention and context in bfloat16, heads and results in float32."""
    exact = Backbone(model)(frames)
    monkeypatch.setattr(Backbone, "_dtype", torch.bfloat16)
    backbone = Backbone(model)
    context = backbone.new_context(ContextConfig(), *frames.shape[-2:])
    out = backbone(frames, context=context)
    assert {layer.kv.dtype for layer in context._layers} == {torch.bfloat16}
    assert {layer.camera.dtype for layer in context._layers if layer.camera is not None} <= {torch.float32}
    context.commit(range(5), range(5))
    later = backbone(frames[:2], context=context, reduction=ReductionConfig(kv_factor=2, query_factor=2))
    for result in (out, later):
        assert {result.depth.dtype, result.T_world_camera.dtype, result.confidence.dtype} == {torch.float32}
        assert torch.isfinite(result.depth).all()
    if not model.spec.trunk.picks_reference:
        assert float((out.depth.log() - exact.depth.log()).abs().mean() / exact.depth.log().std()) < 0.15
