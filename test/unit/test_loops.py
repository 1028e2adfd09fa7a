"""Pose graph: drift is taken out, false loops are survived, both solvers agree."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from spark3r_ros import geometry
from spark3r_ros.config import LoopConfig
from spark3r_ros.loops import (
    ANCHOR_STEP,
    LOOP_TRANSLATION,
    Edge,
    LoopCloser,
    condense,
    correct,
    gathered_drift,
    is_plausible,
    loop_edge,
    optimise_gtsam,
    optimise_scipy,
    sigmas_off,
    spread,
    step_doubt,
    step_edge,
)
from spark3r_ros.places import Place, PlaceStore, Sighting
from spark3r_ros.windows import Keyframe


def ring(
    count: int = 60, scale_drift: float = 0.004, rotation_drift: float = 0.002, seed: int = 0, rounds: float = 1.0
):
    """A closed circle seen with drift: truth, drifted nodes, step edges."""
    rng = np.random.default_rng(seed)
    angle = np.linspace(0, 2 * np.pi * rounds, count)
    truth = np.stack(
        [geometry.make_T(geometry.so3_exp(np.array([0, 0, a])), [5 * np.cos(a), 5 * np.sin(a), 0.0]) for a in angle]
    )
    nodes = [truth[0]]
    edges = []
    for i in range(1, count):
        T = geometry.inverse(truth[i - 1]) @ truth[i]
        T = T @ geometry.se3_exp(np.r_[rng.normal(0, 0.003, 3), rng.normal(rotation_drift, 0.002, 3)])
        T[:3, 3] *= np.exp(scale_drift * i)
        edges.append(step_edge(i - 1, i, T, depth=3.0))
        nodes.append(nodes[-1] @ T)
    return truth, dict(enumerate(nodes)), edges


def position_error(nodes, truth) -> float:
    estimated = np.stack([nodes[i][:3, 3] for i in range(len(truth))])
    S = geometry.umeyama(estimated, truth[:, :3, 3])
    return float(np.sqrt(np.mean(np.sum((geometry.transform(S, estimated) - truth[:, :3, 3]) ** 2, axis=1))))


def true_loop(truth, first: int, second: int, log_scale: float) -> Edge:
    S = geometry.inverse(truth[first]) @ truth[second]
    return loop_edge(
        first, second, geometry.similarity(1.0, S) @ geometry.similarity(np.exp(log_scale), np.eye(4)), 3.0
    )


@pytest.mark.parametrize("solve", [optimise_gtsam, optimise_scipy])
def test_a_loop_takes_drift_out(solve):
    truth, nodes, edges = ring()
    loops = [true_loop(truth, i, 59 - i, -0.004 * (59 - 2 * i)) for i in (0, 1, 2)]
    before = position_error(nodes, truth)
    after = position_error(solve(nodes, edges + loops), truth)
    assert before > 0.3
    assert after < before / 3


@pytest.mark.parametrize("solve", [optimise_gtsam, optimise_scipy])
def test_a_false_loop_is_outvoted(solve):
    truth, nodes, edges = ring()
    loops = [true_loop(truth, i, 59 - i, -0.004 * (59 - 2 * i)) for i in (0, 1, 2, 3)]
    wrong = loop_edge(10, 40, np.eye(4), 3.0)
    clean = position_error(solve(nodes, edges + loops), truth)
    assert position_error(solve(nodes, [*edges, *loops, wrong]), truth) < 2 * clean + 0.05


def test_both_solvers_agree():
    truth, nodes, edges = ring(30)
    loops = [true_loop(truth, 0, 29, -0.004 * 29)]
    a, b = optimise_gtsam(nodes, edges + loops), optimise_scipy(nodes, edges + loops)
    for i in nodes:
        np.testing.assert_allclose(a[i], b[i], atol=0.05)


def test_drift_is_put_where_few_points_held_the_path():
    """Ten steps with few points turned the path: the loop turns it back there, and nowhere else."""
    truth, _, _ = ring(60)
    edges, nodes = [], [truth[0]]
    for i in range(1, 60):
        T = geometry.inverse(truth[i - 1]) @ truth[i]
        weak = 20 <= i < 30
        if weak:
            T = T @ geometry.se3_exp(np.array([0, 0, 0, 0, 0, 0.02]))
        edges.append(step_edge(i - 1, i, T, 3.0, step_doubt(60 if weak else 450)))
        nodes.append(nodes[-1] @ T)
    moved = optimise_gtsam(dict(enumerate(nodes)), [*edges, true_loop(truth, 0, 59, 0.0)])
    assert position_error(dict(enumerate(nodes)), truth) > 0.3
    for i in range(1, 60):
        turned = geometry.inverse(moved[i - 1]) @ moved[i] @ geometry.inverse(geometry.inverse(truth[i - 1]) @ truth[i])
        assert geometry.rotation_angle(turned[:3, :3] / geometry.scale_of(turned)) < (0.012 if 20 <= i < 30 else 0.002)


def test_without_loops_nothing_moves():
    _, nodes, edges = ring(20)
    moved = optimise_gtsam(nodes, edges)
    for i, S in nodes.items():
        np.testing.assert_allclose(moved[i], S, atol=1e-3)


def test_the_first_node_stays():
    truth, nodes, edges = ring(20)
    moved = optimise_gtsam(nodes, [*edges, true_loop(truth, 0, 19, 0.0)])
    np.testing.assert_allclose(moved[0], nodes[0], atol=1e-5)


def test_same_graph_same_result():
    truth, nodes, edges = ring()
    loops = [true_loop(truth, 0, 59, 0.0)]
    a, b = optimise_gtsam(nodes, edges + loops), optimise_gtsam(nodes, edges + loops)
    for i in nodes:
        np.testing.assert_array_equal(a[i], b[i])


def test_implausible_cycles_are_refused():
    truth, nodes, _ = ring(rotation_drift=0.0, scale_drift=0.0)
    config = LoopConfig()
    assert is_plausible(true_loop(truth, 0, 59, 0.0), nodes[0], nodes[59], 31.0, config)
    assert not is_plausible(true_loop(truth, 0, 59, 1.5), nodes[0], nodes[59], 31.0, config)
    assert not is_plausible(loop_edge(0, 30, np.eye(4), 3.0), nodes[0], nodes[30], 15.0, config)
    turned = geometry.make_T(geometry.so3_exp(np.array([0, 1.5, 0])), np.zeros(3))
    assert not is_plausible(loop_edge(0, 59, turned, 3.0), nodes[0], nodes[59], 31.0, config)


# -- what steps can have gathered --------------------------------------------------------------------------------------


def test_gathered_drift_is_what_errors_of_steps_add_up_to():
    """Many noisy copies of one path: the drift between its ends is spread as predicted, levers and scale included."""
    rng = np.random.default_rng(0)
    truth, _, _ = ring(40)
    steps = geometry.inverse(truth[:-1]) @ truth[1:]
    edges = [step_edge(i, i + 1, T, 3.0) for i, T in enumerate(steps)]
    gathered = gathered_drift(truth[1:], edges)
    exact = Edge(0, 39, geometry.inverse(truth[0]) @ truth[39], (1e-6, 1e-6, 1e-6), is_loop=True)
    off = []
    for _ in range(300):
        S = truth[0]
        for T, edge in zip(steps, edges, strict=True):
            r, t, s = edge.sigmas
            noise = geometry.se3_exp(np.r_[rng.normal(0, t, 3), rng.normal(0, r, 3)])
            S = S @ T @ geometry.similarity(np.exp(rng.normal(0, s)), noise)
        off.append(sigmas_off(exact, truth[0], S, gathered))
    assert np.mean(np.square(off)) == pytest.approx(7, rel=0.2)


def revisited(scale_drift: float, rotation_drift: float) -> tuple[np.ndarray, LoopCloser, dict[int, Keyframe]]:
    """A ring of 60 keyframes walked one and a half times; the truth, and what was mapped."""
    truth, nodes, edges = ring(90, scale_drift, rotation_drift, rounds=1.5)
    closer, keyframes = remembered(np.zeros(90), LoopConfig())
    closer.edges.extend(edges)
    for number, S in nodes.items():
        keyframes[number].T_map_camera, keyframes[number].travelled = S, 0.53 * number
    return truth, closer, keyframes


def sees(
    closer, keyframes, number: int, place: int, S_place_query: np.ndarray,
    unconnected_from: int | None = None, scale_spread: float = 0.01,
) -> Edge | None:  # fmt: skip
    """What becomes of a keyframe's sighting of a place."""
    none = np.zeros((0, 3)), np.zeros((0, 2))
    sighting = Sighting(keyframes[place].place, S_place_query, 50, 0.0, scale_spread, *none)
    return closer.judge(keyframes[number], sighting, keyframes, unconnected_from)


