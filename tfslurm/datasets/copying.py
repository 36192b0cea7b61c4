"""Bytes of a data file to a new file that nobody else ever had open."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tfslurm.datasets.files import DataFile, Identity
from tfslurm.errors import InvalidError

CLOCK_TICK = 0.02
"""Seconds after which a write surely gets another time stamp than one before it."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
BLOCK = 1024 * 1024
STEP = 512 * 1024
"""Bytes that are read and written at a time: they are still in the processor's cache when they are written."""
_FICLONE = 0x40049409
_SYNC_FILE_RANGE_WRITE = 2


@dataclass(frozen=True)
class Copying:
    """A file that is read and, where `target` is a descriptor, copied there, in pieces of any order.

    Reading gives the bytes that are in the copy then: those read from the source and written, or,
    where the two share their blocks, those of the copy itself.
    """

    file: DataFile
    source: int
    target: int | None
    shares_blocks: bool

    def read_into(self, buffer: Any, start: int) -> None:
        """Fill `buffer` with the bytes from `start` on."""
        view, done = memoryview(buffer), 0
        while done < len(view):
            count = os.preadv(self._readable, [view[done : done + STEP]], start + done)
            if not count:
                raise _changed(self.file)
            self._write(view[done : done + count], start + done)
            done += count
        self._start_writing_out(start, len(view))

    def read(self, size: int, start: int) -> bytes:
        """At most `size` bytes from `start` on, none at the end."""
        data = os.pread(self._readable, size, start)
        self._write(memoryview(data), start)
        self._start_writing_out(start, len(data))
        return data

    def check_unchanged(self) -> None:
        """Raises InvalidError where the source is no longer as it was found."""
        if Identity.of(os.fstat(self.source)) != self.file.identity:
            raise _changed(self.file)

    @property
    def _readable(self) -> int:
        return self.target if self.shares_blocks and self.target is not None else self.source

    def _write(self, view: memoryview, start: int) -> None:
        if self.target is None or self.shares_blocks:
            return
        done = 0
        while done < len(view):
            done += os.pwrite(self.target, view[done:], start + done)

    def _start_writing_out(self, start: int, length: int) -> None:
        """Let the kernel write these bytes to disk meanwhile, so that the fsync at the end has little left.

        A hint without a promise: where it is not taken, only time is lost.
        """
        if self.target is not None and not self.shares_blocks and (sync := _sync_file_range()):
            sync(self.target, start, length, _SYNC_FILE_RANGE_WRITE)


@contextmanager
def copying(file: DataFile, staging: Path | None) -> Iterator[Copying]:
    """Open `file`, and its copy in `staging` where that is given, sharing blocks if the filesystem can.

    Raises InvalidError, at the end too, where the file is not the one that was found; NotPermittedError.
    """
    _let_the_clock_pass(file.identity)
    source, target = file.open(), None
    try:
        if staging:
            target = _create(staging / file.name)
        opened = Copying(file, source, target, target is not None and clone(source, target))
        yield opened
        opened.check_unchanged()
    finally:
        os.close(source)
        if target is not None:
            os.close(target)


def copy(file: DataFile, staging: Path) -> str:
    """Copy a whole file; the SHA-256 of the copy in hex."""
    digest, start = hashlib.sha256(), 0
    with copying(file, staging) as opened:
        while block := opened.read(BLOCK, start):
            digest.update(block)
            start += len(block)
    return digest.hexdigest()


def _create(target: Path) -> int:
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return os.open(target, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW, 0o600)


def _changed(file: DataFile) -> InvalidError:
    hint = "Wait until nothing writes to it, then try again."
    return InvalidError(f"{file.path}: changed while it was read.", hint=hint)


def _let_the_clock_pass(identity: Identity) -> None:
    """Wait until a write after now cannot leave the times as they were found."""
    newest = max(identity.mtime_ns, identity.ctime_ns) / 1e9
    if time.time() - newest < CLOCK_TICK:
        time.sleep(CLOCK_TICK)


def clone(source: int, target: int) -> bool:
    """Share the blocks on filesystems that can (btrfs, XFS, bcachefs); the inode is new all the same."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        return False
    return True


@cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """sync_file_range(2), which Python has no name for; None where the C library has none."""
    import ctypes  # in the workers, side by side: an import's start is its one part that is not shared

    try:
        function = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function
