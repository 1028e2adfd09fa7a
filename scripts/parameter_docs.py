#!/usr/bin/env python3
"""Write docs/parameters.md from the configuration; test/unit/test_docs.py checks that it is up to date.

usage: .venv/bin/python scripts/parameter_docs.py
"""

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from spark3r_ros.config import Config, NodeConfig, Parameter, node_parameters, parameters

PAGE = Path(__file__).resolve().parent.parent / "docs" / "parameters.md"
HEAD = """# Parameters

Written by `scripts/parameter_docs.py` from `spark3r_ros/config.py`; do not edit.

Names are the same as ROS parameters (`-p window.size:=12`, YAML), in `spark3r map --set window.size=12`, and in
`Config`. Those marked *live* may change while the node runs; the others are read when it is configured. A value outside
its range is refused, never repaired.
"""


def allowed(p: Parameter) -> str:
    if p.choices:
        return ", ".join(f"`{choice}`" for choice in p.choices)
    if isinstance(p.default, bool):
        return "`true`, `false`"
    if p.ge is None and p.le is None:
        return "text" if isinstance(p.default, str) else "any"
    if p.le is None:
        return f">= {p.ge:g}"
    return f"{p.ge:g} to {p.le:g}" if p.ge is not None else f"<= {p.le:g}"


def table(rows: Iterable[Parameter]) -> str:
    lines = ["| name | default | allowed | meaning |", "|---|---|---|---|"]
    for p in rows:
        default = str(p.default).lower() if isinstance(p.default, bool) else str(p.default)
        live = " *live*" if p.dynamic else ""
        lines.append(f"| `{p.name}` | {f'`{default}`' if default else 'empty'} | {allowed(p)} | {p.doc}{live} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    parts = [HEAD, "## The node\n\nOnly in ROS.\n\n" + table(node_parameters(NodeConfig()))]
    for group, rows in groupby(parameters(Config()), key=lambda p: p.name.partition(".")[0]):
        parts.append(f"## {group}\n\n" + table(rows))
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
