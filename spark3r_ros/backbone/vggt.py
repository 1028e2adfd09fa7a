"""VGGT: DINOv2 encoder, 24 pairs of frame and global blocks, iterative camera head, DPT depth and point heads."""

from __future__ import annotations

import torch
from torch import Tensor

from spark3r_ros.backbone.cameras import IterativeCamera, decode_world_to_camera
from spark3r_ros.backbone.checkpoint import AGGREGATOR_RENAMES, KeyMap, dpt_renames, special_tokens
from spark3r_ros.backbone.encoder import Encoder, EncoderSpec
from spark3r_ros.backbone.heads import DptHead
from spark3r_ros.backbone.model import Geometry, Model, ModelSpec
from spark3r_ros.backbone.trunk import DENSE, FRAME, GLOBAL, PassOptions, Trunk, TrunkSpec, describe
from spark3r_ros.preprocess import ResizeRule

SPEC = ModelSpec(
    name="vggt",
    trunk=TrunkSpec(
        patch=14, dim=1024, heads=16, kinds=(FRAME, GLOBAL) * 24, taps=(9, 23, 35, 47), num_special=5,
    ),
    resize=ResizeRule(14, 518, "width"),
    sensitive=frozenset(range(11, 17)),
    camera_tokens=1,
    encoder_depth=24,
)  # fmt: skip

KEYS = KeyMap(
    renames=(
        *AGGREGATOR_RENAMES,
        (r"^aggregator\.global_blocks\.(\d+)\.", lambda m: f"trunk.blocks.{2 * int(m[1]) + 1}."),
        (r"^camera_head\.empty_pose_tokens", "camera_head.start"),
        (r"^camera_head\.embed_pose\.", "camera_head.embed."),
        (r"^camera_head\.poseLN_modulation\.1\.", "camera_head.modulate."),
        (r"^camera_head\.pose_branch\.", "camera_head.branch."),
        *dpt_renames("depth_head"),
        *dpt_renames("point_head"),
    ),
    unused={r"track_head\..*": "the point tracker", r"aggregator\.patch_embed\.mask_token": "training only"},
    marker="camera_head.poseLN_modulation.1.weight",
    finish=special_tokens("aggregator.camera_token", "aggregator.register_token"),
)


class Vggt(Model):
    """Depth, confidence and cameras; ``points=True`` adds the point head's map in the reference camera's frame."""

    def __init__(self, spec: ModelSpec = SPEC) -> None:
        super().__init__(spec)
        trunk = spec.trunk
        self.encoder = Encoder(EncoderSpec(trunk.patch, trunk.dim, trunk.heads, spec.encoder_depth, num_registers=4))
        self.trunk = Trunk(trunk)
        self.camera_head = IterativeCamera(trunk.tap_dim, trunk.heads)
        channels, features = spec.dpt
        self.depth_head = DptHead(trunk.tap_dim, channels, features, (2,), relu_skip=True)
        self.point_head = DptHead(trunk.tap_dim, channels, features, (4,), relu_skip=True)

    def forward(
        self,
        images: Tensor,
        options: PassOptions = DENSE,
        *,
        motion: Tensor | None = None,
        intrinsics: Tensor | None = None,
        points: bool = False,
    ) -> Geometry:
        batch, num_frames, _, height, width = images.shape
        x, grid = self.encoder(self.normalise(images).flatten(0, 1))
        x = x.unflatten(0, (batch, num_frames))
        tokens = self.trunk(x, grid, options, describe(x))
        with torch.autocast(images.device.type, enabled=False):
            encoding = self.camera_head(tokens.special()[:, :, :1].float(), options)
            T_world_camera, K = decode_world_to_camera(encoding, height, width)
            taps = [tokens.patches(i).flatten(0, 1).float() for i in range(len(tokens.taps))]
            depth, confidence = self.depth_head(taps, grid, (height, width)).unflatten(0, (batch, num_frames)).unbind(2)
            extras = {"pose_encoding": encoding}
            if points:
                raw = self.point_head(taps, grid, (height, width)).unflatten(0, (batch, num_frames))
                xyz = raw[:, :, :3].movedim(2, -1)
                extras["points"] = xyz.sign() * xyz.abs().expm1()  # [B, S, H, W, 3]
                extras["points_confidence"] = raw[:, :, 3]
        return Geometry(T_world_camera, K, depth.exp(), confidence, tokens.descriptors, extras)
