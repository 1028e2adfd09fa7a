"""How good are nano weights? Held-out scenes (and real sequences, for reporting only) against trivial controls.

    python -m training.evaluate --weights CHECKPOINT_OR_SAFETENSORS          # default: the shipped weights
    python -m training.evaluate --real DIR                                   # folders with rgb/ and poses.txt

Methods: ``identity`` (the camera never moves), ``straight line`` (even speed along the true first direction, no
rotation), ``constant depth``, ``solver`` (flow and classical solver, no learning), ``network`` (nano before its second
solve) and ``nano``, in one bidirectional pass; ``nano no K``, ``nano windows`` (block-causal, as with a context) and
``nano reduced`` (token reduction on). The last line is JSON. Errors:

* rotation: degrees between the true and the estimated rotation from each frame to the one before
* direction: degrees between the translations of such a step, where the step exceeds 1% of the depth
* ATE: RMSE of positions after a similarity, in shares of the path length, per sequence (paths over 2% of the depth)
* AbsRel: mean of |depth / truth - 1| after one scale per sequence (median)
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from spark3r_ros.backbone.motion import motion_channels
from spark3r_ros.backbone.nano import Nano, chain, in_gauge
from spark3r_ros.backbone.trunk import PassOptions
from spark3r_ros.config import ReductionConfig
from spark3r_ros.geometry import inverse, make_T, matrix_from_quat_xyzw, rotation_angle, transform, umeyama
from training.data import Batch, Shard, list_shards
from training.generate import DEFAULT_DATA, scaled

SHIPPED = Path(__file__).resolve().parents[1] / "spark3r_ros" / "weights" / "nano.safetensors"
MOVING = 0.01  # of the depth: below, a step has no direction
WINDOW_IDS = (0, 0, 0, 0, 1, 1, 2, 2, *np.repeat(range(3, 7), 4).tolist())  # of the block-causal evaluation


@dataclass(frozen=True, eq=False)
class Answer:
    """What a method says about a batch of sequences; NaN depth: nothing."""

    T_world_camera: np.ndarray  # [B, S, 4, 4] any scale
    depth: np.ndarray  # [B, S, h, w] any scale


def load_model(path: Path) -> Nano:
    """Weights from a training checkpoint (the mean weights) or a safetensors file."""
    model = Nano()
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        model.load_state_dict(load_file(path))
    else:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["mean"])
    return model.eval()


@torch.no_grad()
def network_answers(model: Nano, batch: Batch, known: bool, options: PassOptions) -> dict[str, Answer]:
    """``solver``, ``network`` and ``nano`` on one batch."""
    estimate = model.estimate(batch.rgb, batch.packed_motion(), batch.K[:, None] if known else None, options)
    size = estimate.log_unit.shape
    log_depth = estimate.log_depth + estimate.log_unit[..., None, None]
    first = estimate.observed.first
    T_first = torch.eye(4).repeat(*size, 2, 1, 1)
    T_first[..., :3, :3], T_first[..., :3, 3] = first.R.unflatten(0, size), first.t.unflatten(0, size)
    flat = -first.log_inverse_depth.unflatten(1, estimate.observed.grid)[:, None]
    flat = torch.nn.functional.interpolate(flat, size=log_depth.shape[-2:], mode="bilinear")[:, 0].unflatten(0, size)
    answers = {}
    for name, T, unit, depth in (
        ("solver", T_first, torch.zeros(size), flat),
        ("network", estimate.T_partner_frame, estimate.log_unit, log_depth),
        ("nano", model.solve_again(estimate), estimate.log_unit, log_depth),
    ):
        poses = chain(in_gauge(T, unit)[:, :, 0])
        answers[name] = Answer(poses.double().numpy(), depth.exp().double().numpy())
    return answers


def control_answers(batch: Batch) -> dict[str, Answer]:
    """The trivial controls; the straight line is given the true first direction."""
    truth = batch.T_world_camera.double().numpy()
    shape = truth.shape[:2]
    eye = np.tile(np.eye(4), (*shape, 1, 1))
    line = eye.copy()
    first = (inverse(truth[:, 0]) @ truth[:, 1])[:, :3, 3]
    line[..., :3, 3] = first[:, None] * np.arange(shape[1])[None, :, None]
    constant = np.ones(batch.depth.shape)
    nothing = np.full(batch.depth.shape, np.nan)
    return {
        "identity": Answer(eye, nothing),
        "straight line": Answer(line, nothing),
        "constant depth": Answer(np.full_like(eye, np.nan), constant),
    }


def score(answer: Answer, batch: Batch) -> dict[str, np.ndarray]:
    """Errors of one method: rotation and direction per step, ATE and AbsRel per sequence; NaN where undefined."""
    truth = batch.T_world_camera.double().numpy()
    depth_true = batch.depth.double().numpy()
    step, step_true = (inverse(T[:, :-1]) @ T[:, 1:] for T in (answer.T_world_camera, truth))
    finite = bool(np.isfinite(answer.T_world_camera).all())
    rotation = np.degrees(rotation_angle(np.swapaxes(step_true, -1, -2)[..., :3, :3] @ step[..., :3, :3]))
    t, t_true = step[..., :3, 3], step_true[..., :3, 3]
    cosine = (t * t_true).sum(-1) / np.maximum(np.linalg.norm(t, axis=-1) * np.linalg.norm(t_true, axis=-1), 1e-12)
    with np.errstate(invalid="ignore"):
        level = np.nan_to_num(np.nanmedian(depth_true[:, 0], axis=(1, 2))[:, None], nan=2.0)  # of frame 0, metres
    moving = np.linalg.norm(t_true, axis=-1) > MOVING * level
    direction = np.where(moving, np.degrees(np.arccos(np.clip(cosine, -1, 1))), np.nan)
    path = np.linalg.norm(t_true, axis=-1).sum(axis=1)
    ate = np.full(len(truth), np.nan)
    for i in np.flatnonzero(path > 2 * MOVING * level[:, 0]):
        ate[i] = _ate(answer.T_world_camera[i, :, :3, 3], truth[i, :, :3, 3]) / path[i] if finite else np.nan
    ratio = answer.depth / depth_true
    return {
        "rotation": rotation if finite else np.full_like(rotation, np.nan), "direction": direction, "ate": ate,
        "absrel": np.array([_absrel(r[np.isfinite(r)]) for r in ratio]),
    }  # fmt: skip


def _absrel(ratio: np.ndarray) -> float:
    return float(np.abs(ratio / np.median(ratio) - 1).mean()) if len(ratio) else np.nan


def _ate(estimate: np.ndarray, truth: np.ndarray) -> float:
    if np.ptp(estimate, axis=0).max() < 1e-12:  # a point: no similarity makes it better than the mean
        return float(np.sqrt(((truth - truth.mean(axis=0)) ** 2).sum(axis=1).mean()))
    moved = transform(umeyama(estimate, truth), estimate)
    return float(np.sqrt(((moved - truth) ** 2).sum(axis=1).mean()))


def held_out(root: Path, split: str, limit: int) -> Iterator[Batch]:
    """Batches of whole held-out sequences, at most ``limit`` per shard."""
    for folder in list_shards(root, split):
        shard = Shard(folder)
        rows = np.arange(min(limit, len(shard)))
        for part in np.array_split(rows, max(1, len(rows) // 16)):
            yield shard.batch(part, shard.num_frames)


def real_windows(folder: Path, stride: int, num_frames: int = 8) -> Iterator[Batch]:
    """Windows of a folder in the shared layout (rgb/, poses.txt, intrinsics.json, depth/ optional), undistorted."""
    camera = json.loads((folder / "intrinsics.json").read_text())
    K_full = np.array([[camera["fx"], 0, camera["cx"]], [0, camera["fy"], camera["cy"]], [0, 0, 1]])
    coefficients = np.array(camera.get("distortion", {}).get("coeffs", []), float)
    rows = np.loadtxt(folder / "poses.txt", ndmin=2)
    T = make_T(matrix_from_quat_xyzw(rows[:, 4:]), rows[:, 1:4])
    files = sorted((folder / "rgb").iterdir())
    for start in range(0, len(files) - (num_frames - 1) * stride, max(1, stride * num_frames // 2)):
        index = [start + stride * i for i in range(num_frames)]
        images = [cv2.cvtColor(cv2.imread(str(files[i])), cv2.COLOR_BGR2RGB) for i in index]
        if coefficients.size:
            images = [cv2.undistort(image, K_full, coefficients) for image in images]
        images = [cv2.resize(image, (192, 144), interpolation=cv2.INTER_AREA) for image in images]
        motion = motion_channels([cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in images])
        small = np.stack([cv2.resize(image, (96, 72), interpolation=cv2.INTER_AREA) for image in images])
        depth = np.stack([_read_depth(folder / "depth" / f"{files[i].stem}.png") for i in index])
        K = scaled(K_full, 192 / camera["width"])
        tensors = (small.transpose(0, 3, 1, 2) / 255, motion, depth, T[index], K)
        yield Batch(*(torch.from_numpy(np.asarray(x, np.float32))[None] for x in tensors))


def _read_depth(path: Path) -> np.ndarray:
    """Depth [36, 48] in metres (millimetre PNG, lens distortion neglected), NaN where unknown or without a file."""
    if not path.exists():
        return np.full((36, 48), np.nan)
    depth = cv2.imread(str(path), cv2.IMREAD_UNCHANGED) / 1000.0
    return cv2.resize(np.where(depth > 0, depth, np.nan), (48, 36), interpolation=cv2.INTER_NEAREST)


def evaluate(model: Nano, batches: Iterator[Batch]) -> dict[str, dict[str, float]]:
    """Median and mean errors per method over all batches."""
    reduced = PassOptions(reduction=ReductionConfig(query_factor=2, kv_factor=2))
    collected: dict[str, dict[str, list[np.ndarray]]] = {}
    for batch in batches:
        ids = torch.tensor(WINDOW_IDS[: batch.rgb.shape[1]])
        answers = control_answers(batch) | network_answers(model, batch, True, PassOptions())
        answers["nano no K"] = network_answers(model, batch, False, PassOptions())["nano"]
        answers["nano windows"] = network_answers(model, batch, True, PassOptions(window_ids=ids))["nano"]
        answers["nano reduced"] = network_answers(model, batch, True, reduced)["nano"]
        for method, answer in answers.items():
            for name, value in score(answer, batch).items():
                collected.setdefault(method, {}).setdefault(name, []).append(value.ravel())
    table: dict[str, dict[str, float]] = {}
    for method, errors in collected.items():
        table[method] = {}
        for name, parts in errors.items():
            values = np.concatenate(parts)
            values = values[np.isfinite(values)]
            if len(values):
                table[method][name] = float(np.median(values))
                table[method][f"{name}_mean"] = float(np.mean(values))
    return table


def print_table(title: str, table: dict[str, dict[str, float]]) -> None:
    """Median (mean) of every error per method."""
    print(f"\n{title}: median (mean)\n{'':15s} {'rotation deg':>16s} {'direction deg':>16s} {'ATE / path':>16s} AbsRel")
    for method, row in table.items():
        cells = [
            f"{row[name]:.{digits}f} ({row[name + '_mean']:.{digits}f})" if name in row else "-"
            for name, digits in (("rotation", 2), ("direction", 1), ("ate", 3), ("absrel", 3))
        ]
        print(f"{method:15s} " + " ".join(f"{cell:>16s}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=SHIPPED, help="(default: %(default)s)")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--split", nargs="*", default=["held-out", "tame"])
    parser.add_argument("--limit", type=int, default=96, help="sequences per shard")
    parser.add_argument("--real", type=Path, nargs="*", default=[], help="folders of real sequences, reported only")
    parser.add_argument("--stride", type=int, default=1, help="take every n-th real frame")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(args.weights)
    results = {}
    for split in args.split:
        results[split] = evaluate(model, held_out(args.data, split, args.limit))
        print_table(split, results[split])
    for folder in args.real:
        name = f"{folder.name} stride {args.stride}"
        results[name] = evaluate(model, real_windows(folder, args.stride))
        print_table(name, results[name])
    print(json.dumps({"benchmark": "training.evaluate", "weights": args.weights.name, "results": results}))


if __name__ == "__main__":
    main()
