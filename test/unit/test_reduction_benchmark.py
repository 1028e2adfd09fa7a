"""The benchmark of reduction: its FLOP model counts what runs, and composed figures stand for all layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import forward
from benchmarks import reduction as benchmark
from benchmarks.reduction import (
    METHODS,
    Case,
    Clock,
    chosen_blocks,
    drive,
    flop_model,
    layer_kinds,
    measure,
    use_method,
)
from spark3r_ros.backbone.trunk import FRAME, GLOBAL, Trunk, TrunkSpec

SPEC = TrunkSpec(patch=14, dim=32, heads=2, kinds=(FRAME, GLOBAL) * 8, taps=(15,), num_special=2)
CASE = Case(SPEC, 4, 4, frozenset({3, 4, 5}))
NUM_FRAMES = 130  # where the schedule merges queries and prunes keys


def attention_flops(q: torch.Size, k: torch.Size, *_: object, out_shape: object = None, **__: object) -> int:
    batch, heads, queries, width = q
    return 4 * batch * heads * queries * k[2] * width


@pytest.mark.parametrize("method", METHODS)
def test_flop_model_counts_what_runs(method: str) -> None:
    torch.manual_seed(0)
    trunk, x = Trunk(SPEC).eval(), torch.randn(1, NUM_FRAMES, CASE.tokens_per_frame, SPEC.dim)
    kinds = layer_kinds(method, CASE, NUM_FRAMES)
    run = use_method(method, trunk, CASE, NUM_FRAMES, Clock())
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with torch.inference_mode(), FlopCounterMode(display=False, custom_mapping={kernel: attention_flops}) as counter:
        drive(trunk, CASE, x, run, kinds, chosen_blocks(kinds, CASE, False), Clock())
    assert sum(flop_model(method, CASE, NUM_FRAMES).values()) == pytest.approx(counter.get_total_flops(), rel=2e-3)


@pytest.mark.parametrize("method", ["dense", "spark3r", "covering"])
def test_composed_figures_run_two_layers_of_each_kind(method: str) -> None:
    kinds = layer_kinds(method, CASE, NUM_FRAMES)
    chosen = chosen_blocks(kinds, CASE, True)
    layers = [kinds[i // 2] for i in chosen if SPEC.kinds[i] == GLOBAL]
    assert all(layers.count(kind) == min(2, kinds.count(kind)) for kind in set(kinds))
    assert sum(SPEC.kinds[i] == FRAME for i in chosen) == 4
    assert chosen_blocks(kinds, CASE, False) == list(range(16))
    composed, whole = (measure(method, CASE, 21, flag, 1) for flag in (True, False))
    assert composed.tflop == whole.tflop
    assert composed.composed
    assert composed.global_cpu < composed.cpu


def test_the_run_ends_with_a_table_a_picture_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    command = "reduction --trunk nano --frames 21 --methods dense spark3r --out"
    monkeypatch.setattr("sys.argv", [*command.split(), str(tmp_path)])
    benchmark.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1] for line in lines if line.startswith("| 21 |")] == ["dense", "spark3r"]
    report = json.loads(lines[-1])
    assert report["trunk"] == "nano"
    assert [(m["num_frames"], m["method"]) for m in report["results"]] == [(21, "dense"), (21, "spark3r")]
    assert all(m["cpu"] > 0 and m["memory_mb"] >= 0 and not m["composed"] for m in report["results"])
    assert (tmp_path / "nano.png").stat().st_size > 10_000


def test_whole_models_are_timed_dense_reduced_and_with_a_context():
    rows = forward.measure("nano", [2], "cpu")
    assert [(row.frames, row.method) for row in rows] == [(2, "dense"), (2, "spark3r"), (8, "with context")]
    assert all(row.seconds > 0 for row in rows)
