"""Every family at toy size with random weights: same code, same structure, milliseconds instead of minutes."""

from __future__ import annotations

from dataclasses import replace

import torch

from spark3r_ros.backbone import da3, omega, pi3, vggt
from spark3r_ros.backbone.model import Model, ModelSpec
from spark3r_ros.backbone.trunk import FRAME, GLOBAL, REGISTER

FAMILIES = ("vggt", "pi3", "da3", "omega")
TINY_DPT = ((16, 16, 16, 16), 32)


def tiny_spec(family: str) -> ModelSpec:
    """The family's own specification with fewer, narrower blocks."""
    full, kinds, taps = {
        "vggt": (vggt.SPEC, (FRAME, GLOBAL) * 4, (1, 3, 5, 7)),
        "pi3": (pi3.SPEC, (FRAME, GLOBAL) * 2, (3,)),
        "pi3x": (pi3.PI3X_SPEC, (FRAME, GLOBAL) * 2, (3,)),
        "da3": (da3.SPECS["da3-small"], (FRAME,) * 3 + (GLOBAL, FRAME) * 3 + (GLOBAL,), (3, 5, 7, 9)),
        "omega": (omega.SPEC, (FRAME, GLOBAL, FRAME, REGISTER) * 2 + (FRAME, GLOBAL), (1, 5, 7, 9)),
    }[family]
    plain = 2 if full.trunk.plain else 0
    dim = 128 if family == "pi3x" else 64  # its metric scale has one head per 128 channels
    trunk = replace(full.trunk, dim=dim, heads=2, kinds=kinds, taps=taps, plain=plain)
    middle = frozenset({trunk.num_global // 2}) if full.sensitive else full.sensitive
    return replace(full, trunk=trunk, sensitive=middle, encoder_depth=min(full.encoder_depth, 1), dpt=TINY_DPT)


def tiny_model(family: str, seed: int = 0) -> Model:
    classes = {"vggt": vggt.Vggt, "pi3": pi3.Pi3, "pi3x": pi3.Pi3X, "da3": da3.DepthAnything3, "omega": omega.Omega}
    model = classes[family](tiny_spec(family))
    randomise(model, seed)
    return model.eval()


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights that make every part matter, unlike initial ones: gains near one half, biases and tokens not zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if name.endswith("gamma"):
            p.copy_(0.5 + 0.1 * noise)
        elif p.ndim == 1 and name.endswith("weight"):
            p.copy_(1 + 0.1 * noise)
        elif p.ndim == 1:
            p.copy_(0.02 * noise)
        elif any(word in name for word in ("special", "token", "registers", "pos_embed")):
            p.copy_(0.2 * noise)
        else:
            p.copy_(noise / p[0].numel() ** 0.5)
    for name, p in model.named_parameters():  # keep fields of view away from zero, and depth within a few e-foldings
        if name.endswith(("fc_fov.bias", "branch.fc2.bias")):
            p[-2:] += 0.9
        elif name.endswith(("fc_fov.weight", "branch.fc2.weight", "point_head.weight")):
            p *= 0.2


def images(num_frames: int, height: int, width: int, seed: int = 1) -> torch.Tensor:
    """Smooth random frames [S, 3, H, W] in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(num_frames, 3, 6, 6, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
