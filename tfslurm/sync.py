"""Sync: what happened to everything alive is folded into the catalog.

It may run at any time, anywhere, twice, late, or be killed halfway: the next one ends the same.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from tfslurm.catalog import queries
from tfslurm.catalog.db import write_transaction
from tfslurm.catalog.leases import lease
from tfslurm.catalog.models import Submission, SubmissionState, Table, now
from tfslurm.datasets import importing
from tfslurm.errors import InvalidError, NotFoundError, StatusError, TfslurmError, UnreachableError
from tfslurm.serving import following as serving
from tfslurm.settings import Settings
from tfslurm.slurm.adoption import adopt
from tfslurm.slurm.client import Slurm
from tfslurm.slurm.observe import UNKNOWN, Observation, observe
from tfslurm.slurm.submissions import note_seen_all
from tfslurm.slurm.usage import usage
from tfslurm.training import following as training

LEASE = 600.0
"""Seconds after which another process may take over from one that was killed."""

ACCOUNTED = 600.0
"""Seconds after an end until which accounting is asked what was used."""

Follow = Callable[[Settings, Table, Submission, Observation], bool]

FOLLOW: dict[str, Follow] = {"job": training.follow, "endpoint": serving.follow, "import": importing.follow}
"""Moves an object to where its run is; whether the run goes on as before."""


@dataclass
class Summary:
    """What a sync came to."""

    alive: int = 0
    ran: bool = True
    """False where another process is at it, or was a moment ago."""
    stale: str | None = None
    """Why Slurm could not be asked: the catalog is then as old as the last sync."""
    failed: list[str] = field(default_factory=list)
    """What could not be folded in, with the reason."""
    at: datetime = field(default_factory=now)


def sync(settings: Settings, *, floor: float = 0.0, patience: float | None = None) -> Summary:
    """Look at everything alive, unless another process is at it or did so within `floor` seconds.

    `patience` is how many seconds Slurm gets to say what it knows, where that is less than the site's limit.
    """
    if not queries.launchers_alive() and not queries.unaccounted():
        return Summary()
    with lease("sync", seconds=LEASE, floor=floor) as taken:
        alive = queries.submissions_alive()
        if not taken:
            return Summary(len(alive), ran=False)
        return _fold(settings, alive, Slurm(settings.site.slurm.command_timeout, patience))


def refresh(settings: Settings) -> Summary:
    """`sync` before a listing: Slurm is asked no more often than the site's poll floor allows, and not for long."""
    site = settings.site.slurm
    floor = site.poll_floor if "slurm" in queries.launchers_alive() else 0.0
    return sync(settings, floor=floor, patience=site.listing_timeout)


def _fold(settings: Settings, alive: list[Submission], slurm: Slurm) -> Summary:
    summary = Summary(len(alive))
    seen = _look(settings, alive, slurm, summary)
    rows = queries.objects_of(alive)
    on = [s for s in alive if _follow(settings, rows.get(s.object_id), s, seen.get(s.uuid, UNKNOWN), summary)]
    note_seen_all([(submission, seen[submission.uuid]) for submission in on if submission.uuid in seen])
    if not summary.stale:
        _account(slurm, summary)
    return summary


def _look(settings: Settings, alive: list[Submission], slurm: Slurm, summary: Summary) -> dict[str, Observation]:
    half_made = [s for s in alive if s.state == SubmissionState.SUBMITTING]
    ended, summary.stale = adopt(settings, half_made, slurm) if half_made else ({}, None)
    try:
        return ended | observe(settings, alive, slurm)
    except UnreachableError as error:
        summary.stale = error.message
        return ended | observe(settings, [s for s in alive if s.launcher == "local"], slurm)


def _follow(settings: Settings, row: Table | None, submission: Submission, seen: Observation, summary: Summary) -> bool:
    """One damaged folder must not keep all others from being followed."""
    what, follow = f"{submission.kind} {submission.object_id}", FOLLOW[submission.kind]
    try:
        if row is None:
            raise NotFoundError(f"there is none, but its submission {submission.uuid} is open")
        try:
            return follow(settings, row, submission, seen)
        except StatusError:  # somebody changed it since it was read: stopped it, say
            return follow(settings, queries.objects_of([submission])[row._pk], submission, seen)
    except TfslurmError as error:
        summary.failed.append(f"{what}: {error.message}")
    except Exception:
        summary.failed.append(f"{what}: {traceback.format_exc()}")
    return False


def _account(slurm: Slurm, summary: Summary) -> None:
    """Note once what each has used that has ended; accounting learns of an end some seconds later."""
    waiting = queries.unaccounted()
    if not waiting:
        return
    try:
        since = min(submission.created_at for submission in waiting) - timedelta(minutes=1)
        found = usage(slurm, [submission.job_id for submission in waiting], since) if slurm.accounts else {}
        given_up = now() - (timedelta(seconds=ACCOUNTED) if slurm.accounts else timedelta(0))
    except (UnreachableError, InvalidError) as error:
        summary.stale = error.message
        return
    with write_transaction():
        for submission in waiting:
            used = found.get(submission.job_id)
            if used or submission.ended_at < given_up:
                submission.usage = used.to_dict() if used else {}
                submission.save(only=["usage"])
