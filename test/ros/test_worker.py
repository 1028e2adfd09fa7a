"""The queue between executor and worker: what is dropped, and when."""

import threading

import pytest

from spark3r_ros.ros.worker import Worker


@pytest.fixture
def held():
    """A worker that does not go on before ``gate`` is set, with room for three; what it has handled."""
    gate, handled = threading.Event(), []

    def handle(item):
        gate.wait()
        handled.append(item)

    worker = Worker(handle, capacity=3)
    yield worker, gate, handled
    gate.set()
    worker.stop()


def test_the_newest_win_and_the_oldest_are_handed_back(held):
    worker, gate, handled = held
    worker.offer(0)
    while worker.waiting:
        pass  # it is in work now
    dropped = [worker.offer(i) for i in range(1, 8)]
    assert dropped == [None, None, None, 1, 2, 3, 4]
    gate.set()
    worker.call(lambda: None).result()
    while worker.waiting:
        pass
    worker.stop()
    assert handled == [0, 5, 6, 7]


def test_commands_go_before_waiting_frames(held):
    worker, gate, handled = held
    worker.offer(0)
    while worker.waiting:
        pass
    worker.offer(1)
    done = worker.call(lambda: list(handled))
    gate.set()
    assert done.result() == [0]


def test_discarded_frames_are_counted_and_never_handled(held):
    worker, gate, handled = held
    for i in range(3):
        worker.offer(i)
    discarded = worker.discard_frames()
    gate.set()
    worker.call(lambda: None).result()
    assert worker.stop() == 0
    assert len(handled) == 3 - discarded


def test_frames_that_a_busy_machine_held_up_are_not_dropped():
    """Forty at once through room for five: a worker that keeps up gets the time to take them."""
    handled = []
    worker = Worker(handled.append, capacity=5)
    dropped = [worker.offer(i) for i in range(1, 41)]
    worker.call(lambda: None).result()
    while worker.waiting:
        pass
    worker.stop()
    lost = [i for i in dropped if i is not None]
    assert sorted(handled + lost) == list(range(1, 41))
    assert len(lost) <= 10, lost  # thirty-five without that time; a very busy machine may take a few
