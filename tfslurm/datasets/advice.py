"""What to do with a file that is no JSON lines: the command that makes it some."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

_ARRAY = "import json, sys; [print(json.dumps(row)) for row in json.load(sys.stdin)]"
_SHAREGPT = """.[] | {messages: [.conversations[] |
  if .from == "human" then {role: "user", content: .value}
  elif .from == "gpt" then {role: "assistant", content: .value}
  elif .from == "observation" then {role: "tool", content: .value}
  elif .from == "function_call" then
    {role: "assistant", content: null, tool_calls: [{type: "function", function: (.value | fromjson)}]}
  else {role: .from, content: .value} end
], tools: ((.tools // "") | if . == "" then null elif type == "string" then fromjson else . end)}"""
_CSV = "import csv, json, sys; [print(json.dumps(row)) for row in csv.DictReader(sys.stdin{})]"
_TEXT = 'import json, sys; [print(json.dumps({"text": line.rstrip("\\n")})) for line in sys.stdin]'
_PARQUET = "import pandas, sys; pandas.read_parquet(sys.argv[1]).to_json(sys.stdout, orient='records', lines=True)"

_PACKED = {
    ".gz": "gunzip",
    ".zst": "unzstd",
    ".bz2": "bunzip2",
    ".xz": "unxz",
    ".zip": "unzip",
    ".tar": "tar -xf",
    ".tgz": "tar -xf",
}


def how_to_convert(path: Path) -> tuple[str, str]:
    """(check, message) for a file whose name is not one of JSON lines.

    Opens `path` only where it is called `.json`, to see what it starts with.
    """
    suffix = path.suffix.lower()
    if suffix == ".json":
        return _json(path)
    if suffix in (".csv", ".tsv"):
        script = _CSV.format("" if suffix == ".csv" else ', delimiter="\\t"')
        return "unsupported_file", f"is a table, not JSON lines. Convert it: {_python(script, path)}"
    if suffix == ".parquet":
        command = f"python3 -c {shlex.quote(_PARQUET)} {_quoted(path)} > {_target(path)}"
        return "unsupported_file", f"is Parquet, not JSON lines. Convert it (needs pandas and pyarrow): {command}"
    if suffix == ".txt":
        message = f"is plain text. To make every line a row of the text format: {_python(_TEXT, path)}"
        return "unsupported_file", message
    if suffix in _PACKED:
        return "unsupported_file", f"is packed. Unpack it: {_PACKED[suffix]} {_quoted(path)}"
    return "unsupported_file", "is not data: only .jsonl, .jsonl.gz and .jsonl.zst are; move it elsewhere."


def array_advice(path: Path) -> str:
    """How to make JSON lines of the JSON array in `path`; where there are two commands, both do the same.

    Chats of `from` and `value` (the ShareGPT dialect) become messages at the same time.
    """
    start = _start(path)
    if b'"conversations"' in start and b'"from"' in start and b'"value"' in start:
        command = f"jq -c {shlex.quote(' '.join(_SHAREGPT.split()))} {_quoted(path)} > {_target(path)}"
        return f"is one JSON array of from/value chats, not JSON lines of messages. Convert it: {command}"
    return (
        f"is one JSON array, not JSON lines. Convert it: jq -c '.[]' {_quoted(path)} > {_target(path)}"
        f" (without jq: {_python(_ARRAY, path)})"
    )


def _json(path: Path) -> tuple[str, str]:
    first = _start(path)[:1]
    if first == b"[":
        return "json_array", array_advice(path)
    if first == b"{":
        command = f"jq -c . {_quoted(path)} > {_target(path)}"
        return "unsupported_file", f"is not named as JSON lines. If every row is an object of its own: {command}"
    return "unsupported_file", "is not JSON lines: a row is one JSON object on one line, in a file named .jsonl."


def _start(path: Path) -> bytes:
    """The first bytes after white space; none where `path` cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return b""
    with open(descriptor, "rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()


def _python(script: str, path: Path) -> str:
    return f"python3 -c {shlex.quote(script)} < {_quoted(path)} > {_target(path)}"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _target(path: Path) -> str:
    """Beside the file where one may write there, else in the current folder."""
    name = f"{path.stem}.jsonl"
    beside = path.with_name(name)
    return shlex.quote(str(beside if os.access(path.parent, os.W_OK) else name))
