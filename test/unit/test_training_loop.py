"""Training: data repeat, steps resume bit by bit, mirrored data stay true, controls score as they must."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from spark3r_ros.backbone.trunk import PassOptions
from training import generate
from training.data import Shard, augment, list_shards, mirror
from training.evaluate import control_answers, score
from training.losses import losses, pose_losses, total, truth_in_units
from training.plot import plot
from training.ship import beats_controls, beats_shipped
from training.train import CHECKPOINT, TrainConfig, Trainer, find_shards, pass_options, run


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    patch = pytest.MonkeyPatch()
    patch.setattr(generate, "SIZES", ((48, 72),))
    patch.setattr(
        generate, "texture_bank", lambda count, seed, photos, make=generate.texture_bank: make(6, seed, photos)
    )
    generate.write_shard(root, "train", 0, 4)
    generate.write_shard(root, "held-out", 0, 2)
    patch.undo()
    return root


def batch_of(root, split="train", rows=4, frames=8):
    return Shard(list_shards(root, split)[0]).batch(np.arange(rows), frames)


def test_steps_resume_bit_by_bit(shards, tmp_path):
    config = TrainConfig(batch=2)
    whole, half = (Trainer(config, list_shards(shards, "train")) for _ in range(2))
    for _ in range(4):
        whole.train_step()
    for _ in range(2):
        half.train_step()
    half.save(tmp_path / CHECKPOINT)
    resumed = Trainer(TrainConfig(batch=2), list_shards(shards, "train"))
    resumed.restore(tmp_path / CHECKPOINT)
    for _ in range(2):
        resumed.train_step()
    assert resumed.step == whole.step == 4
    assert resumed.samples == whole.samples
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
        assert torch.equal(whole.mean[name], resumed.mean[name]), name


@pytest.mark.parametrize("known", [True, False])
def test_every_step_has_a_gradient(shards, known):
    batch = batch_of(shards, frames=4)  # some partners are missing, and augmentation takes flow away
    batch = augment(batch, torch.Generator().manual_seed(0))
    trainer = Trainer(TrainConfig(), list_shards(shards, "train"))
    total(trainer.loss_terms(batch, PassOptions(), known, solve=True)).backward()
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_a_run_saves_logs_and_plots(shards, tmp_path):
    from argparse import Namespace

    trainer = Trainer(TrainConfig(batch=1), list_shards(shards, "train"))
    trainer.step = 24
    run(trainer, Namespace(hours=1e-9, cooldown=1.0, save_minutes=60.0, out=tmp_path, data=shards))
    assert trainer.step == 25
    assert {group["lr"] for group in trainer.optimiser.param_groups} == {0.02 * trainer.config.rate * 25 / 200}
    assert (tmp_path / CHECKPOINT).exists()
    assert plot(tmp_path).stat().st_size > 1000


def test_long_sequences_are_trained_too(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "SIZES", ((48, 72),))
    monkeypatch.setattr(generate, "NUM_FRAMES_LONG", 12)
    few = generate.texture_bank
    monkeypatch.setattr(generate, "texture_bank", lambda count, seed, photos: few(6, seed, photos))
    shutil.copytree(shards / "train", tmp_path / "train")
    assert len(find_shards(tmp_path)) == 1
    generate.write_shard(tmp_path, "long", 0, 2)
    trainer = Trainer(TrainConfig(batch=2, long_share=1.0), find_shards(tmp_path))
    assert [len(trainer.shards), len(trainer.long)] == [1, 1]
    lengths = []
    monkeypatch.setattr(Shard, "batch", lambda self, rows, n, get=Shard.batch: lengths.append(n) or get(self, rows, n))
    for _ in range(3):
        assert np.isfinite(trainer.train_step()["loss"])
    assert set(lengths) <= {6, 8, 12}


def test_windows_of_long_sequences_are_as_long_as_those_of_a_stream():
    ids = [pass_options(np.random.default_rng(seed), 24).window_ids for seed in range(40)]
    windows = [torch.bincount(each) for each in ids if each is not None]
    assert len(windows) > 25
    assert all(3 <= sizes[0] <= 8 and max(sizes[1:]) <= 6 for sizes in windows)


def test_training_lowers_the_loss(shards):
    trainer = Trainer(TrainConfig(batch=2, warm_up=1, solve_from=100), list_shards(shards, "train"))
    batch = batch_of(shards)

    @torch.no_grad()
    def loss() -> float:
        return total(trainer.loss_terms(batch, PassOptions(), known=True, solve=False)).item()

    before = loss()
    for _ in range(12):
        trainer.train_step()
    assert loss() < before - 0.05


def test_mirrored_data_are_true(shards):
    """Flow agrees with depth, poses and K as well in a mirror as without."""
    for batch in (batch_of(shards), mirror(batch_of(shards))):
        T, present = batch.relative_truth()
        rows, columns = batch.depth.shape[-2:]
        x, y = torch.meshgrid(torch.arange(columns) * 4 + 1.5, torch.arange(rows) * 4 + 1.5, indexing="xy")
        pixels = torch.stack([x, y, torch.ones_like(x)])  # [3, h, w]
        rays = torch.einsum("bij,jhw->bihw", torch.linalg.inv(batch.K), pixels)
        points = rays[:, None] * batch.depth[:, :, None]  # [B, S, 3, h, w]
        moved = torch.einsum("bsij,bsjhw->bsihw", T[:, :, 0, :3, :3], points) + T[:, :, 0, :3, 3, None, None]
        seen = torch.einsum("bij,bsjhw->bsihw", batch.K, moved)
        miss = (seen[:, :, :2] / seen[:, :, 2:] - pixels[:2] - batch.motion[:, :, :2]).norm(dim=2)
        good = (batch.motion[:, :, 2] >= 0) & (batch.motion[:, :, 2] < 0.5) & present[None, :, 0, None, None]
        assert miss[good].median() < 1.0


def test_short_sequences_lose_partners(shards):
    assert (batch_of(shards, frames=2).motion[:, :, 5] == -1).all()
    assert (batch_of(shards, frames=2).motion[:, :, 2] >= 0).all()


def test_augmentation_repeats_with_its_seed(shards):
    batch = batch_of(shards)
    first, again, other = (augment(batch, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first.rgb, again.rgb)
    assert torch.equal(first.motion, again.motion)
    assert not torch.equal(first.rgb, other.rgb)


def test_the_truth_has_no_loss(shards):
    batch = batch_of(shards)
    T, log_depth, log_unit, present = truth_in_units(batch)
    rotation, translation = pose_losses(T, T, present.float().expand(4, -1, -1))
    assert rotation < 0.02
    assert translation < 1e-5
    trainer = Trainer(TrainConfig(), list_shards(shards, "train"))
    estimate = trainer.model.estimate(batch.rgb, batch.packed_motion(), batch.K[:, None])
    perfect = replace(estimate, T_partner_frame=T, log_depth=log_depth, log_unit=log_unit)
    terms = losses(perfect, None, batch, present.expand(4, -1, -1))
    assert terms["depth"] == terms["unit"] == terms["focal"] == 0


def test_controls_and_truth_score_as_they_must(shards):
    from training.evaluate import Answer

    batch = batch_of(shards, "held-out", 2)
    truth = Answer(batch.T_world_camera.double().numpy(), 3.0 * batch.depth.double().numpy())
    perfect = score(truth, batch)
    assert np.nanmax(perfect["rotation"]) < 0.05
    assert np.nanmax(np.nan_to_num(perfect["direction"])) < 0.1
    assert np.nanmax(perfect["absrel"]) < 1e-6
    assert np.nanmax(np.nan_to_num(perfect["ate"])) < 1e-3
    controls = {name: score(answer, batch) for name, answer in control_answers(batch).items()}
    assert np.nanmean(controls["identity"]["rotation"]) > 0.1
    assert np.nanmean(controls["constant depth"]["absrel"]) > 0.05
    assert np.nanmean(controls["straight line"]["ate"]) < np.nanmean(controls["identity"]["ate"])


def test_only_better_weights_are_shipped():
    table = {
        "identity": {"rotation": 2.0, "ate": 0.05}, "constant depth": {"absrel": 0.4},
        "nano": {"rotation": 1.0, "direction": 20.0, "ate": 0.04, "absrel": 0.3},
    }  # fmt: skip
    assert beats_controls(table) == []
    worse = {**table, "nano": {"rotation": 2.5, "direction": 20.0, "ate": 0.06, "absrel": 0.3}}
    assert [reason.split()[0] for reason in beats_controls(worse)] == ["rotation", "ate"]
    assert beats_shipped(table, worse)
    assert not beats_shipped(worse, table)


def test_missing_data_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="make some: python -m training.generate"):
        list_shards(tmp_path, "train")
