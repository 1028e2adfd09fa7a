import numpy as np
import pytest

from spark3r_ros import geometry as g


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def random_T(rng: np.random.Generator, n: int) -> np.ndarray:
    return g.make_T(g.so3_exp(rng.normal(size=(n, 3))), rng.normal(size=(n, 3)))


def test_so3_log_inverts_exp_up_to_nearly_pi(rng):
    axes = rng.normal(size=(200, 3))
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    angles = np.concatenate([np.linspace(0, 1e-6, 20), rng.uniform(0, np.pi - 1e-6, 180)])
    w = axes * angles[:, None]
    np.testing.assert_allclose(g.so3_log(g.so3_exp(w)), w, atol=1e-7)


def test_quaternions_round_trip_and_agree_with_scipy(rng):
    from scipy.spatial.transform import Rotation

    quat = rng.normal(size=(100, 4))
    R = g.matrix_from_quat_xyzw(quat)
    np.testing.assert_allclose(R, Rotation.from_quat(quat).as_matrix(), atol=1e-12)
    np.testing.assert_allclose(g.matrix_from_quat_xyzw(g.quat_xyzw_from_matrix(R)), R, atol=1e-12)


def test_inverse_of_similarities(rng):
    S = random_T(rng, 10)
    S[:, :3, :3] *= rng.uniform(0.1, 5, 10)[:, None, None]
    np.testing.assert_allclose(g.inverse(S) @ S, np.broadcast_to(np.eye(4), (10, 4, 4)), atol=1e-12)


def test_umeyama_recovers_a_similarity(rng):
    S = g.similarity(2.5, random_T(rng, 1)[0])
    points = rng.normal(size=(50, 3))
    np.testing.assert_allclose(g.umeyama(points, g.transform(S, points)), S, atol=1e-10)


def test_unproject_inverts_project(rng):
    K = np.array([[100.0, 0, 31.5], [0, 90, 23.5], [0, 0, 1]])
    depth = rng.uniform(1, 5, (48, 64))
    pixels = g.project(g.unproject(depth, K), K)
    expected = np.stack(np.meshgrid(np.arange(64), np.arange(48)), axis=-1)
    np.testing.assert_allclose(pixels, expected, atol=1e-9)


def test_chordal_mean_of_symmetric_rotations_is_identity():
    w = np.array([[0.3, 0, 0], [-0.3, 0, 0]])
    np.testing.assert_allclose(g.project_to_so3(g.so3_exp(w).sum(axis=0)), np.eye(3), atol=1e-12)


def test_pose_moved_by_similarity_stays_rigid(rng):
    S = g.similarity(3.0, random_T(rng, 1)[0])
    T = random_T(rng, 4)
    moved = g.apply_similarity_to_pose(S, T)
    np.testing.assert_allclose(np.linalg.det(moved[:, :3, :3]), 1.0)
    np.testing.assert_allclose(moved[:, :3, 3], g.transform(S, T[:, :3, 3]), atol=1e-12)
