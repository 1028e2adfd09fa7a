"""The same on a GPU: results of the CPU in float32, close in bfloat16, and nothing mid-pass waits for the device.

Skipped where there is no GPU.
"""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, images, tiny_model

from benchmarks import streaming
from spark3r_ros import geometry
from spark3r_ros.backbone import Backbone, load_backbone
from spark3r_ros.backbone.trunk import PassOptions
from spark3r_ros.config import Config, ContextConfig, ReductionConfig
from spark3r_ros.reconstructor import Reconstructor
from training import generate
from training.data import list_shards
from training.train import CHECKPOINT, TrainConfig, Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU on this machine")

STRIDED = ReductionConfig(kv_factor=2, query_factor=2)
REDUCTIONS = (None, STRIDED, replace(STRIDED, kv_selection="coverage", keep_special_kv=True), STRIDED)


@contextmanager
def no_waiting():
    """Whatever waits for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def stream(backbone, frames):
    """Predictions of passes with every reduction: alone, then one after the other with a context."""
    yield from (backbone(frames, reduction=reduction) for reduction in REDUCTIONS)
    context = backbone.new_context(ContextConfig(), *frames.shape[-2:])
    for number, reduction in enumerate(REDUCTIONS):
        yield backbone(frames, reduction=reduction, context=context)
        context.commit(range(len(frames)), range(len(frames) * number, len(frames) * (number + 1)))


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_agrees_with_the_cpu(family, monkeypatch):
    monkeypatch.setattr(Backbone, "_dtype", torch.float32)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    frames = images(5, 42 if family != "omega" else 48, 56 if family != "omega" else 64)
    ours, theirs = (stream(Backbone(tiny_model(family), device), frames) for device in ("cuda", "cpu"))
    for gpu, cpu in zip(ours, theirs, strict=True):
        for name in ("depth", "confidence", "T_world_camera", "intrinsics", "descriptors"):
            have, want = getattr(gpu, name), getattr(cpu, name)
            assert have.is_cuda
            error = (have.cpu() - want).abs().max() / want.std().clamp_min(1e-3)
            assert float(error) < 5e-3, (name, float(error))


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_waits_inside_a_pass(family):
    model = tiny_model(family)
    patch = model.spec.trunk.patch
    backbone = Backbone(model, "cuda")
    frames = images(5, 3 * patch, 4 * patch).cuda()
    context = backbone.new_context(ContextConfig(), *frames.shape[-2:])
    for reduction, with_context in itertools.product(REDUCTIONS, (False, True)):
        for attempt in range(2):  # the first fills tables that are kept
            context.begin(5)
            options = PassOptions(True, reduction, frozenset({1}), context if with_context else None)
            with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
                if attempt == 0:
                    backbone.model(frames[None], options)
                    continue
                with no_waiting():
                    out = backbone.model(frames[None], options)
            assert torch.isfinite(out.depth).all()
    with pytest.raises(RuntimeError), no_waiting():  # the check itself works
        frames.amax().item()


@pytest.fixture(scope="module")
def recording():
    return streaming.circuit(120, 0.15, (320, 240), 5)


@pytest.fixture(scope="module")
def window(recording):
    """Eight frames [8, 3, H, W] and K as nano takes them."""
    recorded = list(recording.frames())[:56:7]
    plan = load_backbone("nano").resize(*recorded[0].image.shape[:2])
    pixels = torch.from_numpy(np.stack([frame.image for frame in recorded])).permute(0, 3, 1, 2).float() / 255
    K = recorded[0].camera.K.copy()
    K[:2] *= plan.size[1] / pixels.shape[-1]
    return torch.nn.functional.interpolate(pixels, size=plan.size, mode="area"), torch.from_numpy(K).float()


def test_nano_keeps_its_poses_in_half_precision(window):
    frames, K = window
    cpu, gpu = (load_backbone("nano", device=device)(frames, intrinsics=K) for device in ("cpu", "cuda"))
    T_error = torch.linalg.inv(cpu.T_world_camera) @ gpu.T_world_camera.cpu()
    turns = [geometry.rotation_angle(T[:3, :3].double().numpy()) for T in T_error]
    step = float(cpu.T_world_camera[1:, :3, 3].diff(dim=0).norm(dim=-1).mean())
    assert max(turns) < np.radians(0.02)
    assert float(T_error[:, :3, 3].norm(dim=-1).max()) < 0.02 * step
    assert float((cpu.depth.log() - gpu.depth.cpu().log()).abs().mean()) < 0.01


def test_nano_does_not_wait_inside_a_pass(window):
    frames, K = window
    backbone = load_backbone("nano", device="cuda")
    frames = frames.cuda()
    motion = backbone.model.motion(frames, None)  # flow is computed on the CPU
    K = K.cuda().expand(1, 8, 3, 3)
    context = backbone.new_context(ContextConfig(), *frames.shape[-2:])
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        for number, known in enumerate((K, None, K)):
            for with_context in (None, context):
                context.begin(8)
                options = PassOptions(reduction=STRIDED, sensitive=frozenset({0}), context=with_context)
                if number == 0:
                    backbone.model(frames[None], options, motion=motion[None], intrinsics=known)
                    continue
                with no_waiting():
                    backbone.model(frames[None], options, motion=motion[None], intrinsics=known)
            context.commit(range(8), range(8 * number, 8 * number + 8))


def test_a_stream_on_the_gpu_is_as_good(recording):
    truth = recording.T_world_camera[:, :3, 3]
    errors = {}
    for device in ("cpu", "cuda"):
        config = Config()
        config = replace(config, model=replace(config.model, device=device))
        reconstructor = Reconstructor(config)
        for frame in recording.frames():
            reconstructor.push(frame)
        reconstructor.finish()
        path = np.stack([T[:3, 3] for _, T in reconstructor.trajectory()])
        aligned = geometry.transform(geometry.umeyama(path, truth), path)
        errors[device] = float(np.sqrt(((aligned - truth) ** 2).sum(axis=1).mean()))
    assert errors["cuda"] < 1.5 * errors["cpu"] + 0.005


def test_training_on_the_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "SIZES", ((48, 72),))
    few = generate.texture_bank
    monkeypatch.setattr(generate, "texture_bank", lambda count, seed, photos: few(6, seed))
    generate.write_shard(tmp_path, "train", 0, 4)
    config = TrainConfig(batch=2, warm_up=1, solve_from=0)
    trainer = Trainer(config, list_shards(tmp_path, "train"), "cuda")
    losses = [trainer.train_step()["loss"] for _ in range(20)]
    assert np.isfinite(losses).all()
    trainer.save(tmp_path / CHECKPOINT)
    again = Trainer(config, list_shards(tmp_path, "train"))  # the CPU goes on
    again.restore(tmp_path / CHECKPOINT)
    assert np.isfinite(again.train_step()["loss"])
