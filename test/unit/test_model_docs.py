"""The page about the models says what the code does."""

import json
import math
import re

import pytest

from benchmarks.parity import LARGE, SMALL
from scripts import model_docs
from spark3r_ros.backbone.registry import MODELS


def test_tables_are_up_to_date():
    text = model_docs.PAGE.read_text(encoding="utf-8")
    assert text == model_docs.updated(text), "run python -m scripts.model_docs"


def test_parity_is_listed_for_every_fixture_and_within_its_bound():
    text = model_docs.PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| `\w+` \| ([\d.e-]+) \| ([\d.e-]+) \|", text, flags=re.MULTILINE)
    assert {name for name, *_ in rows} == {*SMALL, *LARGE}
    assert all(float(largest) < 1e-3 for _, largest, _ in rows)


@pytest.mark.parametrize("name", [*SMALL, *LARGE, "da3metric-large", "pi3x"])
def test_unused_tensors_are_counted(shared, name):
    shapes = json.loads(shared("golden", "keys", f"{name}.json").read_text())
    keys = MODELS[name].keys
    patterns = [*keys.unused, *(pattern for pattern, _ in keys.constants)]
    unused = [key for key in shapes if any(re.fullmatch(pattern, key) for pattern in patterns)]
    parameters = sum(math.prod(shapes[key]) for key in unused)
    row = f"| `{name}` | {len(shapes)} | {len(unused)} | {parameters:,} |"
    assert row in model_docs.PAGE.read_text(encoding="utf-8"), row
