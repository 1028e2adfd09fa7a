"""What reduction costs in accuracy: pose and depth errors of nano over query and key-value factors.

    python -m benchmarks.quality --frames 100 --scenes 4
    python -m benchmarks.quality --schedule 100 200 300 --scenes 4
    python -m benchmarks.quality --real shared/data/tum_fr3_office --frames 100

Held-out scenes are rendered here, from seeds that neither training nor the probe uses. Errors are against the true
poses and depths: ``direction`` and ``rotation`` of the step from frame to frame (degrees), ``ATE`` after a similarity
in shares of the path, ``AbsRel`` depth after one scale per sequence. ``pose change`` (radians plus shares of the extent
of the scene) and ``point change`` (shares of that extent) are against the dense pass: they resolve differences far
below the model's own error. Prints tables, writes a plot, last line JSON.

    python -m benchmarks.quality --probe spark3r_ros/reduction/factors/nano.json --scenes 4

writes the probe's result for nano, measured on calibration scenes of seeds of their own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from spark3r_ros.backbone import Backbone, load_backbone
from spark3r_ros.config import ReductionConfig
from spark3r_ros.frame import Prediction
from spark3r_ros.geometry import inverse, matrix_from_quat_xyzw, rotation_angle, transform, umeyama
from spark3r_ros.reduction.probe import ProbeSequence, change, run_probe, sequence_from_frames
from spark3r_ros.reduction.probe import plot as plot_probe
from spark3r_ros.reduction.schedule import UNREDUCED_FRAMES
from spark3r_ros.sources import open_source
from training.evaluate import load_model
from training.paths import camera_path
from training.scenes import Scene, camera_matrix

HELD_OUT_SEED, CALIBRATION_SEED = 910_000, 820_000  # of scenes and paths
KINDS = (("orbit", "room"), ("handheld", "room"), ("circuit", "hall"), ("forward", "room"))
MIN_STEP = 0.005  # metres: below, a step has no direction
GRID = {"query": (1, 2, 4, 8, 20), "kv": (1, 3, 8, 32, 100)}


@dataclass(frozen=True, eq=False)
class Truth:
    """A sequence at the network's size with what is true about it."""

    sequence: ProbeSequence
    T_world_camera: np.ndarray  # [S, 4, 4] metres
    depth: np.ndarray | None  # [S, H, W] metres


def rendered(index: int, num_frames: int, size: tuple[int, int], first_seed: int = HELD_OUT_SEED) -> Truth:
    """One scene with a smooth path; a frame moves about as far whatever the number of frames."""
    kind, layout = KINDS[index % len(KINDS)]
    seed = first_seed + index
    scene, loops = Scene(seed, layout), num_frames / 240 if kind in ("orbit", "circuit") else 1.0
    poses = camera_path(kind, num_frames, seed, loops)
    height, width = 2 * size[0], 2 * size[1]
    K = camera_matrix(width, height, 60 + 5 * (index % 4))
    views = [scene.render(pose, K, width, height) for pose in poses]
    rgb = np.stack([cv2.resize(view, size[::-1], interpolation=cv2.INTER_AREA) for view, _ in views])
    K_half = K.copy()
    K_half[:2] *= 0.5
    K_half[:2, 2] -= 0.25  # pixel centres at integers
    images = torch.from_numpy(rgb).permute(0, 3, 1, 2) / 255
    name = f"{kind} {index}, {num_frames} frames"
    depth = np.stack([depth[::2, ::2] for _, depth in views])
    return Truth(ProbeSequence(name, images, torch.from_numpy(K_half).float()), poses, depth)


def recorded(folder: Path, num_frames: int, backbone: Backbone) -> Truth:
    """A real sequence with rgb/ and poses.txt."""
    rows = np.loadtxt(folder / "poses.txt", ndmin=2)
    poses = np.tile(np.eye(4), (len(rows), 1, 1))
    poses[:, :3, :3], poses[:, :3, 3] = matrix_from_quat_xyzw(rows[:, 4:]), rows[:, 1:4]
    sequence = sequence_from_frames(backbone, open_source(folder), folder.name, num_frames=num_frames)
    return Truth(sequence, poses[: len(sequence.images)], None)


