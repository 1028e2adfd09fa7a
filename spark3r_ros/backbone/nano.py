"""nano: the small default model, trained and shipped with this package; one more configuration of the shared trunk."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spark3r_ros.backbone.model import (
    Geometry,
    Model,
    ModelSpec,
    T_from_R_t,
    intrinsics_from_fov,
    matrix_from_quat_xyzw,
)
from spark3r_ros.backbone.preprocess import ResizeRule
from spark3r_ros.backbone.trunk import FRAME, GLOBAL, PassOptions, Trunk, TrunkSpec

MOTION_CHANNELS = 4  # flow (dx, dy) in shares of the image width to each of the two frames before

SPEC = ModelSpec(
    name="nano",
    trunk=TrunkSpec(
        patch=8,
        dim=128,
        heads=4,
        kinds=(FRAME, GLOBAL) * 4,
        taps=(3, 7),
        num_special=3,
        eps=1e-6,
        layer_scale=0.1,
    ),
    resize=ResizeRule(patch=8, longest=128),
)


class Nano(Model):
    """RGB and motion channels -> trunk -> depth with confidence, pose and field of view."""

    def __init__(self, spec: ModelSpec = SPEC) -> None:
        super().__init__(spec)
        trunk = spec.trunk
        self.embed = nn.Sequential(
            nn.Conv2d(3 + MOTION_CHANNELS, 32, 5, stride=2, padding=2),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(64, trunk.dim, trunk.patch // 4, stride=trunk.patch // 4),
        )
        self.trunk = Trunk(trunk)
        self.depth_head = nn.Linear(trunk.tap_dim * len(trunk.taps), 2 * trunk.patch**2)
        self.camera_head = nn.Sequential(nn.Linear(trunk.tap_dim, trunk.dim), nn.GELU(), nn.Linear(trunk.dim, 9))

    def motion(self, images: Tensor, previous: Tensor | None) -> Tensor:
        return images.new_zeros(len(images), MOTION_CHANNELS, *images.shape[-2:])

    def forward(
        self,
        images: Tensor,
        options: PassOptions = PassOptions(),
        *,
        motion: Tensor | None = None,
        intrinsics: Tensor | None = None,
    ) -> Geometry:
        batch, num_frames, _, height, width = images.shape
        assert motion is not None, "nano needs its motion channels"
        x = torch.cat([self.normalise(images), motion], dim=2).flatten(0, 1)
        x = self.embed(x)  # [B * S, C, h, w]
        grid = (x.shape[-2], x.shape[-1])
        x = x.flatten(2).transpose(1, 2).unflatten(0, (batch, num_frames))  # [B, S, h * w, C]
        tokens = self.trunk(x, grid, options)
        depth, confidence = self._dense(tokens.patches, grid)
        pose = self.camera_head(tokens.special()[:, :, 0]).float()  # [B, S, 9]
        identity = pose.new_tensor([0.0, 0.0, 0.0, 1.0])
        R = matrix_from_quat_xyzw(pose[..., 3:7] + identity)
        fov = 1.0 + 0.5 * torch.tanh(pose[..., 7:])
        K = intrinsics_from_fov(fov[..., 0], fov[..., 1], height, width)
        return Geometry(T_from_R_t(R, pose[..., :3]), K, depth.exp(), confidence, tokens.descriptors)

    def _dense(self, patches, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Log depth and confidence logit, each [B, S, H, W]."""
        x = self.depth_head(torch.cat([patches(i) for i in range(len(self.spec.trunk.taps))], dim=-1))
        batch, num_frames = x.shape[:2]
        x = x.flatten(0, 1).transpose(1, 2).unflatten(2, grid)  # [B * S, 2 * patch ** 2, h, w]
        x = F.pixel_shuffle(x, self.spec.trunk.patch).unflatten(0, (batch, num_frames)).float()
        return x[:, :, 0], x[:, :, 1]
