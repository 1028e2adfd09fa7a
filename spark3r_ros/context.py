"""The key-value context: what earlier windows leave for later ones, and the only eviction policy.

After a bidirectional window solve the keys and values of chosen keyframes stay behind, one page per frame and layer, as
they were used: pruned, normalised, rotated. No re-rotation is ever needed, since positions carry no frame index. Later
passes attend to ``[special ring | pages | own tokens]``, one contiguous slice of a preallocated buffer per layer.

Tiers: *reference* pages (the frames that fix the gauge) are never evicted; *recent* pages (the last commit) stay until
the next commit; *covering* pages are thinned closest-first, so that what stays covers the scene, never by age alone;
*special* tokens of evicted frames live on in a ring. Eviction fills the hole with the last page, so pages stay dense.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import ContextConfig
from .device import send


@dataclass(frozen=True)
class ContextSpec:
    """What a backbone caches per frame. ``layer_tokens[l]``: tokens per frame that global layer l attends with."""

    layer_tokens: tuple[int, ...]
    num_heads: int
    head_dim: int
    num_special: int
    sensitive: frozenset[int]  # layers that keep every page, as `reduction.sensitive_layers` means it; others a share
    camera_shape: tuple[int, int] = (0, 0)  # tokens and channels per frame of a camera head that mixes frames
    num_reference: int = 1  # how many of the first keyframes fix the gauge


class _Layer:
    """Keys and values of one layer: a ring of special tokens, then pages, then the tokens of the running pass."""

    def __init__(self, ring: int, num_special: int, pages: int, window: int, tokens: int, heads: int, like: Tensor):
        self.tokens, self.num_special = tokens, num_special
        self.ring_capacity, self.page_capacity = ring, pages
        length = ring * num_special + (pages + window) * tokens
        self.kv = like.new_zeros((2, 1, heads, length, like.shape[-1]))  # [key | value, B=1, H, N, D]
        self.camera: Tensor | None = None  # [pages + window, T, C], of the key layer only
        self.clear()

    def clear(self) -> None:
        self.ids: list[int] = []  # frame id of each page
        self.ring_count = 0  # special entries ever pushed
        self.pending: Sequence[int] | Tensor = ()  # positions in the running pass of the whole frames appended

    @property
    def start(self) -> int:
        """First valid token; the ring fills from its end so that valid tokens are always one slice."""
        return (self.ring_capacity - min(self.ring_count, self.ring_capacity)) * self.num_special

    @property
    def own_start(self) -> int:
        return self.page(len(self.ids)).start

    def page(self, slot: int) -> slice:
        first = self.ring_capacity * self.num_special + slot * self.tokens
        return slice(first, first + self.tokens)

    def copy_page(self, source: int, target: int) -> None:
        if source != target:
            self.kv[..., self.page(target), :] = self.kv[..., self.page(source), :]

    def remove(self, slot: int, keep_special: bool) -> None:
        """Drop one page, its special tokens going to the ring if wanted; the last page moves into its place."""
        if keep_special and self.ring_capacity and self.num_special:
            entry = self.ring_capacity - 1 - self.ring_count % self.ring_capacity  # over the oldest entry
            source, target, n = self.page(slot).start, entry * self.num_special, self.num_special
            self.kv[..., target : target + n, :] = self.kv[..., source : source + n, :]
            self.ring_count += 1
        last = len(self.ids) - 1
        self.copy_page(last, slot)
        if self.camera is not None:
            self.camera[slot] = self.camera[last]
        self.ids[slot] = self.ids[last]
        self.ids.pop()


class KVContext:
    """Bounded cross-window context of one stream (batch size 1).

    One pass is ``begin``, one ``append`` per layer, and then ``commit`` for the frames worth remembering, or nothing
    for frames that only look (tracking). All memory, the space of the running pass included, is allocated by
    ``reserve``, or by the first ``begin``, and never exceeds ``config.budget_mb``, not even while it is replaced by
    more for a longer pass.

    Raises:
        ValueError: at ``reserve`` or ``begin`` when the budget cannot hold the pass and its reference pages.
    """

    def __init__(self, spec: ContextSpec, config: ContextConfig, device: torch.device | str, dtype: torch.dtype):
        self.spec, self.config = spec, config
        self._like = torch.empty((0, spec.head_dim), device=device, dtype=dtype)
        self._layers: list[_Layer] = []
        self._window_frames = 0
        self._reference: list[int] = []
        self._recent: frozenset[int] = frozenset()
        self._window_of: dict[int, int] = {}  # frame id -> number of the commit it came with
        self._mean_keys = self._like.new_zeros(
            (0, spec.num_heads * spec.head_dim)
        )  # [rows, H * D] mean keys of patches at the key layer
        self._mean_row: dict[int, int] = {}  # frame id -> its row there
        self._num_commits = 0
        self._camera_start = -1  # row of the running pass's first camera token; -1: it has none

    # -- what is known about the context -------------------------------------------------------------------------

    @property
    def frame_ids(self) -> tuple[int, ...]:
        """Ids of the frames whose pages the fullest layers hold."""
        return tuple(self._layers[self._key_layer].ids) if self._layers else ()

    @property
    def num_frames(self) -> int:
        return len(self.frame_ids)

    @property
    def is_empty(self) -> bool:
        return self.num_frames == 0

    @property
    def bytes(self) -> int:
        """Allocated bytes: pages, ring and running pass of all layers, camera tokens, and what eviction compares."""
        tensors = [self._mean_keys, *(layer.kv for layer in self._layers)]
        tensors += [layer.camera for layer in self._layers if layer.camera is not None]
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def budget_bytes(self) -> int:
        return int(self.config.budget_mb * 2**20)

    # -- one pass ------------------------------------------------------------------------------------------------

    def reserve(self, num_frames: int) -> None:
        """Allocate for passes of up to ``num_frames`` frames; what is held already stays."""
        if num_frames > self._window_frames:
            self._allocate(num_frames)

    def holds(self, num_frames: int) -> bool:
        """Whether the budget allows a pass over ``num_frames`` frames now: growing needs room beside what is held."""
        if num_frames <= self._window_frames:
            return True
        return self._bytes_for(self._least, num_frames) + self.bytes <= self.budget_bytes

    def begin(self, num_frames: int) -> None:
        """Start a pass over ``num_frames`` frames; what the last pass did not commit is forgotten."""
        self.reserve(num_frames)
        for layer in self._layers:
            layer.pending = ()
        self._camera_start = -1

    def append(self, layer: int, k: Tensor, v: Tensor, frames: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Make this pass's keys visible at one layer.

        Args:
            layer: global layer index.
            k, v: [1, H, M, D], the first ``len(frames) * tokens`` are whole frames, the rest extra special tokens that
                are visible in this pass only.
            frames: positions in the pass of those whole frames; a tensor is read back by ``commit``.

        Returns:
            Keys and values [1, H, C + M, D] over context and pass: views of the buffer, valid until the next append.
        """
        store = self._layers[layer]
        first, last = store.own_start, store.own_start + k.shape[2]
        assert last <= store.kv.shape[3], (last, store.kv.shape)
        store.kv[0, :, :, first:last] = k
        store.kv[1, :, :, first:last] = v
        store.pending = frames
        return store.kv[0, :, :, store.start : last], store.kv[1, :, :, store.start : last]

    def append_camera(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Camera tokens [S, T, C] of this pass behind those of the context.

        Returns:
            All tokens [F + S, T, C] and the number of the window each belongs to [F + S], for a block-causal mask.
        """
        key_layer = self._layers[self._key_layer]
        assert key_layer.camera is not None, "the spec has no camera_shape"
        first = self._camera_start = len(key_layer.ids)
        last = first + len(tokens)
        key_layer.camera[first:last] = tokens
        windows = [self._window_of[i] for i in key_layer.ids] + [self._num_commits] * len(tokens)
        return key_layer.camera[:last], send(torch.tensor(windows), tokens.device)

    @torch.no_grad()
    def commit(self, frames: Sequence[int], ids: Sequence[int]) -> tuple[int, ...]:
        """Keep frames of the running pass as pages; the pass ends.

        A frame that is in the context already is replaced (the overlap of windows), except reference frames: their
        pages carry the gauge. Frames whose keys the reduction dropped have nothing to keep at that layer.

        Args:
            frames: positions in the pass.
            ids: their keyframe ids, unique in the stream.

        Returns:
            Ids of the frames that the context now holds.
        """
        wanted = {position: ident for position, ident in zip(frames, ids) if ident not in self._reference}
        for layer in self._layers:
            layer.pending = torch.as_tensor(layer.pending).tolist()
        key_layer = self._layers[self._key_layer]
        free = iter(sorted(set(range(len(self._mean_keys))) - set(self._mean_row.values())))
        for index, position in enumerate(key_layer.pending):
            if position in wanted:
                ident = wanted[position]
                if len(self._reference) < self.spec.num_reference:
                    self._reference.append(ident)
                self._window_of[ident] = self._num_commits
                own = slice(key_layer.own_start + index * key_layer.tokens, None)
                patches = key_layer.kv[0, 0, :, own][:, key_layer.num_special : key_layer.tokens]  # [H, P, D]
                if ident not in self._mean_row:
                    self._mean_row[ident] = next(free)
                self._mean_keys[self._mean_row[ident]] = patches.float().mean(dim=1).flatten()  # [H * D]
        self._recent = frozenset(ids)
        for layer in self._layers:
            self._commit_layer(layer, wanted)
        present = {ident for layer in self._layers for ident in layer.ids}
        self._mean_row = {i: row for i, row in self._mean_row.items() if i in present}
        self._window_of = {i: w for i, w in self._window_of.items() if i in present}
        self._num_commits += 1
        return self.frame_ids

    def reset(self) -> None:
        """Forget everything; the memory stays allocated."""
        for layer in self._layers:
            layer.clear()
        self._reference, self._recent = [], frozenset()
        self._window_of, self._mean_row = {}, {}
        self._num_commits, self._camera_start = 0, -1

    # -- pages and eviction --------------------------------------------------------------------------------------

    def _commit_layer(self, layer: _Layer, wanted: dict[int, int]) -> None:
        first_own = len(layer.ids)  # the running pass lies where these page slots would be
        renewed = {wanted[position] for position in layer.pending if position in wanted}
        for slot in reversed(range(len(layer.ids))):
            if layer.ids[slot] in renewed:
                layer.remove(slot, keep_special=False)
        for index, position in enumerate(layer.pending):
            if position not in wanted or wanted[position] not in self._mean_row:
                continue
            if len(layer.ids) == layer.page_capacity:
                layer.remove(self._victim(layer.ids), keep_special=True)
            target = len(layer.ids)
            layer.copy_page(first_own + index, target)
            if layer.camera is not None and self._camera_start >= 0:
                layer.camera[target] = layer.camera[self._camera_start + position]
            layer.ids.append(wanted[position])
        layer.pending = ()

    def _victim(self, ids: list[int]) -> int:
        """Slot to evict: of the closest pair by mean key, the frame that is also closer to the rest; then the older.

        Reference frames are never candidates; frames of the running commit only when nothing else is left.
        """
        old = [s for s, i in enumerate(ids) if i not in self._reference and i not in self._recent]
        new = [s for s, i in enumerate(ids) if i not in self._reference]
        assert new, (ids, self._reference)  # _allocate leaves room beside the reference pages
        keys = self._mean_keys[[self._mean_row[i] for i in ids]]  # [F, H * D]
        distance = torch.cdist(keys, keys)
        distance.fill_diagonal_(math.inf)
        ranked = distance.sort(dim=1).values.tolist()
        return min(old or new, key=lambda slot: (ranked[slot], ids[slot]))

    # -- memory --------------------------------------------------------------------------------------------------

    def _num_pages(self, layer: int, frames: int) -> int:
        """Pages of one layer when the fullest layers hold ``frames``; insensitive layers hold a share of them."""
        share = max(self._least, -(-frames // self.config.insensitive_divisor))
        return frames if layer in self.spec.sensitive else share

    @property
    def _least(self) -> int:
        """The fewest pages that a context is worth having for."""
        return self.spec.num_reference + 1

    @property
    def _key_layer(self) -> int:
        """The layer that stands for the whole: the middle one with patches of those that keep every page, if any do."""
        tokens = self.spec.layer_tokens
        whole = [i for i, count in enumerate(tokens) if count == max(tokens)]
        fullest = [i for i in whole if i in self.spec.sensitive] or whole
        return fullest[len(fullest) // 2]

    def _bytes_for(self, frames: int, window: int) -> int:
        spec = self.spec
        tokens = sum(
            self.config.special_frames * spec.num_special + (self._num_pages(i, frames) + window) * per_frame
            for i, per_frame in enumerate(spec.layer_tokens)
        )
        camera = (frames + window) * spec.camera_shape[0] * spec.camera_shape[1]
        width = spec.num_heads * spec.head_dim
        singles = camera + self._num_mean_keys(frames, window) * width  # kept in float32
        return 2 * tokens * width * self._like.element_size() + 4 * singles

    def _num_mean_keys(self, frames: int, window: int) -> int:
        """Frames that may have a page in some layer, and those of a pass beside them."""
        return sum(self._num_pages(i, frames) for i in range(len(self.spec.layer_tokens))) + window

    def _allocate(self, window: int) -> None:
        """Buffers for passes of up to ``window`` frames and as many pages as the budget and the configuration allow."""
        least = self._least
        room = self.budget_bytes - self.bytes  # old buffers are still there while their pages move into new ones
        frames = self.config.frames
        while frames > least and self._bytes_for(frames, window) > room:
            frames -= 1
        frames = max(frames, least)
        if (need := self._bytes_for(frames, window) + self.bytes) > self.budget_bytes:
            raise ValueError(
                f"context.budget_mb must be >= {need / 2**20:.1f} for passes of {window} frames at this image size, "
                f"got {self.config.budget_mb:g}; raise it, or lower window.size or the image size"
            )
        old, self._window_frames = self._layers, window
        with torch.inference_mode(False):  # buffers outlive the pass that allocates them
            layers = [self._make_layer(i, frames, window) for i in range(len(self.spec.layer_tokens))]
            size = (self._num_mean_keys(frames, window), self.spec.num_heads * self.spec.head_dim)
            mean_keys = self._like.new_zeros(size, dtype=torch.float32)
        for source, target in zip(old, layers):
            self._adopt(source, target)
        ids = sorted({ident for layer in layers for ident in layer.ids})
        rows = [self._mean_row[ident] for ident in ids]
        mean_keys[: len(rows)] = self._mean_keys[rows]
        self._mean_row = dict(zip(ids, range(len(rows))))
        self._layers, self._mean_keys = layers, mean_keys

    def _make_layer(self, index: int, frames: int, window: int) -> _Layer:
        spec = self.spec
        tokens, pages = spec.layer_tokens[index], self._num_pages(index, frames)
        ring = self.config.special_frames
        layer = _Layer(ring, spec.num_special, pages, window, tokens, spec.num_heads, self._like)
        if index == self._key_layer and spec.camera_shape[0]:
            layer.camera = self._like.new_zeros((pages + window, *spec.camera_shape), dtype=torch.float32)
        return layer

    def _adopt(self, source: _Layer, target: _Layer) -> None:
        """Move ring and pages into a buffer made for longer passes; what no longer fits is evicted by the policy."""
        while len(source.ids) > target.page_capacity:
            source.remove(self._victim(source.ids), keep_special=True)
        end = source.own_start
        target.kv[..., :end, :] = source.kv[..., :end, :]
        target.ids, target.ring_count = source.ids, source.ring_count
        if target.camera is not None and source.camera is not None:
            target.camera[: len(source.ids)] = source.camera[: len(source.ids)]
