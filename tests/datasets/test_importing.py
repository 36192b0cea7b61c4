"""Imports through the product: a script in the background, its outcome, and `sync`."""

import json
import os
import signal
import sys
from datetime import timedelta

import pytest

from tfslurm.artifacts.manifest import verify_folder
from tfslurm.artifacts.publish import remove_tree
from tfslurm.catalog import queries
from tfslurm.catalog.models import Dataset, Lease, Submission, now
from tfslurm.datasets import importing
from tfslurm.datasets.importer import run
from tfslurm.datasets.sealing import staging_of
from tfslurm.errors import ConfigurationError, InvalidError, NotFoundError, StatusError
from tfslurm.slurm import local

TEXT = '{"text": "Once upon a time."}\n'


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "my source"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.jsonl").write_text(TEXT)
    (folder / "deep" / "b.jsonl").write_text(TEXT * 2)
    return folder


@pytest.fixture
def begin(installation, source):
    def begin(name="copied", **options):
        return importing.start(installation.settings, name, "text", {}, str(source), **options)

    yield begin
    for submission in Submission.select():
        if submission.job_id:
            local.end(submission.job_id, signal.SIGKILL)


@pytest.fixture
def finished(installation, until):
    """Sync until the import has ended, and read it."""

    def finished(dataset):
        def ended():
            summary = installation.sync()
            assert not summary.failed, summary.failed
            row = queries.find_dataset(dataset.artifact_id, deleted=True)
            return row if row.artifact.status != "assembling" else None

        return until(ended)

    return finished


def test_a_folder_is_copied_validated_and_sealed_in_the_background(installation, begin, finished, source):
    made = begin()
    assert made.artifact.status == "assembling"
    row = finished(made)
    assert (row.artifact.status, row.artifact.error) == ("ready", None)
    assert (row.row_count, row.artifact.file_count, row.source) == (3, 2, str(source))
    assert row.artifact.producer == f"import from {source}"
    verify_folder(installation.root.dataset(made.artifact_id), row.artifact.digest)
    assert [event.change for event in queries.events_of(made.artifact_id)] == ["created", "ready"]
    assert Submission.get().state == "ended"
    assert sorted(path.name for path in source.rglob("*.jsonl")) == ["a.jsonl", "b.jsonl"]
    progress = json.loads(installation.root.import_(made.artifact_id).progress.read_text())
    assert progress["bytes_done"] == progress["bytes_total"]


def test_bad_rows_end_in_error_with_the_report(installation, begin, finished, source):
    (source / "bad.jsonl").write_text('{"txt": 1}\n')
    row = finished(begin())
    assert row.artifact.status == "error"
    assert "bad.jsonl" in row.artifact.error
    assert row.metadata["bad_rows"] == 1
    assert not installation.root.dataset(row.artifact_id).exists()
    assert not staging_of(installation.root, row.artifact_id).exists()


def test_an_import_that_is_killed_every_time_ends_in_error(installation, begin, until, program):
    installation.configure(environments={"core": str(program("python", "sleep 60"))})
    made = begin()
    for attempt in range(1, 4):
        newest = Submission.select().order_by(Submission.created_at.desc()).get()
        assert newest.state == "submitted"
        local.end(newest.job_id, signal.SIGKILL)
        until(lambda newest=newest: not local.alive(newest.job_id))
        assert not installation.sync().failed
        assert Submission.select().count() == min(attempt + 1, 3)
    row = queries.find_dataset(made.artifact_id)
    assert row.artifact.status == "error"
    assert row.artifact.error == "the import lost: its process was killed (attempt 3 of 3)"
    changes = [(event.change, event.reason) for event in queries.events_of(made.artifact_id)]
    assert changes[1] == ("resumed", "attempt 2 of 3: the import lost: its process was killed")
    assert [change for change, _ in changes] == ["created", "resumed", "resumed", "error"]
    assert {row.state for row in Submission.select()} == {"ended"}


def test_an_import_whose_importer_alone_is_killed_is_resumed(installation, begin, finished, program, source, tmp_path):
    """The script outlives it: its exit code says it, and its own sync submits it again."""
    once = f"if [[ $2 != tfslurm && ! -e {tmp_path}/killed ]]; then touch {tmp_path}/killed; kill -9 $$; fi"
    installation.configure(environments={"core": str(program("python", f'{once}; exec {sys.executable} "$@"'))})
    row = finished(begin())
    assert row.artifact.status == "ready"
    assert [event.change for event in queries.events_of(row.artifact_id)] == ["created", "resumed", "ready"]


def test_a_sync_that_is_killed_while_it_resubmits_an_import_is_finished_by_the_next(
    installation, begin, finished, program, until
):
    installation.configure(environments={"core": str(program("python", "sleep 60"))})
    made = begin()
    local.end(Submission.get().job_id, signal.SIGKILL)
    installation.configure(environments={"core": sys.executable})
    killed = until(lambda: installation.run("sync", TFSLURM_FAULT="import-resubmitted"))
    assert killed.returncode == -signal.SIGKILL
    assert sorted(row.state for row in Submission.select()) == ["ended", "submitting"]
    Lease.update(expires_at=now()).execute()
    Submission.update(created_at=now() - timedelta(hours=1)).where(Submission.state == "submitting").execute()
    assert finished(made).artifact.status == "ready"


