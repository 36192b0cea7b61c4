"""Checks files line by line. The table of checks is in `checks`, the result is a `report.Report`.

A plain row costs one decode and a count of its quotation marks; see `_has_only`. Any other row
is looked at again by `diagnosis`, which names all that is wrong with it. Many lines at once cost
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

from tfslurm.datasets import diagnosis, rows
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
        self._decode, self._decode_lines = parts.decoder(field_map), parts.lines_decoder(field_map)
        self._plain, self._measure = parts.plain, parts.measure
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
        found = self._together(lines, block) if len(block) <= MAX_LINE else None
        if found is None:
            for number, line in enumerate(lines, first):
                self._check_line(name, number, line[: MAX_LINE + 1])
        elif None not in found:
            self._counts.rows_from(name, first, found, list(map(hash, lines)))  # the `_key` of such lines
        else:
            for number, (line, measure) in enumerate(zip(lines, found, strict=True), first):
                if measure:
                    self._counts.row(name, number, measure, _key(line))
                else:
                    self._check_line(name, number, line)
        return len(lines)

    def _together(self, lines: list[bytes], block: bytes) -> list[Measure | None] | None:
        """What `_quickly` says of each line; None where that takes decoding each by itself."""
        try:
            decoded = self._decode_lines(block)
        except _UNDECODABLE:
            return None
        if len(decoded) != len(lines) or not _are_objects(lines):
            return None
        return list(map(self._plain, decoded, lines))

    def _check_line(self, name: str, number: int, line: bytes) -> None:
        if not line or line.isspace():
            self._counts.finding(name, number, "", "blank_line", "a blank line, skipped")
            return
        if len(line) > MAX_LINE and not line.endswith(b"\n"):
            self._counts.finding(name, number, "", "line_too_long", f"has more than {MAX_LINE:,} bytes")
            self._counts.bad_row()
            return
        measure = self._quickly(line) or self._carefully(name, number, line)
        if measure is None:
            self._counts.bad_row()
            return
        self._counts.row(name, number, measure, _key(line))

    def _quickly(self, line: bytes) -> Measure | None:
        """The measure of a row with nothing to say about it; None where `diagnosis` must look."""
        try:
            return self._plain(self._decode(line), line)
        except _UNDECODABLE:
            return None

    def _carefully(self, name: str, number: int, line: bytes) -> Measure | None:
        """Tally every finding of the row; its measure, or None where one is an error."""
        findings = list(self._findings(line))
        refused = False
        for check, path, message in findings:
            self._counts.finding(name, number, path, check, message)
            refused = refused or CHECKS[check].severity is Severity.REFUSE
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


_UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def _key(line: bytes) -> int:
    """The same for the same bytes, whatever the line's end."""
    return hash(line.rstrip(b"\r\n") + b"\n")


def _are_objects(lines: list[bytes]) -> bool:
    """Whether each starts with { and ends with } and a line feed."""
    return set(map(_first, lines)) == {ord("{")} and set(map(_last_before_end, lines)) == {ord("}")}


_first, _last_before_end = itemgetter(0), itemgetter(-2)


def _has_only(line: bytes, strings: int) -> bool:
    """Whether the line's JSON has just so many strings, keys included.

    Keys that the format doesn't know, and keys given twice, which the decoder passes over, would
    each add one. Quotation marks inside a string are escaped, so the others number twice the strings.
    """
    marks = line.count(b'"')
    if marks == 2 * strings:
        return True
    unescaped = line.replace(b"\\\\", b"") if b'\\\\"' in line else line
    return marks - unescaped.count(b'\\"') == 2 * strings


def _blank(text: str) -> bool:
    return not text or text.isspace()


def _plain_conversation(row: rows.ConversationRow | rows.PlainConversation, line: bytes) -> Measure | None:
    """Of turns with a role and a text alone, user and assistant alternating, the assistant last."""
    characters, previous = 0, ""
    for message in row.messages:
        content, role = message.content, message.role
        if not content or type(content) is not str or content.isspace():
            return None
        if role == previous or (role == "system" and previous):
            return None
        characters += len(content)
        previous = role
    turns = len(row.messages)
    return (turns, characters, "messages") if previous == "assistant" and _has_only(line, 1 + 4 * turns) else None


def _measure_conversation(row: rows.ConversationRow) -> Measure:
    used = ["messages"]
    if row.tools:
        used.append("tools")
    if any(message.tool_calls for message in row.messages):
        used.append("tool_calls")
    return len(row.messages), sum(len(message.text) for message in row.messages), "+".join(used)


def _plain_instruction(keys: Any, line: bytes) -> Measure | None:
    given = {name: value for name in keys.__struct_fields__ if (value := getattr(keys, name)) is not None}
    if any(_blank(value) for name, value in given.items() if name != "input") or not _has_only(line, 2 * len(given)):
        return None
    try:
        return _measure_instruction(keys)
    except msgspec.ValidationError:
        return None


def _measure_instruction(keys: Any) -> Measure:
    row = rows.normalise(keys)
    schema = "/".join(name for name in keys.__struct_fields__ if getattr(keys, name) is not None)
    return 0, len(row.prompt) + len(row.response), schema


def _plain_text(row: rows.TextRow, line: bytes) -> Measure | None:
    return None if _blank(row.text) or not _has_only(line, 2) else _measure_text(row)


def _measure_text(row: rows.TextRow) -> Measure:
    return 0, len(row.text), "text"


def _plain_pretokenized(row: rows.PretokenizedRow, line: bytes) -> Measure | None:
    labels = row.labels
    if not row.input_ids or not _has_only(line, 1 if labels is None else 2):
        return None
    if labels is not None:
        negative = [label for label in labels if label < 0]
        masked = negative.count(rows.IGNORED_LABEL)
        if len(labels) != len(row.input_ids) or masked != len(negative) or masked == len(labels):
            return None
    return _measure_pretokenized(row)


def _measure_pretokenized(row: rows.PretokenizedRow) -> Measure:
    return 0, len(row.input_ids), "input_ids" if row.labels is None else "input_ids/labels"


class _Parts(NamedTuple):
    """How rows of a format are decoded and measured; `plain` gives None where there is more to say."""

    decoder: Callable[[Mapping[str, str]], rows.Decode]
    lines_decoder: Callable[[Mapping[str, str]], rows.DecodeLines]
    plain: Callable[[Any, bytes], Measure | None]
    measure: Callable[[Any], Measure]
    diagnose: Callable[[Mapping[str, str]], diagnosis.Diagnose]


_PARTS: dict[Format, _Parts] = {
    Format.CONVERSATIONAL: _Parts(
        rows.conversation_decoder,
        rows.conversation_lines_decoder,
        _plain_conversation,
        _measure_conversation,
        diagnosis.conversation,
    ),
    Format.INSTRUCTION: _Parts(
        rows.instruction_keys_decoder,
        rows.instruction_lines_decoder,
        _plain_instruction,
        _measure_instruction,
        diagnosis.instruction,
    ),
    Format.TEXT: _Parts(
        rows.text_decoder,
        rows.text_lines_decoder,
        _plain_text,
        _measure_text,
        diagnosis.text,
    ),
    Format.PRETOKENIZED: _Parts(
        rows.pretokenized_decoder,
        rows.pretokenized_lines_decoder,
        _plain_pretokenized,
        _measure_pretokenized,
        diagnosis.pretokenized,
    ),
}
