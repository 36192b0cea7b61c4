import os
import socket
import subprocess

import pytest
from dataset_rows import ROWS

from tfslurm.datasets.files import discover, expand
from tfslurm.datasets.ingest import ingest
from tfslurm.errors import InvalidError, ValidationError


def refused(folder, tmp_path):
    """(file, check) of each refusal, having made sure that nothing was staged and the source is untouched."""
    before = sorted(os.listdir(os.fsencode(folder)))
    with pytest.raises(ValidationError) as caught:
        ingest(folder, tmp_path / "staging", format="text")
    assert not (tmp_path / "staging").exists()
    assert sorted(os.listdir(os.fsencode(folder))) == before
    return [(error["file"], error["check"]) for error in caught.value.report["first_errors"]]


def test_data_is_found_in_subfolders_in_bytewise_order_and_hidden_names_are_ignored(write):
    for name in (
        "b/a.jsonl",
        "b.jsonl",
        "Z.jsonl.gz",
        "c.jsonl.zst",
        ".hidden.jsonl",
        ".git/a.jsonl",
        "MANIFEST.sha256",
    ):
        folder = write(name=name)
    found = discover(folder)
    assert [file.name for file in found.files] == ["Z.jsonl.gz", "b.jsonl", "b/a.jsonl", "c.jsonl.zst"]
    assert sorted(found.ignored) == [".git", ".hidden.jsonl", "MANIFEST.sha256"]
    assert found.problems == []


def test_a_symbolic_link_to_a_file_is_refused(write, tmp_path):
    folder = write(ROWS["text"])
    (folder / "b.jsonl").symlink_to("/etc/passwd")
    assert refused(folder, tmp_path) == [("b.jsonl", "symbolic_link")]


def test_a_symbolic_link_to_a_folder_is_refused(write, tmp_path):
    folder = write(ROWS["text"])
    (folder / "sub").symlink_to(tmp_path)
    assert refused(folder, tmp_path) == [("sub", "symbolic_link")]


def test_a_fifo_is_refused_without_waiting_for_a_writer(write, tmp_path):
    folder = write(ROWS["text"])
    os.mkfifo(folder / "b.jsonl")
    assert refused(folder, tmp_path) == [("b.jsonl", "special_file")]


def test_a_socket_is_refused(write, tmp_path):
    folder = write(ROWS["text"])
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "b.jsonl"))
        assert refused(folder, tmp_path) == [("b.jsonl", "special_file")]


@pytest.mark.skipif(os.geteuid() != 0, reason="making a device needs root: devices were NOT tried")
def test_a_device_is_refused(write, tmp_path):
    folder = write(ROWS["text"])
    os.mknod(folder / "b.jsonl", 0o20600, os.makedev(1, 5))
    assert refused(folder, tmp_path) == [("b.jsonl", "special_file")]


def test_a_hard_link_is_refused(write, tmp_path):
    folder = write(ROWS["text"])
    os.link(folder / "a.jsonl", tmp_path / "other.jsonl")
    assert refused(folder, tmp_path) == [("a.jsonl", "hard_link")]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root: a filesystem inside the folder was NOT tried")
def test_a_filesystem_mounted_inside_is_refused(write, tmp_path):
    folder = write(ROWS["text"], name="sub/a.jsonl")
    if subprocess.run(["mount", "-t", "tmpfs", "none", folder / "sub"]).returncode:
        pytest.skip("mount is not allowed here: a filesystem inside the folder was NOT tried")
    try:
        write(ROWS["text"], name="sub/b.jsonl")
        found = discover(folder)
    finally:
        subprocess.run(["umount", folder / "sub"], check=True)
    assert {problem.check for problem in found.problems} == {"other_filesystem"}
    assert found.files == []


@pytest.mark.parametrize(
    ("name", "check"),
    [
        (b"\xff.jsonl", "name_not_utf8"),
        (b"a\nb.jsonl", "name_control_character"),
        (b"a\\b.jsonl", "name_control_character"),
        (b"a.csv", "unsupported_file"),
        (b"notes.txt", "unsupported_file"),
        (b"README.md", "unsupported_file"),
        (b"data.parquet", "unsupported_file"),
        (b"data.zip", "unsupported_file"),
        (b"one.json", "unsupported_file"),
        (b"a.JSONL", "unsupported_file"),
    ],
)
def test_other_files_are_refused_by_name(write, tmp_path, name, check):
    folder = write(ROWS["text"])
    with open(os.path.join(os.fsencode(folder), name), "wb") as file:
        file.write(b'{"text": "x"}\n')
    assert [found for _, found in refused(folder, tmp_path)] == [check]


@pytest.mark.parametrize("other", ["A.jsonl", "sub/B.jsonl", "SUB/c.jsonl"])
def test_names_that_differ_only_in_case_are_refused(write, tmp_path, other):
    write(ROWS["text"])
    write(ROWS["text"], name="sub/b.jsonl")
    folder = write(ROWS["text"], name=other)
    assert {check for _, check in refused(folder, tmp_path)} == {"case_clash"}


def test_names_that_differ_only_in_the_accents_encoding_are_refused(write, tmp_path):
    write(ROWS["text"], name="\u00e9.jsonl")
    folder = write(ROWS["text"], name="e\u0301.jsonl")
    assert [check for _, check in refused(folder, tmp_path)] == ["case_clash"]


def test_a_file_that_was_replaced_since_it_was_found_is_not_opened(write, tmp_path):
    folder = write(ROWS["text"], name="sub/a.jsonl")
    (file,) = discover(folder).files
    (folder / "sub/a.jsonl").rename(tmp_path / "was.jsonl")
    (folder / "sub/a.jsonl").symlink_to(tmp_path / "was.jsonl")
    with pytest.raises(InvalidError, match="replaced or removed"):
        file.open()
    (folder / "sub").rename(folder / "was")
    (folder / "sub").symlink_to("was")
    with pytest.raises(InvalidError, match="replaced or removed"):
        file.open()


def test_a_source_may_be_a_file_a_link_to_one_a_glob_or_a_list(write, tmp_path):
    write(ROWS["text"], name="x/a.jsonl")
    folder = write(ROWS["text"], name="y/a.jsonl")
    link = tmp_path / "link.jsonl"
    link.symlink_to(folder / "x/a.jsonl")
    assert [file.name for file in discover(folder / "x/a.jsonl").files] == ["a.jsonl"]
    assert [file.name for file in discover(link).files] == ["link.jsonl"]
    assert [file.name for file in discover(expand(f"{folder}/*/a.jsonl")).files] == ["x/a.jsonl", "y/a.jsonl"]
    assert [file.name for file in discover([folder / "x", folder / "y/a.jsonl"]).files] == ["x/a.jsonl", "y/a.jsonl"]
    assert expand(folder) == [folder]
    with pytest.raises(InvalidError, match="no such file"):
        expand(f"{folder}/*.nothing")
