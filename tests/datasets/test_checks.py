import gzip
import json
import random
import shlex
import shutil
import subprocess
import sys

import pytest
from dataset_rows import ROWS
from hypothesis import given, settings
from hypothesis import strategies as st

from tfslurm.datasets.checks import CHECKS, Severity
from tfslurm.datasets.files import MAX_LINE
from tfslurm.datasets.formats import decoder, read_rows
from tfslurm.datasets.report import Sizes
from tfslurm.datasets.validation import Validator, refuse, validate
from tfslurm.errors import ValidationError

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def chat(*messages, **more):
    return {"messages": list(messages), **more}


BAD = [
    # lines, in any format
    ("text", b'{"text": "a"', "invalid_json", ""),
    ("text", b'{"text": "a"} {"text": "b"}', "invalid_json", ""),
    ("text", b"\x00", "invalid_json", ""),
    ("text", b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "invalid_json", ""),
    ("text", b"3", "data_type", "$"),
    ("text", b'["a"]', "data_type", "$"),
    ("text", b'{"text": "a", "score": NaN}', "not_a_number", "$.score"),
    ("text", b'{"text": "a", "scores": [1, -Infinity]}', "not_a_number", "$.scores[1]"),
    ("text", b'{"text": "a\xff"}', "invalid_utf8", ""),
    ("text", b'{"text": "a", "other": "\xff"}', "invalid_utf8", ""),
    ("text", '{"text": "a"}'.encode("utf-16"), "invalid_utf8", ""),
    ("text", rb'{"text": "\ud800"}', "lone_surrogate", "$.text"),
    ("text", rb'{"text": "a", "\udfff": 1}', "lone_surrogate", "$"),
    ("text", b'{"text": "a", "text": "b"}', "duplicate_key", "$.text"),
    ("text", b'{"text": "a", "m": {"k l": 1, "k l": 2}}', "duplicate_key", '$.m["k l"]'),
    ("text", b'{"text": "a", "m": ' + b"[" * 70 + b"]" * 70 + b"}", "nested_too_deep", ""),
    ("text", b'{"text": "a", "m": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested_too_deep", ""),
    ("text", b'{"text": "' + b"a" * MAX_LINE + b'"}', "line_too_long", ""),
    # conversational
    ("conversational", {}, "missing_messages_list", "$.messages"),
    ("conversational", {"messages": "hi"}, "missing_messages_list", "$.messages"),
    ("conversational", chat(), "missing_messages_list", "$.messages"),
    ("conversational", chat(USER, "hello", ANSWER), "data_type", "$.messages[1]"),
    ("conversational", chat({"content": "hi"}, ANSWER), "message_missing_key", "$.messages[0]"),
    ("conversational", chat({"role": "user"}, ANSWER), "message_missing_key", "$.messages[0]"),
    ("conversational", chat(USER, {**ANSWER, "mood": "fine"}), "message_unrecognized_key", "$.messages[1].mood"),
    ("conversational", chat(USER, {"role": "bot", "content": "x"}, ANSWER), "unrecognized_role", "$.messages[1].role"),
    ("conversational", chat({"role": ["user"], "content": "x"}, ANSWER), "unrecognized_role", "$.messages[0].role"),
    ("conversational", chat(USER, {"role": "assistant", "content": None}), "missing_content", "$.messages[1].content"),
    ("conversational", chat(USER, {"role": "assistant", "content": 3}), "missing_content", "$.messages[1].content"),
    ("conversational", chat(USER, {"role": "assistant", "content": []}), "missing_content", "$.messages[1].content"),
    (
        "conversational",
        chat({"role": "user", "content": [{"type": "image_url"}]}, ANSWER),
        "unsupported_content_part",
        "$.messages[0].content[0]",
    ),
    ("conversational", chat(USER, {**ANSWER, "weight": 0.5}), "invalid_weight", "$.messages[1].weight"),
    ("conversational", chat(USER, {**ANSWER, "weight": True}), "invalid_weight", "$.messages[1].weight"),
    ("conversational", chat({**USER, "name": 3}, ANSWER), "field_type", "$.messages[0].name"),
    ("conversational", chat(USER, {**ANSWER, "tool_calls": {}}), "invalid_tool_calls", "$.messages[1].tool_calls"),
    ("conversational", chat(USER, {**ANSWER, "tool_calls": [{}]}), "invalid_tool_calls", "$.messages[1].tool_calls[0]"),
    ("conversational", chat({**USER, "tool_calls": [CALL]}, ANSWER), "invalid_tool_calls", "$.messages[0].tool_calls"),
    ("conversational", chat(USER, ANSWER, tools="f"), "invalid_tools", "$.tools"),
    ("conversational", chat(USER, ANSWER, tools=["f"]), "invalid_tools", "$.tools[0]"),
    ("conversational", chat(USER), "example_missing_assistant_message", "$.messages"),
    # instruction
    ("instruction", {"completion": "a"}, "missing_prompt", "$"),
    ("instruction", {"prompt": "a"}, "missing_response", "$"),
    ("instruction", {"prompt": None, "completion": "a"}, "missing_prompt", "$"),
    ("instruction", {"prompt": "a", "instruction": "b", "output": "c"}, "ambiguous_keys", "$"),
    ("instruction", {"prompt": "a", "response": ["c"]}, "field_type", "$.response"),
    # text
    ("text", {"body": "a"}, "missing_text", "$"),
    ("text", {"text": 3}, "field_type", "$.text"),
    # pretokenized
    ("pretokenized", {"labels": [1]}, "missing_input_ids", "$.input_ids"),
    ("pretokenized", {"input_ids": [1, -1]}, "invalid_token_id", "$.input_ids[1]"),
    ("pretokenized", {"input_ids": [1, 2.0]}, "invalid_token_id", "$.input_ids[1]"),
    ("pretokenized", {"input_ids": [True]}, "invalid_token_id", "$.input_ids[0]"),
    ("pretokenized", {"input_ids": [2**31]}, "invalid_token_id", "$.input_ids[0]"),
    ("pretokenized", {"input_ids": [1, 2], "labels": [1, -1]}, "invalid_label", "$.labels[1]"),
    ("pretokenized", {"input_ids": [1, 2], "labels": [1]}, "labels_length", "$.labels"),
    ("pretokenized", {"input_ids": [1], "labels": "x"}, "field_type", "$.labels"),
]


@pytest.mark.parametrize(("format", "row", "check", "path"), BAD, ids=[f"{bad[2]}-{n}" for n, bad in enumerate(BAD)])
def test_a_bad_row_is_refused_by_name_with_file_line_and_path(write, format, row, check, path):
    report = validate(write(ROWS[format], row), format)
    assert not report.ok
    assert report.errors[check] == 1
    assert (report.rows, report.bad_rows, report.statistics.rows) == (2, 1, 1)
    (found,) = [error for error in report.first_errors if error.check == check]
    assert (found.file, found.line, found.path) == ("a.jsonl", 2, path)
    place = f"a.jsonl:2: {path}: " if path else "a.jsonl:2: "
    assert any(line.startswith(place) for line in report.describe().splitlines())


WARNED = [
    ("conversational", chat(USER, {"role": "assistant", "content": " "}), "empty_content"),
    ("conversational", chat(USER, {**ANSWER, "weight": 0}), "no_trainable_token"),
    ("conversational", chat(USER, {"role": "system", "content": "x"}, ANSWER), "system_message_not_first"),
    ("conversational", chat(USER, USER, ANSWER), "repeated_role"),
    ("conversational", chat(USER, ANSWER, USER), "last_message_not_assistant"),
    ("conversational", chat(USER, ANSWER, id=3), "unrecognized_key"),
    ("instruction", {"prompt": " ", "completion": "a"}, "empty_prompt"),
    ("instruction", {"prompt": "a", "completion": ""}, "empty_answer"),
    ("instruction", {"prompt": "a", "completion": "b", "id": 3}, "unrecognized_key"),
    ("text", {"text": ""}, "no_trainable_token"),
    ("text", b"  ", "blank_line"),
    ("text", ROWS["text"], "duplicate_row"),
    ("pretokenized", {"input_ids": [1], "labels": [-100]}, "no_trainable_token"),
    ("pretokenized", {"input_ids": []}, "no_trainable_token"),
]


@pytest.mark.parametrize(("format", "row", "check"), WARNED, ids=[f"{case[2]}-{n}" for n, case in enumerate(WARNED)])
def test_a_doubtful_row_is_accepted_with_a_warning(write, format, row, check):
    report = validate(write(ROWS[format], row), format)
    assert report.ok
    assert report.warnings == {check: 1}
    (first,) = report.first_warnings
    assert (first.file, first.line, first.check) == ("a.jsonl", 2, check)


GOOD = [
    ("conversational", chat({"role": "system", "content": "s"}, USER, ANSWER), "messages"),
    ("conversational", chat(USER, {**ANSWER, "weight": 1, "name": "Ann"}), "messages"),
    ("conversational", chat({"role": "user", "content": [{"type": "text", "text": "x"}]}, ANSWER), "messages"),
    (
        "conversational",
        chat(
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "4", "tool_call_id": "1"},
            {"role": "tool", "content": "5"},
            ANSWER,
            tools=[{"type": "function", "function": {"name": "f"}}],
        ),
        "messages+tools+tool_calls",
    ),
    ("conversational", chat(USER, {"role": "assistant", "tool_calls": [CALL]}), "messages+tool_calls"),
    (
        "conversational",
        rb'{"messages":[{"role":"user","content":"a \"role\": \\"},{"role":"assistant","content":"\\\""}]}',
        "messages",
    ),
    ("instruction", {"instruction": "a", "input": "", "output": "b"}, "instruction/input/output"),
    ("text", '{"text": "\\ud83d\\ude00 \u2028"}'.encode(), "text"),
    ("pretokenized", {"input_ids": [1, 2]}, "input_ids"),
]


