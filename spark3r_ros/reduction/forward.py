"""The plans of one forward pass, as the attention layers ask for them."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    turn_groups,
    turn_keys,
)
from spark3r_ros.reduction.schedule import check_layers, frame_factors


class ForwardReduction:
    """Decides, for one forward pass, what every global layer reduces. Everything that does not depend on features is
    computed here, once; nothing ever waits for the device.

    ``sensitive``: global layers that prune by the base factor, see :func:`schedule.sensitive_layers`. ``start`` []: the
    reference frame where the model has chosen it and only the device knows it; strides and groups then begin there and
    go round.
    """

    def __init__(
        self,
        config: ReductionConfig,
        layout: TokenLayout,
        num_layers: int,
        sensitive: frozenset[int],
        device: torch.device | str = "cpu",
        start: Tensor | None = None,
    ) -> None:
        assert start is None or layout.reference == 0, "strides begin at frame 0, which takes the reference's place"
        check_layers(sensitive, num_layers, "sensitive layers")
        self.config = config
        self.layout = layout
        self.num_layers = num_layers
        self.device = torch.device(device)
        self._start = start
        self.factors = frame_factors(config, layout.num_frames)
        self._sensitive = sensitive
        self._key_plans: dict[int, KeyPlan | None] = {}
        self._covering: Tensor | None = None  # frames in the order that coverage chose them
        self._groups = None
        if self.factors.query > 1 and layout.num_frames > 1:
            groups = query_groups(layout, self.factors.query, config.group_size, device)
            groups = groups if start is None else turn_groups(groups, layout, start)
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
            self._key_plans[factor] = self._plan_keys(factor, x)
        return self._key_plans[factor]

    def _plan_keys(self, factor: int, x: Tensor) -> KeyPlan | None:
        covers = self.config.kv_selection == "coverage" and factor > 1
        frames: Sequence[int] | Tensor = self._cover(factor, x) if covers else strided_frames(self.layout, factor)
        if len(frames) == self.layout.num_frames:
            return None
        plan = plan_keys(self.layout, frames, self.config.keep_special_kv, self.device)
        return plan if covers or self._start is None else turn_keys(plan, self.layout, self._start)

    def _cover(self, factor: int, x: Tensor) -> Tensor:
        """The frames that cover this pass best, ascending; decided at the first layer that asks."""
        num_frames = self.layout.num_frames
        if self._covering is None:
            smallest = min(f for f in (self.factors.kv, self.factors.kv_insensitive) if f > 1)
            self._covering = farthest_frames(x, self.layout, math.ceil(num_frames / smallest), self._start)
        return self._covering[: math.ceil(num_frames / factor)].sort().values

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
