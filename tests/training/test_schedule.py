from __future__ import annotations

import pytest

from tfslurm.training.schedule import learning_rate


def rates(steps, warmup):
    return [learning_rate(step, steps, peak=1.0, warmup_ratio=warmup) for step in range(1, steps + 1)]


def test_the_rate_rises_to_the_peak_and_falls_without_reaching_zero():
    made = rates(100, 0.1)
    assert made.index(max(made)) == 10 and max(made) == 1.0
    assert made[:11] == sorted(made[:11]) and made[10:] == sorted(made[10:], reverse=True)
    assert made[0] > 0 and 0 < made[-1] < 1e-3


def test_without_warm_up_the_first_update_has_the_peak():
    assert rates(10, 0.0)[0] == 1.0


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5, 1.0])
def test_short_runs_still_learn_at_every_step(steps, warmup):
    assert all(0 < rate <= 1 for rate in rates(steps, warmup))
