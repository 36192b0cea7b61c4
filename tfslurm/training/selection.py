"""Choose the rows that a maximum length leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

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


def _rows(tokens: TokenFile, chosen: np.ndarray) -> Rows:
    rows = Rows()
    for row in tokens.rows[chosen]:
        rows.add(int(row))
    return rows
