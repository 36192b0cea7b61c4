"""Turn rows into token ids and say which of them carry loss."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from tfslurm.datasets.formats import (
    ConversationRow,
    InstructionRow,
    Message,
    PretokenizedRow,
    Row,
    TextRow,
)
from tfslurm.training.base_tokenizer import BaseTokenizer
from tfslurm.training.conversations import ConversationRenderer, Rendered, Unrenderable

IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """A row as tokens; `spans` are the tokens [start, end) that carry loss, ascending and apart."""

    ids: list[int]
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class Rejected:
    """A row that nothing can be learned from, and why."""

    reason: str


class RowEncoder:
    """Encodes rows of every format.

    The loss falls on the assistant's turns with their end-of-turn token (conversational), the
    response and EOS (instruction; through the chat template where the model has one), the text and
    EOS (text), and where `labels` repeat the ids (pretokenized). The first token never carries
    loss: nothing predicts it. Tokens after the last one that carries loss are left out.
    """

    def __init__(self, tokenizer: BaseTokenizer) -> None:
        self._tokenizer = tokenizer
        self._renderer = ConversationRenderer(tokenizer) if tokenizer.template else None

    def encode(self, rows: Sequence[Row]) -> list[Encoded | Rejected]:
        """One result a row, in order; texts are tokenized together, on all threads of the tokenizer."""
        drafts = [self._draft(row) for row in rows]
        texts = [draft.text for draft in drafts if isinstance(draft, Rendered)]
        encodings = iter(self._tokenizer.backend.encode_batch(texts, add_special_tokens=False))
        return [self._finish(draft, next(encodings)) if isinstance(draft, Rendered) else draft for draft in drafts]

    def _draft(self, row: Row) -> Rendered | Encoded | Rejected:
        if isinstance(row, PretokenizedRow):
            return self._pretokenized(row)
        if isinstance(row, TextRow):
            return Rendered(row.text, [(0, len(row.text))], complete=True, begins=True)
        if isinstance(row, InstructionRow) and self._renderer is None:
            text = row.prompt + row.response
            return Rendered(text, [(len(row.prompt), len(text))], complete=True, begins=True)
        if self._renderer is None:
            return Rejected("the model has no chat template")
        try:
            return self._renderer.render(_as_conversation(row))
        except Unrenderable as error:
            return Rejected(str(error))

    def _finish(self, rendered: Rendered, encoding) -> Encoded | Rejected:
        before = self._tokenizer.beginning if rendered.begins else []
        ids, offsets = encoding.ids, encoding.offsets
        if cuts := [start for start, _ in rendered.spans if _straddled(offsets, start)]:
            ids, offsets = self._encode_pieces(rendered.text, cuts)
        ids = before + ids
        spans = [_token_span(offsets, span, len(before)) for span in rendered.spans]
        if rendered.complete and spans:
            _add_end(ids, spans, self._tokenizer)
        return _learnable(ids, spans)

    def _encode_pieces(self, text: str, cuts: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokenize the text before each of `cuts` and after it apart, as it is when the model is served."""
        ids, offsets = [], []
        for start, end in pairwise([0, *cuts, len(text)]):
            piece = self._tokenizer.backend.encode(text[start:end], add_special_tokens=False)
            ids += piece.ids
            offsets += [(first + start, last + start) for first, last in piece.offsets]
        return ids, offsets

    def _pretokenized(self, row: PretokenizedRow) -> Encoded | Rejected:
        ids = row.input_ids
        if ids and max(ids) >= self._tokenizer.size:
            return Rejected(f"a token id is not in the model's vocabulary of {self._tokenizer.size}")
        if row.labels is None:
            return _learnable(ids, [(0, len(ids))])
        pairs = zip(row.labels, ids, strict=True)
        if any(label not in (IGNORED, id) for label, id in pairs):
            return Rejected("labels that are neither -100 nor the token at the same place")
        return _learnable(ids, _runs([label != IGNORED for label in row.labels]))


def _as_conversation(row: ConversationRow | InstructionRow) -> ConversationRow:
    if isinstance(row, ConversationRow):
        return row
    return ConversationRow(
        messages=[Message(role="user", content=row.prompt), Message(role="assistant", content=row.response)]
    )


def _token_span(offsets: list[tuple[int, int]], span: tuple[int, int], shift: int) -> tuple[int, int]:
    """The tokens that start within the characters of `span`."""
    start = bisect_left(offsets, (span[0],))
    return start + shift, bisect_left(offsets, (span[1],), start) + shift


def _straddled(offsets: list[tuple[int, int]], start: int) -> bool:
    """Whether one token holds both the prompt's last character and the answer's first, at `start`."""
    before = bisect_left(offsets, (start,)) - 1
    return before >= 0 and offsets[before][1] > start


def _add_end(ids: list[int], spans: list[tuple[int, int]], tokenizer: BaseTokenizer) -> None:
    """See to it that what is learned last is a token at which generation stops."""
    start, end = spans[-1]
    if end > start and ids[end - 1] in tokenizer.ends:
        return
    del ids[end:]
    ids.append(tokenizer.eos)
    spans[-1] = (start, end + 1)


def _learnable(ids: list[int], spans: list[tuple[int, int]]) -> Encoded | Rejected:
    kept = [(max(start, 1), end) for start, end in spans if end > max(start, 1)]
    if not kept:
        return Rejected("no token of it carries loss")
    return Encoded(ids[: kept[-1][1]], kept)


def _runs(flags: list[bool]) -> list[tuple[int, int]]:
    """The [start, end) of each run of True."""
    edges = [index for index, (a, b) in enumerate(zip([False, *flags], [*flags, False], strict=True)) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))
