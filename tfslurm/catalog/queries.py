"""Finding and listing what the catalog holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from peewee import Expression, Field, ModelSelect

from tfslurm.catalog.models import (
    Artifact,
    BaseModel,
    Checkpoint,
    Dataset,
    Endpoint,
    EndpointStatus,
    Event,
    Job,
    JobStatus,
    Submission,
    SubmissionState,
    Sweep,
    Table,
)
from tfslurm.errors import NotFoundError, StatusError

DELETED = "deleted"


@dataclass(frozen=True)
class Page:
    """Which rows of a listing: the newest first."""

    status: str | None = None
    owner: str | None = None
    name: str | None = None
    """A glob: `*`, `?` and `[…]`."""
    limit: int | None = None
    after: str | None = None
    """The id of the last row already seen."""


def datasets() -> ModelSelect:
    """Every dataset with its registry row, in one query."""
    return Dataset.select(Dataset, Artifact).join(Artifact).where(Artifact.kind == "dataset")


def checkpoints() -> ModelSelect:
    """Every checkpoint with its registry row and its job's name, in one query."""
    return Checkpoint.select(Checkpoint, Artifact, Job).join(Artifact).switch(Checkpoint).join(Job)


def jobs() -> ModelSelect:
    """Every job; `dataset_id` is the dataset's, and no view needs more of it."""
    return Job.select()


def endpoints() -> ModelSelect:
    """Every endpoint with its checkpoint's registry row, in one query."""
    return Endpoint.select(Endpoint, Checkpoint, Artifact).join(Checkpoint).join(Artifact)


def paged(rows: ModelSelect, table: type[Table], page: Page, *, key: Field | None = None) -> ModelSelect:
    """`rows` filtered on the columns of `table`; deleted ones only where they are asked for.

    `key` is the column that holds the ids, where an index of another table gives their order.
    """
    if page.status:
        rows = rows.where(table.status == page.status)
    else:
        rows = rows.where(table.status != DELETED)
    if page.owner:
        rows = rows.where(table.owner == page.owner)
    if page.name:
        rows = rows.where(table.name % page.name)  # GLOB, on SQLite
    if page.after:
        rows = rows.where(table.id < page.after)
    return rows.order_by((key or table.id).desc()).limit(page.limit)


def find_dataset(ref: str, *, deleted: bool = False) -> Dataset:
    """The dataset with this id or name. Raises NotFoundError."""
    return _find(datasets(), Artifact, "dataset", ref, deleted)


def find_checkpoint(ref: str, *, deleted: bool = False) -> Checkpoint:
    """The checkpoint with this id or name. Raises NotFoundError."""
    return _find(checkpoints(), Artifact, "checkpoint", ref, deleted)


def find_job(ref: str) -> Job:
    """The job with this id or name. Raises NotFoundError."""
    return _find(jobs(), Job, "job", ref, True)


def find_sweep(ref: str) -> Sweep:
    """The sweep with this id or name. Raises NotFoundError."""
    found = Sweep.get_or_none((Sweep.id == ref) | (Sweep.name == ref))
    if found is None:
        raise NotFoundError(f"no sweep '{ref}'", hint="`tfslurm job show JOB` names the sweep of a job.")
    return found


def jobs_of(sweep: Sweep) -> list[Job]:
    """The jobs of a sweep, in the order of its cells."""
    return list(jobs().where(Job.sweep == sweep).order_by(Job.id))


def find_endpoint(ref: str, *, deleted: bool = False) -> Endpoint:
    """The endpoint with this id or name. Raises NotFoundError."""
    return _find(endpoints(), Endpoint, "endpoint", ref, deleted)


def find_model(name: str) -> BaseModel:
    """The base model of this name. Raises NotFoundError."""
    model = BaseModel.get_or_none(BaseModel.name == name)
    if model is None:
        known = ", ".join(m.name for m in BaseModel.select(BaseModel.name).order_by(BaseModel.name))
        hint = f"There are: {known}." if known else "None is registered: see `tfslurm model add --help`."
        raise NotFoundError(f"no base model '{name}'", hint=hint)
    return model


def _find(rows: ModelSelect, table: type[Table], kind: str, ref: str, deleted: bool) -> Table:
    rows = rows.where((table.id == ref) | (table.name == ref))
    if not deleted:
        rows = rows.where(table.status != DELETED)
    # Of several deleted ones of the same name the newest is meant; an id is never a name.
    found = rows.order_by((table.status == DELETED), table.id.desc()).first()
    if found is None:
        raise NotFoundError(f"no {kind} '{ref}'", hint=f"See `tfslurm {kind} list`.")
    return found


