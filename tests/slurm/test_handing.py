"""Handing over to a Slurm that answers late, twice, or with every transient error: nothing lost, nothing doubled."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tfslurm.catalog.db import write_transaction
from tfslurm.catalog.models import Submission
from tfslurm.slurm import handing, submissions
from tfslurm.slurm.client import TRANSIENT, Slurm, SlurmMissing, SlurmRefused, SlurmUnreachable
from tfslurm.slurm.executors import Handed, LocalLauncher, SlurmLauncher
from tfslurm.slurm.handing import TRIES, hand

# A controller in a folder. Each sbatch does what the next line of `modes` says.
SBATCH = """
name=$(sed -n 's/^#SBATCH --job-name=//p' "${@: -1}")
take() ( # under a lock, as a controller does
  exec 9>"$CONTROLLER/lock"; flock 9
  n=$(($(wc -l <"$CONTROLLER/jobs") + 101)); echo "$n $name" >>"$CONTROLLER/jobs"; echo "$n"
)
mode=$(head -n 1 "$CONTROLLER/modes"); sed -i 1d "$CONTROLLER/modes"
echo "$name" >>"$CONTROLLER/asked"
case $mode in
  "") take ;;
  late) take; exec sleep 9 ;;
  later) (sleep 0.6; take) >/dev/null 2>&1 & exec sleep 9 ;;
  silent) exec sleep 9 ;;
  twice) take >/dev/null; take ;;
  garbled) take >/dev/null; echo "sbatch: who knows" ;;
  taken:*) take >/dev/null; echo "${mode#taken:}" >&2; exit 1 ;;
  *) echo "$mode" >&2; exit 1 ;;
