"""Observing and following: what scripts left behind, folded into the catalog; on the local launcher."""

import os
import signal
import subprocess
import sys
from datetime import timedelta

import pytest

from tfslurm import sync as module
from tfslurm.catalog import queries
from tfslurm.catalog.models import Artifact, Checkpoint, Event, Lease, Submission, SubmissionState, now
from tfslurm.errors import StatusError
from tfslurm.process import handle
from tfslurm.settings import Instance
from tfslurm.slurm import local
from tfslurm.slurm.observe import observe
from tfslurm.slurm.states import Fate
from tfslurm.training import jobs, stopping
from tfslurm.training.outcome import Stopped

LONG_AGO = timedelta(hours=1)


@pytest.fixture
def started(installation, program, until):
    """Create a job for real whose interpreter runs `body`; the scripts are ended with the test."""
    made = []

    def started(body, name="first"):
        environments = {"train": str(program("python", body)), "core": "/bin/true"}
        installation.configure(environments=environments)
        made.append(jobs.create(installation.settings, installation.plan(name)))
        return made[-1]

    yield started
    for job in made:
        submission = installation.submission(job)
        if submission.job_id:
            local.end(submission.job_id, signal.SIGKILL)


@pytest.fixture
def synced(installation, until):
    """Sync until the job has ended, and read it."""

    def synced(job):
        def ended():
            summary = installation.sync()
            assert not summary.failed, summary.failed
            row = queries.find_job(job.id)
            return row if queries.JobStatus(row.status).ended else None

        return until(ended)

    return synced


def changes(object_id):
    return [event.change for event in queries.events_of(object_id)]


def test_a_job_runs_and_is_followed_to_its_end(started, synced, installation, until):
    job = started('touch "$3/running"; while [[ ! -e $3/go ]]; do sleep 0.02; done; exit 1')
    folder = installation.root.job(job.id).folder
    until(lambda: (folder / "running").exists())
    installation.sync()
    assert queries.find_job(job.id).status == "running"
    (folder / "go").touch()
    row = synced(job)
    assert (row.status, row.error) == ("error", "failed: exit code 1")
    assert changes(job.id) == ["created", "running", "error"]
    assert installation.submission(job).state == SubmissionState.ENDED
    assert row.started_at <= row.ended_at


def test_a_script_that_ends_well_without_an_outcome_is_no_success(started, synced):
    row = synced(started("exit 0"))
    assert (row.status, row.error) == ("error", "the script ended without saying how the training went")
    assert Checkpoint.select().count() == 0


def test_a_killed_trainer_is_an_error_that_says_so(started, synced):
    row = synced(started("[[ $2 == *trainer ]] && kill -9 $$; exit 0"))
    assert row.status == "error"
    assert row.error.startswith("exit code 137: a process was killed")


def test_a_script_that_was_killed_whole_is_lost(started, synced, installation, until):
    job = started("sleep 60")
    until(lambda: installation.root.job(job.id).started.exists())
    local.end(installation.submission(job).job_id, signal.SIGKILL)
    row = synced(job)
    assert (row.status, row.error) == ("error", "lost: its process was killed")


def test_what_the_trainer_says_of_its_failure_is_the_error(started, synced):
    row = synced(started("""echo '{"result": "failed", "error": "the loss is NaN"}' >"$3/outcome.json"; exit 1"""))
    assert (row.status, row.error) == ("error", "the loss is NaN")


def test_a_success_is_registered_once_however_often_sync_runs(installation):
    job = installation.completed()
    before = installation.everything()
    assert installation.sync().alive == 0
    assert installation.everything() == before
    checkpoint = queries.find_checkpoint("first")
    assert checkpoint.job_id == job.id
    assert checkpoint.artifact.producer == job.id
    assert checkpoint.metadata["lora_rank"] == 16
    assert changes(checkpoint.artifact_id) == ["registered"]
    assert changes(job.id) == ["created", "running", "completed"]