def check_name_free(table: type[Table], kind: str, name: str) -> None:
    """Raises StatusError where an object of this kind has the name; run it inside the writing transaction."""
    taken = table.select().where(table.name == name)
    if table is Artifact:
        taken = taken.where(Artifact.kind == kind)
    if table is not Job:
        taken = taken.where(table.status != DELETED)
    row = taken.first()
    if row:
        raise StatusError(
            f"the name '{name}' is taken by {kind} {row.id}", hint="Choose another one; names are unique."
        )


def reads(dataset_id: str) -> Expression:
    """The condition of a job that trains on the dataset, or validates on it."""
    return (Job.dataset == dataset_id) | (Job.validation_dataset == dataset_id)


def consumers_of_dataset(dataset_id: str) -> list[Job]:
    """The jobs that may still read the dataset."""
    alive = [status for status in JobStatus if not status.ended]
    return list(Job.select().where(reads(dataset_id), Job.status.in_(alive)).order_by(Job.id))


def consumers_of_checkpoint(checkpoint_id: str) -> list[Endpoint]:
    """The endpoints that serve the checkpoint, or will again."""
    alive = [status for status in EndpointStatus if not status.ended]
    return list(Endpoint.select().where(Endpoint.checkpoint == checkpoint_id, Endpoint.status.in_(alive)))


def submissions_alive() -> list[Submission]:
    """What was handed over and is not known to have ended, the oldest first."""
    alive = Submission.select().where(Submission.state != SubmissionState.ENDED)
    return list(alive.order_by(Submission.created_at))


def launchers_alive() -> set[str]:
    """The launchers of what has not ended: a quick look whether there is anything to follow."""
    alive = Submission.select(Submission.launcher).where(Submission.state != SubmissionState.ENDED).distinct()
    return {launcher for (launcher,) in alive.tuples()}


def unaccounted(limit: int = 1000) -> list[Submission]:
    """What has run on Slurm, has ended, and has not been looked up in accounting yet; the oldest first."""
    ended = (Submission.state == SubmissionState.ENDED) & (Submission.launcher == "slurm")
    unknown = Submission.usage.is_null() & Submission.job_id.is_null(False)
    return list(Submission.select().where(ended, unknown).order_by(Submission.ended_at).limit(limit))


def objects_of(submissions: Iterable[Submission]) -> dict[str, Table]:
    """What the submissions run, by its id: the jobs, endpoints and datasets."""
    ids: dict[str, list[str]] = {"job": [], "endpoint": [], "import": []}
    for submission in submissions:
        ids[submission.kind].append(submission.object_id)
    found = [
        *_among(Job.select(), Job.id, ids["job"]),
        *_among(endpoints(), Endpoint.id, ids["endpoint"]),
        *_among(datasets(), Artifact.id, ids["import"]),
    ]
    return {row._pk: row for row in found}


VARIABLES = 500
"""Values in one statement: databases have a limit."""


def _among(rows: ModelSelect, key: Field, ids: list[str]) -> Iterator[Table]:
    for start in range(0, len(ids), VARIABLES):
        yield from rows.where(key.in_(ids[start : start + VARIABLES]))


def submissions_of(object_ids: Iterable[str]) -> dict[str, Submission]:
    """The newest submission of each object."""
    rows = Submission.select().where(Submission.object_id.in_(list(object_ids))).order_by(Submission.created_at)
    return {row.object_id: row for row in rows}


SUMMED = ("gpu_hours", "cpu_hours", "queue_wait_seconds", "elapsed_seconds", "runs")


def usage_of(object_ids: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What accounting said of each object's submissions, together; objects of which it said nothing are missing."""
    rows = Submission.select(Submission.object_id, Submission.usage).where(Submission.usage.is_null(False))
    found: dict[str, dict[str, Any]] = {}
    for row in _among(rows.order_by(Submission.created_at), Submission.object_id, list(object_ids)):
        if row.usage:
            found[row.object_id] = _together(found.get(row.object_id), row.usage)
    return found


def _together(before: dict[str, Any] | None, used: dict[str, Any]) -> dict[str, Any]:
    if before is None:
        return used
    peaks = [each["peak_memory_bytes"] for each in (before, used) if each["peak_memory_bytes"]]
    return {
        **{key: before[key] + used[key] for key in SUMMED},
        "peak_memory_bytes": max(peaks, default=None),
        "nodes": list(dict.fromkeys(before["nodes"] + used["nodes"])),
    }


def events_of(object_id: str) -> list[Event]:
    """The recorded changes of an object, the oldest first."""
    return list(Event.select().where(Event.object_id == object_id).order_by(Event.id))
