"""Time and memory of token reduction against dense attention and other methods, on one trunk with the same weights.

    python -m benchmarks.reduction --frames 50 100 300 500 1000 --trunk vggt-narrow

Every figure comes from a child process of its own (so that its peak memory is its own), methods interleaved, the
fastest of ``--repeats``. The trunk runs from tokens to tokens: no image encoder, no heads. Ratios are of CPU seconds:
on a machine shared with others these repeat, seconds on the wall do not; both are printed. A method whose forward pass
would take longer than ``--compose-above`` seconds runs two global layers of each kind that it has and four frame
blocks at full length; the sum over all layers is composed from these, and marked with a *.

``spark3r shared`` lets four neighbouring global layers share one matching of queries.

Memory is the peak resident set during the pass less the resident set right before it: weights and input tokens are not
counted, output tokens are. Last line: the same as JSON.

``--device cuda`` runs under bfloat16 autocast, as the models do there. All seconds are then of the wall, with the
device waited for, and memory is the allocator's, so that one process does everything:

    python -m benchmarks.reduction --device cuda --trunk vggt --frames 50 100 300 500 1000 --compose-above 20
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.baselines import (
    BASELINES,
    COVERING_FRAMES,
    COVERING_PATCH_STRIDE,
    Covering,
    Grid,
    GridKeys,
    Uniform,
)
from spark3r_ros.backbone import attention, blocks
from spark3r_ros.backbone.attention import GlobalPass
from spark3r_ros.backbone.model import ModelSpec
from spark3r_ros.backbone.nano import SPEC as NANO
from spark3r_ros.backbone.trunk import FRAME, GLOBAL, Trunk, TrunkSpec
from spark3r_ros.config import ReductionConfig
from spark3r_ros.reduction import ForwardReduction, TokenLayout, forward, sensitive_layers
from spark3r_ros.reduction.plan import query_groups

# One core of an ordinary machine, one large GPU; only decides what is composed.
FLOPS_PER_SECOND = {"cpu": 75e9, "cuda": 400e12}
REDUCTIONS = {"spark3r": ReductionConfig(), "spark3r shared": ReductionConfig(matching_interval=4)}
METHODS = ("dense", *REDUCTIONS, *BASELINES)


@dataclass(frozen=True)
class Case:
    """A trunk with the tokens it sees, and its sensitive layers."""

    spec: TrunkSpec
    rows: int
    columns: int
    sensitive: frozenset[int]

    @property
    def tokens_per_frame(self) -> int:
        return self.spec.num_special + self.rows * self.columns

    def layout(self, num_frames: int) -> TokenLayout:
        return TokenLayout(num_frames, self.tokens_per_frame, self.spec.num_special)

    def grid(self, num_frames: int) -> Grid:
        return Grid(self.layout(num_frames), self.rows, self.columns, self.spec.num_global)


def _narrow(pairs: int) -> TrunkSpec:
    """Blocks and special tokens of the real model; width 128 keeps its ratio of attention to linear FLOPs."""
    last = (2 * pairs - 1,)
    return TrunkSpec(patch=14, dim=128, heads=2, kinds=(FRAME, GLOBAL) * pairs, taps=last, num_special=5)


def _real(spec: ModelSpec) -> Case:
    """A model's own trunk with the tokens of a 640x480 camera; without a probe result all layers are sensitive."""
    rows, columns = (side // spec.trunk.patch for side in spec.resize.plan(480, 640).size)
    layers = spec.trunk.num_global
    return Case(spec.trunk, rows, columns, sensitive_layers(ReductionConfig(), spec.name, layers, spec.sensitive))


VGGT_1B = Case(TrunkSpec(14, 1024, 16, (FRAME, GLOBAL) * 24, (47,), 5), 28, 37, frozenset(range(11, 17)))
TRUNKS = {
    "vggt": VGGT_1B,
    "vggt-narrow": Case(_narrow(24), 8, 12, frozenset(range(11, 17))),
    "pi3-narrow": Case(_narrow(18), 8, 12, frozenset(range(11, 17))),
    "nano": _real(NANO),
}


# -- what each method computes ---------------------------------------------------------------------------------------


def layer_kinds(method: str, case: Case, num_frames: int) -> list[str]:
    """For every global layer, the name of the group of layers that cost the same."""
    layers = range(case.spec.num_global)
    if method in REDUCTIONS:
        return ["sensitive" if i in case.sensitive else "insensitive" for i in layers]
    if method == "grid":
        frame_layers = GridKeys(case.grid(1)).frame_layers
        return ["within" if i < frame_layers else "grid" for i in layers]
    if method == "covering":
        level = [Covering(case.grid(1))._level(i) for i in layers]
        return ["within" if at < 2 else "thinned" if at < 9 else "covering" for at in level]
    return ["global" for _ in layers]


def flop_model(method: str, case: Case, num_frames: int) -> dict[str, float]:
    """Floating-point operations of one pass by kind; multiply and add count two."""
    layout, dim = case.layout(num_frames), case.spec.dim
    N, P, L = layout.num_tokens, layout.tokens_per_frame, case.spec.num_global
    frame_blocks = len(case.spec.kinds) - L
    flops = {
        "attention": 0.0,
        "matching": 0.0,
        "linear": (frame_blocks + L) * N * 24.0 * dim**2,
        "frame": frame_blocks * 4.0 * N * P * dim,
    }
    if method == "dense":
        flops["attention"] = L * 4.0 * N * N * dim
    elif method == "uniform":
        uniform = Uniform(case.grid(num_frames))
        flops["attention"] = L * 4.0 * uniform.num_rows**2 * dim
        flops["matching"] = L * 2.0 * len(uniform.source) * len(uniform.destination) * dim
        flops["linear"] -= L * (N - uniform.num_rows) * 2.0 * dim**2  # outputs of merged rows only
    elif method in REDUCTIONS:
        _add_spark3r(flops, REDUCTIONS[method], case, layout)
    else:
        _add_key_subsets(flops, method, case, layout)
    return flops


def _add_spark3r(flops: dict[str, float], config: ReductionConfig, case: Case, layout: TokenLayout) -> None:
    dim, N, L = case.spec.dim, layout.num_tokens, case.spec.num_global
    reduction = ForwardReduction(config, layout, L, case.sensitive)
    groups = query_groups(layout, reduction.factors.query, 20)
    empty = torch.empty(1, 0, 0)
    plans = [reduction.keys(i, empty) for i in range(L)]
    kept = [N if plan is None else plan.index.shape[1] for plan in plans]
    flops["attention"] = sum(4.0 * groups.num_rows * m * dim for m in kept)
    matchings = -(-L // config.matching_interval)
    flops["matching"] = matchings * sum(2.0 * b.source.numel() * b.destination.shape[1] * dim for b in groups.batches)
    flops["linear"] -= sum((N - m) * 4.0 * dim**2 for m in kept) + L * (N - groups.num_rows) * 2.0 * dim**2


def _add_key_subsets(flops: dict[str, float], method: str, case: Case, layout: TokenLayout) -> None:
    dim, N, P = case.spec.dim, layout.num_tokens, layout.tokens_per_frame
    frames = min(COVERING_FRAMES, layout.num_frames)
    keys = {
        "within": P,
        "grid": len(GridKeys(case.grid(layout.num_frames)).index),
        "thinned": frames * (case.spec.num_special + -(-(P - case.spec.num_special) // COVERING_PATCH_STRIDE)),
        "covering": frames * P,
    }
    kinds = layer_kinds(method, case, layout.num_frames)
    flops["attention"] = sum(4.0 * N * keys[kind] * dim for kind in kinds)
    flops["linear"] -= sum((N - keys[kind]) * 4.0 * dim**2 for kind in kinds if kind in ("thinned", "covering"))


# -- one measurement, in a process of its own ------------------------------------------------------------------------


@dataclass
class Clock:
    """CPU and wall seconds by name; on a GPU both are of the wall, until it has finished."""

    device: str = "cpu"
    cpu: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    wall: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        wall, cpu = self._now()
        yield
        later = self._now()
        self.wall[name] += later[0] - wall
        self.cpu[name] += later[1] - cpu

    def _now(self) -> tuple[float, float]:
        if self.device == "cpu":
            return time.perf_counter(), time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter(), time.perf_counter()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self(name):
                return function(*args, **kwargs)

        return run


@dataclass
class Measurement:
    """One pass of one method. Seconds are of one pass; ``memory_mb`` above what was resident before it."""

    method: str
    num_frames: int
    cpu: float
    wall: float
    global_cpu: float  # attention of global layers: plans, projections, merging, attention, copying back
    matching_cpu: float  # of it: matching
    merging_cpu: float  # of it: merging and copying back
    memory_mb: float
    composed: bool
    tflop: float


@contextlib.contextmanager
def clocked(clock: Clock) -> Iterator[None]:
    """Time the parts of the reduced path where its modules call them."""
    with contextlib.ExitStack() as stack:
        for module, name, kind in (
            (forward, "match", "matching"),
            (attention, "new_sums", "merging"),
            (attention, "add_to_sums", "merging"),
            (attention, "finish_sums", "merging"),
            (blocks, "unmerge", "copying"),
        ):
            stack.enter_context(mock.patch.object(module, name, clock.timed(kind, getattr(module, name))))
        yield


def memory_mb(device: str, peak: bool) -> float:
    """Memory now or at its peak: the resident set of this process (Linux), or what is allocated on the GPU."""
    if device == "cuda":
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**20
    key = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def forget_peak(device: str) -> None:
    """Let the peak of memory start again from what is used now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def chosen_blocks(kinds: list[str], case: Case, composed: bool) -> list[int]:
    """Indices of the blocks to run: all, or two of each kind of global layer and four frame blocks."""
    if not composed:
        return list(range(len(case.spec.kinds)))
    left: dict[str, int] = dict.fromkeys(kinds, 2) | {FRAME: 4}
    chosen, layer = [], 0
    for index, kind in enumerate(case.spec.kinds):
        name = FRAME if kind == FRAME else kinds[layer]
        layer += kind != FRAME
        if left[name]:
            left[name] -= 1
            chosen.append(index)
    return chosen


def use_method(method: str, trunk: Trunk, case: Case, num_frames: int, clock: Clock) -> GlobalPass:
    """Put the method into every global layer of the trunk, timed."""
    device = torch.device(clock.device)
    rope = trunk._rope(case.spec.global_rope, (case.rows, case.columns), device)
    reduction, layout = None, case.layout(num_frames)
    if method in REDUCTIONS:
        reduction = ForwardReduction(REDUCTIONS[method], layout, case.spec.num_global, case.sensitive, device)
    with device:
        baseline = BASELINES[method](case.grid(num_frames)) if method in BASELINES else None
    for block, kind in zip(trunk.blocks, case.spec.kinds):
        if kind == GLOBAL:
            attend = block.attn.attend if baseline is None else partial(baseline.attend, block.attn)
            block.attn.attend = clock.timed("attend", attend)
    return GlobalPass(num_frames, None if rope is None else rope.repeat(num_frames), reduction)


@torch.inference_mode()
def measure(method: str, case: Case, num_frames: int, composed: bool, passes: int, device: str = "cpu") -> Measurement:
    """Time one method; the fastest of ``passes`` passes."""
    torch.manual_seed(0)
    with torch.device(device):
        trunk = Trunk(case.spec).eval()
        x = torch.randn(1, num_frames, case.tokens_per_frame, case.spec.dim)
    kinds = layer_kinds(method, case, num_frames)
    best: Measurement | None = None
    peak = 0.0
    for index in range(passes + 1):
        warm_up = index == 0
        clock, seconds = Clock(device), Clock(device)
        few = x[:, :2] if warm_up else x
        run = use_method(method, trunk, case, few.shape[1], clock)
        forget_peak(device)
        before = memory_mb(device, peak=False)
        place = torch.device(device) if method in BASELINES else contextlib.nullcontext()  # they make tables as they go
        with clocked(clock), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"), place:
            drive(trunk, case, few, run, kinds, chosen_blocks(kinds, case, composed), seconds)
        if warm_up:
            continue
        result = summarise(method, case, num_frames, composed, kinds, clock, seconds)
        peak = max(peak, memory_mb(device, peak=True) - before)  # a later pass reuses what the first one freed
        if best is None or result.cpu < best.cpu:
            best = result
    assert best is not None
    best.memory_mb = peak
    return best


def drive(
    trunk: Trunk, case: Case, x: Tensor, run: GlobalPass, kinds: list[str], chosen: list[int], seconds: Clock
) -> Tensor:
    """The trunk's loop over its blocks, or over some of them, each timed under the name of its kind."""
    rope = trunk._rope(case.spec.frame_rope, (case.rows, case.columns), x.device)
    num_frames, layer = x.shape[1], 0
    for index, (block, kind) in enumerate(zip(trunk.blocks, case.spec.kinds)):
        if index in chosen:
            with seconds(FRAME if kind == FRAME else kinds[layer]):
                if kind == FRAME:
                    x = block(x[0], rope)[None]
                else:
                    x = block.forward_global(x.flatten(1, 2), layer, run).unflatten(1, (num_frames, -1))
        layer += kind != FRAME
    return x


def summarise(
    method: str, case: Case, num_frames: int, composed: bool, kinds: list[str], clock: Clock, seconds: Clock
) -> Measurement:
    """Whole-pass figures; composed ones scale each kind of block from those that ran to all."""
    counts = {kind: kinds.count(kind) for kind in kinds} | {FRAME: case.spec.kinds.count(FRAME)}
    ran = {kind: min(count, 4 if kind == FRAME else 2) if composed else count for kind, count in counts.items()}
    cpu = sum(seconds.cpu[kind] * counts[kind] / ran[kind] for kind in counts)
    wall = sum(seconds.wall[kind] * counts[kind] / ran[kind] for kind in counts)
    frame = seconds.cpu[FRAME] * counts[FRAME] / ran[FRAME]
    attend = clock.cpu["attend"] + clock.cpu["copying"]
    in_global = sum(seconds.cpu[kind] for kind in counts if kind != FRAME)
    return Measurement(
        method,
        num_frames,
        cpu=cpu,
        wall=wall,
        global_cpu=(cpu - frame) * attend / in_global,
        matching_cpu=(cpu - frame) * clock.cpu["matching"] / in_global,
        merging_cpu=(cpu - frame) * (clock.cpu["merging"] + clock.cpu["copying"]) / in_global,
        memory_mb=0.0,
        composed=composed,
        tflop=sum(flop_model(method, case, num_frames).values()) / 1e12,
    )


def measure_apart(arguments: argparse.Namespace, method: str, num_frames: int) -> Measurement:
    """One measurement: on the CPU in a process of its own."""
    case = TRUNKS[arguments.trunk]
    flops = sum(flop_model(method, case, num_frames).values())
    if arguments.device == "cuda":
        estimate = flops / FLOPS_PER_SECOND["cuda"]
        return measure(method, case, num_frames, estimate > arguments.compose_above, 3 if estimate < 1 else 1, "cuda")
    estimate = flops / FLOPS_PER_SECOND["cpu"] / arguments.threads
    composed = estimate > arguments.compose_above
    passes = 3 if estimate < 3 else 1
    order = [arguments.trunk, method, num_frames, composed, passes, arguments.threads]
    command = [sys.executable, "-m", "benchmarks.reduction", "--child", json.dumps(order)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


def child(order: str) -> None:
    trunk, method, num_frames, composed, passes, threads = json.loads(order)
    torch.set_num_threads(threads)
    print(json.dumps(asdict(measure(method, TRUNKS[trunk], num_frames, composed, passes))))


# -- the run ---------------------------------------------------------------------------------------------------------


def fastest(runs: list[Measurement]) -> Measurement:
    """The run with the least CPU time, with the largest memory of all."""
    best = min(runs, key=lambda m: m.cpu)
    best.memory_mb = max(m.memory_mb for m in runs)
    return best


def table(results: list[Measurement]) -> str:
    """One row per length and method, ratios against dense and uniform merging of the same length."""
    lines = [
        "| frames | method | forward CPU s | wall s | x dense | FLOP x dense | global attention CPU s | x dense "
        "| matching+merging | peak MB | of dense |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    dense = {m.num_frames: m for m in results if m.method == "dense"}
    for m in results:
        base = dense.get(m.num_frames, m)
        share = (m.matching_cpu + m.merging_cpu) / m.global_cpu if m.method in REDUCTIONS else None
        lines.append(
            f"| {m.num_frames} | {m.method} | {m.cpu:.2f}{'*' if m.composed else ''} | {m.wall:.2f} "
            f"| {base.cpu / m.cpu:.2f} | {base.tflop / m.tflop:.2f} | {m.global_cpu:.2f} "
            f"| {base.global_cpu / m.global_cpu:.2f} | {'' if share is None else f'{share:.0%}'} "
            f"| {m.memory_mb:.0f} | {'' if base.memory_mb == 0 else f'{m.memory_mb / base.memory_mb:.2f}'} |"
        )
    return "\n".join(lines)


def flop_table(case: Case, lengths: list[int]) -> str:
    """The FLOP model of Spark3R beside the real VGGT's, in TFLOP."""
    lines = ["| trunk | frames | method | attention | matching | linear | frame | all | x dense |", "|" + "---|" * 9]
    for name, which in (("this trunk", case), ("VGGT 518x392, without encoder and heads", VGGT_1B)):
        for num_frames in lengths:
            dense = sum(flop_model("dense", which, num_frames).values())
            for method in ("dense", "spark3r"):
                f = flop_model(method, which, num_frames)
                cells = " | ".join(f"{f[key] / 1e12:.3g}" for key in ("attention", "matching", "linear", "frame"))
                total = sum(f.values())
                lines.append(
                    f"| {name} | {num_frames} | {method} | {cells} | {total / 1e12:.3g} | {dense / total:.2f} |"
                )
    return "\n".join(lines)


def plot(results: list[Measurement], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for method in METHODS:
        rows = sorted((m for m in results if m.method == method), key=lambda m: m.num_frames)
        lengths = [m.num_frames for m in rows]
        axes[0].plot(lengths, [m.cpu for m in rows], marker="o", label=method)
        axes[1].plot(lengths, [m.memory_mb for m in rows], marker="o", label=method)
    for axis, label in zip(axes, ("whole forward, CPU s", "peak memory of the pass, MB")):
        axis.set(xscale="log", yscale="log", xlabel="frames", ylabel=label)
        axis.grid(alpha=0.3, which="both")
    axes[0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[50, 100, 300])
    parser.add_argument("--trunk", choices=sorted(TRUNKS), default="vggt-narrow")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--repeats", type=int, default=1, help="interleaved rounds; the fastest counts")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compose-above", type=float, default=600.0, help="estimated seconds of a forward pass")
    parser.add_argument("--out", type=Path, default=Path("out/reduction"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child)
        return
    runs: dict[tuple[int, str], list[Measurement]] = defaultdict(list)
    for num_frames in arguments.frames:
        for _ in range(arguments.repeats):
            for method in arguments.methods:
                m = measure_apart(arguments, method, num_frames)
                runs[num_frames, method].append(m)
                print(f"{num_frames} {method}: CPU {m.cpu:.2f} s, wall {m.wall:.2f} s", file=sys.stderr, flush=True)
    results = [fastest(several) for several in runs.values()]
    case = TRUNKS[arguments.trunk]
    print(table(results), "\n\nFLOP model, TFLOP\n\n" + flop_table(case, arguments.frames), sep="")
    print("\n* composed from two global layers of each kind and four frame blocks at full length")
    arguments.out.mkdir(parents=True, exist_ok=True)
    plot(results, f"{arguments.trunk}, {arguments.threads} thread(s)", arguments.out / f"{arguments.trunk}.png")
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    about = {"trunk": arguments.trunk, "device": device, "torch": torch.__version__, "threads": arguments.threads}
    print(json.dumps(about | {"results": [asdict(m) for m in results]}))


if __name__ == "__main__":
    main()
