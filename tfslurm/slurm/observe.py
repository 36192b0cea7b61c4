"""What became of submissions: one squeue and one sacct, whatever their number."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import timedelta

from tfslurm.catalog.models import Submission, SubmissionState, now
from tfslurm.files import read_json
from tfslurm.process import alive
from tfslurm.settings import Settings
from tfslurm.slurm.client import QueueEntry, Slurm, SlurmRefused, SlurmUnreachable
from tfslurm.slurm.states import Fate, fate
from tfslurm.slurm.submissions import folder_of


@dataclass(frozen=True)
class Observation:
    """What is known of a submission now."""

    fate: Fate
    reason: str = ""
    state: str = ""
    """Slurm's own word."""
    nodes: str = ""
    start: str = ""
    exit_code: int | None = None


UNKNOWN = Observation(Fate.UNKNOWN)


def observe(settings: Settings, submissions: Iterable[Submission], slurm: Slurm) -> dict[str, Observation]:
    """What became of each submission, by its uuid.

    Whatever cannot be found out is UNKNOWN: an unreachable Slurm changes nothing.
    Raises SlurmUnreachable only where there was nothing but Slurm to ask.
    """
    handed = [s for s in submissions if s.state == SubmissionState.SUBMITTED]
    seen = {s.uuid: _observe_local(settings, s) for s in handed if s.launcher == "local"}
    on_slurm = [s for s in handed if s.launcher == "slurm"]
    if on_slurm:
        seen |= _observe_slurm(settings, on_slurm, slurm)
    return seen


def _observe_local(settings: Settings, submission: Submission) -> Observation:
    ended = exit_record(settings, submission)
    if ended:
        return ended
    if submission.cluster != socket.gethostname():
        return UNKNOWN  # only its own machine can look
    if alive(submission.job_id):
        return Observation(Fate.ACTIVE, state="RUNNING", nodes=submission.cluster)
    # The script may have ended between the two looks.
    return exit_record(settings, submission) or Observation(Fate.LOST, "its process was killed")


def _observe_slurm(settings: Settings, submissions: list[Submission], slurm: Slurm) -> dict[str, Observation]:
    queue = slurm.queue([s.job_id for s in submissions])
    absent = [s for s in submissions if s.job_id not in queue]
    accounts = _accounts(slurm, absent)
    found = accounts | queue
    return {
        s.uuid: _translate(settings, s, found[s.job_id]) if _is(found.get(s.job_id), s) else _forgotten(settings, s)
        for s in submissions
    }


def _accounts(slurm: Slurm, submissions: list[Submission]) -> dict[str, QueueEntry]:
    if not submissions:
        return {}
    since = min(s.created_at for s in submissions) - timedelta(minutes=1)
    try:
        return slurm.accounting([s.job_id for s in submissions], since)
    except (SlurmRefused, SlurmUnreachable):
        return {}  # no accounting here, or not now: the exit files say it too


def _is(entry: QueueEntry | None, submission: Submission) -> bool:
    """Slurm uses its numbers again; the name is the submission's own."""
    return entry is not None and entry.name == submission.uuid


def _translate(settings: Settings, submission: Submission, entry: QueueEntry) -> Observation:
    """Slurm's word for it; how the script ended, the script itself knows better than squeue."""
    what = fate(entry.state)
    reason = "" if entry.reason in ("None", "NonZeroExitCode") else entry.reason
    code = entry.exit_code.partition(":")[0]
    seen = Observation(what, reason, entry.state, entry.nodes, entry.start, int(code) if code.isdigit() else None)
    own = exit_record(settings, submission) if what.ended else None
    return replace(seen, reason=reason or own.reason, exit_code=own.exit_code) if own else seen


def _forgotten(settings: Settings, submission: Submission) -> Observation:
    ended = exit_record(settings, submission)
    if ended:
        return ended
    age = (now() - submission.submitted_at).total_seconds()
    if age < settings.site.slurm.grace:
        return UNKNOWN
    return Observation(Fate.LOST, "neither squeue nor sacct knows it, and it left no exit record")


def exit_record(settings: Settings, submission: Submission) -> Observation | None:
    """What the script's own exit trap wrote, if it is of this submission."""
    record = read_json(folder_of(settings.root, submission).exit)
    if not record or record["uuid"] != submission.uuid:
        return None
    code = record["exit_code"]
    return Observation(Fate.COMPLETED if code == 0 else Fate.FAILED, f"exit code {code}", exit_code=code)
