"""Sweeps on a real Slurm: one array, a job a cell; and what Slurm says no to."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from datetime import timedelta

import pytest

from tfslurm.catalog import queries
from tfslurm.catalog.models import Event, Job, JobStatus, Submission, SubmissionState, Sweep, now
from tfslurm.errors import InvalidError, StatusError
from tfslurm.slurm.client import Limits, Slurm, SlurmRefused, SlurmUnreachable
from tfslurm.training import jobs, ranking, stopping, sweeps
from tfslurm.training.grid import parse_grid

INSTANCES = {
    "cell": {"purposes": ["training"], "memory": "100M", "time": 10},
    "moon": {"purposes": ["training"], "partition": "moon"},
    "few": {"purposes": ["training"], "memory": "100M", "time": 10, "qos": "limited"},
    "long": {"purposes": ["training"], "memory": "100M", "time": "2-00:00:00"},
}

TRAIN = """
[[ $2 == *trainer ]] || exit 0
rank=$(grep -o '"lora_rank": [0-9]*' "$3/training.json" | grep -o '[0-9]*')
if [[ $rank == 13 ]]; then
  echo '{"result": "failed", "error": "13 is bad luck"}' >"$3/outcome.json"; exit 1
fi
printf '{"step": 2, "steps": 2, "epoch": 1, "loss": %s.5}' "$rank" >"$3/progress.json"
while [[ $rank == 32 ]]; do
  [[ -e $3/stop ]] && echo '{"result": "stopped", "step": 2}' >"$3/outcome.json" && exit 0
  sleep 0.1
