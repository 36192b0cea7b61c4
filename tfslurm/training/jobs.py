"""Fine-tuning jobs: planned, created, stopped."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from tfslurm.artifacts.publish import remove_tree
from tfslurm.artifacts.references import BaseModelRef, DatasetRef
from tfslurm.catalog import queries
from tfslurm.catalog.db import write_transaction
from tfslurm.catalog.lifecycle import record, transition
from tfslurm.catalog.models import BaseModel, Dataset, DatasetStatus, Job, JobStatus, Submission, now
from tfslurm.catalog.views import digest_of
from tfslurm.errors import InvalidError, StatusError
from tfslurm.files import write_atomic
from tfslurm.identity import check_name, current_user, new_id
from tfslurm.settings import HyperparameterRanges, Instance, ModelSettings, Settings
from tfslurm.slurm import submissions
from tfslurm.slurm.client import Slurm, SlurmUnreachable
from tfslurm.training.config import Hyperparameters, Processes, Trackers, TrainingConfig
from tfslurm.training.deepspeed_config import deepspeed_config
from tfslurm.training.hyperparameters import resolve
from tfslurm.training.memory import Choice, choose


@dataclass(frozen=True)
class Request:
    """What a user asks for."""

    model: str
    dataset: str
    hyperparameters: Mapping[str, float | None] = field(default_factory=dict)
    instance: str | None = None
    name: str | None = None
    seed: int = 0
    validation_dataset: str | None = None


@dataclass(frozen=True)
class Plan:
    """Everything that a job would be made of; making one changes nothing."""

    config: TrainingConfig
    deepspeed: dict
    instance: Instance
    memory: Choice
    uuid: str
    script: str


@dataclass(frozen=True)
class Ground:
    """What a request stands on, whatever its numbers: the same for every cell of a sweep."""

    model: BaseModel
    dataset: Dataset
    ranges: HyperparameterRanges
    memory: Choice
    validation: Dataset | None = None

    @property
    def instance(self) -> Instance:
        return self.memory.instance

    def name_for(self, object_id: str) -> str:
        """The name of what is given none."""
        return f"{self.dataset.artifact.name[:46]}-{object_id[-8:]}"

    def resolve(self, given: Mapping[str, float | None]) -> Hyperparameters:
        """Raises InvalidError naming what is out of range."""
        return resolve(given, self.ranges, longest=self.model.metadata.get("max_position_embeddings"))

    def configure(
        self, settings: Settings, job_id: str, name: str, hyperparameters: Hyperparameters, seed: int
    ) -> TrainingConfig:
        instance = self.instance
        return TrainingConfig(
            job_id=job_id,
            name=name,
            base_model=BaseModelRef.of(self.model),
            dataset=DatasetRef.of(self.dataset),
            validation_dataset=DatasetRef.of(self.validation) if self.validation else None,
            hyperparameters=hyperparameters,
            seed=seed,
            processes=Processes(
                nodes=instance.nodes, per_node=instance.processes_per_node, threads=instance.cpus_per_process
            ),
            trainer=settings.site.training.trainer,
            trackers=Trackers.of(settings.site.training),
            tokens=str(settings.root.tokens),
        )


def ground(settings: Settings, request: Request, largest: Mapping[str, float] = {}) -> Ground:
    """Look up what the request names, and whether it goes together.

    `largest` are the largest values of what varies in a sweep: the instance must do for all its cells.
    Raises NotFoundError for an unknown model, dataset or instance, StatusError for a dataset that is not ready,
    InvalidError for a dataset that the model cannot be trained on, and for hyperparameters out of range.
    """
    model = queries.find_model(request.model)
    allowed = settings.model(model.name)
    dataset, validation = _trainable(model, allowed, request.dataset), None
    if request.validation_dataset:
        validation = _trainable(model, allowed, request.validation_dataset)
        if validation == dataset:
            raise InvalidError(
                f"dataset '{dataset.artifact.name}' is to be trained on and validated on",
                hint="A loss on rows that were trained on tells nothing: keep some in a dataset of their own.",
            )
    wanted, longest = {**request.hyperparameters, **largest}, model.metadata.get("max_position_embeddings")
    hyperparameters = resolve(wanted, allowed.hyperparameters, longest=longest)
    name = request.instance or settings.site.training.instance
    choice = choose(settings, name, Path(model.location), hyperparameters)
    return Ground(model, dataset, allowed.hyperparameters, choice, validation)


def _trainable(model: BaseModel, allowed: ModelSettings, ref: str) -> Dataset:
    """The dataset, if the model can read it. Raises NotFoundError, StatusError, InvalidError."""
    dataset = ready(ref)
    if dataset.format not in allowed.formats:
        raise InvalidError(f"base model '{model.name}' is not for {dataset.format} datasets")
    _check_vocabulary(model, dataset)
    return dataset


def _check_vocabulary(model: BaseModel, dataset: Dataset) -> None:
    """Ids of a pretokenized dataset index the model's embeddings: beyond their end training can only crash."""
    largest = dataset.metadata.get("statistics", {}).get("max_token_id")
    size = model.metadata.get("vocabulary_size")
    if largest is not None and size is not None and largest >= size:
        raise InvalidError(
            f"dataset '{dataset.artifact.name}' has the token id {largest}, and base model '{model.name}' "
            f"only knows 0 to {size - 1}",
            hint="It was tokenized for another model: tokenize it anew, or choose that model.",
        )


