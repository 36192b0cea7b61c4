"""What goes, what stays and why, and that a rename and two graces lie between."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from datetime import timedelta
from pathlib import Path

import pytest

from tfslurm.artifacts import trash
from tfslurm.artifacts.fsck import examine
from tfslurm.artifacts.reclaim import plan, reclaim
from tfslurm.catalog import queries
from tfslurm.catalog.models import Artifact, Endpoint, Job, Submission, SubmissionState, now
from tfslurm.datasets import registry
from tfslurm.datasets.sealing import lock, seal
from tfslurm.errors import ConfigurationError
from tfslurm.files import locked
from tfslurm.training import checkpoints

PAST_GRACE, PAST_BOTH = timedelta(days=8), timedelta(days=11)


def later(by=PAST_GRACE):
    return now() + by


def reasons(steps, action):
    return {step.ref: step.reason for step in steps if step.action == action}


def row(dataset):
    return Artifact.get_by_id(dataset.artifact_id)


@pytest.fixture
def deleted(installation):
    """A deleted dataset."""
    return registry.delete(installation.dataset())


def test_a_deleted_dataset_goes_by_way_of_the_trash_and_its_row_stays(installation, deleted):
    folder = installation.root.dataset(deleted.artifact_id)
    assert reasons(plan(installation.settings), "keep")[deleted.artifact_id].startswith("can be restored until ")
    assert not reclaim(installation.settings).failed
    assert folder.exists()

    done = reclaim(installation.settings, at=later())
    assert list(reasons(done.steps, "reclaim")) == [deleted.artifact_id]
    assert not folder.exists()
    assert row(deleted).reclaimed_at and row(deleted).digest == deleted.artifact.digest
    (kept,) = trash.entries(installation.root)
    assert (kept.folder, kept.name) == ("datasets", deleted.artifact_id)
    assert (kept.path / "a.jsonl").exists()

    assert reclaim(installation.settings, at=later()).freed_bytes == 0
    assert reclaim(installation.settings, at=later(PAST_BOTH)).freed_bytes > deleted.artifact.size_bytes
    assert not os.listdir(installation.root.trash)
    assert [event.change for event in queries.events_of(deleted.artifact_id)][-2:] == ["deleted", "reclaimed"]
    assert list(examine(installation.settings, at=later(PAST_BOTH))) == []


def test_running_it_again_does_nothing(installation, deleted):
    at = later()
    reclaim(installation.settings, at=at)
    before = installation.everything()
    assert {step.action for step in reclaim(installation.settings, at=at).steps} == {"keep"}
    assert installation.everything() == before


def test_a_dry_run_changes_nothing_and_says_what_a_run_does(installation, deleted):
    installation.dataset("living")
    before, at = installation.everything(), later()
    planned = plan(installation.settings, at=at)
    assert installation.everything() == before
    done = reclaim(installation.settings, at=at)
    assert [(step.action, step.ref) for step in done.steps] == [(step.action, step.ref) for step in planned]


def test_bytes_that_are_gone_already_count_as_reclaimed(installation, deleted):
    folder = installation.root.dataset(deleted.artifact_id)
    trash.remove_tree(folder)
    done = reclaim(installation.settings, at=later())
    assert not done.failed
    assert row(deleted).reclaimed_at


def test_what_a_living_dataset_has_is_never_touched(installation):
    kept = installation.dataset("kept")
    draft = installation.dataset("draft", ready=False)
    before = installation.everything()
    reclaim(installation.settings, at=later(timedelta(days=4000)))
    assert installation.everything() == before
    assert seal(installation.settings, draft).artifact.status == "ready"
    assert row(kept).status == "ready"


def test_a_job_whose_submission_is_not_known_to_have_ended_keeps_its_deleted_dataset(installation):
    job = installation.job()
    Job.update(status="error").execute()
    dataset = registry.delete(queries.find_dataset("chats"))
    kept = reasons(reclaim(installation.settings, at=later(), stale="timed out").steps, "keep")[dataset.artifact_id]
    assert kept == (
        "job 'first' (error): what was handed over for it is not known to have ended; Slurm does not answer: timed out"
    )
    assert installation.root.dataset(dataset.artifact_id).exists()
    Submission.update(state=SubmissionState.ENDED).where(Submission.object_id == job.id).execute()
    assert dataset.artifact_id in reasons(reclaim(installation.settings, at=later()).steps, "reclaim")


def test_a_running_endpoint_keeps_its_checkpoint_and_not_the_dataset(installation):
    job = installation.completed()
    installation.endpoint(status="healthy")
    dataset, checkpoint = registry.delete(queries.find_dataset("chats")), queries.find_checkpoint("first")
    Artifact.update(status="deleted", deleted_at=now()).where(Artifact.id == checkpoint.artifact_id).execute()
    done = reclaim(installation.settings, at=later())
    assert list(reasons(done.steps, "reclaim")) == [dataset.artifact_id]
    assert reasons(done.steps, "keep")[checkpoint.artifact_id] == "endpoint 'helper' (healthy)"
    assert installation.root.checkpoint(checkpoint.artifact_id).exists()
    # The lineage needs only rows.
    shown = installation.json("lineage", "helper")
    assert (shown["dataset"]["digest"], shown["job"]["id"]) == (dataset.artifact.digest, job.id)


def test_a_stopped_endpoint_does_not_keep_its_checkpoint(installation):
    installation.completed()
    endpoint = installation.endpoint(status="stopped")
    Submission.update(state=SubmissionState.ENDED).where(Submission.object_id == endpoint.id).execute()
    checkpoint = checkpoints.delete(queries.find_checkpoint("first"))
    reclaim(installation.settings, at=later())
    assert not installation.root.checkpoint(checkpoint.artifact_id).exists()
    assert Endpoint.get_by_id(endpoint.id).checkpoint_id == checkpoint.artifact_id


def test_a_deleted_dataset_that_is_being_sealed_stays(installation):
    draft = installation.dataset(ready=False)
    with lock(installation.root, draft.artifact_id):
        registry.delete(draft)
        kept = reasons(reclaim(installation.settings, at=later()).steps, "keep")
        assert kept[draft.artifact_id] == "it is being sealed"
        assert installation.root.assembling(draft.artifact_id).exists()
        assert row(draft).reclaimed_at is None
    reclaim(installation.settings, at=later())
    assert not installation.root.assembling(draft.artifact_id).exists()


def test_one_that_is_restored_between_the_plan_and_its_turn_stays(installation, deleted, monkeypatch):
    from tfslurm.artifacts import reclaim as module

    planned = plan(installation.settings, at=later())
    monkeypatch.setattr(module, "plan", lambda *_, **__: planned)
    registry.restore(deleted)
    done = reclaim(installation.settings, at=later())
    assert reasons(done.steps, "keep") == {deleted.artifact_id: "it was restored meanwhile"}
    assert installation.root.dataset(deleted.artifact_id).exists()
    assert row(deleted).reclaimed_at is None


def test_only_one_runs_at_a_time(installation, deleted):
    with locked(installation.root.path / ".lock-reclaim"):
        assert reclaim(installation.settings, at=later()).ran is False
    assert installation.root.dataset(deleted.artifact_id).exists()
    assert reclaim(installation.settings, at=later()).ran


def test_several_at_once_do_no_harm_even_without_the_lock(installation, deleted, monkeypatch):
    from tfslurm.artifacts import reclaim as module
    from tfslurm.catalog.models import database

    at, failed = later(), []

    def one():
        failed.extend(module._execute(installation.settings, plan(installation.settings, at=at), at).failed)
        database.obj.close()

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not [said for said in failed if "already" not in said]
    assert len([event for event in queries.events_of(deleted.artifact_id) if event.change == "reclaimed"]) == 1
    assert [entry.name for entry in trash.entries(installation.root)] == [deleted.artifact_id]


def test_leftovers_go_past_the_grace_and_what_a_row_still_needs_stays(installation):
    root, ready = installation.root, installation.dataset("ready")
    draft = installation.dataset("draft", ready=False)
    staging, published = root.dataset(f".staging-{draft.artifact_id}"), root.dataset(draft.artifact_id)
    stale_lock, assembled = root.dataset(f".lock-{draft.artifact_id}"), root.assembling(ready.artifact_id)
    for folder in (staging, published, assembled):
        folder.mkdir()
        (folder / "part.jsonl").write_text("{}")
    stale_lock.touch()
    model, token, unknown = root.model(".staging-m"), root.tokens / "a.h5", root.dataset("ds-0000000000000000")
    model.mkdir()
    root.tokens.mkdir()
    token.write_text("tokens")
    unknown.mkdir()
    leftover = (staging, published, stale_lock, assembled, model)

    reclaim(installation.settings)
    assert all(path.exists() for path in (*leftover, token))
    reclaim(installation.settings, at=later())
    assert not any(path.exists() for path in leftover)
    assert token.exists() and unknown.exists()
    assert root.assembling(draft.artifact_id).exists() and root.dataset(ready.artifact_id).exists()
    reclaim(installation.settings, at=later(timedelta(days=31)))
    assert not token.exists() and unknown.exists()


def test_what_an_import_under_way_writes_stays(installation, tmp_path, monkeypatch):
    from tfslurm.datasets import importing
    from tfslurm.slurm import submissions
    from tfslurm.slurm.executors import Handed

    class Launcher:
        def submit(self, script):
            return Handed("another-host", "1:1")

    monkeypatch.setattr(submissions, "launcher", lambda *_: Launcher())
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    made = importing.start(installation.settings, "copied", "text", {}, str(tmp_path / "a.jsonl"))
    staging = installation.root.dataset(f".staging-{made.artifact_id}")
    staging.mkdir()
    before = installation.everything()
    reclaim(installation.settings, at=later(timedelta(days=400)))
    assert installation.everything() == before


def test_tokens_of_a_job_that_runs_stay(installation):
    job, token = installation.job(), installation.root.tokens / "a.h5"
    token.parent.mkdir()
    token.write_text("tokens")
    installation.root.job(job.id).prepared.write_text(json.dumps({"tokens": str(token)}))
    reclaim(installation.settings, at=later(timedelta(days=400)))
    assert token.exists()


def test_a_checkpoint_that_was_published_for_a_job_that_then_stopped_goes(installation):
    job = installation.job()
    folder = installation.root.checkpoint("ckpt-" + job.id.removeprefix("job-"))
    folder.mkdir()
    reclaim(installation.settings, at=later())
    assert folder.exists()
    Job.update(status="stopped").execute()
    Submission.update(state=SubmissionState.ENDED).execute()
    reclaim(installation.settings, at=later())
    assert not folder.exists()


def test_one_that_cannot_be_moved_does_not_keep_the_others_and_is_named(installation, deleted, monkeypatch):
    other = registry.delete(installation.dataset("other"))
    rename = os.rename

    def refuse(source, target):
        if Path(source).name == deleted.artifact_id:
            raise OSError(18, "Invalid cross-device link")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    done = reclaim(installation.settings, at=later())
    assert len(done.failed) == 1 and deleted.artifact_id in done.failed[0]
    assert not installation.root.dataset(other.artifact_id).exists()
    monkeypatch.undo()
    assert not reclaim(installation.settings, at=later()).failed
    assert not installation.root.dataset(deleted.artifact_id).exists()


def test_the_graces_are_the_sites(installation, deleted, tmp_path):
    installation.configure(reclaim={"grace": 0, "trash_grace": 0})
    installation.run("reclaim", check=0)
    assert [entry.name for entry in trash.entries(installation.root)] == [deleted.artifact_id]
    installation.run("reclaim", "--quiet", check=0)
    assert not os.listdir(installation.root.trash)
    with pytest.raises(ConfigurationError, match="reclaim"):
        installation.configure(reclaim={"grace": -1})


def test_the_command_says_what_goes_and_why_the_rest_stays(installation, deleted):
    table = installation.run("reclaim", "--dry-run", check=0).stdout
    assert "can be restored until" in table and deleted.artifact_id in table and "would be reclaimed: 0" in table
    found = installation.json("reclaim", "--dry-run")
    assert (found["ran"], found["dry_run"], found["freed_bytes"]) == (True, True, 0)
    (step,) = found["steps"]
    assert (step["action"], step["name"], step["size_bytes"]) == ("keep", "chats", deleted.artifact.size_bytes)
    (shown,) = installation.json("dataset", "list", "--status", "deleted")
    assert shown["deleted_at"] and shown["reclaimed_at"] is None
    assert "RECLAIMED AT" in installation.run("dataset", "list", "--status", "deleted").stdout


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become somebody who is not: root may rename anything")
def test_an_ordinary_user_can_move_a_read_only_folder_of_his_own():
    program = """if True:
        import _strptime, os, sys  # all that is needed: only root may read where this Python lies
        from datetime import UTC, datetime
        from pathlib import Path
        from tfslurm.artifacts import trash
        from tfslurm.paths import Root
        os.setuid(65534)
        root = Root(Path(sys.argv[1]))
        folder = root.dataset("ds-1")
        folder.mkdir(parents=True)
        (folder / "a").write_text("a")
        (folder / "a").chmod(0o444)
        folder.chmod(0o555)
        assert trash.discard(root, folder, datetime.now(UTC))
        (entry,) = trash.entries(root)
        assert trash.remove(entry) == 1
        assert not list(root.trash.iterdir())
    """
    with tempfile.TemporaryDirectory() as home:
        os.chmod(home, 0o777)
        environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run([sys.executable, "-c", program, home], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
