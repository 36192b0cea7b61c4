"""Which files of a folder are data, found and opened without trusting whoever may write there.

Accepted: regular files with one link whose name ends in `.jsonl`, `.jsonl.gz` or `.jsonl.zst`, in
subfolders too. Ignored, and said so: hidden names (they start with a dot) and a manifest that an
earlier seal left at the top. Anything else is refused by name, so that nothing that somebody took
for training data is left out silently.
"""

from __future__ import annotations

import glob
import gzip
import importlib
import io
import os
import stat
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from tfslurm.artifacts.manifest import MANIFEST
from tfslurm.datasets.advice import how_to_convert
from tfslurm.errors import InvalidError, NotPermittedError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
BOM = b"\xef\xbb\xbf"
MAX_LINE = 8 * 1024 * 1024
"""The longest accepted line, in bytes: about two million tokens of text, and a bound on our memory."""
BUFFER = 1024 * 1024


class DamagedFile(InvalidError):
    """A compressed file ends early or is not what its name says."""


@dataclass(frozen=True)
class Problem:
    """Something about a file, not about a row: `check` is its name in the table of checks."""

    name: str
    check: str
    message: str


@dataclass(frozen=True)
class Identity:
    """What says that a file is still the one looked at: any write changes its times."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(frozen=True)
class DataFile:
    """A data file: `name` is its path in the dataset, `below` its path under the folder `base`."""

    name: str
    base: Path
    below: str
    identity: Identity

    @property
    def size(self) -> int:
        return self.identity.size

    @property
    def path(self) -> Path:
        return self.base / self.below

    def open(self) -> int:
        """A descriptor that reads this very file; no link is followed on the way below `base`.

        Raises InvalidError where another file, or none, stands there now; NotPermittedError.
        """
        try:
            descriptor = _open_below(self.base, self.below)
        except PermissionError as error:
            raise NotPermittedError(f"{self.path}: not readable for you.") from error
        except OSError as error:
            raise InvalidError(f"{self.path}: was replaced or removed while it was read: {error.strerror}.") from error
        if Identity.of(os.fstat(descriptor)) != self.identity:
            os.close(descriptor)
            raise InvalidError(
                f"{self.path}: changed while it was read.", hint="Wait until nothing writes to it, then try again."
            )
        return descriptor


@dataclass
class Found:
    """Data files in bytewise order of their names, what was ignored, and what was refused."""

    files: list[DataFile] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def expand(source: str | Path) -> list[Path]:
    """The path itself where it exists; else what it matches as a glob (`**` goes into subfolders).

    Raises InvalidError where there is nothing.
    """
    if os.path.exists(source):
        return [Path(source)]
    matches = [Path(match) for match in glob.glob(str(source), recursive=True)]
    if files := sorted((match for match in matches if not match.is_dir()), key=os.fsencode):
        return files
    raise InvalidError(f"{source}: no such file or folder, and no file matches it.")


def discover(source: Path | Sequence[Path]) -> Found:
    """The data files of a folder, of one file, or of a list of both.

    A link that the caller names is followed; links inside a folder are refused. Files of a list
    keep their paths below the folder that they have in common. Reads names and stats alone,
    and the first byte of files named `.json`.
    """
    found = Found()
    paths = [source] if isinstance(source, Path) else list(dict.fromkeys(source))
    parent = Path(os.path.commonpath([os.path.abspath(path.parent) for path in paths])) if paths else Path()
    for path in paths:
        name = os.path.relpath(os.path.abspath(path), parent)
        _look_at(path, "" if isinstance(source, Path) and path.is_dir() else name, found)
    found.files.sort(key=lambda file: file.name.encode())
    found.problems += _case_clashes(found.files)
    return found


def _look_at(path: Path, name: str, found: Found) -> None:
    try:
        real = path.resolve(strict=True)
        if real.is_dir():
            _walk(real, name, found)
        else:
            _classify(real.parent, real.name, name, os.lstat(real), found, data_name=name)
    except PermissionError as error:
        raise NotPermittedError(f"{error.filename or path}: not readable for you.") from error
    except OSError as error:
        raise InvalidError(f"{path}: cannot be read: {error.strerror}.") from error


def _walk(top: Path, prefix: str, found: Found) -> None:
    device = top.stat().st_dev
    for root, folders, files, descriptor in os.fwalk(top, onerror=_raise):
        relative = os.path.relpath(root, top)
        for name in sorted(folders + files):
            below = name if relative == "." else f"{relative}/{name}"
            if name.startswith(".") or below == MANIFEST:
                found.ignored.append(printable(below))
                continue
            status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            if name_problem := _name_problem(name):
                found.problems.append(Problem(printable(below), *name_problem))
            elif status.st_dev != device:
                message = f"{below}: lies on another filesystem than the folder; copy it here."
                found.problems.append(Problem(below, "other_filesystem", message))
            elif not stat.S_ISDIR(status.st_mode):
                dataset_name = f"{prefix}/{below}" if prefix else below
                _classify(top, below, dataset_name, status, found, data_name=name)
        folders[:] = [name for name in folders if not name.startswith(".") and not _name_problem(name)]


def _raise(error: OSError) -> None:
    raise error


def _classify(base: Path, below: str, name: str, status: os.stat_result, found: Found, *, data_name: str) -> None:
    def refuse(check: str, message: str) -> None:
        found.problems.append(Problem(printable(name), check, f"{printable(name)}: {message}"))

    if name_problem := _name_problem(name.replace("/", "")):
        found.problems.append(Problem(printable(name), *name_problem))
    elif stat.S_ISLNK(status.st_mode):
        refuse("symbolic_link", "is a symbolic link; put the file itself here.")
    elif not stat.S_ISREG(status.st_mode):
        refuse("special_file", f"is {_KINDS.get(stat.S_IFMT(status.st_mode), 'no regular file')}; remove it.")
    elif status.st_nlink > 1:
        refuse("hard_link", "has other names (hard links), through which it could change; put a copy here.")
    elif not data_name.endswith(SUFFIXES):
        check, message = how_to_convert(base / below)
        refuse(check, message)
    else:
        found.files.append(DataFile(name, base, below, Identity.of(status)))


_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def _name_problem(name: str) -> tuple[str, str] | None:
    try:
        os.fsencode(name).decode()
    except UnicodeDecodeError:
        return "name_not_utf8", f"{printable(name)}: the name is not UTF-8; rename it."
    if any(unicodedata.category(character) == "Cc" for character in name) or "\\" in name:
        return "name_control_character", f"{name!r}: the name has a control character or a backslash; rename it."
    return None


def _case_clashes(files: list[DataFile]) -> Iterator[Problem]:
    seen: dict[str, str] = {}
    for file in files:
        parts = file.name.split("/")
        for length in range(1, len(parts) + 1):
            path = "/".join(parts[:length])
            first = seen.setdefault(unicodedata.normalize("NFC", path).casefold(), path)
            if first != path:
                message = f"{path}: differs from {first} only in case or accents' encoding; rename one."
                yield Problem(path, "case_clash", message)


def printable(name: str) -> str:
    """A name that can be printed and put into JSON: bytes that are no UTF-8 are escaped."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _open_below(base: Path, below: str) -> int:
    *folders, name = below.split("/")
    folder = os.open(base, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in folders:
            deeper = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = deeper
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    finally:
        os.close(folder)


def data_files(folder: Path) -> list[Path]:
    """The data files of a sealed folder, in bytewise order of their paths below it."""
    found = [path for path in folder.rglob("*") if path.name.endswith(SUFFIXES) and path.is_file()]
    return sorted(found, key=lambda path: os.fsencode(path.relative_to(folder).as_posix()))


@contextmanager
def open_lines(
    path: Path, descriptor: int | None = None, on_read: Callable[[int], None] | None = None
) -> Iterator[Iterator[bytes]]:
    """The lines of a data file, decompressed as its name says, each with its line end.

    A line longer than MAX_LINE is cut there, so that memory stays bounded; the next one is whole
    again. `descriptor` is read (and closed) instead of opening `path`; `on_read` gets the length of
    each read from the file. Raises DamagedFile.
    """
    with open_content(path, descriptor, on_read) as content, io.BufferedReader(content, BUFFER) as stream:
        yield _lines(stream)


@contextmanager
def open_content(
    path: Path, descriptor: int | None = None, on_read: Callable[[int], None] | None = None
) -> Iterator[io.RawIOBase]:
    """The bytes of a data file, decompressed as its name says; otherwise as `open_lines`."""
    with open(path if descriptor is None else descriptor, "rb", buffering=0) as file:
        raw = _Watched(file, on_read) if on_read else file
        content, damage = _decompressed(path, raw)
        try:
            yield content
        except damage as error:
            raise DamagedFile(f"{path}: the compressed data is damaged or cut off: {error}") from error


class _Watched(io.RawIOBase):
    """A file that tells how much of it was read."""

    def __init__(self, file: io.RawIOBase, on_read: Callable[[int], None]) -> None:
        self._file, self._on_read = file, on_read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        count = self._file.readinto(buffer)
        self._on_read(count or 0)
        return count


def _decompressed(path: Path, raw: io.RawIOBase) -> tuple[io.RawIOBase, tuple[type[Exception], ...]]:
    """The content, and the exceptions that mean damage while it is read."""
    if path.name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw, mode="rb"), (EOFError, gzip.BadGzipFile, zlib.error)
    if path.name.endswith(".zst"):
        zstd = _zstd(path)
        return zstd.ZstdFile(raw, "rb"), (EOFError, zstd.ZstdError)
    return raw, ()


def _zstd(path: Path) -> ModuleType:
    """Python 3.14's `compression.zstd`, or its backport for older Pythons."""
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise InvalidError(f"{path}: to read .zst files, Python needs backports.zstd.", hint="pip install backports.zstd")


def _lines(stream: io.BufferedReader) -> Iterator[bytes]:
    while line := stream.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            _skip_line(stream, line)
        yield line


def _skip_line(stream: io.BufferedReader, start: bytes) -> None:
    piece = start
    while piece and not piece.endswith(b"\n"):
        piece = stream.readline(BUFFER)
