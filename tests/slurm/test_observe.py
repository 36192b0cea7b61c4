"""What Slurm's answers mean for submissions, with a Slurm that says what it is told to."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from tfslurm.catalog.db import write_transaction
from tfslurm.catalog.models import Submission, SubmissionState, now
from tfslurm.files import read_json
from tfslurm.settings import Instance
from tfslurm.slurm import submissions
from tfslurm.slurm.client import QueueEntry, SlurmRefused, SlurmUnreachable
from tfslurm.slurm.executors import Handed
from tfslurm.slurm.observe import Observation, observe
from tfslurm.slurm.states import STATES, Fate

LONG_AGO = now() - timedelta(hours=1)
START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


class FakeSlurm:
    """Knows jobs by id; `asked` is what it was asked."""

    def __init__(self, queue=(), accounting=(), error=None):
        self.entries = [{entry.job_id: entry for entry in entries} for entries in (queue, accounting)]
        self.error, self.asked = error, []

    def queue(self, job_ids):
        return self._known(0, "squeue", job_ids)

    def accounting(self, job_ids, since):
        if self.error:
            raise self.error
        return self._known(1, "sacct", job_ids)

    def _known(self, which, command, job_ids):
        self.asked.append((command, list(job_ids)))
        return {job_id: self.entries[which][job_id] for job_id in job_ids if job_id in self.entries[which]}


@pytest.fixture
def row(installation):
    job = installation.job()
    Submission.update(
        launcher="slurm", state=SubmissionState.SUBMITTED, cluster="lab", job_id="7",
        created_at=LONG_AGO, submitted_at=LONG_AGO,
    ).execute()  # fmt: skip
    return installation.submission(job)


@pytest.fixture
def see(installation, row):
    def see(**answers):
        return observe(installation.settings, [row], FakeSlurm(**answers))[row.uuid]

    return see


@pytest.fixture
def entry(row):
    def entry(state, reason="None", job_id="7", **fields):
        return QueueEntry(job_id, row.uuid, state, reason, **fields)

    return entry


@pytest.fixture
def left(installation, row):
    """What scripts leave in the job's folder."""
    paths = installation.root.job(row.object_id)

    def left(*, started=None, exited=None, code=0, claim=None):
        if started is not None:
            paths.started.write_text(json.dumps({"uuid": row.uuid, "attempt": started, "slurm_job_id": "7"}))
        if exited is not None:
            record = {"uuid": row.uuid, "attempt": exited, "exit_code": code, "at": "2026-01-02T03:04:05Z"}
            paths.exit.write_text(json.dumps(record))
        if claim:
            paths.claim(row.uuid).write_text(f"{claim}\n")

    return left


def test_two_thousand_jobs_are_one_question_and_the_absent_another(installation):
    rows = [
        Submission(
            uuid=f"u-{n}", name=f"u-{n}", kind="job", object_id=f"job-{n}", state="submitted", launcher="slurm",
            job_id=str(n), created_at=LONG_AGO, submitted_at=LONG_AGO,
        )
        for n in range(2000)
    ]  # fmt: skip
    slurm = FakeSlurm([QueueEntry(str(n), f"u-{n}", "RUNNING") for n in range(1990)])
    seen = observe(installation.settings, rows, slurm)
    assert [command for command, _ in slurm.asked] == ["squeue", "sacct"]
    assert slurm.asked[1][1] == [str(n) for n in range(1990, 2000)]
    assert [seen[f"u-{n}"].fate for n in (0, 1989, 1990)] == [Fate.ACTIVE, Fate.ACTIVE, Fate.LOST]


@pytest.mark.parametrize("state", [*STATES, "HIBERNATING"])
@pytest.mark.filterwarnings("ignore:Slurm reports the job state")
def test_only_slurms_own_completed_is_a_success_and_what_is_unknown_goes_on(see, entry, state):
    seen = see(queue=[entry(state)])
    assert (seen.fate is Fate.COMPLETED) == (state == "COMPLETED")
    assert seen.ended == (state in STATES and STATES[state].ended)
    assert seen.queued


def test_a_preempted_job_has_ended_once_squeue_has_forgotten_it(see, entry):
    assert not see(queue=[entry("PREEMPTED")]).ended
    seen = see(accounting=[entry("PREEMPTED", exit_code="0:15")])
    assert (seen.fate, seen.ended, seen.queued) == (Fate.PREEMPTED, True, False)


