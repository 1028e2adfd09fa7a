"""Points of the scene by track number, and their first depth."""

from __future__ import annotations

import numpy as np

from spark3r_ros.geometry import transform
from spark3r_ros.refine.pose import Landmarks


def among(ids: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which of the numbers [N] are ``known`` [K], ascending. [N] bool; several times as fast as numpy's ``isin``."""
    if len(known) == 0:
        return np.zeros(len(ids), bool)
    return np.asarray(known[np.searchsorted(known, ids).clip(0, len(known) - 1)] == ids)


class LandmarkTable:
    """Columns sorted by track number; rows come and go, numbers never change."""

    def __init__(self) -> None:
        self.ids = np.zeros(0, np.int64)
        self.xyz = np.zeros((0, 3))  # world
        self.depth_sigma = np.zeros(0)  # relative standard deviation of the depth at the anchor
        self.anchor = np.zeros(0, np.int64)  # keyframe id
        self.origin = np.zeros((0, 3))  # world position of the anchor when the point was solved

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows [N] of track numbers [N] (valid where found) and whether each was found [N]."""
        if len(self.ids) == 0:
            return np.zeros(len(ids), int), np.zeros(len(ids), bool)
        rows = np.searchsorted(self.ids, ids).clip(0, len(self.ids) - 1)
        return rows, self.ids[rows] == ids

    def put(
        self, ids: np.ndarray, xyz: np.ndarray, depth_sigma: np.ndarray, anchor: np.ndarray, origin: np.ndarray
    ) -> None:
        """Insert or overwrite rows of ascending numbers."""
        keep = ~among(self.ids, ids)
        order = np.argsort(np.concatenate([self.ids[keep], ids]), kind="stable")
        self.ids = np.concatenate([self.ids[keep], ids])[order]
        self.xyz = np.concatenate([self.xyz[keep], xyz])[order]
        self.depth_sigma = np.concatenate([self.depth_sigma[keep], depth_sigma])[order]
        self.anchor = np.concatenate([self.anchor[keep], anchor])[order]
        self.origin = np.concatenate([self.origin[keep], origin])[order]

    def drop(self, ids: np.ndarray) -> None:
        self.select(~among(self.ids, ids))

    def select(self, keep: np.ndarray) -> None:
        """Keep the rows where ``keep`` [N] bool."""
        self.ids, self.xyz, self.depth_sigma = self.ids[keep], self.xyz[keep], self.depth_sigma[keep]
        self.anchor, self.origin = self.anchor[keep], self.origin[keep]

    def move(self, which: np.ndarray, T: np.ndarray) -> None:
        """Move the rows ``which`` [N] bool by the rigid T [4, 4]."""
        self.xyz[which] = transform(T, self.xyz[which])
        self.origin[which] = transform(T, self.origin[which])

    def landmarks(self, rows: np.ndarray, uv: np.ndarray) -> Landmarks:
        """The rows [N] with the undistorted pixels [N, 2] where a frame sees them."""
        return Landmarks(self.xyz[rows], self.xyz[rows] - self.origin[rows], self.depth_sigma[rows], uv)


def first_inverse_depth(
    T_world_camera: np.ndarray,
    xy: np.ndarray,
    camera: np.ndarray,
    point: np.ndarray,
    anchor_camera: np.ndarray,
    anchor_xy: np.ndarray,
    prior: np.ndarray,
    prior_information: np.ndarray,
    floor: float = 0.1,
) -> tuple[np.ndarray, np.ndarray]:
    """Inverse depth [P] of points at their anchors by linear least squares, and the information [P] it rests on.

    xy [M, 2]: normalised (z = 1) observations, camera [M] and point [M] their indices; anchor_camera [P],
    anchor_xy [P, 2]; ``prior`` [P] with its information [P] in units of one observation's (z = 1) variance. Never below
    ``floor`` times the prior: points that come out behind the camera are left to the adjustment's gates.
    """
    R, t = T_world_camera[:, :3, :3], T_world_camera[:, :3, 3]
    rays = np.concatenate([anchor_xy, np.ones((len(anchor_xy), 1))], axis=1)
    direction = np.einsum("pij,pj->pi", R[anchor_camera], rays)
    a = np.einsum("mji,mj->mi", R[camera], direction[point])
    b = np.einsum("mji,mj->mi", R[camera], t[anchor_camera][point] - t[camera])
    inv_z = 1.0 / np.maximum(np.abs(a[:, 2:]), 0.1)
    slope = (b[:, :2] - xy * b[:, 2:]) * inv_z
    value = (xy * a[:, 2:] - a[:, :2]) * inv_z
    count = len(prior)
    information = np.bincount(point, (slope**2).sum(axis=1), count) + prior_information
    moment = np.bincount(point, (slope * value).sum(axis=1), count) + prior_information * prior
    return np.maximum(moment / information, floor * prior), information
