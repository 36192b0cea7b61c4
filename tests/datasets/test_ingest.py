import gzip
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys

import pytest
from dataset_rows import ROWS

from tfslurm.artifacts import manifest
from tfslurm.artifacts.publish import publish, remove_tree
from tfslurm.datasets import copying, scan
from tfslurm.datasets.formats import read_rows
from tfslurm.datasets.ingest import ingest
from tfslurm.errors import InvalidError, UnreachableError, ValidationError


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_becomes_a_staged_copy_with_manifest_and_report(write, tmp_path):
    write(ROWS["text"], {"text": "b"}, name="a.jsonl")
    folder = write(ROWS["text"], name="sub/b.jsonl")
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "c"}\n'))
    (folder / ".DS_Store").write_bytes(b"x")
    before, seen = tree(folder), []
    done = ingest(folder, tmp_path / "staging", format="text", progress=lambda *at: seen.append(at))
    staged = tree(tmp_path / "staging")
    assert staged.pop("MANIFEST.sha256") == done.manifest.encode()
    assert staged == {name: data for name, data in before.items() if name != ".DS_Store"}
    assert [(e.path, e.sha256) for e in done.manifest.entries] == [
        (name, hashlib.sha256(staged[name]).hexdigest()) for name in sorted(staged)
    ]
    assert (done.report.rows, done.report.ok, done.report.files) == (4, True, 3)
    assert done.report.warnings == {"hidden_file": 1, "duplicate_row": 1}
    assert tree(folder) == before
    total = sum(map(len, staged.values()))
    assert seen[-1] == (total, total) and seen == sorted(seen)


def test_the_staged_inode_is_new_and_nobody_elses(write, tmp_path):
    folder = write(ROWS["text"])
    with open(folder / "a.jsonl", "r+b") as held:
        ingest(folder, tmp_path / "staging", format="text")
        held.write(b"XXXXXX")
    staged = tmp_path / "staging/a.jsonl"
    assert json.loads(staged.read_bytes()) == ROWS["text"]
    assert stat.S_IMODE(staged.stat().st_mode) == 0o600
    assert stat.S_IMODE(staged.parent.stat().st_mode) == 0o700


def test_a_field_map_leaves_the_bytes_alone(write, tmp_path):
    folder = write({"question": "q", "answer": "a"})
    field_map = {"prompt": "question", "response": "answer"}
    ingest(folder, tmp_path / "staging", format="instruction", field_map=field_map)
    assert (tmp_path / "staging/a.jsonl").read_bytes() == (folder / "a.jsonl").read_bytes()
    assert [row.response for row in read_rows(tmp_path / "staging", "instruction", field_map)] == ["a"]


def test_rows_that_fail_leave_no_staging_and_the_source_untouched(write, tmp_path):
    folder = write(ROWS["text"], {"text": 3})
    before = tree(folder)
    with pytest.raises(ValidationError, match=r"a\.jsonl:2: \$\.text: ") as caught:
        ingest(folder, tmp_path / "staging", format="text")
    assert caught.value.report["errors"] == {"field_type": 1}
    assert not (tmp_path / "staging").exists()
    assert tree(folder) == before


def test_what_a_killed_attempt_left_is_replaced(write, tmp_path):
    staging = tmp_path / "staging"
    (staging / "old").mkdir(parents=True)
    (staging / "old/part.jsonl").write_text("half")
    ingest(write(ROWS["text"]), staging, format="text")
    assert set(tree(staging)) == {"a.jsonl", "MANIFEST.sha256"}


@pytest.mark.parametrize("change", ["append", "overwrite", "replace", "truncate"])
def test_a_file_that_changes_while_it_is_copied_is_an_error(write, tmp_path, monkeypatch, change):
    monkeypatch.setattr(scan, "CHUNK", 4096)
    folder = write(*[{"text": f"row {number}"} for number in range(1000)])
    path, changed = folder / "a.jsonl", []

    def meanwhile(done, total):
        if changed:
            return
        changed.append(change)
        if change == "replace":
            path.rename(folder / ".was")
            path.write_bytes(b"{}")
        else:
            with open(path, "ab" if change == "append" else "r+b") as file:
                file.truncate(8000) if change == "truncate" else file.write(b'{"text": "x"}')

    with pytest.raises(InvalidError, match="changed while it was read"):
        ingest(folder, tmp_path / "staging", format="text", progress=meanwhile)
    assert changed
    assert not (tmp_path / "staging").exists()


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(write, tmp_path, monkeypatch):
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", small]).returncode:
        pytest.skip("mounting a small filesystem needs root: a full disk was NOT tried")
    try:
        folder = write(*[{"text": "x" * 1000 + str(number)} for number in range(900)])
        (small / "other").write_bytes(b"x" * 300_000)
        with pytest.raises(UnreachableError, match="bytes are needed"):
            ingest(folder, small / "staging", format="text")
        assert os.listdir(small) == ["other"]

        (small / "other").unlink()
        one = write({"text": "y" * 600_000}, name="b.jsonl") / "b.jsonl"
        monkeypatch.setattr(scan, "CHUNK", 65536)
        with pytest.raises(UnreachableError, match="disk is full"):
            ingest(one, small / "staging", format="text", progress=take_all_room(small))
        assert os.listdir(small) == ["other"]
        (small / "other").unlink()
        ingest(one, small / "staging", format="text")
        assert (small / "staging/MANIFEST.sha256").exists()
    finally:
        subprocess.run(["umount", small], check=True)


