"""Checks files line by line. The table of checks is in `checks`, the result is a `report.Report`.

A plain row costs one decode and a count of its quotation marks; see `measures`. Any other row is
looked at again by `diagnosis`, which names all that is wrong with it. Many lines at once cost
less than one by one and give the same; see `check_lines`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from tfslurm.datasets import diagnosis, measures, rows
from tfslurm.datasets.advice import array_advice
from tfslurm.datasets.checks import CHECKS, Check, Severity
from tfslurm.datasets.diagnosis import Finding
from tfslurm.datasets.files import BOM, MAX_LINE, DamagedFile, Found, discover, open_lines
from tfslurm.datasets.formats import Format, as_format, check_field_map
from tfslurm.datasets.report import Counts, Measure, Report, RowError, Sizes, Spread, Statistics, Tally
from tfslurm.errors import ValidationError

__all__ = [
    "CHECKS",
    "Check",
    "Report",
    "RowError",
    "Severity",
    "Sizes",
    "Spread",
    "Statistics",
    "Validator",
    "refuse",
    "validate",
]


def validate(
    source: Path | Sequence[Path],
    format: str,
    field_map: Mapping[str, str] | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
    workers: int | None = None,
) -> Report:
    """Check a folder, a file or a list of both; changes and copies nothing.

    The report holds what is wrong with the files and with the rows of those that are data.
    `workers` processes share the work, as many as there are cores where it is None.
    Raises InvalidError for an unknown format, a wrong field map or a missing source.
    """
    from tfslurm.datasets.scan import scan  # it needs the Validator of this module

    validator = Validator(format, field_map or {})
    found = discover(source)
    validator.note_files(found)
    scan(found.files, validator, progress=progress, workers=workers)
    return validator.report()


def refuse(report: Report, what: str) -> None:
    """Raise ValidationError, with the first errors in words and the report, unless the report is ok."""
    if report.ok:
        return
    lines = [f"{what}: {report.verdict()}", *(str(error) for error in report.first_errors[:5])]
    if (rest := sum(report.errors.values()) - len(lines) + 1) > 0:
        lines.append(f"… and {rest:,} more")
    raise ValidationError("\n".join(lines), hint="Mend the source and try again.", report=report.to_dict())


class Validator:
    """Checks files one after the other and tallies what it finds.

    Raises InvalidError for an unknown format or a field map that doesn't fit it.
    """

    def __init__(self, format: str, field_map: Mapping[str, str]) -> None:
        check_field_map(format, field_map)
        self.format = as_format(format)
        self.tally = Tally(self.format, tokens=self.format is Format.PRETOKENIZED)
        self._counts: Counts = self.tally
        parts = _PARTS[self.format]
        self._row, self._decode_lines = parts.row(field_map), parts.lines_decoder(field_map)
        self._decode = msgspec.json.Decoder(self._row).decode
        self._plain, self._measure = parts.plain, parts.measure
        self._tokens = self._decode_lines if isinstance(self._decode_lines, rows.PretokenizedLines) else None
        self._diagnose = parts.diagnose(field_map)

    def note_files(self, found: Found) -> None:
        """Put what discovery refused and ignored into the report."""
        for problem in found.problems:
            message = problem.message.removeprefix(f"{problem.name}: ")
            self.tally.finding(problem.name, 0, "", problem.check, message)
        for name in found.ignored:
            self.tally.finding(name, 0, "", "hidden_file", "ignored")
        if not found.files and not found.problems:
            self.tally.finding("", 0, "", "empty_dataset", "there is no .jsonl, .jsonl.gz or .jsonl.zst file")

    def check_file(
        self,
        path: Path,
        name: str,
        *,
        descriptor: int | None = None,
        on_read: Callable[[int], None] | None = None,
    ) -> None:
        """Check every line of `path`, called `name` in the report; `on_read` gets the bytes of each read.

        One line at a time, in this process: what `scan` does in several must give the same.
        """
        rows_before = self.start_file()
        try:
            with open_lines(path, descriptor, on_read) as lines:
                for number, line in enumerate(lines, 1):
                    self.check_line(path, name, number, line)
        except DamagedFile as error:
            self.note_damage(path, name, error)
        self.end_file(name, rows_before)

    def start_file(self) -> int:
        """How many rows there were before it."""
        self.tally.files += 1
        return self.tally.rows

    def check_line(self, path: Path, name: str, number: int, line: bytes) -> None:
        """Check one line, cut off after MAX_LINE + 1 bytes, of the file `path`."""
        if number == 1:
            line = self._start_of_file(path, name, line)
        self._check_line(name, number, line)

    def note_damage(self, path: Path, name: str, error: DamagedFile) -> None:
        self.tally.finding(name, 0, "", "damaged_compression", error.message.removeprefix(f"{path}: "))

    def end_file(self, name: str, rows_before: int) -> None:
        if self.tally.rows == rows_before:
            self.tally.finding(name, 0, "", "empty_file", "has no rows")

    def count_piece(self, name: str, blocks: Iterable[bytes]) -> tuple[int, Counts]:
        """(lines, what is in them) of blocks of whole lines that follow each other; the tally stays as it is."""
        lines, self._counts = 0, Counts()
        try:
            for block in blocks:
                lines += self.check_lines(name, lines + 1, block)
            return lines, self._counts
        finally:
            self._counts = self.tally

    def report(self) -> Report:
        if not self.tally.rows and self.tally.files:
            self.tally.finding("", 0, "", "empty_dataset", "there is no row in any file")
        return self.tally.report()

    def _start_of_file(self, path: Path, name: str, line: bytes) -> bytes:
        if line.startswith(BOM):
            self.tally.finding(name, 1, "", "byte_order_mark", "a byte order mark, skipped")
            line = line[len(BOM) :]
        if line.lstrip().startswith(b"["):
            self.tally.finding(name, 0, "", "json_array", array_advice(path))
        return line

    def check_lines(self, name: str, first: int, block: bytes) -> int:
        """Check lines, each with its line end, the first of which is `first`; returns how many.

        The decoder takes any white space between values and asks for no line end, so that it may pair
        rows with lines wrongly. Where every line starts with { and ends with }, it cannot: no value
        goes on from a } to a {, so each line has one value or more, and as many values as lines
        means one in each. Elsewhere, and where a row is not plain, the line is decoded by itself.
        """
        lines = io.BytesIO(block).readlines()
        count = len(lines)
        found = self._together(lines, block) if len(block) <= MAX_LINE else [None] * count
        numbers: Sequence[int] = range(first, first + count)
        if None not in found:
            self._count(name, numbers, found, list(map(hash, lines)))  # the `_key` of such lines
            return count
        measured = zip(numbers, lines, found, strict=True)
        good = [
            (number, measure, _key(line))
            for number, line, known in measured
            if (measure := known or self._measure_line(name, number, line[: MAX_LINE + 1]))
        ]
        if good:
            self._count(name, *zip(*good, strict=True))
        return count

    def _together(self, lines: list[bytes], block: bytes) -> list[Measure | None]:
        """What `_quickly` says of each line; None for all where that takes decoding each by itself."""
        try:
            decoded = self._decode_lines(block)
        except _UNDECODABLE:
            return [None] * len(lines)
        if len(decoded) != len(lines) or not _are_objects(lines):
            return [None] * len(lines)
        return self._plain(decoded, lines)

    def _check_line(self, name: str, number: int, line: bytes) -> None:
        if measure := self._measure_line(name, number, line):
            self._count(name, [number], [measure], [_key(line)])

    def _count(self, name: str, numbers: Sequence[int], measured: Sequence[Measure], keys: Sequence[int]) -> None:
        self._counts.rows_from(name, numbers, measured, keys)
        if self._tokens and self._counts.largest_token > self._tokens.largest:
            self._tokens.learn(self._counts.largest_token)

    def _measure_line(self, name: str, number: int, line: bytes) -> Measure | None:
        """The measure of a row without errors; all else that there is to say of the line is tallied."""
        if not line or line.isspace():
            self._counts.finding(name, number, "", "blank_line", "a blank line, skipped")
            return None
        if len(line) > MAX_LINE and not line.endswith(b"\n"):
            self._counts.finding(name, number, "", "line_too_long", f"has more than {MAX_LINE:,} bytes")
            self._counts.bad_row()
            return None
        measure = self._quickly(line) or self._sound(name, number, line) or self._carefully(name, number, line)
        if measure is None:
            self._counts.bad_row()
        return measure

    def _quickly(self, line: bytes) -> Measure | None:
        """The measure of a row with nothing to say about it; None where `diagnosis` must look."""
        try:
            decoded = self._decode_lines(line)
        except _UNDECODABLE:
            return None
        return self._plain(decoded, [line])[0] if len(decoded) == 1 else None

    def _sound(self, name: str, number: int, line: bytes) -> Measure | None:
        """What `_carefully` says and tallies of a row without errors, in half the time; None for others."""
        try:
            value = _decode_any(line)
            if type(value) is not dict or not diagnosis.has_no_anomalies(value, line):
                return None
            measure = self._measure(msgspec.convert(value, self._row))
        except _UNDECODABLE:
            return None
        findings = list(self._diagnose(value))
        if not _REFUSING.isdisjoint([finding.check for finding in findings]):
            return None
        for check, path, message in findings:
            self._counts.finding(name, number, path, check, message)
        return measure

    def _carefully(self, name: str, number: int, line: bytes) -> Measure | None:
        """Tally every finding of the row; its measure, or None where one is an error."""
        findings = list(self._findings(line))
        refused = False
        for check, path, message in findings:
            self._counts.finding(name, number, path, check, message)
            refused = refused or check in _REFUSING
        if refused:
            return None
        try:
            return self._measure(self._decode(line))
        except _UNDECODABLE as error:
            self._counts.finding(name, number, "", "row_type", str(error))
            return None

    def _findings(self, line: bytes) -> list[Finding]:
        try:
            value = diagnosis.parse(line)
        except UnicodeDecodeError as error:
            return [Finding("invalid_utf8", "", f"byte {error.start + 1} is not UTF-8 ({line[error.start]:#04x})")]
        except json.JSONDecodeError as error:
            return [Finding("invalid_json", "", f"column {error.colno}: {error.msg}")]
        except ValueError as error:
            return [Finding("invalid_json", "", str(error))]
        except RecursionError:
            return [Finding("nested_too_deep", "", f"more than {diagnosis.MAX_DEPTH} levels deep")]
        found = list(diagnosis.anomalies(value))
        if not isinstance(value, dict):
            return [*found, Finding("data_type", "$", "the row is no JSON object")]
        return found + list(self._diagnose(value))


_REFUSING = frozenset(name for name, check in CHECKS.items() if check.severity is Severity.REFUSE)
_decode_any = msgspec.json.Decoder().decode
_UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def _key(line: bytes) -> int:
    """The same for the same bytes, whatever the line's end."""
    return hash(line.rstrip(b"\r\n") + b"\n")


def _are_objects(lines: list[bytes]) -> bool:
    """Whether each starts with { and ends with } and a line feed."""
    return set(map(_first, lines)) == {ord("{")} and set(map(_last_before_end, lines)) == {ord("}")}


_first, _last_before_end = itemgetter(0), itemgetter(-2)


class _Parts(NamedTuple):
    """How rows of a format are decoded and measured; `plain` gives None where there is more to say."""

    row: Callable[[Mapping[str, str]], type]
    lines_decoder: Callable[[Mapping[str, str]], rows.DecodeLines]
    plain: Callable[[Sequence[Any], Sequence[bytes]], list[Measure | None]]
    measure: Callable[[Any], Measure]
    diagnose: Callable[[Mapping[str, str]], diagnosis.Diagnose]


_PARTS: dict[Format, _Parts] = {
    Format.CONVERSATIONAL: _Parts(
        rows.conversation_type,
        rows.conversation_lines_decoder,
        measures.plain_conversations,
        measures.conversation,
        diagnosis.conversation,
    ),
    Format.INSTRUCTION: _Parts(
        rows.instruction_keys_type,
        rows.instruction_lines_decoder,
        measures.plain_instructions,
        measures.instruction,
        diagnosis.instruction,
    ),
    Format.TEXT: _Parts(
        rows.text_type,
        rows.text_lines_decoder,
        measures.plain_texts,
        measures.text,
        diagnosis.text,
    ),
    Format.PRETOKENIZED: _Parts(
        rows.pretokenized_type,
        rows.PretokenizedLines,
        measures.plain_pretokenized,
        measures.pretokenized,
        diagnosis.pretokenized,
    ),
}
