"""Stopping jobs: at the next step boundary, or at once."""

from __future__ import annotations

import signal
from datetime import datetime

from tfslurm.catalog import queries
from tfslurm.catalog.db import write_transaction
from tfslurm.catalog.lifecycle import transition
from tfslurm.catalog.models import Event, Job, JobStatus, Submission, now
from tfslurm.errors import StatusError
from tfslurm.identity import current_user
from tfslurm.settings import Settings
from tfslurm.slurm import local
from tfslurm.slurm.client import Slurm


def stop(settings: Settings, job: Job) -> Job:
    """Ask the job to leave: a waiting one is cancelled at once, a running one at its next step boundary.

    A second stop kills. Raises StatusError where it has ended already.
    """
    if JobStatus(job.status).ended:
        raise StatusError(f"job '{job.name}' has ended already: it is {job.status}")
    again, waiting = job.status == JobStatus.STOPPING, job.status == JobStatus.PENDING
    if not again:
        with write_transaction():
            transition(job, JobStatus.STOPPING, actor=current_user(), reason="stop requested")
    settings.root.job(job.id).stop.touch()
    submission = queries.submissions_of([job.id]).get(job.id)
    if submission and submission.job_id and (again or waiting):
        kill(settings, submission)
    return job


def overdue(settings: Settings, job: Job) -> bool:
    """Whether a job that was asked to stop has had its time to reach a step boundary."""
    asked = _asked(job)
    return asked is not None and (now() - asked).total_seconds() > settings.site.slurm.stop_timeout


def _asked(job: Job) -> datetime | None:
    if job.status != JobStatus.STOPPING:
        return None
    event = Event.select().where(Event.object_id == job.id, Event.to_status == JobStatus.STOPPING)
    return max((row.at for row in event), default=None)


def kill(settings: Settings, submission: Submission) -> None:
    """End what was submitted, now. Raises SlurmUnreachable."""
    if submission.launcher == "local":
        local.end(submission.job_id, signal.SIGKILL)
    else:
        Slurm(settings.site.slurm.command_timeout).cancel(submission.job_id)
