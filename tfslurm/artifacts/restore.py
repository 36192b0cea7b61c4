"""Taking a soft deletion back."""

from __future__ import annotations

from pathlib import Path

from tfslurm.artifacts import manifest
from tfslurm.catalog import queries
from tfslurm.catalog.lifecycle import transition
from tfslurm.catalog.models import Artifact, CheckpointStatus, DatasetStatus, Event
from tfslurm.errors import InvalidError, StatusError
from tfslurm.identity import check_name, current_user

STATUSES = {"dataset": DatasetStatus, "checkpoint": CheckpointStatus}


def bring_back(artifact: Artifact, name: str | None = None) -> None:
    """Give a deleted artifact the status that it had; inside write_transaction(). A living one stays as it is.

    With `name` it is called so from now on. Raises StatusError where the name is taken by now, or its bytes were
    given up, or a living one is called otherwise; InvalidError for a name that is not allowed, and where the bytes
    are not there, or not those of its digest. Nothing is changed then.
    """
    name = check_name(name) if name else artifact.name
    if artifact.status != "deleted":
        return _check_called(artifact, name)
    if artifact.reclaimed_at:
        raise StatusError(f"the bytes of {artifact.kind} '{artifact.name}' were reclaimed: it cannot be restored")
    before = STATUSES[artifact.kind](status_before(artifact))
    _check_name(artifact, name)
    _check_bytes(artifact, before)
    reason = "restored" if name == artifact.name else f"restored; it was called '{artifact.name}'"
    return transition(artifact, before, actor=current_user(), reason=reason, deleted_at=None, name=name)


def deleted(kind: str, ref: str) -> str:
    """The id of the newest deleted artifact of this name that still has its bytes; `ref` itself where there is none."""
    named = Artifact.select().where(Artifact.kind == kind, Artifact.name == ref, Artifact.status == "deleted")
    found = named.where(Artifact.reclaimed_at.is_null()).order_by(Artifact.id.desc()).first()
    return found.id if found else ref


def status_before(artifact: Artifact) -> str:
    """The status that a deleted artifact was deleted in."""
    deletions = Event.select().where(Event.object_id == artifact.id, Event.change == "deleted")
    return deletions.order_by(Event.id.desc()).get().from_status


def _check_called(artifact: Artifact, name: str) -> None:
    if artifact.name != name:
        raise StatusError(f"{artifact.kind} '{artifact.name}' is {artifact.status}: only a deleted one gets a new name")


def _check_name(artifact: Artifact, name: str) -> None:
    try:
        queries.check_name_free(Artifact, artifact.kind, name)
    except StatusError as error:
        hint = f"Take another one: tfslurm {artifact.kind} restore {artifact.id} --as NAME"
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
