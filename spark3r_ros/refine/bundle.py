"""Robust bundle adjustment of a few cameras and many points, by a Schur complement in numpy.

Own code instead of a kept solver because of what the stream needs at once: points as inverse depths (far points and
rotation without parallax stay well conditioned) with a robust prior on each, a focal length and a readout that can be
free, bits that repeat, and 8 keyframes with 600 points in about a quarter of the time that gtsam 4.3 takes from Python.
Ceres through pycolmap takes two thirds of ours, but knows neither priors of depth nor a shutter
(``benchmarks/refine.py``).
``test_refine_bundle.py`` holds it against scipy's ``least_squares``.

Legend: K cameras, P points, M observations. A point is (a, b, r): in the frame of its *anchor*, a camera pose that is
frozen while the problem is solved, it lies at (a, b, 1) / r; r is the inverse depth there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from spark3r_ros.geometry import so3_exp

_MIN_DEPTH = 1e-6  # of the homogeneous z: below, the point is beside or behind the camera

_MAX_READOUT = 0.1  # seconds
_SINGLE_THREAD_PRODUCT = 200_000  # multiplications below which OpenBLAS does not start threads
_LEAST_ROWS = 64  # of a piece, which may be more than that: shorter ones take twice as long with 30 cameras


@dataclass(frozen=True, eq=False)
class Problem:
    """What is adjusted. Observations are sorted by point; pixels are those of the undistorted image."""

    T_world_camera: np.ndarray  # [K, 4, 4]
    is_free: np.ndarray  # [K] bool: the other cameras hold world and scale
    focal: np.ndarray  # [2]
    centre: np.ndarray  # [2]
    xyz: np.ndarray  # [P, 3] world
    anchor: np.ndarray  # [P] index of the camera whose depth is parametrised
    camera: np.ndarray  # [M]
    point: np.ndarray  # [M] ascending
    uv: np.ndarray  # [M, 2] as read
    shutter: np.ndarray  # [M, 2] px/s: image velocity, times this row's distance from the middle row in image heights
    sigma_px: np.ndarray  # [M]
    prior_inverse_depth: np.ndarray  # [P] at the anchor
    prior_sigma: np.ndarray  # [P] of its logarithm; inf: no prior
    focal_sigma: float = 0.0  # prior of log focal around ``focal``; 0: the focal length is fixed
    readout: float = 0.0  # seconds from the first row to the last
    readout_sigma: float = 0.0  # prior of it; 0: fixed


@dataclass(frozen=True, eq=False)
class Solution:
    T_world_camera: np.ndarray  # [K, 4, 4]
    focal: np.ndarray  # [2]
    xyz: np.ndarray  # [P, 3] world
    residual_px: np.ndarray  # [M] length; inf behind the camera
    depth_sigma: np.ndarray  # [P] relative standard deviation of the depth, the poses held
    focal_sigma: float  # of log focal after the adjustment; 0 when it was fixed
    readout: float
    readout_sigma: float  # after the adjustment; 0 when it was fixed
    cost: float  # robust, per observation
    iterations: int


@dataclass(frozen=True, eq=False)
class _State:
    R: np.ndarray  # [K, 3, 3]
    t: np.ndarray  # [K, 3]
    log_focal: float
    readout: float
    abr: np.ndarray  # [P, 3]

    @property
    def camera_globals(self) -> np.ndarray:
        return np.array([self.log_focal, self.readout])


@dataclass(frozen=True, eq=False)
class _Projection:
    """Where the cameras of a state see its points."""

    q: np.ndarray  # [M, 3] homogeneous camera points: depth times inverse depth
    q_by_abr: np.ndarray  # [M, 3, 3] their derivative by (a, b, r)
    focal: np.ndarray  # [2]
    residual: np.ndarray  # [M, 2] pixels


@dataclass(frozen=True, eq=False)
class _Frozen:
    """Indices and anchors that do not change between iterations."""

    problem: Problem
    R_anchor: np.ndarray  # [P, 3, 3]
    t_anchor: np.ndarray  # [P, 3]
    pair: np.ndarray  # [M] camera * K + anchor of the point
    by_camera: tuple[np.ndarray, ...]  # observations of each free camera
    starts: np.ndarray  # [P] first observation of each point
    open_globals: np.ndarray  # which of (log focal, readout) are free
    loss_px: float
    min_inverse_depth: float


def adjust(problem: Problem, iterations: int = 12, loss_px: float = 1.0, tolerance: float = 1e-4) -> Solution:
    """Levenberg-Marquardt on the Cauchy loss; stops when the cost falls by less than ``tolerance`` of itself.

    Every point needs at least one observation. ``ValueError`` when the problem has no observations.
    """
    if len(problem.uv) == 0:
        raise ValueError("bundle adjustment needs observations, got none")
    frozen, state = _freeze(problem, loss_px)
    seen = _project(frozen, state)
    damping, cost = 1e-4, _cost(frozen, state, seen)
    done = 0
    for _ in range(iterations):
        done += 1
        system = _linearise(frozen, state, seen)
        improved = False
        for _ in range(6):
            trial = _moved(frozen, state, *_step(frozen, system, damping))
            trial_seen = _project(frozen, trial)
            trial_cost = _cost(frozen, trial, trial_seen)
            if trial_cost < cost:
                improved = True
                break
            damping *= 8.0
        if not improved:
            break
        gain = (cost - trial_cost) / max(cost, 1e-12)
        state, seen, cost, damping = trial, trial_seen, trial_cost, max(damping * 0.2, 1e-9)
        if gain < tolerance:
            break
    return _solution(frozen, state, seen, cost, done)


def without(problem: Problem, keep: np.ndarray) -> Problem:
    """The problem with the observations ``keep`` [M] bool; points keep their numbers (also those left with none)."""
    return replace(
        problem,
        camera=problem.camera[keep],
        point=problem.point[keep],
        uv=problem.uv[keep],
        shutter=problem.shutter[keep],
        sigma_px=problem.sigma_px[keep],
    )


def _freeze(problem: Problem, loss_px: float) -> tuple[_Frozen, _State]:
    R, t = problem.T_world_camera[:, :3, :3], problem.T_world_camera[:, :3, 3]
    R_anchor, t_anchor = R[problem.anchor], t[problem.anchor]
    local = np.einsum("pji,pj->pi", R_anchor, problem.xyz - t_anchor)
    depth = np.maximum(local[:, 2], 1e-3 * np.median(np.abs(local[:, 2])) + 1e-9)
    abr = np.stack([local[:, 0] / depth, local[:, 1] / depth, 1.0 / depth], axis=1)
    pair = problem.camera * len(R) + problem.anchor[problem.point]
    by_camera = tuple(np.flatnonzero(problem.camera == k) for k in np.flatnonzero(problem.is_free))
    starts = np.searchsorted(problem.point, np.arange(len(problem.xyz)))
    floor = 1e-3 * float(np.median(abr[:, 2]))
    open_globals = np.flatnonzero([problem.focal_sigma > 0, problem.readout_sigma > 0])
    frozen = _Frozen(problem, R_anchor, t_anchor, pair, by_camera, starts, open_globals, loss_px, floor)
    return frozen, _State(R, t, 0.0, problem.readout, abr)


def _project(frozen: _Frozen, state: _State) -> _Projection:
    problem = frozen.problem
    T = problem.T_world_camera
    R_camera = np.swapaxes(state.R, 1, 2)[:, None]
    R_camera_anchor = R_camera @ T[:, :3, :3]  # [K, K, 3, 3]
    anchor_in_camera = (R_camera @ (T[:, :3, 3] - state.t[:, None])[..., None])[..., 0]  # [K, K, 3]
    basis = R_camera_anchor.copy()
    basis[..., 2] = anchor_in_camera
    q_by_abr = basis.reshape(-1, 3, 3)[frozen.pair]
    abr = state.abr[problem.point]
    axis = R_camera_anchor[..., 2].reshape(-1, 3)[frozen.pair]
    q = axis + sum(q_by_abr[:, :, i] * abr[:, i, None] for i in range(3))
    focal = problem.focal * np.exp(state.log_focal)
    z = np.maximum(q[:, 2:], _MIN_DEPTH)
    residual = q[:, :2] / z * focal + problem.centre - problem.uv + state.readout * problem.shutter
    return _Projection(q, q_by_abr, focal, residual)


def _prior_residual(frozen: _Frozen, state: _State) -> np.ndarray:
    """Of the logarithm: in inverse depth itself infinity is near, and a camera that only turns saw its map grow."""
    problem = frozen.problem
    return np.asarray(np.log(state.abr[:, 2] / problem.prior_inverse_depth) / problem.prior_sigma)


def _global_priors(frozen: _Frozen, state: _State) -> tuple[np.ndarray, np.ndarray]:
    """Differences to the priors of the free camera parameters, and the priors' information."""
    problem = frozen.problem
    sigma = np.array([problem.focal_sigma, problem.readout_sigma])[frozen.open_globals]
    return (state.camera_globals - np.array([0.0, problem.readout]))[frozen.open_globals], 1.0 / sigma**2


