"""From a folder that is being made to one that never changes, in a single rename."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from tfslurm.artifacts import manifest
from tfslurm.artifacts.manifest import Manifest
from tfslurm.errors import InvalidError
from tfslurm.faults import fault_point
from tfslurm.files import fsync_folder

_THERE_ALREADY = (errno.EEXIST, errno.ENOTEMPTY)


def publish(staging: Path, final: Path) -> Manifest:
    """Make `staging`, which has its manifest, appear as `final`: read-only, whole and on disk.

    Both lie in the same folder, so that the rename needs no right on `staging` itself and it can
    be read-only before. A crash leaves the one or the other, never a part of `final`. Run again
    after a crash, or where `final` has the same manifest already, it ends the same; what is left
    of `staging` is removed then.

    Raises InvalidError where `staging` has no manifest or other files than it lists, or where
    `final` is another artifact; nothing is changed then.
    """
    if staging.parent != final.parent:
        raise ValueError(f"{staging} and {final} must be in the same folder")
    if os.path.lexists(final):
        return _already_published(staging, final)
    listed = manifest.read(staging)
    manifest.check_names(staging, listed)
    _make_durable(staging)
    fault_point("publish-synced")
    _make_read_only(staging)
    fault_point("publish-read-only")
    try:
        os.rename(staging, final)
    except OSError as error:
        if error.errno in _THERE_ALREADY:
            return _already_published(staging, final)
        raise
    fault_point("publish-renamed")
    fsync_folder(final.parent)
    return listed


def _already_published(staging: Path, final: Path) -> Manifest:
    published = manifest.read(final)
    if staging.exists():
        if manifest.read(staging) != published:
            raise InvalidError(f"{final}: another artifact is published there.")
        remove_tree(staging)
    fsync_folder(final.parent)
    return published


def _make_durable(folder: Path) -> None:
    """fsync every file, then every folder, the innermost first."""
    for _, _, files, descriptor in os.fwalk(folder, topdown=False, onerror=_raise):
        for name in files:
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=descriptor)
            try:
                os.fsync(file)
            finally:
                os.close(file)
        os.fsync(descriptor)


def _make_read_only(folder: Path) -> None:
    for _, _, files, descriptor in os.fwalk(folder, topdown=False, onerror=_raise):
        for name in files:
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=descriptor)
            try:
                os.fchmod(file, 0o444)
                os.fsync(file)
            finally:
                os.close(file)
        os.fchmod(descriptor, 0o555)
        os.fsync(descriptor)


def remove_tree(folder: Path) -> None:
    """Delete a folder and all in it, read-only parts too; what is gone already counts as done.

    No link is followed. Run again after a crash, it goes on.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        folder.unlink(missing_ok=True)
        return
    try:
        _empty(descriptor)
    finally:
        os.close(descriptor)
    _quietly(os.rmdir, folder)


def _empty(folder: int) -> None:
    os.fchmod(folder, 0o700)
    for name in os.listdir(folder):
        try:
            is_folder = stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
        except FileNotFoundError:
            continue
        if not is_folder:
            _quietly(os.unlink, name, dir_fd=folder)
            fault_point("tree-part-removed")
            continue
        inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
        try:
            _empty(inner)
        finally:
            os.close(inner)
        _quietly(os.rmdir, name, dir_fd=folder)


def _quietly(remove, *arguments, **options) -> None:
    try:
        remove(*arguments, **options)
    except FileNotFoundError:
        pass


def _raise(error: OSError) -> None:
    raise error
