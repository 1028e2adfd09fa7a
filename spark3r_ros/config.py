"""Every default of the package, once, with its meaning and its range.

ROS parameters, the command line's ``--set`` and the tables in docs/ are generated from these dataclasses. A parameter's
name is ``group.field``. Values are checked when a Config is built and never repaired afterwards.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any


def param(
    default: Any,
    doc: str,
    *,
    ge: float | None = None,
    le: float | None = None,
    choices: tuple[str, ...] = (),
    dynamic: bool = False,
) -> Any:
    """A field with its description, its closed range or its choices, and whether it may change while running."""
    metadata = {"doc": doc, "ge": ge, "le": le, "choices": choices, "dynamic": dynamic}
    return field(default=default, metadata=types.MappingProxyType(metadata))


class _Group:
    """A validated, frozen group of parameters; ``_name`` is the prefix in messages and ROS parameter names."""

    _name: typing.ClassVar[str] = ""

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]
            check_value(f"{self._name}.{f.name}", f, getattr(self, f.name))


def check_value(name: str, f: dataclasses.Field[Any], value: Any) -> None:
    """Raise ValueError naming the parameter, the allowed range and the value given."""
    expected = type(f.default)
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not expected:
        raise ValueError(f"{name} must be of type {expected.__name__}, got {value!r} ({type(value).__name__})")
    ge, le, choices = f.metadata["ge"], f.metadata["le"], f.metadata["choices"]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    if ge is not None and value < ge:
        raise ValueError(f"{name} must be >= {ge:g}, got {value}")
    if le is not None and value > le:
        raise ValueError(f"{name} must be <= {le:g}, got {value}")
    if choices and value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(repr(c) for c in choices)}, got {value!r}")


@dataclass(frozen=True)
class ModelConfig(_Group):
    _name = "model"
    name: str = param("nano", "backbone: `spark3r models` lists the names")
    checkpoint: str = param("", "weights file; empty: the model's own place in the cache, or the embedded nano")
    device: str = param("auto", "auto takes CUDA when there is one", choices=("auto", "cpu", "cuda"))
    accept_licence: bool = param(False, "you have read and accept the licence of non-commercial weights")


@dataclass(frozen=True)
class WindowConfig(_Group):
    _name = "window"
    size: int = param(8, "keyframes solved together", ge=2, le=1000)
    overlap: int = param(4, "keyframes of the previous window that are solved again", ge=1, le=100)
    keyframe_flow: float = param(
        0.09, "a frame is a keyframe when the median flow since the last one exceeds this share of the image width",
        ge=0.0, le=1.0, dynamic=True,
    )  # fmt: skip
    static_flow: float = param(
        0.004, "below this share of the image width the camera stands still: never a keyframe",
        ge=0.0, le=1.0, dynamic=True,
    )  # fmt: skip
    max_keyframe_interval: float = param(
        2.0, "seconds after which a moving camera's frame becomes a keyframe whatever its flow",
        ge=0.0, le=3600.0, dynamic=True,
    )  # fmt: skip
    min_keyframe_interval: float = param(
        0.25, "seconds before which what would be a keyframe only brings points to follow, where the sparse map tracks",
        ge=0.0, le=3600.0, dynamic=True,
    )  # fmt: skip
    min_survival: float = param(
        0.35, "a frame is a keyframe when fewer of the last one's features than this share are still in view, or, "
        "where frames come 0.3 s apart or more, will be in the one after the first",
        ge=0.0, le=1.0, dynamic=True,
    )  # fmt: skip
    max_pending: int = param(300, "frames that may wait for the first window to be full", ge=1, le=100000)
    first_size: int = param(
        4, "keyframes that make do for the first window, and for one after being lost", ge=2, le=1000
    )
    first_seconds: float = param(
        1.0, "a first window of first_size keyframes is solved after this time, a full one at once", ge=0.0, le=3600.0
    )
    first_flow: float = param(
        0.03, "keyframe_flow until the first window is solved, and first_seconds is max_keyframe_interval until then, "
        "where they are smaller", ge=0.0, le=1.0,
    )  # fmt: skip
    min_features: int = param(
        30, "a frame with fewer followed points and fewer corners is blank: never a keyframe", ge=0, le=10000
    )
    lost_confidence: float = param(0.15, "poses below this confidence are bad", ge=0.0, le=1.0)
    lost_overlap: float = param(
        0.1, "a frame that shares less than this share of the last keyframe's features, and that the sparse map does "
        "not place, is bad: never a keyframe", ge=0.0, le=1.0,
    )  # fmt: skip
    lost_seconds: float = param(0.5, "bad poses for longer than this mean that tracking is lost", ge=0.0, le=60.0)
    intrinsics_windows: int = param(3, "windows after which an estimated focal length is locked", ge=1, le=1000)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.overlap >= self.size:
            raise ValueError(f"window.overlap must be < window.size ({self.size}), got {self.overlap}")


@dataclass(frozen=True)
class ContextConfig(_Group):
    _name = "context"
    enabled: bool = param(True, "later windows attend to the keys and values of earlier ones")
    budget_mb: float = param(256.0, "hard limit of the context's memory in MiB", ge=1.0, le=1e6)
    frames: int = param(40, "keyframes whose keys the sensitive layers remember", ge=2, le=10000)
    insensitive_divisor: int = param(3, "all other layers remember this share of them", ge=1, le=1000)
    special_frames: int = param(64, "evicted keyframes whose special tokens stay in a ring", ge=0, le=100000)


@dataclass(frozen=True)
class ReductionConfig(_Group):
    _name = "reduction"
    enabled: bool = param(True, "Spark3R token reduction in global attention; off: dense")
    query_factor: int = param(0, "frames per query destination frame; 0: by the length schedule", ge=0, le=1024)
    kv_factor: int = param(0, "base factor of key-value pruning; 0: by the length schedule", ge=0, le=1024)
    insensitive_multiplier: int = param(3, "layers outside the sensitive set prune this much harder", ge=1, le=1024)
    group_size: int = param(20, "consecutive frames inside which queries merge", ge=2, le=100000)
    matching: str = param("input", "what source and destination tokens are compared on", choices=("input", "q", "k"))
    kv_selection: str = param("stride", "which frames keep their keys", choices=("stride", "coverage"))
    keep_special_kv: bool = param(False, "keep special tokens of dropped frames, with a logit bias that is exact")
    matching_interval: int = param(1, "consecutive global layers that share one matching of queries", ge=1, le=1024)
    sensitive_layers: str = param("", "global layers that prune by kv_factor alone, as '11-16,20'; empty: factor_file")
    factor_file: str = param("", "JSON written by `spark3r probe`; empty: the model's shipped or published set")


@dataclass(frozen=True)
class AlignmentConfig(_Group):
    _name = "alignment"
    mode: str = param(
        "cameras", "cameras: scale from depth ratios, pose from cameras; dense: Sim(3) on points; rigid: no scale",
        choices=("cameras", "dense", "rigid"),
    )  # fmt: skip
    scale_prior: bool = param(True, "pull the scale of windows that share a context towards the map's")
    scale_prior_sigma: float = param(0.03, "how far log scale may drift per window", ge=1e-6, le=10.0)
    max_residual: float = param(0.25, "overlap points may disagree by this share of their depth", ge=0.0, le=10.0)
    bad_link_sigma: float = param(0.5, "sigma of log scale given to a link that was refused", ge=1e-6, le=10.0)


@dataclass(frozen=True)
class RefineConfig(_Group):
    _name = "refine"
    mode: str = param("auto", "bundle adjustment of windows; auto: on for nano", choices=("auto", "on", "off"))
    dense: bool = param(True, "depth of keyframes from the flow between them; the network's depth is the prior")
    features: int = param(
        450, "points that are followed from frame to frame; a third more where keyframes come slowly", ge=50, le=10000
    )
    min_survival: float = param(
        0.4, "when fewer points survive a frame, corners or descriptors look for them", ge=0.0, le=1.0
    )
    max_keyframes: int = param(40, "keyframes whose points are kept for tracking", ge=4, le=10000)
    match_ratio: float = param(0.8, "a match's descriptor distance must be below this share of the next best's",
        ge=0.1, le=1.0,
    )  # fmt: skip


@dataclass(frozen=True)
class LoopConfig(_Group):
    _name = "loops"
    enabled: bool = param(True, "look for places seen before and correct the map")
    min_gap: int = param(20, "keyframes that must lie between two sights of a place for a loop", ge=1, le=100000)
    candidates: int = param(3, "similar places that are compared with each new keyframe", ge=1, le=100)
    max_nodes: int = param(300, "nodes of the pose graph; longer paths get longer steps", ge=10, le=100000)
    max_places: int = param(
        1000, "places that are remembered, in memory claimed at the start; of the two that look from the nearest "
        "positions the newer goes",
        ge=10, le=1000000,
    )  # fmt: skip
    corners: int = param(400, "described corners that a keyframe remembers", ge=50, le=5000)
    min_inliers: int = param(25, "corners that must agree on where the camera stands", ge=6, le=1000)
    max_scale_spread: float = param(
        0.15, "both cameras of a loop may disagree by this much in log scale, radians and relative translation",
        ge=0.0, le=10.0,
    )  # fmt: skip
    max_cycle_scale: float = param(0.7, "largest drift of log scale that a loop may claim", ge=0.0, le=10.0)
    max_cycle_rotation: float = param(0.8, "largest drift of rotation in rad that a loop may claim", ge=0.0, le=3.15)
    max_cycle_translation: float = param(0.3, "largest drift over path length that a loop may claim", ge=0.0, le=10.0)


@dataclass(frozen=True)
class ScaleConfig(_Group):
    _name = "scale"
    camera_height: float = param(0.0, "height of the camera above flat ground in metres; 0: unknown", ge=0.0, le=100.0)
    min_baseline: float = param(0.3, "metres of odometry that one measurement of scale needs", ge=0.01, le=1000.0)
    max_lever: float = param(0.5, "metres that the camera may be away from where the robot turns", ge=0.0, le=100.0)
    gate: float = param(3.0, "sigmas by which a measurement may differ before it is refused", ge=0.5, le=100.0)
    confirmations: int = param(3, "agreeing measurements before the scale is called metric", ge=1, le=100)
    drift: float = param(0.003, "how much log scale may drift between two measurements", ge=0.0, le=1.0)
    min_sigma: float = param(0.005, "log scale is never claimed to be known better than this", ge=0.0, le=1.0)


@dataclass(frozen=True)
class MapConfig(_Group):
    _name = "map"
    min_confidence: float = param(0.5, "points below are not trusted", ge=0.0, le=1.0, dynamic=True)
    max_depth_jump: float = param(0.08, "relative depth step between neighbours that marks an edge", ge=0.0, le=10.0)
    min_parallax: float = param(0.01, "least baseline over depth that a point needs", ge=0.0, le=1.0)
    voxel_size: float = param(0.01, "voxel edge as a share of the keyframe's median depth", ge=1e-5, le=1.0)
    max_points: int = param(
        1_000_000, "bound of the fused map, whose memory is claimed at the start", ge=1000, le=200_000_000
    )


@dataclass(frozen=True)
class Config:
    """All parameters of the reconstruction; the ROS node adds its own group."""

    model: ModelConfig = ModelConfig()
    window: WindowConfig = WindowConfig()
    context: ContextConfig = ContextConfig()
    reduction: ReductionConfig = ReductionConfig()
    alignment: AlignmentConfig = AlignmentConfig()
    refine: RefineConfig = RefineConfig()
    loops: LoopConfig = LoopConfig()
    scale: ScaleConfig = ScaleConfig()
    map: MapConfig = MapConfig()


@dataclass(frozen=True)
class Parameter:
    """One parameter as users see it."""

    name: str
    default: Any
    doc: str
    ge: float | None
    le: float | None
    choices: tuple[str, ...]
    dynamic: bool


def parameters(config: Any) -> Iterator[Parameter]:
    """All parameters of a config dataclass (Config or one that holds groups), defaults taken from ``config``."""
    for group in fields(config):
        values = getattr(config, group.name)
        for f in fields(values):
            yield Parameter(f"{group.name}.{f.name}", getattr(values, f.name), **f.metadata)


def with_values(config: Any, values: Mapping[str, Any]) -> Any:
    """A copy of ``config`` with ``{"group.field": value}`` applied; unknown names and bad values raise ValueError."""
    known = {p.name: p for p in parameters(config)}
    by_group: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"unknown parameter {name!r}{hint}")
        if isinstance(known[name].default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        group, _, leaf = name.partition(".")
        by_group.setdefault(group, {})[leaf] = value
    groups = {g: dataclasses.replace(getattr(config, g), **v) for g, v in by_group.items()}
    return dataclasses.replace(config, **groups)


@dataclass(frozen=True)
class NodeConfig(_Group):
    """What only the ROS node needs. Its parameters have no group prefix: ``map_frame``, not ``node.map_frame``."""

    _name = "node"
    autostart: bool = param(True, "configure and activate on start; off: a lifecycle manager does it")
    map_frame: str = param("map", "frame of path, points and map; z up")
    odom_frame: str = param("odom", "frame of the smooth odometry, or of the robot's own one in tf_mode map_to_odom")
    base_frame: str = param("base_link", "the robot's body; empty: the camera itself is tracked")
    camera_frame: str = param("", "optical frame of the camera; empty: taken from the image header")
    base_wait: float = param(
        1.0, "seconds that the first poses wait for base_frame <- camera in TF before the camera itself is tracked",
        ge=0.0, le=60.0,
    )  # fmt: skip
    tf_mode: str = param(
        "odom_to_base", "which transforms are published",
        choices=("odom_to_base", "map_to_odom", "map_to_camera", "off"),
    )  # fmt: skip
    invert_tf: bool = param(False, "publish every transform as child -> parent, for use below an EKF's tree")
    transform_tolerance: float = param(
        0.1, "seconds by which map -> odom is dated into the future", ge=0.0, le=10.0, dynamic=True
    )
    odom_source: str = param(
        "auto", "the robot's own odometry; auto: the `odom` topic when it speaks, TF in tf_mode map_to_odom",
        choices=("auto", "topic", "tf", "none"),
    )  # fmt: skip
    image_transport: str = param("raw", "type of the image topic", choices=("raw", "compressed"))
    image_is_rectified: bool = param(False, "images are undistorted already: P of camera_info counts, K and D do not")
    reliability: str = param(
        "auto", "of the image subscription; auto follows the publishers", choices=("auto", "best_effort", "reliable")
    )
    drop_policy: str = param(
        "newest", "newest: a full queue drops its oldest image; never: a full queue holds the publisher back",
        choices=("newest", "never"),
    )  # fmt: skip
    queue_size: int = param(5, "images that wait for the reconstruction", ge=1, le=10000)
    sync_tolerance: float = param(
        0.02, "seconds by which depth or odometry may differ from the image's stamp", ge=0.0, le=1.0, dynamic=True
    )
    no_data_timeout: float = param(5.0, "seconds without images until the node warns", ge=0.1, le=3600.0, dynamic=True)
    path_length: int = param(1000, "most poses of path and keyframe markers; longer ones are thinned", ge=2, le=100000)
    map_period: float = param(2.0, "least seconds between two messages on ~/map", ge=0.1, le=3600.0, dynamic=True)
    map_file: str = param(
        "", "file of ~/save_map and ~/load_map; ending in .ply: only the points, to be saved", dynamic=True
    )
    load_map_on_start: bool = param(False, "load map_file while configuring and localise in it")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.load_map_on_start and not self.map_file:
            raise ValueError("node.map_file must name a map when load_map_on_start is set, got ''")
        if self.odom_source == "tf" and self.tf_mode == "odom_to_base":
            raise ValueError(
                "node.odom_source 'tf' needs tf_mode 'map_to_odom', 'map_to_camera' or 'off': "
                "in 'odom_to_base' the node would follow its own transforms"
            )
        frames = [f for f in (self.map_frame, self.odom_frame, self.base_frame) if f]
        if not self.map_frame or not self.odom_frame or len(set(frames)) != len(frames):
            raise ValueError(
                "node.map_frame, node.odom_frame and node.base_frame must be different names, "
                f"got {self.map_frame!r}, {self.odom_frame!r}, {self.base_frame!r}"
            )


def node_parameters(config: NodeConfig) -> Iterator[Parameter]:
    """The node's own parameters, under the flat names that ROS users see."""
    for f in fields(config):
        yield Parameter(f.name, getattr(config, f.name), **f.metadata)
