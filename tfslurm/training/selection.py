"""Choose the rows that a maximum length leaves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from tfslurm.errors import InvalidError
from tfslurm.training.prepared import Rows
from tfslurm.training.tokens import TokenFile


@dataclass(frozen=True)
class Selection:
    """The rows of a token file that are trained on, and what the maximum length did to the others."""

    kept: np.ndarray
    """int64: their indexes in the token file"""
    lengths: np.ndarray
    """int64: tokens of each, after truncation"""
    supervised: np.ndarray
    """int64: tokens that carry loss, of each"""
    truncated: Rows
    dropped: Rows

    def only(self, chosen: np.ndarray) -> Selection:
        """Those of the kept rows that `chosen`, bool [kept], says."""
        return replace(self, kept=self.kept[chosen], lengths=self.lengths[chosen], supervised=self.supervised[chosen])


def select(tokens: TokenFile, limit: int, overlong: Literal["truncate", "drop"]) -> Selection:
    """Truncate or drop the rows of more than `limit` tokens.

    A row whose first `limit` tokens carry no loss is dropped in either case.
    """
    lengths = tokens.lengths
    supervised = tokens.supervised(limit)
    over = lengths > limit
    keep = supervised > 0
    if overlong == "drop":
        keep &= ~over
    return Selection(
        kept=np.flatnonzero(keep),
        lengths=np.minimum(lengths, limit)[keep],
        supervised=supervised[keep],
        truncated=_rows(tokens, over & keep),
        dropped=_rows(tokens, ~keep),
    )


def split(selection: Selection, total: int, share: float, seed: int) -> tuple[Selection, Selection]:
    """What is trained on, and the `share` of the rows that is kept for validation: at least one.

    The seed alone orders the `total` rows of the token file; the first of them that are kept at all are taken.
    Raises InvalidError where nothing would be left to train on.
    """
    if len(selection.kept) < 2:
        raise InvalidError(
            "the dataset has a single row to train on, and none to keep for validation",
            hint="add rows, or let the site set training.trainer.validation_split to 0",
        )
    # Epochs, which are ordered by the same seed, count from 1.
    place = np.random.default_rng([seed, 0]).permutation(total)[selection.kept]
    count = min(max(1, round(share * len(place))), len(place) - 1)
    chosen = np.zeros(len(place), dtype=bool)
    chosen[np.argsort(place)[:count]] = True
    return selection.only(~chosen), replace(selection.only(chosen), truncated=Rows(), dropped=Rows())


def _rows(tokens: TokenFile, chosen: np.ndarray) -> Rows:
    rows = Rows()
    for row in tokens.rows[chosen]:
        rows.add(int(row))
    return rows