def plan(settings: Settings, request: Request) -> Plan:
    """Render the whole job. Raises what `ground` raises."""
    on, job_id = ground(settings, request), new_id("job")
    name = check_name(request.name) if request.name else on.name_for(job_id)
    config = on.configure(settings, job_id, name, on.resolve(request.hyperparameters), request.seed)
    uuid, script = submissions.script_for(settings, "train", on.instance, settings.root.job(job_id), "job", job_id)
    return Plan(config, deepspeed_config(config), on.instance, on.memory, uuid, script)


def estimate(settings: Settings, instance: Instance, script: str) -> str | None:
    """When and where Slurm would start the script; None on an instance without Slurm.

    Raises SlurmRefused with its own words where it would not, SlurmUnreachable where it does not answer.
    """
    if instance.launcher != "slurm":
        return None
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script)
        file.flush()
        return Slurm(settings.site.slurm.command_timeout).test(Path(file.name))


def preflight(settings: Settings, instance: Instance, script: str) -> None:
    """Let Slurm refuse the script before anything is written: raises SlurmRefused.

    Where it does not answer nothing is known: what is written then is submitted by `sync`.
    """
    with suppress(SlurmUnreachable):
        estimate(settings, instance, script)


def ready(ref: str) -> Dataset:
    """The dataset, if a job may read it. Raises NotFoundError, StatusError."""
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

    Raises StatusError where the name is taken or the dataset no longer ready, SlurmRefused where Slurm would not
    take it: nothing is left then. Where Slurm refuses it after all, SlurmRefused with the job in error; where it
    does not answer, SlurmUnreachable with the job pending: `sync` submits it.
    """
    preflight(settings, made.instance, made.script)
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


def deepspeed_text(config: TrainingConfig) -> bytes:
    """The DeepSpeed configuration as it is written."""
    return msgspec.json.format(msgspec.json.encode(deepspeed_config(config)), indent=2) + b"\n"


def _write(settings: Settings, made: Plan) -> None:
    paths = settings.root.job(made.config.job_id)
    paths.logs.mkdir(parents=True)
    write_atomic(paths.config, made.config.encode(), mode=0o444)
    write_atomic(paths.deepspeed, deepspeed_text(made.config), mode=0o444)
    write_atomic(paths.script, made.script, mode=0o555)


def _insert(made: Plan) -> tuple[Job, Submission]:
    config = made.config
    # The job's row is what keeps the datasets from being deleted: both are decided under one lock.
    dataset = ready(config.dataset.id)
    validation = config.validation_dataset and ready(config.validation_dataset.id)
    queries.check_name_free(Job, "job", config.name)
    job = Job.create(
        id=config.job_id,
        name=config.name,
        status=JobStatus.PENDING.value,
        base_model=config.base_model.name,
        base_model_revision=config.base_model.revision,
        dataset=dataset,
        validation_dataset=validation,
        instance=made.instance.name,
        config_digest=digest_of(config.encode()),
        owner=current_user(),
        created_at=now(),
    )
    record(job, "created", actor=current_user(), after=JobStatus.PENDING)
    return job, submissions.record(made.uuid, made.instance, "job", job.id)
