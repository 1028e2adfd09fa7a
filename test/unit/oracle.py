"""A rendered stream with exact ground truth, and a backbone that knows it: what the network would ideally say.

``Oracle`` answers like a backbone of each gauge, with settable errors, so that alignment, windows, loops and scale can
be tested without any network. It recognises frames by their pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch

from spark3r_ros import geometry
from spark3r_ros.frame import CameraModel, Frame, Gauge, Prediction
from spark3r_ros.preprocess import Resize
from training.paths import camera_path
from training.scenes import Scene, camera_matrix

SMALL, LARGE = (160, 120), (320, 240)  # width and height of images


@dataclass(frozen=True, eq=False)
class Stream:
    """Frames in order with their ground truth."""

    frames: list[Frame]
    T_world_camera: np.ndarray  # [N, 4, 4] metres
    depth: np.ndarray  # [N, H, W] metres
    K: np.ndarray  # [3, 3]


def render(
    poses: np.ndarray,
    seed: int = 3,
    layout: str = "room",
    fps: float = 10.0,
    camera: bool = True,
    size: tuple[int, int] = SMALL,
) -> Stream:
    """Render a stream along T_world_camera [N, 4, 4]."""
    scene = Scene(seed, layout)
    K = camera_matrix(*size, 65.0)
    model = CameraModel(*size, K) if camera else None
    frames, depths = [], []
    for i, T in enumerate(poses):
        rgb, depth = scene.render(T, K, *size)
        frames.append(Frame(round(i / fps * 1e9), rgb, "camera", model))
        depths.append(depth)
    return Stream(frames, np.asarray(poses), np.stack(depths), K)


def orbit(num_frames: int, seed: int = 3, loops: float = 0.1, **options) -> Stream:
    return render(camera_path("orbit", num_frames, seed, loops), seed, **options)


class OracleContext:
    """Remembers that there is a context, nothing else."""

    bytes, budget_bytes = 1000, 2000

    def __init__(self) -> None:
        self.frame_ids: tuple[int, ...] = ()
        self.gauge: np.ndarray | None = None
        self.pending: np.ndarray | None = None

    @property
    def is_empty(self) -> bool:
        return not self.frame_ids

    @property
    def num_frames(self) -> int:
        return len(self.frame_ids)

    def holds(self, num_frames: int) -> bool:
        return True

    def reserve(self, num_frames: int) -> None:
        pass

    def commit(self, frames, ids):
        self.frame_ids = tuple(ids)
        self.gauge = self.pending
        return self.frame_ids

    def reset(self) -> None:
        self.frame_ids, self.gauge = (), None


class Oracle:
    """Ground truth as a backbone.

    Every pass without a context has its own gauge: first camera at the origin and a random scale; with one, the gauge
    is the context's and only ``scale_noise`` disturbs it.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        scale_noise: float = 0.0,
        pose_noise: float = 0.0,
        depth_noise: float = 0.0,
        gauge: Gauge = Gauge.ANCHORED,
        first_scale: float = 0.5,
        confidence: float = 0.9,
        query_scale: float = 1.0,
    ) -> None:
        self.stream, self.gauge = stream, gauge
        self.scale_noise, self.pose_noise, self.depth_noise = scale_noise, pose_noise, depth_noise
        self.first_scale, self.confidence = first_scale, confidence
        self.query_scale = query_scale  # of single frames over that of the windows that made their context
        self.index = {f.image.tobytes(): i for i, f in enumerate(stream.frames)}
        self.passes: list[int] = []  # frames per pass
        self.rng = np.random.default_rng(0)
        self.spec = SimpleNamespace(name="oracle")
        self.broken: set[int] = set()  # windows (by number of multi-frame pass) that answer nonsense

    def resize(self, height: int, width: int) -> Resize:
        return Resize((0, 0, height, width), (height, width))

    def new_context(self, config, height: int, width: int, reduction) -> OracleContext:
        return OracleContext()

    def __call__(self, images, *, context=None, reduction=None, previous=None, intrinsics=None) -> Prediction:
        rows = [self.index[self._key(image)] for image in images]
        self.passes.append(len(rows))
        T, depth = self.stream.T_world_camera[rows].copy(), self.stream.depth[rows].copy()
        if context is None or context.is_empty:
            gauge = geometry.similarity(self._scale(), geometry.inverse(T[0]))
            gauge[:3, 3] *= geometry.scale_of(gauge)
        else:
            gauge = geometry.similarity(np.exp(self.rng.normal(0, self.scale_noise)), np.eye(4)) @ context.gauge
            if len(rows) == 1:
                gauge = geometry.similarity(self.query_scale, np.eye(4)) @ gauge
        if context is not None:
            context.pending = gauge if context.is_empty else context.gauge
        T = geometry.apply_similarity_to_pose(gauge, T)
        noise = np.concatenate([self.rng.normal(0, self.pose_noise, (len(T), 6))], axis=1)
        T = T @ geometry.se3_exp(noise)
        depth = depth * geometry.scale_of(gauge) * np.exp(self.rng.normal(0, self.depth_noise, depth.shape))
        if sum(n > 2 for n in self.passes) - 1 in self.broken and len(rows) > 2:
            depth = np.exp(self.rng.normal(0, 1.0, depth.shape))
            T = T @ geometry.se3_exp(self.rng.normal(0, 0.5, (len(T), 6)))
        return Prediction(
            T_world_camera=torch.from_numpy(T).float(),
            intrinsics=torch.from_numpy(self.stream.K).float().expand(len(rows), 3, 3),
            depth=torch.from_numpy(depth).float(),
            confidence=torch.full(depth.shape, self.confidence),
            gauge=self.gauge,
            descriptors=self._descriptors(images),
        )

    def _scale(self) -> float:
        if self.gauge is Gauge.METRIC:
            return 1.0
        return self.first_scale if self.gauge is Gauge.ANCHORED else float(np.exp(self.rng.normal(0, 0.5)))

    @staticmethod
    def _key(image: torch.Tensor) -> bytes:
        return (image.permute(1, 2, 0) * 255).round().byte().numpy().tobytes()

    @staticmethod
    def _descriptors(images: torch.Tensor) -> torch.Tensor:
        """Tiny images, centred and of unit length: the same place from the same side looks alike."""
        small = torch.nn.functional.adaptive_avg_pool2d(images, (6, 8)).flatten(1)
        small = small - small.mean(dim=1, keepdim=True)
        return torch.nn.functional.normalize(small, dim=1)


def ate(estimated: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """RMSE of positions [N, 3] after Sim(3) alignment, and the scale that was needed."""
    S = geometry.umeyama(estimated, truth)
    error = geometry.transform(S, estimated) - truth
    return float(np.sqrt(np.mean(np.sum(error**2, axis=1)))), float(geometry.scale_of(S))
