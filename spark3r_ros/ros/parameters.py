"""ROS parameters generated from the one configuration: names, defaults, descriptions, ranges, validation."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Mapping
from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.node import Node

from spark3r_ros.config import Config, NodeConfig, Parameter, node_parameters, parameters, with_values

# Parameters that rclpy itself declares or reads.
_OF_ROS = ("use_sim_time", "start_type_description_service")
_OF_ROS_PREFIX = "qos_overrides."


def all_parameters(config: Config | None = None, node_config: NodeConfig | None = None) -> list[Parameter]:
    """Every parameter of the node as users see it: its own flat names first, then ``group.field``."""
    return [*node_parameters(node_config or NodeConfig()), *parameters(config or Config())]


def build_configs(
    values: Mapping[str, Any], config: Config | None = None, node_config: NodeConfig | None = None
) -> tuple[Config, NodeConfig]:
    """Apply ``values`` on top of the given configurations. Unknown names and bad values raise ValueError."""
    config, node_config = config or Config(), node_config or NodeConfig()
    known = {p.name: p for p in all_parameters(config, node_config)}
    for name in values:
        if name not in known:
            raise ValueError(unknown(name))
    own = {f.name for f in dataclasses.fields(NodeConfig)}
    flat = {n: _as_declared(known[n], v) for n, v in values.items() if n in own}
    grouped = {n: v for n, v in values.items() if n not in own}
    try:
        node_config = dataclasses.replace(node_config, **flat)
    except ValueError as error:
        raise ValueError(str(error).replace("node.", "")) from None  # users know these names without a group
    return with_values(config, grouped), node_config


def unknown(name: str) -> str:
    """What to say about a parameter that does not exist."""
    near = difflib.get_close_matches(name, [p.name for p in all_parameters()], n=1)
    return f"unknown parameter {name!r}" + (f"; did you mean {near[0]}?" if near else "")


def declare(node: Node, config: Config) -> tuple[Config, NodeConfig]:
    """Declare all parameters on a node that was made with ``automatically_declare_parameters_from_overrides``.

    The overrides are checked against ``config``, the defaults, before anything is declared, so that a wrong one is
    refused by name with the range and the value.
    """
    given = {
        name: p.value
        for name, p in node.get_parameters_by_prefix("").items()
        if name not in _OF_ROS and not name.startswith(_OF_ROS_PREFIX)
    }
    config, node_config = build_configs(given, config)
    for p in all_parameters(config, node_config):
        if node.has_parameter(p.name):
            node.undeclare_parameter(p.name)
        node.declare_parameter(p.name, p.default, descriptor(p), ignore_override=True)
    return config, node_config


def descriptor(p: Parameter) -> ParameterDescriptor:
    """What ``ros2 param describe`` shows; fixed parameters are read only."""
    out = ParameterDescriptor(name=p.name, description=p.doc, read_only=not p.dynamic)
    if p.choices:
        out.additional_constraints = "one of: " + ", ".join(p.choices)
    bounded = p.ge is not None or p.le is not None
    if isinstance(p.default, float):
        out.dynamic_typing = True  # `-p transform_tolerance:=1` arrives as an integer and is meant as a number
        if bounded:
            low = -sys.float_info.max if p.ge is None else float(p.ge)
            high = sys.float_info.max if p.le is None else float(p.le)
            out.floating_point_range = [FloatingPointRange(from_value=low, to_value=high)]
    elif isinstance(p.default, int) and not isinstance(p.default, bool) and bounded:
        low_int = -(2**63) if p.ge is None else int(p.ge)
        high_int = 2**63 - 1 if p.le is None else int(p.le)
        out.integer_range = [IntegerRange(from_value=low_int, to_value=high_int, step=1)]
    return out


def _as_declared(p: Parameter, value: Any) -> Any:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if isinstance(p.default, float) and is_number else value
