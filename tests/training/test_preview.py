"""`dataset preview` through the command line and the training environment's program, on real tokenizers."""

from __future__ import annotations

import gzip
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from backports import zstd

from tfslurm.catalog.db import write_transaction
from tfslurm.catalog.models import BaseModel, now
from tfslurm.datasets import registry
from tfslurm.errors import NotFoundError
from tfslurm.training import previewing
from tfslurm.training.masks import Encoded, RowEncoder
from tfslurm.training.preview import Place, Question

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def model(installation, tiny):
    """The tiny model, on the allow-list."""
    with write_transaction():
        return BaseModel.create(
            name="tiny", revision="r1", digest="sha256:1", location=str(tiny), source=str(tiny),
            metadata={"max_position_embeddings": 512}, owner="somebody", created_at=now(),
        )  # fmt: skip


@pytest.fixture
def dataset(installation):
    """An assembling dataset with these files: `dataset("text", {"a.jsonl": [row, …]})`; a row may be raw bytes."""

    def dataset(format, files, field_map=None):
        made = registry.create(installation.settings, "data", format, field_map or {})
        folder = installation.root.assembling(made.artifact_id)
        for name, rows in files.items():
            lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
            write = {"gz": gzip.compress, "st": zstd.compress}.get(name[-2:], bytes)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(write(b"".join(line + b"\n" for line in lines)))
        return folder

    return dataset


@pytest.fixture
def look(dataset, tiny):
    """Preview in this process: `look(format, files, **question)`."""

    def look(format, files, field_map=None, **more):
        folder = dataset(format, files, field_map)
        question = dict(max_seq_length=100, overlong="truncate", count=5, places=[]) | more
        return previewing.preview(
            Question(folder=str(folder), format=format, field_map=field_map or {}, model=str(tiny), **question)
        )

    return look


def text(row, learned):
    return "".join(token.text for token in row.tokens if token.learned is learned)


def chat(answer, question="hello"):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


FORMATS = {
    "conversational": (chat("the mat é 🐈"), None, "the mat é 🐈<|im_end|>"),
    "instruction": ({"q": "hello", "a": "the mat é 🐈"}, {"prompt": "q", "response": "a"}, "the mat é 🐈<|im_end|>"),
    "text": ({"body": "the mat é 🐈"}, {"text": "body"}, "he mat é 🐈<|im_end|>"),
    "pretokenized": ({"ids": [80, 81, 82], "labels": [-100, 81, 82]}, {"input_ids": "ids"}, None),
}


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_shown_with_its_loss_and_its_field_map_compressed_or_not(look, tiny, format, suffix):
    row, field_map, learned = FORMATS[format]
    (shown,) = look(format, {f"a.{suffix}": [row]}, field_map).rows
    assert (shown.file, shown.line, shown.status, shown.reason) == (f"a.{suffix}", 1, "kept", None)
    assert shown.token_count == shown.length == len(shown.tokens)
    assert shown.supervised_count == sum(token.learned for token in shown.tokens) > 0
    if learned:
        assert text(shown, True).endswith(learned[-12:]) and "hello" not in text(shown, True)
    else:
        assert [(token.id, token.learned) for token in shown.tokens] == [(80, False), (81, True), (82, True)]


def test_what_is_shown_is_what_training_encodes(look, tiny):
    from tfslurm.datasets.formats import decoder
    from tfslurm.training.base_tokenizer import BaseTokenizer

    rows = [chat("the cat"), chat("run the job, é", "🐈?")]
    shown = look("conversational", {"a.jsonl": rows}).rows
    decode = decoder("conversational")
    for row, seen in zip(rows, shown, strict=True):
        (encoded,) = RowEncoder(tokenizer := BaseTokenizer(tiny)).encode([decode(json.dumps(row).encode())])
        assert isinstance(encoded, Encoded)
        assert [token.id for token in seen.tokens] == encoded.ids
        assert "".join(token.text for token in seen.tokens) == tokenizer.backend.decode(encoded.ids, False)
        learned = {at for start, end in encoded.spans for at in range(start, end)}
        assert {at for at, token in enumerate(seen.tokens) if token.learned} == learned


