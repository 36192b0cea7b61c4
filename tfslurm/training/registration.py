"""From a job's adapter to a registered checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tfslurm.artifacts import manifest
from tfslurm.artifacts.manifest import Manifest
from tfslurm.artifacts.publish import publish, remove_tree
from tfslurm.catalog import queries
from tfslurm.catalog.db import write_transaction
from tfslurm.catalog.lifecycle import record, transition
from tfslurm.catalog.models import Artifact, Checkpoint, CheckpointStatus, Job, JobStatus, Submission, now
from tfslurm.errors import InvalidError
from tfslurm.faults import fault_point
from tfslurm.files import write_json
from tfslurm.identity import checkpoint_id
from tfslurm.paths import STAGING, JobPaths
from tfslurm.settings import Settings
from tfslurm.slurm.submissions import note_ended
from tfslurm.training.config import TrainingConfig
from tfslurm.training.outcome import Succeeded

METADATA = "checkpoint.json"
"""What serving needs to know, inside the checkpoint's folder."""


def register(settings: Settings, job: Job, submission: Submission, outcome: Succeeded, actor: str) -> None:
    """Publish the adapter, insert its row and complete the job, the last two in one transaction.

    Killed anywhere and called again it ends the same: the checkpoint's id follows from the job's.
    Raises InvalidError naming the file where the adapter is not the one that the trainer verified.
    """
    paths, name = settings.root.job(job.id), checkpoint_id(job.id)
    final = settings.root.checkpoint(name)
    metadata = _metadata(TrainingConfig.read(paths.config), outcome)
    if not final.exists():
        _publish(paths, settings.root.checkpoint(STAGING + name), final, metadata, outcome)
    content = manifest.read(final)
    fault_point("register-published")
    with write_transaction():
        _insert(job, name, content, final, metadata, actor)
        transition(job, JobStatus.COMPLETED, actor=actor, ended_at=now())
        note_ended(submission)
        fault_point("register-marked")
    fault_point("register-ready")


def _metadata(config: TrainingConfig, outcome: Succeeded) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    return {
        "job": config.job_id,
        "base_model": config.base_model.name,
        "base_model_revision": config.base_model.revision,
        "base_model_digest": config.base_model.digest,
        "dataset": config.dataset.id,
        "dataset_digest": config.dataset.digest,
        "max_seq_length": config.hyperparameters.max_seq_length,
        "lora_rank": outcome.adapter.lora_rank,
        "target_modules": outcome.adapter.target_modules,
        "steps": outcome.steps,
        "examples": outcome.examples,
        "tokens": outcome.tokens,
        "final_loss": outcome.final_loss,
        "validation_dataset": config.validation_dataset and config.validation_dataset.id,
        "validation_dataset_digest": config.validation_dataset and config.validation_dataset.digest,
        "validation_loss": outcome.validation_loss,
        "best_step": outcome.best_step,
        "final_validation_loss": outcome.final_validation_loss,
    }


def _publish(paths: JobPaths, staging: Path, final: Path, metadata: dict, outcome: Succeeded) -> None:
    if not paths.adapter.is_dir():
        raise InvalidError(f"{paths.adapter} is missing, though the training succeeded")
    if staging.exists():
        remove_tree(staging)
    shutil.copytree(paths.adapter, staging)
    fault_point("register-copied")
    write_json(staging / METADATA, metadata)
    content = manifest.build(staging)
    _check_copied(content, outcome, paths.adapter)
    manifest.write(content, staging)
    publish(staging, final)


def _check_copied(content: Manifest, outcome: Succeeded, source: Path) -> None:
    copied = {entry.path: entry.sha256 for entry in content.entries if entry.path != METADATA}
    verified = {path: file.sha256 for path, file in outcome.adapter.files.items()}
    wrong = sorted(path for path in copied.keys() | verified.keys() if copied.get(path) != verified.get(path))
    if wrong:
        raise InvalidError(f"{source / wrong[0]} is not the file that the trainer verified")


def _insert(job: Job, name: str, content: Manifest, final: Path, metadata: dict, actor: str) -> None:
    registered = Artifact.create(
        id=name,
        kind="checkpoint",
        name=_free_name(job),
        status=CheckpointStatus.READY.value,
        size_bytes=content.size,
        file_count=len(content.entries),
        digest=content.digest,
        location=str(final),
        producer=job.id,
        owner=job.owner,
        created_at=now(),
        sealed_at=now(),
    )
    Checkpoint.create(
        artifact=registered,
        job=job,
        base_model=job.base_model_id,
        base_model_revision=job.base_model_revision,
        metadata=metadata,
    )
    record(registered, "registered", actor=actor, reason=f"by job {job.id}", after=CheckpointStatus.READY)


def _free_name(job: Job) -> str:
    """The job's own name: those are unique for ever, and only jobs make checkpoints."""
    queries.check_name_free(Artifact, "checkpoint", job.name)
    return job.name
