"""Jobs that are interrupted: requeued by Slurm, submitted once more, or given up; a Slurm that only answers."""

import json
import os
import signal
from datetime import timedelta

import pytest

from tfslurm import sync as module
from tfslurm.catalog import queries
from tfslurm.catalog.models import Checkpoint, Job, Submission, SubmissionState, now
from tfslurm.slurm.observe import Observation
from tfslurm.slurm.states import Fate
from tfslurm.training import stopping
from tfslurm.training.following import follow
from tfslurm.training.outcome import Suspended

WALLTIME = Observation(Fate.TIMEOUT, "", "TIMEOUT")
DEAD_NODE = Observation(Fate.INFRASTRUCTURE, "NodeDown", "NODE_FAIL", nodes="n1")
WAITS = Observation(Fate.WAITING, "BeginTime", "PENDING")
RUNS = Observation(Fate.ACTIVE, "", "RUNNING", nodes="n1")
KILLED = Observation(Fate.CANCELLED, "", "CANCELLED")


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Slurm's commands that answer at once; what they were asked, a line each. Submitted jobs are 8, 9, ..."""
    (tmp_path / "bin").mkdir()
    asked = tmp_path / "asked"
    asked.write_text("")
    for name in ("sbatch", "scontrol", "scancel", "squeue", "sacct"):
        path = tmp_path / "bin" / name
        answer = f"echo $((7 + $(grep -c '^sbatch' {asked})))" if name == "sbatch" else "echo ClusterName = lab"
        path.write_text(f'#!/bin/bash\necho "{name} $*" >>{asked}\n{answer}\n')
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return lambda: [line for line in asked.read_text().splitlines() if not line.startswith("scontrol show")]


@pytest.fixture
def job(installation):
    """A job that Slurm runs as number 7, on n1."""
    made = installation.job()
    Job.update(instance="gpu-1").execute()
    Submission.update(
        launcher="slurm", state=SubmissionState.SUBMITTED, cluster="lab", job_id="7", submitted_at=now(), nodes="n1"
    ).execute()
    installation.write_started(made, slurm_job_id="7", node="n1")
    return made


@pytest.fixture
def seen(installation, job):
    """Follow the job's newest submission with an observation; the job as it is then."""

    def seen(observation):
        row, submission = Job.get_by_id(job.id), queries.submissions_of([job.id])[job.id]
        follow(installation.settings, row, submission, observation)
        return queries.find_job(job.id)

    return seen


def save_state(installation, job, attempt, step=10):
    folder = installation.root.job(job.id).resume
    folder.mkdir(exist_ok=True)
    (folder / "state.json").write_text(json.dumps({"step": step, "attempt": attempt}))


def newest(job):
    return queries.submissions_of([job.id])[job.id]


def start_again(installation, job, attempt):
    """The script's report of a later attempt."""
    path = installation.root.job(job.id).started
    before = json.loads(path.read_text())
    path.write_text(json.dumps(before | {"uuid": newest(job).uuid, "attempt": attempt, "node": "n2"}))


def changes(job):
    return [event.change for event in queries.events_of(job.id)]


def test_a_job_that_slurm_requeues_waits_and_runs_again_under_its_own_row(installation, job, seen, slurm):
    assert seen(RUNS).status == "running"
    installation.write_exit(job, 75)
    assert seen(WAITS).status == "pending"
    assert seen(WAITS).status == "pending"
    start_again(installation, job, 1)
    row = seen(RUNS)
    assert (row.status, row.attempt) == ("running", 1)
    assert changes(job) == ["created", "running", "pending", "running"]
    assert Submission.select().count() == 1
    assert slurm() == []


def test_a_requeue_that_nobody_saw_is_recorded_all_the_same(installation, job, seen):
    seen(RUNS)
    start_again(installation, job, 1)
    row = seen(RUNS)
    assert (row.status, row.attempt) == ("running", 1)
    assert changes(job) == ["created", "running", "pending", "running"]


def test_a_job_requeued_after_its_node_died_does_not_get_that_node_again(installation, job, seen, slurm):
    seen(RUNS)
    assert seen(WAITS).status == "pending"
    assert slurm() == ["scontrol update JobId=7 ExcNodeList=n1"]
    assert newest(job).exclude == ["n1"]
    seen(WAITS)
    assert len(slurm()) == 1


