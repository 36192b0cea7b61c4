"""Standard input, kept under the root until its import has been registered."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tfslurm.artifacts.publish import remove_tree
from tfslurm.errors import InvalidError, UnreachableError
from tfslurm.faults import fault_point
from tfslurm.files import locked
from tfslurm.paths import ImportPaths, Root

INCOMING = ".incoming-"
BLOCK = 1024 * 1024

_MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all, 0 where nobody knows."""


@contextmanager
def spooled(root: Root, paths: ImportPaths, stream: BinaryIO, progress: Progress | None = None) -> Iterator[None]:
    """Make the import's folder with all that comes from `stream` as its one object.

    The process that reads it holds a lock while it does, and until this context ends: what one that was
    killed left behind is known by its lock being free, and removed by the next (`sweep`). On failure
    nothing stays. Raises InvalidError where nothing comes, UnreachableError where the disk is full.
    """
    sweep(root)
    incoming = paths.folder.with_name(f"{INCOMING}{paths.folder.name}")
    with locked(_lock_of(incoming)):
        try:
            objects = incoming / paths.objects.relative_to(paths.folder)
            objects.mkdir(mode=0o700, parents=True)
            _copy(stream, objects, progress)
            fault_point("import-spooled")
            incoming.rename(paths.folder)
        except BaseException:
            remove_tree(incoming)
            raise
        yield


def sweep(root: Root) -> list[Path]:
    """Remove what killed processes were spooling; the folders that were there."""
    removed = []
    for lock in root.import_("x").folder.parent.glob(f"{INCOMING}*.lock"):
        try:
            with open(lock, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(file.fileno()).st_nlink:
                    remove_tree(lock.with_suffix(""))
                    os.unlink(lock)
                    removed.append(lock.with_suffix(""))
        except (FileNotFoundError, BlockingIOError):
            continue  # it has ended, or it is at it
    return removed


def _lock_of(incoming: Path) -> Path:
    return incoming.with_name(f"{incoming.name}.lock")


def _copy(stream: BinaryIO, objects: Path, progress: Progress | None) -> None:
    total, done = _length(stream), 0
    block = stream.read(BLOCK)
    if not block:
        raise InvalidError("nothing came on standard input")
    suffix = next((suffix for magic, suffix in _MAGIC.items() if block.startswith(magic)), "")
    try:
        with open(objects / f"stdin.jsonl{suffix}", "xb", buffering=0) as file:
            while block:
                done += file.write(block)
                if progress:
                    progress(done, total)
                block = stream.read(BLOCK)
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UnreachableError(f"{objects}: the disk is full ({error.strerror}).") from error
        raise


def _length(stream: BinaryIO) -> int:
    status = os.fstat(stream.fileno())
    return status.st_size if stat.S_ISREG(status.st_mode) else 0
