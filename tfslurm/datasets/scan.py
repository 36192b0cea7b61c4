"""Data files read once: copied, hashed and checked in one flow, by several processes.

A large file is cut into parts, wherever their ends fall. The lines that were cut through are put
together again in the parent, in order, which also gives every line its number; and it makes the
file's digest meanwhile. Any other file is the work of one worker, digest included.

The copy is not made by copy_file_range: the bytes must come into memory anyhow, and to write them
from there costs no more. What is checked and hashed is then surely what was written.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tfslurm.artifacts.manifest import Entry
from tfslurm.datasets import files as data_files
from tfslurm.datasets.copying import Copying, copy, copying
from tfslurm.datasets.files import BUFFER, DamagedFile, DataFile, open_content
from tfslurm.datasets.report import Counts
from tfslurm.datasets.workers import cores, in_order, window
from tfslurm.faults import fault_point

if TYPE_CHECKING:
    from tfslurm.datasets.validation import Validator

CHUNK = 1024 * 1024
"""Bytes that a worker reads at a time."""
BLOCK = 128 * 1024
"""Bytes of lines that are decoded at once: their rows still fit the processor's cache."""
SMALL = 4 * 1024 * 1024
"""Bytes up to which starting processes costs more than it saves."""

Progress = Callable[[int, int], None]


class Task(NamedTuple):
    """The file of this number; where `part` is true only its bytes from `start` to `stop`."""

    file: int
    start: int
    stop: int
    part: bool
    slot: int


class Piece(NamedTuple):
    """What `read` bytes of a file are: the end of a line, then whole `lines` with their counts, then a tail.

    Where no line ends in them, `whole` is false and all is the head. Of a line too long, what is
    past the limit is cut off from head and tail.
    """

    read: int
    head: bytes
    whole: bool = False
    lines: int = 0
    counts: Counts | None = None
    tail: bytes = b""


class Done(NamedTuple):
    """A file that one worker did has ended: the digest of its copy, "" without one, and how it is damaged."""

    sha256: str
    damage: DamagedFile | None = None


def scan(
    files: Sequence[DataFile],
    validator: Validator,
    staging: Path | None = None,
    *,
    progress: Progress | None = None,
    workers: int | None = None,
) -> list[Entry]:
    """Check files into the validator's tally, and copy them into `staging` where that is given.

    The entries of the copies, none without. `workers` is the number of cores where it is None; few
    bytes are done in this process. `progress` gets the bytes of the sources done and in all.
    Raises InvalidError where a file changes meanwhile, NotPermittedError, OSError, and EndedBadly
    where a worker is killed.
    """
    total, entries, done = sum(file.size for file in files), [], 0
    workers = 1 if total <= SMALL else workers or cores()
    with _Reader(files, validator, staging, workers) as reader, closing(reader.messages()) as messages:
        merge = None
        for task, message in messages:
            merge = merge or _Merge(files[task.file], validator, staging)
            done += merge.take(message, reader.buffer(task))
            if progress:
                progress(done, total)
            if isinstance(message, Done) or (task.part and task.stop == files[task.file].size):
                entries.append(merge.end())
                merge = None
    return entries if staging else []


