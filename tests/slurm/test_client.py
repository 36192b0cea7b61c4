"""The client, on commands that stand in for Slurm's where these won't fail on demand."""

import os
import time
from datetime import UTC, datetime

import pytest

from tfslurm.errors import InvalidError, UnreachableError
from tfslurm.slurm.client import Slurm, SlurmMissing, SlurmRefused, SlurmUnreachable
from tfslurm.slurm.ids import LONGEST
from tfslurm.slurm.usage import Usage, usage


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


SINCE = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

CONFIG = """cat <<'END'
Configuration data as of now
AccountingStorageType   = accounting_storage/{storage}
ClusterName             = lab
MaxArraySize            = 1001
END
"""


@pytest.fixture
def slurm():
    return Slurm(timeout=5)


@pytest.fixture
def accounts(command):
    command("scontrol", CONFIG.format(storage="slurmdbd"))


def refuse(text):
    return f"echo 'slurm_load_jobs error: {text}' >&2; exit 1"


def test_a_missing_command_is_unreachable(command, monkeypatch, tmp_path, slurm):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmMissing, match="sinfo is not on PATH"):
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
def test_what_a_busy_controller_says_is_unreachable(command, text, slurm):
    command("sbatch", refuse(text))
    with pytest.raises(SlurmUnreachable) as caught:
        slurm.run("sbatch")
    assert text.split()[0] in caught.value.message
    assert caught.value.exit_code == 7


@pytest.mark.parametrize(
    "text", ["invalid partition specified: gpus", "Invalid account or account/partition combination specified"]
)
def test_any_other_failure_is_a_refusal_in_slurms_own_words(command, text, slurm):
    command("sbatch", refuse(text))
    with pytest.raises(SlurmRefused, match=text) as caught:
        slurm.run("sbatch")
    assert caught.value.exit_code == 5


def test_a_silent_failure_says_its_exit_code(command, slurm):
    command("sbatch", "exit 9")
    with pytest.raises(SlurmRefused, match="exit code 9"):
        slurm.run("sbatch")


def test_the_errors_are_of_the_tree():
    assert issubclass(SlurmUnreachable, UnreachableError)
    assert issubclass(SlurmRefused, InvalidError)


def line(*fields):
    """As squeue --Format pads them."""
    return "".join(f"{field:<20}|" for field in fields)


def test_the_queue_is_read_field_by_field(command, slurm):
    waits = line("7", "PENDING", "Resources", "1767323045", "0", "", "0", "u-1")
    runs = line("8_3", "RUNNING", "None", "1767323045", "2", "n[1-2]", "0", "u|2")
    failed = line("9", "FAILED", "NonZeroExitCode", "1767323045", "0", "n1", "768", "u-3")
    killed = line("10", "FAILED", "JobLaunchFailure", "1767323045", "0", "n1", "9", "u-4")
    command("squeue", f"printf '%s\\n' '{waits}' '{runs}' '{failed}' '{killed}'")
    entries = slurm.queue(["7", "8_3", "9", "10"])
    assert (entries["9"].exit_code, entries["10"].exit_code) == ("3:0", "0:9")
    assert (entries["7"].state, entries["7"].reason, entries["7"].nodes) == ("PENDING", "Resources", "")
    assert (entries["8_3"].name, entries["8_3"].nodes, entries["8_3"].restarts) == ("u|2", "n[1-2]", 2)
    assert entries["8_3"].start == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def test_tasks_that_wait_together_are_told_one_by_one(command, slurm):
    command("squeue", f"echo '{line('8_[0-1,4,10-14:2%3]', 'PENDING', 'Priority', 'N/A', '0', '', '0', 'u-1')}'")
    entries = slurm.queue(["8_0"])
    assert list(entries) == ["8_0", "8_1", "8_4", "8_10", "8_12", "8_14"]
    assert entries["8_4"].start is None


def test_a_queue_that_forgot_the_only_job_is_empty(command, slurm):
    command("squeue", refuse("Invalid job id specified"))
    assert slurm.queue(["7"]) == {}


def test_a_queue_that_does_not_answer_is_not_empty(command, slurm):
    command("squeue", refuse("Socket timed out on send/recv operation"))
    with pytest.raises(SlurmUnreachable):
        slurm.queue(["7"])
    command("squeue", refuse("Access denied"))
    with pytest.raises(SlurmRefused):
        slurm.queue(["7"])


