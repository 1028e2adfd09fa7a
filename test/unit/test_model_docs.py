"""The page about the models says what the code does."""

import re

from benchmarks.parity import LARGE, SMALL
from scripts import model_docs


def test_tables_are_up_to_date():
    text = model_docs.PAGE.read_text(encoding="utf-8")
    assert text == model_docs.updated(text), "run python -m scripts.model_docs"


def test_parity_is_listed_for_every_fixture_and_within_its_bound():
    text = model_docs.PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| `\w+` \| ([\d.e-]+) \| ([\d.e-]+) \|", text, flags=re.MULTILINE)
    assert {name for name, *_ in rows} == {*SMALL, *LARGE}
    assert all(float(largest) < 1e-3 for _, largest, _ in rows)
