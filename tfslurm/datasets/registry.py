"""Datasets in the catalog: created, deleted, and restored."""

from __future__ import annotations

from pathlib import Path

from tfslurm.artifacts.restore import bring_back
from tfslurm.catalog import queries
from tfslurm.catalog.db import write_transaction
from tfslurm.catalog.lifecycle import record, transition
from tfslurm.catalog.models import Artifact, Dataset, DatasetStatus, Submission, SubmissionState, now
from tfslurm.datasets import mounts
from tfslurm.datasets.formats import Format, as_format, check_field_map
from tfslurm.errors import StatusError
from tfslurm.faults import fault_point
from tfslurm.identity import check_name, current_user, new_id
from tfslurm.settings import Settings


def create(settings: Settings, name: str, format: str, field_map: dict[str, str]) -> Dataset:
    """Register an assembling dataset and make its writable folder.

    Raises InvalidError for the name, format or map, StatusError where the name is taken; nothing is changed then.
    """
    kind = checked(name, format, field_map)
    dataset_id = new_id("dataset")
    folder = settings.root.assembling(dataset_id)
    folder.mkdir()
    fault_point("create-reserved")
    try:
        with write_transaction():
            return insert(dataset_id, name, kind, field_map, folder)
    except BaseException:
        folder.rmdir()
        raise


def checked(name: str, format: str, field_map: dict[str, str]) -> Format:
    """The format, if a dataset may be called and made so. Raises InvalidError."""
    check_name(name)
    kind = as_format(name=format)
    check_field_map(kind, field_map)
    return kind


def insert(
    dataset_id: str, name: str, format: str, field_map: dict[str, str], folder: Path, source: str | None = None
) -> Dataset:
    """The rows and the event of a new dataset, inside write_transaction(); with a `source`, one that is imported.

    Raises StatusError where the name is taken.
    """
    queries.check_name_free(Artifact, "dataset", name)
    registered = Artifact.create(
        id=dataset_id,
        kind="dataset",
        name=name,
        status=DatasetStatus.ASSEMBLING.value,
        location=str(folder),
        producer=f"import from {source}" if source else f"assembled by {current_user()}",
        owner=current_user(),
        created_at=now(),
    )
    dataset = Dataset.create(artifact=registered, format=format, field_map=field_map, source=source)
    record(registered, "created", actor=current_user(), after=DatasetStatus.ASSEMBLING)
    return dataset


def delete(dataset: Dataset) -> Dataset:
    """Soft-delete: hidden from listings at once; the bytes are reclaimed later.

    Raises StatusError naming the consumers while there are any.
    """
    with write_transaction():
        dataset = queries.find_dataset(dataset.artifact_id, deleted=True)
        if dataset.artifact.status == DatasetStatus.DELETED:
            return dataset
        _check_unused(dataset)
        transition(dataset.artifact, DatasetStatus.DELETED, actor=current_user(), deleted_at=now())
        fault_point("delete-marked")
    fault_point("deleted")
    return dataset


def restore(dataset: Dataset, name: str | None = None) -> Dataset:
    """Take a deletion back: the dataset is again what it was, called `name` if given. One not deleted stays as it is.

    Raises StatusError where the name is taken by now or its bytes were reclaimed, InvalidError for the name, and where
    they are missing or others; nothing is changed then.
    """
    with write_transaction():
        dataset = queries.find_dataset(dataset.artifact_id, deleted=True)
        bring_back(dataset.artifact, name)
        fault_point("restore-marked")
    return dataset


def _check_unused(dataset: Dataset) -> None:
    name = dataset.artifact.name
    users = [f"job '{job.name}' ({job.status})" for job in queries.consumers_of_dataset(dataset.artifact_id)]
    users += mounts.lasting(dataset.artifact_id)
    if users:
        hint = "Wait for jobs or stop them; unmount what is mounted."
        raise StatusError(f"dataset '{name}' is in use: {', '.join(users)}", hint=hint)
    importing = Submission.select().where(
        Submission.object_id == dataset.artifact_id, Submission.state != SubmissionState.ENDED
    )
    if importing.exists():
        raise StatusError(f"dataset '{name}' is being imported", hint="Wait until it is ready or in error.")
