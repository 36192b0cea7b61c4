from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfslurm.training.plan import Plan, make_plan


def plan(count=23, *, world=1, batch=7, epochs=2, seed=0, capacity=50):
    lengths = np.random.default_rng(5).integers(2, 40, count)
    return make_plan(
        np.arange(count) * 2,
        lengths,
        lengths - 1,
        epochs=epochs,
        batch=batch,
        world_size=world,
        capacity=capacity,
        seed=seed,
    )


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_batch_of_seven_is_seven_on_any_number_of_ranks(world):
    made = plan(world=world)
    sizes = [len(made.examples_of(step)) for step in range(made.steps)]
    assert sizes == [7, 7, 7, 2] * 2


@pytest.mark.parametrize("world", [2, 3, 5])
def test_which_examples_a_step_takes_does_not_depend_on_the_ranks(world):
    one, many = plan(world=1), plan(world=world)
    assert one.steps == many.steps
    for step in range(one.steps):
        assert sorted(one.examples_of(step)) == sorted(many.examples_of(step))
    assert (one.tokens == many.tokens).all() and (one.supervised == many.supervised).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 12), st.integers(1, 3))
def test_every_example_is_taken_once_an_epoch_and_all_ranks_take_as_many_micro_steps(count, world, batch, epochs):
    made = plan(count, world=world, batch=batch, epochs=epochs)
    for epoch in range(1, epochs + 1):
        steps = np.flatnonzero(made.epoch == epoch)
        assert sorted(np.concatenate([made.examples_of(step) for step in steps])) == list(range(0, 2 * count, 2))
    for step in range(made.steps):
        parts = [made.micro_batches(step, rank) for rank in range(world)]
        assert len({len(part) for part in parts}) == 1
        assert sorted(np.concatenate([b for part in parts for b in part])) == sorted(made.examples_of(step))


def test_a_micro_batch_keeps_to_its_capacity():
    lengths = dict(zip(range(0, 46, 2), np.random.default_rng(5).integers(2, 40, 23).tolist(), strict=True))
    made = plan(world=2)
    for step in range(made.steps):
        for rank in range(2):
            assert all(sum(lengths[e] for e in batch.tolist()) <= 50 for batch in made.micro_batches(step, rank))


def test_tokens_and_supervised_tokens_are_those_of_the_steps_examples():
    lengths = np.random.default_rng(5).integers(2, 40, 23)
    made = plan()
    for step in range(made.steps):
        taken = lengths[made.examples_of(step) // 2]
        assert made.tokens[step] == taken.sum() and made.supervised[step] == (taken - 1).sum()


def test_epochs_and_seeds_order_the_examples_differently_and_the_same_seed_alike():
    made = plan()
    assert sorted(made.examples_of(0)) != sorted(made.examples_of(4))
    assert sorted(made.examples_of(0)) != sorted(plan(seed=1).examples_of(0))
    assert (made.examples == plan().examples).all()


def test_a_plan_survives_saving(tmp_path):
    made = plan(world=2)
    made.save(tmp_path / "plan.npz")
    loaded = Plan.load(tmp_path / "plan.npz")
    assert loaded.world_size == 2 and (loaded.examples == made.examples).all()
    assert [p.name for p in tmp_path.iterdir()] == ["plan.npz"]
