"""What killed commands left over, and what an end left behind: folders that no row and nothing alive needs.

A folder is judged by its name's row, and by whether anything alive has that id; never by its mode or by a process.
What has no row at all is left alone unless it never held anything: it may be all that is left of a row that was lost.
`fsck` speaks of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from tfslurm.artifacts.trash import changed
from tfslurm.catalog import needs
from tfslurm.catalog.models import Artifact, Endpoint, Job, Submission, Sweep
from tfslurm.files import read_json
from tfslurm.identity import job_id_of
from tfslurm.paths import LOCK, STAGING, ArrayPaths, RunPaths
from tfslurm.settings import Settings

FOLDERS = (
    "datasets", "checkpoints", "assembling", "imports", "jobs", "arrays", "endpoints", "models", "cache/tokens",
    "cache/identities",
)  # fmt: skip
"""Where something may be left over, below the root."""


@dataclass(frozen=True)
class Leftover:
    """Something that may go from the moment `due` on."""

    path: Path
    reason: str
    due: datetime
    lock: Path | None = None
    """Whoever makes something here holds this."""


def leftovers(settings: Settings) -> Iterator[Leftover]:
    """Everything that may go, now or later."""
    # The folders are read first: what is made after that is not seen at all.
    paths = [settings.root.path / folder / name for folder in FOLDERS for name in names_in(settings.root.path / folder)]
    columns = (Artifact.id, Artifact.kind, Artifact.status, Artifact.sealed_at, Artifact.reclaimed_at)
    rows = {row.id: row for row in Artifact.select(*columns).namedtuples()}
    judge = Judge(settings, rows.get)
    yield from filter(None, map(judge, paths))


def again(settings: Settings, found: Leftover) -> Leftover | None:
    """What was found, judged by the rows as they are now; None where it is needed by now."""
    return Judge(settings, lambda name: Artifact.get_or_none(Artifact.id == name))(found.path)


class Judge:
    """Says of a path in one of FOLDERS whether it is left over."""

    def __init__(self, settings: Settings, row: Callable[[str], Any]) -> None:
        self.root, self.row, self.alive = settings.root, row, needs.alive()
        self.grace = timedelta(days=settings.site.reclaim.grace)
        self.jobs = timedelta(days=settings.site.reclaim.jobs)
        self.unused = timedelta(days=settings.site.reclaim.unused_tokens)
        self.tokens = {(read_json(self.root.job(name).prepared) or {}).get("tokens") for name in self.alive}

    def __call__(self, path: Path) -> Leftover | None:
        rules = {
            "datasets": self._dataset,
            "checkpoints": self._checkpoint,
            "assembling": self._assembling,
            "imports": self._import,
            "jobs": self._run,
            "arrays": self._array,
            "endpoints": self._run,
            "models": self._model,
            "tokens": self._token_file,
            "identities": self._identities,
        }
        return rules[path.parent.name](path)

    def _dataset(self, path: Path) -> Leftover | None:
        name = path.name.removeprefix(STAGING).removeprefix(LOCK)
        row, lock = self.row(name), self.root.dataset(LOCK + name)
        if path == lock:
            return Leftover(path, "a lock that nobody holds", changed(path) + self.grace, lock)
        if row is None or name in self.alive:
            return None
        if _given_up(row):
            return Leftover(path, "its dataset was reclaimed", row.reclaimed_at, lock)
        if path.name.startswith(STAGING):
            return Leftover(path, "a part of what was never published", changed(path) + self.grace, lock)
        if row.status in ("assembling", "error"):
            reason = f"published by a command that was killed: its dataset is {row.status}"
            return Leftover(path, reason, changed(path) + self.grace, lock)
        return None

    def _checkpoint(self, path: Path) -> Leftover | None:
        name = path.name.removeprefix(STAGING)
        row = self.row(name)
        if row and _given_up(row):
            return Leftover(path, "its checkpoint was reclaimed", row.reclaimed_at)
        if row and name == path.name:
            return None
        job = Job.get_or_none(Job.id == job_id_of(name))
        if job is None or job.id in self.alive:
            return None
        return Leftover(path, f"never registered: its job is {job.status}", changed(path) + self.grace)

    def _assembling(self, path: Path) -> Leftover | None:
        row, lock = self.row(path.name), self.root.dataset(LOCK + path.name)
        if row is None:
            empty = path.is_dir() and not any(os.scandir(path))
            reason = "empty, of a dataset that was never registered"
            return Leftover(path, reason, changed(path) + self.grace) if empty else None
        if _given_up(row):
            return Leftover(path, "its dataset was reclaimed", row.reclaimed_at, lock)
        if row.status == "ready":
            return Leftover(path, "its dataset is sealed", max(row.sealed_at, changed(path)) + self.grace, lock)
        return None

    def _import(self, path: Path) -> Leftover | None:
        row = self.row(path.name)
        if row is None:
            return self._run(path)
        if row.id in self.alive:
            return None
        if _given_up(row):
            return Leftover(path, "its dataset was reclaimed", row.reclaimed_at)
        if row.status in ("ready", "error"):
            return Leftover(path, f"its import has ended: {row.status}", changed(path) + self.grace)
        return None

    def _run(self, path: Path) -> Leftover | None:
        if never_ran(path) and not _registered(path.name):
            return Leftover(path, "of a command that was killed before it registered this", changed(path) + self.grace)
        return None

    def _array(self, path: Path) -> Leftover | None:
        """What tasks of an array share, by its name; or cells of a sweep that take turns, by the sweep's id."""
        tasks = Submission.select().join(Job, on=(Job.id == Submission.object_id))
        tasks = list(tasks.where((Submission.name == path.name) | (Job.sweep == path.name)))
        if any(task.object_id in self.alive for task in tasks):
            return None
        if tasks:
            due = max(task.ended_at for task in tasks) + self.jobs
            return Leftover(path, "all that was handed over with it has ended", due)
        if Sweep.get_or_none(Sweep.id == path.name) or any(map(_known, _cells(path))):
            return None
        return Leftover(path, "of a command that was killed before it registered this", changed(path) + self.grace)

    def _model(self, path: Path) -> Leftover | None:
        if not path.name.startswith(STAGING):
            return None
        # No row speaks of it until it is there: the newest file does.
        newest = max([changed(path), *(changed(below) for below in path.rglob("*"))])
        return Leftover(path, "a part of a base model that was never added", newest + self.grace)

    def _token_file(self, path: Path) -> Leftover | None:
        if str(path) in self.tokens:
            return None
        return Leftover(path, "no job has used these tokens for long", changed(path) + self.unused)

    def _identities(self, path: Path) -> Leftover | None:
        row = self.row(path.stem)
        if row is None or not _given_up(row):
            return None
        return Leftover(path, "its dataset was reclaimed", row.reclaimed_at)


def _given_up(row: Any) -> bool:
    """Whether the row was claimed: the bytes of one with any other status are never touched for it."""
    return row.status == "deleted" and row.reclaimed_at is not None


def never_ran(path: Path) -> bool:
    """Whether a folder of something that runs says nothing of a start: then it holds what was rendered, and no more."""
    return not RunPaths(path).started.exists()


def _cells(array: Path) -> list[Path]:
    """The folders of what an array's tasks run; none where the list was never written."""
    cells = ArrayPaths(array).cells
    return [Path(line.partition("\t")[2]) for line in cells.read_text().splitlines()] if cells.exists() else []


def _known(folder: Path) -> bool:
    return not never_ran(folder) or _registered(folder.name)


def _registered(name: str) -> bool:
    return bool(Job.get_or_none(Job.id == name) or Endpoint.get_or_none(Endpoint.id == name))


def names_in(folder: Path) -> list[str]:
    """The names in a folder, sorted; none where it is missing."""
    return sorted(os.listdir(folder)) if folder.is_dir() else []