@pytest.fixture(params=[1000, 5], ids=["all steps at once", "the last steps first"])
def last_steps(request, monkeypatch):
    """What is decided does not depend on how many steps are asked first."""
    monkeypatch.setattr(LoopCloser, "LAST_STEPS", request.param)


@pytest.mark.usefixtures("last_steps")
def test_a_true_loop_after_drift_is_taken():
    truth, closer, keyframes = revisited(scale_drift=0.0002, rotation_drift=0.0002)
    assert sees(closer, keyframes, 65, 5, geometry.inverse(truth[5]) @ truth[65]) is not None
    assert closer.num_loops == 1


def test_what_is_seen_needs_no_path_that_agrees_where_nothing_ties_the_camera_to_the_map():
    truth, closer, keyframes = revisited(scale_drift=0.0002, rotation_drift=0.0002)
    period = geometry.make_T(np.eye(3), np.array([0.0, 1.5, 0.0]))
    far = geometry.inverse(truth[5]) @ period @ truth[65]
    assert sees(closer, keyframes, 65, 5, far) is None
    assert sees(closer, keyframes, 65, 5, far, unconnected_from=60) is not None
    assert sees(closer, keyframes, 65, 5, far, unconnected_from=60, scale_spread=np.nan) is None
    assert closer.judge(keyframes[65], None, keyframes, None) is None
    assert (closer.num_loops, closer.num_refused) == (1, 2)


