"""What exactly is wrong with a row: every finding in it, each with its JSON path.

Rows come here when they could not be decoded, or are less plain than most. It is several times
slower than decoding and says much more.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import msgspec

from tfslurm.datasets.rows import IGNORED_LABEL, MAX_TOKEN_ID, PROMPTS, RESPONSES, ROLES, Message, instruction_names

MAX_DEPTH = 64


class Finding(NamedTuple):
    check: str
    path: str
    message: str


Diagnose = Callable[[dict[str, Any]], Iterator[Finding]]


class _Object(dict):
    """An object that has some key twice."""

    twice: tuple[str, ...] = ()


class _NotANumber(float):
    """NaN, Infinity or -Infinity, which Python's json lets through."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    plain = dict(pairs)
    if len(plain) == len(pairs):
        return plain
    marked = _Object(plain)
    keys = [key for key, _ in pairs]
    marked.twice = tuple(key for key in plain if keys.count(key) > 1)
    return marked


_parser = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_NotANumber)


def parse(line: bytes) -> Any:
    """The line's value, in which `anomalies` finds duplicate keys and NaN again.

    Raises UnicodeDecodeError, ValueError (json.JSONDecodeError above all) and RecursionError.
    """
    return _parser.decode(line.decode())


_encode = msgspec.json.Encoder().encode


def has_no_anomalies(value: dict[str, Any], line: bytes) -> bool:
    """Whether `anomalies` surely finds nothing in what msgspec decoded `line` to; it lets less through than Python.

    It lets through keys given twice, but then `value` lacks strings that `line` has. Written again,
    `value` has fewer quotation marks then: those in strings are written alike, unless as \\u0022.
    """
    if b"\\u0022" in line or line.count(b'"') != _encode(value).count(b'"'):
        return False
    return line.count(b"{") + line.count(b"[") <= MAX_DEPTH or _depth(value) <= MAX_DEPTH


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        parts = (part for item in level for part in (item.values() if isinstance(item, dict) else item))
        level = [part for part in parts if isinstance(part, (dict, list))]
    return depth


def anomalies(value: Any) -> Iterator[Finding]:
    """What is wrong anywhere in a value, whatever the format."""
    stack: list[tuple[Any, tuple | None, int]] = [(value, None, 1)]
    while stack:
        item, place, depth = stack.pop()
        if isinstance(item, _NotANumber):
            yield Finding("not_a_number", _path(place), f"{float(item)} is not JSON")
        elif isinstance(item, str):
            if not _is_text(item):
                yield Finding("lone_surrogate", _path(place), "half of a surrogate pair is no text")
        elif depth > MAX_DEPTH:
            yield Finding("nested_too_deep", "", f"more than {MAX_DEPTH} levels deep")
            return
        elif isinstance(item, dict):
            for key in getattr(item, "twice", ()):
                yield Finding("duplicate_key", _path((place, key)), f"the key {_shown(key)} appears twice")
            stack += [(key, place, depth) for key in item if not _is_text(key)]
            stack += [(part, (place, key), depth + 1) for key, part in item.items() if _is_worth_a_look(part)]
        elif isinstance(item, list):
            stack += [(part, (place, index), depth + 1) for index, part in enumerate(item) if _is_worth_a_look(part)]


def _is_worth_a_look(value: Any) -> bool:
    return isinstance(value, (dict, list, _NotANumber)) or (isinstance(value, str) and not _is_text(value))


def _is_text(value: str) -> bool:
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _path(place: tuple | None) -> str:
    parts = []
    while place:
        place, key = place
        parts.append(f"[{key}]" if isinstance(key, int) else _member(key))
    return "$" + "".join(reversed(parts))


def _member(key: str) -> str:
    return f".{key}" if key.isidentifier() else f"[{json.dumps(key)}]"


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), "a number")


def _unrecognized(row: dict[str, Any], known: set[str]) -> Iterator[Finding]:
    for key in row:
        if key not in known:
            yield Finding("unrecognized_key", f"${_member(key)}", "not a field of this format; it is not used")


def conversation(field_map: Mapping[str, str]) -> Diagnose:
    messages_key, tools_key = field_map.get("messages", "messages"), field_map.get("tools", "tools")
    names = {name: field_map.get(name, name) for name in Message.__struct_fields__}
    known = {messages_key, tools_key}
    kinds = {names[name]: str for name in ("role", "content", "name", "tool_call_id")} | {names["weight"]: int}

    def diagnose(row: dict[str, Any]) -> Iterator[Finding]:
        yield from _unrecognized(row, known)
        yield from _tools(row.get(tools_key), f"${_member(tools_key)}")
        messages, path = row.get(messages_key), f"${_member(messages_key)}"
        if not isinstance(messages, list) or not messages:
            what = "an empty list" if messages == [] else _kind(messages) if messages_key in row else "missing"
            yield Finding("missing_messages_list", path, f"expected a list of messages, it is {what}")
            return
        for index, message in enumerate(messages):
            if not _is_plain(message, kinds, names):
                yield from _message(message, f"{path}[{index}]", names)
        yield from _dialogue([message for message in messages if isinstance(message, dict)], path, names)

    return diagnose


