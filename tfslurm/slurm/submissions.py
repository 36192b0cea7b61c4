"""Submissions: the row first, then the hand-over, so that nothing runs that the catalog doesn't know."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfslurm.catalog.db import execute_many, insert_all, write_transaction
from tfslurm.catalog.lifecycle import transition
from tfslurm.catalog.models import Endpoint, Job, Submission, SubmissionState, database, now
from tfslurm.errors import InvalidError
from tfslurm.faults import fault_point
from tfslurm.files import write_atomic
from tfslurm.paths import ArrayPaths, Root, RunPaths
from tfslurm.settings import Instance, Settings
from tfslurm.slurm.executors import Handed, launcher
from tfslurm.slurm.handing import hand
from tfslurm.slurm.ids import task_id

if TYPE_CHECKING:
    from tfslurm.slurm.observe import Observation
    from tfslurm.slurm.templates import Template

Sleep = Callable[[float], object]


def folder_of(root: Root, submission: Submission) -> RunPaths:
    """The folder of what the submission runs."""
    of = {"job": root.job, "endpoint": root.endpoint, "import": root.import_}[submission.kind]
    return of(submission.object_id)


def script_for(
    settings: Settings,
    template: Template,
    instance: Instance,
    paths: RunPaths,
    kind: str,
    object_id: str,
    *,
    first_attempt: int = 0,
    exclude: Sequence[str] = (),
) -> tuple[str, str]:
    """A fresh submission's uuid, and the script rendered for it.

    Raises ConfigurationError for an instance, or a template of the site's own, that makes no script.
    """
    from tfslurm.slurm.templates import Script, render  # late: jinja2, which following a job doesn't need

    name = str(uuid.uuid4())
    script = Script.of(
        settings, template, instance, paths.folder, uuid=name, kind=kind, object_id=object_id,
        first_attempt=first_attempt, exclude=tuple(exclude),
    )  # fmt: skip
    return name, render(script)


def array_script_for(
    settings: Settings, instance: Instance, kind: str, object_id: str, size: int, max_parallel: int | None = None
) -> tuple[str, str]:
    """A fresh array's name, and the one training script of its `size` tasks, at most `max_parallel` at a time.

    Its log of what goes wrong before a task has found its own folder lies in the array's.
    """
    from tfslurm.slurm.templates import Array, Script, render

    name = str(uuid.uuid4())
    paths = settings.root.array(name)
    array = Array(size=size, cells=paths.cells, max_parallel=max_parallel)
    script = Script.of(
        settings, "train", instance, paths.folder, uuid=name, kind=kind, object_id=object_id, array=array
    )
    return name, render(script)


def write_array(paths: ArrayPaths, script: str, tasks: Iterable[tuple[str, Path]]) -> None:
    """The folder of an array: `tasks` are the submission's uuid and the folder of each, in the order of the indices."""
    (paths.folder / "logs").mkdir(parents=True)
    write_atomic(paths.cells, "".join(f"{name}\t{folder}\n" for name, folder in tasks), mode=0o444)
    write_atomic(paths.script, script, mode=0o555)


def record(
    name: str,
    instance: Instance,
    kind: str,
    object_id: str,
    *,
    attempt: int = 0,
    exclude: Sequence[str] = (),
) -> Submission:
    """The row of what is about to be handed over; in the transaction that makes its object."""
    return Submission.create(
        uuid=name,
        name=name,
        kind=kind,
        object_id=object_id,
        state=SubmissionState.SUBMITTING,
        launcher=instance.launcher,
        attempt=attempt,
        exclude=list(exclude),
        created_at=now(),
    )


def record_array(name: str, instance: Instance, kind: str, tasks: Iterable[tuple[str, str]]) -> list[Submission]:
    """The rows of an array's tasks, each (uuid, object's id), in the order of the indices; in the same transaction."""
    at = now()
    shared = {
        "name": name,
        "kind": kind,
        "state": SubmissionState.SUBMITTING.value,
        "launcher": instance.launcher,
        "created_at": at,
    }
    rows = [
        {**shared, "uuid": own, "object_id": object_id, "array_index": index}
        for index, (own, object_id) in enumerate(tasks)
    ]
    insert_all(Submission, rows)
    return [Submission(**row) for row in rows]


def hand_over(
    settings: Settings,
    submission: Submission,
    script: Path,
    refused: Callable[[str], None],
    *,
    sleep: Sleep = time.sleep,
) -> None:
    """Submit the script and note where it went; `refused` notes in the object that Slurm said no, and why.

    What is transient is tried again, and what went through all the same is found by its name. Raises SlurmRefused
    where Slurm says no; SlurmUnreachable where it does not answer: then `sync` finds out whether it was taken, and
    submits it again if not.
    """
    _hand_over(settings, [submission], script, refused, sleep)


