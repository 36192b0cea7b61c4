"""What became of a job, folded into the catalog."""

from __future__ import annotations

from tfslurm.catalog import queries
from tfslurm.catalog.db import write_transaction
from tfslurm.catalog.lifecycle import transition
from tfslurm.catalog.models import Job, JobStatus, Submission, now
from tfslurm.errors import InvalidError
from tfslurm.files import read_json
from tfslurm.settings import Settings
from tfslurm.slurm.observe import Observation
from tfslurm.slurm.states import Fate
from tfslurm.slurm.submissions import note_ended, note_seen, note_started
from tfslurm.training.outcome import Failed, Outcome, Stopped, Succeeded, read_outcome
from tfslurm.training.registration import register

ACTOR = "sync"


def follow(settings: Settings, submission: Submission, seen: Observation) -> None:
    """Move the job to where its run is; once more changes nothing."""
    job, paths = queries.find_job(submission.object_id), settings.root.job(submission.object_id)
    started, outcome = read_json(paths.started), read_outcome(paths.outcome)
    if job.status == JobStatus.PENDING and started and started["uuid"] == submission.uuid:
        note_started(job, JobStatus.RUNNING, started, actor=ACTOR)
    if JobStatus(job.status).ended:
        with write_transaction():
            note_ended(submission)
    elif isinstance(outcome, Succeeded) and job.status == JobStatus.RUNNING:
        _complete(settings, job, submission, outcome)
    elif outcome or seen.fate.ended:
        _end(job, submission, seen, outcome)
    else:
        note_seen(submission, seen.state, seen.reason)


def _complete(settings: Settings, job: Job, submission: Submission, outcome: Succeeded) -> None:
    try:
        register(settings, job, submission, outcome, ACTOR)
    except InvalidError as error:
        _to_error(job, submission, error.message)


def _end(job: Job, submission: Submission, seen: Observation, outcome: Outcome | None) -> None:
    if job.status == JobStatus.STOPPING or isinstance(outcome, Stopped):
        _to_stopped(job, submission, "as requested")
    elif isinstance(outcome, Failed):
        _to_error(job, submission, outcome.error)
    elif seen.fate is Fate.CANCELLED:
        _to_stopped(job, submission, f"cancelled outside of tfslurm: {seen.state}")
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
