"""The streaming engine on real and rendered sequences: ablations, loops, endurance, tracking cost, saved maps.

    python -m benchmarks.streaming ablation --sequences ../shared/data/tum_fr3_office ../shared/data/tum_fr1_plant19
    python -m benchmarks.streaming ablation --circuit 2400 --seeds 5 7 --variants default "no context"
    python -m benchmarks.streaming circuit --frames 2400 --seeds 5 7 11
    python -m benchmarks.streaming endurance --frames 12500
    python -m benchmarks.streaming tracking
    python -m benchmarks.streaming query --model da3-small --untrained
    python -m benchmarks.streaming relocalise

Every part prints a table and ends with one line of JSON. ``--set group.field=value`` changes the configuration of every
run, ``--threads`` the CPU threads (figures in docs/streaming.md: one).

Measures. ATE: RMSE of camera positions after Sim(3) alignment (``evo_ape -as`` gives the same), of every frame's best
pose at the end of the stream. Boundary ratio: median translation error of the relative pose between consecutive
keyframes that different windows solved, over the same for keyframes that one window solved.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from spark3r_ros import geometry
from spark3r_ros.backbone import Backbone, load_backbone
from spark3r_ros.backbone.registry import MODELS
from spark3r_ros.config import Config, parameters, with_values
from spark3r_ros.device import choose_device
from spark3r_ros.frame import CameraModel, Frame, FramePose, TrackingState, Update, WindowReport
from spark3r_ros.reconstructor import Job, Reconstructor
from spark3r_ros.solver import Solver
from spark3r_ros.sources import open_source
from spark3r_ros.windows import Keyframe
from training.paths import camera_path
from training.scenes import Scene, camera_matrix


@dataclass(frozen=True, eq=False)
class Recording:
    """Frames, as often as wanted, and their ground truth."""

    name: str
    frames: Callable[[], Iterable[Frame]]
    T_world_camera: np.ndarray  # [N, 4, 4] metres


@dataclass(eq=False)
class Run:
    """What one pass over a sequence gave."""

    reconstructor: Reconstructor
    poses: list[FramePose] = field(default_factory=list)
    windows: list[WindowReport] = field(default_factory=list)
    window_of: dict[int, int] = field(default_factory=dict)  # keyframe stamp -> window that solved it first
    seconds: list[float] = field(default_factory=list)  # per frame


def recorded(path: Path) -> Recording:
    """A sequence in the layout of ../shared/data, with its poses.txt."""
    rows = np.loadtxt(path / "poses.txt")
    T = geometry.make_T(geometry.matrix_from_quat_xyzw(rows[:, 4:8]), rows[:, 1:4])
    return Recording(path.name, lambda: open_source(path), T)


def circuit(frames: int, rounds: float, size: tuple[int, int], seed: int, fps: float = 10.0) -> Recording:
    """Rounds of a closed lane through a furnished hall, rendered once and kept in memory."""
    poses = camera_path("circuit", frames, seed, rounds)
    return Recording(f"circuit {frames}", _rendered(poses, Scene(seed, "hall"), size, fps), poses)


def _rendered(poses: np.ndarray, scene: Scene, size: tuple[int, int], fps: float) -> Callable[[], Iterator[Frame]]:
    K = camera_matrix(*size, 70.0)
    camera = CameraModel(*size, K)
    kept: list[np.ndarray] = []

    def frames() -> Iterator[Frame]:
        for i, T in enumerate(poses):
            if i == len(kept):
                kept.append(scene.render(T, K, *size)[0])
            yield Frame(round(i / fps * 1e9), kept[i], "camera", camera)

    return frames


def run(sequence: Recording, config: Config, backbone: Backbone, load: Path | None = None) -> Run:
    result = Run(Reconstructor(config, backbone))
    if load is not None:
        result.reconstructor.load_map(load)
    for frame in sequence.frames():
        started = time.perf_counter()
        update = result.reconstructor.push(frame)
        result.seconds.append(time.perf_counter() - started)
        _note(result, update)
    _note(result, result.reconstructor.finish())
    return result


def _note(result: Run, update: Update) -> None:
    result.poses.extend(update.poses)
    if update.window is not None:
        result.windows.append(update.window)
        for stamp, _ in result.reconstructor.keyframe_poses():
            result.window_of.setdefault(stamp, update.window.index)


def ate(estimated: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """RMSE in metres of positions of [N, 4, 4] after Sim(3), and the scale."""
    S = geometry.umeyama(estimated[:, :3, 3], truth[:, :3, 3])
    error = geometry.transform(S, estimated[:, :3, 3]) - truth[:, :3, 3]
    return float(np.sqrt(np.mean(np.sum(error**2, axis=1)))), float(geometry.scale_of(S))


def boundary_ratio(result: Run, truth: np.ndarray, stamps: np.ndarray, scale: float) -> tuple[float, float, float]:
    """Median relative translation error in metres of keyframe pairs across and inside windows, and their ratio."""
    row = {int(s): i for i, s in enumerate(stamps)}
    across, inside = [], []
    keyframes = result.reconstructor.keyframe_poses()
    for (stamp_a, T_a), (stamp_b, T_b) in itertools.pairwise(keyframes):
        if stamp_a not in row or stamp_b not in row:
            continue
        wanted = geometry.inverse(truth[row[stamp_a]]) @ truth[row[stamp_b]]
        found = geometry.inverse(T_a) @ T_b
        error = float(np.linalg.norm(scale * found[:3, 3] - wanted[:3, 3]))
        (across if result.window_of[stamp_a] != result.window_of[stamp_b] else inside).append(error)
    if not across or not inside:
        return float("nan"), float("nan"), float("nan")
    return float(np.median(across)), float(np.median(inside)), float(np.median(across) / np.median(inside))


def summary(result: Run, sequence: Recording) -> dict[str, Any]:
    stamps = np.array([stamp for stamp, _ in result.reconstructor.trajectory()])
    truth = sequence.T_world_camera
    best = np.stack([T for _, T in result.reconstructor.trajectory()])
    odometry = np.stack([p.T_odom_camera for p in result.poses])
    error, scale = ate(best, truth)
    across, inside, ratio = boundary_ratio(result, truth, stamps, scale)
    status = result.reconstructor.status()
    length = float(np.linalg.norm(np.diff(truth[:, :3, 3], axis=0), axis=1).sum())
    return {
        "frames": len(truth),
        "posed": len(result.poses) / len(truth),
        "lost": sum(p.state is TrackingState.LOST for p in result.poses) / len(truth),
        "path_m": length,
        "ate_m": error,
        "ate_share": error / length,
        "odom_ate_m": ate(odometry, truth)[0],
        "boundary_mm": 1e3 * across,
        "interior_mm": 1e3 * inside,
        "boundary_ratio": ratio,
        "keyframes": status["keyframes"],
        "windows": len(result.windows),
        "refused_links": sum(not w.accepted for w in result.windows),
        "residual": float(np.nanmedian([w.residual for w in result.windows])) if len(result.windows) > 1 else None,
        "loops": status["loops"],
        "loops_refused": status["loops_refused"],
        "context_mib": float(max((w.context_bytes for w in result.windows), default=0)) / 2**20,
        "ms_per_frame": 1e3 * float(np.mean(result.seconds)),
    }


# -- the parts ---------------------------------------------------------------------------------------------------


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no context": {"context.enabled": False},
    "context 4 frames": {"context.frames": 4},
    "context 12 frames": {"context.frames": 12},
    "context 80 frames": {"context.frames": 80},
    "context of 3 MiB": {"context.budget_mb": 3.0},
    "no scale prior, no context": {"alignment.scale_prior": False, "context.enabled": False},
    "no token reduction": {"reduction.enabled": False},
    "align dense": {"alignment.mode": "dense"},
    "align rigid": {"alignment.mode": "rigid"},
    "no scale prior": {"alignment.scale_prior": False},
    "overlap 1": {"window.overlap": 1},
    "overlap 2": {"window.overlap": 2},
    "overlap 3": {"window.overlap": 3},
    "overlap 5": {"window.overlap": 5},
    "overlap 6": {"window.overlap": 6},
    "window 12": {"window.size": 12},
    "keyframe flow 0.06": {"window.keyframe_flow": 0.06},
    "keyframe flow 0.075": {"window.keyframe_flow": 0.075},
    "keyframe flow 0.12": {"window.keyframe_flow": 0.12},
    "no loops": {"loops.enabled": False},
    "refine off": {"refine.mode": "off"},
    "refine off, no context": {"refine.mode": "off", "context.enabled": False},
    "refine off, align dense": {"refine.mode": "off", "alignment.mode": "dense"},
    "refine off, align rigid": {"refine.mode": "off", "alignment.mode": "rigid"},
    "refine off, no scale prior": {"refine.mode": "off", "alignment.scale_prior": False},
    "refine off, context 4 frames": {"refine.mode": "off", "context.frames": 4},
    "refine off, no loops": {"refine.mode": "off", "loops.enabled": False},
    **{f"refine off, overlap {n}": {"refine.mode": "off", "window.overlap": n} for n in (1, 2, 3, 5, 6)},
}


def ablation(options: argparse.Namespace, config: Config, backbone: Backbone) -> dict[str, Any]:
    """One change at a time, on every sequence."""
    sequences = [recorded(Path(p)) for p in options.sequences]
    for seed in options.seeds if options.circuit else ():
        hall = circuit(options.circuit, options.rounds, (320, 240), seed)
        sequences.append(replace(hall, name=f"hall {seed}"))
    rows: dict[str, Any] = {}
    for name in options.variants or VARIANTS:
        for sequence in sequences:
            figures = summary(run(sequence, with_values(config, VARIANTS[name]), backbone), sequence)
            rows[f"{sequence.name} | {name}"] = figures
            _row(f"{sequence.name[:20]:20} {name}", figures)
    return rows


def circuit_loops(options: argparse.Namespace, config: Config, backbone: Backbone) -> dict[str, Any]:
    """A long closed circuit without and with loop closure, in several halls."""
    rows: dict[str, Any] = {}
    gains = []
    for seed in options.seeds:
        sequence = circuit(options.frames, options.rounds, (options.width, options.width * 3 // 4), seed)
        for name, enabled in (("loops off", False), ("loops on", True)):
            figures = summary(run(sequence, with_values(config, {"loops.enabled": enabled}), backbone), sequence)
            rows[f"hall {seed}, {name}"] = figures
            _row(f"hall {seed}, {name}", figures)
        gains.append(rows[f"hall {seed}, loops off"]["ate_m"] / rows[f"hall {seed}, loops on"]["ate_m"])
        print(f"hall {seed}: ATE before / after loop closure: {gains[-1]:.2f}", flush=True)
    rows["ate before / after"] = gains
    return rows


def endurance(options: argparse.Namespace, config: Config, backbone: Backbone) -> dict[str, Any]:
    """Time, memory and context early and late in a long stream round the same circuit, where the images are the same.

    Time is compared side by side: in each of the last laps, when the long stream comes to the images of its frame
    ``age``, another one that is so old sees them too, in turn with it, so that whatever else the machine does slows
    both; one grey level brighter, since the flow of the same images would be remembered. It is processor time: of the
    thread that frames wait for, and of all threads that work for a stream; of several laps, since one window more or
    less in one is two percent. Memory is that of the process without the images, before the first comparison.
    """
    age, span = options.age, options.span
    if age + span > options.lap:
        raise SystemExit(f"--age {age} and --span {span} must fit into a lap of {options.lap} frames")
    first = options.frames - span - (options.comparisons - 1) * options.lap
    lap = next((n for n in range(options.lap, first) if (first - age) % n == 0), 0)
    if not lap:
        raise SystemExit(f"--frames {options.frames} are too few for {options.comparisons} laps beside a young stream")
    starts = [first + k * lap for k in range(options.comparisons)]
    frames = starts[-1] + span
    sequence = circuit(lap, 1.0, (options.width, options.width * 3 // 4), options.seed)
    images = list(sequence.frames())  # rendered before anything is measured
    not_ours = sum(frame.image.nbytes for frame in images)
    old = Busy(config, backbone)
    memory, context = np.zeros(first - age), np.zeros(frames, int)
    young: Busy | None = None
    begun, seconds = np.zeros((2, 2)), []
    posed = 0
    for i in range(frames):
        frame = replace(images[i % lap], stamp_ns=round(i * 1e8))
        if i + age in starts:
            young = Busy(config, backbone)
        if young is not None and i in starts:
            begun = np.array([old.seconds, young.seconds])
        posed += len(old.push(frame).poses)
        if i < len(memory):
            memory[i] = _resident() - not_ours
        if young is not None:
            young.push(replace(frame, image=cv2.add(frame.image, (1, 1, 1, 0))))
            if i + 1 - span in starts:
                seconds.append([old.seconds, young.seconds] - begun)
                young = None
        context[i] = old.status()["context_bytes"]
        if i % 1000 == 999:
            print(
                f"frame {i + 1}: {1e3 * old.seconds[1] / (i + 1):.1f} ms CPU per frame so far, "
                f"{memory[min(i, len(memory) - 1)] / 2**20:.0f} MiB, {old.status()['keyframes']} keyframes", flush=True,
            )  # fmt: skip
    posed += len(old.finish().poses)
    spent = np.array(seconds)  # [comparisons, 2 streams, 2 kinds of time]
    (old_push, old_all), (young_push, young_all) = 1e3 * spent.mean(axis=0) / span
    early, late = (float(part.mean()) for part in (memory[age : age + span], memory[-span:]))
    status = old.status()
    return {
        "frames": frames,
        "lap": lap,
        "posed": posed / frames,
        "push_young_ms": float(young_push),
        "push_old_ms": float(old_push),
        "push_ratio": float(old_push / young_push),
        "all_threads_young_ms": float(young_all),
        "all_threads_old_ms": float(old_all),
        "all_threads_ratio": float(old_all / young_all),
        "all_threads_ratios": (spent[:, 0, 1] / spent[:, 1, 1]).tolist(),
        "early_mib": early / 2**20,
        "late_mib": late / 2**20,
        "memory_ratio": late / early,
        "context_bytes_early": int(context[age + span]),
        "context_bytes_late": int(context[-1]),
        "context_bytes_max": int(context.max()),
        "context_budget": status["context_budget"],
        "keyframes": status["keyframes"],
        "loops": status["loops"],
        "points": status["points"],
    }


class Busy(Reconstructor):
    """Counts its processor time: of ``push``, and of what its threads do beside it, once that is done."""

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self._pushed: list[float] = []
        self._spent: list[float] = []
        for pool in (self._beside, self._loops._pool):
            pool.submit = functools.partial(pool.submit, self._counted, self._spent)  # type: ignore[method-assign]

    @property
    def seconds(self) -> np.ndarray:
        """[2] of ``push``, and of all threads."""
        pushed = sum(self._pushed)
        return np.array([pushed, pushed + sum(self._spent)])

    def push(self, frame: Frame) -> Update:
        return self._counted(self._pushed, super().push, frame)

    @staticmethod
    def _counted(spent: list[float], call: Callable[..., Any], *arguments: Any) -> Any:
        started = time.thread_time()
        try:
            return call(*arguments)
        finally:
            spent.append(time.thread_time() - started)


class Timed(Reconstructor):
    """Notes the processor time of each tracked frame, of each window's way into the map and of the network in both.

    Time is that of the thread that does the work: much of a window's is done in one of its own.
    """

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self._beside.submit = functools.partial(self._beside.submit, self._aside)  # type: ignore[method-assign]

    def reset(self) -> None:
        super().reset()
        self.times: dict[str, list[float]] = {"frame": [], "window": [], "query": [], "solve": []}
        self._spent: list[float] = []  # for the oldest window on its way, the network aside

    def _open_camera(self, frame: Frame) -> None:
        super()._open_camera(frame)
        self._solver.query = self._timed("query", self._solver.query)  # type: ignore[method-assign]
        self._solver.solve = self._timed("solve", self._solver.solve)  # type: ignore[method-assign]
        self._track = self._timed("frame", self._track)  # type: ignore[method-assign]

    def _aside(self, call: Callable[..., Any], *arguments: Any) -> Any:
        started = time.thread_time()
        result = call(*arguments)
        if call is not self._solver.solve:
            self._spent.append(time.thread_time() - started)
        return result

    def _advance(self, job: Job, stamp_ns: int) -> None:
        started = time.thread_time()
        super()._advance(job, stamp_ns)
        self._spent.append(time.thread_time() - started)
        if job not in self._jobs:
            solve = self.times["solve"][len(self.times["window"])]  # the next one may have been solved already
            spent, self._spent = self._spent, []
            self.times["window"].append(sum(spent) + solve)

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            started = time.thread_time()
            result = call(*arguments)
            self.times[name].append(time.thread_time() - started)
            return result

        return timed


def tracking(options: argparse.Namespace, config: Config, backbone: Backbone) -> dict[str, Any]:
    """What the pose of one frame costs, over what a window solve costs: by network query, and by the sparse map."""
    rows = {}
    rounds = 0.12 * options.frames / 250
    sequence = circuit(options.frames, rounds, (options.width, options.width * 3 // 4), options.seed)
    for name, mode in (("network query", "off"), ("sparse map", "on")):
        reconstructor = Timed(with_values(config, {"refine.mode": mode}), backbone)
        for frame in sequence.frames():
            reconstructor.push(frame)
        times = reconstructor.times
        ms = {key: 1e3 * float(np.median(values[1:])) for key, values in times.items() if len(values) > 1}
        rows[name] = {
            **{f"{key}_ms": value for key, value in ms.items()},
            "frame over window": ms["frame"] / ms["window"],
            "network query over network solve": ms["query"] / ms["solve"] if "query" in ms else None,
        }
        shown = [f"{key} {value:.3f}" for key, value in rows[name].items() if value is not None]
        print(f"{name:14} " + ", ".join(shown), flush=True)
    return rows


def query(options: argparse.Namespace, config: Config, backbone: Backbone) -> dict[str, Any]:
    """One frame that asks a full context, over a window's solve: the network alone, in turn; weights do not matter."""
    size = backbone.resize(options.width * 3 // 4, options.width).size
    images = np.random.default_rng(0).integers(0, 255, (config.context.frames, *size, 3), np.uint8)
    keyframes = [Keyframe(i, i, i, "camera", image) for i, image in enumerate(images)]
    solver = Solver(config, backbone, choose_device(config.model.device), np.ones(size, bool))
    solver.K = camera_matrix(size[1], size[0], 70.0)
    for start in range(0, len(keyframes), config.window.size):
        solver.solve(keyframes[start : start + config.window.size], [])
        solver.commit(keyframes[start : start + config.window.size])
    window, seconds = keyframes[-config.window.size :], np.zeros((options.repeats, 2))
    for row in seconds:
        for column, (frames, previous) in enumerate(((window[:1], keyframes[-2:]), (window, keyframes[:2]))):
            started = time.thread_time()
            solver.solve(frames, previous)
            row[column] = time.thread_time() - started
    ratio = np.median(seconds[:, 0]) / np.median(seconds[:, 1])
    figures = {
        "image": f"{size[1]}x{size[0]}",
        "query_ms": 1e3 * float(np.median(seconds[:, 0])),
        "solve_ms": 1e3 * float(np.median(seconds[:, 1])),
        "query over solve": float(ratio),
        "spread": [float(f(seconds[:, 0] / seconds[:, 1])) for f in (np.min, np.max)],
    }
    print(f"{backbone.spec.name}: {figures}", flush=True)
    return figures


def relocalise(options: argparse.Namespace, config: Config, backbone: Backbone) -> dict[str, Any]:
    """A map saved from one pass, loaded in another that starts elsewhere and moves differently.

    Errors: of positions in the truth's frame, the map's own distortion included, and relative to the frame of the first
    pass that stood closest.
    """
    size, n = (options.width, options.width * 3 // 4), options.frames
    scene = Scene(options.seed, "hall")
    first_poses = camera_path("circuit", n, options.seed, options.rounds)
    second_poses = camera_path("circuit", n, options.seed + 1, options.rounds)[: n // 2]
    first = Recording("first pass", _rendered(first_poses, scene, size, 10.0), first_poses)
    second = Recording("second pass", _rendered(second_poses, scene, size, 10.0), second_poses)
    mapped = run(first, config, backbone)
    best = np.stack([T for _, T in mapped.reconstructor.trajectory()])
    S = geometry.umeyama(best[:, :3, 3], first_poses[:, :3, 3])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "hall.map"
        mapped.reconstructor.save_map(path)
        size_mib = path.stat().st_size / 2**20
        again = run(second, config, backbone, load=path)
    found = [p.state is TrackingState.TRACKING and p.covariance[0, 0] < 1.0 for p in again.poses]
    positions = geometry.transform(S, np.stack([p.T_map_camera[:3, 3] for p in again.poses]))
    error = np.linalg.norm(positions - second_poses[:, :3, 3], axis=1)
    apart = np.linalg.norm(second_poses[:, None, :3, 3] - first_poses[None, :, :3, 3], axis=2)
    near = apart.argmin(axis=1)  # the frame of the first pass that was closest to each of the second
    wanted = geometry.inverse(first_poses[near]) @ second_poses
    seen = geometry.inverse(best[near]) @ np.stack([p.T_map_camera for p in again.poses])
    local = np.linalg.norm(geometry.scale_of(S) * seen[:, :3, 3] - wanted[:, :3, 3], axis=1)
    first_found = found.index(True) if any(found) else -1
    return {
        "map_ate_m": ate(best, first_poses)[0],
        "file_mib": size_mib,
        "frames": len(found),
        "relocalised": float(np.mean(found)),
        "first_frame": first_found,
        "seconds_to_first_pose": float(np.sum(again.seconds[: first_found + 1])),
        "median_error_m": float(np.median(error[found])) if any(found) else None,
        "p90_error_m": float(np.percentile(error[found], 90)) if any(found) else None,
        "median_distance_m": float(np.median(apart.min(axis=1))),
        "median_error_to_map_m": float(np.median(local[found])) if any(found) else None,
        "p90_error_to_map_m": float(np.percentile(local[found], 90)) if any(found) else None,
    }


def _resident() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096


def _row(name: str, r: dict[str, Any]) -> None:
    print(
        f"{name:48} ATE {r['ate_m']:.4f} m ({100 * r['ate_share']:.2f} %), odom {r['odom_ate_m']:.4f}, boundary "
        f"{r['boundary_mm']:.1f} / {r['interior_mm']:.1f} mm = {r['boundary_ratio']:.2f}, kf {r['keyframes']}, "
        f"loops {r['loops']}, posed {r['posed']:.3f}, lost {r['lost']:.3f}, {r['ms_per_frame']:.0f} ms",
        flush=True,
    )


def _value(config: Config, text: str) -> tuple[str, Any]:
    name, _, raw = text.partition("=")
    kinds = {p.name: type(p.default) for p in parameters(config)}
    kind = kinds.get(name, str)
    return name, raw == "true" if kind is bool else kind(raw)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {
        "ablation": ablation, "circuit": circuit_loops, "endurance": endurance, "tracking": tracking,
        "query": query, "relocalise": relocalise,
    }  # fmt: skip
    parser.add_argument("part", choices=parts)
    parser.add_argument("--sequences", nargs="*", default=[], help="folders in the layout of ../shared/data")
    parser.add_argument("--circuit", type=int, default=0, help="ablation: also rendered circuits of so many frames")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, help="ablation: only these")
    parser.add_argument("--frames", type=int, help="default: 2400; tracking: 250")
    parser.add_argument("--rounds", type=float, default=1.1, help="of the circuit: more than one, or nothing closes")
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--seed", type=int, default=5, help="of scene and path")
    parser.add_argument("--seeds", type=int, nargs="*", default=[5, 7, 11], help="circuit, ablation: of the halls")
    parser.add_argument("--span", type=int, default=700, help="endurance: frames that are averaged")
    parser.add_argument("--lap", type=int, default=900, help="endurance: least frames in a round")
    parser.add_argument("--age", type=int, default=100, help="endurance: frames that a young stream has seen before")
    parser.add_argument("--comparisons", type=int, default=3, help="endurance: laps with a young stream beside")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--untrained", action="store_true", help="query: the model without its weights")
    parser.add_argument("--repeats", type=int, default=7, help="query: measurements, of which the median counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="GROUP.FIELD=VALUE")
    options = parser.parse_args(arguments)
    options.frames = options.frames or (250 if options.part == "tracking" else 2400)
    torch.set_num_threads(options.threads)
    config = with_values(Config(), dict(_value(Config(), s) for s in options.set))
    entry = MODELS.get(options.model)
    if options.untrained and entry is not None:
        backbone = Backbone(entry.build(entry.spec), choose_device(config.model.device))
    else:
        backbone = load_backbone(options.model)
    figures = parts[options.part](options, config, backbone)
    print(json.dumps({"part": options.part, "model": options.model, "set": options.set, "figures": figures}))


if __name__ == "__main__":
    main()
