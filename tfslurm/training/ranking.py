"""A sweep's cells, the best first."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

from tfslurm.catalog import queries
from tfslurm.catalog.models import Checkpoint, Job, JobStatus, Sweep
from tfslurm.catalog.views import View, rendered, time
from tfslurm.files import read_json
from tfslurm.paths import JobPaths, Root

KINDS = ("validation", "training", None)
"""What a cell's loss is of, the better kind first; None where there is none yet."""

FAILED = frozenset({JobStatus.ERROR, JobStatus.STOPPED})


def sweep_view(sweep: Sweep) -> View:
    """The sweep as users and scripts see it; its status follows from those of its jobs."""
    jobs = Job.select(Job.name, Job.status, Job.error).where(Job.sweep == sweep).order_by(Job.id).namedtuples()
    counts = Counter(job.status for job in jobs)
    failed = next((job for job in jobs if job.error), None)
    return {
        "id": sweep.id,
        "name": sweep.name,
        "kind": "sweep",
        "status": _status(counts),
        "grid": dict(sweep.grid),
        "max_parallel": sweep.max_parallel,
        "cells": len(jobs),
        "statuses": {status.value: counts[status] for status in JobStatus if counts[status]},
        "error": failed and f"{counts[JobStatus.ERROR]} of {len(jobs)} jobs failed; '{failed.name}': {failed.error}",
        "owner": sweep.owner,
        "created_at": time(sweep.created_at),
    }


def _status(counts: Counter[str]) -> str:
    """Of jobs that have not ended, the furthest on; of those that have, the worst."""
    if any(not JobStatus(status).ended for status in counts):
        waiting = set(counts) <= {JobStatus.PENDING}
        stopping = JobStatus.RUNNING not in counts and JobStatus.PENDING not in counts
        return JobStatus.PENDING if waiting else JobStatus.STOPPING if stopping else JobStatus.RUNNING
    return next(status for status in (JobStatus.ERROR, JobStatus.STOPPED, JobStatus.COMPLETED) if status in counts)


def ranked(root: Root, sweep: Sweep) -> list[View]:
    """Every cell, the lowest loss first; what failed or was stopped comes last.

    A cell's loss is of its validation where there was one, else that of its last training step: `loss_of` says which.
    Raises InvalidError where a rendered configuration is not the one that was recorded.
    """
    of = Checkpoint.select(Checkpoint.job, Checkpoint.artifact).join(Job).where(Job.sweep == sweep)
    made = {job: checkpoint for job, checkpoint in of.tuples()}
    cells = [_cell(root, job, made.get(job.id)) for job in queries.jobs_of(sweep)]
    cells.sort(key=_rank)
    return [{"rank": number, **cell} for number, cell in enumerate(cells, 1)]


def _cell(root: Root, job: Job, checkpoint: str | None) -> View:
    paths = root.job(job.id)
    config, progress = rendered(paths.config, job.config_digest), read_json(paths.progress) or {}
    loss, loss_of = _loss(paths, progress)
    return {
        "id": job.id,
        "name": job.name,
        "status": job.status,
        "hyperparameters": config["hyperparameters"],
        "seed": config["seed"],
        "loss": loss,
        "loss_of": loss_of,
        "step": progress.get("step"),
        "steps": progress.get("steps"),
        "checkpoint": checkpoint,
        "error": job.error,
    }


def _loss(paths: JobPaths, progress: dict[str, Any]) -> tuple[float | None, str | None]:
    for value, kind in ((_validated(paths), "validation"), (progress.get("loss"), "training")):
        if value is not None and math.isfinite(value):
            return value, kind
    return None, None


def _validated(paths: JobPaths) -> float | None:
    """The lowest loss on rows that are not trained on: the weights that had it are those that are kept."""
    try:
        lines = paths.metrics.read_bytes().splitlines()
    except FileNotFoundError:
        return None
    measured = (json.loads(line)["validation_loss"] for line in lines if b'"validation_loss"' in line)
    return min(measured, default=None)


def _rank(cell: View) -> tuple:
    return cell["status"] in FAILED, KINDS.index(cell["loss_of"]), cell["loss"] or 0.0
