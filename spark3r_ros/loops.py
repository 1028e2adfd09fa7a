"""Loop closure: which sightings of old places are believed, and the pose graph that they correct.

Keyframes are similarities ``S_map_keyframe``; consecutive ones are joined by what was measured when they were solved,
sightings join distant ones. Only sightings are robust (Cauchy): they alone can be false. What is solved is a graph of
few anchors (``condense``), whose corrections are then handed to the keyframes between them (``spread``): so its time
is bounded however long the path becomes.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from spark3r_ros import geometry
from spark3r_ros.config import LoopConfig
from spark3r_ros.places import Place, PlaceStore, Sighting
from spark3r_ros.windows import Keyframe

logger = logging.getLogger(__name__)

STEP_ROTATION = 0.002  # rad, between consecutive keyframes that SURE_INLIERS tracked points tie together
STEP_TRANSLATION = 0.02  # share of the step, plus
STEP_DEPTH = 0.002  # of the distance of the scene
STEP_SCALE = 0.005  # of log scale
SURE_INLIERS = 300  # errors of steps grow as points get fewer, in proportion (measured on rendered circuits)
FEW_INLIERS = 100  # below, faster, as at blank walls: with the third or fourth power (docs/streaming.md, Loops)
FIRST_DOUBT = 2.0  # of steps into a sparse map that did not track yet
NETWORK_DOUBT = 6.0  # of steps that only the network has seen (likewise)
LOOP_ROTATION = 0.01
LOOP_TRANSLATION = 0.02  # of the distance of the scene
LOOP_SCALE = 0.03
SCALE_PRIOR = 1.0  # of each node's log scale: drift is possible, collapse is not
ITERATIONS = 30
ANCHOR_STEP = 5  # keyframes between two anchors, about one window
CAUCHY_WIDTHS = (50.0, 3.0)  # sigmas; wide first, since a true loop looks like an outlier until drift is taken out


@dataclass(frozen=True, eq=False)
class Edge:
    """A measured similarity between two keyframes; sigmas are of rotation, translation and log scale."""

    first: int
    second: int
    S_first_second: np.ndarray  # [4, 4]
    sigmas: tuple[float, float, float]
    is_loop: bool = False


def step_edge(
    first: int, second: int, T_first_second: np.ndarray, depth: float, doubt: float = 1.0, log_scale_sigma: float = 0.0
) -> Edge:
    """Consecutive keyframes, solved in the same world.

    ``depth``: median distance of the scene. ``doubt`` multiplies the sigmas of a good step. ``log_scale_sigma``: of the
    link when another window solved the second.
    """
    step = float(np.linalg.norm(T_first_second[:3, 3]))
    translation = STEP_TRANSLATION * step + STEP_DEPTH * depth
    scale = float(np.hypot(doubt * STEP_SCALE, log_scale_sigma))
    return Edge(first, second, T_first_second, (doubt * STEP_ROTATION, doubt * translation, scale))


def step_doubt(num_inliers: int) -> float:
    """How much less certain than a good step one is that ``num_inliers`` tracked points tie to the map."""
    count = max(num_inliers, 30)
    return max(0.5, SURE_INLIERS / count) * max(1.0, FEW_INLIERS / count) ** 3


def loop_edge(first: int, second: int, S_first_second: np.ndarray, depth: float, doubt: float = 1.0) -> Edge:
    """``depth``: distance of the scene in units of ``first``. ``doubt`` multiplies the sigmas of a good sighting."""
    sigmas = (doubt * LOOP_ROTATION, doubt * LOOP_TRANSLATION * depth, doubt * LOOP_SCALE)
    return Edge(first, second, S_first_second, sigmas, is_loop=True)


def is_plausible(
    loop: Edge, S_map_first: np.ndarray, S_map_second: np.ndarray, path_length: float, config: LoopConfig
) -> bool:
    """Whether the drift that a loop implies is one that some path between its ends could gather, however bad.

    ``path_length``: of the path from one end to the other, in map units.
    """
    drift = _drift(loop, S_map_first, S_map_second)
    scale = float(geometry.scale_of(drift))
    rotation = float(geometry.rotation_angle(drift[:3, :3] / scale))
    there = S_map_first @ loop.S_first_second
    shift = float(np.linalg.norm(there[:3, 3] - S_map_second[:3, 3]))
    allowed = config.max_cycle_translation * path_length + 3 * loop.sigmas[1]
    good = abs(np.log(scale)) <= config.max_cycle_scale and rotation <= config.max_cycle_rotation and shift <= allowed
    if not good:
        logger.info(
            "loop %d-%d refused: it implies a drift of %.2f in log scale, %.2f rad, %.2f of %.2f in translation",
            loop.first, loop.second, np.log(scale), rotation, shift, allowed,
        )  # fmt: skip
    return good


def gathered_drift(S_map: np.ndarray, edges: Sequence[Edge]) -> np.ndarray:
    """Covariance [7, 7] of a chain of N edges that end in the nodes S_map [N, 4, 4], in the axes of the map."""
    spread = _adjoint(S_map) * np.sqrt(_variances(edges))[:, None]
    return np.einsum("nij,nkj->ik", spread, spread)


def sigmas_off(loop: Edge, S_map_first: np.ndarray, S_map_second: np.ndarray, gathered: np.ndarray) -> float:
    """How unlikely the drift is that a loop implies (Mahalanobis); ``gathered`` [7, 7]: see ``gathered_drift``."""
    error = _log(_drift(loop, S_map_first, S_map_second)[None])[0]
    A = _adjoint(geometry.inverse(S_map_second)[None])[0]
    return float(np.sqrt(error @ np.linalg.solve(A @ gathered @ A.T + np.diag(_variances([loop])[0]), error)))


def _drift(loop: Edge, S_map_first: np.ndarray, S_map_second: np.ndarray) -> np.ndarray:
    """Where the second keyframe stands, as seen from where the loop says that it does."""
    return geometry.inverse(loop.S_first_second) @ geometry.inverse(S_map_first) @ S_map_second


def _whitened(loop: Edge, S_map_first: np.ndarray, S_map_second: np.ndarray) -> np.ndarray:
    """[7] ``_drift`` in sigmas of the loop alone."""
    off: np.ndarray = _log(_drift(loop, S_map_first, S_map_second)[None])[0] / np.sqrt(_variances([loop])[0])
    return off


class LoopCloser:
    """Finds loops as keyframes come, and has the pose graph solved behind the stream's back.

    ``submit`` starts a solution and ``collect`` waits for it. When that happens is the caller's decision, by counting
    keyframes and never by the clock: so results do not depend on how fast the machine is.
    """

    SPACING = 3  # keyframes between two places that one is compared with
    SPARE = 50  # one of so many places is forgotten beyond the bound, so that it is seldom that all are compared
    TELLING = 1.5  # times the sigma of a good sight that the path between its ends must have grown uncertain by
    DOUBTFUL = 4.0  # sigmas by which a loop may be off what its steps can have gathered, without another that agrees
    LAST_STEPS = 50  # are asked first: what they explain needs no sum of all
    HELD = 20  # of the doubtful, the latest so many may be confirmed
    TOLERATED = 3.0  # sigmas by which a loop may be off before the graph is solved for it,
    AGREEING = 4  # or a third of that, by which so many are off on average: drift, not the error of a sight
    ENOUGH = 24  # loops that were in order before the graph is solved for all of them, or, as it grows,
    SHARE = 1 / 16  # of its edges: a solution takes as long as these are many

    def __init__(self, config: LoopConfig, places: PlaceStore) -> None:
        self.config = config
        self.places = places
        self.edges: list[Edge] = []
        self.num_loops = 0
        self.num_refused = 0
        self._held: deque[Edge] = deque(maxlen=self.HELD)
        self._unsolved: list[np.ndarray] = []  # [7] sigmas by which the loops since the last solution are off
        self._optimise = optimiser()  # here, so that loading it does not hold up the stream at the first loop
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loops")
        self._running: Future[dict[int, np.ndarray]] | None = None

    def candidates(
        self, query: Keyframe, descriptor: np.ndarray, before: int, keyframes: Mapping[int, Keyframe]
    ) -> Sequence[Place]:
        """Places of keyframes ``before`` this number that look like the new one, best first.

        ``descriptor``: [C] of its image. Only those whose sight would tell something.
        """
        if not self.config.enabled:
            return []
        similar = self.places.similar(descriptor, self.config.candidates, self.SPACING, before)
        return [place for place in similar if self._tells(keyframes[place.keyframe_id], query)]

    def _tells(self, first: Keyframe, second: Keyframe) -> bool:
        """Whether the path between two keyframes is less certain than a sight of one by the other would be.

        A camera that has kept its points in view, to and fro, knows where it is ten times better than a sight can say.
        """
        if first.segment != second.segment:
            return True
        grown = np.diag(second.covariance) - np.diag(first.covariance)
        rotation, translation = self.TELLING * LOOP_ROTATION, self.TELLING * LOOP_TRANSLATION * first.median_depth
        return bool(grown[:3].mean() > translation**2 or grown[3:].mean() > rotation**2)

    def judge(
        self,
        query: Keyframe,
        seen: Sighting | None,
        keyframes: Mapping[int, Keyframe],
        unconnected_from: int | None,
    ) -> Edge | None:
        """Add what a new keyframe sees of an old place to the graph, if it is believable.

        Args:
            query: the new keyframe.
            seen: the first of its ``candidates`` that it could ``recognise``.
            keyframes: all keyframes.
            unconnected_from: first keyframe of a segment that hangs on nothing: a sight of anything older says where it
                is, so there is no drift that could be implausible.
        """
        if seen is None:
            return None
        first = keyframes[seen.place.keyframe_id]
        loop = loop_edge(first.id, query.id, seen.S_place_query, query.median_depth * float(np.exp(seen.log_scale)))
        tells_scale = np.isfinite(seen.scale_spread)
        if tells_scale and (unconnected_from is not None or self._is_believed(loop, keyframes)):
            self._take(loop, keyframes)
            return loop
        self.num_refused += 1
        return None

    def _is_believed(self, loop: Edge, keyframes: Mapping[int, Keyframe]) -> bool:
        """Whether the steps between its ends can have gathered what a loop implies, or another doubtful one agrees.

        A pattern that repeats looks like the same place: so well that nothing in the two images tells it.
        """
        first, second = keyframes[loop.first], keyframes[loop.second]
        ends = first.S_map_keyframe, second.S_map_keyframe
        if not is_plausible(loop, *ends, second.travelled - first.travelled, self.config):
            return False
        if np.linalg.norm(_whitened(loop, *ends)) <= self.DOUBTFUL:  # whatever its steps have gathered
            return True
        off = 0.0
        for start in sorted({max(loop.first, loop.second - self.LAST_STEPS), loop.first}, reverse=True):
            gathered = self._gathered(start, loop.second, keyframes)
            if gathered is None:
                return True
            off = sigmas_off(loop, *ends, gathered)
            if off <= self.DOUBTFUL:
                return True
        confirmed = [held for held in self._held if self._agree(held, loop, keyframes)]
        logger.info(
            "loop %d-%d is %.1f sigma off what its steps can have gathered, %d earlier ones agree",
            loop.first, loop.second, off, len(confirmed),
        )  # fmt: skip
        for held in confirmed:
            self._held.remove(held)
            self._take(held, keyframes)
        if not confirmed:
            self._held.append(loop)
        return bool(confirmed)

    def _agree(self, held: Edge, loop: Edge, keyframes: Mapping[int, Keyframe]) -> bool:
        """Whether a loop is right where an earlier one of other places is: neighbours see the same false pattern."""
        if min(abs(loop.first - held.first), loop.second - held.second) < self.config.min_gap:
            return False
        before, behind = (self._gathered(*ends, keyframes) for ends in zip(_ends(held), _ends(loop), strict=True))
        if before is None or behind is None:
            return False
        first, second = (keyframes[i].S_map_keyframe for i in _ends(held))
        there = first @ held.S_first_second
        moved = there @ geometry.inverse(second)
        A = _adjoint(moved[None])[0]
        gathered = before + gathered_drift(there[None], [held]) + A @ behind @ A.T
        S_first, S_second = (keyframes[i].S_map_keyframe for i in _ends(loop))
        return sigmas_off(loop, S_first, moved @ S_second, gathered) <= self.DOUBTFUL

    def _gathered(self, first: int, second: int, keyframes: Mapping[int, Keyframe]) -> np.ndarray | None:
        """Covariance of the steps between two keyframes; None where they are not one chain."""
        first, second = sorted((first, second))
        steps = [e for e in self.edges if not e.is_loop and first < e.second <= second]
        if len(steps) < second - first:
            return None
        return gathered_drift(np.stack([keyframes[e.second].S_map_keyframe for e in steps]), steps)

    def _take(self, loop: Edge, keyframes: Mapping[int, Keyframe]) -> None:
        self.edges.append(loop)
        self.num_loops += 1
        off = _whitened(loop, *(keyframes[i].S_map_keyframe for i in _ends(loop)))
        self._unsolved.append(off)
        logger.info("loop %d-%d, %.1f sigma off", loop.first, loop.second, np.abs(off).max())

    @property
    def is_unsolved(self) -> bool:
        """Whether there are loops that no solution knows of, and none is being computed."""
        return self._running is None and bool(self._unsolved)

    @property
    def is_due(self) -> bool:
        """Whether the graph should be solved now."""
        enough = max(self.ENOUGH, self.SHARE * len(self.edges))
        return self.is_unsolved and (self.is_urgent or len(self._unsolved) >= enough)

    @property
    def is_urgent(self) -> bool:
        """Whether loops have been taken that keyframes do not agree with yet."""
        if not self._unsolved:
            return False
        off = np.array(self._unsolved)
        drifts = len(off) >= self.AGREEING and np.abs(off.mean(axis=0)).max() > self.TOLERATED / 3
        return bool(drifts or np.abs(off).max() > self.TOLERATED)

    @property
    def is_running(self) -> bool:
        return self._running is not None

    def submit(self, S_map: dict[int, np.ndarray]) -> None:
        widths = CAUCHY_WIDTHS if self.is_urgent else CAUCHY_WIDTHS[-1:]  # in order: none looks like an outlier
        self._unsolved.clear()
        edges = list(self.edges)
        self._running = self._pool.submit(correct, S_map, edges, self.config.max_nodes, self._optimise, widths)

    def collect(self) -> dict[int, np.ndarray]:
        """The solution that was started last; waits for it."""
        assert self._running is not None, "nothing was submitted"
        running, self._running = self._running, None
        return running.result()

    def close(self) -> None:
        """Let the background thread end."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def forget_places(self, keyframes: Mapping[int, Keyframe]) -> None:
        """Keep the number of places bounded: of the two that stand closest the newer one goes, except the latest."""
        excess = len(self.places) - self.config.max_places
        if excess <= 0:
            return
        excess += self.config.max_places // self.SPARE
        known = sorted(self.places.ids)
        old = known[: max(2, len(known) - self.config.min_gap)]
        views = _Views([keyframes[i] for i in old])
        apart, closest = views.closest_older(np.arange(len(old)))
        for _ in range(min(excess, len(old) - 1)):
            row = int(np.argmin(apart))
            self.places.remove(old[row])
            keyframes[old[row]].place = None
            views.remove(row)
            apart[row] = np.inf
            lonely = np.flatnonzero((closest == row) & np.isfinite(apart))
            apart[lonely], closest[lonely] = views.closest_older(lonely)