def test_two_thousand_jobs_and_an_array_are_one_question(command, tmp_path, slurm):
    command("squeue", f'echo "${{@: -1}}" >>{tmp_path}/asked')
    ids = [str(n) for n in range(100_000, 102_000)] + [f"7_{n}" for n in range(1000)]
    assert slurm.queue(ids) == {}
    (asked,) = (tmp_path / "asked").read_text().split()
    assert asked == "--jobs=" + ",".join([*ids[:2000], "7"])


def test_what_does_not_fit_into_an_argument_is_asked_for_in_parts(command, tmp_path, slurm):
    command("squeue", f'echo "${{@: -1}}" >>{tmp_path}/asked')
    ids = [str(n) for n in range(10_000_000, 10_020_000)]
    assert slurm.queue(ids) == {}
    asked = (tmp_path / "asked").read_text().split()
    assert max(len(line) for line in asked) < LONGEST + len("--jobs=")
    assert ",".join(line.removeprefix("--jobs=") for line in asked).split(",") == ids


def test_all_commands_together_get_no_more_than_the_total(command):
    command("squeue", "sleep 0.3")
    limited = Slurm(timeout=5, total=0.5)
    begun = time.monotonic()
    limited.queue(["7"])
    with pytest.raises(SlurmUnreachable, match="squeue did not answer within 0.5 s"):
        limited.queue(["7"])
    with pytest.raises(SlurmUnreachable, match="Slurm did not answer within 0.5 s"):
        limited.queue(["7"])
    assert time.monotonic() - begun < 2


def test_nothing_is_asked_about_no_job(command, slurm):
    assert slurm.queue([]) == slurm.accounting([], datetime.now(UTC)) == {}


def test_of_several_runs_of_a_job_the_newest_counts(command, tmp_path, slurm, accounts):
    command(
        "sacct",
        f'echo "$*" >{tmp_path}/asked; '
        'printf "%s\\n" "7|NODE_FAIL|None|n1|Unknown|0:0|u-1" "7|CANCELLED by 1000|None|n2|1767323045|0:15|u|1"',
    )
    entry = slurm.accounting(["7"], SINCE)["7"]
    assert (entry.state, entry.nodes, entry.exit_code, entry.name) == ("CANCELLED by 1000", "n2", "0:15", "u|1")
    assert "--starttime=2026-01-0" in (tmp_path / "asked").read_text()


