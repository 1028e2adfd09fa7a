"""Other ways to make global attention cheap, from their papers' descriptions, on the same weights and the same seam.

Every method replaces ``Attention.attend``: it gets the normalised tokens x [1, N, C] of one global layer and returns
output rows and how tokens take them. Dense attention is ``Attention.attend`` without reduction (the best kernel that
``scaled_dot_product_attention`` has), Spark3R is the same with it.

=================  ====================================================================================================
uniform            FastVGGT's idea: one merge plan for queries, keys and values; about a third of the tokens remain
grid               AVGGT's: the first layers look inside frames only, later ones keep one key of each 2x2 patches
covering           GoToHunt's (arXiv 2605.23892): the same few frames that cover the scene are the keys of all queries
=================  ====================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from spark3r_ros.backbone.attention import Attention, GlobalPass, Rope
from spark3r_ros.reduction import QueryPlan, TokenLayout, merge, plan_keys
from spark3r_ros.reduction.plan import farthest_frames

Attend = Callable[[Attention, Tensor, int, GlobalPass], tuple[Tensor, QueryPlan | None]]

GRID_FRAME_LAYERS = 9  # of 24: AVGGT turns the first global layers into frame attention
COVERING_FRAMES = 25
COVERING_THINNED_LAYERS, COVERING_PATCH_STRIDE = range(2, 9), 3  # of 24 layers; 0 and 1 are frame attention
MATCH_ROWS = 4096  # source tokens compared at a time: bounds the memory of the global matching


@dataclass(frozen=True)
class Grid:
    """Where a trunk's tokens are: layout in time, and patch rows and columns."""

    layout: TokenLayout
    rows: int
    columns: int
    num_layers: int

    def corner_patches(self) -> Tensor:
        """Token places inside a frame of one patch per 2x2 cell."""
        y, x = torch.meshgrid(torch.arange(0, self.rows, 2), torch.arange(0, self.columns, 2), indexing="ij")
        return self.layout.num_special + (y * self.columns + x).flatten()

    def all_frames(self, places: Tensor) -> Tensor:
        """Token indices of these places in every frame."""
        frames = torch.arange(self.layout.num_frames)[:, None] * self.layout.tokens_per_frame
        return (frames + places).flatten()


def within_frames(attention: Attention, x: Tensor, grid: Grid, rope: Rope | None) -> Tensor:
    """Frame attention in the place of global attention: [1, N, C]."""
    tokens = grid.layout.tokens_per_frame
    one = None if rope is None else rope.slice(slice(0, tokens))
    return attention(x[0].unflatten(0, (-1, tokens)), one).flatten(0, 1)[None]


def keys_and_values(attention: Attention, x: Tensor, index: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor]:
    """Final keys and values [1, H, M, D] of the tokens ``index`` [M]."""
    k, v = attention._project(x[:, index], 1, 3).unflatten(1, (2, -1)).unbind(1)
    return attention._finish(k, attention.k_norm, None if rope is None else rope.take(index[None]), v), v


def finish(attention: Attention, y: Tensor) -> Tensor:
    return attention.proj(y.transpose(1, 2).flatten(2))


class Uniform:
    """Uniform merging. Destinations: all of the first frame, special tokens, one patch per 2x2 cell; every tenth of the
    other patches is protected (neither merges nor is merged into); all the rest go to the most similar destination
    anywhere in the sequence. Queries, keys and values are averaged by the same plan."""

    def __init__(self, grid: Grid) -> None:
        num_tokens, layout = grid.layout.num_tokens, grid.layout
        places = torch.arange(num_tokens) % layout.tokens_per_frame
        destination = (torch.arange(num_tokens) < layout.tokens_per_frame) | (places < layout.num_special)
        destination[grid.all_frames(grid.corner_patches())] = True
        others = (~destination).nonzero().squeeze(1)
        protected = torch.zeros(num_tokens, dtype=torch.bool)
        protected[others[::10]] = True
        self.source = (~destination & ~protected).nonzero().squeeze(1)
        self.destination = destination.nonzero().squeeze(1)
        kept = destination | protected
        self.own_row = kept.cumsum(0) - 1
        self.num_rows = int(kept.sum())

    def plan(self, x: Tensor) -> QueryPlan:
        towards = F.normalize(x[0, self.destination], dim=-1).T  # [C, m]
        target = self.own_row.clone()
        for rows in self.source.split(MATCH_ROWS):
            target[rows] = self.own_row[self.destination[(x[0, rows] @ towards).max(dim=-1).indices]]
        members = torch.bincount(target, minlength=self.num_rows).float()
        return QueryPlan(target[None], members.reciprocal()[None, :, None], self.num_rows)

    def attend(self, attention: Attention, x: Tensor, _layer: int, run: GlobalPass) -> tuple[Tensor, QueryPlan]:
        plan = self.plan(x)
        q, k, v = attention._project(x, 0, 3).unflatten(1, (3, -1)).unbind(1)
        q = merge(attention._finish(q, attention.q_norm, run.rope, v), plan)
        k = merge(attention._finish(k, attention.k_norm, run.rope, v), plan)
        return finish(attention, F.scaled_dot_product_attention(q, k, merge(v, plan))), plan