def plan(files: Sequence[DataFile], workers: int) -> list[Task]:
    """A file so large that the workers without it would be done long before is cut into parts."""
    share = max(CHUNK, sum(file.size for file in files) // (2 * workers))
    tasks: list[Task] = []
    for number, file in enumerate(files):
        parts = workers > 1 and file.size > share and _is_plain(file)
        for start in range(0, file.size, CHUNK) if parts else (0,):
            stop = min(start + CHUNK, file.size) if parts else file.size
            tasks.append(Task(number, start, stop, parts, len(tasks) % window(workers)))
    return tasks


def _is_plain(file: DataFile) -> bool:
    return file.name.endswith(".jsonl")


class _Reader:
    """Does the tasks. Files in parts are opened, and the memory for them made, before the workers start."""

    def __init__(self, files: Sequence[DataFile], validator: Validator, staging: Path | None, workers: int) -> None:
        self._files, self._validator, self._staging = files, validator, staging
        self._tasks, self._workers = plan(files, workers), workers
        self._slots: list[mmap.mmap] = []
        self._copying: dict[int, Copying] = {}
        self._opened = ExitStack()

    def __enter__(self) -> _Reader:
        numbers = {task.file for task in self._tasks if task.part}
        with ExitStack() as opening:
            for number in sorted(numbers):
                opened = opening.enter_context(copying(self._files[number], self._staging))
                self._copying[number] = opened
            self._opened = opening.pop_all()
        self._slots = [mmap.mmap(-1, CHUNK) for _ in range(window(self._workers) if numbers else 0)]
        return self

    def __exit__(self, *exception) -> bool | None:
        return self._opened.__exit__(*exception)

    def messages(self) -> Iterator[tuple[Task, Piece | Done]]:
        return in_order(self._tasks, self._read, self._workers)

    def buffer(self, task: Task) -> memoryview:
        """The bytes of a part, as long as the message about them is the latest; nothing for other tasks."""
        return memoryview(self._slots[task.slot])[: task.stop - task.start] if task.part else memoryview(b"")

    def _read(self, task: Task) -> Iterator[Piece | Done]:
        file = self._files[task.file]
        if task.part:
            yield self._part(file, task)
        elif _is_plain(file):
            yield from self._whole(file)
        else:
            yield from self._packed(file)

    def _part(self, file: DataFile, task: Task) -> Piece:
        slot, size = self._slots[task.slot], task.stop - task.start
        self._copying[task.file].read_into(self.buffer(task), task.start)
        fault_point("scan-part-read")
        return piece(self._validator, file.name, slot, size)

    def _whole(self, file: DataFile) -> Iterator[Piece | Done]:
        digest, start = hashlib.sha256(), 0
        with copying(file, self._staging) as opened:
            while data := opened.read(CHUNK, start):
                if self._staging:
                    digest.update(data)
                start += len(data)
                yield piece(self._validator, file.name, data, len(data))
        fault_point("ingest-copied")
        yield Done(digest.hexdigest())

    def _packed(self, file: DataFile) -> Iterator[Piece | Done]:
        sha256, damage, path = "", None, file.path
        if self._staging:
            sha256, path = copy(file, self._staging), self._staging / file.name
            fault_point("ingest-copied")
        reads: list[int] = []
        try:
            with open_content(path, None if self._staging else file.open(), reads.append) as content:
                while data := content.read(BUFFER):
                    yield piece(self._validator, file.name, data, len(data))._replace(read=sum(reads))
                    reads.clear()
        except DamagedFile as error:
            damage = error
        yield Done(sha256, damage)


def piece(validator: Validator, name: str, data: bytes | mmap.mmap, size: int) -> Piece:
    """Check the whole lines in the first `size` bytes of `data`."""
    limit = data_files.MAX_LINE + 1
    first = data.find(b"\n", 0, size) + 1
    if not first:
        return Piece(size, data[: min(size, limit)])
    last = data.rfind(b"\n", 0, size) + 1
    lines, counts = validator.count_piece(name, _blocks(data, first, last))
    return Piece(size, data[: min(first, limit)], True, lines, counts, data[last : min(size, last + limit)])


def _blocks(data: bytes | mmap.mmap, start: int, stop: int) -> Iterator[bytes]:
    """Of whole lines, of about BLOCK bytes; both ends are ends of lines."""
    while start < stop:
        end = data.find(b"\n", min(start + BLOCK, stop) - 1, stop) + 1
        yield data[start:end]
        start = end


class _Merge:
    """One file's pieces, in order, into the tally."""

    def __init__(self, file: DataFile, validator: Validator, staging: Path | None) -> None:
        self._file, self._validator = file, validator
        self._path = staging / file.name if staging else file.path
        self._rows_before = validator.start_file()
        self._digest, self._sha256, self._hashes = hashlib.sha256(), "", staging is not None
        self._lines, self._line, self._read = 0, b"", 0

    def take(self, message: Piece | Done, part: memoryview) -> int:
        """Count a message; how many bytes of the source it is about."""
        if isinstance(message, Done):
            return self._done(message)
        if part and self._hashes:
            self._digest.update(part)
        self._read += message.read
        self._line = (self._line + message.head)[: data_files.MAX_LINE + 1]
        if message.whole:
            self._check_line()
            self._validator.tally.merge(self._file.name, self._lines, message.counts)
            self._lines += message.lines
            self._line = message.tail
        return message.read

    def _done(self, message: Done) -> int:
        self._sha256 = message.sha256
        if message.damage:
            self._line = b""
            self._validator.note_damage(self._path, self._file.name, message.damage)
        return self._file.size - self._read

    def _check_line(self) -> None:
        self._lines += 1
        self._validator.check_line(self._path, self._file.name, self._lines, self._line)

    def end(self) -> Entry:
        if self._line:
            self._check_line()
        self._validator.end_file(self._file.name, self._rows_before)
        return Entry(self._file.name, self._file.size, self._sha256 or self._digest.hexdigest())
