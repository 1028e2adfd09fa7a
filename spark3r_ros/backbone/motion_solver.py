"""Camera motion and inverse depth of one frame from its flow to two partners: robust Gauss-Newton, batched.

nano's network starts from this solution and corrects it; with the network's depth as the prior it runs a second time.
Shapes: B problems (frames), P partners, N points per frame. Lengths are in units of the frame's prior depth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROBUST_SCALE = 2.0  # residuals beyond so many sigmas lose weight (Cauchy)
TRANSLATION_SIGMA = 0.5  # prior, in units of depth
MAX_DEPTH_STEP = 0.7  # of log inverse depth per iteration
MIN_Z = 0.05
START_STEP = 0.1  # translation per frame, in units of depth, that a direction is tried with


@dataclass(frozen=True, eq=False)
class Motion:
    """Result of ``solve_motion``."""

    R: Tensor  # [B, P, 3, 3] of T_partner_frame
    t: Tensor  # [B, P, 3]
    log_inverse_depth: Tensor  # [B, N]
    information: Tensor  # [B, N] of log inverse depth, prior included
    residual: Tensor  # [B, P, N, 2] normalised image coordinates


def so3_exp(w: Tensor) -> Tensor:
    """Rotation vectors [..., 3] to matrices [..., 3, 3]; differentiable at zero."""
    theta_sq = (w * w).sum(-1)[..., None, None]
    theta = (theta_sq + 1e-12).sqrt()
    K = hat(w)
    return torch.eye(3, dtype=w.dtype, device=w.device) + theta.sin() / theta * K + (1 - theta.cos()) / theta**2 * K @ K


def hat(w: Tensor) -> Tensor:
    """Vectors [..., 3] to cross-product matrices [..., 3, 3]."""
    x, y, z = w.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).unflatten(-1, (3, 3))


def solve_motion(
    points: Tensor,
    targets: Tensor,
    weights: Tensor,
    prior_mean: Tensor,
    prior_sigma: Tensor,
    start: tuple[Tensor, Tensor],
    iterations: int = 5,
) -> Motion:
    """Minimise flow residuals and the depth prior over both partners' poses and the shared inverse depths.

    Args:
        points: [B, N, 2] normalised image coordinates (x / z, y / z) in the frame.
        targets: [B, P, N, 2] where they are seen in the partners.
        weights: [B, P, N] one over squared sigma of a target; 0: unknown.
        prior_mean, prior_sigma: [B, N] of log inverse depth.
        start: R [B, P, 3, 3] and t [B, P, 3].
    """
    R, t = start
    s = prior_mean
    for _ in range(iterations):
        system = _linearise(points, targets, weights, R, t, s)
        step, depth_step = _solve_step(system, t, s, prior_mean, prior_sigma)
        R, t = so3_exp(step[..., 3:]) @ R, t + step[..., :3]
        s = s + depth_step.clamp(-MAX_DEPTH_STEP, MAX_DEPTH_STEP)
    last = _linearise(points, targets, weights, R, t, s)
    information = (last.w * (last.J_s**2).sum(-1)).sum(1) + prior_sigma**-2
    return Motion(R, t, s, information, last.residual)


def solve_from_directions(
    points: Tensor, targets: Tensor, weights: Tensor, offsets: Tensor, grid: tuple[int, int], prior_sigma: float
) -> Motion:
    """``solve_motion`` from the best of six directions of travel; from rest it ends in a wrong minimum half the time.

    Args:
        points, targets, weights: as for ``solve_motion``; the N points lie on ``grid`` = (rows, columns).
        offsets: [B, P] partner's place in time minus the frame's; 0: no partner.
        prior_sigma: of log inverse depth, whose prior mean is zero.
    """
    directions = torch.cat([torch.eye(3), -torch.eye(3)]).to(points)  # [6, 3]
    count = len(directions)
    t = -START_STEP * offsets[:, None, :, None] * directions[None, :, None]  # [B, 6, P, 3]
    sparse = torch.arange(grid[0] * grid[1], device=points.device).view(grid)[::2, ::2].flatten()

    def repeat(x: Tensor) -> Tensor:
        return x.repeat_interleave(count, dim=0)

    few = (repeat(points[:, sparse]), repeat(targets[:, :, sparse]), repeat(weights[:, :, sparse]))
    mean = torch.zeros_like(few[0][..., 0])
    still = torch.eye(3).to(points).expand(len(mean), offsets.shape[1], 3, 3)
    tried = solve_motion(*few, mean, mean + prior_sigma, (still, t.flatten(0, 1)), 6)
    best = robust_cost(tried, few[2], mean, mean + prior_sigma).unflatten(0, (-1, count)).argmin(dim=1)
    rows = torch.arange(len(best), device=best.device) * count + best
    mean = torch.zeros_like(points[..., 0])
    return solve_motion(points, targets, weights, mean, mean + prior_sigma, (tried.R[rows], tried.t[rows]), 4)


def robust_cost(motion: Motion, weights: Tensor, prior_mean: Tensor, prior_sigma: Tensor) -> Tensor:
    """What ``solve_motion`` minimises, [B] (twice the negative log likelihood)."""
    squared = weights * (motion.residual**2).sum(-1) / ROBUST_SCALE**2
    prior = ((motion.log_inverse_depth - prior_mean) / prior_sigma) ** 2
    return ROBUST_SCALE**2 * torch.log1p(squared).sum(dim=(1, 2)) + prior.sum(dim=1)


@dataclass(frozen=True, eq=False)
class _System:
    residual: Tensor  # [B, P, N, 2]
    w: Tensor  # [B, P, N] robust weights
    J: Tensor  # [B, P, N, 2, 6] by translation, rotation
    J_s: Tensor  # [B, P, N, 2] by log inverse depth


def _linearise(points: Tensor, targets: Tensor, weights: Tensor, R: Tensor, t: Tensor, s: Tensor) -> _System:
    rays = torch.nn.functional.pad(points, (0, 1), value=1.0)  # [B, N, 3]
    rotated = rays[:, None] @ R.transpose(-1, -2)  # [B, P, N, 3]
    rho = s.exp()[:, None, :, None]  # [B, 1, N, 1]
    moved = rotated + rho * t[:, :, None]
    z = moved[..., 2:].clamp_min(MIN_Z)
    uv = moved[..., :2] / z  # [B, P, N, 2]
    residual = targets - uv
    w = weights / (1 + weights * (residual**2).sum(-1) / ROBUST_SCALE**2)
    inv_z = 1 / z
    zero = torch.zeros_like(inv_z)
    row_x = torch.cat([inv_z, zero, -uv[..., :1] * inv_z], dim=-1)  # [B, P, N, 3] d u / d moved
    row_y = torch.cat([zero, inv_z, -uv[..., 1:] * inv_z], dim=-1)
    rows = torch.stack([row_x, row_y], dim=-2)  # [B, P, N, 2, 3]
    turn = torch.linalg.cross(rotated[..., None, :].expand_as(rows), rows)  # d u / d rotation
    J = torch.cat([rows * rho[..., None], turn], dim=-1)
    J_s = (rows * (rho * t[:, :, None])[..., None, :]).sum(-1)
    return _System(residual, w, J, J_s)


def _solve_step(
    system: _System, t: Tensor, s: Tensor, prior_mean: Tensor, prior_sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """Pose step [B, P, 6] and depth step [B, N] of one damped Gauss-Newton iteration (Schur complement over depths)."""
    batch, num_partners = t.shape[:2]
    J = system.J.flatten(2, 3)  # [B, P, 2N, 6]
    w = system.w.repeat_interleave(2, dim=2)[..., None]  # [B, P, 2N, 1]
    H = (J * w).transpose(-1, -2) @ J  # [B, P, 6, 6]
    b = ((J * w).transpose(-1, -2) @ system.residual.flatten(2)[..., None])[..., 0]  # [B, P, 6]
    prior = torch.tensor([TRANSLATION_SIGMA**-2] * 3 + [1.0] * 3, dtype=t.dtype, device=t.device)
    H = H + torch.diag_embed(1e-4 * H.diagonal(dim1=-2, dim2=-1) + prior)
    b = b - torch.cat([t, torch.zeros_like(t)], dim=-1) * prior
    H_ps = (system.w[..., None] * (system.J * system.J_s[..., None]).sum(-2)).transpose(1, 2).flatten(2)  # [B, N, 6P]
    H_ss = (system.w * (system.J_s**2).sum(-1)).sum(1) + prior_sigma**-2  # [B, N]
    b_s = (system.w * (system.J_s * system.residual).sum(-1)).sum(1) + (prior_mean - s) * prior_sigma**-2
    scaled = H_ps / H_ss[..., None]
    full = t.new_zeros(batch, 6 * num_partners, 6 * num_partners)
    for k in range(num_partners):
        full[:, 6 * k : 6 * k + 6, 6 * k : 6 * k + 6] = H[:, k]
    full = full - scaled.transpose(-1, -2) @ H_ps
    right = b.flatten(1) - (scaled.transpose(-1, -2) @ b_s[..., None])[..., 0]
    step = torch.linalg.solve(full, right)
    depth_step = (b_s - (H_ps @ step[..., None])[..., 0]) / H_ss
    return step.unflatten(-1, (num_partners, 6)), depth_step
