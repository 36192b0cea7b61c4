"""What stays of a job that has ended, what goes and when; and that no crash or doubt takes anything else."""

import json
import os
import signal
from datetime import timedelta
from pathlib import Path

import pytest

from tfslurm.artifacts.fsck import examine
from tfslurm.artifacts.reclaim import plan, reclaim
from tfslurm.artifacts.retention import LOG_END, cut
from tfslurm.catalog import queries
from tfslurm.catalog.models import Artifact, Job, Lease, Submission, SubmissionState, Sweep, now

LINE = "step 1/300  epoch 0  loss 2.1234\n"


def later(days):
    return now() + timedelta(days=days)


def reasons(steps, action):
    return {step.ref: step.reason for step in steps if step.action == action}


def fill(paths):
    """All that a job leaves in its folder; its logs are long."""
    paths.folder.mkdir(parents=True, exist_ok=True)
    paths.logs.mkdir(exist_ok=True)
    (paths.resume).mkdir()
    (paths.resume / "state.json").write_text("{}")
    (paths.resume / "attempt-0-step-5.safetensors").write_bytes(bytes(5000))
    paths.plan.write_bytes(bytes(3000))
    paths.metrics.write_text('{"step": 1, "loss": 2.0}\n')
    paths.progress.write_text('{"step": 1, "steps": 1, "loss": 2.0}')
    paths.prepared.write_text("{}")
    (paths.folder / "claim-6f1c").write_text("12\n")
    (paths.folder / ".progress.json.x1").write_text("half a fi")
    (paths.folder / "stop").touch()
    (paths.folder / "profile").mkdir()
    (paths.folder / "profile" / "trace").write_bytes(bytes(100))
    paths.log(0).write_text(LINE * 10_000)
    paths.rank_log(0, 1).write_text(LINE * 10_000)
    paths.log(1).write_text("short\n")
    (paths.logs / ".attempt-0.log.x2").write_text("half a cut")


RECORD = [
    "claim-6f1c", "deepspeed.json", "logs", "metrics.jsonl", "prepared.json", "progress.json", "script.sh",
    "training.json",
]  # fmt: skip


def wrong(installation, days):
    """What fsck finds, but that the base model's bytes are none."""
    found = examine(installation.settings, full=True, at=later(days))
    return [finding for finding in found if finding.ref != "tiny"]


def left(paths):
    return sorted(os.listdir(paths.folder))


@pytest.fixture
def completed(installation):
    job = installation.completed()
    fill(installation.root.job(job.id))
    return job


@pytest.fixture
def failed(installation):
    job = installation.job("second")
    fill(installation.root.job(job.id))
    (installation.root.job(job.id).adapter).mkdir()
    Job.update(status="error", error="out of memory", ended_at=now()).where(Job.id == job.id).execute()
    Submission.update(state=SubmissionState.ENDED, ended_at=now()).where(Submission.object_id == job.id).execute()
    return Job.get_by_id(job.id)


def test_a_completed_job_gives_its_state_and_its_adapter_at_once_and_the_rest_later(installation, completed, cli_view):
    paths, ref = installation.root.job(completed.id), f"jobs/{completed.id}"
    kept_for_good = sorted({*RECORD, "started.json", "exit.json", "outcome.json"})
    everything = left(paths)
    assert {"adapter", "resume"} <= set(everything)
    before = cli_view("first")

    done = reclaim(installation.settings)
    assert set(reasons(done.steps, "prune")) == {f"{ref}/adapter", f"{ref}/resume"}
    assert reasons(done.steps, "keep")[ref].startswith("job 'first' is completed since ")
    assert left(paths) == [name for name in everything if name not in ("adapter", "resume")]

    assert not reasons(reclaim(installation.settings, at=later(89)).steps, "prune")
    done = reclaim(installation.settings, at=later(91))
    assert set(reasons(done.steps, "prune")) == {ref}
    assert left(paths) == kept_for_good
    assert sorted(os.listdir(paths.logs)) == ["attempt-0.log", "attempt-0.rank-1.log", "attempt-1.log"]
    assert cli_view("first") == before
    assert installation.json("job", "metrics", "first") == [{"step": 1, "loss": 2.0}]
    assert queries.find_checkpoint("first").artifact.status == "ready"

    assert not reasons(reclaim(installation.settings, at=later(91)).steps, "prune")
    assert reclaim(installation.settings, at=later(94)).freed_bytes > 3000
    assert not os.listdir(installation.root.trash)
    assert wrong(installation, 95) == []


