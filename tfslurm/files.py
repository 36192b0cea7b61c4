"""Small files that other processes read: written whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_atomic(path: Path, data: bytes | str, *, mode: int = 0o644) -> None:
    """Replace `path` by `data`: a reader sees the old bytes or the new ones, also after a crash.

    The bytes go to a temporary name in the same folder, are flushed to disk and renamed;
    on failure the temporary file is removed and `path` is as it was.
    """
    import tempfile  # with all that it imports, as long to load as the rest of a listing's own modules

    if isinstance(data, str):
        data = data.encode()
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    fsync_folder(path.parent)


def write_json(path: Path, value: Any, *, mode: int = 0o644) -> None:
    """`write_atomic` of indented JSON."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", mode=mode)


def read_json(path: Path) -> Any | None:
    """The value in `path`, or None where there is no such file."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None


def fsync_folder(folder: Path) -> None:
    """Make a rename or a new name in `folder` survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_filesystem(folder: Path) -> None:
    """Make everything written to the filesystem that holds `folder` survive a crash: one syncfs(2) for many files."""
    import ctypes  # only where many files are written at once

    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if libc.syncfs(descriptor):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(folder))
    finally:
        os.close(descriptor)


def tail(path: Path, lines: int = 20, *, limit: int = 64 * 1024) -> list[str]:
    """The last `lines` lines of `path`, read from its last `limit` bytes; [] where it is missing."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - limit))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return text.splitlines()[-lines:]


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """One process at a time between here and there; the kernel frees the lock of one that dies.

    The lock's file is removed at the end. Whoever waited for a file that is gone by then takes a new one:
    flock(2) locks the file, not its name. Without `wait`, raises BlockingIOError while another process is there.
    """
    while True:
        with open(path, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink:
                try:
                    yield
                finally:
                    os.unlink(path)
                return
