"""How large a row is: of any row, and at once, for many, of those with nothing to say about them.

The `plain_…` functions take decoded rows and their lines, and give None for each row that
`diagnosis` must look at. They are called for every row that is imported: most of an import's
time is spent in the decoder and here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from tfslurm.datasets import rows
from tfslurm.datasets.report import Measure

Lines = Sequence[bytes]


def plain_conversations(decoded: Sequence[rows.PlainConversation], lines: Lines) -> list[Measure | None]:
    """Of turns with a role and a text alone, user and assistant alternating, the assistant last."""
    measures: list[Measure | None] = []
    for row, line in zip(decoded, lines, strict=True):
        characters, previous = 0, ""
        for message in row.messages:
            content, role = message.content, message.role
            if not content or content.isspace() or role == previous or (role == "system" and previous):
                previous = ""
                break
            characters += len(content)
            previous = role
        turns = len(row.messages)
        plain = previous == "assistant" and (line.count(b'"') == 2 + 8 * turns or _has_only(line, 1 + 4 * turns))
        measures.append((turns, characters, "messages") if plain else None)
    return measures


def plain_instructions(decoded: Sequence[Any], lines: Lines) -> list[Measure | None]:
    return list(map(_plain_instruction, decoded, lines))


def plain_texts(decoded: Sequence[rows.TextRow], lines: Lines) -> list[Measure | None]:
    return [
        None if _blank(row.text) or not _has_only(line, 2) else text(row)
        for row, line in zip(decoded, lines, strict=True)
    ]


def plain_pretokenized(decoded: Sequence[rows.PretokenizedRow], lines: Lines) -> list[Measure | None]:
    return list(map(_plain_pretokenized, decoded, lines))


def conversation(row: rows.ConversationRow) -> Measure:
    characters, called = 0, False
    for message in row.messages:
        content = message.content
        characters += len(content if type(content) is str else message.text)
        called = called or bool(message.tool_calls)
    schema = "messages+tools" if row.tools else "messages"
    return len(row.messages), characters, schema + "+tool_calls" if called else schema


def instruction(keys: Any) -> Measure:
    """Raises msgspec.ValidationError unless there is exactly one prompt and one response."""
    row = rows.normalise(keys)
    schema = "/".join(name for name in keys.__struct_fields__ if getattr(keys, name) is not None)
    return 0, len(row.prompt) + len(row.response), schema


def text(row: rows.TextRow) -> Measure:
    return 0, len(row.text), "text"


def pretokenized(row: rows.PretokenizedRow) -> Measure:
    """With the largest token id, or -1 where that is not beyond what is known."""
    schema = "input_ids" if row.labels is None else "input_ids/labels"
    if isinstance(row, rows.FamiliarRow):
        return 0, len(row.input_ids), schema, -1
    return 0, len(row.input_ids), schema, max(max(row.input_ids, default=-1), max(row.labels or (-1,)))


def _plain_instruction(keys: Any, line: bytes) -> Measure | None:
    given = {name: value for name in keys.__struct_fields__ if (value := getattr(keys, name)) is not None}
    if any(_blank(value) for name, value in given.items() if name != "input") or not _has_only(line, 2 * len(given)):
        return None
    try:
        return instruction(keys)
    except msgspec.ValidationError:
        return None


def _plain_pretokenized(row: rows.PretokenizedRow, line: bytes) -> Measure | None:
    labels = row.labels
    if not row.input_ids or not _has_only(line, 1 if labels is None else 2):
        return None
    if labels is not None:
        negative = [label for label in labels if label < 0]
        masked = negative.count(rows.IGNORED_LABEL)
        if len(labels) != len(row.input_ids) or masked != len(negative) or masked == len(labels):
            return None
    return pretokenized(row)


def _blank(value: str) -> bool:
    return not value or value.isspace()


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
