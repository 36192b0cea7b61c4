"""Making the storage root, and finding out what is wrong with one."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tfslurm.catalog import db
from tfslurm.errors import NotPermittedError, TfslurmError
from tfslurm.files import locked
from tfslurm.settings import Settings
from tfslurm.slurm.client import Slurm


def install(settings: Settings) -> list[str]:
    """Make the folders and the catalog, or bring the catalog to this version's schema; the migrations that ran.

    Raises NotPermittedError where the root cannot be written.
    """
    root = settings.root
    try:
        for folder in (root.path, *root.folders):
            folder.mkdir(parents=True, exist_ok=True)
        with locked(root.path / ".lock-init"):
            return db.migrate(settings)
    except PermissionError as error:
        raise NotPermittedError(f"{error.filename}: {error.strerror}", hint="Choose another root: --root.") from None


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, and the cure where it is wrong."""

    check: str
    result: Literal["ok", "warning", "wrong"]
    said: str
    cure: str | None = None


def examine(settings: Settings) -> Iterator[Finding]:
    """Look at everything that this installation needs, the foundations first."""
    yield _storage(settings)
    yield _catalog(settings)
    yield from _slurm(settings)
    for name, module, extra in (("train", "deepspeed", "train"), ("serve", "vllm", "serve")):
        yield _environment(settings.python(name), name, module, extra)


def _storage(settings: Settings) -> Finding:
    root = settings.root.path
    if not root.is_dir():
        return Finding("storage", "wrong", f"{root} does not exist", "Run `tfslurm init`.")
    free = os.statvfs(root).f_bavail * os.statvfs(root).f_frsize
    kind = db.filesystem(root)
    said = f"{root} ({kind}), {free / 2**30:.0f} GiB free"
    if not os.access(root, os.W_OK):
        return Finding("storage", "warning", f"{said}, read-only for you", "Commands that write will be refused.")
    if free < 10 * 2**30:
        return Finding("storage", "warning", said, "Make room: a dataset or checkpoint may not fit.")
    return Finding("storage", "ok", said)


def _catalog(settings: Settings) -> Finding:
    try:
        db.connect(settings)
    except TfslurmError as error:
        return Finding("catalog", "wrong", error.message, error.hint)
    mode = db.database.execute_sql("PRAGMA journal_mode").fetchone()[0]
    wanted = db.journal_mode(settings.root.path)
    said = f"SQLite {settings.root.catalog}, journal mode {mode}"
    if mode.upper() != wanted:
        return Finding("catalog", "wrong", said, f"This filesystem wants {wanted}: run `tfslurm init`.")
    return Finding("catalog", "ok", said)


def _slurm(settings: Settings) -> Iterator[Finding]:
    wanted = [i.name for i in settings.instances.values() if i.launcher == "slurm"]
    if not Slurm.installed():
        yield Finding(
            "slurm",
            "warning",
            "sbatch is not on PATH: only local instances can be used",
            f"On a login node of the cluster, {', '.join(wanted)} can be used too.",
        )
        return
    slurm = Slurm(settings.site.slurm.command_timeout)
    try:
        yield Finding("slurm", "ok", f"cluster {slurm.cluster()}")
    except TfslurmError as error:
        needed = "slurm" in _launchers(settings)
        cure = "Is slurmctld running, and SLURM_CONF right?" if needed else "The instances in use are local ones."
        yield Finding("slurm", "wrong" if needed else "warning", error.message, cure)
        return
    try:
        slurm.run("sacct", "--noheader", "--allocations", "--starttime=now")
        yield Finding("accounting", "ok", "sacct answers")
    except TfslurmError as error:
        yield Finding("accounting", "warning", error.message, "States then come from squeue and exit files alone.")


def _launchers(settings: Settings) -> set[str]:
    """The launchers of the instances that jobs, endpoints and imports take where nobody names one."""
    site = settings.site
    names = {"training": site.training.instance, "serving": site.serving.instance, "import": site.imports.instance}
    return {settings.instance(name, purpose).launcher for purpose, name in names.items()}


def _environment(python: str, name: str, module: str, extra: str) -> Finding:
    # The modules are found, not imported: that would take half a minute.
    script = f"import importlib.util as u, sys; sys.exit(not (u.find_spec('tfslurm') and u.find_spec({module!r})))"
    cure = f"Install tfslurm[{extra}] there, or name another interpreter: environments.{name} in site.yaml."
    try:
        done = subprocess.run([python, "-c", script], capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(f"environment {name}", "wrong", f"{python}: {error}", cure)
    if done.returncode:
        return Finding(f"environment {name}", "wrong", f"{python} has no {module}, or no tfslurm", cure)
    return Finding(f"environment {name}", "ok", f"{python} has {module}")
