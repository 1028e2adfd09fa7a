"""nano: its motion solver finds known motion, partners follow the rules, contexts carry the gauge."""

import itertools
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from spark3r_ros.backbone import Backbone
from spark3r_ros.backbone.motion import CHANNELS, MAX_ERROR, _flow, motion_channels, partners
from spark3r_ros.backbone.motion_solver import so3_exp, solve_from_directions, solve_motion
from spark3r_ros.backbone.nano import MOTION_WIDTH, Nano, chain
from spark3r_ros.backbone.trunk import PassOptions
from spark3r_ros.config import Config, ContextConfig, ReductionConfig, with_values
from spark3r_ros.reduction import sensitive_layers
from spark3r_ros.solver import Solver
from training.paths import camera_path
from training.scenes import Scene, camera_matrix
from training.textures import texture_bank

SIZE = (144, 192)


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return Backbone(Nano())


@pytest.fixture(scope="module")
def clip():
    """Six frames [6, 3, 144, 192] of an orbit with K and true poses."""
    scene = Scene(1, "room", texture_bank(12, seed=3))
    K = camera_matrix(SIZE[1], SIZE[0], 60)
    path = camera_path("orbit", 60, seed=1)[:6]
    images = np.stack([scene.render(pose, K, SIZE[1], SIZE[0])[0] for pose in path])
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 255, torch.from_numpy(K), path


def test_partners_are_earlier_frames_or_else_later_ones():
    assert partners(4, 0).tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    assert partners(2, 2).tolist() == [[1, 0], [2, 1]]
    assert partners(1, 0).tolist() == [[-1, -1]]
    assert partners(1, 1).tolist() == [[0, -1]]


def test_flow_to_a_shifted_image_and_its_absence():
    rng = np.random.default_rng(0)
    base = np.kron(rng.integers(0, 255, (20, 28)), np.ones((8, 8))).astype(np.uint8)
    flow = motion_channels([base[8:152, 8:200], base[8:152, 11:203]]).reshape(2, 2, CHANNELS, 36, 48)
    inner = flow[1, 0][:, 4:-4, 4:-4]
    assert abs(np.median(inner[0]) - 3) < 0.1  # frame 1 sees at x what frame 0 sees at x + 3
    assert abs(np.median(inner[1])) < 0.1
    assert np.median(inner[2]) < 0.1
    assert (flow[1, 1, 2] == -1).all()


def test_windows_that_overlap_share_their_flow():
    rng = np.random.default_rng(1)
    base = np.kron(rng.integers(0, 255, (20, 34)), np.ones((8, 8))).astype(np.uint8)
    images = [base[8:152, 8 + 3 * i : 200 + 3 * i] for i in range(8)]
    _flow.cache_clear()
    first = motion_channels(images[:6])
    asked = _flow.cache_info().misses
    second = motion_channels(images[2:], num_previous=2)
    assert asked == 12  # two partners of every frame
    assert _flow.cache_info().misses - asked == 4  # the two new frames'
    np.testing.assert_array_equal(second[:2], first[4:])
    _flow.cache_clear()
    np.testing.assert_array_equal(motion_channels(images[2:], num_previous=2), second)


def test_a_frame_that_asks_alone_reaches_its_second_partner_by_way_of_the_first():
    rng = np.random.default_rng(2)
    base = np.kron(rng.integers(0, 255, (26, 34)), np.ones((8, 8))).astype(np.uint8)
    images = [base[8 + 2 * i : 152 + 2 * i, 8 + 5 * i : 200 + 5 * i] for i in range(3)]
    _flow.cache_clear()
    asked = motion_channels(images, num_previous=2).reshape(2, CHANNELS, 36, 48)
    assert _flow.cache_info().misses == 2  # to the first; and between the partners, which their window knows
    motion_channels([*images[:2], np.roll(images[2], 1, axis=1)], num_previous=2)
    assert _flow.cache_info().misses == 3
    direct = _flow(images[2].tobytes(), images[0].tobytes(), SIZE, False)
    inner = np.s_[4:-4, 4:-4]
    for found in (asked[1], direct):
        np.testing.assert_allclose(np.median(found[0][inner]), 10, atol=0.1)
        np.testing.assert_allclose(np.median(found[1][inner]), 4, atol=0.1)
    assert np.abs(asked[1] - direct)[:2, 4:-4, 4:-4].mean() < 0.2
    assert (asked[1][2, :, 46:] == MAX_ERROR).all()  # seen where the partners have nothing: ten pixels are out of view


