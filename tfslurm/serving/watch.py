"""Probes in a thread of their own, so that a slow answer delays neither heartbeat nor stop."""

from __future__ import annotations

import queue
import threading

from tfslurm.serving.health import Observation
from tfslurm.serving.probe import Probe


class Watch:
    """Probes one engine until it is closed; `next` hands out what was seen, in order."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._seen: queue.SimpleQueue[Observation | BaseException] = queue.SimpleQueue()
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="probe", daemon=True).start()

    def next(self, timeout: float) -> Observation | None:
        """The next observation; None where there is none within `timeout` seconds."""
        try:
            seen = self._seen.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(seen, BaseException):
            raise seen
        return seen

    def close(self) -> None:
        """Ask no more; a probe that is under way ends by its own time limit and is forgotten."""
        self._closed.set()

    def _run(self) -> None:
        pace = self._probe.pace
        try:
            while not self._probe.up():
                if self._closed.wait(pace.start_interval):
                    return
            interval = pace.start_interval
            while not self._closed.is_set():
                seen = self._probe.observe()
                self._seen.put(seen)
                if seen.answered:
                    interval = pace.probe_interval
                self._closed.wait(interval)
        except BaseException as error:  # The supervisor's main thread raises it.
            self._seen.put(error)
