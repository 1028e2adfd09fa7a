"""One frame against known points: accuracy, outliers, wrong guesses, and a covariance that tells the truth."""

import numpy as np
import pytest
from sightings import K, ahead, around, perturbed, sideways, turning, wall

from spark3r_ros.geometry import inverse, make_T, rotation_angle, so3_exp, so3_log
from spark3r_ros.refine import pose
from spark3r_ros.refine.bootstrap import rays
from spark3r_ros.refine.pose import MIN_INLIERS, Landmarks, align_rays, fit_pose, sample_consensus

SIGMA_PX = 0.3
T_TRUE = sideways(8)[7]
NEAR = perturbed(T_TRUE, np.random.default_rng(0), 0.05, 0.02)


def landmarks(world=None, T=T_TRUE, seed=0, noise_px=SIGMA_PX, outliers=0.0) -> tuple[Landmarks, np.ndarray]:
    """What a frame at T sees of the world, and which of it is right [N] bool."""
    rng = np.random.default_rng([seed, 9])
    world = ahead(200, seed) if world is None else world
    ids, uv = world.seen(T)
    uv = uv + rng.normal(0, noise_px, uv.shape)
    right = rng.random(len(uv)) >= outliers
    uv[~right] = rng.uniform(0, [640, 480], (int((~right).sum()), 2))
    return placed(world.xyz[ids], uv), right


def placed(xyz, uv, depth_sigma=0.0) -> Landmarks:
    """Points measured from the origin, all of the same doubt or each of its own."""
    return Landmarks(xyz, xyz, np.broadcast_to(depth_sigma, len(xyz)), uv)


def errors(T, truth=T_TRUE) -> tuple[float, float]:
    """Metres and degrees."""
    difference = inverse(truth) @ T
    return float(np.linalg.norm(difference[:3, 3])), float(np.degrees(rotation_angle(difference[:3, :3])))


def test_exact_points_give_the_exact_pose():
    seen, _ = landmarks(noise_px=0.0)
    fit = fit_pose(seen, K, NEAR, SIGMA_PX)
    np.testing.assert_allclose(fit.T_world_camera, T_TRUE, atol=1e-7)
    assert fit.inlier.all()
    assert fit.residual_px < 1e-4
    np.testing.assert_allclose(fit.T_world_camera[:3, :3] @ fit.T_world_camera[:3, :3].T, np.eye(3), atol=1e-12)


@pytest.mark.parametrize("outliers", [0.0, 0.3, 0.55])
def test_outliers_do_not_move_the_pose(outliers):
    seen, right = landmarks(outliers=outliers)
    fit = fit_pose(seen, K, NEAR, SIGMA_PX)
    metres, degrees = errors(fit.T_world_camera)
    assert metres < 0.006
    assert degrees < 0.08
    assert fit.inlier[right].mean() > 0.95
    assert fit.inlier[~right].sum() <= 0.02 * len(right)
    assert fit.residual_px == pytest.approx(SIGMA_PX * np.sqrt(2 * np.log(2)), rel=0.2)  # median of a Rayleigh


@pytest.mark.parametrize("world", [ahead(200), wall(300)], ids=["scene", "wall"])
def test_a_useless_guess_is_replaced_by_sample_consensus(world):
    seen, _ = landmarks(world, outliers=0.3)
    guess = make_T(so3_exp(np.array([0.3, 1.8, -0.4])), np.array([4.0, -2.0, 3.0]))
    metres, degrees = errors(fit_pose(seen, K, guess, SIGMA_PX).T_world_camera)
    assert metres < 0.01
    assert degrees < 0.15


def test_blur_is_no_reason_for_a_sample_consensus(monkeypatch):
    """Most points miss the gate and the pose is right all the same; a wrong one would miss by far more."""
    monkeypatch.setattr(pose, "sample_consensus", lambda *_: pytest.fail("the guess was good enough"))
    seen, _ = landmarks(noise_px=1.1)
    fit = fit_pose(seen, K, NEAR, SIGMA_PX)
    metres, degrees = errors(fit.T_world_camera)
    assert fit.inlier.mean() < 0.4
    assert fit.trusted.mean() > 0.7
    assert metres < 0.03
    assert degrees < 0.4


def test_sample_consensus():
    seen, _ = landmarks(outliers=0.4)
    T = sample_consensus(seen, K, SIGMA_PX)
    metres, degrees = errors(T)
    assert metres < 0.03
    assert degrees < 0.4
    assert (sample_consensus(seen, K, SIGMA_PX) == T).all()


