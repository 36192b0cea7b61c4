"""Half-made submissions: whether they went through is found out, and where they did not they are handed over again.

Somebody wrote the row and was killed before Slurm's answer was noted, or Slurm did not answer. Slurm may still
take what it was sent long after that. That two of the same name then wait in its queue cannot be ruled out; that
both run, can: the script claims its folder under its own job id, and what is claimed here is believed.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

from tfslurm.catalog.models import Submission, now
from tfslurm.errors import InvalidError, UnreachableError
from tfslurm.files import read_json
from tfslurm.settings import Settings
from tfslurm.slurm.client import Slurm
from tfslurm.slurm.executors import Handed
from tfslurm.slurm.handing import longest
from tfslurm.slurm.observe import Observation
from tfslurm.slurm.states import Fate
from tfslurm.slurm.submissions import folder_of, note_handed, submit


class Adopted(NamedTuple):
    """What has come to its end without ever being handed over, by uuid; and why Slurm could not be asked."""

    ended: dict[str, Observation]
    stale: str | None


def adopt(settings: Settings, submissions: Iterable[Submission], slurm: Slurm) -> Adopted:
    """See to every half-made submission that its maker is no longer at."""
    ended: dict[str, Observation] = {}
    stale = None
    left = (s for s in submissions if _left_alone(settings, s))
    for _, tasks in groupby(sorted(left, key=attrgetter("name", "array_index")), key=attrgetter("name")):
        together = list(tasks)
        try:
            seen = _see_to(settings, together, slurm)
        except InvalidError as error:
            seen = Observation(Fate.FAILED, error.message)
        except UnreachableError as error:
            stale = error.message
            continue
        if seen:
            ended |= {submission.uuid: seen for submission in together}
    return Adopted(ended, stale)


def _left_alone(settings: Settings, submission: Submission) -> bool:
    """Whoever makes it may still be at it for as long as that may take."""
    return (now() - submission.created_at).total_seconds() >= longest(settings)


def _see_to(settings: Settings, tasks: list[Submission], slurm: Slurm) -> Observation | None:
    """The submissions of one hand-over: all tasks of an array, or a single one. What they came to, if to an end."""
    found = _started(settings, tasks, slurm) or _queued(tasks, slurm)
    wanted = not all(folder_of(settings.root, task).stop.exists() for task in tasks)
    if not found and not wanted:
        return Observation(Fate.CANCELLED, "stopped before it was submitted")
    note_handed(tasks, found or submit(settings, tasks))
    return None


def _started(settings: Settings, tasks: list[Submission], slurm: Slurm) -> Handed | None:
    """Where one of them has started already: its script says so itself."""
    for task in tasks:
        started = read_json(folder_of(settings.root, task).started)
        if started and started["uuid"] == task.uuid:
            if task.launcher == "local":
                return Handed(started["node"], f"{started['pid']}:{started['ticks']}")
            return Handed(slurm.cluster(), started["slurm_job_id"])
    return None


def _queued(tasks: list[Submission], slurm: Slurm) -> Handed | None:
    """The job of their name, as Slurm knows it; where there are several, the oldest, and the others are cancelled."""
    if tasks[0].launcher != "slurm":
        return None
    since = tasks[0].created_at - timedelta(minutes=1)
    first, *others = slurm.find(tasks[0].name, since) or [None]
    for job_id in others:
        slurm.cancel(job_id)
    return Handed(slurm.cluster(), first) if first else None
