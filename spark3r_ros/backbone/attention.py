"""Attention: plain inside a frame, and the one seam where all frames meet.

Shapes: B batch, S frames, P tokens per frame, N = S * P tokens, M kept keys or merged queries, H heads, D head
dimension, C = H * D.
Global tokens are frame-major: token ``s * P + p``; special tokens come first in each frame, then patches row by row.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spark3r_ros.reduction import (
    ForwardReduction,
    KeyPlan,
    QueryPlan,
    add_to_sums,
    finish_sums,
    merge,
    new_sums,
    unmerge,
)

if TYPE_CHECKING:
    from spark3r_ros.context import KVContext

# Per-token work of inference goes over so many tokens at a time: what fits the cache of a CPU, what bounds memory on a
# GPU.
PIECE_TOKENS = {"cpu": 1024, "cuda": 1 << 17}


def pieces(length: int, device: torch.device, tokens_each: int = 1) -> list[slice]:
    """Consecutive slices of ``length`` items of ``tokens_each`` tokens, PIECE_TOKENS tokens or one item at a time."""
    step = max(1, PIECE_TOKENS["cpu" if device.type == "cpu" else "cuda"] // tokens_each)
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


@dataclass(frozen=True, eq=False)
class Rope:
    """Rotary embedding table of one sequence; ``groups`` parts of the head dimension are rotated as separate halves."""

    cos: Tensor  # [N, groups, D / groups / 2]
    sin: Tensor  # [N, groups, D / groups / 2]

    def apply(self, x: Tensor) -> Tensor:
        """Rotate x [B, H, N, D]; tables are [N, ...] or, after ``take``, [B, 1, N, ...]."""
        groups, half = self.cos.shape[-2:]
        first, second = x.unflatten(-1, (groups, 2, half)).unbind(-2)  # [B, H, N, groups, half]
        rotated = torch.stack([first * self.cos - second * self.sin, second * self.cos + first * self.sin], dim=-2)
        return rotated.flatten(-3)

    def take(self, index: Tensor) -> Rope:
        """The table at token positions ``index`` [B, M]."""
        return Rope(self.cos[index][:, None], self.sin[index][:, None])

    def slice(self, part: slice) -> Rope:
        """The table of a range of tokens."""
        return Rope(self.cos[part], self.sin[part])

    def repeat(self, times: int) -> Rope:
        """The table of ``times`` frames with the same positions, frame-major."""
        return Rope(self.cos.repeat(times, 1, 1), self.sin.repeat(times, 1, 1))


def _table(angles: Tensor, num_special: int, device: torch.device) -> Rope:
    """Tables from patch angles [h * w, groups, half]; special tokens come first and are not rotated."""
    angles = F.pad(angles, (0, 0, 0, 0, num_special, 0))
    return Rope(angles.cos().float().to(device), angles.sin().float().to(device))


@functools.lru_cache(maxsize=16)
def grid_rope(height: int, width: int, head_dim: int, num_special: int, constant: bool, device: torch.device) -> Rope:
    """2-D rotary table of one frame, frequency base 100: y rotates one half of the head, x the other.

    Patch (y, x) stands at (y + 1, x + 1), special tokens at (0, 0); ``constant`` puts all patches at (1, 1).
    """
    with torch.inference_mode(False):  # tables are shared between inference and training
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        position = torch.stack([y, x], dim=-1).reshape(-1, 2, 1).double() + 1  # [h * w, 2, 1]
        if constant:
            position = torch.ones_like(position)
        frequency = 100.0 ** -(torch.arange(0, head_dim // 2, 2, dtype=torch.float64) / (head_dim // 2))
        return _table(position * frequency, num_special, device)


@functools.lru_cache(maxsize=16)
def unit_rope(height: int, width: int, head_dim: int, num_special: int, device: torch.device) -> Rope:
    """2-D rotary table with patch centres in [-1, 1] by the longer side (DINOv3 style), periods 1 to 100, one group."""
    with torch.inference_mode(False):
        longest, quarter = max(height, width), head_dim // 4
        y = 2 * (torch.arange(height, dtype=torch.float64) + 0.5) / longest - 1
        x = 2 * (torch.arange(width, dtype=torch.float64) + 0.5) / longest - 1
        position = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).reshape(-1, 2, 1)  # [h * w, 2, 1]
        periods = 100.0 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
        angles = (2 * torch.pi * position / periods).flatten(1)[:, None]  # [h * w, 1, D / 2]
        return _table(angles, num_special, device)


@dataclass(frozen=True, eq=False)
class GlobalPass:
    """What global attention needs to know about one forward pass."""

    num_frames: int
    rope: Rope | None = None  # over all N tokens
    reduction: ForwardReduction | None = None
    context: KVContext | None = None
    mask: Tensor | None = None  # [N, N] bool, True: may attend; for training and as the reference in tests


class Attention(nn.Module):
    """Multi-head self-attention; queries and keys optionally normalised per head before rotation."""

    def __init__(self, dim: int, heads: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.q_norm = nn.LayerNorm(dim // heads, eps=1e-5) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // heads, eps=1e-5) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, rope: Rope | None = None, mask: Tensor | None = None) -> Tensor:
        """Dense attention over x [B, N, C] with an optional mask that broadcasts to [B, H, N, N]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, N, D]
        q, k = self._finish(q, self.q_norm, rope, v), self._finish(k, self.k_norm, rope, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(y.transpose(1, 2).flatten(2))

    def forward_global(self, x: Tensor, layer: int, run: GlobalPass) -> Tensor:
        """Attention over the tokens of all frames, x [B, N, C], and over the context; ``layer`` counts global ones."""
        y, plan = self.attend(x, layer, run)
        return y if plan is None else unmerge(y, plan)

    def attend(self, x: Tensor, layer: int, run: GlobalPass) -> tuple[Tensor, QueryPlan | None]:
        """``forward_global`` before the copy back: output rows [B, M, C], and the row each token takes (None: its own).

        Keys and values are projected for kept tokens only and stored final, after norm and rotation: no model in this
        family rotates by frame index, so they never need rotating again. Merged queries share one output, copied back
        to their members after the output projection.
        """
        reduction, rope = run.reduction, run.rope
        keep = reduction.keys(layer, x) if reduction is not None else None
        kept, key_rope = x, rope
        if keep is not None:
            index = keep.index.expand(len(x), -1)  # [B, M]
            kept = x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))  # [B, M, C]
            key_rope = rope.take(index) if rope is not None else None
        k, v = self._project(kept, 1, 3).unflatten(1, (2, -1)).unbind(1)  # [B, H, M, D]
        k = self._finish(k, self.k_norm, key_rope, v)
        q, plan = self._queries(x, layer, rope, reduction)
        bias = _bias(run, keep, q)
        if run.context is not None:
            own = k.shape[2]
            k, v = run.context.append(layer, k, v, tuple(range(run.num_frames)) if keep is None else keep.frames)
            bias = F.pad(bias, (k.shape[2] - own, 0)) if bias is not None else None
        assert plan is None or run.mask is None, "queries of frames under different masks cannot be merged"
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        del q, k, v  # before the projection asks for memory
        return self.proj(y.transpose(1, 2).flatten(2)), plan

    def _queries(
        self, x: Tensor, layer: int, rope: Rope | None, reduction: ForwardReduction | None
    ) -> tuple[Tensor, QueryPlan | None]:
        """Final queries [B, H, N, D] of x [B, N, C], or [B, H, M, D] merged and the plan that says how."""
        if reduction is None or not reduction.merges_queries:
            return self._query(x, rope), None
        if reduction.matching == "q":
            q = self._query(x, rope)
            plan = reduction.queries(layer, q.transpose(1, 2).flatten(2))
            return merge(q, plan), plan
        metric = x if reduction.matching == "input" else self.k_norm(self._project(x, 1, 2)).transpose(1, 2).flatten(2)
        plan = reduction.queries(layer, metric)
        sums = new_sums(len(x), plan, x.shape[-1], x.device)
        for part in pieces(x.shape[1], x.device):
            q = self._query(x[:, part], None if rope is None else rope.slice(part))
            add_to_sums(sums, q.transpose(1, 2).flatten(2), plan, part.start)
        return finish_sums(sums, plan, q.dtype).unflatten(-1, (self.heads, -1)).transpose(1, 2), plan

    def _query(self, x: Tensor, rope: Rope | None) -> Tensor:
        """Final queries [B, H, N, D] of x [B, N, C]."""
        q = self._project(x, 0, 1)
        return self._finish(q, self.q_norm, rope, q)

    def _project(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Thirds ``start`` to ``stop`` of the fused projection, [B, (stop - start) * H, N, D]."""
        dim = self.proj.in_features
        rows = slice(start * dim, stop * dim)
        y = F.linear(x, self.qkv.weight[rows], self.qkv.bias[rows])
        return y.unflatten(-1, ((stop - start) * self.heads, -1)).transpose(1, 2)

    @staticmethod
    def _finish(x: Tensor, norm: nn.Module, rope: Rope | None, like: Tensor) -> Tensor:
        """Normalise and rotate; under autocast both come out in float32, so return to the type of the values."""
        x = norm(x)
        return (x if rope is None else rope.apply(x)).to(like.dtype)


def _bias(run: GlobalPass, keep: KeyPlan | None, q: Tensor) -> Tensor | None:
    """Additive attention bias from the mask [N, N] and the key plan's bias [M]: None, [1, 1, 1, M] or [B, 1, N, M]."""
    bias = None if keep is None or keep.bias is None else keep.bias.to(q.dtype)[None, None, None]
    if run.mask is None:
        return bias
    allowed = run.mask if keep is None else run.mask[:, keep.index].transpose(0, 1)[:, None]
    masked = torch.zeros_like(allowed, dtype=q.dtype).masked_fill_(~allowed, float("-inf"))
    return masked if bias is None else masked + bias
