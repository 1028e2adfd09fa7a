"""Our models with the fixtures' weights against the outputs of the original implementations.

    python -m benchmarks.parity                        all six models, up to 12 GB and some minutes
    python -m benchmarks.parity da3-small da3-base

One pass of the full-size network over the fixture's frames, in float32 on the CPU. Prints, for every output, the
largest and the mean absolute error in units of the standard deviation of the original's output, the seconds of the
pass, and the peak memory of the process with the checkpoint in it. Every model has a process of its own. Last line
JSON.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from spark3r_ros.backbone import Backbone, load_backbone
from spark3r_ros.backbone.model import Geometry, inverse_T
from spark3r_ros.backbone.registry import find
from spark3r_ros.frame import Prediction

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("da3-small", "da3-base")
LARGE = ("da3-large", "vggt", "pi3", "omega")


@dataclass(frozen=True)
class Row:
    """How far one output is from the original's."""

    model: str
    output: str
    largest: float  # absolute error over the standard deviation of the original's output
    mean: float
    seconds: float
    peak_gib: float


def load_fill(golden: Path):
    """The module that makes deterministic weights and images."""
    spec = importlib.util.spec_from_file_location("golden_fill", golden / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def weights(golden: Path, name: str) -> dict[str, torch.Tensor]:
    """The whole checkpoint of a fixture; constants as the original sets them."""
    fill = load_fill(golden)
    constants = find(name).keys.constants
    shapes = json.loads((golden / "keys" / f"{name}.json").read_text())

    def value(item: tuple[str, list[int]]) -> torch.Tensor:
        key, shape = item
        values = [v for pattern, v in constants if re.fullmatch(pattern, key)]
        return torch.tensor(values[0]).reshape(shape) if values else torch.from_numpy(fill.tensor(key, shape))

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(shapes, pool.map(value, shapes.items())))


def compare(golden: Path, name: str) -> list[Row]:
    """One pass of one model, all its outputs."""
    reset_peak()
    backbone = load_backbone(name, weights(golden, name))
    case = json.loads((golden / "outputs" / f"{name}.json").read_text())
    fill = load_fill(golden)
    images = torch.from_numpy(fill.images(case["num_frames"], case["height"], case["width"], case["seed"]))
    start = time.perf_counter()
    prediction, raw = predict(backbone, images)
    seconds, peak = time.perf_counter() - start, peak_gib()
    ours = all_outputs(name, prediction, raw)
    rows = []
    with np.load(golden / "outputs" / f"{name}.npz") as original:
        for output in original:
            want = original[output]
            error = np.abs(ours[output].double().numpy().reshape(want.shape) - want) / want.std()
            rows.append(Row(name, output, float(error.max()), float(error.mean()), seconds, peak))
    return rows


def predict(backbone: Backbone, images: torch.Tensor) -> tuple[Prediction, Geometry]:
    """The public prediction, and the network's own output that it was made from."""
    raw = []
    if backbone.spec.name == "vggt":  # the point head runs only when it is asked for
        backbone.model.register_forward_pre_hook(lambda _, a, k: (a, {**k, "points": True}), with_kwargs=True)
    backbone.model.register_forward_hook(lambda _, args, out: raw.append(out))
    return backbone(images), raw[0]


def all_outputs(name: str, prediction: Prediction, raw: Geometry) -> dict[str, torch.Tensor]:
    """By the original's names; what the public prediction holds is taken from there."""
    unsure = 1 - prediction.confidence.double()  # confidence = 1 - 1 / c for originals that give c >= 1
    outputs = {
        "depth": prediction.depth,
        "depth_conf": 1 / unsure,
        "conf": torch.log((1 - unsure) / unsure),
        "extrinsics": inverse_T(prediction.T_world_camera)[:, :3],
        "intrinsics": prediction.intrinsics,
        "camera_poses": prediction.T_world_camera,
        "pose_enc": raw.extras.get("pose_encoding"),
        "camera_and_register_tokens": raw.extras.get("special"),
        "world_points": raw.extras.get("points"),
        "local_points": raw.extras.get("local_points"),
    }
    if name == "vggt":
        outputs["world_points_conf"] = 1 + raw.extras["points_confidence"].exp()
    if name == "pi3":
        T, local = prediction.T_world_camera, raw.extras["local_points"][0]  # [S, 4, 4], [S, H, W, 3]
        outputs["points"] = torch.einsum("sij,shwj->shwi", T[:, :3, :3], local) + T[:, None, None, :3, 3]
    return {k: v for k, v in outputs.items() if v is not None}


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_gib() -> float:
    """Largest resident set since ``reset_peak``."""
    line = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line[1]) / 2**20


def main(names: list[str]) -> None:
    golden = Path(os.environ.get("SPARK3R_SHARED", ROOT.parent / "shared")) / "golden"
    line = "{:12} {:27} {:>9} {:>9} {:>8} {:>6}"
    print(line.format("model", "output", "max", "mean", "seconds", "GiB"))
    rows: list[Row] = []
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        for model_rows in processes.map(compare, repeat(golden), names):
            for r in model_rows:
                numbers = (f"{r.largest:.1e}", f"{r.mean:.1e}", f"{r.seconds:.1f}", f"{r.peak_gib:.2f}")
                print(line.format(r.model, r.output, *numbers), flush=True)
            rows += model_rows
    about = {"benchmark": "parity", "torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps({**about, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main(sys.argv[1:] or [*SMALL, *LARGE])
