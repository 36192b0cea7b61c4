"""Rows of a dataset as a base model will see them: tokens, what carries loss, what the maximum length cuts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import msgspec

from tfslurm.catalog.models import BaseModel, Dataset
from tfslurm.errors import StatusError
from tfslurm.settings import Settings
from tfslurm.training.hyperparameters import resolve
from tfslurm.training.programs import ask

Status = Literal["kept", "truncated", "dropped", "rejected"]


class Place(msgspec.Struct, frozen=True):
    """A line of a data file: its path in the dataset, and the line's number from 1."""

    file: str
    line: int


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """Which rows, read how, seen by which model. `places` are the rows; without any, the first `count`."""

    folder: str
    format: str
    field_map: dict[str, str]
    model: str
    max_seq_length: int
    overlong: Literal["truncate", "drop"]
    count: int
    places: list[Place]


class Token(msgspec.Struct, frozen=True):
    """`text` is empty where several tokens make one character: the last of them has it."""

    id: int
    text: str
    learned: bool


class PreviewedRow(msgspec.Struct, frozen=True, kw_only=True):
    """A row, and what becomes of it. `tokens` are those within the maximum length, as are the counts."""

    file: str
    line: int
    status: Status
    reason: str | None = None
    length: int = 0
    """Tokens before truncation."""
    token_count: int = 0
    supervised_count: int = 0
    tokens: list[Token] = []


class Preview(msgspec.Struct, frozen=True, kw_only=True):
    """The rows in the order in which they were asked for."""

    max_seq_length: int
    rows: list[PreviewedRow]

    @property
    def statuses(self) -> Counter[str]:
        """How many rows came to each status."""
        return Counter(row.status for row in self.rows)

    @property
    def token_count(self) -> int:
        """Over the rows that are trained on."""
        return sum(row.token_count for row in self._trained)

    @property
    def supervised_count(self) -> int:
        return sum(row.supervised_count for row in self._trained)

    @property
    def _trained(self) -> list[PreviewedRow]:
        return [row for row in self.rows if row.status in ("kept", "truncated")]


def preview(
    settings: Settings,
    dataset: Dataset,
    model: BaseModel,
    *,
    count: int = 5,
    places: Sequence[Place] = (),
    max_seq_length: int | None = None,
) -> Preview:
    """The rows at `places`, or the first `count`, tokenized in the training environment.

    Works on what is being assembled too, as it is now. The maximum length is the base model's default where none is
    given. Raises InvalidError for a length that the model does not allow, NotFoundError for a row that is not there,
    StatusError where the dataset has no bytes, and what `programs.ask` raises.
    """
    registered = dataset.artifact
    if registered.status not in ("assembling", "ready"):
        raise StatusError(f"dataset '{registered.name}' is {registered.status}: there are no rows to look at")
    longest = model.metadata.get("max_position_embeddings")
    ranges = settings.model(model.name).hyperparameters
    limit = resolve({"max_seq_length": max_seq_length}, ranges, longest=longest).max_seq_length
    question = Question(
        folder=registered.location,
        format=dataset.format,
        field_map=dataset.field_map,
        model=model.location,
        max_seq_length=limit,
        overlong=settings.site.training.trainer.overlong,
        count=count,
        places=list(places),
    )
    return ask(settings, "tfslurm.training.previewing", question=question, answer=Preview)
