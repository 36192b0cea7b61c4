"""Put examples of different lengths into as few micro-batches as fit."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: bins of indexes into `lengths`, each of at most `capacity` tokens.

    An item longer than `capacity` gets a bin of its own, since examples are never split. Needs
    at most 11/9 of the optimum's bins, and 6/9 of a bin (Dósa 2007); O(n log n) comparisons.
    Ties are broken by index, so that the result depends on the lengths alone.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []
    for item in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        fitting = bisect_left(room, (lengths[item], -1))
        if fitting < len(room):
            left, chosen = room.pop(fitting)
        else:
            left, chosen = max(capacity, lengths[item]), len(bins)
            bins.append([])
        bins[chosen].append(item)
        insort(room, (left - lengths[item], chosen))
    return bins


def pack_evenly(lengths: Sequence[int], capacity: int, ranks: int) -> list[list[int]]:
    """Bins for `ranks` processes that take the same number of bins each, heaviest first.

    As few rounds as `capacity` allows; within them the load is spread by the smallest capacity
    that still fits, so that no process waits for another with everything. The number of bins is a
    multiple of `ranks`: the missing ones are empty.
    """
    bins = pack(lengths, capacity)
    slots = -(-len(bins) // ranks) * ranks
    if ranks > 1:
        bins = _tightest(lengths, capacity, slots)
    loads = [sum(lengths[index] for index in items) for items in bins]
    order = sorted(range(len(bins)), key=lambda number: (-loads[number], number))
    return [bins[number] for number in order] + [[] for _ in range(slots - len(bins))]


def _tightest(lengths: Sequence[int], capacity: int, slots: int) -> list[list[int]]:
    """Packs into at most `slots` bins with (nearly) the smallest capacity that does it."""
    low, high = max(max(lengths), -(-sum(lengths) // slots)), max(capacity, max(lengths))
    best = pack(lengths, capacity)
    while low < high:
        middle = (low + high) // 2
        bins = pack(lengths, middle)
        if len(bins) <= slots:
            best, high = bins, middle
        else:
            low = middle + 1
    return best
