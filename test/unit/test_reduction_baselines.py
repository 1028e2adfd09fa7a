"""The baselines of the benchmarks do what their descriptions say, against plain softmax attention."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from benchmarks.baselines import Covering, Grid, GridKeys, Uniform, within_frames
from spark3r_ros.backbone.attention import Attention, GlobalPass, grid_rope
from spark3r_ros.reduction import TokenLayout, unmerge

FRAMES, ROWS, COLUMNS, SPECIAL, DIM = 5, 4, 4, 2, 16
TOKENS = SPECIAL + ROWS * COLUMNS


@pytest.fixture
def case() -> tuple[Attention, Tensor, GlobalPass, Grid]:
    torch.manual_seed(0)
    attention = Attention(DIM, 2, qk_norm=True).eval().requires_grad_(False)
    grid = Grid(TokenLayout(FRAMES, TOKENS, SPECIAL), ROWS, COLUMNS, 24)
    rope = grid_rope(ROWS, COLUMNS, DIM // 2, SPECIAL, False, torch.device("cpu")).repeat(FRAMES)
    return attention, torch.randn(1, FRAMES * TOKENS, DIM), GlobalPass(FRAMES, rope), grid


def plain(attention: Attention, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    logits = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~allowed, -math.inf)
    return attention.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


def projections(attention: Attention, x: Tensor, run: GlobalPass) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = attention._project(x, 0, 3).unflatten(1, (3, -1)).unbind(1)
    assert run.rope is not None
    return run.rope.apply(attention.q_norm(q)), run.rope.apply(attention.k_norm(k)), v


def test_uniform_merging_keeps_a_third_and_averages_all_three(case) -> None:
    attention, x, run, grid = case
    method = Uniform(grid)
    y, plan = method.attend(attention, x, 0, run)
    assert y.shape[1] == method.num_rows < 0.55 * x.shape[1]  # the first frame and 10% are kept: more in short inputs
    assert len(method.source) + method.num_rows == x.shape[1]
    q, k, v = projections(attention, x, run)
    average = torch.zeros(plan.num_rows, x.shape[1]).scatter_(0, plan.target, 1.0)
    average /= average.sum(1, keepdim=True)
    expected = plain(attention, average @ q, average @ k, average @ v, torch.tensor(True))
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    cosine = torch.nn.functional.cosine_similarity(x[0][:, None], x[0][None], dim=-1)[:, method.destination]
    best = method.own_row[method.destination[cosine.argmax(1)]]
    assert torch.equal(plan.target[0, method.source], best[method.source])


def test_uniform_merging_keeps_a_third_of_a_long_input() -> None:
    grid = Grid(TokenLayout(200, 5 + 96, 5), 8, 12, 24)
    assert 0.30 < Uniform(grid).num_rows / grid.layout.num_tokens < 0.40


def test_grid_keys_add_the_mean_and_the_own_key(case) -> None:
    attention, x, run, grid = case
    method = GridKeys(grid)
    y, _ = method.attend(attention, x, 23, run)
    q, k, v = projections(attention, x, run)
    n = x.shape[1]
    allowed = torch.eye(n, dtype=torch.bool)
    allowed[:, method.index] = True
    with_mean = torch.cat([allowed, torch.ones(n, 1, dtype=torch.bool)], dim=1)
    k, v = (torch.cat([t, t.mean(2, keepdim=True)], dim=2) for t in (k, v))
    torch.testing.assert_close(y, plain(attention, q, k, v, with_mean), atol=1e-5, rtol=1e-5)
    assert len(method.index) == FRAMES * (SPECIAL + 4)


def test_first_layers_of_grid_and_covering_look_inside_frames(case) -> None:
    attention, x, run, grid = case
    q, k, v = projections(attention, x, run)
    frame = torch.arange(x.shape[1]) // TOKENS
    expected = plain(attention, q, k, v, frame[:, None] == frame)
    torch.testing.assert_close(within_frames(attention, x, grid, run.rope), expected, atol=1e-5, rtol=1e-5)
    for method in (GridKeys(grid), Covering(grid)):
        torch.testing.assert_close(method.attend(attention, x, 1, run)[0], expected, atol=1e-5, rtol=1e-5)


def test_covering_frames_are_the_keys_of_all(case) -> None:
    attention, x, run, grid = case
    method = Covering(grid)
    method.count = 2
    method.attend(attention, x, 0, run)
    assert method.index is not None
    q, k, v = projections(attention, x, run)
    for layer, places in ((12, range(TOKENS)), (5, (0, 1, 2, 5, 8, 11, 14, 17))):
        allowed = torch.zeros(x.shape[1], dtype=torch.bool)
        frames = (method.index // TOKENS).unique()
        allowed[(frames[:, None] * TOKENS + torch.tensor(list(places))).flatten()] = True
        y, _ = method.attend(attention, x, layer, run)
        torch.testing.assert_close(y, plain(attention, q, k, v, allowed), atol=1e-5, rtol=1e-5)


def test_uniform_output_is_copied_back(case) -> None:
    attention, x, run, grid = case
    y, plan = Uniform(grid).attend(attention, x, 0, run)
    assert unmerge(y, plan).shape == x.shape
