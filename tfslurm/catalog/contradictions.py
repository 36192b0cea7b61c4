"""Rows that cannot all be true: statuses against submissions, checkpoints against jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tfslurm.catalog import queries
from tfslurm.catalog.db import write_transaction
from tfslurm.catalog.lifecycle import kind_of, transition
from tfslurm.catalog.models import (
    Artifact,
    Checkpoint,
    Dataset,
    DatasetStatus,
    Endpoint,
    EndpointStatus,
    Job,
    JobStatus,
    Submission,
    SubmissionState,
    Table,
    now,
)

ACTOR = "fsck"


@dataclass(frozen=True)
class Contradiction:
    """Which object, what of it cannot be, what to do, and how it is mended where that is safe."""

    ref: str
    said: str
    cure: str
    mend: Callable[[], str] | None = None
    """Mends it; says what it did."""


def contradictions() -> Iterator[Contradiction]:
    """Everything found, one at a time."""
    waiting = {row._pk: row for row in _waiting()}
    newest = queries.submissions_of(waiting)
    for ref, row in waiting.items():
        submission = newest.get(ref)
        if submission is None or submission.state == SubmissionState.ENDED:
            yield _unfollowed(row, submission)
    for submission in queries.submissions_alive():
        if submission.object_id not in waiting and not _still_waits(submission.object_id):
            yield _unended(submission)
    yield from _checkpoints()
    yield from _halves()


def _waiting() -> Iterator[Table]:
    """Whatever is to be moved on by what becomes of a submission."""
    yield from Job.select().where(Job.status.in_([status for status in JobStatus if not status.ended]))
    yield from Endpoint.select().where(Endpoint.status.in_([status for status in EndpointStatus if not status.ended]))
    imports = Artifact.select().join(Dataset).where(Artifact.status == DatasetStatus.ASSEMBLING)
    yield from imports.where(Dataset.source.is_null(False))


def _still_waits(ref: str) -> bool:
    """Asked again of one that was made after the first look."""
    return any(row._pk == ref for row in _waiting())


def _unfollowed(row: Table, submission: Submission | None) -> Contradiction:
    said = f"{kind_of(row)} '{row.name}' is {row.status}, and nothing that was handed over for it is alive"
    if submission is None or submission.job_id is None:
        return Contradiction(row._pk, said, "End it: --repair puts it in error.", lambda: _to_error(row))
    return Contradiction(row._pk, said, "Let `sync` look again: --repair opens it.", lambda: _reopen(submission))


def _to_error(row: Table) -> str:
    reason = "it was never handed over, or that was lost"
    ended = {} if isinstance(row, Artifact) else {"ended_at": now()}
    statuses = {"job": JobStatus, "endpoint": EndpointStatus}.get(kind_of(row), DatasetStatus)
    with write_transaction():
        transition(row, statuses.ERROR, actor=ACTOR, reason=reason, error=reason, **ended)
    return "is in error"


def _reopen(submission: Submission) -> str:
    with write_transaction():
        Submission.update(state=SubmissionState.SUBMITTED, ended_at=None).where(
            Submission.uuid == submission.uuid
        ).execute()
    return "is followed again: the next `sync` says what became of it"


def _unended(submission: Submission) -> Contradiction:
    known = Artifact.get_or_none(Artifact.id == submission.object_id)
    known = known or Job.get_or_none(Job.id == submission.object_id)
    known = known or Endpoint.get_or_none(Endpoint.id == submission.object_id)
    what = f"is {known.status}" if known else "does not exist"
    said = f"{submission.kind} {submission.object_id} {what}, but its submission {submission.uuid} is open"
    cure = "`tfslurm sync`, or --repair, closes it."
    return Contradiction(submission.object_id, said, cure, lambda: _close(submission))


def _close(submission: Submission) -> str:
    with write_transaction():
        Submission.update(state=SubmissionState.ENDED, ended_at=now()).where(
            Submission.uuid == submission.uuid
        ).execute()
    return "its submission is closed"


def _checkpoints() -> Iterator[Contradiction]:
    have = Checkpoint.select(Checkpoint.job)
    for job in Job.select().where(Job.status == JobStatus.COMPLETED, Job.id.not_in(have)):
        yield Contradiction(
            job.id, f"job '{job.name}' is completed and has no checkpoint", "Restore the catalog from its backup."
        )
    unfinished = queries.checkpoints().where(Job.status != JobStatus.COMPLETED)
    for row in unfinished:
        said = f"checkpoint '{row.artifact.name}' is of job '{row.job.name}', which is {row.job.status}"
        yield Contradiction(row.artifact_id, said, "Restore the catalog from its backup.")


def _halves() -> Iterator[Contradiction]:
    """Registry rows without what only their kind has."""
    for kind, table in (("dataset", Dataset), ("checkpoint", Checkpoint)):
        for row in Artifact.select().where(Artifact.kind == kind, Artifact.id.not_in(table.select(table.artifact))):
            yield Contradiction(row.id, f"{kind} '{row.name}' is only half registered", "Restore the catalog.")
