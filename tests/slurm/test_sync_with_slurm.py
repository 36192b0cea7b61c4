"""What Slurm says, or does not say, of what was handed to it: folded into the catalog."""

import os
from datetime import timedelta

import pytest

from tfslurm import sync as module
from tfslurm.catalog import queries
from tfslurm.catalog.models import Job, Submission, SubmissionState, now
from tfslurm.slurm.client import QueueEntry, SlurmRefused, SlurmUnreachable
from tfslurm.training.outcome import Failed

LONG_AGO = timedelta(hours=1)
BARREN = "attempts in a row that came to nothing: 1"


class FakeSlurm:
    """Slurm's answers, or its silence."""

    def __init__(self, queue=None, accounting=None, error=None, found=None):
        self.answers, self.error, self.found = (queue or {}, accounting or {}), error, found

    accounts = False

    def __call__(self, timeout, total=None):
        return self

    def queue(self, job_ids):
        return self._say(0)

    def accounting(self, job_ids, since):
        return self._say(1)

    def find(self, name, since):
        self._say(0)
        return self.found or []

    def cancel(self, *job_ids):
        self.cancelled = job_ids

    def cluster(self):
        return "lab"

    def _say(self, which):
        if self.error:
            raise self.error
        return self.answers[which]


@pytest.fixture
def on_slurm(installation):
    """A job that Slurm has had as number 7 for an hour."""
    job = installation.job()
    Submission.update(
        launcher="slurm", state=SubmissionState.SUBMITTED, cluster="lab", job_id="7",
        created_at=now() - LONG_AGO, submitted_at=now() - LONG_AGO,
    ).execute()  # fmt: skip
    return job


@pytest.fixture
def slurm(monkeypatch):
    def put(**answers):
        monkeypatch.setattr(module, "Slurm", FakeSlurm(**answers))

    return put


def entry(job, state, reason="None", **fields):
    return {"7": QueueEntry("7", Submission.get(Submission.object_id == job.id).uuid, state, reason, **fields)}


@pytest.mark.parametrize("error", [SlurmUnreachable("Socket timed out"), SlurmUnreachable("squeue is not on PATH")])
def test_a_slurm_that_does_not_answer_changes_nothing_and_local_jobs_are_followed(installation, on_slurm, slurm, error):
    other = installation.job("local-one")
    installation.trained(other)
    Submission.update(slurm_state="PENDING", reason="Priority").execute()
    before = installation.submission(on_slurm).__data__, Job.get_by_id(on_slurm.id).__data__
    slurm(error=error)
    summary = installation.sync()
    assert summary.stale == error.message
    assert not summary.failed
    assert installation.submission(on_slurm).__data__ == before[0]
    assert Job.get_by_id(on_slurm.id).__data__ == before[1]
    assert queries.find_job(other.id).status == "completed"


def test_a_waiting_job_shows_slurms_reason(installation, on_slurm, slurm):
    slurm(queue=entry(on_slurm, "PENDING", "Resources"))
    installation.sync()
    submission = installation.submission(on_slurm)
    assert (submission.slurm_state, submission.reason) == ("PENDING", "Resources")
    assert queries.find_job(on_slurm.id).status == "pending"


@pytest.mark.parametrize(
    ("state", "fields", "status", "error"),
    [
        ("OUT_OF_MEMORY", {}, "error", "out of memory (OUT_OF_MEMORY): exit code 0"),
        ("TIMEOUT", {}, "error", "no progress within the time limit: give it"),
        ("NODE_FAIL", {"reason": "NodeDown"}, "error", f"lost its node (NODE_FAIL): NodeDown; {BARREN}"),
        ("FAILED", {"exit_code": "2:0"}, "error", "failed: exit code 2"),
        ("FAILED", {"exit_code": "137:0"}, "error", "exit code 137: a process was killed"),
        ("COMPLETED", {}, "error", "the script ended without saying how the training went"),
        ("CANCELLED by 1000", {}, "stopped", None),
        ("RUNNING", {}, "running", None),
        ("PREEMPTED", {}, "error", f"preempted: exit code 0; {BARREN}"),
    ],
)
def test_what_accounting_says_of_a_job_becomes_its_status(installation, on_slurm, slurm, state, fields, status, error):
    installation.configure(slurm={"barren_attempts": 1})
    installation.write_started(on_slurm, slurm_job_id="7")
    slurm(accounting=entry(on_slurm, state, **{"exit_code": "0:0"} | fields))
    installation.sync()
    row = queries.find_job(on_slurm.id)
    assert row.status == status
    assert (row.error or "").startswith(error or "")
    assert error or row.error is None


def test_a_recycled_number_is_not_taken_for_the_job(installation, on_slurm, slurm):
    slurm(queue={"7": QueueEntry("7", "somebody-elses", "COMPLETED")})
    installation.write_started(on_slurm)
    installation.write_outcome(on_slurm, Failed(error="too hot"))
    installation.write_exit(on_slurm, 1)
    installation.sync()
    assert queries.find_job(on_slurm.id).error == "too hot"


def test_an_unknown_job_is_lost_only_after_the_grace(installation, on_slurm, slurm):
    slurm()
    installation.configure(slurm={"barren_attempts": 1})
    Submission.update(submitted_at=now()).execute()
    installation.sync()
    assert queries.find_job(on_slurm.id).status == "pending"
    Submission.update(submitted_at=now() - LONG_AGO).execute()
    installation.sync()
    row = queries.find_job(on_slurm.id)
    assert row.error.startswith("lost: neither squeue nor sacct knows it, and it left no exit record")


def test_without_accounting_the_exit_record_counts(installation, on_slurm, slurm, monkeypatch):
    fake = FakeSlurm()

    def refuse(job_ids, since):
        raise SlurmRefused("Slurm accounting storage is disabled")

    fake.accounting = refuse
    monkeypatch.setattr(module, "Slurm", fake)
    installation.trained(on_slurm)
    installation.sync()
    assert queries.find_job(on_slurm.id).status == "completed"


def test_a_submission_that_slurm_took_after_all_is_adopted(installation, on_slurm, slurm):
    Submission.update(state=SubmissionState.SUBMITTING, job_id=None, cluster=None).execute()
    slurm(found=["7"], queue=entry(on_slurm, "PENDING", "Priority"))
    installation.sync()
    submission = installation.submission(on_slurm)
    assert (submission.state, submission.cluster, submission.job_id) == ("submitted", "lab", "7")
    assert submission.slurm_state == "PENDING"


def test_a_half_made_submission_waits_while_slurm_does_not_answer(installation, on_slurm, slurm):
    Submission.update(state=SubmissionState.SUBMITTING, job_id=None, cluster=None).execute()
    slurm(error=SlurmUnreachable("Unable to contact slurm controller"))
    assert installation.sync().stale
    assert installation.submission(on_slurm).state == "submitting"
    assert queries.find_job(on_slurm.id).status == "pending"


def test_a_half_made_submission_that_slurm_refuses_ends_its_job(installation, on_slurm, slurm, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    for name, body in (
        ("sbatch", "echo 'sbatch: error: invalid partition specified: gpus' >&2; exit 1"),
        ("scontrol", "echo 'ClusterName = lab'"),
    ):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    Submission.update(state=SubmissionState.SUBMITTING, job_id=None, cluster=None).execute()
    slurm()
    summary = installation.sync()
    assert not summary.failed
    row = queries.find_job(on_slurm.id)
    assert row.status == "error"
    assert "invalid partition specified: gpus" in row.error
    assert installation.submission(on_slurm).state == "ended"