def test_a_job_that_slurm_started_again_waits_with_its_restarts(see, entry, left):
    left(started=0, exited=0, code=75)
    seen = see(queue=[entry("PENDING", "BeginTime", restarts=1, start=START)])
    assert (seen.fate, seen.restarts, seen.estimated_start, seen.ended) == (Fate.WAITING, 1, START, False)
    assert seen.reason.startswith("BeginTime: not before its begin time")
    assert see(queue=[entry("RUNNING", restarts=1, start=START)]).estimated_start is None


@pytest.mark.parametrize(
    ("state", "reason", "said"),
    [
        ("REQUEUE_HOLD", "None", "it was started again and is held; `scontrol release 7`"),
        ("SPECIAL_EXIT", "None", "after a special exit and is held; `scontrol release 7`"),
        ("RESV_DEL_HOLD", "None", "its reservation was deleted, and it is held"),
        ("PENDING", "JobHeldUser", "JobHeldUser: it is held; `scontrol release 7`"),
        ("PENDING", "launch failed requeued held", "could not be launched and is held; `scontrol release 7`"),
        ("PENDING", "job requeued in held state", "it was started again and is held; `scontrol release 7`"),
        ("PENDING", "JobHoldMaxRequeue", "started again too often"),
        ("PENDING", "DependencyNeverSatisfied", "what it depends on has failed: it never starts"),
        ("PENDING", "PartitionTimeLimit", "more time than its partition allows: it never starts"),
        ("PENDING", "BadConstraints", "it never starts"),
        ("PENDING", "ReservationDeleted", "its reservation was deleted"),
    ],
)
def test_what_does_not_start_by_itself_is_held_and_says_why(see, entry, state, reason, said):
    seen = see(queue=[entry(state, reason)])
    assert (seen.fate, seen.ended) == (Fate.HELD, False)
    assert said in seen.reason


@pytest.mark.parametrize(
    "reason", ["Resources", "Priority", "QOSMaxJobsPerUserLimit", "AssocGrpCpuLimit", "Reservation"]
)
def test_an_ordinary_reason_is_slurms_word_alone(see, entry, reason):
    seen = see(queue=[entry("PENDING", reason)])
    assert (seen.fate, seen.reason) == (Fate.WAITING, reason)


def test_nodes_that_are_not_available_are_told_and_named(see, entry):
    seen = see(queue=[entry("PENDING", "ReqNodeNotAvail, UnavailableNodes:n[3-4]")])
    assert seen.fate is Fate.WAITING
    assert seen.reason.startswith("ReqNodeNotAvail, UnavailableNodes:n[3-4]: nodes that it needs are down")


def test_why_a_job_waited_is_no_reason_of_its_end(see, entry):
    assert see(accounting=[entry("TIMEOUT", "Priority", exit_code="0:0")]).reason == ""
    assert see(accounting=[entry("NODE_FAIL", "NodeDown")]).reason == "NodeDown"


def test_an_end_is_explained_by_the_scripts_own_record(see, entry, left):
    left(started=0, exited=0, code=3)
    seen = see(queue=[entry("FAILED", "NonZeroExitCode")])
    assert (seen.fate, seen.exit_code, seen.reason) == (Fate.FAILED, 3, "exit code 3")


def test_a_script_that_was_killed_and_could_not_say_so_has_the_code_of_its_signal(see, entry):
    assert see(queue=[entry("FAILED", "JobLaunchFailure", exit_code="0:9")]).exit_code == 137
    assert see(accounting=[entry("FAILED", exit_code="3:0")]).exit_code == 3


def test_a_record_of_an_attempt_before_is_not_this_ones_end(see, entry, left):
    left(started=1, exited=0, code=75)
    seen = see(accounting=[entry("NODE_FAIL", exit_code="0:0")])
    assert (seen.fate, seen.exit_code) == (Fate.INFRASTRUCTURE, 0)
    assert see().fate is Fate.LOST
    left(exited=1, code=0)
    assert see().fate is Fate.COMPLETED


def test_a_recycled_number_is_not_the_submission(see, row, left):
    stranger = QueueEntry("7", "another", "RUNNING")
    assert see(queue=[stranger], accounting=[stranger]).fate is Fate.LOST
    own = QueueEntry("7", row.uuid, "COMPLETED", exit_code="0:0")
    assert see(queue=[stranger], accounting=[own]).fate is Fate.COMPLETED


def test_without_accounting_the_exit_record_says_how_it_ended(see, left):
    refused = SlurmRefused("Slurm accounting storage is disabled")
    assert see(error=refused).fate is Fate.LOST
    left(started=0, exited=0, code=1)
    assert see(error=refused).fate is Fate.FAILED


def test_an_accounting_that_does_not_answer_is_no_end(see, left):
    silent = SlurmUnreachable("slurm_persist_conn_open: failed to open persistent connection")
    assert see(error=silent).fate is Fate.UNKNOWN
    left(started=0, exited=0, code=0)
    assert see(error=silent).fate is Fate.COMPLETED


