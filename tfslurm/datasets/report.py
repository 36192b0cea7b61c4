"""What validation found: counts, the first findings of each kind, and statistics, in bounded memory."""

from __future__ import annotations

import heapq
from array import array
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import structs

from tfslurm.datasets.checks import CHECKS, Severity

FIRST = 5
"""How many findings of each check are kept with their places."""
DUPLICATES_REMEMBERED = 1_000_000
FAR_LONGER = 10
ENOUGH_ROWS_TO_COMPARE = 20
FRESH_SIZES = 65_536

Measure = tuple[int, int, str] | tuple[int, int, str, int]
"""Messages, size (characters or tokens) and schema of a row; where it is of tokens, also the largest id."""


class RowError(msgspec.Struct, frozen=True):
    """One finding. `line` starts at 1 and is 0 where the whole file is meant; `path` is `$.a[0].b`."""

    file: str
    line: int
    path: str
    check: str
    message: str

    def __str__(self) -> str:
        """`chat.jsonl:17: $.messages[1].role: …`, without the parts that are not known."""
        place = f"{self.file}:{self.line}" if self.line else self.file
        return ": ".join(part for part in (place, self.path, self.message) if part)


class Spread(msgspec.Struct, frozen=True):
    """How a size is spread over the rows; percentiles are nearest-rank, within 0.1 % above 1,024."""

    min: int
    p5: int
    median: int
    p95: int
    max: int
    total: int


class Statistics(msgspec.Struct, frozen=True):
    """Over the rows without errors: `characters` of text, or `tokens` where rows are pretokenized.

    `max_token_id` is the largest id among their tokens and labels: a model must know that many.
    """

    rows: int = 0
    messages: int = 0
    characters: Spread | None = None
    tokens: Spread | None = None
    max_token_id: int | None = None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a validation; `rows` counts all rows, `bad_rows` those with an error."""

    format: str
    schema: str
    files: int
    rows: int
    bad_rows: int
    errors: dict[str, int]
    first_errors: list[RowError]
    warnings: dict[str, int]
    first_warnings: list[RowError]
    statistics: Statistics

    @property
    def ok(self) -> bool:
        return not self.errors

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for the dataset's metadata."""
        return msgspec.to_builtins(self)

    def describe(self, limit: int = 20) -> str:
        """For people: the verdict, the first `limit` errors by place, then warnings and statistics."""
        return "\n".join([self.verdict(), *self._places(limit), *self._counts(), *self._sizes()])

    def verdict(self) -> str:
        """One sentence."""
        if self.ok:
            return f"{_many(self.rows, f'{self.format} row')} in {_many(self.files, 'file')}: no errors."
        if self.bad_rows:
            return f"{self.bad_rows:,} of {_many(self.rows, 'row')} not in the {self.format} format."
        return f"{_many(sum(self.errors.values()), 'error')} in the files."

    def _places(self, limit: int) -> list[str]:
        shown = [str(error) for error in self.first_errors[:limit]]
        rest = sum(self.errors.values()) - len(shown)
        return shown + ([f"… and {_many(rest, 'more error')}"] if rest else [])

    def _counts(self) -> list[str]:
        lines = [f"error {name}: {count:,}" for name, count in self.errors.items()]
        firsts = {first.check: first for first in reversed(self.first_warnings)}
        return lines + [f"warning {name}: {count:,}, first at {firsts[name]}" for name, count in self.warnings.items()]

    def _sizes(self) -> list[str]:
        sizes = {"characters": self.statistics.characters, "tokens": self.statistics.tokens}
        largest = self.statistics.max_token_id
        return ([] if largest is None else [f"largest token id: {largest:,}"]) + [
            f"{name} a row: min {size.min:,}, p5 {size.p5:,}, median {size.median:,}, "
            f"p95 {size.p95:,}, max {size.max:,}"
            for name, size in sizes.items()
            if size
        ]


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


