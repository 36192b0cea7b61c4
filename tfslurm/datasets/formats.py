"""The four formats of a dataset, and reading the rows of a sealed one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path

import msgspec

from tfslurm.datasets import rows
from tfslurm.datasets.rows import (
    ConversationRow,
    Decode,
    InstructionRow,
    Message,
    PretokenizedRow,
    Row,
    TextPart,
    TextRow,
)
from tfslurm.errors import InvalidError

__all__ = [
    "ConversationRow",
    "Format",
    "InstructionRow",
    "Message",
    "PretokenizedRow",
    "Row",
    "TextPart",
    "TextRow",
    "check_field_map",
    "decoder",
    "read_rows",
]


class Format(StrEnum):
    """What the rows are; decides which validation runs and how they become tokens."""

    CONVERSATIONAL = "conversational"
    INSTRUCTION = "instruction"
    TEXT = "text"
    PRETOKENIZED = "pretokenized"


LEVELS: dict[Format, tuple[tuple[str, ...], ...]] = {
    Format.CONVERSATIONAL: (rows.ConversationRow.__struct_fields__, rows.Message.__struct_fields__),
    Format.INSTRUCTION: (rows.INSTRUCTION_KEYS,),
    Format.TEXT: (rows.TextRow.__struct_fields__,),
    Format.PRETOKENIZED: (rows.PretokenizedRow.__struct_fields__,),
}
"""The canonical keys of each format, which `--map` may rename: those of one object stand together."""

_DECODERS: dict[Format, Callable[[Mapping[str, str]], Decode]] = {
    Format.CONVERSATIONAL: rows.conversation_decoder,
    Format.INSTRUCTION: rows.instruction_decoder,
    Format.TEXT: rows.text_decoder,
    Format.PRETOKENIZED: rows.pretokenized_decoder,
}


def check_field_map(format: str, field_map: Mapping[str, str]) -> None:
    """Raises InvalidError unless every canonical key is one of the format's and the map is one to one."""
    levels = LEVELS[as_format(format)]
    known = [name for level in levels for name in level]
    for canonical, actual in field_map.items():
        if canonical not in known:
            raise InvalidError(
                f"The {format} format has no field {canonical!r}: it has {', '.join(known)}.",
                hint="Write --map CANONICAL=FIELD, the format's own name first.",
            )
        if not actual or any(ord(character) < 32 or character in '"\\' for character in actual):
            raise InvalidError(f"--map {canonical}={actual!r}: not the name of a field.")
    for level in levels:
        _check_one_to_one(format, level, field_map)


def _check_one_to_one(format: str, level: tuple[str, ...], field_map: Mapping[str, str]) -> None:
    names = {name: field_map.get(name, name) for name in level}
    if format == Format.INSTRUCTION:
        names = rows.instruction_names({name: field_map[name] for name in level if name in field_map})
        for group in (rows.PROMPTS, rows.RESPONSES):
            if len(mapped := [name for name in group if name in field_map]) > 1:
                raise InvalidError(f"--map gives both {' and '.join(mapped)}: they are the same field; keep one.")
    owners: dict[str, str] = {}
    for canonical, actual in names.items():
        if other := owners.get(actual):
            raise InvalidError(
                f"--map makes the field {actual!r} both {other} and {canonical}.",
                hint=f"Map {other if canonical in field_map else canonical} to a field of its own.",
            )
        owners[actual] = canonical


def as_format(name: str) -> Format:
    """Raises InvalidError where there is no such format."""
    try:
        return Format(name)
    except ValueError:
        raise InvalidError(f"There is no format {name!r}: choose one of {', '.join(Format)}.") from None


def decoder(format: str, field_map: Mapping[str, str] | None = None) -> Decode:
    """A function from a line's bytes to its row; it raises what msgspec raises."""
    field_map = field_map or {}
    check_field_map(format, field_map)
    return _DECODERS[as_format(format)](field_map)


def read_rows(folder: Path, format: str, field_map: Mapping[str, str] | None = None) -> Iterator[Row]:
    """The rows of a sealed dataset: its data files in bytewise path order, blank lines left out.

    Raises InvalidError, with file and line, where a line is not a row of this format:
    a sealed dataset was validated, so then its bytes or its field map are not those recorded.
    """
    from tfslurm.datasets.files import BOM, data_files, open_lines  # late: a listing needs only the formats' names

    decode = decoder(format, field_map)
    for path in data_files(folder):
        name = path.relative_to(folder).as_posix()
        with open_lines(path) as lines:
            for number, line in enumerate(lines, 1):
                if number == 1:
                    line = line.removeprefix(BOM)
                if line.isspace() or not line:
                    continue
                try:
                    yield decode(line)
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                    raise InvalidError(f"{name}:{number}: not a row of the {format} format: {error}") from error
