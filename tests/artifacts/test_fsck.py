"""Every kind of damage is found, named with its cure, and mended where that is safe."""

import os
from datetime import timedelta

import pytest

from tfslurm.artifacts import trash
from tfslurm.artifacts.fsck import examine, repair
from tfslurm.artifacts.manifest import MANIFEST, verify_folder
from tfslurm.artifacts.publish import remove_tree
from tfslurm.artifacts.reclaim import reclaim
from tfslurm.catalog import queries
from tfslurm.catalog.models import Artifact, Checkpoint, Endpoint, Job, Submission, database, now
from tfslurm.datasets import registry

LATER = timedelta(days=2)


def found(installation, **options):
    options.setdefault("at", now() + LATER)
    return list(examine(installation.settings, **options))


def checks(findings):
    return [(finding.check, finding.ref) for finding in findings]


def overwrite(path, data):
    """Bytes that change on the disk: the mode does not matter to those."""
    mode = path.stat().st_mode
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(mode)


@pytest.fixture
def whole(installation):
    """A dataset of each status, a job with its checkpoint, an endpoint; the base model has its manifest."""
    from tfslurm.artifacts import manifest
    from tfslurm.catalog.models import BaseModel

    installation.completed()
    installation.endpoint()
    installation.dataset("draft", ready=False)
    registry.delete(installation.dataset("gone"))
    folder = installation.root.model("tiny")
    listed = manifest.build(folder)
    manifest.write(listed, folder)
    BaseModel.update(digest=listed.digest).execute()
    return installation


def test_nothing_is_found_where_nothing_is_wrong(whole):
    assert found(whole) == found(whole, full=True) == []
    assert whole.run("admin", "fsck", check=0).stdout == "nothing is wrong\n"
    assert whole.json("admin", "fsck", "--full") == []


def test_a_flipped_byte_is_found_by_reading_all_and_named(whole):
    dataset = queries.find_dataset("chats")
    file = whole.root.dataset(dataset.artifact_id) / "a.jsonl"
    data = file.read_bytes()
    overwrite(file, b"[" + data[1:])
    assert found(whole) == []
    (finding,) = found(whole, full=True)
    assert checks([finding]) == [("damaged", dataset.artifact_id)]
    assert f"{file}: its bytes have changed" in finding.said
    assert repair(finding).done is None
    (row,) = whole.json("admin", "fsck", "--full", "--repair", check=5)
    assert (row["repaired"], row["repairable"]) == (None, False) and "backup" in row["cure"]


@pytest.mark.parametrize("change", ["shorter", "missing", "added", "manifest"])
def test_a_change_that_names_sizes_and_digests_show_is_found_without_reading(whole, change):
    dataset = queries.find_dataset("chats")
    folder = whole.root.dataset(dataset.artifact_id)
    folder.chmod(0o755)
    if change == "shorter":
        overwrite(folder / "a.jsonl", b"{}")
    elif change == "missing":
        (folder / "a.jsonl").unlink()
    elif change == "added":
        (folder / "b.jsonl").write_text("{}")
    else:
        overwrite(folder / MANIFEST, (folder / MANIFEST).read_bytes().replace(b"  a.jsonl", b"  b.jsonl"))
    assert checks(found(whole)) == [("damaged", dataset.artifact_id)]


def test_a_ready_dataset_without_its_bytes_is_missing_and_taken_from_the_trash_if_it_is_there(whole):
    dataset = queries.find_dataset("chats")
    folder = whole.root.dataset(dataset.artifact_id)
    trash.discard(whole.root, folder, now())
    (finding,) = found(whole)
    assert checks([finding]) == [("missing", dataset.artifact_id)]
    assert repair(finding).done == "is back from the trash"
    verify_folder(folder, dataset.artifact.digest)
    assert folder.stat().st_mode & 0o777 == 0o555
    remove_tree(folder)
    (finding,) = found(whole)
    assert (finding.check, finding.mend) == ("missing", None)
    assert "backup" in finding.cure


@pytest.mark.parametrize("folder", ["datasets", "assembling", "imports", "checkpoints", "jobs", "endpoints", "models"])
def test_a_folder_without_a_row_is_an_orphan_and_repaired_into_the_trash(whole, folder):
    path = whole.root.path / folder / "ds-0000000000000000"
    path.mkdir()
    (path / "a").write_text("a")
    (path / "started.json").write_text("{}")
    assert found(whole, at=now()) == [], "it may be in the making"
    reclaim(whole.settings, at=now() + timedelta(days=400))
    assert path.exists(), "it may be all that is left of a lost row"
    (finding,) = found(whole)
    assert checks([finding]) == [("orphan", f"{folder}/ds-0000000000000000")]
    assert repair(finding).done == "is in the trash"
    assert not path.exists()
    assert found(whole) == []


