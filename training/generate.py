"""Generate training data: short image sequences with wide camera motion, exact depth, poses and K, in shards.

    python -m training.generate --data DIR --shards 40            # sequences of shard 0, 1, ... that are missing
    python -m training.generate --data DIR --split held-out --shards 2

A shard is a folder of memory-mappable arrays; its content depends on (split, index) only. Photo textures are for
training alone: no held-out scene shows a picture that was trained on.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from spark3r_ros.backbone.motion import CELL, motion_channels
from spark3r_ros.geometry import inverse, make_T, project, so3_exp, transform, unproject
from training.scenes import Scene
from training.textures import texture_bank

NUM_FRAMES, NUM_FRAMES_LONG = 8, 24
SIZES = ((144, 192), (144, 192), (144, 192), (120, 216), (192, 144), (168, 168))  # of shards in turn, all / 24
OVERSAMPLING = 1.5
SPLITS = {"train": 0, "held-out": 1, "tame": 2, "long": 3, "held-out-long": 4}
RGB_STEP = 2  # stored images are this much smaller than those that flow is computed on
TRAINED = ("train", "long")
MIN_OVERLAP = 0.3  # share of a frame that must be seen by its neighbour
MIN_RELIEF = 0.2  # standard deviation of log depth at the start ...
FLAT_SHARE = 0.2  # ... except in this share of the sequences
DEFAULT_DATA = Path.home() / ".cache" / "spark3r_ros" / "training" / "data"
KINDS = ("handheld", "orbit", "forward", "lateral", "rotation", "jitter", "drive")
KIND_SHARES = (0.32, 0.15, 0.12, 0.15, 0.08, 0.1, 0.08)


@dataclass(frozen=True, eq=False)
class Sequence:
    """One training sample, S frames; images are H x W, stored at H/2 x W/2, depth at H/4 x W/4."""

    rgb: np.ndarray  # [S, H/2, W/2, 3] uint8
    motion: np.ndarray  # [S, 6, H/4, W/4] float16, see spark3r_ros.backbone.motion
    depth: np.ndarray  # [S, H/4, W/4] float16 metres at the cells' centres
    T_world_camera: np.ndarray  # [S, 4, 4] float32
    K: np.ndarray  # [3, 3] float32, pixels of H x W


def length(split: str) -> int:
    """Frames of every sequence of a split."""
    return NUM_FRAMES_LONG if split.endswith("long") else NUM_FRAMES


def sample_motion(
    rng: np.random.Generator, T_start: np.ndarray, distance: float, num_frames: int, tame: bool
) -> np.ndarray:
    """Poses [num_frames, 4, 4] of a random kind of motion from T_start, ``distance`` being a typical depth ahead."""
    kind = rng.choice(KINDS, p=KIND_SHARES)
    top = 3.0 if tame else (30.0 if rng.random() < 0.12 else 12.0)
    turn = np.radians(np.exp(rng.uniform(np.log(0.2), np.log(top))))  # per frame
    step = distance * np.exp(rng.uniform(np.log(0.006), np.log(0.06 if tame else 0.22)))
    axis = _unit(rng.normal(0, [1.0, 1.3, 0.35]))  # camera axes: mostly pitch and yaw
    heading = _unit(rng.normal(0, [1.0, 0.7, 0.6]))
    unsteady = rng.uniform(0.0, 0.8)
    shake = np.radians(rng.choice([0.0, 0.3, 1.0 if tame else 3.0])) * rng.random()
    if kind == "rotation":
        step *= rng.choice([0.0, 0.05])
    elif kind == "forward":
        heading, turn = _unit(np.array([*rng.normal(0, 0.15, 2), rng.choice([1.0, 1.0, -1.0])])), turn * 0.3
    elif kind == "lateral":
        heading, turn = _unit(np.array([*rng.normal(0, 1, 2), rng.normal(0, 0.1)])), turn * 0.2
    elif kind == "jitter":
        unsteady = 2.5
    elif kind == "drive":
        heading, axis = np.array([0, 0, 1.0]), _unit(np.array([0.05, 1.0, 0.02]) * rng.choice([-1, 1]))
    poses, drift_w, drift_t = [T_start], np.zeros(3), np.zeros(3)
    for _ in range(num_frames - 1):
        drift_w = 0.6 * drift_w + unsteady * turn * rng.normal(0, 0.5, 3)
        drift_t = 0.6 * drift_t + unsteady * step * rng.normal(0, 0.5, 3)
        if kind == "orbit":  # about a point ahead
            R = so3_exp(turn * axis + drift_w * 0.3)
            ahead = np.array([0, 0, distance])
            T_step = make_T(R, ahead - R @ ahead + 0.3 * drift_t)
        else:
            T_step = make_T(so3_exp(turn * axis + drift_w), step * heading + drift_t)
        poses.append(poses[-1] @ T_step)
    shakes = so3_exp(shake * rng.normal(0, 1, (num_frames, 3)))
    return np.stack(poses) @ make_T(shakes, np.zeros((num_frames, 3)))


def sample_start(rng: np.random.Generator, scene: Scene, tame: bool) -> np.ndarray:
    """A free camera pose that looks mostly level; any roll in a quarter of the cases."""
    while True:
        position = rng.uniform(-0.9, 0.9, 3) * scene.room_half_size
        if scene.clearance(position[None])[0] > 0.25:
            break
    azimuth, elevation = rng.uniform(-np.pi, np.pi), np.radians(rng.normal(-8, 18))
    forward = np.array([np.cos(azimuth), np.sin(azimuth), np.tan(elevation)])
    forward /= np.linalg.norm(forward)
    right = _unit(np.cross(forward, [0, 0, 1.0]))
    roll = rng.uniform(-np.pi, np.pi) if rng.random() < 0.25 and not tame else np.radians(rng.normal(0, 6))
    return make_T(np.stack([right, np.cross(forward, right), forward], axis=1) @ so3_exp([0, 0, roll]), position)


def sample_camera(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, tuple[float, ...]]:
    """K [3, 3] of height x width pixels and distortion coefficients (none in two thirds of the cases)."""
    fov = rng.uniform(30, 90) if rng.random() < 0.4 else rng.normal(62, 8)
    focal = 0.5 * max(width, height) / np.tan(np.radians(np.clip(fov, 28, 92)) / 2)
    centre = np.array([width - 1, height - 1]) / 2 + rng.normal(0, 0.015, 2) * width
    K = np.array([[focal, 0, centre[0]], [0, focal * np.exp(rng.normal(0, 0.01)), centre[1]], [0, 0, 1]])
    if rng.random() < 0.67:
        return K, ()
    strength = 1.0 if fov < 70 else 0.5
    return K, (rng.uniform(-0.2, 0.1) * strength, rng.uniform(-0.03, 0.06) * strength, 0.0, 0.0)


def overlap(depth: np.ndarray, K: np.ndarray, T_other_this: np.ndarray) -> float:
    """Share of the pixels of a depth image [h, w] that project into the other camera's image."""
    height, width = depth.shape
    points = transform(T_other_this, unproject(depth, K).reshape(-1, 3))
    front = points[points[:, 2] > 0.05]
    uv = project(front, K)
    inside = (uv[:, 0] >= 0) & (uv[:, 0] < width) & (uv[:, 1] >= 0) & (uv[:, 1] < height)
    return float(inside.sum()) / len(points)


