"""nano: the small default model, trained and shipped with this package (see weights/MODEL_CARD.md, docs/training.md).

Besides RGB it sees each frame's optical flow to the one and two frames before it (``motion.py``). A classical robust
solver (``motion_solver.py``) turns flow into a first camera motion and inverse depth; flow without that rotation, what
the solver found and how sure it is go into the patch tokens. The trunk corrects motion and depth across frames, then
the solver runs once more with the network's depth as its prior. Poses are relative and chained; with a context the
chain starts at the pose of a context frame that is recognised among the previous frames or this pass's own.

Shapes: B batch, S frames, H x W pixels, h x w cells of CELL pixels, N solver points (cells pooled by POOL).
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spark3r_ros.backbone.model import Geometry, Model, ModelSpec, T_from_R_t, inverse_T
from spark3r_ros.backbone.motion import CELL, CHANNELS, NUM_PARTNERS, motion_channels, partners
from spark3r_ros.backbone.motion_solver import Motion, so3_exp, solve_from_directions, solve_motion
from spark3r_ros.backbone.trunk import DENSE, FRAME, GLOBAL, PassOptions, Tokens, Trunk, TrunkSpec
from spark3r_ros.context import KVContext
from spark3r_ros.device import send
from spark3r_ros.preprocess import ResizeRule

PATCH = 24
RGB_STEP = 2  # RGB enters at half the resolution that flow is computed at
POOL = 3  # cells per side of a solver point
GUESSED_FOCAL = 0.87  # of the longer side: 60 degrees, where K is unknown
FLOW_SIGMA, FLOW_SIGMA_PER_ERROR = 0.12, 0.7  # pixels; per pixel of forward-backward error (tuned on training scenes)
MAX_FLOW_ERROR = 3.0  # pixels of forward-backward error; beyond, flow is not used
DEPTH_SIGMA = 0.5  # of log depth before anything is known about the scene
DEPTH_RANGE = 3.0  # of log depth to both sides of a frame's mean: no cell may outweigh those pooled with it
CONFIDENCE_UNIT = 0.1  # confidence = 1 / (1 + expected error of log depth / this)
MOTION_WIDTH = NUM_PARTNERS * (CHANNELS + 1) + 1  # per partner flow, error and offset in frames; first partner's grey
FINGERPRINT = (12, 16)  # grey thumbnail by which context frames are recognised; integers, exact in bfloat16

SPEC = ModelSpec(
    name="nano",
    trunk=TrunkSpec(
        patch=PATCH,
        dim=128,
        heads=4,
        kinds=(FRAME, GLOBAL) * 3,
        taps=(5,),
        num_special=3,
        eps=1e-6,
        layer_scale=0.2,
    ),
    resize=ResizeRule(PATCH, 170, mode="patches"),
    camera_tokens=1,
)


@dataclass(frozen=True, eq=False)
class Estimate:
    """What the network says, in each frame's own unit of length (its geometric mean depth)."""

    K: Tensor  # [B, S, 3, 3] pixels
    T_partner_frame: Tensor  # [B, S, 2, 4, 4] lengths in the frame's unit
    log_unit: Tensor  # [B, S] log of the frame's unit in the gauge's
    log_depth: Tensor  # [B, S, h, w] of zero mean
    log_error: Tensor  # [B, S, h, w] log of the expected absolute error of log depth
    tokens: Tokens
    observed: Observation


@dataclass(frozen=True, eq=False)
class Observation:
    """Flow as the solver wants it, B * S frames."""

    points: Tensor  # [B * S, N, 2] normalised coordinates
    targets: Tensor  # [B * S, 2, N, 2]
    weights: Tensor  # [B * S, 2, N]
    grid: tuple[int, int]  # rows and columns of the N points
    K: Tensor  # [B * S, 3, 3] that normalised them
    first: Motion  # solved without the network


