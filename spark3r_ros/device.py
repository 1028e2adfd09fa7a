"""Where torch computes, and how tables made on the CPU get there."""

from __future__ import annotations

import torch
from torch import Tensor


def choose_device(name: str) -> torch.device:
    """``auto``: CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def send(table: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the CPU on ``device``; pinned first, since a plain copy to a GPU waits for all before it."""
    device = torch.device(device)
    return (table.pin_memory() if device.type == "cuda" else table).to(device, non_blocking=True)
