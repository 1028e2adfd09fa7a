"""How accurate is the package? Its methods and trivial controls, side by side, on rendered scenes and real sequences.

    python -m benchmarks.accuracy --sequences ../shared/data/* --scenes 6
    python -m benchmarks.accuracy --sequences ../shared/data/* --scenes 0 --unknown-camera      # without K
    python -m benchmarks.accuracy --scenes 0 --slow 24 --methods "nano + refine"                # wide baselines
    python -m benchmarks.accuracy --sequences ../shared/data/* --scenes 0 --noise 1             # what is chance

Methods: ``identity`` (the camera never moves) and ``straight line`` (from the true first to the true last position at
even speed, no rotation) are controls; ``refine alone`` runs the corridor without any network (flat depth of no
confidence), ``nano alone`` without refinement, ``nano + refine`` is the package's default. One setting for all
sequences, the package's defaults; ``--set group.field=value`` changes all of them.

Errors, over every frame of the input; truth is used for nothing but scoring:

* ATE: RMSE of camera positions after Sim(3), and after SE(3) with the recovered scale taken as 1 (metric claims only)
* odometry: the same after Sim(3) for the poses that were given out while the stream ran
* rotation, direction at gaps of 1, 5, 10 and 20 frames: median degrees between the true and the estimated relative
  rotation, and between the translations where the camera moved by more than 2% of the scene's depth (unknown: 1 cm)
* AbsRel: mean of |depth / truth - 1| over the pixels that were published, after one scale per sequence; ``covered``:
  the share of published pixels; ``control``: the same pixels with one constant depth per sequence
* posed: share of frames with a pose, and share of those given out as confident; ``lie``: share of frames whose position
  is confident but wrong by more than three of its own standard deviations. Truth is moved and scaled onto the estimate
  for this, every frame counting by its covariance (a similarity the other way would shrink an estimate that is mostly
  noise to nothing); less than 2% of the scene's depth is no lie

Prints a table per sequence, writes a plot of the trajectories, last line JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from spark3r_ros import geometry
from spark3r_ros.backbone import Backbone, load_backbone
from spark3r_ros.cli import build_config
from spark3r_ros.config import Config, with_values
from spark3r_ros.frame import CameraModel, DepthImage, Frame, FramePose, Gauge, Prediction, TrackingState
from spark3r_ros.preprocess import Preprocessor, Resize
from spark3r_ros.reconstructor import Reconstructor
from spark3r_ros.sources import open_source
from training.evaluate import load_model
from training.paths import camera_path
from training.scenes import Scene, camera_matrix

GAPS = (1, 5, 10, 20)
FIRST_SEED = 910_000  # of the scenes: neither training, demo, probe nor another benchmark uses these
SCENE_SIZE = (640, 480)


@dataclass(frozen=True, eq=False)
class Recording:
    """Frames, as often as wanted, and their truth."""

    name: str
    frames: Callable[[], Iterable[Frame]]
    T_world_camera: np.ndarray  # [N, 4, 4] metres
    depth: Callable[[int], np.ndarray | None]  # of frame i, [H, W] metres, NaN where unknown, lens as in the image


@dataclass(eq=False)
class Run:
    """What one method said about one recording."""

    best: np.ndarray  # [N, 4, 4] of every frame, at the end of the stream
    online: np.ndarray  # [N, 4, 4] as given out
    states: list[TrackingState] = field(default_factory=list)
    sigma: np.ndarray = field(default_factory=lambda: np.zeros(0))  # [N] of the position, as given out
    depths: list[DepthImage] = field(default_factory=list)
    seconds: float = 0.0
    keyframes: int = 0


class FlatBackbone(Backbone):
    """No network: every view is a fronto-parallel wall at distance 1 that nobody should trust."""

    def __init__(self, like: Backbone) -> None:
        self.device, self._spec = like.device, replace(like.spec, name="flat")

    @property
    def spec(self):  # type: ignore[no-untyped-def]
        return self._spec

    def __call__(self, images: torch.Tensor, *, intrinsics: torch.Tensor | None = None, **_: Any) -> Prediction:
        count, _, height, width = images.shape
        K = torch.tensor([[0.87 * width, 0, width / 2], [0, 0.87 * width, height / 2], [0, 0, 1.0]])
        return Prediction(
            T_world_camera=torch.eye(4).repeat(count, 1, 1),
            intrinsics=(K if intrinsics is None else intrinsics).expand(count, 3, 3),
            depth=torch.ones(count, height, width),
            confidence=torch.zeros(count, height, width),
            gauge=Gauge.FREE,
            descriptors=torch.ones(count, 1),
        )


def recorded(folder: Path) -> Recording:
    """A sequence in the shared layout: rgb/, timestamps.txt, intrinsics.json, poses.txt, depth/ optional."""
    rows = np.loadtxt(folder / "poses.txt", ndmin=2)
    poses = geometry.make_T(geometry.matrix_from_quat_xyzw(rows[:, 4:8]), rows[:, 1:4])
    names = [path.stem for path in sorted((folder / "rgb").iterdir())]

    def depth(index: int) -> np.ndarray | None:
        path = folder / "depth" / f"{names[index]}.png"
        if not path.exists():
            return None
        millimetres = cv2.imread(str(path), cv2.IMREAD_UNCHANGED).astype(np.float32)
        return np.where(millimetres > 0, millimetres / 1000, np.nan)

    return Recording(folder.name, lambda: open_source(folder), poses, depth)


def held_out(index: int, num_frames: int) -> Recording:
    """A held-out scene with a path of its own kind, hand-held ones most often."""
    kind = ("handheld", "handheld", "orbit", "forward", "handheld", "circuit")[index % 6]
    seed = FIRST_SEED + index
    scene = Scene(seed, "hall" if kind == "circuit" else "room")
    poses = camera_path(kind, num_frames, seed, num_frames / 240)
    return rendered(f"{kind} {index}", scene, poses, 1e8, 58 + 4 * (index % 5))


def slow(index: int) -> Recording:
    """Sixteen frames at 1 Hz, 8 degrees and 0.27 m a step: wide baselines."""
    seed = FIRST_SEED + 1000 + index
    return rendered(f"slow {index}", Scene(seed, "room"), camera_path("orbit", 45, seed)[:16], 1e9, 62)


def noisy(recording: Recording, seed: int) -> Recording:
    """The same with noise of one grey level: figures that change with it are chance."""

    def frames() -> Iterable[Frame]:
        rng = np.random.default_rng(seed)
        for frame in recording.frames():
            noise = np.rint(rng.normal(0, 1, frame.image.shape))
            yield replace(frame, image=np.clip(frame.image + noise, 0, 255).astype(np.uint8))

    return replace(recording, frames=frames)


def rendered(name: str, scene: Scene, poses: np.ndarray, interval_ns: float, fov: float) -> Recording:
    """A scene seen from poses [N, 4, 4], each image rendered once."""
    width, height = SCENE_SIZE
    K = camera_matrix(width, height, fov)
    camera = CameraModel(width, height, K)
    views: list[tuple[np.ndarray, np.ndarray]] = []

    def frames() -> Iterable[Frame]:
        for i, T in enumerate(poses):
            if i == len(views):
                views.append(scene.render(T, K, width, height))
            yield Frame(round(i * interval_ns), views[i][0], "camera", camera)

    return Recording(name, frames, poses, lambda i: views[i][1])


def reconstruct(recording: Recording, config: Config, backbone: Backbone, known_camera: bool) -> Run:
    """One pass of the corridor."""
    reconstructor, poses, depths = Reconstructor(config, backbone), [], []
    started = time.process_time()
    for frame in recording.frames():
        frame = frame if known_camera else replace(frame, camera=None)
        update = reconstructor.push(frame)
        poses.extend(update.poses)
        depths += [update.depth] if update.depth is not None else []
    update = reconstructor.finish()
    poses.extend(update.poses)
    depths += [update.depth] if update.depth is not None else []
    seconds = time.process_time() - started
    best = np.stack([T for _, T in reconstructor.trajectory()])
    return Run(best, *_given_out(poses), depths, seconds, len(reconstructor.keyframe_poses()))


def _given_out(poses: list[FramePose]) -> tuple[np.ndarray, list[TrackingState], np.ndarray]:
    sigma = np.array([np.sqrt(max(np.linalg.eigvalsh(p.covariance[:3, :3])[-1], 0.0)) for p in poses])
    return np.stack([p.T_odom_camera for p in poses]), [p.state for p in poses], sigma


def controls(truth: np.ndarray) -> dict[str, Run]:
    """The camera that never moves, and the one that moves evenly from the true start to the true end."""
    still = np.tile(np.eye(4), (len(truth), 1, 1))
    line = np.tile(truth[0], (len(truth), 1, 1))
    share = np.linspace(0, 1, len(truth))[:, None]
    line[:, :3, 3] = (1 - share) * truth[0, :3, 3] + share * truth[-1, :3, 3]
    return {"identity": Run(still, still), "straight line": Run(line, line)}


def position_errors(estimate: np.ndarray, truth: np.ndarray, with_scale: bool) -> tuple[np.ndarray, float]:
    """Distance [N] between positions after the best similarity (or rigid motion), and its scale."""
    source, target = estimate[:, :3, 3], truth[:, :3, 3]
    if np.ptp(source, axis=0).max() < 1e-9:  # a point: nothing is better than the mean
        return np.linalg.norm(target - target.mean(axis=0), axis=1), 1.0
    S = geometry.umeyama(source, target)
    scale = float(geometry.scale_of(S))
    if not with_scale:
        S = geometry.make_T(S[:3, :3] / scale, target.mean(axis=0) - S[:3, :3] / scale @ source.mean(axis=0))
    return np.linalg.norm(geometry.transform(S, source) - target, axis=1), scale


def sigmas_off(estimate: np.ndarray, truth: np.ndarray, sigma: np.ndarray, floor: float) -> np.ndarray:
    """How many sigmas [N] each position is off; ``sigma`` [N] in the estimate's units, ``floor`` in metres."""
    source, target = truth[:, :3, 3], estimate[:, :3, 3]
    for _ in range(2):  # the floor is in metres, so it needs the scale
        S = geometry.umeyama(source, target, 1.0 / (sigma**2 + 1e-12))
        sigma = np.maximum(sigma, floor * float(geometry.scale_of(S)))
    return np.linalg.norm(geometry.transform(S, source) - target, axis=1) / sigma


