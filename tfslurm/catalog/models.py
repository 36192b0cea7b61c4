"""The tables."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from peewee import (
    SQL,
    AutoField,
    BigIntegerField,
    CharField,
    DatabaseProxy,
    ForeignKeyField,
    IntegerField,
    Model,
    TextField,
)

database = DatabaseProxy()


class DatasetStatus(StrEnum):
    ASSEMBLING = "assembling"
    READY = "ready"
    ERROR = "error"
    DELETED = "deleted"


class CheckpointStatus(StrEnum):
    READY = "ready"
    DELETED = "deleted"


class JobStatus(StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"
    COMPLETED = "completed"
    ERROR = "error"

    @property
    def ended(self) -> bool:
        return self in (JobStatus.STOPPED, JobStatus.COMPLETED, JobStatus.ERROR)


class EndpointStatus(StrEnum):
    PENDING = "pending"
    STARTING = "starting"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    STOPPING = "stopping"
    STOPPED = "stopped"
    ERROR = "error"
    DELETED = "deleted"

    @property
    def ended(self) -> bool:
        return self in (EndpointStatus.STOPPED, EndpointStatus.ERROR, EndpointStatus.DELETED)


def now() -> datetime:
    """The present, in UTC: every time in the catalog comes from here."""
    return datetime.now(UTC)


class TimeField(BigIntegerField):
    """A moment, stored as microseconds since 1970: the same on every database, and it sorts."""

    def db_value(self, value: datetime | None) -> int | None:
        return None if value is None else round(value.timestamp() * 1_000_000)

    def python_value(self, value: int | None) -> datetime | None:
        return None if value is None else datetime.fromtimestamp(value / 1_000_000, UTC)


class JsonField(TextField):
    """A JSON value; the catalog never searches inside it."""

    def db_value(self, value: Any) -> str | None:
        return None if value is None else json.dumps(value, ensure_ascii=False, sort_keys=True)

    def python_value(self, value: str | None) -> Any:
        return None if value is None else json.loads(value)


class Table(Model):
    class Meta:
        database = database
        legacy_table_names = False


def reference(model: type[Model], **options: Any) -> ForeignKeyField:
    """A foreign key: what is referred to cannot be removed."""
    return ForeignKeyField(model, on_delete="RESTRICT", on_update="RESTRICT", **options)


class Artifact(Table):
    """The registry's row, one for every dataset and every checkpoint."""

    id = CharField(primary_key=True, max_length=32)
    kind = CharField(max_length=16)
    name = CharField(max_length=63)
    status = CharField(max_length=16)
    size_bytes = BigIntegerField(null=True)
    file_count = IntegerField(null=True)
    digest = CharField(max_length=80, null=True)
    location = TextField()
    producer = TextField(null=True)
    owner = TextField()
    error = TextField(null=True)
    created_at = TimeField()
    sealed_at = TimeField(null=True)
    deleted_at = TimeField(null=True)
    reclaimed_at = TimeField(null=True)
    """When a deleted one's bytes were given up: from then on it cannot be restored. Its row stays for ever."""


# A name is free again once what it named is deleted.
Artifact.add_index(
    Artifact.index(Artifact.kind, Artifact.name, unique=True, name="artifact_name").where(SQL("status <> 'deleted'"))
)
Artifact.add_index(Artifact.index(Artifact.kind, Artifact.status, Artifact.id, name="artifact_status"))
Artifact.add_index(Artifact.index(Artifact.kind, Artifact.id, name="artifact_kind"))
Artifact.add_index(Artifact.index(Artifact.kind, Artifact.owner, Artifact.id, name="artifact_owner"))


class Dataset(Table):
    """What only datasets have."""

    artifact = reference(Artifact, primary_key=True)
    format = CharField(max_length=16)
    field_map = JsonField(default=dict)
    source = TextField(null=True)
    row_count = BigIntegerField(null=True)
    metadata = JsonField(default=dict)


Dataset.add_index(Dataset.index(Dataset.format, Dataset.artifact, name="dataset_format"))


class BaseModel(Table):
    """The allow-list of base models."""

    name = CharField(primary_key=True, max_length=63)
    revision = CharField(max_length=80)
    digest = CharField(max_length=80)
    location = TextField()
    source = TextField()
    metadata = JsonField(default=dict)
    owner = TextField()
    created_at = TimeField()


class Sweep(Table):
    """Jobs that were started together over a grid; what differs between them stands in their configurations."""

    id = CharField(primary_key=True, max_length=32)
    name = CharField(max_length=63, unique=True)
    grid = JsonField()
    """The values of each hyperparameter that varies, in the order given: `[[name, [value, …]], …]`."""
    max_parallel = IntegerField(null=True)
    owner = TextField()
    created_at = TimeField()


