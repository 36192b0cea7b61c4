"""Sweeps: a job for every cell of a grid, handed over together."""

from __future__ import annotations

import errno
import functools
import itertools
import math
import os
import shlex
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import NamedTuple

from msgspec.structs import replace

from tfslurm.artifacts.publish import remove_tree
from tfslurm.catalog import queries
from tfslurm.catalog.db import insert_all, write_transaction
from tfslurm.catalog.lifecycle import record_created, transition
from tfslurm.catalog.models import Job, JobStatus, Submission, SubmissionState, Sweep, now
from tfslurm.catalog.views import digest_of
from tfslurm.errors import InvalidError, StatusError
from tfslurm.faults import fault_point
from tfslurm.files import sync_filesystem
from tfslurm.identity import check_name, current_user, new_id, new_ids
from tfslurm.settings import Instance, Settings
from tfslurm.slurm import submissions
from tfslurm.slurm.client import Slurm, SlurmUnreachable
from tfslurm.slurm.ids import base
from tfslurm.training import jobs, stopping
from tfslurm.training.config import TrainingConfig
from tfslurm.training.grid import Grid, check_grid, size
from tfslurm.training.jobs import Ground

MOST_LOCAL_CELLS = 100
"""Without Slurm each cell that waits for its turn is a process."""

USUAL_ARRAY = 1001
"""Slurm's own default for MaxArraySize, where it does not answer."""


@dataclass(frozen=True)
class Request:
    """A job's request, whose name is the sweep's, and what varies; every hyperparameter stands in one of the two."""

    fixed: jobs.Request
    grid: Grid
    max_parallel: int | None = None


class Cell(NamedTuple):
    """One job of the sweep, and the submission that it begins with."""

    config: TrainingConfig
    encoded: bytes
    uuid: str


@dataclass(frozen=True)
class Batch:
    """What is handed over together: the tasks of an array, or a single cell where there is no Slurm."""

    name: str
    script: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Plan:
    """Everything that a sweep would be made of; making one changes nothing."""

    id: str
    name: str
    request: Request
    ground: Ground
    batches: tuple[Batch, ...]

    @property
    def instance(self) -> Instance:
        return self.ground.instance

    @property
    def cells(self) -> Iterator[Cell]:
        return itertools.chain.from_iterable(batch.cells for batch in self.batches)


def plan(settings: Settings, request: Request) -> Plan:
    """Render the whole sweep: the product of the grid's values, the last field varying fastest.

    Raises what `jobs.ground` raises, InvalidError for values out of range and too many cells, UsageError for a field
    that is both fixed and in the grid.
    """
    fixed, count = request.fixed, size(request.grid)
    check_grid(request.grid, fixed.hyperparameters)
    largest = {field: max(values) for field, values in request.grid if field != "seed"}
    on, sweep_id = jobs.ground(settings, fixed, largest), new_id("sweep")
    name = check_name(fixed.name or on.name_for(sweep_id))
    check_name(f"{name}-{count - 1}")
    local = on.instance.launcher == "local"
    if local and count > MOST_LOCAL_CELLS:
        raise InvalidError(
            f"{count:,} cells are too many for instance '{on.instance.name}', which is this machine alone",
            hint=f"Choose an instance on Slurm, or a grid of at most {MOST_LOCAL_CELLS} cells.",
        )
    cells = tuple(_cells(settings, on, request, name, count))
    batches = (
        _alone(settings, on.instance, sweep_id, request, cells)
        if local
        else _arrays(settings, on.instance, sweep_id, request, cells)
    )
    return Plan(sweep_id, name, request, on, tuple(batches))


def _cells(settings: Settings, on: Ground, request: Request, name: str, count: int) -> Iterator[Cell]:
    fields, products = [field for field, _ in request.grid], itertools.product(*(values for _, values in request.grid))
    like = None
    for index, (job_id, values) in enumerate(zip(new_ids("job", count), products, strict=True)):
        cell = dict(zip(fields, values, strict=True))
        seed = cell.pop("seed", request.fixed.seed)
        own = on.resolve({**request.fixed.hyperparameters, **cell})
        like = like or on.configure(settings, job_id, name, own, seed)
        config = replace(like, job_id=job_id, name=f"{name}-{index}", hyperparameters=own, seed=seed)
        yield Cell(config, config.encode(), str(uuid.uuid4()))


