"""Token reduction against a plain, slow implementation of the same specification, and its invariants.

The reference below follows arXiv 2605.06270 word by word with loops over frames and tokens; it shares no code with
``spark3r_ros.reduction``.
"""

from __future__ import annotations

import math
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from spark3r_ros import reduction
from spark3r_ros.backbone.attention import PIECE_TOKENS, Attention, GlobalPass, Rope, grid_rope
from spark3r_ros.backbone.blocks import Block
from spark3r_ros.backbone.trunk import FRAME, GLOBAL, PassOptions, Trunk, TrunkSpec, most_typical
from spark3r_ros.config import ReductionConfig
from spark3r_ros.reduction import ForwardReduction, TokenLayout, merge, plan_keys, plan_query_merge, unmerge
from spark3r_ros.reduction.plan import farthest_frames, query_groups

HEADS, HEAD_DIM = 2, 8
DIM = HEADS * HEAD_DIM


# -- the reference ---------------------------------------------------------------------------------------------------


def reference_layer(
    attention: Attention, x: Tensor, rope: Rope, layout: TokenLayout, config: ReductionConfig, kv_factor: int
) -> Tensor:
    """One reduced global layer on x [N, C], token by token: [N, C]."""
    P, n_special = layout.tokens_per_frame, layout.num_special
    order = layout.frame_order or tuple(range(layout.num_frames))
    at_time = {time: stored for stored, time in enumerate(order)}
    q, k, v = attention.qkv(x).reshape(len(x), 3, HEADS, HEAD_DIM).unbind(1)  # each [N, H, D]
    q_normed, k_normed = attention.q_norm(q), attention.k_norm(k)
    q = rope.apply(q_normed.transpose(0, 1)[None])[0].transpose(0, 1)
    k = rope.apply(k_normed.transpose(0, 1)[None])[0].transpose(0, 1)
    metric = {"input": x, "q": q.flatten(1), "k": k_normed.flatten(1)}[config.matching]

    representative = list(range(len(x)))
    for stored in range(layout.num_frames):
        group, place = divmod(order[stored], config.group_size)
        if place % config.query_factor == 0 or stored == layout.reference:
            continue
        times = range(group * config.group_size, min((group + 1) * config.group_size, layout.num_frames))
        destinations = [
            at_time[t]
            for t in times
            if (t % config.group_size) % config.query_factor == 0 or at_time[t] == layout.reference
        ]
        candidates = [f * P + p for f in destinations for p in range(n_special, P)]
        for p in range(n_special, P):
            token = stored * P + p
            similarity = [F.cosine_similarity(metric[token], metric[c], dim=0).item() for c in candidates]
            representative[token] = candidates[max(range(len(candidates)), key=similarity.__getitem__)]

    if config.kv_selection == "coverage":
        kept_frames = reference_coverage(x, layout, math.ceil(layout.num_frames / kv_factor))
    else:
        kept_frames = [f for f in range(layout.num_frames) if order[f] % kv_factor == 0 or f == layout.reference]
    keys, bias = [], []
    for f in range(layout.num_frames):
        for p in range(P):
            if f in kept_frames or (config.keep_special_kv and p < n_special):
                keys.append(f * P + p)
                light = config.keep_special_kv and p < n_special
                bias.append(math.log(len(kept_frames) / layout.num_frames) if light else 0.0)

    outputs: dict[int, Tensor] = {}
    for token in set(representative):
        members = [i for i, r in enumerate(representative) if r == token]
        query = sum(q[i] for i in members) / len(members)  # [H, D]
        heads = []
        for h in range(HEADS):
            logits = torch.stack([query[h] @ k[i, h] / math.sqrt(HEAD_DIM) + b for i, b in zip(keys, bias)])
            heads.append(logits.softmax(0) @ v[keys, h])
        outputs[token] = attention.proj(torch.cat(heads))
    return torch.stack([outputs[r] for r in representative])


