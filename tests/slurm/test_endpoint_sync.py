"""Endpoints: what their supervisors publish, folded into the catalog."""

import os
import subprocess
from datetime import UTC, datetime, timedelta

import pytest

from tfslurm.catalog import queries
from tfslurm.catalog.models import Submission, SubmissionState, now
from tfslurm.errors import StatusError
from tfslurm.files import write_json
from tfslurm.process import handle
from tfslurm.serving import endpoints


@pytest.fixture
def served(installation):
    """An endpoint whose script runs; `say` publishes what its supervisor would, and syncs."""
    installation.completed("first")
    row = installation.endpoint("helper")
    paths = installation.root.endpoint(row.id)
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    Submission.update(state=SubmissionState.SUBMITTED, cluster=os.uname().nodename, job_id=handle(process.pid)).where(
        Submission.object_id == row.id
    ).execute()
    uuid = Submission.get(Submission.object_id == row.id).uuid
    start = {"uuid": uuid, "slurm_job_id": "", "attempt": 0, "node": "n1", "pid": 1, "at": "2026-01-02T03:04:05Z"}
    write_json(paths.started, start)

    class Served:
        def say(self, status, *, age=0.0, url="http://127.0.0.1:8000/v1", reason=None):
            at = (datetime.now(UTC) - timedelta(seconds=age)).isoformat()
            state = {"status": status, "reason": reason, "since": at, "at": at, "url": url, "attempt": 0}
            write_json(paths.state, state)
            return self.status()

        def status(self):
            summary = installation.sync()
            assert not summary.failed, summary.failed
            return self.row().status

        def row(self):
            return queries.find_endpoint(row.id)

        def finish(self, code, outcome=None):
            if outcome:
                write_json(paths.outcome, outcome)
            write_json(paths.exit, {"uuid": uuid, "attempt": 0, "exit_code": code, "at": "2026-01-02T03:05:05Z"})
            process.kill()
            process.wait()
            return self.status()

    made = Served()
    made.paths, made.process = paths, process
    yield made
    process.kill()
    process.wait()


def test_an_endpoint_follows_its_supervisor(served):
    assert served.status() == "starting"
    assert served.say("starting", reason="loading weights") == "starting"
    assert served.say("healthy", url="http://n1:9000/v1") == "healthy"
    assert served.row().url == "http://n1:9000/v1"
    assert served.say("unhealthy", reason="no answer within 10 s") == "unhealthy"
    assert served.say("healthy", url="http://n1:9000/v1") == "healthy"
    events = queries.events_of(served.row().id)
    assert [event.change for event in events] == ["created", "starting", "healthy", "unhealthy", "healthy"]
    assert events[3].reason == "no answer within 10 s"


def test_one_that_is_not_heard_of_no_longer_counts_as_healthy(served):
    served.say("healthy")
    assert served.say("healthy", age=600) == "unhealthy"
    assert "has not been heard of for 6" in queries.events_of(served.row().id)[-1].reason
    assert served.say("healthy") == "healthy"


def test_following_it_again_changes_nothing(served, installation):
    served.say("healthy")
    before = installation.everything()
    served.status()
    assert installation.everything() == before


def test_a_supervisor_that_gives_up_is_an_error_that_says_why(served):
    served.say("starting")
    assert served.finish(1, {"result": "failed", "error": "the engine died three times"}) == "error"
    assert served.row().error == "the engine died three times"


def test_a_supervisor_that_is_killed_is_an_error(served):
    served.say("healthy")
    served.process.kill()
    served.process.wait()
    assert served.status() == "error"
    assert served.row().error == "lost: its process was killed"


def test_a_stop_waits_until_the_engine_has_drained(served, installation):
    served.say("healthy")
    endpoints.stop(installation.settings, served.row())
    assert served.paths.stop.exists()
    assert served.finish(0, {"result": "stopped"}) == "stopped"
    assert served.row().ended_at
    assert Submission.get(Submission.object_id == served.row().id).state == "ended"
    with pytest.raises(StatusError, match="has ended already"):
        endpoints.stop(installation.settings, served.row())


def test_a_stop_before_the_submission_ends_in_stopped(installation):
    installation.completed("first")
    row = installation.endpoint("helper")
    endpoints.stop(installation.settings, row)
    Submission.update(created_at=now() - timedelta(hours=1)).execute()
    installation.sync()
    assert queries.find_endpoint("helper").status == "stopped"
    assert not installation.root.endpoint(row.id).started.exists()


def test_an_endpoint_that_stopped_starts_again_with_its_key_and_address(served, installation, program, until):
    installation.configure(environments={"serve": str(program("python", "sleep 60")), "core": "/bin/true"})
    served.say("healthy")
    endpoints.stop(installation.settings, served.row())
    served.finish(0, {"result": "stopped"})
    before = served.row()
    endpoints.start(installation.settings, before)
    try:
        until(served.paths.started.exists)
        assert served.status() == "starting"
        assert (served.row().url, served.row().error) == (before.url, None)
        assert not served.paths.stop.exists()
    finally:
        endpoints.stop(installation.settings, served.row())
        until(lambda: served.status() == "stopped")
