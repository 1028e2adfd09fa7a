"""How much to reduce: factors by length and by layer (arXiv 2605.06270), and where sensitive layers come from."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from spark3r_ros.config import ReductionConfig

KV_FRAMES = 40  # the key-value schedule keeps about this many frames' keys at any length
UNREDUCED_FRAMES = 100  # up to this length queries and the keys of sensitive layers stay whole
FACTOR_FORMAT = "spark3r-factors-1"


@dataclass(frozen=True)
class Factors:
    """Reduction factors of one forward pass; 1 means dense."""

    query: int
    kv: int  # of sensitive layers
    kv_insensitive: int  # of all other layers

    def __post_init__(self) -> None:
        for name in ("query", "kv", "kv_insensitive"):
            check_factor(name, getattr(self, name))


@dataclass(frozen=True)
class FactorFile:
    """What the probe found for one model: the layers that must keep more keys."""

    model: str
    num_layers: int  # global layers of that model
    sensitive_layers: tuple[int, ...]
    format: str = FACTOR_FORMAT

    def __post_init__(self) -> None:
        check_layers(self.sensitive_layers, self.num_layers, f"factor file of {self.model}")


def check_factor(name: str, factor: int) -> None:
    """Raise ValueError unless ``factor`` is a whole number of at least 1."""
    if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1:
        raise ValueError(f"{name} factor must be a whole number >= 1, got {factor!r}")


def check_layers(layers: Iterable[int], num_layers: int, source: str) -> None:
    """Raise ValueError when a layer does not exist."""
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < num_layers:
            raise ValueError(f"{source}: global layer {layer!r} is unknown, allowed are 0 to {num_layers - 1}")


def scheduled_query_factor(num_frames: int) -> int:
    """1 up to 100 frames, 2 up to 300, 3 up to 500, then 4."""
    return 1 + sum(num_frames > limit for limit in (UNREDUCED_FRAMES, 300, 500))


def scheduled_kv_factor(num_frames: int) -> int:
    """1 up to 100 frames, then about 40 frames of keys at any length."""
    return 1 if num_frames <= UNREDUCED_FRAMES else math.ceil(num_frames / KV_FRAMES)


def frame_factors(config: ReductionConfig, num_frames: int) -> Factors:
    """The factors for an input of ``num_frames``: the length schedule, or what the config fixes."""
    kv = config.kv_factor or scheduled_kv_factor(num_frames)
    query = config.query_factor or scheduled_query_factor(num_frames)
    return Factors(query=query, kv=kv, kv_insensitive=kv * config.insensitive_multiplier)


def sensitive_layers(
    config: ReductionConfig, model: str, num_layers: int, published: frozenset[int] = frozenset()
) -> frozenset[int]:
    """Global layers that prune by the base factor: from the config, its factor file, the shipped probe, or the paper.

    ``published`` is the paper's set for this model. A model for which nothing is known (an empty set) has all its
    layers sensitive: it is reduced as little as the schedule allows.
    Raises ValueError when a layer does not exist or the factor file is of another model.
    """
    if config.sensitive_layers:
        layers = parse_layers(config.sensitive_layers)
        check_layers(layers, num_layers, "reduction.sensitive_layers")
        return layers
    shipped = Path(__file__).with_name("factors") / f"{model}.json"
    if config.factor_file or shipped.exists():
        path = Path(config.factor_file or shipped)
        written_ns = path.stat().st_mtime_ns if path.exists() else 0
        return _read_checked(path, written_ns, model, num_layers)
    check_layers(published, num_layers, f"published sensitive layers of {model}")
    return published or frozenset(range(num_layers))


def parse_layers(text: str) -> frozenset[int]:
    """Layers written like ``11-16,20``; ``none`` is the empty set."""
    if text.strip() == "none":
        return frozenset()
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if match is None:
            raise ValueError(f"reduction.sensitive_layers must look like '11-16,20' or 'none', got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"reduction.sensitive_layers: range {part.strip()!r} runs backwards")
        layers.update(range(first, last + 1))
    return frozenset(layers)


def format_layers(layers: Iterable[int]) -> str:
    """The inverse of :func:`parse_layers`, one number per layer."""
    return ",".join(str(layer) for layer in sorted(layers)) or "none"


def save_factor_file(path: Path, factors: FactorFile, extra: dict[str, Any] | None = None) -> None:
    """Write the JSON that :func:`load_factor_file` reads; ``extra`` keeps the measurements beside the result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**asdict(factors), **(extra or {})}, indent=1) + "\n")


def load_factor_file(path: Path) -> FactorFile:
    """Read a probe result. Raises ValueError naming the file when it is not one."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read factor file {path}: {error}; write one with `spark3r probe`") from error
    if not isinstance(data, dict) or data.get("format") != FACTOR_FORMAT:
        raise ValueError(
            f"{path} is not a factor file: 'format' must be {FACTOR_FORMAT!r}; write one with `spark3r probe`"
        )
    missing = {"model", "num_layers", "sensitive_layers"} - set(data)
    if missing:
        raise ValueError(f"factor file {path} lacks {', '.join(sorted(missing))}")
    num_layers, layers = data["num_layers"], data["sensitive_layers"]
    if isinstance(num_layers, bool) or not isinstance(num_layers, int) or num_layers < 1:
        raise ValueError(f"factor file {path}: num_layers must be a whole number >= 1, got {num_layers!r}")
    if not isinstance(layers, list):
        raise ValueError(f"factor file {path}: sensitive_layers must be a list of layers, got {layers!r}")
    return FactorFile(data["model"], num_layers, tuple(layers))


@lru_cache(maxsize=16)
def _read_checked(path: Path, _written_ns: int, model: str, num_layers: int) -> frozenset[int]:
    factors = load_factor_file(path)
    if factors.model != model:
        raise ValueError(f"factor file {path} is of model {factors.model!r}, this model is {model!r}")
    if factors.num_layers != num_layers:
        raise ValueError(f"factor file {path} has {factors.num_layers} global layers, this {model} has {num_layers}")
    return frozenset(factors.sensitive_layers)