done
mkdir -p "$3/adapter"
printf 'weights %s' "$rank" >"$3/adapter/adapter_model.safetensors"
size=$(stat -c %s "$3/adapter/adapter_model.safetensors")
sha=$(sha256sum <"$3/adapter/adapter_model.safetensors" | cut -d ' ' -f 1)
file="{\\"adapter_model.safetensors\\": {\\"size\\": $size, \\"sha256\\": \\"$sha\\"}}"
adapter="{\\"lora_rank\\": $rank, \\"target_modules\\": [\\"q\\"], \\"files\\": $file}"
totals='"steps": 2, "final_loss": 0.5, "examples": 1, "tokens": 10, "peak_memory_bytes": 1'
echo "{\\"result\\": \\"succeeded\\", $totals, \\"adapter\\": $adapter}" >"$3/outcome.json"
"""


@pytest.fixture
def site(installation, program):
    """Instances on Slurm, a trainer that takes its lora_rank as its part, a model and a dataset."""
    environments = {"train": str(program("python", TRAIN)), "core": "/bin/true"}
    (installation.folder / "instances.yaml").write_text(json.dumps({"instances": INSTANCES}))
    installation.configure(environments=environments, training={"instance": "cell"}, slurm={"poll_floor": 0})
    installation.model()
    installation.dataset()
    return installation


@pytest.fixture
def cluster(site):
    if not shutil.which("sbatch") or "TFSLURM_DEVCLUSTER" not in os.environ:
        pytest.skip('no dev cluster is up: run scripts/test, or eval "$(scripts/devcluster up)"')
    yield site
    for name in {submission.name for submission in Submission.select()}:
        subprocess.run(["scancel", "--name", name], check=True)


def planned(site, *grid, **request):
    fields = {name: request.pop(name) for name in ("instance", "name") if name in request}
    fixed = jobs.Request("tiny", "chats", **fields)
    return sweeps.plan(site.settings, sweeps.Request(fixed, parse_grid(grid), **request))


def swept(site, *grid, **request):
    return sweeps.create(site.settings, planned(site, *grid, **request))


def by_rank(site, sweep):
    return {cell["hyperparameters"]["lora_rank"]: cell for cell in ranking.ranked(site.root, sweep)}


def ended(site, sweep):
    def look():
        summary = site.sync()
        assert not summary.failed, summary.failed
        return all(JobStatus(job.status).ended for job in queries.jobs_of(sweep))

    return look


@pytest.mark.slurm
def test_the_cells_of_a_sweep_are_one_array_and_each_ends_for_itself(cluster, until):
    site, sweep = cluster, swept(cluster, "lora_rank=8,13,32,16", name="s", max_parallel=3)
    submissions = list(Submission.select().order_by(Submission.array_index))
    array = submissions[0].job_id.partition("_")[0]
    assert [s.job_id for s in submissions] == [f"{array}_{index}" for index in range(4)]
    assert {s.state for s in submissions} == {"submitted"}
    shown = subprocess.run(["scontrol", "show", "job", array], capture_output=True, text=True, check=True).stdout
    assert "ArrayTaskThrottle=3" in shown
    assert f"JobName={submissions[0].name}" in shown

    until(lambda: site.sync() and by_rank(site, sweep)[32]["status"] == "running", timeout=60)
    until(lambda: site.sync() and by_rank(site, sweep)[16]["status"] == "completed", timeout=60)
    stopping.stop(site.settings, queries.find_job("s-2"))
    until(ended(site, sweep), timeout=60)
    cells = by_rank(site, sweep)
    assert {rank: cell["status"] for rank, cell in cells.items()} == {
        8: "completed", 13: "error", 16: "completed", 32: "stopped",
    }  # fmt: skip
    assert cells[13]["error"] == "13 is bad luck"
    assert [cell["name"] for cell in ranking.ranked(site.root, sweep)] == ["s-0", "s-3", "s-2", "s-1"]
    for rank in (8, 16):
        checkpoint = queries.find_checkpoint(cells[rank]["checkpoint"])
        assert (checkpoint.metadata["lora_rank"], checkpoint.artifact.producer) == (rank, cells[rank]["id"])
    assert cells[13]["checkpoint"] is cells[32]["checkpoint"] is None
    view = ranking.sweep_view(sweep)
    assert (view["status"], view["statuses"]) == ("error", {"stopped": 1, "completed": 2, "error": 1})
    assert {s.state for s in Submission.select()} == {SubmissionState.ENDED}


@pytest.mark.slurm
def test_a_stop_of_the_sweep_cancels_what_waits_and_asks_what_runs(cluster, until):
    site, sweep = cluster, swept(cluster, "lora_rank=32", "seed=1,2,3", name="s", max_parallel=1)
    until(lambda: site.sync() and [job for job in queries.jobs_of(sweep) if job.status == "running"], timeout=60)
    sweeps.stop(site.settings, sweep)
    until(ended(site, sweep), timeout=60)
    assert {job.status for job in queries.jobs_of(sweep)} == {"stopped"}
    assert sum((site.root.job(job.id).outcome).exists() for job in queries.jobs_of(sweep)) == 1
    with pytest.raises(StatusError, match="have ended already"):
        sweeps.stop(site.settings, sweep)


@pytest.mark.slurm
def test_one_waiting_cell_is_stopped_while_the_rest_of_its_array_goes_on(cluster, until):
    site, sweep = cluster, swept(cluster, "lora_rank=32,16,8", name="s", max_parallel=1)
    until(lambda: site.sync() and queries.find_job("s-0").status == "running", timeout=60)
    stopping.stop(site.settings, queries.find_job("s-1"))
    until(lambda: site.sync() and queries.find_job("s-1").status == "stopped")
    assert [job.status for job in queries.jobs_of(sweep)] == ["running", "stopped", "pending"]
    stopping.stop(site.settings, queries.find_job("s-0"))
    until(ended(site, sweep), timeout=60)
    assert [job.status for job in queries.jobs_of(sweep)] == ["stopped", "stopped", "completed"]


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("instance", "said"),
    [
        ("moon", "invalid partition specified: moon"),
        ("long", "PartitionTimeLimit"),
        ("few", "Job violates accounting/QOS policy"),
    ],
)
def test_what_slurm_would_not_take_is_refused_in_its_words_before_anything_is_written(cluster, instance, said):
    before = cluster.everything()
    with pytest.raises(SlurmRefused, match=said):
        swept(cluster, "seed=1,2,3", instance=instance)
    assert cluster.everything() == before
    if instance != "few":
        made = jobs.plan(cluster.settings, jobs.Request("tiny", "chats", instance=instance))
        with pytest.raises(SlurmRefused, match=said):
            jobs.create(cluster.settings, made)
        assert cluster.everything() == before


@pytest.mark.slurm
def test_more_cells_than_an_array_takes_are_several(cluster, monkeypatch, until):
    monkeypatch.setattr(Slurm, "limits", lambda self: Limits(max_array_size=3))
    site, sweep = cluster, swept(cluster, "lora_rank=8", "seed=1,2,3,4", name="s")
    until(ended(site, sweep), timeout=60)
    assert {job.status for job in queries.jobs_of(sweep)} == {"completed"}
    tasks = [(s.name, s.array_index) for s in Submission.select()]
    assert len({name for name, _ in tasks}) == 2
    assert sorted(index for _, index in tasks) == [0, 0, 1, 1]


@pytest.mark.slurm
@pytest.mark.parametrize("point", ["sweep-recorded", "submission-handed"])
def test_a_sweep_that_was_killed_before_its_rows_knew_is_one_array_after_sync(cluster, point, until):
    words = ("job", "sweep", "--model", "tiny", "--dataset", "chats", "--grid", "lora_rank=8,16", "--name", "s")
    environment = {"SLURM_CONF": os.environ["SLURM_CONF"], "TFSLURM_FAULT": point}
    assert cluster.run(*words, **environment).returncode == -signal.SIGKILL
    assert {s.state for s in Submission.select()} == {"submitting"}
    Submission.update(created_at=now() - timedelta(hours=1)).execute()
    until(ended(cluster, queries.find_sweep("s")), timeout=60)
    assert {job.status for job in Job.select()} == {"completed"}
    name = Submission.get().name
    command = ["squeue", "-h", "--states=all", "--array", f"--name={name}", "--format=%i"]
    known = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert len(known) == 2


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Put a command of one's own before Slurm's."""
    folder = tmp_path / "commands"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def write(name, body):
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)

    write("scontrol", "echo 'MaxArraySize = 1001'; echo 'ClusterName = lab'")
    write("sinfo", "true")
    return write


