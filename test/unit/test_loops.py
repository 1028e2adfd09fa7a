"""Pose graph: drift is taken out, false loops are survived, both solvers agree."""

from __future__ import annotations

import numpy as np
import pytest

from spark3r_ros import geometry
from spark3r_ros.config import LoopConfig
from spark3r_ros.loops import Edge, is_plausible, loop_edge, optimise_gtsam, optimise_scipy, step_edge


def ring(count: int = 60, scale_drift: float = 0.004, rotation_drift: float = 0.002, seed: int = 0):
    """A closed circle seen with drift: truth, drifted nodes, step edges."""
    rng = np.random.default_rng(seed)
    angle = np.linspace(0, 2 * np.pi, count)
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
    assert is_plausible(true_loop(truth, 0, 59, 0.0), nodes, 31.0, config)
    assert not is_plausible(true_loop(truth, 0, 59, 1.5), nodes, 31.0, config)
    assert not is_plausible(loop_edge(0, 30, np.eye(4), 3.0), nodes, 15.0, config)
    turned = geometry.make_T(geometry.so3_exp(np.array([0, 1.5, 0])), np.zeros(3))
    assert not is_plausible(loop_edge(0, 59, turned, 3.0), nodes, 31.0, config)
