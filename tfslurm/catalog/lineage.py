"""Which weights, from which run, on which bytes, with which hyperparameters: up and down from any object."""

from __future__ import annotations

from dataclasses import dataclass

from tfslurm.catalog import queries
from tfslurm.catalog.models import BaseModel, Checkpoint, Dataset, Endpoint, Job
from tfslurm.errors import NotFoundError


@dataclass(frozen=True)
class Chain:
    """An object with all that it came from; what doesn't apply is None. Downwards, what came of it."""

    start: str
    endpoint: Endpoint | None
    checkpoint: Checkpoint | None
    job: Job | None
    dataset: Dataset
    validation_dataset: Dataset | None
    base_model: BaseModel | None
    consumers: tuple[Job | Checkpoint | Endpoint, ...]
    """Jobs on a dataset with their checkpoints and endpoints; endpoints of a checkpoint; the nearest first."""


def trace(ref: str) -> Chain:
    """The chain of the object with this id or name.

    A name that several kinds share means the one furthest down: its chain holds the others.
    Raises NotFoundError.
    """
    for find, build in (
        (queries.find_endpoint, of_endpoint),
        (queries.find_checkpoint, of_checkpoint),
        (queries.find_job, of_job),
        (queries.find_dataset, of_dataset),
    ):
        try:
            found = find(ref) if find is queries.find_job else find(ref, deleted=True)
        except NotFoundError:
            continue
        return build(found)
    raise NotFoundError(f"no endpoint, checkpoint, job or dataset '{ref}'")


def of_endpoint(endpoint: Endpoint) -> Chain:
    checkpoint = queries.find_checkpoint(endpoint.checkpoint.artifact_id, deleted=True)
    return _chain("endpoint", checkpoint.job_id, (), endpoint=endpoint, checkpoint=checkpoint)


def of_checkpoint(checkpoint: Checkpoint) -> Chain:
    return _chain("checkpoint", checkpoint.job_id, _served([checkpoint]), checkpoint=checkpoint)


def of_job(job: Job) -> Chain:
    made = _made([job])
    return _chain("job", job.id, (*made, *_served(made)))


def of_dataset(dataset: Dataset) -> Chain:
    jobs = list(queries.jobs().where(queries.reads(dataset.artifact_id)).order_by(Job.id))
    made = _made(jobs)
    return Chain("dataset", None, None, None, dataset, None, None, (*jobs, *made, *_served(made)))


def _chain(
    start: str,
    job_id: str,
    consumers: tuple,
    *,
    endpoint: Endpoint | None = None,
    checkpoint: Checkpoint | None = None,
) -> Chain:
    job = queries.find_job(job_id)
    dataset = queries.find_dataset(job.dataset_id, deleted=True)
    validation = job.validation_dataset_id and queries.find_dataset(job.validation_dataset_id, deleted=True)
    return Chain(start, endpoint, checkpoint, job, dataset, validation, job.base_model, consumers)


def _made(jobs: list[Job]) -> tuple[Checkpoint, ...]:
    return tuple(queries.checkpoints().where(Checkpoint.job.in_(jobs)).order_by(Checkpoint.artifact)) if jobs else ()


def _served(checkpoints: tuple[Checkpoint, ...] | list[Checkpoint]) -> tuple[Endpoint, ...]:
    if not checkpoints:
        return ()
    return tuple(queries.endpoints().where(Endpoint.checkpoint.in_(list(checkpoints))).order_by(Endpoint.id))