def reference_coverage(x: Tensor, layout: TokenLayout, count: int) -> list[int]:
    """Farthest-point sampling of frames on the cosine of their mean patch tokens, one frame at a time."""
    per_frame = x.reshape(layout.num_frames, layout.tokens_per_frame, -1)[:, layout.num_special :]
    mean = [frame.float().mean(dim=0) for frame in per_frame]
    earliest = 0 if layout.frame_order is None else layout.frame_order.index(0)
    chosen = [earliest if layout.reference is None else layout.reference]
    while len(chosen) < count:
        rest = [f for f in range(layout.num_frames) if f not in chosen]
        nearest = [max(F.cosine_similarity(mean[f], mean[c], dim=0).item() for c in chosen) for f in rest]
        chosen.append(rest[min(range(len(rest)), key=nearest.__getitem__)])
    return sorted(chosen)


# -- cases -----------------------------------------------------------------------------------------------------------


def make_attention(seed: int = 0) -> Attention:
    torch.manual_seed(seed)
    attention = Attention(DIM, HEADS, qk_norm=True).double().eval()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return attention.requires_grad_(False)


def run_layer(
    attention: Attention, x: Tensor, rope: Rope, layout: TokenLayout, config: ReductionConfig | None, layer: int = 0
) -> Tensor:
    """The package's own path on x [B, N, C]; layers 0 of 2 is insensitive, 1 is sensitive."""
    reduction = None if config is None else ForwardReduction(config, layout, 2, frozenset({1}))
    return attention.forward_global(x, layer, GlobalPass(layout.num_frames, rope, reduction))


def double_rope(patches: int, num_special: int, num_frames: int) -> Rope:
    rope = grid_rope(1, patches, HEAD_DIM, num_special, False, torch.device("cpu")).repeat(num_frames)
    return Rope(rope.cos.double(), rope.sin.double())


@st.composite
def cases(draw: st.DrawFn) -> tuple[TokenLayout, ReductionConfig, int, int]:
    """Layout, configuration, batch size, seed; small enough for the reference."""
    num_frames = draw(st.integers(1, 13))
    patches, num_special = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    order = draw(st.none() | st.permutations(range(num_frames)).map(tuple))
    reference = draw(st.none() | st.integers(0, num_frames - 1))
    config = ReductionConfig(
        query_factor=draw(st.integers(1, 6)),
        kv_factor=draw(st.integers(1, 5)),
        insensitive_multiplier=draw(st.integers(1, 3)),
        group_size=draw(st.integers(2, 7) | st.just(20)),
        matching=draw(st.sampled_from(["input", "q", "k"])),
        kv_selection=draw(st.sampled_from(["stride", "coverage"])),
        keep_special_kv=draw(st.booleans()),
    )
    layout = TokenLayout(num_frames, num_special + patches, num_special, order, reference)
    batch = 1 if config.kv_selection == "coverage" else draw(st.integers(1, 2))  # coverage takes one sequence
    return layout, config, batch, draw(st.integers(0, 1000))


def tokens(layout: TokenLayout, batch: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, layout.num_tokens, DIM, generator=generator, dtype=torch.float64)


# -- exactness -------------------------------------------------------------------------------------------------------


