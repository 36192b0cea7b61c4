"""Objects as users and scripts see them: the keys of the JSON output, which stay."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

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
)
from tfslurm.errors import InvalidError
from tfslurm.files import read_json, tail
from tfslurm.paths import Root

View = dict[str, Any]

LOG_LINES = 20
"""How much of a failed run's log its view shows."""


VALIDATED = ("validation_loss", "best_step", "final_validation_loss")
"""Of a completed job that had validation rows: its checkpoint's loss on them, its step, and the last step's loss."""


def time(moment: datetime | None) -> str | None:
    """RFC 3339, in UTC."""
    return None if moment is None else moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def artifact_view(row: Artifact) -> View:
    return {
        "id": row.id,
        "kind": row.kind,
        "name": row.name,
        "status": row.status,
        "size_bytes": row.size_bytes,
        "producer": row.producer,
        "location": row.location,
        "digest": row.digest,
        "owner": row.owner,
        "created_at": time(row.created_at),
        "deleted_at": time(row.deleted_at),
        "reclaimed_at": time(row.reclaimed_at),
    }


def dataset_view(row: Dataset, root: Root) -> View:
    registered = row.artifact
    return {
        "id": registered.id,
        "name": registered.name,
        "kind": "dataset",
        "format": row.format,
        "status": registered.status,
        "location": registered.location,
        "size_bytes": registered.size_bytes,
        "file_count": registered.file_count,
        "row_count": row.row_count,
        "digest": registered.digest,
        "field_map": row.field_map,
        "source": row.source,
        "metadata": row.metadata,
        "owner": registered.owner,
        "created_at": time(registered.created_at),
        "sealed_at": time(registered.sealed_at),
        "deleted_at": time(registered.deleted_at),
        "reclaimed_at": time(registered.reclaimed_at),
        "progress": read_json(root.import_(registered.id).progress) if _importing(row) else None,
        "error": registered.error,
    }


def _importing(row: Dataset) -> bool:
    return row.source is not None and row.artifact.status == "assembling"


def job_view(row: Job, root: Root, submission: Submission | None, usage: View | None = None) -> View:
    """`usage` is what accounting said of all its submissions together.

    Raises InvalidError where the rendered configuration is not the one that was recorded.
    """
    paths = root.job(row.id)
    config = rendered(paths.config, row.config_digest)
    failed = row.status == JobStatus.ERROR
    checkpoint = row.checkpoints.first() if row.status == JobStatus.COMPLETED else None
    return {
        "id": row.id,
        "name": row.name,
        "kind": "job",
        "status": row.status,
        "base_model": row.base_model_id,
        "base_model_revision": row.base_model_revision,
        "dataset": row.dataset_id,
        "validation_dataset": row.validation_dataset_id,
        "hyperparameters": config["hyperparameters"],
        "seed": config["seed"],
        "instance": row.instance,
        "location": str(paths.folder),
        "sweep": row.sweep_id,
        **_slurm(submission),
        "attempt": row.attempt,
        "progress": read_json(paths.progress),
        "checkpoint": checkpoint.artifact_id if checkpoint else None,
        **{key: checkpoint and checkpoint.metadata.get(key) for key in VALIDATED},
        "error": row.error,
        "log_tail": tail(paths.log(row.attempt), LOG_LINES) if failed else None,
        "usage": usage,
        "owner": row.owner,
        "created_at": time(row.created_at),
        "started_at": time(row.started_at),
        "ended_at": time(row.ended_at),
    }


def _slurm(submission: Submission | None) -> View:
    """Where Slurm has it; state and reason only as long as it is there."""
    keys = ("slurm_job_id", "slurm_state", "slurm_reason", "estimated_start", "nodes")
    if submission is None or submission.launcher != "slurm":
        return dict.fromkeys(keys)
    alive = submission.state != SubmissionState.ENDED
    seen = submission.slurm_state, submission.reason or None, time(submission.estimated_start)
    return dict(zip(keys, (submission.job_id, *(seen if alive else (None,) * 3), submission.nodes), strict=True))


def rendered(path: Path, digest: str) -> View:
    """The rendered configuration, if it is the one whose digest the catalog recorded.

    Raises InvalidError naming the file, also where it is missing.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InvalidError(f"{path} is missing", hint="It is the record of what was run: restore it.") from None
    if digest_of(data) != digest:
        raise InvalidError(
            f"{path} was changed after it was rendered", hint=f"Its recorded digest is {digest}: restore it."
        )
    return json.loads(data)


def digest_of(data: bytes) -> str:
    """`sha256:` and the hexadecimal SHA-256."""
    import hashlib  # no listing of datasets needs it

    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def checkpoint_view(row: Checkpoint) -> View:
    registered = row.artifact
    return {
        "id": registered.id,
        "name": registered.name,
        "kind": "checkpoint",
        "status": registered.status,
        "location": registered.location,
        "size_bytes": registered.size_bytes,
        "digest": registered.digest,
        "job": row.job_id,
        "base_model": row.base_model_id,
        "base_model_revision": row.base_model_revision,
        "metadata": row.metadata,
        "owner": registered.owner,
        "created_at": time(registered.created_at),
        "deleted_at": time(registered.deleted_at),
        "reclaimed_at": time(registered.reclaimed_at),
    }


def endpoint_view(row: Endpoint, root: Root, submission: Submission | None) -> View:
    """Raises InvalidError where the rendered configuration is not the one that was recorded."""
    paths = root.endpoint(row.id)
    config = rendered(paths.config, row.config_digest)
    state = read_json(paths.state) or {}
    alive = not EndpointStatus(row.status).ended
    return {
        "id": row.id,
        "name": row.name,
        "kind": "endpoint",
        "status": row.status,
        "health": {key: state.get(key) for key in ("status", "reason", "since", "at", "restarts")} if alive else None,
        "url": row.url,
        "checkpoint": row.checkpoint.artifact_id,
        "base_model": config["base_model"]["name"],
        "instance": row.instance,
        **_slurm(submission),
        "attempt": row.attempt,
        "serving": {key: config[key] for key in ("max_context", "precision", "quantization", "engine_options")},
        "metadata": {"key_file": str(paths.key), "location": str(paths.folder)},
        "error": row.error,
        "log_tail": tail(paths.engine_log, LOG_LINES) if row.status == EndpointStatus.ERROR else None,
        "owner": row.owner,
        "created_at": time(row.created_at),
        "started_at": time(row.started_at),
        "ended_at": time(row.ended_at),
    }


def model_view(row: BaseModel) -> View:
    return {
        "name": row.name,
        "kind": "base_model",
        "revision": row.revision,
        "digest": row.digest,
        "location": row.location,
        "source": row.source,
        "metadata": row.metadata,
        "owner": row.owner,
        "created_at": time(row.created_at),
    }


def event_view(row: Event) -> View:
    return {
        "at": time(row.at),
        "actor": row.actor,
        "kind": row.kind,
        "object_id": row.object_id,
        "change": row.change,
        "from": row.from_status,
        "to": row.to_status,
        "reason": row.reason,
    }