class Job(Table):
    """A fine-tuning job; its hyperparameters stand in its rendered configuration alone."""

    id = CharField(primary_key=True, max_length=32)
    name = CharField(max_length=63, unique=True)
    status = CharField(max_length=16, index=True)
    base_model = reference(BaseModel, column_name="base_model")
    base_model_revision = CharField(max_length=80)
    dataset = reference(Dataset, backref="jobs")
    validation_dataset = reference(Dataset, null=True, backref="validated_jobs")
    instance = CharField(max_length=63)
    config_digest = CharField(max_length=80)
    attempt = IntegerField(default=0)
    sweep = reference(Sweep, null=True, backref="jobs")
    error = TextField(null=True)
    owner = TextField()
    created_at = TimeField()
    started_at = TimeField(null=True)
    ended_at = TimeField(null=True)


class Checkpoint(Table):
    """What only checkpoints have."""

    artifact = reference(Artifact, primary_key=True)
    job = reference(Job, unique=True, backref="checkpoints")
    base_model = reference(BaseModel, column_name="base_model")
    base_model_revision = CharField(max_length=80)
    metadata = JsonField(default=dict)


class Endpoint(Table):
    """An inference endpoint."""

    id = CharField(primary_key=True, max_length=32)
    name = CharField(max_length=63)
    status = CharField(max_length=16, index=True)
    url = TextField(null=True)
    checkpoint = reference(Checkpoint, backref="endpoints")
    instance = CharField(max_length=63)
    config_digest = CharField(max_length=80)
    attempt = IntegerField(default=0)
    error = TextField(null=True)
    owner = TextField()
    created_at = TimeField()
    started_at = TimeField(null=True)
    ended_at = TimeField(null=True)


Endpoint.add_index(Endpoint.index(Endpoint.name, unique=True, name="endpoint_name").where(SQL("status <> 'deleted'")))


class SubmissionState(StrEnum):
    SUBMITTING = "submitting"
    SUBMITTED = "submitted"
    ENDED = "ended"


class Submission(Table):
    """One thing handed to Slurm or to the local launcher; the row is written before it is handed over."""

    uuid = CharField(primary_key=True, max_length=36)
    name = CharField(max_length=36)
    """What Slurm calls it: its own uuid, or that of the array whose task it is."""
    kind = CharField(max_length=16)
    object_id = CharField(max_length=32)
    state = CharField(max_length=16)
    launcher = CharField(max_length=16)
    cluster = TextField(null=True)
    job_id = CharField(max_length=64, null=True)
    """Slurm's id, `123`, or `123_4` for an array's task; the process's handle where there is no Slurm."""
    array_index = IntegerField(null=True)
    attempt = IntegerField(default=0)
    """The number of its first attempt: a restart by Slurm itself adds one."""
    slurm_state = CharField(max_length=32, null=True)
    reason = TextField(null=True)
    nodes = TextField(null=True)
    """Where it runs, or ran last, as Slurm writes it: n[1-2]."""
    exclude = JsonField(default=list)
    """The nodes that failed under an earlier attempt: this one must not get them."""
    estimated_start = TimeField(null=True)
    usage = JsonField(null=True)
    """What accounting says once it has ended; see slurm.usage."""
    created_at = TimeField()
    submitted_at = TimeField(null=True)
    ended_at = TimeField(null=True)


Submission.add_index(Submission.index(Submission.state, Submission.kind, name="submission_state"))
Submission.add_index(Submission.index(Submission.name, name="submission_name"))
Submission.add_index(Submission.index(Submission.object_id, Submission.created_at, name="submission_object"))


class Mount(Table):
    """A read-only view of a dataset in somebody's workspace: a consumer as long as it lasts."""

    id = AutoField()
    artifact = reference(Artifact, backref="mounts")
    path = TextField()
    how = CharField(max_length=16)
    host = TextField()
    process = CharField(max_length=32, null=True)
    owner = TextField()
    created_at = TimeField()
    ended_at = TimeField(null=True)


class Event(Table):
    """One recorded change; rows are only ever added."""

    id = AutoField()
    at = TimeField()
    actor = TextField()
    kind = CharField(max_length=16)
    object_id = CharField(max_length=63, index=True)
    change = CharField(max_length=32)
    from_status = CharField(max_length=16, null=True)
    to_status = CharField(max_length=16, null=True)
    reason = TextField(null=True)


class Lease(Table):
    """Held by the one process that may do a thing; it runs out by itself."""

    name = CharField(primary_key=True, max_length=63)
    holder = TextField()
    renewed_at = TimeField()
    expires_at = TimeField()


TABLES = (Artifact, Dataset, BaseModel, Sweep, Job, Checkpoint, Endpoint, Submission, Mount, Event, Lease)
