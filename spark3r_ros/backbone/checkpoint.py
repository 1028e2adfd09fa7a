"""Checkpoints: read safely, rename to this package's names, load strictly.

Every tensor of a file is used, named in the model's list of unused ones, or an error.
"""

from __future__ import annotations

import logging
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

log = logging.getLogger(__name__)

Rename = tuple[str, str | Callable[[re.Match[str]], str]]
State = dict[str, Tensor]


# What readers run into where bytes of a file are wrong.
_DAMAGE = (
    RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, MemoryError,
    AssertionError, struct.error, zipfile.BadZipFile,
)  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that cannot be used as it is."""


@dataclass(frozen=True)
class KeyMap:
    """How one family's checkpoint names become ours."""

    renames: tuple[Rename, ...]  # applied in order, all of them, to every key
    unused: Mapping[str, str]  # patterns of whole keys that inference does not need: what they are for
    marker: str  # part of a key that only this family's files have
    finish: Callable[[State], State] | None = None  # what renaming alone cannot do
    constants: tuple[tuple[str, tuple[float, ...]], ...] = ()  # patterns of whole keys, and the values built in here

    def rename(self, key: str) -> str:
        """Our name of one of the file's keys."""
        for pattern, replacement in self.renames:
            key = re.sub(pattern, replacement, key)
        return key


def dpt_renames(head: str) -> tuple[Rename, ...]:
    """Names of the DPT heads that VGGT, Depth-Anything-3 and VGGT-Omega share."""
    return (
        (rf"^{head}\.norm\.", f"{head}.dpt.norm."),
        (rf"^{head}\.projects\.", f"{head}.dpt.project."),
        (rf"^{head}\.resize_layers\.", f"{head}.dpt.resize."),
        (rf"^{head}\.scratch\.layer(\d)_rn\.", lambda m: f"{head}.dpt.adapt.{int(m[1]) - 1}."),
        (rf"^{head}\.scratch\.refinenet(\d)\.", lambda m: f"{head}.dpt.fuse.{int(m[1]) - 1}."),
        (r"\.resConfUnit(\d)\.", r".unit\1."),
        (rf"^{head}\.scratch\.output_conv1\.", f"{head}.narrow."),
        (rf"^{head}\.scratch\.output_conv2\.", f"{head}.out.0."),
    )


# Names of the encoder and the frame blocks that VGGT and VGGT-Omega share.
AGGREGATOR_RENAMES: tuple[Rename, ...] = (
    (r"^aggregator\.patch_embed\.patch_embed\.proj\.", "encoder.proj."),
    (r"^aggregator\.patch_embed\.(register|storage)_tokens", "encoder.registers"),
    (r"^aggregator\.patch_embed\.", "encoder."),
    (r"^aggregator\.frame_blocks\.(\d+)\.", lambda m: f"trunk.blocks.{2 * int(m[1])}."),
)


