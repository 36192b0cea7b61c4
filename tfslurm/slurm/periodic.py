"""Sync without cron: a small batch job that queues its own successor, for sites whose login nodes have no cron.

Its name is one for each storage root, and `--dependency=singleton` lets one of that name run at a time.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from tfslurm.errors import InvalidError, StatusError
from tfslurm.files import write_atomic
from tfslurm.settings import Settings
from tfslurm.slurm.client import Slurm
from tfslurm.slurm.executors import launcher


@dataclass(frozen=True)
class PeriodicSync:
    """What `start` would write and submit."""

    name: str
    folder: Path
    script: str


def name_of(settings: Settings) -> str:
    return f"tfslurm-sync-{hashlib.sha256(str(settings.root.path).encode()).hexdigest()[:12]}"


def plan(settings: Settings, *, minutes: int = 5, instance: str | None = None) -> PeriodicSync:
    """Render the job; writes nothing.

    Raises InvalidError for less than a minute or an instance without Slurm, NotFoundError for an unknown one,
    ConfigurationError as `templates.render` does.
    """
    from tfslurm.slurm.templates import Script, render

    if minutes < 1:
        raise InvalidError(f"a sync every {minutes} minutes is not possible: the least is 1")
    size = settings.instance(instance or settings.site.imports.instance, "import")
    if size.launcher != "slurm":
        raise InvalidError(f"instance '{size.name}' does not run on Slurm", hint="Take one that does, or use cron.")
    name, folder = name_of(settings), settings.root.path / "sync"
    script = Script.of(settings, "sync", size, folder, uuid=name, kind="sync", object_id="sync", minutes=minutes)
    return PeriodicSync(name, folder, render(script))


def start(settings: Settings, made: PeriodicSync) -> str:
    """Write the script and submit the first one; Slurm's id for it.

    Raises StatusError where one waits or runs already, SlurmRefused, SlurmUnreachable.
    """
    there = queued(settings)
    if there:
        raise StatusError(f"sync is queued already, as job {', '.join(there)}", hint="Stop it first.")
    (made.folder / "logs").mkdir(parents=True, exist_ok=True)
    (made.folder / "stop").unlink(missing_ok=True)
    script = made.folder / "script.sh"
    write_atomic(script, made.script, mode=0o555)
    return launcher("slurm", settings).submit(script).job_id


def stop(settings: Settings) -> list[str]:
    """Cancel what waits or runs, and let it queue no more; the ids. Raises SlurmUnreachable."""
    folder = settings.root.path / "sync"
    if folder.is_dir():
        (folder / "stop").touch()
    there = queued(settings)
    _slurm(settings).cancel_named(name_of(settings))
    return there


def queued(settings: Settings) -> list[str]:
    """The ids of those that wait or run. Raises SlurmUnreachable."""
    return _slurm(settings).run("squeue", "--noheader", "--format=%A", f"--name={name_of(settings)}").split()


def _slurm(settings: Settings) -> Slurm:
    return Slurm(settings.site.slurm.command_timeout)
