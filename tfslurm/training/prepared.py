"""What preparation came to: read by the trainer, and by the job's view."""

from __future__ import annotations

from pathlib import Path

import msgspec

from tfslurm.files import write_atomic

FIRST = 20
"""How many row numbers are kept of those that are left out."""


class Rows(msgspec.Struct, kw_only=True):
    """How many rows, and the numbers of the first of them in the dataset, from 0."""

    count: int = 0
    first: list[int] = []

    def add(self, row: int) -> None:
        self.count += 1
        if len(self.first) < FIRST:
            self.first = [*self.first, row]


class PreparedValidation(msgspec.Struct, frozen=True, kw_only=True):
    """What the loss is measured on: one pass over it, after each of the steps `points`.

    Rows are left out of a validation dataset as of one that is trained on.
    """

    tokens: str
    """The token file."""
    plan: str
    points: list[int]
    """The steps after which it is measured, the first being 1; the last is the run's last."""
    rows: int
    token_count: int
    supervised_count: int
    truncated: Rows
    dropped: Rows
    rejected: dict[str, Rows]


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """The plan in figures. `examples` and the counts of tokens are over all epochs."""

    tokens: str
    """The token file."""
    plan: str
    steps: int
    steps_per_epoch: int
    rows: int
    """Rows of the dataset that are trained on."""
    examples: int
    token_count: int
    supervised_count: int
    micro_batches: int
    """Over all processes, with those that only keep step with the others."""
    truncated: Rows
    dropped: Rows
    rejected: dict[str, Rows]
    """By reason: what the tokenizer or the chat template could make nothing of."""
    validation: PreparedValidation | None = None

    def write(self, path: Path) -> None:
        write_atomic(path, msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")

    @classmethod
    def read(cls, path: Path) -> Prepared:
        return msgspec.json.decode(path.read_bytes(), type=cls)