def test_a_long_row_is_cut_and_one_that_keeps_nothing_to_learn_is_dropped_with_the_reason(look):
    files = {"a.jsonl": [{"text": "the cat sat " * 30}, {"text": "the"}]}
    cut, whole = look("text", files, max_seq_length=20).rows
    assert (cut.status, cut.token_count, len(cut.tokens), whole.status) == ("truncated", 20, 20, "kept")
    assert cut.length > 20


def test_rows_are_dropped_where_the_site_says_so_or_where_the_loss_lies_beyond_the_cut(look):
    long = chat("yes", "which dataset is ready? " * 20)
    (row,) = look("conversational", {"a.jsonl": [long]}, max_seq_length=16).rows
    assert (row.status, row.reason) == ("dropped", "none of its first 16 tokens carries loss")


def test_a_site_that_drops_long_rows_has_them_shown_as_dropped(look):
    (row,) = look("text", {"a.jsonl": [{"text": "the cat sat " * 30}]}, max_seq_length=16, overlong="drop").rows
    assert (row.status, len(row.tokens)) == ("dropped", 16)
    assert "drops rows of more than" in row.reason


def test_rows_that_are_rejected_say_why_and_the_others_are_shown(look):
    rows = [{"messages": 3}, b"{", {"messages": [{"role": "user", "content": "a"}]}, chat("yes"), b'{"text": "\xff"}']
    shown = look("conversational", {"a.jsonl": rows}).rows
    assert [row.status for row in shown] == ["rejected"] * 3 + ["kept", "rejected"]
    assert "Expected `array`, got `int` - at `$.messages`" in shown[0].reason
    assert "no token of it carries loss" in shown[2].reason


def test_rows_are_chosen_by_file_and_line_in_the_order_given_and_else_the_first_in_training_order(look, dataset, tiny):
    files = {"b.jsonl": [b"", {"text": "b two"}, {"text": "b three"}], "sub/a.jsonl": [{"text": "sub"}],
             "a.jsonl": [{"text": "a one"}]}  # fmt: skip
    shown = look("text", files, count=3)
    assert [(row.file, row.line) for row in shown.rows] == [("a.jsonl", 1), ("b.jsonl", 2), ("b.jsonl", 3)]


def test_places_that_are_not_there_are_refused_and_a_blank_line_is_no_row(look):
    places = [Place("sub/b.jsonl", 2), Place("a.jsonl", 1), Place("sub/b.jsonl", 1)]
    shown = look("text", {"a.jsonl": [{"text": "a one"}], "sub/b.jsonl": [{"text": "x y"}, b" "]}, places=places).rows
    assert [(row.file, row.line, row.status) for row in shown] == [
        ("sub/b.jsonl", 2, "rejected"),
        ("a.jsonl", 1, "kept"),
        ("sub/b.jsonl", 1, "kept"),
    ]


@pytest.mark.parametrize(
    ("place", "said"), [(("../a.jsonl", 1), "has no file '../a.jsonl'"), (("a.jsonl", 9), "has no line 9: its last is")]
)
def test_a_place_outside_the_dataset_is_refused(look, place, said):
    with pytest.raises(NotFoundError, match=said):
        look("text", {"a.jsonl": [{"text": "a one"}]}, places=[Place(*place)])


def test_the_command_marks_what_is_learned_with_brackets_where_there_is_no_terminal(installation, dataset, model):
    dataset(
        "conversational",
        {"a.jsonl": [chat("the cat\x1b[31m"), chat("b"), {"messages": [{"role": "user", "content": "a"}]}]},
    )
    done = installation.run("dataset", "preview", "data", "--model", "tiny", check=0)
    assert "<|im_start|>assistant\n[the cat\\x1b[31m<|im_end|>]\n" in done.stdout
    assert "a.jsonl:3  rejected: no token of it carries loss" in done.stdout
    assert "\n3 rows at max_seq_length 512: 2 kept, 1 rejected; " in done.stdout
    assert "\x1b" not in done.stdout and done.stderr == ""


