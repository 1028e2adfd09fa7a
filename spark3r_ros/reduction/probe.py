"""Which global layers are sensitive to losing keys: measured once per model, on scenes that no test uses.

All layers prune keys by one factor; then one layer at a time prunes much harder. A layer is sensitive when the error of
poses and points grows by more than a threshold (arXiv 2605.06270). The error is the change against the dense pass of
the same model, so that any recording will do. Queries stay whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from spark3r_ros.config import ReductionConfig
from spark3r_ros.frame import Frame, Prediction
from spark3r_ros.geometry import apply_similarity_to_pose, rotation_angle, transform, umeyama, unproject
from spark3r_ros.preprocess import Preprocessor
from spark3r_ros.reduction.schedule import FactorFile, check_factor, format_layers, load_factor_file, save_factor_file

if TYPE_CHECKING:
    from spark3r_ros.backbone import Backbone

POINT_STEP = 8  # pixels between the points that are compared


@dataclass(frozen=True, eq=False)
class ProbeSequence:
    """One calibration sequence at the network's size."""

    name: str
    images: torch.Tensor  # [S, 3, H, W] RGB in [0, 1]
    intrinsics: torch.Tensor | None = None  # [3, 3] pixels of these images, when known


@dataclass(frozen=True)
class Change:
    """How far a reduced pass is from the dense one, averaged over frames, after a similarity."""

    rotation: float  # radians
    position: float  # in units of the dense points' spread
    points: float  # the same unit

    @property
    def pose(self) -> float:
        return self.rotation + self.position