@given(cases(), st.integers(0, 1))
@settings(max_examples=60, deadline=None)
def test_fast_path_equals_the_reference(case: tuple[TokenLayout, ReductionConfig, int, int], layer: int) -> None:
    layout, config, batch, seed = case
    attention, x = make_attention(), tokens(layout, batch, seed)
    rope = double_rope(layout.tokens_per_frame - layout.num_special, layout.num_special, layout.num_frames)
    kv_factor = config.kv_factor * (1 if layer == 1 else config.insensitive_multiplier)
    expected = torch.stack([reference_layer(attention, item, rope, layout, config, kv_factor) for item in x])
    # sums of merged queries are float32 by design; everything else here is float64
    torch.testing.assert_close(run_layer(attention, x, rope, layout, config, layer), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_frames", [19, 20, 23, 41])
def test_whole_groups_of_twenty_equal_the_reference(num_frames: int) -> None:
    """The published group size, at lengths that fill it, do not, and leave one frame over."""
    layout = TokenLayout(num_frames, 3, 1, reference=num_frames - 2)
    config = ReductionConfig(query_factor=3, kv_factor=4, insensitive_multiplier=1)
    attention, x = make_attention(), tokens(layout, 1, num_frames)
    rope = double_rope(2, 1, num_frames)
    expected = reference_layer(attention, x[0], rope, layout, config, 4)[None]
    torch.testing.assert_close(run_layer(attention, x, rope, layout, config), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("query_factor", [1, 3])
def test_a_block_in_pieces_equals_the_block_at_once(query_factor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inference goes through the cache some tokens at a time; with gradients everything is one piece."""
    torch.manual_seed(0)
    block = Block(DIM, HEADS, qk_norm=True, layer_scale=0.5).double().eval()
    layout = TokenLayout(25, 4, 1)
    config = ReductionConfig(query_factor=query_factor, kv_factor=2)
    x, rope = tokens(layout, 2, 0), double_rope(3, 1, 25)

    def run() -> Tensor:
        return block.forward_global(x, 0, GlobalPass(25, rope, ForwardReduction(config, layout, 2, frozenset({1}))))

    at_once = run().detach()
    monkeypatch.setitem(PIECE_TOKENS, "cpu", 7)
    with torch.inference_mode():
        torch.testing.assert_close(run(), at_once, atol=1e-6, rtol=1e-6)


@given(cases())
@settings(max_examples=30, deadline=None)
def test_factor_one_is_dense_bit_for_bit(case: tuple[TokenLayout, ReductionConfig, int, int]) -> None:
    layout, config, batch, seed = case
    config = replace(config, query_factor=1, kv_factor=1, insensitive_multiplier=1)
    attention, x = make_attention().float(), tokens(layout, batch, seed).float()
    rope = grid_rope(1, layout.tokens_per_frame - layout.num_special, HEAD_DIM, layout.num_special, False, x.device)
    rope = rope.repeat(layout.num_frames)
    assert torch.equal(run_layer(attention, x, rope, layout, config), run_layer(attention, x, rope, layout, None))


@given(
    factor=st.sampled_from([1, 2, 3, 4, 5]),
    distinct=st.integers(1, 9),
    num_special=st.integers(0, 2),
    keep_special=st.booleans(),
    matching=st.sampled_from(["input", "q", "k"]),
    selection=st.sampled_from(["stride", "coverage"]),
)
@settings(max_examples=60, deadline=None)
def test_repeated_frames_equal_dense_attention(
    factor: int, distinct: int, num_special: int, keep_special: bool, matching: str, selection: str
) -> None:
    attention = make_attention().float()
    layout = TokenLayout(distinct * factor, num_special + 3, num_special)
    frames = torch.randn(distinct, layout.tokens_per_frame, DIM, generator=torch.Generator().manual_seed(distinct))
    x = frames.repeat_interleave(factor, dim=0).flatten(0, 1)[None]
    rope = grid_rope(1, 3, HEAD_DIM, num_special, False, x.device).repeat(layout.num_frames)
    config = ReductionConfig(
        query_factor=factor, kv_factor=factor, insensitive_multiplier=1, group_size=max(2, 12 // factor * factor),
        matching=matching, keep_special_kv=keep_special, kv_selection=selection,
    )  # fmt: skip
    dense, reduced = run_layer(attention, x, rope, layout, None), run_layer(attention, x, rope, layout, config)
    torch.testing.assert_close(reduced, dense, atol=1e-5, rtol=1e-5)


@given(cases())
@settings(max_examples=30, deadline=None)
def test_reordered_views_give_the_same_as_temporal_order(case: tuple[TokenLayout, ReductionConfig, int, int]) -> None:
    layout, config, batch, seed = case
    attention, x = make_attention(), tokens(layout, batch, seed)
    rope = double_rope(layout.tokens_per_frame - layout.num_special, layout.num_special, layout.num_frames)
    order = layout.frame_order or tuple(range(layout.num_frames))
    reference = None if layout.reference is None else order[layout.reference]
    temporal = TokenLayout(layout.num_frames, layout.tokens_per_frame, layout.num_special, None, reference)
    expected = run_layer(attention, x, rope, temporal, config)
    per_frame = (layout.num_frames, layout.tokens_per_frame)
    stored = run_layer(attention, x.unflatten(1, per_frame)[:, order].flatten(1, 2), rope, layout, config)
    restored = stored.unflatten(1, per_frame)[:, layout.temporal_positions()].flatten(1, 2)
    torch.testing.assert_close(restored, expected, atol=1e-5, rtol=1e-5)


# -- invariants of plans ---------------------------------------------------------------------------------------------


@given(cases())
@settings(max_examples=60, deadline=None)
def test_sources_stay_in_their_group_and_special_tokens_alone(
    case: tuple[TokenLayout, ReductionConfig, int, int],
) -> None:
    layout, config, batch, seed = case
    plan = plan_query_merge(tokens(layout, batch, seed), layout, config.query_factor, config.group_size)
    order = layout.frame_order or tuple(range(layout.num_frames))
    frame = torch.arange(layout.num_tokens) // layout.tokens_per_frame
    is_special = torch.arange(layout.num_tokens) % layout.tokens_per_frame < layout.num_special
    group = torch.tensor(order)[frame] // config.group_size  # [N]
    for target, weight in zip(plan.target, plan.weight):
        members = torch.bincount(target, minlength=plan.num_rows)
        assert members.min() >= 1
        assert torch.equal(weight.squeeze(-1), 1 / members.float())
        assert (members[target[is_special]] == 1).all()
        for row in range(plan.num_rows):
            assert group[target == row].unique().numel() == 1
        if layout.reference is not None:
            own = target[frame == layout.reference]
            assert own.unique().numel() == layout.tokens_per_frame  # every token of it keeps its own row


@pytest.mark.parametrize("num_frames", [1, 2, 19, 20, 21, 41, 101])
@pytest.mark.parametrize("factor", [2, 3, 4, 19, 20, 64])
def test_group_sizes_that_do_not_divide(num_frames: int, factor: int) -> None:
    layout = TokenLayout(num_frames, 1, 0)  # one patch per frame
    groups = query_groups(layout, factor, 20)
    sources = torch.cat([part.source.flatten() for part in groups.batches]) if groups.batches else torch.tensor([])
    assert sorted(sources.tolist()) == [f for f in range(num_frames) if (f % 20) % factor]
    assert groups.num_rows == num_frames - len(sources)
    x = torch.randn(1, num_frames, 4)
    plan = plan_query_merge(x, layout, factor)
    assert torch.equal(unmerge(merge(torch.ones(1, 1, num_frames, 4), plan)[:, 0], plan), torch.ones(1, num_frames, 4))


def test_merge_averages_and_unmerge_copies() -> None:
    layout = TokenLayout(2, 2, 0)
    metric = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.1, 9.0], [0.2, 9.0]]])  # both of frame 1 look like token 1
    plan = plan_query_merge(metric, layout, 2)
    q = torch.tensor([1.0, 2.0, 4.0, 6.0]).view(1, 1, 4, 1)
    assert merge(q, plan).flatten().tolist() == [1.0, 4.0]
    assert unmerge(torch.tensor([[[10.0], [20.0]]]), plan).flatten().tolist() == [10.0, 20.0, 20.0, 20.0]


def test_half_precision_queries_are_summed_in_float32() -> None:
    layout = TokenLayout(20, 1, 0)
    plan = plan_query_merge(torch.ones(1, 20, 4), layout, 20)
    q = torch.full((1, 1, 20, 4), 1.0, dtype=torch.bfloat16)
    q[:, :, 0] = 300.0  # bfloat16 sums would lose the ones
    expected = torch.tensor((300 + 19) / 20).bfloat16()
    assert merge(q, plan).flatten().unique().tolist() == [expected.item()]
    assert merge(q, plan).dtype == torch.bfloat16


def test_kept_frames_are_strided_and_hold_the_reference() -> None:
    layout = TokenLayout(10, 3, 1, frame_order=(7, 0, 1, 2, 3, 4, 5, 6, 8, 9), reference=0)
    reduction = ForwardReduction(
        ReductionConfig(query_factor=1, kv_factor=4, insensitive_multiplier=1), layout, 1, frozenset()
    )
    plan = reduction.keys(0, torch.zeros(1, 30, DIM))
    assert plan is not None
    assert plan.frames == (0, 1, 5, 8)  # times 7 (the reference), 0, 4, 8
    assert plan.index.tolist() == [[t for f in plan.frames for t in (3 * f, 3 * f + 1, 3 * f + 2)]]


def test_special_tokens_of_dropped_frames_come_last_and_are_light() -> None:
    plan = plan_keys(TokenLayout(4, 3, 2), (0, 2), keep_special=True)
    assert plan.index.tolist() == [[0, 1, 2, 6, 7, 8, 3, 4, 9, 10]]
    assert plan.bias is not None
    light = -math.log(2)
    assert plan.bias.tolist() == pytest.approx([light, light, 0, light, light, 0, light, light, light, light])


# -- coverage --------------------------------------------------------------------------------------------------------


def test_coverage_reaches_every_place_and_never_repeats() -> None:
    layout = TokenLayout(30, 4, 1)
    place = torch.tensor([0] * 20 + [1] * 3 + [2] * 5 + [3] * 2)  # a camera that lingers at the first place
    x = F.one_hot(place, DIM).float()[:, None].expand(-1, 4, -1).reshape(1, -1, DIM)
    x = x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    frames = farthest_frames(x, layout, 30).tolist()
    assert frames[0] == 0
    assert sorted(frames) == list(range(30))
    assert set(place[frames[:4]].tolist()) == {0, 1, 2, 3}
    assert sorted(farthest_frames(torch.ones_like(x), layout, 30).tolist()) == list(range(30))


def test_coverage_is_decided_once_and_keeps_the_reference() -> None:
    layout = TokenLayout(12, 2, 0, reference=5)
    config = ReductionConfig(query_factor=1, kv_factor=2, kv_selection="coverage")
    reduction = ForwardReduction(config, layout, 2, frozenset({1}))
    x = torch.randn(1, 24, DIM)
    insensitive, sensitive = reduction.keys(0, x), reduction.keys(1, -x.flip(1))
    assert insensitive is not None
    assert sensitive is not None
    assert len(insensitive.frames) == 2
    assert len(sensitive.frames) == 6
    assert set(insensitive.frames.tolist()) <= set(sensitive.frames.tolist())
    assert 5 in insensitive.frames


def test_coverage_refuses_a_batch() -> None:
    config = ReductionConfig(kv_factor=2, kv_selection="coverage")
    reduction = ForwardReduction(config, TokenLayout(4, 2, 0), 1, frozenset())
    with pytest.raises(ValueError, match="one sequence at a time, got a batch of 2"):
        reduction.keys(0, torch.randn(2, 8, DIM))


# -- one forward pass ------------------------------------------------------------------------------------------------


def test_plans_are_shared_between_layers() -> None:
    layout = TokenLayout(8, 3, 1)
    config = ReductionConfig(query_factor=2, kv_factor=2, matching_interval=3)
    reduction = ForwardReduction(config, layout, 6, frozenset({1, 2}))
    x = [torch.randn(1, 24, DIM, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    keys = [reduction.keys(i, x[i]) for i in range(6)]
    assert keys[1] is keys[2]
    assert keys[0] is keys[3]
    assert keys[0] is not keys[1]
    queries = [reduction.queries(i, x[i]) for i in range(6)]
    assert queries[0] is queries[1] is queries[2]
    assert queries[3] is queries[5]
    assert queries[2] is not queries[3]


@pytest.mark.parametrize("chooses_reference", [False, True])
@pytest.mark.parametrize("selection", ["stride", "coverage"])
@pytest.mark.parametrize("matching", ["input", "q", "k"])
def test_no_layer_waits_for_the_device(matching: str, selection: str, chooses_reference: bool) -> None:
    """Fake tensors have no values: any read-back to the host or shape that depends on values raises."""
    layout = TokenLayout(45, 3, 1)
    config = ReductionConfig(
        query_factor=3, kv_factor=4, matching=matching, kv_selection=selection, keep_special_kv=True
    )
    attention = make_attention().float()
    rope = grid_rope(1, 2, HEAD_DIM, 1, False, torch.device("cpu")).repeat(45)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    start = mode.from_tensor(torch.tensor(7)) if chooses_reference else None
    reduction = ForwardReduction(config, layout, 2, frozenset({1}), start=start)
    with mode:
        x = mode.from_tensor(torch.randn(1, 135, DIM))
        for layer in range(2):
            y = attention.forward_global(x, layer, GlobalPass(45, rope, reduction))
            assert y.shape == x.shape


def test_single_frame_and_full_factor_are_dense() -> None:
    reduction = ForwardReduction(ReductionConfig(query_factor=4, kv_factor=8), TokenLayout(1, 5, 1), 2, frozenset())
    assert reduction.keys(0, torch.zeros(1, 5, DIM)) is None
    assert not reduction.merges_queries


@settings(max_examples=60, deadline=None)
@given(case=cases(), start=st.integers(0, 100))
def test_a_reference_on_the_device_is_a_first_frame(
    case: tuple[TokenLayout, ReductionConfig, int, int], start: int
) -> None:
    """Time counted from frame ``start`` on and round equals frames stored in that order, with the reference first."""
    drawn, config, _, seed = case
    layout = TokenLayout(drawn.num_frames, drawn.tokens_per_frame, drawn.num_special)
    start %= layout.num_frames
    attention, x = make_attention(), tokens(layout, 1, seed)
    shift = start * layout.tokens_per_frame

    def run(x: Tensor, first: Tensor | None) -> Tensor:
        plans = ForwardReduction(config, layout, 1, frozenset(), start=first)
        return attention.forward_global(x, 0, GlobalPass(layout.num_frames, None, plans))

    turned = run(x.roll(-shift, dims=1), None).roll(shift, dims=1)
    torch.testing.assert_close(run(x, torch.tensor(start)), turned, rtol=1e-6, atol=1e-6)


def test_a_reference_that_the_trunk_picks_is_kept_in_temporal_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Depth-Anything-3 does: views stay in the order of time, the chosen one keeps its keys and its queries."""
    torch.manual_seed(0)
    spec = TrunkSpec(14, 16, 2, (FRAME, FRAME, GLOBAL, FRAME, GLOBAL), (4,), 1, plain=1, picks_reference=True)
    trunk = Trunk(spec).eval()
    x = torch.randn(1, 25, 1 + 6, 16, generator=torch.Generator().manual_seed(6))
    passes: list[ForwardReduction] = []
    monkeypatch.setattr(
        reduction, "ForwardReduction", lambda *arguments: passes.append(ForwardReduction(*arguments)) or passes[-1]
    )
    config = ReductionConfig(query_factor=4, kv_factor=10, insensitive_multiplier=1)
    with torch.inference_mode():
        picked = int(most_typical(x[:, :, 0]))
        trunk(x, (2, 3), PassOptions(reduction=config))
    assert picked % 4
    assert picked % 10
    layout = passes[0].layout
    assert layout.frame_order is None
    keys = passes[0].keys(1, torch.empty(0))
    assert keys is not None
    assert keys.frames.tolist() == [(picked + t) % 25 for t in (0, 10, 20)]
    groups = passes[0]._groups
    destinations = torch.cat([part.destination.flatten() for part in groups.batches]) // layout.tokens_per_frame
    assert set(destinations.tolist()) == {(picked + t) % 25 for t in (*range(0, 20, 4), 20, 24)}
    own = groups.own_row.view(25, -1)[picked]
    assert own.tolist() == list(range(7))  # the rows of frame 0


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 0}, "num_frames must be >= 1, got 0"),
        ({"num_special": 3}, "num_special must be in 0..2, got 3"),
        ({"frame_order": (0, 0)}, r"frame_order must be a permutation of 0..1, got \(0, 0\)"),
        ({"reference": 2}, "reference must be in 0..1, got 2"),
    ],
)
def test_bad_layouts_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenLayout(**{"num_frames": 2, "tokens_per_frame": 3, "num_special": 1, **arguments})


def test_bad_factors_and_groups_are_refused() -> None:
    layout = TokenLayout(4, 2, 0)
    with pytest.raises(ValueError, match="query factor must be a whole number >= 1, got 0"):
        query_groups(layout, 0, 20)
    with pytest.raises(ValueError, match="query group size must be >= 2 frames, got 1"):
        query_groups(layout, 2, 1)
    with pytest.raises(ValueError, match="reduction.group_size must be >= 2, got 1"):
        ReductionConfig(group_size=1)
    with pytest.raises(ValueError, match="reduction.kv_factor must be >= 0, got -1"):
        ReductionConfig(kv_factor=-1)
    with pytest.raises(ValueError, match="sensitive layers: global layer 6 is unknown, allowed are 0 to 5"):
        ForwardReduction(ReductionConfig(), layout, 6, frozenset({6}))
    with pytest.raises(ValueError, match="global layer 7 is unknown, allowed are 0 to 5"):
        ForwardReduction(ReductionConfig(), layout, 6, frozenset()).keys(7, torch.zeros(1, 8, DIM))
