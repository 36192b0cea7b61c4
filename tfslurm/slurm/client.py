"""The one place that runs Slurm's commands."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from tfslurm.errors import InvalidError, UnreachableError

CHUNK = 500
"""Job ids in one command: their list has to fit into an argument."""

TRANSIENT = (
    "socket timed out",
    "unable to contact slurm controller",
    "unexpected message received",
    "slurm_persist_conn",
    "connection refused",
    "connection timed out",
    "zero bytes were transmitted",
    "slurm temporarily unable to accept job",
    "resource temporarily unavailable",
)
"""What a controller that is busy or restarting makes the commands say: asking again helps."""


class SlurmUnreachable(UnreachableError):
    """Slurm does not answer; nothing is known of what was asked."""


class SlurmRefused(InvalidError):
    """Slurm answered no, in its own words."""


@dataclass(frozen=True)
class QueueEntry:
    """A job as squeue or sacct sees it."""

    job_id: str
    name: str
    state: str
    reason: str = ""
    nodes: str = ""
    start: str = ""
    exit_code: str = ""


class Slurm:
    """Slurm's commands, with a time limit for each."""

    def __init__(self, timeout: float = 30.0) -> None:
        self.timeout = timeout

    @staticmethod
    def installed() -> bool:
        return shutil.which("sbatch") is not None

    def run(self, *command: str) -> str:
        """What the command prints.

        Raises SlurmUnreachable where it is missing, does not answer in time or cannot reach the controller,
        SlurmRefused with Slurm's own words for any other failure.
        """
        return self._run(command).stdout

    def _run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "SLURM_TIME_FORMAT": "standard"}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=self.timeout, env=environment, stdin=subprocess.DEVNULL
            )
        except FileNotFoundError:
            hint = "Is this a login node of the cluster?"
            raise SlurmUnreachable(f"{command[0]} is not on PATH", hint=hint) from None
        except subprocess.TimeoutExpired:
            raise SlurmUnreachable(f"{command[0]} did not answer within {self.timeout:g} s") from None
        if done.returncode:
            said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
            kind = SlurmUnreachable if any(text in said.lower() for text in TRANSIENT) else SlurmRefused
            raise kind(said)
        return done

    def test(self, script: Path) -> str:
        """Slurm's estimate of when and where the script would start. Raises what `run` raises."""
        said = self._run(["sbatch", "--test-only", str(script)]).stderr
        return " ".join(said.replace("sbatch:", "").split())

    def queue(self, job_ids: Sequence[str]) -> dict[str, QueueEntry]:
        """What squeue knows of these jobs, finished ones included as long as it remembers them."""
        found: dict[str, QueueEntry] = {}
        for ids in _chunks(job_ids):
            command = ["squeue", "--noheader", "--states=all", "--format=%i|%j|%T|%r|%N|%S", f"--jobs={ids}"]
            try:
                lines = self.run(*command).splitlines()
            except SlurmRefused as error:
                # squeue fails like this when the only id that it was asked for is forgotten: that is an answer.
                if "invalid job id" not in error.message.lower():
                    raise
                lines = []
            for line in lines:
                job_id, name, state, reason, nodes, start = line.split("|", 5)
                found[job_id] = QueueEntry(job_id, name, state, reason, nodes, start)
        return found

    def accounting(self, job_ids: Sequence[str], since: datetime) -> dict[str, QueueEntry]:
        """What sacct knows of these jobs, of each its newest run."""
        found: dict[str, QueueEntry] = {}
        start = since.astimezone().strftime("%Y-%m-%dT%H:%M:%S")
        for ids in _chunks(job_ids):
            command = ["sacct", "--allocations", "--noheader", "--parsable2", "--duplicates", f"--starttime={start}"]
            fields = "--format=JobID,JobName,State,Reason,NodeList,Start,ExitCode"
            for line in self.run(*command, fields, f"--jobs={ids}").splitlines():
                entry = QueueEntry(*line.split("|"))
                found[entry.job_id] = entry
        return found

    def find(self, name: str) -> str | None:
        """The id of the job of this name, as long as squeue or sacct knows it."""
        lines = self.run("squeue", "--noheader", "--states=all", "--format=%A", f"--name={name}").split()
        return lines[0] if lines else None

    def cancel(self, job_id: str) -> None:
        """Cancel a job; one that has ended, or that nobody knows any more, is as good as cancelled."""
        try:
            self.run("scancel", "--quiet", job_id)
        except SlurmRefused as error:
            if "invalid job id" not in error.message.lower():
                raise

    def cluster(self) -> str:
        """The cluster's name, from the controller's configuration."""
        for line in self.run("scontrol", "show", "config").splitlines():
            key, _, value = line.partition("=")
            if key.strip() == "ClusterName":
                return value.strip()
        raise SlurmRefused("scontrol show config names no cluster")


def _chunks(job_ids: Sequence[str]) -> Iterable[str]:
    return (",".join(job_ids[i : i + CHUNK]) for i in range(0, len(job_ids), CHUNK))
