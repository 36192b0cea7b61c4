"""What of which object lies in the spool already, on disk: lines that are only ever added."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from tfslurm.datasets.stores import Remote


class Journal:
    """One line when an object is begun, one when a chunk of it is on disk.

    A line that a crash cut off is dropped when the journal is opened. Chunks count only as long as
    the object has the version, the size and the chunk size that it was begun with; one without a
    version, or without a known size, is never resumed.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._begun: dict[str, list[Any]] = {}
        self._chunks: dict[str, set[int]] = {}
        self._file = open(path, "a+b", buffering=0)
        self._read()

    def close(self) -> None:
        self._file.close()

    def chunks(self, remote: Remote, chunk_size: int) -> set[int]:
        """The chunks of this very version that are there."""
        resumable = remote.version is not None and remote.size is not None
        same = self._begun.get(remote.name) == [remote.version, remote.size, chunk_size]
        return set(self._chunks[remote.name]) if resumable and same else set()

    def begin(self, remote: Remote, chunk_size: int) -> None:
        """Forget what there was of the object."""
        self._add({"object": remote.name, "begun": [remote.version, remote.size, chunk_size]})

    def done(self, remote: Remote, chunk: int) -> None:
        """Call it once the chunk's bytes are on disk."""
        self._add({"object": remote.name, "chunk": chunk})

    def _add(self, line: dict[str, Any]) -> None:
        with self._lock:
            self._file.write(json.dumps(line).encode() + b"\n")
            os.fdatasync(self._file.fileno())
            self._note(line)

    def _note(self, line: dict[str, Any]) -> None:
        if "begun" in line:
            self._begun[line["object"]], self._chunks[line["object"]] = line["begun"], set()
        else:
            self._chunks[line["object"]].add(line["chunk"])

    def _read(self) -> None:
        self._file.seek(0)
        whole = 0
        for line in self._file.read().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            self._note(json.loads(line))
            whole += len(line)
        self._file.truncate(whole)
