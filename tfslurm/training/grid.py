"""Grids: the values that a sweep tries, field by field."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from tfslurm.errors import InvalidError, UsageError
from tfslurm.training.hyperparameters import FIELDS

MOST_CELLS = 10_000
"""More are a slip of the pen."""

Grid = tuple[tuple[str, tuple[float, ...]], ...]
"""The values of each field that varies, in the order given; a field is a hyperparameter or `seed`."""


def size(grid: Grid) -> int:
    """The number of its cells."""
    return math.prod(len(values) for _, values in grid)


def parse_grid(words: Iterable[str]) -> Grid:
    """The grid that `FIELD=VALUE,VALUE…` words mean; a field may be written with - or _.

    Raises UsageError naming the field for what is no such word, no number, empty, or there twice.
    """
    grid: dict[str, tuple[float, ...]] = {}
    for word in words:
        field, equals, values = word.partition("=")
        name = field.strip().replace("-", "_")
        if not equals or name not in (*FIELDS, "seed"):
            raise UsageError(
                f"--grid {word}: there is no field '{field}'" if equals else f"--grid {word}: there is no = in it",
                hint=f"Write FIELD=VALUE,VALUE… with one of {', '.join(FIELDS)} and seed.",
            )
        if name in grid:
            raise UsageError(f"--grid: {name} is there twice", hint="Give all its values in one --grid.")
        grid[name] = tuple(_number(name, text.strip()) for text in values.split(","))
        twice = [value for index, value in enumerate(grid[name]) if value in grid[name][:index]]
        if twice:
            raise UsageError(f"--grid {name}: {twice[0]:g} is there twice")
    return tuple(grid.items())


def _number(name: str, text: str) -> float:
    kind = FIELDS.get(name, int)
    try:
        return kind(text)
    except ValueError:
        what = "a number" if kind is float else "a whole number"
        raise UsageError(f"--grid {name}: {text!r} is not {what}") from None


def check_grid(grid: Grid, fixed: Mapping[str, float | None]) -> None:
    """Raises UsageError for an empty grid or a field that is `fixed` too, InvalidError for what no sweep can have."""
    if not grid:
        raise UsageError("nothing varies", hint="Give at least one --grid FIELD=VALUE,VALUE…")
    both = [name for name, _ in grid if fixed.get(name) is not None]
    if both:
        raise UsageError(f"{both[0]} is both fixed and in the grid")
    negative = [seed for seed in dict(grid).get("seed", ()) if seed < 0]
    if negative:
        raise InvalidError(f"seed {negative[0]} is negative")
    if size(grid) > MOST_CELLS:
        raise InvalidError(f"the grid has {size(grid):,} cells, and a sweep at most {MOST_CELLS:,}")