def test_without_accounting_nothing_is_asked_and_nothing_is_wrong(command, slurm):
    command("scontrol", CONFIG.format(storage="none"))
    command("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    command("squeue", "true")
    assert not slurm.accounts
    assert slurm.accounting(["7"], SINCE) == usage(slurm, ["7"], SINCE) == {}
    assert slurm.find("u-1", SINCE) == []


def test_the_controllers_configuration_is_asked_for_once(command, tmp_path, slurm):
    command("scontrol", f"echo asked >>{tmp_path}/asked; {CONFIG.format(storage='slurmdbd')}")
    assert (slurm.accounts, slurm.cluster(), slurm.limits().max_array_size) == (True, "lab", 1001)
    assert (tmp_path / "asked").read_text() == "asked\n"


ROWS = """
7|NODE_FAIL|1767323000|1767323045|1767326645|3600|billing=8,cpu=8,gres/gpu=2,mem=64G,node=1||n1
7.batch|CANCELLED|1767323045|1767323045|1767326645|3600|cpu=8|1024K|n1
7|COMPLETED|1767326645|1767326655|1767328455|1800|cpu=8,gres/gpu:h100=2,mem=64G,node=1||n2
7.0|COMPLETED|1767326655|1767326655|1767328455|1800|cpu=8|1.5G|n2
8_1|CANCELLED|1767326645|Unknown|1767326700|0|||None assigned
8_2|RUNNING|1767326645|1767326655|Unknown|9|cpu=8||n2
9|COMPLETED|1767326645|1767326655|1767328455|1800|cpu=8||n2
"""


def test_what_a_job_used_is_summed_over_all_its_runs(command, slurm, accounts):
    command("sacct", f"cat <<'END'{ROWS}END")
    used = usage(slurm, ["7", "8_1", "8_2", "999"], SINCE)
    assert used == {
        "7": Usage(
            gpu_hours=3.0, cpu_hours=12.0, queue_wait_seconds=55.0, elapsed_seconds=5400,
            peak_memory_bytes=1610612736, nodes=["n1", "n2"], runs=2,
        ),
        "8_1": Usage(
            gpu_hours=0.0, cpu_hours=0.0, queue_wait_seconds=0.0, elapsed_seconds=0,
            peak_memory_bytes=None, nodes=[], runs=0,
        ),
    }  # fmt: skip
    assert used["7"].to_dict()["runs"] == 2


def test_jobs_are_found_by_their_name_the_oldest_first_and_an_array_once(command, slurm):
    command("squeue", '[[ "$*" == *--name=u-1* ]] && printf "%s\\n" 100 42 42; true')
    assert slurm.find("u-1") == ["42", "100"]
    assert slurm.find("u-2") == []


def test_what_squeue_has_forgotten_is_found_in_accounting(command, slurm, accounts):
    command("squeue", "true")
    command("sacct", 'printf "%s\\n" 42_1 "42_[2-3]"')
    assert slurm.find("u-1", SINCE) == ["42"]
    assert slurm.find("u-1") == []


def test_cancelling_what_has_ended_is_done(command, slurm):
    command("scancel", "echo 'scancel: error: Kill job error on job id 7: Invalid job id specified' >&2; exit 1")
    slurm.cancel("7")
    command("scancel", refuse("Access/permission denied"))
    with pytest.raises(SlurmRefused, match="permission denied"):
        slurm.cancel("7")


def test_the_cluster_is_read_from_the_controller(command, slurm):
    command("scontrol", "echo 'Configuration data as of now'; echo 'ClusterName             = lab'")
    assert slurm.cluster() == "lab"
    command("scontrol", "echo nothing")
    with pytest.raises(SlurmRefused, match="names no cluster"):
        Slurm().cluster()
    with pytest.raises(SlurmRefused, match="names no MaxArraySize"):
        Slurm().limits()


def test_times_are_asked_for_in_the_standard_form(command, slurm):
    command("squeue", 'echo "$SLURM_TIME_FORMAT"')
    assert slurm.run("squeue") == "standard\n"


def test_a_command_never_waits_for_the_terminal(command, slurm):
    command("squeue", "cat; echo done")
    assert slurm.run("squeue") == "done\n"


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.sh"
    path.write_text("#!/bin/bash\n#SBATCH --time=10:00\n#SBATCH --partition=short\n")
    return path


def test_a_test_of_a_script_says_what_slurm_thinks(command, script, slurm):
    command("sinfo", "echo 'short|5:00'; echo 'long*|infinite'; echo 'gpu|1-00:00:00'")
    command("sbatch", "echo 'sbatch: Job 7 to start at 2026-01-02T03:04:05 on n1' >&2")
    with pytest.raises(SlurmRefused, match=r"more than the partition allows: short \(5:00\)"):
        slurm.test(script)
    for partition in ("gpu", "short,gpu", "long", "elsewhere"):
        script.write_text(f"#SBATCH --time=10:00\n#SBATCH --partition={partition}\n")
        assert slurm.test(script).startswith("Job 7 to start at")
    command("sbatch", "echo 'allocation failure: Invalid qos' >&2; exit 1")
    with pytest.raises(SlurmRefused, match="Invalid qos"):
        slurm.test(script)
    command("sbatch", "sleep 20")
    with pytest.raises(SlurmUnreachable):
        Slurm(timeout=0.2).test(script)


def test_a_script_that_may_have_to_wait_for_drained_nodes_is_not_refused(command, script, slurm):
    command("sbatch", "echo 'allocation failure: Requested node configuration is not available' >&2; exit 1")
    command("sinfo", "[[ $* != *states=* ]] || echo 'n[1-2]'")
    assert slurm.test(script) == "Slurm cannot tell when it starts: n[1-2] are down or drained"
    command("sinfo", "true")
    with pytest.raises(SlurmRefused, match="Requested node configuration is not available"):
        slurm.test(script)


@pytest.mark.usefixtures("accounts")
def test_submitit_hands_the_script_over_as_it_is(command, tmp_path, slurm):
    from tfslurm.slurm.executors import SlurmLauncher

    command("sbatch", f'echo "$*" >{tmp_path}/asked; echo "42;west"')
    (tmp_path / "script.sh").write_text("#!/bin/bash\n")
    handed = SlurmLauncher(slurm).submit(tmp_path / "script.sh")
    assert (handed.cluster, handed.job_id) == ("west", "42")
    assert (tmp_path / "asked").read_text() == f"--parsable {tmp_path / 'script.sh'}\n"


def test_a_cluster_that_sbatch_does_not_name_is_asked_for(command, tmp_path, slurm):
    from tfslurm.slurm.executors import SlurmLauncher

    command("sbatch", "echo 42")
    command("scontrol", "echo 'ClusterName = lab'")
    handed = SlurmLauncher(slurm).submit(tmp_path / "script.sh")
    assert (handed.cluster, handed.job_id) == ("lab", "42")
