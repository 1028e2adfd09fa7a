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
    s, certainty = prior_mean, prior_sigma**-2
    rays = torch.nn.functional.pad(points, (0, 1), value=1.0)[:, None]  # [B, 1, N, 3]
    for _ in range(iterations):
        system = _linearise(rays, targets, weights, R, t, s)
        step, depth_step = _solve_step(system, t, (prior_mean - s) * certainty, certainty)
        R, t = so3_exp(step[..., 3:]) @ R, t + step[..., :3]
        s = s + depth_step.clamp(-MAX_DEPTH_STEP, MAX_DEPTH_STEP)
    last = _linearise(rays, targets, weights, R, t, s)
    information = (last.w[..., None] * last.J_s**2).sum(dim=(1, 3)) + certainty
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
    unit = torch.eye(3, dtype=points.dtype, device=points.device)
    directions = torch.cat([unit, -unit])  # [6, 3]
    count = len(directions)
    t = -START_STEP * offsets[:, None, :, None] * directions[None, :, None]  # [B, 6, P, 3]
    sparse = torch.arange(grid[0] * grid[1], device=points.device).view(grid)[::2, ::2].flatten()

    def repeat(x: Tensor) -> Tensor:
        return x.repeat_interleave(count, dim=0)

    few = (repeat(points[:, sparse]), repeat(targets[:, :, sparse]), repeat(weights[:, :, sparse]))
    mean = torch.zeros_like(few[0][..., 0])
    still = unit.expand(len(mean), offsets.shape[1], 3, 3)
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


def _linearise(rays: Tensor, targets: Tensor, weights: Tensor, R: Tensor, t: Tensor, s: Tensor) -> _System:
    rotated = rays @ R.transpose(-1, -2)  # [B, P, N, 3]
    rho = s.exp()[:, None, :, None]  # [B, 1, N, 1]
    shift = rho * t[:, :, None]  # [B, P, N, 3]
    x, y, z = (rotated + shift).unbind(-1)  # each [B, P, N]
    inv_z = z.clamp_min(MIN_Z).reciprocal()
    u, v = x * inv_z, y * inv_z
    uv = torch.stack([u, v], dim=-1)
    residual = targets - uv
    w = weights / (1 + weights * residual.square().sum(-1) / ROBUST_SCALE**2)
    J_s = (shift[..., :2] - uv * shift[..., 2:]) * inv_z[..., None]
    x, y, z = rotated.unbind(-1)
    by_t, zero = rho[..., 0] * inv_z, torch.zeros_like(u)  # d u / d t_x
    rows = [
        by_t, zero, -u * by_t, -u * y * inv_z, (z + u * x) * inv_z, -y * inv_z,
        zero, by_t, -v * by_t, -(z + v * y) * inv_z, v * x * inv_z, x * inv_z,
    ]  # fmt: skip
    return _System(residual, w, torch.stack(rows, dim=-1).unflatten(-1, (2, 6)), J_s)


def _solve_step(system: _System, t: Tensor, prior_pull: Tensor, certainty: Tensor) -> tuple[Tensor, Tensor]:
    """Pose step [B, P, 6] and depth step [B, N] of one damped Gauss-Newton iteration (Schur complement over depths).

    The prior on depths comes as its gradient and its information, each [B, N].
    """
    num_partners = t.shape[1]
    J, residual = system.J.flatten(2, 3), system.residual  # [B, P, 2N, 6], [B, P, N, 2]
    weighted = system.J * system.w[..., None, None]
    across = weighted.flatten(2, 3).transpose(-1, -2)  # [B, P, 6, 2N]
    H, b = across @ J, (across @ residual.flatten(2)[..., None])[..., 0]  # [B, P, 6, 6], [B, P, 6]
    prior = torch.nn.functional.pad(t.new_full((3,), TRANSLATION_SIGMA**-2), (0, 3), value=1.0)
    H = H + torch.diag_embed(1e-4 * H.diagonal(dim1=-2, dim2=-1) + prior)
    b = b - torch.nn.functional.pad(t, (0, 3)) * prior
    weighted_s = system.J_s * system.w[..., None]  # [B, P, N, 2]
    H_ps = (weighted * system.J_s[..., None]).sum(-2).transpose(1, 2).flatten(2)  # [B, N, 6P]
    H_ss = (weighted_s * system.J_s).sum(dim=(1, 3)) + certainty  # [B, N]
    b_s = (weighted_s * residual).sum(dim=(1, 3)) + prior_pull
    scaled = (H_ps / H_ss[..., None]).transpose(-1, -2)
    full = -(scaled @ H_ps)  # [B, 6P, 6P]
    blocks = full.unflatten(1, (num_partners, 6)).unflatten(3, (num_partners, 6))  # [B, P, 6, P, 6]
    blocks.diagonal(dim1=1, dim2=3).add_(H.permute(0, 2, 3, 1))
    right = b.flatten(1) - (scaled @ b_s[..., None])[..., 0]
    step = torch.linalg.solve_ex(full, right).result  # solve itself would wait for the device, to check
    depth_step = (b_s - (H_ps @ step[..., None])[..., 0]) / H_ss
    return step.unflatten(-1, (num_partners, 6)), depth_step
