"""Backbones: one trunk, several models, their checkpoints. ``load_backbone`` is the way in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from spark3r_ros.backbone.model import Model, ModelSpec
from spark3r_ros.backbone.trunk import PassOptions
from spark3r_ros.config import ContextConfig, ReductionConfig
from spark3r_ros.context import ContextSpec, KVContext
from spark3r_ros.frame import Prediction
from spark3r_ros.preprocess import Resize
from spark3r_ros.reduction import sensitive_layers

__all__ = ["Backbone", "load_backbone"]


RANGE_SLACK = 0.01  # resampling may overshoot a little


class Backbone:
    """A loaded model, ready for inference."""

    def __init__(self, model: Model, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec

    def resize(self, height: int, width: int) -> Resize:
        """The way from a camera image of this size to the network's, and back."""
        return self.spec.resize.plan(height, width)

    def new_context(
        self, config: ContextConfig, height: int, width: int, reduction: ReductionConfig | None = None
    ) -> KVContext:
        """An empty context for images of this network size; ``reduction`` says which layers are sensitive.

        Raises:
            ValueError: a model whose frames never meet; sensitive layers that it does not have.
        """
        if not self.spec.trunk.num_global:
            raise ValueError(f"{self.spec.name} has no attention across frames: it takes no context")
        spec = self._context_spec(height, width, self._sensitive(reduction or ReductionConfig()))
        return KVContext(spec, config, self.device, self._dtype)

    def _context_spec(self, height: int, width: int, sensitive: frozenset[int]) -> ContextSpec:
        patch = self.spec.trunk.patch
        num_patches = (height // patch) * (width // patch)
        return self.spec.trunk.context_spec(num_patches, sensitive, self.spec.camera_tokens)

    def _sensitive(self, config: ReductionConfig) -> frozenset[int]:
        return sensitive_layers(config, self.spec.name, self.spec.trunk.num_global, self.spec.sensitive)

    @property
    def _dtype(self) -> torch.dtype:
        """Of attention, and so of the context: bfloat16 is for GPUs, it is hundreds of times slower on a CPU."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @torch.inference_mode()
    def __call__(
        self,
        images: Tensor,
        *,
        context: KVContext | None = None,
        reduction: ReductionConfig | None = None,
        previous: Tensor | None = None,
        intrinsics: Tensor | None = None,
    ) -> Prediction:
        """Predict cameras and depth for one window.

        Args:
            images: [S, 3, H, W] RGB in [0, 1], sides multiples of the model's patch.
            context: keys and values of earlier windows; this pass's own are appended, the caller commits them or not.
                With an empty context frame 0 is the reference; otherwise the context's gauge holds.
            reduction: Spark3R token reduction; None: dense.
            previous: [<= 2, 3, H, W] the frames right before images[0], oldest first, for models that use motion.
            intrinsics: [3, 3] known K in pixels of the images.

        Raises:
            ValueError: images of a shape, size, type or range that the model does not accept; intrinsics not [3, 3].
        """
        self._check(images)
        if intrinsics is not None and intrinsics.shape != (3, 3):
            raise ValueError(f"intrinsics must be [3, 3], got {list(intrinsics.shape)}")
        images = images.to(self.device, torch.float32)
        motion = self.model.motion(images, previous)
        known = None if intrinsics is None else intrinsics.to(self.device, torch.float32).expand(1, len(images), 3, 3)
        height, width = images.shape[-2:]
        if context is not None and context.spec != self._context_spec(height, width, context.spec.sensitive):
            raise ValueError(f"the context is not one of {self.spec.name} at {width}x{height}: make a new one")
        first = context is None or context.is_empty
        if context is not None:
            context.begin(len(images))
        sensitive = frozenset() if reduction is None else self._sensitive(reduction)
        options = PassOptions(first, reduction, sensitive, context)
        with torch.autocast(self.device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
            out = self.model(images[None], options, motion=None if motion is None else motion[None], intrinsics=known)
        return Prediction(
            T_world_camera=out.T_world_camera[0],
            intrinsics=out.intrinsics[0] if known is None else known[0],
            depth=out.depth[0],
            confidence=out.confidence[0].sigmoid(),
            gauge=self.spec.gauge,
            descriptors=out.descriptors[0],
        )

    def _check(self, images: Tensor) -> None:
        patch = self.spec.trunk.patch
        if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
            raise ValueError(f"images must be [S, 3, H, W] with S >= 1, got {tuple(images.shape)}")
        height, width = images.shape[-2:]
        if height % patch or width % patch or not height or not width:
            near = self.resize(height or patch, width or patch).size
            raise ValueError(
                f"{self.spec.name} takes sides that are multiples of {patch}, got {width}x{height}; "
                f"resize to {near[1]}x{near[0]} (backbone.resize)"
            )
        if not images.is_floating_point():
            raise ValueError(f"images must be floating point in [0, 1], got {images.dtype}; divide bytes by 255")
        low, high = (float(value) for value in images.aminmax())
        if not (low > -RANGE_SLACK and high < 1 + RANGE_SLACK):  # also false for NaN
            raise ValueError(f"images must be in [0, 1], got {low:g} to {high:g}")


def load_backbone(
    name: str, checkpoint: str | Path | Mapping[str, Tensor] | None = None, device: torch.device | str = "cpu"
) -> Backbone:
    """A model with its weights, ready on ``device``.

    Args:
        name: one of ``registry.MODELS``, or the path of a weights file of any of them.
        checkpoint: a file or its tensors; None: from the cache folder (nano: from this package).
        device: where it runs; nothing else changes between CPU and CUDA.

    Raises:
        ValueError: unknown name, a GPU that is not there; ``CheckpointError`` (a ValueError) for weights that are
            missing, damaged or of another model, with the remedy.
    """
    from spark3r_ros.backbone.registry import load_model  # registry knows all families, they know Backbone's parts

    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device} was asked for, but torch {torch.__version__} finds no GPU; use cpu or auto")
    return Backbone(load_model(name, checkpoint), device)