def test_on_a_terminal_what_is_learned_is_green_and_each_token_has_its_shade(installation, dataset, model):
    dataset("conversational", {"a.jsonl": [chat("the cat")]})
    ours, theirs = pty.openpty()
    environment = {"TFSLURM_CONFIG": str(installation.config), "PYTHONPATH": str(REPOSITORY), "TERM": "xterm"}
    command = [sys.executable, "-m", "tfslurm", "dataset", "preview", "data", "--model", "tiny"]
    subprocess.run(command, stdout=theirs, env=os.environ | environment, check=True)
    os.close(theirs)
    text = os.read(ours, 65536).decode()
    os.close(ours)
    assert re.search(r"\x1b\[(32|92)m<\|im_end\|>\x1b\[0m", text) and "[the" not in text
    assert "\x1b[32m" in text and "\x1b[92m" in text and "\x1b[90m" in text


def test_the_command_gives_scripts_the_tokens_and_the_counts(installation, dataset, model):
    dataset("conversational", {"a.jsonl": [chat("the cat"), chat("yes", "why? " * 30)]})
    shown = installation.json("dataset", "preview", "data", "--model", "tiny", "--max-seq-length", "40")
    assert (shown["dataset"], shown["model"], shown["max_seq_length"]) == ("data", "tiny", 40)
    first, second = shown["rows"]
    assert first.keys() == {
        "file", "line", "status", "reason", "length", "token_count", "supervised_count", "tokens",
    }  # fmt: skip
    assert first["tokens"][-1] == {"id": first["tokens"][-1]["id"], "text": "<|im_end|>", "learned": True}
    assert second["status"] == "dropped"
    assert shown["totals"] == {
        "kept": 1, "truncated": 0, "dropped": 1, "rejected": 0,
        "token_count": first["token_count"], "supervised_count": first["supervised_count"],
    }  # fmt: skip


def test_the_programs_errors_and_their_exit_codes_are_the_commands(installation, dataset, model, program):
    words = ("dataset", "preview", "data", "--model", "tiny")
    dataset("text", {"a.jsonl": [{"text": "a"}]})
    before = installation.everything()
    done = installation.run(*words, "--row", "b.jsonl:1", check=3)
    assert done.stderr == "Error: the dataset has no file 'b.jsonl'\nIt has a.jsonl.\n"
    assert "is not FILE:LINE" in installation.run(*words, "--row", "b.jsonl", check=2).stderr
    assert "max_seq_length 9999 is not between" in installation.run(*words, "--max-seq-length", "9999", check=5).stderr
    installation.configure(environments={"train": "/nowhere/python"})
    assert "/nowhere/python, cannot be run: No such file" in installation.run(*words, check=5).stderr
    installation.configure(environments={"train": str(program("python", "echo no torch here >&2; exit 1"))})
    done = installation.run(*words, check=1)
    assert "no torch here" in done.stderr and "previewing ended with exit code 1" in done.stderr
    installation.configure(environments={"train": str(program("python", "kill -9 $$"))})
    assert "was killed by SIGKILL" in installation.run(*words, check=1).stderr
    assert installation.everything() == before


def test_an_environment_without_the_packages_is_named(installation, dataset, model, tmp_path):
    dataset("text", {"a.jsonl": [{"text": "a"}]})
    (tmp_path / "tokenizers.py").write_text("raise ModuleNotFoundError(name='tokenizers')")
    done = installation.run(
        "dataset", "preview", "data", "--model", "tiny", check=5, PYTHONPATH=f"{tmp_path}:{REPOSITORY}"
    )
    assert "the training environment lacks the Python package tokenizers" in done.stderr
    assert "tfslurm[train]" in done.stderr
