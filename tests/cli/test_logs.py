"""`job logs`: every line once and whole, through attempts, ranks, and a filesystem that shows things late."""

import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfslurm.cli import following
from tfslurm.cli.following import start_of_tail


@pytest.fixture
def job(installation):
    return installation.job()


@pytest.fixture
def logs(installation, job):
    return installation.root.job(job.id).logs


@pytest.fixture
def follower(installation, until):
    """Start `tfslurm WORDS` in the background, its output in files; whatever still runs is killed at the end."""
    started = []

    def start(*words):
        out, err = installation.folder / "out", installation.folder / "err"
        environ = os.environ | {"TFSLURM_CONFIG": str(installation.config), "HOME": str(installation.folder)}
        command = [sys.executable, "-m", "tfslurm", *words]
        with open(out, "wb") as stdout, open(err, "wb") as stderr:
            process = subprocess.Popen(command, env=environ, stdout=stdout, stderr=stderr)
        started.append(process)
        process.out, process.err = out, err
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def add(path, text):
    with open(path, "a") as file:
        file.write(text)


def test_attempts_come_in_their_order_and_their_ranks_after_the_first_process(cli, logs):
    names = ["attempt-0", "attempt-0.rank-1", "attempt-0.rank-10", "attempt-2", "attempt-2.rank-3", "attempt-10"]
    names.append("slurm")  # what Slurm itself said
    for name in reversed(names):
        (logs / f"{name}.log").write_text(f"in {name}\n")
    done = cli("job", "logs", "first")
    assert done.stdout == "".join(f"in {name}\n" for name in names)
    assert done.stderr == "".join(f"==> {name} <==\n" for name in names)


def test_a_single_log_has_no_header_and_its_bytes_are_its_own(installation, job, logs):
    data = b"caf\xe9 \x1b[31mred\x1b[0m\r\n50%\r100%\nno end"
    (logs / "attempt-0.log").write_bytes(data)
    environ = os.environ | {"TFSLURM_CONFIG": str(installation.config)}
    command = [sys.executable, "-m", "tfslurm", "job", "logs", "first"]
    done = subprocess.run(command, env=environ, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, data, b"")


def test_empty_logs_are_not_spoken_of(cli, logs):
    (logs / "attempt-0.log").write_text("a\n")
    (logs / "attempt-0.rank-1.log").touch()
    (logs / "slurm.log").touch()
    assert cli("job", "logs", "first").stderr == "==> attempt-0 <==\n"


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (("--rank", "0"), ["attempt-0", "attempt-1"]),
        (("--rank", "1"), ["attempt-0.rank-1", "attempt-1.rank-1"]),
        (("--attempt", "1"), ["attempt-1", "attempt-1.rank-1", "attempt-1.rank-11"]),
        (("--attempt", "1", "--rank", "all"), ["attempt-1", "attempt-1.rank-1", "attempt-1.rank-11"]),
        (("--attempt", "1", "--rank", "11"), ["attempt-1.rank-11"]),
    ],
)
def test_one_attempt_and_one_rank_can_be_asked_for(cli, logs, options, shown):
    for name in ("attempt-0", "attempt-0.rank-1", "attempt-1", "attempt-1.rank-1", "attempt-1.rank-11", "slurm"):
        (logs / f"{name}.log").write_text(f"{name}\n")
    assert cli("job", "logs", "first", *options).stdout.split() == shown


def test_a_log_that_is_not_there_is_said(cli, logs):
    assert cli("job", "logs", "first").code == 0
    (logs / "attempt-0.log").write_text("a\n")
    for options in (("--rank", "4"), ("--attempt", "1")):
        done = cli("job", "logs", "first", *options)
        assert (done.code, done.stdout) == (3, "")
        assert f"Error: job 'first' has no such log\nIts logs are in {logs}.\n" == done.stderr
    for wrong in (("--rank", "some"), ("--rank", "-1"), ("--attempt", "x"), ("--tail", "-1")):
        assert cli("job", "logs", "first", *wrong).code == 2


def test_the_tail_is_of_each_log(cli, logs):
    for name in ("attempt-0", "attempt-1"):
        (logs / f"{name}.log").write_text("".join(f"{name} {number}\n" for number in range(9)))
    assert cli("job", "logs", "first", "--tail", "2").stdout == ("attempt-0 7\nattempt-0 8\nattempt-1 7\nattempt-1 8\n")
    assert cli("job", "logs", "first", "--tail", "0").stdout == ""


