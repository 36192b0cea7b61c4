"""Data files to a staged copy that nobody else ever had open: hashed, validated, listed.

The bytes that are hashed and validated are those of the copy, so that a sealed dataset's digest
and report are about its own bytes. `scan` does it, in parallel.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tfslurm.artifacts import manifest
from tfslurm.artifacts.manifest import Manifest
from tfslurm.artifacts.publish import remove_tree
from tfslurm.datasets.copying import NO_ROOM
from tfslurm.datasets.files import discover
from tfslurm.datasets.report import Report
from tfslurm.datasets.scan import Progress, scan
from tfslurm.datasets.validation import Validator, refuse
from tfslurm.errors import UnreachableError
from tfslurm.faults import fault_point


@dataclass(frozen=True)
class Ingested:
    """What lies in the staging folder now; its manifest is written there too."""

    manifest: Manifest
    report: Report


def ingest(
    source: Path | Sequence[Path],
    staging: Path,
    *,
    format: str,
    field_map: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    workers: int | None = None,
) -> Ingested:
    """Copy the data files of `source` (a folder, a file, a list of both) into the new folder `staging`.

    `workers` processes share the work, as many as there are cores where it is None; `progress` gets
    bytes done and bytes in all. What an earlier, killed attempt left in `staging` is removed first.
    It is on disk only once `artifacts.publish.publish` has been called. On any failure `staging` is
    removed; the source is never changed. Raises ValidationError with the report for bad files or
    rows, InvalidError for a source that is missing or changes meanwhile, NotPermittedError,
    UnreachableError where the disk is full, and EndedBadly where one of the processes is killed.
    """
    validator = Validator(format, field_map or {})
    found = discover(source)
    validator.note_files(found)
    if found.problems or not found.files:
        refuse(validator.report(), _named(source))
    remove_tree(staging)
    with _room_for(found.size, staging), _removed_on_failure(staging):
        staging.mkdir(mode=0o700)
        entries = scan(found.files, validator, staging, progress=progress, workers=workers)
        report = validator.report()
        refuse(report, _named(source))
        fault_point("ingest-validated")
        listed = Manifest.of(entries)
        manifest.write(listed, staging)
        fault_point("ingest-listed")
    return Ingested(listed, report)


def _named(source: Path | Sequence[Path]) -> str:
    if isinstance(source, Path):
        return str(source)
    return str(source[0]) if len(source) == 1 else f"{len(source)} files"


@contextmanager
def _room_for(size: int, staging: Path) -> Iterator[None]:
    """Turn a full disk, known before or found on the way, into UnreachableError."""
    status = os.statvfs(staging.parent)
    free = status.f_bavail * status.f_frsize
    hint = "Make room (`tfslurm reclaim` may help), then try again."
    if size > free:
        raise UnreachableError(f"{staging.parent}: {size:,} bytes are needed, {free:,} are free.", hint=hint)
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise UnreachableError(f"{staging.parent}: the disk is full ({error.strerror}).", hint=hint) from error


@contextmanager
def _removed_on_failure(staging: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        remove_tree(staging)
        raise