def pack_motion(channels: Tensor, grey: Tensor, num_previous: int) -> Tensor:
    """The network's motion input [..., S, MOTION_WIDTH, h, w].

    Args:
        channels: [..., S, 6, h, w] from ``motion_channels``.
        grey: [..., num_previous + S, h, w] cell means of the images, 0..1.
        num_previous: frames before the first of the pass that are partners only.
    """
    num_frames = channels.shape[-4]
    table = torch.from_numpy(partners(num_frames, num_previous))  # [S, 2]
    own = torch.arange(num_frames) + num_previous
    offsets = torch.where(table >= 0, table - own[:, None], 0).to(channels)[:, :, None, None]
    offsets = offsets.expand(*channels.shape[:-3], -1, *grey.shape[-2:])
    before = grey[..., (own - 1).clamp_min(0), None, :, :]  # of the frame before; unused where there is none
    return torch.cat([channels, offsets, before], dim=-3)


class Nano(Model):
    """RGB and flow -> motion solver -> trunk -> depth with expected error, motion, field of view -> motion solver."""

    def __init__(self, spec: ModelSpec = SPEC) -> None:
        super().__init__(spec)
        dim = spec.trunk.dim
        cells = (PATCH // CELL) ** 2
        points = (PATCH // (CELL * POOL)) ** 2
        rgb = 3 * (PATCH // RGB_STEP) ** 2
        width = rgb + cells * NUM_PARTNERS * 6 + points * (2 + 2 * NUM_PARTNERS) + 2 + NUM_PARTNERS * 9 + 2
        self.embed = nn.Sequential(nn.Linear(width, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.trunk = Trunk(spec.trunk)
        tap = spec.trunk.tap_dim
        self.depth_head = nn.Sequential(nn.Linear(tap + dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, 2 * cells + 1))
        self.camera_head = nn.Sequential(nn.Linear(tap, dim), nn.GELU(), nn.Linear(dim, 6 * NUM_PARTNERS + 3))
        for last in (self.depth_head[-1], self.camera_head[-1]):
            assert isinstance(last, nn.Linear)
            nn.init.normal_(last.weight, std=0.01)  # start from what the solver says

    def motion(self, images: Tensor, previous: Tensor | None) -> Tensor:
        """Flow to the partners [S, MOTION_WIDTH, h, w] of a window [S, 3, H, W]."""
        frames = images if previous is None else torch.cat([previous.to(images), images])
        pixels = (frames * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        greys = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in pixels]
        num_previous = len(frames) - len(images)
        channels = torch.from_numpy(motion_channels(greys, num_previous))
        return pack_motion(channels, _grey(frames).cpu(), num_previous).to(images.device)

    def forward(
        self,
        images: Tensor,
        options: PassOptions = DENSE,
        *,
        motion: Tensor | None = None,
        intrinsics: Tensor | None = None,
    ) -> Geometry:
        assert motion is not None, "nano needs its motion channels"
        height, width = images.shape[-2:]
        small = F.avg_pool2d(images.flatten(0, 1), RGB_STEP).unflatten(0, images.shape[:2])
        estimate = self.estimate(small, motion, intrinsics, options)
        with full_precision(images):
            T_partner_frame = self.solve_again(estimate)
            T_before_frame = in_gauge(T_partner_frame, estimate.log_unit)[:, :, 0]  # [B, S, 4, 4]
            if options.context is None:
                T_world_camera = chain(T_before_frame)
            else:
                T_world_camera = _anchor(options.context, T_before_frame, _grey(images[0]), motion[0, :, -1])
        log_depth = (estimate.log_depth + estimate.log_unit[..., None, None]).float()
        log_depth = F.interpolate(log_depth, size=(height, width), mode="bilinear")
        logit = torch.log(torch.tensor(CONFIDENCE_UNIT)) - estimate.log_error.float()
        logit = F.interpolate(logit, size=(height, width), mode="bilinear")
        return Geometry(T_world_camera, estimate.K, log_depth.exp(), logit, estimate.tokens.descriptors)

    def estimate(
        self, small: Tensor, motion: Tensor, intrinsics: Tensor | None, options: PassOptions = DENSE
    ) -> Estimate:
        """The network's estimate.

        Args:
            small: [B, S, 3, H / 2, W / 2] RGB in [0, 1].
            motion: [B, S, MOTION_WIDTH, h, w].
            intrinsics: [B, S, 3, 3] pixels of H x W; None: unknown.
            options: of the trunk.
        """
        batch, num_frames = small.shape[:2]
        height, width = RGB_STEP * small.shape[-2], RGB_STEP * small.shape[-1]
        known = intrinsics is not None
        K = _guess_K(height, width, small) if intrinsics is None else intrinsics
        K = K.expand(batch, num_frames, 3, 3).flatten(0, 1)
        with torch.no_grad(), full_precision(small):
            observed = observe(motion.flatten(0, 1), K)
            features = self._features(small.flatten(0, 1), motion.flatten(0, 1), observed, known)
        x = self.embed(features)  # [B * S, h * w / 36, C]
        grid = (height // PATCH, width // PATCH)
        tokens = self.trunk(x.unflatten(0, (batch, num_frames)), grid, options)
        dense = self.depth_head(torch.cat([tokens.patches().flatten(0, 1), x], dim=-1)).float()
        log_depth, log_error = self._dense(dense, observed, grid)
        camera = self.camera_head(tokens.special()[:, :, 0].flatten(0, 1)).float()  # [B * S, 15]
        step = camera[:, : 6 * NUM_PARTNERS].unflatten(1, (NUM_PARTNERS, 6))
        with full_precision(small):
            T = T_from_R_t(so3_exp(step[..., 3:]) @ observed.first.R, observed.first.t + step[..., :3])
        if not known:
            K = _with_focal(K, camera[:, -3:-1])

        def split(value: Tensor) -> Tensor:
            return value.unflatten(0, (batch, num_frames))

        return Estimate(split(K), split(T), split(camera[:, -1]), split(log_depth), split(log_error), tokens, observed)

    def _features(self, rgb: Tensor, motion: Tensor, observed: Observation, known: bool) -> Tensor:
        """Input of the embedding [B * S, patches, width]."""
        first, K = observed.first, observed.K
        rgb = F.pixel_unshuffle((rgb - 0.45) / 0.25, PATCH // RGB_STEP)
        cells = F.pixel_unshuffle(_cell_features(motion, K, first.R), PATCH // CELL)
        s, info = first.log_inverse_depth, (first.information * (FLOW_SIGMA / 0.3) ** 2).clamp_min(1).log() - 1.4
        residual = (first.residual * 20).clamp(-2, 2).permute(0, 1, 3, 2).flatten(1, 2)  # [B * S, 4, N]
        points = torch.cat([s[:, None], info[:, None] / 3, residual], dim=1).unflatten(2, observed.grid)
        points = F.pixel_unshuffle(points, PATCH // (CELL * POOL))
        rays = F.avg_pool2d(observed.points.transpose(1, 2).unflatten(2, observed.grid), PATCH // (CELL * POOL))
        local = torch.cat([rgb, cells, points, rays], dim=1).flatten(2).transpose(1, 2)  # [B * S, patches, C]
        offsets = motion[:, 3 * NUM_PARTNERS : 4 * NUM_PARTNERS, 0, 0]  # [B * S, 2]
        twice = first.R - first.R.transpose(-1, -2)
        angles = torch.cat([twice[..., 0, 1:], twice[..., 1, 2:]], dim=-1) * 2
        error = (
            (observed.weights.sqrt() * first.residual.norm(dim=-1) * (FLOW_SIGMA / 0.3))
            .clamp_max(5)
            .mean(dim=-1, keepdim=True)
        )
        support = (observed.weights > 0).to(s).mean(dim=-1, keepdim=True)
        frame = torch.cat([angles, first.t.clamp(-2, 2) * 4, error, support, offsets[..., None] / 2], dim=-1)
        focal = torch.log(K[:, 0, 0] / (K[:, 0, 2] * 2) / GUESSED_FOCAL)[:, None] * 2
        frame = torch.cat([frame.flatten(1), focal, torch.full_like(focal, float(known))], dim=1)
        return torch.cat([local, frame[:, None].expand(-1, local.shape[1], -1)], dim=-1)

    def _dense(self, dense: Tensor, observed: Observation, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Log depth of zero mean and log of its expected error [B * S, h, w] from [B * S, patches, 2 * 36 + 1]."""
        maps = dense[..., :-1].transpose(1, 2).unflatten(2, grid)
        maps = F.pixel_shuffle(maps, PATCH // CELL)  # [B * S, 2, h, w]
        gate = dense[..., -1:].transpose(1, 2).unflatten(2, grid).sigmoid()
        size = maps.shape[-2:]
        solved = -observed.first.log_inverse_depth.unflatten(1, observed.grid)[:, None]
        solved = F.interpolate(solved, size=size, mode="bilinear") * F.interpolate(gate, size=size, mode="bilinear")
        log_depth = maps[:, 0] + solved[:, 0]
        log_depth = log_depth - log_depth.mean(dim=(1, 2), keepdim=True)
        return log_depth.clamp(-DEPTH_RANGE, DEPTH_RANGE), maps[:, 1].clamp(-3, 3) - 1.5

    def solve_again(self, estimate: Estimate, iterations: int = 5) -> Tensor:
        """T_partner_frame [B, S, 2, 4, 4] from flow with the network's estimate as start and depth prior."""
        seen, size = estimate.observed, estimate.log_depth.shape[:2]
        focal = torch.stack([seen.K[:, 0, 0], seen.K[:, 1, 1]], dim=-1)
        change = focal / torch.stack([estimate.K[..., 0, 0], estimate.K[..., 1, 1]], dim=-1).flatten(0, 1)  # [B * S, 2]
        points, targets = seen.points * change[:, None], seen.targets * change[:, None, None]
        weights = seen.weights / (change[:, :1, None] ** 2)
        mean = -F.avg_pool2d(estimate.log_depth.flatten(0, 1)[:, None], POOL).flatten(1)
        error = F.avg_pool2d(estimate.log_error.flatten(0, 1)[:, None], POOL).flatten(1).exp()
        T = estimate.T_partner_frame.flatten(0, 1)
        start = (T[..., :3, :3], T[..., :3, 3])
        solved = solve_motion(points, targets, weights, mean, (2.0 * error).clamp(0.03, 0.7), start, iterations)
        return T_from_R_t(solved.R, solved.t).unflatten(0, size)


def full_precision(like: Tensor) -> torch.autocast:
    """Autocast off: geometry in bfloat16 (3 digits) doubles the error of rotations and loses that of translations."""
    return torch.autocast(like.device.type, enabled=False)


def observe(motion: Tensor, K: Tensor) -> Observation:
    """Pool flow [F, MOTION_WIDTH, h, w] to solver points and solve for motion; K [F, 3, 3]."""
    flow = motion[:, : NUM_PARTNERS * CHANNELS].unflatten(1, (NUM_PARTNERS, CHANNELS))  # [F, 2, 3, h, w]
    error = flow[:, :, 2]
    sigma = FLOW_SIGMA + FLOW_SIGMA_PER_ERROR * error  # pixels
    trust = torch.where((error >= 0) & (error < MAX_FLOW_ERROR), sigma**-2, torch.zeros_like(error))
    weights = F.avg_pool2d(trust, POOL)  # [F, 2, rows, columns]
    pooled = F.avg_pool2d((flow[:, :, :2] * trust[:, :, None]).flatten(1, 2), POOL).unflatten(1, (NUM_PARTNERS, 2))
    pooled = (pooled / weights[:, :, None].clamp_min(1e-6)).flatten(3).transpose(2, 3)  # [F, 2, N, 2]
    rows, columns = weights.shape[-2:]
    size = CELL * POOL
    y = torch.arange(rows, dtype=motion.dtype, device=motion.device) * size + (size - 1) / 2
    x = torch.arange(columns, dtype=motion.dtype, device=motion.device) * size + (size - 1) / 2
    pixels = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(1, -1, 2)
    focal = torch.stack([K[:, 0, 0], K[:, 1, 1]], dim=-1)[:, None]  # [F, 1, 2]
    points = (pixels - K[:, None, :2, 2]) / focal
    targets = points[:, None] + pooled / focal[:, None]
    weights = weights.flatten(2) * (focal[..., 0] ** 2)[..., None]
    offsets = motion[:, NUM_PARTNERS * CHANNELS : NUM_PARTNERS * (CHANNELS + 1), 0, 0]  # [F, 2]
    first = solve_from_directions(points, targets, weights, offsets, (rows, columns), DEPTH_SIGMA)
    return Observation(points, targets, weights, (rows, columns), K, first)


def _cell_features(motion: Tensor, K: Tensor, R: Tensor) -> Tensor:
    """Per cell and partner: flow, flow without the rotation R [F, 2, 3, 3], error, presence: [F, 12, h, w]."""
    flow = motion[:, : NUM_PARTNERS * CHANNELS].unflatten(1, (NUM_PARTNERS, CHANNELS))
    rows, columns = flow.shape[-2:]
    y = torch.arange(rows, dtype=motion.dtype, device=motion.device) * CELL + (CELL - 1) / 2
    x = torch.arange(columns, dtype=motion.dtype, device=motion.device) * CELL + (CELL - 1) / 2
    pixels = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(1, -1, 2)
    focal = torch.stack([K[:, 0, 0], K[:, 1, 1]], dim=-1)  # [F, 2]
    points = (pixels - K[:, None, :2, 2]) / focal[:, None]
    rotated = F.pad(points, (0, 1), value=1.0)[:, None] @ R.transpose(-1, -2)  # [F, 2, h * w, 3]
    turned = rotated[..., :2] / rotated[..., 2:].clamp_min(0.1) - points[:, None]
    moved = flow[:, :, :2] / focal[:, None, :, None, None]  # [F, 2, 2, h, w]
    still = moved - turned.transpose(2, 3).unflatten(3, (rows, columns))
    present = (flow[:, :, 2:] >= 0).to(moved)
    error = torch.log1p(flow[:, :, 2:].clamp_min(0)) - 0.5
    maps = torch.cat([moved.clamp(-1, 1) * 4, still.clamp(-0.5, 0.5) * 12, error, present], dim=2) * present
    return maps.flatten(1, 2)


def _guess_K(height: int, width: int, like: Tensor) -> Tensor:
    focal = GUESSED_FOCAL * max(height, width)
    rows = [[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]]
    return send(torch.tensor(rows, dtype=like.dtype, device="cpu"), like.device)


def _with_focal(K: Tensor, log_factors: Tensor) -> Tensor:
    """K [F, 3, 3] with its focal lengths multiplied by exp(log_factors [F, 2])."""
    gain = torch.ones_like(K)
    gain[:, 0, 0], gain[:, 1, 1] = log_factors[:, 0].exp(), log_factors[:, 1].exp()
    return K * gain


def in_gauge(T_partner_frame: Tensor, log_unit: Tensor) -> Tensor:
    """Relative poses [B, S, 2, 4, 4] with lengths in units of the gauge instead of each frame's own."""
    t = T_partner_frame[..., :3, 3] * log_unit.exp()[..., None, None]
    return T_from_R_t(T_partner_frame[..., :3, :3], t)


def chain(T_before_frame: Tensor) -> Tensor:
    """T_first_frame [B, S, 4, 4] from each frame's pose in the one before [B, S, 4, 4]; the first one is not used."""
    T = [torch.eye(4, dtype=T_before_frame.dtype, device=T_before_frame.device).expand(len(T_before_frame), 4, 4)]
    for step in T_before_frame[:, 1:].unbind(1):
        T.append(T[-1] @ step)
    return torch.stack(T, dim=1)


def _grey(images: Tensor) -> Tensor:
    """Cell means [S, h, w] of the luminance of images [S, 3, H, W]."""
    red, green, blue = images.unbind(1)
    return F.avg_pool2d((0.299 * red + 0.587 * green + 0.114 * blue)[:, None], CELL)[:, 0]


def _fingerprint(grey: Tensor) -> Tensor:
    """Thumbnails [S, 192] of integers 0..255 from cell means [S, h, w]."""
    return (F.adaptive_avg_pool2d(grey[:, None].float(), FINGERPRINT) * 255).round().flatten(1)


def _to_token(T: Tensor, fingerprint: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Context camera tokens [S, 1, width] of poses [S, 4, 4], in three parts (exact in bfloat16), and fingerprints."""
    rest, parts = T[:, :3].flatten(1).float(), []
    for _ in range(3):
        parts.append(rest.bfloat16().float())
        rest = rest - parts[-1]
    token = torch.cat([*parts, fingerprint], dim=1)
    return F.pad(token, (0, width - token.shape[1]))[:, None].to(dtype)


def _from_token(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Poses [F, 4, 4] and fingerprints [F, 192] of camera tokens [F, 1, width]."""
    tokens = tokens[:, 0].float()
    rows = tokens[:, :36].unflatten(1, (3, 3, 4)).sum(dim=1)  # [F, 3, 4]
    count = FINGERPRINT[0] * FINGERPRINT[1]
    return T_from_R_t(rows[..., :3], rows[..., 3]), tokens[:, 36 : 36 + count]


def _anchor(context: KVContext, T_before_frame: Tensor, grey: Tensor, grey_before: Tensor) -> Tensor:
    """Poses [1, S, 4, 4] in the world of the context, whose camera tokens remember poses and fingerprints.

    The chain is hung up on a frame that the context knows: one of this pass (windows overlap), or the frame before it.
    Where neither is known, the frame before is taken to be where the context's last frame was.
    """
    T_first_frame = chain(T_before_frame)[0]
    own, width = _fingerprint(grey), context.spec.camera_shape[1]
    known = context.append_camera(_to_token(T_first_frame, own, width, context._like.dtype))[0]
    count = len(known) - len(grey)
    T_known, seen = _from_token(known[:count])
    T_world_first = torch.eye(4, dtype=T_first_frame.dtype, device=T_first_frame.device)
    if count:
        candidates = torch.cat([own, _fingerprint(grey_before[:1])])  # [S + 1, 192] in order of preference
        difference = (candidates[:, None] - seen[None]).abs().mean(dim=-1)  # [S + 1, F]
        closest, source = difference.min(dim=1)
        T_first_before = inverse_T(T_before_frame[0, :1])
        T_first_candidate = torch.cat([T_first_frame, T_first_before, T_first_before])  # [S + 2] with the last resort
        is_known = F.pad(closest < 0.5, (0, 1), value=True)
        source = F.pad(source, (0, 1), value=count - 1)
        first = is_known.byte().argmax(dim=0, keepdim=True)  # [1], never read back
        T_world_first = T_known[source[first]] @ inverse_T(T_first_candidate[first])
    T_world_camera = T_world_first @ T_first_frame
    token = _to_token(T_world_camera, own, width, context._like.dtype)
    known[count:] = token.to(known.dtype)
    return T_world_camera[None]
