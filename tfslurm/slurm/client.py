"""The one place that runs Slurm's commands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from tfslurm.errors import InvalidError, UnreachableError
from tfslurm.slurm import ids, walltime

TRANSIENT = (
    "socket timed out",
    "unable to contact slurm controller",
    "could not establish a configuration source",
    "unexpected message received",
    "slurm_persist_conn",
    "connection refused",
    "connection timed out",
    "connection reset",
    "zero bytes were transmitted",
    "slurm temporarily unable to accept job",
    "resource temporarily unavailable",
    "transport endpoint is not connected",
    "slurm backup controller in standby mode",
    "protocol authentication error",
    "communications connection failure",
    "message receive failure",
    "message send failure",
)
"""What a controller, or a munged, that is busy or restarting makes the commands say: asking again helps."""

OVERRIDING = ("SBATCH_", "SQUEUE_", "SACCT_", "SCANCEL_", "SINFO_")
"""Variables that would change what the commands are asked; sbatch prefers them to a script's own lines."""

QUEUE_FIELDS = "JobArrayID:64|,State:24|,Reason:160|,StartTime:16|,RestartCnt:8|,NodeList:256|,exit_code:8|,Name:64|"
"""squeue pads each to this width; its other notation, --format, has no restarts."""
ACCOUNT_FIELDS = "JobID,State,Reason,NodeList,Start,ExitCode,JobName"
USAGE_FIELDS = "JobID,State,Submit,Start,End,ElapsedRaw,AllocTRES,MaxRSS,NodeList"


class SlurmUnreachable(UnreachableError):
    """Slurm does not answer; nothing is known of what was asked."""


class SlurmMissing(SlurmUnreachable):
    """Slurm's commands are not on PATH: asking again does not help."""


class SlurmRefused(InvalidError):
    """Slurm answered no, in its own words."""


@dataclass(frozen=True)
class QueueEntry:
    """A job, or a task of an array, as squeue or sacct sees it."""

    job_id: str
    name: str
    state: str
    reason: str = ""
    nodes: str = ""
    start: datetime | None = None
    """When it started; while it waits, Slurm's estimate."""
    exit_code: str = ""
    """Of its script, and the signal that ended it: 0:9."""
    restarts: int = 0


@dataclass(frozen=True)
class Run:
    """One run of a job, or one step of it (`step` is then "batch" or a number), as sacct knows it."""

    job_id: str
    step: str
    state: str
    submit: datetime | None
    start: datetime | None
    end: datetime | None
    elapsed_seconds: int
    tres: dict[str, str]
    """What it was given: `{"cpu": "8", "gres/gpu": "2", "mem": "64G"}`."""
    max_rss: str
    nodes: str


@dataclass(frozen=True)
class Limits:
    """What the controller itself allows."""

    max_array_size: int
    """No index of an array may reach it."""