def errors(prediction: Prediction, truth: Truth) -> dict[str, float]:
    """Errors of one pass against the truth."""
    poses, true_poses = prediction.T_world_camera.double().numpy(), truth.T_world_camera
    step, true_step = (inverse(T[:-1]) @ T[1:] for T in (poses, true_poses))
    rotation = np.degrees(rotation_angle(np.swapaxes(true_step, -1, -2)[:, :3, :3] @ step[:, :3, :3]))
    t, true_t = step[:, :3, 3], true_step[:, :3, 3]
    length = np.linalg.norm(true_t, axis=1)
    cosine = (t * true_t).sum(1) / np.maximum(np.linalg.norm(t, axis=1) * length, 1e-12)
    moved = length > MIN_STEP
    aligned = transform(umeyama(poses[:, :3, 3], true_poses[:, :3, 3]), poses[:, :3, 3])
    found = {
        "rotation": float(np.mean(rotation)),
        "direction": float(np.mean(np.degrees(np.arccos(np.clip(cosine[moved], -1, 1))))),
        "ATE": float(np.sqrt(((aligned - true_poses[:, :3, 3]) ** 2).sum(1).mean()) / length.sum()),
    }
    if truth.depth is not None:
        ratio = prediction.depth.double().numpy() / truth.depth
        found["AbsRel"] = float(np.mean(np.abs(ratio / np.median(ratio) - 1)))
    return found


class Runner:
    """Passes of one sequence; what the model computes from pixels alone (nano's flow) is computed once."""

    def __init__(self, backbone: Backbone, truth: Truth) -> None:
        self.backbone, self.truth = backbone, truth
        model = backbone.model
        motion = type(model).motion(model, truth.sequence.images, None)
        model.motion = lambda _images, _previous: motion  # type: ignore[method-assign]
        self.dense = self._predict(None)

    def _predict(self, config: ReductionConfig | None) -> Prediction:
        sequence = self.truth.sequence
        return self.backbone(sequence.images, reduction=config, intrinsics=sequence.intrinsics)

    def measure(self, config: ReductionConfig | None) -> dict[str, float]:
        prediction = self.dense if config is None else self._predict(config)
        moved = change(prediction, self.dense)
        return errors(prediction, self.truth) | {"pose change": moved.pose, "point change": moved.points}


Configs = dict[str, ReductionConfig | None]
Table = dict[str, dict[str, float]]


def grid_configs() -> Configs:
    """Every pair of a query and a key-value factor, the same in all layers."""
    return {
        f"q{q} kv{kv}": ReductionConfig(query_factor=q, kv_factor=kv, insensitive_multiplier=1)
        for q in GRID["query"]
        for kv in GRID["kv"]
    }


def option_configs(num_frames: int) -> Configs:
    """The schedule, and each named option around it; where the schedule leaves most whole, around factors that bite."""
    named: Configs = {"dense": None, "schedule": ReductionConfig()}
    base = ReductionConfig()
    if num_frames <= UNREDUCED_FRAMES:
        base = named["q2 kv3"] = ReductionConfig(query_factor=2, kv_factor=3)
    change_one: dict[str, dict[str, object]] = {
        "matching on q": {"matching": "q"},
        "matching on k": {"matching": "k"},
        "one matching for all layers": {"matching_interval": 1024},
        "coverage": {"kv_selection": "coverage"},
        "special keys kept": {"keep_special_kv": True},
        "all layers sensitive": {"insensitive_multiplier": 1},
        "no layer sensitive": {"sensitive_layers": "none"},
    }
    return named | {name: dataclasses.replace(base, **kw) for name, kw in change_one.items()}  # type: ignore[arg-type]


