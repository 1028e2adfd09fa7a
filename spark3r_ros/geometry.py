"""SE(3), Sim(3) and projection: pure functions on numpy arrays, float64.

``T`` is a rigid 4x4 matrix; a similarity is a 4x4 matrix whose upper left block is ``s * R``.
"""

from __future__ import annotations

import numpy as np


def make_T(R: np.ndarray, t: np.ndarray) -> np.ndarray:
    """[..., 3, 3] rotation and [..., 3] translation to [..., 4, 4]."""
    T = np.zeros((*np.shape(R)[:-2], 4, 4))
    T[..., :3, :3] = R
    T[..., :3, 3] = t
    T[..., 3, 3] = 1.0
    return T


def inverse(T: np.ndarray) -> np.ndarray:
    """Inverse of rigid transforms or similarities [..., 4, 4]."""
    scale_sq = np.sum(T[..., :3, 0] ** 2, axis=-1)[..., None, None]
    R_inv = np.swapaxes(T[..., :3, :3], -1, -2) / scale_sq
    return make_T(R_inv, -(R_inv @ T[..., :3, 3:])[..., 0])


def transform(T: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Apply T [..., 4, 4] to points [..., N, 3]."""
    return points @ np.swapaxes(T[..., :3, :3], -1, -2) + T[..., None, :3, 3]


def scale_of(S: np.ndarray) -> np.ndarray:
    """Scale of similarities [..., 4, 4]."""
    return np.cbrt(np.linalg.det(S[..., :3, :3]))


def similarity(scale: float, T: np.ndarray) -> np.ndarray:
    """Similarity that scales first and then applies the rigid T [4, 4]."""
    S = np.array(T, dtype=float)
    S[:3, :3] *= scale
    return S


def apply_similarity_to_pose(S: np.ndarray, T_world_camera: np.ndarray) -> np.ndarray:
    """Poses [..., 4, 4] in a world moved by the similarity S [4, 4]; the result is rigid."""
    moved = S @ T_world_camera
    moved[..., :3, :3] /= scale_of(S)
    return moved


def so3_exp(w: np.ndarray) -> np.ndarray:
    """Rotation vectors [..., 3] in radians to matrices [..., 3, 3] (Rodrigues)."""
    w = np.asarray(w, dtype=float)
    theta = np.linalg.norm(w, axis=-1)[..., None, None]
    K = hat(w)
    small = theta < 1e-8
    safe = np.where(small, 1.0, theta)
    a = np.where(small, 1.0 - theta**2 / 6, np.sin(safe) / safe)
    b = np.where(small, 0.5 - theta**2 / 24, (1 - np.cos(safe)) / safe**2)
    return np.eye(3) + a * K + b * (K @ K)


def so3_log(R: np.ndarray) -> np.ndarray:
    """Rotation matrices [..., 3, 3] to rotation vectors [..., 3] in radians."""
    q = quat_xyzw_from_matrix(R)
    q = np.where(q[..., 3:] < 0, -q, q)
    sin_half = np.linalg.norm(q[..., :3], axis=-1, keepdims=True)
    angle = 2 * np.arctan2(sin_half, q[..., 3:])
    return q[..., :3] * np.where(sin_half < 1e-12, 2.0, angle / np.maximum(sin_half, 1e-12))


def hat(w: np.ndarray) -> np.ndarray:
    """[..., 3] to the cross-product matrix [..., 3, 3]."""
    w = np.asarray(w, dtype=float)
    zero = np.zeros_like(w[..., 0])
    rows = [zero, -w[..., 2], w[..., 1], w[..., 2], zero, -w[..., 0], -w[..., 1], w[..., 0], zero]
    return np.stack(rows, axis=-1).reshape(*w.shape[:-1], 3, 3)


def adjoint(T: np.ndarray) -> np.ndarray:
    """[6, 6] that turns a small motion (translation, rotation) in the axes of b into the same in those of a = T_a_b."""
    out = np.zeros((6, 6))
    out[:3, :3] = out[3:, 3:] = T[:3, :3]
    out[:3, 3:] = hat(T[:3, 3]) @ T[:3, :3]
    return out


def se3_exp(xi: np.ndarray) -> np.ndarray:
    """Twists [..., 6] (translation, rotation vector) to [..., 4, 4]; translation is not coupled to rotation."""
    xi = np.asarray(xi, dtype=float)
    return make_T(so3_exp(xi[..., 3:]), xi[..., :3])


def rotation_angle(R: np.ndarray) -> np.ndarray:
    """Angle of rotations [..., 3, 3] in radians."""
    return np.linalg.norm(so3_log(R), axis=-1)


def quat_xyzw_from_matrix(R: np.ndarray) -> np.ndarray:
    """Rotation matrices [..., 3, 3] to unit quaternions [..., 4], x y z w."""
    R = np.asarray(R, dtype=float)
    m = R.reshape(-1, 3, 3)
    trace = np.trace(m, axis1=1, axis2=2)
    diag = np.stack([m[:, 0, 0], m[:, 1, 1], m[:, 2, 2], trace], axis=1)
    best = diag.argmax(axis=1)
    q = np.empty((len(m), 4))
    for case in range(3):
        i, j, k = case, (case + 1) % 3, (case + 2) % 3
        rows = best == case
        mm = m[rows]
        q[rows, i] = 1 + mm[:, i, i] - mm[:, j, j] - mm[:, k, k]
        q[rows, j] = mm[:, j, i] + mm[:, i, j]
        q[rows, k] = mm[:, k, i] + mm[:, i, k]
        q[rows, 3] = mm[:, k, j] - mm[:, j, k]
    rows = best == 3
    mm = m[rows]
    q[rows, 0] = mm[:, 2, 1] - mm[:, 1, 2]
    q[rows, 1] = mm[:, 0, 2] - mm[:, 2, 0]
    q[rows, 2] = mm[:, 1, 0] - mm[:, 0, 1]
    q[rows, 3] = 1 + trace[rows]
    q /= np.linalg.norm(q, axis=1, keepdims=True)
    return q.reshape(*R.shape[:-2], 4)


def matrix_from_quat_xyzw(quat_xyzw: np.ndarray) -> np.ndarray:
    """Quaternions [..., 4], x y z w, of any length > 0, to rotation matrices [..., 3, 3]."""
    q = np.asarray(quat_xyzw, dtype=float)
    x, y, z, w = np.moveaxis(q / np.linalg.norm(q, axis=-1, keepdims=True), -1, 0)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w),
        2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w),
        2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return np.stack(rows, axis=-1).reshape(*q.shape[:-1], 3, 3)


def project_to_so3(M: np.ndarray) -> np.ndarray:
    """Nearest rotation to each [..., 3, 3]; of a sum of rotations: their chordal mean."""
    U, _, Vt = np.linalg.svd(M)
    sign = np.ones((*M.shape[:-2], 3))
    sign[..., 2] = np.linalg.det(U @ Vt)
    return (U * sign[..., None, :]) @ Vt


def interpolate_pose(T0: np.ndarray, T1: np.ndarray, ratio: float | np.ndarray) -> np.ndarray:
    """Poses [..., 4, 4] between T0 (ratio [...] 0) and T1 (1): linear in translation, geodesic in rotation."""
    ratio = np.asarray(ratio)[..., None]
    R0, R1 = T0[..., :3, :3], T1[..., :3, :3]
    R = R0 @ so3_exp(ratio * so3_log(np.swapaxes(R0, -1, -2) @ R1))
    return make_T(R, (1 - ratio) * T0[..., :3, 3] + ratio * T1[..., :3, 3])


def interpolate_similarity(S0: np.ndarray, S1: np.ndarray, ratio: float | np.ndarray) -> np.ndarray:
    """Similarities [..., 4, 4] between S0 and S1: as ``interpolate_pose``, and linear in log scale."""
    s0, s1 = scale_of(S0)[..., None, None], scale_of(S1)[..., None, None]
    T0, T1 = make_T(S0[..., :3, :3] / s0, S0[..., :3, 3]), make_T(S1[..., :3, :3] / s1, S1[..., :3, 3])
    S = interpolate_pose(T0, T1, ratio)
    ratio = np.asarray(ratio)[..., None, None]
    S[..., :3, :3] *= s0 ** (1 - ratio) * s1**ratio
    return S


def umeyama(source: np.ndarray, target: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Weighted least-squares similarity [4, 4] from points [N, 3] to points [N, 3] (Umeyama 1991, trace form)."""
    w = np.ones(len(source)) if weights is None else np.asarray(weights, dtype=float)
    w = w / w.sum()
    mean_s, mean_t = w @ source, w @ target
    s, t = source - mean_s, target - mean_t
    U, d, Vt = np.linalg.svd((t * w[:, None]).T @ s)
    sign = np.array([1.0, 1.0, np.sign(np.linalg.det(U @ Vt))])
    R = (U * sign) @ Vt
    scale = (d * sign).sum() / max(float(w @ (s**2).sum(axis=1)), 1e-300)
    return make_T(scale * R, mean_t - scale * R @ mean_s)


def unproject(depth: np.ndarray, K: np.ndarray) -> np.ndarray:
    """z-depth [H, W] and K [3, 3] to points in the camera frame [H, W, 3]; pixel centres at integers."""
    height, width = depth.shape
    x = (np.arange(width) - K[0, 2]) / K[0, 0]
    y = (np.arange(height) - K[1, 2]) / K[1, 1]
    return np.stack([depth * x[None, :], depth * y[:, None], depth], axis=-1)


def project(points: np.ndarray, K: np.ndarray) -> np.ndarray:
    """Points in the camera frame [..., 3] to pixels [..., 2]; the caller keeps z > 0."""
    return points[..., :2] / points[..., 2:] * np.array([K[0, 0], K[1, 1]]) + np.array([K[0, 2], K[1, 2]])
