"""What became of a job, folded into the catalog."""

from __future__ import annotations

from typing import Any

from tfslurm.catalog.db import write_transaction
from tfslurm.catalog.lifecycle import record, transition
from tfslurm.catalog.models import Job, JobStatus, Submission, now
from tfslurm.errors import InvalidError, NotFoundError
from tfslurm.faults import fault_point
from tfslurm.files import read_json, write_atomic
from tfslurm.paths import JobPaths
from tfslurm.settings import Instance, Settings
from tfslurm.slurm import submissions
from tfslurm.slurm.client import Slurm, SlurmRefused
from tfslurm.slurm.observe import Observation
from tfslurm.slurm.states import Fate
from tfslurm.slurm.submissions import note_ended, note_started
from tfslurm.training import stopping
from tfslurm.training.outcome import Failed, Outcome, Stopped, Succeeded, Suspended, read_outcome
from tfslurm.training.registration import register

ACTOR = "sync"

WAITS = frozenset({Fate.WAITING, Fate.HELD})

INTERRUPTED = frozenset({Fate.TIMEOUT, Fate.INFRASTRUCTURE, Fate.PREEMPTED, Fate.LOST})
"""What ends an attempt from outside on a cluster, through no fault of the job's."""


MORE_TIME = "give it an instance with more time, or a smaller effective batch"


def follow(settings: Settings, job: Job, submission: Submission, seen: Observation) -> bool:
    """Move the job to where its run is; once more changes nothing. Whether it goes on as before."""
    paths = settings.root.job(job.id)
    started, outcome = read_json(paths.started), read_outcome(paths.outcome)
    if started and started["uuid"] == submission.uuid:
        _note_attempt(job, started)
    if JobStatus(job.status).ended:
        with write_transaction():
            note_ended(submission)
    elif isinstance(outcome, Succeeded) and job.status in (JobStatus.RUNNING, JobStatus.PENDING):
        _complete(settings, job, submission, seen, outcome)
    elif seen.ended or (outcome and not isinstance(outcome, Suspended)):
        _end(settings, job, submission, seen, outcome)
    elif job.status == JobStatus.RUNNING and seen.fate in WAITS:
        _note_requeue(settings, job, submission, seen)
        return True
    else:
        _see_to_stop(settings, job, submission, seen)
        return True
    return False


def _note_attempt(job: Job, started: dict[str, Any]) -> None:
    """The batch script has started: for the first time, or again, whether or not anybody saw it wait in between."""
    if job.started_at is not None and started["attempt"] <= job.attempt:
        return
    if job.status == JobStatus.RUNNING:
        with write_transaction():
            transition(job, JobStatus.PENDING, actor=ACTOR, reason="it was started again")
    if job.status == JobStatus.PENDING:
        note_started(job, JobStatus.RUNNING, started, actor=ACTOR)


def _note_requeue(settings: Settings, job: Job, submission: Submission, seen: Observation) -> None:
    """Slurm will start it again by itself; not on the node that died under it."""
    node = _lost_node(settings.root.job(job.id), submission, seen)
    if node:
        try:
            Slurm(settings.site.slurm.command_timeout).exclude(submission.job_id, [*submission.exclude, node])
        except SlurmRefused:
            node = None  # it runs again already
    with write_transaction():
        if node:
            submission.exclude = [*submission.exclude, node]
            submission.save(only=["exclude"])
        transition(job, JobStatus.PENDING, actor=ACTOR, reason=f"requeued: {seen.reason or seen.state}")


def _lost_node(paths: JobPaths, submission: Submission, seen: Observation) -> str | None:
    """The node that died, where that can be told: the job ran on it alone, and its script could not even say so."""
    started, ended = read_json(paths.started), read_json(paths.exit)
    if not started or (ended and (ended["uuid"], ended["attempt"]) == (started["uuid"], started["attempt"])):
        return None
    nodes = submission.nodes or seen.nodes
    alone = nodes and not set(nodes) & set("[],")
    return started["node"] if alone and started["node"] not in submission.exclude else None


def _see_to_stop(settings: Settings, job: Job, submission: Submission, seen: Observation) -> None:
    """One that was asked to stop has been told; it is killed where it waits again, or doesn't leave in time."""
    if job.status != JobStatus.STOPPING:
        return
    settings.root.job(job.id).stop.touch()
    if submission.job_id and (seen.fate in WAITS or stopping.overdue(settings, job)):
        stopping.kill(settings, submission)


def _complete(settings: Settings, job: Job, submission: Submission, seen: Observation, outcome: Succeeded) -> None:
    if job.status == JobStatus.PENDING:  # its node died after all was done
        with write_transaction():
            transition(job, JobStatus.RUNNING, actor=ACTOR, reason="its training had succeeded")
    try:
        register(settings, job, submission, outcome, ACTOR)
    except InvalidError as error:
        _to_error(job, submission, error.message)
    if seen.fate in WAITS:
        stopping.kill(settings, submission)


