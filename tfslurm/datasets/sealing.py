"""Sealing: from what somebody assembled to bytes that never change."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from tfslurm.artifacts.manifest import Manifest
from tfslurm.artifacts.publish import publish, remove_tree
from tfslurm.catalog import queries
from tfslurm.catalog.db import write_transaction
from tfslurm.catalog.lifecycle import transition
from tfslurm.catalog.models import Dataset, DatasetStatus, now
from tfslurm.datasets.ingest import ingest
from tfslurm.errors import StatusError
from tfslurm.faults import fault_point
from tfslurm.files import locked
from tfslurm.identity import current_user
from tfslurm.paths import LOCK, STAGING, Root
from tfslurm.settings import Settings

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""


def seal(settings: Settings, dataset: Dataset, progress: Progress | None = None) -> Dataset:
    """Copy, hash and validate what was assembled, publish the copy, and only then call it ready.

    Sealing a ready dataset changes nothing. Raises StatusError where it is neither assembling nor ready, or is
    being imported; ValidationError with the report where rows or files are wrong: it stays assembling, as it was.
    """
    with lock(settings.root, dataset.artifact_id):
        dataset = queries.find_dataset(dataset.artifact_id, deleted=True)
        if dataset.artifact.status == DatasetStatus.READY:
            return dataset
        _check_assembling(dataset)
        source = settings.root.assembling(dataset.artifact_id)
        staging = staging_of(settings.root, dataset.artifact_id)
        ingested = ingest(source, staging, format=dataset.format, field_map=dataset.field_map, progress=progress)
        publish(staging, cleared(settings.root.dataset(dataset.artifact_id)))
        fault_point("seal-published")
        with write_transaction():
            make_ready(settings.root, dataset, ingested.manifest, ingested.report.to_dict(), current_user())
            fault_point("seal-marked")
        fault_point("seal-ready")
    remove_tree(source)
    return dataset


def _check_assembling(dataset: Dataset) -> None:
    if dataset.artifact.status != DatasetStatus.ASSEMBLING:
        raise StatusError(f"dataset '{dataset.artifact.name}' is {dataset.artifact.status}: it cannot be sealed")
    if dataset.source is not None:
        raise StatusError(
            f"dataset '{dataset.artifact.name}' is being imported: it seals itself when the copy is complete"
        )


def make_ready(root: Root, dataset: Dataset, manifest: Manifest, report: dict, actor: str) -> None:
    transition(
        dataset.artifact,
        DatasetStatus.READY,
        actor=actor,
        size_bytes=manifest.size,
        file_count=len(manifest.entries),
        digest=manifest.digest,
        location=str(root.dataset(dataset.artifact_id)),
        sealed_at=now(),
    )
    dataset.row_count, dataset.metadata = report["rows"], report
    dataset.save(only=["row_count", "metadata"])


def staging_of(root: Root, dataset_id: str) -> Path:
    """Where the copy grows: beside the canonical one, so that publishing is a rename."""
    return root.dataset(STAGING + dataset_id)


def cleared(final: Path) -> Path:
    """`final`, without what a sealing that was killed before its row was ready left there; hold the lock."""
    if final.exists():
        remove_tree(final)
    return final


def lock(root: Root, dataset_id: str) -> AbstractContextManager[None]:
    """One sealing of a dataset at a time."""
    return locked(root.dataset(LOCK + dataset_id))
