"""Reclaim: the bytes that nobody needs any more go, in steps of which each may be the last one before a crash.

1. A deleted artifact past the grace, which nobody may still read (`catalog.needs` has the rule), is claimed: one
   transaction sets `reclaimed_at`. From then on it cannot be restored; its row stays for ever.
2. Its folders are renamed into trash/. What is gone already counts as moved. Killed in between, the next run
   moves the rest: a row says that it was claimed. What killed commands left over goes the same way (`leftovers`).
3. What is no record of a job that has ended goes there, too, and its logs are cut to their ends (`retention`).
4. After a second grace, the trash is emptied.

The bytes of a ready artifact are in none of these steps: only a deleted row is claimed, by a transaction that a
restore cannot overtake. One process at a time; that a second one does no harm does not rest on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

from tfslurm.artifacts import trash
from tfslurm.artifacts.leftovers import Leftover, again, leftovers
from tfslurm.artifacts.retention import Remnant, prune, remnants
from tfslurm.catalog import needs
from tfslurm.catalog.db import write_transaction
from tfslurm.catalog.lifecycle import record
from tfslurm.catalog.models import Artifact, now
from tfslurm.errors import TfslurmError
from tfslurm.faults import fault_point
from tfslurm.files import locked
from tfslurm.identity import current_user
from tfslurm.paths import LOCK, STAGING, Root
from tfslurm.settings import Settings

SEALED_NOW = "it is being sealed"

Action = Literal["reclaim", "trash", "prune", "remove", "keep"]


@dataclass(frozen=True)
class Step:
    """One thing that is done, or that stays, and why."""

    action: Action
    ref: str
    """An artifact's id, or a path below the root."""
    reason: str
    size_bytes: int | None = None
    subject: Artifact | Leftover | Remnant | trash.Entry | None = None


@dataclass
class Summary:
    """What a reclaim came to."""

    ran: bool = True
    """False where another process is at it."""
    steps: list[Step] = field(default_factory=list)
    freed_bytes: int = 0
    """Of what was removed for good."""
    failed: list[str] = field(default_factory=list)
    """What could not be done, with the reason."""


def plan(settings: Settings, *, at: datetime | None = None, stale: str | None = None) -> list[Step]:
    """What a reclaim at the moment `at` would do, and what would stay; changes nothing.

    `stale` says why Slurm could not be asked: what was handed to it is then not known to have ended.
    """
    at = at or now()
    return [
        *_artifacts(settings, at, stale),
        *_leftovers(settings, at),
        *_remnants(settings, at, stale),
        *_trash(settings, at),
    ]


def reclaim(settings: Settings, *, at: datetime | None = None, stale: str | None = None) -> Summary:
    """Do what `plan` says; once more changes nothing, and killed anywhere the next one goes on."""
    at = at or now()
    try:
        with locked(settings.root.path / f"{LOCK}reclaim", wait=False):
            return _execute(settings, plan(settings, at=at, stale=stale), at)
    except BlockingIOError:
        return Summary(ran=False)


def _artifacts(settings: Settings, at: datetime, stale: str | None) -> Iterator[Step]:
    grace = timedelta(days=settings.site.reclaim.grace)
    waiting = Artifact.select().where(Artifact.status == "deleted", Artifact.reclaimed_at.is_null())
    for row in waiting.order_by(Artifact.id):
        due = row.deleted_at + grace
        users = needs.needed_by(row)
        if users:
            unsure = f"; Slurm does not answer: {stale}" if stale else ""
            yield Step("keep", row.id, f"{', '.join(users)}{unsure}", row.size_bytes, row)
        elif at < due:
            yield Step("keep", row.id, f"can be restored until {_said(due)}", row.size_bytes, row)
        else:
            yield Step("reclaim", row.id, f"deleted {_said(row.deleted_at)}, and nobody needs it", row.size_bytes, row)


def _leftovers(settings: Settings, at: datetime) -> Iterator[Step]:
    for found in leftovers(settings):
        ref = str(found.path.relative_to(settings.root.path))
        if at < found.due:
            yield Step("keep", ref, f"{found.reason}; stays until {_said(found.due)}", subject=found)
        else:
            yield Step("trash", ref, found.reason, subject=found)


