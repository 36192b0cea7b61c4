"""Sync: what happened to everything alive is folded into the catalog.

It may run at any time, anywhere, twice, late, or be killed halfway: the next one ends the same.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime

from tfslurm.catalog import queries
from tfslurm.catalog.leases import lease
from tfslurm.catalog.models import Submission, SubmissionState, now
from tfslurm.datasets import importing
from tfslurm.errors import InvalidError, TfslurmError, UnreachableError
from tfslurm.files import read_json
from tfslurm.serving import following as serving
from tfslurm.settings import Settings
from tfslurm.slurm.client import Slurm
from tfslurm.slurm.executors import Handed, launcher
from tfslurm.slurm.observe import UNKNOWN, Observation, observe
from tfslurm.slurm.states import Fate
from tfslurm.slurm.submissions import folder_of, note_handed
from tfslurm.training import following as training

LEASE = 600.0
"""Seconds after which another process may take over from one that was killed."""

FOLLOW: dict[str, Callable] = {"job": training.follow, "endpoint": serving.follow, "import": importing.follow}


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


def sync(settings: Settings, *, floor: float = 0.0) -> Summary:
    """Look at everything alive, unless another process is at it or did so within `floor` seconds."""
    alive = queries.submissions_alive()
    if not alive:
        return Summary()
    with lease("sync", seconds=LEASE, floor=floor) as taken:
        if not taken:
            return Summary(len(alive), ran=False)
        return _fold(settings, queries.submissions_alive())


def refresh(settings: Settings) -> Summary:
    """`sync` before a listing: Slurm is asked no more often than the site's poll floor allows."""
    slurm = any(submission.launcher == "slurm" for submission in queries.submissions_alive())
    return sync(settings, floor=settings.site.slurm.poll_floor if slurm else 0.0)


def _fold(settings: Settings, alive: list[Submission]) -> Summary:
    summary, slurm = Summary(len(alive)), Slurm(settings.site.slurm.command_timeout)
    seen = _adopt(settings, (s for s in alive if s.state == SubmissionState.SUBMITTING), slurm, summary)
    try:
        seen |= observe(settings, alive, slurm)
    except UnreachableError as error:
        summary.stale = error.message
        seen |= observe(settings, (s for s in alive if s.launcher == "local"), slurm)
    for submission in alive:
        try:
            FOLLOW[submission.kind](settings, submission, seen.get(submission.uuid, UNKNOWN))
        except TfslurmError as error:
            summary.failed.append(f"{submission.kind} {submission.object_id}: {error.message}")
        except Exception:
            # One damaged folder must not keep all others from being followed.
            summary.failed.append(f"{submission.kind} {submission.object_id}: {traceback.format_exc()}")
    return summary


def _adopt(
    settings: Settings, submissions: Iterable[Submission], slurm: Slurm, summary: Summary
) -> dict[str, Observation]:
    """Find out of each half-made submission whether it went through, and hand it over again where it did not.

    What is not wanted any more, or refused, has come to its end: these are the observations.
    """
    ended = {}
    for submission in submissions:
        if (now() - submission.created_at).total_seconds() < settings.site.slurm.command_timeout:
            continue  # whoever makes it may still be at it
        try:
            found, paths = _find(settings, submission, slurm), folder_of(settings.root, submission)
            if found:
                note_handed(submission, found)
            elif paths.stop.exists():
                ended[submission.uuid] = Observation(Fate.CANCELLED, "stopped before it was submitted")
            else:
                note_handed(submission, launcher(submission.launcher, settings).submit(paths.script))
        except InvalidError as error:
            ended[submission.uuid] = Observation(Fate.FAILED, error.message)
        except UnreachableError as error:
            summary.stale = error.message
    return ended


def _find(settings: Settings, submission: Submission, slurm: Slurm) -> Handed | None:
    started = read_json(folder_of(settings.root, submission).started)
    if started and started["uuid"] == submission.uuid:
        if submission.launcher == "local":
            return Handed(started["node"], f"{started['pid']}:{started['ticks']}")
        return Handed(slurm.cluster(), started["slurm_job_id"])
    job_id = slurm.find(submission.uuid) if submission.launcher == "slurm" else None
    return Handed(slurm.cluster(), job_id) if job_id else None