def test_a_refusal_that_comes_late_puts_every_cell_in_error_with_slurms_words(site, command):
    command("sbatch", '[[ $1 == --test-only ]] || { echo "sbatch: error: no, not today" >&2; exit 1; }')
    with pytest.raises(SlurmRefused, match="no, not today"):
        swept(site, "seed=1,2,3", name="s")
    sweep = queries.find_sweep("s")
    assert {(job.status, job.error) for job in queries.jobs_of(sweep)} == {("error", "sbatch: error: no, not today")}
    assert {s.state for s in Submission.select()} == {SubmissionState.ENDED}
    assert Event.select().where(Event.change == "error").count() == 3
    view = ranking.sweep_view(sweep)
    assert view["error"] == "3 of 3 jobs failed; 's-0': sbatch: error: no, not today"


def test_a_refusal_of_the_first_array_is_one_of_those_after_it(site, command, monkeypatch):
    monkeypatch.setattr(Slurm, "limits", lambda self: Limits(max_array_size=2))
    command("sbatch", '[[ $1 == --test-only ]] || { echo "sbatch: error: no" >&2; exit 1; }')
    with pytest.raises(SlurmRefused, match="no"):
        swept(site, "seed=1,2,3", name="s")
    assert {job.status for job in Job.select()} == {"error"}
    assert {s.state for s in Submission.select()} == {SubmissionState.ENDED}


