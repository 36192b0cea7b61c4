"""Handing a script over in spite of a Slurm that answers late, not at all, or not yet.

An sbatch that failed may have succeeded: its answer may be what was lost. So after every failure that leaves this
open Slurm is asked for the job by its name, which is a uuid, before anything is submitted again. What a controller
takes even later than that is a second job of the same name: the batch script's claim lets only one of them run.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

from tfslurm.settings import Settings
from tfslurm.slurm.client import SlurmMissing, SlurmUnreachable
from tfslurm.slurm.executors import Handed, Launcher

TRIES = 5
FIRST_DELAY = 0.25
LONGEST_DELAY = 4.0


def longest(settings: Settings) -> float:
    """Seconds after which nobody who began to hand a submission over is still at it."""
    return 3 * settings.site.slurm.command_timeout + 2 * LONGEST_DELAY


def hand(
    launcher: Launcher, script: Path, name: str, *, patience: float, sleep: Callable[[float], object] = time.sleep
) -> Handed:
    """Submit the script of this name once, or find that it was; nothing is submitted again after `patience` seconds.

    Raises SlurmRefused at once where Slurm says no, SlurmUnreachable where it stays open whether it was taken.
    """
    until = time.monotonic() + patience
    failure = None
    for attempt in range(TRIES):
        try:
            if failure is not None:
                sleep(_delay(attempt))
                taken = launcher.find(name)
                if taken:
                    return taken[0]
                if time.monotonic() > until:
                    break
            return launcher.submit(script)
        except SlurmMissing:
            raise
        except SlurmUnreachable as error:
            late = failure is not None and time.monotonic() > until
            failure = error
            if late:
                break
    hint = "It is written down: `tfslurm sync` finds out whether Slurm took it, and submits it if not."
    raise SlurmUnreachable(failure.message, hint=hint)


def _delay(attempt: int) -> float:
    """Exponential, with jitter, so that many submitters do not come back together."""
    return random.uniform(0.5, 1.0) * min(LONGEST_DELAY, FIRST_DELAY * 2**attempt)
