"""What follows from what was seen of an engine: pure, with the clock passed in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from tfslurm.serving.pace import Pace


class Status(StrEnum):
    """What the supervisor publishes."""

    STARTING = "starting"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    STOPPING = "stopping"
    STOPPED = "stopped"
    ERROR = "error"


@dataclass(frozen=True)
class Observation:
    """One probe: did the adapter answer, and if not, did the engine at least move?"""

    answered: bool
    progressed: bool = False
    reason: str | None = None


@dataclass(frozen=True)
class Health:
    """One engine's health since its start at `began` (seconds of any steady clock)."""

    began: float
    status: Status = Status.STARTING
    reason: str | None = None
    failures: int = 0
    healthy_since: float | None = None
    dead: str | None = None
    """Why the engine must be replaced; it stays None while there is hope."""

    def after(self, seen: Observation, at: float, pace: Pace) -> Health:
        """The health that follows from `seen`.

        A busy engine keeps its status: only `pace.failures` probes in a row without an answer
        and without progress make it dead. While it starts, failures do not count.
        """
        if seen.answered:
            since = at if self.healthy_since is None else self.healthy_since
            return Health(self.began, Status.HEALTHY, healthy_since=since)
        if self.status is Status.STARTING:
            return replace(self, reason=seen.reason).at(at, pace)
        if seen.progressed:
            return replace(self, failures=0, reason=f"busy: {seen.reason}, but the engine works on other requests")
        failures = self.failures + 1
        dead = f"{failures} probes in a row failed: {seen.reason}" if failures >= pace.failures else None
        return replace(
            self, status=Status.UNHEALTHY, reason=seen.reason, failures=failures, healthy_since=None, dead=dead
        )

    def at(self, now: float, pace: Pace) -> Health:
        """The health after time alone: a start may take only so long."""
        if self.status is Status.STARTING and now - self.began > pace.start_timeout:
            why = f" ({self.reason})" if self.reason else ""
            return replace(self, dead=f"it was not ready {pace.start_timeout:g} s after its start{why}")
        return self


@dataclass(frozen=True)
class Restarts:
    """How often an engine was started again, and whether it may be once more."""

    total: int = 0
    in_a_row: int = 0
    ever_healthy: bool = False

    def after(self, ended: Health, at: float, pace: Pace) -> Restarts | None:
        """The count that includes the next start; None where there have been too many."""
        steady = ended.healthy_since is not None and at - ended.healthy_since >= pace.steady
        ever = self.ever_healthy or ended.status is not Status.STARTING
        in_a_row = 1 if steady else self.in_a_row + 1
        if in_a_row > (pace.restarts if ever else pace.first_restarts):
            return None
        return Restarts(self.total + 1, in_a_row, ever)

    def delay(self, pace: Pace) -> float:
        """Seconds to wait before this start."""
        return min(pace.backoff * 2 ** (self.in_a_row - 1), pace.backoff_limit) if self.in_a_row else 0.0
