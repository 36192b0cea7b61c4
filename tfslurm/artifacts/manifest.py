"""The list of an artifact's files, and one digest over all of them.

`MANIFEST.sha256` lies at the top of the artifact's folder:

    # tfslurm manifest 1
    # 4166206 bytes
    5c1f…  train.jsonl

`sha256sum -c MANIFEST.sha256` checks it, since lines that start with # are comments to it. The
artifact's digest is the SHA-256 of that text, so `sha256sum MANIFEST.sha256` prints it: the
version line, every size, every file's digest and every path are in it.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tfslurm.errors import InvalidError
from tfslurm.files import write_atomic

MANIFEST = "MANIFEST.sha256"
VERSION_LINE = "# tfslurm manifest 1"

_SIZE = re.compile(r"# (\d+) bytes")
_FILE = re.compile(r"([0-9a-f]{64})  (.+)")
_BLOCK = 1024 * 1024

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all, from one thread at a time."""


@dataclass(frozen=True)
class Entry:
    """One file: its path below the folder with `/` between the parts, bytes, SHA-256 in hex."""

    path: str
    size: int
    sha256: str

    def __post_init__(self) -> None:
        check_path(self.path)


@dataclass(frozen=True)
class Manifest:
    """An artifact's files, in bytewise order of their paths."""

    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Manifest:
        return cls(tuple(sorted(entries, key=lambda entry: entry.path.encode())))

    @property
    def size(self) -> int:
        return sum(entry.size for entry in self.entries)

    @property
    def digest(self) -> str:
        """`sha256:` and the SHA-256 of the manifest's text."""
        return "sha256:" + hashlib.sha256(self.encode()).hexdigest()

    def encode(self) -> bytes:
        """The text of MANIFEST.sha256."""
        lines = [VERSION_LINE]
        for entry in self.entries:
            lines += [f"# {entry.size} bytes", f"{entry.sha256}  {entry.path}"]
        return "".join(f"{line}\n" for line in lines).encode()


