"""Factors by length and layer, sensitive sets, and factor files."""

from __future__ import annotations

import json
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from spark3r_ros.config import ReductionConfig
from spark3r_ros.reduction import FactorFile, frame_factors, load_factor_file, save_factor_file, sensitive_layers
from spark3r_ros.reduction.schedule import check_factor, format_layers, parse_layers


@pytest.mark.parametrize(
    ("num_frames", "query", "kv"),
    [(1, 1, 1), (100, 1, 1), (101, 2, 3), (300, 2, 8), (301, 3, 8), (500, 3, 13), (501, 4, 13), (1000, 4, 25)],
)
def test_schedule_of_the_paper(num_frames: int, query: int, kv: int) -> None:
    factors = frame_factors(ReductionConfig(), num_frames)
    assert (factors.query, factors.kv, factors.kv_insensitive) == (query, kv, 3 * kv)


@given(st.integers(101, 100_000))
def test_about_forty_frames_of_keys_at_any_length(num_frames: int) -> None:
    kv = frame_factors(ReductionConfig(), num_frames).kv
    assert 30 < num_frames / kv <= 40


def test_fixed_factors_override_the_schedule() -> None:
    factors = frame_factors(ReductionConfig(query_factor=7, kv_factor=11, insensitive_multiplier=2), 1000)
    assert (factors.query, factors.kv, factors.kv_insensitive) == (7, 11, 22)


@given(st.frozensets(st.integers(0, 40)))
def test_layer_lists_survive_text(layers: frozenset[int]) -> None:
    assert parse_layers(format_layers(layers)) == layers


def test_layer_ranges() -> None:
    assert parse_layers("11-13, 20") == {11, 12, 13, 20}
    for bad in ("", "a", "3-", "1;2"):
        with pytest.raises(ValueError, match="must look like '11-16,20' or 'none'"):
            parse_layers(bad)
    with pytest.raises(ValueError, match="'5-3' runs backwards"):
        parse_layers("5-3")


def test_published_set_or_all_layers() -> None:
    assert sensitive_layers(ReductionConfig(), "vggt", 24, frozenset(range(11, 17))) == set(range(11, 17))
    assert sensitive_layers(ReductionConfig(), "never-probed", 5) == {0, 1, 2, 3, 4}
    with pytest.raises(ValueError, match="published sensitive layers of vggt: global layer 11 is unknown"):
        sensitive_layers(ReductionConfig(), "vggt", 11, frozenset({11}))


def test_factor_file_round_trip_and_precedence(tmp_path: Path) -> None:
    path = tmp_path / "made" / "factors.json"  # the folder, too: nobody loses an hour's probe to a missing one
    save_factor_file(path, FactorFile("vggt", 24, (3, 5)), {"errors": [1.0]})
    assert load_factor_file(path) == FactorFile("vggt", 24, (3, 5))
    assert json.loads(path.read_text())["errors"] == [1.0]
    assert sensitive_layers(ReductionConfig(factor_file=str(path)), "vggt", 24) == {3, 5}
    explicit = ReductionConfig(factor_file=str(path), sensitive_layers="7")
    assert sensitive_layers(explicit, "vggt", 24) == {7}
    assert sensitive_layers(ReductionConfig(sensitive_layers="none"), "vggt", 24) == frozenset()


def test_a_rewritten_factor_file_is_read_again(tmp_path: Path) -> None:
    import os

    path = tmp_path / "factors.json"
    config = ReductionConfig(factor_file=str(path))
    for time, layers in ((1, (3,)), (2, (4,))):
        save_factor_file(path, FactorFile("vggt", 24, layers))
        os.utime(path, ns=(time, time))
        assert sensitive_layers(config, "vggt", 24) == set(layers)


def test_bad_factor_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "factors.json"
    config = ReductionConfig(factor_file=str(path))
    with pytest.raises(ValueError, match=r"cannot read factor file .*spark3r probe"):
        sensitive_layers(config, "vggt", 24)
    path.write_text("{")
    with pytest.raises(ValueError, match="cannot read factor file"):
        sensitive_layers(config, "vggt", 24)
    path.write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="is not a factor file: 'format' must be 'spark3r-factors-1'"):
        load_factor_file(path)
    path.write_text('{"format": "spark3r-factors-1", "model": "vggt"}')
    with pytest.raises(ValueError, match="lacks num_layers, sensitive_layers"):
        load_factor_file(path)
    for key, value, message in (
        ("num_layers", 0, "num_layers must be a whole number >= 1, got 0"),
        ("num_layers", "24", "num_layers must be a whole number >= 1, got '24'"),
        ("sensitive_layers", 5, "sensitive_layers must be a list of layers, got 5"),
        ("sensitive_layers", "11-16", "sensitive_layers must be a list of layers, got '11-16'"),
        ("sensitive_layers", [3, 24], "global layer 24 is unknown, allowed are 0 to 23"),
    ):
        good = {"format": "spark3r-factors-1", "model": "vggt", "num_layers": 24, "sensitive_layers": [3]}
        path.write_text(json.dumps(good | {key: value}))
        with pytest.raises(ValueError, match=message):
            load_factor_file(path)
    save_factor_file(path, FactorFile("pi3", 18, (3,)))
    with pytest.raises(ValueError, match="is of model 'pi3', this model is 'vggt'"):
        sensitive_layers(config, "vggt", 24)
    with pytest.raises(ValueError, match="has 18 global layers, this pi3 has 17"):
        sensitive_layers(config, "pi3", 17)


@pytest.mark.parametrize("layer", [24, -1, "3", True])
def test_unknown_layers_are_refused(layer: object) -> None:
    with pytest.raises(ValueError, match=rf"global layer {layer!r} is unknown, allowed are 0 to 23"):
        FactorFile("vggt", 24, (layer,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reduction.sensitive_layers: global layer 30 is unknown, allowed are 0 to 23"):
        sensitive_layers(ReductionConfig(sensitive_layers="30"), "vggt", 24)


@pytest.mark.parametrize("factor", [0, -3, 1.5, True, None])
def test_factors_below_one_are_refused(factor: object) -> None:
    with pytest.raises(ValueError, match=rf"query factor must be a whole number >= 1, got {factor!r}"):
        check_factor("query", factor)  # type: ignore[arg-type]
