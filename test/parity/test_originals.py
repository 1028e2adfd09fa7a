"""Full-size models agree with the original implementations, output by output."""

import gc
import json
import re

import pytest
import torch

from benchmarks.parity import LARGE, SMALL, compare
from spark3r_ros.backbone.checkpoint import convert
from spark3r_ros.backbone.registry import MODELS, skeleton

KEY_MANIFESTS = ("da3-small", "da3-base", "da3-large", "da3metric-large", "vggt", "pi3", "pi3x", "omega")


def check(golden, name):
    rows = compare(golden, name)
    gc.collect()
    assert rows
    assert {row.output: row.largest for row in rows if not row.largest < 1e-3} == {}
    assert rows[0].peak_gib < 12


@pytest.mark.parametrize("name", SMALL)
def test_small_models(shared, name):
    check(shared("golden"), name)


@pytest.mark.large
@pytest.mark.parametrize("name", LARGE)
def test_large_models(shared, name):
    check(shared("golden"), name)


@pytest.mark.parametrize("name", KEY_MANIFESTS)
def test_every_key_of_the_original_checkpoint_has_its_place(shared, name):
    shapes = json.loads(shared("golden", "keys", f"{name}.json").read_text())
    keys = MODELS[name].keys
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in shapes.items()}
    for pattern, values in keys.constants:
        state.update({key: torch.tensor(values) for key in state if re.fullmatch(pattern, key)})
    ours = {key: tuple(value.shape) for key, value in convert(state, keys).items()}
    assert ours == {key: tuple(value.shape) for key, value in skeleton(MODELS[name]).state_dict().items()}
