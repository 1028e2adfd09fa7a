"""The backbone as the corridor uses it: windows in, numpy out, with its context and the camera's intrinsics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from spark3r_ros import geometry
from spark3r_ros.backbone import Backbone
from spark3r_ros.config import Config
from spark3r_ros.context import KVContext
from spark3r_ros.frame import Gauge
from spark3r_ros.windows import Keyframe


@dataclass(frozen=True, eq=False)
class Solution:
    """A prediction in numpy; see frame.Prediction. ``same_gauge``: the pass attended to the context of earlier ones."""

    T_window_camera: np.ndarray  # [S, 4, 4]
    K: np.ndarray  # [3, 3] one camera for all frames: known, locked, or the median of what was predicted
    depth: np.ndarray  # [S, h, w] float32
    confidence: np.ndarray  # [S, h, w] float32
    descriptors: np.ndarray  # [S, C]
    gauge: Gauge
    same_gauge: bool


def to_tensor(images: Sequence[np.ndarray], device: torch.device) -> torch.Tensor:
    """RGB images [h, w, 3] uint8 to [S, 3, h, w] in 0..1."""
    stacked = torch.from_numpy(np.stack(images)).to(device)
    return stacked.permute(0, 3, 1, 2).float().div(255)


class Solver:
    """One backbone, one context, one camera. ``K`` [3, 3] in network pixels is None until known or locked."""

    def __init__(self, config: Config, backbone: Backbone, device: torch.device, valid: np.ndarray) -> None:
        self.config = config
        self.backbone = backbone
        self.device = device
        self.valid = valid  # [h, w] bool, False where undistortion left no pixel
        height, width = valid.shape
        self.context: KVContext | None = None
        if config.context.enabled:
            self.context = backbone.new_context(config.context, height, width, config.reduction)
            self.context.reserve(config.window.size)
        self.K: np.ndarray | None = None
        self._guesses: list[np.ndarray] = []

    def solve(self, keyframes: Sequence[Keyframe], previous: Sequence[Keyframe]) -> Solution:
        """One bidirectional pass over a window; its keys stay uncommitted until ``commit``."""
        return self._run([_rgb(k) for k in keyframes], [_rgb(k) for k in previous], self.context)

    def query(self, rgb: np.ndarray, previous: Sequence[Keyframe]) -> Solution:
        """One frame looks at the frozen context and leaves nothing behind."""
        return self._run([rgb], [_rgb(k) for k in previous], self.context)

    def pair(self, first: np.ndarray, second: np.ndarray) -> Solution:
        """Two frames on their own: how frames are tracked without a context."""
        return self._run([first, second], [], None)

    def commit(self, keyframes: Sequence[Keyframe]) -> None:
        """Remember the keyframes of the last ``solve``."""
        if self.context is not None:
            self.context.commit(frames=list(range(len(keyframes))), ids=[k.id for k in keyframes])

    @property
    def has_context(self) -> bool:
        return self.context is not None and not self.context.is_empty

    def can_solve(self, num_keyframes: int) -> bool:
        """Whether the context's budget holds a window of so many keyframes."""
        return self.context is None or self.context.holds(num_keyframes)

    def reset(self) -> None:
        if self.context is not None:
            self.context.reset()

    def learn_intrinsics(self, K: np.ndarray) -> None:
        """Lock the intrinsics once enough windows have said theirs."""
        if self.K is None:
            self._guesses.append(K)
            if len(self._guesses) >= self.config.window.intrinsics_windows:
                self.K = np.median(self._guesses, axis=0)

    def _run(self, images: list[np.ndarray], previous: list[np.ndarray], context: KVContext | None) -> Solution:
        had_context = context is not None and not context.is_empty
        intrinsics = None
        if self.K is not None:
            intrinsics = torch.from_numpy(self.K).to(self.device, torch.float32)
        with torch.inference_mode():
            prediction = self.backbone(
                to_tensor(images, self.device),
                context=context,
                reduction=self.config.reduction if self.config.reduction.enabled else None,
                previous=to_tensor(previous, self.device) if previous else None,
                intrinsics=intrinsics,
            )
        confidence = prediction.confidence.float().cpu().numpy() * self.valid
        K = self.K if self.K is not None else np.median(_numpy(prediction.intrinsics), axis=0)
        return Solution(
            T_window_camera=_rigid(_numpy(prediction.T_world_camera)),
            K=K,
            depth=prediction.depth.float().cpu().numpy(),
            confidence=confidence,
            descriptors=_numpy(prediction.descriptors),
            gauge=prediction.gauge,
            same_gauge=had_context or prediction.gauge is Gauge.METRIC,
        )


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().cpu().numpy()


def _rigid(T: np.ndarray) -> np.ndarray:
    """Single precision rotations are not quite rotations, and chains of them less and less."""
    return geometry.make_T(geometry.project_to_so3(T[..., :3, :3]), T[..., :3, 3])


def _rgb(keyframe: Keyframe) -> np.ndarray:
    assert keyframe.rgb is not None, f"keyframe {keyframe.id} has left the window"
    return keyframe.rgb
