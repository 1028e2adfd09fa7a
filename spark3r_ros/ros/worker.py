"""The one thread that owns the reconstruction, and the one queue through which everything reaches it."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

_MOMENT_S = 0.005

Item = TypeVar("Item")


class Worker(Generic[Item]):
    """Runs ``handle(item)`` for frames in order, and commands between two frames, before the frames that wait.

    A full queue drops its oldest frame and returns it to the caller of ``offer``, who counts it. ``never drop`` is
    the caller's business: it asks ``has_room`` before it takes a message, and is told by ``on_room`` when to ask again.
    """

    def __init__(self, handle: Callable[[Item], None], capacity: int, on_room: Callable[[], None] = lambda: None):
        self._handle = handle
        self._capacity = capacity
        self._on_room = on_room
        self._frames: deque[Item] = deque()
        self._commands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._lock = threading.Lock()
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()  # a token for every job
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="spark3r-worker", daemon=True)
        self._thread.start()

    @property
    def has_room(self) -> bool:
        return len(self._frames) < self._capacity

    @property
    def waiting(self) -> int:
        return len(self._frames)

    def offer(self, item: Item) -> Item | None:
        """Put a frame into the queue; the oldest waiting one is returned when it had to go."""
        if not self.has_room:
            time.sleep(_MOMENT_S)  # frames that a busy machine held up come at once: a worker that keeps up takes them
        with self._lock:
            dropped = self._frames.popleft() if len(self._frames) >= self._capacity else None
            self._frames.append(item)
        self._wake.put(None)
        return dropped

    def discard_frames(self) -> int:
        """Forget every waiting frame; returns how many."""
        with self._lock:
            count = len(self._frames)
            self._frames.clear()
        return count

    def call(self, command: Callable[[], Any]) -> Future[Any]:
        """Run ``command`` on the worker's thread, after the frame in work and before those that wait."""
        future: Future[Any] = Future()
        with self._lock:
            if self._stopping:
                raise RuntimeError("the worker is stopping")
            self._commands.append((command, future))
        self._wake.put(None)
        return future

    def stop(self) -> int:
        """Finish the frame in work and all commands, then end; returns how many waiting frames were given up."""
        with self._lock:
            self._stopping = True
            count = len(self._frames)
            self._frames.clear()
        self._wake.put(None)
        self._thread.join()
        return count

    def _run(self) -> None:
        while True:
            self._wake.get()
            with self._lock:
                is_command = bool(self._commands)
                if is_command:
                    job: Any = self._commands.popleft()
                elif self._frames:
                    job = self._frames.popleft()
                elif self._stopping:
                    return
                else:
                    continue  # the frame of this token was dropped
            if is_command:
                _fulfil(*job)
            else:
                self._on_room()
                self._handle(job)
            del job  # an image must not live on while the queue is empty


def _fulfil(command: Callable[[], Any], future: Future[Any]) -> None:
    try:
        future.set_result(command())
    except Exception as error:  # noqa: BLE001  whoever waits for the future raises it again
        future.set_exception(error)