def _arrays(
    settings: Settings, instance: Instance, sweep_id: str, request: Request, cells: Sequence[Cell]
) -> Iterator[Batch]:
    """As few arrays as Slurm allows, of nearly the same size; each gets its share of `max_parallel`."""
    count = math.ceil(len(cells) / _largest_array(settings))
    if request.max_parallel is not None and request.max_parallel < count:
        raise InvalidError(
            f"{len(cells):,} cells need {count} arrays, and Slurm runs at least one cell of each at a time",
            hint=f"Give --max-parallel {count} or more, or a smaller grid.",
        )
    for index in range(count):
        tasks = tuple(cells[len(cells) * index // count : len(cells) * (index + 1) // count])
        share = request.max_parallel and (request.max_parallel + index) // count
        name, script = submissions.array_script_for(settings, instance, "sweep", sweep_id, len(tasks), share)
        yield Batch(name, script, tasks)


def _largest_array(settings: Settings) -> int:
    try:
        return Slurm(settings.site.slurm.command_timeout).limits().max_array_size
    except SlurmUnreachable:
        return USUAL_ARRAY


def _alone(
    settings: Settings, instance: Instance, sweep_id: str, request: Request, cells: Sequence[Cell]
) -> Iterator[Batch]:
    """Each cell by itself; its script waits for one of the places that the sweep has on this machine."""
    for cell in cells:
        paths = settings.root.job(cell.config.job_id)
        name, script = submissions.script_for(settings, "train", instance, paths, "job", cell.config.job_id)
        yield Batch(name, script, (cell._replace(uuid=name),))


def create(settings: Settings, made: Plan) -> Sweep:
    """Write what was planned, register the sweep with all its jobs, and submit them.

    Raises StatusError where a name is taken or the dataset no longer ready, SlurmRefused where Slurm would not take
    it: nothing is left then. Where Slurm refuses it after all, SlurmRefused with the jobs in error; where it does
    not answer, SlurmUnreachable with the jobs pending: `sync` submits them.
    """
    # submitit takes as long to load as Slurm takes to answer.
    Thread(target=import_module, args=["tfslurm.slurm.submitit_executor"]).start()
    jobs.preflight(settings, made.instance, made.batches[0].script)
    try:
        _write(settings, made)
        fault_point("sweep-written")
        with write_transaction():
            sweep, rows = _insert(made)
    except BaseException:
        _remove(settings, made)
        raise
    fault_point("sweep-recorded")
    _hand_over(settings, rows)
    return sweep


def _write(settings: Settings, made: Plan) -> None:
    """The scripts and a folder a cell, brought to disk together at the end.

    A crash before that may lose any of it, or half of a file, and nothing refers to it then: the rows come after.
    """
    for batch in made.batches:
        if made.instance.launcher == "local":
            _write_alone(settings, made, batch)
        else:
            folders = ((cell.uuid, settings.root.job(cell.config.job_id).folder) for cell in batch.cells)
            submissions.write_array(settings.root.array(batch.name), batch.script, folders)
    rendered: dict[bytes, Path] = {}
    for cell in made.cells:
        paths = settings.root.job(cell.config.job_id)
        paths.folder.mkdir(exist_ok=True)
        _write_new(paths.config, cell.encoded)
        deepspeed = jobs.deepspeed_text(cell.config)
        _write_or_link(paths.deepspeed, deepspeed, rendered.setdefault(deepspeed, paths.deepspeed))
    sync_filesystem(settings.root.path)


def _write_or_link(path: Path, data: bytes, same: Path) -> None:
    """A second name for the `same` read-only bytes costs less than a second file; not every filesystem has them."""
    if same != path:
        try:
            return os.link(same, path)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
                raise
    return _write_new(path, data)


def _write_alone(settings: Settings, made: Plan, batch: Batch) -> None:
    """A cell's script, and before it one that waits for a place: the lock is free again when the last process ends."""
    (cell,) = batch.cells
    paths, places = settings.root.job(cell.config.job_id), settings.root.array(made.id).folder
    paths.logs.mkdir(parents=True)
    places.mkdir(parents=True, exist_ok=True)
    place = places / f"place-{made.batches.index(batch) % (made.request.max_parallel or 1)}"
    own = paths.folder / "own.sh"
    _write_new(own, batch.script.encode(), mode=0o555)
    waiting = f"exec 9>>{shlex.quote(str(place))} && flock 9 && exec bash {shlex.quote(str(own))}\n"
    _write_new(paths.script, f"#!/bin/bash\n# Cell of sweep {made.id}.\n{waiting}".encode(), mode=0o555)


def _write_new(path: Path, data: bytes, *, mode: int = 0o444) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb", buffering=0) as file:
        if os.fstat(file.fileno()).st_mode & 0o777 != mode:  # for the umask; a needless change costs as much as a file
            os.fchmod(file.fileno(), mode)
        written = file.write(data)
    if written != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _remove(settings: Settings, made: Plan) -> None:
    for name in (made.id, *(batch.name for batch in made.batches)):
        remove_tree(settings.root.array(name).folder)
    for cell in made.cells:
        remove_tree(settings.root.job(cell.config.job_id).folder)


def _insert(made: Plan) -> tuple[Sweep, list[list[Submission]]]:
    # The jobs' rows are what keeps the dataset from being deleted: both are decided under one lock.
    dataset, validation = jobs.ready(made.ground.dataset.artifact_id), made.ground.validation
    if validation:
        jobs.ready(validation.artifact_id)
    _check_names_free(made)
    shared = {"owner": current_user(), "created_at": now()}
    sweep = Sweep.create(
        id=made.id, name=made.name, grid=made.request.grid, max_parallel=made.request.max_parallel, **shared
    )
    shared |= {
        "status": JobStatus.PENDING.value,
        "base_model": made.ground.model.name,
        "base_model_revision": made.ground.model.revision,
        "dataset": dataset.artifact_id,
        "validation_dataset": validation and validation.artifact_id,
        "instance": made.instance.name,
        "sweep": sweep.id,
    }
    insert_all(
        Job,
        [
            {**shared, "id": cell.config.job_id, "name": cell.config.name, "config_digest": digest_of(cell.encoded)}
            for cell in made.cells
        ],
    )
    ids = [cell.config.job_id for cell in made.cells]
    record_created("job", ids, JobStatus.PENDING, actor=current_user())
    return sweep, [_submissions(made, batch) for batch in made.batches]


def _check_names_free(made: Plan) -> None:
    hint = "Choose another one; names are unique."
    sweep = Sweep.get_or_none(Sweep.name == made.name)
    if sweep:
        raise StatusError(f"the name '{made.name}' is taken by sweep {sweep.id}", hint=hint)
    names = {cell.config.name for cell in made.cells}
    # One look at the names that begin alike, rather than one for each cell.
    for job in Job.select(Job.id, Job.name).where(Job.name.between(f"{made.name}-", f"{made.name}-~")):
        if job.name in names:
            raise StatusError(f"the name '{job.name}', for a cell, is taken by job {job.id}", hint=hint)


def _submissions(made: Plan, batch: Batch) -> list[Submission]:
    if made.instance.launcher == "local":
        return [submissions.record(batch.name, made.instance, "job", batch.cells[0].config.job_id)]
    tasks = ((cell.uuid, cell.config.job_id) for cell in batch.cells)
    return submissions.record_array(batch.name, made.instance, "job", tasks)


def _hand_over(settings: Settings, batches: list[list[Submission]]) -> None:
    """One after the other; what Slurm refuses of one, it refuses of those that would have come after it."""
    for index, tasks in enumerate(batches):
        first, later = tasks[0], list(itertools.chain.from_iterable(batches[index + 1 :]))
        paths = submissions.folder_of(settings.root, first)
        script = paths.script if first.array_index is None else settings.root.array(first.name).script
        submissions.hand_over_array(settings, tasks, script, functools.partial(_refuse, tasks, later))


def _refuse(tasks: list[Submission], later: list[Submission], reason: str) -> None:
    for task in later:
        submissions.note_ended(task, reason)
    for task in (*tasks, *later):
        job = Job.get_by_id(task.object_id)
        transition(job, JobStatus.ERROR, actor=current_user(), reason=reason, error=reason, ended_at=now())


def stop(settings: Settings, sweep: Sweep) -> None:
    """Ask every job of the sweep to leave, as `stopping.stop` does one; those that wait are cancelled together.

    A second stop kills. Raises StatusError where all have ended already.
    """
    with write_transaction():
        alive = [job for job in queries.jobs_of(sweep) if not JobStatus(job.status).ended]
        now_killed = {job.id for job in alive if job.status in (JobStatus.PENDING, JobStatus.STOPPING)}
        for job in alive:
            if job.status != JobStatus.STOPPING:
                transition(job, JobStatus.STOPPING, actor=current_user(), reason="stop of the sweep requested")
    if not alive:
        raise StatusError(f"all jobs of sweep '{sweep.name}' have ended already")
    for job in alive:
        settings.root.job(job.id).stop.touch()
    newest = queries.submissions_of(job.id for job in alive).values()
    _kill(settings, [s for s in newest if s.state != SubmissionState.ENDED], now_killed)


def _kill(settings: Settings, handed: list[Submission], wanted: set[str]) -> None:
    """Kill those whose object is `wanted`; an array by its own id where no other task of it is left running."""
    kept = {s.name for s in handed if s.object_id not in wanted}
    killed = [s for s in handed if s.object_id in wanted and s.job_id]
    for submission in killed:
        if submission.launcher == "local":
            stopping.kill(settings, submission)
    on_slurm = [s for s in killed if s.launcher == "slurm"]
    ids = dict.fromkeys(s.job_id if s.name in kept else base(s.job_id) for s in on_slurm)
    if ids:
        Slurm(settings.site.slurm.command_timeout).cancel(*ids)
