"""Freed memory goes back to the system."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from benchmarks.streaming import _resident
from spark3r_ros import memory


def leave_gaps(count: int) -> np.ndarray:
    """Fill ``count`` arrays of 100 KB, which the C library takes from its heap, and free all but the last."""
    return [np.full(100_000, i % 256, np.uint8) for i in range(count)][-1]


def test_what_another_thread_has_freed_is_not_resident_any_more():
    if memory._trim() is None:
        pytest.skip("this C library has no malloc_trim")
    with ThreadPoolExecutor(1) as thread:
        kept = thread.submit(leave_gaps, 300).result()  # in a heap of its own
        before = _resident()
        memory.return_freed_memory()
        assert before - _resident() > 20e6
    assert kept[0] == 43  # 299 modulo 256


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(memory, "_trim", lambda: None)
    memory.return_freed_memory()
