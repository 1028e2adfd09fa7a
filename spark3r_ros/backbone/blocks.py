"""Transformer blocks shared by all models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spark3r_ros.backbone.attention import Attention, GlobalPass, Rope, pieces
from spark3r_ros.reduction import unmerge


class LayerScale(nn.Module):
    """Learned gain per channel."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Mlp(nn.Module):
    """Two linear layers with exact GELU."""

    def __init__(self, dim: int, hidden: int, out: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out or dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGlu(nn.Module):
    """Gated feed-forward, inner projections fused: silu(first half) * second half; 2 / 3 of 4 C wide, rounded to 8."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = (int(4 * dim * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    """Pre-norm block; ``layer_scale`` None leaves the gains out, otherwise it is their initial value."""

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        eps: float = 1e-6,
        qk_norm: bool = False,
        layer_scale: float | None = None,
        ffn: str = "gelu",
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, qk_norm=qk_norm)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = SwiGlu(dim) if ffn == "swiglu" else Mlp(dim, 4 * dim)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)

    def forward(self, x: Tensor, rope: Rope | None = None, mask: Tensor | None = None) -> Tensor:
        """Dense attention inside each sequence of x [B, N, C]; in inference some sequences at a time."""
        parts = pieces(len(x), x.device, x.shape[1])
        if torch.is_grad_enabled() or len(parts) == 1:
            return self._feed_forward(x + self.ls1(self.attn(self.norm1(x), rope, mask)))
        out = torch.empty_like(x)
        for part in parts:
            out[part] = self._feed_forward(x[part] + self.ls1(self.attn(self.norm1(x[part]), rope, mask)))
        return out

    def forward_global(self, x: Tensor, layer: int, run: GlobalPass) -> Tensor:
        """Attention across frames, x [B, S * P, C], with reduction and context; in inference the rest in pieces."""
        y, plan = self.attn.attend(self.norm1(x), layer, run)
        y = self.ls1(y)  # [B, M, C]
        parts = pieces(x.shape[1], x.device)
        if torch.is_grad_enabled() or len(parts) == 1:
            return self._feed_forward(x + (y if plan is None else unmerge(y, plan)))
        out = torch.empty_like(x)
        for part in parts:
            update = y[:, part] if plan is None else unmerge(y, plan, part)
            out[:, part] = self._feed_forward(x[:, part] + update)
        return out

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x + self.ls2(self.mlp(self.norm2(x)))
