"""The probe finds the layer that needs its keys, and its result is what the reduction then loads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from spark3r_ros.backbone.registry import MODELS
from spark3r_ros.config import ReductionConfig
from spark3r_ros.frame import Frame, Gauge, Prediction
from spark3r_ros.geometry import apply_similarity_to_pose, se3_exp, similarity
from spark3r_ros.preprocess import Resize
from spark3r_ros.reduction import ForwardReduction, TokenLayout, schedule, sensitive_layers
from spark3r_ros.reduction.probe import ProbeResult, ProbeSequence, change, plot, run_probe, sequence_from_frames

NUM_FRAMES, HEIGHT, WIDTH, LAYERS = 40, 16, 24, 4


def make_prediction(noise: float = 0.0) -> Prediction:
    """A camera walking along x before a wavy wall; ``noise`` bends poses and depth."""
    rng = np.random.default_rng(0)
    steps = rng.standard_normal((NUM_FRAMES, 6)) * 0.01
    poses = np.stack([se3_exp(np.array([0.1 * i, 0, 0, 0, 0, 0]) + noise * s) for i, s in enumerate(steps)])
    wall = 3 + np.sin(np.arange(WIDTH) / 3)[None, None] + np.arange(NUM_FRAMES)[:, None, None] * 0.01
    depth = np.broadcast_to(wall, (NUM_FRAMES, HEIGHT, WIDTH)) + noise * 0.05 * rng.random((NUM_FRAMES, HEIGHT, WIDTH))
    K = np.array([[20.0, 0, 11.5], [0, 20.0, 7.5], [0, 0, 1]])
    return Prediction(
        torch.from_numpy(poses), torch.from_numpy(np.broadcast_to(K, (NUM_FRAMES, 3, 3)).copy()),
        torch.from_numpy(depth), torch.ones(NUM_FRAMES, HEIGHT, WIDTH), Gauge.ANCHORED, torch.ones(NUM_FRAMES, 4),
    )  # fmt: skip


class FakeBackbone:
    """Its error is one per kept-key shortfall; layers 1 and 2 cost ten times as much as the others."""

    spec = SimpleNamespace(name="fake", trunk=SimpleNamespace(num_global=LAYERS))
    weights = (0.1, 1.0, 1.0, 0.1)

    def __init__(self) -> None:
        self.passes = 0

    def resize(self, height: int, width: int) -> Resize:
        return Resize((0, 0, height, width), (height // 2, width // 2))

    def __call__(self, images: torch.Tensor, *, reduction: ReductionConfig | None, intrinsics: object) -> Prediction:
        self.passes += 1
        if reduction is None:
            return make_prediction()
        assert reduction.query_factor == 1
        sensitive = sensitive_layers(reduction, "fake", LAYERS)
        forward = ForwardReduction(reduction, TokenLayout(len(images), 2, 1), LAYERS, sensitive)
        return make_prediction(sum(w * np.log(forward.kv_factor(i)) for i, w in enumerate(self.weights)))


@pytest.fixture(scope="module")
def result() -> ProbeResult:
    backbone, seen = FakeBackbone(), []
    sequences = [ProbeSequence(name, torch.zeros(NUM_FRAMES, 3, HEIGHT, WIDTH)) for name in ("one", "two")]
    found = run_probe(backbone, sequences, progress=lambda done, total: seen.append((done, total)))  # type: ignore[arg-type]
    assert backbone.passes == 2 * (LAYERS + 2)
    assert seen == [(i + 1, 2 * (LAYERS + 2)) for i in range(2 * (LAYERS + 2))]
    return found


def test_the_layers_that_matter_are_found(result: ProbeResult) -> None:
    assert result.sensitive_layers == (1, 2)
    assert result.sequences == ("one", "two")
    assert result.num_frames == (NUM_FRAMES, NUM_FRAMES)
    assert all(ratio >= 1 for ratio in result.ratios)


def test_the_result_is_loaded_by_the_reduction(result: ProbeResult, tmp_path: Path) -> None:
    path = tmp_path / "fake.json"
    result.save(path)
    assert ProbeResult.load(path) == result
    config = ReductionConfig(factor_file=str(path))
    assert sensitive_layers(config, "fake", LAYERS) == {1, 2}
    with pytest.raises(ValueError, match="is of model 'fake', this model is 'vggt'"):
        sensitive_layers(config, "vggt", LAYERS)
    plot(result, tmp_path / "fake.png")
    assert (tmp_path / "fake.png").stat().st_size > 5000


def test_change_ignores_the_gauge() -> None:
    dense = make_prediction()
    S = similarity(2.5, se3_exp(np.array([1.0, -2, 3, 0.4, 0.2, -0.7])))
    poses = np.stack([apply_similarity_to_pose(S, T) for T in dense.T_world_camera.numpy()])
    moved = replace(dense, T_world_camera=torch.from_numpy(poses), depth=2.5 * dense.depth)
    found = change(moved, dense)
    assert max(found.rotation, found.position, found.points) < 1e-9
    assert change(make_prediction(2.0), dense).pose > change(make_prediction(1.0), dense).pose > 1e-4


def test_bad_probes_are_refused(tmp_path: Path) -> None:
    backbone: object = FakeBackbone()
    short = ProbeSequence("short", torch.zeros(32, 3, HEIGHT, WIDTH))
    with pytest.raises(ValueError, match="short has 32 frames, the probe needs more than 32"):
        run_probe(backbone, [short])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one calibration sequence"):
        run_probe(backbone, [])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="base factor must be a whole number >= 1, got 0"):
        run_probe(backbone, [short], base_factor=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="raised factor must be a multiple of the base factor 32, got 100"):
        run_probe(backbone, [short], raised_factor=100)  # type: ignore[arg-type]
    path = tmp_path / "bare.json"
    path.write_text('{"format": "spark3r-factors-1", "model": "m", "num_layers": 2, "sensitive_layers": []}')
    with pytest.raises(ValueError, match="holds no measurements"):
        ProbeResult.load(path)


def test_sequences_are_resized_and_thinned() -> None:
    frames = [Frame(i, np.full((32, 48, 3), i, np.uint8)) for i in range(10)]
    sequence = sequence_from_frames(FakeBackbone(), frames, "grey", num_frames=3, stride=2)  # type: ignore[arg-type]
    assert sequence.images.shape == (3, 3, 16, 24)
    assert (sequence.images[:, 0, 0, 0] * 255).round().tolist() == [0, 2, 4]
    assert sequence.intrinsics is None
    with pytest.raises(ValueError, match="calibration sequence empty has no frames"):
        sequence_from_frames(FakeBackbone(), [], "empty")  # type: ignore[arg-type]


PUBLISHED = {
    "vggt": {*range(11, 17)},
    "pi3": {*range(11, 17)},
    "pi3x": {*range(11, 17)},
    "da3-giant": {*range(3, 13)},
    "omega": {10, 11, 12, 13, 15, 16, 17, 21},
}


def test_every_model_knows_its_sensitive_layers() -> None:
    """nano by the probe's shipped result, the paper's models by the paper, the others treat every layer as sensitive.

    Omega's layers are counted over its inter-frame blocks: register blocks are not reduced.
    """
    for name, model in MODELS.items():
        spec, trunk = model.spec, model.spec.trunk
        found = sensitive_layers(ReductionConfig(), spec.name, trunk.num_global, spec.sensitive)
        if name == "nano":
            shipped = ProbeResult.load(Path(schedule.__file__).with_name("factors") / "nano.json")
            assert found == set(shipped.sensitive_layers)
            assert (shipped.model, len(shipped.layers)) == ("nano", trunk.num_global)
            assert (shipped.base_factor, shipped.raised_factor, shipped.threshold) == (32, 256, 1.05)
            assert min(shipped.num_frames) >= 100
        else:
            assert found == PUBLISHED.get(spec.name, set(range(trunk.num_global))), name
