"""What the network is trained for. Lengths are in units of each frame's geometric mean depth."""

from __future__ import annotations

import torch
from torch import Tensor

from spark3r_ros.backbone.nano import Estimate
from training.data import Batch

ROTATION_KNEE = 0.05  # radians


def rotation_error(R: Tensor, R_true: Tensor) -> Tensor:
    """Angle in radians between rotations [..., 3, 3], with a gradient at zero."""
    chord = (R - R_true).flatten(-2).norm(dim=-1) / 2**1.5  # sin(angle / 2)
    return 2 * torch.asin(chord.clamp_max(0.999999))


def truth_in_units(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Relative poses [B, S, 2, 4, 4] and log depth [B, S, h, w] in frame units, log units [B, S], presence [S, 2]."""
    log_depth = batch.depth.clamp_min(0.01).log()
    log_unit = log_depth.mean(dim=(2, 3))
    T, present = batch.relative_truth()
    T[..., :3, 3] = T[..., :3, 3] / log_unit.exp()[..., None, None]
    return T, log_depth - log_unit[..., None, None], log_unit - log_unit[:, :1], present


def pose_losses(T: Tensor, T_true: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Robust mean errors of rotation and of translation (relative) of poses [B, S, 2, 4, 4]; weight [B, S, 2].

    Hopeless frames (blank, blurred, turned away) must not drown the others, hence the logarithms.
    """
    rotation = torch.log1p(rotation_error(T[..., :3, :3], T_true[..., :3, :3]) / ROTATION_KNEE)
    miss = (T[..., :3, 3] - T_true[..., :3, 3]).norm(dim=-1)
    translation = miss / (T_true[..., :3, 3].norm(dim=-1) + 0.04)
    translation = torch.where(translation < 2, translation, 2 + torch.log(translation.clamp_min(2) / 2))
    total = weight.sum().clamp_min(1)
    return (rotation * weight).sum() / total, (translation * weight).sum() / total


def losses(estimate: Estimate, T_solved: Tensor | None, batch: Batch, seen: Tensor) -> dict[str, Tensor]:
    """All terms, unweighted. ``seen`` [B, S, 2]: the partner's motion was given to the network."""
    T_true, log_depth, log_unit, present = truth_in_units(batch)
    weight = (seen & present).float()
    terms = {}
    terms["rotation"], terms["translation"] = pose_losses(estimate.T_partner_frame, T_true, weight)
    if T_solved is not None:
        terms["solved_rotation"], terms["solved_translation"] = pose_losses(T_solved, T_true, weight)
    miss = (estimate.log_depth - log_depth).abs()
    terms["depth"] = miss.mean()
    terms["likelihood"] = (miss * torch.exp(-estimate.log_error) + estimate.log_error).mean()
    terms["unit"] = (estimate.log_unit - log_unit).abs().mean()
    focal = torch.stack([estimate.K[..., 0, 0], estimate.K[..., 1, 1]], dim=-1)
    focal_true = torch.stack([batch.K[:, 0, 0], batch.K[:, 1, 1]], dim=-1)[:, None]
    terms["focal"] = (focal / focal_true).log().abs().mean()
    return terms


# Chosen so that the terms' gradients are of like size: pose terms are steep, depth is what the second solve needs.
WEIGHTS = {
    "rotation": 0.15, "translation": 0.1, "solved_rotation": 0.7, "solved_translation": 0.7, "depth": 4.0,
    "likelihood": 1.0, "unit": 1.5, "focal": 1.0,
}  # fmt: skip


def total(terms: dict[str, Tensor]) -> Tensor:
    """The scalar that is minimised."""
    return sum((WEIGHTS[name] * value for name, value in terms.items()), torch.zeros(()))
