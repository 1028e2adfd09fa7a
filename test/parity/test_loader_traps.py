"""The thirteen ways in which a re-implementation of these models goes wrong without noticing, in order."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import images, tiny_model, tiny_spec

from benchmarks.parity import weights
from spark3r_ros.backbone import Backbone, da3, load_backbone, omega, pi3, vggt
from spark3r_ros.backbone.blocks import SwiGlu
from spark3r_ros.backbone.cameras import decode_world_to_camera
from spark3r_ros.backbone.checkpoint import CheckpointError, convert, differences, load_strictly
from spark3r_ros.backbone.encoder import Encoder, EncoderSpec
from spark3r_ros.backbone.registry import MODELS, identify, skeleton


def manifest(shared, name):
    """The original's state dict without memory."""
    shapes = json.loads(shared("golden", "keys", f"{name}.json").read_text())
    with torch.device("meta"):
        return {key: torch.empty(shape) for key, shape in shapes.items()}


def shapes(state):
    return {key: tuple(value.shape) for key, value in state.items()}


def expected(name):
    return shapes(skeleton(MODELS[name]).state_dict())


def test_1_omega_key_biases_are_masked():
    prefix = "aggregator.frame_blocks.3.attn.qkv."
    mask = torch.tensor([1.0, 0.0, 1.0])
    state = convert({prefix + "bias": torch.tensor([2.0, 3.0, 4.0]), prefix + "bias_mask": mask}, omega.KEYS)
    assert list(state) == ["trunk.blocks.6.attn.qkv.bias"]
    assert state["trunk.blocks.6.attn.qkv.bias"].tolist() == [2, 0, 4]


def test_1_a_missing_mask_is_an_error():
    with pytest.raises(CheckpointError, match="qkv.bias_mask is missing"):
        convert({"camera_head.trunk.0.attn.qkv.bias": torch.ones(3)}, omega.KEYS)


def test_1_a_mask_that_was_never_filled_is_an_error():
    bias = torch.nn.Module()
    bias.bias = torch.nn.Parameter(torch.zeros(3))
    name = "camera_head.trunk.0.attn.qkv.bias"
    state = convert({name: torch.ones(3), name + "_mask": torch.full((3,), float("nan"))}, omega.KEYS)
    with pytest.raises(CheckpointError, match="not finite"):
        load_strictly(bias, {"bias": state[name]}, "file")


def test_2_omega_periods_are_recomputed_and_must_agree():
    key = "aggregator.rope_embed.periods"
    periods = 100 ** (2 * torch.arange(16) / 32)
    assert convert({key: periods}, omega.KEYS) == {}
    assert convert({key: periods.bfloat16()}, omega.KEYS) == {}
    with pytest.raises(CheckpointError, match="periods"):
        convert({key: 2 * periods}, omega.KEYS)


def test_2_omega_runs_without_asking_for_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: pytest.fail("asked for a GPU"))
    assert torch.isfinite(Backbone(tiny_model("omega"))(images(2, 32, 48)).depth).all()


@pytest.mark.parametrize("prefix", ["model.", "model.da3.", ""])
def test_3_da3_keys_have_a_prefix_on_the_hub(shared, prefix):
    state = {prefix + key: value for key, value in manifest(shared, "da3-small").items()}
    if prefix == "model.da3.":  # nested models hold the metric one beside it
        state.update({"model.da3_metric." + k: v for k, v in manifest(shared, "da3metric-large").items()})
        assert shapes(convert(state, da3.METRIC_KEYS)) == expected("da3metric-large")
    assert shapes(convert(state, da3.KEYS)) == expected("da3-small")


def test_4_da3_stores_a_shared_norm_once(shared):
    state = manifest(shared, "da3-small")
    copies = [f"head.scratch.output_conv2_aux.{i}.2.{leaf}" for i in range(3) for leaf in ("weight", "bias")]
    for key in copies:
        del state[key]
    assert shapes(convert(state, da3.KEYS)) == expected("da3-small")


