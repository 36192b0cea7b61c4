import os
import time

import pytest

from tfslurm.artifacts import manifest
from tfslurm.artifacts.identity import record, verify_quick
from tfslurm.artifacts.publish import publish, remove_tree
from tfslurm.errors import InvalidError

DAY = 86_400


@pytest.fixture
def published(tmp_path):
    staging = tmp_path / "staging"
    (staging / "sub").mkdir(parents=True)
    (staging / "a.jsonl").write_bytes(b"a" * 1000)
    (staging / "sub/b.jsonl").write_bytes(b"b" * 1000)
    manifest.write(manifest.build(staging), staging)
    digest = publish(staging, tmp_path / "final").digest
    yield tmp_path / "final", digest, tmp_path / "identities.json"
    remove_tree(tmp_path / "final")


def change(folder, data=b"x", *, keep_mtime=True):
    """Overwrite a byte of a.jsonl, as someone with the rights could, its mtime set back."""
    path = folder / "a.jsonl"
    status = path.stat()
    path.chmod(0o644)
    with open(path, "r+b") as file:
        file.write(data)
    path.chmod(0o444)
    if keep_mtime:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_files_recorded_after_publishing_are_not_read_again(published):
    folder, digest, path = published
    record(folder, digest, path)
    seen = []
    assert verify_quick(folder, digest, path, DAY, progress=lambda *at: seen.append(at)) is False
    assert seen == []


def test_without_a_record_all_bytes_are_read_once(published):
    folder, digest, path = published
    assert verify_quick(folder, digest, path, DAY) is True
    assert verify_quick(folder, digest, path, DAY) is False


def test_after_the_set_age_all_bytes_are_read_again(published):
    folder, digest, path = published
    record(folder, digest, path)
    later = time.time() + DAY + 1
    assert verify_quick(folder, digest, path, DAY, now=lambda: later) is True
    assert verify_quick(folder, digest, path, DAY, now=lambda: later + 1) is False
    assert verify_quick(folder, digest, path, DAY, now=lambda: later - DAY) is True  # verified in the future: no
    assert verify_quick(folder, digest, path, 0) is True


def test_a_changed_byte_is_found_though_size_and_mtime_are_the_same(published):
    folder, digest, path = published
    record(folder, digest, path)
    change(folder)
    for _ in range(2):
        with pytest.raises(InvalidError, match=r"a\.jsonl: its bytes have changed"):
            verify_quick(folder, digest, path, DAY)


def test_a_file_touched_but_the_same_is_read_once_more(published):
    folder, digest, path = published
    record(folder, digest, path)
    change(folder, b"a")
    assert verify_quick(folder, digest, path, DAY) is True
    assert verify_quick(folder, digest, path, DAY) is False


def test_a_change_while_all_is_read_is_not_taken_for_verified(published):
    folder, digest, path = published
    changed = []

    def meanwhile(done, total):
        if done == total and not changed:
            changed.append(True)
            change(folder)

    assert verify_quick(folder, digest, path, DAY, progress=meanwhile) is True
    assert not path.exists()
    with pytest.raises(InvalidError, match=r"a\.jsonl"):
        verify_quick(folder, digest, path, DAY)


def test_missing_and_added_files_and_another_manifest_are_found_without_reading(published):
    folder, digest, path = published
    record(folder, digest, path)
    with pytest.raises(InvalidError, match="not sha256:0 as recorded"):
        verify_quick(folder, "sha256:0", path, DAY)
    folder.chmod(0o755)
    (folder / "c.jsonl").touch()
    with pytest.raises(InvalidError, match=r"c\.jsonl: is not in the manifest"):
        verify_quick(folder, digest, path, DAY)
    (folder / "c.jsonl").unlink()
    (folder / "a.jsonl").unlink()
    with pytest.raises(InvalidError, match=r"a\.jsonl: is missing"):
        verify_quick(folder, digest, path, DAY)


FOREIGN = b'{"digest": "sha256:1", "verified_at": 1, "files": {}}'


@pytest.mark.parametrize("content", [b"", b"{}", b"[1", b"\xff", FOREIGN])
def test_a_damaged_or_foreign_record_means_reading_all(published, content):
    folder, digest, path = published
    path.write_bytes(content)
    assert verify_quick(folder, digest, path, DAY) is True
    assert verify_quick(folder, digest, path, DAY) is False


def test_where_the_record_cannot_be_written_the_bytes_are_verified_all_the_same(published):
    folder, digest, path = published
    path.parent.joinpath("file").touch()
    assert verify_quick(folder, digest, path.parent / "file/identities.json", DAY) is True
