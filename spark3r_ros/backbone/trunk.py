"""The trunk all models share: blocks that look inside one frame alternate with blocks that look at all frames.

Shapes: B batch, S frames, P = num_special + h * w tokens per frame, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spark3r_ros.backbone.attention import GlobalPass, Rope, grid_rope, unit_rope
from spark3r_ros.backbone.blocks import Block
from spark3r_ros.config import ReductionConfig
from spark3r_ros.context import ContextSpec, KVContext

FRAME, GLOBAL, REGISTER = "frame", "global", "register"


@dataclass(frozen=True)
class TrunkSpec:
    """What tells the trunks of this family apart. Defaults are the commonest value."""

    patch: int  # pixels
    dim: int
    heads: int
    kinds: tuple[str, ...]  # per block: FRAME, GLOBAL or REGISTER (all frames, special tokens only)
    taps: tuple[int, ...]  # blocks after which tokens go to the heads
    num_special: int  # camera and register tokens, first in each frame
    variants: int = 2  # rows of the special token: 2 (reference frame, other frames) or 1 (the same for all)
    plain: int = 0  # first blocks that are an ordinary image transformer: no q/k norm, no rotation, own class token
    frame_rope: str = "grid"  # grid, unit (DINOv3) or none
    global_rope: str = "grid"  # grid (the same in every frame), constant (all patches alike) or none
    eps: float = 1e-5  # of the blocks' layer norms
    layer_scale: float | None = 0.01  # initial gain; None: none
    ffn: str = "gelu"  # gelu or swiglu
    final_eps: float | None = None  # of the layer norm on tapped tokens; None: there is none
    picks_reference: bool = False  # from three frames on, without a context, the model chooses its reference frame
    join: bool = True  # a tap is [last frame block's output | this output], otherwise this output alone

    @property
    def num_global(self) -> int:
        return sum(kind != FRAME for kind in self.kinds)

    @property
    def tap_dim(self) -> int:
        return self.dim * (2 if self.join else 1)

    def context_spec(self, num_patches: int, sensitive: frozenset[int], camera_tokens: int = 0) -> ContextSpec:
        """What one frame of ``num_patches`` leaves in the context; ``camera_tokens`` go to a head that mixes frames."""
        full = self.num_special + num_patches
        tokens = tuple(full if kind == GLOBAL else self.num_special for kind in self.kinds if kind != FRAME)
        # Without a reference token the gauge is held by the first keyframes together.
        num_reference = 1 if self.variants == 2 else 4
        camera_shape = (camera_tokens, self.tap_dim if camera_tokens else 0)
        return ContextSpec(
            tokens, self.heads, self.dim // self.heads, self.num_special, sensitive, camera_shape, num_reference
        )


@dataclass(frozen=True, eq=False)
class PassOptions:
    """How one pass runs. Everything off is the plain dense pass that networks are trained with."""

    first: bool = True  # the pass holds the reference frame; False: every frame is an "other" frame
    reduction: ReductionConfig | None = None
    sensitive: frozenset[int] = frozenset()  # global layers, counted from 0, that reduction treats gently
    context: KVContext | None = None
    window_ids: Tensor | None = None  # [S] ascending: a frame sees its own and lower windows only (block-causal)


DENSE = PassOptions()


@dataclass(frozen=True, eq=False)
class Tokens:
    """What the trunk hands to the heads."""

    taps: list[Tensor]  # each [B, S, P, tap_dim]
    num_special: int
    grid: tuple[int, int]  # patch rows and columns
    descriptors: Tensor  # [B, S, C] unit length

    def special(self, tap: int = -1) -> Tensor:
        """Special tokens [B, S, num_special, tap_dim]."""
        return self.taps[tap][:, :, : self.num_special]

    def patches(self, tap: int = -1) -> Tensor:
        """Patch tokens [B, S, h * w, tap_dim]."""
        return self.taps[tap][:, :, self.num_special :]


class Trunk(nn.Module):
    """Alternating frame and global blocks, configured by a TrunkSpec."""

    def __init__(self, spec: TrunkSpec) -> None:
        super().__init__()
        self.spec = spec
        self.blocks = nn.ModuleList(
            Block(
                spec.dim,
                spec.heads,
                eps=spec.eps,
                qk_norm=index >= spec.plain,
                layer_scale=spec.layer_scale,
                ffn=spec.ffn,
            )
            for index in range(len(spec.kinds))
        )
        if spec.variants:
            self.special = nn.Parameter(0.02 * torch.randn(spec.variants, spec.num_special, spec.dim))
        if spec.final_eps is not None:
            self.norm = nn.LayerNorm(spec.dim, eps=spec.final_eps)

    def forward(
        self, x: Tensor, grid: tuple[int, int], options: PassOptions, descriptors: Tensor | None = None
    ) -> Tokens:
        """Run all blocks.

        Args:
            x: [B, S, h * w, C] patch tokens; with ``spec.plain`` > 0 [B, S, num_special + h * w, C], the class token
                first.
            grid: patch rows and columns.
            options: reference, reduction, context and mask of this pass.
            descriptors: [B, S, C] of an encoder before the trunk; None: taken before the first global block.
        """
        spec = self.spec
        batch, num_frames = x.shape[:2]
        rope = self._rope(spec.frame_rope, grid, x.device)
        run: _Run | None = None
        taps: list[Tensor] = []
        layer = 0
        local = x
        reference: int | Tensor | None = 0 if options.first else None
        for index, (block, kind) in enumerate(zip(self.blocks, spec.kinds)):
            if index == spec.plain - 1 and self._picks_reference(num_frames, options):
                reference = most_typical(x[:, :, 0])
            if index == spec.plain:
                if descriptors is None and spec.plain:
                    descriptors = describe(x[:, :, spec.num_special :])
                x = self._insert_special(x, reference)
            if kind == FRAME:
                x = block(x.flatten(0, 1), rope if index >= spec.plain else None).unflatten(0, (batch, num_frames))
                local = x
            else:
                assert isinstance(block, Block)
                if run is None:
                    run = _Run(spec, self._rope(spec.global_rope, grid, x.device), options, reference, x)
                if descriptors is None:
                    descriptors = describe(x[:, :, spec.num_special :])
                x = run.across_frames(block, x, kind, layer)
                layer += 1
            if index in spec.taps:
                taps.append(self._tap(local, x))
        if descriptors is None:
            descriptors = describe(x[:, :, spec.num_special :])
        return Tokens(taps, spec.num_special, grid, descriptors)

    def _rope(self, kind: str, grid: tuple[int, int], device: torch.device) -> Rope | None:
        spec = self.spec
        head_dim = spec.dim // spec.heads
        if kind == "none":
            return None
        if kind == "unit":
            return unit_rope(*grid, head_dim, spec.num_special, device)
        return grid_rope(*grid, head_dim, spec.num_special, kind == "constant", device)

    def _picks_reference(self, num_frames: int, options: PassOptions) -> bool:
        """Where windows follow each other the first frame stays the reference: the gauge must not jump."""
        alone = options.context is None and options.window_ids is None
        return self.spec.picks_reference and options.first and alone and num_frames >= 3

    def _insert_special(self, x: Tensor, reference: int | Tensor | None) -> Tensor:
        """Prepend the special tokens, or put them in the place of the class token."""
        num_frames, spec = x.shape[1], self.spec
        rows = torch.full((num_frames,), spec.variants - 1, device=x.device)
        if reference is not None:  # a tensor stays on its device: no waiting
            rows = torch.where(torch.arange(num_frames, device=x.device) == reference, 0, rows)
        special = self.special[rows].to(x.dtype).expand(len(x), -1, -1, -1)  # [B, S, num_special, C]
        return torch.cat([special, x[:, :, spec.num_special if spec.plain else 0 :]], dim=2)

    def _tap(self, local: Tensor, x: Tensor) -> Tensor:
        """Tokens for the heads [B, S, P, tap_dim]; the final norm is for patches only, cameras read raw tokens."""
        if self.spec.final_eps is not None:
            n = self.spec.num_special
            x = torch.cat([x[:, :, :n], self.norm(x[:, :, n:])], dim=2)
        return torch.cat([local, x], dim=-1) if self.spec.join else x


class _Run:
    """The global blocks of one pass: token layouts of full and register layers, with mask, context and reduction."""

    def __init__(
        self, spec: TrunkSpec, rope: Rope | None, options: PassOptions, reference: int | Tensor | None, x: Tensor
    ) -> None:
        num_frames, num_tokens = x.shape[1:3]
        self.num_special = spec.num_special
        reduction = None
        if options.reduction is not None and options.reduction.enabled:
            from spark3r_ros.reduction import ForwardReduction, TokenLayout

            layout = TokenLayout(num_frames, num_tokens, spec.num_special, reference=None if reference is None else 0)
            start = reference if isinstance(reference, Tensor) else None
            reduction = ForwardReduction(options.reduction, layout, spec.num_global, options.sensitive, x.device, start)
        rope = None if rope is None else rope.repeat(num_frames)
        ids = None if options.window_ids is None else options.window_ids.to(x.device)
        mask = None if ids is None else block_causal(ids, num_tokens)
        self.full = GlobalPass(num_frames, rope, reduction, options.context, mask)
        if REGISTER in spec.kinds:
            assert rope is None, "register layers attend without rotation"
            mask = None if ids is None else block_causal(ids, spec.num_special)
            self.register = GlobalPass(num_frames, None, None, options.context, mask)

    def across_frames(self, block: Block, x: Tensor, kind: str, layer: int) -> Tensor:
        """One global or register block on x [B, S, P, C]."""
        num_frames = x.shape[1]
        if kind == GLOBAL:
            return block.forward_global(x.flatten(1, 2), layer, self.full).unflatten(1, (num_frames, -1))
        special, patches = x[:, :, : self.num_special], x[:, :, self.num_special :]
        special = block.forward_global(special.flatten(1, 2), layer, self.register).unflatten(1, (num_frames, -1))
        return torch.cat([special, patches], dim=2)


def most_typical(class_tokens: Tensor) -> Tensor:
    """Index of the frame that Depth-Anything-3 takes as reference ("saddle balanced"), from class tokens [1, S, C].

    Three numbers per frame, each stretched to 0..1 over the frames: mean cosine similarity to the others, length of the
    token, variance of the unit token. The frame closest to the middle of all three wins.
    """
    assert len(class_tokens) == 1, "the reference is chosen for one sequence at a time"
    tokens = class_tokens[0].float()
    unit = nn.functional.normalize(tokens, dim=-1)
    similarity = ((unit @ unit.T).sum(dim=1) - 1) / (len(tokens) - 1)
    measures = torch.stack([similarity, tokens.norm(dim=-1), unit.var(dim=-1)])  # [3, S]
    low, high = measures.amin(dim=1, keepdim=True), measures.amax(dim=1, keepdim=True)
    return ((measures - low) / (high - low + 1e-8) - 0.5).abs().sum(dim=0).argmin()


def block_causal(window_ids: Tensor, tokens: int) -> Tensor:
    """Mask [S * tokens, S * tokens], True where a token may attend: frames of its own and of lower windows."""
    allowed = window_ids[:, None] >= window_ids[None, :]  # [S, S]
    return allowed.repeat_interleave(tokens, dim=0).repeat_interleave(tokens, dim=1)


@torch.no_grad()
def describe(patches: Tensor) -> Tensor:
    """Unit-length generalised mean (power 3, signed root) of patch tokens [B, S, N, C]: [B, S, C]."""
    mean = (patches.float() ** 3).mean(dim=2)
    return torch.nn.functional.normalize(mean.sign() * mean.abs() ** (1 / 3), dim=-1)
