"""What the supervisor says of its endpoint, in `state.json`."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from tfslurm.files import write_json
from tfslurm.serving.health import Status


class State(msgspec.Struct, frozen=True, kw_only=True):
    """One publication. `since` is when `status` began and `at` when this was written, in RFC 3339, UTC."""

    status: Status
    reason: str | None = None
    since: str
    at: str
    attempt: int
    """Which start of the supervisor this is: Slurm's restart count; the first is 0."""
    restarts: int = 0
    """How often this supervisor started the engine again."""
    node: str
    address: str
    """Where others reach the engine."""
    port: int | None = None
    pid: int
    engine_pid: int | None = None
    url: str | None = None
    """The base of an OpenAI client."""


class Board:
    """Publishes the state: at once where something changed, else when a heartbeat is due."""

    def __init__(self, path: Path, bind: str, environment: Mapping[str, str], *, heartbeat: float) -> None:
        self._path = path
        self._heartbeat = heartbeat
        self._written = 0.0
        now = timestamp()
        self._state = State(
            status=Status.STARTING,
            since=now,
            at=now,
            attempt=attempt(environment),
            node=environment.get("SLURMD_NODENAME") or socket.gethostname(),
            address=address(bind, environment),
            pid=os.getpid(),
        )

    def publish(self, at: float, **changes: Any) -> None:
        """Write the state with `changes` (fields of State); `at` is a steady clock's time."""
        changed = msgspec.structs.replace(self._state, **changes)
        if changed == self._state and at - self._written < self._heartbeat and self._written:
            return
        now = timestamp()
        since = self._state.since if changed.status == self._state.status else now
        host = f"[{changed.address}]" if ":" in changed.address else changed.address
        url = f"http://{host}:{changed.port}/v1" if changed.port else None
        self._state = msgspec.structs.replace(changed, since=since, at=now, url=url)
        write_json(self._path, msgspec.to_builtins(self._state))
        self._written = at


def timestamp() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def attempt(environment: Mapping[str, str]) -> int:
    return int(environment.get("SLURM_RESTART_COUNT") or environment.get("TFSLURM_ATTEMPT") or 0)


def address(bind: str, environment: Mapping[str, str]) -> str:
    """How others reach this node: what the site says, else the loopback that is bound, else the host's name."""
    if said := environment.get("TFSLURM_NODE_ADDRESS"):
        return said
    return bind if is_loopback(bind) else socket.gethostname()


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")
