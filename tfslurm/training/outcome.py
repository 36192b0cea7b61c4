"""What a job says of an attempt's end, in `outcome.json`; imports no torch, since `sync` reads it too."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path

import msgspec

from tfslurm.errors import TfslurmError
from tfslurm.files import write_atomic
from tfslurm.paths import JobPaths

SUSPENDED = os.EX_TEMPFAIL
"""The trainer's exit code when it saved a state to go on from."""

NO_PROGRESS = 76
"""The trainer's exit code when it had to leave before it had anything to save."""


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
    """`adapter/` is whole and verified. `examples` and `tokens` are over all epochs.

    Where there were validation rows, the adapter is that of `best_step`, with `validation_loss` on them;
    `final_validation_loss` is that after the last step. Else the adapter is that of the last step.
    """

    steps: int
    final_loss: float
    """Of the last step."""
    validation_loss: float | None = None
    best_step: int | None = None
    final_validation_loss: float | None = None
    adapter: AdapterSummary
    examples: int
    tokens: int
    peak_memory_bytes: int
    attempt: int = 0


class Stopped(msgspec.Struct, frozen=True, kw_only=True, tag_field="result", tag="stopped"):
    """Someone asked for it; `step` updates had been made, and no adapter is kept."""

    step: int
    attempt: int = 0


class Suspended(msgspec.Struct, frozen=True, kw_only=True, tag_field="result", tag="suspended"):
    """Time is up, or the node is wanted back: the state after `step` updates is saved, to go on in another attempt.

    `steps_made` is how many this attempt made itself: one that makes none had better not be repeated for ever.
    """

    step: int
    steps_made: int
    attempt: int = 0


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag_field="result", tag="failed"):
    """`error` is one sentence for the job's view."""

    error: str
    attempt: int = 0


Outcome = Succeeded | Stopped | Suspended | Failed


def write_outcome(path: Path, outcome: Outcome) -> None:
    write_atomic(path, msgspec.json.format(msgspec.json.encode(outcome), indent=2) + b"\n")


def read_outcome(path: Path) -> Outcome | None:
    """None where there is none: the job runs, or was killed."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Outcome)
    except FileNotFoundError:
        return None


def has_succeeded(paths: JobPaths) -> bool:
    """Whether an earlier attempt came to its end, and its node died only afterwards."""
    try:
        return isinstance(read_outcome(paths.outcome), Succeeded) and paths.adapter.is_dir()
    except msgspec.MsgspecError:
        return False  # whatever it says, no trainer of ours wrote it


def reporting(path: Path, body: Callable[[], int], *, attempt: int = 0, log: Path | None = None) -> int:
    """Run `body`, and return its exit code; a failure goes to `path` as a sentence and, if unexpected, to the log.

    An outcome that another process of the job wrote first is kept: what fails first is the cause. `log` is named
    there, where this process has one of its own.
    """
    try:
        return body()
    except TfslurmError as error:
        _report(path, str(error), attempt, log)
        print(f"error: {error}", flush=True)
        return error.exit_code
    except Exception as error:
        traceback.print_exc()
        if not is_witness(error):
            said = str(error).strip().splitlines() or ["-"]
            _report(path, f"{type(error).__name__}: {said[0]}", attempt, log)
        return 1


LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "remote process exited", "Broken pipe")
"""What gloo and NCCL say in the processes that are left when one of a job dies."""


def is_witness(error: Exception) -> bool:
    """Whether the error only tells that another process is gone: the cause is that one's, and its exit code says it."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in LOST_PEER)


def _report(path: Path, error: str, attempt: int, log: Path | None) -> None:
    if not path.exists():
        where = f"\nsee {log.parent.name}/{log.name}" if log else ""
        write_outcome(path, Failed(error=error + where, attempt=attempt))