def _remnants(settings: Settings, at: datetime, stale: str | None) -> Iterator[Step]:
    for found in remnants(settings):
        ref, size = str(found.path.relative_to(settings.root.path)), found.size()
        if stale:
            yield Step("keep", ref, f"{found.reason}; Slurm does not answer: {stale}", size, found)
        elif found.due is None:
            yield Step("keep", ref, found.reason, size, found)
        elif at < found.due:
            yield Step("keep", ref, f"{found.reason}; stays until {_said(found.due)}", size, found)
        else:
            yield Step("prune", ref, found.reason, size, found)


def _trash(settings: Settings, at: datetime) -> Iterator[Step]:
    grace = timedelta(days=settings.site.reclaim.trash_grace)
    for entry in trash.entries(settings.root):
        ref, due = f"trash/{entry.path.name}", entry.since + grace
        if at < due:
            yield Step("keep", ref, f"in the trash until {_said(due)}", subject=entry)
        else:
            yield Step("remove", ref, f"in the trash since {_said(entry.since)}", subject=entry)


def _execute(settings: Settings, steps: list[Step], at: datetime) -> Summary:
    summary = Summary()
    for step in steps:
        try:
            if step.action == "reclaim":
                step = _reclaim(settings.root, step, at)
            elif step.action == "trash":
                refusal = move_away(settings, step.subject, at)
                step = Step("keep", step.ref, refusal, subject=step.subject) if refusal else step
            elif step.action == "prune":
                refusal = prune(settings, step.subject, at)
                step = Step("keep", step.ref, refusal, step.size_bytes, step.subject) if refusal else step
            elif step.action == "remove":
                summary.freed_bytes += trash.remove(step.subject)
        except (TfslurmError, OSError) as error:
            # One folder that cannot be moved must not keep all others.
            summary.failed.append(f"{step.ref}: {error}")
            continue
        summary.steps.append(step)
    return summary


def _reclaim(root: Root, step: Step, at: datetime) -> Step:
    row = step.subject
    try:
        with _held(root.dataset(LOCK + row.id) if row.kind == "dataset" else None):
            refusal = _claim(row, step.reason)
            if refusal:
                return Step("keep", row.id, refusal, row.size_bytes, row)
            fault_point("reclaim-claimed")
            for folder in folders_of(root, row):
                trash.discard(root, folder, at)
    except BlockingIOError:
        return Step("keep", row.id, SEALED_NOW, row.size_bytes, row)
    return step


def _claim(row: Artifact, reason: str) -> str | None:
    """Give the bytes up, if they still may go; else why not."""
    with write_transaction():
        users = needs.needed_by(row)
        if users:
            return ", ".join(users)
        unclaimed = (Artifact.id == row.id) & (Artifact.status == "deleted") & Artifact.reclaimed_at.is_null()
        if not Artifact.update(reclaimed_at=now()).where(unclaimed).execute():
            return "it was restored meanwhile"
        record(row, "reclaimed", actor=current_user(), reason=reason)
        fault_point("reclaim-marked")
    return None


def folders_of(root: Root, row: Artifact) -> tuple[Path, ...]:
    """Every place where an artifact's bytes, or parts of them, may lie."""
    if row.kind == "checkpoint":
        return root.checkpoint(row.id), root.checkpoint(STAGING + row.id)
    return (
        root.dataset(row.id),
        root.assembling(row.id),
        root.dataset(STAGING + row.id),
        root.import_(row.id).folder,
    )


def move_away(settings: Settings, found: Leftover, at: datetime) -> str | None:
    """Move what was left over into the trash, if the rows still say so; else why it stays."""
    try:
        with _held(found.lock):
            judged = again(settings, found)
            if judged is None or at < judged.due:
                return "it is needed by now"
            if found.path != found.lock:  # an unused lock is gone once it was held
                trash.discard(settings.root, found.path, at)
    except BlockingIOError:
        return SEALED_NOW
    return None


def _held(lock: Path | None) -> AbstractContextManager[None]:
    return locked(lock, wait=False) if lock else nullcontext()


def _said(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M")