class _Views:
    """Where keyframes look from, oldest first, and how far that is apart."""

    BLOCK = 64  # rows of the table of distances that are in memory at a time

    def __init__(self, keyframes: Sequence[Keyframe]) -> None:
        T = np.stack([k.T_map_camera for k in keyframes])
        self._position, self._axis = T[:, :3, 3], T[:, :3, 2]
        self._squared = np.sum(self._position**2, axis=1)
        self._depth = np.array([k.median_depth * k.scale for k in keyframes])
        self._removed = np.zeros(len(keyframes))  # infinite where a view was removed

    def remove(self, row: int) -> None:
        self._removed[row] = np.inf

    def closest_older(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distance and row of the closest older view of each of ``rows`` [R], ascending; infinite where none is."""
        blocks = [self._closest(rows[i : i + self.BLOCK]) for i in range(0, len(rows), self.BLOCK)]
        if not blocks:
            return np.zeros(0), np.zeros(0, int)
        apart, closest = zip(*blocks, strict=True)
        return np.concatenate(apart), np.concatenate(closest)

    def _closest(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shift over the scene's distance plus radians, to the closest of the views before each row."""
        older = slice(0, int(rows[-1]) + 1)
        product = self._position[rows] @ self._position[older].T
        shift = np.sqrt(np.maximum(self._squared[rows, None] + self._squared[older] - 2 * product, 0.0))
        turn = np.arccos(np.clip(self._axis[rows] @ self._axis[older].T, -1.0, 1.0))
        apart = shift / np.minimum(self._depth[rows, None], self._depth[older]) + turn + self._removed[older]
        apart[np.arange(older.stop) >= rows[:, None]] = np.inf
        closest = apart.argmin(axis=1)
        return apart[np.arange(len(rows)), closest], closest


# -- the graph ---------------------------------------------------------------------------------------------------------


Optimiser = Callable[[dict[int, np.ndarray], Sequence[Edge], Sequence[float]], dict[int, np.ndarray]]


def correct(
    S_map: Mapping[int, np.ndarray],
    edges: Sequence[Edge],
    max_nodes: int,
    optimise: Optimiser,
    widths: Sequence[float] = CAUCHY_WIDTHS,
) -> dict[int, np.ndarray]:
    """Similarities [4, 4] of all keyframes that agree best with the edges, found with at most ``max_nodes`` anchors.

    ``widths``: of the Cauchy loss, in sigmas, one solution after the other.
    """
    anchor_of, condensed = condense(S_map, edges, max_nodes)
    anchors = {a for pair in anchor_of.values() for a in pair}
    solved = optimise({i: S_map[i] for i in sorted(anchors)}, condensed, widths)
    return spread(S_map, anchor_of, solved)


def condense(
    S_map: Mapping[int, np.ndarray], edges: Sequence[Edge], max_nodes: int
) -> tuple[dict[int, tuple[int, int]], list[Edge]]:
    """Anchors of the graph: for each keyframe those before and behind it on its chain, and the edges between anchors.

    Steps are chained; a sighting is moved along its steps to the anchors nearest to its ends, and of several between
    the same anchors the newest counts.
    """
    steps = {e.second: e for e in edges if not e.is_loop and e.first == e.second - 1}
    chains: list[list[int]] = []
    for i in sorted(S_map):
        if i in steps and chains and chains[-1][-1] == i - 1:
            chains[-1].append(i)
        else:
            chains.append([i])
    stride = max(ANCHOR_STEP, -(-len(S_map) // max(1, max_nodes - 2 * len(chains))))
    anchor_of: dict[int, tuple[int, int]] = {}
    S_anchor_node: dict[int, tuple[int, np.ndarray]] = {}  # the nearer anchor of each node
    condensed: list[Edge] = []
    for chain in chains:
        for start in range(0, max(1, len(chain) - 1), stride):
            piece = chain[start : start + stride + 1]
            first, last = piece[0], piece[-1]
            S_first_node = [np.eye(4)]
            for i in piece[1:]:
                S_first_node.append(S_first_node[-1] @ steps[i].S_first_second)
            S_last_first = geometry.inverse(S_first_node[-1])
            for row, i in enumerate(piece):
                anchor_of.setdefault(i, (first, last))
                if 2 * row < len(piece):
                    S_anchor_node.setdefault(i, (first, S_first_node[row]))
                else:
                    S_anchor_node[i] = (last, S_last_first @ S_first_node[row])
            if len(piece) > 1:
                condensed.append(_chained([steps[i] for i in piece[1:]], S_first_node))
    return anchor_of, condensed + _between_anchors([e for e in edges if e.is_loop], S_anchor_node)


def _between_anchors(loops: Sequence[Edge], S_anchor_node: Mapping[int, tuple[int, np.ndarray]]) -> list[Edge]:
    """Sightings moved to the anchors of their ends, the newest of those that then join the same two."""
    newest = {(S_anchor_node[e.first][0], S_anchor_node[e.second][0]): e for e in loops}
    kept = [(*anchors, e) for anchors, e in newest.items() if anchors[0] != anchors[1]]
    if not kept:
        return []
    S_first, S_second = (np.stack([S_anchor_node[i][1] for i in ids]) for ids in zip(*(_ends(e) for *_, e in kept)))
    S = S_first @ np.stack([e.S_first_second for *_, e in kept]) @ geometry.inverse(S_second)
    return [Edge(first, second, S[i], e.sigmas, is_loop=True) for i, (first, second, e) in enumerate(kept)]


def _chained(steps: Sequence[Edge], S_first_node: Sequence[np.ndarray]) -> Edge:
    """One edge for several steps; a turn in the middle also shifts what comes behind it."""
    end = S_first_node[-1][:3, 3]
    r, t, s = np.array([e.sigmas for e in steps]).T
    lever = np.array([np.linalg.norm(end - S[:3, 3]) for S in S_first_node[1:]])
    sigmas = tuple(float(np.sqrt(np.sum(v**2))) for v in (r, np.r_[t, r * lever], s))
    return Edge(steps[0].first, steps[-1].second, S_first_node[-1], (sigmas[0], sigmas[1], sigmas[2]))


def spread(
    S_map: Mapping[int, np.ndarray], anchor_of: Mapping[int, tuple[int, int]], solved: Mapping[int, np.ndarray]
) -> dict[int, np.ndarray]:
    """Move every keyframe as the anchors before and behind it have moved, in proportion to how near they are."""
    S_moved_map = {a: S @ geometry.inverse(S_map[a]) for a, S in solved.items()}
    first, last = np.array(list(anchor_of.values())).T
    ratio = (np.array(list(anchor_of)) - first) / np.maximum(last - first, 1)
    nodes = np.stack([S_map[i] for i in anchor_of])
    before, behind = (np.stack([S_moved_map[a] for a in anchors]) @ nodes for anchors in (first, last))
    return dict(zip(anchor_of, geometry.interpolate_similarity(before, behind, ratio), strict=True)) | dict(solved)


def optimiser() -> Optimiser:
    """The solver of this machine: similarities [4, 4] of all nodes that agree best with the edges, the first fixed."""
    try:
        import gtsam  # noqa: F401
    except ImportError:
        return optimise_scipy
    return optimise_gtsam


def optimise_gtsam(
    S_map: dict[int, np.ndarray], edges: Sequence[Edge], widths: Sequence[float] = CAUCHY_WIDTHS
) -> dict[int, np.ndarray]:
    """Levenberg-Marquardt on Similarity3 factors; Cauchy loss on loops."""
    import gtsam

    nodes = dict(zip(S_map, _to_gtsam(np.stack(list(S_map.values()))), strict=True))
    measured = _to_gtsam(np.stack([e.S_first_second for e in edges]))
    values = gtsam.Values()
    for node, S in nodes.items():
        values.insert(node, S)
    parameters = gtsam.LevenbergMarquardtParams()
    parameters.setMaxIterations(ITERATIONS)
    parameters.setRelativeErrorTol(1e-5)
    for width in widths:
        graph = _gtsam_graph(nodes, edges, measured, width)
        values = gtsam.LevenbergMarquardtOptimizer(graph, values, parameters).optimize()
    return {node: _from_gtsam(values.atSimilarity3(node)) for node in S_map}


def _gtsam_graph(nodes, edges: Sequence[Edge], measured, width: float):  # type: ignore[no-untyped-def]
    """``nodes``: gtsam's similarities by number, ``measured``: those of the edges."""
    import gtsam

    graph = gtsam.NonlinearFactorGraph()
    first = min(nodes)
    fixed = gtsam.noiseModel.Isotropic.Sigma(7, 1e-6)
    graph.add(gtsam.PriorFactorSimilarity3(first, nodes[first], fixed))
    free = gtsam.noiseModel.Diagonal.Sigmas(np.array([1e4] * 6 + [SCALE_PRIOR]))
    unit = nodes[first].scale()
    for node, S in nodes.items():
        expected = gtsam.Similarity3(S.rotation(), S.translation() * S.scale() / unit, unit)
        graph.add(gtsam.PriorFactorSimilarity3(node, expected, free))
    for edge, S in zip(edges, measured, strict=True):
        r, t, s = edge.sigmas
        noise: gtsam.noiseModel.Base = gtsam.noiseModel.Diagonal.Sigmas(np.array([r] * 3 + [t] * 3 + [s]))
        if edge.is_loop:
            noise = gtsam.noiseModel.Robust.Create(gtsam.noiseModel.mEstimator.Cauchy.Create(width), noise)
        graph.add(gtsam.BetweenFactorSimilarity3(edge.first, edge.second, S, noise))
    return graph


def optimise_scipy(
    S_map: dict[int, np.ndarray], edges: Sequence[Edge], widths: Sequence[float] = CAUCHY_WIDTHS
) -> dict[int, np.ndarray]:
    """The same problem for scipy's sparse least squares: slower, for machines without gtsam."""
    from scipy.optimize import least_squares

    ids = sorted(S_map)
    row = {node: i for i, node in enumerate(ids)}
    start = np.stack([S_map[i] for i in ids])
    first, second = np.array([[row[e.first], row[e.second]] for e in edges]).T
    measured_inverse = geometry.inverse(np.stack([e.S_first_second for e in edges]))
    sigma = np.sqrt(_variances(edges))
    is_loop = np.array([e.is_loop for e in edges])
    log_unit = np.log(geometry.scale_of(start[0]))

    def nodes(x: np.ndarray) -> np.ndarray:
        return np.concatenate([start[:1], _moved(start[1:], x.reshape(-1, 7))])

    def residuals(x: np.ndarray, width: float) -> np.ndarray:
        S = nodes(x)
        error = _log(measured_inverse @ geometry.inverse(S[first]) @ S[second]) / sigma  # [E, 7]
        squared = np.sum(error[is_loop] ** 2, axis=1, keepdims=True)
        error[is_loop] *= np.sqrt(width**2 * np.log1p(squared / width**2) / np.maximum(squared, 1e-12))  # Cauchy
        prior = (np.log(geometry.scale_of(S)) - log_unit) / SCALE_PRIOR
        return np.concatenate([error.ravel(), prior])

    x = np.zeros(7 * (len(ids) - 1))
    sparsity = _sparsity(first, second, len(ids))
    for width in widths:
        x = least_squares(
            residuals, x, jac_sparsity=sparsity, method="trf", max_nfev=ITERATIONS, ftol=1e-5, args=(width,)
        ).x
    return dict(zip(ids, nodes(x), strict=True))


def _sparsity(first: np.ndarray, second: np.ndarray, count: int):  # type: ignore[no-untyped-def]
    """Which unknowns each residual depends on: [7 E + N, 7 (N - 1)]."""
    from scipy.sparse import coo_matrix

    edges = np.arange(len(first))
    block = np.arange(7)
    rows, columns = [], []
    for node in (first, second):
        used = node > 0
        r = (7 * edges[used][:, None, None] + block[:, None]) + 0 * block
        c = (7 * (node[used][:, None, None] - 1) + block) + 0 * block[:, None]
        rows.append(r.ravel())
        columns.append(c.ravel())
    rows.append(7 * len(first) + np.arange(1, count))
    columns.append(7 * np.arange(count - 1) + 6)
    r, c = np.concatenate(rows), np.concatenate(columns)
    return coo_matrix((np.ones(len(r)), (r, c)), shape=(7 * len(first) + count, 7 * (count - 1)))


def _moved(S: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Similarities [N, 4, 4] moved in their own frame by x [N, 7]: rotation vector, translation, log scale."""
    step = geometry.make_T(np.exp(x[:, 6])[:, None, None] * geometry.so3_exp(x[:, :3]), x[:, 3:6])
    return S @ step


def _adjoint(S: np.ndarray) -> np.ndarray:
    """[N, 7, 7] that turn a small ``_log`` in the axes of the similarities [N, 4, 4] into the same in those outside."""
    scale = geometry.scale_of(S)[:, None, None]
    R, t = S[:, :3, :3] / scale, S[:, :3, 3]
    A = np.zeros((len(S), 7, 7))
    A[:, :3, :3], A[:, 3:6, 3:6], A[:, 6, 6] = R, scale * R, 1.0
    A[:, 3:6, :3], A[:, 3:6, 6] = geometry.hat(t) @ R, -t
    return A


def _variances(edges: Sequence[Edge]) -> np.ndarray:
    """[E, 7] of rotation, translation, log scale."""
    return np.repeat(np.square([e.sigmas for e in edges]), (3, 3, 1), axis=1)


def _ends(edge: Edge) -> tuple[int, int]:
    return edge.first, edge.second


def _log(S: np.ndarray) -> np.ndarray:
    """[N, 7] rotation vector, translation, log scale of small similarities [N, 4, 4]."""
    scale = geometry.scale_of(S)
    return np.concatenate(
        [geometry.so3_log(S[:, :3, :3] / scale[:, None, None]), S[:, :3, 3], np.log(scale)[:, None]], axis=1
    )


def _to_gtsam(S: np.ndarray):  # type: ignore[no-untyped-def]
    """Similarities [N, 4, 4] as a list of gtsam's, which scale after they move: p -> s (R p + t)."""
    import gtsam

    scale = geometry.scale_of(S)
    R, t = geometry.project_to_so3(S[:, :3, :3]), S[:, :3, 3] / scale[:, None]
    return [gtsam.Similarity3(gtsam.Rot3(r), *rest) for r, *rest in zip(R, t, scale, strict=True)]


def _from_gtsam(S) -> np.ndarray:  # type: ignore[no-untyped-def]
    return geometry.make_T(S.scale() * S.rotation().matrix(), S.scale() * S.translation())