def test_a_job_whose_walltime_ended_goes_on_under_a_new_submission(installation, job, seen, slurm):
    seen(RUNS)
    save_state(installation, job, attempt=0)
    row = seen(WALLTIME)
    submission = newest(job)
    assert (row.status, submission.job_id, submission.attempt, submission.exclude) == ("pending", "8", 1, [])
    assert [s.state for s in Submission.select().order_by(Submission.created_at)] == ["ended", "submitted"]
    assert "attempt 1: ran into its time limit" in queries.events_of(job.id)[-1].reason
    script = installation.root.job(job.id).script.read_text()
    assert f"--job-name={submission.uuid}" in script
    assert len(slurm()) == 1
    start_again(installation, job, 1)
    assert (seen(RUNS).status, seen(RUNS).attempt) == ("running", 1)


def test_a_walltime_without_progress_ends_the_job(installation, job, seen, slurm):
    seen(RUNS)
    row = seen(WALLTIME)
    assert row.status == "error"
    assert row.error.startswith("no progress within the time limit: give it")
    assert slurm() == []


def test_a_job_that_got_somewhere_may_come_to_nothing_within_the_time_limit_for_once(installation, job, seen, slurm):
    seen(RUNS)
    save_state(installation, job, attempt=0)
    statuses = []
    for attempt in range(1, 5):
        statuses.append(seen(WALLTIME).status)
        start_again(installation, job, attempt)
        seen(RUNS)
    assert statuses == ["pending", "pending", "pending", "error"]
    error = queries.find_job(job.id).error
    assert "attempts in a row that came to nothing: 3; give it an instance with more time" in error


def test_a_job_that_left_in_time_goes_on(installation, job, seen, slurm):
    seen(RUNS)
    save_state(installation, job, attempt=0)
    installation.write_outcome(job, Suspended(step=10, steps_made=10))
    installation.write_exit(job, 75)
    assert seen(RUNS).status == "running"
    assert seen(Observation(Fate.FAILED, "", "FAILED", exit_code=75)).status == "pending"
    assert "attempt 1: saved its state and left" in queries.events_of(job.id)[-1].reason


def test_a_job_that_was_preempted_before_its_first_step_goes_on(installation, job, seen, slurm):
    seen(RUNS)
    installation.write_outcome(job, Suspended(step=0, steps_made=0))
    assert seen(Observation(Fate.PREEMPTED, "", "PREEMPTED")).status == "pending"


def test_a_job_that_left_in_time_without_having_made_a_step_does_not(installation, job, seen, slurm):
    seen(RUNS)
    installation.write_outcome(job, Suspended(step=0, steps_made=0))
    row = seen(Observation(Fate.FAILED, "", "FAILED", exit_code=76))
    assert (row.status, slurm()) == ("error", [])
    assert row.error.startswith("no progress within the time limit")


def test_a_dead_node_is_excluded_from_the_next_attempt(installation, job, seen, slurm):
    seen(RUNS)
    row = seen(DEAD_NODE)
    assert (row.status, newest(job).exclude) == ("pending", ["n1"])
    assert "#SBATCH --exclude=n1" in installation.root.job(job.id).script.read_text()


def test_of_several_nodes_none_is_blamed(installation, job, seen, slurm):
    Submission.update(nodes="n[1-2]").execute()
    seen(RUNS)
    seen(DEAD_NODE)
    assert newest(job).exclude == []


@pytest.mark.parametrize(
    "interruption",
    [
        DEAD_NODE,
        Observation(Fate.PREEMPTED, "", "PREEMPTED"),
        Observation(Fate.LOST, "neither squeue nor sacct knows it"),
    ],
)
def test_interruptions_without_any_progress_are_bounded(installation, job, seen, slurm, interruption):
    for attempt in range(1, 4):
        start_again(installation, job, attempt - 1)
        seen(RUNS)
        row = seen(interruption)
        assert row.status == ("pending" if attempt < 3 else "error")
    assert row.error.endswith("attempts in a row that came to nothing: 3")
    assert len(slurm()) == 2


def test_attempts_that_never_start_are_bounded_too(installation, job, seen, slurm):
    installation.root.job(job.id).started.unlink()
    assert [seen(DEAD_NODE).status for _ in range(3)] == ["pending", "pending", "error"]
    assert Checkpoint.select().count() == 0


