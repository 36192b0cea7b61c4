from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tfslurm.training.packing import pack, pack_evenly

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=60)


def load(lengths, items):
    return sum(lengths[item] for item in items)


@given(LENGTHS, st.integers(1, 100))
def test_every_item_is_in_one_bin_and_only_an_overlong_one_exceeds_the_capacity(lengths, capacity):
    bins = pack(lengths, capacity)
    assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
    assert all(len(items) == 1 or load(lengths, items) <= capacity for items in bins)


@given(LENGTHS, st.integers(60, 200))
def test_bins_are_within_the_bound_of_best_fit_decreasing(lengths, capacity):
    least = -(-sum(lengths) // capacity)
    assert len(pack(lengths, capacity)) <= max(least * 3 / 2 + 1, 1)


@given(LENGTHS, st.integers(60, 200), st.integers(1, 5))
def test_packing_evenly_gives_every_rank_as_many_bins_and_never_more_rounds(lengths, capacity, ranks):
    bins = pack_evenly(lengths, capacity, ranks)
    assert len(bins) % ranks == 0
    assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
    assert all(load(lengths, items) <= capacity for items in bins)
    assert len(bins) // ranks == -(-len(pack(lengths, capacity)) // ranks)


def test_a_batch_that_would_fit_one_bin_is_still_spread_over_the_ranks():
    assert sorted(map(len, pack_evenly([10, 10, 10, 10], 100, 2))) == [2, 2]


def test_ranks_without_an_example_get_an_empty_bin():
    assert pack_evenly([10], 100, 3) == [[0], [], []]


def test_best_fit_fills_the_tightest_gap():
    assert pack([7, 6, 4, 3], 10) == [[0, 3], [1, 2]]
