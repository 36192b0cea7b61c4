"""Tokenized datasets on disk: one HDF5 file, laid out so that any row is one memory-mapped slice.

Datasets: `tokens` 1-D contiguous, uint16 where the vocabulary allows and else uint32; `offsets`
int64 [rows + 1] into it; `runs` int64 [runs, 2], the [start, end) of each stretch of `tokens` that
carries loss; `run_offsets` int64 [rows + 1] into `runs`; `rows` int64 [rows], the row's number in the
dataset, from 0. The attributes say what it was made from.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import msgspec
import numpy as np

from tfslurm.files import fsync_folder
from tfslurm.training.masks import Encoded, Rejected
from tfslurm.training.prepared import Rows

LAYOUT = 1
BLOCK = 1 << 24


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """What decides every byte of a token file."""

    dataset_digest: str
    tokenizer_hash: str
    template_hash: str
    format: str
    field_map: dict[str, str]

    @property
    def file_name(self) -> str:
        key = msgspec.json.encode([LAYOUT, self], order="deterministic")
        return hashlib.sha256(key).hexdigest()[:40] + ".h5"


@dataclass
class _Columns:
    """What grows with the number of rows, not of tokens; held in memory while writing."""

    offsets: array = field(default_factory=lambda: array("q", [0]))
    runs: array = field(default_factory=lambda: array("q"))
    run_offsets: array = field(default_factory=lambda: array("q", [0]))
    rows: array = field(default_factory=lambda: array("q"))


def write_tokens(path: Path, encoded: Iterable[Encoded | Rejected], source: Source, vocabulary: int) -> None:
    """Write a token file; `path` appears whole or not at all, and one that is there already stays.

    Memory holds a batch of tokens and some 40 bytes a row. Two processes may write the same path
    at once: each writes a temporary file in the same folder, and the first to be done wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        with tempfile.TemporaryFile(dir=path.parent) as flat:
            columns, rejected = _spool(encoded, flat, dtype)
            _write_file(Path(temporary), flat, dtype, columns, _attributes(source, rejected))
        _publish(Path(temporary), path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _spool(encoded: Iterable[Encoded | Rejected], flat, dtype: np.dtype) -> tuple[_Columns, dict[str, Rows]]:
    """Tokens go to the unnamed file `flat`: a contiguous dataset's size must be known beforehand."""
    columns, rejected, position = _Columns(), {}, 0
    for row, result in enumerate(encoded):
        if isinstance(result, Rejected):
            rejected.setdefault(result.reason, Rows()).add(row)
            continue
        np.array(result.ids, dtype=dtype).tofile(flat)
        for start, end in result.spans:
            columns.runs.extend((position + start, position + end))
        position += len(result.ids)
        columns.offsets.append(position)
        columns.run_offsets.append(len(columns.runs) // 2)
        columns.rows.append(row)
    flat.flush()
    return columns, rejected


def _attributes(source: Source, rejected: dict[str, Rows]) -> dict[str, Any]:
    values = msgspec.to_builtins(source) | {"layout": LAYOUT, "rejected": msgspec.to_builtins(rejected)}
    return {key: json.dumps(value) if isinstance(value, dict) else value for key, value in values.items()}


def _write_file(path: Path, flat, dtype: np.dtype, columns: _Columns, attributes: dict[str, Any]) -> None:
    with h5py.File(path, "w", locking=False) as file:
        total = columns.offsets[-1]
        tokens = file.create_dataset("tokens", shape=(total,), dtype=dtype)
        flat.seek(0)
        for start in range(0, total, BLOCK):
            tokens[start : start + BLOCK] = np.fromfile(flat, dtype=dtype, count=min(BLOCK, total - start))
        file["offsets"] = np.array(columns.offsets, dtype=np.int64)
        file["runs"] = np.array(columns.runs, dtype=np.int64).reshape(-1, 2)
        file["run_offsets"] = np.array(columns.run_offsets, dtype=np.int64)
        file["rows"] = np.array(columns.rows, dtype=np.int64)
        file.attrs.update(attributes)


def _publish(temporary: Path, path: Path) -> None:
    with open(temporary, "rb") as file:
        os.fchmod(file.fileno(), 0o644)
        os.fsync(file.fileno())
    # Another job may be reading the same bytes under this name already: leave its file alone.
    if not path.exists():
        os.rename(temporary, path)
        fsync_folder(path.parent)


class TokenFile:
    """A token file, opened for reading: rows are slices of one memory map."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with h5py.File(path, "r", locking=False) as file:
            self.attributes = dict(file.attrs)
            self.offsets = file["offsets"][:]
            self.runs = file["runs"][:]
            self.run_offsets = file["run_offsets"][:]
            self.rows = file["rows"][:]
            self._tokens = _memory_map(path, file["tokens"])

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def rejected(self) -> dict[str, Rows]:
        """Why rows of the dataset are not here."""
        return msgspec.json.decode(self.attributes["rejected"], type=dict[str, Rows])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens a row, int64 [rows]."""
        return np.diff(self.offsets)

    def supervised(self, limit: int) -> np.ndarray:
        """Tokens that carry loss among the first `limit` of each row, int64 [rows]."""
        row_of_run = np.repeat(np.arange(len(self)), np.diff(self.run_offsets))
        cut = self.offsets[row_of_run] + limit
        counts = np.clip(np.minimum(self.runs[:, 1], cut) - self.runs[:, 0], 0, None)
        return np.bincount(row_of_run, weights=counts, minlength=len(self)).astype(np.int64)

    def row(self, index: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """The first `limit` tokens of a row, and which of them carry loss (bool), both [tokens]."""
        start = self.offsets[index]
        end = min(self.offsets[index + 1], start + limit)
        mask = np.zeros(end - start, dtype=bool)
        for first, last in self.runs[self.run_offsets[index] : self.run_offsets[index + 1]] - start:
            mask[first:last] = True
        return self._tokens[start:end], mask


def _memory_map(path: Path, dataset) -> np.ndarray:
    if dataset.size == 0:
        return np.empty(0, dtype=dataset.dtype)
    return np.memmap(path, dtype=dataset.dtype, mode="r", offset=dataset.id.get_offset(), shape=dataset.shape)