@pytest.mark.usefixtures("last_steps")
def test_a_pattern_that_repeats_moves_nothing_however_many_keyframes_see_it():
    """Steps know within 0.4 where the camera is; a wall's pattern says 1.5 along it, to one keyframe after another."""
    truth, closer, keyframes = revisited(scale_drift=0.0002, rotation_drift=0.0002)
    period = geometry.make_T(np.eye(3), np.array([0.0, 1.5, 0.0]))
    for i in range(0, 16, 4):
        false = geometry.inverse(truth[5 + i]) @ period @ truth[65 + i]
        assert sees(closer, keyframes, 65 + i, 5 + i, false) is None
    assert closer.num_loops == 0
    assert closer.num_refused == 4
    assert sees(closer, keyframes, 85, 25, geometry.inverse(truth[25]) @ truth[85]) is not None


@pytest.mark.usefixtures("last_steps")
def test_a_drift_that_steps_do_not_explain_is_believed_when_another_place_confirms_it():
    """A lens that is not as it was said bends the path, always to the same side."""
    truth, closer, keyframes = revisited(scale_drift=0.0002, rotation_drift=0.0015)
    for i in range(0, 24, 3):
        loop = sees(closer, keyframes, 65 + i, 5 + i, geometry.inverse(truth[5 + i]) @ truth[65 + i])
        assert (loop is not None) == (i >= closer.config.min_gap)
    assert closer.num_loops == 2  # the first one and the last
    nodes = {i: k.S_map_keyframe for i, k in keyframes.items()}
    assert position_error(correct(nodes, closer.edges, 100, optimise_gtsam), truth) < position_error(nodes, truth) / 3