def scaled(K: np.ndarray, factor: float) -> np.ndarray:
    """K [3, 3] of an image resized by ``factor`` (pixel centres at integers)."""
    out = K * np.array([[factor, factor, factor], [factor, factor, factor], [1, 1, 1]])
    out[:2, 2] += 0.5 * factor - 0.5
    return out


class Effects:
    """What a real camera does to an image: exposure, tone, vignette, blur, noise, compression; fixed per sequence."""

    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        self.target = rng.uniform(60, 170)
        self.gamma = np.exp(rng.normal(0, 0.2))
        self.white = np.exp(rng.normal(0, 0.08, 3))
        self.drift = rng.choice([0.0, 0.02, 0.1])
        y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
        self.vignette = (1 - rng.choice([0.0, 0.15, 0.4]) * rng.random() * (x**2 + y**2) / 2)[..., None]
        self.blur = rng.choice([0.0, 0.5, 1.0]) * rng.random() + 0.01
        self.shutter = rng.choice([0.0, 0.0, 0.15, 0.5]) * rng.random()  # share of the frame interval
        self.noise = rng.choice([1.0, 4.0, 9.0]) * rng.random()
        self.quality = int(rng.choice([0, 0, 60, 85]))
        self.gain: float | None = None

    def apply(self, rgb: np.ndarray, flow: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The photograph of a rendered image [H, W, 3] while the image moves by ``flow`` [2] pixels per frame."""
        if self.gain is None:
            self.gain = self.target / max(float(rgb.mean()), 8.0)
        image = rgb.astype(np.float32) * (self.gain * self.white * np.exp(rng.normal(0, self.drift))) * self.vignette
        image = 255 * (np.clip(image, 0, 255) / 255) ** self.gamma
        image = cv2.GaussianBlur(image, (0, 0), self.blur)
        length = min(self.shutter * float(np.hypot(*flow)), 12.0)
        if length > 1:
            image = cv2.filter2D(image, -1, _streak(flow, length))
        image += np.float32(self.noise) * rng.standard_normal(image.shape, dtype=np.float32)
        out = np.clip(image, 0, 255).astype(np.uint8)
        if self.quality:
            out = cv2.imdecode(cv2.imencode(".jpg", out, [cv2.IMWRITE_JPEG_QUALITY, self.quality])[1], 1)
        return out


def _streak(direction: np.ndarray, length: float) -> np.ndarray:
    """Kernel [n, n] of a straight motion blur."""
    half = int(np.ceil(length / 2))
    kernel = np.zeros((2 * half + 1, 2 * half + 1), np.float32)
    reach = direction / np.hypot(*direction) * length / 2
    ends = [tuple(int(v) for v in np.round((half + sign * reach) * 16)) for sign in (-1, 1)]
    cv2.line(kernel, ends[0], ends[1], 1.0, 1, cv2.LINE_8, 4)
    return kernel / kernel.sum()


def _unit(v: np.ndarray) -> np.ndarray:
    return v / max(float(np.linalg.norm(v)), 1e-9)


def sample_trajectory(
    rng: np.random.Generator, scene: Scene, K: np.ndarray, height: int, width: int, num_frames: int, tame: bool
) -> np.ndarray:
    """Poses [S, 4, 4] that stay free of walls and whose neighbours overlap."""
    small = (height // 8, width // 8)
    K_small = scaled(K, 1 / 8)
    relief = 0.0 if rng.random() < FLAT_SHARE else MIN_RELIEF
    while True:
        T_start = sample_start(rng, scene, tame)
        depth = scene.render(T_start, K_small, small[1], small[0])[1]
        if np.log(depth).std() < relief:
            continue
        poses = sample_motion(rng, T_start, float(np.median(depth)), num_frames, tame)
        if scene.clearance(poses[:, :3, 3]).min() < 0.1:
            continue
        shares = []
        for i in range(num_frames):
            depth = scene.render(poses[i], K_small, small[1], small[0])[1]
            neighbours = [j for j in (i - 1, i + 1) if 0 <= j < num_frames]
            shares += [overlap(depth, K_small, inverse(poses[j]) @ poses[i]) for j in neighbours]
            if np.median(depth) < 0.25:
                shares.append(0.0)
        if min(shares) > MIN_OVERLAP:
            return poses


def make_sequence(
    seed: list[int], height: int, width: int, textures: np.ndarray, num_frames: int = NUM_FRAMES, tame: bool = False
) -> Sequence:
    """One sequence; the same for the same arguments."""
    rng = np.random.default_rng(seed)
    scene = Scene(int(rng.integers(2**31)), "room" if rng.random() < 0.25 else "clutter", textures)
    K, distortion = sample_camera(rng, height, width)
    poses = sample_trajectory(rng, scene, K, height, width, num_frames, tame)
    effects = Effects(rng, height, width)
    fine = (int(height * OVERSAMPLING), int(width * OVERSAMPLING))
    K_fine = scaled(K, OVERSAMPLING)
    photos, depths = [], []
    for i, pose in enumerate(poses):
        rgb, depth = scene.render(pose, K_fine, fine[1], fine[0], distortion)
        rgb = cv2.resize(rgb, (width, height), interpolation=cv2.INTER_AREA)
        other = poses[max(i - 1, 0)] if i else poses[1]
        photos.append(effects.apply(rgb, _mean_flow(depth, K, inverse(other) @ pose, K_fine), rng))
        middle = (np.arange(height // CELL) * CELL + (CELL - 1) / 2 + 0.5) * OVERSAMPLING - 0.5
        across = (np.arange(width // CELL) * CELL + (CELL - 1) / 2 + 0.5) * OVERSAMPLING - 0.5
        depths.append(depth[np.ix_(middle.astype(int), across.astype(int))])
    motion = motion_channels([cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY) for photo in photos])
    half = (width // RGB_STEP, height // RGB_STEP)
    small = [cv2.resize(photo, half, interpolation=cv2.INTER_AREA) for photo in photos]
    return Sequence(
        np.stack(small), motion.astype(np.float16), np.stack(depths).astype(np.float16),
        poses.astype(np.float32), K.astype(np.float32),
    )  # fmt: skip


def _mean_flow(depth: np.ndarray, K: np.ndarray, T_other_this: np.ndarray, K_fine: np.ndarray) -> np.ndarray:
    """Motion [2] in pixels of the point in the middle of the image."""
    height, width = depth.shape
    ray = np.array([(width / 2 - K_fine[0, 2]) / K_fine[0, 0], (height / 2 - K_fine[1, 2]) / K_fine[1, 1], 1.0])
    point = ray * depth[height // 2, width // 2]
    moved = transform(T_other_this, point[None])[0]
    moved[2] = max(moved[2], 0.05)
    return project(moved, K) - project(point, K)


def write_shard(root: Path, split: str, index: int, count: int) -> Path:
    """Generate one shard of ``count`` sequences; an existing one is left alone."""
    folder = root / split / f"shard_{index:05d}"
    if folder.exists():
        return folder
    height, width = SIZES[index % len(SIZES)]
    textures = texture_bank(96, 1000 * SPLITS[split] + 7919 * (index + 1), photos=split in TRAINED)
    form = (height, width, textures, length(split), split == "tame")
    samples = [make_sequence([SPLITS[split], index, i], *form) for i in range(count)]
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for name in ("rgb", "motion", "depth", "T_world_camera", "K"):
        np.save(scratch / f"{name}.npy", np.stack([getattr(sample, name) for sample in samples]))
    scratch.rename(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="data set folder (default: %(default)s)")
    parser.add_argument("--split", choices=sorted(SPLITS), default="train")
    parser.add_argument("--first", type=int, default=0, help="index of the first shard")
    parser.add_argument("--shards", type=int, default=40, help="number of shards")
    parser.add_argument("--count", type=int, default=256, help="sequences per shard")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    for index in range(args.first, args.first + args.shards):
        start = time.perf_counter()
        folder = write_shard(args.data, args.split, index, args.count)
        print(f"{folder}  {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
