"""The launcher for machines without Slurm: the same script, as a background process."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path


def start(script: Path) -> str:
    """Run the script in a session of its own, which outlives this process; its handle, "pid:ticks"."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    process = subprocess.Popen(
        ["bash", str(script)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=environment,
        cwd="/",
    )
    return handle(process.pid)


def handle(pid: int) -> str:
    """A name for a process that no later process can have: its id and its start, in clock ticks since boot."""
    return f"{pid}:{_start_ticks(pid) or 0}"


def alive(name: str) -> bool:
    """Whether the process of this handle still runs."""
    pid, _, ticks = name.partition(":")
    return _start_ticks(int(pid)) == int(ticks)


def end(name: str, number: signal.Signals) -> None:
    """Signal the script's whole session: all its processes are in one group.

    The group outlives its leader, and as long as it does nobody else gets the leader's id.
    """
    pid = int(name.partition(":")[0])
    if _start_ticks(pid) is not None and not alive(name):
        return  # the id belongs to a stranger by now
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def _start_ticks(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat (proc(5)); None where there is no such process, or only its zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])
