"""What validation found: counts, the first findings of each kind, and statistics, in bounded memory."""

from __future__ import annotations

import heapq
from collections import Counter
from typing import Any

import msgspec

from tfslurm.datasets.checks import CHECKS, Severity

FIRST = 5
"""How many findings of each check are kept with their places."""
DUPLICATES_REMEMBERED = 1_000_000
FAR_LONGER = 10
ENOUGH_ROWS_TO_COMPARE = 20


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
    """Over the rows without errors: `characters` of text, or `tokens` where rows are pretokenized."""

    rows: int = 0
    messages: int = 0
    characters: Spread | None = None
    tokens: Spread | None = None


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
        return [
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

    def add(self, size: int) -> None:
        key = size if size < 1024 else size >> (shift := size.bit_length() - 10) << shift
        self.counts[key] = self.counts.get(key, 0) + 1
        self.rows += 1
        self.total += size
        if size > self.max:
            self.max = size
        if self.min is None or size < self.min:
            self.min = size

    def spread(self) -> Spread | None:
        """None where there were no rows."""
        if self.min is None:
            return None
        p5, median, p95 = (max(self.min, self._percentile(rank)) for rank in (5, 50, 95))
        return Spread(self.min, p5, median, p95, self.max, self.total)

    def above(self, size: int) -> int:
        return sum(count for key, count in self.counts.items() if key > size)

    def _percentile(self, percent: int) -> int:
        wanted = -(-self.rows * percent // 100)
        for size in sorted(self.counts):
            wanted -= self.counts[size]
            if wanted <= 0:
                return size
        return self.max


class Tally:
    """Gathers what is found while rows stream by; `report` closes it.

    One process tallies rows in order. To validate ranges in parallel, give each its own and
    merge: everything here is a count, a bounded list by place, or a set.
    """

    def __init__(self, format: str, *, tokens: bool = False) -> None:
        self.format = format
        self.tokens = tokens
        self.files = self.rows = self.bad_rows = self.messages = 0
        self.counts: Counter[str] = Counter()
        self.first: dict[str, list[RowError]] = {}
        self.schemas: set[str] = set()
        self.sizes = Sizes()
        self._seen: set[int] = set()
        self._longest: list[tuple[int, str, int]] = []

    def finding(self, file: str, line: int, path: str, check: str, message: str) -> None:
        self.counts[check] += 1
        first = self.first.setdefault(check, [])
        if len(first) < FIRST:
            first.append(RowError(file, line, path, check, message))

    def row(self, file: str, line: int, messages: int, size: int, schema: str) -> None:
        """Count a row without errors."""
        self.rows += 1
        self.messages += messages
        self.schemas.add(schema)
        self.sizes.add(size)
        if len(self._longest) < FIRST:
            heapq.heappush(self._longest, (size, file, line))
        elif size > self._longest[0][0]:
            heapq.heapreplace(self._longest, (size, file, line))

    def bad_row(self) -> None:
        self.rows += 1
        self.bad_rows += 1

    def note_duplicate(self, file: str, line: int, row: bytes) -> None:
        key = hash(row)
        if key in self._seen:
            self.finding(file, line, "", "duplicate_row", "the same as an earlier row")
        elif len(self._seen) < DUPLICATES_REMEMBERED:
            self._seen.add(key)

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
        for size, file, line in sorted(self._longest, reverse=True):
            if size > bound:
                message = f"{size:,} {unit}, where 95 % of the rows have at most {spread.p95:,}"
                self.finding(file, line, "", "far_longer_than_the_rest", message)
        if count := self.sizes.above(bound):
            self.counts["far_longer_than_the_rest"] = max(count, self.counts["far_longer_than_the_rest"])
