"""The plans of one forward pass, as the attention layers ask for them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spark3r_ros.config import ReductionConfig
from spark3r_ros.reduction.plan import (
    KeyPlan,
    QueryPlan,
    TokenLayout,
    farthest_frames,
    match,
    plan_keys,
    query_groups,
    strided_frames,
)
from spark3r_ros.reduction.schedule import check_layers, frame_factors


class ForwardReduction:
    """Decides, for one forward pass, what every global layer reduces. Everything that does not depend on features is
    computed here, once; ``keys`` and ``queries`` never wait for the device, except that coverage selection reads the
    chosen frames back at the first layer.

    ``sensitive``: global layers that prune by the base factor, see :func:`schedule.sensitive_layers`.
    """

    def __init__(
        self,
        config: ReductionConfig,
        layout: TokenLayout,
        num_layers: int,
        sensitive: frozenset[int],
        device: torch.device | str = "cpu",
    ) -> None:
        check_layers(sensitive, num_layers, "sensitive layers")
        self.config = config
        self.layout = layout
        self.num_layers = num_layers
        self.device = torch.device(device)
        self.factors = frame_factors(config, layout.num_frames)
        self._sensitive = sensitive
        self._key_plans: dict[int, KeyPlan | None] = {}
        self._covering: list[int] | None = None
        self._groups = None
        if self.factors.query > 1 and layout.num_frames > 1:
            groups = query_groups(layout, self.factors.query, config.group_size, device)
            self._groups = groups if groups.batches else None
        self._query_plan: QueryPlan | None = None
        self._query_plan_block = -1

    @property
    def merges_queries(self) -> bool:
        """Whether ``queries`` will ever return a plan."""
        return self._groups is not None

    @property
    def matching(self) -> str:
        """What ``queries`` expects as its metric: the layer's normalised ``input``, all its ``q``, or all its ``k``."""
        return self.config.matching

    def kv_factor(self, layer: int) -> int:
        """Key-value factor of a global layer."""
        check_layers((layer,), self.num_layers, "reduction")
        return self.factors.kv if layer in self._sensitive else self.factors.kv_insensitive

    def keys(self, layer: int, x: Tensor) -> KeyPlan | None:
        """Which tokens' keys and values to project in this layer; ``x`` [B, N, C] is its normalised input.

        None: all of them.
        """
        factor = self.kv_factor(layer)
        if factor not in self._key_plans:
            frames = self._kept_frames(factor, x)
            whole = len(frames) == self.layout.num_frames
            keep_special = self.config.keep_special_kv
            plan = None if whole else plan_keys(self.layout, frames, keep_special, self.device)
            self._key_plans[factor] = plan
        return self._key_plans[factor]

    def _kept_frames(self, factor: int, x: Tensor) -> tuple[int, ...]:
        num_frames = self.layout.num_frames
        if self.config.kv_selection == "stride" or factor == 1:
            return strided_frames(self.layout, factor)
        if self._covering is None:
            smallest = min(f for f in (self.factors.kv, self.factors.kv_insensitive) if f > 1)
            self._covering = farthest_frames(x, self.layout, math.ceil(num_frames / smallest))
        return tuple(sorted(self._covering[: math.ceil(num_frames / factor)]))

    def queries(self, layer: int, metric: Tensor) -> QueryPlan:
        """How to merge this layer's queries, matched on ``metric`` [B, N, C]; only when ``merges_queries``.

        The plan is shared by ``config.matching_interval`` consecutive global layers.
        """
        assert self._groups is not None, self.factors
        block = layer // self.config.matching_interval
        if self._query_plan is None or block != self._query_plan_block:
            self._query_plan = match(metric, self._groups)
            self._query_plan_block = block
        return self._query_plan
