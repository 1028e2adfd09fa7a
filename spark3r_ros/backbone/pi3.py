"""pi3: no reference frame at all; per-frame decoders for points, confidence and cameras. pi3x adds a metric scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spark3r_ros.backbone.attention import Rope, grid_rope
from spark3r_ros.backbone.blocks import Block, Mlp
from spark3r_ros.backbone.checkpoint import KeyMap, special_tokens
from spark3r_ros.backbone.encoder import Encoder, EncoderSpec
from spark3r_ros.backbone.heads import in_chunks, place_grid
from spark3r_ros.backbone.model import Geometry, Model, ModelSpec, T_from_R_t, matrix_from_quat_xyzw
from spark3r_ros.backbone.trunk import DENSE, FRAME, GLOBAL, PassOptions, Tokens, Trunk, TrunkSpec, describe
from spark3r_ros.frame import Gauge
from spark3r_ros.preprocess import ResizeRule

SPEC = ModelSpec(
    name="pi3",
    trunk=TrunkSpec(
        patch=14, dim=1024, heads=16, kinds=(FRAME, GLOBAL) * 18, taps=(35,), num_special=5, variants=1, eps=1e-6,
    ),
    resize=ResizeRule(14, 505, "area"),
    gauge=Gauge.FREE,
    sensitive=frozenset(range(11, 17)),
    encoder_depth=24,
)  # fmt: skip
SQUARINGS = 27  # of nearest_rotation: eigenvalues that are 1e-7 apart are still told from each other
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
CONSTANTS = (("image_mean", Model.pixel_mean), ("image_std", Model.pixel_std))
KEYS = KeyMap(
    renames=RENAMES,
    unused={},
    marker="point_head.proj.weight",
    finish=special_tokens("register_token"),
    constants=CONSTANTS,
)

PI3X_SPEC = replace(SPEC, name="pi3x", gauge=Gauge.METRIC)
PI3X_KEYS = KeyMap(
    renames=(
        *RENAMES,
        (r"^metric_decoder\.projects_x\.", "metric.project_token."),
        (r"^metric_decoder\.projects_y\.", "metric.project_tokens."),
        (r"^metric_decoder\.linear_out\.", "metric.out."),
        (r"^metric_decoder\.(blocks\.\d+)\.(norm2|norm_y|norm3|mlp)\.", r"metric.\1.\2."),
        (r"^metric_decoder\.(blocks\.\d+)\.cross_attn\.", r"metric.\1."),
        (r"^metric_token", "metric.token"),
        (r"^metric_head\.", "metric.head."),
        (r"\.upsample_blocks\.(\d)\.0\.0\.", r".up.\1.enlarge."),
        (r"\.upsample_blocks\.(\d)\.0\.1\.", r".up.\1.smooth."),
        (r"\.upsample_blocks\.(\d)\.(\d)\.layers\.", lambda m: f".up.{m[1]}.residual.{int(m[2]) - 1}."),
        (r"\.output_block\.(\d)\.0\.", r".out.\1.0."),
        (r"\.output_block\.(\d)\.2\.", r".out.\1.2."),
    ),
    unused={r"(depth_encoder|depth_emb|ray_embed|pose_inject_blk)\b.*": "depth, rays and poses as input"},
    marker="metric_decoder.projects_x.weight",
    finish=special_tokens("register_token"),
    constants=CONSTANTS,
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
    """Rotation closest to each [..., 3, 3] (orthogonal Procrustes).

    By Davenport's q-method: its quaternion is the first eigenvector of a symmetric matrix, to which repeated squares of
    that matrix tend. A singular value decomposition would wait for the device.
    """
    m = M.double()
    x, y, z = m.diagonal(dim1=-2, dim2=-1).unbind(-1)
    xy, xz, yz = (m[..., i, j] + m[..., j, i] for i, j in ((0, 1), (0, 2), (1, 2)))
    xw, yw, zw = (m[..., i, j] - m[..., j, i] for i, j in ((2, 1), (0, 2), (1, 0)))
    rows = [
        x - y - z, xy, xz, xw,
        xy, y - x - z, yz, yw,
        xz, yz, z - x - y, zw,
        xw, yw, zw, x + y + z,
    ]  # fmt: skip
    square = torch.stack(rows, dim=-1).unflatten(-1, (4, 4))
    unit = torch.eye(4, dtype=m.dtype, device=m.device)
    square = square + square.flatten(-2).norm(dim=-1)[..., None, None] * unit  # the first is now the largest, too
    for _ in range(SQUARINGS):
        square = square / square.flatten(-2).norm(dim=-1)[..., None, None]
        square = square @ square
    longest = square.diagonal(dim1=-2, dim2=-1).argmax(dim=-1)[..., None, None].expand(*m.shape[:-2], 4, 1)
    return matrix_from_quat_xyzw(square.gather(-1, longest)[..., 0]).to(M)


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
        self.point_head: nn.Module
        self.conf_head: nn.Module
        self._build_dense(dim)

    def _build_dense(self, dim: int) -> None:
        """Layers from decoded patches to points and confidence."""
        self.point_head = nn.Linear(dim, 3 * self.spec.trunk.patch**2)
        self.conf_head = nn.Linear(dim, self.spec.trunk.patch**2)

    def forward(
        self,
        images: Tensor,
        options: PassOptions = DENSE,
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
        T_world_camera, xyz = self._scale(tokens, T_world_camera, xyz)
        return Geometry(T_world_camera, K, xyz[..., 2], confidence, tokens.descriptors, {"local_points": xyz})

    def _scale(self, tokens: Tokens, T_world_camera: Tensor, xyz: Tensor) -> tuple[Tensor, Tensor]:
        """Poses and points in the unit that the model gives out."""
        return T_world_camera, xyz

    def _decode(self, x: Tensor, rope: Rope, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [F, P, C] to T_world_camera [F, 4, 4], local points [F, H, W, 3], confidence logits [F, H, W]."""
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
    u = torch.arange(width, device=rays.device) + 0.5 - width / 2
    v = torch.arange(height, device=rays.device) + 0.5 - height / 2
    # [H, W, 2] from the centre, of pixel centres
    offset = torch.stack(torch.meshgrid(u, v, indexing="xy"), dim=-1).to(rays)
    w = weight[..., None]
    focal = (w * rays * offset).sum(dim=(-3, -2)) / (w * rays * rays).sum(dim=(-3, -2))  # [..., 2]
    K = torch.zeros(*focal.shape[:-1], 3, 3, device=xyz.device, dtype=xyz.dtype)
    K[..., 0, 0], K[..., 1, 1], K[..., 2, 2] = focal[..., 0], focal[..., 1], 1
    K[..., 0, 2], K[..., 1, 2] = width / 2, height / 2
    return K


