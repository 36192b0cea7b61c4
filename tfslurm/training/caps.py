"""How many tokens a process takes at once, where as many as configured did not fit; remembered beside the job."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from tfslurm.errors import InvalidError
from tfslurm.faults import fault_above
from tfslurm.files import write_atomic
from tfslurm.training.progress import now

if TYPE_CHECKING:
    from tfslurm.training.batches import MicroBatch

SHARE = 0.8
"""Of what did not fit, what is tried next."""

MOST = 6
"""How often a job's cap is lowered: to about a quarter."""

HINT = (
    "start it with a smaller --max-seq-length, on an instance with more memory a GPU, or have the site set "
    "training.trainer.gradient_checkpointing or zero_stage 3"
)


class Cap(msgspec.Struct, frozen=True, kw_only=True):
    """`cap.json`: the tokens of a micro-batch, and how often they were lowered to get there."""

    tokens: int
    lowered: int
    at: str = msgspec.field(default_factory=now)


class OutOfMemory(Exception):
    """The device had no room for a micro-batch of `rows` examples, of `tokens` tokens together."""

    def __init__(self, rows: int, tokens: int) -> None:
        super().__init__(f"no memory for {rows} examples of {tokens} tokens")
        self.rows, self.tokens = rows, tokens


@contextmanager
def fitting(batch: MicroBatch) -> Iterator[None]:
    """What needs memory for a micro-batch. Raises OutOfMemory where the device has too little."""
    import torch

    rows, tokens = len(batch.bounds) - 1, batch.input_ids.shape[1]
    try:
        if fault_above("out-of-memory", tokens):
            raise torch.OutOfMemoryError("injected")
        yield
    except torch.OutOfMemoryError as error:
        print(f"out of memory, for a micro-batch of {rows} rows with {tokens:,} tokens: {error}", flush=True)
        raise OutOfMemory(rows, tokens) from error


def read(path: Path) -> Cap | None:
    """None where everything fitted so far."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Cap)
    except FileNotFoundError:
        return None


def capacity(path: Path, configured: int) -> int:
    """The cap in force."""
    cap = read(path)
    return min(configured, cap.tokens) if cap else configured


def lowered(cap: Cap | None) -> int:
    """How often it was lowered so far."""
    return cap.lowered if cap else 0


def lower(path: Path, failed: OutOfMemory, before: Cap | None, capacity: int) -> Cap:
    """Remember a smaller cap than the `capacity` with which a micro-batch failed; `before` was in force then.

    Raises InvalidError where that cannot help: a single example is never split, and only so many times are tried.
    """
    if failed.rows == 1:
        raise InvalidError(f"a single row of {failed.tokens:,} tokens does not fit into memory", hint=HINT)
    times = lowered(before)
    if times >= MOST:
        raise InvalidError(
            f"memory ran out again, after the tokens a micro-batch were lowered {times} times, to {capacity:,}",
            hint=HINT,
        )
    cap = Cap(tokens=max(1, int(SHARE * min(failed.tokens, capacity))), lowered=times + 1)
    write_atomic(path, msgspec.json.encode(cap) + b"\n")
    return cap