def test_an_import_that_dies_without_a_word_ends_in_error(installation, begin, finished, program):
    installation.configure(environments={"core": str(program("python", "exit 9"))})
    assert finished(begin()).artifact.error == "the import failed: exit code 9"


@pytest.mark.parametrize("point", ["publish-synced", "publish-read-only", "publish-renamed"])
def test_a_sync_that_is_killed_while_it_publishes_is_finished_by_the_next(
    installation, begin, until, finished, program, point
):
    # The sync at the end of the script is left out, so that the one that is killed is the first.
    without_sync = program("python", f'[[ $2 == tfslurm ]] || exec {sys.executable} "$@"')
    installation.configure(environments={"core": str(without_sync)})
    made = begin()
    until(installation.root.import_(made.artifact_id).exit.exists)
    assert installation.run("sync", TFSLURM_FAULT=point).returncode == -signal.SIGKILL
    assert queries.find_dataset("copied").artifact.status == "assembling"
    Lease.update(expires_at=now()).execute()
    row = finished(made)
    assert row.artifact.status == "ready"
    verify_folder(installation.root.dataset(made.artifact_id), row.artifact.digest)


def test_a_copy_that_vanished_before_it_was_published_is_an_error(installation, begin, finished, program):
    installation.configure(environments={"core": str(program("python", "sleep 60"))})
    made = begin()
    outcome = {"result": "succeeded", "digest": "sha256:0", "size_bytes": 1, "file_count": 1, "report": {"rows": 1}}
    installation.root.import_(made.artifact_id).outcome.write_text(json.dumps(outcome))
    row = finished(made)
    assert row.artifact.status == "error"
    assert "has no MANIFEST.sha256" in row.artifact.error


def test_a_copy_with_another_digest_is_an_error(installation, begin, program):
    installation.configure(environments={"core": str(program("python", "sleep 60"))})
    made = begin()
    paths = installation.root.import_(made.artifact_id)
    paths.outcome.write_text(json.dumps(run(paths) | {"digest": "sha256:0"}))
    installation.sync()
    row = queries.find_dataset(made.artifact_id)
    assert row.artifact.status == "error"
    assert "not sha256:0" in row.artifact.error


def test_following_an_import_again_changes_nothing(installation, begin, finished, until):
    until(installation.root.import_(finished(begin()).artifact_id).exit.exists)
    before = installation.everything()
    Submission.update(state="submitted").execute()
    installation.sync()
    after = installation.everything()
    assert after[1] == before[1]
    assert after[0]["Artifact"] == before[0]["Artifact"]
    assert after[0]["Event"] == before[0]["Event"]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"name": "Bad Name"}, InvalidError),
        ({"format": "csv"}, InvalidError),
        ({"field_map": {"prompt": "q"}}, InvalidError),
        ({"source": "/nowhere"}, InvalidError),
        ({"source": "ftp://host/folder"}, InvalidError),
        ({"name": "taken"}, StatusError),
        ({"instance": "huge"}, NotFoundError),
        ({"instance": "gpu-1"}, InvalidError),
        ({"instance": "broken"}, ConfigurationError),
    ],
)
def test_what_is_refused_leaves_nothing(installation, source, changes, error):
    installation.dataset("taken")
    (installation.folder / "instances.yaml").write_text(
        "instances: {broken: {launcher: local, options: {wrap: x}}, gpu-1: {purposes: [training]}}"
    )
    request = {"name": "copied", "format": "text", "field_map": {}, "source": str(source), "instance": None} | changes
    before = installation.everything()
    with pytest.raises(error):
        importing.start(installation.settings, **request)
    assert installation.everything() == before


def test_an_import_that_slurm_refuses_is_in_error(installation, source, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid account' >&2; exit 1\n")
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\necho 'ClusterName = lab'\n")
    for name in ("sbatch", "scontrol"):
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with pytest.raises(InvalidError, match="invalid account"):
        importing.start(installation.settings, "copied", "text", {}, str(source), "cpu")
    row = queries.find_dataset("copied")
    assert (row.artifact.status, row.artifact.error) == ("error", "sbatch: error: invalid account")
    assert Submission.get().state == "ended"


def test_an_import_whose_maker_was_killed_is_started_by_sync(installation, source, finished, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(importing.submissions, "hand_over", killed)
    with pytest.raises(KeyboardInterrupt):
        importing.start(installation.settings, "copied", "text", {}, str(source))
    dataset = Dataset.get()
    assert Submission.get().state == "submitting"
    Submission.update(created_at=now() - timedelta(hours=1)).execute()
    assert finished(dataset).artifact.status == "ready"


def test_a_source_that_is_gone_by_the_time_it_is_copied_is_an_error(installation, source, finished, monkeypatch):
    monkeypatch.setattr(importing.submissions, "hand_over", lambda *_: None)
    made = importing.start(installation.settings, "copied", "text", {}, str(source))
    remove_tree(source)
    Submission.update(created_at=now() - timedelta(hours=1)).execute()
    row = finished(made)
    assert row.artifact.status == "error"
    assert str(source) in row.artifact.error