class MetricBlock(nn.Module):
    """One token looks at the tokens of all frames."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm2, self.norm_y, self.norm3 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(3))
        self.q_proj, self.k_proj, self.v_proj, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, token: Tensor, tokens: Tensor) -> Tensor:
        """[B, 1, C] and [B, N, C] to [B, 1, C]."""
        context = self.norm_y(tokens)
        q, k, v = self.q_proj(self.norm2(token)), self.k_proj(context), self.v_proj(context)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, H, N, D]
        token = token + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return token + self.mlp(self.norm3(token))


class MetricScale(nn.Module):
    """Metres per model unit of one pass, read from all its frames: neighbouring windows may disagree a little."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, in_dim))
        self.project_token, self.project_tokens = nn.Linear(in_dim, dim), nn.Linear(in_dim, dim)
        self.blocks = nn.ModuleList(MetricBlock(dim, dim // 64) for _ in range(5))
        self.out, self.head = nn.Linear(dim, dim), nn.Linear(dim, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, in_dim] to [B]."""
        token = self.project_token(self.token).expand(len(tokens), -1, -1)
        tokens = self.project_tokens(tokens)
        for block in self.blocks:
            token = block(token, tokens)
        return self.head(self.out(token)).exp()[:, 0, 0]


class Upsample(nn.Module):
    """Twice the size, then two residual blocks."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.enlarge = nn.ConvTranspose2d(in_dim, dim, 2, stride=2)
        self.smooth = nn.Conv2d(dim, dim, 3, padding=1, padding_mode="replicate")
        self.residual = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(1, dim),
                nn.ReLU(),
                nn.Conv2d(dim, 2 * dim, 3, padding=1, padding_mode="replicate"),
                nn.GroupNorm(2 * dim // 32, 2 * dim),
                nn.ReLU(),
                nn.Conv2d(2 * dim, dim, 3, padding=1, padding_mode="replicate"),
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.smooth(self.enlarge(x))
        for block in self.residual:
            x = x + block(x)
        return x


class ConvHead(nn.Module):
    """Patch features to full resolution, three times doubled, the place in the image joined in at every step (MoGe)."""

    def __init__(self, in_dim: int, outputs: Sequence[int]) -> None:
        super().__init__()
        dims = (in_dim, 256, 128, 64)
        self.up = nn.ModuleList(Upsample(a + 2, b) for a, b in pairwise(dims))
        self.out = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(dims[-1] + 2, 32, 3, padding=1, padding_mode="replicate"), nn.ReLU(), nn.Conv2d(32, n, 1)
            )
            for n in outputs
        )

    def forward(self, x: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """[F, h * w, C] to [F, sum of outputs, H, W]."""
        x = x.transpose(1, 2).unflatten(2, grid)
        aspect = size[1] / size[0]
        for up in self.up:
            x = up(with_place(x, aspect))
        x = with_place(F.interpolate(x, size=size, mode="bilinear", align_corners=False), aspect)
        return torch.cat([out(x) for out in self.out], dim=1)


def with_place(x: Tensor, aspect: float) -> Tensor:
    """Two more channels: the place in the image along x and y."""
    u, v = place_grid(x.shape[-2], x.shape[-1], aspect, x.device)
    place = torch.stack(torch.meshgrid(u, v, indexing="xy")).to(x.dtype)  # [2, rows, columns]
    return torch.cat([x, place.expand(len(x), -1, -1, -1)], dim=1)


class Pi3X(Pi3):
    """pi3 with convolutional heads and an approximate metric scale, from images alone."""

    def _build_dense(self, dim: int) -> None:
        self.point_head = ConvHead(dim, (2, 1))
        self.conf_head = ConvHead(dim, (1,))
        self.metric = MetricScale(self.spec.trunk.tap_dim, dim // 2)

    def _points(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return points_from_rays(self.point_head(x, grid, self._size(grid)))

    def _confidence(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.conf_head(x, grid, self._size(grid))[:, 0]

    def _size(self, grid: tuple[int, int]) -> tuple[int, int]:
        patch = self.spec.trunk.patch
        return grid[0] * patch, grid[1] * patch

    def _scale(self, tokens: Tokens, T_world_camera: Tensor, xyz: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(tokens.taps[0].device.type, enabled=False):  # one number scales everything: no rounding
            metres = self.metric(tokens.taps[0].flatten(1, 2).float())  # [B]
        scaled = torch.cat([T_world_camera[..., :3, :3], T_world_camera[..., :3, 3:] * metres[:, None, None, None]], -1)
        T_world_camera = torch.cat([scaled, T_world_camera[..., 3:, :]], dim=-2)
        return T_world_camera, xyz * metres[:, None, None, None, None]
