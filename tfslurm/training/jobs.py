"""Fine-tuning jobs: planned, created, stopped."""

from __future__ import annotations

import json
import signal
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tfslurm.artifacts.publish import remove_tree
from tfslurm.artifacts.references import BaseModelRef, DatasetRef
from tfslurm.catalog import queries
from tfslurm.catalog.db import write_transaction
from tfslurm.catalog.lifecycle import record, transition
from tfslurm.catalog.models import Dataset, DatasetStatus, Job, JobStatus, Submission, now
from tfslurm.catalog.views import digest_of
from tfslurm.errors import InvalidError, StatusError
from tfslurm.files import write_atomic
from tfslurm.identity import check_name, current_user, new_id
from tfslurm.settings import Instance, Settings
from tfslurm.slurm import local, submissions
from tfslurm.slurm.client import Slurm
from tfslurm.training.config import Processes, TrainingConfig
from tfslurm.training.deepspeed_config import deepspeed_config
from tfslurm.training.hyperparameters import resolve


@dataclass(frozen=True)
class Request:
    """What a user asks for."""

    model: str
    dataset: str
    hyperparameters: Mapping[str, float | None] = field(default_factory=dict)
    instance: str | None = None
    name: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Plan:
    """Everything that a job would be made of; making one changes nothing."""

    config: TrainingConfig
    deepspeed: dict
    instance: Instance
    uuid: str
    script: str


def plan(settings: Settings, request: Request) -> Plan:
    """Render the whole job.

    Raises NotFoundError for an unknown model, dataset or instance, StatusError for a dataset that is not ready,
    InvalidError for hyperparameters out of range or a format that the model is not for.
    """
    model, dataset = queries.find_model(request.model), _ready(request.dataset)
    allowed = settings.model(model.name)
    if dataset.format not in allowed.formats:
        raise InvalidError(f"base model '{model.name}' is not for {dataset.format} datasets")
    instance = settings.instance(request.instance or settings.site.training.instance, "training")
    job_id = new_id("job")
    config = TrainingConfig(
        job_id=job_id,
        name=check_name(request.name) if request.name else f"{dataset.artifact.name[:46]}-{job_id[-8:]}",
        base_model=BaseModelRef.of(model),
        dataset=DatasetRef.of(dataset),
        hyperparameters=resolve(
            request.hyperparameters, allowed.hyperparameters, longest=model.metadata.get("max_position_embeddings")
        ),
        seed=request.seed,
        processes=Processes(
            nodes=instance.nodes, per_node=instance.processes_per_node, threads=instance.cpus_per_process
        ),
        trainer=settings.site.training.trainer,
        tokens=str(settings.root.tokens),
    )
    uuid, script = submissions.script_for(settings, "train", instance, settings.root.job(job_id), "job", job_id)
    return Plan(config, deepspeed_config(config), instance, uuid, script)


def estimate(settings: Settings, made: Plan) -> str:
    """When and where Slurm would start the job. Raises SlurmRefused with its own words where it would not."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(made.script)
        file.flush()
        return Slurm(settings.site.slurm.command_timeout).test(Path(file.name))


def _ready(ref: str) -> Dataset:
    dataset = queries.find_dataset(ref)
    if dataset.artifact.status != DatasetStatus.READY:
        raise StatusError(
            f"dataset '{dataset.artifact.name}' is {dataset.artifact.status}, not ready",
            hint=f"Seal it first: tfslurm dataset seal {dataset.artifact.name}"
            if dataset.artifact.status == DatasetStatus.ASSEMBLING and dataset.source is None
            else None,
        )
    return dataset


def create(settings: Settings, made: Plan) -> Job:
    """Write what was planned, register the job and submit it.

    Raises StatusError where the name is taken or the dataset no longer ready: nothing is left then; SlurmRefused
    with the job in error; SlurmUnreachable with the job pending: `sync` submits it.
    """
    paths = settings.root.job(made.config.job_id)
    _write(settings, made)
    try:
        with write_transaction():
            job, submission = _insert(made)
    except BaseException:
        remove_tree(paths.folder)
        raise
    submissions.hand_over(settings, submission, paths.script, lambda reason: _refuse(job, reason))
    return job


def _refuse(job: Job, reason: str) -> None:
    transition(job, JobStatus.ERROR, actor=current_user(), reason=reason, error=reason, ended_at=now())


def _write(settings: Settings, made: Plan) -> None:
    paths = settings.root.job(made.config.job_id)
    paths.logs.mkdir(parents=True)
    write_atomic(paths.config, made.config.encode(), mode=0o444)
    write_atomic(paths.deepspeed, json.dumps(made.deepspeed, indent=2) + "\n", mode=0o444)
    write_atomic(paths.script, made.script, mode=0o555)


def _insert(made: Plan) -> tuple[Job, Submission]:
    config = made.config
    # The job's row is what keeps the dataset from being deleted: both are decided under one lock.
    dataset = _ready(config.dataset.id)
    queries.check_name_free(Job, "job", config.name)
    job = Job.create(
        id=config.job_id,
        name=config.name,
        status=JobStatus.PENDING.value,
        base_model=config.base_model.name,
        base_model_revision=config.base_model.revision,
        dataset=dataset,
        instance=made.instance.name,
        config_digest=digest_of(config.encode()),
        owner=current_user(),
        created_at=now(),
    )
    record(job, "created", actor=current_user(), after=JobStatus.PENDING)
    return job, submissions.record(made.uuid, made.instance, "job", job.id)


def stop(settings: Settings, job: Job) -> Job:
    """Ask the job to leave: a waiting one is cancelled at once, a running one at its next step boundary.

    A second stop kills. Raises StatusError where it has ended already.
    """
    if JobStatus(job.status).ended:
        raise StatusError(f"job '{job.name}' has ended already: it is {job.status}")
    again, waiting = job.status == JobStatus.STOPPING, job.status == JobStatus.PENDING
    if not again:
        with write_transaction():
            transition(job, JobStatus.STOPPING, actor=current_user(), reason="stop requested")
    settings.root.job(job.id).stop.touch()
    submission = queries.submissions_of([job.id]).get(job.id)
    if submission and submission.job_id and (again or waiting):
        kill(settings, submission)
    return job


def kill(settings: Settings, submission: Submission) -> None:
    """End what was submitted, now. Raises SlurmUnreachable."""
    if submission.launcher == "local":
        local.end(submission.job_id, signal.SIGKILL)
    else:
        Slurm(settings.site.slurm.command_timeout).cancel(submission.job_id)