def test_an_assembling_dataset_without_its_folder_gets_an_empty_one(whole):
    draft = queries.find_dataset("draft")
    remove_tree(whole.root.assembling(draft.artifact_id))
    (finding,) = found(whole)
    assert checks([finding]) == [("missing", draft.artifact_id)]
    assert repair(finding).done
    assert whole.root.assembling(draft.artifact_id).is_dir()
    assert found(whole) == []


def test_a_stale_part_is_found_a_day_after_reclaim_should_have_taken_it(whole):
    draft = queries.find_dataset("draft")
    part = whole.root.dataset(f".staging-{draft.artifact_id}")
    part.mkdir()
    assert found(whole, at=now() + timedelta(days=7.5)) == []
    (finding,) = found(whole, at=now() + timedelta(days=8.5))
    assert checks([finding]) == [("stale", f"datasets/.staging-{draft.artifact_id}")]
    assert repair(finding).done == "is in the trash"
    assert not part.exists()


def test_a_record_that_was_changed_or_lost_is_named(whole):
    job, endpoint = Job.get(), Endpoint.get()
    overwrite(whole.root.job(job.id).config, b"{}")
    whole.root.endpoint(endpoint.id).config.unlink()
    assert checks(found(whole)) == [("damaged", job.id), ("missing", endpoint.id)]


def test_a_base_model_that_is_not_the_one_that_was_added_is_named(whole):
    overwrite(whole.root.model("tiny") / "config.json", b'{"a": 1}')
    assert checks(found(whole)) == [("damaged", "tiny")]
    remove_tree(whole.root.model("tiny"))
    assert checks(found(whole)) == [("missing", "tiny")]


def test_a_job_that_nothing_follows_is_opened_for_sync_or_put_in_error(whole):
    lost, refused = whole.job("lost"), whole.job("refused")
    Submission.update(state="ended").where(Submission.object_id.in_([lost.id, refused.id])).execute()
    Submission.update(job_id="1:1", cluster=os.uname().nodename).where(Submission.object_id == lost.id).execute()
    findings = {finding.ref: finding for finding in found(whole)}
    assert {finding.check for finding in findings.values()} == {"status"}
    assert set(findings) == {lost.id, refused.id}
    assert "sync" in repair(findings[lost.id]).done
    assert repair(findings[refused.id]).done == "is in error"
    whole.sync()
    assert queries.find_job("lost").error.startswith("lost")
    assert queries.find_job("refused").error == "it was never handed over, or that was lost"
    assert found(whole) == []


def test_an_import_that_nothing_follows_is_found(whole):
    draft = queries.find_dataset("draft")
    draft.source = "/nowhere"
    draft.save()
    (finding,) = [finding for finding in found(whole) if finding.check == "status"]
    assert repair(finding).done == "is in error"
    assert queries.find_dataset("draft").artifact.status == "error"


def test_a_submission_that_is_open_for_what_has_ended_is_closed(whole):
    job = whole.job("stopped")
    Job.update(status="stopped").where(Job.id == job.id).execute()
    (finding,) = found(whole)
    assert checks([finding]) == [("status", job.id)]
    assert repair(finding).done == "its submission is closed"
    assert found(whole) == []


def test_rows_that_cannot_both_be_true_are_named(whole):
    job, checkpoint = Job.get(Job.name == "first"), Checkpoint.get()
    Job.update(status="error").where(Job.id == job.id).execute()
    assert checks(found(whole)) == [("status", checkpoint.artifact_id)]
    Job.update(status="completed").where(Job.id == job.id).execute()
    database.execute_sql("PRAGMA foreign_keys=0")
    Checkpoint.delete().execute()
    assert set(checks(found(whole))) == {("status", job.id), ("status", checkpoint.artifact_id)}


def test_the_command_repairs_what_it_can_and_fails_for_the_rest(whole):
    draft, chats = queries.find_dataset("draft"), queries.find_dataset("chats")
    remove_tree(whole.root.assembling(draft.artifact_id))
    remove_tree(whole.root.dataset(chats.artifact_id))
    before = whole.everything()
    listed = whole.run("admin", "fsck", check=5)
    assert "2 findings" in listed.stderr and draft.artifact_id in listed.stdout
    assert whole.everything() == before
    rows = {row["ref"]: row for row in whole.json("admin", "fsck", "--repair", check=5)}
    assert rows[draft.artifact_id]["repaired"] == "has an empty folder"
    assert rows[chats.artifact_id]["repaired"] is None
    Artifact.update(status="deleted", deleted_at=now()).where(Artifact.id == chats.artifact_id).execute()
    assert whole.run("admin", "fsck", check=0).stdout == "nothing is wrong\n"
