"""Per-frame image encoders: DINOv2 (learned positions) and DINOv3 style (rotary positions)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spark3r_ros.backbone.attention import unit_rope
from spark3r_ros.backbone.blocks import Block


@dataclass(frozen=True)
class EncoderSpec:
    """What tells the encoders apart."""

    patch: int  # pixels
    dim: int
    heads: int
    depth: int  # blocks; 0: only the embedding, whose tokens a plain trunk takes whole
    num_registers: int
    positions: int = 37  # side of the learned position grid; 0: rotary positions
    antialias: bool = True  # of position interpolation
    offset: float = 0.0  # added to the patch grid when the position grid is scaled
    eps: float = 1e-6


class Encoder(nn.Module):
    """Images to normalised patch tokens; without blocks to raw tokens, class token first."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.proj = nn.Conv2d(3, spec.dim, spec.patch, stride=spec.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, spec.dim))
        if spec.num_registers:
            self.registers = nn.Parameter(0.02 * torch.randn(1, spec.num_registers, spec.dim))
        if spec.positions:
            self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + spec.positions**2, spec.dim))
        self.blocks = nn.ModuleList(
            Block(spec.dim, spec.heads, eps=spec.eps, layer_scale=1.0) for _ in range(spec.depth)
        )
        if spec.depth:
            self.norm = nn.LayerNorm(spec.dim, eps=spec.eps)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Normalised images [B, 3, H, W] to tokens [B, N, C] and the patch grid (rows, columns)."""
        spec = self.spec
        x = self.proj(images)  # [B, C, h, w]
        grid = (x.shape[-2], x.shape[-1])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        if spec.positions:
            x = x + self._positions(grid)
        if spec.num_registers:
            x = torch.cat([x[:, :1], self.registers.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        if not spec.depth:
            return x, grid
        prefix = 1 + spec.num_registers
        rope = None if spec.positions else unit_rope(*grid, spec.dim // spec.heads, prefix, x.device)
        for block in self.blocks:
            x = block(x, rope)
        return self.norm(x[:, prefix:]), grid

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """Learned positions scaled to the patch grid, [1, 1 + h * w, C], the class token's first."""
        side = self.spec.positions
        if grid == (side, side):
            return self.pos_embed
        table = self.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2).float()  # [1, C, side, side]
        if self.spec.offset:
            scale = [(n + self.spec.offset) / side for n in grid]
            table = F.interpolate(table, scale_factor=scale, mode="bicubic", antialias=self.spec.antialias)
        else:
            table = F.interpolate(table, size=grid, mode="bicubic", antialias=self.spec.antialias)
        assert table.shape[-2:] == grid, (table.shape, grid)
        return torch.cat([self.pos_embed[:, :1], table.flatten(2).transpose(1, 2)], dim=1)
