"""What Slurm's job states mean. https://slurm.schedmd.com/squeue.html#SECTION_JOB-STATE-CODES"""

from __future__ import annotations

import warnings
from enum import Enum


class Fate(Enum):
    """What became of a submission, in the words that matter to its owner."""

    WAITING = "waiting"
    HELD = "held"
    ACTIVE = "active"
    COMPLETED = "completed"
    FAILED = "failed"
    OUT_OF_MEMORY = "out of memory"
    TIMEOUT = "ran into its time limit"
    CANCELLED = "cancelled"
    INFRASTRUCTURE = "lost its node"
    PREEMPTED = "preempted"
    LOST = "lost"
    UNKNOWN = "unknown"

    @property
    def ended(self) -> bool:
        """Nothing more will happen to it; unknown and preempted are not such ends."""
        return self in ENDED


ENDED = frozenset(
    {
        Fate.COMPLETED,
        Fate.FAILED,
        Fate.OUT_OF_MEMORY,
        Fate.TIMEOUT,
        Fate.CANCELLED,
        Fate.INFRASTRUCTURE,
        Fate.LOST,
    }
)

STATES = {
    **dict.fromkeys("PENDING CONFIGURING POWER_UP_NODE REQUEUED REQUEUE_FED".split(), Fate.WAITING),
    **dict.fromkeys("REQUEUE_HOLD SPECIAL_EXIT RESV_DEL_HOLD".split(), Fate.HELD),
    **dict.fromkeys("RUNNING COMPLETING SIGNALING STAGE_OUT RESIZING UPDATE_DB SUSPENDED STOPPED".split(), Fate.ACTIVE),
    "COMPLETED": Fate.COMPLETED,
    "FAILED": Fate.FAILED,
    "REVOKED": Fate.FAILED,
    "OUT_OF_MEMORY": Fate.OUT_OF_MEMORY,
    "TIMEOUT": Fate.TIMEOUT,
    "DEADLINE": Fate.TIMEOUT,
    "CANCELLED": Fate.CANCELLED,
    **dict.fromkeys("NODE_FAIL BOOT_FAIL LAUNCH_FAILED RECONFIG_FAIL".split(), Fate.INFRASTRUCTURE),
    "PREEMPTED": Fate.PREEMPTED,
}


def fate(state: str) -> Fate:
    """The fate that a state of squeue or sacct means: "CANCELLED by 1000" and "COMPLETED+" are understood.

    A state that is not known here is UNKNOWN, with a warning: it never counts as an end.
    """
    words = state.split()
    word = words[0].rstrip("+") if words else ""
    if word not in STATES:
        warnings.warn(f"Slurm reports the job state {state!r}, which is not known here", stacklevel=2)
    return STATES.get(word, Fate.UNKNOWN)