def test_sample_consensus_admits_that_nothing_agrees():
    seen, _ = landmarks()
    few = seen.select(np.arange(len(seen.uv)) < 5)
    assert sample_consensus(few, K, SIGMA_PX) is None
    same = placed(np.tile(seen.xyz[:1], (20, 1)), np.tile(seen.uv[:1], (20, 1)))
    T = sample_consensus(same, K, SIGMA_PX)
    assert T is None or np.isfinite(T).all()


def test_a_fit_to_nonsense_has_few_inliers_and_stays_finite():
    rng = np.random.default_rng(3)
    seen = placed(ahead(60).xyz, rng.uniform(0, [640, 480], (60, 2)))
    fit = fit_pose(seen, K, np.eye(4), SIGMA_PX)
    assert fit.inlier.sum() < MIN_INLIERS
    assert np.isfinite(fit.T_world_camera).all()
    assert np.isfinite(fit.covariance).all()


def test_no_inliers_have_no_residual():
    behind = ahead(40).xyz * [1, 1, -1]
    fit = fit_pose(placed(behind, np.full((40, 2), 100.0)), K, np.eye(4), SIGMA_PX)
    if fit.inlier.any():
        pytest.fail("points behind the camera were counted as inliers")
    assert np.isnan(fit.residual_px)


def test_the_covariance_is_that_of_the_errors():
    """Over many draws of noise: squared errors in standard deviations sum to the six degrees of freedom."""
    squared, deviations = [], []
    for seed in range(120):
        seen, _ = landmarks(ahead(60, 1), seed=seed)
        fit = fit_pose(seen, K, NEAR, SIGMA_PX)
        difference = inverse(fit.T_world_camera) @ T_TRUE
        error = np.concatenate([difference[:3, 3], so3_log(difference[:3, :3])])
        squared.append(error @ np.linalg.solve(fit.covariance, error))
        deviations.append(error / np.sqrt(np.diag(fit.covariance)))
    assert 4.0 < np.mean(squared) < 8.0
    assert (np.abs(np.std(deviations, axis=0) - 1.0) < 0.3).all()  # each of x y z and the rotations


def test_the_covariance_grows_with_noise_and_shrinks_with_points():
    def sigma(world, noise_px):
        return np.sqrt(np.diag(fit_pose(landmarks(world, noise_px=noise_px)[0], K, NEAR, SIGMA_PX).covariance))

    many, few = sigma(ahead(400), SIGMA_PX), sigma(ahead(100), SIGMA_PX)
    np.testing.assert_allclose(few / many, 2.0, rtol=0.4)
    far = sigma(ahead(400, nearest=20.0, farthest=60.0), SIGMA_PX)
    assert (far[:3] > 5 * many[:3]).all()  # positions
    noisy = fit_pose(landmarks(ahead(400), noise_px=0.6)[0], K, NEAR, SIGMA_PX).covariance
    assert (np.sqrt(np.diag(noisy)) > 1.2 * many).all()


def test_uncertain_depths_are_weighed_by_their_sigma():
    """Half of the points lie far too deep along their rays from the origin and say so."""
    rng = np.random.default_rng(4)
    seen, _ = landmarks(ahead(200))
    vague = rng.random(len(seen.uv)) < 0.5
    factor = np.where(vague, np.exp(rng.normal(0.3, 0.2, len(vague))), 1.0)[:, None]
    xyz = seen.xyz * factor
    told = placed(xyz, seen.uv, vague * 0.4)
    untold = placed(xyz, seen.uv)
    fit = fit_pose(told, K, NEAR, SIGMA_PX)
    metres, degrees = errors(fit.T_world_camera)
    assert metres < 0.01
    assert degrees < 0.1
    assert fit.inlier.mean() > 0.95
    assert fit_pose(untold, K, NEAR, SIGMA_PX).inlier.mean() < 0.8


def test_points_of_unknown_depth_lead_to_the_pose_however_wrong_their_depths():
    """Thirty known ones; three hundred at random depths, up to four times too near or far, that claim nothing.

    From where the camera was a fifth of a metre before: the lines on which they are seen turn on the way.
    """
    rng = np.random.default_rng(5)
    seen, _ = landmarks(ahead(330))
    known = np.arange(len(seen.uv)) < 30
    factor = np.where(known, 1.0, np.exp(rng.uniform(-1.4, 1.4, len(known))))[:, None]
    xyz = seen.xyz * factor
    guess = T_TRUE @ make_T(so3_exp(np.array([0.005, -0.01, 0.005])), np.array([-0.2, 0.05, 0.05]))
    fit = fit_pose(placed(xyz, seen.uv, np.where(known, 0.01, 3.0)), K, guess, SIGMA_PX)
    alone = fit_pose(placed(xyz, seen.uv, np.where(known, 0.01, 3.0)).select(known), K, guess, SIGMA_PX)
    metres, degrees = errors(fit.T_world_camera)
    assert metres < 0.006
    assert degrees < 0.06
    assert degrees < errors(alone.T_world_camera)[1]  # they help
    assert fit.inlier.mean() > 0.95
    assert fit.residual_px < 0.4  # each at its best depth


