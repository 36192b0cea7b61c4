"""Taking a soft deletion back."""

from __future__ import annotations

from pathlib import Path

from tfslurm.artifacts import manifest
from tfslurm.catalog import queries
from tfslurm.catalog.lifecycle import transition
from tfslurm.catalog.models import Artifact, CheckpointStatus, DatasetStatus, Event
from tfslurm.errors import InvalidError, StatusError
from tfslurm.identity import current_user

STATUSES = {"dataset": DatasetStatus, "checkpoint": CheckpointStatus}


def bring_back(artifact: Artifact) -> None:
    """Give a deleted artifact the status that it had; inside write_transaction(). A living one stays as it is.

    Raises StatusError where its name is taken by now, or its bytes were given up; InvalidError where they are
    not there, or not those of its digest. Nothing is changed then.
    """
    if artifact.status != "deleted":
        return
    if artifact.reclaimed_at:
        raise StatusError(f"the bytes of {artifact.kind} '{artifact.name}' were reclaimed: it cannot be restored")
    before = STATUSES[artifact.kind](status_before(artifact))
    _check_name(artifact)
    _check_bytes(artifact, before)
    transition(artifact, before, actor=current_user(), reason="restored", deleted_at=None)


def status_before(artifact: Artifact) -> str:
    """The status that a deleted artifact was deleted in."""
    deletions = Event.select().where(Event.object_id == artifact.id, Event.change == "deleted")
    return deletions.order_by(Event.id.desc()).get().from_status


def _check_name(artifact: Artifact) -> None:
    try:
        queries.check_name_free(Artifact, artifact.kind, artifact.name)
    except StatusError as error:
        hint = f"Delete that one first, or import {artifact.location} under another name."
        raise StatusError(error.message, hint=hint) from None


def _check_bytes(artifact: Artifact, before: str) -> None:
    location = Path(artifact.location)
    if before == "assembling" and not location.is_dir():
        raise InvalidError(f"{location} is not there any more: {artifact.kind} '{artifact.name}' cannot be restored")
    if before == "ready":
        check_sealed(artifact)


def check_sealed(artifact: Artifact) -> None:
    """Raises InvalidError unless the folder has the manifest that the row names, and just its files in their sizes."""
    location = Path(artifact.location)
    listed = manifest.read(location)
    if listed.digest != artifact.digest:
        raise InvalidError(f"{location}: its manifest's digest is {listed.digest}, not {artifact.digest} as recorded")
    manifest.check_names(location, listed)