def test_false_loops_of_different_places_do_not_confirm_each_other():
    truth, closer, keyframes = revisited(scale_drift=0.0002, rotation_drift=0.0002)
    for i, shift in ((0, [0.0, 1.5, 0.0]), (22, [1.5, 0.0, 0.0])):
        false = geometry.inverse(truth[5 + i]) @ geometry.make_T(np.eye(3), np.array(shift)) @ truth[65 + i]
        assert sees(closer, keyframes, 65 + i, 5 + i, false) is None


@pytest.mark.usefixtures("last_steps")
def test_where_the_chain_is_broken_only_the_wide_bounds_hold():
    truth, closer, keyframes = revisited(scale_drift=0.0002, rotation_drift=0.0002)
    closer.edges = [e for e in closer.edges if e.second != 30]
    shifted = geometry.inverse(truth[5]) @ geometry.make_T(np.eye(3), np.array([0.0, 1.5, 0.0])) @ truth[65]
    assert sees(closer, keyframes, 65, 5, shifted) is not None


@pytest.mark.parametrize("changes", [{"covariance": (0.1, 0.0)}, {"covariance": (0.0, 0.02)}, {"segment": 1}])
def test_a_camera_that_knows_its_way_back_better_than_a_sight_would_say_looks_for_none(changes):
    closer, keyframes = remembered(np.zeros(40), LoopConfig())
    query, wanted = keyframes[39], keyframes[5].place.descriptor
    sigmas = np.repeat(changes.pop("covariance", (0.0, 0.0)), 3)
    keyframes[5].covariance = np.diag(np.full(6, 0.5))  # of both: what is common says nothing
    query.covariance = keyframes[5].covariance.copy()
    assert not [p for p in closer.candidates(query, wanted, 10, keyframes) if p.keyframe_id == 5]
    query.covariance += np.diag(sigmas**2)
    query.segment = changes.pop("segment", 0)
    assert closer.candidates(query, wanted, 10, keyframes)[0].keyframe_id == 5


# -- the condensed graph -------------------------------------------------------------------------------------------


def test_a_condensed_graph_corrects_as_well_as_the_whole_one():
    truth, nodes, edges = ring(200, scale_drift=0.001, rotation_drift=0.001)
    loops = [true_loop(truth, i, 199 - i, -0.001 * (199 - 2 * i)) for i in (0, 2, 5, 9)]
    whole = position_error(optimise_gtsam(nodes, edges + loops), truth)
    corrected = correct(nodes, edges + loops, 100, optimise_gtsam)
    assert sorted(corrected) == sorted(nodes)
    assert position_error(nodes, truth) > 3 * whole
    assert position_error(corrected, truth) < 1.3 * whole + 0.02


