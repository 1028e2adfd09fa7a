"""Depth-Anything-3: one DINOv2 that turns into an alternating trunk half-way; cameras from one token per frame."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from spark3r_ros.backbone.checkpoint import KeyMap, dpt_renames, special_tokens
from spark3r_ros.backbone.encoder import Encoder, EncoderSpec
from spark3r_ros.backbone.heads import DptHead
from spark3r_ros.backbone.model import (
    Geometry,
    Model,
    ModelSpec,
    T_from_R_t,
    intrinsics_from_fov,
    matrix_from_quat_xyzw,
)
from spark3r_ros.backbone.trunk import DENSE, FRAME, GLOBAL, PassOptions, Trunk, TrunkSpec
from spark3r_ros.frame import Gauge
from spark3r_ros.preprocess import ResizeRule

WIDE = ((256, 512, 1024, 1024), 256)


def any_view(
    name: str, dim: int, depth: int, plain: int, taps: tuple[int, ...], dpt: tuple[tuple[int, ...], int] = WIDE
) -> ModelSpec:
    """Odd blocks from ``plain`` on are global."""
    kinds = tuple(GLOBAL if i >= plain and i % 2 else FRAME for i in range(depth))
    trunk = TrunkSpec(
        patch=14, dim=dim, heads=dim // 64, kinds=kinds, taps=taps, num_special=1, plain=plain,
        global_rope="constant", eps=1e-6, layer_scale=1.0, ffn="swiglu" if dim == 1536 else "gelu", final_eps=1e-5,
        picks_reference=True,
    )  # fmt: skip
    return ModelSpec(name=name, trunk=trunk, resize=ResizeRule(14, 504), dpt=dpt)


SPECS = {
    "da3-small": any_view("da3-small", 384, 12, 4, (5, 7, 9, 11), ((48, 96, 192, 384), 64)),
    "da3-base": any_view("da3-base", 768, 12, 4, (5, 7, 9, 11), ((96, 192, 384, 768), 128)),
    "da3-large": any_view("da3-large", 1024, 24, 8, (11, 15, 19, 23)),
    "da3-giant": replace(any_view("da3-giant", 1536, 40, 13, (19, 27, 33, 39)), sensitive=frozenset(range(3, 13))),
}
METRIC_SPEC = ModelSpec(
    name="da3metric-large",
    trunk=TrunkSpec(
        patch=14, dim=1024, heads=16, kinds=(FRAME,) * 24, taps=(4, 11, 17, 23), num_special=1, variants=0, plain=24,
        eps=1e-6, layer_scale=1.0, final_eps=1e-5, join=False,
    ),
    resize=ResizeRule(14, 504),
    gauge=Gauge.METRIC,
)  # fmt: skip
KEYS = KeyMap(
    renames=(
        (r"^(model\.)?((da3|da3_metric)\.)?", ""),  # as on the hub; nested models hold one of each kind
        (r"^net\.", "backbone."),  # names of older files
        (r"camera_token_extra", "camera_token"),
        (r"^backbone\.pretrained\.(patch_embed\.proj|cls_token|pos_embed)", lambda m: "encoder." + m[1].split(".")[-1]),
        (r"^backbone\.pretrained\.(blocks|norm)\.", r"trunk.\1."),
        (r"^cam_dec\.backbone\.", "camera.mlp."),
        (r"^cam_dec\.fc_qvec\.", "camera.fc_q."),
        (r"^cam_dec\.fc_fov\.0\.", "camera.fc_fov."),
        (r"^cam_dec\.", "camera."),
        *dpt_renames("head"),
        (r"^head\.scratch\.sky_output_conv2\.", "head.out.1."),
    ),
    unused={
        r"(model\.)?(da3\.)?head\.scratch\.\w+_(aux|ray)\..*": "ray maps; one of their norms is stored once for four",
        r"(model\.)?(da3\.)?cam_enc\..*": "known cameras as input",
        r"(model\.)?(da3\.)?gs_(head|adapter)\..*": "Gaussian splats (giant)",
        r"(model\.)?da3_metric\..*": "the second network of nested models",
        r".*\.mask_token": "training only",
    },
    marker="backbone.pretrained.camera_token",
    finish=special_tokens("backbone.pretrained.camera_token"),
)
METRIC_KEYS = replace(
    KEYS,
    unused={r"(model\.)?da3\..*": "the first network of nested models", r".*\.mask_token": "training only"},
    marker="scratch.sky_output_conv2.0.weight",
    finish=None,
)


def plain_encoder(trunk: TrunkSpec) -> Encoder:
    """Only the embedding: the first blocks of the trunk are the image transformer."""
    return Encoder(EncoderSpec(trunk.patch, trunk.dim, trunk.heads, 0, num_registers=0, antialias=False, offset=0.1))


class CameraDecoder(nn.Module):
    """Camera token to translation, quaternion (xyzw) of T_world_camera, vertical and horizontal field of view."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU())
        self.fc_t, self.fc_q, self.fc_fov = nn.Linear(dim, 3), nn.Linear(dim, 4), nn.Linear(dim, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.mlp(x)
        return self.fc_t(x), self.fc_q(x), self.fc_fov(x).relu()


class DepthAnything3(Model):
    """Any-view model: depth, confidence and cameras."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        trunk = spec.trunk
        self.encoder = plain_encoder(trunk)
        self.trunk = Trunk(trunk)
        channels, features = spec.dpt
        self.head = DptHead(trunk.tap_dim, channels, features, (2,))
        self.camera = CameraDecoder(trunk.tap_dim)

    def forward(
        self,
        images: Tensor,
        options: PassOptions = DENSE,
        *,
        motion: Tensor | None = None,
        intrinsics: Tensor | None = None,
    ) -> Geometry:
        batch, num_frames, _, height, width = images.shape
        x, grid = self.encoder(self.normalise(images).flatten(0, 1))
        tokens = self.trunk(x.unflatten(0, (batch, num_frames)), grid, options)
        with torch.autocast(images.device.type, enabled=False):
            taps = [tokens.patches(i).flatten(0, 1).float() for i in range(len(tokens.taps))]
            depth, confidence = self.head(taps, grid, (height, width)).unflatten(0, (batch, num_frames)).unbind(2)
            t, quat_xyzw, fov = self.camera(tokens.special()[:, :, 0].float())
            T_world_camera = T_from_R_t(matrix_from_quat_xyzw(quat_xyzw), t)
            K = intrinsics_from_fov(fov[..., 0], fov[..., 1], height, width)
        return Geometry(T_world_camera, K, depth.exp(), confidence, tokens.descriptors)


class MetricDepth(Model):
    """Depth in metres of single images whose focal length is known; no poses, frames do not see each other."""

    canonical_focal = 300.0  # the network's output is metres times this over the focal length in pixels

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        trunk = spec.trunk
        self.encoder = plain_encoder(trunk)
        self.trunk = Trunk(trunk)
        self.head = DptHead(trunk.tap_dim, *spec.dpt, (1, 1), norm=False, positions=False)

    def forward(
        self,
        images: Tensor,
        options: PassOptions = DENSE,
        *,
        motion: Tensor | None = None,
        intrinsics: Tensor | None = None,
    ) -> Geometry:
        batch, num_frames, _, height, width = images.shape
        if intrinsics is None:
            raise ValueError(f"{self.spec.name} gives metres only for a known focal length: pass intrinsics")
        x, grid = self.encoder(self.normalise(images).flatten(0, 1))
        tokens = self.trunk(x.unflatten(0, (batch, num_frames)), grid, options)
        with torch.autocast(images.device.type, enabled=False):
            taps = [tokens.patches(i).flatten(0, 1).float() for i in range(len(tokens.taps))]
            depth, sky = self.head(taps, grid, (height, width)).unflatten(0, (batch, num_frames)).unbind(2)
        raw = depth.exp()
        focal = (intrinsics[..., 0, 0] + intrinsics[..., 1, 1])[..., None, None] / 2
        nowhere = images.new_full((batch, num_frames, 4, 4), float("nan"))
        extras = {"raw_depth": raw, "sky": sky.relu()}
        confidence = 10 * (0.3 - extras["sky"])
        return Geometry(nowhere, intrinsics, raw * focal / self.canonical_focal, confidence, tokens.descriptors, extras)
