"""All models by name: how to build them, where their weights come from, and under which licence."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spark3r_ros.backbone import da3, nano, omega, pi3, vggt
from spark3r_ros.backbone.checkpoint import (
    CheckpointError,
    KeyMap,
    convert,
    differences,
    load_strictly,
    read_checkpoint,
    unwrap,
)
from spark3r_ros.backbone.download import Weights, by_hand, cached_path, download
from spark3r_ros.backbone.model import Model, ModelSpec

log = logging.getLogger(__name__)

APACHE, CC_NC = "Apache-2.0", "CC BY-NC 4.0 (non-commercial)"
VGGT_LICENCE = "VGGT License v1 (no military use, no operation of critical infrastructure, transport, heavy machinery)"
EMBEDDED = Path(__file__).resolve().parents[1] / "weights" / "nano.safetensors"


@dataclass(frozen=True)
class Entry:
    """One name that users can ask for."""

    spec: ModelSpec
    build: Callable[[ModelSpec], Model]
    keys: KeyMap
    code_licence: str  # of the original implementation; ours is written anew
    parameters: int  # that inference uses; 0: counted on the spot
    download_bytes: int
    weights: Weights | None  # None: shipped with the package


@dataclass(frozen=True)
class ModelInfo:
    """One line of ``spark3r models``."""

    name: str
    parameters: int
    code_licence: str
    weights_licence: str
    permissive: bool
    download_bytes: int
    kv_bytes_per_frame: int  # of a 640 x 480 camera, bfloat16, unreduced
    path: Path
    present: bool


def _da3(name: str, repo: str, parameters: int, download_bytes: int, licence: str) -> Entry:
    weights = Weights(f"depth-anything/{repo}", "model.safetensors", licence, licence == APACHE)
    return Entry(da3.SPECS[name], da3.DepthAnything3, da3.KEYS, APACHE, parameters, download_bytes, weights)


PI3_CODE = "BSD-3-Clause, one file CC BY-NC-SA 4.0"
FAIR = "FAIR Noncommercial Research License"
MODELS: dict[str, Entry] = {
    "nano": Entry(
        nano.SPEC, nano.Nano, KeyMap((), {}, marker="trunk.special"), APACHE, 0, 0, None
    ),
    "da3-small": _da3("da3-small", "DA3-SMALL", 26_179_819, 137_000_000, APACHE),
    "da3-base": _da3("da3-base", "DA3-BASE", 103_022_955, 541_000_000, APACHE),
    "da3-large": _da3("da3-large", "DA3-LARGE-1.1", 345_439_467, 1_640_000_000, CC_NC),
    "da3-giant": _da3("da3-giant", "DA3-GIANT-1.1", 1_190_937_579, 5_400_000_000, CC_NC),
    "da3metric-large": Entry(
        da3.METRIC_SPEC, da3.MetricDepth, da3.METRIC_KEYS, APACHE, 334_171_394, 1_340_000_000,
        Weights("depth-anything/DA3METRIC-LARGE", "model.safetensors", APACHE, True),
    ),
    "vggt": Entry(
        vggt.SPEC, vggt.Vggt, vggt.KEYS, "VGGT License v1", 1_190_595_096, 5_030_000_000,
        Weights("facebook/VGGT-1B", "model.safetensors", CC_NC, False),
    ),
    "vggt-commercial": Entry(
        vggt.SPEC, vggt.Vggt, vggt.KEYS, "VGGT License v1", 1_190_595_096, 5_030_000_000,
        Weights("facebook/VGGT-1B-Commercial", "vggt_1B_commercial.pt", VGGT_LICENCE, False),
    ),
    "pi3": Entry(
        pi3.SPEC, pi3.Pi3, pi3.KEYS, PI3_CODE, 958_696_732, 3_830_000_000,
        Weights("yyfz233/Pi3", "model.safetensors", CC_NC, False),
    ),
    "pi3x": Entry(
        pi3.PI3X_SPEC, pi3.Pi3X, pi3.PI3X_KEYS, PI3_CODE, 992_465_329, 5_440_000_000,
        Weights("yyfz233/Pi3X", "model.safetensors", CC_NC, False),
    ),
    "omega": Entry(
        omega.SPEC, omega.Omega, omega.KEYS, FAIR, 1_143_813_161, 4_580_000_000,
        Weights("facebook/VGGT-Omega", "vggt_omega_1b_512.pt", f"{FAIR} and DINOv3 License", False),
    ),
}  # fmt: skip


def find(name: str) -> Entry:
    """The entry of a name; ValueError lists the names there are."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known are {', '.join(MODELS)}, or the path of a weights file")
    return MODELS[name]


def list_models() -> list[ModelInfo]:
    """All models with what decides between them."""
    return [_describe(name, entry) for name, entry in MODELS.items()]


