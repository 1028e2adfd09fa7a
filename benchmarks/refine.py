"""What refinement costs: our bundle adjustment against kept solvers, and one window and one pose of a real stream.

    python -m benchmarks.refine --sequences ../shared/data/tum_fr3_office ../shared/data/tum_fr1_rpy

**Solvers.** One window's problem (8 keyframes of which two are held, 600 points, about 4 observations a point, 5% of
them wrong, Cauchy loss of one pixel, no depth priors) from the same disturbed start, by ours, by gtsam from Python, by
scipy's ``least_squares`` (trust region, sparse, exact derivatives) and by Ceres through pycolmap where that is
installed; interleaved, ``--repeats`` times, each stopping when the cost falls by less than ``--tolerance`` of itself.
``build``: from arrays to the solver's own data; ``solve``: the rest. The cost is evaluated by one function for all, per
observation; ``above best``: how much the cost exceeds the lowest of the table.

**Stream.** Each sequence through the feature tracker and the refiner without any network, every ``--every``-th frame a
keyframe, a window as soon as it has ``window.size`` of them: milliseconds of every ``Refiner.solve``, ``add_keyframe``
and ``track``. What is wanted of two cores: 300 ms a window, 20 ms a pose.

Wall milliseconds are medians; ``cpu`` is the process's time over all its threads. Last line: the same as JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from scipy.optimize import least_squares
from scipy.sparse import coo_matrix, csr_matrix

from spark3r_ros.config import Config, ModelConfig
from spark3r_ros.geometry import hat, inverse, make_T, project, so3_exp, transform
from spark3r_ros.refine import Refiner
from spark3r_ros.refine.bundle import Problem, adjust
from spark3r_ros.sources import open_source
from spark3r_ros.tracks import FeatureTracker

FOCAL, WIDTH, HEIGHT = 500.0, 640, 480
MAX_ITERATIONS = 50

Result = tuple[np.ndarray, np.ndarray]  # T_world_camera [K, 4, 4], xyz [P, 3]
Build = Callable[[Problem, float], Callable[[], Result]]


def window_problem(num_cameras: int, num_points: int, per_point: int, seed: int) -> Problem:
    """Cameras in a row that turn a little, every point seen by ``per_point`` neighbouring cameras."""
    rng = np.random.default_rng(seed)
    i = np.arange(num_cameras)[:, None]
    T = make_T(so3_exp(0.03 * i * np.array([0.2, -1.0, 0.1])), 0.1 * i * np.array([1.0, -0.1, 0.2]))
    K = np.array([[FOCAL, 0, (WIDTH - 1) / 2], [0, FOCAL, (HEIGHT - 1) / 2], [0, 0, 1.0]])
    anchor = np.sort(rng.integers(0, num_cameras - per_point + 1, num_points))
    depth = rng.uniform(2.0, 8.0, num_points)
    uv = rng.uniform([60, 40], [WIDTH - 60, HEIGHT - 40], (num_points, 2))
    local = np.concatenate([(uv - K[:2, 2]) / FOCAL, np.ones((num_points, 1))], axis=1) * depth[:, None]
    xyz = np.einsum("pij,pj->pi", T[anchor, :3, :3], local) + T[anchor, :3, 3]
    point = np.repeat(np.arange(num_points), per_point)
    camera = (anchor[:, None] + np.arange(per_point)).ravel()
    seen = np.einsum("mji,mj->mi", T[camera, :3, :3], xyz[point] - T[camera, :3, 3])
    uv = project(seen, K) + rng.normal(0, 0.3, (len(point), 2))
    wrong = rng.random(len(point)) < 0.05
    uv[wrong] += rng.normal(0, 40.0, (int(wrong.sum()), 2))
    is_free = np.arange(num_cameras) >= 2
    start = T.copy()
    noise = rng.normal(0, 1, (num_cameras, 6)) * is_free[:, None]
    start = start @ make_T(so3_exp(0.005 * noise[:, 3:]), 0.02 * noise[:, :3])
    return Problem(
        T_world_camera=start,
        is_free=is_free,
        focal=np.array([FOCAL, FOCAL]),
        centre=K[:2, 2],
        xyz=xyz + (xyz - T[anchor, :3, 3]) * rng.normal(0, 0.1, (num_points, 1)),
        anchor=anchor,
        camera=camera,
        point=point,
        uv=uv,
        shutter=np.zeros_like(uv),
        sigma_px=np.ones(len(uv)),
        prior_inverse_depth=1.0 / depth,
        prior_sigma=np.full(num_points, np.inf),
    )


def cost_of(problem: Problem, T: np.ndarray, xyz: np.ndarray) -> float:
    """Cauchy loss per observation, from poses and points alone."""
    K = np.array([[problem.focal[0], 0, problem.centre[0]], [0, problem.focal[1], problem.centre[1]], [0, 0, 1.0]])
    local = transform(inverse(T)[problem.camera], xyz[problem.point][:, None])[:, 0]
    return float(np.log1p(((project(local, K) - problem.uv) ** 2).sum(axis=1)).mean())


# The solvers


def ours(problem: Problem, tolerance: float) -> Callable[[], Result]:
    def solve() -> Result:
        solution = adjust(problem, MAX_ITERATIONS, tolerance=tolerance)
        return solution.T_world_camera, solution.xyz

    return solve


def by_gtsam(problem: Problem, tolerance: float) -> Callable[[], Result]:
    import gtsam
    from gtsam.symbol_shorthand import L, X

    calibration = gtsam.Cal3_S2(*problem.focal, 0.0, *problem.centre)
    noise = gtsam.noiseModel.Robust.Create(
        gtsam.noiseModel.mEstimator.Cauchy.Create(1.0), gtsam.noiseModel.Isotropic.Sigma(2, 1.0)
    )
    graph, values = gtsam.NonlinearFactorGraph(), gtsam.Values()
    for uv, camera, point in zip(problem.uv, problem.camera.tolist(), problem.point.tolist()):
        graph.push_back(gtsam.GenericProjectionFactorCal3_S2(uv, noise, X(camera), L(point), calibration))
    for i, T in enumerate(problem.T_world_camera):
        values.insert(X(i), gtsam.Pose3(T))
        if not problem.is_free[i]:
            graph.push_back(gtsam.NonlinearEqualityPose3(X(i), gtsam.Pose3(T)))
    for i, xyz in enumerate(problem.xyz):
        values.insert(L(i), xyz)
    parameters = gtsam.LevenbergMarquardtParams()
    parameters.setRelativeErrorTol(tolerance)
    parameters.setAbsoluteErrorTol(0.0)
    parameters.setMaxIterations(MAX_ITERATIONS)

    def solve() -> Result:
        optimizer = gtsam.LevenbergMarquardtOptimizer(graph, values, parameters)
        found = optimizer.optimize()
        T = np.stack([found.atPose3(X(i)).matrix() for i in range(len(problem.T_world_camera))])
        xyz = np.stack([found.atPoint3(L(i)) for i in range(len(problem.xyz))])
        return T, xyz

    return solve


def by_scipy(problem: Problem, tolerance: float) -> Callable[[], Result]:
    """Rotation vectors before the start's rotation, positions, points; two numbers per observation whose squares sum to
    its loss."""
    free = np.flatnonzero(problem.is_free)
    column = np.full(len(problem.is_free), -1)
    column[free] = 6 * np.arange(len(free))
    num_points, count = len(problem.xyz), len(problem.uv)
    moving = np.flatnonzero(column[problem.camera] >= 0)
    rows = 2 * np.arange(count)[:, None, None] + np.arange(2)[None, :, None]
    point_columns = 6 * len(free) + 3 * problem.point[:, None, None] + np.arange(3)
    pose_columns = column[problem.camera[moving]][:, None, None] + np.arange(6)
    row = np.concatenate([np.broadcast_to(rows, (count, 2, 3)).ravel(),
                          np.broadcast_to(rows[moving], (len(moving), 2, 6)).ravel()])  # fmt: skip
    col = np.concatenate([np.broadcast_to(point_columns, (count, 2, 3)).ravel(),
                          np.broadcast_to(pose_columns, (len(moving), 2, 6)).ravel()])  # fmt: skip
    shape = (2 * count, 6 * len(free) + 3 * num_points)

    def unpack(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        twist = x[: 6 * len(free)].reshape(-1, 6)
        T = problem.T_world_camera.copy()
        T[free, :3, :3] = T[free, :3, :3] @ so3_exp(twist[:, :3])
        T[free, :3, 3] += twist[:, 3:]
        return T, x[6 * len(free) :].reshape(-1, 3), twist[:, :3]

    def observe(x: np.ndarray) -> tuple[np.ndarray, ...]:
        T, xyz, turn = unpack(x)
        world = xyz[problem.point] - T[problem.camera, :3, 3]
        local = np.einsum("mji,mj->mi", T[problem.camera, :3, :3], world)
        error = local[:, :2] / local[:, 2:] * problem.focal + problem.centre - problem.uv
        squared = np.maximum((error**2).sum(axis=1), 1e-12)
        return T, turn, local, error, squared, np.sqrt(np.log1p(squared) / squared)

    def residuals(x: np.ndarray) -> np.ndarray:
        *_, error, _, weight = observe(x)
        return (error * weight[:, None]).ravel()

    def jacobian(x: np.ndarray) -> csr_matrix:
        T, turn, local, error, squared, weight = observe(x)
        slope = (1.0 / (1.0 + squared) - weight**2) / (2 * squared * weight)  # of the weight by the squared length
        outer = error[:, :, None] * error[:, None, :]
        robust = weight[:, None, None] * np.eye(2) + 2 * slope[:, None, None] * outer
        J = np.zeros((count, 2, 3))
        J[:, [0, 1], [0, 1]] = problem.focal / local[:, 2:]
        J[:, :, 2] = -local[:, :2] / local[:, 2:] ** 2 * problem.focal
        J = robust @ J
        J_point = J @ np.swapaxes(T[problem.camera, :3, :3], 1, 2)
        angle = np.maximum(np.linalg.norm(turn, axis=1), 1e-9)[:, None, None]
        cross = hat(turn)
        right = np.eye(3) - (1 - np.cos(angle)) / angle**2 * cross + (angle - np.sin(angle)) / angle**3 * cross @ cross
        J_turn = J[moving] @ hat(local[moving]) @ right[column[problem.camera[moving]] // 6]
        values = np.concatenate([J_point.ravel(), np.concatenate([J_turn, -J_point[moving]], axis=2).ravel()])
        return coo_matrix((values, (row, col)), shape).tocsr()

    start = np.concatenate([np.zeros(6 * len(free)), problem.xyz.ravel()])

    def solve() -> Result:
        found = least_squares(
            residuals, start, jacobian, x_scale="jac", ftol=tolerance, xtol=1e-12, gtol=1e-12, max_nfev=MAX_ITERATIONS
        )
        return unpack(found.x)[:2]

    return solve


def by_ceres(problem: Problem, tolerance: float) -> Callable[[], Result]:
    """COLMAP's bundle adjustment: one camera, one image per pose, poses of held cameras constant."""
    import pycolmap

    map_ = pycolmap.Reconstruction()
    camera = pycolmap.Camera(
        camera_id=1, model="PINHOLE", width=WIDTH, height=HEIGHT, params=[*problem.focal, *problem.centre]
    )
    map_.add_camera_with_trivial_rig(camera)
    config = pycolmap.BundleAdjustmentConfig()
    slot = np.zeros(len(problem.uv), int)
    for k, T in enumerate(problem.T_world_camera):
        mine = np.flatnonzero(problem.camera == k)
        slot[mine] = np.arange(len(mine))
        image = pycolmap.Image(
            name=str(k),
            camera_id=1,
            image_id=k + 1,
            points2D=pycolmap.Point2DList([pycolmap.Point2D(uv) for uv in problem.uv[mine]]),
        )
        map_.add_image_with_trivial_frame(image, pycolmap.Rigid3d(inverse(T)[:3]))
        config.add_image(k + 1)
        if not problem.is_free[k]:
            config.set_constant_rig_from_world_pose(map_.image(k + 1).frame_id)
    ends = np.searchsorted(problem.point, np.arange(len(problem.xyz) + 1))
    ids = []
    for xyz, first, last in zip(problem.xyz, ends[:-1], ends[1:]):
        track = pycolmap.Track()
        for m in range(first, last):
            track.add_element(int(problem.camera[m]) + 1, int(slot[m]))
        ids.append(map_.add_point3D(xyz, track))
    config.set_constant_cam_intrinsics(1)
    options = pycolmap.BundleAdjustmentOptions()
    options.print_summary = False
    options.ceres.loss_function_type = pycolmap.LossFunctionType.CAUCHY
    options.ceres.solver_options.function_tolerance = tolerance
    options.ceres.solver_options.max_num_iterations = MAX_ITERATIONS

    def solve() -> Result:
        pycolmap.create_default_bundle_adjuster(options, config, map_).solve()
        T = np.tile(np.eye(4), (len(problem.T_world_camera), 1, 1))
        for k in range(len(T)):
            T[k, :3] = map_.image(k + 1).cam_from_world().inverse().matrix()
        return T, np.stack([map_.point3D(i).xyz for i in ids])

    return solve


