"""Job ids as Slurm writes them: 123, 123_4, and 123_[0-4,7%2] for the tasks of an array that wait together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

LONGEST = 120_000
"""Characters in one argument: Linux takes 128 KiB (MAX_ARG_STRLEN), which is some 15,000 ids."""


def base(job_id: str) -> str:
    """The id of the array for one of its tasks; any other id is its own."""
    return job_id.partition("_")[0]


def task_id(job_id: str, index: int | None) -> str:
    """The id of an array's task; without an index, the id itself."""
    return job_id if index is None else f"{job_id}_{index}"


def expand(job_id: str) -> list[str]:
    """The ids of the tasks that a line stands for; squeue cuts a long list off with `...`, which names none."""
    array, _, tasks = job_id.partition("_")
    if not tasks.startswith("["):
        return [job_id]
    spans = tasks.strip("[]").partition("%")[0].split(",")
    return [f"{array}_{index}" for span in spans if span[:1].isdigit() for index in _indices(span)]


def _indices(span: str) -> range:
    ends, _, step = span.partition(":")
    first, _, last = ends.partition("-")
    return range(int(first), int(last or first) + 1, int(step or 1))


def lists(job_ids: Iterable[str]) -> Iterator[str]:
    """The jobs and arrays of these ids, each once, as few comma-separated arguments as it takes."""
    pending: list[str] = []
    length = 0
    for job_id in dict.fromkeys(base(job_id) for job_id in job_ids):
        if length + len(job_id) >= LONGEST:
            yield ",".join(pending)
            pending, length = [], 0
        pending.append(job_id)
        length += len(job_id) + 1
    if pending:
        yield ",".join(pending)