@pytest.mark.parametrize(("format", "row", "schema"), GOOD, ids=[case[2] + str(n) for n, case in enumerate(GOOD)])
def test_a_good_row_passes_without_a_word(write, format, row, schema):
    report = validate(write(row), format)
    assert (report.errors, report.warnings, report.schema, report.rows) == ({}, {}, schema, 1)


def test_every_row_check_is_tested_and_says_what_it_answers():
    tested = {case[2] for case in BAD + WARNED}
    of_files = {check.name for check in CHECKS.values() if check.of == "files"}
    elsewhere = {"byte_order_mark", "crlf", "unterminated_last_line", "far_longer_than_the_rest", "row_type"}
    assert tested | of_files | elsewhere == set(CHECKS)
    assert all(check.answer.endswith(".") for check in CHECKS.values())
    assert {CHECKS[case[2]].severity for case in BAD} == {Severity.REFUSE}
    assert {CHECKS[case[2]].severity for case in WARNED} == {Severity.WARN}


def test_crlf_and_an_unterminated_last_line_are_accepted_and_a_bom_is_warned_of(write):
    report = validate(write(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}', end=b""), "text")
    assert (report.rows, report.errors, report.warnings) == (2, {}, {"byte_order_mark": 1})


def test_a_row_far_longer_than_the_rest_is_warned_of(write):
    rows = [{"text": f"row {number}"} for number in range(100)]
    report = validate(write(*rows, {"text": "x" * 5000}), "text")
    assert report.warnings == {"far_longer_than_the_rest": 1}
    assert report.first_warnings[0].line == 101


def test_only_the_first_errors_are_kept_but_all_are_counted(write):
    report = validate(write(*[{"text": 3}] * 1000), "text")
    assert report.errors == {"field_type": 1000}
    assert [error.line for error in report.first_errors] == [1, 2, 3, 4, 5]
    assert "… and 995 more errors" in report.describe()


def test_a_hundred_megabyte_line_is_refused_in_little_memory(tmp_path):
    source = tmp_path / "a.jsonl"
    with open(source, "wb") as file:
        file.write(b'{"text": "')
        for _ in range(100):
            file.write(b"a" * 1_000_000)
        file.write(b'"}\n{"text": "b"}\n')
    code = (
        "import resource, sys; from pathlib import Path; from tfslurm.datasets.validation import validate\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "report = validate(Path(sys.argv[1]), 'text')\n"
        "print(report.errors, report.rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    out = subprocess.run([sys.executable, "-c", code, str(source)], capture_output=True, text=True, check=True).stdout
    assert out.startswith("{'line_too_long': 1} 2 ")
    assert int(out.split()[-1]) < 60_000


def test_cut_off_and_fake_compressed_files_are_refused_by_name(write):
    folder = write(ROWS["text"])
    whole = gzip.compress(json.dumps(ROWS["text"]).encode() * 1000)
    (folder / "cut.jsonl.gz").write_bytes(whole[:-20])
    (folder / "fake.jsonl.gz").write_bytes(b'{"text": "a"}')
    (folder / "fake.jsonl.zst").write_bytes(b'{"text": "a"}')
    report = validate(folder, "text")
    assert report.errors["damaged_compression"] == 3
    named = {error.file for error in report.first_errors if error.check == "damaged_compression"}
    assert named == {"cut.jsonl.gz", "fake.jsonl.gz", "fake.jsonl.zst"}


def test_an_empty_dataset_is_an_error_and_an_empty_file_a_warning(write, tmp_path):
    assert validate(write(), "text").errors == {"empty_dataset": 1}
    assert validate(write(b""), "text").errors == {"empty_dataset": 1}
    (tmp_path / "none").mkdir()
    assert validate(tmp_path / "none", "text").errors == {"empty_dataset": 1}
    assert validate(write(ROWS["text"], name="b.jsonl"), "text").warnings == {"empty_file": 1, "blank_line": 1}


def commands(message):
    """The commands in the advice: the one with jq, and the one with Python."""
    jq, _, python = message.partition("Convert it: ")[2].partition(" (without jq: ")
    return jq, python.removesuffix(")")


@pytest.mark.parametrize("which", ["jq", "python"])
def test_the_advice_for_a_json_array_works_when_followed(write, tmp_path, which):
    if which == "jq" and not shutil.which("jq"):
        pytest.skip("jq is not installed: the command with jq was NOT tried")
    folder = write(name="it's data.json")
    rows = [{"instruction": f"é {number}", "input": "", "output": "b"} for number in range(3)]
    (folder / "it's data.json").write_text(json.dumps(rows, indent=2))
    report = validate(folder, "instruction")
    assert report.errors == {"json_array": 1}
    jq, python = commands(report.first_errors[0].message)
    subprocess.run(["bash", "-c", jq if which == "jq" else python], check=True)
    (folder / "it's data.json").unlink()
    after = validate(folder, "instruction")
    assert (after.ok, after.rows, after.files) == (True, 3, 1)


def test_an_array_named_jsonl_gets_the_same_advice(write):
    report = validate(write(b'[{"text": "a"},', b'{"text": "b"}]'), "text")
    assert report.errors["json_array"] == 1
    assert any("jq -c '.[]'" in str(error) for error in report.first_errors)


@pytest.mark.skipif(not shutil.which("jq"), reason="jq is not installed: converting from/value chats was NOT tried")
def test_the_advice_for_an_array_of_from_value_chats_makes_messages_of_them(write):
    folder = write(name="chats.json")
    call = json.dumps({"name": "add", "arguments": {"a": 1}})
    turns = [("human", "1+1?"), ("function_call", call), ("observation", "2"), ("gpt", "It's 2.")]
    chats = [{"conversations": [{"from": who, "value": what} for who, what in turns], "tools": '[{"name": "add"}]'}]
    (folder / "chats.json").write_text(json.dumps(chats + [{"conversations": chats[0]["conversations"], "tools": ""}]))
    (error,) = validate(folder, "conversational").first_errors
    subprocess.run(["bash", "-c", error.message.partition("Convert it: ")[2]], check=True)
    (folder / "chats.json").unlink()
    first, second = read_rows(folder, "conversational")
    assert [message.role for message in first.messages] == ["user", "assistant", "tool", "assistant"]
    assert first.messages[1].tool_calls == [{"type": "function", "function": json.loads(call)}]
    assert (first.tools, second.tools) == ([{"name": "add"}], None)
    assert validate(folder, "conversational").ok


def test_the_advice_for_plain_text_works_when_followed(write):
    folder = write(name="a.txt")
    (folder / "a.txt").write_text('one "quoted"\ntwo\n')
    (error,) = validate(folder, "text").first_errors
    subprocess.run(["bash", "-c", error.message.partition("text format: ")[2]], check=True)
    (folder / "a.txt").unlink()
    assert [row.text for row in read_rows(folder, "text")] == ['one "quoted"', "two"]


def test_the_advice_for_a_table_works_when_followed(write):
    folder = write(name="a.csv")
    (folder / "a.csv").unlink()
    (folder / "a.tsv").write_text("prompt\tcompletion\na, b\tc\n")
    (error,) = validate(folder, "instruction").first_errors
    subprocess.run(["bash", "-c", error.message.partition("Convert it: ")[2]], check=True)
    (folder / "a.tsv").unlink()
    assert validate(folder, "instruction").rows == 1
    assert shlex.split(error.message.partition("Convert it: ")[2])[0] == "python3"


def test_refusing_says_what_and_carries_the_report(write):
    report = validate(write(ROWS["text"], {"text": 3}), "text")
    with pytest.raises(
        ValidationError, match=r"(?s)1 of 2 rows not in the text format.*a\.jsonl:2: \$\.text: "
    ) as caught:
        refuse(report, "source")
    assert caught.value.report == report.to_dict()
    assert json.loads(json.dumps(report.to_dict()))["errors"] == {"field_type": 1}


def test_percentiles_are_nearest_rank_and_close_for_long_rows():
    sizes, values = Sizes(), [random.Random(1).randrange(5_000_000) for _ in range(1000)]
    for value in values:
        sizes.add(value)
    spread, ordered = sizes.spread(), sorted(values)
    assert (spread.min, spread.max, spread.total) == (ordered[0], ordered[-1], sum(values))
    assert [spread.p5, spread.median, spread.p95] == pytest.approx([ordered[49], ordered[499], ordered[949]], rel=0.001)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-200, 200) | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
message = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["system", "user", "assistant", "tool", "bot"]) | json_values,
        "content": st.text(max_size=5) | json_values | st.just([{"type": "text", "text": "x"}]),
        "weight": st.sampled_from([0, 1, 2, 1.0, None]),
        "tool_calls": st.just([CALL]) | json_values,
        "name": json_values,
        "other": json_values,
    },
)
row = st.fixed_dictionaries(
    {},
    optional={
        "messages": st.lists(message, max_size=3) | json_values,
        "tools": json_values,
        "prompt": json_values,
        "instruction": json_values,
        "input": json_values,
        "output": json_values,
        "text": json_values,
        "input_ids": st.lists(st.integers(-2, 5), max_size=3) | json_values,
        "labels": st.lists(st.sampled_from([-100, -1, 0, 5]), max_size=3) | json_values,
    },
)