def test_3_and_4_the_hub_file_of_da3_small_as_a_user_has_it(shared, tmp_path, caplog):
    """Prefixed keys, the shared norm stored once, parts that inference does not use; opened by its path alone."""
    golden = shared("golden")
    state = weights(golden, "da3-small")
    copies = {f"head.scratch.output_conv2_aux.{i}.2.{leaf}" for i in (1, 2, 3) for leaf in ("weight", "bias")}
    path = tmp_path / "model.safetensors"
    save_file({"model." + key: value for key, value in state.items() if key not in copies}, path)
    with caplog.at_level("INFO"):
        backbone = load_backbone(str(path))
    assert backbone.spec.name == "da3-small"
    assert "da3-small: weights under Apache-2.0" in caplog.text
    frames = images(3, 56, 70)
    assert (backbone(frames).depth == load_backbone("da3-small", state)(frames).depth).all()

    more = {"model." + key: value for key, value in state.items()}
    more.update({"model.backbone.pretrained.blocks.0.extra": torch.zeros(1), "config": torch.zeros(1)})
    save_file(more, path)
    with pytest.raises(CheckpointError, match="2 unknown: config, model.backbone.pretrained.blocks.0.extra$"):
        load_backbone(str(path))


@pytest.mark.parametrize("name", ["da3-small", "da3metric-large", "vggt", "pi3x", "omega"])
def test_5_every_lost_or_misshapen_tensor_is_noticed(shared, name):
    """One key at a time, of every part of the original checkpoint: lost, or of another shape."""
    state, keys = manifest(shared, name), MODELS[name].keys
    for pattern, values in keys.constants:
        state.update({key: torch.tensor(values) for key in state if re.fullmatch(pattern, key)})
    wanted = skeleton(MODELS[name]).state_dict()
    kinds = {}
    for key in state:
        kinds.setdefault(re.sub(r"\d+", "#", key), key)  # one of each kind
    assert len(kinds) > 25
    for key in kinds.values():
        unused = any(re.fullmatch(pattern, key) for pattern in (*keys.unused, *(p for p, _ in keys.constants)))
        for change in ("lost", "misshapen"):
            broken = dict(state)
            if change == "lost":
                del broken[key]
            elif any(re.fullmatch(pattern, key) for pattern, _ in keys.constants):
                continue  # its values are compared: test_2 and test_9
            else:
                broken[key] = torch.empty(3, *state[key].shape, device="meta")
            try:
                wrong = differences(wanted, convert(broken, keys))
            except CheckpointError:
                continue
            assert bool(any(wrong.values())) is not unused, (key, change)


def test_5_da3_variants_are_told_apart_without_config_json(shared):
    for name in ("da3-small", "da3-base", "da3-large", "da3metric-large"):
        assert identify(manifest(shared, name), "file") == name


def test_5_a_wrong_variant_is_an_error(shared):
    with pytest.raises(CheckpointError, match=r"has shape \[384\] instead of \[768\]"):
        load_strictly(skeleton(MODELS["da3-base"]), convert(manifest(shared, "da3-small"), da3.KEYS), "file")


def test_5_names_of_older_da3_files(shared):
    old = {}
    for key, value in manifest(shared, "da3-small").items():
        key = re.sub(r"^backbone\.", "net.", key)
        old["model." + key.replace("camera_token", "camera_token_extra").replace("_aux.", "_ray.")] = value
    old["model.net.pretrained.mask_token"] = torch.empty(1, 384, device="meta")
    assert shapes(convert(old, da3.KEYS)) == expected("da3-small")


def test_6_norms_and_position_interpolation_of_every_model():
    table = {  # encoder eps, block eps, final norm, antialias, offset of the position grid
        "vggt": (1e-6, 1e-5, None, True, 0.0),
        "pi3": (1e-6, 1e-6, None, True, 0.0),
        "da3-small": (None, 1e-6, 1e-5, False, 0.1),
        "omega": (1e-5, 1e-5, None, None, None),
    }
    for name, (encoder_eps, block_eps, final_eps, antialias, offset) in table.items():
        model = skeleton(MODELS[name])
        assert {b.norm1.eps for b in model.trunk.blocks} == {b.norm2.eps for b in model.trunk.blocks} == {block_eps}
        assert {b.norm1.eps for b in model.encoder.blocks} == ({encoder_eps} if encoder_eps else set())
        assert model.spec.trunk.final_eps == final_eps
        assert {b.attn.q_norm.eps for b in model.trunk.blocks[model.spec.trunk.plain :]} == {1e-5}
        if model.encoder.spec.positions:
            assert (model.encoder.spec.antialias, model.encoder.spec.offset) == (antialias, offset)


