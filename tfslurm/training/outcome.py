"""What a job says of its end, in `outcome.json`; imports no torch, since `sync` reads it too."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path

import msgspec

from tfslurm.errors import TfslurmError
from tfslurm.files import write_atomic


class FileEntry(msgspec.Struct, frozen=True):
    """Bytes, and SHA-256 in hex."""

    size: int
    sha256: str


class AdapterSummary(msgspec.Struct, frozen=True, kw_only=True):
    """The adapter as it was verified."""

    lora_rank: int
    target_modules: list[str]
    files: dict[str, FileEntry]


class Succeeded(msgspec.Struct, frozen=True, kw_only=True, tag_field="result", tag="succeeded"):
    """`adapter/` is whole and verified. `examples` and `tokens` are over all epochs."""

    steps: int
    final_loss: float
    adapter: AdapterSummary
    examples: int
    tokens: int
    peak_memory_bytes: int


class Stopped(msgspec.Struct, frozen=True, kw_only=True, tag_field="result", tag="stopped"):
    """Someone asked for it; `step` updates had been made, and no adapter is kept."""

    step: int


class Suspended(msgspec.Struct, frozen=True, kw_only=True, tag_field="result", tag="suspended"):
    """Time is up, or the node is wanted back: the state after `step` updates is saved, to go on in another attempt.

    `steps_made` is how many this attempt made itself: one that makes none had better not be repeated for ever.
    """

    step: int
    steps_made: int


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag_field="result", tag="failed"):
    """`error` is one sentence for the job's view."""

    error: str


Outcome = Succeeded | Stopped | Suspended | Failed


def write_outcome(path: Path, outcome: Outcome) -> None:
    write_atomic(path, msgspec.json.format(msgspec.json.encode(outcome), indent=2) + b"\n")


def read_outcome(path: Path) -> Outcome | None:
    """None where there is none: the job runs, or was killed."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Outcome)
    except FileNotFoundError:
        return None


def reporting(path: Path, body: Callable[[], None]) -> int:
    """Run `body`; a failure goes to `path` as a sentence and, where it is unexpected, to the log.

    Returns the exit code. An outcome that another process of the job wrote first is kept: what
    fails first is the cause.
    """
    try:
        body()
    except TfslurmError as error:
        _report(path, str(error))
        print(f"error: {error}", flush=True)
        return error.exit_code
    except Exception as error:
        traceback.print_exc()
        if not _is_witness(error):
            _report(
                path, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else '-'}"
            )
        return 1
    return 0


LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "remote process exited", "Broken pipe")
"""What gloo and NCCL say in the processes that are left when one of a job dies."""


def _is_witness(error: Exception) -> bool:
    """Whether the error only tells that another process is gone: the cause is that one's, and its exit code says it."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in LOST_PEER)


def _report(path: Path, error: str) -> None:
    if not path.exists():
        write_outcome(path, Failed(error=error))
