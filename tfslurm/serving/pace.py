"""How often the supervisor looks, how long it waits, and when it gives up."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from tfslurm.errors import ConfigurationError

VARIABLE = "TFSLURM_SERVING_PACE"


class Pace(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All times in seconds.

    `drain` and `kill_after` together stay below Slurm's default KillWait of 30 s: where a site
    raises KillWait, it may raise `drain` as far.
    """

    poll: float = 0.25
    """Between two looks at the engine's process, the stop file and the signals."""
    heartbeat: float = 10.0
    """At most this long between two writes of the state."""
    start_interval: float = 0.5
    start_timeout: float = 1800.0
    """A large model needs minutes to load from a parallel filesystem."""
    probe_interval: float = 10.0
    probe_timeout: float = 30.0
    """For the one-token completion; with three failures, a hung engine is found within 120 s."""
    glance_timeout: float = 5.0
    """For /health, /v1/models and /metrics, which no model runs for."""
    failures: int = 3
    """Probes in a row without an answer and without progress that make an engine dead."""
    restarts: int = 5
    """In a row, after the engine has been healthy once."""
    first_restarts: int = 2
    """In a row, while it never has been: then the configuration is the likely cause."""
    backoff: float = 2.0
    """Before the first restart; doubled for each one that follows."""
    backoff_limit: float = 60.0
    steady: float = 600.0
    """An engine that was healthy for so long has its restarts forgotten."""
    drain: int = 20
    """vLLM's --shutdown-timeout: requests that run may finish, new ones are refused."""
    kill_after: float = 8.0
    """After `drain`, until SIGKILL; an idle vLLM on a CPU takes 5 s to leave."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Pace:
        """The defaults, changed by the JSON object in TFSLURM_SERVING_PACE: `{"drain": 120}`."""
        try:
            return msgspec.json.decode(environment.get(VARIABLE) or "{}", type=cls)
        except msgspec.DecodeError as error:
            raise ConfigurationError(f"{VARIABLE}: {error}.") from error