@given(text=st.text("a\n", max_size=40), lines=st.integers(0, 12), block=st.integers(1, 9))
def test_a_tail_is_the_last_lines_wherever_the_blocks_end(tmp_path_factory, text, lines, block):
    path = tmp_path_factory.mktemp("tail") / "log"
    path.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(following, "LINE", block)
        offset = start_of_tail(path, lines)
    assert text[offset:] == "".join(text.splitlines(keepends=True)[-lines:] if lines else [])


def test_following_goes_on_over_a_requeue_until_the_end_and_no_line_is_lost_or_repeated(
    installation, job, logs, follower, until
):
    logs.rmdir()  # the folder appears late, too
    process = follower("job", "logs", "first", "--follow")
    installation.write_started(job)
    logs.mkdir()
    first, rank, second = (logs / f"{name}.log" for name in ("attempt-0", "attempt-0.rank-1", "attempt-1"))
    add(first, "step 1\nste")
    until(lambda: process.out.read_text() == "step 1\n")
    add(rank, "a warning\n")
    until(lambda: process.out.read_text() == "step 1\na warning\n")
    add(first, "p 2\n")
    until(lambda: process.out.read_text() == "step 1\na warning\nstep 2\n")
    add(second, "step 3\n")
    installation.write_started(job, attempt=1)
    until(lambda: process.out.read_text().endswith("step 3\n"))
    assert process.poll() is None
    add(second, "half a line")
    installation.trained(job)
    until(lambda: "completed" in installation.run("job", "show", "first").stdout)
    add(second, "\nlate: the script's last word")
    assert process.wait(20) == 0
    assert process.out.read_text() == ("step 1\na warning\nstep 2\nstep 3\nhalf a line\nlate: the script's last word")
    headers = ["attempt-0.rank-1", "attempt-0", "attempt-1"]
    assert process.err.read_text() == "".join(f"==> {name} <==\n" for name in headers)


def test_a_bar_that_is_written_over_is_shown_while_it_grows(job, logs, installation, follower, until):
    installation.write_started(job)
    add(logs / "attempt-0.log", "10%\r")
    process = follower("job", "logs", "first", "-f")
    until(lambda: process.out.read_bytes() == b"10%\r")
    add(logs / "attempt-0.log", "20%\r")
    until(lambda: process.out.read_bytes() == b"10%\r20%\r")


def test_following_with_a_tail_begins_there(job, logs, installation, follower, until):
    installation.write_started(job)
    add(logs / "attempt-0.log", "1\n2\n3\n")
    process = follower("job", "logs", "first", "-f", "--tail", "1")
    until(lambda: process.out.read_text() == "3\n")
    add(logs / "attempt-0.log", "4\n")
    add(logs / "attempt-1.log", "5\n6\n")
    until(lambda: process.out.read_text() == "3\n4\n5\n6\n")


def test_an_interrupt_ends_it_quietly(job, logs, installation, follower, until):
    installation.write_started(job)
    add(logs / "attempt-0.log", "step 1\n")
    process = follower("job", "logs", "first", "-f")
    until(process.out.read_bytes)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    assert (process.out.read_text(), process.err.read_text()) == ("step 1\n", "")


def test_following_one_attempt_ends_when_the_next_has_begun(job, logs, installation, follower, until):
    installation.write_started(job)
    add(logs / "attempt-0.log", "step 1\n")
    process = follower("job", "logs", "first", "-f", "--attempt", "0")
    until(process.out.read_bytes)
    installation.write_started(job, attempt=1)
    add(logs / "attempt-1.log", "step 2\n")
    assert process.wait(20) == 0
    assert process.out.read_text() == "step 1\n"


def test_a_reader_that_leaves_ends_it(job, logs, installation):
    installation.write_started(job)
    add(logs / "attempt-0.log", "step 1\n" * 100_000)
    environ = os.environ | {"TFSLURM_CONFIG": str(installation.config)}
    command = f"set -o pipefail; {sys.executable} -m tfslurm job logs first -f | head -1"
    done = subprocess.run(["bash", "-c", command], env=environ, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "step 1\n", "")


def test_an_endpoint_has_its_logs_too(installation, cli):
    installation.completed()
    endpoint = installation.endpoint(status="stopped")
    folder = installation.root.endpoint(endpoint.id).logs
    (folder / "engine.log").write_text("engine\n")
    (folder / "attempt-0.log").write_text("script\n")
    for options in ((), ("-f",)):
        done = cli("endpoint", "logs", "helper", *options)
        assert done.stdout == "script\nengine\n"
        assert done.stderr == "==> attempt-0 <==\n==> engine <==\n"
