"""pi3: no reference frame at all; per-frame decoders for points, confidence and cameras. pi3x adds a metric scale."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spark3r_ros.backbone.attention import Rope, grid_rope
from spark3r_ros.backbone.blocks import Block
from spark3r_ros.backbone.checkpoint import KeyMap, special_tokens
from spark3r_ros.backbone.encoder import Encoder, EncoderSpec
from spark3r_ros.backbone.heads import in_chunks
from spark3r_ros.backbone.model import Geometry, Model, ModelSpec, T_from_R_t
from spark3r_ros.backbone.preprocess import ResizeRule
from spark3r_ros.backbone.trunk import FRAME, GLOBAL, PassOptions, Trunk, TrunkSpec, describe
from spark3r_ros.frame import Gauge

SPEC = ModelSpec(
    name="pi3",
    trunk=TrunkSpec(
        patch=14, dim=1024, heads=16, kinds=(FRAME, GLOBAL) * 18, taps=(35,), num_special=5, variants=1, eps=1e-6,
    ),
    resize=ResizeRule(14, 505, "area"),
    gauge=Gauge.FREE,
    encoder_depth=24,
)  # fmt: skip
RENAMES = (
    (r"^encoder\.patch_embed\.proj\.", "encoder.proj."),
    (r"^encoder\.register_tokens", "encoder.registers"),
    (r"^decoder\.", "trunk.blocks."),
    (r"^(point|conf|camera)_decoder\.projects\.", r"\1_decoder.project."),
    (r"^(point|conf|camera)_decoder\.linear_out\.", r"\1_decoder.out."),
    (r"^(point|conf)_head\.proj\.", r"\1_head."),
    (r"^camera_head\.res_conv\.(\d)\.res_conv(\d)\.", lambda m: f"camera_head.res.{m[1]}.{2 * (int(m[2]) - 1)}."),
    (r"^camera_head\.more_mlps\.", "camera_head.mlp."),
)
KEYS = KeyMap(
    renames=RENAMES,
    unused=(r"image_(mean|std)",),
    marker="conf_decoder.projects.weight",
    finish=special_tokens("register_token"),
)


class FrameDecoder(nn.Module):
    """Five blocks that look inside one frame, between two linear layers."""

    def __init__(self, in_dim: int, dim: int, heads: int, out: int, depth: int = 5) -> None:
        super().__init__()
        self.project = nn.Linear(in_dim, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, eps=1e-6) for _ in range(depth))
        self.out = nn.Linear(dim, out)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        """Tokens [F, P, in_dim] to [F, P, out]."""
        x = self.project(x)
        for block in self.blocks:
            x = block(x, rope)
        return self.out(x)


class PoseHead(nn.Module):
    """Patch features of one frame to T_world_camera: residual layers, mean over patches, translation and rotation."""

    def __init__(self, dim: int) -> None:
        super().__init__()

        def layers(count: int) -> nn.Sequential:
            return nn.Sequential(*(m for _ in range(count) for m in (nn.Linear(dim, dim), nn.ReLU())))

        self.res = nn.ModuleList(layers(3) for _ in range(2))
        self.mlp = layers(2)
        self.fc_t, self.fc_rot = nn.Linear(dim, 3), nn.Linear(dim, 9)

    def forward(self, x: Tensor) -> Tensor:
        """[F, h * w, C] to [F, 4, 4]."""
        for layers in self.res:
            x = x + layers(x)
        x = self.mlp(x.mean(dim=1))
        rows = F.normalize(self.fc_rot(x).unflatten(-1, (3, 3)), dim=-1)
        return T_from_R_t(nearest_rotation(rows), self.fc_t(x))


def nearest_rotation(M: Tensor) -> Tensor:
    """Rotation closest to each [..., 3, 3] (orthogonal Procrustes)."""
    U, _, Vt = torch.linalg.svd(M)
    sign = torch.ones_like(M[..., 0])
    sign[..., 2] = torch.linalg.det(U @ Vt)
    return (U * sign[..., None, :]) @ Vt


class Pi3(Model):
    """Local points, confidence, cameras in a gauge that the frames share but nothing fixes."""

    def __init__(self, spec: ModelSpec = SPEC) -> None:
        super().__init__(spec)
        trunk = spec.trunk
        dim, heads = trunk.dim, trunk.heads
        self.encoder = Encoder(EncoderSpec(trunk.patch, dim, heads, spec.encoder_depth, num_registers=4))
        self.trunk = Trunk(trunk)
        self.point_decoder = FrameDecoder(trunk.tap_dim, dim, heads, dim)
        self.conf_decoder = FrameDecoder(trunk.tap_dim, dim, heads, dim)
        self.camera_decoder = FrameDecoder(trunk.tap_dim, dim, heads, dim // 2)
        self.camera_head = PoseHead(dim // 2)
        self._build_dense(dim)

    def _build_dense(self, dim: int) -> None:
        self.point_head = nn.Linear(dim, 3 * self.spec.trunk.patch**2)
        self.conf_head = nn.Linear(dim, self.spec.trunk.patch**2)

    def forward(
        self,
        images: Tensor,
        options: PassOptions = PassOptions(),
        *,
        motion: Tensor | None = None,
        intrinsics: Tensor | None = None,
    ) -> Geometry:
        batch, num_frames = images.shape[:2]
        x, grid = self.encoder(self.normalise(images).flatten(0, 1))
        x = x.unflatten(0, (batch, num_frames))
        tokens = self.trunk(x, grid, options, describe(x))
        trunk = self.spec.trunk
        rope = grid_rope(*grid, trunk.dim // trunk.heads, trunk.num_special, False, x.device)
        T_world_camera, xyz, confidence = (
            y.unflatten(0, (batch, num_frames)) for y in self._decode(tokens.taps[0].flatten(0, 1), rope, grid)
        )
        K = fit_intrinsics(xyz, confidence.sigmoid())
        return Geometry(T_world_camera, K, xyz[..., 2], confidence, tokens.descriptors, {"local_points": xyz})

    def _decode(self, x: Tensor, rope: Rope, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Tapped tokens [F, P, C] to T_world_camera [F, 4, 4], local points [F, H, W, 3], confidence logits [F, H, W]."""
        n, device = self.spec.trunk.num_special, x.device.type
        camera, point, conf = (
            in_chunks(lambda piece, d=decoder: d(piece, rope)[:, n:], x)
            for decoder in (self.camera_decoder, self.point_decoder, self.conf_decoder)
        )  # each [F, h * w, C]
        with torch.autocast(device, enabled=False):
            T_world_camera = self.camera_head(camera.float())
            xyz = in_chunks(lambda piece: self._points(piece, grid), point.float())
            confidence = in_chunks(lambda piece: self._confidence(piece, grid), conf.float())
        return T_world_camera, xyz, confidence

    def _points(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Features [F, h * w, C] to points in each camera's frame [F, H, W, 3]."""
        return points_from_rays(self._to_pixels(self.point_head(x), grid))

    def _confidence(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self._to_pixels(self.conf_head(x), grid)[:, 0]

    def _to_pixels(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """[F, h * w, n * patch ** 2] to [F, n, H, W]."""
        return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, grid), self.spec.trunk.patch)


def points_from_rays(raw: Tensor) -> Tensor:
    """[F, 3, H, W] of x / z, y / z and log z to points [F, H, W, 3]."""
    z = raw[:, 2:].exp()
    return torch.cat([raw[:, :2] * z, z], dim=1).movedim(1, -1)


def fit_intrinsics(xyz: Tensor, weight: Tensor) -> Tensor:
    """K [..., 3, 3] that best projects points [..., H, W, 3] onto their own pixels, principal point at the centre.

    Weighted least squares for one focal length per axis.
    """
    height, width = xyz.shape[-3:-1]
    rays = xyz[..., :2] / xyz[..., 2:]
    v, u = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    centre = torch.tensor([width / 2, height / 2])
    offset = (torch.stack([u, v], dim=-1) + 0.5 - centre).to(rays)  # [H, W, 2] from the centre, of pixel centres
    w = weight[..., None]
    focal = (w * rays * offset).sum(dim=(-3, -2)) / (w * rays * rays).sum(dim=(-3, -2))  # [..., 2]
    K = torch.zeros(*focal.shape[:-1], 3, 3, device=xyz.device, dtype=xyz.dtype)
    K[..., 0, 0], K[..., 1, 1], K[..., 2, 2] = focal[..., 0], focal[..., 1], 1
    K[..., 0, 2], K[..., 1, 2] = width / 2, height / 2
    return K
