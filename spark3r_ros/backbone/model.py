"""What every model of the family is: images in, cameras and depth out, trainable, with a batch dimension."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from spark3r_ros.backbone.trunk import DENSE, PassOptions, TrunkSpec
from spark3r_ros.frame import Gauge
from spark3r_ros.preprocess import ResizeRule


@dataclass(frozen=True)
class ModelSpec:
    """One model of the family: its trunk and what the rest of the package must know about it."""

    name: str
    trunk: TrunkSpec
    resize: ResizeRule
    gauge: Gauge = Gauge.ANCHORED
    sensitive: frozenset[int] = frozenset()  # global layers that arXiv 2605.06270 found sensitive to reduction
    camera_tokens: int = 0  # tokens per frame of a camera head that mixes frames
    encoder_depth: int = 0  # blocks of the per-frame image encoder before the trunk
    dpt: tuple[tuple[int, ...], int] = ((256, 512, 1024, 1024), 256)  # channels of the four taps, features


@dataclass(frozen=True, eq=False)
class Geometry:
    """A model's batched output; the public ``Prediction`` is made from it."""

    T_world_camera: Tensor  # [B, S, 4, 4]
    intrinsics: Tensor  # [B, S, 3, 3] pixels
    depth: Tensor  # [B, S, H, W]
    confidence: Tensor  # [B, S, H, W] logits
    descriptors: Tensor  # [B, S, C] unit length
    extras: dict[str, Tensor] = field(default_factory=dict)  # a model's own further outputs


class Model(nn.Module):
    """Base of all models. Nothing here switches gradients off; ``Backbone`` does that."""

    pixel_mean: ClassVar[tuple[float, float, float]] = (0.485, 0.456, 0.406)  # ImageNet
    pixel_std: ClassVar[tuple[float, float, float]] = (0.229, 0.224, 0.225)
    _mean: Tensor
    _std: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        # Constants keep their device when a model is built on "meta" to receive a checkpoint's own tensors.
        mean, std = (torch.tensor(v, device="cpu").view(3, 1, 1) for v in (self.pixel_mean, self.pixel_std))
        self.register_buffer("_mean", mean, persistent=False)
        self.register_buffer("_std", std, persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """Images [..., 3, H, W] in [0, 1] to zero mean and unit deviation."""
        return (images - self._mean) / self._std

    def motion(self, images: Tensor, previous: Tensor | None) -> Tensor | None:
        """Further input channels [S, M, H, W] of a window [S, 3, H, W]; ``previous`` are the frames right before it."""
        return None

    def forward(
        self,
        images: Tensor,
        options: PassOptions = DENSE,
        *,
        motion: Tensor | None = None,
        intrinsics: Tensor | None = None,
    ) -> Geometry:
        """Run the network.

        Args:
            images: [B, S, 3, H, W] RGB in [0, 1].
            options: reference, reduction, context, mask.
            motion: [B, S, M, H, W] from ``motion``, for models that use it.
            intrinsics: [B, S, 3, 3] known K in pixels of the images, for models that use it.
        """
        raise NotImplementedError


def T_from_R_t(R: Tensor, t: Tensor) -> Tensor:
    """[..., 3, 3] and [..., 3] to [..., 4, 4]."""
    bottom = nn.functional.pad(R.new_ones(1), (3, 0)).expand(*R.shape[:-2], 1, 4)
    return torch.cat([torch.cat([R, t[..., None]], dim=-1), bottom], dim=-2)


def inverse_T(T: Tensor) -> Tensor:
    """Inverse of rigid transforms [..., 4, 4]."""
    R = T[..., :3, :3].transpose(-1, -2)
    return T_from_R_t(R, -(R @ T[..., :3, 3:])[..., 0])


def matrix_from_quat_xyzw(quat_xyzw: Tensor) -> Tensor:
    """Quaternions [..., 4] of any length > 0 to rotation matrices [..., 3, 3]."""
    x, y, z, w = (quat_xyzw / quat_xyzw.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w),
        2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w),
        2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def intrinsics_from_fov(fov_h: Tensor, fov_w: Tensor, height: int, width: int) -> Tensor:
    """K [..., 3, 3] from full vertical and horizontal fields of view in radians, principal point at the centre."""
    zero, one = torch.zeros_like(fov_h), torch.ones_like(fov_h)
    fy, fx = 0.5 * height / torch.tan(0.5 * fov_h), 0.5 * width / torch.tan(0.5 * fov_w)
    rows = [fx, zero, 0.5 * width * one, zero, fy, 0.5 * height * one, zero, zero, one]
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))