def _describe(name: str, entry: Entry) -> ModelInfo:
    spec = entry.spec
    height, width = spec.resize.plan(480, 640).size
    context = spec.trunk.context_spec((height // spec.trunk.patch) * (width // spec.trunk.patch), frozenset())
    per_token = 2 * 2 * context.num_heads * context.head_dim  # keys and values, two bytes each
    path = weights_path(name)
    return ModelInfo(
        name=name,
        parameters=entry.parameters or count_parameters(entry),
        code_licence=entry.code_licence,
        weights_licence=licence(entry),
        permissive=entry.weights is None or entry.weights.permissive,
        download_bytes=entry.download_bytes,
        kv_bytes_per_frame=per_token * sum(context.layer_tokens),
        path=path,
        present=path.is_file(),
    )


def count_parameters(entry: Entry) -> int:
    return sum(p.numel() for p in skeleton(entry).parameters())


def licence(entry: Entry) -> str:
    return APACHE if entry.weights is None else entry.weights.licence


def weights_path(name: str) -> Path:
    """Where a model's weights belong."""
    entry = find(name)
    return EMBEDDED if entry.weights is None else cached_path(name, entry.weights)


def get_model(name: str, accept_licence: bool = False) -> Path:
    """Fetch a model's weights unless they are there.

    Raises:
        ValueError: unknown name, or a licence that was not accepted.
        DownloadError: no network or no access; the message says how to fetch the file by hand.
    """
    entry = find(name)
    path = weights_path(name)
    if entry.weights is None or path.is_file():
        return path
    if not entry.weights.permissive and not accept_licence:
        raise ValueError(
            f"the weights of {name} are under {entry.weights.licence}: read https://huggingface.co/{entry.weights.repo}"
            " and repeat with --accept-licence if you may and want to use them"
        )
    return download(name, entry.weights)


def skeleton(entry: Entry) -> Model:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return entry.build(entry.spec)


def load_model(name: str, checkpoint: str | Path | Mapping[str, Tensor] | None) -> Model:
    """A model with its weights, on the CPU in float32. ``name`` may be the path of a weights file.

    Raises:
        ValueError: unknown name; CheckpointError, a ValueError: weights missing or unfit.
    """
    given = name
    if isinstance(checkpoint, Mapping):
        source = "the given checkpoint"
        state = unwrap(checkpoint, source)
    else:
        path = _find_file(name, checkpoint)
        source, state = str(path), read_checkpoint(path)
        if name not in MODELS and checkpoint is None:
            name = identify(state, source)
    entry = find(name)
    if not any(entry.keys.marker in key for key in state):
        raise CheckpointError(f"{source} is not of {name}{_looks_like(state)}")
    model = skeleton(entry)
    file_names = {entry.keys.rename(key): key for key in state}
    load_strictly(model, convert(state, entry.keys), f"{source} ({name})", file_names)
    log.info("%s: weights under %s", name, licence(entry) if given == name else _possible_licences(entry))
    return model


def _find_file(name: str, checkpoint: str | Path | None) -> Path:
    """The weights file that is meant, there or not; a name with a dot or a slash is a path."""
    if checkpoint is not None:
        find(name)
        return Path(checkpoint)
    if name not in MODELS and ("/" in name or "." in name):
        return Path(name)
    path = weights_path(name)
    if not path.is_file():
        raise CheckpointError(_missing(name))
    return path


def _possible_licences(entry: Entry) -> str:
    """Of all models with this architecture: from a file alone they cannot be told apart."""
    same = {name: licence(other) for name, other in MODELS.items() if other.spec is entry.spec}
    return " or ".join(same.values() if len(same) == 1 else (f"{text} ({name})" for name, text in same.items()))


def _missing(name: str) -> str:
    weights = find(name).weights
    if weights is None:
        return f"the embedded weights {EMBEDDED} are missing: the installation is incomplete"
    accept = "" if weights.permissive else " --accept-licence"
    command = f"spark3r models get {name}{accept}"
    return f"the weights of {name} are not on this machine: run `{command}`, or {by_hand(name, weights)}"


def _candidates(state: Mapping[str, Tensor]) -> list[str]:
    return [name for name, entry in MODELS.items() if any(entry.keys.marker in key for key in state)]


def _looks_like(state: Mapping[str, Tensor]) -> str:
    names = _candidates(state)
    return f": it looks like {' or '.join(names)}" if names else ""


def identify(state: Mapping[str, Tensor], source: str) -> str:
    """The name of the model whose tensors these are, or, when something is wrong with them, of the closest one."""

    def num_differences(name: str) -> int:
        wrong = differences(skeleton(MODELS[name]).state_dict(), convert(state, MODELS[name].keys))
        return sum(len(keys) for keys in wrong.values())

    candidates = _candidates(state)
    if not candidates:
        raise CheckpointError(f"{source} does not fit any model; known are {', '.join(MODELS)}")
    return min(candidates, key=num_differences)
