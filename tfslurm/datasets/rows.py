"""What a line of each format becomes: typed rows, and how a line's bytes are decoded into them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Annotated, Any, Literal

import msgspec

ROLES = ("system", "user", "assistant", "tool")
IGNORED_LABEL = -100
"""The label of a token that is not learned, as in PyTorch's cross entropy."""
MAX_TOKEN_ID = 2**31 - 1

TokenId = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKEN_ID)]
Label = Annotated[int, msgspec.Meta(ge=IGNORED_LABEL, le=MAX_TOKEN_ID)]


class TextPart(msgspec.Struct, tag_field="type", tag="text"):
    """`{"type": "text", "text": …}`: the one kind of content part that a text model can learn."""

    text: str


class Message(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One turn. `weight` 0 takes an assistant's turn out of the loss; None counts as 1."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    weight: Literal[0, 1] | None = None

    @property
    def text(self) -> str:
        """The content as one string: parts are joined without a separator, null is empty."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content or ())


class ConversationRow(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A chat, and the functions that the assistant may call in it (JSON schemas, as given)."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


class PlainMessage(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, gc=False):
    """A message of the commonest kind; it decodes a fifth faster than a Message."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class PlainConversation(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, gc=False):
    """A chat of plain messages alone."""

    messages: list[PlainMessage]


class InstructionRow(msgspec.Struct):
    """A prompt and the answer to learn, whatever the keys were called in the file."""

    prompt: str
    response: str


class TextRow(msgspec.Struct):
    """A plain text, all of it learned."""

    text: str


class PretokenizedRow(msgspec.Struct):
    """Token ids; `labels` has the same length, IGNORED_LABEL where nothing is learned. None: learn all."""

    input_ids: list[TokenId]
    labels: list[Label] | None = None


class FamiliarRow(PretokenizedRow):
    """One whose ids are all no larger than the largest one seen so far."""


Row = ConversationRow | InstructionRow | TextRow | PretokenizedRow


PROMPTS = ("prompt", "instruction")
RESPONSES = ("completion", "response", "output")
INSTRUCTION_KEYS = ("prompt", "instruction", "input", "completion", "response", "output")
"""The spellings of an instruction row, which has one of PROMPTS and one of RESPONSES."""


def join_input(instruction: str, given: str | None) -> str:
    """The prompt of `instruction` with `input`: both, a blank line between, unless the input is blank."""
    return f"{instruction}\n\n{given}" if given and not given.isspace() else instruction


def normalise(keys: msgspec.Struct) -> InstructionRow:
    """The row of what an `instruction_keys_type` has.

    Raises msgspec.ValidationError unless there is exactly one prompt and one response.
    """
    prompt = _only(keys, PROMPTS)
    response = _only(keys, RESPONSES)
    return InstructionRow(join_input(prompt, getattr(keys, "input", None)), response)


def _only(keys: msgspec.Struct, group: tuple[str, ...]) -> str:
    found = [value for name in group if (value := getattr(keys, name, None)) is not None]
    if len(found) != 1:
        raise msgspec.ValidationError(f"Expected exactly one of {', '.join(group)}, got {len(found)}")
    return found[0]


Decode = Callable[[bytes], Any]
DecodeLines = Callable[[bytes], list[Any]]


def conversation_decoder(field_map: Mapping[str, str]) -> Decode:
    return msgspec.json.Decoder(conversation_type(field_map)).decode


def conversation_lines_decoder(field_map: Mapping[str, str]) -> DecodeLines:
    """Of plain conversations alone: any other row makes it raise."""
    if not field_map:
        return msgspec.json.Decoder(PlainConversation).decode_lines
    message = renamed(PlainMessage, _of(PlainMessage, field_map))
    conversation = renamed(PlainConversation, _of(PlainConversation, field_map), messages=list[message])
    return msgspec.json.Decoder(conversation).decode_lines


def _of(row: type[msgspec.Struct], field_map: Mapping[str, str]) -> dict[str, str]:
    return {name: field_map.get(name, name) for name in row.__struct_fields__}


def text_type(field_map: Mapping[str, str]) -> type[TextRow]:
    return renamed(TextRow, field_map)


def text_decoder(field_map: Mapping[str, str]) -> Decode:
    return msgspec.json.Decoder(text_type(field_map)).decode


def text_lines_decoder(field_map: Mapping[str, str]) -> DecodeLines:
    return msgspec.json.Decoder(text_type(field_map)).decode_lines


def pretokenized_type(field_map: Mapping[str, str]) -> type[PretokenizedRow]:
    return renamed(PretokenizedRow, field_map)


def pretokenized_decoder(field_map: Mapping[str, str]) -> Decode:
    return msgspec.json.Decoder(pretokenized_type(field_map)).decode


class PretokenizedLines:
    """Decodes pretokenized rows, as FamiliarRows where no id in a block is beyond what `learn` was told.

    To look for the largest id of a row takes half as long as to decode it, and the decoder compares each with a
    bound anyway: nearly every block is familiar after the first few.
    """

    def __init__(self, field_map: Mapping[str, str]) -> None:
        self._names = tuple(sorted(field_map.items()))
        self._any = msgspec.json.Decoder(pretokenized_type(field_map)).decode_lines
        self.learn(-1)

    def __call__(self, block: bytes) -> list[PretokenizedRow]:
        """Raises msgspec.DecodeError where a line is no such row."""
        try:
            return self._familiar(block)
        except msgspec.ValidationError:
            return self._any(block)

    def learn(self, largest: int) -> None:
        """Take ids up to `largest` for familiar."""
        self.largest = largest
        ids, labels = (list[Annotated[int, msgspec.Meta(ge=least, le=largest)]] for least in (0, IGNORED_LABEL))
        familiar = _renamed(FamiliarRow, self._names, (("input_ids", ids), ("labels", labels | None)))
        self._familiar = msgspec.json.Decoder(familiar).decode_lines


def instruction_keys_type(field_map: Mapping[str, str]) -> type[msgspec.Struct]:
    """A struct of INSTRUCTION_KEYS, before the spellings are brought together."""
    return _instruction_type(tuple(instruction_names(field_map).items()))


def instruction_lines_decoder(field_map: Mapping[str, str]) -> DecodeLines:
    return msgspec.json.Decoder(instruction_keys_type(field_map)).decode_lines


def instruction_decoder(field_map: Mapping[str, str]) -> Decode:
    decode = msgspec.json.Decoder(instruction_keys_type(field_map)).decode
    return lambda line: normalise(decode(line))


def conversation_type(field_map: Mapping[str, str]) -> type[ConversationRow]:
    if not field_map:
        return ConversationRow
    message = renamed(Message, field_map)
    return renamed(ConversationRow, field_map, messages=list[message])


@lru_cache(maxsize=64)
def _instruction_type(names: tuple[tuple[str, str], ...]) -> type[msgspec.Struct]:
    fields = [(name, str | None, None) for name, _ in names]
    return msgspec.defstruct("InstructionKeys", fields, rename=dict(names), kw_only=True)


def instruction_names(field_map: Mapping[str, str]) -> dict[str, str]:
    """Canonical key → the key in the file, for those that are looked at.

    A mapped prompt (or response) is the only spelling looked at; the others are then just
    columns like any other, as is a key that the map gives another meaning.
    """
    names = {name: field_map.get(name, name) for name in INSTRUCTION_KEYS}
    for group in (PROMPTS, RESPONSES):
        if mapped := [name for name in group if name in field_map]:
            names = {name: actual for name, actual in names.items() if name not in group or name in mapped}
    taken = set(field_map.values())
    return {name: actual for name, actual in names.items() if name in field_map or actual not in taken}


def renamed(row: type, names: Mapping[str, str], **types: Any) -> type:
    """`row` as it is spelled in the file, with other types for some of its fields."""
    return _renamed(row, tuple(sorted(names.items())), tuple(sorted(types.items()))) if names else row


@lru_cache(maxsize=64)
def _renamed(row: type, names: tuple[tuple[str, str], ...], types: tuple[tuple[str, Any], ...]) -> type:
    changed = dict(types)
    fields = []
    for field in msgspec.structs.fields(row):
        of_type = changed.get(field.name, field.type)
        fields.append((field.name, of_type) if field.required else (field.name, of_type, field.default))
    return msgspec.defstruct(row.__name__, fields, bases=(row,), rename=dict(names), kw_only=True)