def _tools(tools: Any, path: str) -> Iterator[Finding]:
    if tools is None:
        return
    if not isinstance(tools, list):
        yield Finding("invalid_tools", path, f"expected a list of objects, it is {_kind(tools)}")
        return
    for index, tool in enumerate(tools):
        if not isinstance(tool, dict):
            yield Finding("invalid_tools", f"{path}[{index}]", f"expected an object, it is {_kind(tool)}")


def _is_plain(message: Any, kinds: Mapping[str, type], names: Mapping[str, str]) -> bool:
    """Whether `_message` has nothing to say, seen sooner: no tool calls, and a text in one piece."""
    if type(message) is not dict:
        return False
    for key, value in message.items():
        if type(value) is not kinds.get(key):
            return False
    content, weight = message.get(names["content"]), message.get(names["weight"])
    return bool(content) and not content.isspace() and weight in (None, 0, 1) and message.get(names["role"]) in ROLES


def _message(message: Any, path: str, names: Mapping[str, str]) -> Iterator[Finding]:
    if not isinstance(message, dict):
        yield Finding("data_type", path, f"expected an object, it is {_kind(message)}")
        return
    calls = message.get(names["tool_calls"])
    for key in message:
        if key not in names.values():
            hint = "; write tool_calls" if key == "function_call" else ""
            yield Finding("message_unrecognized_key", f"{path}{_member(key)}", f"not a field of a message{hint}")
    for name in ("role", "content"):
        if names[name] not in message and not (name == "content" and calls):
            yield Finding("message_missing_key", path, f"has no {names[name]}")
    if names["role"] in message and message[names["role"]] not in ROLES:
        found = _shown(message[names["role"]])
        yield Finding("unrecognized_role", path + _member(names["role"]), f"{found} is none of {', '.join(ROLES)}")
    if names["content"] in message:
        yield from _content(message[names["content"]], path + _member(names["content"]), bool(calls))
    yield from _extras(message, path, names)


def _content(content: Any, path: str, has_calls: bool) -> Iterator[Finding]:
    if isinstance(content, str):
        if (not content or content.isspace()) and not has_calls:
            yield Finding("empty_content", path, "is blank")
    elif isinstance(content, list) and content:
        for index, part in enumerate(content):
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                message = f'expected {{"type": "text", "text": …}}, it is {_shown(part)}'
                yield Finding("unsupported_content_part", f"{path}[{index}]", message)
    elif not (content is None and has_calls):
        what = "an empty list" if content == [] else _kind(content)
        yield Finding("missing_content", path, f"expected a string or a list of text parts, it is {what}")


def _extras(message: dict[str, Any], path: str, names: Mapping[str, str]) -> Iterator[Finding]:
    weight = message.get(names["weight"])
    if weight is not None and (type(weight) is not int or weight not in (0, 1)):
        yield Finding("invalid_weight", path + _member(names["weight"]), f"{_shown(weight)} is neither 0 nor 1")
    for name in ("name", "tool_call_id"):
        value = message.get(names[name])
        if value is not None and not isinstance(value, str):
            yield Finding("field_type", path + _member(names[name]), f"expected a string, it is {_kind(value)}")
    calls = message.get(names["tool_calls"])
    if calls is not None:
        yield from _tool_calls(calls, message.get(names["role"]), path + _member(names["tool_calls"]))


def _tool_calls(calls: Any, role: Any, path: str) -> Iterator[Finding]:
    if not isinstance(calls, list):
        yield Finding("invalid_tool_calls", path, f"expected a list, it is {_kind(calls)}")
        return
    if calls and role != "assistant":
        yield Finding("invalid_tool_calls", path, "only the assistant calls tools")
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            message = 'expected {"type": "function", "function": {"name": …, "arguments": …}}'
            yield Finding("invalid_tool_calls", f"{path}[{index}]", message)
        elif not isinstance(function.get("arguments"), (str, dict)):
            message = "expected an object, or a string of JSON"
            yield Finding("invalid_tool_calls", f"{path}[{index}].function.arguments", message)