def test_a_slurm_that_does_not_answer_leaves_the_sweep_to_sync(site, command):
    site.configure(slurm={"command_timeout": 0.2})
    for name in ("sbatch", "scontrol", "sinfo", "squeue"):
        command(name, "echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(SlurmUnreachable):
        swept(site, "seed=1,2", name="s")
    assert {job.status for job in Job.select()} == {"pending"}
    assert {s.state for s in Submission.select()} == {"submitting"}
    assert all(site.root.job(job.id).config.exists() for job in Job.select())


def test_each_array_gets_its_share_of_what_may_run_at_once(site, command, monkeypatch):
    monkeypatch.setattr(Slurm, "limits", lambda self: Limits(max_array_size=3))
    made = planned(site, "seed=1,2,3,4,5,6,7", max_parallel=4)
    assert [len(batch.cells) for batch in made.batches] == [2, 2, 3]
    asked = [line for batch in made.batches for line in batch.script.splitlines() if "--array=" in line]
    assert asked == ["#SBATCH --array=0-1%1", "#SBATCH --array=0-1%1", "#SBATCH --array=0-2%2"]
    with pytest.raises(InvalidError, match="7 cells need 3 arrays"):
        planned(site, "seed=1,2,3,4,5,6,7", max_parallel=2)


def test_what_is_written_is_read_only_and_the_cells_lead_to_it(site, command):
    command("sbatch", "echo 7")
    sweep = swept(site, "learning_rate=1e-4,2e-4", "lora_rank=8,16", name="s")
    found = queries.jobs_of(sweep)
    array = site.root.array(Submission.get().name)
    lines = [line.split("\t") for line in array.cells.read_text().splitlines()]
    assert [folder for _, folder in lines] == [str(site.root.job(job.id).folder) for job in found]
    assert [uuid for uuid, _ in lines] == [s.uuid for s in Submission.select().order_by(Submission.array_index)]
    for job, (rate, rank) in zip(found, ((1e-4, 8), (1e-4, 16), (2e-4, 8), (2e-4, 16)), strict=True):
        paths = site.root.job(job.id)
        assert [path.stat().st_mode & 0o777 for path in (paths.config, paths.deepspeed)] == [0o444, 0o444]
        config = json.loads(paths.config.read_text())
        assert (config["job_id"], config["name"]) == (job.id, job.name)
        assert (config["hyperparameters"]["learning_rate"], config["hyperparameters"]["lora_rank"]) == (rate, rank)
        assert json.loads(paths.deepspeed.read_text())["optimizer"]["params"]["lr"] == rate
    assert Sweep.get().grid == [["learning_rate", [1e-4, 2e-4]], ["lora_rank", [8, 16]]]


def test_a_validation_loss_ranks_before_a_training_loss(site, command):
    command("sbatch", "echo 7")
    sweep = swept(site, "seed=1,2,3", name="s")
    for job, loss in zip(queries.jobs_of(sweep), (0.1, 0.7, 0.4), strict=True):
        site.root.job(job.id).progress.write_text(json.dumps({"step": 2, "steps": 2, "loss": loss}))
    best = site.root.job(queries.find_job("s-1").id)
    best.metrics.write_text(
        '{"step": 1, "loss": 2, "validation_loss": 9.5}\n{"step": 2, "validation_loss": 0.9}\n{"step": 3}\n'
    )
    cells = [(cell["name"], cell["loss"], cell["loss_of"]) for cell in ranking.ranked(site.root, sweep)]
    assert cells == [("s-1", 0.9, "validation"), ("s-0", 0.1, "training"), ("s-2", 0.4, "training")]


def test_ids_beyond_the_models_vocabulary_are_refused(site, command):
    dataset, model = queries.find_dataset("chats"), queries.find_model("tiny")
    model.metadata = {**model.metadata, "vocabulary_size": 100}
    model.save()
    for largest, fine in ((99, True), (100, False)):
        dataset.metadata = {"statistics": {"max_token_id": largest}}
        dataset.save()
        if fine:
            planned(site, "seed=1,2")
            continue
        with pytest.raises(InvalidError, match="token id 100, and base model 'tiny' only knows 0 to 99"):
            planned(site, "seed=1,2")
