"""Spark3R token reduction (arXiv 2605.06270): merge queries, prune keys and values, each by its own factor.

``schedule`` says how much, ``plan`` what and how, ``forward`` keeps the plans of one forward pass, ``probe`` measures
which layers are sensitive. Nothing here knows a model; attention layers call :class:`ForwardReduction`.
"""

from spark3r_ros.reduction.forward import ForwardReduction
from spark3r_ros.reduction.plan import (
    KeyPlan,
    QueryPlan,
    TokenLayout,
    add_to_sums,
    finish_sums,
    merge,
    new_sums,
    plan_keys,
    plan_query_merge,
    unmerge,
)
from spark3r_ros.reduction.schedule import (
    FactorFile,
    Factors,
    frame_factors,
    load_factor_file,
    save_factor_file,
    sensitive_layers,
)

__all__ = [
    "FactorFile",
    "Factors",
    "ForwardReduction",
    "KeyPlan",
    "QueryPlan",
    "TokenLayout",
    "add_to_sums",
    "finish_sums",
    "frame_factors",
    "load_factor_file",
    "merge",
    "new_sums",
    "plan_keys",
    "plan_query_merge",
    "save_factor_file",
    "sensitive_layers",
    "unmerge",
]