def read_checkpoint(path: str | Path) -> State:
    """Tensors of a safetensors or PyTorch file, mapped into memory where the format allows it.

    PyTorch files are read with ``weights_only=True``: a pickle that wants to run code is refused unexecuted.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, or unsafe.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        found = "a folder, not a weights file, is at" if path.is_dir() else "no checkpoint at"
        raise CheckpointError(f"{found} {path}")
    with path.open("rb") as file:
        head = file.read(16)
    if head[8:9] == b"{":  # safetensors: eight bytes of length, then JSON
        try:
            return load_file(path)
        except (SafetensorError, *_DAMAGE) as error:
            raise CheckpointError(f"{path} is damaged or cut short ({error}); delete it and fetch it again") from error
    if not head.startswith((b"PK", b"\x80")):
        raise CheckpointError(f"{path} is neither a safetensors nor a PyTorch file, it starts with {head!r}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} is refused: it holds more than tensors ({_first_line(error)})") from error
    except _DAMAGE as error:
        raise CheckpointError(
            f"{path} is damaged or cut short ({_first_line(error)}); delete it and fetch it again"
        ) from error
    return unwrap(content, str(path))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


def unwrap(content: object, source: str) -> State:
    """The dictionary of tensors itself, or out of a training checkpoint that keeps it one level down."""
    for name in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not all(
        isinstance(k, str) and isinstance(content[k], Tensor) for k in content
    ):
        raise CheckpointError(f"{source} does not hold a dictionary of tensors")
    return dict(content)


def convert(state: Mapping[str, Tensor], keys: KeyMap) -> State:
    """Tensors under our names; those that inference does not need are left out."""
    unused = [re.compile(pattern) for pattern in keys.unused]
    skipped = [key for key in state if any(pattern.fullmatch(key) for pattern in unused)]
    if skipped:
        log.debug("unused checkpoint tensors: %s", ", ".join(skipped))
    constant = {key for key in state for pattern, _ in keys.constants if re.fullmatch(pattern, key)}
    _check_constants(state, keys)
    renamed: State = {}
    for key in state.keys() - set(skipped) - constant:
        name = keys.rename(key)
        if name in renamed:
            raise CheckpointError(f"two tensors of the checkpoint are named {name}")
        renamed[name] = state[key]
    return keys.finish(renamed) if keys.finish else renamed


def _check_constants(state: Mapping[str, Tensor], keys: KeyMap) -> None:
    """Constants that this package computes itself must be those of the checkpoint."""
    for pattern, values in keys.constants:
        for key in state:
            if re.fullmatch(pattern, key):
                have = state[key].flatten().float()
                if len(have) != len(values) or not torch.allclose(have, torch.tensor(values), rtol=0.01):
                    raise CheckpointError(f"{key} is {have.tolist()}, this package was written for {list(values)}")


def differences(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], file_names: Mapping[str, str] | None = None
) -> dict[str, list[str]]:
    """Keys by what is wrong with them, named as in the file where ``file_names`` knows it: ours to the file's."""
    names = file_names or {}
    shapes = {key: (list(state[key].shape), list(expected[key].shape)) for key in expected.keys() & state.keys()}
    return {
        "unknown": sorted(names.get(key, key) for key in state.keys() - expected.keys()),
        "missing": sorted(expected.keys() - state.keys()),
        "misshapen": sorted(
            f"{names.get(key, key)} has shape {a} instead of {b}" for key, (a, b) in shapes.items() if a != b
        ),
    }


def load_strictly(
    model: nn.Module, state: Mapping[str, Tensor], source: str, file_names: Mapping[str, str] | None = None
) -> None:
    """Give a model built on the meta device these tensors as its own, in float32.

    Raises:
        CheckpointError: missing, unknown, misshapen, quantised or non-finite tensors, listed; see ``differences``.
    """
    names = file_names or {}
    wrong = differences(model.state_dict(), state, names)
    wrong["not floating point"] = sorted(names.get(k, k) for k, v in state.items() if not v.is_floating_point())
    if not any(wrong.values()):
        state = {key: value.float() for key, value in state.items()}
        wrong["not finite"] = sorted(names.get(k, k) for k, v in state.items() if not torch.isfinite(v).all())
    if any(wrong.values()):
        raise CheckpointError(f"{source} does not fit: {_listed(wrong)}")
    model.load_state_dict(state, strict=True, assign=True)


def _listed(wrong: Mapping[str, list[str]], limit: int = 10) -> str:
    """``2 unknown: a, b; 14 missing: c, d, ...``"""
    parts = []
    for kind, lines in wrong.items():
        if lines:
            more = ", ..." if len(lines) > limit else ""
            parts.append(f"{len(lines)} {kind}: {', '.join(lines[:limit])}{more}")
    return "; ".join(parts)


def special_tokens(*names: str) -> Callable[[State], State]:
    """A ``finish`` that joins camera and register tokens [1, variants, n, C] to ``trunk.special``."""

    def finish(state: State) -> State:
        parts = [state[name] for name in names if name in state and state[name].ndim >= 3]
        if len(parts) == len(names) and len({(p.shape[1], p.shape[-1]) for p in parts}) == 1:
            # [1, variants, n, C], or [1, variants, C] for a single token, to [variants, n, C]
            state["trunk.special"] = torch.cat([p.reshape(p.shape[1], -1, p.shape[-1]) for p in parts], dim=1)
            for name in names:
                del state[name]
        return state  # tokens that do not fit each other are left to be reported

    return finish