def _squared_length(residual: np.ndarray) -> np.ndarray:
    return residual[:, 0] ** 2 + residual[:, 1] ** 2


def _loss(squared: np.ndarray, scale: float) -> np.ndarray:
    return scale**2 * np.log1p(squared / scale**2)


def _cost(frozen: _Frozen, state: _State, seen: _Projection) -> float:
    squared = _squared_length(seen.residual) / frozen.problem.sigma_px**2
    squared = np.where(seen.q[:, 2] > _MIN_DEPTH, squared, 1e6)
    cost = _loss(squared, frozen.loss_px).sum() + _loss(_prior_residual(frozen, state) ** 2, 1.0).sum()
    difference, information = _global_priors(frozen, state)
    return float(cost + information @ difference**2)


@dataclass(frozen=True, eq=False)
class _System:
    H_cc: np.ndarray  # [C, C] cameras, then the free ones of log focal and readout
    H_pp: np.ndarray  # [P, 3, 3]
    H_pc: np.ndarray  # [3, P, C]
    g_c: np.ndarray  # [C]
    g_p: np.ndarray  # [P, 3]


def _jacobians(
    frozen: _Frozen, state: _State, seen: _Projection
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Residuals [M, 2], J of camera [M, 2, 6], of point [M, 2, 3], of free camera parameters [M, 2, G]; weighted.

    Products are written out: numpy is slow at many small matrices.
    """
    problem, q, residual = frozen.problem, seen.q, seen.residual
    squared = _squared_length(residual) / problem.sigma_px**2
    weight = 1.0 / (1.0 + squared / frozen.loss_px**2) / problem.sigma_px**2
    root = np.sqrt(np.where(q[:, 2] > _MIN_DEPTH, weight, 0.0))[:, None]
    inv_z = 1.0 / np.maximum(q[:, 2:], _MIN_DEPTH)
    xy = q[:, :2] * inv_z
    by_xy = seen.focal * root  # [M, 2] of pixels by x / z and y / z
    by_q = by_xy * inv_z
    J_camera = np.zeros((len(q), 2, 6))
    r = state.abr[problem.point, 2:]
    J_camera[:, 0, 0], J_camera[:, 1, 1] = (-r * by_q).T
    J_camera[:, :, 2] = r * by_q * xy
    J_camera[:, 0, 3], J_camera[:, 1, 3] = by_xy[:, 0] * xy[:, 0] * xy[:, 1], by_xy[:, 1] * (1.0 + xy[:, 1] ** 2)
    J_camera[:, 0, 4], J_camera[:, 1, 4] = -by_xy[:, 0] * (1.0 + xy[:, 0] ** 2), -by_xy[:, 1] * xy[:, 0] * xy[:, 1]
    J_camera[:, 0, 5], J_camera[:, 1, 5] = by_xy[:, 0] * xy[:, 1], -by_xy[:, 1] * xy[:, 0]
    J_point = by_q[..., None] * (seen.q_by_abr[:, :2] - xy[..., None] * seen.q_by_abr[:, 2:])
    J_globals = np.stack([by_xy * xy, root * problem.shutter], axis=2)[:, :, frozen.open_globals]
    return residual * root, J_camera, J_point, J_globals


def _linearise(frozen: _Frozen, state: _State, seen: _Projection) -> _System:
    problem = frozen.problem
    residual, J_camera, J_point, J_globals = _jacobians(frozen, state, seen)
    num_points, num_free, num_globals = len(state.abr), len(frozen.by_camera), len(frozen.open_globals)
    size = 6 * num_free + num_globals
    tail = slice(6 * num_free, size)
    H_cc, g_c = np.zeros((size, size)), np.zeros(size)
    H_pc = np.zeros((3, num_points, size))
    for i, rows in enumerate(frozen.by_camera):
        block = slice(6 * i, 6 * i + 6)
        J = J_camera[rows].reshape(-1, 6)
        H_cc[block, block] = J.T @ J
        g_c[block] = J.T @ residual[rows].ravel()
        by_point = J_point[rows].transpose(1, 2, 0)[..., None]  # [2, 3, N, 1]
        H_pc[:, problem.point[rows], block] = by_point[0] * J_camera[rows, 0] + by_point[1] * J_camera[rows, 1]
        H_cc[block, tail] = J.T @ J_globals[rows].reshape(2 * len(rows), num_globals)
    g_p = _sum_by_point(frozen, np.einsum("mni,mn->mi", J_point, residual))
    if num_globals:
        J = J_globals.reshape(2 * len(J_globals), num_globals)
        difference, information = _global_priors(frozen, state)
        H_cc[tail, : 6 * num_free] = H_cc[: 6 * num_free, tail].T
        H_cc[tail, tail] = J.T @ J + np.diag(information)
        g_c[tail] = J.T @ residual.ravel() + information * difference
        H_pc[:, :, tail] = np.moveaxis(_sum_by_point(frozen, np.einsum("mni,mnj->mij", J_point, J_globals)), 1, 0)
    prior, prior_J, prior_weight = _depth_priors(frozen, state)
    g_p[:, 2] += prior_weight * prior_J * prior
    return _System(H_cc, _point_information(frozen, state, J_point), H_pc, g_c, g_p)


def _point_information(frozen: _Frozen, state: _State, J_point: np.ndarray) -> np.ndarray:
    """H_pp [P, 3, 3]."""
    by_x, by_y = J_point[:, 0], J_point[:, 1]
    H_pp = _sum_by_point(frozen, by_x[:, :, None] * by_x[:, None] + by_y[:, :, None] * by_y[:, None])
    _, prior_J, prior_weight = _depth_priors(frozen, state)
    H_pp[:, 2, 2] += prior_weight * prior_J**2
    return H_pp


def _depth_priors(frozen: _Frozen, state: _State) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Residuals of the priors [P], their derivative by the inverse depth, and their robust weights."""
    prior = _prior_residual(frozen, state)
    prior_J = 1.0 / (state.abr[:, 2] * frozen.problem.prior_sigma)
    return prior, prior_J, 1.0 / (1.0 + prior**2)


def _sum_by_point(frozen: _Frozen, values: np.ndarray) -> np.ndarray:
    """Sum [M, ...] over the observations of each point: [P, ...]; zero where a point has none."""
    padded = np.concatenate([values, np.zeros((1, *values.shape[1:]))])
    summed = np.add.reduceat(padded, frozen.starts, axis=0)
    counts = np.diff(np.append(frozen.starts, len(values)))
    summed[counts == 0] = 0.0
    return summed


def _step(frozen: _Frozen, system: _System, damping: float) -> tuple[np.ndarray, np.ndarray]:
    """Update of cameras and free camera parameters [C] and of points [P, 3]."""
    eye = np.eye(3)
    diagonal = np.einsum("pii->pi", system.H_pp)
    H_pp = system.H_pp + (diagonal * damping + 1e-12 * diagonal.max())[:, :, None] * eye
    inverse = np.linalg.inv(H_pp)
    size = len(system.g_c)
    reduced, H_ip = _reduce(system, inverse)
    reduced += np.diag(np.diag(system.H_cc) * damping + 1e-12 * np.trace(system.H_cc) / max(size, 1) + 1e-300)
    g = system.g_c - np.einsum("ipc,pi->c", H_ip, system.g_p)
    d_c = -np.linalg.solve(reduced, g) if size else np.zeros(0)
    d_p = -np.einsum("pij,pj->pi", inverse, system.g_p) - np.einsum("ipc,c->pi", H_ip, d_c)
    return d_c, d_p


def _reduce(system: _System, inverse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Schur complement [C, C] of the points and inverse(H_pp) H_pc [3, P, C].

    Written out over the three coordinates: numpy calls BLAS once per point otherwise, which takes ten times as long.
    """
    H_pc = system.H_pc
    H_ip = np.stack([sum(inverse[:, i, j, None] * H_pc[j] for j in range(3)) for i in range(3)])
    shape = 3 * H_pc.shape[1], H_pc.shape[2]
    return system.H_cc - _inner(H_pc.reshape(shape), H_ip.reshape(shape)), H_ip


def _inner(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a.T @ b for tall [N, C], in pieces that BLAS leaves on one thread, but for those of many cameras.

    Its threads wait for each other by spinning: when other work has the cores, one product took 50 ms instead of 1.
    """
    count, size = a.shape
    rows = max(_LEAST_ROWS, _SINGLE_THREAD_PRODUCT // max(size * size, 1))
    whole = count // rows * rows
    shape = count // rows, rows, size
    pieces = a[:whole].reshape(shape).swapaxes(1, 2) @ b[:whole].reshape(shape)
    return pieces.sum(axis=0) + a[whole:].T @ b[whole:]


def _moved(frozen: _Frozen, state: _State, d_c: np.ndarray, d_p: np.ndarray) -> _State:
    free = frozen.problem.is_free
    num_free = len(frozen.by_camera)
    xi = d_c[: 6 * num_free].reshape(-1, 6)
    R, t = state.R.copy(), state.t.copy()
    t[free] += np.einsum("kij,kj->ki", state.R[free], xi[:, :3])
    R[free] = state.R[free] @ so3_exp(xi[:, 3:])
    abr = state.abr + d_p
    abr[:, 2] = np.maximum(abr[:, 2], frozen.min_inverse_depth)
    camera_globals = state.camera_globals
    camera_globals[frozen.open_globals] += d_c[6 * num_free :]
    log_focal, readout = np.clip(camera_globals, [-1.5, -_MAX_READOUT], [1.5, _MAX_READOUT])
    return _State(R, t, float(log_focal), float(readout), abr)


def _solution(frozen: _Frozen, state: _State, seen: _Projection, cost: float, iterations: int) -> Solution:
    problem = frozen.problem
    length = np.where(seen.q[:, 2] > _MIN_DEPTH, np.linalg.norm(seen.residual, axis=1), np.inf)
    direction = np.einsum("pij,pj->pi", frozen.R_anchor[:, :, :2], state.abr[:, :2]) + frozen.R_anchor[:, :, 2]
    xyz = frozen.t_anchor + direction / state.abr[:, 2:]
    H_pp = _point_information(frozen, state, _jacobians(frozen, state, seen)[2])
    diagonal = np.einsum("pii->pi", H_pp)
    inverse = np.linalg.inv(H_pp + (1e-9 * diagonal + 1e-12)[:, :, None] * np.eye(3))
    depth_sigma = np.sqrt(np.maximum(inverse[:, 2, 2], 0.0)) / state.abr[:, 2]
    T = np.tile(np.eye(4), (len(state.R), 1, 1))
    T[:, :3, :3], T[:, :3, 3] = state.R, state.t
    sigmas = np.zeros(2)
    if len(frozen.open_globals):
        system = _linearise(frozen, state, seen)
        sigmas[frozen.open_globals] = _sigma_of_last(_reduce(system, inverse)[0], len(frozen.open_globals))
    return Solution(
        T, seen.focal, xyz, length, depth_sigma, float(sigmas[0]), state.readout, float(sigmas[1]),
        cost / len(problem.uv), iterations,
    )  # fmt: skip


def _sigma_of_last(information: np.ndarray, count: int) -> np.ndarray:
    """Standard deviations of the last ``count`` parameters; without eigenvectors, where threads of LAPACK spin."""
    diagonal = np.diag(information)
    damped = information + np.diag(1e-10 * diagonal + 1e-300)
    columns = np.linalg.solve(damped, np.eye(len(diagonal))[:, -count:])
    return np.sqrt(np.maximum(np.diag(columns[-count:]), 0.0))
