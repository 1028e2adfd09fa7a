"""Batches for training and evaluation from the shards that ``training.generate`` wrote."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spark3r_ros.backbone.motion import CHANNELS, NUM_PARTNERS, partners
from spark3r_ros.backbone.nano import RGB_STEP, pack_motion

ARRAYS = ("rgb", "motion", "depth", "T_world_camera", "K")


@dataclass(frozen=True, eq=False)
class Batch:
    """B sequences of S frames of H x W pixels; see ``generate.Sequence``."""

    rgb: Tensor  # [B, S, 3, H/2, W/2] in [0, 1]
    motion: Tensor  # [B, S, 6, H/4, W/4]
    depth: Tensor  # [B, S, H/4, W/4] metres
    T_world_camera: Tensor  # [B, S, 4, 4]
    K: Tensor  # [B, 3, 3]

    def packed_motion(self) -> Tensor:
        """The network's motion input [B, S, C, H/4, W/4]."""
        grey = torch.nn.functional.avg_pool2d(self.rgb.mean(dim=2), 4 // RGB_STEP)
        return pack_motion(self.motion, grey, 0)

    def relative_truth(self) -> tuple[Tensor, Tensor]:
        """T_partner_frame [B, S, 2, 4, 4] in metres and whether there is that partner [S, 2]."""
        table = torch.from_numpy(partners(self.rgb.shape[1], 0))
        T_partner = self.T_world_camera[:, table.clamp_min(0)].double()  # [B, S, 2, 4, 4]
        T_partner_frame = torch.linalg.inv(T_partner) @ self.T_world_camera[:, :, None].double()
        return T_partner_frame.float(), (table >= 0).to(T_partner.device)


class Shard:
    """One folder of sequences of one image size: memory-mapped, or all of it in the memory of a GPU."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        self.folder = folder
        mapped = {name: np.load(folder / f"{name}.npy", mmap_mode="c") for name in ARRAYS}
        self.arrays = {name: torch.from_numpy(array).to(device) for name, array in mapped.items()}

    def __len__(self) -> int:
        return len(self.arrays["K"])

    @property
    def num_frames(self) -> int:
        """Of every sequence."""
        return int(self.arrays["T_world_camera"].shape[1])

    def batch(self, rows: np.ndarray, num_frames: int) -> Batch:
        """The first ``num_frames`` frames of some sequences."""
        chosen = torch.from_numpy(np.sort(rows)).to(self.arrays["K"].device)
        part = {name: array[chosen].float() for name, array in self.arrays.items()}
        frames = {name: part[name][:, :num_frames] for name in ARRAYS if name != "K"}
        absent = torch.from_numpy(partners(num_frames, 0)) < 0  # a partner beyond the shortened sequence
        absent = absent.to(chosen.device).expand(len(rows), -1, -1)
        return Batch(
            frames["rgb"].permute(0, 1, 4, 2, 3) / 255, drop_partners(frames["motion"], absent),
            frames["depth"], frames["T_world_camera"], part["K"],
        )  # fmt: skip


def list_shards(root: Path, split: str) -> list[Path]:
    """Finished shards in order of their index. Raises FileNotFoundError when there are none."""
    found = sorted((root / split).glob("shard_*"))
    if not found:
        raise FileNotFoundError(f"no shards in {root / split}; make some: python -m training.generate --data {root}")
    return found


def drop_partners(motion: Tensor, absent: Tensor) -> Tensor:
    """Motion [B, S, 6, h, w] as if partners did not exist where ``absent`` [B, S, 2]."""
    slots = motion.unflatten(2, (NUM_PARTNERS, CHANNELS))  # [B, S, 2, 3, h, w]
    nothing = motion.new_zeros(CHANNELS, 1, 1)
    nothing[2] = -1.0
    return torch.where(absent[..., None, None, None], nothing, slots).flatten(2, 3)


def mirror(batch: Batch) -> Batch:
    """The same sequences seen in a mirror: left and right exchanged."""
    width = RGB_STEP * batch.rgb.shape[-1]
    flip = torch.diag(batch.K.new_tensor([-1.0, 1, 1, 1]))
    sign = batch.K.new_tensor([-1.0, 1, 1, -1, 1, 1])[:, None, None]
    K = batch.K.clone()
    K[:, 0, 2] = width - 1 - K[:, 0, 2]
    return Batch(
        batch.rgb.flip(-1), batch.motion.flip(-1) * sign, batch.depth.flip(-1), flip @ batch.T_world_camera @ flip, K
    )


def augment(batch: Batch, generator: torch.Generator) -> Batch:
    """Random mirror, colours, flow noise and missing partners; ``generator`` lives where the batch does."""
    random = {"generator": generator, "device": generator.device}

    def chance(probability: float, *shape: int) -> Tensor:
        return torch.rand(shape, **random) < probability

    count = len(batch.rgb)
    if chance(0.5):
        batch = mirror(batch)
    gain = torch.exp(0.25 * torch.randn(count, 1, 3, 1, 1, **random))
    rgb = (batch.rgb * gain).clamp(0, 1)
    rgb = rgb[:, :, torch.randperm(3, **random)]
    rgb = torch.where(chance(0.15, count)[:, None, None, None, None], rgb.mean(dim=2, keepdim=True), rgb)
    noise = torch.randn(batch.motion.shape, **random) * 0.1 * torch.rand(count, **random).view(-1, 1, 1, 1, 1)
    noise[:, :, [2, 5]] = 0
    absent = torch.zeros(*batch.motion.shape[:2], NUM_PARTNERS, dtype=torch.bool, device=generator.device)
    absent[..., 1] = chance(0.1, count)[:, None] | chance(0.05, *absent.shape[:2])
    absent |= chance(0.03, *absent.shape[:2])[..., None]
    present = batch.motion[:, :, [2, 5], :1, :1] >= 0
    noise = noise * present.repeat_interleave(CHANNELS, dim=2)
    return replace(batch, rgb=rgb, motion=drop_partners(batch.motion + noise, absent))