class Sizes:
    """A histogram of sizes: exact below 1,024, the upper ten bits above, so its length is bounded."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.min: int | None = None
        self.max = self.total = self.rows = 0
        self._fresh: list[int] = []

    def add(self, size: int) -> None:
        self.add_all((size,))

    def add_all(self, sizes: Sequence[int]) -> None:
        self._fresh += sizes
        if len(self._fresh) >= FRESH_SIZES:
            self.settle()

    def settle(self) -> None:
        """Put what was added lately into the histogram: many at once cost less than one by one."""
        if not self._fresh:
            return
        fresh, self._fresh = self._fresh, []
        self._widen(min(fresh), max(fresh))
        self.total += sum(fresh)
        self.rows += len(fresh)
        for size, count in Counter(fresh).items():
            key = size if size < 1024 else size >> (shift := size.bit_length() - 10) << shift
            self.counts[key] = self.counts.get(key, 0) + count

    def merge(self, other: Sizes) -> None:
        """Add all sizes of another histogram: the result is that of one that saw them all."""
        if other.min is not None:
            self._widen(other.min, other.max)
            self.total += other.total
            self.rows += other.rows
            for key, count in other.counts.items():
                self.counts[key] = self.counts.get(key, 0) + count
        self.add_all(other._fresh)

    def spread(self) -> Spread | None:
        """None where there were no rows."""
        self.settle()
        if self.min is None:
            return None
        p5, median, p95 = (max(self.min, self._percentile(rank)) for rank in (5, 50, 95))
        return Spread(self.min, p5, median, p95, self.max, self.total)

    def above(self, size: int) -> int:
        self.settle()
        return sum(count for key, count in self.counts.items() if key > size)

    def _widen(self, smallest: int, largest: int) -> None:
        self.min = smallest if self.min is None else min(self.min, smallest)
        self.max = max(self.max, largest)

    def _percentile(self, percent: int) -> int:
        wanted = -(-self.rows * percent // 100)
        for size in sorted(self.counts):
            wanted -= self.counts[size]
            if wanted <= 0:
                return size
        return self.max


class Counts:
    """What is found in some lines that follow each other: counts, and bounded lists by place.

    A piece of a file has one of its own, with lines counted from the piece's first; a Tally of
    the whole takes them in, in the order of the lines.
    """

    def __init__(self) -> None:
        self.rows = self.bad_rows = self.messages = 0
        self.largest_token = -1
        self.counts: Counter[str] = Counter()
        self.first: dict[str, list[RowError]] = {}
        self.schemas: set[str] = set()
        self.sizes = Sizes()
        self.keys = array("q")
        self.lines = array("q")
        self._longest: list[tuple[int, str, int]] = []

    def finding(self, file: str, line: int, path: str, check: str, message: str) -> None:
        self.counts[check] += 1
        first = self.first.setdefault(check, [])
        if len(first) < FIRST:
            first.append(RowError(file, line, path, check, message))

    def row(self, file: str, line: int, measure: Measure, key: int) -> None:
        """Count a row without errors; `key` is the same for the same bytes."""
        self.rows_from(file, [line], [measure], [key])

    def rows_from(self, file: str, lines: Sequence[int], measures: Sequence[Measure], keys: Sequence[int]) -> None:
        """Count rows without errors, at `lines`, which ascend."""
        messages, sizes, schemas, *tokens = zip(*measures, strict=True)
        self.rows += len(measures)
        self.messages += sum(messages)
        self.schemas.update(schemas)
        if tokens:
            self.largest_token = max(self.largest_token, *tokens[0])
        self.sizes.add_all(sizes)
        self._note_longest(file, lines, sizes)
        self.note_keys(file, keys, lines)

    def bad_row(self) -> None:
        self.rows += 1
        self.bad_rows += 1

    def note_keys(self, file: str, keys: Sequence[int], lines: Sequence[int]) -> None:
        """Keep them: which rows are duplicates is seen where those before are known."""
        self.keys.fromlist(list(keys))
        self.lines.fromlist(list(lines))

    def _note_longest(self, file: str, lines: Sequence[int], sizes: Sequence[int]) -> None:
        bound = -self._longest[-1][0] if len(self._longest) == FIRST else -1
        if max(sizes) > bound:
            longer = [(-size, file, line) for line, size in zip(lines, sizes, strict=True) if size > bound]
            self._longest = heapq.nsmallest(FIRST, self._longest + longer)


class Tally(Counts):
    """Gathers what is found in all rows; `report` closes it.

    Rows can be counted one by one, or by `merge` piece by piece: the report is the same.
    """

    def __init__(self, format: str, *, tokens: bool = False) -> None:
        super().__init__()
        self.format = format
        self.tokens = tokens
        self.files = 0
        self._seen: set[int] = set()

    def merge(self, file: str, line: int, piece: Counts) -> None:
        """Take in the counts of a piece of `file` whose first line comes after `line` others."""
        self.rows += piece.rows
        self.bad_rows += piece.bad_rows
        self.messages += piece.messages
        self.largest_token = max(self.largest_token, piece.largest_token)
        self.counts.update(piece.counts)
        self.schemas |= piece.schemas
        self.sizes.merge(piece.sizes)
        for check, errors in piece.first.items():
            first = self.first.setdefault(check, [])
            moved = [structs.replace(error, line=error.line + line) for error in errors]
            first += moved[: FIRST - len(first)]
        longest = [(size, file, line + number) for size, file, number in piece._longest]
        self._longest = heapq.nsmallest(FIRST, self._longest + longest)
        self._note_keys(file, piece.keys, piece.lines, line)

    def note_keys(self, file: str, keys: Sequence[int], lines: Sequence[int]) -> None:
        self._note_keys(file, keys, lines, 0)

    def _note_keys(self, file: str, keys: Sequence[int], lines: Sequence[int], before: int) -> None:
        if self._all_are_new(keys):
            return
        for key, line in zip(keys, lines, strict=True):
            if key in self._seen:
                self.finding(file, before + line, "", "duplicate_row", "the same as an earlier row")
            elif len(self._seen) < DUPLICATES_REMEMBERED:
                self._seen.add(key)

    def _all_are_new(self, keys: Sequence[int]) -> bool:
        """Whether none is a duplicate, which costs less to see than which one is; they are remembered then."""
        before = len(self._seen)
        room = DUPLICATES_REMEMBERED - before
        if 0 < room < len(keys) or not self._seen.isdisjoint(keys):
            return False
        if room:
            self._seen.update(keys)
        if room and len(self._seen) < before + len(keys):
            self._seen.difference_update(keys)
            return False
        return True

    def report(self) -> Report:
        """The report of all that was tallied."""
        self._note_far_longer()
        errors, first_errors = self._of(Severity.REFUSE)
        warnings, first_warnings = self._of(Severity.WARN)
        spread = self.sizes.spread()
        statistics = Statistics(
            rows=self.sizes.rows,
            messages=self.messages,
            characters=None if self.tokens else spread,
            tokens=spread if self.tokens else None,
            max_token_id=None if self.largest_token < 0 else self.largest_token,
        )
        return Report(
            format=str(self.format),
            schema=", ".join(sorted(self.schemas)),
            files=self.files,
            rows=self.rows,
            bad_rows=self.bad_rows,
            errors=errors,
            first_errors=first_errors,
            warnings=warnings,
            first_warnings=first_warnings,
            statistics=statistics,
        )

    def _of(self, severity: Severity) -> tuple[dict[str, int], list[RowError]]:
        names = [name for name, check in CHECKS.items() if check.severity == severity and self.counts[name]]
        first = [error for name in names for error in self.first[name]]
        return {name: self.counts[name] for name in names}, sorted(first, key=lambda error: (error.file, error.line))

    def _note_far_longer(self) -> None:
        spread = self.sizes.spread()
        if not spread or self.sizes.rows < ENOUGH_ROWS_TO_COMPARE:
            return
        bound = FAR_LONGER * spread.p95
        unit = "tokens" if self.tokens else "characters"
        for size, file, line in self._longest:
            if -size > bound:
                message = f"{-size:,} {unit}, where 95 % of the rows have at most {spread.p95:,}"
                self.finding(file, line, "", "far_longer_than_the_rest", message)
        if count := self.sizes.above(bound):
            self.counts["far_longer_than_the_rest"] = max(count, self.counts["far_longer_than_the_rest"])
