"""Mounts: a read-only view of a dataset's files in a workspace.

A mount is a consumer of its dataset as long as it lasts. Whether a symbolic link lasts is seen from every host that
sees its folder; whether a bind mount lasts, only on its own host, since it ends with its process. Where it cannot be
seen it counts as lasting, and the refusal to delete says so.
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from tfslurm import process
from tfslurm.catalog.db import write_transaction
from tfslurm.catalog.models import Artifact, Dataset, DatasetStatus, Mount, now
from tfslurm.errors import InvalidError, NotFoundError, StatusError, UnreachableError
from tfslurm.identity import current_user

Container = Literal["apptainer", "pyxis"]


def link(dataset: Dataset, destination: Path) -> Mount:
    """Make `destination` a symbolic link to the canonical copy.

    Raises StatusError where the dataset is not ready, InvalidError where something is at `destination` already.
    """
    folder, path = _ready(dataset), _absolute(destination)
    try:
        os.symlink(folder, path)
    except FileExistsError:
        raise InvalidError(f"{path} exists already", hint="Name a place that is free.") from None
    except OSError as error:
        raise InvalidError(f"{path}: {error.strerror}") from None
    try:
        return _record(dataset, path, "symlink", None)
    except BaseException:
        os.unlink(path)
        raise


def run_bound(dataset: Dataset, destination: Path, command: Sequence[str]) -> int:
    """Run `command` where `destination` shows the dataset read-only, in a mount namespace of its own; its exit code.

    Raises StatusError where the dataset is not ready, UnreachableError where this machine can make no such mount.
    """
    folder, path = _ready(dataset), _absolute(destination)
    with _place(path):
        words = bound(folder, path, command)
        mount = _record(dataset, path, "bind", process.handle(os.getpid()))
        try:
            return os.waitstatus_to_exitcode(os.waitpid(os.spawnvp(os.P_NOWAIT, words[0], words), 0)[1])
        finally:
            _end(mount)


def bound(folder: Path, path: Path, command: Sequence[str]) -> list[str]:
    """The command line that runs `command` with `folder` bound read-only at `path`.

    Raises UnreachableError where neither bubblewrap nor unshare is installed.
    """
    if shutil.which("bwrap"):
        binds = ["--dev-bind", "/", "/", "--ro-bind", str(folder), str(path)]
        return ["bwrap", "--die-with-parent", *binds, "--", *command]
    if shutil.which("unshare"):
        script = 'mount --bind "$1" "$2" && mount -o remount,bind,ro "$2" && shift 2 && exec "$@"'
        namespace = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        unshare = ["unshare", *namespace, "--mount", "--fork", "--kill-child"]
        return [*unshare, "sh", "-c", script, "sh", str(folder), str(path), *command]
    raise UnreachableError("neither bwrap nor unshare is installed here", hint="Mount with --how symlink.")


def option(dataset: Dataset, destination: Path, container: Container) -> str:
    """The option with which a container shows the dataset read-only at `destination`."""
    pair = f"{_ready(dataset)}:{destination}:ro"
    name = {"apptainer": "--bind", "pyxis": "--container-mounts"}[container]
    return f"{name}={shlex.quote(pair)}"


def unmount(destination: Path) -> Mount:
    """Take a mount away: the link itself, or the record of a bind mount whose process cannot be seen from here.

    Raises NotFoundError where nothing of ours is mounted there, StatusError where a bind mount's process runs.
    """
    path = _absolute(destination)
    mount = Mount.select().where(Mount.path == str(path), Mount.ended_at.is_null()).order_by(Mount.id.desc()).first()
    if mount is None:
        raise NotFoundError(f"no dataset is mounted at {path}")
    if mount.how == "bind" and mount.host == socket.gethostname() and process.alive(mount.process):
        raise StatusError(f"{path} is in use by process {mount.process.partition(':')[0]}", hint="It ends with it.")
    if mount.how == "symlink" and _linked(mount):
        os.unlink(path)
    _end(mount)
    return mount


def lasting(dataset_id: str) -> list[str]:
    """The mounts of a dataset that last, in words; inside the transaction that depends on it."""
    mounts = Mount.select().where(Mount.artifact == dataset_id, Mount.ended_at.is_null()).order_by(Mount.id)
    return [words for mount in mounts if (words := _lasts(mount))]


def _lasts(mount: Mount) -> str | None:
    name = f"mounted at {mount.path} by {mount.owner}"
    if mount.how == "symlink":
        if _linked(mount):
            return name
        seen = mount.host == socket.gethostname() or Path(mount.path).parent.exists()
        return None if seen else f"{name} on {mount.host}, which cannot be seen from here"
    if mount.host != socket.gethostname():
        return f"{name} on {mount.host}, which cannot be seen from here"
    return name if process.alive(mount.process) else None


def _linked(mount: Mount) -> bool:
    try:
        return os.readlink(mount.path) == Artifact.get_by_id(mount.artifact_id).location
    except OSError:
        return False


def _ready(dataset: Dataset) -> Path:
    if dataset.artifact.status != DatasetStatus.READY:
        raise StatusError(f"dataset '{dataset.artifact.name}' is {dataset.artifact.status}, not ready")
    return Path(dataset.artifact.location)


def _absolute(destination: Path) -> Path:
    """Absolute, with the folder's links resolved but not the last name: that one may be our link."""
    return destination.parent.resolve() / destination.name


@contextmanager
def _place(path: Path) -> Iterator[None]:
    """An empty folder to mount on; one that was made for it is removed again."""
    made = not path.exists()
    if made:
        path.mkdir(parents=True)
    elif not path.is_dir():
        raise InvalidError(f"{path} is no folder", hint="Name a folder, or a place that is free.")
    try:
        yield
    finally:
        if made:
            path.rmdir()


def _record(dataset: Dataset, path: Path, how: str, handle: str | None) -> Mount:
    with write_transaction():
        # Whether it may be mounted and that it is are decided under one lock, against a delete in between.
        _ready(Dataset.select(Dataset, Artifact).join(Artifact).where(Artifact.id == dataset.artifact_id).get())
        return Mount.create(
            artifact=dataset.artifact_id,
            path=str(path),
            how=how,
            host=socket.gethostname(),
            process=handle,
            owner=current_user(),
            created_at=now(),
        )


def _end(mount: Mount) -> None:
    with write_transaction():
        Mount.update(ended_at=now()).where(Mount.id == mount.id).execute()
