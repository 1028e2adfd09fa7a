"""Results as files that other tools read: TUM trajectories, PLY clouds, a picture, a JSON report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spark3r_ros import geometry
from spark3r_ros.frame import PointBatch
from spark3r_ros.sources import NS_PER_S, parse_stamp

Trajectory = Sequence[tuple[int, np.ndarray]]  # (stamp_ns, T_map_camera [4, 4]) in stamp order

_VERTEX = np.dtype([("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("red", "u1"), ("green", "u1"), ("blue", "u1"),
                    ("confidence", "<f4")])  # fmt: skip
_PLY_TYPES = {"<f4": "float", "|u1": "uchar"}
_PLOTTED_POINTS = 60_000


def write_tum(path: str | Path, trajectory: Trajectory) -> None:
    """One line per pose: ``seconds tx ty tz qx qy qz qw``; stamps with all nine decimals."""
    lines = []
    for stamp_ns, T in trajectory:
        quat_xyzw = geometry.quat_xyzw_from_matrix(T[:3, :3])
        seconds, nanoseconds = divmod(stamp_ns, NS_PER_S)
        numbers = " ".join(f"{value:.9f}" for value in (*T[:3, 3], *quat_xyzw))
        lines.append(f"{seconds}.{nanoseconds:09d} {numbers}\n")
    Path(path).write_text("".join(lines), encoding="utf-8")


def read_tum(path: str | Path) -> list[tuple[int, np.ndarray]]:
    """The poses of a TUM file; ValueError with the line's number when one is not ``stamp`` and seven numbers."""
    trajectory = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            stamp, *values = line.split()
            x, y, z, *quat_xyzw = (float(value) for value in values)
            R = geometry.matrix_from_quat_xyzw(np.array(quat_xyzw).reshape(4))
            trajectory.append((parse_stamp(stamp), geometry.make_T(R, np.array([x, y, z]))))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
    return trajectory


def write_ply(path: str | Path, points: PointBatch) -> None:
    """A binary PLY with position, colour and confidence."""
    vertices = np.empty(len(points.xyz), _VERTEX)
    for axis, name in enumerate("xyz"):
        vertices[name] = points.xyz[:, axis]
    for channel, name in enumerate(("red", "green", "blue")):
        vertices[name] = points.rgb[:, channel]
    vertices["confidence"] = points.confidence
    properties = [f"property {_PLY_TYPES[_VERTEX[name].str]} {name}" for name in _VERTEX.names or ()]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(vertices)}", *properties, "end_header"]
    Path(path).write_bytes("\n".join([*header, ""]).encode() + vertices.tobytes())


def write_json(path: str | Path, report: Mapping[str, Any]) -> None:
    """Numbers that JSON does not know (NaN, infinity) become null."""
    Path(path).write_text(json.dumps(_plain(report), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def path_length(trajectory: Trajectory) -> float:
    """Length of the way between consecutive poses, in the trajectory's unit."""
    if len(trajectory) < 2:
        return 0.0
    positions = np.array([T[:3, 3] for _, T in trajectory])
    return float(np.linalg.norm(np.diff(positions, axis=0), axis=1).sum())


def plot_map(
    path: str | Path,
    trajectory: Trajectory,
    points: PointBatch,
    *,
    title: str = "",
    unit: str = "model units",
    up: str = "-y",
    truth: Trajectory = (),
) -> None:
    """A PNG of map and trajectory, from above and, level, from behind (optical frame) or from the right (ROS).

    Args:
        up: the map's axis that points up: ``-y`` where the map is the first camera's optical frame, ``z`` in ROS.
        truth: a second trajectory in the same frame, drawn below the first.
    """
    from matplotlib.figure import Figure

    # columns of the map frame that are drawn to the right, up seen from above, and up seen level
    right, forward, height, level = {"-y": (0, 2, 1, "from behind"), "z": (0, 1, 2, "from the side")}[up]
    chosen = np.linspace(0, len(points.xyz) - 1, min(len(points.xyz), _PLOTTED_POINTS)).astype(int)
    xyz, rgb = points.xyz[chosen], points.rgb[chosen] / 255
    paths = [(truth, "k--", "truth"), (trajectory, "r-", "camera")]

    figure = Figure(figsize=(12, 6), layout="constrained")
    figure.suptitle(title)
    for axes, vertical, name in zip(figure.subplots(1, 2), (forward, height), ("from above", level)):
        columns = [right, vertical]
        axes.scatter(*xyz[:, columns].T, c=rgb, s=0.6, linewidths=0, rasterized=True)
        positions = np.array([T[columns, 3] for poses, _, _ in paths for _, T in poses]).reshape(-1, 2)
        for poses, style, label in paths:
            if len(poses):
                axes.plot(*np.array([T[columns, 3] for _, T in poses]).T, style, lw=1.5, label=label)
        _set_limits(axes, xyz[:, columns], positions)
        axes.set(title=name, xlabel=f"{'xyz'[right]} [{unit}]", ylabel=f"{'xyz'[vertical]} [{unit}]")
        axes.set_aspect("equal", adjustable="box")
        if vertical == height and up == "-y":
            axes.invert_yaxis()
        if len(positions):
            axes.legend(loc="upper right")
    figure.savefig(Path(path), dpi=110)


def _set_limits(axes: Any, points: np.ndarray, positions: np.ndarray) -> None:
    """Shows all positions [P, 2] and most points [N, 2]: a few far ones must not blow up the picture."""
    corners = [positions]
    if len(points):
        corners.append(np.percentile(points, [1, 99], axis=0))
    shown = np.concatenate(corners)
    if not len(shown):
        return
    low, high = shown.min(axis=0), shown.max(axis=0)
    margin = 0.05 * np.maximum(high - low, 1e-3)
    axes.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]))
