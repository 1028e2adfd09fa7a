"""Camera motion and inverse depth of one frame from its flow to two partners: robust Gauss-Newton, batched.

nano's network starts from this solution and corrects it; with the network's depth as the prior it runs a second time.
Shapes: B problems (frames), P partners, N points per frame. Lengths are in units of the frame's prior depth.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ROBUST_SCALE = 2.0  # residuals beyond so many sigmas lose weight (Cauchy)
TRANSLATION_SIGMA = 0.5  # prior, in units of depth
MAX_DEPTH_STEP = 0.7  # of log inverse depth per iteration
MIN_Z = 0.05
DAMPING = 1e-4  # of the pose, relative
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
    return _turn(torch.eye(3, dtype=w.dtype, device=w.device).expand(*w.shape, 3), w)


def _turn(R: Tensor, w: Tensor) -> Tensor:
    """``so3_exp(w) @ R``."""
    theta_sq = w.square().sum(dim=-1)[..., None, None] + 1e-12
    theta, w = theta_sq.sqrt(), w[..., None]
    once = torch.linalg.cross(w, R, dim=-2)
    twice = torch.linalg.cross(w, once, dim=-2)
    return R + theta.sin() / theta * once + (1 - theta.cos()) / theta_sq * twice


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
    rays = F.pad(points, (0, 1), value=1.0).mT
    known = weights > 0  # the reciprocal of zero would have no gradient, not even one that is masked
    variance = torch.where(known, torch.where(known, weights, 1.0).reciprocal(), torch.inf)
    problem = _Problem(rays, targets.mT[:, :, None], variance, prior_mean, prior_sigma**-2)
    (R, t), s = start, prior_mean
    for _ in range(iterations):
        step, depth_step = problem.step(t, s, *problem.linearise(R, t, s))
        R, t = _turn(R, step[..., 3:]), t + step[..., :3]
        s = s + depth_step.clamp(-MAX_DEPTH_STEP, MAX_DEPTH_STEP)
    columns, w = problem.linearise(R, t, s)
    information = (w * columns[:, :, 6].square().sum(dim=2)).sum(dim=1) + problem.certainty
    return Motion(R, t, s, information, columns[:, :, 7].mT)


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
class _Problem:
    """What stays the same over the iterations. One frame is all overhead, so operations are few rather than small."""

    rays: Tensor  # [B, 3, N]
    targets: Tensor  # [B, P, 1, 2, N]
    variance: Tensor  # [B, P, N] of targets; infinite: unknown
    prior_mean: Tensor  # [B, N] of log inverse depth
    certainty: Tensor  # [B, N] of that

    def linearise(self, R: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives by translation, rotation and log inverse depth of where points are seen, and last the residual.

        Args:
            R, t, s: [B, P, 3, 3], [B, P, 3], [B, N].

        Returns:
            [B, P, 3 + 3 + 1 + 1, 2, N], and robust weights [B, P, N].
        """
        offset, matrix = _moving_matrix(t.dtype, t.device)
        pose = torch.cat([R.flatten(2), t], dim=2).flatten(0, 1)  # [B * P, 12]
        moving = torch.addmm(offset, pose, matrix).view(len(t), -1, 4)  # [B, P * 8 * 3, 4]
        moved = moving @ torch.cat([self.rays, s.exp()[:, None]], dim=1)
        x_y, z = moved.view(*t.shape[:2], 8, 3, -1).split((2, 1), dim=3)  # [B, P, 8, 2 or 1, N]
        inv_z = z[:, :, 7:].clamp_min(MIN_Z).reciprocal()
        uv = x_y[:, :, 7:] * inv_z
        residual = self.targets - uv
        w = torch.add(self.variance, residual.square().sum(dim=(2, 3)), alpha=ROBUST_SCALE**-2).reciprocal()
        return torch.cat([(x_y[:, :, :7] - uv * z[:, :, :7]) * inv_z, residual], dim=2), w

    def step(self, t: Tensor, s: Tensor, columns: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Pose step [B, P, 6] and depth step [B, N] of one damped Gauss-Newton iteration (Schur complement of depths).

        Args:
            t, s: where it begins.
            columns, w: from ``linearise`` there.
        """
        prior, damping = _pose_prior(t.dtype, t.device)
        weighted = columns * w[:, :, None, None]
        normal = weighted[:, :, :6].flatten(3) @ columns.flatten(3).mT  # [B, P, 6, 8]
        normal = torch.addcmul(prior, normal, damping)
        normal[..., :3, 7].sub_(t, alpha=TRANSLATION_SIGMA**-2)
        shared = (weighted * columns[:, :, 6:7]).sum(dim=3)  # [B, P, 8, N]
        own = torch.stack([self.certainty, (self.prior_mean - s) * self.certainty], dim=1)
        H_ss, b_s = (shared[:, :, 6:].sum(dim=1) + own).split(1, dim=1)  # [B, 1, N]
        H_ps = shared[:, :, :6].flatten(1, 2)  # [B, 6P, N]
        full = (H_ps / -H_ss) @ torch.cat([H_ps, b_s], dim=1).mT  # [B, 6P, 6P + 1]
        own_blocks = full[:, :, :-1].unflatten(2, (-1, 6)).unflatten(1, (-1, 6)).diagonal(dim1=1, dim2=3)
        own_blocks.add_(normal[..., :6].permute(0, 2, 3, 1))  # [B, 6, 6, P]
        right = full[:, :, -1] + normal[..., 7].flatten(1)
        step = torch.linalg.solve_ex(full[:, :, :-1], right).result  # solve itself would wait for the device, to check
        return step.view(*t.shape[:2], 6), ((b_s - step[:, None] @ H_ps) / H_ss)[:, 0]


@functools.lru_cache(maxsize=4)
def _moving_matrix(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Offset [96] and matrix [12, 96] that make of (R, t) what (ray, rho) is multiplied by, [6 + 1 + 1, 3, 4].

    A point over its depth moves to R @ ray + t * rho. That comes last, before it its derivatives, in the order of
    ``linearise``.
    """
    with torch.inference_mode(False):  # shared between inference and training
        unit = torch.eye(12, dtype=dtype, device=device)
        R, t, still = unit[:, :9].view(-1, 3, 3), unit[:, 9:], unit[:3, :3]
        turned = torch.linalg.cross(still[None, :, :, None], R[:, None], dim=2)  # [12, 3, 3, 3] hat(unit vector) @ R
        shift = F.pad(t[:, None, :, None], (3, 0))
        matrix = torch.cat([F.pad(turned, (0, 1, 0, 0, 3, 0)), shift, shift + F.pad(R, (0, 1))[:, None]], dim=1)
        return F.pad(still[..., None], (3, 0, 0, 0, 0, 5)).flatten(), matrix.flatten(1)


@functools.lru_cache(maxsize=4)
def _pose_prior(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """What is added to the normal equations of a pose [6, 8], and what they are multiplied by before."""
    with torch.inference_mode(False):
        unit = torch.eye(6, 8, dtype=dtype, device=device)
        prior = unit.clone()
        prior[:3] *= TRANSLATION_SIGMA**-2
        return prior, 1 + DAMPING * unit
