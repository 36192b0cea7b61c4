import json
import os
import signal
import stat

import pytest
from dataset_rows import ROWS

from tfslurm.artifacts.manifest import MANIFEST, verify_folder
from tfslurm.catalog import queries
from tfslurm.datasets import registry
from tfslurm.datasets.sealing import seal, staging_of
from tfslurm.errors import StatusError, ValidationError

CONVERSATION = '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}\n'


def folders(installation):
    """The names below datasets/ and assembling/."""
    return {name: sorted(os.listdir(installation.root.path / name)) for name in ("datasets", "assembling")}


@pytest.mark.parametrize("format", ROWS)
def test_each_format_is_sealed_read_only_with_its_report(installation, format):
    made = registry.create(installation.settings, "mine", format, {})
    folder = installation.root.assembling(made.artifact_id)
    (folder / "sub").mkdir()
    for name in ("b.jsonl", "sub/a.jsonl"):
        (folder / name).write_text(json.dumps(ROWS[format]) + "\n")
    sealed = seal(installation.settings, made)
    row = queries.find_dataset("mine")
    final = installation.root.dataset(made.artifact_id)
    assert row.artifact.status == sealed.artifact.status == "ready"
    assert (row.artifact.location, row.row_count, row.artifact.file_count) == (str(final), 2, 2)
    assert row.metadata["rows"] == 2
    verify_folder(final, row.artifact.digest)
    for path in (final, *final.rglob("*")):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o222
    assert folders(installation) == {"datasets": [made.artifact_id], "assembling": []}


def test_the_same_bytes_have_the_same_digest_and_others_another(installation):
    one, two = installation.dataset("one"), installation.dataset("two")
    other = installation.dataset("other", rows=CONVERSATION)
    assert one.artifact.digest == two.artifact.digest != other.artifact.digest


def test_bad_rows_leave_it_assembling_as_it_was_and_mended_it_is_sealed(installation):
    made = installation.dataset(ready=False, rows='{"messages": 3}\n')
    before = installation.everything()
    with pytest.raises(ValidationError) as caught:
        seal(installation.settings, made)
    assert caught.value.report["bad_rows"] == 1
    assert installation.everything() == before
    file = installation.root.assembling(made.artifact_id) / "a.jsonl"
    file.write_text(CONVERSATION)
    assert seal(installation.settings, made).artifact.status == "ready"


def test_an_empty_dataset_is_not_sealed(installation):
    made = registry.create(installation.settings, "empty", "text", {})
    before = installation.everything()
    with pytest.raises(ValidationError):
        seal(installation.settings, made)
    assert installation.everything() == before


def test_sealing_twice_changes_nothing(installation):
    made = installation.dataset()
    before = installation.everything()
    assert seal(installation.settings, made).artifact.status == "ready"
    assert installation.everything() == before


@pytest.mark.parametrize("status", ["error", "deleted"])
def test_only_an_assembling_dataset_is_sealed(installation, status):
    made = installation.dataset(ready=False)
    registry.Artifact.update(status=status).execute()
    before = installation.everything()
    with pytest.raises(StatusError, match=f"is {status}: it cannot be sealed"):
        seal(installation.settings, made)
    assert installation.everything() == before


@pytest.mark.parametrize(
    "point",
    ["ingest-copied", "ingest-validated", "ingest-listed", "publish-synced", "publish-read-only", "publish-renamed"],
)
def test_a_sealing_that_is_killed_anywhere_is_done_by_the_next(installation, point):
    made = installation.dataset(ready=False)
    killed = installation.run("dataset", "seal", "chats", TFSLURM_FAULT=point)
    assert killed.returncode == -signal.SIGKILL
    assert queries.find_dataset("chats").artifact.status == "assembling"
    assert (installation.root.assembling(made.artifact_id) / "a.jsonl").exists()
    sealed = seal(installation.settings, made)
    verify_folder(installation.root.dataset(made.artifact_id), sealed.artifact.digest)
    assert folders(installation) == {"datasets": [made.artifact_id], "assembling": []}


def test_progress_reaches_the_total(installation):
    made = installation.dataset(ready=False)
    seen = []
    seal(installation.settings, made, lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_dataset_deleted_while_it_is_sealed_does_not_become_ready(installation, monkeypatch):
    from tfslurm.datasets import sealing

    made = installation.dataset(ready=False)
    publish = sealing.publish

    def delete_first(*arguments):
        registry.delete(queries.find_dataset("chats"))
        return publish(*arguments)

    monkeypatch.setattr(sealing, "publish", delete_first)
    with pytest.raises(StatusError, match="no longer assembling"):
        seal(installation.settings, made)
    assert queries.find_dataset("chats", deleted=True).artifact.status == "deleted"


def test_what_a_stranger_left_in_the_staging_folder_is_not_sealed(installation):
    made = installation.dataset(ready=False)
    staging = staging_of(installation.root, made.artifact_id)
    staging.mkdir()
    (staging / "stray.jsonl").write_text("{}\n")
    sealed = seal(installation.settings, made)
    final = installation.root.dataset(made.artifact_id)
    assert sorted(os.listdir(final)) == [MANIFEST, "a.jsonl"]
    assert sealed.artifact.file_count == 1
