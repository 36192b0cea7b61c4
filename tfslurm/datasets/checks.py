"""Every check that a dataset goes through, and our answer to what it finds.

The names of the chat checks are those of OpenAI's fine-tuning guide ("Data preparation and
analysis for chat model fine-tuning"), so that people know them again.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    ACCEPT = "accept"
    WARN = "warn"
    REFUSE = "refuse"


@dataclass(frozen=True)
class Check:
    """`answer` is a sentence for the reference; `of` says what is looked at."""

    name: str
    of: str
    severity: Severity
    answer: str


def _checks(of: str, *rows: tuple[str, Severity, str]) -> list[Check]:
    return [Check(name, of, severity, answer) for name, severity, answer in rows]


_ACCEPT, _WARN, _REFUSE = Severity.ACCEPT, Severity.WARN, Severity.REFUSE

_ALL = [
    *_checks(
        "files",
        ("empty_dataset", _REFUSE, "There is no data file, or no row in any of them."),
        ("empty_file", _WARN, "A data file has no row."),
        ("hidden_file", _WARN, "A file or folder whose name starts with a dot is ignored, as is an old manifest."),
        (
            "unsupported_file",
            _REFUSE,
            "Only .jsonl, .jsonl.gz and .jsonl.zst are data; the message says how to convert.",
        ),
        ("json_array", _REFUSE, "One JSON array is not JSON lines; the message has the command that converts it."),
        (
            "symbolic_link",
            _REFUSE,
            "A link inside the folder could lead anywhere. One that the caller names is followed.",
        ),
        ("hard_link", _REFUSE, "A file with other names can change through them."),
        ("special_file", _REFUSE, "FIFOs, sockets and devices are no data."),
        ("other_filesystem", _REFUSE, "Something is mounted inside the folder."),
        ("name_not_utf8", _REFUSE, "The name of a file is not UTF-8."),
        (
            "name_control_character",
            _REFUSE,
            "The name of a file has a control character (a newline, say) or a backslash.",
        ),
        ("case_clash", _REFUSE, "Two paths differ only in case or in how an accent is encoded."),
        ("damaged_compression", _REFUSE, "A .gz or .zst file ends early or is no such file."),
    ),
    *_checks(
        "lines",
        ("blank_line", _WARN, "A blank line is no row; it is skipped, and counts in the line numbers."),
        ("byte_order_mark", _WARN, "A byte order mark at the start of a file is skipped."),
        ("crlf", _ACCEPT, "CRLF line ends are the same as LF: JSON takes the carriage return for white space."),
        ("unterminated_last_line", _ACCEPT, "The last line of a file needs no newline."),
        ("line_too_long", _REFUSE, "A line has more than 8 MiB."),
        ("invalid_utf8", _REFUSE, "A line is not UTF-8, anywhere in it, also in fields that are not used."),
        ("invalid_json", _REFUSE, "A line is not one JSON value."),
        ("not_a_number", _REFUSE, "NaN and Infinity are not JSON."),
        ("lone_surrogate", _REFUSE, "An escape such as \\ud800, half of a character, is no text."),
        ("duplicate_key", _REFUSE, "An object has a key twice: readers disagree on which value counts."),
        ("nested_too_deep", _REFUSE, "A value lies more than 64 levels deep."),
    ),
    *_checks(
        "every format",
        ("data_type", _REFUSE, "A row, or a message, is no JSON object."),
        ("field_type", _REFUSE, "A field has another type than the format says."),
        ("row_type", _REFUSE, "A row cannot be read as one of the format, for a reason without a name of its own."),
        ("unrecognized_key", _WARN, "A key of the row is not one of the format's: it is kept and not used."),
        ("no_trainable_token", _WARN, "Nothing in the row is learned: all is masked, weighted 0, or empty."),
        (
            "duplicate_row",
            _WARN,
            "A line has the same bytes as an earlier one, among the first million different ones.",
        ),
        ("far_longer_than_the_rest", _WARN, "A row is more than ten times as long as 95 % of the rows are."),
    ),
    *_checks(
        "conversational",
        ("missing_messages_list", _REFUSE, "`messages` is missing, is no list, or is empty."),
        (
            "message_missing_key",
            _REFUSE,
            "A message has no `role` or no `content` (which a message with tool calls may lack).",
        ),
        (
            "message_unrecognized_key",
            _REFUSE,
            "A message has a key beside role, content, name, tool_calls, tool_call_id, weight.",
        ),
        ("unrecognized_role", _REFUSE, "A role is none of system, user, assistant, tool."),
        (
            "missing_content",
            _REFUSE,
            "The content is null or neither a string nor a list of parts, and there are no tool calls.",
        ),
        ("unsupported_content_part", _REFUSE, 'A part of the content is not {"type": "text", "text": …}.'),
        ("invalid_weight", _REFUSE, "A weight is neither 0 nor 1."),
        (
            "invalid_tool_calls",
            _REFUSE,
            "Tool calls are no list of functions with name and arguments, or not the assistant's.",
        ),
        ("invalid_tools", _REFUSE, "`tools` is no list of objects."),
        ("example_missing_assistant_message", _REFUSE, "No message is the assistant's: there is nothing to learn."),
        ("empty_content", _WARN, "A message's content is blank."),
        (
            "system_message_not_first",
            _WARN,
            "A system message comes later than first; many chat templates refuse that.",
        ),
        (
            "repeated_role",
            _WARN,
            "Two user or two assistant messages follow each other; many chat templates refuse that.",
        ),
        ("last_message_not_assistant", _WARN, "What follows the assistant's last message teaches nothing."),
    ),
    *_checks(
        "instruction",
        ("missing_prompt", _REFUSE, "There is neither `prompt` nor `instruction`."),
        ("missing_response", _REFUSE, "There is none of `completion`, `response`, `output`."),
        ("ambiguous_keys", _REFUSE, "Two keys of a row mean the same; say with --map which one counts."),
        ("empty_prompt", _WARN, "The prompt is blank."),
        ("empty_answer", _WARN, "The answer is blank."),
    ),
    *_checks(
        "text",
        ("missing_text", _REFUSE, "There is no `text`."),
    ),
    *_checks(
        "pretokenized",
        ("missing_input_ids", _REFUSE, "There is no `input_ids` list."),
        ("invalid_token_id", _REFUSE, "A token id is no whole number from 0 to 2147483647."),
        ("invalid_label", _REFUSE, "A label is neither -100 nor a token id."),
        ("labels_length", _REFUSE, "`labels` and `input_ids` differ in length."),
    ),
]

CHECKS: dict[str, Check] = {check.name: check for check in _ALL}
"""By name, in the order of the reference."""
