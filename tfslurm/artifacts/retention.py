"""What stays of a job that has ended: what was run, how it went, and the end of its logs; as long as the job's row.

    resume/    at once where the job completed, else after the site's reclaim.resume days
    adapter/   at once where it is registered as a checkpoint, whose own copy it is no part of
    the rest   after reclaim.jobs days; of longer logs the last LOG_END bytes stay

Nothing of this is touched while the job has not ended, or while something that was handed over for it is not known
to have ended: rows decide, as everywhere. What goes is renamed into the trash, piece by piece; a log is replaced by
its end in one rename. Killed in between, the next run goes on, and with all done there is nothing left to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

from tfslurm.artifacts import trash
from tfslurm.artifacts.leftovers import names_in
from tfslurm.catalog import needs
from tfslurm.catalog.models import Checkpoint, Job, JobStatus
from tfslurm.faults import fault_point
from tfslurm.files import write_atomic
from tfslurm.paths import JobPaths
from tfslurm.settings import Settings

LOG_END = 64 * 1024
"""Bytes that stay of a log, with the line that says what was cut off."""

NOTICE = 128
"""Bytes that are left for that line."""

Part = Literal["resume", "adapter", "rest"]


@dataclass(frozen=True)
class Remnant:
    """A part of a job's folder that may go from the moment `due` on; without one, for the reason why it stays."""

    job: Job
    part: Part
    folder: Path
    reason: str
    due: datetime | None
    going: tuple[Path, ...]
    """What is moved away."""
    logs: tuple[Path, ...] = ()
    """What is cut down to its end."""

    @property
    def name(self) -> str:
        return self.job.name

    @property
    def path(self) -> Path:
        return self.folder if self.part == "rest" else self.folder / self.part

    def size(self) -> int:
        """The bytes that would go."""
        return sum(map(trash.tree_size, self.going)) + sum(log.stat().st_size - LOG_END for log in self.logs)


def remnants(settings: Settings) -> Iterator[Remnant]:
    """Everything that may go, now or later, of all jobs."""
    judge = Judge(settings)
    for job in Job.select().order_by(Job.id).iterator():
        yield from judge(job)


def prune(settings: Settings, found: Remnant, at: datetime) -> str | None:
    """Take away what was found, if the rows still say so; else why it stays."""
    now = next((each for each in Judge(settings)(Job.get_by_id(found.job.id)) if each.part == found.part), None)
    if now is None:
        return "it is gone already"
    if now.due is None or at < now.due:
        return now.reason if now.due is None else "it is needed by now"
    for path in now.going:
        trash.discard(settings.root, path, at)
        fault_point("retention-moved")
    for log in now.logs:
        cut(log, at)
        fault_point("retention-cut")
    return None


class Judge:
    """Says of a job what may go of its folder, and when."""

    def __init__(self, settings: Settings) -> None:
        self.root = settings.root
        # Before any job's row is read: one that ends in between is then taken for alive.
        self.alive = needs.alive()
        self.resume = timedelta(days=settings.site.reclaim.resume)
        self.jobs = timedelta(days=settings.site.reclaim.jobs)

    def __call__(self, job: Job) -> Iterator[Remnant]:
        paths = self.root.job(job.id)
        if not paths.folder.is_dir():
            return
        ended = job.ended_at or trash.changed(paths.folder)
        old, said = ended + self.jobs, f"job '{job.name}' is {job.status} since {ended:%Y-%m-%d}"
        registered = paths.adapter.is_dir() and Checkpoint.select().where(Checkpoint.job == job.id).exists()
        if paths.resume.is_dir():
            due = ended if job.status == JobStatus.COMPLETED else min(ended + self.resume, old)
            yield self._remnant(job, "resume", said, due, (paths.resume,))
        if registered:
            yield self._remnant(job, "adapter", "it is registered as a checkpoint", ended, (paths.adapter,))
        going, logs = _beyond_the_record(paths, registered), _long_logs(paths.logs)
        if (going or logs) and not self._stays(job):  # of what runs, only the two above are worth a line
            yield self._remnant(job, "rest", said, old, going, logs)

    def _remnant(
        self, job: Job, part: Part, reason: str, due: datetime, going: tuple[Path, ...], logs: tuple[Path, ...] = ()
    ) -> Remnant:
        stays = self._stays(job)
        folder = self.root.job(job.id).folder
        return Remnant(job, part, folder, stays or reason, None if stays else due, going, logs)

    def _stays(self, job: Job) -> str | None:
        if not JobStatus(job.status).ended:
            return f"job '{job.name}' is {job.status}"
        return f"job '{job.name}' ({job.status}): {needs.HANDED}" if job.id in self.alive else None


def _beyond_the_record(paths: JobPaths, registered: bool) -> tuple[Path, ...]:
    """What is no part of the job's record, and has no rule of its own."""
    record = {paths.config, paths.deepspeed, paths.script, paths.metrics, paths.progress, paths.prepared}
    record |= {paths.started, paths.exit, paths.outcome, paths.logs, paths.resume, paths.folder / "own.sh"}
    record |= {paths.adapter} if registered else set()
    below = (paths.folder / name for name in names_in(paths.folder))
    # A claim keeps a second job of the same submission, which Slurm may still have, from running.
    going = [path for path in below if path not in record and not path.name.startswith("claim-")]
    # A log that was being cut when the process was killed.
    return (*going, *(paths.logs / name for name in names_in(paths.logs) if name.startswith(".")))


def _long_logs(folder: Path) -> tuple[Path, ...]:
    logs = (folder / name for name in names_in(folder) if not name.startswith("."))
    return tuple(log for log in logs if not log.is_symlink() and log.is_file() and log.stat().st_size > LOG_END)


def cut(log: Path, at: datetime) -> None:
    """Replace a log by its last bytes, LOG_END in all, from the beginning of a line; a first line says so.

    Killed halfway, the log is as it was, or is cut.
    """
    status = log.stat()
    with open(log, "rb") as file:
        file.seek(status.st_size - (LOG_END - NOTICE))
        end = file.read(LOG_END - NOTICE)
    end = end[end.find(b"\n") + 1 :]
    notice = f"[{status.st_size - len(end)} bytes were cut off here by tfslurm reclaim on {at:%Y-%m-%d}]\n"
    write_atomic(log, notice.encode() + end, mode=status.st_mode & 0o777)