def synthetic_motion(batch=16, seed=0):
    """Random points seen from two partners: points, targets, weights, offsets, R, t."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(batch, 48, 2, generator=generator, dtype=torch.float64) - 0.5
    depth = torch.exp(0.3 * torch.randn(batch, 48, generator=generator, dtype=torch.float64))
    w = 0.05 * torch.randn(batch, 1, 3, generator=generator, dtype=torch.float64)
    t = 0.15 * torch.nn.functional.normalize(torch.randn(batch, 1, 3, generator=generator, dtype=torch.float64), dim=-1)
    factor = torch.tensor([1.0, 2.0], dtype=torch.float64)[:, None]
    R, t = so3_exp(w * factor), t * factor
    moved = (torch.nn.functional.pad(points, (0, 1), value=1.0) * depth[..., None])[:, None] @ R.transpose(-1, -2)
    moved = moved + t[:, :, None]
    targets = moved[..., :2] / moved[..., 2:]
    weights = torch.full(targets.shape[:-1], 160.0**2 / 0.1, dtype=torch.float64)
    offsets = torch.tensor([[-1.0, -2.0]], dtype=torch.float64).expand(batch, 2)
    return points, targets, weights, offsets, R, t, depth


def test_the_solver_finds_motion_and_depth_from_exact_flow():
    points, targets, weights, offsets, R, t, depth = synthetic_motion()
    motion = solve_from_directions(points, targets, weights, offsets, (6, 8), 0.5)
    unit = motion.t.norm(dim=-1) / t.norm(dim=-1)
    angle = torch.rad2deg((motion.R - R).flatten(2).norm(dim=-1) / 2**0.5)
    cosine = torch.nn.functional.cosine_similarity(motion.t, t, dim=-1)
    assert (angle < 0.2).float().mean() > 0.9
    assert (cosine > 0.99).float().mean() > 0.9
    good = (cosine > 0.99).all(dim=1)
    scaled = (-motion.log_inverse_depth).exp() / depth / unit[:, :1]
    assert (scaled[good].log().abs().median() < 0.05).all()


def test_the_solver_ignores_outliers_and_missing_partners():
    points, targets, weights, _, R, t, depth = synthetic_motion(4)
    targets[:, :, ::6] += 0.3
    weights[:, 1] = 0
    start = (R, t)
    prior = depth.log().neg()
    motion = solve_motion(points, targets, weights, prior, torch.full_like(prior, 0.05), start)
    assert torch.rad2deg((motion.R - R)[:, 0].flatten(1).norm(dim=-1)).max() < 1
    assert torch.isfinite(motion.t).all()


def test_gradients_of_the_solver_are_right():
    points, targets, weights, _, R, t, depth = synthetic_motion(2)
    start, prior = torch.cat([R.flatten(2), t], dim=2), depth.log().neg()

    def solved(start, prior):
        R, t = start.split((9, 3), dim=2)
        motion = solve_motion(points, targets, weights, prior, 0.5 + 0 * prior, (R.unflatten(2, (3, 3)), t), 1)
        return motion.R, motion.t, motion.log_inverse_depth

    inputs = start.requires_grad_(), prior.requires_grad_()
    assert torch.autograd.gradcheck(solved, inputs, atol=1e-4, rtol=1e-3, fast_mode=True)


def test_a_chain_composes_relative_poses():
    R, t = so3_exp(torch.tensor([[[0.0, 0.1, 0.0]]])), torch.tensor([1.0, 0, 0])
    T = torch.eye(4).repeat(1, 3, 1, 1)
    T[..., :3, :3], T[..., :3, 3] = R, t
    assert torch.allclose(chain(T)[0, 2], T[0, 0] @ T[0, 0])
    assert torch.equal(chain(T)[0, 0], torch.eye(4))


def test_any_number_of_frames_and_sizes(backbone, clip):
    images, K, _ = clip
    for frames, size in ((1, SIZE), (2, SIZE), (5, (120, 216)), (3, (192, 144))):
        part = torch.nn.functional.interpolate(images[:frames], size=size)
        out = backbone(part)
        assert out.depth.shape == (frames, *size)
        assert out.T_world_camera.shape == (frames, 4, 4)
        assert torch.isfinite(out.T_world_camera).all()
        assert (out.depth > 0).all()
        assert ((out.confidence >= 0) & (out.confidence < 1)).all()
    assert torch.allclose(backbone(images[:2], intrinsics=K.float()).intrinsics[0], K.float())


def test_known_k_and_rendered_motion_give_the_rotation(backbone, clip):
    images, K, path = clip
    out = backbone(images, intrinsics=K.float()).T_world_camera.double().numpy()
    true = np.linalg.inv(path[0]) @ path
    cosine = (np.trace(np.swapaxes(true, 1, 2)[:, :3, :3] @ out[:, :3, :3], axis1=1, axis2=2) - 1) / 2
    assert np.degrees(np.arccos(np.clip(cosine, -1, 1))).max() < 6  # turns 30 degrees; these weights are random


def test_windows_with_context_continue_the_poses_of_one_block_causal_pass(backbone, clip):
    from spark3r_ros.backbone.trunk import PassOptions

    images, K, _ = clip
    context = backbone.new_context(ContextConfig(), *SIZE)
    first = backbone(images[:4], context=context, intrinsics=K.float())
    context.commit([0, 1, 2, 3], [0, 1, 2, 3])
    second = backbone(images[4:], context=context, previous=images[2:4], intrinsics=K.float())
    with torch.inference_mode():
        options = PassOptions(window_ids=torch.tensor([0, 0, 0, 0, 1, 1]))
        motion = backbone.model.motion(images, None)[None]
        whole = backbone.model(images[None], options, motion=motion, intrinsics=K.float().expand(1, 6, 3, 3))
    poses = torch.cat([first.T_world_camera, second.T_world_camera])
    assert torch.allclose(poses, whole.T_world_camera[0], atol=2e-4)
    assert torch.allclose(torch.cat([first.depth, second.depth]), whole.depth[0], rtol=1e-3)


def test_overlapping_windows_hang_on_the_frame_that_the_context_knows(backbone, clip):
    images, K, _ = clip
    context = backbone.new_context(ContextConfig(), *SIZE)
    first = backbone(images[:4], context=context, intrinsics=K.float())
    context.commit([0, 1, 2, 3], [0, 1, 2, 3])
    overlapping = backbone(images[2:], context=context, previous=images[:2], intrinsics=K.float())
    assert torch.allclose(overlapping.T_world_camera[0], first.T_world_camera[2], atol=1e-5)
    tracked = backbone(images[4:5], context=context, previous=images[2:4], intrinsics=K.float())
    again = backbone(images[4:5], context=context, previous=images[2:4], intrinsics=K.float())
    assert torch.allclose(tracked.T_world_camera, again.T_world_camera)  # tracking leaves nothing behind
    assert not torch.allclose(tracked.T_world_camera[0], torch.eye(4), atol=1e-3)


def test_reduction_runs(backbone, clip):
    images, K, _ = clip
    reduced = backbone(images, intrinsics=K.float(), reduction=ReductionConfig(query_factor=2, kv_factor=2))
    dense = backbone(images, intrinsics=K.float())
    assert reduced.depth.shape == dense.depth.shape
    assert not torch.equal(reduced.depth, dense.depth)


def test_nothing_waits_for_the_device(monkeypatch):
    """On the meta device every read-back of a value is an error; flow is made on the host, before the network."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is none for this device
    height, width = 144, 192
    with torch.device("meta"):
        model = Nano().eval()
        model._mean, model._std = model._mean.to("meta"), model._std.to("meta")
        frames, motion = torch.zeros(1, 4, 3, height, width), torch.zeros(1, 4, MOTION_WIDTH, height // 4, width // 4)
    context = Backbone(model, "meta").new_context(ContextConfig(), height, width)
    thinned = ReductionConfig(kv_factor=2, query_factor=2)
    with torch.inference_mode():
        for reduction, with_context in itertools.product((None, thinned), (False, True)):
            context.begin(4)
            options = PassOptions(reduction=reduction, context=context if with_context else None)
            assert model(frames, options, motion=motion).depth.shape == (1, 4, height, width)
            if with_context and reduction is None:
                context.commit(range(4), range(4))


def test_the_users_sensitive_layers_reach_the_context(backbone):
    shipped = set(sensitive_layers(ReductionConfig(), "nano", 3, frozenset()))
    for layers, expected in (("", shipped), ("1", {1}), ("none", set())):
        config = with_values(Config(), {"reduction.sensitive_layers": layers})
        context = Solver(config, backbone, torch.device("cpu"), np.ones(SIZE, bool)).context
        assert context.spec.sensitive == expected
        assert [layer.page_capacity for layer in context._layers] == [40 if i in expected else 14 for i in range(3)]
