"""Train nano: resumable, deterministic, logged.

    python -m training.train --data DIR --out DIR --hours 2 --resume
    python -m training.train --resume --device cuda --batch 128 --rate 2e-3 --hours 0.2 --cooldown 0.2

Every step draws its data, augmentation and pass options from (seed, step), so a resumed run repeats an uninterrupted
one bit by bit as long as the shards are the same. The learning rate stays constant after the warm-up, so training can
always go on; evaluation uses an exponential mean of the weights, ``--cooldown HOURS`` ends a run with a falling rate.
On a GPU all shards are in its memory, and the rounding of its kernels depends on their order.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from spark3r_ros.backbone.nano import Nano
from spark3r_ros.backbone.trunk import PassOptions
from spark3r_ros.config import ReductionConfig
from training.data import Batch, Shard, augment, list_shards
from training.generate import DEFAULT_DATA, NUM_FRAMES
from training.losses import losses, total

DEFAULT_OUT = Path.home() / ".cache" / "spark3r_ros" / "training" / "run"
CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"


@dataclass(frozen=True)
class TrainConfig:
    """Everything that shapes a run besides the data."""

    seed: int = 0
    batch: int = 10
    rate: float = 1.2e-3
    warm_up: int = 200
    weight_decay: float = 0.01
    clip: float = 3.0
    mean_decay: float = 0.995
    solve_from: int = 0  # step from which poses are also trained through the second solve
    known_k: float = 0.75  # share of the steps with known K
    long_share: float = 0.35  # of the steps, where there are long sequences


class Trainer:
    """Model, optimiser, mean weights and counters of one run."""

    def __init__(self, config: TrainConfig, shards: list[Path], device: str = "cpu") -> None:
        self.config, self.device = config, device
        self.shards: list[Shard] = []  # of short sequences
        self.long: list[Shard] = []
        self.use(shards)
        torch.manual_seed(config.seed)
        self.model = Nano().to(device)
        self.mean = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        decay = [p for p in self.model.parameters() if p.ndim >= 2]
        rest = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=config.rate, betas=(0.9, 0.98))
        self.step = self.samples = 0
        self.seconds = 0.0
        self.first_step = 0  # of this optimiser: the rate warms up from here
        self.earlier: dict[str, str] = {}  # what the weights that this run began with have behind them

    def use(self, shards: list[Path]) -> None:
        """Train on these folders from now on; those in use already are not loaded again."""
        known = {shard.folder: shard for shard in (*self.shards, *self.long)}
        both = [known.get(folder) or Shard(folder, self.device) for folder in shards]
        self.shards = [shard for shard in both if shard.num_frames == NUM_FRAMES]
        self.long = [shard for shard in both if shard.num_frames > NUM_FRAMES]

    def train_step(self, cooldown: float = 1.0) -> dict[str, float]:
        """One optimiser step; ``cooldown`` in 0..1 scales the learning rate."""
        config, step = self.config, self.step
        rng = np.random.default_rng([config.seed, step])
        generator = torch.Generator(self.device).manual_seed(config.seed * 1_000_003 + step)
        long = bool(self.long) and rng.random() < config.long_share
        shards = self.long if long else self.shards
        shard = shards[rng.integers(len(shards))]
        whole = shard.num_frames
        lengths = (whole // 2, 2 * whole // 3, whole) if long else (2, 3, 4, 6, whole)
        num_frames = int(rng.choice(lengths, p=(0.3, 0.3, 0.4) if long else (0.05, 0.1, 0.15, 0.2, 0.5)))
        size = min(max(1, config.batch * NUM_FRAMES // num_frames), len(shard), 2 * config.batch)
        batch = augment(shard.batch(rng.choice(len(shard), size, replace=False), num_frames), generator)
        known = bool(rng.random() < config.known_k)
        for group in self.optimiser.param_groups:
            group["lr"] = config.rate * min(1.0, (step + 1 - self.first_step) / config.warm_up) * cooldown
        terms = self.loss_terms(batch, pass_options(rng, num_frames), known, step >= config.solve_from)
        loss = total(terms)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        if torch.isfinite(norm):
            self.optimiser.step()
        self._update_mean()
        self.step += 1
        self.samples += size
        terms |= {"loss": loss, "norm": norm}
        return dict(zip(terms, torch.stack(list(terms.values())).tolist()))

    def loss_terms(self, batch: Batch, options: PassOptions, known: bool, solve: bool) -> dict[str, Tensor]:
        """Loss terms of the current weights on one batch."""
        motion = batch.packed_motion()
        seen = batch.motion[:, :, [2, 5], 0, 0] >= 0
        intrinsics = batch.K[:, None] if known else None
        estimate = self.model.estimate(batch.rgb, motion, intrinsics, options)
        solved = self.model.solve_again(estimate, iterations=3) if solve else None
        return losses(estimate, solved, batch, seen)

    @torch.no_grad()
    def _update_mean(self) -> None:
        decay = min(self.config.mean_decay, (1 + self.step) / (10 + self.step))
        for name, value in self.model.state_dict().items():
            self.mean[name].lerp_(value, 1 - decay)

    def save(self, path: Path) -> None:
        """Write a checkpoint; an interrupted write leaves the old one."""
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        state = {
            "config": vars(self.config), "model": self.model.state_dict(), "mean": self.mean,
            "optimiser": self.optimiser.state_dict(), "step": self.step, "samples": self.samples,
            "seconds": self.seconds, "sequences": sum(len(s) for s in (*self.shards, *self.long)),
            "first_step": self.first_step, "earlier": self.earlier,
        }  # fmt: skip
        torch.save(state, scratch)
        scratch.replace(path)

    def start_from(self, path: Path) -> None:
        """Begin with the weights of a shipped file; steps, samples and hours are counted on from theirs."""
        self.model.load_state_dict(load_file(path, device=self.device))
        self.mean = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        with safe_open(path, "pt") as file:
            self.earlier = dict(file.metadata())
        self.step = self.first_step = int(self.earlier["steps"])
        self.samples, self.seconds = int(self.earlier["samples"]), 3600 * float(self.earlier["hours"])

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.mean = state["mean"]
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.samples, self.seconds = state["step"], state["samples"], state["seconds"]
        self.first_step, self.earlier = state["first_step"], state["earlier"]


def find_shards(root: Path) -> list[Path]:
    """What there is to train on: short sequences, and long ones where they have been made."""
    long = list_shards(root, "long") if (root / "long").exists() else []
    return list_shards(root, "train") + long


def pass_options(rng: np.random.Generator, num_frames: int) -> PassOptions:
    """How this step's pass runs: dense, block-causal windows (as with a context) or token reduction."""
    draw = rng.random()
    long = num_frames > NUM_FRAMES
    if draw < (0.8 if long else 0.35) and num_frames > 3:
        first = int(rng.integers(3, min(num_frames, NUM_FRAMES + 1) if long else num_frames))
        ids = [0] * first
        while len(ids) < num_frames:
            ids += [ids[-1] + 1] * int(rng.integers(1, 7 if long else 4))
        return PassOptions(window_ids=torch.tensor(ids[:num_frames]))
    if draw < (0.9 if long else 0.5):
        reduction = ReductionConfig(
            query_factor=int(rng.integers(1, 3)), kv_factor=int(rng.integers(1, 3)),
            insensitive_multiplier=int(rng.integers(1, 4)), group_size=20,
        )  # fmt: skip
        return PassOptions(reduction=reduction)
    return PassOptions()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="data set folder (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="checkpoint and log (default: %(default)s)")
    parser.add_argument("--hours", type=float, default=1.0, help="stop after so many hours of this call")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--init", type=Path, help="start from these weights (safetensors), the optimiser fresh")
    parser.add_argument("--cooldown", type=float, default=0.0, metavar="HOURS", help="the last of them, the rate falls")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--batch", type=int, default=TrainConfig.batch, help="sequences of 8 frames (default: %(default)s)"
    )
    parser.add_argument("--rate", type=float, default=TrainConfig.rate, help="learning rate (default: %(default)s)")
    parser.add_argument("--save-minutes", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / CHECKPOINT
    if checkpoint.exists() and not args.resume:
        parser.error(f"{checkpoint} exists; continue it with --resume or choose another --out")
    config = TrainConfig(batch=args.batch, rate=args.rate)
    trainer = Trainer(config, find_shards(args.data), args.device)
    if checkpoint.exists():
        trainer.restore(checkpoint)
    elif args.init:
        trainer.start_from(args.init)
    run(trainer, args)


def run(trainer: Trainer, args: argparse.Namespace) -> None:
    """Train until the time or the cool-down is over; log means of 25 steps, save and look for new shards regularly."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())  # save before going
    begin = last = saved = time.monotonic()
    recent: list[dict[str, float]] = []
    while True:
        left = args.hours - (time.monotonic() - begin) / 3600
        recent.append(trainer.train_step(max(0.02, min(1.0, left / args.cooldown)) if args.cooldown else 1.0))
        now = time.monotonic()
        trainer.seconds += now - last
        last = now
        finished = stop.is_set() or now - begin > args.hours * 3600
        if trainer.step % 25 == 0:
            line = {name: round(float(np.mean([r[name] for r in recent if name in r])), 5) for name in recent[-1]}
            head = {"step": trainer.step, "samples": trainer.samples, "hours": round(trainer.seconds / 3600, 4)}
            with open(args.out / LOG, "a") as log:
                log.write(json.dumps(head | line) + "\n")
            print(json.dumps(head | line), flush=True)
            recent = []
        if finished or now - saved > args.save_minutes * 60:
            trainer.save(args.out / CHECKPOINT)
            saved = now
            trainer.use(find_shards(args.data))
        if finished:
            return


if __name__ == "__main__":
    main()
