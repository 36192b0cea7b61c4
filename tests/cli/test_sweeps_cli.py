"""tfslurm job sweep, cells, and what takes --sweep; on the local launcher."""

from __future__ import annotations

import os
import signal
from datetime import timedelta

import pytest

from tfslurm.catalog import queries
from tfslurm.catalog.models import Job, Submission, Sweep, now
from tfslurm.slurm import local

SWEEP = ("job", "sweep", "--model", "tiny", "--dataset", "chats")

TRAIN = """
[[ $2 == *trainer && $RANK == 0 ]] || exit 0
rank=$(grep -o '"lora_rank": [0-9]*' "$3/training.json" | grep -o '[0-9]*')
echo "$rank" >>"{log}"
[[ $rank == 13 ]] && exit 3
printf '{{"step": 2, "steps": 4, "epoch": 1, "loss": %s.5}}' "$rank" >"$3/progress.json"
{more}
echo '{{"result": "failed", "error": "rank '$rank' is done"}}' >"$3/outcome.json"
exit 1
"""


@pytest.fixture
def site(installation, program):
    """A model, a dataset and a trainer that notes the rank it was given."""
    installation.model()
    installation.dataset()

    def configure(more=""):
        python = program("python", TRAIN.format(log=installation.folder / "ran", more=more))
        installation.configure(environments={"train": str(python), "core": "/bin/true"})
        return installation

    configure()
    installation.train = configure
    yield installation
    for submission in Submission.select().where(Submission.job_id.is_null(False)):
        local.end(submission.job_id, signal.SIGKILL)


def test_a_sweep_is_a_job_a_cell_with_its_own_numbers_and_folder(site, cli):
    words = ("--grid", "learning-rate=1e-4,2e-4", "--grid", "lora_rank=8,16,32", "--name", "s", "--epochs", "2")
    made = cli(*SWEEP, *words, "--json").json()
    assert (made["name"], made["kind"], made["cells"]) == ("s", "sweep", 6)
    assert made["grid"] == {"learning_rate": [0.0001, 0.0002], "lora_rank": [8, 16, 32]}
    jobs = [cli("job", "show", f"s-{index}", "--json").json() for index in range(6)]
    numbers = [(job["hyperparameters"]["learning_rate"], job["hyperparameters"]["lora_rank"]) for job in jobs]
    assert numbers == [(0.0001, 8), (0.0001, 16), (0.0001, 32), (0.0002, 8), (0.0002, 16), (0.0002, 32)]
    assert {job["hyperparameters"]["epochs"] for job in jobs} == {2}
    assert {job["sweep"] for job in jobs} == {made["id"]}
    assert len({job["location"] for job in jobs}) == 6
    for job in jobs:
        assert [event["change"] for event in cli("job", "events", job["id"], "--json").json()][0] == "created"