@pytest.mark.parametrize("count", [2, 7, 100, 3000])
def test_the_number_of_nodes_is_bounded(count):
    _, nodes, edges = ring(count)
    anchor_of, condensed = condense(nodes, edges, max_nodes=60)
    anchors = {a for pair in anchor_of.values() for a in pair}
    assert len(anchors) <= max(60, 2 + count // ANCHOR_STEP if count < 100 else 60)
    assert sorted(anchor_of) == sorted(nodes)
    assert {0, count - 1} <= anchors
    assert all(first <= i <= last for i, (first, last) in anchor_of.items())
    assert {(e.first, e.second) for e in condensed} == set(zip(sorted(anchors), sorted(anchors)[1:], strict=False))


def test_chained_steps_measure_what_they_measured_one_by_one():
    _, nodes, edges = ring(23)
    _, condensed = condense(nodes, edges, max_nodes=100)
    for e in condensed:
        np.testing.assert_allclose(e.S_first_second, geometry.inverse(nodes[e.first]) @ nodes[e.second], atol=1e-9)
        steps = edges[e.first : e.second]
        assert e.sigmas[0] == pytest.approx(np.sqrt(sum(s.sigmas[0] ** 2 for s in steps)))
        assert e.sigmas[1] >= np.sqrt(sum(s.sigmas[1] ** 2 for s in steps))


def test_sightings_move_to_anchors_without_changing_what_they_say():
    _, nodes, edges = ring(43)
    loop = loop_edge(3, 39, geometry.inverse(nodes[3]) @ nodes[39], 3.0)
    _, condensed = condense(nodes, [*edges, loop], max_nodes=100)
    (moved,) = [e for e in condensed if e.is_loop]
    assert (moved.first, moved.second) == (5, 40)
    np.testing.assert_allclose(moved.S_first_second, geometry.inverse(nodes[5]) @ nodes[40], atol=1e-9)


def test_of_several_sightings_between_the_same_anchors_the_newest_counts():
    _, nodes, edges = ring(43)
    loops = [loop_edge(3, 39, geometry.inverse(nodes[3]) @ nodes[39], 1.0 + i) for i in range(3)]
    _, condensed = condense(nodes, [*edges, *loops], max_nodes=100)
    assert [e.sigmas for e in condensed if e.is_loop] == [loops[-1].sigmas]


def test_chains_that_do_not_touch_stay_apart():
    _, nodes, edges = ring(30)
    edges = [e for e in edges if e.second != 15]
    anchor_of, condensed = condense(nodes, edges, max_nodes=100)
    assert anchor_of[14][1] == 14
    assert anchor_of[15][0] == 15
    assert not any(e.first < 15 <= e.second for e in condensed)
    moved = correct(nodes, [*edges, loop_edge(0, 10, geometry.inverse(nodes[0]) @ nodes[10], 3.0)], 100, optimise_gtsam)
    for i in range(15, 30):
        np.testing.assert_allclose(moved[i], nodes[i], atol=1e-3)


def test_keyframes_between_anchors_move_in_proportion():
    _, nodes, _ = ring(11, scale_drift=0.0, rotation_drift=0.0)
    shift = geometry.make_T(np.eye(3), np.array([0.0, 0.0, 1.0]))
    moved = spread(nodes, dict.fromkeys(nodes, (0, 10)), {0: nodes[0], 10: shift @ nodes[10]})
    for i in nodes:
        assert moved[i][2, 3] - nodes[i][2, 3] == pytest.approx(i / 10, abs=1e-9)


@pytest.mark.parametrize(("num_steps", "enough"), [(0, LoopCloser.ENOUGH), (3200, 214)])
def test_loops_that_are_in_order_are_collected_the_longer_the_larger_the_graph(num_steps, enough):
    closer, keyframes = remembered(np.zeros(enough + 1), LoopConfig())
    closer.edges.extend([step_edge(0, 1, np.eye(4), 2.0)] * num_steps)
    for i in range(enough):
        assert not closer.is_due, i
        closer._take(loop_edge(0, i + 1, np.eye(4), 2.0), keyframes)
    assert closer.is_due


@pytest.mark.parametrize(("sigmas", "widths"), [(2.5, [3.0]), (3.5, [50.0, 3.0])])
def test_a_loop_that_is_off_is_solved_for_at_once_and_with_a_wide_loss_first(sigmas, widths, monkeypatch):
    closer, keyframes = remembered([0.0, sigmas * LOOP_TRANSLATION * 2.0], LoopConfig())
    closer._take(loop_edge(0, 1, np.eye(4), 2.0), keyframes)
    assert closer.is_due == (len(widths) > 1)
    monkeypatch.setattr("spark3r_ros.loops.correct", lambda *arguments: arguments[-1])
    for expected in (widths, [3.0]):  # what has been solved is in order
        closer.submit({})
        assert list(closer.collect()) == expected
        assert not closer.is_due


@pytest.mark.parametrize(("sigmas", "is_due"), [([1.2] * 3, False), ([1.2] * 4, True), ([1.2, -1.2] * 6, False)])
def test_loops_that_are_off_a_little_are_solved_for_when_they_agree(sigmas, is_due):
    """Each could be the error of a sight; all on one side are drift."""
    closer, keyframes = remembered([0.0, *(s * LOOP_TRANSLATION * 2.0 for s in sigmas)], LoopConfig())
    for number in range(1, len(keyframes)):
        closer._take(loop_edge(0, number, np.eye(4), 2.0), keyframes)
    assert closer.is_due == is_due


# -- places that are remembered ------------------------------------------------------------------------------------


def remembered(positions, config: LoopConfig) -> tuple[LoopCloser, dict[int, Keyframe]]:
    store = PlaceStore()
    keyframes = {}
    for number, position in enumerate(positions):
        none = np.zeros((0, 2), np.float32)
        descriptor = np.random.default_rng(number).normal(0, 1, 8).astype(np.float32)
        place = Place(number, descriptor, none, none[:, 0], np.zeros((0, 32), np.uint8))
        T = geometry.make_T(np.eye(3), np.array([position, 0.0, 0.0]))
        keyframes[number] = Keyframe(number, number, number, "", None, T, T, median_depth=2.0, place=place)
        store.add(place)
    return LoopCloser(config, store), keyframes


def test_places_are_bounded_and_the_newer_of_the_closest_two_is_forgotten():
    closer, keyframes = remembered([0, 1, 2, 3, 1.01, 2.3, 9, 9, 9], LoopConfig(max_places=10, min_gap=3))
    object.__setattr__(closer.config, "max_places", 7)
    closer.forget_places(keyframes)
    assert closer.places.ids == [0, 1, 2, 3, 6, 7, 8]  # 9, 9 and 9 are the latest min_gap keyframes
    assert [i for i, k in keyframes.items() if k.place is None] == [4, 5]
    for number in closer.places.ids:
        assert closer.places.similar(keyframes[number].place.descriptor, 1, 0)[0].keyframe_id == number


def test_forgetting_many_is_forgetting_one_by_one():
    rng = np.random.default_rng(3)
    positions = rng.uniform(0, 8, 60)
    closer, keyframes = remembered(positions, LoopConfig(max_places=30))
    for keyframe in keyframes.values():
        turn = geometry.so3_exp(rng.normal(0, 0.3, 3))
        keyframe.T_map_camera = geometry.make_T(turn, keyframe.T_map_camera[:3, 3])
        keyframe.median_depth = float(rng.uniform(1, 4))

    def apart(a: Keyframe, b: Keyframe) -> float:
        shift = np.linalg.norm(a.T_map_camera[:3, 3] - b.T_map_camera[:3, 3])
        turn = np.arccos(a.T_map_camera[:3, 2] @ b.T_map_camera[:3, 2])
        return float(shift / min(a.median_depth, b.median_depth) + turn)

    left = list(range(60))
    while len(left) > 30:
        old = [i for i in left if i < 60 - closer.config.min_gap]
        left.remove(min((apart(keyframes[a], keyframes[b]), b) for a, b in itertools.combinations(old, 2))[1])
    closer.forget_places(keyframes)
    assert sorted(closer.places.ids) == left


def test_a_few_are_forgotten_beyond_the_bound_so_that_it_is_not_done_each_time():
    rng = np.random.default_rng(4)
    closer, keyframes = remembered(rng.uniform(0, 30, 205), LoopConfig(max_places=200))
    closer.forget_places(keyframes)
    assert len(closer.places) == 200 - 200 // closer.SPARE


def test_below_the_bound_nothing_is_forgotten():
    closer, keyframes = remembered([0] * 9, LoopConfig(max_places=10))
    closer.forget_places(keyframes)
    assert len(closer.places) == 9


def test_steps_of_few_points_are_doubted_much_more():
    doubts = [step_doubt(count) for count in (600, 300, 150, 100, 75, 50, 30, 0)]
    assert doubts[:4] == [0.5, 1.0, 2.0, 3.0]
    assert doubts == sorted(doubts)
    assert step_doubt(50) == 8 * 6.0  # a wall with hardly any texture: scale may be anything
    assert step_doubt(0) == step_doubt(30)
