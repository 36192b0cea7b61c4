"""The launcher for machines without Slurm: the same script, as a background process."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

from tfslurm.process import alive, handle, start_ticks


def start(script: Path) -> str:
    """Run the script in a session of its own, which outlives this process; its handle, "pid:ticks"."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    started = subprocess.Popen(
        ["bash", str(script)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=environment,
        cwd="/",
    )
    return handle(started.pid)


def end(name: str, number: signal.Signals) -> None:
    """Signal the script's whole session: all its processes are in one group.

    The group outlives its leader, and as long as it does nobody else gets the leader's id.
    """
    pid = int(name.partition(":")[0])
    if start_ticks(pid) is not None and not alive(name):
        return  # the id belongs to a stranger by now
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        pass
