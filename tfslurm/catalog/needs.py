"""Who may still read the bytes of a dataset or checkpoint.

The rule: bytes are needed by what reads them, not by what remembers them.

- A dataset is read by its own import and by the jobs that train or validate on it: while one of them has not ended,
  or has been handed over and is not known to have ended, the bytes stay. A checkpoint, and an endpoint that serves it,
  lead back to the dataset, but only to its row: its digest, size and statistics. That row stays for ever.
- A checkpoint is read by the endpoints that serve it, in the same way. A stopped endpoint does not hold it: it cannot
  be started again once its checkpoint is deleted.
- A base model is read by both, and is never deleted while a job names it: `model remove` refuses.

Only rows decide. A submission that Slurm has not been able to speak of is not known to have ended.
"""

from __future__ import annotations

from collections.abc import Iterator

from peewee import ModelSelect

from tfslurm.catalog import queries
from tfslurm.catalog.models import (
    Artifact,
    Endpoint,
    EndpointStatus,
    Job,
    JobStatus,
    Submission,
    SubmissionState,
)

HANDED = "what was handed over for it is not known to have ended"


def needed_by(artifact: Artifact) -> list[str]:
    """Who may still read the artifact's bytes, in words; inside write_transaction() it stays true until the commit."""
    return list(_readers(artifact))


def alive() -> set[str]:
    """The ids of all that has not ended, or of which something was handed over that is not known to have."""
    ids = {row.id for row in Job.select(Job.id).where(Job.status.in_(_unended(JobStatus)))}
    ids |= {row.id for row in Endpoint.select(Endpoint.id).where(Endpoint.status.in_(_unended(EndpointStatus)))}
    return ids | {row.object_id for row in _handed()}


def _readers(artifact: Artifact) -> Iterator[str]:
    if artifact.kind == "checkpoint":
        table, reads, statuses, kind = Endpoint, Endpoint.checkpoint == artifact.id, EndpointStatus, "endpoint"
    else:
        table, reads, statuses, kind = Job, queries.reads(artifact.id), JobStatus, "job"
        if _handed().where(Submission.object_id == artifact.id).exists():
            yield f"its import: {HANDED}"
    unended = table.status.in_(_unended(statuses))
    for row in table.select().where(reads, unended | table.id.in_(_handed())).order_by(table.id):
        ended = statuses(row.status).ended
        yield f"{kind} '{row.name}' ({row.status})" + (f": {HANDED}" if ended else "")


def _handed() -> ModelSelect:
    return Submission.select(Submission.object_id).where(Submission.state != SubmissionState.ENDED)


def _unended(statuses: type[JobStatus] | type[EndpointStatus]) -> list[str]:
    return [status for status in statuses if not status.ended]