def test_of_two_jobs_the_one_that_claimed_the_submission_is_followed(installation, row, entry, left, see):
    left(claim="6")
    both = [entry("COMPLETED", exit_code="0:0"), entry("RUNNING", job_id="6", nodes="n3")]
    seen = see(queue=both)
    assert (seen.fate, seen.job_id, seen.nodes) == (Fate.ACTIVE, "6", "n3")
    submissions.note_seen(row, seen)
    assert installation.settings and Submission.get_by_id(row.uuid).job_id == "6"
    left(claim="7")
    row.job_id = "7"
    assert see(queue=both).fate is Fate.COMPLETED


@pytest.fixture
def array(installation):
    """Three rows of one array, not handed over yet, and no objects for them."""
    name = "a-1"
    with write_transaction():
        return submissions.record_array(name, Instance(name="i"), "job", [(f"u-{n}", f"job-{n}") for n in range(3)])


def test_an_arrays_tasks_are_noted_together(array):
    submissions.note_handed(array, Handed("lab", "12"))
    rows = list(Submission.select().order_by(Submission.array_index))
    assert [(row.uuid, row.name, row.job_id, row.state) for row in rows] == [
        ("u-0", "a-1", "12_0", "submitted"), ("u-1", "a-1", "12_1", "submitted"), ("u-2", "a-1", "12_2", "submitted"),
    ]  # fmt: skip
    assert {(row.cluster, row.launcher, row.attempt, tuple(row.exclude)) for row in rows} == {("lab", "slurm", 0, ())}


def test_a_claim_names_the_array_and_the_task_is_added(installation, array):
    submissions.note_handed(array, Handed("lab", "12"))
    paths = installation.root.job("job-2")
    paths.folder.mkdir(parents=True)
    paths.claim("u-2").write_text("11\n")
    slurm = FakeSlurm([QueueEntry("12_2", "a-1", "PENDING"), QueueEntry("11_2", "a-1", "RUNNING")])
    assert observe(installation.settings, array, slurm)["u-2"].job_id == "11_2"


def test_a_refused_array_ends_with_all_its_tasks(installation, array, program, monkeypatch):
    folder = program("sbatch", "echo 'sbatch: error: Invalid job array specification' >&2; exit 1").parent
    program("scontrol", "echo 'ClusterName = lab'")
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    said = []
    with pytest.raises(SlurmRefused, match="Invalid job array"):
        submissions.hand_over_array(installation.settings, array, installation.folder / "script.sh", said.append)
    assert said == ["sbatch: error: Invalid job array specification"]
    assert {(row.state, row.reason) for row in Submission.select()} == {("ended", said[0])}


def test_only_what_changed_is_written_and_what_says_nothing_changes_nothing(installation, array, monkeypatch):
    written = []
    many = submissions._many
    monkeypatch.setattr(submissions, "_many", lambda sql, rows: many(sql, written.append(rows := list(rows)) or rows))
    first = Observation(Fate.WAITING, "Priority", "PENDING", estimated_start=START)
    submissions.note_seen_all([(row, first) for row in array])
    second = Observation(Fate.ACTIVE, "", "RUNNING", "n[1-2]")
    submissions.note_seen_all([(array[0], second), (array[1], first), (array[2], Observation(Fate.UNKNOWN))])
    submissions.note_seen_all([(array[0], second)])
    assert [len(rows) for rows in written] == [3, 1]
    rows = list(Submission.select().order_by(Submission.array_index))
    assert [(r.slurm_state, r.reason, r.nodes, r.estimated_start) for r in rows] == [
        ("RUNNING", "", "n[1-2]", None), ("PENDING", "Priority", None, START), ("PENDING", "Priority", None, START),
    ]  # fmt: skip
    submissions.note_seen(rows[0], Observation(Fate.WAITING, "BeginTime", "PENDING", restarts=1))
    assert Submission.get_by_id("u-0").nodes == "n[1-2]"  # where it ran last


def test_the_folder_of_an_array_says_which_line_is_whose(installation):
    paths = installation.root.array("a-1")
    folders = [installation.root.job(f"job-{n}").folder for n in range(2)]
    submissions.write_array(paths, "#!/bin/bash\n", zip(["u-0", "u-1"], folders, strict=True))
    assert paths.cells.read_text() == f"u-0\t{folders[0]}\nu-1\t{folders[1]}\n"
    assert paths.script.read_text() == "#!/bin/bash\n"
    assert (paths.folder / "logs").is_dir()
    assert read_json(paths.folder / "nothing") is None
