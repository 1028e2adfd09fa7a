"""Weights files: what is read, what is refused, and that nothing in a file is executed or ignored silently."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from spark3r_ros.backbone import load_backbone
from spark3r_ros.backbone.checkpoint import CheckpointError, read_checkpoint
from spark3r_ros.backbone.nano import Nano
from spark3r_ros.backbone.registry import identify


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return {key: value.contiguous() for key, value in Nano().state_dict().items()}


@pytest.fixture
def file(tmp_path, state):
    path = tmp_path / "nano.safetensors"
    save_file(state, path)
    return path


def assert_holds(backbone, state):
    for key, value in backbone.model.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)


def test_safetensors_file(file, state):
    assert_holds(load_backbone("nano", file), state)


def test_mapping_of_tensors(state):
    assert_holds(load_backbone("nano", state), state)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s, "step": 3}, lambda s: {"state_dict": s}])
@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_file(tmp_path, state, wrap, zipped):
    path = tmp_path / "nano.pt"
    torch.save(wrap(state), path, _use_new_zipfile_serialization=zipped)
    assert_holds(load_backbone("nano", path), state)


def test_half_precision_file_is_used_in_float32(tmp_path, state):
    path = tmp_path / "nano.safetensors"
    save_file({key: value.half() for key, value in state.items()}, path)
    assert all(p.dtype == torch.float32 for p in load_backbone("nano", path).model.parameters())


def test_a_path_in_place_of_the_name_is_recognised(file, state):
    backbone = load_backbone(str(file))
    assert backbone.spec.name == "nano"
    assert_holds(backbone, state)


class Attack:
    """Unpickling this writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.write_text, (self.target, "executed")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_unexecuted(tmp_path, zipped):
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"
    torch.save({"weight": Attack(trace)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="refused"):
        read_checkpoint(path)
    path.write_bytes(pickle.dumps(Attack(trace)))
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    assert not trace.exists()


@pytest.mark.parametrize("share", [0.0001, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "pickle"])
def test_truncated_files(tmp_path, state, kind, share):
    path = tmp_path / "nano"
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    path.write_bytes(data[: max(20, int(share * len(data)))])
    with pytest.raises(CheckpointError, match="cut short|refused"):
        read_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"<html>login</html>"])
def test_other_files(tmp_path, content):
    path = tmp_path / "page.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="neither a safetensors nor a PyTorch file"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["./weights", "weights.pt", "/nowhere/da3-small.safetensors"])
def test_missing_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=f"no checkpoint at .*{Path(name).name}"):
        load_backbone("nano", name)
    with pytest.raises(CheckpointError, match=f"no checkpoint at .*{Path(name).name}"):
        load_backbone(name)


def test_a_folder_is_not_a_weights_file(tmp_path):
    with pytest.raises(CheckpointError, match="a folder, not a weights file, is at"):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize("kind", ["safetensors", "zip", "pickle"])
def test_damaged_bytes_never_end_in_another_error(tmp_path, kind):
    """What describes the tensors is damaged in many places; a file is read or refused, by one kind of error."""
    path, rng = tmp_path / "weights", np.random.default_rng(0)
    tensors = {f"layer.{i}.weight": torch.zeros(2, 3) for i in range(4)}
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    data, refused = path.read_bytes(), 0
    for _ in range(200):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 3):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged if rng.random() < 0.5 else damaged[: rng.integers(1, len(data))])
        try:
            read_checkpoint(path)
        except CheckpointError:
            refused += 1
    assert refused > 60


@pytest.mark.parametrize("content", [[1, 2], {"a": [1]}, {1: torch.zeros(1)}, torch.zeros(1)])
def test_pytorch_file_without_named_tensors(tmp_path, content):
    path = tmp_path / "list.pt"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="list.pt does not hold a dictionary of tensors"):
        read_checkpoint(path)


def test_arrays_are_not_tensors():
    with pytest.raises(CheckpointError, match="the given checkpoint does not hold a dictionary of tensors"):
        load_backbone("nano", {"trunk.special": np.zeros(3)})


def test_quantised_weights_are_refused(state):
    name = "trunk.blocks.0.norm1.weight"
    with pytest.raises(CheckpointError, match=f"1 not floating point: {name}"):
        load_backbone("nano", {**state, name: state[name].to(torch.int8)})


def test_all_differences_are_listed(state):
    wrong = dict(state)
    wrong["embed.0.bias"] = wrong["embed.0.bias"][:3]
    wrong["somebody.else"] = torch.zeros(1)
    del wrong["trunk.blocks.1.norm1.weight"]
    with pytest.raises(CheckpointError) as error:
        load_backbone("nano", wrong)
    for part in (
        "embed.0.bias has shape [3] instead of",
        "1 unknown: somebody.else",
        "1 missing: trunk.blocks.1.norm1.weight",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(state, value):
    name = "trunk.blocks.0.norm1.weight"
    wrong = {**state, name: torch.full_like(state[name], value)}
    with pytest.raises(CheckpointError, match=f"1 not finite: {name}"):
        load_backbone("nano", wrong)


def test_weights_of_another_model_are_named(state):
    with pytest.raises(CheckpointError, match="not of vggt: it looks like nano"):
        load_backbone("vggt", state)
    with pytest.raises(CheckpointError, match="does not fit any model"):
        identify({"weight": torch.zeros(1)}, "file")


def test_what_is_wrong_with_a_file_of_unknown_name_is_listed(tmp_path, state):
    wrong = {**state, "trunk.more": torch.zeros(1)}
    save_file(wrong, tmp_path / "more.safetensors")
    with pytest.raises(CheckpointError, match=r"more\.safetensors \(nano\) does not fit: 1 unknown: trunk\.more"):
        load_backbone(str(tmp_path / "more.safetensors"))


def test_the_licence_is_said_at_load(state, caplog):
    with caplog.at_level("INFO"):
        load_backbone("nano", state)
    assert "nano: weights under Apache-2.0" in caplog.text


def test_a_gpu_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="device cuda was asked for, but torch .* finds no GPU; use cpu or auto"):
        load_backbone("nano", device="cuda")


def test_unknown_name():
    with pytest.raises(ValueError, match="unknown model 'vgt'; known are nano"):
        load_backbone("vgt")
