"""Tokenize a few rows and say what training would make of each.

A program of the training environment (see `programs`): a `preview.Question` comes in, a `preview.Preview` goes out.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import msgspec
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from tfslurm.datasets.files import BOM, data_files, open_lines
from tfslurm.datasets.formats import Row, decoder
from tfslurm.errors import NotFoundError
from tfslurm.training.base_tokenizer import BaseTokenizer
from tfslurm.training.masks import Encoded, Rejected, RowEncoder
from tfslurm.training.preview import Place, Preview, PreviewedRow, Question, Token
from tfslurm.training.programs import answering, read_question


def preview(question: Question) -> Preview:
    """Raises NotFoundError for a place that is not in the dataset, InvalidError for a model without a tokenizer."""
    folder, tokenizer = Path(question.folder), BaseTokenizer(Path(question.model))
    decode, encoder = decoder(question.format, question.field_map), RowEncoder(tokenizer)
    lines = _chosen(folder, question.places) if question.places else islice(_rows(folder), question.count)
    rows = []
    for place, line in lines:
        row = _decoded(decode, line, question.format)
        result = row if isinstance(row, Rejected) else encoder.encode([row])[0]
        rows.append(_previewed(place, result, tokenizer.backend, question))
    return Preview(max_seq_length=question.max_seq_length, rows=rows)


def _lines(folder: Path, path: Path) -> Iterator[tuple[Place, bytes]]:
    name = path.relative_to(folder).as_posix()
    with open_lines(path) as lines:
        for number, line in enumerate(lines, 1):
            yield Place(name, number), line.removeprefix(BOM) if number == 1 else line


def _rows(folder: Path) -> Iterator[tuple[Place, bytes]]:
    """All rows in the order of training's row numbers."""
    for path in data_files(folder):
        for place, line in _lines(folder, path):
            if line and not line.isspace():
                yield place, line


def _chosen(folder: Path, places: list[Place]) -> Iterator[tuple[Place, bytes]]:
    paths = {path.relative_to(folder).as_posix(): path for path in data_files(folder)}
    for place in places:
        if place.file not in paths:
            some = ", ".join(sorted(paths)[:5]) + (", …" if len(paths) > 5 else "")
            raise NotFoundError(f"the dataset has no file '{place.file}'", hint=f"It has {some or 'none'}.")
        last = 0
        for at, line in _lines(folder, paths[place.file]):
            last = at.line
            if last == place.line:
                yield place, line
                break
        else:
            raise NotFoundError(f"{place.file} has no line {place.line}: its last is {last}")


def _decoded(decode, line: bytes, format: str) -> Row | Rejected:
    if not line or line.isspace():
        return Rejected("a blank line is no row")
    try:
        return decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return Rejected(f"not a row of the {format} format: {error}")


def _previewed(place: Place, result: Encoded | Rejected, backend: Tokenizer, question: Question) -> PreviewedRow:
    if isinstance(result, Rejected):
        return PreviewedRow(file=place.file, line=place.line, status="rejected", reason=result.reason)
    limit, length = question.max_seq_length, len(result.ids)
    tokens = _tokens(result, backend, limit)
    supervised = sum(token.learned for token in tokens)
    status, reason = "kept", None
    if length > limit and question.overlong == "drop":
        status, reason = "dropped", f"this site drops rows of more than max_seq_length tokens, {limit}"
    elif not supervised:
        status, reason = "dropped", f"none of its first {limit} tokens carries loss"
    elif length > limit:
        status = "truncated"
    return PreviewedRow(
        file=place.file,
        line=place.line,
        status=status,
        reason=reason,
        length=length,
        token_count=len(tokens),
        supervised_count=supervised,
        tokens=tokens,
    )


def _tokens(result: Encoded, backend: Tokenizer, limit: int) -> list[Token]:
    """The first `limit` tokens, each with the text that it adds to those before it."""
    stream = DecodeStream(skip_special_tokens=False)
    learned = [False] * len(result.ids)
    for start, end in result.spans:
        learned[start:end] = [True] * (end - start)
    return [
        Token(id, stream.step(backend, id) or "", flag)
        for id, flag in zip(result.ids[:limit], learned[:limit], strict=True)
    ]


def main(argv: list[str]) -> int:
    return answering(lambda: preview(read_question(Question)))
