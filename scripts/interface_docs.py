#!/usr/bin/env python3
"""Write the tables of docs/ros.md from the code; test/ros/test_interface_docs.py checks that they are up to date.

usage: .venv/bin/python scripts/interface_docs.py
"""

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy

from spark3r_ros.ros import diagnostics, interface

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "ros.md"
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.S)


def qos(profile: QoSProfile) -> str:
    words = ["reliable" if profile.reliability == ReliabilityPolicy.RELIABLE else "best effort"]
    words += ["transient local"] if profile.durability == DurabilityPolicy.TRANSIENT_LOCAL else []
    return ", ".join(
        [*words, f"keep last {profile.depth}" if profile.history == HistoryPolicy.KEEP_LAST else "keep all"]
    )


def kind(message: type) -> str:
    return f"{message.__module__.partition('.')[0]}/{message.__name__}"


def launch_arguments(path: Path) -> Iterator[tuple[str, str, str]]:
    """(name, default, description) of every argument that a launch file declares, read without running it."""
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "DeclareLaunchArgument":
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            default = given.get("default_value")
            if default is None:
                text = "required"
            elif isinstance(default, ast.Call):  # in_share("config", "live.yaml")
                text = "`" + "/".join(ast.literal_eval(part) for part in default.args) + "`"
            else:
                text = f"`{ast.literal_eval(default)}`" if ast.literal_eval(default) else "empty"
            yield ast.literal_eval(call.args[0]), text, ast.literal_eval(given["description"])


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), ["---"] * len(list(head)), *map(list, rows)]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def tables() -> dict[str, str]:
    out = {
        "inputs": table(
            ("topic", "type", "QoS", ""),
            ((f"`{i.topic}`", " or ".join(map(kind, i.kinds)), qos(i.profile), i.doc) for i in interface.INPUTS),
        ),
        "outputs": table(
            ("topic", "type", "QoS", ""),
            ((f"`{o.topic}`", kind(o.kind), qos(o.profile), o.doc) for o in interface.OUTPUTS),
        ),
        "services": table(("service (std_srvs/Trigger)", ""), ((f"`{s.name}`", s.doc) for s in interface.SERVICES)),
        "dropped": table(
            ("counter", "an image is counted here when"),
            ((f"`dropped_{name}`", doc) for name, doc in diagnostics.DROP_REASONS.items()),
        ),
    }
    for path in sorted((ROOT / "launch").glob("*.launch.py")):
        rows = ((f"`{name}`", default, doc) for name, default, doc in launch_arguments(path))
        out[path.name] = table(("argument", "default", ""), rows)
    return out


def page(text: str) -> str:
    """``text`` with every marked table written anew."""
    current = tables()
    return BLOCK.sub(lambda block: block[1] + current[block[2]] + block[3], text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