def _end(settings: Settings, job: Job, submission: Submission, seen: Observation, outcome: Outcome | None) -> None:
    if job.status == JobStatus.STOPPING or isinstance(outcome, Stopped):
        _to_stopped(job, submission, "as requested")
    elif isinstance(outcome, Failed):
        _to_error(job, submission, outcome.error)
    elif seen.fate is Fate.CANCELLED:
        _to_stopped(job, submission, f"cancelled outside of tfslurm: {seen.state}")
    elif isinstance(outcome, Suspended) or (submission.launcher == "slurm" and seen.fate in INTERRUPTED):
        _go_on(settings, job, submission, seen, outcome)
    else:
        _to_error(job, submission, describe(seen))


def describe(seen: Observation) -> str:
    """Why a run ended that said nothing itself."""
    said = f" ({seen.state})" if seen.state and seen.state.lower() != seen.fate.value else ""
    if seen.fate is Fate.COMPLETED:
        return f"the script ended without saying how the training went{said}"
    if seen.exit_code in (137, 143):
        # srun reports the highest code: after a kill -9 that of the processes that it ended itself.
        return (
            f"exit code {seen.exit_code}: a process was killed, by hand or for want of memory; see the end of the log"
        )
    return f"{seen.fate.value}{said}: {seen.reason or f'exit code {seen.exit_code}'}"


def _go_on(settings: Settings, job: Job, submission: Submission, seen: Observation, outcome: Outcome | None) -> None:
    """Submit what was interrupted once more, from where its state was saved, as long as that comes to something."""
    paths = settings.root.job(job.id)
    reason = "saved its state and left" if isinstance(outcome, Suspended) else describe(seen)
    last = max(job.attempt, submission.attempt)
    barren = last - _last_that_saved(paths)
    walltime = seen.fate is Fate.TIMEOUT or seen.fate not in INTERRUPTED  # it left in time, or did not get to it
    if walltime and barren > last:
        return _to_error(job, submission, f"no progress within the time limit: {MORE_TIME}")
    if barren >= settings.site.slurm.barren_attempts:
        hint = f"; {MORE_TIME}" if walltime else ""
        return _to_error(job, submission, f"{reason}; attempts in a row that came to nothing: {barren}{hint}")
    try:
        size = settings.instance(job.instance, "training")
    except (InvalidError, NotFoundError) as error:
        return _to_error(job, submission, f"{reason}; it cannot go on: {error.message}")
    lost = _lost_node(paths, submission, seen) if seen.fate is Fate.INFRASTRUCTURE else None
    exclude = [*submission.exclude, lost] if lost else submission.exclude
    _submit_again(settings, job, submission, size, last + 1, exclude, reason)
    return None


def _last_that_saved(paths: JobPaths) -> int:
    """The newest attempt that saved a state; -1 where none did."""
    state = read_json(paths.resume / "state.json")
    return state["attempt"] if state else -1


def _submit_again(
    settings: Settings, job: Job, old: Submission, size: Instance, attempt: int, exclude: list[str], reason: str
) -> None:
    paths = settings.root.job(job.id)
    uuid, text = submissions.script_for(
        settings, "train", size, paths, "job", job.id, first_attempt=attempt, exclude=tuple(exclude)
    )
    write_atomic(paths.script, text, mode=0o555)
    fault_point("job-rendered-again")
    with write_transaction():
        note_ended(old, reason)
        again = submissions.record(uuid, size, "job", job.id, attempt=attempt, exclude=exclude)
        if job.status == JobStatus.RUNNING:
            transition(job, JobStatus.PENDING, actor=ACTOR, reason=f"attempt {attempt}: {reason}")
        else:
            record(job, "resubmitted", actor=ACTOR, reason=f"attempt {attempt}: {reason}")
    fault_point("job-resubmitted")
    submissions.hand_over(settings, again, paths.script, lambda why: _refuse(job, why))


def _refuse(job: Job, reason: str) -> None:
    error = f"it cannot go on: {reason}"
    transition(job, JobStatus.ERROR, actor=ACTOR, reason=error, error=error, ended_at=now())


def _to_stopped(job: Job, submission: Submission, reason: str) -> None:
    with write_transaction():
        if job.status != JobStatus.STOPPING:
            transition(job, JobStatus.STOPPING, actor=ACTOR, reason=reason)
        transition(job, JobStatus.STOPPED, actor=ACTOR, reason=reason, ended_at=now())
        note_ended(submission, reason)


def _to_error(job: Job, submission: Submission, error: str) -> None:
    with write_transaction():
        transition(job, JobStatus.ERROR, actor=ACTOR, reason=error, error=error, ended_at=now())
        note_ended(submission, error)
