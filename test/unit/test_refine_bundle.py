"""Bundle adjustment against scipy on the same cost, and what each prior and each free parameter is for."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import least_squares
from sightings import K, ahead, perturbed, sideways, turning

from spark3r_ros.geometry import inverse, project, rotation_angle, so3_exp, so3_log, transform
from spark3r_ros.refine import bundle
from spark3r_ros.refine.bundle import Problem, adjust, without

FIXED_FOCAL = np.array([K[0, 0], K[1, 1]])


def make_problem(
    seed=0, num_points=24, T=None, noise_px=0.3, held=1, prior_sigma=3.0, disturbance=0.02, **changes
) -> tuple[Problem, np.ndarray, np.ndarray]:
    """A disturbed problem, the true T_world_camera [K, 4, 4] and the true points [P, 3]."""
    rng = np.random.default_rng(seed)
    T = sideways(4) if T is None else T
    seen = [ahead(num_points, seed).seen(t) for t in T]
    number = np.concatenate([ids for ids, _ in seen])
    camera = np.repeat(np.arange(len(T)), [len(ids) for ids, _ in seen])
    order = np.lexsort([camera, number])
    kept = np.flatnonzero(np.bincount(number, minlength=num_points) >= 2)
    order = order[np.isin(number[order], kept)]
    uv = np.concatenate([uv for _, uv in seen])[order]
    camera, point = camera[order], np.searchsorted(kept, number[order])
    xyz = ahead(num_points, seed).xyz[kept]
    anchor = camera[np.searchsorted(point, np.arange(len(xyz)))]
    depth = np.einsum("pi,pi->p", xyz - T[anchor, :3, 3], T[anchor, :3, 2])
    is_free = np.arange(len(T)) >= held
    start = T.copy()
    start[is_free] = perturbed(T[is_free], rng, disturbance, disturbance / 4)
    problem = Problem(
        T_world_camera=start,
        is_free=is_free,
        focal=FIXED_FOCAL,
        centre=K[:2, 2],
        xyz=xyz * rng.normal(1, disturbance, (len(xyz), 1)),
        anchor=anchor,
        camera=camera,
        point=point,
        uv=uv + rng.normal(0, noise_px, uv.shape),
        shutter=np.zeros_like(uv),
        sigma_px=rng.uniform(0.3, 1.0, len(uv)),
        prior_inverse_depth=1.0 / depth * rng.uniform(0.8, 1.25, len(depth)),
        prior_sigma=np.full(len(depth), prior_sigma),
    )
    return replace(problem, **changes), T, xyz


def solve_by_scipy(problem: Problem, loss_px: float) -> tuple[float, np.ndarray, np.ndarray, float, float]:
    """Cost, poses, world points, log focal and readout at the minimum of the documented cost by differences.

    Its own parameters: rotation vectors and positions of the free cameras, points of the world.
    """
    num_free, num_points = int(problem.is_free.sum()), len(problem.xyz)
    anchor = problem.T_world_camera[problem.anchor]

    def unpack(x):
        T = problem.T_world_camera.copy()
        T[problem.is_free, :3, :3] = so3_exp(x[: 3 * num_free].reshape(-1, 3))
        T[problem.is_free, :3, 3] = x[3 * num_free : 6 * num_free].reshape(-1, 3)
        xyz = x[6 * num_free : 6 * num_free + 3 * num_points].reshape(-1, 3)
        log_focal = x[-2] if problem.focal_sigma > 0 else 0.0
        readout = x[-1] if problem.readout_sigma > 0 else problem.readout
        return T, xyz, log_focal, readout

    def robust(terms, scale):
        """Vectors [N, D] made such that their squares sum to the Cauchy loss."""
        squared = np.maximum((terms**2).sum(axis=1, keepdims=True), 1e-300)
        return (terms * np.sqrt(scale**2 * np.log1p(squared / scale**2) / squared)).ravel()

    def residuals(x):
        T, xyz, log_focal, readout = unpack(x)
        local = transform(inverse(T[problem.camera]), xyz[problem.point][:, None])[:, 0]
        uv = local[:, :2] / local[:, 2:] * problem.focal * np.exp(log_focal) + problem.centre
        error = (uv + readout * problem.shutter - problem.uv) / problem.sigma_px[:, None]
        inverse_depth = 1.0 / np.einsum("pi,pi->p", xyz - anchor[:, :3, 3], anchor[:, :3, 2])
        prior = np.log(inverse_depth / problem.prior_inverse_depth) / problem.prior_sigma
        parts = [robust(error, loss_px), robust(prior[:, None], 1.0)]
        if problem.focal_sigma > 0:
            parts.append([log_focal / problem.focal_sigma])
        if problem.readout_sigma > 0:
            parts.append([(readout - problem.readout) / problem.readout_sigma])
        return np.concatenate(parts)

    T = problem.T_world_camera[problem.is_free]
    x = np.concatenate([so3_log(T[:, :3, :3]).ravel(), T[:, :3, 3].ravel(), problem.xyz.ravel(), [0, problem.readout]])
    found = least_squares(residuals, x, xtol=1e-10, ftol=1e-10, gtol=1e-10, x_scale="jac")
    return 2 * found.cost, *unpack(found.x)


def exact(problem, **options):
    return adjust(problem, iterations=100, tolerance=1e-12, **options)


CASES = {
    "two cameras held": {"held": 2},
    "scale held by priors": {"held": 1, "prior_sigma": 0.2},
    "wide loss": {"held": 2, "loss_px": 3.0},
    "focal free": {"held": 2, "focal_sigma": 0.3},
    "all free": {"held": 2, "focal_sigma": 0.1, "readout_sigma": 0.02, "readout": 0.005},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(2))
def test_same_minimum_as_scipy(case, seed):
    options = dict(CASES[case])
    loss_px = options.pop("loss_px", 1.0)
    problem, _, _ = make_problem(seed, noise_px=0.15, **options)  # more noise, and the loss has several minima
    if problem.readout_sigma > 0:
        shutter = np.random.default_rng(seed).normal(0, 100, problem.uv.shape)
        problem = replace(problem, shutter=shutter, uv=problem.uv + 0.02 * shutter)
    cost, T, xyz, log_focal, readout = solve_by_scipy(problem, loss_px)
    solution = exact(problem, loss_px=loss_px)
    assert solution.cost * len(problem.uv) == pytest.approx(cost, rel=1e-6)
    np.testing.assert_allclose(solution.T_world_camera, T, atol=1e-4)
    np.testing.assert_allclose(solution.xyz, xyz, rtol=1e-3, atol=1e-3)
    assert np.log(solution.focal / problem.focal) == pytest.approx(log_focal, abs=1e-4)
    assert solution.readout == pytest.approx(readout, abs=1e-5)


def test_exact_observations_give_the_truth():
    problem, T, xyz = make_problem(noise_px=0.0, held=2, num_points=60, prior_sigma=np.inf)
    solution = exact(problem)
    np.testing.assert_allclose(solution.T_world_camera, T, atol=1e-6)
    np.testing.assert_allclose(solution.xyz, xyz, atol=1e-5)
    assert solution.residual_px.max() < 1e-4
    assert solution.cost < 1e-8
    assert (solution.focal == problem.focal).all()
    assert solution.focal_sigma == solution.readout_sigma == 0.0


def test_the_default_number_of_iterations_is_enough():
    problem, _, _ = make_problem(num_points=200, held=2, disturbance=0.05)
    assert adjust(problem).cost == pytest.approx(exact(problem).cost, rel=1e-3)


def test_held_cameras_stay_bit_for_bit_and_rotations_stay_rotations():
    problem, _, _ = make_problem(held=2)
    solution = adjust(problem)
    held = ~problem.is_free
    assert (solution.T_world_camera[held] == problem.T_world_camera[held]).all()
    assert (solution.T_world_camera[problem.is_free] != problem.T_world_camera[problem.is_free]).any(axis=(1, 2)).all()
    R = solution.T_world_camera[:, :3, :3]
    np.testing.assert_allclose(R @ np.swapaxes(R, 1, 2), np.broadcast_to(np.eye(3), R.shape), atol=1e-12)


def test_only_points_move_when_all_cameras_are_held():
    problem, T, xyz = make_problem(held=4, noise_px=0.0, prior_sigma=np.inf)
    solution = exact(problem)
    assert (solution.T_world_camera == T).all()
    np.testing.assert_allclose(solution.xyz, xyz, atol=1e-5)


def test_outliers_hardly_move_the_solution_and_are_told_by_their_residuals():
    problem, T, _ = make_problem(num_points=150, held=2)
    rng = np.random.default_rng(1)
    wrong = rng.random(len(problem.uv)) < 0.15
    uv = problem.uv + wrong[:, None] * rng.uniform(30, 90, problem.uv.shape) * rng.choice([-1, 1], problem.uv.shape)
    clean, spoilt = exact(problem), exact(replace(problem, uv=uv))
    assert position_error(spoilt.T_world_camera, T) < 2 * position_error(clean.T_world_camera, T) + 1e-3
    assert rotation_error(spoilt.T_world_camera, T) < np.radians(0.05)
    assert (spoilt.residual_px[wrong] > 3.0).mean() > 0.95
    crowd = np.bincount(problem.point, wrong)[problem.point] == 0
    assert (spoilt.residual_px[crowd] < 3.0).mean() > 0.99


def position_error(T, truth):
    return float(np.linalg.norm(T[:, :3, 3] - truth[:, :3, 3], axis=1).max())


def rotation_error(T, truth):
    return float(rotation_angle(np.swapaxes(T[:, :3, :3], 1, 2) @ truth[:, :3, :3]).max())


def test_a_free_focal_length_is_found():
    T = sideways(6, step=0.25, turn_deg=5.0)
    problem, _, _ = make_problem(num_points=200, T=T, held=2, noise_px=0.1, sigma_px=0.3)
    problem = replace(problem, sigma_px=np.full(len(problem.uv), 0.3), focal=1.2 * FIXED_FOCAL, focal_sigma=0.3)
    solution = adjust(problem, iterations=30)
    error = np.log(solution.focal / FIXED_FOCAL)
    assert error[0] == pytest.approx(error[1])
    assert abs(error[0]) < 0.003
    assert 0.0 < solution.focal_sigma < 0.003
    assert abs(error[0]) < 4 * solution.focal_sigma


def test_sigmas_of_camera_parameters_are_those_of_the_whole_normal_matrix():
    """Also where scale is free and the matrix as good as singular."""
    problem, _, _ = make_problem(num_points=60, held=1, prior_sigma=np.inf, focal_sigma=0.1, readout_sigma=0.02)
    problem = replace(problem, shutter=np.random.default_rng(0).normal(0, 100, problem.uv.shape))
    solution = adjust(problem, iterations=30)
    frozen, state = bundle._freeze(
        replace(problem, T_world_camera=solution.T_world_camera, xyz=solution.xyz, focal=solution.focal), 1.0
    )
    state = replace(state, readout=solution.readout)
    system = bundle._linearise(frozen, state, bundle._project(frozen, state))
    size, num_points = len(system.g_c), len(solution.xyz)
    whole = np.zeros((size + 3 * num_points,) * 2)
    whole[:size, :size] = system.H_cc
    whole[size:, :size] = system.H_pc.transpose(1, 0, 2).reshape(-1, size)
    whole[:size, size:] = whole[size:, :size].T
    for i in range(num_points):
        block = slice(size + 3 * i, size + 3 * i + 3)
        whole[block, block] = system.H_pp[i]
    variance = np.diag(np.linalg.pinv(whole, hermitian=True, rcond=1e-13))[size - 2 : size]
    np.testing.assert_allclose([solution.focal_sigma, solution.readout_sigma], np.sqrt(variance), rtol=0.02)


def test_a_strong_prior_holds_the_focal_length():
    problem, _, _ = make_problem(num_points=60, held=2, focal=1.02 * FIXED_FOCAL)
    free = exact(replace(problem, focal_sigma=0.3))
    held = exact(replace(problem, focal_sigma=1e-6))
    assert abs(np.log(free.focal / problem.focal)).max() > 0.005
    np.testing.assert_allclose(held.focal, problem.focal, rtol=1e-6)
    assert held.focal_sigma == pytest.approx(1e-6, rel=0.01)


def test_a_free_readout_is_found():
    problem, T, _ = make_problem(num_points=150, T=turning(5, 2.0, step=0.15), held=2)
    rng = np.random.default_rng(2)
    speed = rng.normal(0, 300, (len(T), 2))[problem.camera]  # px/s, another for each image
    shutter = speed * rng.uniform(-0.5, 0.5, (len(problem.uv), 1))
    problem = replace(problem, shutter=shutter, uv=problem.uv + 0.03 * shutter)
    solution = adjust(replace(problem, readout_sigma=0.02), iterations=20)
    assert solution.readout == pytest.approx(0.03, abs=4 * solution.readout_sigma)
    assert 0 < solution.readout_sigma < 0.001
    fixed = adjust(problem, iterations=20)
    assert fixed.readout == problem.readout == 0.0
    assert fixed.cost > 2 * solution.cost


def test_priors_hold_points_without_parallax():
    problem, _, xyz = make_problem(num_points=60, T=turning(4, 4.0), held=4, prior_sigma=0.1)
    wanted = 1.0 / problem.prior_inverse_depth
    problem = replace(problem, xyz=xyz * 1.3)
    solution = exact(problem)
    np.testing.assert_allclose(depth_at_anchor(problem, solution.xyz), wanted, rtol=1e-4)
    np.testing.assert_allclose(solution.depth_sigma, 0.1, rtol=0.01)
    moving, _, xyz = make_problem(num_points=60, T=sideways(4), held=4, prior_sigma=0.1)
    np.testing.assert_allclose(depth_at_anchor(moving, exact(moving).xyz), depth_at_anchor(moving, xyz), rtol=0.06)


def depth_at_anchor(problem, xyz):
    anchor = problem.T_world_camera[problem.anchor]
    return np.einsum("pi,pi->p", xyz - anchor[:, :3, 3], anchor[:, :3, 2])


@pytest.mark.parametrize(("sigma", "bias"), [(1.0, 0.005), (3.0, 0.002)])
def test_a_rotation_without_parallax_is_not_shrunk_by_wrong_priors(sigma, bias):
    T, wrong = turning(5, 3.0), []
    for seed in range(6):
        problem, _, _ = make_problem(seed, num_points=300, T=T, held=1, noise_px=0.1, prior_sigma=sigma)
        flat = np.full(len(problem.xyz), 1.0 / 4.0)
        solution = adjust(replace(problem, prior_inverse_depth=flat), iterations=30)
        wrong.append(rotation_angle(solution.T_world_camera[-1, :3, :3]) / np.radians(12.0) - 1)
    assert abs(np.mean(wrong)) < bias
    assert np.abs(wrong).max() < 0.01


def test_depth_is_held_as_much_from_growing_as_from_shrinking():
    """Regression: infinity was one sigma away, and the map of a camera that only turns grew a thousandfold."""
    problem, _, xyz = make_problem(num_points=60, T=turning(4, 4.0), held=4, prior_sigma=1.0)
    problem = replace(problem, prior_inverse_depth=1.0 / depth_at_anchor(problem, xyz))
    cost = {factor: adjust(replace(problem, xyz=factor * xyz), iterations=0).cost for factor in (0.1, 1.0, 10.0)}
    assert cost[10.0] == pytest.approx(cost[0.1])
    total = (cost[10.0] - cost[1.0]) * len(problem.uv)
    assert total == pytest.approx(len(xyz) * np.log1p(np.log(10) ** 2))


def test_sigma_of_depth_is_that_of_a_stereo_pair():
    baseline, sigma_px = 0.3, 0.5
    T = np.tile(np.eye(4), (2, 1, 1))
    T[1, 0, 3] = baseline
    problem, _, xyz = make_problem(num_points=80, T=T, held=2, noise_px=0.0, prior_sigma=np.inf)
    solution = exact(replace(problem, sigma_px=np.full(len(problem.uv), sigma_px)))
    expected = np.sqrt(2) * sigma_px * xyz[:, 2] / (K[0, 0] * baseline)
    np.testing.assert_allclose(solution.depth_sigma, expected, rtol=1e-3)


def test_points_behind_a_camera_have_infinite_residuals_and_do_no_harm():
    problem, T, _ = make_problem(num_points=80, held=4, noise_px=0.0)
    T_wrong = T.copy()
    T_wrong[2, :3, 3] = [0, 0, 50.0]
    solution = adjust(replace(problem, T_world_camera=T_wrong))
    behind = problem.camera == 2
    assert np.isinf(solution.residual_px[behind]).all()
    assert np.median(solution.residual_px[~behind]) < 0.05
    assert np.isfinite(solution.xyz).all()
    assert np.isfinite(solution.cost)


def test_the_same_problem_gives_the_same_bits():
    problem, _, _ = make_problem(num_points=300, T=sideways(8, step=0.06), held=1, focal_sigma=0.3, readout_sigma=0.02)
    copy = replace(problem, uv=problem.uv.copy(order="F"), xyz=problem.xyz.copy(order="F"))
    first, again, third = adjust(problem), adjust(problem), adjust(copy)
    for other in (again, third):
        assert (other.T_world_camera == first.T_world_camera).all()
        assert (other.xyz == first.xyz).all()
        assert (other.depth_sigma == first.depth_sigma).all()
        assert (other.cost, other.focal[0], other.readout) == (first.cost, first.focal[0], first.readout)


def test_the_input_is_left_alone():
    problem, _, _ = make_problem(held=2)
    before = {name: np.copy(value) for name, value in vars(problem).items()}
    adjust(problem)
    for name, value in before.items():
        np.testing.assert_array_equal(value, getattr(problem, name), err_msg=name)


def test_no_observations_is_an_error():
    problem, _, _ = make_problem()
    with pytest.raises(ValueError, match="needs observations, got none"):
        adjust(without(problem, np.zeros(len(problem.uv), bool)))


def test_without_drops_observations_and_keeps_the_numbers_of_points():
    problem, _, _ = make_problem(num_points=40, held=2)
    last = problem.point.max()
    keep = ~np.isin(problem.point, [0, 7, last])
    rest = without(problem, keep)
    assert len(rest.uv) == len(rest.camera) == len(rest.shutter) == len(rest.sigma_px) == keep.sum()
    np.testing.assert_array_equal(rest.point, problem.point[keep])
    assert len(rest.xyz) == len(problem.xyz)
    others = ~np.isin(np.arange(len(problem.xyz)), [0, 7, last])
    renumbered = replace(
        rest,
        point=(np.cumsum(others) - 1)[rest.point],
        **{name: getattr(rest, name)[others] for name in ("xyz", "anchor", "prior_inverse_depth", "prior_sigma")},
    )
    solution, reference = exact(rest), exact(renumbered)
    np.testing.assert_allclose(solution.T_world_camera, reference.T_world_camera, atol=1e-7)
    np.testing.assert_allclose(solution.xyz[others], reference.xyz, atol=1e-5)
    assert np.isfinite(solution.xyz).all()


def test_projection_convention():
    """A pixel is focal * x / z + centre, of the point seen from the camera."""
    problem, T, xyz = make_problem(noise_px=0.0, disturbance=0.0, held=4)
    uv = np.stack(
        [project(transform(inverse(T[k]), xyz[p][None]), K)[0] for k, p in zip(problem.camera, problem.point)]
    )
    np.testing.assert_allclose(problem.uv, uv, atol=1e-9)
    assert adjust(problem).residual_px.max() < 0.05