class Slurm:
    """Slurm's commands: each gets `timeout` seconds, and all of them together `total` where that is given."""

    def __init__(self, timeout: float = 30.0, total: float | None = None) -> None:
        self.timeout = timeout
        self.total = total
        self._until = None if total is None else time.monotonic() + total

    @staticmethod
    def installed() -> bool:
        return shutil.which("sbatch") is not None

    def run(self, *command: str, time_format: str = "standard") -> str:
        """What the command prints.

        Raises SlurmUnreachable where it is missing, does not answer in time or cannot reach the controller,
        SlurmRefused with Slurm's own words for any other failure.
        """
        return self._run(command, time_format).stdout

    def _run(self, command: Sequence[str], time_format: str = "standard") -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(OVERRIDING)}
        environment = {**kept, "SLURM_TIME_FORMAT": time_format, "SLURM_BITSTR_LEN": "0", "LC_ALL": "C"}
        limit = self._limit()
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=limit, env=environment,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except FileNotFoundError:
            hint = "Is this a login node of the cluster?"
            raise SlurmMissing(f"{command[0]} is not on PATH", hint=hint) from None
        except subprocess.TimeoutExpired:
            waited = self.timeout if self.total is None else self.total
            raise SlurmUnreachable(f"{command[0]} did not answer within {waited:g} s") from None
        if done.returncode:
            said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
            kind = SlurmUnreachable if any(text in said.lower() for text in TRANSIENT) else SlurmRefused
            raise kind(said)
        return done

    def _limit(self) -> float:
        if self._until is None:
            return self.timeout
        left = self._until - time.monotonic()
        if left <= 0:
            raise SlurmUnreachable(f"Slurm did not answer within {self.total:g} s")
        return min(self.timeout, left)

    def test(self, script: Path) -> str:
        """Slurm's estimate of when and where the script would start; nothing is queued.

        Raises SlurmRefused in Slurm's own words where it would not take it: for its partition, account, QOS and
        their limits, array, node configuration, reservation. What exceeds a partition's time limit sbatch takes by
        default, and it then waits for ever: that is found here. A reservation that ends before the job's time is
        up is told: the job would end with it. While nodes are down or drained sbatch makes no difference between
        what waits for them and what no node can be, which is told too. Raises SlurmUnreachable as `run` does.
        """
        lines = re.findall(r'^#SBATCH --(time|partition|reservation)="?([^"\n]*)', script.read_text(), re.MULTILINE)
        asked = dict(lines)
        self._check_time(asked)
        try:
            said = self._run(["sbatch", "--test-only", str(script)]).stderr
        except SlurmRefused as error:
            away = "configuration is not available" in error.message and self._nodes_away()
            if not away:
                raise
            return f"Slurm cannot tell when it starts: {away} are down or drained"
        return " ".join(said.replace("sbatch:", "").split()) + self._reservation_ends(asked)

    def _nodes_away(self) -> str:
        """The nodes that are not there for a time, as Slurm writes them: n[1-2]."""
        said = self.run("sinfo", "--noheader", "--states=down,drain,fail,maint", "--format=%N")
        return ",".join(said.split())

    def _check_time(self, asked: dict[str, str]) -> None:
        wanted = walltime.seconds(asked.get("time", ""))
        limits = self._time_limits()
        names = [name for name in asked.get("partition", "*").split(",") if name in limits]
        allowed = [walltime.seconds(limits[name]) for name in names]
        if wanted is not None and allowed and all(limit is not None and wanted > limit for limit in allowed):
            where = ", ".join(f"{name if name != '*' else 'default'} ({limits[name]})" for name in names)
            raise SlurmRefused(
                f"PartitionTimeLimit: a time of {asked['time']} is more than the partition allows: {where}",
                hint="Set `time` in the instance's entry in instances.yaml.",
            )

    def _reservation_ends(self, asked: dict[str, str]) -> str:
        name, wanted = asked.get("reservation"), walltime.seconds(asked.get("time", ""))
        if not name or wanted is None:
            return ""
        said = self.run("scontrol", "--oneliner", "show", "reservation", name, time_format="%s")
        found = re.search(r"EndTime=(\d+)", said)
        if not found or int(found[1]) >= time.time() + wanted:
            return ""
        end = datetime.fromtimestamp(int(found[1]), UTC)
        return f"; reservation {name} ends at {end:%Y-%m-%dT%H:%M:%SZ}, before the time of {asked['time']} is up"

    def _time_limits(self) -> dict[str, str]:
        """The time limit of each partition, and of the default one under "*"."""
        found = {}
        for line in self.run("sinfo", "--noheader", "--format=%P|%l").splitlines():
            name, _, limit = line.partition("|")
            found[name.rstrip("*")] = limit
            if name.endswith("*"):
                found["*"] = limit
        return found

    def queue(self, job_ids: Iterable[str]) -> dict[str, QueueEntry]:
        """What squeue knows of these jobs, finished ones included as long as it remembers them; by their ids.

        One squeue however many there are, up to what fits into an argument; of an array all tasks are told.
        """
        found: dict[str, QueueEntry] = {}
        for listed in ids.lists(job_ids):
            command = ["squeue", "--noheader", "--states=all", "--array", f"--Format={QUEUE_FIELDS}"]
            try:
                said = self.run(*command, f"--jobs={listed}", time_format="%s")
            except SlurmRefused as error:
                # squeue fails like this when the only id that it was asked for is forgotten: that is an answer.
                if "invalid job id" not in error.message.lower():
                    raise
                continue
            for entry in map(_queued, said.splitlines()):
                found |= dict.fromkeys(ids.expand(entry.job_id), entry)
        return found

    @property
    def accounts(self) -> bool:
        """Whether this cluster has accounting that sacct reads. Raises what `run` raises."""
        return self.config.get("AccountingStorageType", "").endswith("/slurmdbd")

    def accounting(self, job_ids: Iterable[str], since: datetime) -> dict[str, QueueEntry]:
        """What sacct knows of these jobs, of each its newest run; nothing on a cluster without accounting."""
        wanted, found = list(job_ids), {}
        if not wanted or not self.accounts:
            return {}
        command = ["sacct", "--allocations", f"--format={ACCOUNT_FIELDS}"]
        for line in self._sacct(command, wanted, since):
            job_id, state, reason, nodes, start, code, name = line.split("|", 6)
            entry = QueueEntry(job_id, name, state, reason, _nodes(nodes), _time(start), code)
            found |= dict.fromkeys(ids.expand(job_id), entry)
        return found

    def runs(self, job_ids: Iterable[str], since: datetime) -> list[Run]:
        """Every run of these jobs and every step of each, in sacct's order; none on a cluster without accounting.

        A requeued job has a run for each start.
        """
        wanted = list(job_ids)
        if not wanted or not self.accounts:
            return []
        command = ["sacct", "--noconvert", f"--format={USAGE_FIELDS}"]
        return [_run_of(line) for line in self._sacct(command, wanted, since)]

    def _sacct(self, command: list[str], job_ids: list[str], since: datetime) -> Iterator[str]:
        options = ["--noheader", "--parsable2", "--duplicates", f"--starttime={_local(since)}"]
        for listed in ids.lists(job_ids):
            yield from self.run(*command, *options, f"--jobs={listed}", time_format="%s").splitlines()

    def find(self, name: str, since: datetime | None = None) -> list[str]:
        """The ids of all jobs of this name, the oldest first; an array's once.

        squeue forgets what ended a while ago: with `since`, sacct is asked where squeue knows none.
        """
        said = self.run("squeue", "--noheader", "--states=all", "--format=%F", f"--name={name}")
        if not said.split() and since is not None and self.accounts:
            options = ["--noheader", "--parsable2", "--format=JobID", f"--starttime={_local(since)}"]
            said = self.run("sacct", "--allocations", *options, f"--name={name}")
        return sorted({ids.base(job_id) for job_id in said.split()}, key=int)

    def cancel(self, *job_ids: str) -> None:
        """Cancel jobs; one that has ended, or that nobody knows any more, is as good as cancelled."""
        for listed in (job_ids[i : i + 1000] for i in range(0, len(job_ids), 1000)):
            self._forgiving("scancel", "--quiet", *listed)

    def cancel_named(self, name: str) -> None:
        """Cancel every job of this name, those included whose ids nobody has noted."""
        self._forgiving("scancel", "--quiet", f"--name={name}")

    def _forgiving(self, *command: str) -> None:
        try:
            self.run(*command)
        except SlurmRefused as error:
            if not re.search(r"invalid job id|already completing or completed", error.message.lower()):
                raise

    def requeue(self, job_id: str) -> None:
        """Make a running or held job wait again, under its own id. Raises SlurmRefused where it may not."""
        self.run("scontrol", "requeue", job_id)

    def release(self, job_id: str) -> None:
        """Let a held job go. Raises SlurmRefused."""
        self.run("scontrol", "release", job_id)

    def exclude(self, job_id: str, nodes: Iterable[str]) -> None:
        """Keep a job that waits away from these nodes, and from no others. Raises SlurmRefused."""
        self.run("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(nodes)}")

    @cached_property
    def config(self) -> dict[str, str]:
        """The controller's configuration, asked for once."""
        pairs = (line.partition("=") for line in self.run("scontrol", "show", "config").splitlines())
        return {key.strip(): value.strip() for key, equals, value in pairs if equals}

    def cluster(self) -> str:
        """The cluster's name, from the controller's configuration."""
        if not self.config.get("ClusterName"):
            raise SlurmRefused("scontrol show config names no cluster")
        return self.config["ClusterName"]

    def limits(self) -> Limits:
        """Raises SlurmRefused where the controller's configuration says nothing of arrays."""
        size = self.config.get("MaxArraySize", "")
        if not size.isdigit():
            raise SlurmRefused("scontrol show config names no MaxArraySize")
        return Limits(max_array_size=int(size))