@pytest.mark.parametrize("point", ["publish-synced", "publish-read-only", "publish-renamed"])
def test_a_sync_that_is_killed_halfway_is_finished_by_the_next(installation, point, monkeypatch):
    job = installation.job()
    installation.trained(job)
    killed = installation.run("sync", TFSLURM_FAULT=point)
    assert killed.returncode == -signal.SIGKILL
    assert queries.find_job(job.id).status == "running"
    assert Artifact.select().where(Artifact.kind == "checkpoint").count() == 0
    monkeypatch.setattr(module, "LEASE", 0.0)
    Lease.update(expires_at=now()).execute()
    summary = installation.sync()
    assert not summary.failed
    assert queries.find_job(job.id).status == "completed"
    checkpoint = queries.find_checkpoint("first").artifact
    assert [path.name for path in (installation.root.path / "checkpoints").iterdir()] == [checkpoint.id]
    installation.run("checkpoint", "verify", "first", check=0)


def test_a_held_lease_makes_sync_stand_back(installation):
    job = installation.job()
    installation.trained(job)
    with module.lease("sync", seconds=60):
        assert not installation.sync().ran
    assert queries.find_job(job.id).status == "pending"
    assert installation.sync().ran
    assert queries.find_job(job.id).status == "completed"


def test_an_adapter_that_changed_after_it_was_verified_is_not_registered(installation):
    job = installation.job()
    installation.trained(job)
    (installation.root.job(job.id).adapter / "adapter_model.safetensors").write_bytes(b"other weights")
    assert not installation.sync().failed
    row = queries.find_job(job.id)
    assert row.status == "error"
    assert "adapter_model.safetensors is not the file that the trainer verified" in row.error
    assert Checkpoint.select().count() == 0


def test_an_adapter_that_is_missing_is_not_registered(installation):
    job = installation.job()
    installation.trained(job)
    adapter = installation.root.job(job.id).adapter
    adapter.rename(adapter.with_name("elsewhere"))
    assert not installation.sync().failed
    row = queries.find_job(job.id)
    assert row.status == "error"
    assert f"{adapter} is missing" in row.error
    assert Checkpoint.select().count() == 0


def test_one_damaged_folder_does_not_keep_the_others_back(installation):
    damaged, well = installation.job("damaged"), installation.job("well")
    installation.trained(well)
    installation.root.job(damaged.id).started.write_text("{")
    summary = installation.sync()
    assert len(summary.failed) == 1
    assert damaged.id in summary.failed[0]
    assert queries.find_job(well.id).status == "completed"
    assert queries.find_job(damaged.id).status == "pending"


def test_a_stop_before_the_submission_ends_in_stopped(installation):
    job = installation.job()
    stopping.stop(installation.settings, queries.find_job(job.id))
    Submission.update(created_at=now() - LONG_AGO).execute()
    installation.sync()
    row = queries.find_job(job.id)
    assert row.status == "stopped"
    assert installation.submission(job).state == SubmissionState.ENDED
    assert changes(job.id) == ["created", "stopping", "stopped"]
    with pytest.raises(StatusError, match="has ended already"):
        stopping.stop(installation.settings, row)


def test_a_stop_is_left_to_the_trainer_and_a_second_one_kills(started, synced, installation, until):
    job = started("sleep 60")
    until(lambda: installation.root.job(job.id).started.exists())
    installation.sync()
    stopping.stop(installation.settings, queries.find_job(job.id))
    installation.sync()
    assert queries.find_job(job.id).status == "stopping"
    assert installation.root.job(job.id).stop.exists()
    stopping.stop(installation.settings, queries.find_job(job.id))
    assert synced(job).status == "stopped"


def test_a_trainer_that_stops_by_itself_ends_in_stopped(installation):
    job = installation.job()
    installation.write_started(job)
    installation.write_outcome(job, Stopped(step=3))
    installation.write_exit(job, 0)
    installation.sync()
    assert queries.find_job(job.id).status == "stopped"