def test_points_that_slide_along_an_edge_are_outvoted():
    """More than half of the unknown ones agree with one another, and with a wrong step, as points on an edge do."""
    wrong = T_TRUE @ make_T(so3_exp(np.array([0.01, 0.0, 0.0])), np.array([0.0, -0.05, 0.0]))
    seen, _ = landmarks(ahead(200, 1))
    honest, _ = landmarks(ahead(60, 2))
    sliding, _ = landmarks(ahead(100, 3), T=wrong)
    parts = (seen, honest, sliding)
    sigma = np.concatenate([np.full(len(p.uv), s) for p, s in zip(parts, (0.01, 3.0, 3.0), strict=True)])
    both = placed(np.concatenate([p.xyz for p in parts]), np.concatenate([p.uv for p in parts]), sigma)
    metres, degrees = errors(fit_pose(both, K, wrong, SIGMA_PX).T_world_camera)
    assert metres < 0.004
    assert degrees < 0.06


def test_known_points_that_err_together_are_outvoted_by_all():
    """A pattern that repeats was taken for itself a period away: most of the known points agree on a wrong pose."""
    wrong = T_TRUE @ make_T(so3_exp(np.array([0.0, 0.04, 0.0])), np.array([0.12, 0.0, 0.0]))
    aliased, _ = landmarks(wall(400), T=wrong)
    honest, _ = landmarks(ahead(80, 2))
    unknown, _ = landmarks(ahead(400, 3))
    parts = (aliased.select(np.arange(len(aliased.uv)) < 150), honest, unknown)
    sigma = np.concatenate([np.full(len(p.uv), s) for p, s in zip(parts, (0.01, 0.01, 1.0), strict=True)])
    both = placed(np.concatenate([p.xyz for p in parts]), np.concatenate([p.uv for p in parts]), sigma)
    fit = fit_pose(both, K, NEAR, SIGMA_PX)
    metres, degrees = errors(fit.T_world_camera)
    assert metres < 0.01
    assert degrees < 0.1
    assert fit.inlier[150:].mean() > 0.95
    assert fit.inlier[:150].mean() < 0.1


def test_the_fit_that_more_points_agree_with_is_kept(monkeypatch):
    """A sample consensus that is worse than what it should replace changes nothing."""
    seen, _ = landmarks(outliers=0.65)
    fit = fit_pose(seen, K, T_TRUE, SIGMA_PX)
    monkeypatch.setattr(pose, "sample_consensus", lambda *_: make_T(np.eye(3), np.array([50.0, 0.0, 0.0])))
    again = fit_pose(seen, K, T_TRUE, SIGMA_PX)
    assert again.inlier.sum() >= fit.inlier.sum()
    assert errors(again.T_world_camera)[0] < 0.01


def test_fits_are_repeatable_bit_for_bit():
    seen, _ = landmarks(outliers=0.5)
    far = np.eye(4)
    far[:3, 3] = 9.0
    for guess in (NEAR, far):
        first, again = (fit_pose(seen, K, guess, SIGMA_PX) for _ in range(2))
        assert (first.T_world_camera == again.T_world_camera).all()
        assert (first.covariance == again.covariance).all()


@pytest.mark.parametrize("degrees", [0.5, 20.0])
def test_rays_of_a_turned_camera_align(degrees):
    world = around(1500)
    T = turning(2, degrees)
    ids_a, uv_a = world.seen(T[0])
    ids_b, uv_b = world.seen(T[1])
    _, a, b = np.intersect1d(ids_a, ids_b, return_indices=True)
    rng = np.random.default_rng(5)
    wrong = rng.random(len(a)) < 0.3
    uv_b = uv_b[b] + rng.normal(0, 0.2, (len(b), 2))
    uv_b[wrong] = rng.uniform(0, [640, 480], (int(wrong.sum()), 2))
    R, inlier = align_rays(rays(uv_a[a], K), rays(uv_b, K), 0.02)
    assert np.degrees(rotation_angle(R.T @ T[1, :3, :3])) < 0.02
    assert inlier[~wrong].all()
    assert inlier[wrong].mean() < 0.1
