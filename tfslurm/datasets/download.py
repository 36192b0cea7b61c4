"""Objects from a store to the spool: in parallel, in chunks, and from where a killed one left off."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import replace
from pathlib import Path, PurePosixPath

from tfslurm.artifacts.publish import remove_tree
from tfslurm.datasets.files import Found, discover
from tfslurm.datasets.journal import Journal
from tfslurm.datasets.retries import Changed, Missing, NoRanges, Patience, Transient
from tfslurm.datasets.sources import Source
from tfslurm.datasets.stores import Remote, Store
from tfslurm.errors import InvalidError, UnreachableError
from tfslurm.faults import fault_point
from tfslurm.paths import ImportPaths

CHUNK = 8 * 1024 * 1024
WORKERS = 4
ROUNDS = 4
"""How often a source that changes under way is copied before it is given up."""
PROGRESS = 64 * 1024
"""Bytes that a try must bring to count as progress: a server that drips does not keep us for ever."""


class Download:
    """Copies what `store` lists into the import's spool, which may hold what a killed one left.

    `spool/objects` has the files under their names in the dataset, `spool/journal.jsonl` says which
    chunks of which version are there. Nothing that another version of an object left is ever used.
    """

    def __init__(
        self,
        store: Store,
        source: Source,
        paths: ImportPaths,
        progress: Callable[[int, int], None] | None = None,
        *,
        judge: Callable[[Found], None] = lambda found: None,
        chunk: int = CHUNK,
        wait: Callable[[float], object] | None = None,
    ) -> None:
        """`judge` raises for names that are refused, before anything is copied; `wait` sleeps between tries."""
        self.store, self.source, self.objects, self.chunk, self.judge = store, source, paths.objects, chunk, judge
        for folder in (paths.spool, paths.objects):
            folder.mkdir(mode=0o700, exist_ok=True)
        self.journal = Journal(paths.spool / "journal.jsonl")
        self.meter = Meter(progress)
        self._over = threading.Event()
        self._wait = wait or self._over.wait
        self._failure: BaseException | None = None
        self._whole: set[str] = set()

    def run(self) -> int:
        """Copy until the source is, at the end, what it was at the start; the bytes that were fetched.

        Raises InvalidError for a source that keeps changing, or that has names no dataset may have;
        UnreachableError where it does not answer, or the disk is full; NotPermittedError.
        """
        with closing(self.journal):
            listed = self._list()
            for _ in range(ROUNDS):
                missing = self._lay_out(listed)
                fault_point("import-listed")
                undisturbed = self._copy(missing)
                before, listed = listed, self._list()
                if undisturbed and listed == before:
                    fault_point("import-downloaded")
                    return self.meter.fetched
        raise InvalidError(
            f"{self.source.shown}: changed again and again while it was copied ({ROUNDS} times).",
            hint="Wait until nothing writes to it, then import it again.",
        )

    def _list(self) -> list[Remote]:
        patience = Patience(self.source.shown, self._wait)
        while True:
            try:
                listed = self.store.list()
            except (Transient, Changed) as error:
                patience.lost(error if isinstance(error, Transient) else Transient(str(error)))
            else:
                return [replace(r, ranges=False) if r.name in self._whole else r for r in listed]

    def _lay_out(self, listed: Sequence[Remote]) -> list[tuple[Remote, int]]:
        """Make a file of the full size for each object; the chunks that are missing.

        Discovery then looks at these files as at any folder: what it ignores or refuses by name is not copied.
        """
        self._remove_others({remote.name for remote in listed})
        for remote in listed:
            self._check_path(remote)
            _touch(self.objects / remote.name, self.source)
        found = discover(self.objects)
        self.judge(found)
        wanted = {file.name for file in found.files}
        data = [remote for remote in listed if remote.name in wanted]
        missing = [(remote, chunk) for remote in data for chunk in self._missing(remote)]
        self._check_room(data)
        for remote in data:
            os.truncate(self.objects / remote.name, remote.size or 0)
        self.meter.restart(sum(r.size or 0 for r in data), sum(self._length(r, c) for r, c in missing))
        return missing

    def _remove_others(self, names: set[str]) -> None:
        parents = {str(parent) for name in names for parent in PurePosixPath(name).parents}
        for folder, folders, files in os.walk(self.objects):
            for kept, found in ((names, files), (parents, folders)):
                for path in (Path(folder, name) for name in found):
                    if str(path.relative_to(self.objects)) not in kept:
                        remove_tree(path)

    def _check_path(self, remote: Remote) -> None:
        """Raises InvalidError for a name that would not stay below the spool, or is none."""
        parts = remote.name.split("/")
        if not all(parts) or {".", ".."} & set(parts) or "\0" in remote.name:
            raise InvalidError(f"{self.source.shown}: the object {remote.name!r} cannot be a file's name: rename it.")

    def _missing(self, remote: Remote) -> list[int]:
        """The chunks to copy; all of them, begun anew, where another version or none is there."""
        size = self._chunk_of(remote)
        path = self.objects / remote.name
        there = self.journal.chunks(remote, size) if path.stat().st_size == remote.size else set()
        if not there:
            self.journal.begin(remote, size)
        return sorted(set(range(_count(remote, size))) - there)

    def _chunk_of(self, remote: Remote) -> int:
        return self.chunk if remote.ranges else 0

    def _length(self, remote: Remote, chunk: int) -> int:
        size = self._chunk_of(remote)
        return min(size, (remote.size or 0) - chunk * size) if size else remote.size or 0

    def _check_room(self, data: Sequence[Remote]) -> None:
        """The spool and the copy that is made from it: both have to fit."""
        spooled = sum((self.objects / remote.name).stat().st_blocks * 512 for remote in data)
        needed = 2 * sum(remote.size or 0 for remote in data) - spooled
        status = os.statvfs(self.objects)
        free = status.f_bavail * status.f_frsize
        if needed > free:
            raise _no_room(self.objects, f"{needed:,} bytes are needed to spool and to copy it, {free:,} are free")

    def _copy(self, missing: Sequence[tuple[Remote, int]]) -> bool:
        """Copy chunks; False where an object turned out to be another one meanwhile."""
        pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="download")
        try:
            futures = [pool.submit(self._copy_or_end, remote, chunk) for remote, chunk in missing]
            return all([future.result() for future in as_completed(futures)])
        except BaseException:
            if self._failure:
                raise self._failure from None  # the first: the others were ended by it
            raise
        finally:
            self._over.set()
            pool.shutdown(cancel_futures=True)
            self._over.clear()

    def _copy_or_end(self, remote: Remote, chunk: int) -> bool:
        """False where the object turned out to be another one; what fails for good ends all the others too."""
        try:
            self._copy_chunk(remote, chunk)
        except (Changed, Missing, NoRanges):
            return False
        except BaseException as error:
            self._failure = self._failure or error
            self._over.set()
            raise
        return True

    def _copy_chunk(self, remote: Remote, chunk: int) -> None:
        descriptor = os.open(self.objects / remote.name, os.O_WRONLY | os.O_NOFOLLOW)
        try:
            self._fill(descriptor, remote, chunk)
            os.fdatasync(descriptor)
        except NoRanges:
            self._whole.add(remote.name)
            raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _no_room(self.objects, f"the disk is full ({error.strerror})") from error
            raise
        finally:
            os.close(descriptor)
        self.journal.done(remote, chunk)
        fault_point("import-chunk")

    def _fill(self, descriptor: int, remote: Remote, chunk: int) -> None:
        """Read one chunk, after an interruption from where it was; an object without ranges from its start."""
        start = chunk * self._chunk_of(remote)
        end = start + self._length(remote, chunk) if remote.ranges else None
        patience, position, counted = Patience(f"{self.source.shown} ({remote.name})", self._wait), start, start
        while position != end:
            try:
                for block in self.store.read(remote, position, end):
                    self._check_over()
                    _write(descriptor, block, position)
                    position += len(block)
                    self.meter.add(len(block))
                    if remote.ranges and position - counted >= PROGRESS:
                        counted = position
                        patience.progressed()
                if end is None or position == end:
                    break
                raise Transient(f"it sent {position - start:,} of {end - start:,} bytes")
            except Transient as error:
                if not remote.ranges:
                    self.meter.add(start - position, fetched=0)
                    position = start
                patience.lost(error)
                self._check_over()
        if end is None:
            os.ftruncate(descriptor, position)

    def _check_over(self) -> None:
        if self._over.is_set():
            raise UnreachableError(f"{self.source.shown}: the copy ended elsewhere.")


class Meter:
    """Bytes that are there and bytes in all, from several threads; and how many were fetched now."""

    def __init__(self, progress: Callable[[int, int], None] | None) -> None:
        self.progress, self.done, self.total, self.fetched = progress, 0, 0, 0
        self._lock = threading.Lock()

    def restart(self, total: int, missing: int) -> None:
        self.done, self.total = total - missing, total
        self.add(0)

    def add(self, count: int, fetched: int | None = None) -> None:
        with self._lock:
            self.done += count
            self.fetched += count if fetched is None else fetched
            if self.progress:
                self.progress(self.done, max(self.done, self.total))


def _count(remote: Remote, size: int) -> int:
    """How many chunks an object has; one that is read whole is one."""
    return -(-(remote.size or 0) // size) if size else 1


def _write(descriptor: int, block: bytes, position: int) -> None:
    left = memoryview(block)
    while left:
        count = os.pwrite(descriptor, left, position)
        left, position = left[count:], position + count


def _touch(path: Path, source: Source) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o600))
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise InvalidError(f"{source.shown}: '{path.name}' is an object and a folder at once: rename one.") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_room(path.parent, f"the disk is full ({error.strerror})") from error
        raise InvalidError(f"{source.shown}: no file can be called {path.name!r}: {error.strerror}.") from error


def _no_room(folder: Path, why: str) -> UnreachableError:
    return UnreachableError(f"{folder}: {why}.", hint="Make room (`tfslurm reclaim` may help), then import it again.")
