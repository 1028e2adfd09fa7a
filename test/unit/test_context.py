"""The context is checked against a plain list of what should be visible."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spark3r_ros.config import ContextConfig
from spark3r_ros.context import ContextSpec, KVContext

HEADS, DIM, TOKENS, SPECIAL = 2, 4, 5, 2


def make(frames=6, layers=2, sensitive=frozenset(range(9)), special_frames=3, divisor=3, budget=64.0, **spec):
    config = ContextConfig(frames=frames, special_frames=special_frames, insensitive_divisor=divisor, budget_mb=budget)
    layer_tokens = spec.pop("layer_tokens", (TOKENS,) * layers)
    context_spec = ContextSpec(layer_tokens, HEADS, DIM, SPECIAL, sensitive, **spec)
    return KVContext(context_spec, config, "cpu", torch.float32)


def page(ident: int, tokens: int = TOKENS) -> torch.Tensor:
    """Keys [1, H, tokens, D] that tell the frame and the token they belong to."""
    rng = torch.Generator().manual_seed(ident)
    base = torch.randn((1, HEADS, 1, DIM), generator=rng).expand(1, HEADS, tokens, DIM).clone()
    base[..., 0] = ident
    base[..., 1] = torch.arange(tokens)
    return base


def run_pass(context: KVContext, ids: list[int], kept: dict[int, tuple[int, ...]] | None = None) -> list[torch.Tensor]:
    context.begin(len(ids))
    visible = []
    for layer, tokens in enumerate(context.spec.layer_tokens):
        positions = (kept or {}).get(layer, tuple(range(len(ids))))
        k = torch.cat([page(ids[p], tokens) for p in positions], dim=2)
        keys, values = context.append(layer, k, -k, positions)
        torch.testing.assert_close(values, -keys, rtol=0, atol=0)
        visible.append(keys)
    return visible


def ids_seen(keys: torch.Tensor, tokens: int = TOKENS) -> list[int]:
    return keys[0, 0, ::tokens, 0].int().tolist()


def test_a_pass_sees_the_context_and_itself():
    context = make()
    run_pass(context, [0, 1, 2])
    context.commit([0, 1, 2], [0, 1, 2])
    for keys in run_pass(context, [3, 4]):
        assert ids_seen(keys) == [0, 1, 2, 3, 4]
        torch.testing.assert_close(keys, torch.cat([page(i) for i in range(5)], dim=2), rtol=0, atol=0)


def test_what_is_not_committed_is_forgotten():
    context = make()
    run_pass(context, [0, 1])
    context.commit([0, 1], [0, 1])
    run_pass(context, [7])
    assert ids_seen(run_pass(context, [8])[0]) == [0, 1, 8]


def test_committing_some_frames_of_a_pass():
    context = make()
    run_pass(context, [0, 1, 2, 3])
    context.commit([1, 3], [1, 3])
    assert ids_seen(run_pass(context, [9])[0]) == [1, 3, 9]


def test_overlap_frames_are_replaced_but_the_reference_stays():
    context = make()
    run_pass(context, [0, 1, 2])
    context.commit([0, 1, 2], [0, 1, 2])
    run_pass(context, [100, 102, 103])  # new keys of frames 0, 2 and a new frame 3
    context.commit([0, 1, 2], [0, 2, 3])
    keys = run_pass(context, [9])[0]
    assert sorted(ids_seen(keys)) == [0, 1, 9, 102, 103]
    assert sorted(context.frame_ids) == [0, 1, 2, 3]


def test_eviction_thins_the_closest_and_spares_reference_and_recent():
    context = make(frames=4, special_frames=0)
    for ids in ([0, 1], [2, 3], [4, 5], [6, 7]):
        run_pass(context, ids)
        context.commit([0, 1], ids)
    assert {0, 6, 7} <= set(context.frame_ids)
    assert context.num_frames == 4


def test_closest_pair_loses_its_redundant_member():
    context = make(frames=4, special_frames=0, layers=1)
    positions = {0: 0.0, 1: 10.0, 2: 10.1, 3: 30.0}
    context.begin(5)
    k = torch.cat([torch.full((1, HEADS, TOKENS, DIM), p) for p in positions.values()], dim=2)
    context.append(0, k, k, (0, 1, 2, 3))
    context.commit([0, 1, 2, 3], [0, 1, 2, 3])
    context.begin(1)
    far = torch.full((1, HEADS, TOKENS, DIM), 50.0)
    context.append(0, far, far, (0,))
    assert set(context.commit([0], [4])) == {0, 2, 3, 4}  # 1 and 2 are closest, 1 is closer to 0


def test_special_tokens_of_evicted_frames_stay_in_a_ring():
    context = make(frames=2, special_frames=2, layers=1)
    for ident in range(5):
        run_pass(context, [ident])
        context.commit([0], [ident])
    keys = run_pass(context, [9])[0]
    ring, pages = keys[0, 0, : 2 * SPECIAL], keys[0, 0, 2 * SPECIAL :]
    assert set(ring[:, 0].int().tolist()) == {2, 3}  # 1 was the oldest of the evicted
    assert ring[:, 1].int().tolist() == [0, 1, 0, 1]
    assert pages[::TOKENS, 0].int().tolist() == [0, 4, 9]


def test_insensitive_layers_hold_a_share():
    context = make(frames=9, layers=3, sensitive=frozenset({1}), special_frames=0)
    for ident in range(12):
        run_pass(context, [ident])
        context.commit([0], [ident])
    visible = run_pass(context, [99])
    assert [len(ids_seen(keys)) for keys in visible] == [4, 10, 4]


def test_no_sensitive_layer_means_none_and_not_all():
    context = make(frames=9, layers=2, sensitive=frozenset(), special_frames=0)
    for ident in range(12):
        run_pass(context, [ident])
        context.commit([0], [ident])
    assert [len(ids_seen(keys)) for keys in run_pass(context, [99])] == [4, 4]
    assert context.num_frames == 3


def test_a_sensitive_layer_without_patches_does_not_rank_frames():
    context = make(frames=9, layer_tokens=(SPECIAL, TOKENS), sensitive=frozenset({0}), special_frames=0)
    for ident in range(12):
        run_pass(context, [ident])
        context.commit([0], [ident])
    assert torch.isfinite(context._mean_keys).all()
    assert [len(ids_seen(k, n)) for k, n in zip(run_pass(context, [99]), (SPECIAL, TOKENS))] == [10, 4]


def test_frames_pruned_at_a_layer_have_no_page_there():
    context = make(layers=2, sensitive=frozenset({0}), divisor=1)
    run_pass(context, [0, 1, 2, 3], kept={1: (0, 3)})
    context.commit([0, 1, 2, 3], [0, 1, 2, 3])
    visible = run_pass(context, [9])
    assert ids_seen(visible[0]) == [0, 1, 2, 3, 9]
    assert ids_seen(visible[1]) == [0, 3, 9]


def test_layers_may_attend_with_fewer_tokens():
    context = make(layer_tokens=(TOKENS, SPECIAL))
    run_pass(context, [0, 1])
    context.commit([0, 1], [0, 1])
    visible = run_pass(context, [2])
    assert ids_seen(visible[1], SPECIAL) == [0, 1, 2]


def test_camera_tokens_follow_their_frames():
    context = make(frames=3, layers=1, camera_shape=(1, 2), special_frames=0)
    for ident in range(6):
        run_pass(context, [ident])
        tokens, windows = context.append_camera(torch.full((1, 1, 2), float(ident)))
        assert tokens[:, 0, 0].int().tolist() == [*context.frame_ids, ident]
        assert windows.tolist() == [*context.frame_ids, ident]  # one frame a window
        context.commit([0], [ident])


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.floats(0.002, 0.02), st.lists(st.integers(1, 5), min_size=1, max_size=8),
       st.booleans(), st.booleans())  # fmt: skip
def test_the_budget_is_never_exceeded(frames, budget, passes, sensitive, reserved):
    config = ContextConfig(frames=frames, budget_mb=1.0, special_frames=3)
    object.__setattr__(config, "budget_mb", budget)  # below the range that users may set
    spec = ContextSpec((TOKENS,) * 3, HEADS, DIM, SPECIAL, frozenset({1}) if sensitive else frozenset(range(3)))
    context = KVContext(spec, config, "cpu", torch.float32)
    ident = 0
    for count in passes:
        ids = list(range(ident, ident + count))
        try:
            if reserved:
                context.reserve(5)
            visible = run_pass(context, ids)
        except ValueError as error:
            assert "context.budget_mb must be >=" in str(error)  # noqa: PT017
            return
        assert ids_seen(visible[1][:, :, -count * TOKENS :]) == ids
        context.commit(range(count), ids)
        assert context.bytes <= context.budget_bytes
        assert len(set(context.frame_ids)) == context.num_frames <= frames
        assert 0 in context.frame_ids
        ident += count


def test_a_reserved_context_never_moves():
    """No pass, commit or eviction allocates: buffers stay where they are, and their bytes do not change."""
    context = make(frames=3, special_frames=2, sensitive=frozenset({1}), camera_shape=(1, 2))
    context.reserve(4)
    before = context.bytes
    buffers = [context._mean_keys, *(layer.kv for layer in context._layers)]
    places = [b.data_ptr() for b in buffers]
    for start, count in ((0, 1), (1, 4), (5, 2), (7, 4), (11, 3)):
        ids = list(range(start, start + count))
        run_pass(context, ids)
        context.append_camera(torch.zeros((count, 1, 2)))
        context.commit(range(count), ids)
    assert [b.data_ptr() for b in [context._mean_keys, *(layer.kv for layer in context._layers)]] == places
    assert context.bytes == before == sum(t.untyped_storage().nbytes() for t in buffers) + 4 * 7 * 2


def test_growing_stays_inside_the_budget_while_both_buffers_exist():
    context = make(frames=40, special_frames=0)
    run_pass(context, [0, 1])
    context.commit([0, 1], [0, 1])
    object.__setattr__(context.config, "budget_mb", 1.4 * context.bytes / 2**20)
    before = context.bytes
    run_pass(context, [2, 3, 4])
    assert before + context.bytes <= context.budget_bytes
    assert ids_seen(context.append(0, page(9), page(9), (0,))[0])[:2] == [0, 1]


def test_it_says_how_long_a_pass_the_budget_holds():
    context = make(frames=40, special_frames=0)
    context.reserve(2)
    object.__setattr__(context.config, "budget_mb", context.bytes / 2**20)  # taken by what is held
    assert context.holds(2)
    assert not context.holds(3)
    with pytest.raises(ValueError, match="context.budget_mb must be >="):
        context.begin(3)
    object.__setattr__(context.config, "budget_mb", 3 * context.bytes / 2**20)
    assert context.holds(3)
    context.begin(3)


def test_reset_forgets_and_keeps_the_memory():
    context = make()
    run_pass(context, [0, 1])
    context.commit([0, 1], [0, 1])
    before = context.bytes
    context.reset()
    assert context.is_empty
    assert context.bytes == before
    assert ids_seen(run_pass(context, [5])[0]) == [5]


def test_too_small_a_budget_names_the_remedy():
    context = make(budget=1.0, layer_tokens=(100_000,))
    with pytest.raises(ValueError, match=r"context.budget_mb must be >= .* lower window.size"):
        context.begin(1)


def test_buffers_survive_inference_mode():
    context = make()
    with torch.inference_mode():
        run_pass(context, [0, 1])
    context.commit([0, 1], [0, 1])
    assert context.num_frames == 2