def _queued(line: str) -> QueueEntry:
    job_id, state, reason, start, restarts, nodes, code, name = (part.strip() for part in line.split("|", 7))
    return QueueEntry(
        job_id=job_id,
        name=name.removesuffix("|").rstrip(),
        state=state,
        reason=reason,
        nodes=_nodes(nodes),
        start=_time(start),
        exit_code=f"{int(code) >> 8}:{int(code) & 127}" if code.isdigit() else code,  # it is as wait(2) has it
        restarts=int(restarts) if restarts.isdigit() else 0,
    )


def _run_of(line: str) -> Run:
    job, state, submit, start, end, elapsed, tres, rss, nodes = line.split("|", 8)
    job_id, _, step = job.partition(".")
    given = dict(pair.split("=", 1) for pair in tres.split(",") if "=" in pair)
    times = _time(submit), _time(start), _time(end)
    return Run(job_id, step, state, *times, int(elapsed or 0), given, rss, _nodes(nodes))


def _nodes(text: str) -> str:
    return "" if text in ("None assigned", "(null)", "N/A") else text


def _time(text: str) -> datetime | None:
    """Seconds since 1970, as `SLURM_TIME_FORMAT=%s` makes them; None for N/A, Unknown and None."""
    return datetime.fromtimestamp(int(text), UTC) if text.isdigit() and int(text) else None


def _local(moment: datetime) -> str:
    return moment.astimezone().strftime("%Y-%m-%dT%H:%M:%S")
