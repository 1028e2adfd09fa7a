"""The context is exact: windows one after another equal one pass under a block-causal mask of windows."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, images, tiny_model

from spark3r_ros.backbone import Backbone
from spark3r_ros.backbone.model import Geometry
from spark3r_ros.backbone.trunk import PassOptions
from spark3r_ros.config import ContextConfig
from spark3r_ros.frame import Gauge

WINDOWS = (3, 2, 3)  # frames
NAMES = ("T_world_camera", "intrinsics", "depth", "confidence")


def size(model) -> tuple[int, int]:
    patch = model.spec.trunk.patch
    return 3 * patch, 4 * patch


@torch.inference_mode()
def window_by_window(model, frames, *, reuse_first_tokens: bool = False) -> list[Geometry]:
    context = Backbone(model).new_context(ContextConfig(), *frames.shape[-2:])
    results, start = [], 0
    for count in WINDOWS:
        context.begin(count)
        first = context.is_empty or reuse_first_tokens
        window = frames[start : start + count]
        results.append(model(window[None], PassOptions(first=first, context=context)))
        context.commit(range(count), range(start, start + count))
        start += count
    return results


@torch.inference_mode()
def one_pass(model, frames) -> Geometry:
    ids = torch.repeat_interleave(torch.arange(len(WINDOWS)), torch.tensor(WINDOWS))
    return model(frames[None], PassOptions(window_ids=ids))


def largest_difference(windows: list[Geometry], whole: Geometry) -> float:
    """In units of each output's standard deviation; of depth, the logarithm, which is what networks put out."""
    worst = 0.0
    for name in NAMES:
        a, b = torch.cat([getattr(w, name) for w in windows], dim=1), getattr(whole, name)
        if name == "depth":
            a, b = a.log(), b.log()
        worst = max(worst, float((a - b).abs().max() / b.std()))
    return worst


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_with_context_equal_one_block_causal_pass(family):
    model = tiny_model(family)
    frames = images(sum(WINDOWS), *size(model))
    assert largest_difference(window_by_window(model, frames), one_pass(model, frames)) < 1e-5


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "pi3"])
def test_first_frame_tokens_in_a_later_window_break_it(family):
    model = tiny_model(family)
    frames = images(sum(WINDOWS), *size(model))
    wrong = window_by_window(model, frames, reuse_first_tokens=True)
    assert largest_difference(wrong, one_pass(model, frames)) > 0.05


def test_the_reference_of_da3_is_the_first_frame_and_stays():
    """Alone it would choose another; in a stream the first keeps the gauge, however many windows follow."""
    model = tiny_model("da3")
    frames = images(5, *size(model))
    with torch.inference_mode():
        free = model(frames[None]).T_world_camera
        pinned = model(frames[None], PassOptions(window_ids=torch.zeros(5, dtype=torch.long))).T_world_camera
    assert float((free - pinned).abs().max()) > 0.01
    backbone = Backbone(model)
    context = backbone.new_context(ContextConfig(frames=3), *frames.shape[-2:])
    torch.testing.assert_close(backbone(frames, context=context).T_world_camera, pinned[0], rtol=0, atol=2e-5)
    context.commit(range(5), range(5))
    for window in range(1, 5):
        backbone(images(5, *size(model), seed=window), context=context)
        context.commit(range(5), range(5 * window, 5 * window + 5))
        assert 0 in context.frame_ids
        assert len(context.frame_ids) == 3


def test_pi3x_is_exact_up_to_the_metres_that_each_window_reads():
    model = tiny_model("pi3x")
    frames = images(sum(WINDOWS), *size(model))
    metres = []
    model.metric.register_forward_hook(lambda _, args, out: metres.append(float(out)))
    windows, whole = window_by_window(model, frames), one_pass(model, frames)
    start = 0
    for window, unit, count in zip(windows, metres, WINDOWS):
        part, scale = slice(start, start + count), metres[-1] / unit
        torch.testing.assert_close(window.depth * scale, whole.depth[:, part], rtol=2e-4, atol=0)
        t, t_whole = window.T_world_camera[..., :3, 3], whole.T_world_camera[:, part, :3, 3]
        torch.testing.assert_close(t * scale, t_whole, rtol=0, atol=2e-5 * metres[-1])
        torch.testing.assert_close(
            window.T_world_camera[..., :3, :3], whole.T_world_camera[:, part, :3, :3], rtol=0, atol=2e-5
        )
        start += count
    assert max(metres) > 1.001 * min(metres)
    assert Backbone(model)(frames).gauge is Gauge.METRIC


def test_pi3_is_permutation_equivariant():
    model = tiny_model("pi3")
    frames = images(5, *size(model))
    order = torch.tensor([3, 0, 4, 2, 1])
    with torch.inference_mode():
        straight, permuted = model(frames[None]), model(frames[order][None])
    for name in NAMES:
        a, b = getattr(straight, name)[:, order], getattr(permuted, name)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("family", ["vggt", "omega"])
def test_camera_heads_need_the_camera_tokens_of_past_frames(family):
    """Without them a later window's poses are off, although its depth is exact."""
    model = tiny_model(family)
    frames = images(sum(WINDOWS), *size(model))
    whole = one_pass(model, frames)
    model.camera_head.register_forward_pre_hook(lambda _, args: (args[0], PassOptions()))
    windows = window_by_window(model, frames)
    depth = torch.cat([w.depth for w in windows], dim=1)
    torch.testing.assert_close(depth.log(), whole.depth.log(), rtol=0, atol=2e-5)
    poses = torch.cat([w.T_world_camera for w in windows], dim=1)
    assert float((poses - whole.T_world_camera)[:, WINDOWS[0] :].abs().max()) > 0.01
