"""Places where tests kill the process, to see what a crash just there leaves behind."""

from __future__ import annotations

import os
import signal

VARIABLE = "TFSLURM_FAULT"


def fault_above(name: str, size: int) -> bool:
    """Whether the environment's TFSLURM_FAULT is `name:LIMIT`, and `size` is above the limit: what only fails there."""
    wanted, _, limit = os.environ.get(VARIABLE, "").partition(":")
    return wanted == name and size > int(limit)


def fault_point(name: str) -> None:
    """Die at once, as by kill -9, if the environment's TFSLURM_FAULT is `name`; else do nothing."""
    if os.environ.get(VARIABLE) == name:
        os.kill(os.getpid(), signal.SIGKILL)
