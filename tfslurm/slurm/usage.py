"""What jobs have used, from accounting. https://slurm.schedmd.com/sacct.html#SECTION_Job-Accounting-Fields"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from tfslurm.slurm.client import Run, Slurm

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Usage:
    """All runs of one job together: each requeue adds one."""

    gpu_hours: float
    cpu_hours: float
    queue_wait_seconds: float
    elapsed_seconds: int
    peak_memory_bytes: int | None
    """Of the largest process at any time; None where nothing was sampled."""
    nodes: list[str]
    """Where it ran, as Slurm writes it, in order and without repetitions: `["n[1-2]", "n3"]`."""
    runs: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def usage(slurm: Slurm, job_ids: Iterable[str], since: datetime) -> dict[str, Usage]:
    """What each job has used since it was submitted, by its id; one sacct for all, which `since` makes quick.

    A job that accounting does not know, or that it has not seen the end of, is missing; on a cluster without
    accounting all are.
    Raises SlurmUnreachable and SlurmRefused.
    """
    wanted = set(job_ids)
    runs: dict[str, list[Run]] = {}
    for run in slurm.runs(wanted, since):
        if run.job_id in wanted:
            runs.setdefault(run.job_id, []).append(run)
    return {job_id: _sum(of) for job_id, of in runs.items() if _over(of)}


def _over(runs: list[Run]) -> bool:
    whole = [run for run in runs if not run.step]
    return bool(whole) and all(run.end for run in whole)


def _sum(runs: list[Run]) -> Usage:
    whole = [run for run in runs if not run.step]
    started = [run for run in whole if run.start]
    peaks = [_bytes(run.max_rss) for run in runs if run.max_rss]
    nodes = (run.nodes for run in started if run.nodes)
    return Usage(
        gpu_hours=sum(_count(run, "gres/gpu") * run.elapsed_seconds for run in started) / 3600,
        cpu_hours=sum(_count(run, "cpu") * run.elapsed_seconds for run in started) / 3600,
        queue_wait_seconds=sum((run.start - run.submit).total_seconds() for run in started if run.submit),
        elapsed_seconds=sum(run.elapsed_seconds for run in started),
        peak_memory_bytes=max(peaks, default=0) or None,
        nodes=list(dict.fromkeys(nodes)),
        runs=len(started),
    )


def _count(run: Run, resource: str) -> int:
    """A site may count typed GPUs alone: gres/gpu:h100."""
    typed = (int(n) for name, n in run.tres.items() if name.startswith(f"{resource}:") and n.isdigit())
    plain = run.tres.get(resource, "")
    return int(plain) if plain.isdigit() else sum(typed)


def _bytes(text: str) -> int:
    found = re.fullmatch(r"([\d.]+)([KMGT]?)", text)
    return round(float(found[1]) * UNITS[found[2]]) if found else 0
