#!/usr/bin/env python3
"""Write the tables of docs/models.md from the registry; test/unit/test_model_docs.py checks that they are up to date.

usage: .venv/bin/python -m scripts.model_docs
"""

import re
from pathlib import Path

from spark3r_ros.backbone.registry import MODELS, list_models
from spark3r_ros.preprocess import ResizeRule

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"


def resize_rule(rule: ResizeRule) -> str:
    """In words."""
    return {
        "longest": f"longer side to {rule.target}",
        "width": f"width to {rule.target}; taller than wide is cut to a square",
        "area": f"largest with at most {rule.target}² pixels",
        "patches": f"nearest to {rule.target}² pixels, cut to at most 2 : 1",
    }[rule.mode] + f"; sides multiples of {rule.patch}"


def models() -> str:
    lines = [
        "| name | parameters | weights under | original code under | download | K/V per frame | gauge | network size |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for info in list_models():
        spec = MODELS[info.name].spec
        size = f"{info.download_bytes / 1e9:.2f} GB" if info.download_bytes else "included"
        kv = f"{info.kv_bytes_per_frame / 1e6:.1f} MB" if info.kv_bytes_per_frame else "none"
        cells = (f"`{info.name}`", f"{info.parameters / 1e6:.1f} M", info.weights_licence, info.code_licence, size, kv)
        lines.append(f"| {' | '.join(cells)} | {spec.gauge.value} | {resize_rule(spec.resize)} |")
    return "\n".join(lines)


def files() -> str:
    lines = ["| name | repository on the hub | file | must be accepted |", "|---|---|---|---|"]
    for name, entry in MODELS.items():
        if (weights := entry.weights) is not None:
            link = f"[{weights.repo}](https://huggingface.co/{weights.repo})"
            lines.append(f"| `{name}` | {link} | `{weights.file}` | {'no' if weights.permissive else 'yes'} |")
    return "\n".join(lines)


def unused() -> str:
    lines = ["| models | keys (regular expression) | what for |", "|---|---|---|"]
    names: dict[tuple[str, str], list[str]] = {}
    for name, entry in MODELS.items():
        for pattern, purpose in entry.keys.unused.items():
            names.setdefault((pattern, purpose), []).append(name)
        for pattern, values in entry.keys.constants:
            purpose = f"built in and compared: {len(values)} values from {values[0]:.3g} to {values[-1]:.3g}"
            names.setdefault((pattern, purpose), []).append(name)
    for (pattern, purpose), models_of_it in names.items():
        escaped = pattern.replace("|", "\\|")
        lines.append(f"| {', '.join(models_of_it)} | `{escaped}` | {purpose} |")
    return "\n".join(lines)


def updated(text: str) -> str:
    """The page with every block between ``<!-- NAME -->`` and ``<!-- /NAME -->`` written anew."""
    for make in (models, files, unused):
        name = make.__name__
        block = f"<!-- {name} -->\n{make()}\n<!-- /{name} -->"
        text, count = re.subn(rf"<!-- {name} -->\n.*?<!-- /{name} -->", lambda _, b=block: b, text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{PAGE} must hold one block {name}, has {count}")
    return text


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
