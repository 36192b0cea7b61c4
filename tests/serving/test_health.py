from __future__ import annotations

import pytest

from tfslurm.serving.health import Health, Observation, Restarts, Status
from tfslurm.serving.pace import Pace

PACE = Pace(failures=3, start_timeout=100, steady=600, restarts=2, first_restarts=1, backoff=2, backoff_limit=5)
ANSWER = Observation(answered=True)
SILENCE = Observation(answered=False, reason="not answered in 30 s")
BUSY = Observation(answered=False, progressed=True, reason="not answered in 30 s")


def after(*seen: Observation, began: float = 0.0) -> Health:
    """The health after one observation every 10 s."""
    health = Health(began=began)
    for index, observation in enumerate(seen, start=1):
        health = health.after(observation, began + 10 * index, PACE)
    return health


def test_an_engine_is_healthy_with_its_first_answer() -> None:
    assert after(ANSWER) == Health(0.0, Status.HEALTHY, healthy_since=10.0)


def test_it_stays_healthy_since_the_first_of_its_answers() -> None:
    assert after(ANSWER, ANSWER, ANSWER).healthy_since == 10.0


def test_failures_do_not_count_while_it_starts() -> None:
    health = after(*[SILENCE] * 9)
    assert (health.status, health.failures, health.dead) == (Status.STARTING, 0, None)
    assert health.reason == "not answered in 30 s"


def test_a_start_takes_only_so_long() -> None:
    health = after(SILENCE)
    assert health.at(100.0, PACE).dead is None
    assert health.at(100.1, PACE).dead == "it was not ready 100 s after its start (not answered in 30 s)"
    assert after(*[SILENCE] * 11).dead


def test_one_failure_makes_it_unhealthy_and_one_answer_healthy_again() -> None:
    health = after(ANSWER, SILENCE)
    assert (health.status, health.reason, health.dead) == (Status.UNHEALTHY, "not answered in 30 s", None)
    assert after(ANSWER, SILENCE, SILENCE, ANSWER, SILENCE).failures == 1
    assert after(ANSWER, SILENCE, ANSWER).status is Status.HEALTHY


def test_three_failures_in_a_row_make_it_dead() -> None:
    assert after(ANSWER, SILENCE, SILENCE).dead is None
    assert after(ANSWER, SILENCE, SILENCE, SILENCE).dead == "3 probes in a row failed: not answered in 30 s"


def test_a_busy_engine_is_left_alone() -> None:
    health = after(ANSWER, *[BUSY] * 50)
    assert (health.status, health.dead) == (Status.HEALTHY, None)
    assert health.reason is not None and health.reason.startswith("busy: ")


def test_progress_forgives_earlier_failures_but_only_an_answer_makes_healthy() -> None:
    health = after(ANSWER, SILENCE, SILENCE, BUSY, SILENCE, SILENCE)
    assert (health.status, health.failures, health.dead) == (Status.UNHEALTHY, 2, None)


def test_an_engine_that_never_was_healthy_gets_fewer_restarts() -> None:
    once = Restarts().after(Health(0.0), 10.0, PACE)
    assert once == Restarts(total=1, in_a_row=1)
    assert once.after(Health(0.0), 20.0, PACE) is None


def test_restarts_in_a_row_are_bounded() -> None:
    restarts: Restarts | None = Restarts()
    for expected in (1, 2):
        restarts = restarts.after(after(ANSWER), 20.0, PACE)
        assert restarts == Restarts(expected, expected, ever_healthy=True)
    assert restarts.after(Health(0.0), 20.0, PACE) is None


def test_a_steady_engine_has_its_restarts_forgotten() -> None:
    worn = Restarts(total=7, in_a_row=2, ever_healthy=True)
    assert worn.after(after(ANSWER), 10.0 + 599, PACE) is None
    assert worn.after(after(ANSWER), 10.0 + 600, PACE) == Restarts(total=8, in_a_row=1, ever_healthy=True)


@pytest.mark.parametrize(("in_a_row", "seconds"), [(0, 0.0), (1, 2.0), (2, 4.0), (3, 5.0), (60, 5.0)])
def test_the_wait_before_a_start_doubles_up_to_a_limit(in_a_row: int, seconds: float) -> None:
    assert Restarts(in_a_row=in_a_row).delay(PACE) == seconds