SOLVERS: dict[str, Build] = {"ours": ours, "gtsam": by_gtsam, "scipy": by_scipy}
if importlib.util.find_spec("pycolmap"):
    SOLVERS["ceres"] = by_ceres


def compare_solvers(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    times: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    costs: dict[str, list[float]] = defaultdict(list)
    start: list[float] = []
    for repeat in range(options.repeats + 1):
        problem = window_problem(options.cameras, options.points, options.per_point, repeat)
        start.append(cost_of(problem, problem.T_world_camera, problem.xyz))
        for name, build in SOLVERS.items():
            before, cpu = time.perf_counter(), time.process_time()
            solve = build(problem, options.tolerance)
            built = time.perf_counter()
            T, xyz = solve()
            done = time.perf_counter()
            if repeat == 0:
                continue  # imports and first touches
            times[name].append((built - before, done - built, time.process_time() - cpu))
            costs[name].append(cost_of(problem, T, xyz))
    best = np.min([costs[name] for name in SOLVERS], axis=0)
    table = {"start": {"cost": float(np.mean(start[1:]))}}
    for name in SOLVERS:
        build_ms, solve_ms, cpu_ms = 1e3 * np.median(times[name], axis=0)
        table[name] = {
            "build_ms": float(build_ms),
            "solve_ms": float(solve_ms),
            "total_ms": float(1e3 * np.median(np.sum(np.array(times[name])[:, :2], axis=1))),
            "cpu_ms": float(cpu_ms),
            "cost": float(np.mean(costs[name])),
            "above_best": float(np.max(np.array(costs[name]) / best - 1.0)),
        }
    return table


# The stream


def run_stream(path: Path, every: int, max_frames: int) -> dict[str, dict[str, float]]:
    """Times of every call; windows share ``window.overlap`` keyframes with the one before."""
    config = Config(model=ModelConfig(device="cpu"))
    times: dict[str, list[tuple[float, float]]] = defaultdict(list)
    keyframes: list[int] = []

    def timed(name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        before, cpu = time.perf_counter(), time.process_time()
        result = call(*arguments)
        times[name].append((1e3 * (time.perf_counter() - before), 1e3 * (time.process_time() - cpu)))
        return result

    for number, frame in enumerate(itertools.islice(open_source(str(path)), max_frames)):
        if number == 0:
            height, width = frame.image.shape[:2]
            tracker = FeatureTracker(config.refine, frame.camera)
            refiner = Refiner(config.refine, width, height, frame.camera)
            pose = None
        tracks = timed("features", tracker.track, cv2.cvtColor(frame.image, cv2.COLOR_RGB2GRAY), frame.stamp_ns)
        if refiner.is_initialised:
            pose = timed("pose", refiner.track, tracks, None if pose is None else pose.T_world_camera)
        if number % every:
            continue
        keyframes.append(number)
        name = "keyframe" if refiner.is_initialised else "keyframe before the first window"
        timed(name, refiner.add_keyframe, number, tracker.set_keyframe(number), None)
        if len(keyframes) == config.window.size:
            timed("window" if refiner.is_initialised else "first window", refiner.solve, keyframes)
            keyframes = keyframes[-config.window.overlap :]
    return {
        name: {
            "count": len(values),
            "median_ms": float(np.median(values, axis=0)[0]),
            "p95_ms": float(np.percentile(values, 95, axis=0)[0]),
            "median_cpu_ms": float(np.median(values, axis=0)[1]),
            "max_cpu_ms": float(np.max(values, axis=0)[1]),
        }
        for name, values in times.items()
    }


def print_solvers(table: dict[str, dict[str, float]]) -> None:
    print(f"{'solver':8} {'build ms':>9} {'solve ms':>9} {'total ms':>9} {'cpu ms':>8} {'cost':>9} {'above best':>11}")
    for name, row in table.items():
        milliseconds = (
            "".join(f" {row[key]:9.1f}" for key in ("build_ms", "solve_ms", "total_ms")) if len(row) > 1 else ""
        )
        rest = f" {row['cpu_ms']:8.1f} {row['cost']:9.5f} {row['above_best']:11.2%}" if len(row) > 1 else ""
        print(f"{name:8}{milliseconds}{rest}" if rest else f"{name:8} {'':38} {row['cost']:9.5f}")


def print_stream(name: str, table: dict[str, dict[str, float]]) -> None:
    print(f"\n{name:33} {'calls':>6} {'median ms':>10} {'p95 ms':>8} {'median cpu':>11} {'max cpu':>8}")
    for call, row in table.items():
        print(f"{call:33} {row['count']:6.0f} {row['median_ms']:10.1f} {row['p95_ms']:8.1f}"
              f" {row['median_cpu_ms']:11.1f} {row['max_cpu_ms']:8.1f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--cameras", type=int, default=8)
    parser.add_argument("--points", type=int, default=600)
    parser.add_argument("--per-point", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--sequences", type=Path, nargs="*", default=[], help="image folders; none: solvers only")
    parser.add_argument("--every", type=int, default=5, help="frames from one keyframe to the next")
    parser.add_argument("--frames", type=int, default=200, help="of each sequence at most")
    options = parser.parse_args()
    solvers = compare_solvers(options)
    print_solvers(solvers)
    streams = {path.name: run_stream(path, options.every, options.frames) for path in options.sequences}
    for name, table in streams.items():
        print_stream(name, table)
    print(json.dumps({"tolerance": options.tolerance, "solvers": solvers, "streams": streams}))


if __name__ == "__main__":
    main()
