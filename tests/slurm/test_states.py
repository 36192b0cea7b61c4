import warnings

import pytest

from tfslurm.slurm.states import ENDED, STATES, Fate, fate

EXPECTED = {
    Fate.WAITING: "PENDING CONFIGURING POWER_UP_NODE REQUEUED REQUEUE_FED",
    Fate.HELD: "REQUEUE_HOLD SPECIAL_EXIT RESV_DEL_HOLD",
    Fate.ACTIVE: "RUNNING COMPLETING SIGNALING STAGE_OUT RESIZING UPDATE_DB SUSPENDED STOPPED",
    Fate.COMPLETED: "COMPLETED",
    Fate.CANCELLED: "CANCELLED",
    Fate.FAILED: "FAILED REVOKED",
    Fate.OUT_OF_MEMORY: "OUT_OF_MEMORY",
    Fate.TIMEOUT: "TIMEOUT DEADLINE",
    Fate.INFRASTRUCTURE: "NODE_FAIL BOOT_FAIL LAUNCH_FAILED RECONFIG_FAIL",
    Fate.PREEMPTED: "PREEMPTED",
}
CASES = [(state, expected) for expected, states in EXPECTED.items() for state in states.split()]


@pytest.mark.parametrize(("state", "expected"), CASES)
def test_every_state_of_slurm_has_its_fate(state, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fate(state) is expected
        assert fate(f"{state}+") is expected
        assert fate(f"{state} by 1000") is expected


def test_no_state_is_left_out():
    assert set(STATES) == {state for state, _ in CASES}


@pytest.mark.parametrize("state", ["HIBERNATING", "", "completed", "COMPLETED2"])
def test_an_unknown_state_is_a_warning_and_no_end(state):
    with pytest.warns(UserWarning, match="not known here"):
        assert fate(state) is Fate.UNKNOWN
    assert not Fate.UNKNOWN.ended


def test_only_what_is_final_has_ended():
    assert {f for f in Fate if f.ended} == ENDED
    assert not {Fate.WAITING, Fate.HELD, Fate.ACTIVE, Fate.PREEMPTED, Fate.UNKNOWN} & ENDED
