"""Render conversations through the model's chat template, and find what the assistant says in them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from tfslurm.datasets.formats import ConversationRow, Message
from tfslurm.training.base_tokenizer import BaseTokenizer

SENTINEL = "\x01\x02\x03"


class Unrenderable(Exception):
    """The model's chat template cannot express this conversation; the message is the reason."""


@dataclass(frozen=True)
class Rendered:
    """A row as text; `spans` are the characters [start, end) that carry loss, ascending."""

    text: str
    spans: list[tuple[int, int]]
    complete: bool
    """Whether the text ends with what is learned, so that the model must learn to stop there."""
    begins: bool = False
    """Whether the tokenizer's beginning-of-sequence token is to be added: templates write their own."""


class ConversationRenderer:
    """Finds the assistant's turns by rendering prefixes of the conversation and comparing.

    Stock templates carry no `{% generation %}` markers, and those that do may leave the
    end-of-turn token out; comparing works for both. A turn starts after the generation prompt,
    exactly where the model goes on when it is served, and ends with its end-of-turn token.
    """

    def __init__(self, tokenizer: BaseTokenizer) -> None:
        self._tokenizer = tokenizer.hugging_face
        self._specials = tokenizer.specials

    def render(self, row: ConversationRow) -> Rendered:
        """Raises Unrenderable where the template refuses the row or leaves parts of it out."""
        messages = [_template_message(message) for message in row.messages]
        full = self._text(messages, row.tools)
        _require_tools(row, full)
        spans, complete = [], False
        for index, message in enumerate(row.messages):
            if message.role != "assistant" or message.weight == 0:
                continue
            start, end = self._turn(messages, row.tools, index, full)
            _require_calls(message, full[start:end])
            spans.append((start, self._without_tail(full, start, end)))
            complete = index == len(messages) - 1
        return Rendered(full, [span for span in spans if span[0] < span[1]], complete)

    def _text(self, messages: list[dict], tools: list[dict] | None, *, prompt: bool = False) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=prompt
            )
        except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            raise Unrenderable(f"the chat template refuses it: {error}") from error

    def _turn(self, messages: list[dict], tools: list[dict] | None, index: int, full: str) -> tuple[int, int]:
        """The characters of `full` in which message `index` speaks."""
        upto = full if index == len(messages) - 1 else self._text(messages[: index + 1], tools)
        start = self._generation_start(messages, tools, index, full)
        if start is not None and full.startswith(upto):
            return start, len(upto)
        first, last = self._content(messages, tools, index, full)
        _, last_upto = self._content(messages[: index + 1], tools, index, upto)
        tail = upto[last_upto:]
        if not full.startswith(tail, last):
            raise Unrenderable("the chat template rewrites earlier turns of the assistant")
        return first if start is None else start, last + len(tail)

    def _generation_start(self, messages: list[dict], tools: list[dict] | None, index: int, full: str) -> int | None:
        """Where the model would start to generate message `index`; None where `full` has it otherwise."""
        if index == 0:
            return None
        prompt = self._text(messages[:index], tools, prompt=True)
        return len(prompt) if full.startswith(prompt) else None

    def _content(self, messages: list[dict], tools: list[dict] | None, index: int, text: str) -> tuple[int, int]:
        """Where the content of message `index` stands in `text`: what changes when it changes."""
        changed = [*messages]
        changed[index] = messages[index] | {"content": SENTINEL}
        other = self._text(changed, tools)
        start = len(os.path.commonprefix([text, other]))
        tail = len(os.path.commonprefix([text[::-1], other[::-1]]))
        return start, max(start, len(text) - tail)

    def _without_tail(self, text: str, start: int, end: int) -> int:
        """Leave out white space after the end-of-turn token: the model has stopped by then."""
        stripped = text[start:end].rstrip()
        return start + len(stripped) if stripped.endswith(self._specials) else end


def _template_message(message: Message) -> dict[str, Any]:
    """What templates expect: a string as content, tool arguments as an object rather than as JSON text."""
    rendered: dict[str, Any] = {"role": message.role, "content": message.text}
    if message.name is not None:
        rendered["name"] = message.name
    if message.tool_call_id is not None:
        rendered["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        rendered["tool_calls"] = [_template_call(call) for call in message.tool_calls]
    return rendered


def _template_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            return call
    decoded = function | {"arguments": arguments}
    return call | {"function": decoded} if "function" in call else decoded


def _require_calls(message: Message, text: str) -> None:
    """Templates that know no tools drop the calls silently, and an empty answer would be learned."""
    for call in message.tool_calls or ():
        name = str(call.get("function", call).get("name", ""))
        if name not in text:
            raise Unrenderable("the model's chat template leaves out tool calls")


def _require_tools(row: ConversationRow, text: str) -> None:
    for tool in row.tools or ():
        name = str(tool.get("function", tool).get("name", ""))
        if name not in text:
            raise Unrenderable("the model's chat template leaves out the tools' descriptions")
