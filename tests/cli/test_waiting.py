"""`job wait`: a bar on a terminal, nothing elsewhere, and how it ends."""

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading

import pytest

from tfslurm.cli import waiting
from tfslurm.cli.waiting import duration, progress_line
from tfslurm.files import write_atomic
from tfslurm.training.outcome import Failed


class Terminal:
    """A command whose stderr is a terminal of so many columns; `screen` is all that came."""

    def __init__(self, installation, *words, columns=120):
        self.screen = ""
        self.ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        environ = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        environ |= {"TFSLURM_CONFIG": str(installation.config), "HOME": str(installation.folder)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tfslurm", *words], env=environ, stdin=theirs, stdout=theirs, stderr=theirs
        )
        os.close(theirs)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        try:
            while data := os.read(self.ours, 1024):
                self.screen += data.decode()
        except OSError:
            pass  # the other end is closed

    def end(self, timeout=20):
        code = self.process.wait(timeout)
        self.reader.join(timeout)
        os.close(self.ours)
        return code


@pytest.fixture
def job(installation):
    return installation.job()


def progress(installation, job, step):
    values = {"step": step, "steps": 200, "epoch": 1, "loss": 1.23456, "tokens_per_second": 12345.6}
    line = values | {"eta_seconds": 5400, "at": "2026-01-02T03:04:05Z"}
    write_atomic(installation.root.job(job.id).progress, json.dumps(line))


def test_a_terminal_shows_a_bar_that_goes_on_where_it_was_after_a_requeue(installation, job, until):
    terminal = Terminal(installation, "job", "wait", "first", "--json")
    until(lambda: "job 'first': pending" in terminal.screen)
    installation.write_started(job)
    progress(installation, job, 50)
    bar = f"\r\x1b[Kjob 'first' [{'#' * 9}{'-' * 27}]  50/200  loss 1.235  12,346 tokens/s  90 min left"
    until(lambda: bar in terminal.screen)
    installation.write_started(job, attempt=1)
    progress(installation, job, 100)
    until(lambda: f"[{'#' * 18}{'-' * 18}]  100/200" in terminal.screen)
    installation.trained(job)
    assert terminal.end() == 0
    assert "job 'first': completed, step 100 of 200 done" in terminal.screen
    assert '"status": "completed"' in terminal.screen


def test_a_narrow_terminal_has_one_line_and_no_bar(installation, job, until):
    installation.write_started(job)
    progress(installation, job, 50)
    terminal = Terminal(installation, "job", "wait", "first", columns=40)
    until(lambda: "loss" in terminal.screen)
    assert terminal.screen.rpartition("\x1b[K")[2] == "job 'first': 50/200  loss 1.235  12,34…"
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 130


def test_nothing_is_shown_where_there_is_no_terminal(installation, job):
    installation.trained(job)
    done = installation.run("job", "wait", "first", "--json", check=0)
    assert done.stderr == ""
    assert json.loads(done.stdout)["status"] == "completed"


def test_a_wait_that_times_out_leaves_the_job_alone(installation, job, cli):
    installation.write_started(job)
    done = cli("job", "wait", "first", "--timeout", "0.3")
    assert (done.code, done.stdout) == (8, "")
    assert "job 'first' is still running after 0.3 s" in done.stderr
    assert cli("job", "show", "first", "--json").json()["status"] == "running"


def test_a_wait_for_what_failed_says_why(installation, job, cli):
    installation.write_started(job)
    installation.root.job(job.id).log(0).write_text("step 1\nthe cable was out\n")
    installation.write_outcome(job, Failed(error="lost the network"))
    installation.write_exit(job, 1)
    done = cli("job", "wait", "first")
    assert done.code == 9
    assert done.stderr == "Error: job 'first' is error: lost the network\nstep 1\nthe cable was out\n"


def test_the_bar_is_as_wide_as_there_is_room(monkeypatch):
    def line(columns, done=1, total=2):
        monkeypatch.setattr(waiting.shutil, "get_terminal_size", lambda: os.terminal_size((columns, 24)))
        return progress_line("job 'a'", done, total, "1/2")

    assert line(200) == f"job 'a' [{'#' * 18}{'-' * 18}]  1/2"
    assert line(30) == f"job 'a' [{'#' * 7}{'-' * 7}]  1/2"
    assert line(20) == "job 'a': 1/2"
    assert line(30, done=3) == f"job 'a' [{'#' * 14}]  1/2"
    assert line(30, done=0, total=0) == f"job 'a' [{'-' * 14}]  1/2"


def test_durations_are_said_as_people_say_them():
    seconds = [0, 45.4, 99, 100, 3540, 5900, 6000, 12_000, 172_000, 200_000]
    said = ["0 s", "45 s", "99 s", "2 min", "59 min", "98 min", "1 h 40 min", "3 h 20 min", "2 d 0 h", "2 d 8 h"]
    assert [duration(value) for value in seconds] == said