def looks(format, line):
    """What the three looks at a line say, the first two of which need not say anything, and what they tally."""
    for look in (Validator._quickly, Validator._sound, Validator._carefully):
        validator = Validator(format, {})
        arguments = (line,) if look is Validator._quickly else ("a.jsonl", 1, line)
        yield look(validator, *arguments), validator.tally.counts, validator.tally.first


def assert_the_looks_agree(format, line):
    quick, sound, careful = looks(format, line)
    measure, counts, _ = careful
    assert quick[0] is None or (quick == careful and not counts)
    assert sound == careful if sound[0] else not sound[1]
    if measure:
        decoder(format)(line)
    else:
        assert not counts["row_type"]


@settings(max_examples=300, deadline=None)
@given(row=row, format=st.sampled_from(list(ROWS)), ascii=st.booleans(), spaces=st.booleans())
def test_the_quick_looks_and_the_careful_one_agree_and_what_passes_can_be_read(row, format, ascii, spaces):
    assert_the_looks_agree(
        format, json.dumps(row, ensure_ascii=ascii, separators=None if spaces else (",", ":")).encode()
    )


@pytest.mark.parametrize(("format", "line", "check"), [case[:3] for case in BAD + WARNED])
def test_the_looks_agree_about_all_that_has_a_name(format, line, check):
    assert_the_looks_agree(format, line if isinstance(line, bytes) else json.dumps(line).encode())


CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'


@pytest.mark.parametrize(
    "rest",
    [
        ', "id": "1", "id": "1"}',
        ', "m": {"k": 1, "k": 2}}',
        ', "m": [{"k": "\\u0022\\u0022", "k": "\\u0022"}]}',
        ', "m": {"k": "\\"\\\\", "\\u006b": 1}}',
        ', "tools": [{"name": "f", "name": "g"}]}',
        ', "messages": []}',
        ', "m": ' + "[" * 62 + "{}" + "]" * 62 + "}",
        ', "m": ' + "[" * 64 + "]" * 64 + "}",
        ', "m": 1e999}',
        ', "m": "\\ud800"}',
        ', "m": NaN}',
    ],
)
def test_the_looks_agree_about_what_lies_in_columns_of_no_use(rest):
    assert_the_looks_agree("conversational", (CHAT + rest).encode())


@pytest.mark.parametrize(
    "row",
    [
        chat(USER, ANSWER, id="row-1", metadata={"source": "é", "tags": ['"', "b"]}),
        chat(USER, {**ANSWER, "weight": 1}),
        chat({**USER, "name": "Ann"}, {**ANSWER, "content": [{"type": "text", "text": 'a "word"'}]}),
        chat(
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "5", "tool_call_id": "1"},
            ANSWER,
            tools=[{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {}}}}}],
        ),
    ],
    ids=["columns", "weight", "parts", "tools"],
)
def test_common_rows_with_more_than_texts_need_no_careful_look(row):
    _, sound, careful = looks("conversational", json.dumps(row).encode())
    assert sound[0]
    assert sound == careful
