"""A cheap check between full ones: an artifact's files still are the inodes that were verified.

Every write to a file changes its ctime, which no one can set back, so a file with the inode,
size and times of the last full verification has its bytes too, unless the disk itself changed
them; hence the age after which all is read again. The identities lie in a file of their own,
outside of the read-only folder and of its digest: they can be made again at any time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from tfslurm.artifacts import manifest
from tfslurm.artifacts.manifest import Manifest, Progress
from tfslurm.errors import InvalidError
from tfslurm.files import write_atomic

CLOCK_TICK = 0.02
"""Seconds after which a change surely gets another time stamp than one before it."""


class FileIdentity(msgspec.Struct, frozen=True):
    """Of one file; the device is left out, since each node numbers its mounts itself."""

    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


class Identities(msgspec.Struct, frozen=True):
    """The files of the artifact `digest`, as they were when all bytes were right; `verified_at` in seconds."""

    digest: str
    verified_at: float
    files: dict[str, FileIdentity]


def record(folder: Path, expected_digest: str, path: Path, *, now: Callable[[], float] = time.time) -> None:
    """Write down the identities of an artifact whose bytes are known to be right: at once after `publish`.

    Raises InvalidError where its manifest is not that of `expected_digest`, or a file is missing.
    """
    _write(path, Identities(expected_digest, now(), _settled(folder, _listed(folder, expected_digest))))


def verify_quick(
    folder: Path,
    expected_digest: str,
    path: Path,
    max_age: float,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
    now: Callable[[], float] = time.time,
) -> bool:
    """Verify `folder`; whether all bytes had to be read.

    They are not where the identities in `path` are those of the files and were taken less than
    `max_age` seconds ago; names, sizes and the manifest's digest are compared all the same. After
    a full verification the identities are written anew, if `path` may be written. Raises InvalidError
    as `manifest.verify_folder` does.
    """
    listed = _listed(folder, expected_digest)
    manifest.check_names(folder, listed)
    before = _settled(folder, listed)
    recorded = _read(path)
    if recorded and recorded.digest == expected_digest and recorded.files == before:
        if 0 <= now() - recorded.verified_at < max_age:
            return False
    started = now()
    manifest.verify_folder(folder, expected_digest, workers=workers, progress=progress)
    if _identities(folder, listed) == before:
        _write_if_allowed(path, Identities(expected_digest, started, before))
    return True


def _listed(folder: Path, expected_digest: str) -> Manifest:
    listed = manifest.read(folder)
    if listed.digest != expected_digest:
        path = folder / manifest.MANIFEST
        raise InvalidError(f"{path}: its digest is {listed.digest}, not {expected_digest} as recorded.")
    return listed


def _settled(folder: Path, listed: Manifest) -> dict[str, FileIdentity]:
    """The identities, taken late enough that a later change cannot leave the times as they are."""
    taken = _identities(folder, listed)
    newest = max((max(file.mtime_ns, file.ctime_ns) for file in taken.values()), default=0) / 1e9
    if abs(time.time() - newest) >= CLOCK_TICK:
        return taken
    time.sleep(CLOCK_TICK)
    return _identities(folder, listed)


def _identities(folder: Path, listed: Manifest) -> dict[str, FileIdentity]:
    return {entry.path: _identity(folder / entry.path) for entry in listed.entries}


def _identity(path: Path) -> FileIdentity:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        raise InvalidError(f"{path}: is missing") from None
    return FileIdentity(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _read(path: Path) -> Identities | None:
    """None where there are none, or what is there is none of ours: then all bytes are read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Identities)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def _write(path: Path, identities: Identities) -> None:
    write_atomic(path, msgspec.json.encode(identities))


def _write_if_allowed(path: Path, identities: Identities) -> None:
    """A node that may not write there verifies as well; the next verification is full again, that is all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, identities)
    except OSError:
        return
