"""Camera heads that mix frames (VGGT, VGGT-Omega), and what all camera heads share.

Past frames take part through the context: their camera tokens are kept, the head runs on [past | new] under the
block-causal mask of windows, and only the new frames' results are used.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spark3r_ros.backbone.blocks import Block, Mlp
from spark3r_ros.backbone.model import T_from_R_t, intrinsics_from_fov, inverse_T, matrix_from_quat_xyzw
from spark3r_ros.backbone.trunk import PassOptions, block_causal


def decode_world_to_camera(encoding: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """[..., 9] translation and quaternion (xyzw) of T_camera_world, vertical and horizontal field of view.

    Returns:
        T_world_camera [..., 4, 4] and K [..., 3, 3].
    """
    T_camera_world = T_from_R_t(matrix_from_quat_xyzw(encoding[..., 3:7]), encoding[..., :3])
    return inverse_T(T_camera_world), intrinsics_from_fov(encoding[..., 7], encoding[..., 8], height, width)


class CameraTrunk(nn.Module):
    """Four wide blocks over the camera tokens of all frames; subclasses turn them into encodings [B, S, 9]."""

    def __init__(self, dim: int, heads: int, layer_scale: float = 0.01) -> None:
        super().__init__()
        self.token_norm = nn.LayerNorm(dim)
        self.trunk = nn.ModuleList(Block(dim, heads, eps=1e-5, layer_scale=layer_scale) for _ in range(4))
        self.trunk_norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, options: PassOptions) -> Tensor:
        """Camera tokens [B, S, T, C] of this pass to encodings [B, S, 9]; earlier windows come from the context."""
        num_frames, per_frame = tokens.shape[1:3]
        window_ids = options.window_ids
        if options.context is not None:
            past_and_new, window_ids = options.context.append_camera(tokens[0])
            tokens = past_and_new[None].to(tokens.dtype)  # [1, F + S, T, C]
        mask = None if window_ids is None else block_causal(window_ids, per_frame)
        return self.encode(self.token_norm(tokens), mask)[:, -num_frames:]

    def encode(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _blocks(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[B, S, T, C] through the trunk."""
        shape = x.shape
        x = x.flatten(1, 2)
        for block in self.trunk:
            x = block(x, None, mask)
        return self.trunk_norm(x).view(shape)


class IterativeCamera(CameraTrunk):
    """VGGT: four passes, each modulates the camera tokens with the estimate so far and adds a correction."""

    iterations = 4

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.start = nn.Parameter(torch.zeros(1, 1, 9))
        self.embed = nn.Linear(9, dim)
        self.modulate = nn.Linear(dim, 3 * dim)
        self.branch = Mlp(dim, dim // 2, 9)

    def encode(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        tokens = tokens[:, :, :1]  # [B, S, 1, C]
        plain = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
        encoding = self.start.expand(*tokens.shape[:2], -1)[:, :, None]  # [B, S, 1, 9]
        for iteration in range(self.iterations):
            shift, scale, gate = self.modulate(F.silu(self.embed(encoding))).chunk(3, dim=-1)
            x = self._blocks(tokens + gate * (plain * (1 + scale) + shift), mask)
            delta = self.branch(x)
            encoding = encoding + delta if iteration else delta
        encoding = encoding[:, :, 0]
        return torch.cat([encoding[..., :7], encoding[..., 7:].relu()], dim=-1)


class SinglePassCamera(CameraTrunk):
    """VGGT-Omega: one pass over all special tokens of all frames; the camera token is read."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads, layer_scale=1e-5)
        self.branch = Mlp(dim, dim // 2, 9)

    def encode(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        encoding = self.branch(self._blocks(tokens, mask)[:, :, 0])
        return torch.cat([encoding[..., :7], encoding[..., 7:].relu() + 0.01], dim=-1)
