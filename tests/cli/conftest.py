"""The command line in this process: as `tfslurm` itself calls it, so that exit codes and messages are real."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tfslurm.cli.main import main


@dataclass
class Done:
    code: int
    stdout: str
    stderr: str

    def json(self) -> Any:
        assert self.code == 0, self.stderr
        return json.loads(self.stdout)


@pytest.fixture
def cli(installation, monkeypatch, capfd) -> Callable[..., Done]:
    """Run a command on the installation; its exit code and what it printed."""
    monkeypatch.setenv("TFSLURM_CONFIG", str(installation.config))
    monkeypatch.setenv("HOME", str(installation.folder))

    def cli(*words: str) -> Done:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["tfslurm", *words])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        return Done(code, *capfd.readouterr())

    return cli
