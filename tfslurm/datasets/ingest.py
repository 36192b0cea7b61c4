"""Data files to a staged copy that nobody else ever had open: hashed, validated, listed.

Each file is copied, then the copy is what is hashed and validated, so that a sealed dataset's
digest and report are about its own bytes. `ingest_file` is the unit to run in parallel: it shares
nothing with other files but the tally, which can be merged.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tfslurm.artifacts import manifest
from tfslurm.artifacts.manifest import Entry, Manifest
from tfslurm.artifacts.publish import remove_tree
from tfslurm.datasets.files import DataFile, Identity, discover
from tfslurm.datasets.report import Report
from tfslurm.datasets.validation import Validator, refuse
from tfslurm.errors import InvalidError, UnreachableError
from tfslurm.faults import fault_point

BLOCK = 1024 * 1024
CLOCK_TICK = 0.02
"""Seconds after which a write surely gets another time stamp than one before it."""
_FICLONE = 0x40049409
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all: a byte counts half when copied and half when checked."""


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
) -> Ingested:
    """Copy the data files of `source` (a folder, a file, a list of both) into the new folder `staging`.

    What an earlier, killed attempt left in `staging` is removed first. It is on disk only once
    `artifacts.publish.publish` has been called. On any failure `staging` is removed; the source is
    never changed. Raises ValidationError with the report for bad files or rows, InvalidError for a
    source that is missing or changes meanwhile, NotPermittedError, and UnreachableError where the
    disk is full.
    """
    validator = Validator(format, field_map or {})
    found = discover(source)
    validator.note_files(found)
    if found.problems or not found.files:
        refuse(validator.report(), _named(source))
    remove_tree(staging)
    with _room_for(found.size, staging), _removed_on_failure(staging):
        staging.mkdir(mode=0o700)
        meter = _Meter(2 * found.size, progress)
        entries = [ingest_file(file, staging, validator, meter) for file in found.files]
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


def ingest_file(file: DataFile, staging: Path, validator: Validator, on_bytes: Callable[[int], None]) -> Entry:
    """Copy one file into `staging` and validate the copy."""
    target = staging / file.name
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    size, sha256 = copy(file, target, on_bytes)
    fault_point("ingest-copied")
    validator.check_file(target, file.name, on_read=on_bytes)
    return Entry(file.name, size, sha256)


def copy(file: DataFile, target: Path, on_bytes: Callable[[int], None]) -> tuple[int, str]:
    """Copy `file` to a new file; (bytes, SHA-256 in hex). InvalidError if it changes meanwhile."""
    _let_the_clock_pass(file.identity)
    source = file.open()
    try:
        written = os.open(target, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW, 0o600)
        try:
            if _clone(source, written):
                size, sha256 = _hash(written, on_bytes)
            else:
                size, sha256 = _copy_and_hash(source, written, on_bytes)
        finally:
            os.close(written)
        if Identity.of(os.fstat(source)) != file.identity or size != file.size:
            raise InvalidError(
                f"{file.path}: changed while it was copied.", hint="Wait until nothing writes to it, then try again."
            )
    finally:
        os.close(source)
    return size, sha256


def _let_the_clock_pass(identity: Identity) -> None:
    """Wait until a write after now cannot leave the times as they were found."""
    newest = max(identity.mtime_ns, identity.ctime_ns) / 1e9
    if time.time() - newest < CLOCK_TICK:
        time.sleep(CLOCK_TICK)


def _clone(source: int, target: int) -> bool:
    """Share the blocks on filesystems that can (btrfs, XFS, bcachefs); the inode is new all the same."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise
        return False
    return True


def _hash(descriptor: int, on_bytes: Callable[[int], None]) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    while block := os.read(descriptor, BLOCK):
        digest.update(block)
        size += len(block)
        on_bytes(len(block))
    return size, digest.hexdigest()


def _copy_and_hash(source: int, target: int, on_bytes: Callable[[int], None]) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    while block := os.read(source, BLOCK):
        digest.update(block)
        _write_all(target, block)
        size += len(block)
        on_bytes(len(block))
    return size, digest.hexdigest()


def _write_all(target: int, block: bytes) -> None:
    left = memoryview(block)
    while left:
        left = left[os.write(target, left) :]


class _Meter:
    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def __call__(self, count: int) -> None:
        self.done += count
        if self.progress:
            self.progress(self.done // 2, self.total // 2)


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
        if error.errno not in _NO_ROOM:
            raise
        raise UnreachableError(f"{staging.parent}: the disk is full ({error.strerror}).", hint=hint) from error


@contextmanager
def _removed_on_failure(staging: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        remove_tree(staging)
        raise
