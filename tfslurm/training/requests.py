"""What is asked of a running job: to save its state, to leave, to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum

from tfslurm.paths import JobPaths


class Request(IntEnum):
    """What the processes agree on at a step boundary: the largest that any of them heard of."""

    NONE = 0
    SAVE = 1
    LEAVE = 2
    """Save, and end this attempt."""
    STOP = 3
    """End for good, and keep nothing."""


class Requests:
    """What one process has heard.

    The first one looks at the files and at its clock, for all; any may have been told to terminate, as a preempted
    one is. The clock is given so that tests need not wait.
    """

    def __init__(
        self,
        paths: JobPaths,
        terminated: threading.Event,
        *,
        first: bool,
        save_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self._paths, self._terminated, self._first = paths, terminated, first
        self._save_seconds, self._clock = save_seconds, clock
        self._saved = clock()

    def heard(self) -> Request:
        if self._first and self._paths.stop.exists():
            return Request.STOP
        if self._terminated.is_set() or (self._first and self._paths.leave.exists()):
            return Request.LEAVE
        if self._first and self._clock() - self._saved >= self._save_seconds:
            return Request.SAVE
        return Request.NONE

    def saved(self) -> None:
        """The state was saved just now, or could not be: the next time is due from here."""
        self._saved = self._clock()


@contextmanager
def terminations() -> Iterator[threading.Event]:
    """Note a SIGTERM in what is given, instead of dying of it."""
    seen = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: seen.set())
    try:
        yield seen
    finally:
        signal.signal(signal.SIGTERM, before)
