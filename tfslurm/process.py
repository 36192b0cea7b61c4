"""Handles of processes: a name that no later process can have."""

from __future__ import annotations

from pathlib import Path


def handle(pid: int) -> str:
    """`pid:ticks`: its id and its start, in clock ticks since boot."""
    return f"{pid}:{start_ticks(pid) or 0}"


def alive(name: str) -> bool:
    """Whether the process of this handle still runs, on this host."""
    pid, _, ticks = name.partition(":")
    return start_ticks(int(pid)) == int(ticks)


def start_ticks(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat (proc(5)); None where there is no such process, or only its zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])