@pytest.fixture
def cli_view(installation):
    return lambda name: installation.json("job", "show", name)


def test_a_job_that_failed_keeps_its_state_for_a_while_and_its_unregistered_adapter_as_long_as_the_rest(
    installation, failed
):
    paths, ref = installation.root.job(failed.id), f"jobs/{failed.id}"
    done = reclaim(installation.settings, at=later(6))
    assert not reasons(done.steps, "prune")
    assert reasons(done.steps, "keep")[f"{ref}/resume"].startswith("job 'second' is error since ")
    assert "; stays until " in reasons(done.steps, "keep")[f"{ref}/resume"]
    reclaim(installation.settings, at=later(8))
    assert not paths.resume.exists() and paths.adapter.exists()
    reclaim(installation.settings, at=later(91))
    assert left(paths) == RECORD


def test_logs_keep_their_ends_from_the_beginning_of_a_line_with_a_word_about_it(installation, failed):
    paths = installation.root.job(failed.id)
    paths.log(0).chmod(0o640)
    whole = paths.log(0).read_text()
    reclaim(installation.settings, at=later(91))
    for log in (paths.log(0), paths.rank_log(0, 1)):
        notice, *lines = log.read_text().splitlines(keepends=True)
        assert LOG_END - 200 < log.stat().st_size <= LOG_END
        gone = len(whole) - sum(map(len, lines))
        assert notice == f"[{gone} bytes were cut off here by tfslurm reclaim on {later(91):%Y-%m-%d}]\n"
        assert set(lines) == {LINE}
    assert paths.log(0).stat().st_mode & 0o777 == 0o640
    assert paths.log(1).read_text() == "short\n"
    before = installation.tree()
    reclaim(installation.settings, at=later(91))
    assert installation.tree() == before


@pytest.mark.parametrize(
    "text", [b"x" * 100_000, b"x" * 100_000 + b"\n", b"\n" * 100_000, LINE.encode() * 3000 + b"end"]
)
def test_a_log_of_any_shape_is_cut_once(tmp_path, text):
    log = tmp_path / "a.log"
    log.write_bytes(text)
    cut(log, now())
    notice, _, end = log.read_bytes().partition(b"\n")
    assert b"cut off here" in notice and text.endswith(end)
    assert log.stat().st_size <= LOG_END
    assert os.listdir(tmp_path) == ["a.log"]


@pytest.mark.parametrize("status", ["pending", "running", "stopping"])
def test_nothing_of_a_job_that_has_not_ended_is_touched(installation, status):
    job = installation.job()
    fill(installation.root.job(job.id))
    Job.update(status=status).execute()
    before = installation.tree()
    done = reclaim(installation.settings, at=later(4000))
    assert reasons(done.steps, "keep")[f"jobs/{job.id}/resume"] == f"job 'first' is {status}"
    assert not reasons(done.steps, "prune")
    assert installation.tree() == before


def test_nothing_is_touched_while_what_was_handed_over_is_not_known_to_have_ended(installation, failed):
    Submission.update(state=SubmissionState.SUBMITTED).execute()
    before = installation.tree()
    done = reclaim(installation.settings, at=later(4000))
    assert reasons(done.steps, "keep")[f"jobs/{failed.id}/resume"] == (
        "job 'second' (error): what was handed over for it is not known to have ended"
    )
    assert installation.tree() == before


