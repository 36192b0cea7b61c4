"""Submissions: the row first, then the hand-over, so that nothing runs that the catalog doesn't know."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfslurm.catalog.db import write_transaction
from tfslurm.catalog.lifecycle import transition
from tfslurm.catalog.models import Endpoint, Job, Submission, SubmissionState, now
from tfslurm.errors import InvalidError
from tfslurm.faults import fault_point
from tfslurm.paths import Root, RunPaths
from tfslurm.settings import Instance, Settings
from tfslurm.slurm.executors import Handed, launcher

if TYPE_CHECKING:
    from tfslurm.slurm.templates import Template


def folder_of(root: Root, submission: Submission) -> RunPaths:
    """The folder of what the submission runs."""
    of = {"job": root.job, "endpoint": root.endpoint, "import": root.import_}[submission.kind]
    return of(submission.object_id)


def script_for(
    settings: Settings, template: Template, instance: Instance, paths: RunPaths, kind: str, object_id: str
) -> tuple[str, str]:
    """A fresh submission's uuid, and the script rendered for it.

    Raises ConfigurationError for an instance that cannot be written as a script.
    """
    from tfslurm.slurm.templates import Script, render  # late: jinja2, which following a job doesn't need

    name = str(uuid.uuid4())
    script = Script.of(settings, template, instance, paths.folder, uuid=name, kind=kind, object_id=object_id)
    return name, render(script)


def record(name: str, instance: Instance, kind: str, object_id: str) -> Submission:
    """The row of what is about to be handed over; in the transaction that makes its object."""
    return Submission.create(
        uuid=name,
        name=name,
        kind=kind,
        object_id=object_id,
        state=SubmissionState.SUBMITTING,
        launcher=instance.launcher,
        created_at=now(),
    )


def hand_over(settings: Settings, submission: Submission, script: Path, refused: Callable[[str], None]) -> None:
    """Submit the script and note where it went; `refused` notes in the object that Slurm said no, and why.

    Raises SlurmRefused where Slurm says no; SlurmUnreachable where it does not answer: then `sync` finds out
    whether it was taken, and submits it again if not.
    """
    try:
        handed = launcher(submission.launcher, settings).submit(script)
    except InvalidError as error:
        with write_transaction():
            note_ended(submission, error.message)
            refused(error.message)
        raise
    fault_point("submission-handed")
    note_handed(submission, handed)


def note_handed(submission: Submission, handed: Handed) -> None:
    """The submission is now known to be with its launcher."""
    submission.cluster, submission.job_id, submission.submitted_at = handed.cluster, handed.job_id, now()
    with write_transaction():
        submission.save(only=["cluster", "job_id", "submitted_at"])
        # One that has come to its end before this was written stays ended.
        waiting = Submission.update(state=SubmissionState.SUBMITTED).where(
            Submission.uuid == submission.uuid, Submission.state == SubmissionState.SUBMITTING
        )
        if waiting.execute():
            submission.state = SubmissionState.SUBMITTED


def note_started(row: Job | Endpoint, to: StrEnum, started: dict[str, Any], *, actor: str) -> None:
    """The batch script of `row` runs: `started` is what it reported, and `to` the status that this means."""
    with write_transaction():
        transition(
            row,
            to,
            actor=actor,
            reason=f"attempt {started['attempt']} on {started['node']}",
            started_at=datetime.fromisoformat(started["at"]),
            attempt=started["attempt"],
        )


def note_seen(submission: Submission, state: str, reason: str) -> None:
    """What the launcher says of the submission now; "" is nothing, and leaves what it said before."""
    if not state or (submission.slurm_state, submission.reason) == (state, reason):
        return
    submission.slurm_state, submission.reason = state, reason
    with write_transaction():
        submission.save(only=["slurm_state", "reason"])


def note_ended(submission: Submission, reason: str | None = None) -> None:
    """Nothing more is to be expected of the submission; inside the transaction that ends its object."""
    submission.state, submission.ended_at, submission.reason = SubmissionState.ENDED, now(), reason
    submission.save(only=["state", "ended_at", "reason"])
