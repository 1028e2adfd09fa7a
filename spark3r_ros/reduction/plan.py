"""What to reduce: plans of index tensors, and the pure functions that apply them.

Axes: B batch, N tokens of all frames (frame-major, special tokens first in every frame), H heads, D head channels,
C channels, M merged rows, S frames, G groups. A plan never holds features, only indices.

Queries: tokens of source frames are averaged into the most similar token of their group's destination frames; after
attention every token takes its destination's output. Keys and values: whole frames are kept, all others dropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from spark3r_ros.device import send
from spark3r_ros.reduction.schedule import check_factor

# Similarities are computed for so many source-destination pairs at a time: bounds the memory of matching.
MATCH_PAIRS = {"cpu": 1 << 21, "cuda": 1 << 27}


@dataclass(frozen=True)
class TokenLayout:
    """How the N = num_frames * tokens_per_frame tokens of a global layer are laid out.

    ``frame_order[i]`` is the temporal index of the frame stored at position i (None: stored in temporal order);
    ``reference`` is the *stored* position of the reference frame, None when this pass does not hold it.
    """

    num_frames: int
    tokens_per_frame: int
    num_special: int
    frame_order: tuple[int, ...] | None = None
    reference: int | None = 0

    def __post_init__(self) -> None:
        if self.num_frames < 1:
            raise ValueError(f"num_frames must be >= 1, got {self.num_frames}")
        if not 0 <= self.num_special < self.tokens_per_frame:
            raise ValueError(f"num_special must be in 0..{self.tokens_per_frame - 1}, got {self.num_special}")
        if self.frame_order is not None and sorted(self.frame_order) != list(range(self.num_frames)):
            raise ValueError(f"frame_order must be a permutation of 0..{self.num_frames - 1}, got {self.frame_order}")
        if self.reference is not None and not 0 <= self.reference < self.num_frames:
            raise ValueError(f"reference must be in 0..{self.num_frames - 1}, got {self.reference}")

    @property
    def num_tokens(self) -> int:
        return self.num_frames * self.tokens_per_frame

    def temporal_positions(self) -> list[int]:
        """Stored position of every frame, in temporal order."""
        if self.frame_order is None:
            return list(range(self.num_frames))
        positions = [0] * self.num_frames
        for position, time in enumerate(self.frame_order):
            positions[time] = position
        return positions


@dataclass(frozen=True, eq=False)
class KeyPlan:
    """The tokens whose keys and values are projected and kept."""

    index: Tensor  # [1, M] token indices: whole frames ascending, then special tokens of dropped frames
    frames: Sequence[int] | Tensor  # stored positions of the whole frames, ascending; a tensor: on the device only
    bias: Tensor | None = None  # [M] added to the logits; None: nothing to add


@dataclass(frozen=True, eq=False)
class QueryPlan:
    """Where every query goes: row ``target`` of the merged sequence, which is the mean of its members."""

    target: Tensor  # [B, N] row of the merged sequence
    weight: Tensor  # [B, M, 1] float32, one over the number of members
    num_rows: int


class GroupBatch(NamedTuple):
    """Groups of equal shape, matched together."""

    source: Tensor  # [G, n] indices of source tokens
    destination: Tensor  # [G, m] indices of destination tokens
    rows: Tensor  # [G, m] merged row of every destination token


@dataclass(frozen=True, eq=False)
class QueryGroups:
    """The half of a query plan that does not depend on features; one per forward pass."""

    num_rows: int
    own_row: Tensor  # [N] merged row of every token that keeps its own; 0 for source tokens
    batches: tuple[GroupBatch, ...]


def query_groups(layout: TokenLayout, factor: int, group_size: int, device: torch.device | str = "cpu") -> QueryGroups:
    """Split frames into groups of ``group_size`` consecutive frames, and those into destinations and sources.

    Frame f (in temporal order) is a destination when ``(f % group_size) % factor == 0``, the reference frame always.
    """
    check_factor("query", factor)
    if group_size < 2:
        raise ValueError(f"query group size must be >= 2 frames, got {group_size}")
    positions = torch.tensor(layout.temporal_positions())  # [S] stored position of every time
    time = torch.arange(layout.num_frames)
    group, place = time // group_size, time % group_size
    reference = -1 if layout.reference is None else layout.reference
    is_source = (place % factor != 0) & (positions != reference)  # [S] in temporal order
    merges = torch.zeros(layout.num_frames, layout.tokens_per_frame, dtype=torch.bool)  # in stored order
    merges[positions[is_source], layout.num_special :] = True
    merges = merges.flatten()
    own_row = (~merges).cumsum(0) - 1
    own_row[merges] = 0
    num_sources = torch.bincount(group, is_source.double()).long()  # [G]
    shapes = torch.stack([num_sources, torch.bincount(group) - num_sources], dim=1)  # [G, 2] sources, destinations
    batches = []
    for shape in shapes.unique(dim=0):  # whole groups, the last one, the one with the reference: four shapes at most
        if shape[0] > 0:
            chosen = (shapes == shape).all(dim=1)[group]  # [S]
            source = _patch_tokens(layout, positions[chosen & is_source].view(-1, int(shape[0])))
            destination = _patch_tokens(layout, positions[chosen & ~is_source].view(-1, int(shape[1])))
            tables = (source, destination, own_row[destination])
            batches.append(GroupBatch(*(send(table, device) for table in tables)))
    return QueryGroups(int((~merges).sum()), send(own_row, device), tuple(batches))


def _patch_tokens(layout: TokenLayout, frames: Tensor) -> Tensor:
    """Token indices [G, f * patches] of the patch tokens of ``frames`` [G, f]."""
    patches = torch.arange(layout.num_special, layout.tokens_per_frame)
    return (frames[:, :, None] * layout.tokens_per_frame + patches).flatten(1)


def match(metric: Tensor, groups: QueryGroups) -> QueryPlan:
    """Send every source token to the destination token of its group with the largest cosine similarity.

    ``metric`` [B, N, C] holds the features to compare. Sources need no normalisation: their length scales all of
    their similarities alike.
    """
    batch_size, num_tokens, channels = metric.shape
    flat = metric.reshape(-1, channels)  # [B * N, C]
    target = groups.own_row.expand(batch_size, -1).clone()  # [B, N]
    offsets = torch.arange(batch_size, device=metric.device)[:, None, None]
    for part in groups.batches:
        source = (part.source + offsets * num_tokens).flatten(0, 1)  # [B * G, n]
        destination = (part.destination + offsets * num_tokens).flatten(0, 1)  # [B * G, m]
        rows = part.rows.expand(batch_size, -1, -1).flatten(0, 1)  # [B * G, m]
        found = _match_groups(flat, source, destination, rows)
        target.view(-1)[source] = found
    return _query_plan(target, groups.num_rows)


def _match_groups(flat: Tensor, source: Tensor, destination: Tensor, rows: Tensor) -> Tensor:
    """Merged rows [G, n] of the best destinations, a bounded number of pairs at a time."""
    pairs = source.shape[1] * destination.shape[1]
    step = max(1, MATCH_PAIRS["cpu" if flat.device.type == "cpu" else "cuda"] // pairs)
    found = torch.empty_like(source)
    for start in range(0, source.shape[0], step):
        part = slice(start, start + step)
        towards = torch.nn.functional.normalize(flat[destination[part]], dim=-1)  # [g, m, C]
        similarity = flat[source[part]] @ towards.mT  # [g, n, m]
        found[part] = rows[part].gather(1, similarity.max(dim=-1).indices)
    return found


def _query_plan(target: Tensor, num_rows: int) -> QueryPlan:
    members = torch.zeros(target.shape[0], num_rows, device=target.device)
    members.scatter_add_(1, target, torch.ones_like(target, dtype=members.dtype))
    return QueryPlan(target, members.reciprocal_().unsqueeze(-1), num_rows)


def plan_query_merge(metric: Tensor, layout: TokenLayout, factor: int, group_size: int = 20) -> QueryPlan:
    """Match the queries of one global layer on ``metric`` [B, N, C]."""
    return match(metric, query_groups(layout, factor, group_size, metric.device))


def merge(q: Tensor, plan: QueryPlan) -> Tensor:
    """Mean of the members of every row: ``q`` [B, H, N, D] (after norm and RoPE) -> [B, H, M, D]."""
    heads = q.shape[1]
    sums = new_sums(q.shape[0], plan, heads * q.shape[-1], q.device)
    add_to_sums(sums, q.transpose(1, 2).flatten(2), plan, 0)
    return finish_sums(sums, plan, q.dtype).unflatten(2, (heads, -1)).transpose(1, 2)


def new_sums(batch_size: int, plan: QueryPlan, channels: int, device: torch.device) -> Tensor:
    """Zeros [B, M, C] in float32, for :func:`add_to_sums`: merging piece by piece never holds all queries at once."""
    return torch.zeros(batch_size, plan.num_rows, channels, device=device)


def add_to_sums(sums: Tensor, rows: Tensor, plan: QueryPlan, start: int) -> None:
    """Add the queries ``rows`` [B, n, C] of tokens ``start .. start + n`` to their rows of ``sums``, in place."""
    index = _flat_rows(plan.target[:, start : start + rows.shape[1]], plan.num_rows)
    sums.view(-1, sums.shape[-1]).index_add_(0, index, rows.to(sums.dtype).flatten(0, 1))


def finish_sums(sums: Tensor, plan: QueryPlan, dtype: torch.dtype) -> Tensor:
    """Sums [B, M, C] to means, in place, in ``dtype``."""
    return sums.mul_(plan.weight).to(dtype)


def unmerge(y: Tensor, plan: QueryPlan, part: slice = slice(None)) -> Tensor:
    """Copy every row's output to its members: ``y`` [B, M, C] (after the output projection) -> [B, N, C].

    ``part``: for these tokens only.
    """
    target = plan.target[:, part]
    return y.flatten(0, 1).index_select(0, _flat_rows(target, plan.num_rows)).unflatten(0, target.shape)


def _flat_rows(target: Tensor, num_rows: int) -> Tensor:
    """Rows ``target`` [B, n] counted over the whole batch, [B * n]."""
    return (target + num_rows * torch.arange(len(target), device=target.device)[:, None]).flatten()


def strided_frames(layout: TokenLayout, factor: int) -> tuple[int, ...]:
    """Stored positions of frames 0, r, 2r, ... of the temporal order and of the reference, ascending."""
    check_factor("key-value", factor)
    kept = set(layout.temporal_positions()[::factor])
    if layout.reference is not None:
        kept.add(layout.reference)
    return tuple(sorted(kept))


def farthest_frames(x: Tensor, layout: TokenLayout, count: int, start: Tensor | None = None) -> Tensor:
    """The ``count`` frames [count] that cover ``x`` [1, N, C] best, in the order chosen; any prefix covers well too.

    Farthest-point sampling on the cosine distance of mean patch tokens (the covering rule of arXiv 2605.23892), from
    frame ``start`` [] on; None: from the reference, or the first frame. The result stays on the device.
    """
    if x.shape[0] != 1:
        raise ValueError(f"reduction.kv_selection 'coverage' takes one sequence at a time, got a batch of {x.shape[0]}")
    tokens = x[0].unflatten(0, (layout.num_frames, layout.tokens_per_frame))[:, layout.num_special :]
    descriptor = torch.nn.functional.normalize(tokens.float().mean(dim=1), dim=-1)  # [S, C]
    if start is None:
        first = layout.temporal_positions()[0] if layout.reference is None else layout.reference
        start = torch.full((), first, device=x.device)
    chosen = [start[None]]  # each [1]: an index without a dimension would be read back
    nearest = torch.full((layout.num_frames,), -math.inf, device=x.device)  # [S] similarity to the nearest chosen frame
    for _ in range(1, count):
        nearest = torch.maximum(nearest, descriptor @ descriptor.index_select(0, chosen[-1])[0])
        nearest.scatter_(0, chosen[-1], math.inf)  # never chosen twice, even among equal frames
        chosen.append(nearest.argmin(dim=0, keepdim=True))
    return torch.cat(chosen)


def plan_keys(
    layout: TokenLayout, frames: Sequence[int] | Tensor, keep_special: bool, device: torch.device | str = "cpu"
) -> KeyPlan:
    """Keep the keys of ``frames`` (stored positions, ascending) and, if wanted, the special tokens of all others.

    With ``keep_special`` every special token stays while each kept patch stands for S / len(frames) patches, so special
    tokens get the logit bias -log(S / len(frames)): on inputs whose frames repeat this equals dense attention.
    """
    kept = _on_device(frames, device)  # [K]
    index = _frame_tokens(layout, kept, layout.tokens_per_frame)
    if not keep_special or layout.num_special == 0:
        return KeyPlan(index[None], frames)
    is_kept = torch.zeros(layout.num_frames, dtype=torch.int8, device=device).index_fill_(0, kept, 1)
    dropped = is_kept.argsort(stable=True)[: layout.num_frames - len(kept)]
    index = torch.cat([index, _frame_tokens(layout, dropped, layout.num_special)])
    is_special = index % layout.tokens_per_frame < layout.num_special
    bias = torch.where(is_special, -math.log(layout.num_frames / len(kept)), 0.0)
    return KeyPlan(index[None], frames, bias)


def _on_device(frames: Sequence[int] | Tensor, device: torch.device | str) -> Tensor:
    return frames if isinstance(frames, Tensor) else send(torch.tensor(frames), device)


def _frame_tokens(layout: TokenLayout, frames: Tensor, count: int) -> Tensor:
    """Indices [F * count] of the first ``count`` tokens of each of ``frames`` [F]."""
    return (frames[:, None] * layout.tokens_per_frame + torch.arange(count, device=frames.device)).flatten()


def turn_keys(plan: KeyPlan, layout: TokenLayout, start: Tensor) -> KeyPlan:
    """The plan for frames whose time is counted from frame ``start`` [] on, the last joined to the first.

    So a reference frame that only the device knows takes the place of frame 0, and every shape is known beforehand.
    """
    index = (plan.index + start * layout.tokens_per_frame) % layout.num_tokens
    return replace(plan, index=index, frames=(_on_device(plan.frames, start.device) + start) % layout.num_frames)


def turn_groups(groups: QueryGroups, layout: TokenLayout, start: Tensor) -> QueryGroups:
    """The same for the groups of queries."""
    shift, n = start * layout.tokens_per_frame, layout.num_tokens
    own_row = groups.own_row[(torch.arange(n, device=start.device) - shift) % n]
    batches = tuple(GroupBatch((b.source + shift) % n, (b.destination + shift) % n, b.rows) for b in groups.batches)
    return QueryGroups(groups.num_rows, own_row, batches)