def rmse(errors: np.ndarray) -> float:
    return float(np.sqrt(np.mean(errors**2)))


def relative_errors(estimate: np.ndarray, truth: np.ndarray, gap: int, moving: float) -> tuple[float, float]:
    """Median rotation and translation-direction error in degrees over ``gap`` frames; NaN where nothing moved."""
    if len(truth) <= gap:
        return float("nan"), float("nan")
    step, true_step = (geometry.inverse(T[:-gap]) @ T[gap:] for T in (estimate, truth))
    rotation = geometry.rotation_angle(np.swapaxes(true_step, -1, -2)[:, :3, :3] @ step[:, :3, :3])
    t, true_t = step[:, :3, 3], true_step[:, :3, 3]
    length = np.linalg.norm(true_t, axis=1)
    cosine = (t * true_t).sum(1) / np.maximum(np.linalg.norm(t, axis=1) * length, 1e-12)
    angle = np.arccos(np.clip(cosine, -1, 1))[length > moving]
    return float(np.degrees(np.median(rotation))), float(np.degrees(np.median(angle))) if len(angle) else float("nan")


def depth_errors(run: Run, recording: Recording, resize: Resize) -> dict[str, float]:
    """AbsRel of the published depth images, its control, and how much of them was published."""
    by_stamp = {image.stamp_ns: image for image in run.depths}
    ratios, truths, covered = [], [], []
    for index, frame in enumerate(recording.frames()):
        image, true = by_stamp.get(frame.stamp_ns), recording.depth(index)
        if image is None or true is None:
            continue
        true_small = Preprocessor(frame, resize)(replace(frame, depth=true)).depth
        assert true_small is not None
        both = np.isfinite(image.depth) & np.isfinite(true_small)
        covered.append(both.sum() / max(int(np.isfinite(true_small).sum()), 1))
        ratios.append(image.depth[both] / true_small[both])
        truths.append(true_small[both])
    ratio = np.concatenate(ratios) if ratios else np.zeros(0)
    if not len(ratio):
        return {"absrel": float("nan"), "absrel_control": float("nan"), "covered": float(np.mean(covered or [0.0]))}
    true = np.concatenate(truths)
    return {
        "absrel": float(np.abs(ratio / np.median(ratio) - 1).mean()),
        "absrel_control": float(np.abs(np.median(true) / true - 1).mean()),
        "covered": float(np.mean(covered)),
    }


