"""Long smooth camera paths with exact poses, for demo and benchmarks; training motion is drawn in ``generate``."""

from __future__ import annotations

import numpy as np

from spark3r_ros.geometry import make_T, so3_exp
from training.scenes import CIRCUIT_HALF_SIZE

PATH_KINDS = ("orbit", "handheld", "forward", "rotation", "circuit")


def look_at(position: np.ndarray, target: np.ndarray, roll: float = 0.0) -> np.ndarray:
    """T_world_camera [4, 4] at ``position`` that looks at ``target``, world z up, rolled about the viewing axis."""
    forward = np.asarray(target, float) - position
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, [0, 0, 1.0])
    right /= max(float(np.linalg.norm(right)), 1e-9)
    R = np.stack([right, np.cross(forward, right), forward], axis=1)
    return make_T(R @ so3_exp(np.array([0, 0, roll])), np.asarray(position, float))


def camera_path(kind: str, num_frames: int, seed: int, loops: float = 1.0) -> np.ndarray:
    """T_world_camera [num_frames, 4, 4] at even times.

    ``orbit``, ``handheld``, ``forward`` and ``rotation`` fit the layout ``room``, ``circuit`` fits ``hall``. ``loops``:
    rounds of an orbit or a circuit. A path depends on (kind, num_frames, seed, loops) only.
    """
    if kind not in PATH_KINDS:
        raise ValueError(f"path kind must be one of {', '.join(PATH_KINDS)}, got {kind!r}")
    rng = np.random.default_rng([seed, 23])
    phase = np.linspace(0, 1, num_frames, endpoint=False)  # a whole number of loops closes without a repeated frame
    sway = _sway(rng, phase, max(1.0, num_frames / 60))  # [N, 6] about one, slow
    maker = {"orbit": _orbit, "handheld": _handheld, "forward": _forward, "rotation": _rotation, "circuit": _circuit}
    positions, targets, rolls = maker[kind](rng, phase * loops, sway)
    return np.stack([look_at(p, t, r) for p, t, r in zip(positions, targets, rolls)])


def _sway(rng: np.random.Generator, phase: np.ndarray, cycles: float) -> np.ndarray:
    """Six smooth random signals [N, 6] of standard deviation one that are periodic over the path."""
    signals = np.zeros((len(phase), 6))
    for share in (0.35, 0.7, 1.0):
        rounds = np.maximum(1, np.round(cycles * share * rng.uniform(0.6, 1.2, 6)))
        signals += np.sin(2 * np.pi * (phase[:, None] * rounds + rng.random(6)))
    return signals / np.sqrt(1.5)


def _orbit(rng: np.random.Generator, turns: np.ndarray, sway: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    angle = 2 * np.pi * (turns + rng.random())
    radius = 1.95 + 0.06 * sway[:, 0]
    position = np.stack([radius * np.cos(angle), radius * np.sin(angle), 0.1 + 0.1 * sway[:, 1]], axis=1)
    return position, 0.15 * sway[:, 2:5] - np.array([0, 0, 0.4]), 0.04 * sway[:, 5]


def _handheld(
    rng: np.random.Generator, turns: np.ndarray, sway: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    angle = 2 * np.pi * rng.random()
    centre = 1.9 * np.array([np.cos(angle), np.sin(angle), 0.0])
    position = centre + np.array([0.16, 0.16, 0.12]) * sway[:, :3]
    target = 0.35 * np.stack([sway[:, 3], sway[:, 4], sway[:, 5]], axis=1) - np.array([0, 0, 0.3])
    return position, target, 0.06 * sway[:, 0]


def _forward(
    rng: np.random.Generator, turns: np.ndarray, sway: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    side = rng.choice([-1.0, 1.0])
    along = 2.2 * np.sin(2 * np.pi * (turns / 2 - 0.25))  # there and, with two loops, back
    position = np.stack([along, np.full_like(along, 1.9 * side), 0.05 * sway[:, 0]], axis=1)
    target = np.stack([np.full_like(along, 4.0), 0.9 * side + 0.3 * sway[:, 1], 0.2 * sway[:, 2]], axis=1)
    return position, target, 0.03 * sway[:, 3]


def _rotation(
    rng: np.random.Generator, turns: np.ndarray, sway: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    yaw, start = 2 * np.pi * (turns + rng.random()), 2 * np.pi * rng.random()
    position = np.tile(1.9 * np.array([np.cos(start), np.sin(start), 0.0]), (len(turns), 1))
    direction = np.stack([np.cos(yaw), np.sin(yaw), 0.08 * sway[:, 0] - 0.1], axis=1)
    return position, position + direction, 0.03 * sway[:, 1]


def _circuit(
    rng: np.random.Generator, turns: np.ndarray, sway: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    a, b = CIRCUIT_HALF_SIZE
    lane = 2 * np.pi * (turns + rng.random())

    def superellipse(angle: np.ndarray) -> np.ndarray:
        c, s = np.cos(angle), np.sin(angle)
        return np.stack([a * np.sign(c) * np.abs(c) ** 0.6, b * np.sign(s) * np.abs(s) ** 0.6], axis=1)

    table = np.linspace(0, 2 * np.pi, 4001)
    length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(superellipse(table), axis=0), axis=1))])
    even = np.interp((lane / (2 * np.pi) % 1) * length[-1], length, table)  # even speed
    ahead = np.interp(((lane / (2 * np.pi) + 0.09) % 1) * length[-1], length, table)
    position = np.concatenate([superellipse(even), 0.06 * sway[:, :1]], axis=1)
    position[:, :2] += 0.08 * sway[:, 1:3]
    outwards = 0.25 + 0.12 * sway[:, 3:4]
    target = np.concatenate([superellipse(ahead) * (1 + outwards), 0.25 * sway[:, 4:5] - 0.15], axis=1)
    return position, target, 0.03 * sway[:, 5]