def test_interruptions_with_progress_in_between_are_not(installation, job, seen, slurm):
    for attempt in range(5):
        start_again(installation, job, attempt)
        seen(RUNS)
        save_state(installation, job, attempt)
        assert seen(DEAD_NODE).status == "pending"


def test_a_preempted_job_is_waited_for_as_long_as_slurm_has_it(installation, job, seen, slurm):
    seen(RUNS)
    assert seen(Observation(Fate.PREEMPTED, "", "PREEMPTED", queued=True)).status == "running"
    assert slurm() == []


def test_an_instance_that_is_gone_by_then_ends_the_job(installation, job, seen, slurm):
    seen(RUNS)
    Job.update(instance="gone").execute()
    row = seen(DEAD_NODE)
    assert row.status == "error"
    assert "it cannot go on: no instance 'gone'" in row.error


def test_what_slurm_refuses_to_take_again_ends_in_error(installation, job, seen, slurm, tmp_path):
    seen(RUNS)
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: Invalid qos specification' >&2; exit 1\n")
    with pytest.raises(module.InvalidError, match="Invalid qos"):
        seen(DEAD_NODE)
    row = queries.find_job(job.id)
    assert (row.status, row.error) == ("error", "it cannot go on: sbatch: error: Invalid qos specification")


@pytest.mark.parametrize("point", ["job-rendered-again", "job-resubmitted", "submission-handed"])
def test_a_resubmission_that_is_killed_halfway_is_finished_by_the_next_sync(installation, job, slurm, point, tmp_path):
    installation.configure(slurm={"command_timeout": 0.1})
    seen_by_squeue = tmp_path / "bin" / "squeue"
    sacct = tmp_path / "bin" / "sacct"
    seen_by_squeue.write_text("#!/bin/sh\nexit 0\n")
    died = f"7|NODE_FAIL|NodeDown|n1|0|1:0|{newest(job).uuid}"
    sacct.write_text(f"#!/bin/sh\ncase $* in *JobName*jobs=7*) echo '{died}';; esac\n")
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(
        "#!/bin/sh\necho 'ClusterName = lab'; echo 'AccountingStorageType = accounting_storage/slurmdbd'\n"
    )
    Submission.update(submitted_at=now() - timedelta(hours=1), created_at=now() - timedelta(hours=1)).execute()
    environment = {"PATH": os.environ["PATH"], "TFSLURM_FAULT": point}
    killed = installation.run("sync", **environment)
    assert killed.returncode == -signal.SIGKILL, installation.root.log.read_text()
    # The new submission, where there is one, is too young for another process to see to.
    Submission.update(created_at=now() - timedelta(minutes=30)).where(Submission.state == "submitting").execute()
    installation.run("sync", PATH=os.environ["PATH"], check=0)
    row = queries.find_job(job.id)
    assert (row.status, newest(job).state, newest(job).attempt) == ("pending", "submitted", 1)
    assert Submission.select().count() == 2


def test_a_job_that_was_asked_to_stop_is_not_started_again(installation, job, seen, slurm):
    row = seen(RUNS)
    stopping.stop(installation.settings, row)
    assert seen(WAITS).status == "stopping"
    assert [line for line in slurm() if line.startswith("scancel")]
    assert seen(KILLED).status == "stopped"
    assert seen(DEAD_NODE).status == "stopped"
    assert Submission.select().count() == 1


def test_a_job_that_does_not_leave_in_time_is_killed(installation, job, seen, slurm):
    row = seen(RUNS)
    installation.configure(slurm={"stop_timeout": 3600})
    stopping.stop(installation.settings, row)
    installation.root.job(job.id).stop.unlink()
    seen(RUNS)
    assert installation.root.job(job.id).stop.exists()
    assert slurm() == []
    installation.configure(slurm={"stop_timeout": 0.001})
    seen(RUNS)
    assert [line for line in slurm() if line.startswith("scancel")]
    assert seen(KILLED).status == "stopped"


def test_a_training_that_had_succeeded_when_its_node_died_is_registered(installation, job, seen, slurm):
    row = seen(RUNS)
    Job.update(status="pending").where(Job.id == row.id).execute()
    installation.trained(job)
    assert seen(WAITS).status == "completed"
    assert Checkpoint.select().count() == 1
    assert [line for line in slurm() if line.startswith("scancel")]