def score(run: Run, recording: Recording, resize: Resize) -> dict[str, Any]:
    """All errors of one run."""
    truth = recording.T_world_camera
    assert len(run.best) == len(truth), f"{len(run.best)} poses for {len(truth)} frames"
    errors, scale = position_errors(run.best, truth, True)
    true_depth = recording.depth(0)
    moving = 0.02 * float(np.nanmedian(true_depth)) if true_depth is not None else 0.01
    found: dict[str, Any] = {
        "ate": rmse(errors),
        "ate_se3": rmse(position_errors(run.best, truth, False)[0]),
        "scale": scale,
        "odometry": rmse(position_errors(run.online, truth, True)[0]),
    }
    for gap in GAPS:
        found[f"rotation_{gap}"], found[f"direction_{gap}"] = relative_errors(run.best, truth, gap, moving)
    if run.states:
        confident = np.array([s is TrackingState.TRACKING for s in run.states])
        lie = confident & (sigmas_off(run.online, truth, run.sigma, moving / 3) > 3)
        found |= {"posed": len(run.online) / len(truth), "confident": confident.mean(), "lie": float(lie.mean())}
        found |= depth_errors(run, recording, resize)
        found |= {"ms_per_frame": 1e3 * run.seconds / len(truth), "keyframes": run.keyframes}
    return found