def test_nothing_is_touched_while_slurm_does_not_answer(installation, failed):
    before = installation.tree()
    done = reclaim(installation.settings, at=later(4000), stale="timed out")
    kept = reasons(done.steps, "keep")
    assert all("Slurm does not answer: timed out" in kept[f"jobs/{failed.id}{part}"] for part in ("", "/resume"))
    assert installation.tree() == before


def test_a_job_that_is_alive_again_in_its_turn_stays(installation, failed, monkeypatch):
    from tfslurm.artifacts import reclaim as module

    planned = plan(installation.settings, at=later(91))
    monkeypatch.setattr(module, "plan", lambda *_, **__: planned)
    Submission.update(state=SubmissionState.SUBMITTED).execute()
    before = installation.tree()
    done = reclaim(installation.settings, at=later(91))
    assert not reasons(done.steps, "prune") and not done.failed
    assert installation.tree() == before


def test_a_dry_run_says_what_a_run_does_and_changes_nothing(installation, completed, failed):
    before = installation.everything()
    steps = installation.json("reclaim", "--dry-run")["steps"]
    assert installation.everything() == before
    pruned = {step["ref"]: step for step in steps if step["action"] == "prune"}
    assert set(pruned) == {f"jobs/{completed.id}/adapter", f"jobs/{completed.id}/resume"}
    assert pruned[f"jobs/{completed.id}/resume"]["name"] == "first"
    assert pruned[f"jobs/{completed.id}/resume"]["size_bytes"] == 5002
    table = installation.run("reclaim", "--dry-run", check=0).stdout
    assert "would be pruned: 2" in table
    at = later(91)
    planned = plan(installation.settings, at=at)
    done = reclaim(installation.settings, at=at)
    assert [(step.action, step.ref) for step in done.steps] == [(step.action, step.ref) for step in planned]


def test_the_ages_are_the_sites(installation, failed):
    installation.configure(reclaim={"resume": 0, "jobs": 0, "trash_grace": 0})
    installation.run("reclaim", check=0)
    assert left(installation.root.job(failed.id)) == RECORD
    installation.configure(reclaim={"resume": 30, "jobs": 1, "trash_grace": 0})
    installation.root.job(failed.id).resume.mkdir()
    installation.run("reclaim", check=0)
    assert "resume" in left(installation.root.job(failed.id))
    reclaim(installation.settings, at=later(2))  # no part outlives the rest
    assert left(installation.root.job(failed.id)) == RECORD


def test_a_job_that_left_nothing_but_its_record_has_no_line(installation, failed):
    reclaim(installation.settings, at=later(91))
    job = installation.job("third")
    Job.update(status="stopped", ended_at=now()).where(Job.id == job.id).execute()
    Submission.update(state=SubmissionState.ENDED, ended_at=now()).execute()
    assert not [step for step in plan(installation.settings, at=later(4000)) if step.ref.startswith("jobs/")]


POINTS = ["retention-moved", "retention-cut", "trash-unlocked", "trash-renamed", "trash-counted", "tree-part-removed"]


@pytest.mark.parametrize("point", POINTS)
def test_killed_anywhere_the_next_run_goes_on(installation, completed, failed, point):
    installation.configure(reclaim={"resume": 0, "jobs": 0, "trash_grace": 0})
    if point in POINTS[4:]:
        installation.run("reclaim", check=0)
    killed = installation.run("reclaim", TFSLURM_FAULT=point)
    assert killed.returncode == -signal.SIGKILL, f"{point} was not reached\n{killed.stdout}{killed.stderr}"
    Lease.update(expires_at=now()).execute()
    for job in (completed, failed):
        paths = installation.root.job(job.id)
        assert paths.config.exists() and paths.metrics.exists()
        assert paths.log(0).read_text().endswith(LINE)
    installation.run("reclaim", check=0)
    installation.run("reclaim", check=0)
    assert left(installation.root.job(failed.id)) == RECORD
    for paths in (installation.root.job(completed.id), installation.root.job(failed.id)):
        assert not {"adapter", "resume", "plan.npz"} & set(left(paths))
        assert all(log.stat().st_size <= LOG_END for log in paths.logs.iterdir())
        assert all(not name.startswith(".") for name in os.listdir(paths.logs))
    assert not os.listdir(installation.root.trash)
    assert wrong(installation, 2) == []
    assert queries.find_checkpoint("first").artifact.status == "ready"


