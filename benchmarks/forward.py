"""Time and memory of whole models, from images to cameras and depth, dense and with token reduction, on one device.

    python -m benchmarks.forward --device cuda --models vggt pi3 da3-large omega --frames 8 100 200

Weights are random: time does not depend on them. Images are 640x480 ones as each model takes them, on the device
already. ``with context``: a window of 8 frames that looks at a full context of earlier ones, as in a live stream.
Seconds are the fastest of three passes (one, where a pass takes longer than 5 s), after a warm-up, until the device has
finished; ratios are of passes of one process, dense and reduced in turn. Last line: the same as JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from spark3r_ros.backbone import Backbone
from spark3r_ros.backbone.registry import MODELS
from spark3r_ros.config import ContextConfig, ReductionConfig

WINDOW = 8  # keyframes of a live window


@dataclass(frozen=True)
class Row:
    """One kind of pass of one model."""

    model: str
    frames: int
    method: str
    seconds: float
    peak_gib: float  # allocated on the GPU, weights included; 0 on a CPU


def build(name: str, device: str) -> Backbone:
    """A model with random weights, made on the device."""
    entry = MODELS[name]
    torch.manual_seed(0)
    with torch.device(device):
        model = entry.build(entry.spec)
    return Backbone(model, device)


def fastest(work: Callable[[], Any], device: str) -> float:
    best, passes = float("inf"), 0
    while passes < 3 and (passes == 0 or best < 5.0):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        best, passes = min(best, time.perf_counter() - start), passes + 1
    return best


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(name: str, lengths: list[int], device: str) -> list[Row]:
    backbone = build(name, device)
    height, width = backbone.resize(480, 640).size
    rows = []

    def add(frames: int, method: str, work: Callable[[], Any]) -> None:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = fastest(work, device)
        peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
        rows.append(Row(name, frames, method, seconds, peak))
        print(f"| {name} | {frames} | {method} | {seconds:.3f} | {peak:.1f} |", flush=True)

    for length in lengths:
        images = torch.rand(length, 3, height, width, device=device)
        backbone(images[:2])
        add(length, "dense", lambda images=images: backbone(images))
        add(length, "spark3r", lambda images=images: backbone(images, reduction=ReductionConfig()))
    images = torch.rand(WINDOW, 3, height, width, device=device)
    context = backbone.new_context(ContextConfig(budget_mb=4096), height, width)  # room for any model
    for number in range(8):
        backbone(images, context=context)
        context.commit(range(WINDOW), range(number * WINDOW, (number + 1) * WINDOW))
    add(WINDOW, "with context", lambda: backbone(images, context=context))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=["da3-small"])
    parser.add_argument("--frames", nargs="+", type=int, default=[8])
    args = parser.parse_args()
    print("| model | frames | method | seconds | peak GiB |\n|---|---|---|---|---|")
    rows = []
    for name in args.models:
        rows += measure(name, args.frames, args.device)
        gc.collect()
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    print(json.dumps({"device": device, "torch": torch.__version__, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
