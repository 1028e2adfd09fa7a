"""Which frames become keyframes, and which keyframes are solved together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark3r_ros.config import WindowConfig
from spark3r_ros.windows import DepthMap, Gate, Keyframe, Window, gate

CONFIG = WindowConfig(keyframe_flow=0.06, static_flow=0.004, max_keyframe_interval=2.0, min_survival=0.35)


def keyframe(number: int) -> Keyframe:
    return Keyframe(number, number, number, "camera", np.zeros((2, 2, 3), np.uint8))


def filled(window: Window, count: int, first: int = 0) -> list[Keyframe]:
    keyframes = [keyframe(first + i) for i in range(count)]
    for k in keyframes:
        window.add(k)
    return keyframes


def ids(keyframes) -> list[int]:
    return [k.id for k in keyframes]


# -- the gate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flow", "survival", "seconds", "expected"),
    [
        (0.0, 1.0, 0.1, Gate.STATIC),
        (0.003, 1.0, 0.1, Gate.STATIC),
        (0.003, 1.0, 3600.0, Gate.STATIC),  # a camera that stands still for an hour brings nothing new
        (0.005, 1.0, 0.1, Gate.MOVING),
        (0.059, 1.0, 1.99, Gate.MOVING),
        (0.06, 1.0, 0.1, Gate.KEYFRAME),
        (0.005, 1.0, 2.0, Gate.KEYFRAME),  # slow, but long enough
        (0.0, 0.34, 0.1, Gate.KEYFRAME),  # too little of the last one is still in view
        (float("inf"), 0.0, 0.1, Gate.KEYFRAME),  # nothing is
    ],
)
def test_gate(flow, survival, seconds, expected):
    assert gate(CONFIG, flow, survival, seconds) is expected


@pytest.mark.parametrize(
    ("flow", "survival", "seconds", "is_next", "expected"),
    [
        (0.05, 0.55, 0.5, True, Gate.KEYFRAME),  # the next one would show 0.3
        (0.05, 0.65, 0.5, True, Gate.MOVING),  # 0.42
        (0.05, 0.36, 0.5, False, Gate.MOVING),  # what it loses it has lost over several frames
        (0.05, 0.55, 0.1, True, Gate.MOVING),  # a fast stream waits
        (0.0, 0.55, 0.5, True, Gate.STATIC),  # something passes by a camera that stands still
    ],
)
def test_slow_streams_look_ahead(flow, survival, seconds, is_next, expected):
    assert gate(CONFIG, flow, survival, seconds, is_next) is expected


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 0.2), st.floats(0.35, 1), st.floats(0, 10), st.floats(0, 0.1))
def test_more_flow_never_makes_less_of_a_frame(flow, survival, seconds, more):
    order = [Gate.STATIC, Gate.MOVING, Gate.KEYFRAME]
    before, after = (gate(CONFIG, f, survival, seconds) for f in (flow, flow + more))
    assert order.index(after) >= order.index(before)


@pytest.mark.parametrize(
    ("flow", "seconds", "starting", "expected"),
    [
        (0.04, 0.1, True, Gate.KEYFRAME),  # all frames wait: nearer keyframes
        (0.04, 0.1, False, Gate.MOVING),
        (0.01, 1.0, True, Gate.KEYFRAME),  # and sooner ones
        (0.01, 1.0, False, Gate.MOVING),
        (0.003, 9.0, True, Gate.STATIC),  # but never of a camera that stands
    ],
)
def test_keyframes_are_closer_until_the_first_window(flow, seconds, starting, expected):
    assert gate(CONFIG, flow, 1.0, seconds, starting=starting) is expected
    dense = WindowConfig(keyframe_flow=0.02, max_keyframe_interval=0.5)
    for value in (0.01, 0.02, 0.03):  # a user who wants them closer anyway gets them
        assert gate(dense, value, 1.0, 0.1, starting=True) is gate(dense, value, 1.0, 0.1)


def test_every_threshold_can_be_set():
    wide = WindowConfig(keyframe_flow=0.5, static_flow=0.1, max_keyframe_interval=60.0, min_survival=0.0)
    assert gate(wide, 0.09, 0.1, 59.0) is Gate.STATIC
    assert gate(wide, 0.4, 0.1, 59.0) is Gate.MOVING
    assert gate(wide, 0.4, 0.1, 60.0) is Gate.KEYFRAME


# -- the window ----------------------------------------------------------------------------------------------------


def test_the_first_window_has_no_overlap_and_may_start_small():
    window = Window(WindowConfig(size=6, overlap=2, first_size=4))
    filled(window, 3)
    assert not window.can_start
    filled(window, 1, first=3)
    assert window.can_start
    assert not window.is_full
    assert window.overlap == []
    assert window.previous_of(window.keyframes) == []
    filled(window, 2, first=4)
    assert window.is_full
    assert ids(window.keyframes) == [0, 1, 2, 3, 4, 5]


def test_later_windows_repeat_the_overlap():
    window = Window(WindowConfig(size=6, overlap=2))
    filled(window, 6)
    window.slide()
    assert ids(window.overlap) == [4, 5]
    assert list(window.new) == []
    filled(window, 3, first=6)
    assert not window.is_full
    filled(window, 1, first=9)
    assert window.is_full
    assert ids(window.keyframes) == [4, 5, 6, 7, 8, 9]


def test_motion_history_reaches_behind_the_overlap():
    window = Window(WindowConfig(size=6, overlap=2))
    filled(window, 6)
    window.slide()
    filled(window, 4, first=6)
    assert ids(window.previous_of(window.keyframes)) == [2, 3]
    assert ids(window.previous_of(window.keyframes[-1:])) == [7, 8]
    assert ids(window.previous_of(window.keyframes[1:2])) == [3, 4]


def test_a_keyframe_leaves_once_and_drops_its_images():
    window = Window(WindowConfig(size=4, overlap=1))
    left = []
    first = 0
    for count in (4, 3, 3):
        filled(window, count, first)
        first += count
        left += window.slide()
    assert ids(left) == list(range(7))  # the overlap and two frames of motion history stay
    for k in left:
        k.dense = DepthMap(np.ones((2, 2)), np.ones((2, 2)), np.eye(3))
        k.retire()
        assert k.rgb is None
        assert k.dense is None
        assert k.metric_depth is None


def test_clear_returns_everything_that_was_held():
    window = Window(WindowConfig(size=4, overlap=1))
    filled(window, 4)
    window.slide()
    filled(window, 2, first=4)
    assert ids(window.clear()) == [1, 2, 3, 4, 5]
    assert window.keyframes == []
    assert window.clear() == []


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(2, 12), st.integers(1, 60))
def test_every_keyframe_is_solved_new_exactly_once(data, size, total):
    window = Window(WindowConfig(size=size, overlap=data.draw(st.integers(1, size - 1))))
    solved, left = [], []
    for number in range(total):
        window.add(keyframe(number))
        if window.is_full:
            assert len(window.keyframes) == size
            assert ids(window.keyframes) == sorted(ids(window.keyframes))
            solved += ids(window.new)
            left += ids(window.slide())
    assert solved == list(range(len(solved)))
    assert left == list(range(len(left)))
    held = len(solved) - len(left)
    assert held <= window.config.overlap + Window.MOTION_FRAMES


def test_overlap_must_leave_room_for_new_keyframes():
    with pytest.raises(ValueError, match=r"window.overlap must be < window.size \(4\), got 4"):
        WindowConfig(size=4, overlap=4)
