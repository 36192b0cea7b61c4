"""Handing a rendered script over: to Slurm through submitit, or to this machine."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tfslurm.settings import Settings
from tfslurm.slurm import local
from tfslurm.slurm.client import Slurm


@dataclass(frozen=True)
class Handed:
    """Where a submission is now: the launcher's cluster and its name for it."""

    cluster: str
    job_id: str


class Launcher(Protocol):
    """Hands scripts over."""

    name: str

    def submit(self, script: Path) -> Handed:
        """Raises SlurmUnreachable or SlurmRefused; then nothing was started, as far as can be known."""
        ...


class LocalLauncher:
    """Runs scripts on this machine, in the background."""

    name = "local"

    def submit(self, script: Path) -> Handed:
        return Handed(socket.gethostname(), local.start(script))


class SlurmLauncher:
    """Hands scripts to sbatch."""

    name = "slurm"

    def __init__(self, slurm: Slurm) -> None:
        self.slurm = slurm

    def submit(self, script: Path) -> Handed:
        from tfslurm.slurm.submitit_executor import ScriptExecutor  # slow to import, and no listing needs it

        job = ScriptExecutor(script, self.slurm).submit_script()
        return Handed(job.cluster or self.slurm.cluster(), job.job_id)


def launcher(name: str, settings: Settings) -> Launcher:
    """The launcher that an instance names: "slurm" or "local"."""
    return LocalLauncher() if name == "local" else SlurmLauncher(Slurm(settings.site.slurm.command_timeout))
