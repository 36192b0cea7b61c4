"""Several processes must find what one finds that looks at each line by itself."""

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from dataset_rows import ROWS
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checks import ANSWER, BAD, CALL, USER, WARNED, chat

from tfslurm.artifacts.publish import remove_tree
from tfslurm.datasets import files, report, scan, validation
from tfslurm.datasets.files import discover
from tfslurm.datasets.ingest import ingest
from tfslurm.datasets.validation import Validator, validate
from tfslurm.errors import EndedBadly, InvalidError, UnreachableError


@contextmanager
def limits(*, chunk, block, longest=files.MAX_LINE, remembered=report.DUPLICATES_REMEMBERED):
    """Tiny limits, so that small files are cut anywhere and shared by processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "CHUNK", chunk)
        patch.setattr(scan, "BLOCK", block)
        patch.setattr(scan, "SMALL", -1)
        patch.setattr(files, "MAX_LINE", longest)
        patch.setattr(validation, "MAX_LINE", longest)
        patch.setattr(report, "DUPLICATES_REMEMBERED", remembered)
        yield


def line_by_line(source, format, field_map=None):
    validator = Validator(format, field_map or {})
    found = discover(source)
    validator.note_files(found)
    for file in found.files:
        validator.check_file(file.path, file.name)
    return validator.report()


def encoded(value, spaces):
    if isinstance(value, bytes):
        return value
    return json.dumps(value, ensure_ascii=spaces, separators=None if spaces else (",", ":")).encode()


ODD = {
    "conversational": [
        ROWS["conversational"],
        chat(USER, {**ANSWER, "content": 'she said "no" \\'}),
        chat({"role": "system", "content": "be é brief"}, USER, ANSWER, USER, {**ANSWER, "content": "fin →"}),
        chat(USER, {**ANSWER, "weight": 0}),
        chat(
            USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "1"}, ANSWER
        ),
        chat(USER, ANSWER, id=3),
        b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}],"messages":[]}',
        b'{"messages":[{"role":"user","role":"user","content":"a"},{"role":"assistant","content":"b"}]}',
        b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}',
        b"]}",
        b'{"messages":[{"role":"user","content":"a"},',
        b'{"role":"assistant","content":"b"}]}',
    ],
    "text": [
        ROWS["text"],
        {"text": "x" * 150},
        {"text": ""},
        {"text": "b", "id": 1},
        b'{"text": "a", "text": "b"}',
        b'{"text":',
        b'"a"}',
        b'{"text": "a"}{"text": "b"}',
        b'{"text": "a"} {"text": "c"}',
        b'{"text": "a"}\r{"text": "c"}',
        b'  {"text": "indented"}',
        b'{"text": "trailing"} ',
        b'{"text": "a", "b": "\xff"}',
        b"[]",
    ],
}
LINES = {
    format: [*odd, *(line for at, line, *_ in BAD + WARNED if at == format and len(encoded(line, True)) < 1000)]
    for format, odd in ODD.items()
}
BREAKS = [b"\n", b"\n", b"\n", b"\n", b"\r\n", b"\n\n", b"\n \n", b" \n", b"\n\x0c\n", b"\r"]


@st.composite
def contents(draw, format):
    lines = draw(
        st.lists(st.tuples(st.sampled_from(LINES[format]), st.booleans(), st.sampled_from(BREAKS)), max_size=30)
    )
    data = b"".join(encoded(value, spaces) + end for value, spaces, end in lines)
    if draw(st.booleans()):
        data = b"\xef\xbb\xbf" + data
    return data.rstrip(b"\n") if draw(st.booleans()) else data


@settings(deadline=None)
@given(
    data=st.data(),
    format=st.sampled_from(list(LINES)),
    chunk=st.integers(1, 2000),
    block=st.integers(1, 500),
    longest=st.sampled_from([40, 100, files.MAX_LINE]),
    remembered=st.sampled_from([0, 3, report.DUPLICATES_REMEMBERED]),
)
def test_pieces_of_any_size_give_the_report_of_line_by_line(data, format, chunk, block, longest, remembered):
    with (
        tempfile.TemporaryDirectory() as name,
        limits(chunk=chunk, block=block, longest=longest, remembered=remembered),
    ):
        folder = Path(name)
        for file in data.draw(
            st.lists(st.sampled_from(["a.jsonl", "b.jsonl.gz", "c/d.jsonl"]), unique=True, min_size=1)
        ):
            path = folder / file
            path.parent.mkdir(exist_ok=True)
            content = data.draw(contents(format))
            path.write_bytes(gzip.compress(content) if file.endswith(".gz") else content)
        assert validate(folder, format, workers=1) == line_by_line(folder, format)


@settings(deadline=None, max_examples=25)
@given(data=st.data(), format=st.sampled_from(list(LINES)), chunk=st.integers(100, 3000), workers=st.integers(2, 3))
def test_several_processes_give_the_report_of_line_by_line(data, format, chunk, workers):
    with tempfile.TemporaryDirectory() as name, limits(chunk=chunk, block=200, longest=200):
        folder = Path(name)
        (folder / "a.jsonl").write_bytes(b"".join(data.draw(contents(format)) + b"\n" for _ in range(3)))
        (folder / "b.jsonl.gz").write_bytes(gzip.compress(data.draw(contents(format))))
        (folder / "c.jsonl").write_bytes(data.draw(contents(format)))
        assert validate(folder, format, workers=workers) == line_by_line(folder, format)


MISLEADING = {
    "two rows in a line, and a blank line": [b'{"text": "a"}{"text": "bb"}', b'{"text": "ccc"}', b""],
    "two rows in a line": [b'{"text": "a"} {"text": "bb"}', b'{"text": "ccc"}', b'{"text": "dddd"}'],
    "a row that starts in the line before": [b'{"text": "a"}{', b'"text": "bb"}'],
    "a row that ends in the next line": [b'{"text": "a"', b'}{"text": "bb"}', b'{"text": "ccc"}'],
    "rows that are shifted": [b'{"text":', b'"a"}{"text": "bb"}{"text": "ccc"}', b'{"text": "dddd"}'],
    "carriage returns between": [b'{"text": "a"}\r{"text": "bb"}', b'{"text": "ccc"}', b""],
    "line ends of two kinds": [b'{"text": "a"}', b'{"text": "a"}\r', b'{"text": "a"}'],
    "a carriage return in a row": [b'{"text":\r"a"}', b'{"text":\r"a"}\r', b'{"text":\r"a"}'],
}


@pytest.mark.parametrize("lines", MISLEADING.values(), ids=MISLEADING)
def test_rows_that_the_decoder_would_pair_with_other_lines_are_found(write, lines):
    plain = [b'{"text": "row %d"}' % number for number in range(3)]
    folder = write(*plain, *lines, *plain)
    assert validate(folder, "text", workers=1) == line_by_line(folder, "text")


def many_rows(folder, count=3000, seed=1):
    """Good and bad chats with duplicates, one far longer than the rest; several files of all kinds."""
    draw = random.Random(seed)
    lines = [encoded(draw.choice(LINES["conversational"]), draw.random() < 0.5) for _ in range(count)]
    lines += [encoded(chat(USER, {**ANSWER, "content": f"answer {draw.randrange(900)}"}), True) for _ in range(count)]
    lines.append(encoded(chat(USER, {**ANSWER, "content": "x" * 5000}), True))
    draw.shuffle(lines)
    folder.mkdir()
    (folder / "big.jsonl").write_bytes(b"\n".join(lines))
    (folder / "crlf.jsonl").write_bytes(b"\r\n".join(lines[:200]))
    (folder / "empty.jsonl").touch()
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines[:1500])))
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines))[:-200])
    return folder


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_a_folder_of_all_kinds_gives_the_same_report_with_any_number_of_processes(tmp_path, workers):
    folder = many_rows(tmp_path / "source")
    expected = line_by_line(folder, "conversational")
    assert expected.bad_rows and expected.warnings["duplicate_row"] and expected.warnings["far_longer_than_the_rest"]
    assert expected.errors["damaged_compression"] == 1
    seen = []
    with limits(chunk=10_000, block=1000):
        assert validate(folder, "conversational", workers=workers, progress=lambda *at: seen.append(at)) == expected
    total = sum(path.stat().st_size for path in folder.iterdir())
    assert seen == sorted(seen) and seen[-1] == (total, total)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_an_ingested_folder_is_the_same_with_any_number_of_processes(tmp_path, workers):
    folder = tmp_path / "source"
    folder.mkdir()
    lines = [b'{"text": "row %d"}\n' % number for number in range(5000)]
    for name, count in {"a": 500, "b": 4000, "c": 300, "e": 1}.items():
        (folder / f"{name}.jsonl").write_bytes(b"".join(lines[:count]).rstrip(b"\n"))
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(b"".join(lines)))
    with limits(chunk=4096, block=512):
        done = ingest(folder, tmp_path / "staging", format="text", workers=workers)
    assert done.report == line_by_line(folder, "text")
    for entry in done.manifest.entries:
        copied = (tmp_path / "staging" / entry.path).read_bytes()
        assert copied == (folder / entry.path).read_bytes()
        assert (entry.size, entry.sha256) == (len(copied), hashlib.sha256(copied).hexdigest())
    assert_no_children()


def test_a_few_kilobytes_start_no_process(tmp_path, write, monkeypatch):
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    ingest(
        write(*[ROWS["text"] | {"text": f"row {n}"} for n in range(1000)]),
        tmp_path / "staging",
        format="text",
        workers=2,
    )


def assert_no_children():
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.fixture
def large(write):
    """A file of many parts, and its folder."""
    return write(*[{"text": f"row {number}"} for number in range(20_000)])


def test_a_killed_worker_is_a_clear_error_and_leaves_nothing(tmp_path, large, monkeypatch):
    monkeypatch.setenv("TFSLURM_FAULT", "scan-part-read")
    with limits(chunk=4096, block=512), pytest.raises(EndedBadly, match="was killed by SIGKILL"):
        ingest(large, tmp_path / "staging", format="text", workers=2)
    assert not (tmp_path / "staging").exists()
    assert_no_children()


def test_a_stopped_ingest_leaves_no_process_and_no_file(tmp_path, large):
    def stop(done, total):
        raise EndedBadly("stopped")

    with limits(chunk=4096, block=512), pytest.raises(EndedBadly, match="stopped"):
        ingest(large, tmp_path / "staging", format="text", progress=stop, workers=2)
    assert not (tmp_path / "staging").exists()
    assert_no_children()


@pytest.mark.parametrize("change", ["append", "overwrite", "truncate"])
def test_a_file_in_parts_that_changes_meanwhile_is_an_error(tmp_path, large, change):
    path, changed = large / "a.jsonl", []

    def meanwhile(done, total):
        if changed:
            return
        changed.append(change)
        with open(path, "ab" if change == "append" else "r+b") as file:
            file.truncate(8000) if change == "truncate" else file.write(b'{"text": "x"}')

    with limits(chunk=4096, block=512), pytest.raises(InvalidError, match="changed while it was read"):
        ingest(large, tmp_path / "staging", format="text", progress=meanwhile, workers=2)
    assert not (tmp_path / "staging").exists()
    assert_no_children()


def test_a_disk_that_fills_up_in_a_worker_is_a_clear_error(tmp_path, large):
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", small]).returncode:
        pytest.skip("mounting a small filesystem needs root: a disk full in a worker was NOT tried")

    def take_all_room(done, total):
        with open(small / "other", "ab", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(b"x" * 4096)

    try:
        with limits(chunk=4096, block=512), pytest.raises(UnreachableError, match="disk is full"):
            ingest(large, small / "staging", format="text", progress=take_all_room, workers=2)
        assert os.listdir(small) == ["other"]
        (small / "other").unlink()
        with limits(chunk=4096, block=512):
            ingest(large, small / "staging", format="text", workers=2)
        remove_tree(small / "staging")
        assert_no_children()
    finally:
        subprocess.run(["umount", small], check=True)


SLOW = """
import sys, time
from pathlib import Path
from tfslurm.datasets import scan
from tfslurm.datasets.ingest import ingest
scan.CHUNK, scan.SMALL = 4096, -1
def progress(done, total):
    print(done, flush=True)
    time.sleep(60)
ingest(Path(sys.argv[1]), Path(sys.argv[2]), format="text", progress=progress, workers=2)
"""


def test_workers_end_with_a_killed_parent(tmp_path, large):
    command = [sys.executable, "-c", SLOW, str(large), str(tmp_path / "staging")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as parent:
        assert parent.stdout.readline()
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        deadline = time.monotonic() + 10
        while _group_lives(parent.pid):
            assert time.monotonic() < deadline, "a worker outlived its parent"
            time.sleep(0.05)


def _group_lives(group):
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgid = stat.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(pgid) == group and state not in "ZX":
            return True
    return False