def test_6_positions_are_scaled_as_each_model_does():
    def table(**options):
        torch.manual_seed(0)
        encoder = Encoder(EncoderSpec(14, 4, 1, 0, num_registers=0, **options))
        return encoder, encoder._positions((8, 10))[0, 1:].T.reshape(4, 8, 10)

    encoder, smooth = table()
    grid = encoder.pos_embed[0, 1:].T.reshape(1, 4, 37, 37)
    want = torch.nn.functional.interpolate(grid, size=(8, 10), mode="bicubic", antialias=True)[0]
    torch.testing.assert_close(smooth, want)
    _, sharp = table(antialias=False, offset=0.1)
    scale = (8.1 / 37, 10.1 / 37)
    want = torch.nn.functional.interpolate(grid, scale_factor=scale, mode="bicubic", antialias=False)[0]
    torch.testing.assert_close(sharp, want)
    assert (sharp - smooth).abs().max() > 0.01


@pytest.mark.parametrize("family", ["vggt", "pi3", "da3", "omega"])
def test_7_everybody_takes_0_to_1_and_every_network_sees_imagenet_normalised(family):
    model, seen = tiny_model(family), []
    model.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    patch = model.spec.trunk.patch
    frames = images(2, 2 * patch, 2 * patch)
    Backbone(model)(frames)
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    torch.testing.assert_close(seen[0], (frames - mean) / std)


def test_8_vggt_and_omega_encode_world_to_camera():
    half = 0.5**0.5  # a quarter turn about z, then a shift, both from world to camera
    T_world_camera, K = decode_world_to_camera(torch.tensor([1.0, 2, 3, 0, 0, half, half, 1, 0.5]), 100, 200)
    T_camera_world = torch.tensor([[0.0, -1, 0, 1], [1, 0, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]])
    torch.testing.assert_close(T_world_camera @ T_camera_world, torch.eye(4), atol=1e-6, rtol=0)
    fy, fx = 50 / torch.tan(torch.tensor(0.5)), 100 / torch.tan(torch.tensor(0.25))
    torch.testing.assert_close(K, torch.tensor([[float(fx), 0, 100], [0, float(fy), 50], [0, 0, 1]]))


def test_8_da3_encodes_camera_to_world():
    model = tiny_model("da3")
    with torch.inference_mode():
        for linear, value in ((model.camera.fc_t, [1.0, 2, 3]), (model.camera.fc_q, [0.0, 0, 0, 1])):
            linear.weight.zero_()
            linear.bias.copy_(torch.tensor(value))
    T_world_camera = Backbone(model)(images(1, 28, 28)).T_world_camera[0]
    assert T_world_camera[:3, 3].tolist() == [1, 2, 3]


def test_9_pi3_stores_its_normalisation():
    state = {"image_mean": torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)}
    assert convert(state, pi3.KEYS) == convert(state, pi3.PI3X_KEYS) == {}
    with pytest.raises(CheckpointError, match="image_mean"):
        convert({"image_mean": torch.full((1, 3, 1, 1), 0.5)}, pi3.KEYS)
    assert not any("mean" in key for key in expected("pi3"))


def test_10_giant_has_gated_feed_forward():
    names = expected("da3-giant")
    assert names["trunk.blocks.39.mlp.w12.weight"] == (8192, 1536)
    assert names["trunk.blocks.39.mlp.w3.weight"] == (1536, 4096)
    layer, x = SwiGlu(6), torch.randn(2, 6)
    first, second = layer.w12(x).chunk(2, dim=-1)
    torch.testing.assert_close(layer(x), layer.w3(torch.nn.functional.silu(first) * second))


def test_11_vggt_tracker_is_left_out_and_nothing_else(shared):
    state = manifest(shared, "vggt")
    assert any(key.startswith("track_head.") for key in state)
    state["aggregator.new_part"] = torch.empty(1, device="meta")
    converted = convert(state, vggt.KEYS)
    assert not any("track" in key for key in converted)
    assert "aggregator.new_part" in converted
    with pytest.raises(CheckpointError, match=r"1 unknown: aggregator\.new_part"):
        load_strictly(skeleton(MODELS["vggt"]), {"aggregator.new_part": torch.zeros(1)}, "file")


def test_12_mask_tokens_are_known_to_be_unused(shared):
    for name, keys in (("vggt", vggt.KEYS), ("omega", omega.KEYS)):
        assert any(key.endswith("mask_token") for key in manifest(shared, name))
        assert convert({"aggregator.patch_embed.mask_token": torch.zeros(1, 8)}, keys) == {}


def test_13_only_tapped_layers_are_kept():
    spec = tiny_spec("vggt")
    model = vggt.Vggt(replace(spec, trunk=replace(spec.trunk, taps=(1, 3, 5, 7)))).eval()
    kept = []
    model.trunk.register_forward_hook(lambda _, args, tokens: kept.append(tokens))
    Backbone(model)(images(2, 28, 28))
    assert len(kept[0].taps) == 4 < len(model.trunk.blocks)
