"""Commands and the programs that they ask: answers, errors, and what dies with whom."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tfslurm.errors import InvalidError, NotPermittedError, TfslurmError
from tfslurm.process import start_ticks
from tfslurm.training.programs import ask

REPOSITORY = Path(__file__).parents[2]

PROGRAM = """
import os, sys, time, msgspec
from tfslurm import errors
from tfslurm.training.programs import answering, read_question

class Words(msgspec.Struct):
    words: list

def main(argv):
    def body():
        print("noise on standard output")
        match argv[0]:
            case "echo":
                return Words([*argv[1:], *read_question(Words).words, os.environ.get("HF_HUB_OFFLINE")])
            case "refuse":
                raise errors.NotPermittedError("not you", hint="ask somebody")
            case "crash":
                raise RuntimeError("boom")
            case "lack":
                import torch_of_another_name
            case "linger":
                with open(argv[1], "w") as file:
                    file.write(str(os.getpid()))
                time.sleep(60)
    return answering(body)
"""


class Words(msgspec.Struct):
    words: list


@pytest.fixture
def run(installation, monkeypatch, tmp_path):
    (tmp_path / "a_program.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{REPOSITORY}")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return lambda *words, **more: ask(installation.settings, "a_program", *words, answer=Words, **more)


def test_a_program_gets_its_words_and_its_question_and_answers(run):
    odd = "a 'quoted' $word"
    assert run("echo", odd, question=Words([1, "é"])).words == [odd, 1, "é", "1"]
    assert run("echo", question=Words([]), online=True).words == [None]


def test_an_error_of_ours_keeps_its_kind_its_words_and_its_hint(run):
    with pytest.raises(NotPermittedError) as refused:
        run("refuse")
    assert (refused.value.message, refused.value.hint) == ("not you", "ask somebody")


def test_a_crash_is_shown_and_told_from_a_refusal(run, capfd):
    with pytest.raises(TfslurmError, match="a_program ended with exit code 1 in the training environment") as crashed:
        run("crash")
    assert crashed.value.exit_code == 1 and "RuntimeError: boom" in capfd.readouterr().err


def test_a_missing_package_is_named_wherever_it_is_imported(run, installation):
    with pytest.raises(InvalidError, match="lacks the Python package torch_of_another_name"):
        run("lack")
    with pytest.raises(InvalidError, match="lacks the Python package no_such_program"):
        ask(installation.settings, "no_such_program", answer=Words)


def test_a_program_dies_with_the_command_that_asked(run, installation, tmp_path, until):
    script = (
        "import sys; from tfslurm import settings; from tfslurm.training.programs import ask; import msgspec;"
        "ask(settings.load(environ={'TFSLURM_CONFIG': sys.argv[1]}), 'a_program', 'linger', sys.argv[2],"
        " answer=msgspec.Struct)"
    )
    command = subprocess.Popen([sys.executable, "-c", script, str(installation.config), str(tmp_path / "pid")])
    pid = int(until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text()))
    assert start_ticks(pid)
    os.kill(command.pid, signal.SIGKILL)
    command.wait()
    until(lambda: start_ticks(pid) is None, timeout=5)