def test_a_success_after_a_stop_was_asked_for_leaves_no_checkpoint(installation):
    job = installation.job()
    stopping.stop(installation.settings, queries.find_job(job.id))
    installation.trained(job)
    installation.sync()
    assert queries.find_job(job.id).status == "stopped"
    assert Checkpoint.select().count() == 0


def test_a_submission_that_was_just_made_is_left_to_its_maker(installation):
    job = installation.job()
    installation.sync()
    assert installation.submission(job).state == SubmissionState.SUBMITTING
    assert queries.find_job(job.id).status == "pending"


def test_a_half_made_submission_whose_script_runs_is_adopted(installation, until):
    job = installation.job()
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        pid, ticks = handle(process.pid).split(":")
        installation.write_started(job, pid=int(pid), ticks=int(ticks))
        Submission.update(created_at=now() - LONG_AGO).execute()
        installation.sync()
        submission = installation.submission(job)
        assert (submission.state, submission.job_id) == (SubmissionState.SUBMITTED, f"{pid}:{ticks}")
        assert queries.find_job(job.id).status == "running"
    finally:
        process.kill()
        process.wait()
    installation.sync()
    assert queries.find_job(job.id).error == "lost: its process was killed"


def test_a_half_made_submission_whose_script_has_ended_is_followed_to_its_end(installation):
    job = installation.job()
    installation.trained(job)
    Submission.update(created_at=now() - LONG_AGO).execute()
    installation.sync()
    assert queries.find_job(job.id).status == "completed"
    assert Submission.select().count() == 1


def test_a_half_made_submission_that_never_started_is_handed_over_once_more(installation, program, synced):
    installation.configure(environments={"train": str(program("python", "exit 3")), "core": "/bin/true"})
    job = installation.job()
    Submission.update(created_at=now() - LONG_AGO).execute()
    row = synced(job)
    assert row.error == "failed: exit code 3"
    assert installation.root.job(job.id).started.exists()


def test_a_submission_from_another_submission_of_the_same_folder_is_not_taken_for_this_one(installation):
    job = installation.job()
    installation.write_started(job, uuid="another")
    Submission.update(state=SubmissionState.SUBMITTED, cluster=os.uname().nodename, job_id="1:1").execute()
    installation.root.job(job.id).exit.write_text('{"uuid": "another", "attempt": 0, "exit_code": 0, "at": ""}')
    installation.sync()
    assert queries.find_job(job.id).error == "lost: its process was killed"


def test_what_runs_on_another_machine_is_left_alone(installation):
    job = installation.job()
    Submission.update(state=SubmissionState.SUBMITTED, cluster="another-host", job_id="1:1").execute()
    installation.sync()
    assert queries.find_job(job.id).status == "pending"
    assert observe(installation.settings, [installation.submission(job)], None)[
        installation.submission(job).uuid
    ].fate is Fate.UNKNOWN  # fmt: skip


def test_a_run_that_was_quicker_than_its_submitter_stays_ended(installation):
    from tfslurm.slurm.executors import Handed
    from tfslurm.slurm.submissions import note_handed

    job = installation.job()
    late = installation.submission(job)
    installation.trained(job)
    installation.sync()
    note_handed(late, Handed("lab", "7"))
    submission = installation.submission(job)
    assert (submission.state, submission.job_id) == ("ended", "7")


def test_several_syncs_at_once_register_one_checkpoint(installation):
    job = installation.job()
    installation.trained(job)
    command = [sys.executable, "-m", "tfslurm", "--config", installation.config, "sync", "--quiet"]
    started = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(6)]
    said = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0] * 6, said
    assert queries.find_job(job.id).status == "completed"
    assert Event.select().where(Event.change == "completed").count() == 1


def test_an_instance_for_slurm_is_noted_with_the_submission(installation):
    from tfslurm.catalog.db import write_transaction
    from tfslurm.slurm.submissions import record

    with write_transaction():
        made = record("u-1", Instance(name="i"), "job", "job-1")
    assert (made.launcher, made.state, made.job_id) == ("slurm", "submitting", None)
