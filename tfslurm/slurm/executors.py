"""Handing a rendered script over: to Slurm or to this machine, both through submitit."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tfslurm.settings import Settings
from tfslurm.slurm.client import Slurm

# submitit is imported late: it is slow to load, and no listing needs it.


@dataclass(frozen=True)
class Handed:
    """Where a submission is now: the launcher's cluster and its name for it."""

    cluster: str
    job_id: str


class Launcher(Protocol):
    """Hands scripts over."""

    name: str

    def submit(self, script: Path) -> Handed:
        """Raises SlurmRefused: then nothing was started; SlurmUnreachable: then it may have been, or not."""
        ...

    def find(self, name: str) -> list[Handed]:
        """What was started under this name, the oldest first. Raises SlurmUnreachable."""
        ...


class LocalLauncher:
    """Runs scripts on this machine, in the background."""

    name = "local"

    def submit(self, script: Path) -> Handed:
        from tfslurm.slurm.submitit_executor import LocalScriptExecutor

        return Handed(socket.gethostname(), LocalScriptExecutor(script).submit_script().job_id)

    def find(self, name: str) -> list[Handed]:
        return []  # a process that was started has its handle at once


class SlurmLauncher:
    """Hands scripts to sbatch."""

    name = "slurm"

    def __init__(self, slurm: Slurm) -> None:
        self.slurm = slurm

    def submit(self, script: Path) -> Handed:
        from tfslurm.slurm.submitit_executor import ScriptExecutor

        cluster = self.slurm.cluster()  # first: once the script is taken, nothing may fail any more
        job = ScriptExecutor(script, self.slurm).submit_script()
        return Handed(job.cluster or cluster, job.job_id)

    def find(self, name: str) -> list[Handed]:
        return [Handed(self.slurm.cluster(), job_id) for job_id in self.slurm.find(name)]


def launcher(name: str, settings: Settings) -> Launcher:
    """The launcher that an instance names: "slurm" or "local"."""
    return LocalLauncher() if name == "local" else SlurmLauncher(Slurm(settings.site.slurm.command_timeout))
