"""What became of submissions: one squeue and one sacct, whatever their number."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from tfslurm.catalog.models import Submission, SubmissionState, now
from tfslurm.files import read_json
from tfslurm.process import alive
from tfslurm.settings import Settings
from tfslurm.slurm.client import QueueEntry, Slurm, SlurmRefused, SlurmUnreachable
from tfslurm.slurm.ids import task_id
from tfslurm.slurm.reasons import explain
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
    estimated_start: datetime | None = None
    """When Slurm thinks that it starts, while it waits."""
    exit_code: int | None = None
    restarts: int = 0
    """How often Slurm itself has started it again, as far as squeue knows it."""
    queued: bool = False
    """Whether squeue has it, waiting, running or just ended."""
    job_id: str | None = None
    """Slurm's id of the job that runs as this submission, where it is not the one that was noted."""

    @property
    def ended(self) -> bool:
        """Nothing more will happen to it: a preempted one may come back as long as squeue has it."""
        return self.fate.ended or (self.fate is Fate.PREEMPTED and not self.queued)


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
    first = _Looked(slurm, submissions, {s.uuid: s.job_id for s in submissions})
    seen = {s.uuid: _observation(settings, s, first) for s in submissions}
    others = _claimed_by_others(settings, submissions, seen)
    if others:
        moved = [s for s in submissions if s.uuid in others]
        second = _Looked(slurm, moved, others)
        seen |= {s.uuid: replace(_observation(settings, s, second), job_id=others[s.uuid]) for s in moved}
    return seen


class _Looked:
    """What Slurm says of the jobs that `job_ids` has for the submissions' uuids."""

    def __init__(self, slurm: Slurm, submissions: list[Submission], job_ids: Mapping[str, str]) -> None:
        self.job_ids = job_ids
        self.queue = slurm.queue(job_ids.values())
        absent = [s for s in submissions if not _is(self.queue.get(job_ids[s.uuid]), s)]
        self.unanswered = False
        self.arrays = {entry.name for entry in self.queue.values()}
        self.accounts = self._accounts(slurm, absent)

    def _accounts(self, slurm: Slurm, absent: list[Submission]) -> dict[str, QueueEntry]:
        if not absent:
            return {}
        since = min(s.created_at for s in absent) - timedelta(minutes=1)
        try:
            return slurm.accounting([self.job_ids[s.uuid] for s in absent], since)
        except SlurmRefused:
            return {}  # no accounting here: the exit files say it too
        except SlurmUnreachable:
            self.unanswered = True
            return {}

    def entry(self, submission: Submission) -> QueueEntry | None:
        for source in (self.queue, self.accounts):
            entry = source.get(self.job_ids[submission.uuid])
            if _is(entry, submission):
                return entry
        return None

    def in_queue(self, submission: Submission) -> bool:
        return _is(self.queue.get(self.job_ids[submission.uuid]), submission)


def _is(entry: QueueEntry | None, submission: Submission) -> bool:
    """Slurm uses its numbers again; the name is the submission's own, or its array's."""
    return entry is not None and entry.name == submission.name


def _claimed_by_others(
    settings: Settings, submissions: list[Submission], seen: Mapping[str, Observation]
) -> dict[str, str]:
    """The ids of the jobs that run as these submissions, where Slurm took one twice and the other one came first."""
    others = {}
    for submission in submissions:
        if seen[submission.uuid].fate is not Fate.ACTIVE:
            owner = claimed(settings, submission)
            if owner and owner != submission.job_id:
                others[submission.uuid] = owner
    return others


def claimed(settings: Settings, submission: Submission) -> str | None:
    """Slurm's id of the job whose script was the first to start as this submission; None before there is one."""
    try:
        job_id = folder_of(settings.root, submission).claim(submission.uuid).read_text().strip()
    except FileNotFoundError:
        return None
    return task_id(job_id, submission.array_index) if job_id else None


def _observation(settings: Settings, submission: Submission, looked: _Looked) -> Observation:
    entry = looked.entry(submission)
    if entry:
        return _translate(settings, submission, entry, looked.in_queue(submission))
    if submission.array_index is not None and submission.name in looked.arrays and not looked.unanswered:
        cancelled = _cancelled_alone(settings, submission)
        if cancelled:
            return cancelled
    return _forgotten(settings, submission, looked.unanswered)


def _cancelled_alone(settings: Settings, submission: Submission) -> Observation | None:
    """Slurm forgets a waiting task of an array that is cancelled at once, even while it knows the rest of the array.

    The last ones to be cancelled leave a line with the array's bare id, which is not theirs either.
    """
    if exit_record(settings, submission) or claimed(settings, submission):
        return None
    return Observation(Fate.CANCELLED, "cancelled while it waited", state="CANCELLED")


def _translate(settings: Settings, submission: Submission, entry: QueueEntry, queued: bool) -> Observation:
    """Slurm's word for it; how the script ended, the script itself knows better than squeue."""
    what, reason = explain(entry.job_id, entry.state, entry.reason, fate(entry.state))
    seen = Observation(
        fate=what,
        reason=reason,
        state=entry.state,
        nodes=entry.nodes,
        estimated_start=entry.start if what in (Fate.WAITING, Fate.HELD) else None,
        exit_code=_exit_code(entry),
        restarts=entry.restarts,
        queued=queued,
    )
    own = exit_record(settings, submission) if what.ended else None
    return replace(seen, reason=reason or own.reason, exit_code=own.exit_code) if own else seen


def _exit_code(entry: QueueEntry) -> int | None:
    """As a shell has it: a script that was killed by a signal could not say so itself."""
    code, _, number = entry.exit_code.partition(":")
    if not code.isdigit():
        return None
    return 128 + int(number) if number.isdigit() and int(number) and not int(code) else int(code)


def _forgotten(settings: Settings, submission: Submission, unanswered: bool) -> Observation:
    ended = exit_record(settings, submission)
    if ended:
        return ended
    age = (now() - submission.submitted_at).total_seconds()
    if unanswered or age < settings.site.slurm.grace:
        return UNKNOWN
    return Observation(Fate.LOST, "neither squeue nor sacct knows it, and it left no exit record")


def exit_record(settings: Settings, submission: Submission) -> Observation | None:
    """What the script's own exit trap wrote, if it is of this submission and of its newest attempt."""
    paths = folder_of(settings.root, submission)
    record = read_json(paths.exit)
    if not record or record["uuid"] != submission.uuid:
        return None
    started = read_json(paths.started)
    if started and started["uuid"] == submission.uuid and started["attempt"] > record["attempt"]:
        return None  # the node died between the two, or the next attempt is about to remove it
    code = record["exit_code"]
    return Observation(Fate.COMPLETED if code == 0 else Fate.FAILED, f"exit code {code}", exit_code=code)