def hand_over_array(
    settings: Settings,
    submissions: Sequence[Submission],
    script: Path,
    refused: Callable[[str], None],
    *,
    sleep: Sleep = time.sleep,
) -> None:
    """`hand_over` for the tasks of one array: one sbatch, and one transaction that notes all of them."""
    _hand_over(settings, submissions, script, refused, sleep)


def _hand_over(
    settings: Settings, tasks: Sequence[Submission], script: Path, refused: Callable[[str], None], sleep: Sleep
) -> None:
    first, patience = tasks[0], settings.site.slurm.command_timeout
    try:
        handed = hand(launcher(first.launcher, settings), script, first.name, patience=patience, sleep=sleep)
    except InvalidError as error:
        with write_transaction():
            for task in tasks:
                note_ended(task, error.message)
            refused(error.message)
        raise
    fault_point("submission-handed")
    note_handed(tasks, handed)


def submit(settings: Settings, tasks: Sequence[Submission]) -> Handed:
    """Hand over, once, what was written before: an array's tasks together, or a single submission.

    Raises SlurmRefused, SlurmUnreachable.
    """
    first = tasks[0]
    paths = folder_of(settings.root, first) if first.array_index is None else settings.root.array(first.name)
    return launcher(first.launcher, settings).submit(paths.script)


def note_handed(tasks: Submission | Sequence[Submission], handed: Handed) -> None:
    """The submission, or all of an array's, are now known to be with their launcher."""
    tasks = [tasks] if isinstance(tasks, Submission) else tasks
    for task in tasks:
        task.cluster, task.job_id, task.submitted_at = (
            handed.cluster, task_id(handed.job_id, task.array_index), now(),
        )  # fmt: skip
    with write_transaction():
        _update_all(tasks, ("cluster", "job_id", "submitted_at"))
        # One that has come to its end before this was written stays ended.
        waiting = f"UPDATE submission SET state = {_P} WHERE uuid = {_P} AND state = {_P}"
        states = SubmissionState.SUBMITTED.value, SubmissionState.SUBMITTING.value
        _many(waiting, ((states[0], task.uuid, states[1]) for task in tasks))
    for task in tasks:
        if task.state == SubmissionState.SUBMITTING:
            task.state = SubmissionState.SUBMITTED


def note_started(row: Job | Endpoint, to: StrEnum, started: dict[str, Any], *, actor: str) -> None:
    """The batch script of `row` runs: `started` is what it reported, and `to` the status that this means.

    `row.started_at` is the start of the first attempt, and stays.
    """
    with write_transaction():
        transition(
            row,
            to,
            actor=actor,
            reason=f"attempt {started['attempt']} on {started['node']}",
            started_at=row.started_at or datetime.fromisoformat(started["at"]),
            attempt=started["attempt"],
        )


def note_seen(submission: Submission, seen: Observation) -> None:
    """What the launcher says of the submission now; one that says nothing leaves what it said before."""
    note_seen_all([(submission, seen)])


def note_seen_all(looked: Iterable[tuple[Submission, Observation]]) -> None:
    """`note_seen` of many, in one transaction that writes what has changed alone; none where nothing has."""
    changed = [submission for submission, seen in looked if _takes(submission, seen)]
    if changed:
        with write_transaction():
            _update_all(changed, SEEN)


SEEN = ("slurm_state", "reason", "nodes", "estimated_start", "job_id")


def _takes(submission: Submission, seen: Observation) -> bool:
    """Take over what was seen; whether that is anything new. Where it ran stays known while it waits again."""
    if not seen.state:
        return False
    before = [getattr(submission, name) for name in SEEN]
    after = [
        seen.state,
        seen.reason,
        seen.nodes or submission.nodes,
        seen.estimated_start,
        seen.job_id or submission.job_id,
    ]
    for name, value in zip(SEEN, after, strict=True):
        setattr(submission, name, value)
    return before != after


def note_ended(submission: Submission, reason: str | None = None) -> None:
    """Nothing more is to be expected of the submission; inside the transaction that ends its object."""
    submission.state, submission.ended_at, submission.reason = SubmissionState.ENDED, now(), reason
    submission.save(only=["state", "ended_at", "reason"])


def _update_all(submissions: Iterable[Submission], names: Sequence[str]) -> None:
    """Save these fields of many rows with one prepared statement: peewee makes the SQL anew for each row."""
    fields = [getattr(Submission, name) for name in names]
    columns = ", ".join(f"{field.column_name} = {_P}" for field in fields)
    rows = ([*(field.db_value(getattr(s, field.name)) for field in fields), s.uuid] for s in submissions)
    _many(f"UPDATE submission SET {columns} WHERE uuid = {_P}", rows)


_P = "%s"


def _many(sql: str, rows: Iterable[Sequence[Any]]) -> None:
    execute_many(sql.replace(_P, database.param), list(rows))