def test_the_seed_can_vary_too(site, cli):
    cli(*SWEEP, "--grid", "seed=3,1", "--name", "s")
    assert [cli("job", "show", f"s-{index}", "--json").json()["seed"] for index in (0, 1)] == [3, 1]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((), 2, "nothing varies"),
        (("--grid", "lora_rank"), 2, "--grid lora_rank: there is no ="),
        (("--grid", "rank=1"), 2, "there is no field 'rank'"),
        (("--grid", "lora_rank="), 2, "lora_rank: '' is not a whole number"),
        (("--grid", "lora_rank=8,,16"), 2, "lora_rank: '' is not a whole number"),
        (("--grid", "lora_rank=8.5"), 2, "lora_rank: '8.5' is not a whole number"),
        (("--grid", "learning_rate=fast"), 2, "learning_rate: 'fast' is not a number"),
        (("--grid", "learning_rate=1e-4,0.0001"), 2, "learning_rate: 0.0001 is there twice"),
        (("--grid", "lora_rank=8", "--grid", "lora-rank=16"), 2, "lora_rank is there twice"),
        (("--grid", "lora_rank=8", "--lora-rank", "8"), 2, "lora_rank is both fixed and in the grid"),
        (("--grid", "seed=1", "--seed", "1"), 2, "seed is both fixed and in the grid"),
        (("--grid", "lora_rank=8,100000"), 5, "lora_rank 100000 is not between 1 and 512"),
        (("--grid", "learning_rate=nan"), 5, "learning_rate nan is not between"),
        (("--grid", "max_seq_length=64,4096"), 5, "max_seq_length 4096 is not between 16 and 2048"),
        (("--grid", "seed=-1"), 5, "seed -1 is negative"),
        (("--grid", "seed=" + ",".join(map(str, range(10_001)))), 5, "10,001 cells"),
        (("--grid", "seed=" + ",".join(map(str, range(101)))), 5, "101 cells are too many for instance 'local'"),
        (("--grid", "seed=1", "--name", "x" * 62), 5, "is not allowed"),
        (("--grid", "seed=1", "--max-parallel", "0"), 2, "--max-parallel"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_left(site, cli, words, code, said):
    before = site.everything()
    done = cli(*SWEEP, *words)
    assert (done.code, said in done.stderr) == (code, True), done.stderr
    assert site.everything() == before


def test_a_taken_name_leaves_nothing(site, cli):
    site.job("s-1")
    before = site.everything()
    done = cli(*SWEEP, "--grid", "seed=1,2", "--name", "s")
    assert done.code == 4
    assert "'s-1', for a cell, is taken by job" in done.stderr
    assert site.everything() == before
    cli(*SWEEP, "--grid", "seed=1,2", "--name", "t")
    assert "taken by sweep" in cli(*SWEEP, "--grid", "seed=1,2", "--name", "t").stderr
    assert len(os.listdir(site.root.path / "jobs")) == 3
    assert len(os.listdir(site.root.path / "arrays")) == 1


def test_a_dry_run_makes_nothing(site, cli):
    before = site.everything()
    planned = cli(*SWEEP, "--grid", "lora_rank=8,16", "--name", "s", "--dry-run", "--json").json()
    assert [cell["name"] for cell in planned["cells"]] == ["s-0", "s-1"]
    assert [cell["hyperparameters"]["lora_rank"] for cell in planned["cells"]] == [8, 16]
    assert planned["training"]["hyperparameters"]["lora_rank"] == 8
    assert planned["script"].startswith("#!/bin/bash")
    text = cli(*SWEEP, "--grid", "lora_rank=8,16", "--name", "s", "--dry-run").stdout
    assert "# --- training.json" in text
    assert "# --- script.sh" in text
    assert site.everything() == before


def test_without_slurm_the_cells_run_in_turn_and_are_ranked(site, cli):
    done = cli(*SWEEP, "--grid", "lora_rank=16,13,8", "--name", "s", "--wait")
    assert done.code == 9
    assert "sweep 's' is error: 3 of 3 jobs failed" in done.stderr
    assert sorted((site.folder / "ran").read_text().split()) == ["13", "16", "8"]
    ranked = cli("job", "cells", "s", "--json").json()
    assert [(cell["rank"], cell["hyperparameters"]["lora_rank"], cell["loss"]) for cell in ranked] == [
        (1, 8, 8.5), (2, 16, 16.5), (3, 13, None),
    ]  # fmt: skip
    assert ranked[0]["loss_of"] == "training"
    table = cli("job", "cells", "s").stdout.splitlines()
    assert table[0].split() == ["RANK", "NAME", "LORA", "RANK", "STATUS", "LOSS", "LOSS", "OF", "CHECKPOINT"]
    assert table[1].split() == ["1", "s-2", "8", "error", "8.5", "training", "-"]
    assert cli("job", "show", "s-1", "--json").json()["error"].startswith("failed: exit code 3")


def test_at_most_max_parallel_cells_run_at_once(site, cli, until):
    site.train('while [[ ! -e "$3/go" ]]; do sleep 0.05; done')
    cli(*SWEEP, "--grid", "lora_rank=1,2,3,4", "--name", "s", "--max-parallel", "2")

    def counts():
        return cli("job", "list", "--sweep", "s", "--json").json()

    def running():
        return [job for job in counts() if job["status"] == "running"]

    first = until(lambda: len(found := running()) == 2 and found)
    assert len([job for job in counts() if job["status"] == "pending"]) == 2
    (site.root.job(first[0]["id"]).folder / "go").touch()
    until(lambda: len([job for job in counts() if job["status"] == "error"]) == 1 and len(running()) == 2)


def test_a_waiting_cell_is_stopped_by_itself_and_the_rest_together(site, cli, until):
    stopped = """echo '{"result": "stopped", "step": 1}' >"$3/outcome.json"; exit 0"""
    site.train(f'while [[ ! -e "$3/stop" ]]; do sleep 0.05; done; {stopped}')
    cli(*SWEEP, "--grid", "lora_rank=1,2,3", "--name", "s")
    until(lambda: cli("job", "list", "--status", "running", "--json").json())
    waiting = cli("job", "list", "--status", "pending", "--json").json()
    assert len(waiting) == 2
    cli("job", "stop", waiting[0]["id"])
    until(lambda: cli("job", "show", waiting[0]["id"], "--json").json()["status"] == "stopped")
    assert len(cli("job", "list", "--status", "running", "--json").json()) == 1
    assert cli("job", "stop", "--sweep", "s", "--json").json()["status"] in ("stopping", "stopped")
    assert cli("job", "wait", "--sweep", "s", "--timeout", "20").code == 9
    assert {job["status"] for job in cli("job", "list", "--sweep", "s", "--json").json()} == {"stopped"}
    done = cli("job", "stop", "--sweep", "s")
    assert (done.code, "have ended already" in done.stderr) == (4, True)


def test_stop_and_wait_take_a_job_or_a_sweep(site, cli):
    for words in (("job", "stop"), ("job", "wait"), ("job", "stop", "x", "--sweep", "y")):
        done = cli(*words)
        assert (done.code, "name a job, or a sweep" in done.stderr) == (2, True)
    for words in (("job", "stop", "--sweep", "y"), ("job", "cells", "y"), ("job", "list", "--sweep", "y")):
        done = cli(*words)
        assert (done.code, "no sweep 'y'" in done.stderr) == (3, True)


def test_the_listing_can_be_of_one_sweep(site, cli):
    cli(*SWEEP, "--grid", "seed=1,2", "--name", "s")
    site.job("other")
    assert {row["name"] for row in cli("job", "list", "--sweep", "s", "--json").json()} == {"s-0", "s-1"}
    assert len(cli("job", "list", "--json").json()) == 3


def test_sweeps_are_completed(site, cli):
    cli(*SWEEP, "--grid", "seed=1,2", "--name", "my-sweep")
    line = "tfslurm job stop --sweep my"
    done = site.run(_TFSLURM_COMPLETE="bash_complete", COMP_WORDS=line, COMP_CWORD="4", check=0)
    assert done.stdout.split() == ["plain,my-sweep"]


@pytest.mark.parametrize(("point", "rows"), [("sweep-written", 0), ("sweep-recorded", 3), ("submission-handed", 3)])
def test_a_sweep_that_is_killed_halfway_is_finished_by_sync_or_never_was(site, point, rows, until):
    done = site.run(*SWEEP, "--grid", "lora_rank=1,2,3", "--name", "s", TFSLURM_FAULT=point)
    assert done.returncode == -signal.SIGKILL
    assert (Job.select().count(), Sweep.select().count()) == (rows, rows and 1)
    if not rows:
        assert len(os.listdir(site.root.path / "jobs")) == 3  # for `reclaim`: no row names them
        return
    if point == "submission-handed":
        until(lambda: any(site.root.job(job.id).started.exists() for job in Job.select()))
    Submission.update(created_at=now() - timedelta(hours=1)).execute()
    until(lambda: site.sync().alive == 0, timeout=40)
    assert {job.status for job in Job.select()} == {"error"}
    assert sorted((site.folder / "ran").read_text().split()) == ["1", "2", "3"]
    assert queries.find_sweep("s").name == "s"