def print_table(name: str, truth: np.ndarray, table: dict[str, dict[str, Any]]) -> None:
    path = np.linalg.norm(np.diff(truth[:, :3, 3], axis=0), axis=1).sum()
    print(f"\n{name}: {len(truth)} frames, path {path:.2f} m")
    gaps = " ".join(f"{f'rot/dir {g}':>12s}" for g in GAPS)
    print(f"{'':15s} {'ATE':>7s} {'odom.':>7s} {gaps} {'AbsRel (const)':>15s} {'covered':>7s} {'lie':>5s} {'ms':>5s}")
    for method, row in table.items():
        cells = " ".join(f"{row[f'rotation_{g}']:6.2f}/{row[f'direction_{g}']:5.1f}" for g in GAPS)
        line = f"{method:15s} {row['ate']:7.4f} {row['odometry']:7.4f} {cells}"
        if "covered" in row:
            line += f" {row['absrel']:7.3f} ({row['absrel_control']:.3f}) {row['covered']:7.2f} {row['lie']:5.2f}"
            line += f" {row['ms_per_frame']:5.0f}"
        print(line)


def plot(runs: dict[str, tuple[Recording, dict[str, Run]]], path: Path) -> None:
    """Trajectories from above, after Sim(3): the two directions in which the truth extends most."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(4, len(runs))
    rows = -(-len(runs) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.8 * rows), squeeze=False)
    for axis in axes.flat[len(runs) :]:
        axis.axis("off")
    for axis, (name, (recording, methods)) in zip(axes.flat, runs.items()):
        truth = recording.T_world_camera[:, :3, 3]
        plane = np.linalg.svd(truth - truth.mean(axis=0), full_matrices=False)[2][:2]
        axis.plot(*(plane @ truth.T), color="black", linewidth=2.5, alpha=0.4, label="truth")
        for method, run in methods.items():
            S = geometry.umeyama(run.best[:, :3, 3], truth)
            axis.plot(*(plane @ geometry.transform(S, run.best[:, :3, 3]).T), linewidth=1, label=method)
        axis.set_title(name, fontsize=9)
        axis.set_aspect("equal", "datalim")
    axes.flat[0].legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def methods(config: Config, nano: Backbone) -> dict[str, tuple[Config, Backbone]]:
    off = {"context.enabled": False, "loops.enabled": False, "refine.mode": "on"}
    return {
        "refine alone": (with_values(config, off), FlatBackbone(nano)),
        "nano alone": (with_values(config, {"refine.mode": "off"}), nano),
        "nano + refine": (config, nano),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=Path, nargs="*", default=[], help="folders with rgb/ and poses.txt")
    parser.add_argument("--scenes", type=int, default=6, help="held-out scenes")
    parser.add_argument("--frames", type=int, default=120, help="of each scene")
    parser.add_argument("--slow", type=int, default=0, help="rendered streams of 16 frames at 1 Hz")
    parser.add_argument("--noise", type=int, default=0, metavar="SEED", help="one grey level of it (default: none)")
    parser.add_argument("--unknown-camera", action="store_true", help="hide intrinsics and distortion")
    parser.add_argument("--weights", type=Path, help="of nano: safetensors or a training checkpoint; default: shipped")
    parser.add_argument("--methods", nargs="*", help="only these (default: all)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out/accuracy"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = build_config(arguments.set)
    nano = load_backbone("nano") if arguments.weights is None else Backbone(load_model(arguments.weights))
    recordings = [recorded(folder) for folder in arguments.sequences if folder.is_dir()]
    results: dict[str, dict[str, dict[str, Any]]] = {}
    plotted = {}
    recordings += [held_out(i, arguments.frames) for i in range(arguments.scenes)]
    recordings += [slow(i) for i in range(arguments.slow)]
    for recording in [noisy(r, arguments.noise) for r in recordings] if arguments.noise else recordings:
        runs = {}
        for name, (setting, backbone) in methods(config, nano).items():
            if not arguments.methods or name in arguments.methods:
                print(f"{recording.name}: {name}", file=sys.stderr, flush=True)
                runs[name] = reconstruct(recording, setting, backbone, not arguments.unknown_camera)
        everything = controls(recording.T_world_camera) | runs
        resize = nano.resize(*next(iter(recording.frames())).image.shape[:2])
        results[recording.name] = {name: score(run, recording, resize) for name, run in everything.items()}
        print_table(recording.name, recording.T_world_camera, results[recording.name])
        plotted[recording.name] = (recording, runs)
    plot(plotted, arguments.out / "trajectories.png")
    known = not arguments.unknown_camera
    print(json.dumps({"benchmark": "accuracy", "known_camera": known, "results": results}))


if __name__ == "__main__":
    main()
