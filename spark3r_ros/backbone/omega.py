"""VGGT-Omega: DINOv3-style encoder, no rotation between frames, five global blocks on special tokens only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spark3r_ros.backbone.cameras import SinglePassCamera, decode_world_to_camera
from spark3r_ros.backbone.checkpoint import AGGREGATOR_RENAMES, CheckpointError, KeyMap, State, special_tokens
from spark3r_ros.backbone.encoder import Encoder, EncoderSpec
from spark3r_ros.backbone.heads import Dpt, in_chunks, place_embedding
from spark3r_ros.backbone.model import Geometry, Model, ModelSpec
from spark3r_ros.backbone.trunk import DENSE, FRAME, GLOBAL, REGISTER, PassOptions, Trunk, TrunkSpec, describe
from spark3r_ros.preprocess import ResizeRule

REGISTER_PAIRS = (2, 6, 9, 14, 20)  # inter-frame blocks where only special tokens attend; not in the checkpoint
SPEC = ModelSpec(
    name="omega",
    trunk=TrunkSpec(
        patch=16, dim=1024, heads=16,
        kinds=tuple(k for i in range(24) for k in (FRAME, REGISTER if i in REGISTER_PAIRS else GLOBAL)),
        taps=(9, 23, 35, 47), num_special=17, frame_rope="unit", global_rope="none", layer_scale=1e-5,
    ),
    resize=ResizeRule(16, 512, "patches"),
    sensitive=frozenset({10, 11, 12, 13, 15, 16, 17, 21}),  # of the inter-frame blocks
    camera_tokens=17,
    encoder_depth=24,
)  # fmt: skip


def finish(state: State) -> State:
    """Apply the masks of the key biases, which are stored beside them, and join the special tokens."""
    for bias in [key for key in state if key.endswith(".qkv.bias")]:
        mask = state.get(bias + "_mask")
        if mask is None:
            raise CheckpointError(f"{bias}_mask is missing: without it the biases of the keys would be wrong")
        if mask.shape == state[bias].shape:  # otherwise both are left to be reported
            state[bias] = state[bias] * state.pop(bias + "_mask")
    return special_tokens("aggregator.camera_token", "aggregator.register_token")(state)


KEYS = KeyMap(
    renames=(
        *AGGREGATOR_RENAMES,
        (r"^aggregator\.inter_frame_blocks\.(\d+)\.", lambda m: f"trunk.blocks.{2 * int(m[1]) + 1}."),
        (r"^camera_head\.camera_branch\.0\.", "camera_head.branch.fc1."),
        (r"^camera_head\.camera_branch\.2\.", "camera_head.branch.fc2."),
        (r"^dense_head\.norm\.", "dense_head.dpt.norm."),
        (r"^dense_head\.projects\.", "dense_head.dpt.project."),
        (r"^dense_head\.resize_layers\.", "dense_head.dpt.resize."),
        (r"^dense_head\.scratch\.layer(\d)_rn\.", lambda m: f"dense_head.dpt.adapt.{int(m[1]) - 1}."),
        (r"^dense_head\.scratch\.refinenet(\d)\.", lambda m: f"dense_head.dpt.fuse.{int(m[1]) - 1}."),
        (r"\.resConfUnit(\d)\.", r".unit\1."),
        (r"^dense_head\.proj\.", "dense_head.depth."),
        (r"^dense_head\.proj_conf\.", "dense_head.confidence."),
    ),
    unused={
        r"aggregator\.patch_embed\.mask_token": "training only",
        r"text_\w+\..*": "text alignment of the 256 pixel variant",
    },
    marker="dense_head.proj_conf.weight",
    finish=finish,
    constants=((r"aggregator\.(patch_embed\.)?rope_embed\.periods", tuple(100 ** (i / 16) for i in range(16))),),
)


class ShuffleHead(nn.Module):
    """Dpt at a quarter of the resolution; sixteen channels per output become the 4 x 4 pixels."""

    def __init__(self, in_dim: int, channels: tuple[int, ...], features: int) -> None:
        super().__init__()
        self.dpt = Dpt(in_dim, channels, features, upsample=4)
        self.depth = nn.Conv2d(features, 16, 1)
        self.confidence = nn.Conv2d(features, 16, 1)

    def forward(self, taps: list[Tensor], grid: tuple[int, int], aspect: float) -> Tensor:
        """Taps [F, h * w, in_dim] to log depth and confidence logit [F, 2, H, W]."""

        def one_chunk(*piece: Tensor) -> Tensor:
            x = self.dpt(piece, grid, aspect)
            x = x + place_embedding(x, aspect)
            return F.pixel_shuffle(torch.cat([self.depth(x), self.confidence(x)], dim=1), 4)

        return in_chunks(one_chunk, *taps)


class Omega(Model):
    """Depth, confidence and cameras."""

    def __init__(self, spec: ModelSpec = SPEC) -> None:
        super().__init__(spec)
        trunk = spec.trunk
        self.encoder = Encoder(
            EncoderSpec(trunk.patch, trunk.dim, trunk.heads, spec.encoder_depth, num_registers=4, positions=0, eps=1e-5)
        )
        self.trunk = Trunk(trunk)
        self.camera_head = SinglePassCamera(trunk.tap_dim, trunk.heads)
        self.dense_head = ShuffleHead(trunk.tap_dim, *spec.dpt)

    def forward(
        self,
        images: Tensor,
        options: PassOptions = DENSE,
        *,
        motion: Tensor | None = None,
        intrinsics: Tensor | None = None,
    ) -> Geometry:
        batch, num_frames, _, height, width = images.shape
        x, grid = self.encoder(self.normalise(images).flatten(0, 1))
        x = x.unflatten(0, (batch, num_frames))
        tokens = self.trunk(x, grid, options, describe(x))
        with torch.autocast(images.device.type, enabled=False):
            special = tokens.special().float()
            encoding = self.camera_head(special, options)
            T_world_camera, K = decode_world_to_camera(encoding, height, width)
            taps = [tokens.patches(i).flatten(0, 1).float() for i in range(len(tokens.taps))]
            maps = self.dense_head(taps, grid, width / height).unflatten(0, (batch, num_frames))
        extras = {"pose_encoding": encoding, "special": special}
        return Geometry(T_world_camera, K, maps[:, :, 0].exp(), maps[:, :, 1], tokens.descriptors, extras)