class GridKeys:
    """Keys on a grid: one patch per 2x2 cell, all special tokens, the mean key, and for every query its own key."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.frame_layers = round(GRID_FRAME_LAYERS * grid.num_layers / 24)
        special = torch.arange(grid.layout.num_special)
        self.index = grid.all_frames(torch.cat([special, grid.corner_patches()]))
        self.own_is_kept = torch.zeros(grid.layout.num_tokens, dtype=torch.bool)
        self.own_is_kept[self.index] = True

    def attend(self, attention: Attention, x: Tensor, layer: int, run: GlobalPass) -> tuple[Tensor, None]:
        if layer < self.frame_layers:
            return within_frames(attention, x, self.grid, run.rope), None
        q, k, v = attention._project(x, 0, 3).unflatten(1, (3, -1)).unbind(1)
        q = attention._finish(q, attention.q_norm, run.rope, v)
        k = attention._finish(k, attention.k_norm, run.rope, v)
        keys = torch.cat([k[:, :, self.index], k.mean(dim=2, keepdim=True)], dim=2)
        values = torch.cat([v[:, :, self.index], v.mean(dim=2, keepdim=True)], dim=2)
        y, log_sum = attention_with_log_sum(q, keys, values)
        own = (q * k).sum(-1) / q.shape[-1] ** 0.5  # [1, H, N] logit of the token's own key
        share = torch.sigmoid(own - log_sum).masked_fill(self.own_is_kept, 0.0)[..., None]
        return finish(attention, y + share * (v - y)), None


def attention_with_log_sum(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention [B, H, N, D] and the log of its softmax denominator [B, H, N], by the flash kernel."""
    if q.is_cuda:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)


class Covering:
    """A few covering frames as keys. Layers 0-1 look inside frames; in layers 2-8 the covering frames' patches are
    thinned by 3 (layer numbers of a 24-layer trunk, scaled to others)."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.count = min(COVERING_FRAMES, grid.layout.num_frames)
        self.index: Tensor | None = None

    def _level(self, layer: int) -> int:
        return layer * 24 // self.grid.num_layers

    def attend(self, attention: Attention, x: Tensor, layer: int, run: GlobalPass) -> tuple[Tensor, None]:
        layout = self.grid.layout
        if self.index is None or layer == 0:
            frames = tuple(sorted(farthest_frames(x, layout, self.count)))
            self.index = plan_keys(layout, frames, keep_special=False).index[0]
        if self._level(layer) < COVERING_THINNED_LAYERS.start:
            return within_frames(attention, x, self.grid, run.rope), None
        index = self.index
        if self._level(layer) in COVERING_THINNED_LAYERS:
            place = index % layout.tokens_per_frame
            index = index[(place < layout.num_special) | ((place - layout.num_special) % COVERING_PATCH_STRIDE == 0)]
        k, v = keys_and_values(attention, x, index, run.rope)
        return finish(attention, F.scaled_dot_product_attention(attention._query(x, run.rope), k, v)), None


BASELINES: dict[str, type[Uniform | GridKeys | Covering]] = {"uniform": Uniform, "grid": GridKeys, "covering": Covering}
