"""Decide before the first step which examples every step, process and micro-batch takes."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from tfslurm.files import fsync_folder
from tfslurm.training.packing import pack_evenly


@dataclass(frozen=True)
class Plan:
    """The whole run, in flat arrays.

    Step s has micro-steps `micro_offsets[s]:micro_offsets[s+1]`; in micro-step m, process r takes
    `examples[bin_offsets[m·W+r]:bin_offsets[m·W+r+1]]`, where W is `world_size`. An empty slice is
    a padding micro-step: it runs forward and backward with zero loss, so that every process makes
    the same collective calls.
    """

    world_size: int
    capacity: int
    """Tokens a micro-batch; only an example that is longer by itself is more."""
    epoch: np.ndarray
    """int32 [steps], the first epoch being 1."""
    tokens: np.ndarray
    """int64 [steps]: over all processes."""
    supervised: np.ndarray
    """int64 [steps]: what the step's loss is divided by."""
    micro_offsets: np.ndarray
    """int64 [steps + 1]"""
    bin_offsets: np.ndarray
    """int64 [micro-steps · W + 1]"""
    examples: np.ndarray
    """int64: row numbers of the token file"""

    @property
    def steps(self) -> int:
        return len(self.epoch)

    def micro_batches(self, step: int, rank: int) -> list[np.ndarray]:
        """The examples of each micro-step of `step` on process `rank`; step counts from 0."""
        first, last = self.micro_offsets[step], self.micro_offsets[step + 1]
        bins = np.arange(first, last) * self.world_size + rank
        return [self.examples[self.bin_offsets[bin] : self.bin_offsets[bin + 1]] for bin in bins]

    def examples_of(self, step: int) -> np.ndarray:
        """All examples of `step`, over all processes."""
        first, last = self.micro_offsets[step : step + 2] * self.world_size
        return self.examples[self.bin_offsets[first] : self.bin_offsets[last]]

    def save(self, path: Path) -> None:
        """Write atomically: a reader sees the old plan or the new one."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with open(temporary, "wb") as file:
            np.savez(file, **{field.name: getattr(self, field.name) for field in fields(self)})
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
        fsync_folder(path.parent)

    @classmethod
    def load(cls, path: Path) -> Plan:
        with np.load(path, allow_pickle=False) as arrays:
            values = {field.name: arrays[field.name] for field in fields(cls)}
        return cls(**values | {name: int(values[name]) for name in ("world_size", "capacity")})

    def repacked(self, lengths: np.ndarray, capacity: int) -> Plan:
        """The same steps of the same examples, in micro-batches of at most `capacity` tokens.

        `lengths` are those of all rows of the token file, after truncation; int64 [rows].
        """
        bins, counts = [], []
        for step in range(self.steps):
            chosen = self.examples_of(step)
            packed = pack_evenly(lengths[chosen].tolist(), capacity, self.world_size)
            bins += [chosen[items] for items in packed]
            counts.append(len(packed) // self.world_size)
        return replace(
            self,
            capacity=capacity,
            micro_offsets=_offsets(counts),
            bin_offsets=_offsets([len(items) for items in bins]),
            examples=np.concatenate(bins).astype(np.int64),
        )


def make_plan(
    kept: np.ndarray,
    lengths: np.ndarray,
    supervised: np.ndarray,
    *,
    epochs: int,
    batch: int,
    world_size: int,
    capacity: int,
    seed: int,
) -> Plan:
    """Plan `epochs` passes over the examples `kept`, `batch` of them a step.

    Args:
        kept: row numbers of the examples that take part, ascending.
        lengths: tokens of each of them, after truncation, int64 [len(kept)].
        supervised: tokens that carry loss, of each of them, int64 [len(kept)].
        capacity: tokens a micro-batch; a longer example is a micro-batch of its own.

    The order of an epoch is a permutation seeded by (seed, epoch): which examples a step takes
    does not depend on the number of processes. Every step takes exactly `batch` examples, but for
    the last step of an epoch, which takes the rest.
    """
    epoch_of, bins, counts = [], [], []
    for epoch in range(1, epochs + 1):
        order = np.random.default_rng([seed, epoch]).permutation(len(kept))
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            packed = pack_evenly(lengths[chosen].tolist(), capacity, world_size)
            bins += [chosen[items] for items in packed]
            counts.append(len(packed) // world_size)
            epoch_of.append(epoch)
    flat = np.concatenate(bins).astype(np.int64)
    bin_offsets = _offsets([len(items) for items in bins])
    micro_offsets = _offsets(counts)
    starts = bin_offsets[micro_offsets[:-1] * world_size]
    return Plan(
        world_size=world_size,
        capacity=capacity,
        epoch=np.array(epoch_of, dtype=np.int32),
        tokens=np.add.reduceat(lengths[flat], starts),
        supervised=np.add.reduceat(supervised[flat], starts),
        micro_offsets=micro_offsets,
        bin_offsets=bin_offsets,
        examples=kept[flat],
    )


def _offsets(counts: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
