"""The way out of the root: a rename into trash/, and deletion a grace later.

An entry's name is the moment at which it came and the place that it came from,
`20260102T030405.000006Z-datasets-ds-…`: no clock of a filesystem is asked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tfslurm.artifacts.publish import remove_tree
from tfslurm.errors import UnreachableError
from tfslurm.faults import fault_point
from tfslurm.files import fsync_folder
from tfslurm.paths import Root

_STAMP = "%Y%m%dT%H%M%S.%fZ"
_NAME = re.compile(r"(\d{8}T\d{6}\.\d{6}Z)-([a-z]+)-(.+)")


@dataclass(frozen=True)
class Entry:
    """Something in the trash."""

    path: Path
    since: datetime
    folder: str
    """The folder below the root that it came from; "" for what did not come by `discard`."""
    name: str
    """What it was called there."""


def discard(root: Root, path: Path, at: datetime) -> bool:
    """Rename `path`, a file or folder somewhere below the root, into the trash; False where it is gone already.

    Raises UnreachableError where the trash is on another filesystem: then a rename is no rename.
    """
    root.trash.mkdir(exist_ok=True)
    target = root.trash / f"{at.astimezone(UTC).strftime(_STAMP)}-{path.parent.name}-{path.name}"
    try:
        _let_it_move(path)
        fault_point("trash-unlocked")
        os.rename(path, target)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UnreachableError(f"{path} cannot be moved to {root.trash}: {error.strerror}") from error
    fault_point("trash-renamed")
    fsync_folder(root.trash)
    fsync_folder(path.parent)
    return True


def _let_it_move(path: Path) -> None:
    """Another parent is written into the folder itself: the kernel asks for the right to write it."""
    if path.is_dir() and not path.is_symlink() and not os.access(path, os.W_OK):
        os.chmod(path, 0o700)


def entries(root: Root) -> Iterator[Entry]:
    """What is in the trash, the oldest first."""
    for path in sorted(root.trash.iterdir()) if root.trash.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match:
            since = datetime.strptime(match[1], _STAMP).replace(tzinfo=UTC)
            yield Entry(path, since, match[2], match[3])
        else:
            yield Entry(path, changed(path), "", path.name)


def take_out(root: Root, entry: Entry) -> None:
    """Put an entry back to where it came from, read-only as it was; nothing may be there."""
    target = root.path / entry.folder / entry.name
    if os.path.lexists(target):
        raise UnreachableError(f"{target} is there already: {entry.path} stays in the trash")
    os.rename(entry.path, target)
    os.chmod(target, 0o555)
    fsync_folder(target.parent)


def remove(entry: Entry) -> int:
    """Delete an entry for good; the bytes that it took."""
    size = tree_size(entry.path)
    fault_point("trash-counted")
    remove_tree(entry.path)
    fault_point("trash-removed")
    return size


def tree_size(path: Path) -> int:
    """The bytes of all files below `path`, or of `path` itself."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    return sum(os.lstat(os.path.join(folder, name)).st_size for folder, _, names in os.walk(path) for name in names)


def changed(path: Path) -> datetime:
    """When something was last written to `path` itself or its name changed; the present where it has just gone."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return datetime.now(UTC)
    return datetime.fromtimestamp(max(status.st_mtime, status.st_ctime), UTC)
