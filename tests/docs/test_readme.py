"""The README says what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from tfslurm.cli.main import COMMANDS, cli
from tfslurm.errors import TfslurmError

TOP = Path(__file__).parents[2]
README = (TOP / "README.md").read_text()


def test_its_generated_parts_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, TOP / "scripts" / "reference", "--check"])
    assert done.returncode == 0, "run scripts/reference"


def commands() -> list[str]:
    return sorted({line.strip(" $") for line in re.findall(r"^\$ (tfslurm [^\n]+)", README, re.MULTILINE)})


@pytest.mark.parametrize("line", commands())
def test_its_commands_and_their_options_exist(line: str) -> None:
    words = line.split()[1:]
    command: click.Command = cli
    while isinstance(command, click.Group):
        command = command.get_command(click.Context(command), words.pop(0))
        assert command is not None, line
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_every_exit_code_of_the_errors_is_in_its_table() -> None:
    codes = {kind.exit_code for kind in _below(TfslurmError)} | {0, 2}
    assert all(re.search(rf"^\| {code} \| ", README, re.MULTILINE) for code in codes)


def _below(kind: type) -> list[type]:
    return [kind, *(found for child in kind.__subclasses__() for found in _below(child))]


def test_every_command_has_help_with_a_sentence() -> None:
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command.help and command.help[0].isupper()