def check_path(path: str) -> None:
    """Raises InvalidError unless `path` is relative, UTF-8, and the same in a manifest as on disk."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise InvalidError(f"{os.fsencode(path)!r}: the name is not UTF-8; rename it.") from None
    if any(ord(character) < 32 or ord(character) == 127 for character in path) or "\\" in path:
        raise InvalidError(f"{path!r}: the name has a control character or a backslash; rename it.")
    if path == MANIFEST:
        raise InvalidError(f"{MANIFEST}: this name is the manifest's own; rename the file.")
    if any(part in ("", ".", "..") for part in path.split("/")):
        raise InvalidError(f"{path!r}: not a path below the folder.")


def decode(text: bytes, source: str = MANIFEST) -> Manifest:
    """The manifest that `encode` wrote; InvalidError with the line where it is anything else."""
    try:
        lines = text.decode().split("\n")
    except UnicodeDecodeError as error:
        raise InvalidError(f"{source}: not UTF-8: {error}.") from error
    if lines[0] != VERSION_LINE:
        raise InvalidError(f"{source}:1: expected {VERSION_LINE!r}.")
    if lines[-1] != "" or len(lines) % 2:
        raise InvalidError(f"{source}: cut off after line {len(lines)}.")
    entries = []
    for number in range(1, len(lines) - 1, 2):
        size, file = _SIZE.fullmatch(lines[number]), _FILE.fullmatch(lines[number + 1])
        if not size or not file:
            raise InvalidError(f"{source}:{number + 1}: not a size line and a file line.")
        entries.append(Entry(file[2], int(size[1]), file[1]))
    manifest = Manifest.of(entries)
    if manifest.encode() != text:
        raise InvalidError(f"{source}: its lines are not in order.")
    return manifest


def read(folder: Path) -> Manifest:
    """Raises InvalidError where the folder has no manifest, or a damaged one."""
    path = folder / MANIFEST
    try:
        return decode(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise InvalidError(f"{folder}: has no {MANIFEST}.") from None


def write(manifest: Manifest, folder: Path) -> None:
    write_atomic(folder / MANIFEST, manifest.encode())


def build(folder: Path, *, workers: int | None = None) -> Manifest:
    """Read every file of `folder` (its own manifest apart) and list them.

    Raises InvalidError for anything that is neither a regular file nor a folder.
    """
    names = list(_names(folder))
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        digests = pool.map(lambda name: sha256_file(folder / name), names)
        return Manifest.of(Entry(name, size, sha256) for name, (size, sha256) in zip(names, digests, strict=True))


def sha256_file(path: Path, on_read: Callable[[int], None] | None = None) -> tuple[int, str]:
    """(bytes read, SHA-256 in hex) of a file that is no link; `on_read` gets the length of each read."""
    digest, size, block = hashlib.sha256(), 0, memoryview(bytearray(_BLOCK))
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            size += count
            if on_read:
                on_read(count)
    return size, digest.hexdigest()


def verify_folder(
    folder: Path, expected_digest: str, *, workers: int | None = None, progress: Progress | None = None
) -> None:
    """Read every byte of `folder` and compare with its manifest, the files in parallel.

    Raises InvalidError that names the file which is missing, unlisted, of another size or changed
    (all of them, up to ten), or the manifest where its digest is not `expected_digest`.
    """
    manifest = read(folder)
    if manifest.digest != expected_digest:
        raise InvalidError(f"{folder / MANIFEST}: its digest is {manifest.digest}, not {expected_digest} as recorded.")
    wrong = _names_and_sizes(folder, manifest)
    wrong |= _bytes(folder, [entry for entry in manifest.entries if entry.path not in wrong], workers, progress)
    _refuse(folder, wrong)


def check_names(folder: Path, manifest: Manifest) -> None:
    """Raises InvalidError unless `folder` has just the files of `manifest`, in their sizes; reads no bytes."""
    _refuse(folder, _names_and_sizes(folder, manifest))


def _refuse(folder: Path, wrong: dict[str, str]) -> None:
    if not wrong:
        return
    listed = [f"{folder / path}: {what}" for path, what in sorted(wrong.items())]
    more = [f"… and {len(listed) - 10} more"] if len(listed) > 10 else []
    raise InvalidError("\n".join(listed[:10] + more), hint="These are not the bytes of its manifest.")


def _names_and_sizes(folder: Path, manifest: Manifest) -> dict[str, str]:
    present = set(_names(folder))
    listed = {entry.path: entry.size for entry in manifest.entries}
    wrong = {path: "is missing" for path in listed.keys() - present}
    wrong |= {path: "is not in the manifest" for path in present - listed.keys()}
    for path in listed.keys() & present:
        size = os.lstat(folder / path).st_size
        if size != listed[path]:
            wrong[path] = f"has {size} bytes, not {listed[path]}"
    return wrong


def _bytes(folder: Path, entries: list[Entry], workers: int | None, progress: Progress | None) -> dict[str, str]:
    done, total, lock = 0, sum(entry.size for entry in entries), threading.Lock()

    def read(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            progress(done, total)

    def check(entry: Entry) -> str | None:
        try:
            _, digest = sha256_file(folder / entry.path, read if progress else None)
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        return None if digest == entry.sha256 else "its bytes have changed"

    largest_first = sorted(entries, key=lambda entry: -entry.size)
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        answers = zip(largest_first, pool.map(check, largest_first), strict=True)
        return {entry.path: answer for entry, answer in answers if answer}


def _names(folder: Path) -> Iterator[str]:
    for root, folders, files, descriptor in os.fwalk(folder, onerror=_raise):
        below = "" if root == str(folder) else os.path.relpath(root, folder) + "/"
        for name in folders + files:
            mode = os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode):
                continue
            if not stat.S_ISREG(mode):
                raise InvalidError(f"{folder / below / name}: neither a regular file nor a folder.")
            if below + name != MANIFEST:
                yield below + name


def _raise(error: OSError) -> None:
    raise error
