"""The README's first command: SQLite, the local launcher, real DeepSpeed, real vLLM."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from .conftest import python_of

pytestmark = [pytest.mark.train, pytest.mark.vllm]

TOP = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart")


def quickstart(folder: Path) -> str:
    """Run it with the environments that are there, and an empty home."""
    environments = Path(python_of("train")).parents[2]
    python_of("serve")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TFSLURM_"))}
    command = [TOP / "scripts" / "quickstart", "--dir", folder / "site", "--environments", environments]
    home = folder / "home"
    home.mkdir(exist_ok=True)
    done = subprocess.run(command, env={**environment, "HOME": str(home)}, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def answers(folder: Path) -> tuple[str, str]:
    return (folder / "site" / "base.txt").read_text(), (folder / "site" / "tuned.txt").read_text()


def test_it_ends_with_an_answer_that_the_base_model_does_not_give(folder: Path) -> None:
    said = quickstart(folder)
    base, tuned = answers(folder)
    assert "tfslurm job stop" in tuned
    assert "tfslurm job stop" not in base
    assert "$ tfslurm job create" in said  # each command is printed before it runs
    assert "dataset helpdesk" in said.partition("== Where it came from")[2]


def test_run_again_it_goes_on_from_what_is_there(folder: Path) -> None:
    said = quickstart(folder)
    assert "tfslurm job create" not in said
    assert "tfslurm endpoint start" in said
    assert "tfslurm job stop" in answers(folder)[1]