def take_all_room(small):
    """A progress callback that takes all room that is left, the first time it is called."""
    called = []

    def progress(done, total):
        if called:
            return
        called.append(True)
        with open(small / "other", "wb", buffering=0) as file:
            with pytest.raises(OSError):
                while True:
                    file.write(b"x" * 4096)

    return progress


def test_blocks_are_shared_where_the_filesystem_can_and_the_inode_is_new(tmp_path, write):
    if os.geteuid() or not shutil.which("mkfs.xfs"):
        pytest.skip("making an XFS needs root and xfsprogs: sharing blocks was NOT tried")
    image, disk = tmp_path / "image", tmp_path / "disk"
    image.touch()
    os.truncate(image, 400 * 1024 * 1024)
    disk.mkdir()
    subprocess.run(["mkfs.xfs", "-q", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, disk]).returncode:
        pytest.skip("mounting an image is not allowed here: sharing blocks was NOT tried")
    try:
        source = disk / "a.jsonl"
        shutil.copyfile(write(*[{"text": f"row {number}"} for number in range(10_000)]) / "a.jsonl", source)
        with open(source, "rb") as opened, open(disk / "clone", "wb") as cloned:
            assert copying.clone(opened.fileno(), cloned.fileno())
        done = ingest(source, disk / "staging", format="text")
        assert done.manifest.entries[0].sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
        assert (disk / "staging/a.jsonl").stat().st_ino != source.stat().st_ino
        with open(source, "r+b") as file:
            file.write(b"XXXX")
        assert (disk / "staging/a.jsonl").read_bytes().startswith(b'{"text"')
    finally:
        subprocess.run(["umount", disk], check=True)


SCRIPT = """
import sys
from pathlib import Path
from tfslurm.artifacts.publish import publish
from tfslurm.datasets.ingest import ingest
source, home = Path(sys.argv[1]), Path(sys.argv[2])
if not (home / "final").exists():
    ingest(source, home / "staging", format="text")
publish(home / "staging", home / "final")
"""

FAULTS = [
    "ingest-copied",
    "ingest-validated",
    "ingest-listed",
    "publish-synced",
    "publish-read-only",
    "publish-renamed",
]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_kill_at_any_step_publishes_nothing_by_half_and_the_next_try_ends_well(write, tmp_path, fault):
    write({"text": "b"}, name="sub/b.jsonl")
    source, home = write(ROWS["text"]), tmp_path / "home"
    home.mkdir()
    before = tree(source)
    command = [sys.executable, "-c", SCRIPT, str(source), str(home)]
    killed = subprocess.run(command, env={**os.environ, "TFSLURM_FAULT": fault})
    assert killed.returncode == -signal.SIGKILL
    assert tree(source) == before
    if fault == "publish-renamed":
        manifest.verify_folder(home / "final", manifest.read(home / "final").digest)
    else:
        assert not (home / "final").exists()
    subprocess.run(command, check=True)
    assert os.listdir(home) == ["final"]
    manifest.verify_folder(home / "final", manifest.read(home / "final").digest)
    assert [row.text for row in read_rows(home / "final", "text")] == [ROWS["text"]["text"], "b"]
    remove_tree(home / "final")


def test_the_published_dataset_is_the_same_whichever_way_it_came(write, tmp_path):
    folder = write(ROWS["text"])
    digests = set()
    for source in (folder, folder / "a.jsonl", [folder / "a.jsonl"]):
        ingest(source, tmp_path / "staging", format="text")
        digests.add(publish(tmp_path / "staging", tmp_path / "final").digest)
    assert len(digests) == 1
    remove_tree(tmp_path / "final")
