"""Statuses, and the only way to change one."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Any

from tfslurm.catalog.db import insert_all
from tfslurm.catalog.models import (
    Artifact,
    BaseModel,
    CheckpointStatus,
    DatasetStatus,
    Endpoint,
    EndpointStatus,
    Event,
    Job,
    JobStatus,
    Table,
    database,
    now,
)
from tfslurm.errors import StatusError

D, J, C, E = DatasetStatus, JobStatus, CheckpointStatus, EndpointStatus

TRANSITIONS: dict[str, dict[StrEnum, frozenset[StrEnum]]] = {
    "dataset": {
        D.ASSEMBLING: frozenset({D.READY, D.ERROR, D.DELETED}),
        D.READY: frozenset({D.DELETED}),
        D.ERROR: frozenset({D.DELETED}),
        D.DELETED: frozenset({D.ASSEMBLING, D.READY, D.ERROR}),
    },
    "job": {
        J.PENDING: frozenset({J.RUNNING, J.STOPPING, J.ERROR}),
        J.RUNNING: frozenset({J.COMPLETED, J.ERROR, J.STOPPING, J.PENDING}),
        J.STOPPING: frozenset({J.STOPPED, J.ERROR}),
        J.STOPPED: frozenset(),
        J.COMPLETED: frozenset(),
        J.ERROR: frozenset(),
    },
    "checkpoint": {C.READY: frozenset({C.DELETED}), C.DELETED: frozenset({C.READY})},
    "endpoint": {
        E.PENDING: frozenset({E.STARTING, E.STOPPING, E.ERROR}),
        E.STARTING: frozenset({E.HEALTHY, E.UNHEALTHY, E.STOPPING, E.ERROR, E.PENDING}),
        E.HEALTHY: frozenset({E.UNHEALTHY, E.STARTING, E.STOPPING, E.ERROR, E.PENDING}),
        E.UNHEALTHY: frozenset({E.HEALTHY, E.STARTING, E.STOPPING, E.ERROR, E.PENDING}),
        E.STOPPING: frozenset({E.STOPPED, E.ERROR}),
        E.STOPPED: frozenset({E.PENDING, E.DELETED}),
        E.ERROR: frozenset({E.PENDING, E.DELETED}),
        E.DELETED: frozenset(),
    },
}
"""Which status may follow which, by kind of object."""


def kind_of(row: Table) -> str:
    """The word for what `row` is; for a registry row, the word for what it registers."""
    if isinstance(row, Artifact):
        return row.kind
    return {Job: "job", Endpoint: "endpoint", BaseModel: "base model"}[type(row)]


def record(row: Table, change: str, *, actor: str, reason: str | None = None, **statuses: str | None) -> None:
    """Add the event of a change; in the transaction that makes the change."""
    Event.create(
        at=now(),
        actor=actor,
        kind=kind_of(row),
        object_id=row._pk,
        change=change,
        from_status=statuses.get("before"),
        to_status=statuses.get("after"),
        reason=reason,
    )


def record_created(kind: str, object_ids: Iterable[str], status: str, *, actor: str) -> None:
    """Add the event that each of these objects was created; in the transaction that creates them."""
    same = {"at": now(), "actor": actor, "kind": kind, "change": "created", "to_status": status}
    insert_all(Event, ({**same, "object_id": object_id} for object_id in object_ids))


def transition(row: Table, to: StrEnum, *, actor: str, reason: str | None = None, **changes: Any) -> None:
    """Move `row` to the status `to`, with the other `changes`, and record the event.

    A compare-and-set on the status that `row` was read with; runs inside write_transaction().
    Raises StatusError, with nothing changed, where the table forbids it or somebody else moved it first.
    """
    assert database.transaction_depth() > 0, "transition() outside write_transaction()"
    before, kind, model = row.status, kind_of(row), type(row)
    if to not in TRANSITIONS[kind][before]:
        raise StatusError(f"{kind} '{row.name}' is {before}: it cannot become {to}")
    updated = model.update(status=to, **changes).where(model._meta.primary_key == row._pk, model.status == before)
    if updated.execute() != 1:
        raise StatusError(f"{kind} '{row.name}' is no longer {before}: somebody else changed it")
    row.status = to.value
    for name, value in changes.items():
        setattr(row, name, value)
    record(row, to, actor=actor, reason=reason, before=before, after=to)
