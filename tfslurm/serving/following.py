"""What became of an endpoint, folded into the catalog."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from tfslurm.catalog.db import write_transaction
from tfslurm.catalog.lifecycle import TRANSITIONS, transition
from tfslurm.catalog.models import Endpoint, EndpointStatus, Submission, now
from tfslurm.files import read_json
from tfslurm.settings import Settings
from tfslurm.slurm.observe import Observation
from tfslurm.slurm.states import Fate
from tfslurm.slurm.submissions import note_ended, note_started

ACTOR = "sync"

STALE = 60.0
"""Seconds without a word from the supervisor after which an endpoint no longer counts as healthy."""


def follow(settings: Settings, endpoint: Endpoint, submission: Submission, seen: Observation) -> bool:
    """Move the endpoint to where its supervisor says it is; once more changes nothing. Whether it goes on."""
    paths = settings.root.endpoint(submission.object_id)
    started, state, outcome = (read_json(path) for path in (paths.started, paths.state, paths.outcome))
    if endpoint.status == EndpointStatus.PENDING and started and started["uuid"] == submission.uuid:
        note_started(endpoint, EndpointStatus.STARTING, started, actor=ACTOR)
    if EndpointStatus(endpoint.status).ended:
        with write_transaction():
            note_ended(submission)
    elif outcome or seen.fate.ended:
        _end(endpoint, submission, seen, outcome)
    else:
        if state and started:
            _publish(endpoint, state)
        return True
    return False


def _publish(endpoint: Endpoint, state: dict[str, Any]) -> None:
    """Take over the supervisor's status and address, as far as the endpoint's own status lets it."""
    status, reason = _believed(state)
    if status == endpoint.status and state["url"] == endpoint.url:
        return
    with write_transaction():
        if status != endpoint.status and status in TRANSITIONS["endpoint"][endpoint.status]:
            transition(endpoint, status, actor=ACTOR, reason=reason)
        if state["url"] and state["url"] != endpoint.url:
            endpoint.url = state["url"]
            endpoint.save(only=["url"])


def _believed(state: dict[str, Any]) -> tuple[EndpointStatus, str | None]:
    age = (now() - datetime.fromisoformat(state["at"])).total_seconds()
    if state["status"] == EndpointStatus.HEALTHY and age > STALE:
        return EndpointStatus.UNHEALTHY, f"its supervisor has not been heard of for {age:.0f} s"
    return EndpointStatus(state["status"]), state["reason"]


def _end(endpoint: Endpoint, submission: Submission, seen: Observation, outcome: dict[str, Any] | None) -> None:
    wanted = endpoint.status == EndpointStatus.STOPPING
    if wanted and not seen.fate.ended:
        return  # it still drains
    if wanted or (outcome and outcome["result"] == "stopped") or seen.fate is Fate.CANCELLED:
        return _to_stopped(
            endpoint, submission, "as requested" if wanted else f"from outside: {seen.state or 'stopped'}"
        )
    error = outcome["error"] if outcome else f"{seen.fate.value}: {seen.reason}"
    with write_transaction():
        transition(endpoint, EndpointStatus.ERROR, actor=ACTOR, reason=error, error=error, ended_at=now())
        note_ended(submission, error)


def _to_stopped(endpoint: Endpoint, submission: Submission, reason: str) -> None:
    with write_transaction():
        if endpoint.status != EndpointStatus.STOPPING:
            transition(endpoint, EndpointStatus.STOPPING, actor=ACTOR, reason=reason)
        transition(endpoint, EndpointStatus.STOPPED, actor=ACTOR, reason=reason, ended_at=now())
        note_ended(submission, reason)
