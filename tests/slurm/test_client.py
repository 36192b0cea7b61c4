"""The client, on commands that stand in for Slurm's where these won't fail on demand."""

import os
from datetime import UTC, datetime

import pytest

from tfslurm.errors import InvalidError, UnreachableError
from tfslurm.slurm.client import CHUNK, Slurm, SlurmRefused, SlurmUnreachable


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Make a command on PATH: `command("squeue", "echo …")`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def make(name, body):
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        os.chmod(folder / name, 0o755)

    return make


slurm = Slurm(timeout=5)


def refuse(text):
    return f"echo 'slurm_load_jobs error: {text}' >&2; exit 1"


def test_a_missing_command_is_unreachable(command, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmUnreachable, match="sinfo is not on PATH"):
        slurm.run("sinfo")
    assert not Slurm.installed()


def test_a_command_that_does_not_answer_is_given_up(command):
    command("squeue", "sleep 20")
    with pytest.raises(SlurmUnreachable, match="squeue did not answer within 0.2 s"):
        Slurm(timeout=0.2).queue(["1"])


@pytest.mark.parametrize(
    "text",
    [
        "Socket timed out on send/recv operation",
        "Unable to contact slurm controller (connect failure)",
        "Unexpected message received",
        "slurm_persist_conn_open_without_init: failed to open persistent connection to host:localhost:6819",
        "Connection refused",
        "Zero Bytes were transmitted or received",
        "Slurm temporarily unable to accept job, sleeping and retrying",
        "Resource temporarily unavailable",
    ],
)
def test_what_a_busy_controller_says_is_unreachable(command, text):
    command("sbatch", refuse(text))
    with pytest.raises(SlurmUnreachable) as caught:
        slurm.run("sbatch")
    assert text.split()[0] in caught.value.message
    assert caught.value.exit_code == 7


@pytest.mark.parametrize(
    "text", ["invalid partition specified: gpus", "Invalid account or account/partition combination specified"]
)
def test_any_other_failure_is_a_refusal_in_slurms_own_words(command, text):
    command("sbatch", refuse(text))
    with pytest.raises(SlurmRefused, match=text) as caught:
        slurm.run("sbatch")
    assert caught.value.exit_code == 5


def test_a_silent_failure_says_its_exit_code(command):
    command("sbatch", "exit 9")
    with pytest.raises(SlurmRefused, match="exit code 9"):
        slurm.run("sbatch")


def test_the_errors_are_of_the_tree():
    assert issubclass(SlurmUnreachable, UnreachableError)
    assert issubclass(SlurmRefused, InvalidError)


def test_the_queue_is_read_field_by_field(command):
    command("squeue", 'printf "%s\\n" "7|u-1|PENDING|Resources||N/A" "8_3|u-2|RUNNING|None|n1|2026-01-02T03:04:05"')
    entries = slurm.queue(["7", "8_3"])
    assert (entries["7"].state, entries["7"].reason, entries["7"].nodes) == ("PENDING", "Resources", "")
    assert (entries["8_3"].name, entries["8_3"].nodes, entries["8_3"].start) == ("u-2", "n1", "2026-01-02T03:04:05")


def test_a_queue_that_forgot_the_only_job_is_empty(command):
    command("squeue", refuse("Invalid job id specified"))
    assert slurm.queue(["7"]) == {}


def test_a_queue_that_does_not_answer_is_not_empty(command):
    command("squeue", refuse("Socket timed out on send/recv operation"))
    with pytest.raises(SlurmUnreachable):
        slurm.queue(["7"])
    command("squeue", refuse("Access denied"))
    with pytest.raises(SlurmRefused):
        slurm.queue(["7"])


def test_many_jobs_are_asked_for_in_chunks(command, tmp_path):
    command("squeue", f'echo "${{@: -1}}" >>{tmp_path}/asked')
    assert slurm.queue([str(n) for n in range(CHUNK + 1)]) == {}
    asked = (tmp_path / "asked").read_text().split()
    assert [line.count(",") for line in asked] == [CHUNK - 1, 0]


def test_nothing_is_asked_about_no_job(command):
    assert slurm.queue([]) == slurm.accounting([], datetime.now(UTC)) == {}


def test_of_several_runs_of_a_job_the_newest_counts(command, tmp_path):
    command(
        "sacct",
        f'echo "$TZ $*" >{tmp_path}/asked; '
        'printf "%s\\n" "7|u-1|NODE_FAIL|None|n1|Unknown|0:0" "7|u-1|CANCELLED by 1000|None|n2|Unknown|0:15"',
    )
    entry = slurm.accounting(["7"], datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))["7"]
    assert (entry.state, entry.nodes, entry.exit_code) == ("CANCELLED by 1000", "n2", "0:15")
    assert "--starttime=2026-01-0" in (tmp_path / "asked").read_text()


def test_a_job_is_found_by_its_name(command):
    command("squeue", '[[ "$*" == *--name=u-1* ]] && echo 42; true')
    assert slurm.find("u-1") == "42"
    assert slurm.find("u-2") is None


def test_cancelling_what_has_ended_is_done(command):
    command("scancel", "echo 'scancel: error: Kill job error on job id 7: Invalid job id specified' >&2; exit 1")
    slurm.cancel("7")
    command("scancel", refuse("Access/permission denied"))
    with pytest.raises(SlurmRefused, match="permission denied"):
        slurm.cancel("7")


def test_the_cluster_is_read_from_the_controller(command):
    command("scontrol", "echo 'Configuration data as of now'; echo 'ClusterName             = lab'")
    assert slurm.cluster() == "lab"
    command("scontrol", "echo nothing")
    with pytest.raises(SlurmRefused, match="names no cluster"):
        slurm.cluster()


def test_times_are_asked_for_in_the_standard_form(command):
    command("squeue", 'echo "$SLURM_TIME_FORMAT"')
    assert slurm.run("squeue") == "standard\n"


def test_a_command_never_waits_for_the_terminal(command):
    command("squeue", "cat; echo done")
    assert slurm.run("squeue") == "done\n"


def test_a_test_of_a_script_says_what_slurm_thinks(command, tmp_path):
    command("sbatch", "echo 'sbatch: Job 7 to start at 2026-01-02T03:04:05 on n1' >&2")
    assert slurm.test(tmp_path / "s.sh").startswith("Job 7 to start at")
    command("sbatch", "echo 'allocation failure: Invalid qos' >&2; exit 1")
    with pytest.raises(SlurmRefused, match="Invalid qos"):
        slurm.test(tmp_path / "s.sh")
    command("sbatch", "sleep 20")
    with pytest.raises(SlurmUnreachable):
        Slurm(timeout=0.2).test(tmp_path / "s.sh")


def test_submitit_hands_the_script_over_as_it_is(command, tmp_path):
    from tfslurm.slurm.executors import SlurmLauncher

    command("sbatch", f'echo "$*" >{tmp_path}/asked; echo "42;west"')
    (tmp_path / "script.sh").write_text("#!/bin/bash\n")
    handed = SlurmLauncher(slurm).submit(tmp_path / "script.sh")
    assert (handed.cluster, handed.job_id) == ("west", "42")
    assert (tmp_path / "asked").read_text() == f"--parsable {tmp_path / 'script.sh'}\n"


def test_a_cluster_that_sbatch_does_not_name_is_asked_for(command, tmp_path):
    from tfslurm.slurm.executors import SlurmLauncher

    command("sbatch", "echo 42")
    command("scontrol", "echo 'ClusterName = lab'")
    handed = SlurmLauncher(slurm).submit(tmp_path / "script.sh")
    assert (handed.cluster, handed.job_id) == ("lab", "42")