def _dialogue(messages: list[dict[str, Any]], path: str, names: Mapping[str, str]) -> Iterator[Finding]:
    roles = [message.get(names["role"]) for message in messages]
    if "assistant" not in roles:
        yield Finding("example_missing_assistant_message", path, "no message is the assistant's")
        return
    weights = [
        message.get(names["weight"]) for message, role in zip(messages, roles, strict=True) if role == "assistant"
    ]
    if all(weight == 0 for weight in weights):
        yield Finding("no_trainable_token", path, "every assistant message has weight 0")
    if "system" in roles[1:]:
        index = roles.index("system", 1)
        yield Finding("system_message_not_first", f"{path}[{index}]", "a system message that is not the first")
    for index, (role, after) in enumerate(pairwise(roles), 1):
        if role == after and role in ("user", "assistant"):
            yield Finding("repeated_role", f"{path}[{index}]", f"a second {role} message in a row")
            break
    if roles[-1] != "assistant":
        yield Finding(
            "last_message_not_assistant", f"{path}[{len(roles) - 1}]", "nothing is learned from the last message"
        )


def instruction(field_map: Mapping[str, str]) -> Diagnose:
    names = instruction_names(field_map)

    def diagnose(row: dict[str, Any]) -> Iterator[Finding]:
        yield from _unrecognized(row, set(names.values()))
        for actual in names.values():
            if row.get(actual) is not None and not isinstance(row[actual], str):
                yield Finding("field_type", f"${_member(actual)}", f"expected a string, it is {_kind(row[actual])}")
        yield from _one_of(row, PROMPTS, names, "missing_prompt", "empty_prompt")
        yield from _one_of(row, RESPONSES, names, "missing_response", "empty_answer")

    return diagnose


def _one_of(
    row: dict[str, Any], group: tuple[str, ...], names: Mapping[str, str], missing: str, empty: str
) -> Iterator[Finding]:
    keys = [names[name] for name in group if name in names]
    found = [key for key in keys if row.get(key) is not None]
    if not found:
        wanted = " or ".join(keys)
        yield Finding(missing, "$", f"has no {wanted}; if another field is it, say --map {group[0]}=FIELD")
    elif len(found) > 1:
        yield Finding("ambiguous_keys", "$", f"has {' and '.join(found)}, which mean the same; choose one with --map")
    elif isinstance(row[found[0]], str) and not row[found[0]].strip():
        yield Finding(empty, f"${_member(found[0])}", "is blank")


def text(field_map: Mapping[str, str]) -> Diagnose:
    key = field_map.get("text", "text")

    def diagnose(row: dict[str, Any]) -> Iterator[Finding]:
        yield from _unrecognized(row, {key})
        if key not in row:
            yield Finding("missing_text", "$", f"has no {key}; if another field is it, say --map text=FIELD")
        elif not isinstance(row[key], str):
            yield Finding("field_type", f"${_member(key)}", f"expected a string, it is {_kind(row[key])}")
        elif not row[key].strip():
            yield Finding("no_trainable_token", f"${_member(key)}", "is blank")

    return diagnose


def pretokenized(field_map: Mapping[str, str]) -> Diagnose:
    ids_key, labels_key = field_map.get("input_ids", "input_ids"), field_map.get("labels", "labels")

    def diagnose(row: dict[str, Any]) -> Iterator[Finding]:
        yield from _unrecognized(row, {ids_key, labels_key})
        ids, labels = row.get(ids_key), row.get(labels_key)
        if not isinstance(ids, list):
            what = _kind(ids) if ids_key in row else "missing"
            yield Finding("missing_input_ids", f"${_member(ids_key)}", f"expected a list of token ids, it is {what}")
            return
        yield from _numbers(ids, f"${_member(ids_key)}", "invalid_token_id", False)
        if labels is not None:
            yield from _labels(labels, f"${_member(labels_key)}", len(ids))
        if not ids or (isinstance(labels, list) and labels and all(label == IGNORED_LABEL for label in labels)):
            yield Finding("no_trainable_token", "$", "every label is -100" if ids else "there are no tokens")

    return diagnose


def _labels(labels: Any, path: str, length: int) -> Iterator[Finding]:
    if not isinstance(labels, list):
        yield Finding("field_type", path, f"expected a list of labels, it is {_kind(labels)}")
        return
    if len(labels) != length:
        yield Finding("labels_length", path, f"has {len(labels):,} labels for {length:,} tokens")
    yield from _numbers(labels, path, "invalid_label", True)


def _numbers(values: list, path: str, check: str, ignored_too: bool) -> Iterator[Finding]:
    for index, value in enumerate(values):
        if type(value) is int and (0 <= value <= MAX_TOKEN_ID or (ignored_too and value == IGNORED_LABEL)):
            continue
        wanted = f"{IGNORED_LABEL} or a token id" if ignored_too else "a whole number from 0"
        yield Finding(check, f"{path}[{index}]", f"{_shown(value)} is not {wanted}")
        return
