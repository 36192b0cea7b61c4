"""Why a job waits, where Slurm's own word does not say what to do. https://slurm.schedmd.com/job_reason_codes.html"""

from __future__ import annotations

from tfslurm.slurm.states import Fate

HELD_STATES = {
    "REQUEUE_HOLD": "it was started again and is held",
    "SPECIAL_EXIT": "it was started again after a special exit and is held",
    "RESV_DEL_HOLD": "its reservation was deleted, and it is held",
}

NEVER = {
    "DependencyNeverSatisfied": "what it depends on has failed: it never starts",
    "PartitionTimeLimit": "it asks for more time than its partition allows: it never starts",
    "PartitionNodeLimit": "it asks for more nodes than its partition allows: it never starts",
    "BadConstraints": "no node can be what it asks for: it never starts",
    "InvalidAccount": "its account is not valid any more",
    "InvalidQOS": "its QOS is not valid any more",
    "ReservationDeleted": "its reservation was deleted",
    "JobHeldUser": "it is held",
    "JobHeldAdmin": "an administrator holds it",
    "JobHoldMaxRequeue": "it was started again too often and is held",
    "job requeued in held state": "it was started again and is held",
    "job requeued in special exit state": "it was started again after a special exit and is held",
    "launch failed requeued held": "it could not be launched and is held",
    "launch_failure_limit_exceeded_requeued_held": "it could not be launched and is held",
    "JobLaunchFailure": "it could not be launched",
}

EXPLAINED = {
    "BeginTime": "not before its begin time: after a restart Slurm makes a job wait for some minutes",
    "ReqNodeNotAvail": "nodes that it needs are down, drained or reserved for maintenance",
    "PartitionDown": "its partition is down",
    "PartitionInactive": "its partition is inactive",
}

WAITS = frozenset(
    "None Priority Resources Dependency BeginTime JobArrayTaskLimit Licenses Prolog Reservation NonZeroExitCode "
    "JobHeldUser JobHeldAdmin Cleaning".split()
)
"""What accounting goes on to tell of jobs that have ended: why they waited, and NonZeroExitCode, which says nothing."""


def explain(job_id: str, state: str, reason: str, fate: Fate) -> tuple[Fate, str]:
    """What a waiting job's state and reason mean: HELD where somebody has to do something, and Slurm's word for it.

    The word comes first, then what it means and, for one that is held, how it goes on.
    """
    if fate.ended:
        return fate, "" if reason in WAITS or reason.startswith(("Assoc", "QOS")) else reason
    word = reason.partition(",")[0].strip()
    if state in HELD_STATES:
        return Fate.HELD, f"{state}: {HELD_STATES[state]}; `scontrol release {job_id}` lets it go on"
    if fate is Fate.WAITING and word in NEVER:
        release = f"; `scontrol release {job_id}` lets it go on" if "held" in NEVER[word] else ""
        return Fate.HELD, f"{reason}: {NEVER[word]}{release}"
    if fate is Fate.WAITING and word in EXPLAINED:
        return fate, f"{reason}: {EXPLAINED[word]}"
    return fate, "" if reason == "None" else reason
