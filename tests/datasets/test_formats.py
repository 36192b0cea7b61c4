import gzip
import json

import msgspec
import pytest
from backports import zstd
from dataset_rows import ROWS

from tfslurm.datasets.formats import (
    ConversationRow,
    InstructionRow,
    Message,
    PretokenizedRow,
    TextRow,
    check_field_map,
    read_rows,
)
from tfslurm.errors import InvalidError


@pytest.mark.parametrize(
    ("format", "row"),
    [
        (
            "conversational",
            ConversationRow(messages=[Message(role="user", content="hi"), Message(role="assistant", content="hello")]),
        ),
        ("instruction", InstructionRow("2+2?", "4")),
        ("text", TextRow("Once upon a time.")),
        ("pretokenized", PretokenizedRow([1, 2, 3], [-100, 2, 3])),
    ],
)
def test_each_format_has_its_row(write, format, row):
    assert list(read_rows(write(ROWS[format]), format)) == [row]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "a", "completion": "r"}, "a"),
        ({"prompt": "a", "response": "r"}, "a"),
        ({"instruction": "a", "response": "r"}, "a"),
        ({"instruction": "a", "input": "b", "output": "r"}, "a\n\nb"),
        ({"instruction": "a", "input": "", "output": "r"}, "a"),
        ({"instruction": "a", "input": None, "output": "r"}, "a"),
        ({"instruction": "a", "input": " \n", "output": "r"}, "a"),
    ],
)
def test_instruction_spellings_come_to_the_same(write, row, prompt):
    assert list(read_rows(write(row), "instruction")) == [InstructionRow(prompt, "r")]


def test_a_field_map_renames_on_reading_and_other_columns_are_passed_over(write):
    folder = write({"question": "q", "answer": "a", "prompt": 3, "output": ["x"]})
    assert list(read_rows(folder, "instruction", {"prompt": "question", "response": "answer"})) == [
        InstructionRow("q", "a")
    ]


def test_a_field_map_reaches_into_messages(write):
    folder = write({"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]})
    field_map = {"messages": "conversations", "role": "from", "content": "value"}
    (row,) = read_rows(folder, "conversational", field_map)
    assert [(message.role, message.text) for message in row.messages] == [("user", "q"), ("assistant", "a")]
    assert isinstance(row, ConversationRow) and isinstance(row.messages[0], Message)


def test_message_text_joins_parts_and_null_is_empty():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert msgspec.convert({"role": "user", "content": parts}, Message).text == "ab"
    assert Message(role="assistant", content=None).text == ""


@pytest.mark.parametrize(
    ("format", "field_map", "says"),
    [
        ("text", {"txet": "a"}, "no field 'txet'"),
        ("text", {"text": ""}, "not the name of a field"),
        ("instruction", {"prompt": "a", "response": "a"}, "both prompt and response"),
        ("instruction", {"prompt": "a", "instruction": "b"}, "keep one"),
        ("conversational", {"role": "content"}, "both role and content"),
        ("chat", {}, "no format 'chat'"),
    ],
)
def test_a_field_map_that_makes_no_sense_is_refused(format, field_map, says):
    with pytest.raises(InvalidError, match=says):
        check_field_map(format, field_map)


def test_files_are_read_in_bytewise_order_whatever_their_compression(write):
    def text(word):
        return json.dumps({"text": word}).encode()

    folder = write(text("3"), name="b/z.jsonl")
    write(text("1"), name="B.jsonl")
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(text("2") + b"\n") + gzip.compress(text("2b")))
    (folder / "é.jsonl.zst").write_bytes(zstd.compress(text("4") + b"\n") + zstd.compress(text("4b")))
    (folder / "MANIFEST.sha256").write_text("not data")
    assert [row.text for row in read_rows(folder, "text")] == ["1", "2", "2b", "3", "4", "4b"]


def test_bom_crlf_blank_lines_and_a_missing_last_newline_do_not_matter(write):
    folder = write(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}', end=b"")
    assert [row.text for row in read_rows(folder, "text")] == ["a", "b"]


def test_a_row_that_is_none_names_file_and_line(write):
    with pytest.raises(InvalidError, match=r"^a\.jsonl:2: not a row of the text format"):
        list(read_rows(write({"text": "a"}, {"text": 3}), "text"))