esac
"""
SQUEUE = """
mode=$(head -n 1 "$CONTROLLER/squeue" 2>/dev/null); sed -i 1d "$CONTROLLER/squeue" 2>/dev/null
[[ -z $mode ]] || { echo "$mode" >&2; exit 1; }
for word; do [[ $word != --name=* ]] || sed -n "s/ ${word#--name=}\\$//p" "$CONTROLLER/jobs"; done
"""


@pytest.fixture
def controller(tmp_path, program, monkeypatch):
    folder = tmp_path / "controller"
    folder.mkdir()
    (folder / "jobs").touch()
    (folder / "modes").touch()
    commands = {"sbatch": SBATCH, "squeue": SQUEUE, "scontrol": "echo 'ClusterName = lab'"}
    for name, body in commands.items():
        path = program(name, body)
    monkeypatch.setenv("CONTROLLER", str(folder))
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    return folder


@pytest.fixture
def script(tmp_path):
    def script(name):
        path = tmp_path / f"{name}.sh"
        path.write_text(f"#!/bin/bash\n#SBATCH --job-name={name}\n")
        return path

    return script


def jobs_of(controller, name):
    return [line.split()[0] for line in (controller / "jobs").read_text().splitlines() if line.split()[1] == name]


def submit(script, name="u-1", *, patience=30.0, timeout=5.0):
    slept = []
    launcher = SlurmLauncher(Slurm(timeout))
    return hand(launcher, script(name), name, patience=patience, sleep=slept.append), slept


@pytest.mark.parametrize("said", TRANSIENT)
@pytest.mark.parametrize("taken", [True, False])
def test_after_every_transient_error_there_is_one_job(controller, script, said, taken):
    (controller / "modes").write_text(f"{'taken:' if taken else ''}sbatch: error: {said}\n")
    handed, slept = submit(script)
    assert handed == Handed("lab", "101")
    assert jobs_of(controller, "u-1") == ["101"]
    assert (controller / "asked").read_text().count("u-1") == (1 if taken else 2)
    assert len(slept) == 1


@pytest.mark.parametrize("mode", ["late", "garbled"])
def test_what_was_taken_without_an_answer_is_adopted(controller, script, mode):
    (controller / "modes").write_text(f"{mode}\n")
    handed, _ = submit(script, timeout=1.0)
    assert [handed.job_id] == jobs_of(controller, "u-1") == ["101"]


def test_nothing_is_submitted_again_before_slurm_says_that_it_has_none(controller, script):
    (controller / "modes").write_text("taken:Socket timed out\n")
    (controller / "squeue").write_text("Unable to contact slurm controller\n" * 3)
    handed, slept = submit(script)
    assert handed.job_id == "101"
    assert (controller / "asked").read_text() == "u-1\n"
    assert len(slept) == 4
    assert slept == sorted(slept)


@pytest.mark.parametrize(
    "said",
    [
        "invalid partition specified: gpus",
        "Batch job submission failed: Invalid account or account/partition combination specified",
        "QOSMaxSubmitJobPerUserLimit",
        "Invalid job array specification",
    ],
)
def test_a_refusal_is_not_tried_again(controller, script, said):
    (controller / "modes").write_text(f"sbatch: error: {said}\n")
    with pytest.raises(SlurmRefused, match=said):
        submit(script)
    assert (controller / "asked").read_text() == "u-1\n"
    assert jobs_of(controller, "u-1") == []


def test_tries_are_bounded_in_number_and_in_time(controller, script):
    (controller / "modes").write_text("Socket timed out\n" * 20)
    with pytest.raises(SlurmUnreachable, match="Socket timed out") as caught:
        submit(script)
    assert "tfslurm sync" in caught.value.hint
    assert (controller / "asked").read_text().count("u-1") == TRIES
    with pytest.raises(SlurmUnreachable):
        submit(script, "u-2", patience=-1.0)
    assert (controller / "asked").read_text().count("u-2") == 1


def test_a_machine_without_slurm_is_told_at_once(script, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmMissing):
        submit(script)


KILLED = """
import sys
from tfslurm import settings
from tfslurm.catalog import db
from tfslurm.catalog.models import Submission
from tfslurm.slurm import submissions
loaded = settings.load(settings.Path(sys.argv[1]))
db.connect(loaded)
rows = list(Submission.select().order_by(Submission.array_index))
submissions.hand_over_array(loaded, rows, loaded.root.array(rows[0].name).script, print)
"""


def test_a_submitter_killed_before_it_noted_the_answer_leaves_rows_that_find_their_array(controller, on_slurm):
    settings = on_slurm.settings
    size = settings.instance("small", "training")
    name, text = submissions.array_script_for(settings, size, "sweep", "sw-1", 3)
    tasks = [(f"u-{n}", f"job-{n}") for n in range(3)]
    submissions.write_array(settings.root.array(name), text, ((u, settings.root.job(i).folder) for u, i in tasks))
    with write_transaction():
        rows = submissions.record_array(name, size, "job", tasks)
    repository = str(Path(__file__).parents[2])
    environ = {**os.environ, "TFSLURM_FAULT": "submission-handed", "PYTHONPATH": repository}
    done = subprocess.run([sys.executable, "-c", KILLED, on_slurm.config], env=environ, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert {row.state for row in Submission.select()} == {"submitting"}
    found = SlurmLauncher(Slurm(5)).find(name)
    assert [handed.job_id for handed in found] == jobs_of(controller, name) == ["101"]
    submissions.note_handed(rows, found[0])
    kept = Submission.select().order_by(Submission.array_index)
    assert [(row.state, row.job_id) for row in kept] == [("submitted", f"101_{n}") for n in range(3)]


def test_a_local_script_is_started_once(tmp_path, until):
    path = tmp_path / "script.sh"
    path.write_text(f"echo ran >>{tmp_path}/ran\n")
    handed = hand(LocalLauncher(), path, "u-1", patience=1.0)
    assert handed.cluster == os.uname().nodename
    until((tmp_path / "ran").exists)
    assert LocalLauncher().find("u-1") == []


ERRORS = [
    "twice",
    "garbled",
    "taken:Socket timed out",
    "Unable to contact slurm controller",
    "Zero Bytes were transmitted",
]
MODES = ["", *ERRORS, *ERRORS, "late", "later", "silent"]


@pytest.fixture
def on_slurm(installation, program):
    """Jobs whose script really runs: `run` is what a node would do with what the controller took."""
    folder = str(installation.folder / "instances.yaml")
    with open(folder, "w") as file:
        file.write("instances: {small: {memory: 1G}}")
    python = program("python", '[[ $2 != *trainer ]] || echo ran >>"$3/ran"')
    slow = {"command_timeout": 0.3}
    installation.configure(environments={"train": str(python), "core": "/bin/true"}, slurm=slow)
    return installation


def test_in_a_hundred_tries_no_job_is_lost_and_none_runs_twice(controller, on_slurm, monkeypatch, until):
    settings, choice, open_ = on_slurm.settings, random.Random(4), 0
    monkeypatch.setattr(handing, "FIRST_DELAY", 0.0)
    size = settings.instance("small", "training")
    made = []
    for number in range(100):
        modes = [choice.choice(MODES) for _ in range(choice.choice([0, 1, 1, 2]))]
        (controller / "modes").write_text("\n".join(modes) + "\n")
        paths = settings.root.job(f"job-{number}")
        paths.logs.mkdir(parents=True)
        name, text = submissions.script_for(settings, "train", size, paths, "job", f"job-{number}")
        paths.script.write_text(text)
        with write_transaction():
            row = submissions.record(name, size, "job", f"job-{number}")
        try:
            submissions.hand_over(settings, row, paths.script, pytest.fail)
        except SlurmUnreachable:
            open_ += 1  # what sync does later, when Slurm answers
            (controller / "modes").write_text("\n")
            slurm = SlurmLauncher(Slurm(5))
            submissions.note_handed(row, (slurm.find(name) or [slurm.submit(paths.script)])[0])
        made.append((row, paths))
    for row, _ in made:
        assert Submission.get_by_id(row.uuid).job_id in jobs_of(controller, row.name)
    until(lambda: not subprocess.run(["pgrep", "-f", f"{controller.parent}.*sbatch"], capture_output=True).stdout)
    ran = 0
    for row, paths in made:
        for job_id in jobs_of(controller, row.name):
            environ = {**os.environ, "SLURM_JOB_ID": job_id, "SLURM_JOB_NODELIST": "n1"}
            # Without srun a node has nothing to run ranks with: the claim is what counts here.
            subprocess.run(["bash", paths.script], env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        assert paths.claim(row.uuid).read_text().strip() == jobs_of(controller, row.name)[0]
        ran += len(list(paths.logs.glob("attempt-*.log")))
        assert paths.log(0).read_text().count("attempt 0 on") == 1
    assert ran == 100
    assert open_ < 100