@dataclass(frozen=True)
class ProbeResult:
    """What the probe measured; ``layers[i]`` is the change with layer i raised, ``base`` that with none raised."""

    model: str
    base_factor: int
    raised_factor: int
    threshold: float
    base: Change
    layers: tuple[Change, ...]
    sequences: tuple[str, ...]
    num_frames: tuple[int, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Growth of the error by raising each layer: the mean of pose and point growth."""
        return tuple(0.5 * (_ratio(c.pose, self.base.pose) + _ratio(c.points, self.base.points)) for c in self.layers)

    @property
    def sensitive_layers(self) -> tuple[int, ...]:
        return tuple(i for i, ratio in enumerate(self.ratios) if ratio > self.threshold)

    def save(self, path: Path) -> None:
        """Write the factor file that ``reduction.factor_file`` takes, the measurements beside the result."""
        factors = FactorFile(self.model, len(self.layers), self.sensitive_layers)
        save_factor_file(path, factors, {"ratios": self.ratios, "probe": asdict(self)})

    @staticmethod
    def load(path: Path) -> ProbeResult:
        """Read a file that ``save`` wrote. Raises ValueError when it is another kind of file."""
        load_factor_file(path)
        probe = json.loads(path.read_text()).get("probe")
        if not isinstance(probe, dict):
            raise ValueError(f"factor file {path} holds no measurements; write one with `spark3r probe`")
        probe["base"] = Change(**probe["base"])
        probe["layers"] = tuple(Change(**layer) for layer in probe["layers"])
        probe["sequences"], probe["num_frames"] = tuple(probe["sequences"]), tuple(probe["num_frames"])
        return ProbeResult(**probe)


def _ratio(value: float, base: float) -> float:
    return value / base if base > 0 else (1.0 if value == 0 else math.inf)


def sequence_from_frames(
    backbone: Backbone, frames: Iterable[Frame], name: str, *, num_frames: int = 100, stride: int = 1
) -> ProbeSequence:
    """Every ``stride``-th of the frames, ``num_frames`` at most, undistorted and resized for the backbone."""
    preprocess: Preprocessor | None = None
    images = []
    for index, frame in enumerate(frames):
        if index % stride:
            continue
        if preprocess is None:
            preprocess = Preprocessor(frame, backbone.resize(*frame.image.shape[:2]))
        preprocess.check(frame)
        images.append(torch.from_numpy(preprocess(frame).rgb))
        if len(images) == num_frames:
            break
    if preprocess is None:
        raise ValueError(f"calibration sequence {name} has no frames")
    K = None if preprocess.K is None else torch.from_numpy(preprocess.K).float()
    return ProbeSequence(name, torch.stack(images).permute(0, 3, 1, 2) / 255, K)


def run_probe(
    backbone: Backbone,
    sequences: Sequence[ProbeSequence],
    *,
    base_factor: int = 32,
    raised_factor: int = 256,
    threshold: float = 1.05,
    progress: Callable[[int, int], None] | None = None,
) -> ProbeResult:
    """Measure how sensitive each global layer of ``backbone`` is.

    Takes (global layers + 2) passes per sequence; ``progress`` is called with passes done and passes in all.

    Raises ValueError when a sequence is too short for the raised factor to drop more frames than the base factor.
    """
    check_factor("base", base_factor)
    check_factor("raised", raised_factor)
    if raised_factor % base_factor:
        raise ValueError(f"raised factor must be a multiple of the base factor {base_factor}, got {raised_factor}")
    if not sequences:
        raise ValueError("the probe needs at least one calibration sequence")
    num_layers = backbone.spec.trunk.num_global
    total = len(sequences) * (num_layers + 2)
    done = 0
    changes: list[list[Change]] = [[] for _ in range(num_layers + 1)]
    for sequence in sequences:
        _check_length(sequence, base_factor)
        dense = _predict(backbone, sequence, None)
        for index in range(-1, num_layers):
            if progress is not None:
                progress(done := done + 1, total)
            config = _raise_one(index, num_layers, base_factor, raised_factor)
            changes[index + 1].append(change(_predict(backbone, sequence, config), dense))
        if progress is not None:
            progress(done := done + 1, total)
    base, *layers = (_mean(several) for several in changes)
    names, lengths = tuple(s.name for s in sequences), tuple(len(s.images) for s in sequences)
    return ProbeResult(backbone.spec.name, base_factor, raised_factor, threshold, base, tuple(layers), names, lengths)


def _check_length(sequence: ProbeSequence, base_factor: int) -> None:
    if len(sequence.images) <= base_factor:
        raise ValueError(
            f"calibration sequence {sequence.name} has {len(sequence.images)} frames, the probe needs more than "
            f"{base_factor}: with fewer, every factor keeps the same single frame"
        )


def _raise_one(raised: int, num_layers: int, base_factor: int, raised_factor: int) -> ReductionConfig:
    """All layers at the base factor but ``raised`` (-1: none), which is the only insensitive one."""
    others = [layer for layer in range(num_layers) if layer != raised]
    return ReductionConfig(
        query_factor=1,
        kv_factor=base_factor,
        insensitive_multiplier=raised_factor // base_factor,
        sensitive_layers=format_layers(others),
    )


def _predict(backbone: Backbone, sequence: ProbeSequence, config: ReductionConfig | None) -> Prediction:
    return backbone(sequence.images, reduction=config, intrinsics=sequence.intrinsics)


def change(prediction: Prediction, dense: Prediction) -> Change:
    """Compare two predictions for the same frames; the similarity between them is found from their points."""
    moved, fixed = _points(prediction), _points(dense)  # [S, n, 3]
    S = umeyama(moved.reshape(-1, 3), fixed.reshape(-1, 3))
    centre = np.median(fixed.reshape(-1, 3), axis=0)
    spread = float(np.median(np.linalg.norm(fixed - centre, axis=-1)))
    poses = [apply_similarity_to_pose(S, T) for T in prediction.T_world_camera.double().cpu().numpy()]
    truth = dense.T_world_camera.double().cpu().numpy()
    rotations = [rotation_angle(a[:3, :3].T @ b[:3, :3]) for a, b in zip(poses, truth)]
    positions = [np.linalg.norm(a[:3, 3] - b[:3, 3]) for a, b in zip(poses, truth)]
    distances = np.linalg.norm(transform(S, moved) - fixed, axis=-1)  # [S, n]
    return Change(
        rotation=float(np.mean(rotations)),
        position=float(np.mean(positions)) / spread,
        points=float(np.mean(np.median(distances, axis=1))) / spread,
    )


def _points(prediction: Prediction) -> np.ndarray:
    """Points in the world [S, n, 3] of every POINT_STEP-th pixel."""
    frames = zip(
        prediction.depth.double().cpu().numpy(),
        prediction.intrinsics.double().cpu().numpy(),
        prediction.T_world_camera.double().cpu().numpy(),
    )
    half = POINT_STEP // 2
    return np.stack(
        [transform(T, unproject(depth, K)[half::POINT_STEP, half::POINT_STEP].reshape(-1, 3)) for depth, K, T in frames]
    )


def _mean(changes: list[Change]) -> Change:
    """Mean over sequences."""
    return Change(*(float(np.mean([getattr(c, name) for c in changes])) for name in ("rotation", "position", "points")))


def plot(result: ProbeResult, path: Path) -> None:
    """Growth of the error by layer, with the threshold; sensitive layers stand out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 3.5), layout="constrained")
    layers = range(len(result.layers))
    series: dict[str, list[float]] = {
        "poses": [_ratio(c.pose, result.base.pose) for c in result.layers],
        "points": [_ratio(c.points, result.base.points) for c in result.layers],
    }
    for offset, (name, ratios) in zip((-0.2, 0.2), series.items()):
        axis.bar([i + offset for i in layers], ratios, width=0.38, label=name)
    for layer in result.sensitive_layers:
        axis.axvspan(layer - 0.5, layer + 0.5, color="tab:red", alpha=0.12, lw=0, zorder=0)
    axis.axhline(result.threshold, color="tab:red", lw=1, label=f"threshold {result.threshold:g}")
    axis.set(xlabel="global layer", ylabel="error growth", title=f"{result.model}: layers in red are sensitive")
    axis.set_xticks(list(layers))
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