@pytest.fixture
def array(installation):
    """An array of two tasks, each of a job that ended."""
    paths, jobs = installation.root.array("a-uuid"), [installation.job("one"), installation.job("two")]
    paths.folder.mkdir(parents=True)
    paths.script.write_text("#!/bin/bash\n")
    lines = (f"{number}\t{installation.root.job(job.id).folder}\n" for number, job in enumerate(jobs))
    paths.cells.write_text("".join(lines))
    Job.update(status="stopped", ended_at=now()).execute()
    Submission.update(state=SubmissionState.ENDED, ended_at=now(), name="a-uuid").execute()
    return paths.folder


def test_the_folder_of_an_array_goes_when_all_its_tasks_ended_long_ago(installation, array):
    reclaim(installation.settings, at=later(89))
    assert array.exists()
    task = Submission.select().first()
    Submission.update(state=SubmissionState.SUBMITTED).where(Submission.uuid == task.uuid).execute()
    reclaim(installation.settings, at=later(4000))
    assert array.exists()
    Submission.update(state=SubmissionState.ENDED).execute()
    Job.update(status="pending").where(Job.id == task.object_id).execute()  # between two submissions
    reclaim(installation.settings, at=later(4000))
    assert array.exists()
    Job.update(status="error").where(Job.id == task.object_id).execute()
    done = reclaim(installation.settings, at=later(91))
    assert reasons(done.steps, "trash") == {"arrays/a-uuid": "all that was handed over with it has ended"}
    assert not array.exists()


def test_the_places_of_a_sweep_without_slurm_stay_as_long_as_it_runs(installation):
    job = installation.job()
    sweep = Sweep.create(id="sw-0000000000000001", name="rates", grid=[], owner="somebody", created_at=now())
    Job.update(sweep=sweep).execute()
    places = installation.root.array(sweep.id).folder
    places.mkdir(parents=True)
    (places / "place-0").touch()
    reclaim(installation.settings, at=later(4000))
    assert places.exists()
    Job.update(status="completed", ended_at=now()).where(Job.id == job.id).execute()
    Submission.update(state=SubmissionState.ENDED, ended_at=now()).execute()
    reclaim(installation.settings, at=later(89))
    assert places.exists()
    reclaim(installation.settings, at=later(91))
    assert not places.exists()


def test_an_array_of_a_command_that_was_killed_goes_and_one_that_ran_without_a_row_stays(installation):
    folders = []
    for name in ("half-written", "killed", "ran"):
        paths, cell = installation.root.array(name), installation.root.job(f"job-of-{name}")
        paths.folder.mkdir(parents=True)
        if name != "half-written":
            cell.folder.mkdir()
            paths.cells.write_text(f"uuid\t{cell.folder}\n")
        folders.append(paths.folder)
        if name == "ran":
            cell.started.write_text(json.dumps({"uuid": "uuid"}))
    reclaim(installation.settings, at=later(6))
    assert all(map(Path.exists, folders))
    reclaim(installation.settings, at=later(8))
    assert [folder.exists() for folder in folders] == [False, False, True]


def test_what_was_noted_of_a_reclaimed_datasets_files_goes_with_it(installation):
    from tfslurm.datasets import registry

    made = installation.dataset()
    noted = installation.root.cache / "identities" / f"{made.artifact_id}.json"
    noted.parent.mkdir()
    noted.write_text("{}")
    registry.delete(made)
    reclaim(installation.settings, at=later(6))
    assert noted.exists()
    for days in (8, 9):
        reclaim(installation.settings, at=later(days))
    assert Artifact.get_by_id(made.artifact_id).reclaimed_at
    assert not noted.exists()