def run(
    backbone: Backbone, truths: Iterator[Truth], configs: Callable[[int], Configs]
) -> tuple[Table, list[dict[str, object]]]:
    """Means over sequences, and every single figure."""
    rows: list[dict[str, object]] = []
    for truth in truths:
        runner = Runner(backbone, truth)
        for name, config in configs(len(truth.sequence.images)).items():
            found = runner.measure(config)
            rows.append({"sequence": truth.sequence.name, "config": name, **found})
        print(truth.sequence.name, file=sys.stderr, flush=True)
    names = list(dict.fromkeys(str(row["config"]) for row in rows))
    keys = [key for key in rows[0] if key not in ("sequence", "config")]
    means = {n: {k: float(np.mean([row[k] for row in rows if row["config"] == n])) for k in keys} for n in names}
    return means, rows


def print_table(title: str, table: Table) -> None:
    keys = list(next(iter(table.values())))
    print(f"\n{title}\n\n| | {' | '.join(keys)} |\n|{'---|' * (len(keys) + 1)}")
    for name, row in table.items():
        print(f"| {name} | {' | '.join(f'{row[key]:.4g}' for key in keys)} |")


def plot_grid(table: Table, path: Path) -> None:
    """The paper's central figure: error against the factor of queries alone and of keys alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    for axis, key in zip(axes, ("ATE", "direction", "pose change", "point change")):
        for name, factors, row in (
            ("queries", GRID["query"], "q{} kv1"), ("keys and values", GRID["kv"], "q1 kv{}")
        ):  # fmt: skip
            axis.plot(factors, [table[row.format(f)][key] for f in factors], marker="o", label=name)
        axis.set(xscale="log", xlabel="factor (the other is 1)", ylabel=key)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def probe(backbone: Backbone, arguments: argparse.Namespace) -> None:
    """The probe on rendered calibration scenes: factor file, plot and JSON line."""
    size = backbone.resize(480, 640).size
    scenes = range(arguments.scenes)
    sequences = [rendered(i, arguments.frames, size, CALIBRATION_SEED).sequence for i in scenes]
    result = run_probe(
        backbone, sequences, progress=lambda d, n: print(f"pass {d} of {n}", file=sys.stderr, flush=True)
    )
    result.save(arguments.probe)
    plot_probe(result, arguments.out / "probe.png")
    print(json.dumps({"ratios": result.ratios, "sensitive_layers": result.sensitive_layers}))


def load(weights: Path | None) -> Backbone:
    return load_backbone("nano") if weights is None else Backbone(load_model(weights))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="training checkpoint or safetensors; default: the shipped nano")
    parser.add_argument("--frames", type=int, default=100, help="length of the grid's sequences")
    parser.add_argument("--schedule", type=int, nargs="*", default=None, help="lengths: schedule and options instead")
    parser.add_argument("--scenes", type=int, default=4)
    parser.add_argument("--real", type=Path, nargs="*", default=[], help="folders with rgb/ and poses.txt instead")
    parser.add_argument("--probe", type=Path, help="write the probe's factor file from calibration scenes instead")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("out/quality"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    backbone = load(arguments.weights)
    size = backbone.resize(480, 640).size
    results: dict[str, list[dict[str, object]]] = {}

    def sequences(num_frames: int) -> Iterator[Truth]:
        if arguments.real:
            yield from (recorded(folder, num_frames, backbone) for folder in arguments.real)
        else:
            yield from (rendered(i, num_frames, size) for i in range(arguments.scenes))

    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.probe:
        probe(backbone, arguments)
        return
    if arguments.schedule is None:
        table, results["grid"] = run(backbone, sequences(arguments.frames), lambda _: grid_configs())
        print_table(f"{arguments.frames} frames, the same factors in all layers", table)
        plot_grid(table, arguments.out / "grid.png")
    for num_frames in arguments.schedule or []:
        table, results[str(num_frames)] = run(backbone, sequences(num_frames), option_configs)
        print_table(f"{num_frames} frames", table)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
